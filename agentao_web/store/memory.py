"""The store of one process: for tests, and until a database is configured. Dies with the worker.

Histories are kept as JSON text, one string a message: an agent's live dictionaries change under
our feet, and what comes back has to be what a database would give.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import datetime
import json
import threading
import time
import typing as t

from agentao_web.core import clean
from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import IdempotencyConflict
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import Quota
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import TooManySessions
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.history import History
from agentao_web.core.log import GENERATION_BITS
from agentao_web.core.log import MAX_SEQ
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import EventLog
from agentao_web.core.log import Slice
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.core.question import NO_ANSWER
from agentao_web.core.question import Question
from agentao_web.core.question import to_be_remembered
from agentao_web.core.turn import ENDS
from agentao_web.store import LEFT
from agentao_web.store import ActiveTurn
from agentao_web.store import AlreadyAccepted
from agentao_web.store import Claim
from agentao_web.store import EndedTurn
from agentao_web.store import Finish
from agentao_web.store import KeyUse
from agentao_web.store import Left
from agentao_web.store import MessagePage
from agentao_web.store import Orphan
from agentao_web.store import Revocation
from agentao_web.store import SessionRow
from agentao_web.store import Signal
from agentao_web.store import Spoken
from agentao_web.store import TurnRow

_TITLE_LENGTH = 80
#: Start of the clock that seeds the generations (2026-01-01), and claims a second it allows for.
_EPOCH, _PER_SECOND = 1_767_225_600, 16
#: The clock seeds no higher than this (in 2041), and leaves room for a thousand million claims.
_LAST_SEED: t.Final = (MAX_SEQ >> GENERATION_BITS) - 2**30
#: How long an Idempotency-Key is kept.
KEY_SECONDS: t.Final = 24 * 3600.0
#: Sessions pruned at a time: others want to write meanwhile.
PRUNED: t.Final = 100
#: How long it is remembered what a tenant spent, in days.
BUDGET_DAYS: t.Final = 31
#: Outcome of a question whose turn has ended, and who closed it.
TURN_ENDED: t.Final[dict[str, t.Any]] = {"outcome": "cancelled", "by": "turn_ended"}


def generation_seed(now: float) -> int:
    """A generation nobody has used before *now*, up to 16 claims a second on average.

    The memory store forgets its counter when it dies, a database may be an older copy of itself,
    and a number must not be used twice (promise 1).
    """
    # A clock that is wrong by decades must not use up what there is.
    return min(max(1, int((now - _EPOCH) * _PER_SECOND)), _LAST_SEED)


def first_day(day: str) -> str:
    """The oldest day that is remembered on *day*."""
    before = datetime.date.fromisoformat(day) - datetime.timedelta(days=BUDGET_DAYS)
    return before.isoformat()


def share(left: int, least: int, most: int) -> int:
    """What somebody gets who asks for *least* to *most*, and *left* are left."""
    if left < max(least, 1):
        raise BudgetExhausted
    return min(left, most)


def title_of(message: str) -> str:
    """What a session is called until someone renames it."""
    return " ".join(message.split())[:_TITLE_LENGTH]


@dataclasses.dataclass(frozen=True)
class KnownKey:
    """What an Idempotency-Key was used for."""

    body: str
    turn_id: str
    created: float


def used_by(known: KnownKey | None, use: KeyUse, now: float) -> str | None:
    """The turn that was accepted with *use*; IdempotencyConflict if its body was another."""
    if known is None or now - known.created >= KEY_SECONDS:
        return None
    if known.body != use.body:
        raise IdempotencyConflict
    return known.turn_id


def check_use(known: KnownKey | None, use: KeyUse, turn: TurnRow, now: float) -> None:
    """Refuse a *use* that is not new; a turn may come again with its own (queued, then claimed)."""
    turn_id = used_by(known, use, now)
    if turn_id is not None and turn_id != turn.id:
        raise AlreadyAccepted(turn_id)


@dataclasses.dataclass(frozen=True)
class FoundOrphan(Orphan):
    """An orphan and the claim it was found with: one that is newer was taken over already."""

    generation: int | None = None


def taken_over(orphan: Orphan, generation: int, version: int, head: int) -> Claim:
    """The claim that ends *orphan*; its opening has a number but is nowhere written."""
    opening = Event(first_seq(generation) + 1, orphan.turn_id, "turn_begin", {}, 0.0)
    return Claim(orphan.key, generation, orphan.turn_id, opening, version, head)


def page_of(count: int, before: int | None, after: int | None, limit: int) -> tuple[int, int, bool]:
    """Which of *count* entries are on the page, from and up to, and whether there are more."""
    if after is not None:
        last = count if before is None else max(0, min(count, before - 1))
        start = min(last, after)
        stop = min(last, start + limit)
        return start, stop, stop < last
    stop = count if before is None else min(count, before - 1)
    start = max(0, stop - limit)
    return start, stop, start > 0


def fitting(
    sizes: cabc.Iterable[tuple[int, int]], max_bytes: int, *, newest: bool
) -> tuple[int, int]:
    """Of entries (number, size) in their order, those that fit: the place before the first of
    them, and the last one. There is always one, if there are any."""
    numbers: list[int] = []
    for n, size in sorted(sizes, reverse=newest):
        max_bytes -= size
        if numbers and max_bytes < 0:
            break
        numbers.append(n)
    return (min(numbers) - 1, max(numbers)) if numbers else (0, 0)


@dataclasses.dataclass
class _Record:
    row: SessionRow
    log: EventLog
    generation: int | None = None
    running: TurnRow | None = None
    queue: list[TurnRow] = dataclasses.field(default_factory=list)
    endings: dict[str, Draft] = dataclasses.field(default_factory=dict)
    """Of those in the queue that have left it: what is to be written of them."""
    cursor: int = 0
    """The place just before the running turn's first event."""
    ended: dict[str, EndedTurn] = dataclasses.field(default_factory=dict)
    messages: dict[str, str] = dataclasses.field(default_factory=dict)
    """What each turn was started with."""
    keys: dict[str, KnownKey] = dataclasses.field(default_factory=dict)
    questions: dict[str, Question] = dataclasses.field(default_factory=dict)
    transcript: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    history: list[str] = dataclasses.field(default_factory=list)
    epoch: int = 0
    state: str = "{}"


class MemoryStore:
    """Everything in dictionaries behind one lock."""

    def __init__(
        self,
        *,
        max_sessions: int = 10_000,
        max_per_tenant: int | None = None,
        log_bytes: int = 4 * 2**20,
        seed: int | None = None,
        clock: cabc.Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._records: dict[SessionKey, _Record] = {}
        self._generation = generation_seed(time.time()) if seed is None else seed
        self._max_sessions = max_sessions
        self._max_per_tenant = max_per_tenant
        self._log_bytes = log_bytes
        self._clock = clock
        self._beats: dict[str, float] = {}
        """By the worker: how often it has shown that it lives."""
        self._spent: dict[tuple[str, str], int] = {}
        self._revoked: dict[tuple[str, str | None], float] = {}
        #: What was asked -> of which worker; asked twice is asked once.
        self._signals: dict[Signal, str] = {}

    # -- turns ---------------------------------------------------------------------------------

    def claim(
        self,
        key: SessionKey,
        turn: TurnRow,
        opening: Draft,
        now: float,
        use: KeyUse | None = None,
    ) -> Claim:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                record = self._create(key, turn, now)
            self._may_come(record, turn, use)
            if record.running is not None:
                raise SessionBusy(
                    "this session is already answering; cancel that turn, or send on_busy",
                    turn_id=record.running.id,
                )
            if turn.id in record.endings:
                raise ClaimLost
            waiting = _waiting(record)
            queued = any(one.id == turn.id for one in waiting)
            if waiting and not (queued and waiting[0].worker == turn.worker):
                raise SessionBusy("another turn of this session is first")
            return self._begin(record, turn, opening, now, use)

    def enqueue(
        self,
        key: SessionKey,
        turn: TurnRow,
        *,
        limit: int,
        first: bool = False,
        new: bool = False,
        use: KeyUse | None = None,
    ) -> int:
        with self._lock:
            if new and key not in self._records:
                self._create(key, turn, turn.created)
            record = self._known(key)
            self._may_come(record, turn, use)
            waiting = len(_waiting(record))
            if waiting >= limit:
                raise TooManyTurns(
                    "too many turns of this session are waiting", quota=Quota("queue", limit)
                )
            record.queue.insert(0 if first else len(record.queue), turn)
            self._remember(record, turn, use)
            return 1 if first else waiting + 1

    def accepted(self, key: SessionKey, use: KeyUse) -> str | None:
        with self._lock:
            record = self._records.get(key)
            known = None if record is None else record.keys.get(use.key)
            return used_by(known, use, self._clock())

    def end_queued(self, key: SessionKey, turn_id: str, ending: Draft, now: float) -> Left | None:
        with self._lock:
            record = self._records.get(key)
            if record is None or turn_id not in [turn.id for turn in record.queue]:
                return None
            first = turn_id not in record.endings
            record.endings.setdefault(turn_id, ending)
            if record.row.deleting:
                _unqueue(record, turn_id)
                return Left(first)
            if record.running is not None:
                self._signals[Signal(key, turn_id, LEFT)] = record.running.worker
                return Left(first, unwritten=True)
            record.log.claim(self._number(record))
            record.generation = None
            final = record.log.number(record.endings[turn_id], turn_id, now)
            self._write(record, [final])
            return Left(first, final)

    def append(self, batches: cabc.Sequence[tuple[Claim, cabc.Sequence[Event]]]) -> list[Claim]:
        lost: list[Claim] = []
        with self._lock:
            for claim, events in batches:
                try:
                    self._write(self._held(claim), events)
                except ClaimLost:
                    lost.append(claim)
        return lost

    def finish(self, claim: Claim, finish: Finish) -> bool:
        # Before anything is changed: what an agent gives may be no JSON.
        messages = [json.dumps(message) for message in finish.appended]
        state = None if finish.state is None else json.dumps(dict(finish.state))
        with self._lock:
            record = self._held(claim)
            self._write(record, finish.events)
            record.transcript.extend(finish.transcript)
            if finish.rewritten:
                record.epoch += 1
                record.history = []
            record.history.extend(messages)
            record.state = record.state if state is None else state
            record.ended[claim.turn_id] = EndedTurn(finish.events[-1], record.cursor)
            for question in _open(record):
                if question.turn_id == claim.turn_id:
                    ended = dataclasses.replace(question, **TURN_ENDED)
                    record.questions[question.id] = ended
            record.running = record.generation = None
            record.row = dataclasses.replace(
                record.row,
                updated=finish.now,
                usage=clean.usage(record.row.usage, finish.outcome.usage),
                version=claim.generation,
                turn_id=None,
            )
            return bool(record.queue)

    def active(self, key: SessionKey) -> list[ActiveTurn]:
        with self._lock:
            record = self._records.get(key)
            return [] if record is None else _active(record)

    def ended(self, key: SessionKey, turn_id: str) -> EndedTurn | None:
        with self._lock:
            record = self._records.get(key)
            return None if record is None else record.ended.get(turn_id)

    def spoken(self, key: SessionKey, seq: int) -> Spoken | None:
        with self._lock:
            record = self._records.get(key)
            turn_id = None if record is None else _turn_at(record, seq)
            if record is None or turn_id is None:
                return None
            return Spoken(turn_id, record.messages[turn_id])

    # -- questions -----------------------------------------------------------------------------

    def ask(self, claim: Claim, question: Question) -> None:
        asked = Question(
            question.id, claim.turn_id, question.kind, _copied(question.data), question.expires
        )
        with self._lock:
            self._held(claim).questions.setdefault(question.id, asked)

    def questions(self, key: SessionKey) -> list[Question]:
        with self._lock:
            record = self._records.get(key)
            return [] if record is None else [_handed_out(q) for q in _open(record)]

    def question(self, key: SessionKey, question_id: str) -> Question | None:
        with self._lock:
            record = self._records.get(key)
            found = None if record is None else record.questions.get(question_id)
        return None if found is None else _handed_out(found)

    def settle(
        self,
        key: SessionKey,
        question_id: str,
        outcome: str,
        *,
        by: str,
        answer: cabc.Mapping[str, t.Any] = NO_ANSWER,
    ) -> Question:
        answer = _copied(answer)
        with self._lock:
            asked = self._known(key).questions
            found = asked.get(question_id)
            if found is None:
                raise NotFound("no such question")
            if found.outcome is None:
                found = dataclasses.replace(found, outcome=outcome, by=by, answer=answer)
                asked[question_id] = found
        return _handed_out(found)

    # -- reading -------------------------------------------------------------------------------

    def session(self, key: SessionKey) -> SessionRow | None:
        with self._lock:
            record = self._records.get(key)
            return None if record is None else _shown(record)

    def sessions(
        self,
        tenant: str | None,
        user: str | None,
        *,
        before: tuple[float, str] | None,
        limit: int,
    ) -> list[SessionRow]:
        def place(row: SessionRow) -> tuple[float, str]:
            return row.updated, row.key.id

        with self._lock:
            rows = [r.row for r in self._records.values() if not r.row.deleting]
        rows = [
            row
            for row in rows
            if tenant in (None, row.key.tenant)
            and user in (None, row.key.user)
            and (before is None or place(row) < before)
        ]
        return sorted(rows, key=place, reverse=True)[:limit]

    def tenants(self, limit: int) -> list[str]:
        with self._lock:
            return sorted({key.tenant for key in self._records})[:limit]

    def heads(self, keys: cabc.Collection[SessionKey]) -> dict[SessionKey, SessionRow]:
        with self._lock:
            return {key: _shown(self._records[key]) for key in keys if key in self._records}

    def stamp(self) -> int | None:
        return None

    def events(self, key: SessionKey, after: int | None, *, limit: int, max_bytes: int) -> Slice:
        with self._lock:
            return self._known(key).log.after(after, limit=limit, max_bytes=max_bytes)

    def transcript(
        self,
        key: SessionKey,
        *,
        before: int | None,
        after: int | None,
        limit: int,
        max_bytes: int | None = None,
    ) -> MessagePage:
        with self._lock:
            entries = self._known(key).transcript
            start, stop, more = page_of(len(entries), before, after, limit)
            if max_bytes is not None and start < stop:
                sizes = [(i + 1, len(json.dumps(entries[i]))) for i in range(start, stop)]
                asked = start, stop
                start, stop = fitting(sizes, max_bytes, newest=after is None)
                more = more or (start, stop) != asked
            page = [{"id": i + 1, **entries[i]} for i in range(start, stop)]
        return MessagePage(page, more)

    def history(self, key: SessionKey) -> History:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return History([])
            texts, epoch, version = list(record.history), record.epoch, record.row.version
            state = json.loads(record.state)
            approved = tuple(q for q in record.questions.values() if to_be_remembered(q))
        return History([json.loads(text) for text in texts], epoch, version, state, approved)

    # -- changing ------------------------------------------------------------------------------

    def rename(self, key: SessionKey, title: str) -> None:
        with self._lock:
            record = self._known(key)
            record.row = dataclasses.replace(record.row, title=title)

    def tombstone(self, key: SessionKey) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return False
            since = record.row.updated if record.row.deleting else time.time()
            record.row = dataclasses.replace(record.row, deleting=True, updated=since)
            for turn_id in list(record.endings):
                _unqueue(record, turn_id)
            return True

    def delete(self, key: SessionKey) -> None:
        with self._lock:
            record = self._records.get(key)
            if record is not None and record.row.deleting:
                self._forget(key)

    def revoke(self, tenant: str, user: str | None, before: float) -> None:
        with self._lock:
            # What was void stays void.
            last = self._revoked.get((tenant, user), before)
            self._revoked[tenant, user] = max(last, before)

    def revocations(self) -> list[Revocation]:
        with self._lock:
            return [Revocation(*whose, before) for whose, before in self._revoked.items()]

    def prune(self, before: float) -> list[SessionKey]:
        with self._lock:
            rows = [r.row for r in self._records.values() if not _active(r) and not r.row.deleting]
            old = sorted((r for r in rows if r.updated < before), key=lambda row: row.updated)
            keys = [row.key for row in old[:PRUNED]]
            for key in keys:
                record = self._records[key]
                now = time.time()
                record.row = dataclasses.replace(record.row, deleting=True, updated=now)
        return keys

    # -- tokens --------------------------------------------------------------------------------

    def reserve(self, tenant: str, day: str, *, least: int, most: int, limit: int) -> int:
        with self._lock:
            spent = self._spent.get((tenant, day), 0)
            got = share(limit - spent, least, most)
            self._add(tenant, day, got)
            return got

    def spend(self, tenant: str, day: str, tokens: int) -> None:
        with self._lock:
            self._add(tenant, day, tokens)

    def spent(self, tenant: str, day: str) -> int:
        with self._lock:
            return self._spent.get((tenant, day), 0)

    def _add(self, tenant: str, day: str, tokens: int) -> None:
        if (tenant, day) not in self._spent:
            first = first_day(day)
            self._spent = {k: v for k, v in self._spent.items() if k[1] >= first}
        total = self._spent.get((tenant, day), 0) + tokens
        self._spent[tenant, day] = min(max(0, total), clean.MAX_TOKENS)

    # -- workers -------------------------------------------------------------------------------

    def beat(self, worker: str) -> None:
        with self._lock:
            self._beats[worker] = self._beats.get(worker, 0.0) + 1

    def beats(self) -> dict[str, float]:
        with self._lock:
            return dict(self._beats)

    def leave(self, worker: str) -> None:
        with self._lock:
            self._beats.pop(worker, None)
        self.signals(worker)

    def signal(self, key: SessionKey, reason: str, *, but: str, running_only: bool = False) -> int:
        with self._lock:
            record = self._records.get(key)
            turns = [] if record is None else [a for a in _active(record) if a.worker != but]
            turns = [turn for turn in turns if turn.ending is None]
            if running_only:
                turns = [turn for turn in turns if turn.state == "running"]
            for turn in turns:
                self._signals[Signal(key, turn.id, reason)] = turn.worker
            return len(turns)

    def signals(self, worker: str) -> list[Signal]:
        with self._lock:
            mine = [signal for signal, to in self._signals.items() if to == worker]
            for signal in mine:
                del self._signals[signal]
        return mine

    def doomed(self, before: float | None = None) -> list[SessionKey]:
        with self._lock:
            rows = [r.row for r in self._records.values() if r.row.deleting and not _active(r)]
        return [row.key for row in rows if before is None or row.updated < before]

    def orphans(self, workers: cabc.Collection[str]) -> list[Orphan]:
        with self._lock:
            alive = self._beats.keys() - set(workers)
            return [
                FoundOrphan(
                    record.row.key,
                    turn.id,
                    turn.state == "running",
                    turn.cursor,
                    turn.ending,
                    turn.worker,
                    record.generation if turn.state == "running" else None,
                )
                for record in self._records.values()
                for turn in _active(record)
                if turn.worker not in alive or turn.ending is not None
            ]

    def take_over(self, orphan: Orphan, worker: str) -> Claim | None:
        with self._lock:
            record = self._records.get(orphan.key)
            if record is None or not _is_still(orphan, record):
                return None
            assert record.running is not None
            self._unsignal(orphan.key, orphan.turn_id)
            record.running = dataclasses.replace(record.running, worker=worker)
            generation = self._number(record)
            return taken_over(orphan, generation, record.row.version, record.row.head)

    def close(self) -> None:
        with self._lock:
            self._records.clear()
            self._signals.clear()

    # -- inside --------------------------------------------------------------------------------

    def _create(self, key: SessionKey, turn: TurnRow, now: float) -> _Record:
        if self._max_per_tenant is not None:
            count = sum(1 for k in self._records if k.tenant == key.tenant)
            if count >= self._max_per_tenant:
                raise TooManySessions(
                    "this tenant has no room for another session",
                    quota=Quota("sessions", self._max_per_tenant),
                )
        if len(self._records) >= self._max_sessions:
            self._forget_oldest()
        title = title_of(turn.message)
        row = SessionRow(key, title, now, now, head=0, version=0, turns=0, usage={})
        record = self._records[key] = _Record(row, EventLog(max_bytes=self._log_bytes))
        return record

    def _forget_oldest(self) -> None:
        idle = [k for k, r in self._records.items() if not _active(r)]
        if not idle:
            raise TooManySessions(
                "every session is in use", quota=Quota("sessions", self._max_sessions)
            )
        self._forget(min(idle, key=lambda k: self._records[k].row.updated))

    def _forget(self, key: SessionKey) -> None:
        if self._records.pop(key, None) is not None:
            self._signals = {s: w for s, w in self._signals.items() if s.key != key}

    def _known(self, key: SessionKey) -> _Record:
        record = self._records.get(key)
        if record is None:
            raise NotFound("no such session")
        return record

    def _held(self, claim: Claim) -> _Record:
        record = self._records.get(claim.key)
        if record is None or record.generation != claim.generation:
            raise ClaimLost
        return record

    def _may_come(self, record: _Record, turn: TurnRow, use: KeyUse | None) -> None:
        if record.row.deleting:
            raise SessionBusy("this session is being deleted", reason="deleting")
        if turn.id in record.ended:
            raise ClaimLost
        if use is not None:
            check_use(record.keys.get(use.key), use, turn, self._clock())
        record.messages[turn.id] = turn.message

    def _begin(
        self, record: _Record, turn: TurnRow, opening: Draft, now: float, use: KeyUse | None
    ) -> Claim:
        generation = self._number(record)
        record.log.claim(generation)
        for turn_id, ending in list(record.endings.items()):
            self._write(record, [record.log.number(ending, turn_id, now)])
        row = record.row
        _unqueue(record, turn.id)
        record.running, record.cursor = turn, row.head
        event = record.log.number(opening, turn.id, now)
        self._write(record, [event])
        self._remember(record, turn, use)
        record.row = dataclasses.replace(
            record.row, updated=now, turns=row.turns + 1, turn_id=turn.id
        )
        return Claim(row.key, generation, turn.id, event, row.version, row.head)

    def _remember(self, record: _Record, turn: TurnRow, use: KeyUse | None) -> None:
        if use is not None:
            now = self._clock()
            fresh = {k: v for k, v in record.keys.items() if now - v.created < KEY_SECONDS}
            record.keys = {**fresh, use.key: KnownKey(use.body, turn.id, now)}

    def _number(self, record: _Record) -> int:
        self._generation += 1
        record.generation = self._generation
        return self._generation

    def _unsignal(self, key: SessionKey, turn_id: str) -> None:
        mine = (key, turn_id)
        self._signals = {s: w for s, w in self._signals.items() if (s.key, s.turn_id) != mine}

    def _write(self, record: _Record, events: cabc.Sequence[Event]) -> None:
        for event in events:
            # What is there was written by an attempt that seemed to fail.
            if event.seq is None or event.seq <= record.log.head:
                continue
            record.log.add(event)
            if event.type in ENDS and _unqueue(record, event.turn_id):
                record.ended[t.cast(str, event.turn_id)] = EndedTurn(event, event.seq - 1)
                self._unsignal(record.row.key, t.cast(str, event.turn_id))
        record.log.trim()
        record.row = dataclasses.replace(record.row, head=record.log.head)


def _active(record: _Record) -> list[ActiveTurn]:
    def row(turn: TurnRow, state: t.Literal["queued", "running"], cursor: int) -> ActiveTurn:
        ending = record.endings.get(turn.id)
        return ActiveTurn(
            turn.id, turn.worker, state, turn.message, turn.created, cursor, ending=ending
        )

    running = [] if record.running is None else [row(record.running, "running", record.cursor)]
    return running + [row(turn, "queued", record.row.head) for turn in record.queue]


def _waiting(record: _Record) -> list[TurnRow]:
    """Those in the queue that have not left it."""
    return [turn for turn in record.queue if turn.id not in record.endings]


def _turn_at(record: _Record, seq: int) -> str | None:
    part = record.log.after(max(seq, 1) - 1, limit=1, max_bytes=1).events
    if part and part[0].type != "gap" and part[0].seq == seq:
        return part[0].turn_id
    generation = seq >> GENERATION_BITS
    if seq > record.log.base:
        part = record.log.after(
            max(first_seq(generation), record.log.base), limit=1, max_bytes=1
        ).events
        if not part or (part[0].seq or 0) >> GENERATION_BITS != generation:
            return None
    begun = [
        (end.cursor, turn_id)
        for turn_id, end in record.ended.items()
        if end.cursor < first_seq(generation) and seq <= (end.final.seq or 0)
    ]
    if record.running is not None and record.generation == generation:
        begun.append((record.cursor, record.running.id))
    return max(begun)[1] if begun else None


def _unqueue(record: _Record, turn_id: str | None) -> bool:
    """Take a turn out of the queue; False if it is not there."""
    rest = [turn for turn in record.queue if turn.id != turn_id]
    found = len(rest) < len(record.queue)
    record.queue = rest
    if turn_id is not None:
        record.endings.pop(turn_id, None)
    return found


def _open(record: _Record) -> list[Question]:
    return [question for question in record.questions.values() if question.outcome is None]


def _copied(value: cabc.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return t.cast(dict[str, t.Any], json.loads(json.dumps(dict(value))))


def _handed_out(question: Question) -> Question:
    """A row that may be changed without changing ours."""
    data, answer = _copied(question.data), _copied(question.answer)
    return dataclasses.replace(question, data=data, answer=answer)


def _shown(record: _Record) -> SessionRow:
    return dataclasses.replace(record.row, queued=True) if record.queue else record.row


def _is_still(orphan: Orphan, record: _Record) -> bool:
    if record.row.turn_id != orphan.turn_id or record.running is None:
        return False
    found = orphan.generation if isinstance(orphan, FoundOrphan) else record.generation
    return record.generation == found
