"""Every recipe of docs/recipes.md does what is said of it, as it is written there."""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import Page
from playwright.sync_api import Route

from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT
from tests.live.harness import Server

pytestmark = pytest.mark.live

TEXT = (PROJECT / "docs" / "recipes.md").read_text("utf-8")
RECIPES = {
    name: (language, text)
    for name, language, text in re.findall(
        r"<!-- recipe: ([\w. ]+) -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL
    )
}
MILLISECONDS = PATIENCE * 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    with Server(tmp_path_factory.mktemp("recipes"), AGENTAO_DEMO="1") as server:
        server.client.headers["Authorization"] = "Bearer dev"
        yield server


def run(server: Server, name: str, *words: str) -> str:
    """What the recipe prints; only host and port are changed."""
    language, text = RECIPES[name]
    text = text.replace("http://127.0.0.1:8000", server.url)
    shell = "sh" if text.startswith("#!/bin/sh") else "bash"
    command = {
        "sh": [shell, "-c", text, name, *words],
        "python": [sys.executable, "-W", "error", "-c", text],
    }[language]
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=server.folder, env=kept
    )
    assert done.returncode == 0, (name, done.stdout, done.stderr)
    return done.stdout


def test_every_block_is_a_recipe_and_every_recipe_is_tested() -> None:
    assert TEXT.count("\n```") == 2 * len(RECIPES)
    source = Path(__file__).read_text("utf-8")
    for name, (language, _) in RECIPES.items():
        assert language == "js" or f'"{name}"' in source, name


def test_curl_streams(server: Server) -> None:
    lines = run(server, "curl stream").splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert events[0]["type"] == "turn_begin" and events[-1]["reply"] == "1, 2, 3."
    assert run(server, "curl words") == "1, 2, 3."


@pytest.mark.parametrize("name", ["curl wait", "requests wait"])
def test_one_post_is_one_answer(server: Server, name: str) -> None:
    assert run(server, name).strip().endswith("the report is done")


def test_curl_answers_a_question(server: Server) -> None:
    asked, answered = map(json.loads, run(server, "curl answer").splitlines())
    assert asked["tool"] == "write_file" and asked["args"]["content"] == "Ship it."
    assert answered["outcome"] == "approved"


def test_curl_stops_a_turn(server: Server) -> None:
    started, stopped = map(json.loads, run(server, "curl cancel").splitlines())
    assert started["status"] == "running"
    assert stopped == {"ok": True, "cancelled": 1}


def test_a_shell_polls(server: Server) -> None:
    assert (
        run(server, "ask.sh", "count to 12")
        == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12.\n(completed)\n"
    )
    said = 'a "b" \\n c'
    assert run(server, "ask.sh", f"say {said}") == f"{said}\n(completed)\n"


def test_a_shell_is_told_what_is_wrong(server: Server) -> None:
    language, text = RECIPES["ask.sh"]
    text = text.replace("http://127.0.0.1:8000", server.url).replace("Bearer dev", "Bearer x")
    done = subprocess.run(["sh", "-c", text, "ask.sh", "hi"], capture_output=True, text=True)
    assert done.returncode == 1 and '"code":"unauthorized"' in done.stderr


def test_requests_polls(server: Server) -> None:
    assert run(server, "requests poll") == "1, 2, 3.\n(completed)\n"


# -- in a browser ------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> cabc.Iterator[Server]:
    """The API below a prefix, beside a page; streams and tickets end after a second or two."""
    given = {"AGENTAO_DEMO": "1", "AGENTAO_STREAM_LEASE": "1", "TICKET_SECONDS": "2"}
    with Server(
        tmp_path, app="tests.live.recipes_app:app", AGENTAO_HEARTBEAT="1", **given
    ) as server:
        server.client.headers["Authorization"] = "Bearer dev"
        yield server


@pytest.fixture
def page(shop: Server, chromium: Browser) -> cabc.Iterator[Page]:
    """The host's page."""
    with chromium.new_context() as context:
        found = context.new_page()
        found.set_default_timeout(MILLISECONDS)
        found.goto(f"{shop.url}/host")
        yield found


def requests_of(page: Page, part: str) -> list[str]:
    """A list that grows by each request whose address has *part* in it."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if part in request.url else None)
    return found


def meet(page: Page, condition: cabc.Callable[[], t.Any], complaint: str) -> None:
    """Let the page live until *condition* holds."""
    for _ in range(int(PATIENCE * 20)):
        if condition():
            return
        page.wait_for_timeout(50)  # Playwright's own loop: its events come meanwhile.
    raise AssertionError(complaint)


def types(page: Page) -> list[str]:
    return t.cast(list[str], page.evaluate("seen.map((event) => event.type)"))


def in_order(page: Page) -> bool:
    """No event twice, none missing that has a number."""
    numbers = page.evaluate("seen.map((event) => event.seq)")
    return numbers == sorted(set(numbers))


def test_fetch_streams_and_says_what_is_wrong(shop: Server, page: Page) -> None:
    talk = "([sid, words]) => talk('/agent', sid, words, (event) => seen.push(event))"
    page.evaluate(talk, ["s", "count to 40"])
    told = page.evaluate("seen")
    assert told[0]["type"] == "turn_begin" and told[-1]["reply"].startswith("1, 2, 3,")
    assert "".join(e["data"].get("chunk", "") for e in told) == told[-1]["reply"]
    error = page.evaluate(f"({talk})(['-no-id', 'hi']).catch((error) => error.message)")
    assert "a session id is" in error


def test_fetch_starts_one_turn_over_a_bad_network(shop: Server, page: Page) -> None:
    """The first POST is lost on its way, of the second one the answer."""
    lost: list[str] = []

    def lose(route: Route) -> None:
        lost.append(route.request.method)
        if len(lost) == 2:
            route.fetch()
        route.abort() if len(lost) < 3 else route.continue_()

    page.route("**/agent/chat/s", lose)
    page.evaluate("talk('/agent', 's', 'say it once', (event) => seen.push(event))")
    assert lost == ["POST"] * 3
    assert types(page)[0] == "turn_begin" and types(page)[-1] == "done"
    assert shop.client.get("/agent/session/s").json()["turns"] == 1


def test_fetch_goes_on_where_a_stream_ended(shop: Server, page: Page) -> None:
    again = requests_of(page, "/agent/chat/s/events")
    page.evaluate(
        "() => { window.end = talk('/agent', 's', 'write a.txt: x', (e) => seen.push(e)) }"
    )
    meet(page, lambda: "tool_confirmation" in types(page), "no question came")
    meet(page, lambda: len(again) >= 2, "the page did not come back")
    (question,) = (e for e in page.evaluate("seen") if e["type"] == "tool_confirmation")
    answer = {"question_id": question["data"]["question_id"], "approve": True}
    assert shop.client.post("/agent/chat/s/answer", json=answer).status_code == 200
    page.evaluate("window.end")
    assert types(page).count("turn_begin") == 1 and types(page)[-1] == "done"
    assert in_order(page)


def test_an_event_source_outlives_its_ticket(shop: Server, page: Page) -> None:
    headers = {"Accept": "application/json", "Prefer": "wait=50"}
    first = shop.client.post("/agent/chat/s", json={"message": "say one"}, headers=headers)
    assert first.status_code == 200
    tickets = requests_of(page, "/agent/session/s/ticket")
    refused: list[int] = []
    page.on("response", lambda r: refused.append(r.status) if r.status == 401 else None)
    page.evaluate("follow('/agent', 's', (event) => seen.push(event))")
    meet(page, lambda: len(tickets) >= 3 and refused, "its tickets never ended")
    second = shop.client.post("/agent/chat/s", json={"message": "say two"}, headers=headers)
    assert second.status_code == 200
    meet(page, lambda: types(page).count("done") == 2, "the second turn was not seen")
    unknown = page.evaluate("follow('/agent', 'nobody', seen.push).catch((e) => e.message)")
    assert unknown == "no such session"
    replies = [e["reply"] for e in page.evaluate("seen") if e["type"] == "done"]
    assert replies == ["one", "two"] and in_order(page)
