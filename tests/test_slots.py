"""Places for streams and waiting requests: some threads are always free."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import typing as t

import pytest

from agentao_web.slots import NoPlace
from agentao_web.slots import Slot
from agentao_web.slots import StreamSlots
from agentao_web.testing import Gate
from agentao_web.testing import pause
from agentao_web.testing import say
from tests.patience import PATIENCE
from tests.test_views import Make
from tests.test_views import Web
from tests.test_views import assert_error
from tests.test_views import sse
from tests.test_views import web as web


@pytest.mark.parametrize(
    ("threads", "reserve", "most"),
    [(128, 8, 120), (8, 8, 6), (4, 8, 3), (2, 1, 1), (1, 1, 0), (16, 2, 14)],
)
def test_a_quarter_is_kept_free_at_most(threads: int, reserve: int, most: int) -> None:
    slots = StreamSlots()
    slots.of_threads(threads, reserve)
    assert slots.most == most


def test_a_place_given_back_twice_is_one_place() -> None:
    slots = StreamSlots()
    slots.most = 1
    slot = slots.take()
    for _ in range(2):
        with pytest.raises(NoPlace):
            slots.take()
        slot.free()
        slot.free()
        assert slots.taken == 0
        slot = slots.take()


def test_of_many_threads_only_so_many_get_one() -> None:
    slots = StreamSlots()
    slots.most = 5
    start = threading.Barrier(12)
    got: list[Slot] = []

    def take() -> None:
        start.wait(PATIENCE)
        with contextlib.suppress(NoPlace):
            got.append(slots.take())

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(got) == 5 == slots.taken


# -- over HTTP ---------------------------------------------------------------------------------


def limited(w: Web, most: int) -> StreamSlots:
    slots = w.app.extensions["agentao_web"].slots
    slots.most = most
    return t.cast(StreamSlots, slots)


def test_a_stream_without_a_place_is_refused_before_anything_starts(web: Make) -> None:
    w = web()
    limited(w, 0)
    response = w.post("/chat/s", {"message": "hi"})
    body = assert_error(response, 503, "no_stream_slot")
    assert response.headers["Retry-After"] == "2"
    assert body["details"]["poll_url"] == "/chat/s/events?wait=0"
    assert w.get("/session/s").status_code == 404
    assert w.agents.agents == []


def test_without_a_place_a_turn_starts_as_json_and_nobody_waits_for_it(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("hi"))
    limited(w, 0)
    response = w.post("/chat/s", {"message": "hi"}, Accept="application/json", Prefer="wait=50")
    assert response.status_code == 202
    assert "Preference-Applied" not in response.headers
    gate.open()


def test_without_a_place_a_long_poll_is_sent_to_where_it_need_not_wait(web: Make) -> None:
    w = web()
    cursor = w.ask()["cursor"]
    limited(w, 0)
    assert len(w.get("/chat/s/events?after=0&wait=20").json["events"]) == 3, "there is something"
    response = w.get(f"/chat/s/events?after={cursor}&wait=20")
    body = assert_error(response, 503, "no_stream_slot")
    page = w.get(body["details"]["poll_url"]).json
    assert (page["events"], page["cursor"]) == ([], cursor)
    stream = w.get("/chat/s/events?after=0", Accept="text/event-stream")
    assert_error(stream, 503, "no_stream_slot")
    caught_up = w.get(f"/chat/s/events?after={cursor}", Accept="text/event-stream")
    assert caught_up.status_code == 204


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/chat/s/events?after=0", "text/event-stream"),
        ("/chat/s/events?after=0&follow=1", "text/event-stream"),
        ("/chat/nobodys/events", "text/event-stream"),
        ("/chat/s/events?after=9007199254740991&wait=1", "application/json"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_place_is_given_back(web: Make, path: str, accept: str, method: str) -> None:
    w = web(stream_lease=0.05)
    w.ask()
    slots = limited(w, 1)
    for _ in range(3):
        response = w.client.open(path, method=method, headers=w.headers(Accept=accept))
        assert response.status_code != 503
        response.close()
    assert slots.taken == 0


def test_a_stream_that_is_closed_before_it_is_read_gives_its_place_back(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("hi"))
    slots = limited(w, 1)
    response = w.client.post("/chat/s", json={"message": "hi"}, headers=w.headers(), buffered=False)
    assert slots.taken == 1
    assert_error(w.post("/chat/t", {"message": "hi"}), 503, "no_stream_slot")
    response.close()
    assert slots.taken == 0
    gate.open()
    assert sse(w.post("/chat/t", {"message": "hi"}))[-1]["reply"] == "hi"


def test_a_refused_turn_gives_its_place_back(web: Make) -> None:
    gate = Gate()
    w = web(pause(gate), say("hi"))
    slots = limited(w, 1)
    w.post("/chat/s", {"message": "one"}, Accept="application/json")
    assert_error(w.post("/chat/s", {"message": "two"}), 409, "session_busy")
    assert slots.taken == 0
    gate.open()


def test_a_stream_that_the_hosts_own_code_throws_away_leaves_its_place(
    web: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # What is logged here is kept, with its traceback, which has the answer.
    for log in ("agentao_web", "host"):
        caplog.set_level(logging.CRITICAL + 1, log)
    w = web()
    slots = limited(w, 1)

    @w.app.after_request
    def broken(response: t.Any) -> t.Any:
        if response.mimetype == "text/event-stream":
            raise ZeroDivisionError
        return response

    assert w.post("/chat/s", {"message": "hi"}).status_code == 500
    gc.collect()
    assert slots.taken == 0
