"""The list of chats, drafts and images; sizes, prefixes and logins."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.live.harness import Server
from tests.live.harness import token
from tests.page.conftest import APP
from tests.page.conftest import Opened
from tests.page.conftest import Tab

pytestmark = pytest.mark.live


def png(width: int = 8, height: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\x00" + b"\x10\x80\x60" * width for _ in range(height))
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_chats_are_listed_opened_and_begun(tab: Tab) -> None:
    expect(tab.page.get_by_role("heading", name="What can I do for you?")).to_be_visible()
    tab.say("first chat")
    expect(tab.chats).to_have_text(["first chat"])
    expect(tab.page.locator("#title")).to_have_text("first chat")
    expect(tab.page).to_have_title("first chat")
    first = tab.sid
    tab.button("New chat").first.click()
    expect(tab.box).to_be_focused()
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.say("second chat")
    expect(tab.chats).to_have_text(["second chat", "first chat"])
    assert tab.sid != first
    tab.chats.nth(1).click()
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: first chat")
    expect(tab.chats.nth(1)).to_have_attribute("aria-current", "page")
    assert tab.sid == first
    tab.page.go_back()
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: second chat")


def test_a_chat_is_listed_while_its_first_turn_runs(tab: Tab, fresh: str) -> None:
    tab.say(f"slow {fresh}")
    expect(tab.turn().locator(".prose")).to_have_text("first half,")
    expect(tab.chats).to_have_text([f"slow {fresh}"])
    tab.gate(fresh)


def test_a_chat_is_renamed_and_deleted(tab: Tab) -> None:
    tab.say("some chat")
    expect(tab.chats).to_have_text(["some chat"])
    tab.chats.first.hover()
    tab.button("Rename some chat").click()
    field = tab.page.get_by_role("textbox", name="New name")
    field.fill("<b>The</b> plan")
    field.press("Enter")
    expect(tab.chats).to_have_text(["<b>The</b> plan"])
    expect(tab.page.locator("#title")).to_have_text("<b>The</b> plan")
    tab.chats.first.hover()
    tab.button("Rename <b>The</b> plan").click()
    field.fill("never mind")
    field.press("Escape")
    expect(tab.chats).to_have_text(["<b>The</b> plan"])
    tab.chats.first.hover()
    tab.button("Delete <b>The</b> plan").click()
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Delete “<b>The</b> plan”?")
    tab.button("Keep it").click()
    expect(tab.chats).to_have_count(1)
    tab.chats.first.hover()
    tab.button("Delete <b>The</b> plan").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(tab.chats).to_have_count(0)
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.page.reload()
    tab.ready()
    expect(tab.chats).to_have_count(0)
    tab.allowed.append("404")


def test_a_chat_is_renamed_and_deleted_while_the_list_is_read_again(tab: Tab) -> None:
    def read_again() -> None:
        with tab.page.expect_response("**/sessions?*"):
            tab.page.evaluate("dispatchEvent(new Event('online'))")

    tab.say("some chat")
    expect(tab.chats).to_have_text(["some chat"])
    tab.chats.first.hover()
    tab.button("Rename some chat").click()
    field = tab.page.get_by_role("textbox", name="New name")
    field.fill("plan")
    read_again()
    field.press("Enter")
    expect(tab.chats).to_have_text(["plan"])
    tab.chats.first.hover()
    tab.button("Delete plan").click()
    read_again()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.chats).to_have_count(0)
    tab.allowed.append("404")


def test_many_chats_come_a_page_at_a_time(browse: Opened, server: Server, fresh: str) -> None:
    headers = {"Authorization": f"Bearer {token(user=fresh)}", "Accept": "application/json"}
    for number in range(33):
        server.client.post(
            f"/chat/s{number}", json={"message": f"chat {number}"}, headers=headers
        ).raise_for_status()
    tab = browse(who=fresh).open()
    expect(tab.chats).to_have_count(30)
    tab.button("Show more").dblclick()
    expect(tab.button("Show more")).to_be_hidden()
    expect(tab.chats).to_have_count(33)


def test_results_of_tools_are_found_for_earlier_messages_too(
    browse: Opened, server: Server, fresh: str
) -> None:
    headers = {"Authorization": f"Bearer {token(user=fresh)}", "Accept": "application/json"}
    server.client.post(f"/test/gate/{fresh}").raise_for_status()
    for message in (f"tool {fresh}", *("hello",) * 25, f"tool {fresh}"):
        server.client.post(
            "/chat/s", json={"message": message}, headers={**headers, "Prefer": "wait=50"}
        ).raise_for_status()
    tab = browse(who=fresh).open(hash="s")
    for number in (-1, 0):
        card = tab.turn(number).locator(".card.tool")
        card.locator("summary").click()
        expect(card.locator(".result")).to_contain_text("second line")
        if number:
            tab.button("Show earlier messages").click()
            expect(tab.turn(0).locator(".said")).to_have_text(f"tool {fresh}")


def test_a_long_chat_shows_what_came_before(browse: Opened, server: Server, fresh: str) -> None:
    headers = {"Authorization": f"Bearer {token(user=fresh)}", "Accept": "application/json"}
    for number in range(30):
        server.client.post(
            "/chat/s",
            json={"message": f"message {number}"},
            headers={**headers, "Prefer": "wait=50"},
        ).raise_for_status()
    tab = browse(who=fresh).open(hash="s")
    expect(tab.page.locator(".turn")).to_have_count(25)
    tab.button("Show earlier messages").click()
    expect(tab.page.locator(".turn")).to_have_count(30)
    expect(tab.turn(0).locator(".prose")).to_have_text("You wrote: message 0")
    expect(tab.turn(29).locator(".prose")).to_have_text("You wrote: message 29")
    expect(tab.button("Show earlier messages")).to_be_hidden()


def test_images_are_chosen_pasted_and_dropped(tab: Tab) -> None:
    picture = base64.b64encode(png()).decode()
    tab.page.locator("input[type=file]").set_input_files(
        {"name": "one.png", "mimeType": "image/png", "buffer": png()}
    )
    expect(tab.page.locator(".shelf img")).to_have_count(1)
    give = """([picture, kind, name, type]) => {
        const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, { type }));
        const event = kind === "paste"
            ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.getElementById(kind === "paste" ? "message" : "turns").dispatchEvent(event);
    }"""
    tab.page.evaluate(give, [picture, "paste", "two.png", "image/png"])
    expect(tab.page.locator(".shelf img")).to_have_count(2)
    tab.page.evaluate(give, [picture, "drop", "<img src=x onerror=alert(1)>.png", "image/png"])
    expect(tab.page.locator(".shelf img")).to_have_count(3)
    tab.page.evaluate(give, [picture, "drop", "page.svg", "image/svg+xml"])
    expect(tab.page.locator("#composer .trouble")).to_contain_text("Only PNG, JPEG, GIF and WebP")
    tab.button("Remove two.png").click()
    expect(tab.page.locator(".shelf img")).to_have_count(2)
    with tab.page.expect_request(lambda request: request.method == "POST") as sent:
        tab.say("look at these")
    assert sent.value.post_data_json["images"] == [{"data": picture, "mimeType": "image/png"}] * 2
    expect(tab.turn().locator(".bubble img")).to_have_count(2)
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: look at these")
    tab.page.reload()
    tab.ready()
    expect(tab.turn().locator(".bubble")).to_contain_text("2 images")


def test_what_is_too_large_is_told_and_can_be_changed(browse: Opened, narrow: Server) -> None:
    tab = browse(at=narrow).open()
    tab.allowed.append("Failed to load resource.*(400|413)")
    tab.say("far too long a message " * 2)
    expect(tab.turn().locator(".notice.bad")).to_have_text("message is too long (limit: 40)")
    tab.button("Edit").click()
    expect(tab.box).to_have_value("far too long a message far too long a message")
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.page.locator("input[type=file]").set_input_files(
        {"name": "one.png", "mimeType": "image/png", "buffer": png()}
    )
    expect(tab.page.locator(".shelf img")).to_have_count(1)
    tab.say("look")
    expect(tab.turn().locator(".notice.bad")).to_contain_text(re.compile("image"))
    tab.button("Edit").click()
    expect(tab.page.locator(".shelf img")).to_have_count(1)
    tab.button("Remove one.png").click()
    tab.say("look")
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: look")


def test_an_image_that_cannot_be_read_is_said_to_be_so(tab: Tab) -> None:
    tab.page.evaluate(
        "FileReader.prototype.readAsDataURL = function () {"
        " setTimeout(() => this.dispatchEvent(new ProgressEvent('error'))); }"
    )
    tab.page.locator("input[type=file]").set_input_files(
        {"name": "one.png", "mimeType": "image/png", "buffer": png()}
    )
    expect(tab.page.locator("form .trouble")).to_have_text("one.png cannot be read.")
    expect(tab.page.locator(".shelf img")).to_have_count(0)


def test_behind_a_prefix_and_with_the_hosts_login_no_token_is_asked_for(
    browse: Opened, monolith: Server, fresh: str
) -> None:
    tab = browse(at=monolith, who=None)
    tab.page.context.request.get(f"{monolith.url}/login/{fresh}")
    tab.page.goto(monolith.url + "/agent")
    tab.ready()
    assert tab.page.url.startswith(monolith.url + "/agent/#")
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    tab.say(f"approve {fresh}")
    tab.button("Allow once").click()
    expect(tab.turn().locator(".prose")).to_have_text("You said: True")
    expect(tab.button("Forget my token")).to_be_hidden()
    tab.chats.first.hover()
    tab.button(f"Delete approve {fresh}").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.chats).to_have_count(0)


def test_a_login_of_the_hosts_that_ends_is_asked_for_again(
    browse: Opened, monolith: Server, fresh: str
) -> None:
    tab = browse(at=monolith, who=None)
    tab.allowed.append("401")
    tab.page.context.request.get(f"{monolith.url}/login/{fresh}")
    tab.open("/agent/")
    tab.page.context.request.get(monolith.url + "/logout")
    tab.say("am I in?")
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("Sign in there, in another tab")
    expect(dialog.get_by_label("Access token")).to_have_count(0)
    tab.page.context.request.get(f"{monolith.url}/login/{fresh}")
    tab.button("I have signed in").click()
    expect(tab.turn().locator(".prose")).to_have_text("You wrote: am I in?")


def test_who_comes_back_signed_in_goes_on_without_a_click(
    browse: Opened, tmp_path: Path, fresh: str
) -> None:
    env = {"TEST_PREFIX": "/agent", "TEST_LOGIN": "cookie", "AGENTAO_DEMO": "1"}
    with Server(tmp_path, app=APP, **env) as host:
        tab = browse(at=host, who=None)
        # A chat nobody has said anything in may be looked for as one comes back.
        tab.allowed += ["401", "404"]
        tab.page.goto(host.url + "/agent/")
        dialog = tab.page.get_by_role("dialog")
        # The demo's token is none here.
        expect(dialog.get_by_role("button")).to_have_text(["I have signed in"])
        there = dialog.get_by_role("link", name="Sign in there")
        expect(there).to_have_attribute("href", host.url + "/")
        come_back = "document.dispatchEvent(new Event('visibilitychange'))"
        with tab.page.expect_response(lambda response: response.status == 401):
            tab.page.evaluate(come_back)
        expect(dialog).to_have_count(1)
        tab.page.context.request.get(f"{host.url}/login/{fresh}")
        signed_in = "'ready' in document.documentElement.dataset"
        tab.page.wait_for_function(f"() => {{ {come_back}; return {signed_in}; }}", polling=300)
        expect(dialog).to_have_count(0)


def test_the_demo_offers_its_token_and_works_with_real_agents(
    browse: Opened, tmp_path: Path
) -> None:
    with Server(tmp_path, AGENTAO_DEMO="1") as server:
        tab = browse(at=server, who=None)
        tab.allowed.append("401")
        tab.page.goto(server.url)
        tab.button("Use the demo token").click()
        tab.ready()
        tab.button("write plan.txt: Ship it on Friday.").click()
        expect(tab.box).to_be_focused()
        tab.box.press("Enter")
        tab.button("Allow once").click()
        card = tab.turn().locator(".card.tool")
        expect(card.locator(".chip")).to_have_text("Done")
        expect(card.locator(".brief")).to_have_text("plan.txt")
        expect(tab.turn().locator(".prose").last).to_contain_text("Done.")
        usage = tab.turn().locator(".usage")
        expect(usage).to_have_text(re.compile(r"^[\d,]+ tokens in · \d+ out · 1 tool · .* m?s$"))
        card.locator("summary").click()
        expect(card.locator(".result")).to_contain_text("Successfully wrote")
        tab.say("fail")
        expect(tab.turn(1).locator(".notice.bad")).to_contain_text("model could not be reached")
        tab.page.reload()
        tab.ready()
        # As it was: a call names its arguments in their order.
        expect(tab.turn().locator(".card.tool .brief")).to_have_text("plan.txt")


def test_a_token_that_is_none_is_told_and_one_can_be_forgotten(
    browse: Opened, server: Server
) -> None:
    tab = browse(who=None)
    tab.allowed.append("401")
    tab.page.goto(server.url)
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).not_to_contain_text("dev")
    dialog.get_by_label("Access token").fill("no token")
    tab.button("Continue").click()
    expect(dialog).to_contain_text("Your token is not valid")
    dialog.get_by_label("Access token").fill(token(user="forgetful"))
    tab.button("Continue").click()
    tab.ready()
    assert "forgetful" not in tab.page.evaluate("JSON.stringify(localStorage)")
    tab.button("Forget my token").click()
    expect(dialog).to_contain_text("Sign in")
    assert tab.page.evaluate("sessionStorage['agentao-token']") is None
