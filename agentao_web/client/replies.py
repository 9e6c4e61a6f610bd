"""How a turn ended, and what a person answers to its questions."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

from agentao_web.client.events import End
from agentao_web.client.events import Failed


@dataclasses.dataclass(frozen=True)
class Reply:
    """How a turn ended."""

    text: str
    """The last answer; also of a turn that was stopped in the middle of it."""
    status: str
    """completed, incomplete, cancelled, timed_out or failed."""
    reason: str | None
    usage: cabc.Mapping[str, int]
    tool_count: int
    duration: float
    """Seconds."""
    turn_id: str
    cursor: int | None
    """The log up to here is read."""
    error: cabc.Mapping[str, t.Any] | None = None
    """code, message, details of a turn that failed."""

    @property
    def ok(self) -> bool:
        """Whether the turn completed."""
        return self.status == "completed"


def reply(end: End, turn_id: str, cursor: int | None) -> Reply:
    """What *end*, the last event of a turn, says."""
    return Reply(
        text=end.reply,
        status=end.status or ("failed" if isinstance(end, Failed) else "completed"),
        reason=end.reason,
        usage=end.usage,
        tool_count=end.tool_count,
        duration=end.duration_ms / 1000,
        turn_id=turn_id,
        cursor=cursor,
        error=end.error if isinstance(end, Failed) else None,
    )


@dataclasses.dataclass(frozen=True)
class Approve:
    """An approval that holds on: for the rest of the ``turn``, or for the ``session``."""

    remember: t.Literal["turn", "session"] | None = None


Answer = bool | str | cabc.Sequence[str] | Approve | None
"""What ``on_question`` gives back. None leaves the question to somebody else."""


def as_answer(question_id: str, answer: Answer) -> dict[str, t.Any]:
    """The body of ``POST /chat/<sid>/answer``."""
    body: dict[str, t.Any] = {"question_id": question_id}
    if isinstance(answer, Approve):
        body["approve"] = True
        if answer.remember is not None:
            body["remember"] = answer.remember
    elif isinstance(answer, bool):
        body["approve"] = answer
    elif isinstance(answer, str):
        body["answer"] = answer
    else:
        body["answer"] = list(answer or ())
    return body
