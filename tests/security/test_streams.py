"""Nobody takes all streams of a server: not a user, not a tenant, not one ticket."""

from __future__ import annotations

import contextlib
import typing as t
from pathlib import Path

import pytest

from agentao_web import Principal
from agentao_web.slots import StreamSlots
from agentao_web.testing import say
from agentao_web.views import TICKET_STREAMS
from tests import test_views as views
from tests.live.harness import Server
from tests.live.harness import model_env
from tests.live.harness import token
from tests.model_server import ModelServer
from tests.test_views import Make
from tests.test_views import Web
from tests.test_views import assert_error

web = views.web

ANN, BOB = Principal("acme", "ann"), Principal("acme", "bob")
CARL, SERVICE = Principal("other", "carl"), Principal("acme")
EVERYBODY = (ANN, BOB, CARL, SERVICE)


def served(make: Make, most: int | None = None, **config: t.Any) -> Web:
    """An application of *most* places, in which everybody has the session ``s``."""
    w = make(say("hi"), **config)
    for who in EVERYBODY:
        json = {"Accept": "application/json", "Prefer": "wait=20"}
        assert w.post("/chat/s", {"message": "hi"}, who, **json).status_code == 200
    w.app.extensions["agentao_web"].slots.most = most
    return w


def opened(w: Web, who: Principal | None, query: str = "") -> t.Any:
    """A stream that goes on until it is closed."""
    headers = w.headers(who, Accept="text/event-stream") if who else {"Accept": "text/event-stream"}
    return w.client.get(f"/chat/s/events?follow=1{query}", headers=headers, buffered=False)


def fill(w: Web, who: Principal | None, query: str = "") -> tuple[list[t.Any], t.Any]:
    """As many streams as there are to be had, and the refusal of one more."""
    got = []
    while (stream := opened(w, who, query)).status_code == 200:
        got.append(stream)
        assert len(got) < 500
    return got, stream


@contextlib.contextmanager
def held(streams: list[t.Any]) -> t.Iterator[None]:
    try:
        yield
    finally:
        for stream in streams:
            stream.close()


def test_a_user_has_a_share_and_the_others_theirs(web: Make) -> None:
    w = served(web, max_streams_per_user=3, max_streams_per_tenant=5)
    streams, refused = fill(w, ANN)
    with held(streams):
        assert len(streams) == 3
        body = assert_error(refused, 429, "too_many_streams")
        assert body["details"]["limit"] == "user_streams" and body["details"]["quota"] == 3
        assert refused.headers["Retry-After"] == "2"
        assert refused.headers["RateLimit-Policy"] == '"user_streams";q=3'
        assert w.get(body["details"]["poll_url"], ANN).status_code == 200
        theirs, refused = fill(w, BOB)
        with held(theirs):
            assert len(theirs) == 2
            body = assert_error(refused, 429, "too_many_streams")
            assert body["details"]["limit"] == "tenant_streams"
            others, _ = fill(w, CARL)
            with held(others):
                assert len(others) == 3
        again, _ = fill(w, BOB)
        with held(again):
            assert len(again) == 2, "they were given back"
    assert w.app.extensions["agentao_web"].slots.taken == 0


@pytest.mark.parametrize("places", [2, 3, 6, 120])
@pytest.mark.parametrize("who", [ANN, SERVICE])
def test_without_a_setting_nobody_takes_all_places(web: Make, places: int, who: Principal) -> None:
    w = served(web, places)
    streams, refused = fill(w, who)
    with held(streams):
        assert_error(refused, 429, "too_many_streams")
        assert opened_and_closed(w, CARL) == 200
        if places == 120:
            assert len(streams) == (32 if who is ANN else 90)


def opened_and_closed(w: Web, who: Principal) -> int:
    stream = opened(w, who)
    stream.close()
    return int(stream.status_code)


def test_a_dozen_tabs_are_fine(web: Make) -> None:
    w = served(web, 120)
    streams = [opened(w, ANN) for _ in range(24)]
    with held(streams):
        assert {stream.status_code for stream in streams} == {200}


def test_a_long_poll_and_a_wait_count_as_a_stream_does(web: Make) -> None:
    w = served(web, max_streams_per_user=1)
    stream = opened(w, ANN)
    with held([stream]):
        assert stream.status_code == 200
        cursor = w.get("/chat/s/events?after=0&wait=0", ANN).json["cursor"]
        polled = w.get(f"/chat/s/events?after={cursor}&wait=20", ANN)
        body = assert_error(polled, 429, "too_many_streams")
        assert body["details"]["poll_url"] == f"/chat/s/events?after={cursor}&wait=0"
        posted = w.post("/chat/new", {"message": "hi"}, ANN)
        assert_error(posted, 429, "too_many_streams")
        assert w.get("/session/new", ANN).status_code == 404, "nothing has begun"
        started = w.post(
            "/chat/new", {"message": "hi"}, ANN, Accept="application/json", Prefer="wait=20"
        )
        assert "Preference-Applied" not in started.headers
        assert started.status_code in (200, 202)


def test_one_ticket_opens_a_few_streams_and_counts_as_its_user(web: Make) -> None:
    w = served(web, max_streams_per_user=10)
    tickets = [w.post("/session/s/ticket", {}, ANN).json["ticket"] for _ in range(2)]
    streams, refused = fill(w, None, f"&ticket={tickets[0]}")
    with held(streams):
        assert len(streams) == TICKET_STREAMS
        body = assert_error(refused, 429, "too_many_streams")
        assert body["details"]["limit"] == "ticket_streams"
        assert tickets[0] not in refused.get_data(as_text=True)
        # Spelled in another way it is the same one.
        spelled = "".join(f"%{ord(c):02x}" for c in tickets[0])
        assert opened(w, None, f"&ticket={spelled}").status_code == 429
        more, _ = fill(w, None, f"&ticket={tickets[1]}")
        with held(more):
            own, refused = fill(w, ANN)
            with held(own):
                assert len(streams) + len(more) + len(own) == 10
                assert assert_error(refused, 429, "too_many_streams")
                assert opened_and_closed(w, BOB) == 200


def test_shares_are_forgotten_when_they_are_given_back() -> None:
    from agentao_web.slots import Share

    slots = StreamSlots()
    for n in range(100):
        slots.take([Share("user_streams", ("acme", str(n)), 1)]).free()
    assert slots.taken == 0 and not slots._shares


@pytest.mark.live
def test_three_hundred_streams_of_one_user_leave_the_server_to_others(tmp_path: Path) -> None:
    with (
        ModelServer() as model,
        Server(tmp_path, "--threads", "16", **model_env(model)) as server,
        contextlib.ExitStack() as stack,
    ):
        for user in ("ann", "bob"):
            mine = {"Authorization": f"Bearer {token('acme', user)}"}
            wait = {"Prefer": "wait=20", "Accept": "application/json", **mine}
            done = server.client.post("/chat/s", json={"message": "say hi"}, headers=wait)
            assert done.status_code == 200
        refused = 0
        for _ in range(300):
            request = server.client.build_request(
                "GET", "/chat/s/events?follow=1", headers={"Accept": "text/event-stream"}
            )
            stream = server.client.send(request, stream=True)
            stack.callback(stream.close)
            if stream.status_code == 429:
                refused += 1
                stream.read()
        assert refused == 300 - 6, "half of the twelve places"
        bob = {"Authorization": f"Bearer {token('acme', 'bob')}", "Accept": "text/event-stream"}
        answer = server.client.post("/chat/s", json={"message": "say hi"}, headers=bob)
        assert answer.status_code == 200 and "hi" in answer.text
        assert server.client.get("/healthz").status_code == 200
