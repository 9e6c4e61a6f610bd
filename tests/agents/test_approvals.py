"""What a remembered approval covers, at the bridge an Agentao asks through."""

from __future__ import annotations

import dataclasses
import typing as t
from types import SimpleNamespace

import pytest
from agentao.transport.confirmation import APPROVAL_UNAVAILABLE
from agentao.transport.confirmation import decline_reason
from agentao.transport.confirmation import gated

from agentao_web.agents.bridge import Bridge
from agentao_web.core.log import Draft
from agentao_web.core.question import Question

SHELL = "run_shell_command"


class Person:
    """A stage whose every question is answered in one way."""

    turn_id = "turn-1234"

    def __init__(self, outcome: str = "approved", remember: str | None = None) -> None:
        self.outcome = outcome
        self.remember = remember
        self.asked: list[dict[str, t.Any]] = []
        self.unasked: list[str] = []

    def publish(self, draft: Draft) -> None: ...
    def on_stop(self, callback: t.Any) -> None: ...
    def stop(self, reason: str) -> None: ...

    def approved(self, data: t.Any, by: str) -> None:
        self.unasked.append(by)

    def ask(self, kind: str, data: t.Any) -> Question:
        self.asked.append(dict(data))
        answer = {"remember": self.remember} if self.remember else {}
        return Question("q", self.turn_id, kind, data, 1.0, self.outcome, "ann", answer)


def bridge(*approved: Question) -> Bridge:
    return Bridge("/ws/a", thinking=False, approved=approved)


def confirm(made: Bridge, tool: str, **args: t.Any) -> bool:
    made.emit(SimpleNamespace(type="tool_confirmation", data={"call_id": "c1", "tool": tool}))
    return made.confirm_tool(tool, f"Runs {tool}.", args)


def remembered(tool: str, **args: t.Any) -> Question:
    data = {"tool": tool, "args": args}
    return Question("q", "t", "tool_confirmation", data, 1.0, "approved", "a", {"remember": "x"})


@pytest.mark.parametrize("span", ["turn", "session"])
def test_a_tool_is_covered_for_the_span(span: str) -> None:
    made, person = bridge(), Person(remember=span)
    made.attach(person)
    assert confirm(made, "write_file", file_path="a")
    assert confirm(made, "write_file", file_path="b")
    assert len(person.asked) == 1
    assert person.unasked == [f"an approval for this {span}"]
    assert confirm(made, "replace", file_path="a")
    assert len(person.asked) == 2, "another tool is asked about"
    made.detach()
    later = Person()
    made.attach(later)
    assert confirm(made, "write_file", file_path="c")
    assert len(later.asked) == (1 if span == "turn" else 0)


@pytest.mark.parametrize("outcome", ["denied", "expired", "cancelled"])
def test_a_no_is_never_remembered(outcome: str) -> None:
    made, person = bridge(), Person(outcome, remember="session")
    made.attach(person)
    assert not confirm(made, "write_file")
    assert not confirm(made, "write_file")
    assert len(person.asked) == 2


def test_only_one_that_nobody_answered_says_so() -> None:
    for outcome in ("denied", "expired", "cancelled"):
        made = bridge()
        made.attach(Person(outcome))
        with gated(None):
            assert not confirm(made, "write_file")
            unavailable = decline_reason() == APPROVAL_UNAVAILABLE
        assert unavailable == (outcome == "expired")


@pytest.mark.parametrize("name", [SHELL, f"[generalist] {SHELL}"])
@pytest.mark.parametrize("restored", [False, True])
def test_a_command_is_covered_to_the_letter(name: str, restored: bool) -> None:
    if restored:
        made = bridge(remembered(name, command="make test", description="Tests."))
    else:
        made = bridge()
        made.attach(Person(remember="session"))
        assert confirm(made, name, command="make test", description="Tests.")
    person = Person("denied")
    made.attach(person)
    assert confirm(made, name, description="Runs it again.", command="make test")
    assert not person.asked
    for other in ("make test ", "make tests", "make test; rm -rf .", "MAKE TEST"):
        assert not confirm(made, name, command=other, description="Tests.")
    assert not confirm(made, name, command="make test", working_directory="other")
    assert len(person.asked) == 5


@pytest.mark.parametrize(
    ("shown", "hidden"),
    [
        ("true #" + "x" * 5000, "true #" + "x" * 4090 + "\nrm -rf ."),
        # What is shown with the workspace's path made relative may be two different commands.
        ("cd / && rm -rf /ws/a/etc", "cd / && rm -rf etc"),
        ("echo \ud800", "echo ?"),
    ],
)
def test_what_was_not_shown_to_the_letter_covers_nothing(shown: str, hidden: str) -> None:
    made, person = bridge(), Person(remember="session")
    made.attach(person)
    assert confirm(made, SHELL, command=shown)
    assert person.asked[0]["remember"] == [], "so that nobody can say so"
    person.outcome = "denied"
    assert not confirm(made, SHELL, command=hidden)


def test_what_is_gated_is_asked_for_every_time() -> None:
    made, person = bridge(remembered("activate_skill")), Person(remember="session")
    made.attach(person)
    with gated("consent to this one"):
        assert confirm(made, "activate_skill")
        assert confirm(made, "activate_skill")
    assert [asked["remember"] for asked in person.asked] == [[], []]
    assert not person.unasked


@pytest.mark.parametrize(
    ("args", "truncated"),
    [
        ({"content": "x" * 4096, "n": 10**30, "list": ["y"] * 64}, False),
        ({"content": "x" * 4097}, True),
        ({"list": ["y"] * 65}, True),
        ({str(n): n for n in range(65)}, True),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}, True),
    ],
)
def test_who_is_asked_knows_whether_it_is_all_there_is(
    args: dict[str, t.Any], truncated: bool
) -> None:
    made, person = bridge(), Person()
    made.attach(person)
    confirm(made, "write_file", **args)
    assert person.asked[0]["truncated"] == truncated


def test_without_a_turn_nothing_is_approved() -> None:
    made = bridge(remembered("write_file"))
    assert not confirm(made, "write_file")
    assert "stopped" in made.ask_user("which?")


@dataclasses.dataclass
class Choice:
    """Not a string, as a model may send one."""

    name: str


def test_a_question_in_words_is_bounded_and_sendable() -> None:
    made, person = bridge(), Person("expired")
    made.attach(person)
    options = [Choice("x"), "y" * 5000, "half \ud83d", *map(str, range(100))]
    told = made.ask_user("q" * 50_000, header="/ws/a/h", options=options, allow_custom=False)
    assert "nobody answered in time" in told
    (asked,) = person.asked
    assert (len(asked["question"]), len(asked["options"]), asked["header"]) == (16_384, 64, "h")
    assert max(map(len, asked["options"])) == 1024
    str(asked).encode()


def test_without_options_any_answer_will_do() -> None:
    made, person = bridge(), Person("expired")
    made.attach(person)
    made.ask_user("q", options=[], allow_custom=False)
    assert person.asked[0]["allow_custom"] is True
