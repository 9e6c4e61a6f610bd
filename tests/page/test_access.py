"""For everybody: keyboard, screen readers, small screens, light and dark."""

from __future__ import annotations

import typing as t

import pytest
from playwright.sync_api import expect

from tests.page.conftest import AXE
from tests.page.conftest import Opened
from tests.page.conftest import Tab

pytestmark = pytest.mark.live

PHONE: dict[str, t.Any] = {
    "viewport": {"width": 360, "height": 740},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 2,
}


def faults(tab: Tab) -> list[str]:
    """What axe finds that is serious or critical."""
    if not tab.page.evaluate("typeof axe === 'object'"):
        tab.page.evaluate(AXE.read_text() + "; null")
    found = tab.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:160] for node in one['nodes']]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical", "moderate")
    ]


def fits(tab: Tab) -> None:
    """Nothing is wider than the screen."""
    wide = """() => [...document.querySelectorAll("#main, #main *, dialog[open] *")].filter((e) =>
        !e.closest(".table, pre, .away, .brief") && e.getBoundingClientRect().right > innerWidth + 1
    ).map((e) => e.outerHTML.slice(0, 100))"""
    assert tab.page.evaluate(wide) == []
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_axe_finds_nothing_serious(browse: Opened, fresh: str, colours: str, screen: str) -> None:
    tab = browse(color_scheme=colours, **(PHONE if screen == "phone" else {})).open()
    states: list[list[str]] = [faults(tab)]
    tab.say("markdown")
    expect(tab.turn().locator(".hljs-keyword").first).to_be_visible()
    states.append(faults(tab))
    tab.say(f"tool {fresh}")
    expect(tab.turn(1).locator(".output")).to_have_text("first line\n")
    states.append(faults(tab))
    tab.gate(fresh)
    expect(tab.turn(1).locator(".result")).to_be_visible()
    states.append(faults(tab))
    tab.say(f"approve {fresh}")
    expect(tab.button("Allow once")).to_be_visible()
    states.append(faults(tab))
    fits(tab)
    tab.button("Deny").click()
    tab.say("several")
    expect(tab.page.get_by_role("checkbox")).to_have_count(3)
    states.append(faults(tab))
    tab.page.get_by_role("checkbox").first.check()
    tab.button("Send answer").click()
    tab.say("crash")
    expect(tab.turn(4).locator(".notice.bad")).to_be_visible()
    states.append(faults(tab))
    fits(tab)
    if screen == "phone":
        tab.button("Show the list of chats").tap()
        expect(tab.button("New chat").first).to_be_visible()
        states.append(faults(tab))
    tab.button("Delete markdown").click(force=True)
    expect(tab.page.get_by_role("dialog")).to_be_visible()
    states.append(faults(tab))
    tab.page.evaluate("sessionStorage['agentao-token'] = 'over'")
    tab.allowed.append("401")
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.page.get_by_label("Access token")).to_be_visible()
    states.append(faults(tab))
    assert not [fault for state in states for fault in state]


def test_all_of_it_works_with_the_keyboard_alone(tab: Tab, fresh: str) -> None:
    keys = tab.page.keyboard
    expect(tab.box).to_be_focused()
    keys.type("two")
    keys.press("Shift+Enter")
    keys.type("lines")
    keys.press("Enter")
    expect(tab.turn().locator(".said")).to_have_text("two\nlines")
    expect(tab.turn().locator(".prose")).to_contain_text("You wrote: two")
    expect(tab.box).to_be_focused()
    keys.type(f"approve {fresh}")
    keys.press("Enter")
    expect(tab.button("Allow once")).to_be_visible()
    expect(tab.box).to_be_focused()  # A key that was meant for the text approves nothing.
    for name in ("Deny", "Allow for this chat", "Allow for this turn", "Allow once"):
        keys.press("Shift+Tab")
        expect(tab.button(name)).to_be_focused()
    keys.press("Enter")
    expect(tab.turn(1).locator(".outcome")).to_contain_text("Allowed")
    expect(tab.turn(1).get_by_role("button", name="Copy answer")).to_be_visible()
    expect(tab.box).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    expect(tab.turn(1).locator(".card.tool summary")).to_be_focused()
    keys.press("Enter")
    expect(tab.turn(1).locator(".card.tool")).to_have_attribute("open", "")
    tab.page.reload()
    tab.ready()
    tab.page.evaluate("document.activeElement.blur()")
    keys.press("Tab")
    expect(tab.button("Skip to the message box")).to_be_focused()
    keys.press("Tab")
    expect(tab.button("New chat").first).to_be_focused()
    keys.press("Tab")
    expect(tab.chats.first).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    expect(tab.page.get_by_role("textbox", name="New name")).to_be_focused()
    keys.type("named by keys")
    keys.press("Enter")
    expect(tab.chats.first).to_have_text("named by keys")
    expect(tab.chats.first).to_be_focused()
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    expect(tab.button("Keep it")).to_be_focused()
    keys.press("Escape")
    expect(tab.page.get_by_role("dialog")).to_be_hidden()
    expect(tab.chats).to_have_count(1)


def test_a_screen_reader_is_told_what_matters_and_no_more(tab: Tab, fresh: str) -> None:
    """Not each word while it comes: the answer once, when it is whole."""
    said = tab.page.locator("#announcer")
    expect(said).to_have_attribute("aria-live", "polite")
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    expect(said).to_have_text("")
    live = tab.page.locator("#scroll").locator("[aria-live], [role=log]")
    expect(live).to_have_count(0)
    tab.gate(fresh)
    expect(said).to_have_text("first half, second half")
    tab.say("crash")
    expect(said).to_contain_text("Something went wrong")


def test_a_phone_has_the_list_in_a_drawer_and_nothing_is_too_wide(browse: Opened) -> None:
    tab = browse(**PHONE).open()
    fits(tab)
    expect(tab.page.locator("#side")).to_be_hidden()
    tab.say("markdown")
    expect(tab.turn().locator(".hljs-keyword").first).to_be_visible()
    fits(tab)
    tab.say("x" * 300)
    expect(tab.turn(1).locator(".prose")).to_contain_text("xxx")
    fits(tab)
    tab.button("Show the list of chats").tap()
    expect(tab.chats).to_have_text(["markdown"])
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#side")).to_be_hidden()
    expect(tab.button("Show the list of chats")).to_be_focused()
    tab.button("New chat").last.tap()
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.button("Show the list of chats").tap()
    tab.chats.first.tap()
    expect(tab.page.locator("#side")).to_be_hidden()
    expect(tab.page.locator(".turn")).to_have_count(2)


def test_colours_follow_the_system_or_a_choice(browse: Opened) -> None:
    tab = browse(color_scheme="dark").open()
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = tab.page.evaluate(paper)
    tab.page.emulate_media(color_scheme="light")
    light = tab.page.evaluate(paper)
    assert dark != light
    tab.button("Colours: system").click()
    tab.button("Colours: light").click()
    expect(tab.button("Colours: dark")).to_be_visible()
    assert tab.page.evaluate(paper) == dark
    tab.allowed.append("404")  # A chat that nobody has said anything in.
    tab.page.reload()
    tab.ready()
    assert tab.page.evaluate(paper) == dark


def test_who_has_scrolled_up_is_left_there(tab: Tab, fresh: str) -> None:
    tab.say("long")
    expect(tab.turn().locator(".prose")).to_contain_text("Paragraph 199.")
    box = tab.page.locator("#scroll")
    bottom = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    tab.page.wait_for_function(f"({bottom})(document.getElementById('scroll')) < 5")
    tab.say(f"approve {fresh}")
    expect(tab.button("Allow once")).to_be_in_viewport()
    expect(tab.page.locator("#waiting")).to_be_hidden()
    box.evaluate("e => { e.scrollTop = 0; }")
    expect(tab.page.locator("#waiting")).to_contain_text("May it run write_file?")
    assert box.evaluate("e => e.scrollTop") == 0
    tab.button("Review").click()
    expect(tab.button("Allow once")).to_be_focused()
    expect(tab.button("Allow once")).to_be_in_viewport()
    box.evaluate("e => { e.scrollTop = 0; }")
    tab.button("Latest").click()
    tab.page.wait_for_function(f"({bottom})(document.getElementById('scroll')) < 5")
