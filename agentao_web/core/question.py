"""A question to a person: may a tool run, what does the user want, are more steps wanted."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import types
import typing as t

from agentao_web.core.errors import InvalidRequest
from agentao_web.core.log import Draft

#: How a question may be closed.
OUTCOMES: t.Final = ("approved", "denied", "answered", "expired", "cancelled")

#: How long a free answer may be, in characters, and how many choices it may name.
MAX_ANSWER: t.Final = 32_768
MAX_CHOICES: t.Final = 64

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


def cancelled(question: Question, by: str = "turn_ended") -> Question:
    """*question* as it is closed when its turn does not wait for it any more."""
    return dataclasses.replace(question, outcome="cancelled", by=by)


def closed(question: Question) -> Draft:
    """The event that says how *question* was closed."""
    data = {"question_id": question.id, "outcome": question.outcome, "by": question.by}
    remember = question.answer.get("remember")
    return Draft("question_closed", {**data, "remember": remember} if remember else data)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a client answered: ``approve`` a tool (or not), or an ``answer`` in words."""

    approve: bool | None = None
    answer: str | tuple[str, ...] | None = None
    """Several only where the question takes ``multiple``."""
    remember: t.Literal["turn", "session"] | None = None


def closing(question: Question, reply: Reply) -> tuple[str, dict[str, t.Any]]:
    """The outcome *reply* gives *question*, and what is kept of it.

    InvalidRequest if it does not answer what was asked.
    """
    if question.kind == "tool_confirmation":
        return _approval(question, reply)
    if reply.answer is None:
        raise InvalidRequest("this question takes an answer in words", field="answer")
    if reply.remember is not None:
        raise InvalidRequest("only an approval can be remembered", field="remember")
    return "answered", {"answer": _in_words(question.data, reply.answer)}


def _approval(question: Question, reply: Reply) -> tuple[str, dict[str, t.Any]]:
    if reply.approve is None:
        raise InvalidRequest("this question takes approve: true or false", field="approve")
    if reply.remember is None:
        return ("approved" if reply.approve else "denied"), {}
    if not reply.approve:
        raise InvalidRequest("only an approval can be remembered", field="remember")
    if reply.remember not in question.data.get("remember", ()):
        raise InvalidRequest("this approval is for one call only", field="remember")
    return "approved", {"remember": reply.remember}


def _in_words(asked: cabc.Mapping[str, t.Any], answer: str | tuple[str, ...]) -> str:
    """One text for the model, of one answer or of several."""
    options = asked.get("options") or []
    if not isinstance(answer, str) and not asked.get("multiple"):
        raise InvalidRequest("this question takes one answer, a string", field="answer")
    words = [answer] if isinstance(answer, str) else list(answer)
    if options and not asked.get("allow_custom", True):
        for word in words:
            if word not in options:
                raise InvalidRequest(
                    "the answer must be one of the options", field="answer", options=options
                )
    return ", ".join(words)
