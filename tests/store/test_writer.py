"""The writer: batches, haste, order, and a store that fails."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import logging
import threading
import typing as t

import pytest

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store.writer import Writer
from tests.patience import PATIENCE

LOG = logging.getLogger("test-writer")
CLAIM = Claim(SessionKey("a", "", "s"), 1, "t1", Event(1, "t1", "turn_begin", {}, 0.0))


class Source:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stored = 0
        self.is_lost = threading.Event()
        self.caught_up = threading.Event()

    def say(self, *numbers: int) -> None:
        self.events += [Event(n, "t1", "llm_text", {"chunk": f"{n}"}, 0.0) for n in numbers]

    def unwritten(self) -> tuple[Claim | None, list[Event]]:
        return CLAIM, [e for e in self.events if t.cast(int, e.seq) > self.stored]

    def written(self, through: int) -> None:
        self.stored = through
        self.caught_up.set()

    def lost(self, claim: Claim) -> None:
        self.is_lost.set()


class Store:
    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.error: Exception | None = None
        self.called = threading.Semaphore(0)

    def append(self, batches: cabc.Sequence[tuple[Claim, cabc.Sequence[Event]]]) -> list[Claim]:
        lost = []
        for claim, events in batches:
            try:
                self._take(events)
            except ClaimLost:
                lost.append(claim)
        return lost

    def finish(self, claim: Claim, finish: Finish) -> None:
        self._take(finish.events)

    def _take(self, events: cabc.Sequence[Event]) -> None:
        error, self.error = self.error, None
        self.called.release()
        if error is not None:
            raise error
        self.calls.append([t.cast(int, e.seq) for e in events])


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make(store: Store) -> cabc.Iterator[cabc.Callable[[float], Writer]]:
    made: list[Writer] = []

    def writer(interval: float) -> Writer:
        made.append(Writer(t.cast(t.Any, store), interval=interval, log=LOG))
        return made[-1]

    yield writer
    for one in made:
        one.close(timeout=PATIENCE)


def end(seq: int) -> Finish:
    done = Event(seq, "t1", "done", {}, 0.0)
    return Finish([done], Outcome(State.COMPLETED), [], [], False, 0.0)


def test_events_are_written_within_the_interval_as_one_batch(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    writer, source = make(0.05), Source()
    source.say(2)
    writer.note(source)
    source.say(3, 4)
    writer.note(source)
    assert source.caught_up.wait(PATIENCE)
    assert [n for call in store.calls for n in call] == [2, 3, 4]


def test_what_is_urgent_does_not_wait(make: cabc.Callable[[float], Writer], store: Store) -> None:
    writer, source = make(3600.0), Source()
    source.say(2)
    writer.note(source)
    source.say(3)
    writer.note(source, urgent=True)
    assert source.caught_up.wait(PATIENCE)
    assert store.calls == [[2, 3]]


def test_the_terminal_transaction_takes_what_was_not_written(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    writer, source = make(3600.0), Source()
    source.say(2, 3)
    writer.finish(source, CLAIM, end(4), timeout=PATIENCE)
    assert store.calls == [[2, 3, 4]]


def test_a_batch_that_failed_is_in_the_next_one(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    writer, source = make(0.01), Source()
    store.error = StoreUnavailable()
    source.say(2)
    writer.note(source)
    assert store.called.acquire(timeout=PATIENCE)
    source.say(3)
    writer.note(source)
    assert source.caught_up.wait(PATIENCE)
    assert store.calls == [[2, 3]]


def test_a_lost_claim_is_told_to_the_source(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    writer, source = make(0.01), Source()
    store.error = ClaimLost()
    source.say(2)
    writer.note(source)
    assert source.is_lost.wait(PATIENCE)


@pytest.mark.parametrize("error", [ClaimLost(), StoreUnavailable(), ValueError("x")])
def test_what_the_terminal_transaction_raises_comes_back(
    make: cabc.Callable[[float], Writer], store: Store, error: Exception
) -> None:
    store.error = error
    with pytest.raises(type(error)):
        make(0.01).finish(Source(), CLAIM, end(2), timeout=PATIENCE)


def test_a_store_that_does_not_answer_is_unavailable(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    gate = threading.Event()
    store.finish = lambda claim, finish: gate.wait(PATIENCE) and None  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="in time"):
        make(0.01).finish(Source(), CLAIM, end(2), timeout=0.05)
    gate.set()


def test_close_with_a_job_in_the_same_moment_ends(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    gate = threading.Event()
    writer, source = make(3600.0), Source()
    good = store.finish

    def finish(claim: Claim, done: Finish) -> None:
        gate.wait(PATIENCE)
        good(claim, done)

    store.finish = finish  # type: ignore[method-assign]

    def work(n: int) -> None:
        # One that comes after the close is refused, and that is fine too.
        with contextlib.suppress(StoreUnavailable):
            writer.finish(source, CLAIM, end(n), timeout=PATIENCE)

    jobs = [threading.Thread(target=work, args=(n,)) for n in (2, 3)]
    for job in jobs:
        job.start()
    closing = threading.Thread(target=writer.close, kwargs={"timeout": PATIENCE})
    closing.start()
    gate.set()
    for thread in (*jobs, closing):
        thread.join(PATIENCE / 2)
        assert not thread.is_alive()


def test_what_is_noted_while_the_writer_is_at_work_is_written(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    """The note takes no lock: it must not get lost between two batches."""
    writer, source = make(0.0), Source()
    for n in range(2, 3000):
        source.say(n)
        writer.note(source)
    writer.note(source, urgent=True)
    for _ in range(int(PATIENCE * 100)):
        if source.stored == 2999:
            break
        source.caught_up.wait(0.01)
        source.caught_up.clear()
    assert source.stored == 2999


def test_close_writes_what_is_left_and_then_refuses(
    make: cabc.Callable[[float], Writer], store: Store
) -> None:
    writer, source = make(3600.0), Source()
    source.say(2)
    writer.note(source)
    writer.close(timeout=PATIENCE)
    assert store.calls == [[2]]
    with pytest.raises(StoreUnavailable):
        writer.finish(source, CLAIM, end(3), timeout=1)
