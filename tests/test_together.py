"""Workers on one store: any of them can answer anything, and none of them outlives its claim."""

from __future__ import annotations

import collections.abc as cabc
import threading
import typing as t
from pathlib import Path

import pytest

from agentao_web.core.errors import NotFound
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.turn import ENDS
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import Turn
from agentao_web.core.turn import TurnRequest
from agentao_web.readers import Reader
from agentao_web.readers import ending
from agentao_web.readers import poll
from agentao_web.runner import Stage
from agentao_web.sessions import Started
from agentao_web.store import LEFT
from agentao_web.store import Store
from agentao_web.store import TurnRow
from agentao_web.store.memory import MemoryStore
from agentao_web.store.sql import SqlStore
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Gate
from tests.pool_fakes import Probe
from tests.pool_fakes import say_ok
from tests.pool_fakes import until_stopped

Crew = cabc.Callable[..., list[Probe]]


class Handle:
    """A worker's own hold on a store all of them share."""

    def __init__(self, shared: MemoryStore) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._shared, name)

    def close(self) -> None:
        """The others go on with it."""


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> cabc.Iterator[cabc.Callable[[], Store]]:
    made: list[t.Any] = []
    shared = MemoryStore(seed=1)
    url = f"sqlite:///{tmp_path}/together.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")

    def open_store() -> Store:
        made.append(Handle(shared) if request.param == "memory" else SqlStore(url))
        return t.cast(Store, made[-1])

    yield open_store
    for store in made:
        store.close()


@pytest.fixture
def crew(stores: cabc.Callable[[], Store]) -> cabc.Iterator[Crew]:
    made: list[Probe] = []

    def make(*scripts: t.Any, **caps: t.Any) -> list[Probe]:
        for script in scripts or (say_ok, say_ok):
            made.append(Probe(script, store=stores(), **caps))
        return made

    yield make
    for probe in made:
        probe.pool.drain(grace=2)


def one_is_long(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
    """Runs until it is stopped, if that is what it was asked."""
    (until_stopped if request.message == "one" else say_ok)(agent, request, stage)


def final(probe: Probe, started: Started) -> Event:
    """How a turn ended, read on any worker."""
    reader = Reader(
        started.live, probe.store, started.cursor, turn=started.turn, turn_id=started.turn_id
    )
    probe.pool.read_here(started.live)
    found = ending(reader, wait=PATIENCE)
    assert found is not None, "the turn did not end"
    return found


def elsewhere(probe: Probe, started: Started) -> Started:
    """The same turn as another worker sees it."""
    return Started(probe.pool.find(probe.key()), started.turn_id, started.cursor, "running")


def test_a_conversation_in_random_order_of_workers_is_never_forgotten(crew: Crew) -> None:
    import random

    workers = crew(say_ok, say_ok, say_ok)
    order = [random.Random(5).choice(workers) for _ in range(40)]
    for n, worker in enumerate(order):
        assert worker.run(f"m{n}").data["status"] == "completed"
    history = workers[0].store.history(workers[0].key()).messages
    assert [m["content"] for m in history if m["role"] == "user"] == [f"m{n}" for n in range(40)]
    seqs = [e.seq for e in workers[1].log()]
    assert seqs == sorted(set(seqs))
    last = order[-1].agents.built[-1]
    assert len(last.messages) == 80, "the agent that answered last knew it all"


def test_a_place_given_back_by_who_waits_elsewhere_is_taken(crew: Crew) -> None:
    """It has no thread while it waits for another worker, so nobody comes by to look."""
    one, two = crew(until_stopped, say_ok, max_turns=1)
    busy = one.start()
    behind: list[Started] = []
    good = two.store.enqueue

    def enqueue(key: t.Any, *args: t.Any, **options: t.Any) -> t.Any:
        if key == two.key():
            two.store.enqueue = good
            behind.append(two.start("in line", "other", on_busy="queue"))
            assert behind[0].status == "queued", "the other one holds the place still"
        return good(key, *args, **options)

    two.store.enqueue = enqueue
    parked = two.start("behind the other worker's", on_busy="queue")
    assert two.finish(behind[0]).data["status"] == "completed"
    one.pool.cancel(one.key())
    assert final(one, busy).data["status"] == "cancelled"
    assert final(two, parked).data["status"] == "cancelled"


def test_a_busy_session_is_busy_everywhere(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    started = one.start()
    with pytest.raises(SessionBusy):
        two.start()
    assert two.pool.find(two.key()).state() == "running"
    one.pool.cancel(one.key())
    assert final(one, started).data["reason"] == "cancelled_by_user"


def test_every_worker_reads_the_turn_as_it_runs(crew: Crew) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": "first"}))
        gate.stand()
        stage.publish(Draft("llm_text", {"chunk": "second"}))

    one, two = crew(script, say_ok)
    started = one.start()
    gate.meet()
    live = two.pool.find(two.key())
    two.pool.read_here(live)
    seen: list[Event] = []
    with Reader(live, two.store, None, turn_id=started.turn_id) as reader:
        until = live.clock() + PATIENCE
        while not reader.told and live.clock() < until:
            found = reader.read(limit=100, max_bytes=10**6)
            seen += found
            if any(e.data.get("chunk") == "first" for e in found):
                gate.opened.set()
            if not found:
                reader.wait(until)
    assert [e.type for e in seen] == ["turn_begin", "llm_text", "llm_text", "done"]
    assert [e.seq for e in seen] == [e.seq for e in one.log()]


def test_a_new_reader_elsewhere_does_not_wait_for_a_slow_look(crew: Crew) -> None:
    """The tailer had nobody to look for and sleeps; a reader that comes wakes it."""
    from agentao_web import peers

    one, two = crew(until_stopped, say_ok)
    started = one.start()
    live = two.pool.find(two.key())
    asked = threading.Event()
    good = two.store.heads

    def heads(keys: t.Any) -> t.Any:
        asked.set()
        return good(keys)

    two.store.heads = heads  # type: ignore[method-assign]
    two.pool.read_here(live)
    with Reader(live, two.store, live.head, entered=two.pool.reader_came):
        begun = two.pool.clock()
        assert asked.wait(PATIENCE)
        assert two.pool.clock() - begun < peers._SLOW_TAIL
    one.pool.cancel(one.key())
    final(one, started)


def test_a_reader_ahead_of_what_its_worker_knows_waits_for_news(crew: Crew) -> None:
    """It has read in the store what its worker has not been told yet."""
    one, two = crew(one_is_long, say_ok)
    two.run("before")
    one.run("between")
    two.pool.find(two.key())
    first = one.start("one")
    looks, told = [], threading.Event()
    heads, events = two.store.heads, two.store.events

    def late(keys: t.Any) -> t.Any:
        assert told.wait(PATIENCE)
        return heads(keys)

    def counted(*args: t.Any, **options: t.Any) -> t.Any:
        looks.append(events(*args, **options))
        return looks[-1]

    two.store.heads, two.store.events = late, counted
    second = two.start("two", on_busy="queue")
    until = two.pool.clock() + PATIENCE
    while not any(e.data.get("chunk") == "working" for e in one.log()):
        assert two.pool.clock() < until, "the turn is not in the store"
    reader = Reader(second.live, two.store, second.cursor, turn=second.turn)
    try:
        assert ending(reader, wait=0.5) is None
        assert 0 < len(looks) < 10, "it looks, and then waits"
    finally:
        told.set()
    one.pool.cancel(one.key())
    assert final(one, first).data["reason"] == "cancelled_by_user"
    assert final(two, second).data["reason"] == "cancelled_by_user"


def test_cancel_works_from_any_worker(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    started = one.start()
    queued = one.start("later", on_busy="queue")
    assert two.pool.cancel(two.key()) == 2
    assert final(one, started).data["reason"] == "cancelled_by_user"
    assert final(one, queued).data["reason"] == "cancelled_by_user"


def test_a_queue_across_workers_keeps_its_order(crew: Crew) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            gate.stand()

    one, two = crew(script, script, max_queue=2)
    first = one.start("one")
    gate.meet()
    second = two.start("two", on_busy="queue")
    third = one.start("three", on_busy="queue")
    with pytest.raises(TooManyTurns):
        two.start("four", on_busy="queue")
    assert two.pool.counts()["slots"] == 0, "a turn that waits holds no thread"
    gate.opened.set()
    for probe, started in ((one, first), (two, second), (one, third)):
        assert final(probe, started).data["status"] == "completed"
    begun = [e.data["message"] for e in one.log() if e.type == "turn_begin"]
    assert begun == ["one", "two", "three"]


def test_a_queued_turn_whose_worker_dies_ends_for_its_readers(crew: Crew) -> None:
    """Also while the turn before it runs on, on a worker that lives."""
    one, two, three = crew(one_is_long, say_ok, say_ok, worker_lease=4.5)
    first = one.start("one")
    second = two.start("two", on_busy="queue")
    die(two)
    two.pool._peers._closed.set()  # It does not look either.
    for probe in (one, three):
        end = polled(probe, second)
        assert end.extra["error"]["code"] == "worker_lost"
    assert one.pool.find(one.key()).state() == "running"
    one.pool.cancel(one.key())
    assert final(one, first).data["status"] == "cancelled"
    assert one.run("three").data["status"] == "completed"
    users = [m["content"] for m in one.store.history(one.key()).messages if m["role"] == "user"]
    assert users == ["one", "three"]
    assert_one_end_each(one)


def test_a_queued_turn_the_store_could_not_end_is_ended_later(crew: Crew) -> None:
    """The store stumbled when a dead worker's was to be ended."""
    (one,) = crew(say_ok, worker_lease=4.5)
    look = janitor_away(one)
    one.run("first")
    gone = TurnRow("t-of-a-dead-worker", "two", 0, 1.0, "a-dead-worker")
    one.store.enqueue(one.key(), gone, limit=4)
    (orphan,) = one.store.orphans(())
    good, endings = one.store.end_queued, one.pool._runner.endings
    one.store.end_queued = refuse
    with pytest.raises(StoreUnavailable):
        endings.reap(orphan)
    one.store.end_queued = good
    one.pool._peers._looked = 0.0
    look(one.pool.clock())
    assert one.store.active(one.key()) == []
    last = one.log()[-1]
    assert (last.turn_id, last.extra["error"]["code"]) == (gone.id, "worker_lost")


def test_interrupt_works_across_workers(crew: Crew) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            until_stopped(agent, request, stage)

    one, two = crew(script, script)
    first = one.start("one")
    second = two.start("two", on_busy="interrupt")
    assert final(one, first).data["reason"] == "interrupted"
    assert final(two, second).data["status"] == "completed"


# -- a queued turn that ends while another worker holds the session -----------------------------


def refuse(*args: t.Any, **options: t.Any) -> t.NoReturn:
    raise StoreUnavailable


def polled(probe: Probe, started: Started) -> Event:
    """The end of a turn for a client that polls; it is not told before that nothing runs."""
    cursor, until = started.cursor, probe.pool.clock() + PATIENCE
    while probe.pool.clock() < until:
        live = probe.pool.find(started.live.key)
        probe.pool.read_here(live)
        reader = Reader(live, probe.store, cursor, entered=probe.pool.reader_came)
        found = poll(reader, wait=1.0, limit=100, max_bytes=10**6)
        state, cursor = live.state(), reader.cursor or 0
        for event in found:
            if event.turn_id == started.turn_id and event.type in ENDS:
                assert event.seq is not None
                return event
        assert state != "idle" or not reader.caught_up, "idle, and its end was not told"
    left = probe.store.active(started.live.key)
    here = [(turn.turn.id, turn.turn.state) for turn in live.turns()]
    mine = started.turn and (started.turn.outcome, started.turn.final, started.turn.late)
    raise AssertionError(f"its end was never told: {state}, {cursor}, {left}, {here}, {mine}")


def assert_one_end_each(probe: Probe) -> None:
    ends = [event.turn_id for event in probe.log() if event.type in ENDS]
    assert len(ends) == len(set(ends)), "a turn ended twice"
    numbers = [event.seq for event in probe.log()]
    assert numbers == sorted(set(numbers))


def by_drain(probe: Probe, started: Started) -> None:
    probe.pool.drain(grace=2)


def by_stop(probe: Probe, started: Started) -> None:
    probe.pool._runner.stop(started.live, t.cast(t.Any, started.turn), "cancelled_by_user")


def by_leaving(probe: Probe, started: Started) -> None:
    with Reader(started.live, probe.store, started.cursor, turn=started.turn) as reader:
        reader.left = True
    probe.pool.tick(probe.pool.clock() + 100)


ENDINGS = {
    "server_shutdown": by_drain,
    "cancelled_by_user": by_stop,
    "client_gone": by_leaving,
}


@pytest.mark.parametrize("reason", ENDINGS)
@pytest.mark.parametrize("on_busy", ["queue", "interrupt"])
def test_a_queued_turn_that_ends_while_another_worker_runs_is_told_in_the_log(
    crew: Crew, reason: str, on_busy: t.Any
) -> None:
    def stubborn(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            gate.stand()

    gate = Gate()
    one, two, three = crew(stubborn, say_ok, say_ok, worker_lease=60.0)
    first = one.start("one")
    gate.meet()
    second = two.start("two", on_busy=on_busy, on_disconnect="cancel")
    ENDINGS[reason](two, second)
    for probe in (one, three):
        end = polled(probe, second)
        assert (end.type, end.data["status"], end.data["reason"]) == ("done", "cancelled", reason)
    assert one.store.ended(one.key(), second.turn_id).final == end
    assert [a.message for a in one.store.active(one.key())] == ["one"], "it runs on"
    gate.opened.set()
    final(one, first)
    assert three.run("three").data["status"] == "completed"
    assert_one_end_each(one)
    page = one.store.transcript(one.key(), before=None, after=None, limit=100).messages
    assert [e["content"] for e in page if e["role"] == "user"] == ["one", "three"]


def test_who_reads_a_queued_turn_where_it_waited_is_told_once(crew: Crew) -> None:
    """By the event in the log, which is another worker's."""
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    second = two.start("two", on_busy="queue")
    by_stop(two, second)
    end = final(two, second)
    assert end.data["reason"] == "cancelled_by_user"
    assert end == next(e for e in one.log() if e.type == "done")
    one.pool.cancel(one.key())
    final(one, first)


def test_who_reads_a_queued_turn_is_told_also_if_nobody_writes_its_end(crew: Crew) -> None:
    """The worker that holds the session may be hung, or of a version that knows nothing of this."""
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    one.pool._runner.endings.write_endings = lambda key: None  # type: ignore[method-assign]
    second = two.start("two", on_busy="queue")
    by_stop(two, second)
    end = final(two, second)
    assert (end.seq, end.data["reason"]) == (None, "cancelled_by_user")
    assert two.pool.find(two.key()).state() == "running"
    one.pool.cancel(one.key())
    final(one, first)
    assert polled(two, second).data["reason"] == "cancelled_by_user"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_cancel_anywhere_ends_every_turn_in_the_log(crew: Crew, at: int) -> None:
    probes = crew(until_stopped, say_ok, say_ok, max_queue=9)
    for n in range(5):
        started = [probes[0].start(f"{n} one")]
        started.append(probes[1].start(f"{n} two", on_busy="queue"))
        started.append(probes[0].start(f"{n} three", on_busy="queue"))
        started.append(probes[1].start(f"{n} four", on_busy="queue"))
        assert probes[at].pool.cancel(probes[at].key()) == 4
        for one in started:
            for probe in probes:
                assert polled(probe, one).data["reason"] == "cancelled_by_user"
    assert_one_end_each(probes[0])


def test_a_signal_that_is_lost_costs_a_moment_only(crew: Crew) -> None:
    """It may come while the claim is on its way; the janitor looks at the rows."""
    one, two = crew(until_stopped, say_ok, worker_lease=4.5)
    first = one.start("one")
    good = one.store.signals
    one.store.signals = lambda worker: [s for s in good(worker) if s.reason != LEFT]
    second = two.start("two", on_busy="queue")
    by_stop(two, second)
    assert polled(two, second).data["reason"] == "cancelled_by_user"
    assert one.store.session(one.key()).turn_id == first.turn_id
    one.store.signals = good
    one.pool.cancel(one.key())
    final(one, first)
    assert_one_end_each(one)


def test_one_behind_a_turn_that_waits_elsewhere_ends_at_once(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    second = two.start("two", on_busy="queue")
    third = two.start("three", on_busy="queue")
    by_stop(two, third)
    assert polled(one, third).data["reason"] == "cancelled_by_user"
    assert final(two, third).seq is not None
    assert two.pool.counts() == {"sessions": 1, "turns": 1, "slots": 0, "given_up": 0}
    one.pool.cancel(one.key())
    final(one, first)
    assert final(two, second).data["reason"] == "cancelled_by_user"
    assert_one_end_each(one)


def test_one_in_line_for_a_place_ends_in_the_log(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok, max_turns=1)
    busy = one.start("busy", "other")
    waiting = one.start("one", on_busy="queue")
    one.pool._runner.stop(waiting.live, t.cast(t.Any, waiting.turn), "cancelled_by_user")
    end = polled(two, waiting)
    assert (end.data["reason"], final(one, waiting)) == ("cancelled_by_user", end)
    one.pool.cancel(one.key("other"))
    final(one, busy)
    one.agents.script = say_ok
    assert one.run("after").data["status"] == "completed"
    assert [e.type for e in one.log()] == ["done", "turn_begin", "llm_text", "done"]


def test_what_a_dead_worker_should_have_written_is_written_by_others(crew: Crew) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    one, two = crew(script, say_ok, worker_lease=4.5)
    first = one.start("one")
    gate.meet()
    die(one)
    one.pool._peers._closed.set()
    second = two.start("two", on_busy="queue")
    by_stop(two, second)
    assert polled(two, second).data["reason"] == "cancelled_by_user"
    assert polled(two, first).extra["error"]["code"] == "worker_lost"
    assert_one_end_each(two)
    gate.opened.set()
    final(one, first)


def test_a_queued_turn_ends_in_the_log_when_the_store_is_back(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    second = two.start("two", on_busy="queue")
    good, two.store.end_queued = two.store.end_queued, refuse
    by_stop(two, second)
    assert final(two, second).seq is None
    two.store.end_queued = good
    assert polled(one, second).data["reason"] == "cancelled_by_user"
    one.pool.cancel(one.key())
    final(one, first)
    assert_one_end_each(one)


def test_a_queued_turn_whose_answer_was_lost_keeps_nobody_waiting(crew: Crew) -> None:
    one, two = crew(one_is_long, say_ok)
    first = one.start("one")
    good = two.store.enqueue

    def enqueue(*args: t.Any, **options: t.Any) -> t.NoReturn:
        good(*args, **options)
        raise StoreUnavailable

    two.store.enqueue = enqueue
    with pytest.raises(StoreUnavailable):
        two.start("two", on_busy="queue")
    two.store.enqueue = good
    third = two.start("three", on_busy="queue")
    one.pool.cancel(one.key())
    final(one, first)
    assert final(two, third).data["reason"] == "cancelled_by_user"
    until = two.pool.clock() + PATIENCE
    while one.store.active(one.key()):
        assert two.pool.clock() < until, "the session is blocked"
        threading.Event().wait(0.02)
    assert one.run("four").data["status"] == "completed"
    assert_one_end_each(one)


def test_a_turn_stopped_on_its_way_into_the_queue_ends_once(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    good = one.store.enqueue

    def enqueue(key: t.Any, row: TurnRow, **options: t.Any) -> t.Any:
        for turn in first.live.turns():
            if turn.turn.id == row.id:
                one.pool._runner.stop(first.live, turn, "client_gone")
        return good(key, row, **options)

    one.store.enqueue = enqueue
    second = one.start("two", on_busy="queue")
    end = final(one, second)
    assert (end.data["reason"], end.seq is None) == ("client_gone", False)
    assert polled(two, second) == end
    assert [turn.message for turn in two.store.active(two.key())] == ["one"]
    one.pool.cancel(one.key())
    final(one, first)
    assert_one_end_each(one)


def test_a_repeated_request_is_told_how_its_queued_turn_ended(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    first = one.start("one")
    key = ("k", "b" * 64)
    second = two.start("two", on_busy="queue", use=key)
    by_stop(two, second)
    for probe in (one, two):
        again = probe.start("two", on_busy="queue", use=key)
        assert again.turn_id == second.turn_id
        assert final(probe, again).data["reason"] == "cancelled_by_user"
    again = one.start("two", on_busy="queue", use=key)
    assert (again.status, final(one, again).seq is None) == ("cancelled", False)
    third = one.start("three", on_busy="queue", use=("other", "c" * 64))
    one.pool._runner.stop(third.live, t.cast(t.Any, third.turn), "client_gone")
    assert polled(two, third).data["reason"] == "client_gone"
    again = two.start("three", on_busy="queue", use=("other", "c" * 64))
    assert (again.status, final(two, again).data["reason"]) == ("cancelled", "client_gone")
    one.pool.cancel(one.key())
    final(one, first)


def test_a_queued_turn_is_counted_once_where_it_was_stopped(crew: Crew) -> None:
    counted: list[tuple[str, str | None]] = []

    class Counter(Observer):
        def ended(self, key: SessionKey, turn: Turn, outcome: Outcome, now: float) -> None:
            counted.append((turn.id, outcome.reason))

        def reaped(self, key: SessionKey, turn_id: str) -> None:
            counted.append((turn_id, "reaped"))

    one, two = crew(until_stopped, say_ok, observer=Counter())
    first = one.start("one")
    second = two.start("two", on_busy="queue")
    by_stop(two, second)
    polled(one, second)
    one.pool.cancel(one.key())
    polled(two, first)
    final(one, first)
    assert sorted(counted) == sorted(
        [(first.turn_id, "cancelled_by_user"), (second.turn_id, "cancelled_by_user")]
    )


def test_a_delete_forgets_what_left_the_queue(crew: Crew) -> None:
    one, two, three = crew(until_stopped, say_ok, say_ok)
    started = one.start("one")
    second = two.start("two", on_busy="queue")
    third = two.start("three", on_busy="queue")
    by_stop(two, third)
    assert three.pool.delete(three.key(), timeout=PATIENCE)
    last = final(two, second)
    assert (last.seq, last.data["reason"]) == (None, "session_deleted")
    assert final(one, started).data["reason"] == "session_deleted"
    assert one.store.session(one.key()) is None
    assert three.run("new life").data["status"] == "completed"


def test_delete_works_from_any_worker(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    started = one.start()
    assert two.pool.delete(two.key(), timeout=PATIENCE)
    last = final(one, started)
    assert (last.seq, last.data["reason"]) == (None, "session_deleted")
    for probe in (one, two):
        with pytest.raises(NotFound):
            probe.pool.find(probe.key())
    assert two.agents.forgotten == [two.key()]
    assert two.run("new life").data["status"] == "completed"
    assert len(one.store.history(one.key()).messages) == 2


def test_an_id_is_free_again_on_the_worker_that_ran_what_another_deleted(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok)
    started = one.start()
    assert two.pool.delete(two.key(), timeout=PATIENCE)
    final(one, started)
    one.agents.script = say_ok
    until = one.pool.clock() + PATIENCE
    while True:
        try:
            new = one.start("new life")
            break
        except SessionBusy:
            assert one.pool.clock() < until, "refused for ever"
            one.pool._peers.tail()
    assert final(one, new).data["status"] == "completed"


def test_a_reader_is_told_when_another_worker_deletes(crew: Crew) -> None:
    one, two = crew()
    one.run()
    live = one.pool.find(one.key())
    one.pool.read_here(live)
    with Reader(live, one.store, live.head) as reader:
        assert two.pool.delete(two.key(), timeout=PATIENCE)
        until = live.clock() + PATIENCE
        events: list[Event] = []
        while not reader.told and live.clock() < until:
            reader.wait(until)
            events = reader.read(limit=9, max_bytes=10**6)
    assert events[-1].data["reason"] == "session_deleted"


def test_a_stale_agent_is_not_used_after_a_delete_and_a_new_life(crew: Crew) -> None:
    one, two = crew()
    one.run("old life")
    two.pool.delete(two.key(), timeout=PATIENCE)
    two.run("new life")
    one.run("still new")
    assert [m["content"] for m in one.agents.built[-1].messages if m["role"] == "user"] == [
        "new life",
        "still new",
    ]


def test_a_reader_elsewhere_keeps_a_turn_its_own_reader_left(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok, disconnect_grace=0.0)
    started = one.start(on_disconnect="cancel")
    turn = started.turn
    assert turn is not None
    live = two.pool.find(two.key())
    two.pool.read_here(live)
    for _ in range(200):
        one.pool._peers.tail()
        if turn.kept:
            break
    assert turn.kept
    with Reader(started.live, one.store, started.cursor, turn=turn) as reader:
        reader.left = True
    one.pool.tick(one.pool.clock() + 100)
    assert turn.turn.stop_reason is None
    one.pool.cancel(one.key())


# -- workers that die --------------------------------------------------------------------------


def die(probe: Probe) -> None:
    """As far as others can see, this worker is dead: no beats, no ticks, no writes come through."""
    probe.store.beat = lambda worker: None  # type: ignore[method-assign]
    probe.pool._closed.set()


def test_a_dead_workers_turn_is_closed_and_told(crew: Crew) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "lost":
            stage.publish(Draft("tool_start", {"call_id": "1", "tool": "pay", "args": {}}))
            gate.stand()
            stage.publish(Draft("llm_text", {"chunk": "too late"}))

    one, two = crew(script, script, worker_lease=4.5)
    one.run("before")
    lost = one.start("lost")
    gate.meet()
    two.pool.find(two.key())
    die(one)
    last = final(two, elsewhere(two, lost))
    assert last.extra["error"]["code"] == "worker_lost"
    assert two.run("after").data["status"] == "completed"
    contents = [m["content"] for m in two.store.history(two.key()).messages]
    assert contents[:3] == ["before", "ok", "lost"]
    assert "may or may not have taken effect: pay" in contents[3]
    gate.opened.set()
    mine = final(one, lost)
    assert mine.extra["error"]["code"] == "worker_lost", "fenced"
    assert "too late" not in str(two.log())
    seqs = [e.seq for e in two.log()]
    assert seqs == sorted(set(seqs))


def test_a_dead_workers_queue_is_not_run(crew: Crew) -> None:
    one, two = crew(until_stopped, say_ok, worker_lease=4.5)
    one.start("one")
    one.start("two", on_busy="queue")
    two.pool.find(two.key())
    die(one)
    until = two.pool.clock() + PATIENCE
    while two.store.active(two.key()) and two.pool.clock() < until:
        two.pool.tick(two.pool.clock())
        threading.Event().wait(0.05)
    assert two.store.active(two.key()) == []
    begun = [e.data["message"] for e in two.log() if e.type == "turn_begin"]
    assert begun == ["one"], "it never runs later unasked"
    ends = [e for e in two.log() if e.type in ("done", "error")]
    assert {e.extra["error"]["code"] for e in ends} == {"worker_lost"}
    one.pool.cancel(one.key())


def janitor_away(probe: Probe) -> cabc.Callable[[float], None]:
    """Nobody looks after open turns but the test, by what this returns."""
    peers = probe.pool._peers
    look = peers.look
    peers.look = lambda now: None  # type: ignore[method-assign]
    return look


@pytest.mark.parametrize("committed", [False, True])
def test_a_turn_the_store_could_not_end_is_ended_when_it_is_back(
    crew: Crew, committed: bool
) -> None:
    """With its true outcome, if the commit had gone through and only the answer was lost."""
    (one,) = crew(say_ok, worker_lease=4.0)
    good = one.store.finish

    def finish(*args: t.Any) -> t.NoReturn:
        if committed:
            good(*args)
        raise StoreUnavailable

    one.store.finish = finish  # type: ignore[method-assign]
    look = janitor_away(one)
    told = final(one, one.start("first"))
    if told.seq is None:
        assert told.extra["error"]["code"] == "store_unavailable"
    else:
        # What was committed after all may be seen before the reader looks.
        assert (committed, told.data["status"]) == (True, "completed")
    one.store.finish = good  # type: ignore[method-assign]
    look(one.pool.clock())
    assert one.store.active(one.key()) == []
    last = one.log()[-1]
    assert last.data["status"] == ("completed" if committed else "failed")
    assert one.run("second").data["status"] == "completed"
    users = [m["content"] for m in one.store.history(one.key()).messages if m["role"] == "user"]
    assert users == ["first", "second"]


def test_a_claim_whose_answer_was_lost_does_not_block_the_session(crew: Crew) -> None:
    (one,) = crew(say_ok)
    good = one.store.claim

    def claim(*args: t.Any) -> t.NoReturn:
        good(*args)
        raise StoreUnavailable

    one.store.claim = claim  # type: ignore[method-assign]
    look = janitor_away(one)
    with pytest.raises(StoreUnavailable):
        one.start("first")
    one.store.claim = good  # type: ignore[method-assign]
    look(one.pool.clock())
    assert one.log()[-1].extra["error"]["code"] == "store_unavailable"
    assert one.run("second").data["status"] == "completed"


def test_a_worker_that_overslept_alone_closes_its_own_turn(crew: Crew) -> None:
    (one,) = crew(until_stopped, worker_lease=4.5)
    look = janitor_away(one)
    lost = one.start("long")
    one.pool._peers._beaten -= 100
    one.pool._peers._looked = 0.0
    look(one.pool.clock())
    assert final(one, lost).extra["error"]["code"] == "worker_lost"
    assert one.store.active(one.key()) == []
    one.agents.script = say_ok
    assert one.run("next").data["status"] == "completed"


def test_a_worker_that_overslept_forgets_what_only_it_knows(crew: Crew) -> None:
    """It stood still past its lease, and another one closed its turn meanwhile."""

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "long":
            until_stopped(agent, request, stage)

    one, two = crew(script, script, worker_lease=4.5)
    lost = one.start("long")
    two.pool.find(two.key())
    die(one)
    assert final(two, elsewhere(two, lost)).extra["error"]["code"] == "worker_lost"
    one.pool._closed.clear()  # It wakes up.
    one.pool._peers._beaten -= 100
    live = one.pool.find(one.key())
    with Reader(live, one.store, 0) as reader:
        seen = reader.read(limit=100, max_bytes=10**6)
    assert [(e.seq, e.type) for e in seen] == [(e.seq, e.type) for e in two.log()]
    assert final(one, lost).extra["error"]["code"] == "worker_lost"


def test_a_worker_that_cannot_beat_stops_its_own_turns_first(crew: Crew) -> None:
    (one,) = crew(until_stopped, worker_lease=4.5)
    started = one.start()

    def refuse(worker: str) -> t.NoReturn:
        raise StoreUnavailable

    one.store.beat = refuse  # type: ignore[method-assign]
    one.pool.tick(one.pool.clock() + 4)
    assert final(one, started).extra["error"]["code"] == "store_unavailable"


# -- idempotency -------------------------------------------------------------------------------


def use(name: str = "k", body: str = "b" * 64) -> tuple[str, str]:
    return (name, body)


def test_a_repeated_request_joins_wherever_it_arrives(crew: Crew) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    one, two = crew(script, script)
    first = one.start("hi", use=use())
    gate.meet()
    here, there = one.start("hi", use=use()), two.start("hi", use=use())
    assert first.turn_id == here.turn_id == there.turn_id
    gate.opened.set()
    assert final(two, there).data["status"] == "completed"
    again = two.start("hi", use=use())
    assert (again.turn_id, again.status) == (first.turn_id, "completed")
    assert final(two, again).extra == {"reply": "ok"}
    assert len([e for e in one.log() if e.type == "turn_begin"]) == 1


def test_two_at_the_same_moment_are_one_turn(crew: Crew) -> None:
    one, two = crew()
    barrier = threading.Barrier(8)
    ids: list[str] = []

    def ask(probe: Probe) -> None:
        barrier.wait(PATIENCE)
        ids.append(probe.start("hi", use=use()).turn_id)

    threads = [threading.Thread(target=ask, args=(p,)) for p in (one, two) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert (len(ids), len(set(ids))) == (8, 1)


# -- retention ---------------------------------------------------------------------------------


def until_gone(probe: Probe, *sids: str) -> None:
    """Until the thread that removes them has done so."""
    until = probe.pool.clock() + PATIENCE
    while any(probe.store.session(probe.key(sid)) is not None for sid in sids):
        assert probe.pool.clock() < until, "still there"
        threading.Event().wait(0.02)


def test_old_conversations_go_with_their_folders_and_no_turn_is_lost(crew: Crew) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        (until_stopped if request.message == "busy" else say_ok)(agent, request, stage)

    one, two = crew(script, script, conversation_ttl=3600.0, turn_timeout=1e6, worker_lease=60.0)
    one.run(sid="old")
    two.run(sid="older")
    busy = two.start("busy", sid="busy")
    live = one.pool.find(one.key("old"))
    one.pool.read_here(live)
    with Reader(live, one.store, live.head) as reader:
        two.pool.tick(two.pool.clock() + 3700)
        until_gone(two, "old", "older")
        until = live.clock() + PATIENCE
        events: list[Event] = []
        while not reader.told and live.clock() < until:
            reader.wait(until)
            events = reader.read(limit=9, max_bytes=10**6)
    assert events[-1].data["reason"] == "session_deleted", "who reads it is told"
    forgotten = {key.id for probe in (one, two) for key in probe.agents.forgotten}
    assert forgotten == {"old", "older"}
    assert two.store.session(two.key("busy")) is not None
    two.pool.cancel(two.key("busy"))
    assert final(two, busy).data["reason"] == "cancelled_by_user"
    for probe in (one, two):
        assert probe.run("a new life", sid="old").data["status"] == "completed"
    assert len(one.store.history(one.key("old")).messages) == 4


def test_old_conversations_are_looked_for_once_a_minute() -> None:
    probe = Probe(conversation_ttl=3600.0)
    asked: list[float] = []
    came = threading.Semaphore(0)

    def prune(before: float) -> list[t.Any]:
        asked.append(before)
        came.release()
        return []

    probe.store.prune = prune
    for now, times in ((10_000.0, 1), (10_059.0, 0), (10_060.0, 1), (10_119.9, 0), (10_121.0, 1)):
        probe.pool.tick(now)
        for _ in range(times):
            assert came.acquire(timeout=PATIENCE)
    probe.pool.drain(grace=1)
    assert asked == [6400.0, 6460.0, 6521.0]


def test_conversations_are_kept_unless_told() -> None:
    probe = Probe()
    probe.run()
    probe.store.prune = None  # Asking it would break the tick.
    probe.pool.tick(probe.pool.clock() + 10**9)
    assert probe.store.session(probe.key()) is not None
    probe.pool.drain(grace=1)


def test_a_store_that_is_down_is_asked_again_later(caplog: pytest.LogCaptureFixture) -> None:
    probe = Probe(conversation_ttl=3600.0)
    came = threading.Semaphore(0)

    def prune(before: float) -> t.NoReturn:
        came.release()
        raise StoreUnavailable

    probe.store.prune = prune
    for now in (10_000.0, 10_060.0):
        probe.pool.tick(now)
        assert came.acquire(timeout=PATIENCE)
    probe.pool.drain(grace=1)
    assert not caplog.records
