"""What is made of what a person types, and of nobody being there."""

from __future__ import annotations

import typing as t

import pytest

from agentao_web.client import Approve
from agentao_web.client import AskUser
from agentao_web.client import ToolConfirmation
from agentao_web.client.events import event
from agentao_web.client.replies import as_answer
from agentao_web.terminal import questions
from agentao_web.terminal.screen import Screen


def choice(*options: str, **more: t.Any) -> AskUser:
    data = {"question_id": "q", "question": "Which?", "options": list(options) or None, **more}
    return AskUser(1, "t", "ask_user_requested", data, 0.0)


@pytest.mark.parametrize(
    ("question", "said", "answer"),
    [
        (choice("red", "blue"), "2", "blue"),
        (choice("red", "blue"), " green ", "green"),
        (choice("red", "blue"), "3", "3"),
        (choice("red", "blue"), "0", "0"),
        (choice("red", "blue", allow_custom=False), "green", None),
        (choice("red", "blue", allow_custom=False), "1", "red"),
        (choice("red", "blue", multiple=True), "1, 2", ["red", "blue"]),
        (choice("red", "blue", multiple=True, allow_custom=False), "1, green", None),
        (choice(), "any, thing", "any, thing"),
        (choice(multiple=True), "any, thing", ["any, thing"]),
        (choice(), "  ", None),
        (choice("red"), "²", "²"),
    ],
)
def test_options_by_number_or_text(question: AskUser, said: str, answer: t.Any) -> None:
    assert questions.chosen_of(question, said) == answer


def test_it_asks_until_it_is_an_answer() -> None:
    said = ["", "green", "2"]
    question = choice("red", "blue", allow_custom=False)
    assert questions.ask(question, Screen(), lambda prompt: said.pop(0)) == "blue"


@pytest.mark.parametrize(
    ("remember", "keys", "answer"),
    [
        (["turn", "session"], ["t"], Approve("turn")),
        (["turn", "session"], ["S"], Approve("session")),
        ([], ["s", "t", "n"], False),
        (["session"], ["t", "yes"], True),
    ],
)
def test_only_what_is_offered_can_be_remembered(
    remember: list[str], keys: list[str], answer: t.Any
) -> None:
    data = {"question_id": "q", "tool": "x", "args": {}, "remember": remember}
    question = ToolConfirmation(1, "t", "tool_confirmation", data, 0.0)
    prompts: list[str] = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return keys.pop(0)

    assert questions.ask(question, Screen(), read) == answer
    assert ("[s]ession" in prompts[0], "[t]his" in prompts[0]) == (
        "session" in remember,
        "turn" in remember,
    )


def test_without_a_person_nothing_is_chosen_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    confirm = ToolConfirmation(1, "t", "tool_confirmation", {"question_id": "q", "tool": "x"}, 0.0)
    assert questions.without_a_person(confirm, screen, yes=False) is False
    assert questions.without_a_person(confirm, screen, yes=True) is True
    strict = choice("red", "blue", allow_custom=False)
    assert questions.without_a_person(strict, screen, yes=True) is None
    free = questions.without_a_person(choice("red", multiple=True), screen, yes=False)
    assert isinstance(free, list) and "Nobody" in free[0]
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (True, {"approve": True}),
        (False, {"approve": False}),
        (Approve(), {"approve": True}),
        (Approve("turn"), {"approve": True, "remember": "turn"}),
        ("text", {"answer": "text"}),
        (["a", "b"], {"answer": ["a", "b"]}),
    ],
)
def test_what_goes_to_the_server(answer: t.Any, body: dict[str, t.Any]) -> None:
    assert as_answer("q", answer) == {"question_id": "q", **body}


def test_words_and_notes_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    """In a script the answer, and nothing but the answer, is on standard output."""
    screen = Screen()
    tool = {"call_id": "c", "tool": "look"}
    told: list[tuple[str, dict[str, t.Any]]] = [
        ("thinking", {"text": "hm"}),
        ("llm_text", {"chunk": "one"}),
        ("thinking", {"text": "hm "}),
        ("thinking", {"text": "hm"}),
        ("tool_start", {**tool, "args": {"a": 1}}),
        ("tool_complete", {**tool, "status": "ok", "duration_ms": 3}),
        ("tool_start", {**tool, "args": {}}),
        ("llm_text", {"chunk": "two"}),
        ("tool_complete", {**tool, "status": "error", "duration_ms": 3}),
        ("done", {"status": "cancelled", "reason": "interrupted"}),
    ]
    for n, (kind, data) in enumerate(told):
        screen.show(event({"seq": n, "turn_id": "t", "type": kind, "data": data}))
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert err == (
        "hm\nhm hm\n[look] a=1 ok, 3 ms\n[look]  \n[look] error, 3 ms\n(cancelled: interrupted)\n"
    )
