"""Whatever clients, workers and the store do at once: each turn ends once, in the log."""

from __future__ import annotations

import collections
import collections.abc as cabc
import random
import threading
import time
import typing as t

import pytest

from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WebError
from agentao_web.core.log import Draft
from agentao_web.core.turn import ENDS
from agentao_web.core.turn import TurnRequest
from agentao_web.runner import Stage
from agentao_web.sessions import Started
from agentao_web.store import Store
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Probe
from tests.test_together import polled
from tests.test_together import stores

__all__ = ["stores"]

#: Sessions nobody deletes, and one that is deleted again and again.
KEPT, DOOMED = ("a", "b"), "d"
#: What the store may fail at, before it did it or after.
FRAGILE = (
    *("claim", "enqueue", "end_queued", "append", "finish", "signal", "signals"),
    *("session", "active", "heads", "history", "take_over", "orphans", "ended", "tombstone"),
)


class Stumbling:
    """A store that fails now and then."""

    def __init__(self, store: Store, chance: random.Random, often: float) -> None:
        self._store = store
        self._chance = chance
        self.often = often

    def __getattr__(self, name: str) -> t.Any:
        good = getattr(self._store, name)
        if name not in FRAGILE:
            return good

        def call(*args: t.Any, **options: t.Any) -> t.Any:
            luck = self._chance.random()
            if luck < self.often / 2:
                raise StoreUnavailable
            found = good(*args, **options)
            if luck < self.often:
                raise StoreUnavailable
            return found

        return call


def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
    """Speaks for a moment, or until it is stopped."""
    stopped = threading.Event()
    stage.on_stop(lambda reason: stopped.set())
    words = 40 if request.message == "long" else 2
    for _ in range(words):
        stage.publish(Draft("llm_text", {"chunk": "x"}))
        if stopped.wait(0.005):
            return


class Storm:
    """Clients of two workers who do anything at any time."""

    def __init__(self, probes: list[Probe], seed: int) -> None:
        self.probes = probes
        self.started: list[tuple[Probe, Started]] = []
        self.wrong: list[BaseException] = []
        self._seed = seed

    def blow(self, deeds: int, *, clients: int = 4) -> None:
        """Each client does so many things, however long that takes here; readers read meanwhile."""
        calm = threading.Event()
        crowd = [
            threading.Thread(target=self._again, args=(self._client, n, lambda did: did >= deeds))
            for n in range(clients)
        ]
        readers = [
            threading.Thread(target=self._again, args=(self._reader, n, lambda did: calm.is_set()))
            for n in range(2)
        ]
        for thread in (*crowd, *readers):
            thread.start()
        for thread in crowd:
            thread.join(3 * PATIENCE)
        calm.set()
        for thread in readers:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in (*crowd, *readers)), "somebody hangs"
        if self.wrong:
            raise self.wrong[0]

    def _again(self, job: t.Any, n: int, over: cabc.Callable[[int], bool]) -> None:
        chance, did = random.Random(self._seed * 100 + n), 0
        try:
            while not over(did):
                did += 1
                try:
                    job(chance)
                except WebError:
                    pass
                threading.Event().wait(chance.random() * 0.01)
        except BaseException as exc:
            self.wrong.append(exc)

    def _client(self, chance: random.Random) -> None:
        probe, sid = chance.choice(self.probes), chance.choice((*KEPT, DOOMED))
        what = chance.random()
        if what < 0.6:
            message = chance.choice(("short", "long"))
            on_busy = chance.choice(("reject", "queue", "queue", "interrupt"))
            self.started.append((probe, probe.start(message, sid, on_busy=on_busy)))
        elif what < 0.75:
            probe.pool.cancel(probe.key(sid))
        elif what < 0.95 and self.started:
            probe, started = chance.choice(self.started[-8:])
            if started.turn is not None:
                probe.pool._runner.stop(started.live, started.turn, "client_gone")
        else:
            probe.pool.delete(probe.key(DOOMED), timeout=1)

    def _reader(self, chance: random.Random) -> None:
        kept = [started for _, started in self.started[-6:] if started.live.key.id in KEPT]
        if kept and not any(probe.store.often for probe in self.probes):
            polled(chance.choice(self.probes), chance.choice(kept))


def settle(probes: list[Probe]) -> None:
    """Have everything end, and wait until nothing is left."""
    until = time.monotonic() + PATIENCE
    for probe in probes:
        probe.store.often = 0.0
    while True:
        for probe in probes:
            for sid in (*KEPT, DOOMED):
                probe.pool.cancel(probe.key(sid))
        counts = [probe.pool.counts() for probe in probes]
        rows = {sid: probes[0].store.active(probes[0].key(sid)) for sid in (*KEPT, DOOMED)}
        unclosed = [probe.pool._runner.endings.unclosed for probe in probes]
        busy = any(c["turns"] or c["slots"] or c["given_up"] for c in counts)
        if not busy and not any(rows.values()) and not any(unclosed):
            return
        assert time.monotonic() < until, (counts, rows, unclosed)
        threading.Event().wait(0.05)


def check(probe: Probe, started: list[Started]) -> None:
    for sid in KEPT:
        if probe.store.session(probe.key(sid)) is None:
            # The weather was too bad for each of its starts.
            assert not [one for one in started if one.live.key.id == sid]
            continue
        log = probe.log(sid)
        numbers = [event.seq for event in log]
        assert numbers == sorted(set(numbers))
        ends = collections.Counter(event.turn_id for event in log if event.type in ENDS)
        assert set(ends.values()) <= {1}, "ended twice"
        told = {event.turn_id for event in log}
        told |= {one.turn_id for one in started if one.live.key.id == sid}
        assert told <= set(ends), "never ended"
        over: set[str | None] = set()
        for event in log:
            assert event.turn_id not in over, "something after the end"
            if event.type in ENDS:
                over.add(event.turn_id)


def welcome(probe: Probe, sid: str) -> t.Any:
    """A turn of *sid*, as soon as a deletion is through."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return probe.run("short", sid)
        except SessionBusy:
            assert time.monotonic() < until, "refused for ever"
            threading.Event().wait(0.05)


@pytest.mark.parametrize("often", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(2))
def test_in_any_weather_each_turn_ends_once_and_nothing_is_left(
    stores: cabc.Callable[[], Store], seed: int, often: float
) -> None:
    chance = random.Random(seed)
    probes = [
        Probe(script, store=Stumbling(stores(), chance, often), max_turns=3, stop_grace=30.0)
        for _ in range(2)
    ]
    try:
        storm = Storm(probes, seed)
        storm.blow(60)
        settle(probes)
        check(probes[0], [started for _, started in storm.started])
        for probe in probes:
            for sid in (*KEPT, DOOMED):
                assert welcome(probe, sid).data["status"] == "completed"
    finally:
        for probe in probes:
            probe.store.often = 0.0
            probe.pool.drain(grace=2)
