"""The shop and its agent, tested as any host's: with a scripted agent, and once the demo model."""

from __future__ import annotations

import collections.abc as cabc
import re
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.testing import Gate
from agentao_web.testing import Scripted
from agentao_web.testing import pause
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.testing import use
from shop import create_app

#: What a page of the shop's own sends along; a browser does it by itself.
OWN_PAGE = {"Sec-Fetch-Site": "same-origin", "Accept": "application/json"}
WAIT = {**OWN_PAGE, "Prefer": "wait=20"}
ANN = Principal("shop", "1")

Make = cabc.Callable[..., Flask]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Make]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made: list[Flask] = []

    def build(agents: Scripted | None = None) -> Flask:
        app = create_app(agents, SHOP_DATA=tmp_path)
        made.append(app)
        done = app.test_cli_runner().invoke(args=["fill"])
        assert done.exit_code == 0, done.output
        return app

    yield build
    for app in made:
        shutdown(app, grace=2)
        app.extensions["shop_engine"].dispose()


def log_in(app: Flask, name: str, password: str = "demo") -> FlaskClient:
    """A browser that went through the form."""
    client = app.test_client()
    form = client.get("/login").text
    token = re.findall(r'name="csrf_token" value="([^"]+)"', form)[0]
    data = {"name": name, "password": password, "csrf_token": token}
    client.post("/login", data=data)
    return client


def ask_agent(client: FlaskClient, message: str) -> dict[str, t.Any]:
    answer = client.post("/agent/chat/s", json={"message": message}, headers=WAIT)
    assert answer.json is not None and answer.status_code in (200, 202), answer.text
    return t.cast(dict[str, t.Any], answer.json)


# -- the shop ----------------------------------------------------------------------------------


def test_a_customer_sees_their_orders_and_a_link_to_the_agent(make: Make) -> None:
    app = make(scripted(say("hi")))
    assert app.test_client().get("/").headers["Location"].startswith("/login")
    page = log_in(app, "ann").get("/").text
    assert "two cups" in page and "a kettle" not in page
    assert 'href="/agent/"' in page
    assert "No such name" in log_in(app, "ann", "wrong").get("/login").text


# -- who may talk to the agent -----------------------------------------------------------------


def test_only_who_is_logged_in_has_an_agent(make: Make) -> None:
    app = make(scripted(say("hi")))
    stranger = app.test_client().post("/agent/chat/s", json={"message": "hi"}, headers=WAIT)
    assert stranger.status_code == 401
    client = log_in(app, "ann")
    assert ask_agent(client, "hi")["reply"] == "hi"
    token = re.findall(r'value="([^"]+)"', client.get("/").text)[0]
    client.post("/logout", data={"csrf_token": token})
    assert client.get("/agent/session/s").status_code == 401


def test_customers_have_sessions_of_their_own(make: Make) -> None:
    app = make(scripted(say("hi")))
    ask_agent(log_in(app, "ann"), "hi")
    assert log_in(app, "bob").get("/agent/session/s").status_code == 404


def test_pages_of_other_sites_can_do_nothing(make: Make) -> None:
    """By the shop's CSRF token for its own forms, by the origin for the agent's routes."""
    client = log_in(make(scripted(say("hi"))), "ann")
    assert client.post("/logout").status_code == 400
    for headers in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        answer = client.post("/agent/chat/s", json={"message": "hi"}, headers=headers)
        assert answer.status_code == 403
        assert client.delete("/agent/session/s", headers=headers).status_code == 403
    assert ask_agent(client, "hi")["reply"] == "hi"


# -- what it can do ----------------------------------------------------------------------------


def test_tools_see_the_orders_of_who_asks_and_no_others(make: Make) -> None:
    agents = scripted(use("my_orders"), use("order", number=2), use("order", number=3), say("ok"))
    ask_agent(log_in(make(agents), "ann"), "what have I ordered?")
    assert agents.principals == [ANN]
    everything, own, anothers = agents.agents[0].results
    assert "a teapot" in everything and "two cups" in everything and "kettle" not in everything
    assert '"delivery":"2030-05-02"' in own
    assert anothers == "this customer has no such order"


def test_a_delivery_is_changed_and_kept(make: Make) -> None:
    agents = scripted(
        use("change_delivery", number=2, day="2030-06-01"),
        use("change_delivery", number=1, day="2030-06-01"),
        use("change_delivery", number=3, day="2030-06-01"),
        use("change_delivery", number=2, day="soon"),
        say("ok"),
    )
    app = make(agents)
    client = log_in(app, "ann")
    ask_agent(client, "not before June")
    done, sent, anothers, wrong = agents.agents[0].results
    assert '"delivery":"2030-06-01"' in done
    assert sent == "it is sent already" and "no such order" in anothers and "day" in wrong
    assert "2030-06-01" in client.get("/").text
    assert "2030-06-01" not in log_in(app, "bob").get("/").text


def test_the_customer_can_stop_it(make: Make) -> None:
    gate = Gate()
    client = log_in(make(scripted(pause(gate), say("too late"))), "ann")
    client.post("/agent/chat/s", json={"message": "go"}, headers=OWN_PAGE)
    gate.reached()
    stopped = client.post("/agent/chat/s/cancel", headers=OWN_PAGE)
    assert stopped.json == {"ok": True, "cancelled": 1}


# -- with the demo model -----------------------------------------------------------------------


def test_the_demo_model_asks_before_it_changes_something(make: Make) -> None:
    client = log_in(make(), "ann")
    assert "a teapot" in ask_agent(client, "use my_orders {}")["reply"]
    move = 'use change_delivery {"number": 2, "day": "2030-05-04"}'
    for approve, day in ((False, "2030-05-02"), (True, "2030-05-04")):
        waiting = ask_agent(client, move)
        (question,) = waiting["questions"]
        assert question["tool"] == "change_delivery" and question["args"]["day"] == "2030-05-04"
        body = {"question_id": question["question_id"], "approve": approve}
        assert client.post("/agent/chat/s/answer", json=body, headers=OWN_PAGE).status_code == 200
        _until_done(client, waiting["cursor"])
        row = client.get("/").text.split("two cups")[1]
        assert day in row


def _until_done(client: FlaskClient, cursor: int) -> None:
    for _ in range(100):
        page = client.get(f"/agent/chat/s/events?after={cursor}&wait=20", headers=OWN_PAGE).json
        assert page is not None
        cursor = page["cursor"]
        if any(event["type"] == "done" for event in page["events"]):
            return
    raise AssertionError("the turn does not end")
