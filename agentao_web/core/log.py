"""The numbered log of one session: what clients may see, and who has seen how much of it.

Numbers are ``generation << 20 | n``: strictly increasing, not dense, never used twice, because a
generation is given out once for ever.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import itertools
import typing as t
from bisect import bisect_right

GENERATION_BITS: t.Final = 20
#: How many events one claim may write; the turn is stopped a little before.
EVENTS_PER_CLAIM: t.Final = (1 << GENERATION_BITS) - 1
#: The largest number JavaScript and JSON readers keep exactly.
MAX_SEQ: t.Final = (1 << 53) - 1

#: What one event costs in memory besides its strings (bytes, measured on CPython 3.11).
_EVENT_OVERHEAD: t.Final = 450
#: Joined text grows up to this many characters, then a new event begins.
_JOIN_LIMIT: t.Final = 32_768
#: Event type -> the field whose text is joined for a reader that is behind.
_JOINABLE: t.Final = {"llm_text": "chunk", "thinking": "text", "tool_output": "chunk"}


class Draft(t.NamedTuple):
    """An event that has no number yet."""

    type: str
    data: cabc.Mapping[str, t.Any]
    extra: cabc.Mapping[str, t.Any] = {}
    """Fields beside ``data``: ``reply`` of a ``done``, ``error`` of an ``error``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One line of a session's log. ``seq`` is None for what was sent but never stored."""

    seq: int | None
    turn_id: str | None
    type: str
    data: cabc.Mapping[str, t.Any]
    ts: float
    extra: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, t.Any]:
        """The JSON object every dialect sends."""
        head = {"seq": self.seq, "turn_id": self.turn_id, "type": self.type}
        return {**head, **self.extra, "data": self.data, "ts": self.ts}

    def weight(self) -> int:
        """About how many bytes this event holds in memory."""
        return _EVENT_OVERHEAD + self.size()

    def size(self) -> int:
        """About how many bytes it tells."""
        size = 0
        for fields in (self.data, self.extra) if self.extra else (self.data,):
            for value in fields.values():
                size += len(value) if isinstance(value, str) else len(repr(value))
        return size


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """A consecutive part of the log, and the cursor of a reader that has read it."""

    events: list[Event]
    cursor: int


def first_seq(generation: int) -> int:
    """The cursor just before the first event of a claim."""
    return generation << GENERATION_BITS


class EventLog:
    """The newest events of a session, bounded in number of bytes.

    ``base`` is the highest number that is no longer (or was never) kept here, ``head`` the last
    one given out; both are 0 for a session that never spoke.
    """

    __slots__ = ("base", "head", "_events", "_weight", "_max_bytes", "_next")

    def __init__(self, *, max_bytes: int, head: int = 0) -> None:
        self.base = head
        self.head = head
        self._events: list[Event] = []
        self._weight = 0
        self._max_bytes = max_bytes
        self._next = head + 1

    def __len__(self) -> int:
        return len(self._events)

    def claim(self, generation: int) -> None:
        """Number what follows with *generation*; it must be newer than all that was."""
        start = first_seq(generation)
        if start < self.head:
            raise ValueError(f"generation {generation} is not newer than event {self.head}")
        self._next = start + 1

    @property
    def room(self) -> int:
        """How many numbers the present claim has left."""
        return EVENTS_PER_CLAIM - (self._next & EVENTS_PER_CLAIM) + 1

    def number(self, draft: Draft, turn_id: str | None, ts: float) -> Event:
        """Give *draft* the next number without showing it to anyone yet."""
        event = Event(self._next, turn_id, draft.type, draft.data, ts, draft.extra)
        self._next += 1
        return event

    def add(self, event: Event) -> None:
        """Show a numbered event to readers. Numbers only go up."""
        seq = event.seq
        if seq is None or seq <= self.head:
            raise ValueError(f"event {seq} does not come after {self.head}")
        self.head = seq
        self._next = max(self._next, seq + 1)
        self._events.append(event)
        self._weight += event.weight()

    def trim(self, *, through: int | None = None) -> None:
        """Forget the oldest events above the bound, but none after *through*."""
        if self._weight <= self._max_bytes:
            return
        # Cut to three quarters at once: front deletion of a list is linear.
        target, cut = self._max_bytes * 3 // 4, 0
        while cut < len(self._events) and self._weight > target:
            seq = self._events[cut].seq
            assert seq is not None
            if through is not None and seq > through:
                break
            self._weight -= self._events[cut].weight()
            self.base = seq
            cut += 1
        del self._events[:cut]

    def covers(self, cursor: int) -> bool:
        """Whether everything after *cursor* is still here."""
        return self.base <= cursor <= self.head

    def after(self, cursor: int | None, *, limit: int, max_bytes: int) -> Slice:
        """What follows *cursor*, at most *limit* events or about *max_bytes*.

        None means from the oldest kept. A cursor too old, or ahead of the log, gets a ``gap``
        first, then what there is.
        """
        events: list[Event] = []
        if cursor is None:
            cursor = self.base
        elif (lost := gap_at(cursor, self.base, self.head)) is not None:
            events.append(lost)
            cursor = self.base
        start = bisect_right(self._events, cursor, key=_seq)
        rest = limit - len(events)
        events += beginning(self._events[start : start + rest], limit=rest, max_bytes=max_bytes)
        return Slice(events, _seq(events[-1]) if events else cursor)

    def since(self, cursor: int) -> list[Event]:
        """Every kept event after *cursor*, for the store's writer."""
        return self._events[bisect_right(self._events, cursor, key=_seq) :]


def _seq(event: Event) -> int:
    return t.cast(int, event.seq)


def beginning(events: cabc.Iterable[Event], *, limit: int, max_bytes: int) -> list[Event]:
    """The first *limit* of *events*, or about *max_bytes*, but the first one in any case."""
    out: list[Event] = []
    size = 0
    for event in itertools.islice(events, limit):
        out.append(event)
        size += event.weight() - _EVENT_OVERHEAD + 120
        if size >= max_bytes:
            break
    return out


def is_ahead(cursor: int, head: int) -> bool:
    """Whether *cursor* is from another life of the log.

    A little ahead in the same generation is not: whoever reads where the log is written sees it
    before the store does, and may ask another worker next.
    """
    return cursor > head and cursor >> GENERATION_BITS > head >> GENERATION_BITS


def gap_at(cursor: int, base: int, head: int) -> Event | None:
    """What a reader at *cursor* has to be told of a log that is kept from *base* to *head*."""
    if cursor < base:
        return gap(cursor, base, "pruned")
    return gap(cursor, base, "ahead_of_log") if is_ahead(cursor, head) else None


def gap(from_: int, to: int, reason: str) -> Event:
    """The event that says numbers between *from_* and *to* are lost to this reader."""
    return Event(to, None, "gap", {"from": from_, "to": to, "reason": reason}, 0.0)


def joined(events: cabc.Iterable[Event]) -> list[Event]:
    """*events* with consecutive text of one turn put together.

    A joined event carries the last ``seq`` and the first ``ts``.
    """
    out: list[Event] = []
    texts: list[str] = []
    length = 0
    for event in events:
        field = _JOINABLE.get(event.type)
        if field and out and length < _JOIN_LIMIT and _continues(out[-1], event):
            texts.append(event.data[field])
            length += len(texts[-1])
            out[-1] = dataclasses.replace(out[-1], seq=event.seq)
            continue
        _settle(out, texts)
        out.append(event)
        texts = [event.data[field]] if field else []
        length = len(texts[0]) if texts else 0
    _settle(out, texts)
    return out


def _continues(before: Event, event: Event) -> bool:
    return (
        before.type == event.type
        and before.turn_id == event.turn_id
        and before.data.get("call_id") == event.data.get("call_id")
    )


def _settle(out: list[Event], texts: list[str]) -> None:
    if len(texts) > 1:
        last = out[-1]
        data = {**last.data, _JOINABLE[last.type]: "".join(texts)}
        out[-1] = dataclasses.replace(last, data=data)
