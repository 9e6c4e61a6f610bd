"""Questions and answers over HTTP: who may answer, what is an answer, and what everybody sees."""

from __future__ import annotations

import collections.abc as cabc
import json
import time
import typing as t
from pathlib import Path

import jsonschema
import pytest
from flask import Flask
from openapi_spec_validator import validate

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.testing import Scripted
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests import test_views as views
from tests.patience import PATIENCE
from tests.test_views import KEY
from tests.test_views import Make
from tests.test_views import Web
from tests.test_views import assert_error
from tests.test_views import host
from tests.test_views import sse

web = views.web

WRITE = ask("write_file", "written", file_path="a.txt")


def opened(w: Web, sid: str = "s", count: int = 1) -> list[dict[str, t.Any]]:
    """The open questions of the snapshot, once there are *count*."""
    until = time.monotonic() + PATIENCE
    while True:
        snapshot = w.get(f"/session/{sid}").json
        found = snapshot["questions"]
        if len(found) >= count:
            assert snapshot["state"] == "waiting"
            return t.cast(list[dict[str, t.Any]], found)
        assert time.monotonic() < until, snapshot
        time.sleep(0.005)


def begin(w: Web, sid: str = "s", **headers: str) -> t.Any:
    return w.post(f"/chat/{sid}", {"message": "go"}, Accept="application/json", **headers)


def reply(w: Web, question: dict[str, t.Any], sid: str = "s", **body: t.Any) -> t.Any:
    return w.post(f"/chat/{sid}/answer", {"question_id": question["question_id"], **body})


def finish(w: Web, sid: str = "s") -> list[dict[str, t.Any]]:
    """Every event, once the session is idle."""
    events: list[dict[str, t.Any]] = []
    until, cursor = time.monotonic() + PATIENCE, 0
    while True:
        page = w.get(f"/chat/{sid}/events?after={cursor}&wait=5").json
        events, cursor = events + page["events"], page["cursor"]
        if page["state"] == "idle":
            return events
        assert time.monotonic() < until, events[-3:]


def conforms(w: Web, name: str, body: t.Any) -> None:
    """Whether *body* is what the contract says."""
    document = w.client.get("/openapi.json").json
    validate(document)
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.validate(body, schema)


def test_asked_seen_answered(web: Make) -> None:
    w = web(WRITE, say("done"))
    accepted = begin(w)
    (question,) = opened(w)
    conforms(w, "Session", w.get("/session/s").json)
    assert question["type"] == "tool_confirmation"
    assert question["turn_id"] == accepted.json["turn_id"]
    assert question["expires_at"] > time.time()
    page = w.get("/chat/s/events?wait=0").json
    assert page["state"] == "waiting"
    event = page["events"][-1]
    assert {"type": event["type"], "turn_id": event["turn_id"], **event["data"]} == question
    answered = reply(w, question, approve=True)
    assert answered.status_code == 200
    assert answered.json == {
        "ok": True,
        "question_id": question["question_id"],
        "outcome": "approved",
    }
    conforms(w, "Answered", answered.json)
    events = finish(w)
    closed = next(e for e in events if e["type"] == "question_closed")
    told = {"question_id": question["question_id"], "outcome": "approved", "by": "ann"}
    assert closed["data"] == told
    snapshot = w.get("/session/s").json
    assert (snapshot["state"], snapshot["questions"]) == ("idle", [])


def test_the_second_answer_is_409_and_the_same_again_200(web: Make) -> None:
    w = web(WRITE, say("done"))
    begin(w)
    (question,) = opened(w)
    assert reply(w, question, approve=False).json["outcome"] == "denied"
    assert reply(w, question, approve=False).status_code == 200
    body = assert_error(reply(w, question, approve=True), 409, "question_closed")
    expected = {"question_id": question["question_id"], "outcome": "denied", "by": "ann"}
    assert body["details"] == expected
    conforms(w, "Error", body)
    finish(w)
    assert w.agents.agents[0].answers == [False]


BAD: dict[str, t.Any] = {
    "no question": {"approve": True},
    "question is a number": {"question_id": 7, "approve": True},
    "question is empty": {"question_id": "", "approve": True},
    "question is long": {"question_id": "q" * 201, "approve": True},
    "nothing said": {},
    "both said": {"approve": True, "answer": "yes"},
    "approve is a word": {"approve": "true"},
    "approve is a number": {"approve": 1},
    "approve is null": {"approve": None},
    "an answer to an approval": {"answer": "yes"},
    "answer is a number": {"answer": 5},
    "answer is blank": {"answer": "  \n"},
    "answer is empty": {"answer": ""},
    "answer is no list of words": {"answer": ["a", 5]},
    "answer is an empty list": {"answer": []},
    "too many choices": {"answer": ["a"] * 65},
    "half a pair": b'{"question_id": "QID", "answer": "\\ud800"}',
    "a nul": {"answer": "a\0b"},
    "remember is unknown": {"approve": True, "remember": "always"},
    "remember is a list": {"approve": True, "remember": ["turn"]},
    "remember is true": {"approve": True, "remember": True},
    "a no to be remembered": {"approve": False, "remember": "session"},
    "another field": {"approve": True, "by": "root"},
    "outcome": {"approve": True, "outcome": "approved"},
    "no json": b"approve",
    "no object": b'["approve"]',
    "nothing": b"",
    "not utf-8": b'{"answer": "\xff"}',
    "NaN": b'{"question_id": "QID", "approve": NaN}',
    "deep": b'{"question_id": "QID", "answer": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


def test_a_bad_answer_says_what_is_wrong_and_closes_nothing(web: Make) -> None:
    w = web(WRITE, say("done"))
    begin(w)
    (question,) = opened(w)
    for name, bad in BAD.items():
        if isinstance(bad, dict):
            # Some are about the question's id themselves.
            bad = {"question_id": question["question_id"], **bad}
            if name == "no question":
                del bad["question_id"]
            bad = json.dumps(bad)
        else:
            bad = bad.replace(b"QID", question["question_id"].encode())
        body = assert_error(w.post("/chat/s/answer", bad), 400, "invalid_request")
        assert body["details"]["field"], name
        assert opened(w) == [question], name
    huge = {"question_id": question["question_id"], "answer": "x" * 40_000}
    assert_error(w.post("/chat/s/answer", huge), 413, "payload_too_large")
    kind = w.post("/chat/s/answer", {"approve": True}, Content_Type="text/plain")
    assert_error(kind, 415, "unsupported_media_type")
    assert_error(w.get("/chat/s/answer"), 405, "method_not_allowed")
    assert_error(w.post("/chat/s/answer", {"question_id": "no", "approve": True}), 404, "not_found")
    elsewhere = w.post(
        "/chat/other/answer", {"question_id": question["question_id"], "approve": True}
    )
    assert_error(elsewhere, 404, "not_found")
    assert opened(w) == [question]
    assert reply(w, question, approve=True).status_code == 200
    finish(w)


def test_words_choices_and_free_text(web: Make) -> None:
    w = web(
        ask_user("Which?", "a", "b", header="Pick", allow_custom=False),
        ask_user("Which ones?", "a", "b", multiple=True, allow_custom=False),
        ask_user("What?"),
        say("done"),
    )
    begin(w)
    (one,) = opened(w)
    assert (one["header"], one["options"], one["allow_custom"]) == ("Pick", ["a", "b"], False)
    for bad in ("c", ["a"], ["a", "b"]):
        assert_error(reply(w, one, answer=bad), 400, "invalid_request")
    assert_error(reply(w, one, approve=True), 400, "invalid_request")
    assert_error(reply(w, one, answer="a", remember="turn"), 400, "invalid_request")
    assert reply(w, one, answer="b").json["outcome"] == "answered"
    (two,) = nth(w, one)
    assert_error(reply(w, two, answer=["a", "c"]), 400, "invalid_request")
    assert reply(w, two, answer=["b", "a"]).status_code == 200
    assert reply(w, two, answer=["b", "a"]).status_code == 200
    assert_error(reply(w, two, answer=["a", "b"]), 409, "question_closed")
    (three,) = nth(w, two)
    assert reply(w, three, answer="whatever, \u202e 🙂").status_code == 200
    finish(w)
    assert w.agents.agents[0].answers == ["b", "b, a", "whatever, \u202e 🙂"]


def nth(w: Web, before: dict[str, t.Any]) -> list[dict[str, t.Any]]:
    """The open questions, once *before* is not among them."""
    until = time.monotonic() + PATIENCE
    while True:
        found = [q for q in opened(w) if q["question_id"] != before["question_id"]]
        if found:
            return found
        assert time.monotonic() < until


def test_prefer_wait_does_not_wait_for_a_person(web: Make) -> None:
    w = web(WRITE, say("done"))
    response = begin(w, Prefer="wait=60")
    assert response.status_code == 202
    body = response.json
    conforms(w, "Accepted", body)
    assert body["status"] == "waiting"
    assert body["questions"] == opened(w)
    reply(w, body["questions"][0], approve=True)
    finish(w)


def test_a_stream_ends_while_it_waits_and_resumes(web: Make) -> None:
    """No thread is held; nobody left, so the turn goes on."""
    w = web(WRITE, say("done"), stream_lease=0.2, disconnect_grace=0.0)
    response = w.post("/chat/s", {"message": "go"})
    text = response.get_data(as_text=True)
    assert "retry: " in text.strip().splitlines()[-1]
    seen = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert seen[-1]["type"] == "tool_confirmation"
    again = w.get("/chat/s/events", Accept="text/event-stream", Last_Event_ID=str(seen[-1]["seq"]))
    assert "retry: " in again.get_data(as_text=True), "still waiting"
    (question,) = opened(w)
    reply(w, question, approve=True)
    rest = w.get("/chat/s/events", Accept="text/event-stream", Last_Event_ID=str(seen[-1]["seq"]))
    events = sse(rest)
    assert events[0]["type"] == "question_closed"
    events += [e for e in finish(w) if e["seq"] > events[-1]["seq"]]
    assert events[-1]["data"]["status"] == "completed"


def test_no_answer_in_time_and_cancel(web: Make) -> None:
    w = web(WRITE, say("done"), question_timeout=0.1)
    response = w.post("/chat/s", {"message": "go"})
    events = sse(response)
    closed = next(e for e in events if e["type"] == "question_closed")
    assert (closed["data"]["outcome"], closed["data"]["by"]) == ("expired", "timeout")
    assert events[-1]["data"]["status"] == "completed"
    slow = web(WRITE, say("done"))
    begin(slow)
    (question,) = opened(slow)
    assert slow.post("/chat/s/cancel").json == {"ok": True, "cancelled": 1}
    assert finish(slow)[-1]["data"]["reason"] == "cancelled_by_user"
    late = assert_error(reply(slow, question, approve=True), 409, "question_closed")
    assert late["details"]["outcome"] == "cancelled"


def test_a_question_of_a_deleted_session_is_unknown(web: Make) -> None:
    w = web(WRITE, say("done"))
    begin(w)
    (question,) = opened(w)
    assert w.delete("/session/s").json == {"ok": True}
    assert_error(reply(w, question, approve=True), 404, "not_found")


def test_remember_for_the_session_survives_eviction_and_delete_ends_it(web: Make) -> None:
    w = web(WRITE, WRITE, say("done"))
    begin(w)
    (question,) = opened(w)
    assert question["remember"] == ["turn", "session"]
    body = reply(w, question, approve=True, remember="session")
    assert body.json["outcome"] == "approved"
    events = finish(w)
    closed = [e["data"] for e in events if e["type"] == "question_closed"]
    assert [c["remember"] for c in closed] == ["session"]
    pool = w.app.extensions["agentao_web"].pool
    pool.tick(pool.clock() + 10_000)
    assert pool.counts()["sessions"] == 0
    assert w.ask("again")["status"] == "completed"
    assert w.agents.agents[-1].answers == [True, True]
    for sid, who in (("other", None), ("s", Principal("acme", "bob"))):
        started = w.post(f"/chat/{sid}", {"message": "go"}, who, Accept="application/json")
        assert started.status_code == 202
        until = time.monotonic() + PATIENCE
        while w.get(f"/session/{sid}", who).json["state"] != "waiting":
            assert time.monotonic() < until, "asked anew: another session, another user"
            time.sleep(0.005)
    w.delete("/session/s")
    begin(w)
    assert opened(w), "a new life"


class Crew:
    """Applications on one store: workers, as far as a client can see."""

    def __init__(self, tmp_path: Path, agents: Scripted, count: int = 2, **options: t.Any) -> None:
        self.workers: list[Web] = []
        for _ in range(count):
            app = Flask("worker")
            app.config.update(AGENTAO_ROOT=tmp_path / "shared", AGENTAO_SECRET_KEYS=KEY)
            AgentaoWeb(agents=agents, **options).init_app(app)
            self.workers.append(Web(app, agents, ""))


@pytest.fixture
def crew(tmp_path: Path) -> cabc.Iterator[cabc.Callable[..., list[Web]]]:
    made: list[Web] = []

    def make(*steps: t.Any, **options: t.Any) -> list[Web]:
        made.extend(Crew(tmp_path, scripted(*steps), **options).workers)
        return made

    yield make
    for one in made:
        shutdown(one.app, grace=2)


def test_every_worker_shows_it_and_takes_the_answer(
    crew: cabc.Callable[..., list[Web]],
) -> None:
    one, two = crew(WRITE, say("done"))
    begin(one)
    (question,) = opened(two)
    assert question == opened(one)[0]
    page = two.get("/chat/s/events?wait=0").json
    assert page["state"] == "waiting"
    conforms(two, "EventPage", page)
    assert reply(two, question, approve=True, remember="session").status_code == 200
    assert_error(reply(one, question, approve=False), 409, "question_closed")
    assert finish(two)[-1]["data"]["status"] == "completed"
    assert two.ask("on the other worker")["status"] == "completed", "nothing is asked again"
    assert [a.answers for a in two.agents.agents] == [[True], [True]]


def test_a_repeated_post_elsewhere_does_not_wait_for_a_person_either(
    crew: cabc.Callable[..., list[Web]],
) -> None:
    one, two = crew(WRITE, say("done"))
    first = begin(one, Idempotency_Key="k").json
    (question,) = opened(two)
    again = begin(two, Idempotency_Key="k", Prefer="wait=60")
    assert again.status_code == 202
    body = again.json
    assert (body["turn_id"], body["status"]) == (first["turn_id"], "waiting")
    assert body["questions"] == [question]
    reply(two, question, approve=True)
    finish(two)


def test_a_read_only_session_is_not_asked_again_after_its_rules_changed(tmp_path: Path) -> None:
    """Rules are looked at before each turn: an agent that may do something else is built anew."""
    import dataclasses

    policy = {"now": "ask"}
    agents = scripted(say("hi"))

    def rules(principal: Principal, given: t.Any) -> t.Any:
        return dataclasses.replace(given, policy=policy["now"])

    (w,) = Crew(tmp_path, agents, count=1, rules=rules).workers
    try:
        for now, built in (("ask", 1), ("ask", 1), ("trusted", 2), ("ask", 3), ("read-only", 4)):
            policy["now"] = now
            assert w.ask()["status"] == "completed"
            assert len(agents.agents) == built
        assert [a.closed for a in agents.agents] == [True, True, True, False]
        assert len(agents.agents[-1].messages) == 10, "with all that was said"
    finally:
        shutdown(w.app, grace=2)


def test_another_sites_page_cannot_answer(tmp_path: Path) -> None:
    app, _ = host(tmp_path)
    client = app.test_client()
    client.get("/login")
    body = {"data": '{"question_id": "q", "approve": true}', "content_type": "application/json"}
    try:
        for headers in ({}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            refused = client.post("/agent/chat/s/answer", headers=headers, **body)
            assert_error(refused, 403, "forbidden")
        own = client.post("/agent/chat/s/answer", headers={"Origin": "http://localhost"}, **body)
        assert_error(own, 404, "not_found")
    finally:
        shutdown(app, grace=2)
