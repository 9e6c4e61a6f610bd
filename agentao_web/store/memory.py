"""The store of one process: for tests, and until a database is configured. Dies with the worker.

Histories are kept as JSON text, one string a message: an agent's live dictionaries change under
our feet, and what comes back has to be what a database would give.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import json
import threading
import time
import typing as t

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import TooManySessions
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import EventLog
from agentao_web.core.log import Slice
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import History
from agentao_web.store import MessagePage
from agentao_web.store import SessionRow
from agentao_web.store import TurnRow

_TITLE_LENGTH = 80
#: Start of the clock that seeds the generations (2026-01-01), and claims a second it allows for.
_EPOCH, _PER_SECOND = 1_767_225_600, 16


def generation_seed(now: float) -> int:
    """A first generation no earlier process has used, up to 16 claims a second on average.

    This store forgets its counter when it dies, and a number must not be used twice (promise 1).
    """
    return max(1, int((now - _EPOCH) * _PER_SECOND))


@dataclasses.dataclass
class _Record:
    row: SessionRow
    log: EventLog
    generation: int | None = None
    turns: dict[str, str] = dataclasses.field(default_factory=dict)
    transcript: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)
    history: list[str] = dataclasses.field(default_factory=list)
    epoch: int = 0


class MemoryStore:
    """Everything in dictionaries behind one lock."""

    def __init__(
        self,
        *,
        max_sessions: int = 10_000,
        max_per_tenant: int | None = None,
        log_bytes: int = 4 * 2**20,
        seed: int | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._records: dict[SessionKey, _Record] = {}
        self._generation = generation_seed(time.time()) if seed is None else seed
        self._max_sessions = max_sessions
        self._max_per_tenant = max_per_tenant
        self._log_bytes = log_bytes

    def claim(self, key: SessionKey, turn: TurnRow, opening: Draft, now: float) -> Claim:
        with self._lock:
            record = self._records.get(key) or self._create(key, turn, now)
            if record.row.deleting:
                raise SessionBusy("this session is being deleted", reason="deleting")
            if record.generation is not None:
                raise SessionBusy("this session is already answering")
            self._generation += 1
            record.generation = self._generation
            record.turns[turn.id] = "running"
            record.log.claim(self._generation)
            event = record.log.number(opening, turn.id, now)
            self._write(record, [event])
            record.row = dataclasses.replace(record.row, updated=now, turns=record.row.turns + 1)
            return Claim(key, self._generation, turn.id, event, record.row.version)

    def enqueue(self, key: SessionKey, turn: TurnRow) -> None:
        with self._lock:
            record = self._records.get(key) or self._create(key, turn, turn.created)
            if record.row.deleting:
                raise SessionBusy("this session is being deleted", reason="deleting")
            record.turns[turn.id] = "queued"

    def dequeue(self, key: SessionKey, turn_id: str, outcome: Outcome) -> None:
        with self._lock:
            record = self._records.get(key)
            if record is not None:
                record.turns.pop(turn_id, None)

    def append(self, claim: Claim, events: cabc.Sequence[Event]) -> None:
        with self._lock:
            self._write(self._held(claim), events)

    def finish(self, claim: Claim, finish: Finish) -> None:
        messages = [json.dumps(message) for message in finish.appended]
        with self._lock:
            record = self._held(claim)
            self._write(record, finish.events)
            record.transcript.extend(finish.transcript)
            if finish.rewritten:
                record.epoch += 1
                record.history = []
            record.history.extend(messages)
            record.turns.pop(claim.turn_id, None)
            record.generation = None
            usage = dict(record.row.usage)
            for name, amount in finish.outcome.usage.items():
                usage[name] = usage.get(name, 0) + amount
            version = record.row.version + 1
            record.row = dataclasses.replace(
                record.row, updated=finish.now, usage=usage, version=version
            )

    def session(self, key: SessionKey) -> SessionRow | None:
        with self._lock:
            record = self._records.get(key)
            return None if record is None else record.row

    def events(self, key: SessionKey, after: int | None, *, limit: int, max_bytes: int) -> Slice:
        with self._lock:
            return self._known(key).log.after(after, limit=limit, max_bytes=max_bytes)

    def transcript(
        self, key: SessionKey, *, before: int | None, after: int | None, limit: int
    ) -> MessagePage:
        with self._lock:
            entries = self._known(key).transcript
            if after is not None:
                start, stop = after, min(len(entries), after + limit)
                more = stop < len(entries)
            else:
                stop = len(entries) if before is None else min(len(entries), before - 1)
                start = max(0, stop - limit)
                more = start > 0
            page = [{"id": i + 1, **entries[i]} for i in range(start, stop)]
        return MessagePage(page, more)

    def history(self, key: SessionKey) -> History:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return History([], 0, 0)
            texts, epoch, version = list(record.history), record.epoch, record.row.version
        return History([json.loads(text) for text in texts], epoch, version)

    def tombstone(self, key: SessionKey) -> bool:
        with self._lock:
            record = self._records.get(key)
            if record is None:
                return False
            record.row = dataclasses.replace(record.row, deleting=True)
            return True

    def delete(self, key: SessionKey) -> None:
        with self._lock:
            self._records.pop(key, None)

    def close(self) -> None:
        with self._lock:
            self._records.clear()

    def _create(self, key: SessionKey, turn: TurnRow, now: float) -> _Record:
        if self._max_per_tenant is not None:
            count = sum(1 for k in self._records if k.tenant == key.tenant)
            if count >= self._max_per_tenant:
                raise TooManySessions("this tenant has no room for another session")
        if len(self._records) >= self._max_sessions:
            self._forget_oldest()
        title = " ".join(turn.message.split())[:_TITLE_LENGTH]
        row = SessionRow(key, title, now, now, head=0, version=0, turns=0, usage={})
        record = self._records[key] = _Record(row, EventLog(max_bytes=self._log_bytes))
        return record

    def _forget_oldest(self) -> None:
        idle = [k for k, r in self._records.items() if r.generation is None and not r.turns]
        if not idle:
            raise TooManySessions("every session is in use")
        del self._records[min(idle, key=lambda k: self._records[k].row.updated)]

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

    def _write(self, record: _Record, events: cabc.Sequence[Event]) -> None:
        for event in events:
            record.log.add(event)
        record.log.trim()
        record.row = dataclasses.replace(record.row, head=record.log.head)
