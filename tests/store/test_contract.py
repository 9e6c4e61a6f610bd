"""What every store does; a new one is done when it passes, added to the params below."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import threading
import time
import typing as t
from pathlib import Path

import pytest

from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import IdempotencyConflict
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import TooManySessions
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import Slice
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.core.question import Question
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.store import LEFT
from agentao_web.store import ActiveTurn
from agentao_web.store import AlreadyAccepted
from agentao_web.store import Claim
from agentao_web.store import EndedTurn
from agentao_web.store import Finish
from agentao_web.store import KeyUse
from agentao_web.store import Left
from agentao_web.store import Orphan
from agentao_web.store import Revocation
from agentao_web.store import Signal
from agentao_web.store import Spoken
from agentao_web.store import Store
from agentao_web.store import TurnRow
from agentao_web.store.memory import MemoryStore
from agentao_web.store.memory import generation_seed
from agentao_web.store.sql import SqlStore

KEY = SessionKey("acme", "ann", "s")
OTHERS = [SessionKey("acme", "bob", "s"), SessionKey("other", "ann", "s")]
OPENING = Draft("turn_begin", {"message": "hello", "images": 0})
DAY = 24 * 3600.0
PATIENCE = 60.0
Open = cabc.Callable[..., Store]


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> cabc.Iterator[Open]:
    """Opens stores; those of one test are on one database, as workers are."""
    made: list[Store] = []

    def make(**options: t.Any) -> Store:
        if request.param == "memory":
            made.append(MemoryStore(seed=7, **options))
        elif request.param == "sqlite":
            made.append(SqlStore(f"sqlite:///{tmp_path}/data/store.db", **options))
        else:
            made.append(SqlStore(request.getfixturevalue("postgres_url"), **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


@pytest.fixture
def two(open_store: Open) -> tuple[Store, Store]:
    """What two workers have of one database; in memory there is only the one."""
    one = open_store()
    return (one, one) if isinstance(one, MemoryStore) else (one, open_store())


def row(turn_id: str = "t1", message: str = "hello", worker: str = "worker-1") -> TurnRow:
    return TurnRow(turn_id, message, 0, 1.0, worker)


def claim(
    store: Store,
    turn_id: str = "t1",
    key: SessionKey = KEY,
    now: float = 1.0,
    use: KeyUse | None = None,
    worker: str = "worker-1",
) -> Claim:
    return store.claim(key, row(turn_id, worker=worker), OPENING, now, use)


def append(store: Store, held: Claim, events: cabc.Sequence[Event]) -> None:
    """Write to one session's log."""
    if store.append([(held, events)]):
        raise ClaimLost


def enqueue(store: Store, turn_id: str, **options: t.Any) -> int:
    worker = options.pop("worker", "worker-1")
    return store.enqueue(KEY, row(turn_id, worker=worker), **{"limit": 9, **options})


def at_once(count: int, work: cabc.Callable[[int], None]) -> None:
    """Do *work* in many threads that begin together; the first exception is the test's."""
    barrier = threading.Barrier(count)
    failed: list[BaseException] = []

    def run_one(n: int) -> None:
        barrier.wait(PATIENCE)
        try:
            work(n)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=run_one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if failed:
        raise failed[0]


def remove(store: Store, key: SessionKey = KEY) -> None:
    store.tombstone(key)
    store.delete(key)


def text(held: Claim, n: int, chunk: str) -> Event:
    return Event(first_seq(held.generation) + n, held.turn_id, "llm_text", {"chunk": chunk}, 2.0)


def ending(held: Claim, n: int, **options: t.Any) -> Finish:
    seq = first_seq(held.generation) + n
    done = Event(seq, held.turn_id, "done", {"status": "completed"}, 3.0, {"reply": "hi"})
    fields: dict[str, t.Any] = {
        "events": [done],
        "outcome": Outcome(State.COMPLETED, reply="hi", usage={"prompt_tokens": 5}),
        "transcript": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
        ],
        "appended": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
        "rewritten": False,
        "now": 3.0,
    }
    return Finish(**{**fields, **options})


def run(store: Store, turn_id: str, key: SessionKey = KEY, **options: t.Any) -> Claim:
    held = claim(store, turn_id, key)
    store.finish(held, ending(held, 2, **options))
    return held


def stop(reason: str = "cancelled_by_user") -> Draft:
    return Draft("done", {"status": "cancelled", "reason": reason}, {"reply": ""})


def leave(store: Store, turn_id: str, reason: str = "cancelled_by_user") -> Left | None:
    """A queued turn ends without having begun."""
    return store.end_queued(KEY, turn_id, stop(reason), 5.0)


def told(store: Store) -> list[tuple[str | None, str, str | None]]:
    """The ends of turns in the log."""
    ends = [event for event in log(store) if event.type in ("done", "error")]
    return [(event.turn_id, event.type, event.data.get("reason")) for event in ends]


def log(store: Store, after: int | None = None) -> list[Event]:
    return store.events(KEY, after, limit=1000, max_bytes=10**9).events


# -- claims ------------------------------------------------------------------------------------


def test_batches_of_several_sessions_are_written_together(store: Store) -> None:
    """The one whose claim is lost is named, and keeps nobody from writing."""
    keys = [SessionKey("acme", "ann", name) for name in ("a", "b", "c")]
    held = [store.claim(key, row(f"t{key.id}"), OPENING, 1.0) for key in keys]
    gone = dataclasses.replace(held[1], generation=held[1].generation - 1)
    claims = [held[0], gone, held[2]]
    texts = [
        [Event(t.cast(int, c.opening.seq) + 1, c.turn_id, "llm_text", {"chunk": c.key.id}, 1.0)]
        for c in claims
    ]
    lost = store.append(list(zip(claims, texts, strict=True)))
    assert [claim.key.id for claim in lost] == ["b"]
    said = [store.events(key, None, limit=9, max_bytes=999).events[1:] for key in keys]
    assert [[e.data["chunk"] for e in part] for part in said] == [["a"], [], ["c"]]


def test_a_worker_knows_best_which_of_its_queued_turns_is_first(store: Store) -> None:
    """Two requests at once are admitted in one order, and may be stored in the other."""
    for name, worker in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        store.enqueue(KEY, dataclasses.replace(row(name), worker=worker), limit=4, new=True)
    with pytest.raises(SessionBusy):
        store.claim(KEY, dataclasses.replace(row("b1"), worker="b"), OPENING, 1.0)
    with pytest.raises(SessionBusy):
        store.claim(KEY, dataclasses.replace(row("a3"), worker="a"), OPENING, 1.0)
    held = store.claim(KEY, dataclasses.replace(row("a2"), worker="a"), OPENING, 1.0)
    assert [(one.id, one.state) for one in store.active(KEY)] == [
        ("a2", "running"),
        ("a1", "queued"),
        ("b1", "queued"),
    ]
    store.finish(held, ending(held, 2))
    assert store.claim(KEY, dataclasses.replace(row("a1"), worker="a"), OPENING, 2.0)


def test_a_turn_may_be_queued_in_a_new_session(store: Store) -> None:
    """It waits for a place on its worker; and then it may claim."""
    assert store.enqueue(KEY, row("t1"), limit=4, new=True) == 1
    assert store.enqueue(KEY, row("t2"), limit=4, new=True) == 2
    assert [turn.state for turn in store.active(KEY)] == ["queued", "queued"]
    with pytest.raises(SessionBusy):
        store.claim(KEY, row("t3"), OPENING, 1.0)
    assert store.claim(KEY, row("t1"), OPENING, 1.0).turn_id == "t1"


def test_a_claim_makes_the_session_and_writes_its_opening(store: Store) -> None:
    assert store.session(KEY) is None
    held = claim(store)
    assert held.opening.seq == first_seq(held.generation) + 1
    assert [(e.seq, e.type, e.data["message"]) for e in log(store)] == [
        (held.opening.seq, "turn_begin", "hello")
    ]
    session = store.session(KEY)
    assert session is not None
    assert (session.title, session.head, session.turns) == ("hello", held.opening.seq, 1)


def test_one_claim_at_a_time(store: Store) -> None:
    held = claim(store, "t1")
    with pytest.raises(SessionBusy):
        claim(store, "t2")
    store.finish(held, ending(held, 2))
    claim(store, "t2")


def test_of_fifty_claims_at_once_one_wins(two: tuple[Store, Store]) -> None:
    won: list[Claim] = []

    def rush(n: int) -> None:
        try:
            won.append(claim(two[n % 2], f"t{n}"))
        except SessionBusy:
            pass

    at_once(50, rush)
    assert len(won) == 1


def test_generations_only_go_up_also_over_sessions_and_deletes(store: Store) -> None:
    first = run(store, "t1")
    other = run(store, "t2", SessionKey("acme", "bob", "s"))
    remove(store, KEY)
    again = run(store, "t3")
    assert first.generation < other.generation < again.generation


def test_a_claim_tells_the_version_its_agent_must_have(store: Store) -> None:
    first = run(store, "t1")
    second = run(store, "t2")
    assert (first.version, second.version) == (0, first.generation)
    session = store.session(KEY)
    assert session is not None and session.version == second.generation


# -- the log -----------------------------------------------------------------------------------


def test_batches_are_appended_in_order(store: Store) -> None:
    held = claim(store)
    append(store, held, [text(held, 2, "a"), text(held, 3, "b")])
    append(store, held, [text(held, 4, "c")])
    assert [e.data["chunk"] for e in log(store, held.opening.seq)] == ["a", "b", "c"]
    session = store.session(KEY)
    assert session is not None and session.head == first_seq(held.generation) + 4


def test_the_log_is_read_by_cursor_and_limit(store: Store) -> None:
    held = claim(store)
    append(store, held, [text(held, n, f"{n}") for n in range(2, 12)])
    part = store.events(KEY, first_seq(held.generation) + 3, limit=2, max_bytes=10**6)
    assert [e.data["chunk"] for e in part.events] == ["4", "5"]
    assert part.cursor == first_seq(held.generation) + 5


def test_what_was_pruned_is_a_gap(open_store: Open) -> None:
    store = open_store(log_bytes=20_000)
    held = claim(store)
    append(store, held, [text(held, n, "x" * 1000) for n in range(2, 100)])
    first, second = log(store, 0)[:2]
    assert (first.type, first.data["reason"]) == ("gap", "pruned")
    assert first.seq == first.data["to"] == t.cast(int, second.seq) - 1


def test_a_cursor_ahead_of_the_log_is_a_gap_too(store: Store) -> None:
    held = run(store, "t1")
    first = log(store, first_seq(held.generation + 5))[0]
    assert (first.type, first.data["reason"]) == ("gap", "ahead_of_log")
    assert log(store, first_seq(held.generation) + 99) == [], "only a little ahead of the store"


def test_events_come_back_as_they_went_in(store: Store) -> None:
    held = claim(store)
    data = {"chunk": "ünïcode \u2028 🙂", "n": 1, "f": 0.5, "none": None, "deep": {"a": [1, "b"]}}
    sent = Event(first_seq(held.generation) + 2, held.turn_id, "tool_output", data, 2.5, {"x": 1})
    append(store, held, [sent])
    assert log(store)[-1] == sent


def test_any_text_a_client_may_send_comes_back(store: Store) -> None:
    odd = "nul \x00, half a pair \ud83d, quotes '\"; \u2028"
    held = store.claim(KEY, row("t1", odd), Draft("turn_begin", {"message": odd}), 1.0)
    entry = {"role": "user", "content": odd}
    done = Event(first_seq(held.generation) + 2, "t1", "done", {"x": odd}, 3.0, {"reply": odd})
    assert store.active(KEY)[0].message == odd
    store.finish(held, ending(held, 2, events=[done], transcript=[entry], appended=[entry]))
    store.rename(KEY, odd)
    session, end = store.session(KEY), store.ended(KEY, "t1")
    assert session is not None and session.title == odd
    assert end is not None and end.final == log(store)[-1] == done
    assert store.history(KEY).messages == [entry]
    page = store.transcript(KEY, before=None, after=None, limit=1)
    assert page.messages == [{"id": 1, **entry}]


def test_a_batch_that_comes_again_is_written_once(store: Store) -> None:
    """The writer sends a batch again when it cannot know whether it was committed."""
    held = claim(store)
    batch = [text(held, 2, "a"), text(held, 3, "b")]
    append(store, held, batch)
    append(store, held, [*batch, text(held, 4, "c")])
    done = ending(held, 5)
    store.finish(held, Finish(**{**vars(done), "events": [*batch, *done.events]}))
    assert [e.data.get("chunk") for e in log(store)] == [None, "a", "b", "c", None]


def test_a_page_of_the_log_has_a_number_of_bytes(store: Store) -> None:
    held = claim(store)
    append(store, held, [text(held, n, "x" * 1000) for n in range(2, 12)])
    part = store.events(KEY, held.opening.seq, limit=100, max_bytes=2500)
    assert len(part.events) == 3
    assert part.cursor == part.events[-1].seq
    assert len(store.events(KEY, part.cursor, limit=100, max_bytes=1).events) == 1


def test_pages_put_together_are_the_log(store: Store) -> None:
    held = claim(store)
    append(store, held, [text(held, n, "x" * (n * 37 % 300)) for n in range(2, 200)])
    found: list[Event] = []
    cursor: int | None = None
    while page := store.events(KEY, cursor, limit=7, max_bytes=900).events:
        found += page
        cursor = page[-1].seq
    assert found == log(store)


@pytest.mark.parametrize("batch", [1, 7, 190])
def test_every_cursor_is_a_place_to_go_on_from(store: Store, batch: int) -> None:
    """However the events came in, and also if turns that wait speak in between."""
    held = claim(store)
    events = [text(held, n, f"{n} ") for n in range(2, 192)]
    events[40:43] = [dataclasses.replace(e, turn_id="waits") for e in events[40:43]]
    for start in range(0, len(events), batch):
        append(store, held, events[start : start + batch])
    assert log(store, held.opening.seq) == events
    for n in (0, 39, 40, 42, 43, 100, 188):
        part = store.events(KEY, events[n].seq, limit=50, max_bytes=10**6)
        assert part.events == events[n + 1 : n + 51]
        assert part.cursor == part.events[-1].seq


def test_an_empty_end_of_the_log_keeps_the_cursor(store: Store) -> None:
    held = run(store, "t1")
    last = log(store)[-1].seq
    assert store.events(KEY, last, limit=5, max_bytes=10**6) == Slice([], t.cast(int, last))
    assert first_seq(held.generation) < t.cast(int, last)


def test_a_long_conversation_keeps_the_end_of_its_log(open_store: Open) -> None:
    """Whoever has read everything sees no gap; whoever is behind sees one, and then all."""
    store = open_store(log_bytes=20_000)
    cursor = None
    for n in range(30):
        held = claim(store, f"t{n}")
        append(store, held, [text(held, i, "x" * 300) for i in range(2, 7)])
        store.finish(held, ending(held, 7))
        part = store.events(KEY, cursor, limit=1000, max_bytes=10**9)
        assert [e.type for e in part.events] == ["turn_begin", *["llm_text"] * 5, "done"]
        cursor = part.cursor
    kept = log(store)
    assert 10 <= len(kept) <= 80 and kept[-1].seq == cursor
    behind = log(store, first_seq(kept[0].seq >> 20) - 1 if kept[0].seq else 0)
    assert behind[0].type == "gap" and behind[1:] == kept
    end = store.ended(KEY, "t0")
    assert end is not None and end.final.type == "done", "though its events are gone"


# -- fencing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finished", "deleted", "taken"])
def test_nothing_is_written_under_a_claim_that_is_gone(store: Store, how: str) -> None:
    stale = claim(store, "t1")
    store.finish(stale, ending(stale, 2))
    if how == "deleted":
        remove(store, KEY)
    if how == "taken":
        claim(store, "t2")
    before = log(store) if how != "deleted" else []
    with pytest.raises(ClaimLost):
        append(store, stale, [text(stale, 5, "late")])
    with pytest.raises(ClaimLost):
        store.finish(stale, ending(stale, 6))
    assert (log(store) if how != "deleted" else []) == before


# -- the end of a turn -------------------------------------------------------------------------


def test_finish_writes_everything_at_once(store: Store) -> None:
    held = claim(store)
    pending = text(held, 2, "hi")
    done = ending(held, 3)
    store.finish(held, Finish(**{**vars(done), "events": [pending, *done.events]}))
    assert [e.type for e in log(store)] == ["turn_begin", "llm_text", "done"]
    assert log(store)[-1].extra == {"reply": "hi"}
    session = store.session(KEY)
    assert session is not None
    assert (session.updated, session.usage) == (3.0, {"prompt_tokens": 5})
    page = store.transcript(KEY, before=None, after=None, limit=10)
    assert [(m["id"], m["role"]) for m in page.messages] == [(1, "user"), (2, "assistant")]
    history = store.history(KEY)
    assert [m["content"] for m in history.messages] == ["hello", "hi"]
    assert (history.epoch, history.version) == (0, held.generation)


def test_history_grows_within_an_epoch_and_is_replaced_by_the_next(store: Store) -> None:
    run(store, "t1")
    run(store, "t2", appended=[{"role": "user", "content": "more"}])
    assert [m["content"] for m in store.history(KEY).messages] == ["hello", "hi", "more"]
    run(store, "t3", appended=[{"role": "user", "content": "summary"}], rewritten=True)
    history = store.history(KEY)
    assert ([m["content"] for m in history.messages], history.epoch) == (["summary"], 1)


def test_history_is_a_copy(store: Store) -> None:
    message = {"role": "user", "content": "hello"}
    run(store, "t1", appended=[message])
    message["content"] = "changed"
    store.history(KEY).messages[0]["content"] = "changed too"
    assert store.history(KEY).messages[0]["content"] == "hello"


def test_usage_adds_up(store: Store) -> None:
    run(store, "t1")
    run(store, "t2")
    session = store.session(KEY)
    assert session is not None and session.usage == {"prompt_tokens": 10}


def test_the_transcript_is_paged_both_ways(store: Store) -> None:
    for n in range(3):
        run(store, f"t{n}")

    def ids(**options: t.Any) -> tuple[list[int], bool]:
        page = store.transcript(KEY, **{"before": None, "after": None, "limit": 2, **options})
        return [m["id"] for m in page.messages], page.more

    assert ids() == ([5, 6], True)
    assert ids(before=5) == ([3, 4], True)
    assert ids(before=3) == ([1, 2], False)
    assert ids(before=1) == ([], False)
    assert ids(after=0) == ([1, 2], True)
    assert ids(after=4) == ([5, 6], False)
    assert ids(after=99) == ([], False)
    assert ids(after=1, before=5) == ([2, 3], True)
    assert ids(after=2, before=5) == ([3, 4], False)
    assert ids(after=3, before=1) == ([], False)


def test_a_page_of_the_transcript_ends_where_it_grows_too_large(store: Store) -> None:
    for n in range(3):
        run(store, f"t{n}")

    def ids(most: int, **options: t.Any) -> tuple[list[int], bool]:
        asked = {"before": None, "after": None, "limit": 10, "max_bytes": most, **options}
        page = store.transcript(KEY, **asked)
        return [m["id"] for m in page.messages], page.more

    assert ids(1) == ([6], True)
    assert ids(1, before=6) == ([5], True)
    assert ids(1, before=2) == ([1], False)
    assert ids(1, after=0) == ([1], True)
    assert ids(1, after=5) == ([6], False)
    assert ids(1, after=6) == ([], False)
    assert ids(10**6) == ([1, 2, 3, 4, 5, 6], False)
    assert ids(10**6, limit=2) == ([5, 6], True)


def test_how_a_turn_ended_can_be_asked_later(store: Store) -> None:
    first = run(store, "t1")
    held = claim(store, "t2")
    assert store.ended(KEY, "t2") is None
    store.finish(held, ending(held, 2))
    end = store.ended(KEY, "t2")
    assert end == EndedTurn(log(store)[-1], first_seq(first.generation) + 2)
    after = store.events(KEY, end.cursor, limit=9, max_bytes=10**6).events
    assert [e.type for e in after] == ["turn_begin", "done"]
    assert store.ended(KEY, "unknown") is None


def test_whose_event_a_number_is(two: tuple[Store, Store]) -> None:
    store, other = two
    first = run(store, "t1")
    mine = [t.cast(int, event.seq) for event in log(store)]
    held = store.claim(KEY, row("t2", "the second"), OPENING, 1.0)
    enqueue(store, "t3")
    queued = Event(first_seq(held.generation) + 2, "t3", "turn_queued", {"position": 1}, 2.0)
    append(store, held, [queued, text(held, 3, "x")])
    assert [other.spoken(KEY, seq) for seq in mine] == [Spoken("t1", "hello")] * len(mine)
    begin = first_seq(held.generation) + 1
    assert other.spoken(KEY, begin) == Spoken("t2", "the second")
    assert other.spoken(KEY, begin + 1) == Spoken("t3", "hello"), "said of one that waits"
    assert other.spoken(KEY, begin + 2) == Spoken("t2", "the second")
    assert other.spoken(KEY, begin + 3) == Spoken("t2", "the second"), "shown, and not stored yet"
    store.finish(held, ending(held, 4))
    assert other.spoken(KEY, begin + 3) == Spoken("t2", "the second")
    for number in (0, 1, mine[-1] + 1, begin + 4, first_seq(held.generation + 1) + 1, 2**53 - 1):
        assert other.spoken(KEY, number) is None, number
    assert first_seq(first.generation) < mine[0]


def test_whose_event_it_was_is_known_when_the_log_has_forgotten_it(open_store: Open) -> None:
    store = open_store(log_bytes=20_000)
    seqs = []
    for n in range(30):
        held = claim(store, f"t{n}")
        append(store, held, [text(held, i, "x" * 300) for i in range(2, 7)])
        store.finish(held, ending(held, 7))
        seqs.append(first_seq(held.generation) + 3)
    assert log(store)[0].seq > seqs[0]
    for n, seq in enumerate(seqs):
        assert store.spoken(KEY, seq) == Spoken(f"t{n}", "hello")


# -- the queue ---------------------------------------------------------------------------------


def test_a_queued_turn_becomes_the_running_one(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2")
    store.finish(held, ending(held, 2))
    assert claim(store, "t2").turn_id == "t2"


def test_a_queued_turn_may_end_without_having_begun(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2")
    leave(store, "t2")
    leave(store, "t2")
    store.finish(held, ending(held, 2))
    session = store.session(KEY)
    assert session is not None and session.turns == 1


def test_the_end_of_a_queued_turn_is_written_at_once_if_nobody_holds_the_session(
    two: tuple[Store, Store],
) -> None:
    store, other = two
    before = run(store, "t1")
    enqueue(store, "t2")
    enqueue(store, "t3")
    left = leave(store, "t2")
    assert left is not None and (left.first, left.unwritten) == (True, False)
    assert left.final == log(other)[-1]
    assert (left.final.data, left.final.extra) == (stop().data, stop().extra)
    assert (left.final.seq or 0) > first_seq(before.generation + 1)
    session = other.session(KEY)
    assert session is not None and (session.head, session.turn_id) == (left.final.seq, None)
    end = other.ended(KEY, "t2")
    assert end is not None and end.final == left.final
    assert [e.turn_id for e in log(other, end.cursor)] == ["t2"], "a join gets it"
    assert [turn.id for turn in other.active(KEY)] == ["t3"]
    assert leave(other, "t2") is None, "once"
    with pytest.raises(ClaimLost):
        claim(store, "t2")
    held = run(other, "t3")
    assert held.head == left.final.seq
    assert [turn for turn, *_ in told(store)] == ["t1", "t2", "t3"]


def test_the_end_of_a_queued_turn_waits_for_who_holds_the_session(
    two: tuple[Store, Store],
) -> None:
    store, other = two
    held = claim(store, "t1")
    enqueue(other, "t2", worker="worker-2", limit=1)
    assert leave(other, "t2", "server_shutdown") == Left(first=True, unwritten=True)
    assert leave(store, "t2", "client_gone") == Left(first=False, unwritten=True)
    assert store.signals("worker-1") == [Signal(KEY, "t2", LEFT)]
    assert store.signal(KEY, "cancelled_by_user", but="worker-1") == 0
    assert enqueue(store, "t3", limit=1) == 1, "its place is free"
    assert [turn.ending for turn in store.active(KEY)] == [None, stop("server_shutdown"), None]
    session = store.session(KEY)
    assert session is not None and session.queued, "so nobody calls it idle"
    assert store.ended(KEY, "t2") is None
    # The first of two endings, by whichever way it is written.
    done = Event(first_seq(held.generation) + 2, "t2", *stop("server_shutdown")[:2], 6.0)
    append(store, held, [done])
    assert [turn.id for turn in other.active(KEY)] == ["t1", "t3"]
    end = other.ended(KEY, "t2")
    assert end is not None and end.final == done
    assert store.finish(held, ending(held, 3)), "one waits"
    run(store, "t3")
    assert told(store).count(("t2", "done", "server_shutdown")) == 1
    assert [turn for turn, *_ in told(store)] == ["t2", "t1", "t3"]


def test_the_terminal_transaction_may_end_queued_turns_too(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2", worker="worker-2")
    leave(store, "t2")
    done = Event(first_seq(held.generation) + 2, "t2", *stop()[:2], 6.0)
    append(store, held, [done])
    finish = ending(held, 3)
    assert not store.finish(held, dataclasses.replace(finish, events=[done, *finish.events]))
    assert store.active(KEY) == []
    assert [turn for turn, *_ in told(store)] == ["t2", "t1"]


def test_who_claims_next_writes_the_ends_nobody_has_written(two: tuple[Store, Store]) -> None:
    store, other = two
    held = claim(store, "t1")
    for n in (2, 3, 4, 5):
        enqueue(other, f"t{n}", worker="worker-2")
    for turn_id in ("t2", "t4"):
        leave(other, turn_id)
    assert store.finish(held, ending(held, 2))
    with pytest.raises(SessionBusy):
        claim(store, "t5")
    with pytest.raises(ClaimLost):
        claim(other, "t2", worker="worker-2")
    held = claim(other, "t3", worker="worker-2")
    events = log(store)
    assert [(e.turn_id, e.type) for e in events[-3:]] == [
        ("t2", "done"),
        ("t4", "done"),
        ("t3", "turn_begin"),
    ]
    assert held.head == events[-2].seq and held.opening == events[-1]
    assert [turn.id for turn in store.active(KEY)] == ["t3", "t5"]
    assert store.active(KEY)[0].cursor == held.head
    store.finish(held, ending(held, 5))
    end = store.ended(KEY, "t3")
    assert end is not None and [e.turn_id for e in log(store, end.cursor)] == ["t3", "t3"]
    leave(store, "t5")
    held = run(store, "new")
    assert [turn for turn, *_ in told(other)] == ["t1", "t2", "t4", "t3", "t5", "new"]


def test_who_left_the_queue_is_found_until_its_end_is_written(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2", worker="worker-2")
    for worker in ("worker-1", "worker-2"):
        store.beat(worker)
    assert store.orphans(()) == []
    leave(store, "t2")
    (orphan,) = store.orphans(())
    assert (orphan.turn_id, orphan.running, orphan.ending) == ("t2", False, stop())
    assert store.take_over(orphan, "worker-1") is None
    store.finish(held, ending(held, 2))
    assert [found.turn_id for found in store.orphans(())] == ["t2"]
    left = store.end_queued(KEY, "t2", Draft("error", {}), 9.0)
    assert left is not None and left.final is not None and not left.first
    assert left.final.data == stop().data, "what its own readers were told"
    assert store.orphans(()) == []


def test_of_many_who_end_a_queued_turn_one_writes(two: tuple[Store, Store]) -> None:
    run(two[0], "t1")
    enqueue(two[0], "t2")
    found: list[Left | None] = []
    at_once(8, lambda n: found.append(leave(two[n % 2], "t2", f"reason-{n}")))
    (wrote,) = [left for left in found if left is not None]
    assert wrote.first and wrote.final == log(two[1])[-1]
    assert [turn for turn, *_ in told(two[0])] == ["t1", "t2"]


def test_nobody_waits_for_the_end_of_a_queued_turn_of_a_doomed_session(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2")
    enqueue(store, "t3")
    leave(store, "t2")
    store.tombstone(KEY)
    assert leave(store, "t3") == Left(first=True)
    assert [turn.id for turn in store.active(KEY)] == ["t1"]
    store.finish(held, ending(held, 2))
    assert store.doomed() == [KEY]


def test_the_key_of_a_turn_that_was_cancelled_while_it_waited_leads_to_its_end(
    store: Store,
) -> None:
    use = KeyUse("k", "b" * 64)
    held = claim(store, "t1")
    enqueue(store, "t2", use=use)
    leave(store, "t2")
    assert store.accepted(KEY, use) == "t2"
    store.finish(held, ending(held, 2))
    leave(store, "t2")
    assert store.accepted(KEY, use) == "t2"
    assert store.ended(KEY, "t2") is not None


def test_the_queue_has_an_order(store: Store) -> None:
    held = claim(store, "t1")
    assert enqueue(store, "t2") == 1
    assert enqueue(store, "t3", worker="worker-2") == 2
    assert enqueue(store, "t4", first=True) == 1
    assert enqueue(store, "t5", first=True) == 1
    assert enqueue(store, "t6") == 5
    assert [a.id for a in store.active(KEY)] == ["t1", "t5", "t4", "t2", "t3", "t6"]
    store.finish(held, ending(held, 2))
    for turn_id in ["t5", "t4", "t2", "t3", "t6"]:
        held = claim(store, turn_id, worker="worker-2" if turn_id == "t3" else "worker-1")
        store.finish(held, ending(held, 2))
    assert store.active(KEY) == []


def test_active_turns_say_where_they_are(store: Store) -> None:
    before = run(store, "t0")
    place = first_seq(before.generation) + 2
    held = claim(store, "t1")
    enqueue(store, "t2", worker="worker-2")
    assert held.head == place
    assert store.active(KEY) == [
        ActiveTurn("t1", "worker-1", "running", "hello", 1.0, place),
        ActiveTurn("t2", "worker-2", "queued", "hello", 1.0, t.cast(int, held.opening.seq)),
    ]
    session = store.session(KEY)
    assert session is not None and session.turn_id == "t1"
    store.finish(held, ending(held, 2))
    session = store.session(KEY)
    assert session is not None and session.turn_id is None
    assert store.active(SessionKey("a", "b", "c")) == []


def test_a_queue_has_an_end(store: Store) -> None:
    claim(store, "t1")
    enqueue(store, "t2", limit=2)
    enqueue(store, "t3", limit=2)
    for first in (False, True):
        with pytest.raises(TooManyTurns):
            enqueue(store, "t4", limit=2, first=first)
    leave(store, "t2")
    assert enqueue(store, "t4", limit=2) == 2
    assert [a.id for a in store.active(KEY) if a.ending is None] == ["t1", "t3", "t4"]


def test_only_the_first_of_the_queue_may_claim(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2")
    enqueue(store, "t3", worker="worker-2")
    with pytest.raises(SessionBusy):
        claim(store, "t2")
    store.finish(held, ending(held, 2))
    with pytest.raises(SessionBusy):
        claim(store, "t3", worker="worker-2")
    with pytest.raises(SessionBusy):
        claim(store, "a newcomer")
    run(store, "t2")
    leave(store, "t3")
    run(store, "a newcomer")


def test_only_a_queued_turn_ends_without_having_begun(store: Store) -> None:
    assert leave(store, "t1") is None
    held = claim(store, "t1")
    assert leave(store, "t1") is None
    assert [a.id for a in store.active(KEY)] == ["t1"]
    store.finish(held, ending(held, 2))


def test_places_in_the_queue_are_given_once(two: tuple[Store, Store]) -> None:
    claim(two[0], "t0")
    found: list[int] = []
    at_once(8, lambda n: found.append(enqueue(two[n % 2], f"t{n + 1}", limit=8)))
    assert sorted(found) == list(range(1, 9))
    with pytest.raises(TooManyTurns):
        enqueue(two[0], "t9", limit=8)


# -- idempotency -------------------------------------------------------------------------------

USE, OTHER_BODY = KeyUse("k", "aa"), KeyUse("k", "bb")


@pytest.mark.parametrize("state", ["queued", "running", "ended"])
def test_a_key_that_was_used_leads_to_its_turn(store: Store, state: str) -> None:
    if state == "queued":
        claim(store, "t0")
        enqueue(store, "t1", use=USE)
    else:
        held = claim(store, "t1", use=USE)
        if state == "ended":
            store.finish(held, ending(held, 2))
    asks: list[cabc.Callable[[KeyUse], t.Any]] = [
        lambda use: claim(store, "t2", use=use),
        lambda use: enqueue(store, "t3", use=use),
    ]
    for ask in asks:
        with pytest.raises(AlreadyAccepted) as known:
            ask(USE)
        assert known.value.turn_id == "t1"
        with pytest.raises(IdempotencyConflict):
            ask(OTHER_BODY)
    assert store.accepted(KEY, USE) == "t1"
    with pytest.raises(IdempotencyConflict):
        store.accepted(KEY, OTHER_BODY)
    assert store.accepted(KEY, KeyUse("other", "aa")) is None


def test_a_queued_turn_claims_with_the_key_it_has(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2", use=USE)
    store.finish(held, ending(held, 2))
    held = claim(store, "t2", use=USE)
    store.finish(held, ending(held, 2))
    assert store.accepted(KEY, USE) == "t2"


def test_a_refusal_stores_no_key(open_store: Open) -> None:
    store = open_store(max_per_tenant=1)
    held = claim(store, "t1")
    with pytest.raises(SessionBusy):
        claim(store, "t2", use=USE)
    with pytest.raises(TooManyTurns):
        enqueue(store, "t3", limit=0, use=USE)
    with pytest.raises(TooManySessions):
        claim(store, "t4", SessionKey("acme", "ann", "s2"), use=USE)
    assert store.accepted(KEY, USE) is None
    store.finish(held, ending(held, 2))
    assert claim(store, "t5", use=USE).turn_id == "t5"


def test_of_the_same_key_at_once_one_wins_and_the_others_join(two: tuple[Store, Store]) -> None:
    won: list[str] = []
    joined: list[str] = []

    def rush(n: int) -> None:
        try:
            won.append(claim(two[n % 2], f"t{n}", use=USE).turn_id)
        except AlreadyAccepted as known:
            joined.append(known.turn_id)

    at_once(16, rush)
    assert len(won) == 1 and joined == won * 15


def test_a_key_is_forgotten_with_its_session(store: Store) -> None:
    held = claim(store, "t1", use=USE)
    store.finish(held, ending(held, 2))
    remove(store, KEY)
    assert store.accepted(KEY, USE) is None
    claim(store, "t2", use=OTHER_BODY)


def test_a_key_is_kept_for_a_day(open_store: Open) -> None:
    now = [1000.0]
    store = open_store(clock=lambda: now[0])
    held = claim(store, "t1", use=USE)
    store.finish(held, ending(held, 2))
    now[0] += DAY - 1
    with pytest.raises(AlreadyAccepted):
        claim(store, "t2", use=USE)
    now[0] += 1
    assert store.accepted(KEY, OTHER_BODY) is None
    claim(store, "t3", use=OTHER_BODY)
    assert store.accepted(KEY, OTHER_BODY) == "t3"
    now[0] += DAY - 1
    assert store.accepted(KEY, OTHER_BODY) == "t3"


# -- deletion ----------------------------------------------------------------------------------


def test_a_tombstone_refuses_new_turns_and_spares_the_running_one(store: Store) -> None:
    held = claim(store, "t1")
    assert store.tombstone(KEY)
    with pytest.raises(SessionBusy) as refused:
        claim(store, "t2")
    assert refused.value.details == {"reason": "deleting"}
    with pytest.raises(SessionBusy):
        enqueue(store, "t3")
    store.finish(held, ending(held, 2))
    with pytest.raises(SessionBusy):
        claim(store, "t4")


def test_delete_spares_a_session_without_a_tombstone(store: Store) -> None:
    """Somebody else was faster with the old one, and this is a new one of that name."""
    run(store, "t1")
    store.delete(KEY)
    assert store.session(KEY) is not None
    store.tombstone(KEY)
    assert store.sessions("acme", "ann", before=None, limit=9) == []


def test_delete_removes_every_row_and_is_harmless_twice(store: Store) -> None:
    run(store, "t1")
    remove(store, KEY)
    remove(store, KEY)
    assert store.session(KEY) is None
    assert not store.tombstone(KEY)
    assert store.history(KEY).messages == []
    for ask in (
        lambda: log(store),
        lambda: store.transcript(KEY, before=None, after=None, limit=5),
        lambda: enqueue(store, "t9"),
    ):
        with pytest.raises(NotFound):
            ask()
    run(store, "t2")
    assert [m["content"] for m in store.history(KEY).messages] == ["hello", "hi"]


def test_a_session_with_a_tombstone_is_doomed_once_it_is_quiet(store: Store) -> None:
    held = claim(store, "t1")
    enqueue(store, "t2")
    run(store, "t9", SessionKey("acme", "ann", "quiet"))
    store.tombstone(KEY)
    assert store.doomed() == []
    store.finish(held, ending(held, 2))
    assert store.doomed() == []
    leave(store, "t2")
    assert store.doomed() == [KEY]
    remove(store, KEY)
    assert store.doomed() == []


# -- lists of sessions -------------------------------------------------------------------------


def test_sessions_come_last_updated_first_and_page_by_page(store: Store) -> None:
    times = {"b": 5.0, "a": 5.0, "B": 5.0, "c": 9.0, "d": 1.0}
    for n, (sid, now) in enumerate(times.items()):
        run(store, f"t{n}", SessionKey("acme", "ann", sid), now=now)
    for key in (SessionKey("acme", "bob", "x"), SessionKey("other", "ann", "y")):
        run(store, "t", key, now=7.0)
    found: list[str] = []
    before: tuple[float, str] | None = None
    while page := store.sessions("acme", "ann", before=before, limit=2):
        found += [row.key.id for row in page]
        before = page[-1].updated, page[-1].key.id
    assert found == ["c", "b", "a", "B", "d"]
    everyone = [row.key for row in store.sessions(None, None, before=None, limit=4)]
    assert everyone[0].id == "c" and {key.id for key in everyone[1:3]} == {"x", "y"}
    of_ann = store.sessions(None, "ann", before=None, limit=99)
    assert len(of_ann) == 6 and len(store.sessions("acme", None, before=None, limit=99)) == 6


def test_heads_are_the_rows_of_those_that_exist(store: Store) -> None:
    one, two = SessionKey("acme", "ann", "one"), SessionKey("acme", "bob", "two")
    run(store, "t1", one)
    run(store, "t2", two)
    asked = [one, two, SessionKey("acme", "ann", "two"), SessionKey("nobody", "", "one")]
    assert store.heads(asked) == {one: store.session(one), two: store.session(two)}
    assert store.heads([]) == {}
    many = [SessionKey("acme", "ann", f"none{n}") for n in range(12_000)]
    assert list(store.heads([*many, one])) == [one]


def test_a_session_can_be_renamed(store: Store) -> None:
    run(store, "t1")
    before = store.session(KEY)
    store.rename(KEY, "Plans")
    session = store.session(KEY)
    assert session is not None and before is not None
    assert (session.title, session.updated) == ("Plans", before.updated)
    with pytest.raises(NotFound):
        store.rename(SessionKey("acme", "ann", "none"), "x")


def test_old_sessions_are_pruned_and_those_with_a_turn_are_not(store: Store) -> None:
    for n in range(230):
        held = claim(store, f"t{n}", SessionKey("acme", "ann", f"old{n}"))
        store.finish(held, ending(held, 2, now=4.0))
    running, queued = SessionKey("acme", "ann", "running"), KEY
    claim(store, "t1", running)
    held = claim(store, "t1", queued)
    enqueue(store, "t2")
    store.finish(held, ending(held, 2))
    run(store, "t1", SessionKey("acme", "ann", "new"), now=5.0)
    pruned: list[SessionKey] = []
    while some := store.prune(5.0):
        pruned += some
    assert sorted(key.id for key in pruned) == sorted(f"old{n}" for n in range(230))
    assert sorted(store.doomed()) == sorted(pruned), "until somebody has removed them"
    with pytest.raises(SessionBusy):
        claim(store, "again", pruned[0])
    for key in pruned:
        remove(store, key)
    left = {row.key.id for row in store.sessions("acme", "ann", before=None, limit=999)}
    assert left == {"running", "s", "new"}
    assert (store.prune(5.0), store.doomed()) == ([], [])


def test_the_oldest_sessions_are_pruned_first(store: Store) -> None:
    for n in range(120):
        held = claim(store, f"t{n}", SessionKey("acme", "ann", f"s{n}"))
        store.finish(held, ending(held, 2, now=float(200 - n)))
    first, second = store.prune(500.0), store.prune(500.0)
    assert [key.id for key in first + second] == [f"s{n}" for n in reversed(range(120))]
    assert 0 < len(second) < len(first), "the others want to write meanwhile"


def test_what_was_revoked_stays_revoked(store: Store) -> None:
    assert store.revocations() == []
    store.revoke("acme", None, 5.0)
    store.revoke("acme", "", 6.0)
    store.revoke("acme", "ann", 9.0)
    store.revoke("acme", "ann", 7.0)
    store.revoke("acme", None, 8.0)
    found = sorted(store.revocations(), key=lambda r: r.before)
    assert found == [
        Revocation("acme", "", 6.0),
        Revocation("acme", None, 8.0),
        Revocation("acme", "ann", 9.0),
    ]


# -- signals -----------------------------------------------------------------------------------


def crew(store: Store) -> None:
    """A running turn of worker-1, and queued ones of worker-2 and worker-1."""
    claim(store, "t1")
    enqueue(store, "t2", worker="worker-2")
    enqueue(store, "t3")


def test_signals_go_to_the_workers_of_the_turns_once(store: Store) -> None:
    crew(store)
    assert store.signal(KEY, "cancelled_by_user", but="worker-3") == 3
    assert store.signals("worker-3") == []
    assert store.signals("worker-2") == [Signal(KEY, "t2", "cancelled_by_user")]
    assert store.signals("worker-2") == []
    assert [signal.turn_id for signal in store.signals("worker-1")] == ["t1", "t3"]


def test_nobody_signals_himself(store: Store) -> None:
    crew(store)
    assert store.signal(KEY, "cancelled_by_user", but="worker-1") == 1
    assert store.signals("worker-1") == []
    assert len(store.signals("worker-2")) == 1


def test_queued_turns_can_be_spared(store: Store) -> None:
    crew(store)
    assert store.signal(KEY, "interrupted", but="worker-2", running_only=True) == 1
    assert store.signals("worker-1") == [Signal(KEY, "t1", "interrupted")]
    assert store.signal(KEY, "interrupted", but="worker-1", running_only=True) == 0


def test_asked_twice_is_asked_once_but_every_reason_arrives(store: Store) -> None:
    claim(store, "t1")
    for reason in ("read_elsewhere", "read_elsewhere", "cancelled_by_user"):
        assert store.signal(KEY, reason, but="worker-2") == 1
    reasons = [signal.reason for signal in store.signals("worker-1")]
    assert reasons == ["read_elsewhere", "cancelled_by_user"]
    store.signal(KEY, "read_elsewhere", but="worker-2")
    assert len(store.signals("worker-1")) == 1


def test_an_idle_or_unknown_session_has_nobody_to_ask(store: Store) -> None:
    assert store.signal(KEY, "cancelled_by_user", but="worker-2") == 0
    run(store, "t1")
    assert store.signal(KEY, "cancelled_by_user", but="worker-2") == 0
    assert store.signals("worker-1") == []


def test_signals_go_with_the_worker_and_with_the_session(store: Store) -> None:
    crew(store)
    store.signal(KEY, "cancelled_by_user", but="")
    store.leave("worker-1")
    assert store.signals("worker-1") == []
    remove(store, KEY)
    assert store.signals("worker-2") == []


def test_signals_asked_for_at_once_are_given_to_one(two: tuple[Store, Store]) -> None:
    crew(two[0])
    two[0].signal(KEY, "cancelled_by_user", but="")
    found: list[Signal] = []
    at_once(8, lambda n: found.extend(two[n % 2].signals("worker-1")))
    assert sorted(signal.turn_id for signal in found) == ["t1", "t3"]


# -- questions ---------------------------------------------------------------------------------


def question(question_id: str = "q1", turn_id: str = "t1", **data: t.Any) -> Question:
    asked = {"tool": "run_shell", "args": {"command": "ls"}, **data}
    return Question(question_id, turn_id, "tool_confirmation", asked, 300.5)


def open_ids(store: Store, key: SessionKey = KEY) -> list[str]:
    return [asked.id for asked in store.questions(key)]


def test_a_question_is_open_until_it_is_settled_and_then_stays_so(store: Store) -> None:
    held = claim(store)
    asked = question(odd="nul \x00, half a pair \ud83d, \u2028")
    assert (store.questions(KEY), store.question(KEY, "q1")) == ([], None)
    store.ask(held, asked)
    assert store.questions(KEY) == [asked]
    assert store.question(KEY, "q1") == asked
    answer = {"approve": True, "remember": "session", "odd": "\x00 \ud83d"}
    closed = store.settle(KEY, "q1", "approved", by="user ann \x00", answer=answer)
    assert (closed.outcome, closed.by, closed.answer) == ("approved", "user ann \x00", answer)
    assert (closed.data, closed.expires) == (asked.data, 300.5)
    assert store.settle(KEY, "q1", "expired", by="expiry", answer={"no": 1}) == closed
    store.ask(held, asked)
    assert (store.questions(KEY), store.question(KEY, "q1")) == ([], closed)


def test_a_question_that_comes_again_is_asked_once(store: Store) -> None:
    held = claim(store)
    store.ask(held, question())
    store.ask(held, question())
    assert open_ids(store) == ["q1"]


def test_what_is_unknown_cannot_be_settled(store: Store) -> None:
    with pytest.raises(NotFound):
        store.settle(KEY, "q1", "denied", by="user")
    store.ask(claim(store), question("q2"))
    with pytest.raises(NotFound):
        store.settle(KEY, "q1", "denied", by="user")
    assert open_ids(store) == ["q2"]


def test_open_questions_are_in_the_order_they_were_asked(store: Store) -> None:
    held = claim(store)
    for question_id in ("q3", "q1", "q2", "q0"):
        store.ask(held, question(question_id))
    assert open_ids(store) == ["q3", "q1", "q2", "q0"]
    store.settle(KEY, "q1", "answered", by="user")
    assert open_ids(store) == ["q3", "q2", "q0"]


def test_a_question_is_a_copy(store: Store) -> None:
    held, asked = claim(store), question()
    store.ask(held, asked)
    asked.data["args"]["command"] = "rm"
    store.questions(KEY)[0].data["args"]["command"] = "rm"
    assert store.questions(KEY) == [question()]


def test_of_many_who_settle_at_once_one_wins(two: tuple[Store, Store]) -> None:
    held = claim(two[0])
    outcomes = ["approved", "denied", "expired", "cancelled"] * 2
    for i in range(5):
        two[0].ask(held, question(f"q{i}"))
        found: dict[int, Question] = {}

        def rush(n: int, i: int = i, found: dict[int, Question] = found) -> None:
            answer = {"n": n}
            found[n] = two[n % 2].settle(KEY, f"q{i}", outcomes[n], by=f"{n}", answer=answer)

        at_once(len(outcomes), rush)
        stands = two[1].question(KEY, f"q{i}")
        assert stands is not None and stands.by is not None
        winner = int(stands.by)
        assert (stands.outcome, stands.answer) == (outcomes[winner], {"n": winner})
        assert list(found.values()) == [stands] * len(outcomes)


def test_the_end_of_a_turn_cancels_its_open_questions_only(store: Store) -> None:
    held = claim(store)
    for question_id in ("q1", "q2"):
        store.ask(held, question(question_id))
    answered = store.settle(KEY, "q1", "denied", by="user", answer={"approve": False})
    bob = claim(store, key=OTHERS[0])
    store.ask(bob, question())
    store.finish(held, ending(held, 2))
    closed = store.question(KEY, "q2")
    assert closed is not None
    assert (closed.outcome, closed.by, closed.answer) == ("cancelled", "turn_ended", {})
    assert store.question(KEY, "q1") == answered
    assert store.settle(KEY, "q2", "approved", by="user") == closed
    assert (open_ids(store), open_ids(store, OTHERS[0])) == ([], ["q1"])


def test_who_ends_a_lost_turn_cancels_its_questions(two: tuple[Store, Store]) -> None:
    stale = claim(two[0])
    two[0].ask(stale, question())
    taken = two[1].take_over(two[1].orphans(())[0], "worker-2")
    assert taken is not None
    with pytest.raises(ClaimLost):
        two[0].ask(stale, question("q2"))
    with pytest.raises(ClaimLost):
        two[0].finish(stale, ending(stale, 2))
    assert open_ids(two[0]) == ["q1"]
    two[1].finish(taken, ending(taken, 2))
    closed = two[0].question(KEY, "q1")
    assert closed is not None and (closed.outcome, closed.by) == ("cancelled", "turn_ended")
    assert two[0].question(KEY, "q2") is None
    with pytest.raises(ClaimLost):
        two[1].ask(taken, question("q3"))


def test_questions_go_with_the_session(store: Store) -> None:
    held = claim(store)
    store.ask(held, question())
    store.ask(held, question("q2"))
    store.settle(KEY, "q2", "denied", by="user")
    remove(store)
    with pytest.raises(ClaimLost):
        store.ask(held, question("q3"))
    claim(store)
    assert [store.question(KEY, f"q{n}") for n in (1, 2, 3)] == [None] * 3
    assert store.questions(KEY) == []


# -- dead workers ------------------------------------------------------------------------------


def lost(store: Store, *workers: str) -> list[str]:
    return [orphan.turn_id for orphan in store.orphans(workers)]


def test_turns_of_workers_without_a_sign_of_life_are_orphans(store: Store) -> None:
    crew(store)
    assert lost(store) == ["t1", "t2", "t3"]
    store.beat("worker-1")
    assert lost(store) == ["t2"]
    store.beat("worker-2")
    store.beat("worker-2")
    assert lost(store) == []
    store.leave("worker-1")
    assert lost(store) == ["t1", "t3"]


def test_turns_of_a_worker_that_is_named_are_orphans(store: Store) -> None:
    """Who names it has measured for how long it was silent: no clock of ours says that."""
    crew(store)
    for worker in ("worker-1", "worker-2"):
        store.beat(worker)
    assert lost(store) == []
    assert lost(store, "worker-2") == ["t2"]
    assert lost(store, "worker-1", "worker-2", "worker-3") == ["t1", "t2", "t3"]
    found = {orphan.turn_id: orphan.worker for orphan in store.orphans(["worker-1", "worker-2"])}
    assert found == {"t1": "worker-1", "t2": "worker-2", "t3": "worker-1"}


def test_every_beat_is_another_number(two: tuple[Store, Store]) -> None:
    """Also of a worker in haste, and also if the clock of its machine steps back for an hour."""
    assert two[0].beats() == {}
    seen: list[float] = []
    for n in range(20):
        two[n % 2].beat("worker-1")
        seen.append(two[1].beats()["worker-1"])
    assert seen == sorted(set(seen))
    two[0].beat("worker-2")
    assert set(two[1].beats()) == {"worker-1", "worker-2"}
    two[1].leave("worker-1")
    assert set(two[0].beats()) == {"worker-2"}


@pytest.mark.parametrize("step", [15.0, -3600.0, 10.0**9])
def test_a_clock_that_steps_is_no_sign_of_life_and_stops_none(
    open_store: Open, step: float
) -> None:
    at = [1_800_000_000.0]
    store = open_store(clock=lambda: at[0])
    claim(store, "t1")
    store.beat("worker-1")
    before = store.beats()
    at[0] += step
    assert store.beats() == before and lost(store) == []
    store.beat("worker-1")
    assert store.beats()["worker-1"] > before["worker-1"]


def test_what_was_deleted_long_ago_can_be_asked_for(store: Store) -> None:
    run(store, "t1")
    store.tombstone(KEY)
    now = time.time()
    assert store.doomed() == [KEY] == store.doomed(before=now + 60)
    assert store.doomed(before=now - 60) == []


def test_an_orphan_says_where_its_turn_begins(store: Store) -> None:
    before = run(store, "t0")
    held = claim(store, "t1")
    enqueue(store, "t2")
    first, second = store.orphans(())
    assert (first.key, first.running, first.cursor) == (KEY, True, held.head)
    assert (second.key, second.running, second.cursor) == (KEY, False, held.opening.seq)
    assert held.head == first_seq(before.generation) + 2


def test_who_takes_over_may_write_and_nobody_else(two: tuple[Store, Store]) -> None:
    stale = claim(two[0], "t1")
    append(two[0], stale, [text(stale, 2, "a")])
    (orphan,) = two[1].orphans(())
    taken = two[1].take_over(orphan, "worker-2")
    assert taken is not None and taken.generation > stale.generation
    assert taken.head == first_seq(stale.generation) + 2
    before = log(two[0])
    assert before[-1].data == {"chunk": "a"}, "its opening was not written"
    with pytest.raises(ClaimLost):
        append(two[0], stale, [text(stale, 3, "late")])
    with pytest.raises(ClaimLost):
        two[0].finish(stale, ending(stale, 4))
    assert log(two[1]) == before
    final = Event(taken.opening.seq, "t1", "error", {"status": "failed"}, 3.0)
    two[1].finish(taken, ending(taken, 1, events=[final]))
    assert two[0].ended(KEY, "t1") == EndedTurn(final, orphan.cursor)
    assert two[0].active(KEY) == []
    assert claim(two[0], "t2").version == taken.generation


def test_an_orphan_is_taken_over_once(two: tuple[Store, Store]) -> None:
    claim(two[0], "t1")
    found = [two[n].orphans(())[0] for n in range(2)]
    won: list[Claim] = []

    def rush(n: int) -> None:
        taken = two[n % 2].take_over(found[n % 2], f"janitor-{n}")
        if taken is not None:
            won.append(taken)

    at_once(8, rush)
    assert len(won) == 1
    two[0].finish(won[0], ending(won[0], 2))
    assert two[0].take_over(found[0], "janitor") is None


def test_who_took_over_may_die_too(store: Store) -> None:
    claim(store, "t1")
    first = store.take_over(store.orphans(())[0], "janitor-1")
    store.beat("janitor-1")
    assert lost(store) == []
    store.leave("janitor-1")
    second = store.take_over(store.orphans(())[0], "janitor-2")
    assert first is not None and second is not None
    with pytest.raises(ClaimLost):
        store.finish(first, ending(first, 2))
    store.finish(second, ending(second, 2))


def test_a_queued_orphan_is_never_taken_over_and_never_begins(store: Store) -> None:
    """Its end is an event like every other, and only who holds the session writes one."""
    held = claim(store, "t1")
    store.beat("worker-1")
    enqueue(store, "t2", worker="worker-2")
    store.signal(KEY, "cancelled_by_user", but="worker-1")
    (orphan,) = store.orphans(())
    assert store.take_over(orphan, "worker-1") is None
    assert [a.id for a in store.active(KEY)] == ["t1", "t2"]
    store.finish(held, ending(held, 2))
    assert [found.turn_id for found in store.orphans(())] == ["t2"]
    assert store.take_over(orphan, "worker-1") is None
    assert leave(store, "t2", "worker_lost") is not None
    assert store.signals("worker-2") == []
    with pytest.raises(ClaimLost):
        claim(store, "t2", worker="worker-2")
    run(store, "t3")


def test_an_orphan_that_lives_again_is_left_alone(store: Store) -> None:
    """It was queued when it was found, and has begun or ended since."""
    held = claim(store, "t1")
    enqueue(store, "t2")
    running, queued = store.orphans(())
    store.finish(held, ending(held, 2))
    assert store.take_over(running, "janitor") is None
    held = claim(store, "t2")
    assert store.take_over(queued, "janitor") is None
    store.finish(held, ending(held, 2))
    remove(store, KEY)
    assert store.take_over(running, "janitor") is None
    assert store.take_over(queued, "janitor") is None


# -- tenants -----------------------------------------------------------------------------------


#: Every question about a session, and the answer for one that is not the caller's.
UNKNOWN: dict[str, tuple[cabc.Callable[[Store, SessionKey], t.Any], t.Any]] = {
    "enqueue": (lambda s, k: s.enqueue(k, row("t9"), limit=9), NotFound),
    "accepted": (lambda s, k: s.accepted(k, OTHER_BODY), None),
    "end_queued": (lambda s, k: s.end_queued(k, "t3", stop(), 1.0), None),
    "active": (lambda s, k: s.active(k), []),
    "ended": (lambda s, k: s.ended(k, "t1"), None),
    "spoken": (lambda s, k: s.spoken(k, _head(s)), None),
    "session": (lambda s, k: s.session(k), None),
    "sessions": (lambda s, k: s.sessions(k.tenant, k.user, before=None, limit=9), []),
    "heads": (lambda s, k: s.heads([k]), {}),
    "events": (lambda s, k: s.events(k, None, limit=1, max_bytes=1), NotFound),
    "transcript": (lambda s, k: s.transcript(k, before=None, after=None, limit=1), NotFound),
    "history": (lambda s, k: s.history(k).messages, []),
    "rename": (lambda s, k: s.rename(k, "mine"), NotFound),
    "tombstone": (lambda s, k: s.tombstone(k), False),
    "delete": (lambda s, k: s.delete(k), None),
    "signal": (lambda s, k: s.signal(k, "cancelled_by_user", but=""), 0),
    "take_over": (lambda s, k: s.take_over(Orphan(k, "t2", True, 0), "w"), None),
    "ask": (lambda s, k: s.ask(_foreign(s, k), question("q9", "t2")), ClaimLost),
    "questions": (lambda s, k: s.questions(k), []),
    "question": (lambda s, k: s.question(k, "q1"), None),
    "settle": (lambda s, k: s.settle(k, "q1", "approved", by="user"), NotFound),
    "append": (lambda s, k: append(s, _foreign(s, k), []), ClaimLost),
    "finish": (lambda s, k: s.finish(_foreign(s, k), ending(_foreign(s, k), 2)), ClaimLost),
}


def _head(store: Store) -> int:
    session = store.session(KEY)
    assert session is not None
    return session.head


def _foreign(store: Store, key: SessionKey) -> Claim:
    """A claim with the generation of the other session's."""
    session = store.session(KEY)
    assert session is not None
    opening = Event(session.head, "t2", "turn_begin", {}, 1.0)
    return Claim(key, session.head >> 20, "t2", opening)


def _all_of(store: Store) -> tuple[t.Any, ...]:
    row, said = (store.session(KEY), store.active(KEY)), (log(store), store.history(KEY))
    return (*row, *said, store.questions(KEY))


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("method", UNKNOWN)
def test_a_session_belongs_to_its_tenant_and_user(
    store: Store, method: str, other: SessionKey
) -> None:
    held = claim(store, "t1", use=USE)
    store.finish(held, ending(held, 2))
    store.ask(claim(store, "t2"), question("q1", "t2"))
    enqueue(store, "t3")
    before = _all_of(store)
    ask, answer = UNKNOWN[method]
    if isinstance(answer, type):
        with pytest.raises(answer):
            ask(store, other)
    else:
        assert ask(store, other) == answer
    assert _all_of(store) == before
    assert store.signals("worker-1") == []


def test_the_tenants_are_those_with_sessions(store: Store) -> None:
    assert store.tenants(2) == []
    for number, tenant in enumerate(["zoo", "acme", "acme", "other"]):
        key = SessionKey(tenant, "ann", f"s{number}")
        claim(store, f"t{number}", key)
    assert store.tenants(10) == ["acme", "other", "zoo"]
    assert store.tenants(2) == ["acme", "other"]
    assert store.tenants(0) == []


def test_the_same_names_are_another_session_for_another(store: Store) -> None:
    for key in (KEY, *OTHERS):
        held = claim(store, "t1", key, use=USE)
        assert held.head == 0
        store.finish(held, ending(held, 2))
    remove(store, KEY)
    assert [store.accepted(key, USE) for key in (KEY, *OTHERS)] == [None, "t1", "t1"]


#: Names a database might take for the same: by case, blanks, Unicode, as a pattern, put together.
ALIKE = [
    SessionKey(*names)
    for names in (
        *(("acme", "ann", "S"), ("ACME", "ann", "s"), ("acme", "Ann", "s"), ("acme", "", "s")),
        *(("acme ", "ann", "s"), ("acme", " ann", "s"), ("acme", "ann ", "s")),
        *(("acme", "caf\u00e9", "s"), ("acme", "cafe\u0301", "s")),
        *(("acme", "stra\u00dfe", "s"), ("acme", "strasse", "s")),
        *(("a", "b/c", "s"), ("a/b", "c", "s"), ("%", "_", "s")),
        *(("1", "0", "s"), ("01", "0.0", "s"), ("1.0", "0", "s")),
    )
]


def test_names_that_only_look_alike_are_others(store: Store) -> None:
    for number, key in enumerate((KEY, *ALIKE)):
        assert store.session(key) is None
        held = claim(store, f"t{number}", key)
        store.finish(held, ending(held, 2))
    for number, key in enumerate((KEY, *ALIKE)):
        events = store.events(key, None, limit=9, max_bytes=10**6).events
        assert {event.turn_id for event in events} == {f"t{number}"}
        mine = store.sessions(key.tenant, key.user, before=None, limit=9)
        assert {row.key for row in mine} == {k for k in (KEY, *ALIKE) if k[:2] == key[:2]}
    remove(store, KEY)
    assert [store.session(key) is None for key in ALIKE] == [False] * len(ALIKE)


def test_a_tenant_has_a_number_of_sessions(open_store: Open) -> None:
    store = open_store(max_per_tenant=1)
    run(store, "t1")
    with pytest.raises(TooManySessions):
        claim(store, "t2", SessionKey("acme", "bob", "s2"))
    claim(store, "t3", SessionKey("other", "ann", "s"))
    run(store, "t4")


def test_the_room_of_a_tenant_is_not_given_twice(open_store: Open) -> None:
    one = open_store(max_per_tenant=3)
    two = one if isinstance(one, MemoryStore) else open_store(max_per_tenant=3)
    made: list[int] = []

    def rush(n: int) -> None:
        try:
            run((one, two)[n % 2], f"t{n}", SessionKey("acme", "ann", f"s{n}"))
            made.append(n)
        except TooManySessions:
            pass

    at_once(16, rush)
    assert len(made) == len(one.sessions("acme", "ann", before=None, limit=99)) == 3


# -- tokens ------------------------------------------------------------------------------------

TODAY, TOMORROW = "2026-02-28", "2026-03-01"


def test_tokens_are_set_aside_as_far_as_there_are_any(store: Store) -> None:
    assert store.spent("acme", TODAY) == 0
    assert store.reserve("acme", TODAY, least=10, most=60, limit=100) == 60
    assert store.reserve("acme", TODAY, least=10, most=60, limit=100) == 40
    with pytest.raises(BudgetExhausted):
        store.reserve("acme", TODAY, least=0, most=60, limit=100)
    assert store.spent("acme", TODAY) == 100


def test_less_than_the_least_is_not_set_aside(store: Store) -> None:
    store.reserve("acme", TODAY, least=1, most=95, limit=100)
    with pytest.raises(BudgetExhausted):
        store.reserve("acme", TODAY, least=6, most=60, limit=100)
    assert store.spent("acme", TODAY) == 95
    assert store.reserve("acme", TODAY, least=5, most=60, limit=100) == 5


def test_what_was_not_used_is_given_back_and_more_is_counted(store: Store) -> None:
    store.reserve("acme", TODAY, least=1, most=80, limit=100)
    store.spend("acme", TODAY, -70)
    assert store.spent("acme", TODAY) == 10
    store.spend("acme", TODAY, 200)
    assert store.spent("acme", TODAY) == 210
    with pytest.raises(BudgetExhausted):
        store.reserve("acme", TODAY, least=1, most=1, limit=100)
    store.spend("acme", TODAY, -1000)
    assert store.spent("acme", TODAY) == 0, "never less than nothing"


def test_tenants_and_days_have_tokens_of_their_own(store: Store) -> None:
    store.spend("acme", TODAY, 100)
    assert store.reserve("other", TODAY, least=1, most=50, limit=100) == 50
    assert store.reserve("acme", TOMORROW, least=1, most=50, limit=100) == 50
    assert store.spent("acme", TODAY) == 100


def test_what_was_spent_long_ago_is_forgotten(store: Store) -> None:
    store.spend("acme", "2026-01-27", 1)
    store.spend("acme", "2026-01-28", 2)
    store.spend("acme", TODAY, 3)
    spent = [store.spent("acme", day) for day in ("2026-01-27", "2026-01-28", TODAY)]
    assert spent == [0, 2, 3]


def test_two_workers_never_set_aside_more_than_there_is(two: tuple[Store, Store]) -> None:
    got: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            try:
                got.append(two[n % 2].reserve("acme", TODAY, least=3, most=7, limit=500))
            except BudgetExhausted:
                return
            if n % 4 == 0:
                two[n % 2].spend("acme", TODAY, -2)
                got.append(-2)

    at_once(12, work)
    assert sum(got) == two[0].spent("acme", TODAY) == two[1].spent("acme", TODAY) <= 500
    assert sum(got) > 490, "and all of it but a rest that is too small can be had"


# -- many at once ------------------------------------------------------------------------------


def test_two_workers_with_eight_threads_each_lose_nothing(two: tuple[Store, Store]) -> None:
    inside, rounds = threading.Semaphore(1), 5

    def work(n: int) -> None:
        store = two[n % 2]
        for i in range(rounds):
            held = _patiently(claim, store, f"t{n}-{i}")
            assert inside.acquire(blocking=False), "two claims at a time"
            _patiently(append, store, held, [text(held, m, f"{n}") for m in range(2, 5)])
            said = [{"role": "user", "content": f"{n}-{i}"}]
            last = ending(held, 5, appended=said, transcript=said)
            inside.release()
            _patiently(store.finish, held, last)

    at_once(16, work)
    everything = sorted(f"{n}-{i}" for n in range(16) for i in range(rounds))
    assert sorted(m["content"] for m in two[0].history(KEY).messages) == everything
    page = two[1].transcript(KEY, before=None, after=0, limit=1000)
    assert [m["id"] for m in page.messages] == list(range(1, len(everything) + 1))
    events = log(two[0])
    seqs = [t.cast(int, e.seq) for e in events]
    assert seqs == sorted(set(seqs)) and len(seqs) == len(everything) * 5
    session = two[1].session(KEY)
    assert session is not None
    assert (session.turns, session.usage) == (80, {"prompt_tokens": 400})


def _patiently(ask: cabc.Callable[..., t.Any], *args: t.Any) -> t.Any:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return ask(*args)
        except (SessionBusy, StoreUnavailable):
            assert time.monotonic() < until
            time.sleep(0.002)


# -- the memory store's own --------------------------------------------------------------------


def test_the_memory_store_forgets_its_oldest_idle_session() -> None:
    store = MemoryStore(seed=1, max_sessions=2)
    old, busy = SessionKey("a", "", "old"), SessionKey("a", "", "busy")
    run(store, "t1", old)
    claim(store, "t2", busy)
    run(store, "t3", SessionKey("a", "", "new"))
    assert store.session(old) is None
    claim(store, "t4", SessionKey("a", "", "new"))
    with pytest.raises(TooManySessions):
        claim(store, "t5", SessionKey("a", "", "one more"))


def test_its_numbers_are_new_after_a_restart() -> None:
    first = generation_seed(1_800_000_000.0)
    assert generation_seed(1_800_000_010.0) == first + 160
    assert first_seq(generation_seed(2_200_000_000.0)) < 2**53
