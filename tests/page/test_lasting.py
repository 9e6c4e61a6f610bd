"""What a page lives through: reloads, lost networks and workers, other tabs, old tokens."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Route
from playwright.sync_api import expect

from agentao_web import Principal
from agentao_web.auth import Tokens
from tests.live.harness import KEY
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import token
from tests.live.nginx import Nginx
from tests.page.conftest import APP
from tests.page.conftest import Opened
from tests.page.conftest import Tab

pytestmark = pytest.mark.live

BROKEN = [r"Failed to load resource: net::"]


def test_a_reload_in_the_middle_of_a_turn_loses_nothing(tab: Tab, fresh: str) -> None:
    tab.say("first")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: first")
    tab.say(f"slow {fresh}")
    expect(tab.turn(1).locator(".prose")).to_have_text("first half,")
    tab.box.fill("a draft")
    for _ in range(2):
        tab.page.reload()
        tab.ready()
        expect(tab.turn().locator(".prose")).to_have_text("You wrote: first")
        expect(tab.turn(1).locator(".said")).to_have_text(f"slow {fresh}")
        expect(tab.turn(1).locator(".prose")).to_have_text("first half,")
        expect(tab.box).to_have_value("a draft")
        expect(tab.button("Stop")).to_be_visible()
    tab.gate(fresh)
    expect(tab.turn(1).locator(".prose")).to_have_text("first half, second half")
    expect(tab.page.locator(".turn")).to_have_count(2)


def test_a_question_survives_a_reload_and_what_ended_is_remembered(tab: Tab, fresh: str) -> None:
    tab.say(f"approve {fresh}")
    expect(tab.page.locator(".card.question")).to_contain_text("May it run")
    tab.page.reload()
    tab.ready()
    expect(tab.page.locator(".card.question")).to_have_count(1)
    tab.button("Deny").click()
    expect(tab.turn().locator(".prose")).to_have_text("You said: False")
    tab.say("crash")
    expect(tab.turn(1).locator(".notice.bad")).to_be_visible()
    tab.page.reload()
    tab.ready()
    expect(tab.turn().locator(".card.tool summary")).to_contain_text("write_file")
    expect(tab.turn().locator(".card.tool .chip")).to_have_text("Not run")
    expect(tab.turn(1).locator(".notice.bad")).to_have_text("This turn failed.")
    expect(tab.turn(1).get_by_role("button", name="Try again")).to_be_visible()


def test_results_of_tools_are_found_again_after_a_reload(tab: Tab, fresh: str) -> None:
    tab.gate(fresh)
    tab.say(f"tool {fresh}")
    expect(tab.turn().locator(".result")).to_contain_text("second line")
    expect(tab.turn().locator(".progress")).to_be_hidden()
    told = tab.turn().locator(".usage").inner_text()
    tab.page.reload()
    tab.ready()
    card = tab.turn().locator(".card.tool")
    expect(card.locator(".time")).to_have_text("1.2 s")
    expect(card.locator(".result")).to_have_count(0)
    card.locator("summary").click()
    expect(card.locator(".result")).to_contain_text("second line")
    expect(tab.turn().locator(".usage")).to_have_text(told)


def test_a_busy_session_that_the_page_knows_nothing_of_is_a_choice(
    browse: Opened, server: Server, fresh: str
) -> None:
    tab = browse(who=fresh).open()
    tab.allowed += [*BROKEN, "409"]
    tab.say("hello")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: hello")
    tab.page.route("**/events?*", lambda route: route.abort())
    tab.page.evaluate("dispatchEvent(new Event('online'))")
    expect(tab.page.locator("#connection")).to_be_visible()
    headers = {"Authorization": f"Bearer {token(user=fresh)}", "Accept": "application/json"}
    begun = server.client.post(
        f"/chat/{tab.sid}", json={"message": f"slow {fresh}"}, headers=headers
    )
    assert begun.status_code == 202
    tab.say("me too")
    expect(tab.turn(1).locator(".notice.bad")).to_contain_text("still busy")
    tab.button("Send after it").click()
    expect(tab.turn(1).locator(".said")).to_have_text("me too")
    tab.page.unroute_all(behavior="ignoreErrors")
    expect(tab.page.locator(".turn")).to_have_count(3)
    tab.gate(fresh)
    said = tab.page.locator(".turn .prose")
    for text in ("You wrote: hello", "first half, second half", "You wrote: me too"):
        expect(said.filter(has_text=text)).to_have_count(1)


def test_without_a_network_it_waits_and_goes_on_where_it_was(tab: Tab, fresh: str) -> None:
    tab.allowed += BROKEN
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    tab.page.context.set_offline(True)
    expect(tab.page.locator("#connection")).to_contain_text("No connection")
    tab.gate(fresh)
    tab.box.fill("written offline")
    tab.box.press("Enter")
    expect(tab.turn(1).locator(".progress")).to_contain_text("No connection")
    tab.page.context.set_offline(False)
    expect(tab.turn().locator(".prose")).to_have_text("first half, second half")
    expect(tab.turn(1).locator(".prose")).to_have_text("You wrote: written offline")
    expect(tab.page.locator("#connection")).to_be_hidden()
    expect(tab.page.locator(".turn")).to_have_count(2)


def test_a_post_whose_answer_is_lost_is_sent_again_but_taken_once(tab: Tab) -> None:
    tab.allowed += BROKEN
    sent: list[tuple[str | None, str | None]] = []

    def lose(route: Route) -> None:
        request = route.request
        if request.method != "POST":
            return route.continue_()
        sent.append((request.headers.get("idempotency-key"), request.post_data))
        if len(sent) > 2:
            return route.continue_()
        # It arrives; its answer does not.
        route.fetch()
        route.abort("connectionreset")

    tab.page.route("**/chat/*", lose)
    tab.say("only once")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: only once")
    eventually(lambda: tab.page.wait_for_timeout(20) or len(sent) == 3, "not sent again")
    assert len(set(sent)) == 1 and json.loads(sent[0][1] or "")["on_disconnect"] == "continue"
    tab.page.reload()
    tab.ready()
    expect(tab.page.locator(".turn")).to_have_count(1)


def test_a_message_whose_page_went_before_the_answer_is_there_once(tab: Tab) -> None:
    tab.allowed += BROKEN

    def lose(route: Route) -> None:
        if route.request.method != "POST":
            return route.continue_()
        route.fetch()
        # Never answered.

    tab.page.route("**/chat/*", lose)
    tab.say("hello there")
    expect(tab.turn().locator(".said")).to_have_text("hello there")
    tab.page.wait_for_function("sessionStorage['agentao-pending']")
    tab.page.unroute_all(behavior="ignoreErrors")
    tab.page.reload()
    tab.ready()
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: hello there")
    tab.page.wait_for_function("!sessionStorage['agentao-pending']")
    expect(tab.page.locator(".turn")).to_have_count(1)


def test_messages_on_their_way_survive_a_reload_in_their_order(tab: Tab) -> None:
    tab.allowed += [*BROKEN, "404"]

    def lose(route: Route) -> None:
        if route.request.method == "POST":
            route.abort("connectionreset")
        else:
            route.continue_()

    tab.page.route("**/chat/*", lose)
    for number, text in enumerate(("one", "two", "three")):
        tab.say(text)
        expect(tab.turn(number).locator(".said")).to_have_text(text)
    tab.page.unroute_all(behavior="ignoreErrors")
    tab.page.reload()
    tab.ready()
    for number, text in enumerate(("one", "two", "three")):
        expect(tab.turn(number).locator(".prose")).to_have_text(f"You wrote: {text}")
    expect(tab.page.locator(".turn")).to_have_count(3)


def test_a_chat_that_was_left_is_not_asked_for_any_more(tab: Tab) -> None:
    tab.allowed += BROKEN
    asked: list[str] = []

    def lose(route: Route) -> None:
        asked.append(route.request.url)
        route.abort("connectionreset")

    tab.page.clock.install()
    tab.page.route("**/session/left", lose)
    tab.page.evaluate("location.hash = 'left'")
    expect(tab.page.locator("#connection")).to_contain_text("No connection")
    tab.button("New chat").first.click()
    expect(tab.page.locator("#connection")).to_be_hidden()
    before = len(asked)
    tab.page.clock.fast_forward(60_000)
    tab.say("hello")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: hello")
    assert len(asked) == before


def test_who_takes_long_to_sign_in_gets_a_stream(browse: Opened, fresh: str) -> None:
    tab = browse(who=fresh)
    tab.allowed.append("401")
    tab.page.clock.install()
    tab.open()
    asked: list[str] = []

    def refuse_once(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(status=401)
        else:
            route.continue_()

    tab.page.route("**/events?*", refuse_once)
    tab.say(f"slow {fresh}")
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Please sign in again")
    tab.page.clock.fast_forward(20_000)
    dialog.get_by_label("Access token").fill(token(user=fresh))
    tab.button("Continue").click()
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    tab.gate(fresh)
    expect(tab.turn().locator(".prose")).to_have_text("first half, second half")
    assert asked and all("follow=1" in url for url in asked), asked


def test_the_turn_of_a_worker_that_dies_is_told_and_tried_again(
    browse: Opened, narrow: Server, fresh: str
) -> None:
    tab = browse(at=narrow).open()
    tab.allowed += BROKEN
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    (worker,) = narrow.workers()
    narrow.signal(signal.SIGKILL, worker)
    expect(tab.turn().locator(".notice.bad")).to_contain_text("is gone")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    tab.turn().get_by_role("button", name="Try again").click()
    expect(tab.turn(1).locator(".prose")).to_have_text("first half,")
    tab.gate(fresh)
    expect(tab.turn(1).locator(".prose")).to_have_text("first half, second half")


def test_behind_a_proxy_that_holds_streams_back_it_polls(
    browse: Opened, tmp_path: Path, fresh: str
) -> None:
    def hold_back(text: str) -> str:
        for old, new in (
            ("gzip_types ", "gzip_types text/event-stream "),
            ("proxy_read_timeout 90s;", "proxy_read_timeout 90s; proxy_buffering on;"),
            ("proxy_buffering on;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"),
        ):
            assert old in text
            text = text.replace(old, new)
        return text

    with (
        Server(tmp_path, app=APP, addresses=1) as server,
        Nginx(tmp_path, server.upstreams, edit=hold_back) as nginx,
    ):
        tab = browse(at=server, url=nginx.url, ignore_https_errors=True).open()
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.say(f"slow {fresh}")
        expect(tab.turn().locator(".prose")).to_have_text("first half,")
        tab.gate(fresh)
        expect(tab.turn().locator(".prose")).to_have_text("first half, second half")
        tab.say(f"slow {fresh}-2")
        expect(tab.turn(1).locator(".prose")).to_have_text("first half,")
        tab.gate(f"{fresh}-2")
        expect(tab.turn(1).locator(".prose")).to_have_text("first half, second half")
        assert sum("follow=1" in url for url in asked) == 1, asked
        assert sum("wait=25" in url for url in asked) >= 3, asked


def test_through_nginx_and_several_workers_it_streams(
    browse: Opened, tmp_path: Path, fresh: str
) -> None:
    with (
        Server(tmp_path, app=APP, addresses=2) as server,
        Nginx(tmp_path, server.upstreams) as nginx,
    ):
        tab = browse(at=server, url=nginx.url, ignore_https_errors=True).open()
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.say("markdown")
        expect(tab.turn().locator(".hljs-keyword").first).to_have_text("def")
        tab.say(f"approve {fresh}")
        tab.button("Allow once").click()
        expect(tab.turn(1).locator(".prose")).to_have_text("You said: True")
        expect(tab.chats).to_have_text(["markdown"])
        assert any("follow=1" in url for url in asked)
        assert not any("wait=25" in url for url in asked)


@pytest.mark.parametrize(("most", "refusal"), [("3", "503"), ("2", "429")])
def test_with_no_place_for_a_stream_it_polls_without_waiting(
    browse: Opened, tmp_path: Path, fresh: str, most: str, refusal: str
) -> None:
    """Neither of the worker, nor in what the user may have of them."""
    shares = {"AGENTAO_MAX_STREAMS_PER_USER": most, "AGENTAO_MAX_STREAMS_PER_TENANT": "3"}
    with Server(tmp_path, "--threads", "4", app=APP, **shares) as server:
        tab = browse(at=server).open()
        tab.allowed.append(refusal)
        others = [server.follow("other", "?follow=1") for _ in range(int(most))]
        server.ask("other", "hello")
        for other in others:
            other.__enter__()
        try:
            tab.say(f"slow {fresh}")
            expect(tab.turn().locator(".prose")).to_have_text("first half,")
            tab.gate(fresh)
            expect(tab.turn().locator(".prose")).to_have_text("first half, second half")
        finally:
            for other in others:
                other.__exit__(None, None, None)


def test_two_tabs_of_one_chat_are_both_live(browse: Opened, fresh: str) -> None:
    who = f"two-{fresh}"
    one = browse(who=who).open()
    one.say("hello")
    expect(one.turn().locator(".prose")).to_have_text("You wrote: hello")
    other = browse(who=who, context=one.page.context).open(hash=one.sid)
    expect(other.turn().locator(".prose")).to_have_text("You wrote: hello")
    one.say(f"slow {fresh}")
    expect(other.turn(1).locator(".said")).to_have_text(f"slow {fresh}")
    expect(other.turn(1).locator(".prose")).to_have_text("first half,")
    one.gate(fresh)
    for tab in (one, other):
        expect(tab.turn(1).locator(".prose")).to_have_text("first half, second half")
    other.say(f"approve {fresh}")
    expect(one.turn(2).locator(".card.question")).to_contain_text("May it run")
    expect(other.turn(2).locator(".card.question")).to_contain_text("May it run")
    other.button("Deny").focus()
    one.button("Allow once").click()
    expect(other.turn(2).locator(".outcome")).to_have_text(f"Allowed by {who}")
    expect(other.box).to_be_focused()
    expect(one.turn(2).locator(".outcome")).to_have_text("Allowed")
    for tab in (one, other):
        expect(tab.turn(2).locator(".prose")).to_have_text("You said: True")
        expect(tab.page.locator(".turn")).to_have_count(3)


def test_a_chat_deleted_elsewhere_is_left(browse: Opened, server: Server, fresh: str) -> None:
    tab = browse(who=fresh).open()
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    headers = {"Authorization": f"Bearer {token(user=fresh)}"}
    assert server.client.delete(f"/session/{tab.sid}", headers=headers).json()["ok"]
    expect(tab.page.locator("#trouble")).to_contain_text("That chat was deleted.")
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.say("a new one")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: a new one")


def test_a_token_that_ends_is_asked_for_again_and_nothing_is_lost(
    browse: Opened, fresh: str
) -> None:
    tab = browse(who=None)
    tab.allowed.append("401")
    tab.page.goto(tab.url)
    tab.page.get_by_label("Access token").fill(token(user=fresh))
    tab.button("Continue").click()
    tab.ready()
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    ended = Tokens([KEY]).issue(Principal("acme", fresh), ttl=0)
    tab.page.evaluate("(token) => { sessionStorage['agentao-token'] = token }", ended)
    tab.box.fill("and now?")
    tab.button("Send after this answer").click()
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Please sign in again")
    tab.page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Access token").fill(token(user=fresh))
    tab.button("Continue").click()
    expect(dialog).to_be_hidden()
    tab.gate(fresh)
    expect(tab.turn().locator(".prose")).to_have_text("first half, second half")
    expect(tab.turn(1).locator(".prose")).to_have_text("You wrote: and now?")


def test_a_question_nobody_answers_expires_in_the_page_too(
    browse: Opened, narrow: Server, fresh: str
) -> None:
    tab = browse(at=narrow).open()
    tab.say(f"approve {fresh}")
    expect(tab.turn().locator(".outcome")).to_contain_text("Expired: nobody answered")
    expect(tab.turn().locator(".prose")).to_have_text("You said: False")


def test_what_the_log_does_not_keep_is_shown_from_its_end(
    browse: Opened, narrow: Server, fresh: str
) -> None:
    tab = browse(at=narrow).open()
    tab.say(f"flood {fresh}")
    for _ in range(2):
        expect(tab.turn()).to_contain_text(re.compile("flooded|is not kept any more"))
        expect(tab.button("Stop")).to_be_visible()
        tab.page.reload()
        tab.ready()
        expect(tab.turn()).to_contain_text("A part of this answer is not kept any more.")
    tab.gate(fresh)
    expect(tab.turn().locator(".progress")).to_be_hidden()
    expect(tab.turn().locator(".prose").last).to_have_text(re.compile(r"the end\s*$"))
