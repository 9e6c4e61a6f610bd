"""The steps the SQL store's transactions are made of; each gets the connection of its own.

Everything written under a claim begins with ``held``: the session's row, locked, where its
generation is ours. Locks are taken in the order session, turns, questions, generation counter.
Only a new session takes the counter first, so that nobody else makes one meanwhile, and then waits
for nothing: it starts over if it was not the first. Who settles a question locks that row alone.
"""

from __future__ import annotations

import collections.abc as cabc
import functools
import json
import typing as t

import sqlalchemy as sa

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import NotFound
from agentao_web.core.log import GENERATION_BITS
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import beginning
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.core.question import Question
from agentao_web.core.question import to_be_remembered
from agentao_web.core.turn import ENDS
from agentao_web.store import ActiveTurn
from agentao_web.store import Finish
from agentao_web.store import SessionRow
from agentao_web.store import Spoken
from agentao_web.store import TurnRow
from agentao_web.store.memory import generation_seed
from agentao_web.store.tables import dumped
from agentao_web.store.tables import events
from agentao_web.store.tables import history
from agentao_web.store.tables import meta
from agentao_web.store.tables import questions
from agentao_web.store.tables import sessions
from agentao_web.store.tables import signals
from agentao_web.store.tables import transcript
from agentao_web.store.tables import turns

Row = sa.Row[t.Any]
Values = dict[str, t.Any]

#: What a row weighs in the log beside its JSON, in bytes.
_ROW_OVERHEAD: t.Final = 64
#: How much memory the events of one row hold, before there is a next one.
_RUN: t.Final = 2**15
#: Rows of the log asked for at first, and at most at a time.
_FEWEST, _MOST = 8, 64

_BY_NAME = sa.select(sessions).where(sessions.c.name == sa.bindparam("name"))
_LOCKED = _BY_NAME.with_for_update()
_HELD = _LOCKED.where(sessions.c.generation == sa.bindparam("generation"))
_NEW_EVENTS = sa.insert(events)
_NEW_TURN = sa.insert(turns)

_COUNTER = meta.c.name == "generation"
_NEXT = meta.c.value + 1
_LEAST = sa.bindparam("least", type_=sa.BigInteger())
_COUNT = (
    sa.update(meta).where(_COUNTER).values(value=sa.case((_NEXT < _LEAST, _LEAST), else_=_NEXT))
)
_COUNTED = sa.select(meta.c.value).where(_COUNTER)
_COUNT_AT_ONCE = _COUNT.returning(meta.c.value)

#: Whether turns of a session, of a statement about sessions, wait.
_WAITS = sa.exists().where(
    turns.c.session == sessions.c.id, turns.c.position.is_not(None), turns.c.state == "queued"
)
#: Sessions as the protocol has them.
SHOWN = sa.select(sessions, _WAITS.label("queued"))
_SHOWN_BY_NAME = SHOWN.where(sessions.c.name == sa.bindparam("name"))

#: Whether a session, of a statement about sessions, has a turn that is not over.
BUSY = sa.exists().where(turns.c.session == sessions.c.id, turns.c.position.is_not(None))

_OF_SESSION = turns.c.session == sa.bindparam("session")
_IN_ORDER = sa.select(turns).order_by(turns.c.state.desc(), turns.c.position)
_IS_ACTIVE = sa.and_(_OF_SESSION, turns.c.position.is_not(None))
_ACTIVE = _IN_ORDER.where(_IS_ACTIVE)
_ANY_ACTIVE = sa.select(turns.c.id).where(_IS_ACTIVE).limit(1)
_WAITING = _IN_ORDER.where(
    sa.or_(_IS_ACTIVE, sa.and_(_OF_SESSION, turns.c.id == sa.bindparam("turn")))
)
_FOLLOWING = (
    sa.select(events)
    .where(events.c.session == sa.bindparam("session"), events.c.seq > sa.bindparam("cursor"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("few"))
)
_OLDEST = (
    sa.select(events.c.seq, events.c.size)
    .where(events.c.session == sa.bindparam("session"), events.c.seq > sa.bindparam("base"))
    .order_by(events.c.seq)
    .limit(100)
)


# -- sessions ----------------------------------------------------------------------------------


def find(db: sa.Connection, key: SessionKey) -> Row | None:
    """The session's row."""
    return db.execute(_BY_NAME, {"name": name_of(key)}).one_or_none()


def shown(db: sa.Connection, key: SessionKey) -> SessionRow | None:
    """The session as the protocol has it."""
    row = db.execute(_SHOWN_BY_NAME, {"name": name_of(key)}).one_or_none()
    return None if row is None else session_row(row)


def known(db: sa.Connection, key: SessionKey) -> Row:
    """The session's row; NotFound if there is none."""
    row = find(db, key)
    if row is None:
        raise NotFound("no such session")
    return row


def locked(db: sa.Connection, key: SessionKey) -> Row | None:
    """The session's row, and nobody else writes to the session until we have."""
    return db.execute(_LOCKED, {"name": name_of(key)}).one_or_none()


def held(db: sa.Connection, key: SessionKey, generation: int) -> Row:
    """The session's row, locked; ClaimLost if the claim is another one."""
    row = db.execute(_HELD, {"name": name_of(key), "generation": generation}).one_or_none()
    if row is None:
        raise ClaimLost
    return row


def change(db: sa.Connection, session: Row, values: Values) -> None:
    """Write to the session's row."""
    changed = {f"new_{name}": value for name, value in values.items()}
    db.execute(_changing(frozenset(values)), {"session": session.id, **changed})


@functools.cache
def _changing(names: frozenset[str]) -> sa.Update:
    """Made once for each set of columns there is: that costs more than to run it."""
    new: Values = {name: sa.bindparam(f"new_{name}") for name in sorted(names)}
    return sa.update(sessions).where(sessions.c.id == sa.bindparam("session")).values(new)


def next_generation(db: sa.Connection, now: float) -> int:
    """A number for a claim, given out once for ever: with this transaction or not at all.

    It follows the clock too: an older copy of this database, put in its place, would count from
    where it was and give numbers out again.
    """
    least = {"least": generation_seed(now)}
    if db.dialect.update_returning:
        return t.cast(int, db.execute(_COUNT_AT_ONCE, least).scalar_one())
    db.execute(_COUNT, least)
    return t.cast(int, db.execute(_COUNTED).scalar_one())


def name_of(key: SessionKey) -> str:
    """The three names of a session as one, which no other session's three can be."""
    return dumped(key)


def key_of(row: Row) -> SessionKey:
    """The names of a session out of its row."""
    return SessionKey(row.tenant, row.user, row.sid)


def session_row(row: Row) -> SessionRow:
    """A session as the protocol has it."""
    return SessionRow(
        key=key_of(row),
        title=row.title,
        created=row.created,
        updated=row.updated,
        head=row.head,
        version=row.version,
        turns=row.turns,
        usage=row.usage,
        deleting=row.deleting,
        turn_id=row.turn_id,
        queued=bool(getattr(row, "queued", False)),
    )


# -- turns -------------------------------------------------------------------------------------


def active(db: sa.Connection, session: Row) -> cabc.Sequence[Row]:
    """The rows of the running turn and the queued ones, in their order."""
    # "running" sorts before "queued", descending.
    return db.execute(_ACTIVE, {"session": session.id}).all()


def waiting(db: sa.Connection, session: Row, turn_id: str) -> cabc.Sequence[Row]:
    """Who is before a turn that wants to begin, and the turn itself if it is known, ended too."""
    return db.execute(_WAITING, {"session": session.id, "turn": turn_id}).all()


def waits(db: sa.Connection, session: Row) -> bool:
    """Whether queued turns are left."""
    return db.execute(_ANY_ACTIVE, {"session": session.id}).first() is not None


def active_turn(row: Row, head: int) -> ActiveTurn:
    """An active turn as the protocol has it; what is queued begins after the *head* for now."""
    cursor = row.cursor if row.state == "running" else head
    ending = ending_of(row.final)
    return ActiveTurn(
        row.id, row.worker, row.state, row.message, row.created, cursor, ending=ending
    )


def insert_turn(
    db: sa.Connection, session: Row, turn: TurnRow, state: str, position: int, cursor: int = 0
) -> None:
    """A new turn."""
    place = {"session": session.id, "state": state, "position": position, "cursor": cursor}
    told = {"id": turn.id, "worker": turn.worker, "created": turn.created}
    said = {"message": turn.message, "images": turn.images}
    db.execute(_NEW_TURN, {**place, **told, **said})


def ending_of(final: list[t.Any] | None) -> Draft | None:
    """What is to be the last event of a turn that has left the queue."""
    return None if final is None else Draft(final[2], final[3], final[5])


def endings(left: cabc.Iterable[Row], generation: int, now: float) -> list[Event]:
    """The last events of turns that have left the queue, as the first ones of a claim."""
    drafts = [(row.id, t.cast(Draft, ending_of(row.final))) for row in left]
    return [
        Event(first_seq(generation) + n, turn_id, draft.type, draft.data, now, draft.extra)
        for n, (turn_id, draft) in enumerate(drafts, 1)
    ]


def end_queued(
    db: sa.Connection, session: Row, written: cabc.Iterable[Event], but: str | None = None
) -> None:
    """End the queued turns whose last events are among *written*; *but* that one is the claim's."""
    for event in written:
        if event.turn_id in (None, but) or event.type not in ENDS:
            continue
        this = this_turn(session, event.turn_id, "queued")
        place = {"state": "ended", "position": None, "cursor": t.cast(int, event.seq) - 1}
        if db.execute(
            sa.update(turns).where(this).values(**place, final=final_json(event))
        ).rowcount:
            unask(db, session, event.turn_id)


def unask(db: sa.Connection, session: Row, turn_id: str) -> None:
    """Nothing is asked of that turn any more."""
    mine = sa.and_(signals.c.session == session.id, signals.c.turn_id == turn_id)
    db.execute(sa.delete(signals).where(mine))


def spoken(db: sa.Connection, session: Row, seq: int) -> Spoken | None:
    """The turn that event *seq* belongs to, also if the event is not (or no longer) in the log."""
    row = db.execute(_FOLLOWING, {"session": session.id, "cursor": seq - 1, "few": 1}).one_or_none()
    if row is not None and any(event.seq == seq for event in _run(row)):
        this = this_turn(session, row.turn_id)
        found = db.execute(sa.select(turns.c.id, turns.c.message).where(this)).one_or_none()
        return None if found is None else Spoken(*found)
    generation = seq >> GENERATION_BITS
    if seq > session.base and (row is None or row.seq >> GENERATION_BITS != generation):
        # It may be a number that was shown and lost with its worker, but not of a claim unknown.
        begin = {"session": session.id, "cursor": first_seq(generation), "few": 1}
        row = db.execute(_FOLLOWING, begin).one_or_none()
        if row is None or row.seq >> GENERATION_BITS != generation:
            return None
    # The newest turn that had begun by then. A claim's numbers are above all that were before it.
    begun = sa.and_(
        turns.c.session == session.id,
        turns.c.state != "queued",
        turns.c.cursor < first_seq(generation),
    )
    newest = sa.select(turns).where(begun).order_by(turns.c.cursor.desc()).limit(1)
    turn = db.execute(newest).one_or_none()
    if turn is None:
        return None
    wrote = turn.final[0] >= seq if turn.final is not None else generation == session.generation
    return Spoken(turn.id, turn.message) if wrote else None


def this_turn(session: Row, turn_id: str, *states: str) -> sa.ColumnElement[bool]:
    """The condition for one turn of a session, in one of *states* if there are any."""
    same = sa.and_(turns.c.session == session.id, turns.c.id == turn_id)
    return sa.and_(same, turns.c.state.in_(states)) if states else same


# -- questions ---------------------------------------------------------------------------------


def question(db: sa.Connection, session: Row, question_id: str) -> Question | None:
    """A question of the session, open or closed."""
    this = sa.and_(questions.c.session == session.id, questions.c.id == question_id)
    row = db.execute(sa.select(questions).where(this)).one_or_none()
    return None if row is None else _question_row(row)


def open_questions(db: sa.Connection, session: Row) -> list[Question]:
    """What nobody has answered yet, oldest first."""
    found = sa.select(questions).where(_open(session)).order_by(questions.c.n)
    return [_question_row(row) for row in db.execute(found)]


def approved(db: sa.Connection, session: Row) -> tuple[Question, ...]:
    """Approvals to be remembered for the session, oldest first."""
    mine = sa.and_(questions.c.session == session.id, questions.c.outcome == "approved")
    found = sa.select(questions).where(mine).order_by(questions.c.n)
    return tuple(q for q in map(_question_row, db.execute(found)) if to_be_remembered(q))


def insert_question(db: sa.Connection, session: Row, turn_id: str, asked: Question) -> None:
    """A new question of a turn, open."""
    place = {"session": session.id, "id": asked.id, "turn_id": turn_id, "answer": {}}
    said = {"kind": asked.kind, "data": dict(asked.data), "expires": asked.expires}
    db.execute(sa.insert(questions).values(**place, **said))


def close_questions(
    db: sa.Connection, session: Row, which: sa.ColumnElement[bool], values: Values
) -> None:
    """Close those that are open: whoever comes second finds none."""
    db.execute(sa.update(questions).where(_open(session), which).values(**values))


def _open(session: Row) -> sa.ColumnElement[bool]:
    return sa.and_(questions.c.session == session.id, questions.c.outcome.is_(None))


def _question_row(row: Row) -> Question:
    asked = (row.id, row.turn_id, row.kind, row.data, row.expires)
    return Question(*asked, row.outcome, row.by, row.answer)


# -- the log -----------------------------------------------------------------------------------


def part(db: sa.Connection, session: Row, cursor: int, limit: int, max_bytes: int) -> list[Event]:
    """Events after *cursor*: the first one, and others within both bounds."""
    return beginning(_following(db, session, cursor), limit=limit, max_bytes=max_bytes)


def _following(db: sa.Connection, session: Row, cursor: int) -> cabc.Iterator[Event]:
    """Every event after *cursor*, asked for a few rows at a time: they may be long ones."""
    few = _FEWEST
    while rows := db.execute(
        _FOLLOWING, {"session": session.id, "cursor": cursor, "few": few}
    ).all():
        for row in rows:
            yield from (event for event in _run(row) if t.cast(int, event.seq) > cursor)
        if len(rows) < few:
            return
        cursor, few = rows[-1].seq, min(few * 2, _MOST)


def write(db: sa.Connection, session: Row, new: cabc.Sequence[Event]) -> Values:
    """Put events into the log; what changes of the session's row."""
    # What is there already was written by an attempt whose commit seemed to fail.
    new = [event for event in new if (event.seq or 0) > session.head]
    place = {"base": session.base, "head": session.head, "log_bytes": session.log_bytes}
    if not new:
        return place
    rows = [_run_row(session, run) for run in _runs(new)]
    db.execute(_NEW_EVENTS, rows)
    size = sum(row["size"] for row in rows)
    return {**place, "head": rows[-1]["seq"], "log_bytes": session.log_bytes + size}


def prune(db: sa.Connection, session: Row, log_bytes: int, most: int) -> Values:
    """Cut the log to *most* bytes; what changes of the session's row.

    Reads and deletes little more than what goes: over a session's life as much as was written.
    (A running total in SQL would add up the whole log before it gave the first row.)
    """
    base = session.base
    while log_bytes > most:
        rows = db.execute(_OLDEST, {"session": session.id, "base": base}).all()
        if not rows:
            break
        for row in rows:
            base, log_bytes = row.seq, log_bytes - row.size
            if log_bytes <= most:
                break
    old = sa.and_(events.c.session == session.id, events.c.seq <= base)
    db.execute(sa.delete(events).where(old))
    return {"base": base, "log_bytes": log_bytes}


def _runs(new: cabc.Iterable[Event]) -> cabc.Iterator[list[Event]]:
    """*new* as it goes into rows: each of one turn, and none much longer than the others.

    A row for each event would cost more than all the rest that is done for a token.
    """
    run: list[Event] = []
    weight = 0
    for event in new:
        if run and (weight >= _RUN or event.turn_id != run[0].turn_id):
            yield run
            run, weight = [], 0
        run.append(event)
        weight += event.weight()
    if run:
        yield run


def _run_row(session: Row, run: list[Event]) -> Values:
    *before, last = run
    told = [[e.seq, e.type, e.ts, dict(e.data), dict(e.extra)] for e in before]
    body = dumped([dict(last.data), dict(last.extra), *told])
    return {
        "session": session.id,
        "seq": last.seq,
        "turn_id": last.turn_id,
        "type": last.type,
        "ts": last.ts,
        "body": body,
        "size": _ROW_OVERHEAD + (len(body) if body.isascii() else len(body.encode())),
    }


def _run(row: Row) -> cabc.Iterator[Event]:
    """The events of a row, in their order."""
    data, extra, *before = json.loads(row.body)
    for seq, kind, ts, *rest in before:
        yield Event(seq, row.turn_id, kind, rest[0], ts, rest[1])
    yield Event(row.seq, row.turn_id, row.type, data, row.ts, extra)


def final_json(event: Event) -> list[t.Any]:
    """A turn's last event as it lies in the turn's row: the log may forget it."""
    data, extra = dict(event.data), dict(event.extra)
    return [event.seq, event.turn_id, event.type, data, event.ts, extra]


# -- the conversation --------------------------------------------------------------------------


def converse(db: sa.Connection, session: Row, finish: Finish) -> Values:
    """Write what was said, for people and for the model; what changes of the session's row."""
    entries, messages, epoch = session.entries, session.messages, session.epoch
    if finish.rewritten:
        db.execute(sa.delete(history).where(history.c.session == session.id))
        messages, epoch = 0, epoch + 1
    said = [
        {"session": session.id, "n": n, "body": entry}
        for n, entry in enumerate(finish.transcript, entries + 1)
    ]
    kept = [
        {"session": session.id, "epoch": epoch, "n": n, "body": message}
        for n, message in enumerate(finish.appended, messages + 1)
    ]
    if said:
        db.execute(sa.insert(transcript), said)
    if kept:
        db.execute(sa.insert(history), kept)
    values: Values = {"entries": entries + len(said), "messages": messages + len(kept)}
    if finish.state is not None:
        values["agent"] = dict(finish.state)
    return {**values, "epoch": epoch}
