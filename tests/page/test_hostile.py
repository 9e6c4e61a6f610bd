"""Hostile text of models, tools, titles and files: nothing runs, nothing is fetched elsewhere."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.live.harness import Server
from tests.live.harness import token
from tests.page import scripts
from tests.page.conftest import Opened
from tests.page.conftest import Tab

pytestmark = pytest.mark.live

#: What must not be there, wherever in the conversation it would come from.
FORBIDDEN = (
    "script, iframe, form:not(.custom), style, base, meta, link, svg:not(.icon), object, embed,"
    " video, audio, math, [onerror], [onload], [onclick], [style], [srcdoc]"
)
LINKS = """() => [...document.querySelectorAll("#turns a")].map((a) => a.getAttribute("href"))
    .filter((href) => href !== null && !/^(https?:|mailto:)/.test(href))"""


def unharmed(tab: Tab) -> None:
    page = tab.page
    assert page.evaluate("window.__pwned") is None
    expect(page.locator("#turns").locator(FORBIDDEN)).to_have_count(0)
    expect(page.locator("#side").locator("script, iframe, style, [onerror]")).to_have_count(0)
    expect(page.locator("#title *, #trouble-text *, #waiting-for *")).to_have_count(0)
    assert page.evaluate(LINKS) == []
    images = page.locator("#turns img").evaluate_all("all => all.map((one) => one.src)")
    assert all(src.startswith("data:image/") for src in images), images
    rels = page.locator("#turns a[href]").evaluate_all("all => all.map((one) => one.rel)")
    assert set(rels) <= {"noopener noreferrer nofollow"}
    assert page.evaluate("document.getElementById('turns').tagName") == "DIV"
    assert page.evaluate("document.body.tagName") == "BODY"
    assert page.evaluate(
        "[...document.querySelectorAll('#turns [id]')].every((e) => /^q-/.test(e.id))"
    )


def test_what_agents_say_and_do_never_runs_or_loads(tab: Tab, fresh: str) -> None:
    """Also while it streams in, and after it is read again from the transcript."""
    tab.say(f"hostile {fresh}")
    turn = tab.turn()
    expect(turn.locator(".card.question")).to_have_count(1)
    unharmed(tab)
    options = turn.locator(".card.question .actions button")
    expect(options).to_have_text([scripts.PAYLOADS[1], scripts.PAYLOADS[0]])
    options.first.click()
    expect(turn.locator(".card.question")).to_have_count(2)
    tab.button("Allow once").click()
    expect(turn.locator(".outcome")).to_have_count(2)
    unharmed(tab)
    tab.gate(fresh)
    expect(turn.locator(".progress")).to_be_hidden()
    for card in turn.locator(".card.tool summary").all():
        card.click()
    unharmed(tab)
    tab.page.reload()
    tab.ready()
    expect(tab.turn().locator(".card.tool").first).to_be_visible()
    unharmed(tab)


def test_each_payload_alone_is_only_text(tab: Tab) -> None:
    """As a message, so as a title, and as what is answered to it."""
    payloads = [payload for payload in scripts.PAYLOADS if "\0" not in payload]
    for count, payload in enumerate(payloads, 1):
        tab.button("New chat").first.click()
        expect(tab.page.locator(".turn")).to_have_count(0)
        tab.say(payload)
        expect(tab.turn().locator(".prose")).to_contain_text("You wrote:")
        expect(tab.turn().locator(".progress")).to_be_hidden()
        expect(tab.chats).to_have_count(count)
        unharmed(tab)


def test_ids_and_errors_of_others_are_only_text(browse: Opened, server: Server, fresh: str) -> None:
    headers = {"Authorization": f"Bearer {token(user=fresh)}"}
    made = server.client.post(
        "/chat/s", json={"message": "x"}, headers={**headers, "Accept": "application/json"}
    )
    made.raise_for_status()
    bad = scripts.PAYLOADS[1]
    tab = browse(who=fresh)
    tab.allowed.append("500|ERR_")
    error = {"code": bad, "message": bad, "details": {"limit": bad}}
    tab.page.route("**/cancel", lambda route: route.fulfill(status=500, json=error))
    tab.open(hash="s")
    tab.page.evaluate("location.hash = '<img src=x onerror=window.__pwned=1>'")
    expect(tab.page.locator("#welcome")).to_be_visible()
    unharmed(tab)
    tab.say(f"slow {fresh}")
    tab.button("Stop").click()
    expect(tab.page.locator("#trouble-text")).to_have_text(bad)
    unharmed(tab)
    tab.gate(fresh)


def test_a_question_hides_nothing_of_itself(tab: Tab, fresh: str) -> None:
    tab.say(f"unseen {fresh}")
    turn = tab.turn()
    card = turn.locator(".card.question").first
    expect(card.locator("strong")).to_have_text("a⟨U+202E⟩b")
    shown = "pay⟨U+202E⟩etov⟨U+200B⟩ ⟨60 line breaks⟩ rm -rf"
    expect(card.locator(".asked")).to_have_text(shown)
    expect(tab.page.locator("#waiting-for")).to_have_text("a⟨U+202E⟩b")
    tab.button("yes⟨U+2066⟩").click()
    expect(turn.locator(".card.question")).to_have_count(2)
    card = turn.locator(".card.question").nth(1)
    expect(card.locator("strong")).to_have_text("May it run pay⟨U+202E⟩?")
    expect(card.locator("pre.args").first).to_have_text(shown)
    expect(card.locator(".label").first).to_have_text("to⟨U+2066⟩")
    expect(card.locator("dd", has_text="blanks")).to_have_text("x ⟨200 blanks⟩ y")
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f 日本"
    expect(card.locator("dd", has_text="日本")).to_have_text(family)
    # All of it is in sight, without scrolling inside of it.
    fits = card.locator("pre.args").first.evaluate("e => e.scrollHeight <= e.clientHeight")
    assert fits
    tab.button("Allow once").click()
    expect(turn.locator(".prose")).to_contain_text("done")
    words = turn.locator(".outcome").all_text_contents()
    assert not any("\u2066" in text or "\u202e" in text for text in words)


def test_a_title_that_turns_its_direction_says_so(tab: Tab) -> None:
    tab.say("evil\u202etxt.exe")
    expect(tab.turn().locator(".progress")).to_be_hidden()
    expect(tab.chats.first).to_contain_text("evil⟨U+202E⟩txt.exe")
    expect(tab.page.locator("#title")).to_have_text("evil⟨U+202E⟩txt.exe")


def test_the_policy_itself_stops_what_gets_past_everything_else(tab: Tab) -> None:
    """A hole in the sanitizer alone would not be enough."""
    tab.allowed += ["Content Security Policy", "Trusted", "violates"]
    tab.say("hello")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: hello")
    tried = tab.page.evaluate(
        """async (foreign) => {
            const place = document.querySelector(".prose");
            const refused = [];
            try { place.innerHTML = "<img src=x onerror='window.__pwned=1'>"; }
            catch { refused.push("html"); }
            const script = document.createElement("script");
            try { script.textContent = "window.__pwned = 1"; } catch { refused.push("script"); }
            place.append(script);
            const image = document.createElement("img");
            try { image.setAttribute("onerror", "window.__pwned = 1"); }
            catch { refused.push("attribute"); }
            const loaded = new Promise((resolve) => {
                image.addEventListener("load", () => resolve("loaded"));
                image.addEventListener("error", () => resolve("blocked"));
            });
            image.src = `${foreign}/pixel.png`;
            place.append(image);
            refused.push(await loaded);
            await fetch(`${foreign}/x`).catch(() => refused.push("fetch"));
            try { trustedTypes.createPolicy("mine", {}); } catch { refused.push("policy"); }
            return refused;
        }""",
        scripts.FOREIGN,
    )
    assert tried == ["html", "script", "attribute", "blocked", "fetch", "policy"]
    assert tab.page.evaluate("window.__pwned") is None
    # Chromium reports the refused ones as requests; nothing of them left.
    tab.foreign.clear()
