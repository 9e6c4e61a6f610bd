"""The pictures of the docs; ``python -m docs.build --pictures`` writes them there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.live.harness import PROJECT
from tests.live.harness import Server
from tests.live.harness import token
from tests.page import scripts
from tests.page.conftest import Opened
from tests.page.test_access import PHONE

pytestmark = pytest.mark.live

WIDE = {"viewport": {"width": 1180, "height": 965}}
EARLIER = [
    "Why was the nightly backup late?",
    "Draft the release notes for 2.4",
    "Which tests are flaky?",
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("page-light", {**WIDE, "color_scheme": "light"}),
        ("page-dark", {**WIDE, "color_scheme": "dark"}),
        ("page-phone", {**PHONE, "viewport": {"width": 390, "height": 800}}),
    ],
)
def test_a_picture_of_the_page(
    browse: Opened,
    server: Server,
    tmp_path: Path,
    fresh: str,
    name: str,
    options: dict[str, object],
) -> None:
    headers = {"Authorization": f"Bearer {token(user=fresh)}", "Accept": "application/json"}
    for number, message in enumerate(EARLIER):
        server.client.post(
            f"/chat/s{number}", json={"message": message}, headers={**headers, "Prefer": "wait=50"}
        ).raise_for_status()
    tab = browse(who=fresh, **options).open()
    (message,) = scripts.PICTURED
    tab.say(message)
    tab.gate("launch")
    expect(tab.button("Allow once")).to_be_visible()
    expect(tab.turn().locator(".hljs-number").first).to_be_visible()
    tab.page.locator("#scroll").evaluate("e => { e.scrollTop = e.scrollHeight; }")
    if name == "page-phone":
        expect(tab.button("Allow once")).to_be_in_viewport()
    else:
        expect(tab.chats).to_have_count(len(EARLIER) + 1)
    made = tmp_path / f"{name}.png"
    # Not path=: the driver would leave a thread.
    data = tab.page.screenshot()
    made.write_bytes(data)
    width, height = struct.unpack(">II", data[16:24])
    scale = int(str(options.get("device_scale_factor", 1)))
    viewport = tab.page.viewport_size or {"width": 0, "height": 0}
    assert (width, height) == (viewport["width"] * scale, viewport["height"] * scale)
    # Something is on it, and it is small enough for a repository.
    assert 20_000 < len(data) < 150_000, len(data)
    if os.environ.get("AGENTAO_WEB_PICTURES") == "docs":
        (PROJECT / "docs" / made.name).write_bytes(data)
    tab.button("Deny").click()
    expect(tab.turn().locator(".progress")).to_be_hidden()
