"""What an agent is built anew from, after it was put out of memory or its worker died."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

from agentao_web.core.question import Question


@dataclasses.dataclass(frozen=True)
class History:
    """What the model gets. ``epoch`` grows when the past was rewritten (a compaction)."""

    messages: list[dict[str, t.Any]]
    epoch: int = 0
    version: int = 0
    state: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    """What else the agent itself keeps, as its ``state()`` gave it: JSON."""
    approved: tuple[Question, ...] = ()
    """Approvals that were to be remembered for the session, oldest first."""
