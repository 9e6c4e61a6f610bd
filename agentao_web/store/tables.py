"""The tables, the same on SQLite and PostgreSQL, and how JSON lies in them.

Names begin with ``agentao_``: a host may give us the database its own tables are in. Free text
(messages, titles) is kept as JSON too: PostgreSQL takes no NUL in a text, neither takes a lone
surrogate, and a client may send both.
"""

from __future__ import annotations

import json
import typing as t

import sqlalchemy as sa

#: The version of this schema. A database that has a newer one is not touched.
SCHEMA: t.Final = 2

#: Version -> what makes the next one of it, besides tables that are new.
MIGRATIONS: t.Final[dict[int, tuple[str, ...]]] = {
    1: ("ALTER TABLE agentao_sessions ADD COLUMN agent TEXT",),
}

metadata = sa.MetaData()

_Big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
#: Ordered by code point everywhere, whatever the language of the database is.
_Name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


#: Made once: json.dumps makes one for every call that is not by its defaults.
_ENCODER: t.Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dumped(value: t.Any) -> str:
    """*value* as JSON that both databases take as text."""
    text = _ENCODER.encode(value)
    return text if text.isascii() or _is_utf8(text) else json.dumps(value, separators=(",", ":"))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Json(sa.types.TypeDecorator[t.Any]):
    """A JSON text, and None for NULL."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: t.Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else dumped(value)

    def process_result_value(self, value: t.Any, dialect: sa.Dialect) -> t.Any:
        return None if value is None else json.loads(value)


def _session(*, primary_key: bool = True) -> sa.Column[int]:
    """Rows of a session go with it."""
    parent = sa.ForeignKey("agentao_sessions.id", ondelete="CASCADE")
    return sa.Column("session", _Big, parent, primary_key=primary_key, nullable=False)


#: ``schema``: the version; ``generation``: the last one given out, never reset.
meta = sa.Table(
    "agentao_meta",
    metadata,
    sa.Column("name", _Name, primary_key=True),
    sa.Column("value", _Big, nullable=False),
)

sessions = sa.Table(
    "agentao_sessions",
    metadata,
    sa.Column("id", _Big, primary_key=True),
    # The three below as one: SQLite looks several of a triple up by reading the whole table.
    sa.Column("name", _Name, nullable=False, unique=True),
    sa.Column("tenant", _Name, nullable=False),
    sa.Column("user", _Name, nullable=False),
    sa.Column("sid", _Name, nullable=False),
    sa.Column("title", Json, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("updated", sa.Double, nullable=False),
    # The last number written, and the highest one that was pruned.
    sa.Column("head", _Big, nullable=False, default=0),
    sa.Column("base", _Big, nullable=False, default=0),
    sa.Column("log_bytes", _Big, nullable=False, default=0),
    sa.Column("version", _Big, nullable=False, default=0),
    # How many rows of each there are: the next one's number without counting.
    sa.Column("turns", _Big, nullable=False, default=0),
    sa.Column("entries", _Big, nullable=False, default=0),
    sa.Column("messages", _Big, nullable=False, default=0),
    sa.Column("epoch", _Big, nullable=False, default=0),
    sa.Column("usage", Json, nullable=False),
    # What else the agent keeps; NULL before its first turn has ended.
    sa.Column("agent", Json),
    sa.Column("deleting", sa.Boolean, nullable=False, default=False),
    # The claim, or NULL.
    sa.Column("generation", _Big),
    sa.Column("turn_id", _Name),
    sa.Index("agentao_sessions_by_time", "tenant", "user", "updated", "sid"),
)

sa.Index(
    "agentao_sessions_doomed",
    sessions.c.deleting,
    # As queries say it there: SQLite compares the texts.
    sqlite_where=sa.text("deleting = 1"),
    postgresql_where=sessions.c.deleting,
)

turns = sa.Table(
    "agentao_turns",
    metadata,
    _session(),
    sa.Column("id", _Name, primary_key=True),
    sa.Column("worker", _Name, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("message", Json, nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    # The place in the queue; NULL once it has ended, so that the index holds active turns only.
    sa.Column("position", _Big),
    sa.Column("cursor", _Big, nullable=False, default=0),
    # Its last event. That of a turn still queued is to be written, and has no number: the turn has
    # left the queue while somebody else held the session.
    sa.Column("final", Json),
)
_ACTIVE = turns.c.position.is_not(None)
sa.Index(
    "agentao_turns_active",
    turns.c.session,
    turns.c.position,
    sqlite_where=_ACTIVE,
    postgresql_where=_ACTIVE,
)

# A row is a run of events of one turn. It is named after the last one, whose data and extra come
# first in ``body``, followed by those before it: [data, extra, [seq, type, ts, data, extra], …].
events = sa.Table(
    "agentao_events",
    metadata,
    _session(),
    sa.Column("seq", _Big, primary_key=True, autoincrement=False),
    sa.Column("turn_id", _Name),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("ts", sa.Double, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    # One tree instead of a heap and an index: half the pages a batch dirties.
    sqlite_with_rowid=False,
)

transcript = sa.Table(
    "agentao_transcript",
    metadata,
    _session(),
    sa.Column("n", _Big, primary_key=True, autoincrement=False),
    sa.Column("body", Json, nullable=False),
)

history = sa.Table(
    "agentao_history",
    metadata,
    _session(),
    sa.Column("epoch", _Big, primary_key=True, autoincrement=False),
    sa.Column("n", _Big, primary_key=True, autoincrement=False),
    sa.Column("body", Json, nullable=False),
)

keys = sa.Table(
    "agentao_keys",
    metadata,
    _session(),
    sa.Column("key", _Name, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("turn_id", _Name, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
)

questions = sa.Table(
    "agentao_questions",
    metadata,
    # In the order they were asked.
    sa.Column("n", _Big, primary_key=True),
    _session(primary_key=False),
    sa.Column("id", _Name, nullable=False),
    sa.Column("turn_id", _Name, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", Json, nullable=False),
    sa.Column("expires", sa.Double, nullable=False),
    # NULL while it is open.
    sa.Column("outcome", sa.Text),
    sa.Column("by", Json),
    sa.Column("answer", Json, nullable=False),
    sa.UniqueConstraint("session", "id"),
)
_OPEN = questions.c.outcome.is_(None)
sa.Index(
    "agentao_questions_open",
    questions.c.session,
    questions.c.n,
    sqlite_where=_OPEN,
    postgresql_where=_OPEN,
)

workers = sa.Table(
    "agentao_workers",
    metadata,
    sa.Column("id", _Name, primary_key=True),
    sa.Column("beat", sa.Double, nullable=False),
)

signals = sa.Table(
    "agentao_signals",
    metadata,
    sa.Column("id", _Big, primary_key=True),
    sa.Column("worker", _Name, nullable=False, index=True),
    _session(primary_key=False),
    sa.Column("turn_id", _Name, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.UniqueConstraint("session", "turn_id", "reason"),
)

#: Tokens used or set aside, per tenant and day (UTC).
budgets = sa.Table(
    "agentao_budgets",
    metadata,
    sa.Column("tenant", _Name, primary_key=True),
    sa.Column("day", _Name, primary_key=True),
    sa.Column("spent", _Big, nullable=False),
    sa.Index("agentao_budgets_by_day", "day"),
)

revocations = sa.Table(
    "agentao_revocations",
    metadata,
    sa.Column("tenant", _Name, primary_key=True),
    # "" is a user too: the one a token without a user names.
    sa.Column("everyone", sa.Boolean, primary_key=True),
    sa.Column("user", _Name, primary_key=True),
    sa.Column("before", sa.Double, nullable=False),
)
