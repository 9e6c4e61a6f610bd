"""What is wrong with a deployment, and the line that would cure it.

``machine`` looks at the settings and at this machine, ``proxy`` at a server through whatever
stands before it. Both only look: what they start they remove.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

#: What is said to the server: the demo model talks for two seconds, any other for about as long.
MESSAGE: t.Final = "count to 60"

Level = t.Literal["ok", "hint", "wrong"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """Its name: one of a small set, for scripts."""
    level: Level
    """``wrong``: something does not work, or will not. ``hint``: it works, and could be better."""
    message: str
    cure: str = ""
    """What to change, and where."""


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def hint(check: str, message: str, cure: str = "") -> Finding:
    return Finding(check, "hint", message, cure)


def wrong(check: str, message: str, cure: str = "") -> Finding:
    return Finding(check, "wrong", message, cure)


def lines(findings: cabc.Iterable[Finding]) -> cabc.Iterator[str]:
    """The findings for people."""
    for found in findings:
        yield f"{found.level:5}  {found.check:12}  {found.message}"
        if found.cure:
            yield f"{'':21}{found.cure}"


def as_dict(findings: cabc.Sequence[Finding]) -> dict[str, t.Any]:
    """The findings for programs."""
    return {"ok": all_well(findings), "findings": [dataclasses.asdict(one) for one in findings]}


def all_well(findings: cabc.Iterable[Finding]) -> bool:
    """Whether nothing is wrong; hints do not count."""
    return not any(found.level == "wrong" for found in findings)
