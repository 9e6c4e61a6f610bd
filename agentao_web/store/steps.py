"""The steps the SQL store's transactions are made of; each gets the connection of its own.

Everything written under a claim begins with ``held``: the session's row, locked, where its
generation is ours. Locks are taken in the order session, turns, questions, generation counter.
Only a new session takes the counter first, so that nobody else makes one meanwhile, and then waits
for nothing: it starts over if it was not the first. Who settles a question locks that row alone.
"""

from __future__ import annotations

import collections.abc as cabc
import json
import typing as t

import sqlalchemy as sa

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import NotFound
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.question import Question
from agentao_web.core.question import to_be_remembered
from agentao_web.store import ActiveTurn
from agentao_web.store import Finish
from agentao_web.store import SessionRow
from agentao_web.store import TurnRow
from agentao_web.store.tables import dumped
from agentao_web.store.tables import events
from agentao_web.store.tables import history
from agentao_web.store.tables import meta
from agentao_web.store.tables import questions
from agentao_web.store.tables import sessions
from agentao_web.store.tables import transcript
from agentao_web.store.tables import turns

Row = sa.Row[t.Any]
Values = dict[str, t.Any]

#: What an event weighs in the log beside its JSON, in bytes.
_EVENT_OVERHEAD: t.Final = 64

_BY_NAME = sa.select(sessions).where(sessions.c.name == sa.bindparam("name"))
_LOCKED = _BY_NAME.with_for_update()
_HELD = _LOCKED.where(sessions.c.generation == sa.bindparam("generation"))
_NEW_EVENT = sa.insert(events)
#: Made once: this is what a turn does most often.
_MOVED = (
    sa.update(sessions)
    .where(sessions.c.id == sa.bindparam("session"))
    .values({name: sa.bindparam(f"new_{name}") for name in ("base", "head", "log_bytes")})
)

_COUNTER = meta.c.name == "generation"
_COUNT = sa.update(meta).where(_COUNTER).values(value=meta.c.value + 1)
_COUNTED = sa.select(meta.c.value).where(_COUNTER)

#: Whether a session, of a statement about sessions, has a turn that is not over.
BUSY = sa.exists().where(turns.c.session == sessions.c.id, turns.c.position.is_not(None))

_ACTIVE = (
    sa.select(turns)
    .where(turns.c.session == sa.bindparam("session"), turns.c.position.is_not(None))
    .order_by(turns.c.state.desc(), turns.c.position)
)
_TAIL = (
    sa.select(events)
    .where(events.c.session == sa.bindparam("session"), events.c.seq > sa.bindparam("cursor"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("limit"))
    .subquery()
)
#: The newest part of the log, up to a number of events and of bytes.
_PART = sa.select(
    _TAIL, (sa.func.sum(_TAIL.c.size).over(order_by=_TAIL.c.seq) - _TAIL.c.size).label("before")
).subquery()
_EVENTS = sa.select(_PART).where(_PART.c.before < sa.bindparam("max_bytes")).order_by(_PART.c.seq)
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
    db.execute(sa.update(sessions).where(sessions.c.id == session.id).values(**values))


def move(db: sa.Connection, session: Row, place: Values) -> None:
    """Write to the session's row how far its log reaches."""
    moved = {f"new_{name}": value for name, value in place.items()}
    db.execute(_MOVED, {"session": session.id, **moved})


def next_generation(db: sa.Connection) -> int:
    """A number for a claim, given out once for ever: with this transaction or not at all."""
    db.execute(_COUNT)
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
    )


# -- turns -------------------------------------------------------------------------------------


def active(db: sa.Connection, session: Row) -> cabc.Sequence[Row]:
    """The rows of the running turn and the queued ones, in their order."""
    # "running" sorts before "queued", descending.
    return db.execute(_ACTIVE, {"session": session.id}).all()


def active_turn(row: Row, head: int) -> ActiveTurn:
    """An active turn as the protocol has it; what is queued begins after the *head* for now."""
    cursor = row.cursor if row.state == "running" else head
    return ActiveTurn(row.id, row.worker, row.state, row.message, row.created, cursor)


def insert_turn(
    db: sa.Connection, session: Row, turn: TurnRow, state: str, position: int, cursor: int = 0
) -> None:
    """A new turn."""
    place = {"session": session.id, "state": state, "position": position, "cursor": cursor}
    told = {"id": turn.id, "worker": turn.worker, "created": turn.created}
    said = {"message": turn.message, "images": turn.images}
    db.execute(sa.insert(turns).values(**place, **told, **said))


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
    bounds = {"session": session.id, "cursor": cursor, "limit": limit, "max_bytes": max_bytes}
    return [_event(row) for row in db.execute(_EVENTS, bounds)]


def write(db: sa.Connection, session: Row, new: cabc.Sequence[Event]) -> Values:
    """Put events into the log; what changes of the session's row."""
    # What is there already was written by an attempt whose commit seemed to fail.
    rows = [_event_row(session, event) for event in new if (event.seq or 0) > session.head]
    place = {"base": session.base, "head": session.head, "log_bytes": session.log_bytes}
    if not rows:
        return place
    db.execute(_NEW_EVENT, rows)
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


def _event_row(session: Row, event: Event) -> Values:
    body = dumped([dict(event.data), dict(event.extra)])
    return {
        "session": session.id,
        "seq": event.seq,
        "turn_id": event.turn_id,
        "type": event.type,
        "ts": event.ts,
        "body": body,
        "size": _EVENT_OVERHEAD + (len(body) if body.isascii() else len(body.encode())),
    }


def _event(row: Row) -> Event:
    data, extra = json.loads(row.body)
    return Event(row.seq, row.turn_id, row.type, data, row.ts, extra)


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
