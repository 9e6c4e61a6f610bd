"""What every store does; a new one is done when it passes, added to the params below."""

from __future__ import annotations

import collections.abc as cabc
import threading
import typing as t

import pytest

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import TooManySessions
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import Store
from agentao_web.store import TurnRow
from agentao_web.store.memory import MemoryStore
from agentao_web.store.memory import generation_seed

KEY = SessionKey("acme", "ann", "s")
Open = cabc.Callable[..., Store]


@pytest.fixture(params=["memory"])
def open_store(request: pytest.FixtureRequest) -> cabc.Iterator[Open]:
    made: list[Store] = []

    def make(**options: t.Any) -> Store:
        made.append(MemoryStore(seed=7, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


def row(turn_id: str = "t1", message: str = "hello") -> TurnRow:
    return TurnRow(turn_id, message, 0, 1.0, "worker-1")


def claim(store: Store, turn_id: str = "t1", key: SessionKey = KEY, now: float = 1.0) -> Claim:
    opening = Draft("turn_begin", {"message": "hello", "images": 0})
    return store.claim(key, row(turn_id), opening, now)


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


def log(store: Store, after: int | None = None) -> list[Event]:
    return store.events(KEY, after, limit=1000, max_bytes=10**9).events


# -- claims ------------------------------------------------------------------------------------


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


def test_of_fifty_claims_at_once_one_wins(store: Store) -> None:
    barrier = threading.Barrier(50)
    won: list[Claim] = []

    def rush(n: int) -> None:
        barrier.wait(20)
        try:
            won.append(claim(store, f"t{n}"))
        except SessionBusy:
            pass

    threads = [threading.Thread(target=rush, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(won) == 1


def test_generations_only_go_up_also_over_sessions_and_deletes(store: Store) -> None:
    first = run(store, "t1")
    other = run(store, "t2", SessionKey("acme", "bob", "s"))
    store.delete(KEY)
    again = run(store, "t3")
    assert first.generation < other.generation < again.generation


def test_a_claim_tells_the_version_its_agent_must_have(store: Store) -> None:
    assert run(store, "t1").version == 0
    assert run(store, "t2").version == 1
    session = store.session(KEY)
    assert session is not None and session.version == 2


# -- the log -----------------------------------------------------------------------------------


def test_batches_are_appended_in_order(store: Store) -> None:
    held = claim(store)
    store.append(held, [text(held, 2, "a"), text(held, 3, "b")])
    store.append(held, [text(held, 4, "c")])
    assert [e.data["chunk"] for e in log(store, held.opening.seq)] == ["a", "b", "c"]
    session = store.session(KEY)
    assert session is not None and session.head == first_seq(held.generation) + 4


def test_the_log_is_read_by_cursor_and_limit(store: Store) -> None:
    held = claim(store)
    store.append(held, [text(held, n, f"{n}") for n in range(2, 12)])
    part = store.events(KEY, first_seq(held.generation) + 3, limit=2, max_bytes=10**6)
    assert [e.data["chunk"] for e in part.events] == ["4", "5"]
    assert part.cursor == first_seq(held.generation) + 5


def test_what_was_pruned_is_a_gap(open_store: Open) -> None:
    store = open_store(log_bytes=20_000)
    held = claim(store)
    store.append(held, [text(held, n, "x" * 1000) for n in range(2, 100)])
    first, second = log(store, 0)[:2]
    assert (first.type, first.data["reason"]) == ("gap", "pruned")
    assert first.seq == first.data["to"] == t.cast(int, second.seq) - 1


def test_a_cursor_ahead_of_the_log_is_a_gap_too(store: Store) -> None:
    held = run(store, "t1")
    first = log(store, first_seq(held.generation + 5))[0]
    assert (first.type, first.data["reason"]) == ("gap", "ahead_of_log")


def test_events_come_back_as_they_went_in(store: Store) -> None:
    held = claim(store)
    data = {"chunk": "ünïcode \u2028 🙂", "n": 1, "f": 0.5, "none": None, "deep": {"a": [1, "b"]}}
    sent = Event(first_seq(held.generation) + 2, held.turn_id, "tool_output", data, 2.5, {"x": 1})
    store.append(held, [sent])
    assert log(store)[-1] == sent


# -- fencing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finished", "deleted", "taken"])
def test_nothing_is_written_under_a_claim_that_is_gone(store: Store, how: str) -> None:
    stale = claim(store, "t1")
    store.finish(stale, ending(stale, 2))
    if how == "deleted":
        store.delete(KEY)
    if how == "taken":
        claim(store, "t2")
    before = log(store) if how != "deleted" else []
    with pytest.raises(ClaimLost):
        store.append(stale, [text(stale, 5, "late")])
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
    assert (history.epoch, history.version) == (0, 1)


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


# -- the queue ---------------------------------------------------------------------------------


def test_a_queued_turn_becomes_the_running_one(store: Store) -> None:
    held = claim(store, "t1")
    store.enqueue(KEY, row("t2"))
    store.finish(held, ending(held, 2))
    assert claim(store, "t2").turn_id == "t2"


def test_a_queued_turn_may_end_without_having_begun(store: Store) -> None:
    held = claim(store, "t1")
    store.enqueue(KEY, row("t2"))
    store.dequeue(KEY, "t2", Outcome(State.CANCELLED, "cancelled_by_user"))
    store.dequeue(KEY, "t2", Outcome(State.CANCELLED, "cancelled_by_user"))
    store.finish(held, ending(held, 2))
    session = store.session(KEY)
    assert session is not None and session.turns == 1


def test_a_turn_may_be_queued_before_the_first_claim_is_through(store: Store) -> None:
    store.enqueue(KEY, row("t2"))
    assert claim(store, "t2").turn_id == "t2"


# -- deletion ----------------------------------------------------------------------------------


def test_a_tombstone_refuses_new_turns_and_spares_the_running_one(store: Store) -> None:
    held = claim(store, "t1")
    assert store.tombstone(KEY)
    with pytest.raises(SessionBusy) as refused:
        claim(store, "t2")
    assert refused.value.details == {"reason": "deleting"}
    with pytest.raises(SessionBusy):
        store.enqueue(KEY, row("t3"))
    store.finish(held, ending(held, 2))
    with pytest.raises(SessionBusy):
        claim(store, "t4")


def test_delete_removes_every_row_and_is_harmless_twice(store: Store) -> None:
    run(store, "t1")
    store.delete(KEY)
    store.delete(KEY)
    assert store.session(KEY) is None
    assert not store.tombstone(KEY)
    assert store.history(KEY).messages == []
    for ask in (
        lambda: log(store),
        lambda: store.transcript(KEY, before=None, after=None, limit=5),
    ):
        with pytest.raises(NotFound):
            ask()
    run(store, "t2")
    assert [m["content"] for m in store.history(KEY).messages] == ["hello", "hi"]


# -- tenants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [SessionKey("acme", "bob", "s"), SessionKey("other", "ann", "s")])
def test_a_session_belongs_to_its_tenant_and_user(store: Store, other: SessionKey) -> None:
    run(store, "t1")
    assert store.session(other) is None
    assert store.history(other).messages == []
    with pytest.raises(NotFound):
        store.events(other, None, limit=1, max_bytes=1)
    store.delete(other)
    assert store.session(KEY) is not None


def test_a_tenant_has_a_number_of_sessions(open_store: Open) -> None:
    store = open_store(max_per_tenant=1)
    run(store, "t1")
    with pytest.raises(TooManySessions):
        claim(store, "t2", SessionKey("acme", "bob", "s2"))
    claim(store, "t3", SessionKey("other", "ann", "s"))
    run(store, "t4")


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
