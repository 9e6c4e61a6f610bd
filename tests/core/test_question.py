"""What answers a question, and what does not."""

from __future__ import annotations

import typing as t

import pytest

from agentao_web.core.errors import InvalidRequest
from agentao_web.core.question import Question
from agentao_web.core.question import Reply
from agentao_web.core.question import cancelled
from agentao_web.core.question import closed
from agentao_web.core.question import closing
from agentao_web.core.question import to_be_remembered


def approval(**data: t.Any) -> Question:
    return Question("q", "t", "tool_confirmation", {"remember": ["turn", "session"], **data}, 1.0)


def words(**data: t.Any) -> Question:
    asked = {"options": [], "multiple": False, "allow_custom": True, **data}
    return Question("q", "t", "ask_user_requested", asked, 1.0)


CHOICE = {"options": ["a", "b"], "allow_custom": False}


@pytest.mark.parametrize(
    ("question", "reply", "outcome", "kept"),
    [
        (approval(), Reply(approve=True), "approved", {}),
        (approval(), Reply(approve=False), "denied", {}),
        (approval(), Reply(True, remember="turn"), "approved", {"remember": "turn"}),
        (approval(), Reply(True, remember="session"), "approved", {"remember": "session"}),
        (approval(remember=[]), Reply(approve=True), "approved", {}),
        (words(), Reply(answer="as I like"), "answered", {"answer": "as I like"}),
        (words(**CHOICE), Reply(answer="b"), "answered", {"answer": "b"}),
        (words(options=["a"]), Reply(answer="none of it"), "answered", {"answer": "none of it"}),
        (words(options=None), Reply(answer="x"), "answered", {"answer": "x"}),
        (words(multiple=True), Reply(answer=("x", "y")), "answered", {"answer": "x, y"}),
        (words(multiple=True), Reply(answer="x"), "answered", {"answer": "x"}),
        (words(multiple=True, **CHOICE), Reply(answer=("b", "a")), "answered", {"answer": "b, a"}),
    ],
)
def test_what_answers_it(
    question: Question, reply: Reply, outcome: str, kept: dict[str, t.Any]
) -> None:
    assert closing(question, reply) == (outcome, kept)


@pytest.mark.parametrize(
    ("question", "reply", "field"),
    [
        (approval(), Reply(answer="yes"), "approve"),
        (approval(), Reply(), "approve"),
        (approval(), Reply(False, remember="turn"), "remember"),
        (approval(), Reply(False, remember="session"), "remember"),
        (approval(remember=[]), Reply(True, remember="turn"), "remember"),
        (approval(remember=[]), Reply(True, remember="session"), "remember"),
        (approval(remember=["turn"]), Reply(True, remember="session"), "remember"),
        (words(), Reply(approve=True), "answer"),
        (words(), Reply(approve=False), "answer"),
        (words(), Reply(answer="x", remember="turn"), "remember"),
        (words(), Reply(answer=("x",)), "answer"),
        (words(**CHOICE), Reply(answer="c"), "answer"),
        (words(**CHOICE), Reply(answer="A"), "answer"),
        (words(**CHOICE), Reply(answer="a, b"), "answer"),
        (words(multiple=True, **CHOICE), Reply(answer=("a", "c")), "answer"),
    ],
)
def test_what_does_not_says_which_field(question: Question, reply: Reply, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        closing(question, reply)
    assert refused.value.details["field"] == field


def test_one_of_before_remember_was_offered_is_for_one_call() -> None:
    question = Question("q", "t", "tool_confirmation", {}, 1.0)
    assert closing(question, Reply(approve=True)) == ("approved", {})
    with pytest.raises(InvalidRequest):
        closing(question, Reply(True, remember="session"))


@pytest.mark.parametrize(
    ("outcome", "answer", "span", "holds"),
    [
        ("approved", {"remember": "session"}, "session", True),
        ("approved", {"remember": "turn"}, "turn", True),
        ("approved", {"remember": "turn"}, "session", False),
        ("approved", {}, "session", False),
        ("denied", {"remember": "session"}, "session", False),
        ("cancelled", {"remember": "session"}, "session", False),
        (None, {"remember": "session"}, "session", False),
    ],
)
def test_only_an_approval_is_remembered(
    outcome: str | None, answer: dict[str, t.Any], span: t.Any, holds: bool
) -> None:
    question = Question("q", "t", "tool_confirmation", {}, 1.0, outcome, "ann", answer)
    assert to_be_remembered(question, span) == holds


def test_how_it_was_closed_does_not_tell_what_was_said() -> None:
    answered = Question("q", "t", "ask_user_requested", {}, 1.0, "answered", "ann", {"answer": "s"})
    told = {"question_id": "q", "outcome": "answered", "by": "ann"}
    assert closed(answered).data == told
    remembered = Question("q", "t", "x", {}, 1.0, "approved", "ann", {"remember": "turn"})
    assert closed(remembered).data == {**told, "outcome": "approved", "remember": "turn"}
    assert closed(cancelled(remembered)).data["outcome"] == "cancelled"
