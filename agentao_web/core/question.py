"""A question to a person: may a tool run, what does the user want, are more steps wanted."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import types
import typing as t

#: Nothing more was said than how a question was closed.
NO_ANSWER: t.Final[cabc.Mapping[str, t.Any]] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Question:
    """Something an agent asked a person; the store's row, not a clock, says whether it is open."""

    id: str
    turn_id: str
    kind: str
    """The type of its event: tool_confirmation or ask_user_requested."""
    data: cabc.Mapping[str, t.Any]
    """As the event has it."""
    expires: float
    outcome: str | None = None
    """approved, denied, answered, expired or cancelled; None while it is open."""
    by: str | None = None
    answer: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    """What was answered, ``remember`` included."""


def to_be_remembered(question: Question, span: t.Literal["turn", "session"] = "session") -> bool:
    """Whether *question* was an approval that holds for the rest of the turn or session."""
    return question.outcome == "approved" and question.answer.get("remember") == span
