"""The store that survives: SQLAlchemy Core, the same code on SQLite and PostgreSQL.

Here is what each method does in its one transaction; the steps they share are in ``steps``, the
transactions themselves in ``database``.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import time
import typing as t
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from agentao_web.core import clean
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import Quota
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import TooManySessions
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.history import History
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import Slice
from agentao_web.core.log import first_seq
from agentao_web.core.log import gap_at
from agentao_web.core.names import SessionKey
from agentao_web.core.question import NO_ANSWER
from agentao_web.core.question import Question
from agentao_web.store import LEFT
from agentao_web.store import ActiveTurn
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
from agentao_web.store import steps
from agentao_web.store import tables
from agentao_web.store.database import Database
from agentao_web.store.memory import KEY_SECONDS
from agentao_web.store.memory import PRUNED
from agentao_web.store.memory import TURN_ENDED
from agentao_web.store.memory import FoundOrphan
from agentao_web.store.memory import KnownKey
from agentao_web.store.memory import check_use
from agentao_web.store.memory import first_day
from agentao_web.store.memory import fitting
from agentao_web.store.memory import page_of
from agentao_web.store.memory import share
from agentao_web.store.memory import taken_over
from agentao_web.store.memory import title_of
from agentao_web.store.memory import used_by
from agentao_web.store.tables import budgets
from agentao_web.store.tables import history
from agentao_web.store.tables import keys
from agentao_web.store.tables import questions
from agentao_web.store.tables import revocations
from agentao_web.store.tables import sessions
from agentao_web.store.tables import signals
from agentao_web.store.tables import transcript
from agentao_web.store.tables import turns
from agentao_web.store.tables import workers

#: What a beat's number grows by at least.
_NEXT_BEAT: t.Final = 0.001

_Result = t.TypeVar("_Result")
_Row = steps.Row

#: How often a transaction that lost a race for a unique row is tried.
_TRIES: t.Final = 3
#: Sessions asked for in one statement: others want to run in between.
_KEYS: t.Final = 250

_MINE = signals.c.worker == sa.bindparam("worker")
_ANY_SIGNAL = sa.select(signals.c.id).where(_MINE).limit(1)
_SIGNALS = (
    sa.select(signals, sessions.c.tenant, sessions.c.user, sessions.c.sid)
    .join_from(signals, sessions)
    .where(_MINE)
    .order_by(signals.c.id)
    .with_for_update(of=signals)
)


_BUDGET = sa.select(budgets.c.spent).where(
    budgets.c.tenant == sa.bindparam("tenant"), budgets.c.day == sa.bindparam("day")
)


class SqlStore:
    """See the module. Nothing is opened before the first use, which must come after the fork.

    *url* may be the path of an SQLite file, with any character in it.
    *clock* says how old an idempotency key is, and since when a session is deleted.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        max_per_tenant: int | None = None,
        log_bytes: int = 4 * 2**20,
        clock: cabc.Callable[[], float] = time.time,
        failed: cabc.Callable[[], None] = lambda: None,
    ) -> None:
        self._db = Database(url, failed)
        self._max_per_tenant = max_per_tenant
        self._log_bytes = log_bytes
        self._clock = clock

    def check(self) -> str:
        """Open the database, make its schema, look whether it is whole; what was found.

        RuntimeError, with the cure, if it is not, or if a newer version wrote it.
        """
        return self._db.check()

    def backup(self, file: Path) -> None:
        """Copy an SQLite database while it is in use; RuntimeError for any other."""
        self._db.backup(file)

    def close(self) -> None:
        self._db.close()

    # -- turns ---------------------------------------------------------------------------------

    def claim(
        self,
        key: SessionKey,
        turn: TurnRow,
        opening: Draft,
        now: float,
        use: KeyUse | None = None,
    ) -> Claim:
        def attempt(db: sa.Connection) -> Claim:
            session = steps.locked(db, key)
            waited, left = False, list[_Row]()
            if session is None:
                generation = steps.next_generation(db, self._clock())
                session = self._create(db, key, turn, now)
            else:
                self._may_come(db, session, turn, use)
                waited, left = _may_begin(db, session, turn)
                generation = steps.next_generation(db, self._clock())
            before = steps.endings(left, generation, now)
            steps.end_queued(db, session, before)
            head = t.cast(int, before[-1].seq) if before else session.head
            seq = first_seq(generation) + len(before) + 1
            event = Event(seq, turn.id, opening.type, opening.data, now, opening.extra)
            if waited:
                _start_queued(db, session, turn, head)
            else:
                steps.insert_turn(db, session, turn, "running", 0, head)
            values = steps.write(db, session, [*before, event])
            values |= {"turns": session.turns + 1, "updated": now}
            steps.change(db, session, {**values, "generation": generation, "turn_id": turn.id})
            self._remember(db, session, turn, use)
            return Claim(key, generation, turn.id, event, session.version, head)

        return self._retried(attempt)

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
        def attempt(db: sa.Connection) -> int:
            session = steps.locked(db, key)
            if session is None and new:
                session = self._create(db, key, turn, turn.created)
            if session is None:
                raise NotFound("no such session")
            self._may_come(db, session, turn, use)
            queued = [r for r in steps.active(db, session) if r.state == "queued"]
            places = [r.position for r in queued]
            waiting = sum(r.final is None for r in queued)
            if waiting >= limit:
                raise TooManyTurns(
                    "too many turns of this session are waiting", quota=Quota("queue", limit)
                )
            place = min(places, default=1) - 1 if first else max(places, default=0) + 1
            steps.insert_turn(db, session, turn, "queued", place)
            self._remember(db, session, turn, use)
            return 1 if first else waiting + 1

        return self._retried(attempt)

    def accepted(self, key: SessionKey, use: KeyUse) -> str | None:
        with self._db.read() as db:
            session = steps.find(db, key)
            return None if session is None else used_by(_use(db, session, use), use, self._clock())

    def end_queued(self, key: SessionKey, turn_id: str, ending: Draft, now: float) -> Left | None:
        with self._db.write() as db:
            session = steps.locked(db, key)
            if session is None:
                return None
            this = steps.this_turn(session, turn_id, "queued")
            row = db.execute(sa.select(turns).where(this)).one_or_none()
            if row is None:
                return None
            first = row.final is None
            if session.deleting:
                db.execute(sa.delete(turns).where(this))
                return Left(first)
            ending = steps.ending_of(row.final) or ending
            if session.generation is None:
                seq = first_seq(steps.next_generation(db, self._clock())) + 1
                final = Event(seq, turn_id, ending.type, ending.data, now, ending.extra)
                steps.end_queued(db, session, [final])
                steps.change(db, session, steps.write(db, session, [final]))
                return Left(first, final)
            if first:
                final = Event(None, turn_id, ending.type, ending.data, now, ending.extra)
                db.execute(sa.update(turns).where(this).values(final=steps.final_json(final)))
                _ask_holder(db, session, row)
            return Left(first, unwritten=True)

    def append(self, batches: cabc.Sequence[tuple[Claim, cabc.Sequence[Event]]]) -> list[Claim]:
        lost: list[Claim] = []
        with self._db.batch() as db:
            for claim, events in batches:
                try:
                    self._append(db, claim, events)
                except ClaimLost:
                    # Found out before anything of it was written.
                    lost.append(claim)
        return lost

    def _append(self, db: sa.Connection, claim: Claim, events: cabc.Sequence[Event]) -> None:
        session = steps.held(db, claim.key, claim.generation)
        place = steps.write(db, session, events)
        steps.end_queued(db, session, events, but=claim.turn_id)
        if place["log_bytes"] > self._log_bytes * 5 // 4:
            place |= steps.prune(db, session, place["log_bytes"], self._log_bytes)
        steps.change(db, session, place)

    def finish(self, claim: Claim, finish: Finish) -> bool:
        with self._db.write() as db:
            session = steps.held(db, claim.key, claim.generation)
            values = steps.write(db, session, finish.events)
            if values["log_bytes"] > self._log_bytes:
                values |= steps.prune(db, session, values["log_bytes"], self._log_bytes)
            values |= steps.converse(db, session, finish)
            values |= {"usage": clean.usage(session.usage, finish.outcome.usage)}
            values |= {"updated": finish.now, "version": claim.generation}
            steps.change(db, session, {**values, "generation": None, "turn_id": None})
            _end(db, session, claim.turn_id, finish.events[-1])
            mine = questions.c.turn_id == claim.turn_id
            steps.close_questions(db, session, mine, TURN_ENDED)
            steps.end_queued(db, session, finish.events, but=claim.turn_id)
            return steps.waits(db, session)

    def active(self, key: SessionKey) -> list[ActiveTurn]:
        with self._db.read() as db:
            session = steps.find(db, key)
            rows = [] if session is None else steps.active(db, session)
            return [steps.active_turn(row, session.head) for row in rows if session is not None]

    def ended(self, key: SessionKey, turn_id: str) -> EndedTurn | None:
        with self._db.read() as db:
            session = steps.find(db, key)
            if session is None:
                return None
            found = sa.select(turns.c.final, turns.c.cursor)
            this = steps.this_turn(session, turn_id, "ended")
            row = db.execute(found.where(this)).one_or_none()
        if row is None or row.final is None:
            return None
        return EndedTurn(Event(*row.final), row.cursor)

    def spoken(self, key: SessionKey, seq: int) -> Spoken | None:
        with self._db.read() as db:
            session = steps.find(db, key)
            return None if session is None else steps.spoken(db, session, seq)

    # -- questions -----------------------------------------------------------------------------

    def ask(self, claim: Claim, question: Question) -> None:
        with self._db.write() as db:
            session = steps.held(db, claim.key, claim.generation)
            # What is there already was written by an attempt whose commit seemed to fail.
            if steps.question(db, session, question.id) is None:
                steps.insert_question(db, session, claim.turn_id, question)

    def questions(self, key: SessionKey) -> list[Question]:
        with self._db.read() as db:
            session = steps.find(db, key)
            return [] if session is None else steps.open_questions(db, session)

    def question(self, key: SessionKey, question_id: str) -> Question | None:
        with self._db.read() as db:
            session = steps.find(db, key)
            return None if session is None else steps.question(db, session, question_id)

    def settle(
        self,
        key: SessionKey,
        question_id: str,
        outcome: str,
        *,
        by: str,
        answer: cabc.Mapping[str, t.Any] = NO_ANSWER,
    ) -> Question:
        values = {"outcome": outcome, "by": by, "answer": dict(answer)}
        with self._db.write() as db:
            session = steps.known(db, key)
            steps.close_questions(db, session, questions.c.id == question_id, values)
            found = steps.question(db, session, question_id)
        if found is None:
            raise NotFound("no such question")
        return found

    # -- reading -------------------------------------------------------------------------------

    def session(self, key: SessionKey) -> SessionRow | None:
        with self._db.read() as db:
            return steps.shown(db, key)

    def sessions(
        self,
        tenant: str | None,
        user: str | None,
        *,
        before: tuple[float, str] | None,
        limit: int,
    ) -> list[SessionRow]:
        found = sa.select(sessions).where(sa.not_(sessions.c.deleting))
        for column, name in ((sessions.c.tenant, tenant), (sessions.c.user, user)):
            if name is not None:
                found = found.where(column == name)
        if before is not None:
            found = found.where(sa.tuple_(sessions.c.updated, sessions.c.sid) < sa.tuple_(*before))
        found = found.order_by(sessions.c.updated.desc(), sessions.c.sid.desc()).limit(limit)
        with self._db.read() as db:
            return [steps.session_row(row) for row in db.execute(found)]

    def tenants(self, limit: int) -> list[str]:
        # One step along the index for each: DISTINCT would read all of it.
        found: list[str] = []
        with self._db.read() as db:
            while len(found) < limit:
                least = sa.select(sa.func.min(sessions.c.tenant))
                if found:
                    least = least.where(sessions.c.tenant > found[-1])
                name = db.execute(least).scalar()
                if name is None:
                    break
                found.append(name)
        return found

    def heads(self, keys: cabc.Collection[SessionKey]) -> dict[SessionKey, SessionRow]:
        names = [steps.name_of(key) for key in keys]
        rows: list[SessionRow] = []
        with self._db.read() as db:
            for start in range(0, len(names), _KEYS):
                some = sessions.c.name.in_(names[start : start + _KEYS])
                rows += [steps.session_row(row) for row in db.execute(steps.SHOWN.where(some))]
        return {row.key: row for row in rows}

    def stamp(self) -> int | None:
        return self._db.stamp()

    def events(self, key: SessionKey, after: int | None, *, limit: int, max_bytes: int) -> Slice:
        with self._db.read() as db:
            session = steps.known(db, key)
            cursor = session.base if after is None else after
            found: list[Event] = []
            lost = gap_at(cursor, session.base, session.head)
            if lost is not None:
                found.append(lost)
                cursor = session.base
            if cursor < session.head:
                found += steps.part(db, session, cursor, limit - len(found), max_bytes)
        return Slice(found, t.cast(int, found[-1].seq) if found else cursor)

    def transcript(
        self,
        key: SessionKey,
        *,
        before: int | None,
        after: int | None,
        limit: int,
        max_bytes: int | None = None,
    ) -> MessagePage:
        n, mine = transcript.c.n, transcript.c.session
        with self._db.read() as db:
            session = steps.known(db, key)
            start, stop, more = page_of(session.entries, before, after, limit)
            page = sa.and_(mine == session.id, n > start, n <= stop)
            if max_bytes is not None and start < stop:
                # Their sizes first: two hundred of them may be more than a worker has memory for.
                size = sa.func.length(transcript.c.body, type_=sa.Integer)
                sizes = [(row[0], row[1]) for row in db.execute(sa.select(n, size).where(page))]
                asked = start, stop
                start, stop = fitting(sizes, max_bytes, newest=after is None)
                more = more or (start, stop) != asked
                page = sa.and_(mine == session.id, n > start, n <= stop)
            rows = db.execute(sa.select(transcript).where(page).order_by(n)).all()
        return MessagePage([{"id": row.n, **row.body} for row in rows], more)

    def history(self, key: SessionKey) -> History:
        with self._db.read() as db:
            session = steps.find(db, key)
            if session is None:
                return History([])
            mine = sa.and_(history.c.session == session.id, history.c.epoch == session.epoch)
            found = sa.select(history.c.body).where(mine).order_by(history.c.n)
            messages = list(db.execute(found).scalars())
            approved = steps.approved(db, session)
        return History(messages, session.epoch, session.version, session.agent or {}, approved)

    # -- changing ------------------------------------------------------------------------------

    def rename(self, key: SessionKey, title: str) -> None:
        with self._db.write() as db:
            steps.change(db, steps.known(db, key), {"title": title})

    def tombstone(self, key: SessionKey) -> bool:
        with self._db.write() as db:
            session = steps.locked(db, key)
            if session is None:
                return False
            # When it was deleted: nobody asks any more when it was last used.
            since = session.updated if session.deleting else self._clock()
            steps.change(db, session, {"deleting": True, "updated": since})
            left = sa.and_(turns.c.state == "queued", turns.c.final.is_not(None))
            db.execute(sa.delete(turns).where(turns.c.session == session.id, left))
            return True

    def delete(self, key: SessionKey) -> None:
        with self._db.write() as db:
            # The other tables' rows go with it.
            doomed = sa.and_(sessions.c.name == steps.name_of(key), sessions.c.deleting)
            db.execute(sa.delete(sessions).where(doomed))

    def revoke(self, tenant: str, user: str | None, before: float) -> None:
        whose = {"tenant": tenant, "everyone": user is None, "user": user or ""}
        same = [revocations.c[name] == value for name, value in whose.items()]

        def attempt(db: sa.Connection) -> None:
            # What was void stays void.
            later = sa.case((revocations.c.before < before, before), else_=revocations.c.before)
            again = sa.update(revocations).where(*same).values(before=later)
            if db.execute(again).rowcount == 0:
                db.execute(sa.insert(revocations).values(**whose, before=before))

        self._retried(attempt)

    def revocations(self) -> list[Revocation]:
        with self._db.read() as db:
            rows = db.execute(sa.select(revocations)).all()
        return [Revocation(r.tenant, None if r.everyone else r.user, r.before) for r in rows]

    def prune(self, before: float) -> list[SessionKey]:
        idle = sa.and_(sessions.c.updated < before, ~sessions.c.deleting, ~steps.BUSY)
        some = sa.select(sessions).where(idle).order_by(sessions.c.updated).limit(PRUNED)
        with self._db.write() as db:
            ids = [row.id for row in db.execute(some.with_for_update())]
            # Asked again now that they are locked: one may have got a turn meanwhile.
            found = sa.select(sessions).where(sessions.c.id.in_(ids), idle)
            rows = db.execute(found.order_by(sessions.c.updated)).all()
            gone = sessions.c.id.in_([row.id for row in rows])
            db.execute(sa.update(sessions).where(gone).values(deleting=True, updated=self._clock()))
        return [steps.key_of(row) for row in rows]

    # -- tokens --------------------------------------------------------------------------------

    def reserve(self, tenant: str, day: str, *, least: int, most: int, limit: int) -> int:
        def attempt(db: sa.Connection) -> int:
            found = _budget(db, tenant, day)
            got = share(limit - (found or 0), least, most)
            _pay(db, tenant, day, found, got)
            return got

        return self._retried(attempt)

    def spend(self, tenant: str, day: str, tokens: int) -> None:
        def attempt(db: sa.Connection) -> None:
            _pay(db, tenant, day, _budget(db, tenant, day), tokens)

        # Should a power cut take it back, what was set aside is still counted.
        self._retried(attempt, self._db.batch)

    def spent(self, tenant: str, day: str) -> int:
        with self._db.read() as db:
            return db.execute(_BUDGET, {"tenant": tenant, "day": day}).scalar() or 0

    # -- workers -------------------------------------------------------------------------------

    def beat(self, worker: str) -> None:
        # Never the same twice, whatever the clock does. It is near the clock because workers of
        # the first version compare the two.
        now, following = self._now(), workers.c.beat + _NEXT_BEAT
        number = sa.case((following < now, now), else_=following)

        def attempt(db: sa.Connection) -> None:
            again = sa.update(workers).where(workers.c.id == worker).values(beat=number)
            if db.execute(again).rowcount == 0:
                db.execute(sa.insert(workers).values(id=worker, beat=self._now()))

        self._retried(attempt)

    def beats(self) -> dict[str, float]:
        with self._db.read() as db:
            return {row.id: row.beat for row in db.execute(sa.select(workers))}

    def clock(self) -> float:
        """The database's time, or ours for SQLite."""
        with self._db.read() as db:
            return float(db.execute(sa.select(self._now())).scalar_one())

    def leave(self, worker: str) -> None:
        with self._db.write() as db:
            db.execute(sa.delete(signals).where(signals.c.worker == worker))
            db.execute(sa.delete(workers).where(workers.c.id == worker))

    def signal(self, key: SessionKey, reason: str, *, but: str, running_only: bool = False) -> int:
        with self._db.write() as db:
            session = steps.locked(db, key)
            if session is None:
                return 0
            rows = steps.active(db, session)
            found = [row for row in rows if row.worker != but and row.final is None]
            if running_only:
                found = [row for row in found if row.state == "running"]
            _ask(db, session, found, reason)
            return len(found)

    def signals(self, worker: str) -> list[Signal]:
        with self._db.read() as db:
            # Several times a second, and nearly always in vain: without a lock.
            if db.execute(_ANY_SIGNAL, {"worker": worker}).first() is None:
                return []
        with self._db.write() as db:
            rows = db.execute(_SIGNALS, {"worker": worker}).all()
            db.execute(sa.delete(signals).where(signals.c.id.in_([row.id for row in rows])))
        return [Signal(steps.key_of(row), row.turn_id, row.reason) for row in rows]

    def doomed(self, before: float | None = None) -> list[SessionKey]:
        found = sa.select(sessions).where(sessions.c.deleting, ~steps.BUSY)
        if before is not None:
            found = found.where(sessions.c.updated < before)
        with self._db.read() as db:
            return [steps.key_of(row) for row in db.execute(found)]

    def orphans(self, workers: cabc.Collection[str]) -> list[Orphan]:
        known = sa.exists().where(tables.workers.c.id == turns.c.worker)
        lost = sa.or_(turns.c.worker.in_(list(workers)), ~known)
        # ``head`` and ``id`` are the session's, the turn's come under names of their own.
        own = (turns.c.worker, turns.c.state, turns.c.cursor, turns.c.final)
        found = (
            sa.select(sessions, turns.c.id.label("turn"), *own)
            .join_from(turns, sessions)
            .where(turns.c.position.is_not(None), sa.or_(lost, turns.c.final.is_not(None)))
            .order_by(sessions.c.id, turns.c.state.desc(), turns.c.position)
        )
        with self._db.read() as db:
            return [_orphan(row) for row in db.execute(found)]

    def take_over(self, orphan: Orphan, worker: str) -> Claim | None:
        with self._db.write() as db:
            session = steps.locked(db, orphan.key)
            if session is None:
                return None
            expected = orphan.generation if isinstance(orphan, FoundOrphan) else session.generation
            if session.turn_id != orphan.turn_id or session.generation != expected:
                return None
            this = steps.this_turn(session, orphan.turn_id)
            db.execute(sa.update(turns).where(this).values(worker=worker))
            steps.unask(db, session, orphan.turn_id)
            generation = steps.next_generation(db, self._clock())
            steps.change(db, session, {"generation": generation})
            return taken_over(orphan, generation, session.version, session.head)

    # -- inside --------------------------------------------------------------------------------

    def _retried(
        self,
        attempt: cabc.Callable[[sa.Connection], _Result],
        transaction: cabc.Callable[[], contextlib.AbstractContextManager[sa.Connection]]
        | None = None,
    ) -> _Result:
        """What *attempt* returns; once more if somebody else made the same row first."""
        for _ in range(_TRIES):
            try:
                with (transaction or self._db.write)() as db:
                    return attempt(db)
            except IntegrityError:
                continue
        raise StoreUnavailable

    def _now(self) -> sa.ColumnElement[float]:
        """Of several machines, the database's clock is the one they share."""
        if self._db.is_sqlite:
            return sa.literal(self._clock(), sa.Double)
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def _create(self, db: sa.Connection, key: SessionKey, turn: TurnRow, now: float) -> _Row:
        """The row of a new session. The generation counter is ours: nobody else makes one now."""
        if self._max_per_tenant is not None:
            mine = sa.select(sa.func.count()).where(sessions.c.tenant == key.tenant)
            if db.execute(mine).scalar_one() >= self._max_per_tenant:
                raise TooManySessions(
                    "this tenant has no room for another session",
                    quota=Quota("sessions", self._max_per_tenant),
                )
        names = {"tenant": key.tenant, "user": key.user, "sid": key.id, "name": steps.name_of(key)}
        values = {"title": title_of(turn.message), "created": now, "updated": now, "usage": {}}
        db.execute(sa.insert(sessions).values(**names, **values))
        return steps.known(db, key)

    def _may_come(
        self, db: sa.Connection, session: _Row, turn: TurnRow, use: KeyUse | None
    ) -> None:
        if session.deleting:
            raise SessionBusy("this session is being deleted", reason="deleting")
        if use is not None:
            check_use(_use(db, session, use), use, turn, self._clock())

    def _remember(
        self, db: sa.Connection, session: _Row, turn: TurnRow, use: KeyUse | None
    ) -> None:
        if use is None:
            return
        now = self._clock()
        # Also the turn's own, from when it was queued.
        old = sa.or_(keys.c.created <= now - KEY_SECONDS, keys.c.key == use.key)
        db.execute(sa.delete(keys).where(keys.c.session == session.id, old))
        row = {"session": session.id, "turn_id": turn.id, "created": now}
        db.execute(sa.insert(keys).values(key=use.key, body=use.body, **row))


def _may_begin(db: sa.Connection, session: _Row, turn: TurnRow) -> tuple[bool, list[_Row]]:
    """Whether it was queued, and who has left the queue and is to be told of.

    SessionBusy, or ClaimLost if it must not begin any more.
    """
    if session.generation is not None:
        raise SessionBusy(
            "this session is already answering; cancel that turn, or send on_busy",
            turn_id=session.turn_id,
        )
    rows = steps.waiting(db, session, turn.id)
    if any(row.id == turn.id and row.final is not None for row in rows):
        # It was queued, and ended for its worker.
        raise ClaimLost
    left = [row for row in rows if row.final is not None]
    waiting = [row for row in rows if row.final is None]
    queued = any(row.id == turn.id for row in waiting)
    if waiting and not (queued and waiting[0].worker == turn.worker):
        raise SessionBusy("another turn of this session is first")
    return bool(waiting), left


def _start_queued(db: sa.Connection, session: _Row, turn: TurnRow, head: int) -> None:
    this = steps.this_turn(session, turn.id, "queued")
    db.execute(sa.update(turns).where(this).values(state="running", cursor=head))


def _end(db: sa.Connection, session: _Row, turn_id: str, final: Event) -> None:
    """The turn that held the session has ended with *final*."""
    this = steps.this_turn(session, turn_id, "running")
    ended = {"state": "ended", "position": None, "final": steps.final_json(final)}
    db.execute(sa.update(turns).where(this).values(**ended))


def _budget(db: sa.Connection, tenant: str, day: str) -> int | None:
    """What was spent, with the row locked; None if there is no row yet."""
    found = db.execute(_BUDGET.with_for_update(), {"tenant": tenant, "day": day})
    return t.cast(int | None, found.scalar())


def _pay(db: sa.Connection, tenant: str, day: str, spent: int | None, tokens: int) -> None:
    total = min(max(0, (spent or 0) + tokens), clean.MAX_TOKENS)
    if spent is None:
        # The first of its day: whoever else inserts it now makes one of us try again.
        db.execute(sa.insert(budgets).values(tenant=tenant, day=day, spent=total))
        old = sa.select(budgets.c.tenant, budgets.c.day).where(budgets.c.day < first_day(day))
        these = sa.tuple_(budgets.c.tenant, budgets.c.day)
        db.execute(sa.delete(budgets).where(these.in_(old.with_for_update(skip_locked=True))))
    else:
        mine = sa.and_(budgets.c.tenant == tenant, budgets.c.day == day)
        db.execute(sa.update(budgets).where(mine).values(spent=total))


def _use(db: sa.Connection, session: _Row, use: KeyUse) -> KnownKey | None:
    mine = sa.and_(keys.c.session == session.id, keys.c.key == use.key)
    row = db.execute(sa.select(keys).where(mine)).one_or_none()
    return None if row is None else KnownKey(row.body, row.turn_id, row.created)


def _ask(db: sa.Connection, session: _Row, found: cabc.Sequence[_Row], reason: str) -> None:
    """Signal the workers of those turns, but none for the second time before it has looked."""
    asked = sa.select(signals.c.turn_id).where(
        signals.c.session == session.id, signals.c.reason == reason
    )
    before = set(db.execute(asked).scalars())
    new = [
        {"worker": r.worker, "session": session.id, "turn_id": r.id, "reason": reason}
        for r in found
        if r.id not in before
    ]
    if new:
        db.execute(sa.insert(signals), new)


def _ask_holder(db: sa.Connection, session: _Row, left: _Row) -> None:
    """Have the worker that holds the session write the end of a turn that left the queue."""
    this = steps.this_turn(session, session.turn_id, "running")
    worker = db.execute(sa.select(turns.c.worker).where(this)).scalar()
    # Who ends a turn behind one of its own has written that already.
    if worker is not None and worker != left.worker:
        asked = {"session": session.id, "turn_id": left.id, "reason": LEFT}
        db.execute(sa.insert(signals).values(worker=worker, **asked))


def _orphan(row: _Row) -> Orphan:
    running = row.state == "running"
    return FoundOrphan(
        steps.key_of(row),
        row.turn,
        running,
        row.cursor if running else row.head,
        steps.ending_of(row.final),
        row.worker,
        row.generation if running else None,
    )
