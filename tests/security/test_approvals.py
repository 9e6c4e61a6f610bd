"""Nobody answers for another, and nobody forges what was decided."""

from __future__ import annotations

import json
import logging
import time
import typing as t

import pytest

from agentao_web import Principal
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import say
from tests import test_views as views
from tests.patience import PATIENCE
from tests.test_views import Make
from tests.test_views import Web
from tests.test_views import assert_error

web = views.web

ANN = Principal("acme", "ann")
STRANGERS = (Principal("acme", "bob"), Principal("other", "ann"), Principal("acme"))


def opened(w: Web, who: Principal = ANN, sid: str = "s") -> dict[str, t.Any]:
    until = time.monotonic() + PATIENCE
    while not (found := w.get(f"/session/{sid}", who).json["questions"]):
        assert time.monotonic() < until, "nothing is asked"
        time.sleep(0.005)
    return t.cast(dict[str, t.Any], found[0])


def idle(w: Web, who: Principal = ANN, sid: str = "s") -> None:
    until = time.monotonic() + PATIENCE
    while w.get(f"/session/{sid}", who).json["state"] != "idle":
        assert time.monotonic() < until
        time.sleep(0.005)


def reply(w: Web, question: dict[str, t.Any], who: Principal, **body: t.Any) -> t.Any:
    body = {"question_id": question["question_id"], **body}
    return w.post("/chat/s/answer", body, who)


@pytest.mark.parametrize("theirs", [False, True], ids=["no session", "a session of that id"])
def test_a_stranger_neither_sees_nor_answers(web: Make, theirs: bool) -> None:
    w = web(ask("pay", sum=5), say("done"), by={"hi": [say("hello")]})
    w.post("/chat/s", {"message": "go"}, ANN, Accept="application/json")
    question = opened(w)
    for who in STRANGERS:
        if theirs:
            w.post("/chat/s", {"message": "hi"}, who, Prefer="wait=50", Accept="application/json")
            assert w.get("/session/s", who).json["questions"] == []
            log = w.get("/chat/s/events?wait=0", who).json["events"]
            assert question["question_id"] not in json.dumps(log)
        for said in ({"approve": True}, {"approve": False}, {"answer": "x"}):
            refused = reply(w, question, who, **said)
            body = assert_error(refused, 404, "not_found")
            assert body["details"] == {}, "no more than of one that never was"
            same = reply(w, {"question_id": "never-was"}, who, **said)
            assert same.json["code"] == body["code"]
    assert opened(w) == question, "nothing was closed"
    assert w.agents.agents[0].answers == []
    assert reply(w, question, ANN, approve=True).status_code == 200
    for who in STRANGERS:
        assert_error(reply(w, question, who, approve=True), 404, "not_found")
    idle(w)


HOSTILE = [
    "pay\n2026-01-01 INFO agentao_web.audit: approved: 'pay' by 'root'",
    "a\r\nb\x1b[2J\x00",
    "\u2028\u2029\u202e\ud800",
    "x" * 100_000,
    "', by 'root'; tenant 'other",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_bounded_sendable_and_forges_no_line(
    web: Make, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentao_web.audit")
    w = web(ask(text, **{text: text, "deep": [[[[[[[[text]]]]]]]]}), ask_user(text, text), say("."))
    w.post("/chat/s", {"message": "go"}, ANN, Accept="application/json")
    asked = opened(w)
    size = len(json.dumps(asked))
    assert size < 64 * 1024
    assert len(asked["tool"]) <= 128
    assert reply(w, asked, ANN, approve=True).status_code == 200
    until = time.monotonic() + PATIENCE
    while (words := opened(w))["type"] != "ask_user_requested":
        assert time.monotonic() < until
    assert len(words["question"]) <= 16_384 and len(words["options"][0]) <= 1024
    answer = "\n".join(["ok", "approved: 'pay' by 'root'"])
    assert reply(w, words, ANN, answer=answer).status_code == 200
    idle(w)
    lines = [r.getMessage() for r in caplog.records if r.name == "agentao_web.audit"]
    assert len(lines) == 2, "one for each decision"
    for line in lines:
        assert line.isprintable(), "what is written in one line stays one line"
        assert line.endswith(f"question {asked['question_id']}") or line.startswith("answered")
    assert "root" not in lines[1], "and tells nothing of what was said"


def test_who_answers_is_who_logged_in(web: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agentao_web.audit")
    w = web(ask("pay"), say("done"))
    w.post("/chat/s", {"message": "go"}, ANN, Accept="application/json")
    asked = opened(w)
    forged = w.post(
        "/chat/s/answer",
        {"question_id": asked["question_id"], "approve": True, "by": "root"},
        ANN,
    )
    assert_error(forged, 400, "invalid_request")
    named = w.post(
        "/chat/s/answer",
        {"question_id": asked["question_id"], "approve": True},
        ANN,
        X_Forwarded_User="root",
        From="root",
    )
    assert named.status_code == 200
    idle(w)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "agentao_web.audit"]
    assert line.startswith("approved: 'pay' by 'ann'; tenant 'acme', user 'ann'")
