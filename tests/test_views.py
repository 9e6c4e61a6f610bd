"""Every route through Flask's test client, with scripted agents: answers, refusals, the host."""

from __future__ import annotations

import base64
import collections.abc as cabc
import itertools
import json
import logging
import time
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask import Response
from flask import session
from flask.testing import FlaskClient
from openapi_spec_validator import validate

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.extension import pool_of
from agentao_web.testing import Gate
from agentao_web.testing import Scripted
from agentao_web.testing import Step
from agentao_web.testing import crash
from agentao_web.testing import emit
from agentao_web.testing import end
from agentao_web.testing import pause
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.testing import use
from agentao_web.views import ROUTES
from tests.patience import PATIENCE

KEY = "a-test-key-of-some-length"
TOKENS = Tokens([KEY])
Make = cabc.Callable[..., "Web"]


class Web:
    """An application of its own, and a client that is somebody."""

    def __init__(self, app: Flask, agents: Scripted, prefix: str) -> None:
        self.app = app
        self.agents = agents
        self.prefix = prefix
        self.client = app.test_client()

    def headers(self, who: Principal | None = None, **more: str) -> dict[str, str]:
        token = TOKENS.issue(who or Principal("acme", "ann"), ttl=60)
        return {"Authorization": f"Bearer {token}", **more}

    def get(self, path: str, who: Principal | None = None, **headers: str) -> t.Any:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return self.client.get(self.prefix + path, headers=self.headers(who, **named))

    def post(
        self, path: str, body: t.Any = None, who: Principal | None = None, **headers: str
    ) -> t.Any:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        named.setdefault("Content-Type", "application/json")
        data = body if isinstance(body, bytes | str) else json.dumps(body or {})
        return self.client.post(self.prefix + path, data=data, headers=self.headers(who, **named))

    def patch(self, path: str, body: t.Any, who: Principal | None = None, **headers: str) -> t.Any:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        named.setdefault("Content-Type", "application/json")
        data = body if isinstance(body, bytes | str) else json.dumps(body)
        return self.client.patch(self.prefix + path, data=data, headers=self.headers(who, **named))

    def delete(self, path: str, who: Principal | None = None) -> t.Any:
        return self.client.delete(self.prefix + path, headers=self.headers(who))

    def ask(self, message: str = "hi", sid: str = "s", **fields: t.Any) -> dict[str, t.Any]:
        """One POST that waits for the answer."""
        response = self.post(
            f"/chat/{sid}",
            {"message": message, **fields},
            Accept="application/json",
            Prefer="wait=50",
        )
        assert response.status_code == 200, response.json
        return t.cast(dict[str, t.Any], response.json)


@pytest.fixture
def web(tmp_path: t.Any) -> cabc.Iterator[Make]:
    made: list[Web] = []

    def make(
        *steps: Step, prefix: str = "", by: dict[str, list[Step]] | None = None, **config: t.Any
    ) -> Web:
        agents = scripted(*(steps or (say("he", "llo"),)), by=by)
        app = Flask("host")
        app.config.update(
            AGENTAO_ROOT=tmp_path / f"root{len(made)}",
            AGENTAO_SECRET_KEYS=KEY,
            **{f"AGENTAO_{k.upper()}": v for k, v in config.items()},
        )
        AgentaoWeb(agents=agents).init_app(app, url_prefix=prefix)
        made.append(Web(app, agents, prefix))
        return made[-1]

    yield make
    for one in made:
        shutdown(one.app, grace=2)


def sse(response: t.Any) -> list[dict[str, t.Any]]:
    """The events of a stream; every id is its event's seq."""
    events = []
    for block in response.get_data(as_text=True).split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        if "data" in fields:
            events.append(event := json.loads(fields["data"]))
            assert fields.get("id") == (None if event["seq"] is None else str(event["seq"]))
    return events


def types(events: list[dict[str, t.Any]]) -> list[str]:
    """The types in their order; how text was cut into events does not matter."""
    return [k for k, _ in itertools.groupby(e["type"] for e in events)]


def assert_error(response: t.Any, status: int, code: str) -> dict[str, t.Any]:
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.content_type == "application/json"
    body = response.json
    assert set(body) == {"code", "message", "details"}
    assert body["code"] == code
    return t.cast(dict[str, t.Any], body)


# -- starting a turn ---------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream", "", "text/event-stream, */*;q=0.1"])
def test_curl_and_the_templates_clients_get_a_stream(web: Make, accept: str) -> None:
    response = web().post("/chat/s", {"message": "hi"}, Accept=accept)
    assert response.status_code == 200
    assert response.content_type == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    events = sse(response)
    assert types(events) == ["turn_begin", "llm_text", "done"]
    assert "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text") == "hello"
    assert events[-1]["reply"] == "hello"
    assert events[-1]["data"]["status"] == "completed"


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("application/json", False),
        ("application/json, */*", False),
        ("application/json, text/event-stream", True),
        ("application/json;q=0.9, text/event-stream;q=0.8", False),
        ("application/json;q=0.5, text/event-stream;q=0.8", True),
        ("application/*", False),
    ],
)
def test_the_higher_q_wins_and_a_name_beats_a_star(web: Make, accept: str, streams: bool) -> None:
    response = web().post("/chat/s", {"message": "hi"}, Accept=accept)
    assert response.status_code == (200 if streams else 202)
    assert response.content_type.startswith("text/event-stream" if streams else "application/json")


def test_nothing_we_can_make_is_406_and_starts_nothing(web: Make) -> None:
    w = web()
    assert_error(w.post("/chat/s", {"message": "hi"}, Accept="text/html"), 406, "not_acceptable")
    assert_error(w.get("/session/s"), 404, "not_found")


def test_json_is_202_with_where_to_read(web: Make) -> None:
    w = web()
    response = w.post("/chat/s", {"message": "hi"}, Accept="application/json")
    assert response.status_code == 202
    body = response.json
    assert (body["session_id"], body["status"]) == ("s", "running")
    assert response.headers["Location"] == body["events_url"]
    w.ask("wait for me", on_busy="queue")
    page = w.get(f"/chat/s/events?after={body['cursor']}").json
    mine = [e for e in page["events"] if e["turn_id"] == body["turn_id"]]
    assert types(mine) == ["turn_begin", "llm_text", "done"]


def test_prefer_wait_makes_it_one_post(web: Make) -> None:
    w = web()
    response = w.post(
        "/chat/s", {"message": "hi"}, Accept="application/json", Prefer="respond-async, wait=50"
    )
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=50"
    assert (response.json["status"], response.json["reply"]) == ("completed", "hello")


def test_nobody_waits_longer_than_a_proxy_does(web: Make) -> None:
    """nginx and others give up after 60 seconds; a longer wish is cut down, not refused."""
    w = web()
    for wish in ("60", "55", "3600", "999999999"):
        response = w.post(
            "/chat/s", {"message": "hi"}, Accept="application/json", Prefer=f"wait={wish}"
        )
        assert response.status_code == 200
        assert response.headers["Preference-Applied"] == "wait=55"
        assert len(w.get(f"/chat/s/events?after=0&wait={wish}").json["events"]) >= 3
    assert_error(w.get("/chat/s/events?wait=-1"), 400, "invalid_request")
    assert_error(w.get("/chat/s/events?wait=1e3"), 400, "invalid_request")


def test_prefer_wait_is_202_when_the_time_is_up(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("late"))
    response = w.post("/chat/s", {"message": "hi"}, Accept="application/json", Prefer="wait=1")
    assert response.status_code == 202
    gate.open()
    assert w.ask("again", on_busy="queue")["reply"] == "late"


def test_a_failed_turn_is_told_to_who_waited(web: Make) -> None:
    body = web(end("llm_error")).ask()
    assert (body["status"], body["reason"]) == ("failed", "llm_unavailable")
    assert body["error"]["code"] == "llm_unavailable"


@pytest.mark.parametrize("reason", ["max_iterations", "length_truncated", "doom_loop", "no_output"])
def test_an_unfinished_answer_is_incomplete_with_its_reason(web: Make, reason: str) -> None:
    body = web(say("par", "tial"), end(reason)).ask()
    assert (body["status"], body["reason"], body["reply"]) == ("incomplete", reason, "partial")


def test_a_crash_is_an_internal_error_with_an_id_in_the_log(
    web: Make, caplog: pytest.LogCaptureFixture
) -> None:
    events = sse(web(crash(ValueError("/etc/secret"))).post("/chat/s", {"message": "hi"}))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)
    assert events[-1]["error"]["details"]["error_id"] in caplog.text
    assert "/etc/secret" in caplog.text


def test_busy_is_409_with_retry_after(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate))
    first = w.post("/chat/s", {"message": "hi"}, Accept="application/json")
    refused = w.post("/chat/s", {"message": "too"})
    body = assert_error(refused, 409, "session_busy")
    assert body["details"]["turn_id"] == first.json["turn_id"]
    assert refused.headers["Retry-After"] == "1"
    gate.open()


def test_images_reach_the_agent(web: Make) -> None:
    w = web()
    png = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
    body = w.ask("look", images=[{"data": png, "mimeType": "image/png"}])
    assert body["status"] == "completed"
    assert w.get("/session/s/messages").json["messages"][0]["images"] == 1


# -- reading -----------------------------------------------------------------------------------


def test_long_poll_and_sse_of_the_same_range_are_the_same(web: Make) -> None:
    w = web(say("a", "b"), use("read_file", "text", file_path="x"), say("c"))
    w.ask("one")
    w.ask("two")
    polled = w.get("/chat/s/events").json
    streamed = sse(w.get("/chat/s/events", Accept="text/event-stream"))
    assert polled["events"] == streamed
    assert polled["state"] == "idle"
    assert polled["cursor"] == streamed[-1]["seq"]
    middle = streamed[4]["seq"]
    assert w.get(f"/chat/s/events?after={middle}").json["events"] == streamed[5:]
    resumed = w.get("/chat/s/events?after=0", Accept="text/event-stream", Last_Event_ID=str(middle))
    assert sse(resumed) == streamed[5:], "Last-Event-ID wins over after"


def test_long_poll_pages_by_limit_without_losing_text(web: Make) -> None:
    w = web(say(*"abcdefgh"))
    w.ask()
    text, cursor = "", 0
    while page := w.get(f"/chat/s/events?after={cursor}&limit=2&wait=0").json["events"]:
        text += "".join(e["data"].get("chunk", "") for e in page)
        cursor = page[-1]["seq"]
    assert text == "abcdefgh"


def test_long_poll_waits_for_what_comes(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("finally"))
    cursor = w.post("/chat/s", {"message": "hi"}, Accept="application/json").json["cursor"]
    page = w.get(f"/chat/s/events?after={cursor}").json
    assert (types(page["events"]), page["state"]) == (["turn_begin"], "running")
    assert w.get(f"/chat/s/events?after={page['cursor']}&wait=0").json["events"] == []
    gate.open()
    texts = []
    while "done" not in texts:
        page = w.get(f"/chat/s/events?after={page['cursor']}").json
        texts += types(page["events"])
    assert texts == ["llm_text", "done"]


def test_an_event_source_is_told_to_stop_with_204(web: Make) -> None:
    w = web()
    last = w.ask()["cursor"]
    again = w.get("/chat/s/events", Accept="text/event-stream", Last_Event_ID=str(last))
    assert (again.status_code, again.data) == (204, b"")


def test_a_cursor_from_another_life_gets_a_gap(web: Make) -> None:
    w = web()
    w.ask()
    page = w.get("/chat/s/events?after=9007199254740991").json
    assert types(page["events"]) == ["gap", "turn_begin", "llm_text", "done"]
    assert page["events"][0]["data"]["reason"] == "ahead_of_log"


def test_idle_is_said_only_with_the_last_event(web: Make) -> None:
    w = web(say(*"abcdef"))
    w.ask()
    cursor, states = 0, []
    while page := w.get(f"/chat/s/events?after={cursor}&limit=3&wait=0").json:
        states.append((page["state"], "done" in types(page["events"])))
        cursor = page["cursor"]
        if page["state"] == "idle":
            break
    assert states[-1] == ("idle", True)
    assert {s for s in states[:-1]} == {("running", False)}


def test_an_unknown_session_has_no_events(web: Make) -> None:
    assert_error(web().get("/chat/nobody/events?wait=0"), 404, "not_found")


def test_a_head_request_opens_no_stream(web: Make) -> None:
    w = web()
    w.ask()
    head = w.client.head("/chat/s/events?follow=1", headers=w.headers(Accept="text/event-stream"))
    assert (head.status_code, head.data) == (200, b"")
    assert pool_of(w.app).peek(pool_key())._readers == {}  # type: ignore[union-attr]


def pool_key() -> t.Any:
    from agentao_web.core.names import SessionKey

    return SessionKey("acme", "ann", "s")


# -- events by allow-list ----------------------------------------------------------------------


def test_only_listed_events_and_fields_leave(web: Make) -> None:
    w = web(
        emit("llm_call_delta", added_messages=["<system-reminder>secret"]),
        emit("turn_start"),
        emit("llm_call_completed", prompt_tokens=7, completion_tokens=2, error_message="secret"),
        emit("tool_start", tool="t", call_id="c", args={"n": float("nan"), "o": object()}),
        emit("tool_complete", tool="t", call_id="c", status="error", duration_ms=3, error="secret"),
        emit("tool_result", tool="t", call_id="c", content="x" * 5000, disk_path="/secret"),
        emit("llm_retry", retry=1, max_retries=2, delay_s=1.5, reason="status=503", raw="secret"),
        emit("turn_end", final_text="secret"),
        say("ok"),
    )
    body = w.ask()
    events = w.get("/chat/s/events").json["events"]
    assert "secret" not in json.dumps(events)
    assert types(events) == [
        "turn_begin",
        "usage",
        "tool_start",
        "tool_complete",
        "tool_result",
        "llm_retry",
        "llm_text",
        "done",
    ]
    result = events[4]["data"]
    assert (len(result["content"]), result["truncated"]) == (4096, True)
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2}
    assert events[2]["data"]["args"]["n"] == "nan"


def test_call_ids_are_ours_and_pair_up(web: Make) -> None:
    w = web(use("one"), use("two"))
    w.ask("a")
    w.ask("b")
    events = w.get("/chat/s/events").json["events"]
    starts = [e["data"]["call_id"] for e in events if e["type"] == "tool_start"]
    ends = [e["data"]["call_id"] for e in events if e["type"] == "tool_complete"]
    assert starts == ends
    assert len(set(starts)) == 4, "providers repeat theirs from turn to turn"


def test_workspace_paths_are_relative_and_bad_text_is_mended(web: Make) -> None:
    w = web(say("x"))
    w.ask()
    folder = str(w.agents.agents[0].transport._workspace)
    w.agents._default = (say(f"see {folder}/notes.txt in {folder}", "\ud800", "é"),)
    assert w.ask("b")["reply"] == "see notes.txt in .\ufffdé"


def test_long_text_is_cut_into_events_and_none_of_it_is_lost(web: Make) -> None:
    w = web(say("x" * 100_000))
    assert len(w.ask()["reply"]) == 100_000
    chunks = [
        e["data"]["chunk"]
        for e in w.get("/chat/s/events").json["events"]
        if e["type"] == "llm_text"
    ]
    assert "".join(chunks) == "x" * 100_000
    assert max(map(len, chunks)) <= 50_000


def test_thinking_is_sent_only_if_switched_on(web: Make) -> None:
    for on in (False, True):
        w = web(emit("thinking", text="hmm"), thinking=on)
        w.ask()
        assert ("thinking" in types(w.get("/chat/s/events").json["events"])) is on


# -- sessions ----------------------------------------------------------------------------------


def test_the_snapshot_tells_where_a_session_is(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), emit("llm_call_completed", prompt_tokens=5))
    first = w.post("/chat/s", {"message": "Tell  me\nall"}, Accept="application/json").json
    second = w.post("/chat/s", {"message": "b", "on_busy": "queue"}, Accept="application/json").json
    assert second["status"] == "queued"
    now = w.get("/session/s").json
    assert (now["state"], now["title"], now["turn"]["turn_id"]) == (
        "running",
        "Tell me all",
        first["turn_id"],
    )
    assert [q["turn_id"] for q in now["queued"]] == [second["turn_id"]]
    gate.open()
    w.ask("c", on_busy="queue")
    then = w.get("/session/s").json
    assert (then["state"], then["turn"], then["queued"]) == ("idle", None, [])
    assert (then["turns"], then["usage"]) == (3, {"prompt_tokens": 15})


def test_the_arguments_of_a_tool_keep_their_order(web: Make) -> None:
    w = web(use("write_file", file_path="plan.txt", content="x"))
    w.ask("go")
    for path in ("/session/s/messages", "/chat/s/events?after=0&wait=0"):
        text = w.get(path).get_data(as_text=True)
        assert '"args":{"file_path":"plan.txt","content":"x"}' in text, path


def test_messages_are_paged_both_ways(web: Make) -> None:
    w = web()
    for n in range(3):
        w.ask(f"m{n}")
    every = w.get("/session/s/messages").json
    assert [m["content"] for m in every["messages"]] == [
        "m0",
        "hello",
        "m1",
        "hello",
        "m2",
        "hello",
    ]
    assert every["more"] is False
    newest = w.get("/session/s/messages?limit=2").json
    assert ([m["id"] for m in newest["messages"]], newest["more"]) == ([5, 6], True)
    older = w.get("/session/s/messages?limit=2&before=5").json
    assert [m["id"] for m in older["messages"]] == [3, 4]
    onward = w.get("/session/s/messages?limit=2&after=4").json
    assert ([m["id"] for m in onward["messages"]], onward["more"]) == ([5, 6], False)
    between = w.get("/session/s/messages?limit=2&after=1&before=5").json
    assert ([m["id"] for m in between["messages"]], between["more"]) == ([2, 3], True)
    between = w.get("/session/s/messages?after=2&before=5").json
    assert ([m["id"] for m in between["messages"]], between["more"]) == ([3, 4], False)
    assert w.get("/session/s/messages?after=5&before=2").json == {"messages": [], "more": False}


def test_cancel_answers_how_many(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate))
    w.post("/chat/s", {"message": "a"}, Accept="application/json")
    gate.reached()
    assert w.post("/chat/s/cancel").json == {"ok": True, "cancelled": 1}
    assert w.post("/chat/nobody/cancel").json == {"ok": True, "cancelled": 0}


def test_delete_forgets_the_session(web: Make) -> None:
    w = web()
    w.ask()
    assert w.delete("/session/s").json == {"ok": True}
    assert_error(w.get("/session/s"), 404, "not_found")
    assert w.delete("/session/s").json == {"ok": True}


def test_two_tenants_and_users_with_one_session_id_never_meet(web: Make) -> None:
    w = web()
    people = [Principal("acme", "ann"), Principal("acme", "bob"), Principal("other", "ann")]
    for n, who in enumerate(people):
        w.post(
            "/chat/s",
            {"message": f"secret {n}"},
            who=who,
            Accept="application/json",
            Prefer="wait=50",
        )
    for n, who in enumerate(people):
        text = w.get("/session/s/messages", who=who).get_data(as_text=True)
        assert [f"secret {m}" in text for m in range(3)] == [m == n for m in range(3)]
    assert w.delete("/session/s", who=people[0]).json == {"ok": True}
    assert w.get("/session/s", who=people[1]).status_code == 200
    assert len({str(p) for p in w.agents.principals}) == 3


def test_a_session_can_be_given_a_title(web: Make) -> None:
    w = web()
    w.ask("the first words")
    assert w.get("/session/s").json["title"] == "the first words"
    named = w.patch("/session/s", {"title": "  Plans \n for\tMay  "})
    assert (named.status_code, named.json) == (200, {"session_id": "s", "title": "Plans for May"})
    assert w.get("/session/s").json["title"] == "Plans for May"
    assert w.patch("/session/s", {"title": "é" * 200}).status_code == 200
    w.ask("more words")
    assert w.get("/session/s").json["title"] == "é" * 200, "a turn does not change it"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "title"),
        ({"title": ""}, "title"),
        ({"title": " \n\t"}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"title": None}, "title"),
        ({"title": 1}, "title"),
        ({"title": ["x"]}, "title"),
        ({"title": "a\0b"}, "title"),
        ('{"title": "\\ud800"}', "title"),
        ({"title": "x", "pinned": True}, "pinned"),
        ({"Title": "x"}, "Title"),
        ("[]", "body"),
        ("{", "body"),
        (b"", "body"),
    ],
)
def test_a_bad_title_is_refused_and_changes_nothing(web: Make, body: t.Any, field: str) -> None:
    w = web()
    w.ask("as it was")
    error = assert_error(w.patch("/session/s", body), 400, "invalid_request")
    assert error["details"]["field"] == field
    assert w.get("/session/s").json["title"] == "as it was"


def test_only_your_own_session_can_be_given_a_title(web: Make) -> None:
    w = web()
    w.ask("mine")
    assert_error(w.patch("/session/none", {"title": "x"}), 404, "not_found")
    bob = w.patch("/session/s", {"title": "x"}, Principal("acme", "bob"))
    assert_error(bob, 404, "not_found")
    assert_error(w.patch("/session/-", {"title": "x"}), 400, "invalid_request")
    wrong = w.patch("/session/s", {"title": "x"}, Content_Type="text/plain")
    assert_error(wrong, 415, "unsupported_media_type")
    assert_error(w.client.patch("/session/s", json={"title": "x"}), 401, "unauthorized")
    assert w.get("/session/s").json["title"] == "mine"


def ids(page: t.Any) -> list[str]:
    return [session["session_id"] for session in page.json["sessions"]]


def test_sessions_are_your_own_and_the_newest_first(web: Make) -> None:
    w = web()
    people = [Principal("acme", "ann"), Principal("acme", "bob"), Principal("acme")]
    assert w.get("/sessions").json == {"sessions": [], "next": None}
    for n in range(3):
        for who in people:
            headers = {"Accept": "application/json", "Prefer": "wait=50"}
            body = {"message": f"{who.user} {n}"}
            assert w.post(f"/chat/s{n}", body, who, **headers).status_code == 200
    w.ask("again", sid="s0")
    page = w.get("/sessions")
    assert ids(page) == ["s0", "s2", "s1"]
    assert page.json["next"] is None
    assert page.json["sessions"][0] == {
        name: w.get("/session/s0").json[name]
        for name in ("session_id", "title", "created_at", "updated_at", "turns", "usage")
    }
    assert page.json["sessions"][0]["turns"] == 2
    assert [s["title"] for s in w.get("/sessions", people[1]).json["sessions"]] == [
        "bob 2",
        "bob 1",
        "bob 0",
    ]
    w.delete("/session/s2")
    assert ids(w.get("/sessions")) == ["s0", "s1"]
    assert ids(w.get("/sessions", people[2])) == ["s2", "s1", "s0"]


def test_sessions_come_in_pages(web: Make) -> None:
    w = web()
    for n in range(5):
        w.ask(sid=f"s{n}")
    seen: list[str] = []
    query = {"limit": "2"}
    for size in (2, 2, 1):
        page = w.client.get("/sessions", query_string=query, headers=w.headers())
        assert len(ids(page)) == size
        seen += ids(page)
        query["page"] = page.json["next"]
    assert (seen, query["page"]) == (["s4", "s3", "s2", "s1", "s0"], None)
    assert w.get("/sessions?limit=5").json["next"] is None, "none is left"
    assert len(ids(w.get("/sessions?limit=1"))) == 1
    assert len(ids(w.get("/sessions?limit=200"))) == 5


@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", ""])
def test_a_bad_limit_of_sessions_says_so(web: Make, limit: str) -> None:
    error = assert_error(web().get(f"/sessions?limit={limit}"), 400, "invalid_request")
    assert error["details"]["field"] == "limit"


def test_an_empty_page_is_the_first_one(web: Make) -> None:
    """As a client sends it that has no ``next`` yet."""
    w = web()
    w.ask()
    assert w.get("/sessions?page=").json == w.get("/sessions").json


@pytest.mark.parametrize("page", ["x", "5", "~s", "nan~s", "inf~s", "1e999~s", "5~-", "5~a/b"])
def test_a_bad_page_of_sessions_says_so(web: Make, page: str) -> None:
    error = assert_error(web().get(f"/sessions?page={page}"), 400, "invalid_request")
    assert error["details"]["field"] == "page"


def test_an_old_session_goes_with_its_own_folder(web: Make) -> None:
    w = web(workspace="session", conversation_ttl=3600)
    w.ask()
    folder = Path(w.agents.agents[0].transport._workspace)
    (folder / "notes.txt").write_text("mine")
    pool = pool_of(w.app)
    pool.tick(pool.clock() + 3700)
    until = time.monotonic() + PATIENCE
    while w.get("/session/s").status_code == 200 or pool.store.session(pool_key()) is not None:
        assert time.monotonic() < until, "still there"
    assert not folder.exists()
    assert w.ask("a new life")["status"] == "completed"


# -- the same request again --------------------------------------------------------------------

AGAIN = {"Idempotency_Key": "k-1", "Accept": "application/json"}


def test_a_repeated_stream_replays_the_turn(web: Make) -> None:
    w = web()
    first, again = (
        sse(w.post("/chat/s", {"message": "hi"}, Idempotency_Key="k-1")) for _ in range(2)
    )
    assert types(first) == ["turn_begin", "llm_text", "done"]
    assert {e["turn_id"] for e in again} == {first[0]["turn_id"]}
    assert [again[0], again[-1]] == [first[0], first[-1]]
    assert text_of(again) == text_of(first) == "hello"
    assert w.get("/session/s").json["turns"] == 1


def text_of(events: list[dict[str, t.Any]]) -> str:
    return "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text")


def test_a_repeated_request_joins_the_turn_that_runs(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("once"))
    first = w.post("/chat/s", {"message": "hi"}, **AGAIN)
    gate.reached()
    again = w.post("/chat/s", {"message": "hi"}, **AGAIN)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json == first.json
    assert again.headers["Location"] == first.headers["Location"]
    gate.open()
    waited = w.post("/chat/s", {"message": "hi"}, Prefer="wait=50", **AGAIN)
    assert (waited.status_code, waited.json["reply"]) == (200, "once")
    assert waited.json["turn_id"] == first.json["turn_id"]
    assert w.get("/session/s").json["turns"] == 1


def test_a_repeated_request_joins_the_turn_that_waits(web: Make) -> None:
    gate = Gate()
    w = web(say("hello"), by={"first": [pause(gate)]})
    w.post("/chat/s", {"message": "first"}, Accept="application/json")
    gate.reached()
    body = {"message": "second", "on_busy": "queue"}
    first, again = (w.post("/chat/s", body, **AGAIN) for _ in range(2))
    assert (again.json["status"], again.json) == ("queued", first.json)
    assert len(w.get("/session/s").json["queued"]) == 1
    gate.open()
    waited = w.post("/chat/s", body, Prefer="wait=50", **AGAIN)
    assert (waited.json["turn_id"], waited.json["reply"]) == (first.json["turn_id"], "hello")


def test_a_repeated_request_is_answered_with_how_the_turn_ended(web: Make) -> None:
    w = web(by={"fail": [end("llm_error")]})
    for message, status in (("hi", "completed"), ("fail", "failed")):
        headers = {**AGAIN, "Idempotency_Key": message}
        first = w.post("/chat/s", {"message": message}, Prefer="wait=50", **headers)
        again = w.post("/chat/s", {"message": message}, **headers)
        assert (again.status_code, again.json["status"]) == (200, status)
        assert again.json == first.json


def test_another_body_with_the_same_key_is_a_conflict(web: Make) -> None:
    """The bytes count: what is the same JSON may be another request."""
    w = web()
    body = '{"message": "hi"}'
    assert w.post("/chat/s", body, Prefer="wait=50", **AGAIN).status_code == 200
    for other in ('{"message":"hi"}', '{"message": "ho"}', body + " "):
        assert_error(w.post("/chat/s", other, **AGAIN), 409, "idempotency_conflict")
    assert w.post("/chat/s", body.encode(), **AGAIN).status_code == 200
    assert w.get("/session/s").json["turns"] == 1


def test_a_key_is_of_one_session_and_one_user(web: Make) -> None:
    w = web()
    bob = Principal("acme", "bob")
    turns = [
        w.post(path, {"message": message}, who, Prefer="wait=50", **AGAIN).json["turn_id"]
        for path, message, who in (
            ("/chat/a", "1", None),
            ("/chat/b", "2", None),
            ("/chat/a", "3", bob),
        )
    ]
    assert len(set(turns)) == 3


@pytest.mark.parametrize("key", ["", " ", "a b", "k\té", "é", "x" * 256])
def test_a_bad_key_is_400_and_starts_nothing(web: Make, key: str) -> None:
    w = web()
    refused = w.post("/chat/s", {"message": "hi"}, Idempotency_Key=key)
    error = assert_error(refused, 400, "invalid_request")
    assert error["details"]["field"] == "Idempotency-Key"
    assert_error(w.get("/session/s"), 404, "not_found")
    longest = w.post("/chat/s", {"message": "hi"}, Idempotency_Key="x" * 255)
    assert sse(longest)[-1]["type"] == "done"


def test_a_refusal_stores_nothing_under_the_key(web: Make) -> None:
    gate = Gate()
    w = web(say("hello"), by={"first": [pause(gate)]})
    first = w.post("/chat/s", {"message": "first"}, Accept="application/json").json
    gate.reached()
    assert_error(w.post("/chat/s", {"message": "refused"}, **AGAIN), 409, "session_busy")
    assert_error(w.post("/chat/s", {"message": ""}, **AGAIN), 400, "invalid_request")
    gate.open()
    w.ask("between", on_busy="queue")
    taken = w.post("/chat/s", {"message": "another body"}, Prefer="wait=50", **AGAIN)
    assert (taken.status_code, taken.json["reply"]) == (200, "hello")
    assert taken.json["turn_id"] != first["turn_id"]


def test_delete_forgets_the_keys(web: Make) -> None:
    w = web()
    first = w.post("/chat/s", {"message": "hi"}, Prefer="wait=50", **AGAIN)
    w.delete("/session/s")
    other = w.post("/chat/s", {"message": "something else"}, Prefer="wait=50", **AGAIN)
    assert other.status_code == 200
    assert other.json["turn_id"] != first.json["turn_id"]


# -- who is asking -----------------------------------------------------------------------------

GUARDED = [
    ("POST", "/chat/s"),
    ("POST", "/chat/s/cancel"),
    ("POST", "/chat/s/answer"),
    ("GET", "/chat/s/events"),
    ("DELETE", "/session/s"),
    ("GET", "/session/s"),
    ("PATCH", "/session/s"),
    ("POST", "/session/s/ticket"),
    ("GET", "/sessions"),
    ("GET", "/session/s/messages"),
]


def bad_tokens() -> dict[str, str | None]:
    good = TOKENS.issue(Principal("acme", "ann"), ttl=60)
    return {
        "missing": None,
        "empty": "Bearer ",
        "basic": "Basic YTpi",
        "nonsense": "Bearer nonsense",
        "tampered": "Bearer " + good[:-2] + ("AA" if good[-2:] != "AA" else "BB"),
        "wrong key": "Bearer "
        + Tokens(["another-key-altogether"]).issue(Principal("acme"), ttl=60),
        "expired": "Bearer " + Tokens([KEY], clock=lambda: 0).issue(Principal("acme"), ttl=60),
        "the demo's": "Bearer dev",
        "no latin": "Basic \udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    }


@pytest.mark.parametrize("name", bad_tokens())
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_good_token_it_is_401_in_one_form(
    web: Make, method: str, path: str, name: str
) -> None:
    value = bad_tokens()[name]
    headers = {} if value is None else {"Authorization": value}
    response = web().client.open(path, method=method, headers=headers)
    body = assert_error(response, 401, "unauthorized")
    assert body["details"] == {}
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_guarded_route_is_in_the_list_above() -> None:
    listed = {(m, p.replace("/s/", "/<sid>/")) for m, p in GUARDED}
    listed = {(m, p[:-1] + "<sid>" if p.endswith("/s") else p) for m, p in listed}
    assert {(r.method, r.path) for r in ROUTES if not r.public and r.scheme == "bearer"} == listed


def test_an_older_key_is_still_good(web: Make) -> None:
    w = web()
    w.app.extensions["agentao_web"].authenticate = None
    newer = Tokens(["the-newest-key-there-is", KEY])
    assert newer.read(TOKENS.issue(Principal("acme"), ttl=60)) == Principal("acme")
    assert TOKENS.read(newer.issue(Principal("acme"), ttl=60)) is None


def test_dev_is_a_token_in_the_demo_only(web: Make) -> None:
    w = web(demo=True)
    headers = {"Authorization": "Bearer dev", "Content-Type": "application/json"}
    answer = w.client.post("/chat/s", data='{"message": "hi"}', headers=headers)
    assert sse(answer)[-1]["reply"] == "hello"
    assert w.agents.principals == [Principal("demo-tenant")]


@pytest.mark.parametrize(
    "tenant", ["../../etc", "/abs", "a/../b", "x" * 256, "C:\\x", "..", "ÄÖ 日本"]
)
def test_names_never_leave_the_root(web: Make, tmp_path: t.Any, tenant: str) -> None:
    w = web(workspace="session")
    who = Principal(tenant, tenant)
    response = w.post(
        "/chat/s", {"message": "hi"}, who=who, Accept="application/json", Prefer="wait=50"
    )
    assert response.json["status"] == "completed"
    folder = w.agents.agents[0].transport._workspace
    assert folder.startswith(str(tmp_path / "root0" / "workspaces") + "/")
    assert ".." not in folder


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "x" * 257, "\ud800"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Principal(name or "", name)


# -- bad input ---------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
BAD_BODIES: dict[str, tuple[t.Any, int, str | None]] = {
    "malformed": ("{", 400, "body"),
    "empty": (b"", 400, "body"),
    "blank": (b"  \n", 400, "body"),
    "a list": ("[]", 400, "body"),
    "null": ("null", 400, "body"),
    "not utf-8": (b'{"message": "\xff"}', 400, "body"),
    "NaN": ('{"message": "a", "timeout": NaN}', 400, "body"),
    "deep": ('{"message": "a", "x": ' + DEEP + "}", 400, "body"),
    "huge number": ('{"message": "a", "x": ' + "9" * 5000 + "}", 400, "body"),
    "no message": ("{}", 400, "message"),
    "message a number": ('{"message": 1}', 400, "message"),
    "message null": ('{"message": null}', 400, "message"),
    "message a list": ('{"message": ["a"]}', 400, "message"),
    "message blank": ('{"message": " \\n\\t"}', 400, "message"),
    "message with NUL": ('{"message": "a\\u0000b"}', 400, "message"),
    "lone surrogate": ('{"message": "\\ud800"}', 400, "message"),
    "on_busy unknown": ('{"message": "a", "on_busy": "wait"}', 400, "on_busy"),
    "on_busy a list": ('{"message": "a", "on_busy": []}', 400, "on_busy"),
    "on_disconnect a bool": ('{"message": "a", "on_disconnect": true}', 400, "on_disconnect"),
    "timeout text": ('{"message": "a", "timeout": "5"}', 400, "timeout"),
    "timeout zero": ('{"message": "a", "timeout": 0}', 400, "timeout"),
    "timeout a bool": ('{"message": "a", "timeout": true}', 400, "timeout"),
    "timeout too long": ('{"message": "a", "timeout": 1e9}', 400, "timeout"),
    "images a dict": ('{"message": "a", "images": {}}', 400, "images"),
    "image a string": ('{"message": "a", "images": ["x"]}', 400, "images[0]"),
    "image kind": (
        '{"message": "a", "images": [{"data": "", "mimeType": "image/svg+xml"}]}',
        400,
        "images[0]",
    ),
    "image no base64": (
        '{"message": "a", "images": [{"data": "!", "mimeType": "image/png"}]}',
        400,
        "images[0]",
    ),
    "image of another kind": (
        '{"message": "a", "images": [{"data": "AAAA", "mimeType": "image/png"}]}',
        400,
        "images[0]",
    ),
    "message too long": ('{"message": "' + "é" * 60 + '"}', 413, "message"),
    "too many images": ('{"message": "a", "images": [1, 2, 3]}', 413, "images"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_says_what_is_wrong_and_changes_nothing(web: Make, name: str) -> None:
    body, status, field = BAD_BODIES[name]
    w = web(max_message=100, max_images=2)
    code = "payload_too_large" if status == 413 else "invalid_request"
    error = assert_error(w.post("/chat/s", body), status, code)
    assert error["details"]["field"] == field
    assert w.agents.agents == []
    assert_error(w.get("/session/s"), 404, "not_found")


def test_a_body_over_the_limit_is_413(web: Make) -> None:
    w = web(max_body=1000)
    assert_error(w.post("/chat/s", '{"message": "' + "a" * 2000), 413, "payload_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415(web: Make, kind: str) -> None:
    response = web().post("/chat/s", '{"message": "a"}', Content_Type=kind)
    assert_error(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "sid", ["-a", ".a", "_a", "a b", "a%2Fb".replace("%2F", "%5C"), "ä", "a" * 129, "%00"]
)
def test_a_bad_session_id_is_400(web: Make, sid: str) -> None:
    error = assert_error(web().get(f"/session/{sid}"), 400, "invalid_request")
    assert error["details"]["field"] == "session_id"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=x", "after"),
        ("after=-1", "after"),
        ("after=1.5", "after"),
        ("after=", "after"),
        ("after=9007199254740992", "after"),
        ("after=%D9%A1", "after"),
        ("wait=-1", "wait"),
        ("wait=-1", "wait"),
        ("wait=soon", "wait"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("follow=yes", "follow"),
    ],
)
def test_a_bad_query_says_which(web: Make, query: str, field: str) -> None:
    w = web()
    w.ask()
    error = assert_error(w.get(f"/chat/s/events?{query}"), 400, "invalid_request")
    assert error["details"]["field"] == field


def test_a_bad_last_event_id_is_400(web: Make) -> None:
    w = web()
    w.ask()
    response = w.get("/chat/s/events", Accept="text/event-stream", Last_Event_ID="abc")
    assert assert_error(response, 400, "invalid_request")["details"]["field"] == "Last-Event-ID"


@pytest.mark.parametrize("prefix", ["", "/agent"])
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/chat/s", "OPTIONS, POST"),
        ("GET", "/chat/s", "OPTIONS, POST"),
        ("BREW", "/chat/s/events", "GET, HEAD, OPTIONS"),
        ("POST", "/session/s", "DELETE, GET, HEAD, OPTIONS, PATCH"),
    ],
)
def test_an_unknown_method_is_405_in_our_form(
    web: Make, prefix: str, method: str, path: str, allow: str
) -> None:
    w = web(prefix=prefix)
    response = w.client.open(prefix + path, method=method, headers=w.headers())
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == allow


def test_options_answers_as_flask_does(web: Make) -> None:
    response = web().client.options("/chat/s")
    assert (response.status_code, response.headers["Allow"]) == (200, "OPTIONS, POST")
    assert "Access-Control-Allow-Origin" not in response.headers


def test_an_unexpected_error_has_an_id_that_is_in_the_log(
    web: Make, caplog: pytest.LogCaptureFixture
) -> None:
    w = web()
    w.ask()
    pool_of(w.app).store.session = lambda key: 1 / 0  # type: ignore[method-assign,assignment]
    error = assert_error(w.get("/session/s"), 500, "internal_error")
    assert set(error["details"]) == {"error_id"}
    assert error["details"]["error_id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


# -- open to all -------------------------------------------------------------------------------


def test_health_and_readiness(web: Make) -> None:
    w = web()
    assert w.client.get("/healthz").json == {"ok": True}
    assert w.client.get("/readyz").json == {"ok": True}
    shutdown(w.app, grace=1)
    gone = w.client.get("/readyz")
    assert (gone.status_code, gone.json["ok"], gone.json["code"]) == (503, False, "draining")
    assert w.client.get("/healthz").status_code == 200
    draining = w.post("/chat/s", {"message": "hi"})
    assert_error(draining, 503, "draining")
    assert draining.headers["Retry-After"] == "1"


@pytest.mark.parametrize("prefix", ["", "/agent"])
def test_the_contract_is_valid_and_complete(web: Make, prefix: str) -> None:
    w = web(prefix=prefix)
    document = w.client.get(prefix + "/openapi.json").json
    validate(document)
    assert document["servers"] == [{"url": prefix or "/"}]
    described = {
        (method.upper(), prefix + path.replace("{", "<").replace("}", ">"))
        for path, methods in document["paths"].items()
        for method in methods
    }
    served = {
        (method, rule.rule.replace("<path:", "<"))
        for rule in w.app.url_map.iter_rules()
        if rule.endpoint.startswith("agentao.") and rule.methods is not None
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert described == served


# -- the host ----------------------------------------------------------------------------------


def host(tmp_path: t.Any, **options: t.Any) -> tuple[Flask, Scripted]:
    """A monolith with a login, hooks and error pages of its own."""
    app = Flask("monolith")
    app.secret_key = "host-secret"
    app.config["AGENTAO_ROOT"] = tmp_path / "host-root"
    agents = scripted(say("hello"))

    def who(request: t.Any) -> Principal | None:
        return Principal("acme", session["user"]) if "user" in session else None

    @app.get("/login")
    def login() -> str:
        session["user"] = "ann"
        return "in"

    @app.get("/boom")
    def boom() -> str:
        raise RuntimeError("the host's own")

    @app.before_request
    def hook() -> None:
        app.extensions.setdefault("seen", []).append(1)

    for code in (400, 401, 403, 404, 405, 409, 413, 415, 500):
        app.register_error_handler(code, lambda e: Response("the host's page", e.code))
    app.register_error_handler(Exception, lambda e: Response("the host's net", 500))
    AgentaoWeb(authenticate=who, agents=agents).init_app(app, url_prefix="/agent")
    return app, agents


@pytest.fixture
def monolith(tmp_path: t.Any) -> cabc.Iterator[FlaskClient]:
    app, _ = host(tmp_path)
    yield app.test_client()
    shutdown(app, grace=2)


BODY = {"data": '{"message": "hi"}', "content_type": "application/json"}


def test_the_hosts_login_is_enough_from_its_own_pages(monolith: FlaskClient) -> None:
    assert_error(monolith.post("/agent/chat/s", **BODY), 401, "unauthorized")
    monolith.get("/login")
    for headers in ({"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}):
        answer = monolith.post("/agent/chat/s", headers=headers, **BODY)
        assert sse(answer)[-1]["reply"] == "hello"
    assert monolith.get("/agent/session/s").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"},
        {"Origin": "http://localhost.evil.example"},
    ],
)
def test_another_sites_page_cannot_use_the_login(
    monolith: FlaskClient, headers: dict[str, str]
) -> None:
    monolith.get("/login")
    assert_error(monolith.post("/agent/chat/s", headers=headers, **BODY), 403, "forbidden")
    assert_error(monolith.delete("/agent/session/s", headers=headers), 403, "forbidden")


def test_the_hosts_error_pages_stay_the_hosts(monolith: FlaskClient) -> None:
    assert monolith.get("/nowhere").data == b"the host's page"
    assert monolith.post("/login").data == b"the host's page"
    assert monolith.get("/boom").data == b"the host's net"


def test_errors_below_our_prefix_are_ours(monolith: FlaskClient) -> None:
    monolith.get("/login")
    assert_error(monolith.get("/agent/nowhere"), 404, "not_found")
    assert_error(monolith.put("/agent/chat/s"), 405, "method_not_allowed")
    assert_error(monolith.get("/agent/session/unknown"), 404, "not_found")
    same = {"Origin": "http://localhost"}
    too_big = b'{"message": "' + b"a" * (21 * 2**20)
    answer = monolith.post(
        "/agent/chat/s", data=too_big, content_type="application/json", headers=same
    )
    assert_error(answer, 413, "payload_too_large")


def test_the_hosts_hooks_see_our_requests(monolith: FlaskClient) -> None:
    before = len(monolith.application.extensions.get("seen", []))  # type: ignore[attr-defined]
    monolith.get("/agent/healthz")
    assert len(monolith.application.extensions["seen"]) == before + 1  # type: ignore[attr-defined]


def test_an_authenticate_that_raises_leaks_nothing(tmp_path: t.Any) -> None:
    app = Flask("host")
    app.config["AGENTAO_ROOT"] = tmp_path

    def who(request: t.Any) -> Principal | None:
        raise RuntimeError("ldap://secret")

    AgentaoWeb(authenticate=who, agents=scripted(say("x"))).init_app(app)
    error = assert_error(app.test_client().get("/session/s"), 500, "internal_error")
    assert "secret" not in json.dumps(error)
    shutdown(app)


def test_an_authenticate_that_returns_something_else_says_the_cure(
    tmp_path: t.Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = Flask("host")
    app.config["AGENTAO_ROOT"] = tmp_path
    wrong: t.Any = lambda request: "ann"  # noqa: E731
    AgentaoWeb(authenticate=wrong, agents=scripted(say("x"))).init_app(app)
    assert_error(app.test_client().get("/session/s"), 500, "internal_error")
    assert "Return an agentao_web.Principal" in caplog.text
    shutdown(app)


def test_two_apps_have_two_of_everything(web: Make) -> None:
    one, two = web(say("one")), web(say("two"))
    assert (one.ask()["reply"], two.ask()["reply"]) == ("one", "two")
    shutdown(one.app, grace=1)
    assert two.ask("b")["reply"] == "two"


def test_one_extension_object_serves_two_apps(tmp_path: t.Any) -> None:
    extension = AgentaoWeb(agents=scripted(say("x")))
    apps = []
    for n in range(2):
        app = Flask(f"app{n}")
        app.config.update(AGENTAO_ROOT=tmp_path / str(n), AGENTAO_SECRET_KEYS=KEY)
        extension.init_app(app, url_prefix=f"/p{n}")
        apps.append(app)
    assert pool_of(apps[0]) is not pool_of(apps[1])
    for app in apps:
        shutdown(app)


def test_a_second_init_app_says_so(web: Make) -> None:
    with pytest.raises(RuntimeError, match="already"):
        AgentaoWeb(agents=scripted(say("x"))).init_app(web().app)


def test_an_app_without_init_app_says_the_cure() -> None:
    with pytest.raises(RuntimeError, match="Did you forget init_app"):
        pool_of(Flask("bare"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "AGENTAO_SECRET_KEYS"),
        ({"AGENTAO_SECRET_KEYS": "short"}, "16 characters"),
        ({"AGENTAO_SECRET_KEY": KEY}, "Did you mean AGENTAO_SECRET_KEYS"),
        ({"AGENTAO_TURN_TIMEOUT": "soon", "AGENTAO_SECRET_KEYS": KEY}, "AGENTAO_TURN_TIMEOUT"),
        ({"AGENTAO_MAX_TURNS": 0, "AGENTAO_SECRET_KEYS": KEY}, "at least 1"),
        ({"AGENTAO_POLICY": "yes", "AGENTAO_SECRET_KEYS": KEY}, "read-only, ask, trusted"),
        ({"AGENTAO_DEMO": "maybe", "AGENTAO_SECRET_KEYS": KEY}, "must be 1 or 0"),
    ],
)
def test_a_setup_mistake_is_refused_with_the_cure(config: dict[str, t.Any], says: str) -> None:
    app = Flask("host")
    app.config.update(config)
    with pytest.raises(RuntimeError, match=says):
        AgentaoWeb(agents=scripted(say("x"))).init_app(app)


def test_nothing_is_logged_at_root_and_no_handler_is_added(web: Make) -> None:
    before = (list(logging.getLogger().handlers), list(logging.getLogger("agentao").handlers))
    web().ask()
    assert (logging.getLogger().handlers, logging.getLogger("agentao").handlers) == before
