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
    *("claim", "enqueue", "end_queued", "append_many", "finish", "signal", "signals"),
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
        self.started: list[tuple[str, Started]] = []
        self.wrong: list[BaseException] = []
        self._seed = seed

    def blow(self, seconds: float, *, clients: int = 4) -> None:
        until = time.monotonic() + seconds
        jobs = [(self._client, n) for n in range(clients)] + [(self._reader, n) for n in range(2)]
        crowd = [
            threading.Thread(target=self._kept_up, args=(job, n, until)) for job, n in jobs
        ]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join(seconds + 3 * PATIENCE)
        if self.wrong:
            raise self.wrong[0]

    def _kept_up(self, job: t.Any, n: int, until: float) -> None:
        chance = random.Random(self._seed * 100 + n)
        try:
            while time.monotonic() < until:
                try:
                    job(chance)
                except WebError:
                    pass
                time.sleep(chance.random() * 0.01)
        except BaseException as exc:
            self.wrong.append(exc)

    def _client(self, chance: random.Random) -> None:
        probe, sid = chance.choice(self.probes), chance.choice((*KEPT, DOOMED))
        what = chance.random()
        if what < 0.6:
            started = probe.start(
                chance.choice(("short", "long")),
                sid,
                on_busy=chance.choice(("reject", "queue", "queue", "interrupt")),
            )
            self.started.append((sid, started))
        elif what < 0.75:
            probe.pool.cancel(probe.key(sid))
        elif what < 0.95 and self.started:
            _, started = chance.choice(self.started[-8:])
            if started.turn is not None:
                probe = next(p for p in self.probes if p.pool.peek(started.live.key) is started.live) \
                    if any(p.pool.peek(started.live.key) is started.live for p in self.probes) else None
                if probe is not None:
                    probe.pool._runner.stop(started.live, started.turn, "client_gone")
        else:
            probe.pool.delete(probe.key(DOOMED), timeout=1)

    def _reader(self, chance: random.Random) -> None:
        kept = [started for sid, started in self.started[-6:] if sid in KEPT]
        if kept:
            probe = chance.choice(self.probes)
            started = chance.choice(kept)
            if all(p.store.often == 0 for p in self.probes):
                # polled() uses key("s")
                _polled(probe, started)


def _polled(probe: Probe, started: Started) -> None:
    sid = started.live.key.id
    key = probe.key
    probe.key = lambda s=sid: key(s)  # type: ignore
    other = Probe.__new__(Probe)
    other.__dict__.update(probe.__dict__)
    other.key = lambda s=sid: key(sid)  # type: ignore
    probe.__dict__.pop("key")
    polled(other, started)


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
        open_ = [probe.pool._runner.unclosed for probe in probes]
        busy = any(c["turns"] or c["slots"] or c["given_up"] for c in counts)
        if not busy and not any(rows.values()) and not any(open_):
            return
        assert time.monotonic() < until, (counts, rows, open_,
            [[(x.turn, x.claim, x.accepted.is_set(), x.closing, l.turns()) for x, l in p.pool._books.running()] for p in probes])
        threading.Event().wait(0.05)


def check(probe: Probe, started: cabc.Iterable[tuple[str, Started]]) -> None:
    for sid in KEPT:
        log = probe.log(sid)
        numbers = [event.seq for event in log]
        assert numbers == sorted(set(numbers))
        ends = collections.Counter(event.turn_id for event in log if event.type in ENDS)
        assert set(ends.values()) <= {1}, "ended twice"
        told = {event.turn_id for event in log}
        told |= {one.turn_id for at, one in started if at == sid}
        assert told <= set(ends), [(tid, [e.type for e in log if e.turn_id==tid], [s.status for _, s in started if s.turn_id==tid]) for tid in told - set(ends)]
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
@pytest.mark.parametrize("seed", range(3))
def test_storm(stores: cabc.Callable[[], Store], seed: int, often: float) -> None:
    chance = random.Random(seed)
    probes = [
        Probe(script, store=Stumbling(stores(), chance, often), max_turns=3, stop_grace=30.0)
        for _ in range(2)
    ]
    try:
        storm = Storm(probes, seed)
        storm.blow(1.5)
        settle(probes)
        check(probes[0], storm.started)
        for probe in probes:
            for sid in (*KEPT, DOOMED):
                assert welcome(probe, sid).data["status"] == "completed"
    finally:
        for probe in probes:
            probe.store.often = 0.0
            probe.pool.drain(grace=2)
