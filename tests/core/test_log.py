"""The numbered log: what readers with cursors get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import EventLog
from agentao_web.core.log import first_seq
from agentao_web.core.log import joined


def make(texts: list[str], *, max_bytes: int = 10**6, generation: int = 3) -> EventLog:
    log = EventLog(max_bytes=max_bytes)
    log.claim(generation)
    for text in texts:
        log.add(log.number(Draft("llm_text", {"chunk": text}), "t1", 1.0))
    return log


def test_numbers_carry_the_generation_and_go_up() -> None:
    log = make(["a", "b"])
    assert [e.seq for e in log.since(0)] == [first_seq(3) + 1, first_seq(3) + 2]
    log.claim(9)
    log.add(log.number(Draft("done", {}), "t2", 2.0))
    assert log.head == (9 << 20) + 1


def test_an_old_generation_is_refused() -> None:
    log = make(["a"])
    with pytest.raises(ValueError, match="not newer"):
        log.claim(3)


def test_a_number_that_does_not_go_up_is_refused() -> None:
    log = make(["a"])
    with pytest.raises(ValueError, match="does not come after"):
        log.add(Event(log.head, "t1", "llm_text", {"chunk": "b"}, 1.0))


def test_no_cursor_means_from_the_oldest_kept() -> None:
    part = make(["a", "b"]).after(None, limit=10, max_bytes=10**6)
    assert [e.data["chunk"] for e in part.events] == ["a", "b"]
    assert part.cursor == part.events[-1].seq


def test_a_cursor_gets_what_follows_it_and_limit_cuts() -> None:
    log = make(["a", "b", "c"])
    part = log.after(first_seq(3) + 1, limit=1, max_bytes=10**6)
    assert [e.data["chunk"] for e in part.events] == ["b"]
    assert log.after(log.head, limit=10, max_bytes=10**6).events == []


def test_bytes_cut_too_but_one_event_always_fits() -> None:
    part = make(["x" * 5000, "y" * 5000]).after(None, limit=10, max_bytes=100)
    assert len(part.events) == 1


def test_trimming_makes_a_gap_whose_seq_is_its_end() -> None:
    log = make(["x" * 1000] * 100, max_bytes=20_000)
    log.trim()
    first, rest = (p := log.after(0, limit=1000, max_bytes=10**9)).events[0], p.events[1:]
    assert first.type == "gap"
    assert first.data == {"from": 0, "to": log.base, "reason": "pruned"}
    assert first.seq == log.base
    assert rest[0].seq == log.base + 1
    assert len(rest) == len(log) < 100


def test_trimming_spares_what_the_store_has_not_seen() -> None:
    log = make(["x" * 1000] * 100, max_bytes=20_000)
    log.trim(through=first_seq(3) + 10)
    assert log.base == first_seq(3) + 10


def test_a_cursor_ahead_of_the_log_gets_a_gap_then_what_there_is() -> None:
    part = make(["a"]).after(first_seq(77), limit=10, max_bytes=10**6)
    assert [e.type for e in part.events] == ["gap", "llm_text"]
    assert part.events[0].data == {"from": first_seq(77), "to": 0, "reason": "ahead_of_log"}
    assert part.cursor == first_seq(3) + 1


def test_a_cursor_a_little_ahead_has_seen_what_the_store_has_not() -> None:
    """Its reader was served by the worker that writes; this is another one's view."""
    log = make(["a"])
    part = log.after(first_seq(3) + 9, limit=10, max_bytes=10**6)
    assert (part.events, part.cursor) == ([], first_seq(3) + 9)


def test_joined_text_has_the_last_seq_and_stops_at_anything_else() -> None:
    log = make(["a", "b"])
    log.add(log.number(Draft("tool_start", {"call_id": "1"}), "t1", 1.0))
    log.add(log.number(Draft("tool_output", {"call_id": "1", "chunk": "x"}), "t1", 1.0))
    log.add(log.number(Draft("tool_output", {"call_id": "2", "chunk": "y"}), "t1", 1.0))
    log.add(log.number(Draft("llm_text", {"chunk": "c"}), "t1", 1.0))
    log.add(log.number(Draft("llm_text", {"chunk": "d"}), "t2", 1.0))
    got = joined(log.since(0))
    assert [(e.type, e.data.get("chunk")) for e in got] == [
        ("llm_text", "ab"),
        ("tool_start", None),
        ("tool_output", "x"),
        ("tool_output", "y"),
        ("llm_text", "c"),
        ("llm_text", "d"),
    ]
    assert got[0].seq == first_seq(3) + 2
    assert log.since(0)[0].data == {"chunk": "a"}, "never joined at rest"


@given(
    st.lists(st.text(max_size=5), max_size=40),
    st.lists(st.integers(1, 7), min_size=1, max_size=60),
)
def test_any_way_of_reading_gives_the_same_events(texts: list[str], limits: list[int]) -> None:
    log = make(texts)
    cursor: int | None = None
    seen: list[Event] = []
    for limit in [*limits, 1000]:
        part = log.after(cursor, limit=limit, max_bytes=10**6)
        seen += joined(part.events)
        cursor = part.cursor
    assert "".join(e.data["chunk"] for e in seen) == "".join(texts)
    assert cursor == log.head
    assert [e.seq for e in seen] == sorted({e.seq for e in seen if e.seq is not None})
