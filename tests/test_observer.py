"""What a pool tells whoever looks on: each thing once, in order, and never under a lock."""

from __future__ import annotations

import collections.abc as cabc
import threading
import typing as t

import pytest

from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.observer import Observer
from agentao_web.core.turn import TurnRequest
from agentao_web.runner import Stage
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Probe
from tests.pool_fakes import say_ok
from tests.pool_fakes import until_stopped

Make = cabc.Callable[..., tuple[Probe, "Ear"]]


class Ear(Observer):
    """Writes down what it is told, and by whom while a lock was held."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, t.Any]] = []
        self.locked: list[str] = []
        self.pool: t.Any = None
        for name in vars(Observer):
            if not name.startswith("_") and name not in ("ticked", "stored"):
                setattr(self, name, self._listener(name))

    def _listener(self, name: str) -> cabc.Callable[..., None]:
        def listen(*told: t.Any) -> None:
            lock = self.pool._books.lock
            if not lock.acquire(timeout=PATIENCE):
                self.locked.append(name)
            else:
                lives = list(self.pool._map.values())
                lock.release()
                if any(live._cond._is_owned() for live in lives):
                    self.locked.append(name)
            self.heard.append((name, told))

        return listen

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


@pytest.fixture
def probe() -> cabc.Iterator[Make]:
    made: list[Probe] = []
    ears: list[Ear] = []

    def make(*args: t.Any, **caps: t.Any) -> tuple[Probe, Ear]:
        ear = Ear()
        made.append(Probe(*args, observer=ear, **caps))
        ear.pool = made[-1].pool
        ears.append(ear)
        return made[-1], ear

    yield make
    for p in made:
        p.pool.drain(grace=2)
    assert [ear.locked for ear in ears] == [[] for _ in ears]


def chatty(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
    for _ in range(3):
        stage.publish(Draft("llm_text", {"chunk": "word"}))
    stage.publish(Draft("tool_start", {"call_id": "1", "tool": "look", "args": {}}))
    done = {"call_id": "1", "tool": "look", "status": "ok", "duration_ms": 1}
    stage.publish(Draft("tool_complete", done))


def test_a_turn_is_told_in_order_and_only_its_first_text(probe: Make) -> None:
    p, ear = probe(chatty)
    p.run()
    assert ear.names() == ["accepted", "began", "said", "said", "said", "ended"]
    drafts = [told[1].type for name, told in ear.heard if name == "said"]
    assert drafts == ["llm_text", "tool_start", "tool_complete"]


def test_a_turn_that_is_refused_was_never_there(probe: Make) -> None:
    p, ear = probe()

    def away(*_: t.Any) -> t.Any:
        raise StoreUnavailable

    p.store.claim = away
    with pytest.raises(StoreUnavailable):
        p.start()
    assert ear.names() == ["accepted", "withdrawn"]


def test_a_turn_that_finds_the_session_busy_is_not_even_accepted(probe: Make) -> None:
    p, ear = probe(until_stopped)
    p.start()
    with pytest.raises(SessionBusy):
        p.start()
    assert ear.names().count("accepted") == 1
    p.pool.cancel(p.key())


def test_queued_turns_end_once_too(probe: Make) -> None:
    p, ear = probe(until_stopped)
    one = p.start("one")
    p.start("two", on_busy="queue")
    assert p.pool.cancel(p.key()) == 2
    p.finish(one)
    ended = [told[1].request.message for name, told in ear.heard if name == "ended"]
    assert sorted(ended) == ["one", "two"]


def test_a_given_up_turn_is_told_as_such_and_ends_once(probe: Make) -> None:
    free = threading.Event()

    def stubborn(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        assert free.wait(PATIENCE)

    p, ear = probe(stubborn, stop_grace=0.1)
    started = p.start()
    p.pool.cancel(p.key())
    p.finish(started)
    free.set()
    assert ear.names() == ["accepted", "began", "given_up", "ended"]


def test_evictions_say_why(probe: Make) -> None:
    p, ear = probe(say_ok, max_sessions=2)
    for sid in ("a", "b", "c"):
        p.run(sid=sid)
    p.pool.tick(p.pool.clock() + 10_000)
    told = [told for name, told in ear.heard if name == "evicted"]
    assert told == [(1, "crowded"), (2, "idle")]


def test_sizes_are_of_the_moment(probe: Make) -> None:
    p, _ = probe(until_stopped)
    assert "agentao_worker_heartbeat_age_seconds" not in p.pool.gauges()
    p.start("one")
    p.start("two", on_busy="queue")
    found = p.pool.gauges()
    assert found["agentao_turns_running"] == 1
    assert found["agentao_turns_queued"] == 1
    assert found["agentao_sessions_in_memory"] == 1
    assert "agentao_worker_heartbeat_age_seconds" in found
    p.pool.cancel(p.key())


def test_the_lag_grows_while_the_store_is_away(probe: Make) -> None:
    p, _ = probe(until_stopped)
    good, tried = p.store.append, threading.Event()

    def away(*_: t.Any) -> t.Any:
        tried.set()
        raise StoreUnavailable

    p.store.append = away
    started = p.start()
    assert tried.wait(PATIENCE)
    first = p.pool.gauges()["agentao_store_lag_seconds"]
    until = threading.Event()
    for _ in range(1000):
        if p.pool.gauges()["agentao_store_lag_seconds"] > first > 0:
            break
        until.wait(0.01)
    assert p.pool.gauges()["agentao_store_lag_seconds"] > first > 0
    p.store.append = good
    p.pool.cancel(p.key())
    p.finish(started)
    for _ in range(1000):
        if p.pool.gauges()["agentao_store_lag_seconds"] == 0:
            break
        until.wait(0.01)
    assert p.pool.gauges()["agentao_store_lag_seconds"] == 0
