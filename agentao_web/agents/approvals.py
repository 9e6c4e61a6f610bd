"""What a person need not be asked again: for the rest of a turn, or of the session."""

from __future__ import annotations

import collections.abc as cabc
import json
import typing as t

from agentao_web.core.question import Question

#: Tools whose approval holds for the very same call only, and what of a call does not matter.
_CALL_BY_CALL: t.Final = {"run_shell_command": frozenset({"description"})}

#: What an approval may be remembered for.
SPANS: t.Final = ("turn", "session")


class Approvals:
    """The approvals of one session. Used by the thread of its turn only."""

    def __init__(self, remembered: cabc.Iterable[Question] = ()) -> None:
        self._grants: dict[str, set[str]] = {span: set() for span in SPANS}
        for question in remembered:
            self.add("session", question.data["tool"], question.data["args"])

    def begin(self) -> None:
        """A new turn: what held for the one before is over."""
        self._grants["turn"].clear()

    def add(self, span: str, tool: str, args: t.Any) -> None:
        """A person approved this, for the whole *span*."""
        self._grants[span].add(_grant(tool, args))

    def covers(self, tool: str, args: t.Any) -> str | None:
        """The span of an approval that covers this call, or None."""
        grant = _grant(tool, args)
        return next((span for span in SPANS if grant in self._grants[span]), None)


def rememberable(tool: str, args: t.Any, shown: t.Any) -> bool:
    """Whether an approval of the call, of which *shown* is kept, can be told from another's.

    What is kept is shortened: two long commands may look the same in it.
    """
    return _aside(tool) is None or args == shown


def _grant(tool: str, args: t.Any) -> str:
    aside = _aside(tool)
    if aside is None or not isinstance(args, dict):
        return tool
    call = {name: value for name, value in args.items() if name not in aside}
    return f"{tool} {json.dumps(call, sort_keys=True)}"


def _aside(tool: str) -> frozenset[str] | None:
    # A sub-agent's calls come as "[its name] tool".
    return _CALL_BY_CALL.get(tool.rpartition("] ")[2])
