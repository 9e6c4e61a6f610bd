"""A turn in the page: what is said and done appears while it happens, and can be answered."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Opened
from tests.page.conftest import Tab

pytestmark = pytest.mark.live


def test_text_appears_while_the_turn_runs(tab: Tab, fresh: str) -> None:
    tab.say(f"slow {fresh}")
    turn = tab.turn()
    expect(turn.locator(".said")).to_have_text(f"slow {fresh}")
    expect(turn.locator(".prose")).to_have_text("first half,")
    expect(turn.locator(".progress")).to_contain_text("Writing")
    expect(tab.button("Stop")).to_be_visible()
    tab.gate(fresh)
    expect(turn.locator(".prose")).to_have_text("first half, second half")
    expect(turn.locator(".progress")).to_be_hidden()
    expect(tab.button("Stop")).to_be_hidden()
    expect(tab.box).to_be_focused()


def test_markdown_is_shown_as_what_it_means_also_while_it_comes(tab: Tab, fresh: str) -> None:
    tab.say(f"markdown {fresh}")
    prose = tab.turn().locator(".prose")
    for _ in range(2):
        expect(prose.get_by_role("heading", name="A heading", level=1)).to_be_visible()
        expect(prose.locator("strong")).to_have_text("bold")
        expect(prose.locator("li")).to_have_text(["one", "two"])
        expect(prose.locator("td.right")).to_have_text("7")
        expect(prose.locator("blockquote")).to_have_text("quoted")
        expect(prose.locator(".code-head")).to_contain_text("python")
        link = prose.get_by_role("link", name="link")
        expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
        expect(link).to_have_attribute("target", "_blank")
        expect(prose).to_contain_text("The end.")
        tab.gate(fresh)
    expect(prose.locator(".hljs-keyword").first).to_have_text("def")


def test_code_and_answers_are_copied(browse: Opened) -> None:
    tab = browse(permissions=["clipboard-read", "clipboard-write"]).open()
    tab.say("markdown")
    tab.button("Copy code").click()
    expect(tab.page.locator("#announcer")).to_have_text("Copied")
    copied = tab.page.evaluate("navigator.clipboard.readText()")
    assert copied == 'def greet(name):\n    return f"Hello {name}"\n'
    tab.button("Copy answer").click()
    tab.page.wait_for_function(
        "navigator.clipboard.readText().then((text) => text.startsWith('# A heading'))"
    )


def test_a_tool_is_a_card_with_output_result_time_and_status(tab: Tab, fresh: str) -> None:
    tab.say(f"tool {fresh}")
    card = tab.turn().locator(".card.tool")
    expect(card.locator("summary")).to_contain_text("run_shell_command")
    expect(card.locator("summary")).to_contain_text("make test")
    expect(card.locator(".chip")).to_have_text("Running")
    expect(card.locator(".output")).to_have_text("first line\n")
    tab.gate(fresh)
    expect(card.locator(".output")).to_have_text("first line\nsecond line\n")
    expect(card.locator(".chip")).to_have_text("Done")
    expect(card.locator(".time")).to_have_text("1.2 s")
    expect(card.locator(".result")).to_contain_text("STDOUT:")
    expect(tab.turn().locator(".prose").last).to_have_text("All green.")
    expect(tab.turn().locator(".usage")).to_have_text(re.compile(r"^\d+ ms$"))


def test_thoughts_and_new_tries_are_shown(tab: Tab, fresh: str) -> None:
    tab.say(f"think {fresh}")
    expect(tab.turn().locator(".thinking p")).to_have_text("Let me see.")
    tab.gate(fresh)
    expect(tab.turn().locator(".prose")).to_have_text("thought")
    tab.say(f"retry {fresh}-2")
    expect(tab.turn(1).locator(".progress")).to_contain_text("Trying again in 9 s (1 of 2)")
    tab.gate(f"{fresh}-2")
    expect(tab.turn(1).locator(".prose")).to_have_text("there")


@pytest.mark.parametrize(
    ("button", "outcome", "told"),
    [
        ("Allow once", "Allowed", "You said: True"),
        ("Deny", "Denied", "You said: False"),
    ],
)
def test_an_approval_is_a_card_with_its_time(
    tab: Tab, fresh: str, button: str, outcome: str, told: str
) -> None:
    tab.say(f"approve {fresh}")
    card = tab.turn().locator(".card.question")
    expect(card).to_contain_text("May it run write_file?")
    expect(card).to_contain_text(f"{fresh}.txt")
    expect(card.locator(".left")).to_have_text(re.compile(r"[45]:\d\d left"))
    expect(tab.turn().locator(".progress")).to_contain_text("Waiting for you")
    expect(tab.page.locator("#announcer")).to_have_text(
        "The agent waits for you: May it run write_file?"
    )
    tab.button(button).click()
    expect(card.locator(".outcome")).to_contain_text(outcome)
    expect(tab.turn().locator(".prose")).to_have_text(told)
    expect(tab.box).to_be_focused()


def test_an_approval_is_remembered(tab: Tab, fresh: str) -> None:
    tab.say(f"twice {fresh}")
    tab.button("Allow for this turn").click()
    expect(tab.turn().locator(".outcome")).to_have_text(re.compile("^Allowed for this turn"))
    expect(tab.turn().locator(".prose")).to_have_text("You said: True")
    tab.say(f"approve {fresh}")
    tab.button("Allow for this chat").click()
    expect(tab.turn(1).locator(".prose")).to_have_text("You said: True")
    tab.say(f"approve {fresh}-2")
    expect(tab.turn(2).locator(".prose")).to_have_text("You said: True")
    expect(tab.turn(2).locator(".card.question")).to_have_count(0)


def test_options_are_buttons_and_other_words_are_welcome(tab: Tab) -> None:
    tab.say("choose")
    card = tab.turn().locator(".card.question")
    expect(card).to_contain_text("Colour")
    expect(card).to_contain_text("Which colour?")
    card.get_by_role("button", name="green").click()
    expect(tab.turn().locator(".prose")).to_have_text("You said: green")
    expect(card.locator(".outcome")).to_have_text("Answered: green")
    tab.say("choose")
    tab.turn(1).get_by_role("textbox", name="Something else").fill("blue, of course")
    tab.turn(1).get_by_role("button", name="Send answer").click()
    expect(tab.turn(1).locator(".prose")).to_have_text("You said: blue, of course")
    tab.say("strict")
    expect(tab.turn(2).locator(".card.question button")).to_have_text(["this", "that"])
    expect(tab.turn(2).locator(".card.question input")).to_have_count(0)
    tab.turn(2).get_by_role("button", name="that").click()
    expect(tab.turn(2).locator(".prose")).to_have_text("You said: that")


def test_several_options_and_free_answers(tab: Tab) -> None:
    tab.say("several")
    card = tab.turn().locator(".card.question")
    card.get_by_role("button", name="Send answer").click()
    expect(card.locator(".trouble")).to_have_text("Choose something first.")
    card.get_by_role("checkbox", name="a").check()
    card.get_by_role("checkbox", name="c").check()
    card.get_by_role("textbox").fill("z")
    card.get_by_role("button", name="Send answer").click()
    expect(tab.turn().locator(".prose")).to_have_text("You said: a, c, z")
    tab.say("open")
    tab.turn(1).get_by_role("textbox", name="Your answer").fill("Ann")
    tab.turn(1).get_by_role("textbox", name="Your answer").press("Enter")
    expect(tab.turn(1).locator(".prose")).to_have_text("You said: Ann")


def test_stop_with_the_button_and_with_escape(tab: Tab, fresh: str) -> None:
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    tab.button("Stop").click()
    expect(tab.turn().locator(".notice")).to_have_text("Stopped.")
    tab.say(f"slow {fresh}-2")
    expect(tab.turn(1).locator(".prose")).to_have_text("first half,")
    tab.page.keyboard.press("Escape")
    expect(tab.turn(1).locator(".notice")).to_have_text("Stopped.")
    expect(tab.turn(1).locator(".prose")).to_have_text("first half,")


def test_a_turn_that_failed_is_tried_again_as_a_new_one(tab: Tab) -> None:
    keys: list[str | None] = []
    tab.page.on(
        "request",
        lambda r: keys.append(r.headers.get("idempotency-key")) if r.method == "POST" else None,
    )
    tab.say("crash")
    expect(tab.turn().locator(".notice.bad")).to_contain_text("Something went wrong")
    expect(tab.turn()).not_to_contain_text("secret")
    tab.turn().get_by_role("button", name="Try again").click()
    expect(tab.turn(1).locator(".notice.bad")).to_be_visible()
    assert len(keys) == 2 and None not in keys and keys[0] != keys[1]
    tab.say("cut")
    expect(tab.turn(2).locator(".notice")).to_contain_text("too long for the model")
    expect(tab.turn(2).get_by_role("button", name="Try again")).to_be_visible()


def test_a_message_for_later_waits_and_one_can_interrupt(tab: Tab, fresh: str) -> None:
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    tab.box.fill("second")
    expect(tab.button("Interrupt")).to_be_visible()
    tab.button("Send after this answer").click()
    expect(tab.turn(1).locator(".progress")).to_have_text("Queued: goes next")
    tab.say("third")
    expect(tab.turn(2).locator(".progress")).to_have_text("Queued: 1 before it")
    tab.gate(fresh)
    expect(tab.turn(1).locator(".prose")).to_have_text("You wrote: second")
    expect(tab.turn(2).locator(".prose")).to_have_text("You wrote: third")
    tab.say(f"slow {fresh}-2")
    expect(tab.turn(3).locator(".prose")).to_have_text("first half,")
    tab.box.fill("now")
    tab.button("Interrupt").click()
    expect(tab.turn(3).locator(".notice")).to_have_text("Stopped for your next message.")
    expect(tab.turn(4).locator(".prose")).to_have_text("You wrote: now")


def test_of_two_questions_the_open_one_is_named(tab: Tab) -> None:
    tab.say("both")
    cards = tab.turn().locator(".card.question")
    expect(cards).to_have_count(2)
    waiting = tab.page.locator("#waiting-for")
    first = waiting.text_content()
    assert first is not None and first.startswith("Header ")
    card = cards.filter(has_text=first)
    card.get_by_role("textbox").fill("yes")
    card.get_by_role("button", name="Send answer").click()
    other = {"Header A": "Header B", "Header B": "Header A"}[first]
    expect(waiting).to_have_text(other)
    expect(tab.page.locator("#announcer")).to_have_text(f"The agent waits for you: {other}")
    card = cards.filter(has_text=other)
    card.get_by_role("textbox").fill("yes")
    card.get_by_role("button", name="Send answer").click()
    expect(tab.turn().locator(".prose")).to_have_text("both")
