"""Opening a database, the three kinds of transactions, and what its failures become.

Nothing is opened before it is used, so nothing is carried over a fork; the schema is made on first
use. Everything a database may do wrong leaves here as StoreUnavailable, without its text.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import logging
import os
import sqlite3
import threading
import time
import typing as t
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import exc

from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WrongSchema
from agentao_web.core.folders import make_private
from agentao_web.store import DRIVERS
from agentao_web.store import check_url
from agentao_web.store import tables

_LOG = logging.getLogger(__name__)

#: How long a writer waits for the others, in seconds.
_BUSY: t.Final = 5.0
#: How long one waits for others of the same worker, in seconds: a burst takes a while.
_QUEUE: t.Final = 15.0
#: SQLite sleeps up to 100 ms between two looks whether another process still writes. We look more
#: often, and whoever has others of its own process behind it leaves the others a moment, in
#: seconds: without both a busy worker keeps the next one from writing for ever.
_GLANCE, _MOMENT = 0.0005, 0.001
#: Who makes the schema on PostgreSQL holds this lock: "agentao" as a number.
_SCHEMA_LOCK: t.Final = 0x6167656E74616F

#: Our own mistakes, and what the caller has to see.
_OURS = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)

#: What a transaction is for -> what SQLite does before it, and how it begins.
_SQLITE_BEGIN: t.Final = {
    "read": (None, "BEGIN"),
    # A deferred transaction that reads and then writes fails at once, whatever the timeout.
    "boundary": ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
    "batch": ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
}
_POSTGRES_TIMEOUTS: t.Final = (
    f"SET lock_timeout = '{_BUSY:.0f}s'; SET statement_timeout = '30s';"
    " SET idle_in_transaction_session_timeout = '60s'"
)
_POOL: t.Final[dict[str, t.Any]] = {
    "pool_size": 8,
    "max_overflow": 8,
    "pool_timeout": _QUEUE,
    # The one used last has pages and statements at hand.
    "pool_use_lifo": True,
}


@dataclasses.dataclass(frozen=True)
class _Opened:
    """An engine, and whose it is."""

    pid: int
    engine: sa.Engine
    kinds: cabc.Mapping[str, sa.Engine]
    file: tuple[int, int] | None
    """Device and inode of an SQLite file."""
    turnstile: contextlib.AbstractContextManager[t.Any]
    """SQLite has one writer. Ours queue here: its own wait is a sleep of up to 100 ms a time."""


class Database:
    """One database, by URL; see the module."""

    def __init__(self, url: str | Path, failed: cabc.Callable[[], None] = lambda: None) -> None:
        """*failed* is called whenever the database could not be asked."""
        self._url = _checked(url)
        self._failed = failed
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._seen = False
        self._inherited: list[object] = []
        self._asker: tuple[_Opened, sqlite3.Connection] | None = None
        self._askers = 0
        self.is_sqlite = self._url.get_backend_name() == "sqlite"

    def read(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A transaction that sees one moment, and writes nothing."""
        return self._transaction("read")

    def write(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A transaction that is on the disk when it has ended."""
        return self._transaction("boundary")

    def batch(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A transaction that a power cut may take back; the next boundary makes it last."""
        return self._transaction("batch")

    def check(self) -> str:
        """Open it, make the schema, look whether it is whole; what was found.

        Leaves nothing open that a fork would carry over.
        """
        was_open = self._opened is not None
        try:
            with self.read() as connection:
                wrong = _damage(connection) if self.is_sqlite else []
        finally:
            if not was_open:
                self.close()
        if wrong:
            raise RuntimeError(f"the database is damaged, restore a backup: {wrong[0]}")
        return f"{self._url.get_backend_name()}, schema {tables.SCHEMA}: ok"

    def backup(self, file: Path) -> None:
        """Copy an SQLite database, as it is at one moment, into a new file."""
        if not self.is_sqlite:
            raise RuntimeError("this is no SQLite database: use pg_dump")
        _create_file(file)
        with self.read() as connection, contextlib.closing(sqlite3.connect(file)) as copy:
            driver = t.cast(sqlite3.Connection, connection.connection.driver_connection)
            driver.backup(copy)

    def stamp(self) -> int | None:
        """Another number whenever anybody has committed since, with SQLite; None otherwise."""
        if not self.is_sqlite:
            return None
        try:
            opened = self._open()
            with self._lock:
                if self._asker is None or self._asker[0] is not opened:
                    # Of its own: the pragma does not see what its own connection wrote.
                    self._asker = opened, _detached(opened.engine)
                    self._askers += 1
                found = self._asker[1].execute("PRAGMA data_version").fetchone()
            return t.cast(int, (self._askers << 32) + found[0])
        except (sqlite3.Error, exc.DBAPIError, exc.TimeoutError, OSError) as error:
            _LOG.error("the store is unavailable: %s", type(error).__name__)
            raise StoreUnavailable from None

    def close(self) -> None:
        """Close every connection; the next use opens anew."""
        with self._lock:
            self._retire()

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> cabc.Iterator[sa.Connection]:
        try:
            opened = self._open()
            queue = contextlib.nullcontext() if kind == "read" else opened.turnstile
            with queue, opened.kinds[kind].begin() as connection:
                yield connection
        except _OURS:
            raise
        except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error, OSError) as error:
            cause = getattr(error, "orig", None) or error
            _LOG.error("the store is unavailable: %s", type(cause).__name__)
            self._failed()
            raise StoreUnavailable from None

    def _open(self) -> _Opened:
        opened = self._opened
        if opened is not None and self._is_good(opened):
            return opened
        with self._lock:
            if self._opened is None or not self._is_good(self._opened):
                self._retire()
                self._opened = self._new()
            return self._opened

    def _is_good(self, opened: _Opened) -> bool:
        """Whether it is ours and still the file at that path.

        SQLite would go on writing into a file that was deleted or moved away: kept nowhere.
        """
        return opened.pid == os.getpid() and opened.file == self._file()

    def _file(self) -> tuple[int, int] | None:
        if not self.is_sqlite:
            return None
        found = os.stat(_path(self._url))
        return found.st_dev, found.st_ino

    def _retire(self) -> None:
        opened, self._opened = self._opened, None
        asker, self._asker = self._asker, None
        if opened is None:
            return
        if opened.pid != os.getpid():
            # The parent's connections: closing them here would disturb it, so they are kept.
            self._inherited += [opened.engine.pool, asker]
        elif asker is not None:
            asker[1].close()
        opened.engine.dispose(close=opened.pid == os.getpid())

    def _options(self, kind: str) -> dict[str, t.Any]:
        if self.is_sqlite or kind != "read":
            return {}
        return {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}

    def _new(self) -> _Opened:
        if self.is_sqlite and not self._seen:
            # Only once: a file that has gone is not replaced by an empty one behind our back.
            _create_file(_path(self._url))
        engine = _sqlite(self._url) if self.is_sqlite else _postgres(self._url)
        kinds = {k: engine.execution_options(agentao=k, **self._options(k)) for k in _SQLITE_BEGIN}
        turnstile = _Turnstile() if self.is_sqlite else contextlib.nullcontext()
        try:
            _ensure_schema(kinds)
            opened = _Opened(os.getpid(), engine, kinds, self._file(), turnstile)
        except BaseException:
            engine.dispose()
            raise
        self._seen = True
        return opened


class _Turnstile(contextlib.AbstractContextManager[None]):
    """A lock one waits for only so long, and that is not held all the time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        if not self._lock.acquire(timeout=_QUEUE):
            raise exc.TimeoutError("too many writers")
        time.sleep(_MOMENT)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


# -- engines -----------------------------------------------------------------------------------


def _checked(url: str | Path) -> sa.URL:
    if isinstance(url, Path):
        # As it is: in a URL, "%20" or "?" would not be a part of the name.
        return sa.URL.create("sqlite", database=str(url))
    check_url(url)
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):
        raise RuntimeError("the database URL cannot be read. Is it a URL?") from None
    return parsed.set(drivername=DRIVERS[parsed.drivername])


def _path(url: sa.URL) -> Path:
    return Path(t.cast(str, url.database))


def _create_file(path: Path) -> None:
    """Make the file before SQLite does, for its owner only; -wal and -shm follow its mode."""
    make_private(path.parent)
    with contextlib.suppress(FileExistsError):
        # Never open it if it is there: closing any descriptor drops the locks of the process.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _sqlite(url: sa.URL) -> sa.Engine:
    # mode=rw: SQLite itself never creates the file.
    uri = f"file:{quote(str(_path(url).absolute()))}?mode=rw"

    def connect() -> sqlite3.Connection:
        # Its own idea of when to begin is switched off: SQLAlchemy's "begin" event says it.
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY, isolation_level=None, check_same_thread=False
        )
        try:
            _switch_to_wal(connection)
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = sa.create_engine(
        "sqlite+pysqlite://", creator=connect, poolclass=sa.QueuePool, hide_parameters=True, **_POOL
    )

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        pragma, statement = _SQLITE_BEGIN[connection.get_execution_options()["agentao"]]
        if pragma is not None and connection.info.get("agentao") != pragma:
            connection.exec_driver_sql(pragma)
            connection.info["agentao"] = pragma
        if statement == "BEGIN IMMEDIATE":
            _begin(t.cast(sqlite3.Connection, connection.connection.driver_connection))
        else:
            connection.exec_driver_sql(statement)

    @sa.event.listens_for(engine, "handle_error")
    def failed(context: sa.ExceptionContext) -> None:
        # What was opened while the file could not be written stays read-only for ever.
        error = getattr(context.original_exception, "sqlite_errorname", "SQLITE_OK")
        if error.startswith(("SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_READONLY")):
            context.is_disconnect = True

    return engine


def _postgres(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"connect_timeout": 5},
        **_POOL,
    )

    @sa.event.listens_for(engine, "connect")
    def connected(connection: t.Any, _: object) -> None:
        connection.execute(_POSTGRES_TIMEOUTS)
        connection.commit()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options()["agentao"] == "batch":
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")

    return engine


def _detached(engine: sa.Engine) -> sqlite3.Connection:
    """A connection that whoever asked has to close."""
    taken = engine.raw_connection()
    connection = t.cast(sqlite3.Connection, taken.driver_connection)
    taken.detach()
    return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite waits for no lock here, and workers that make the file together meet in this place."""
    until = time.monotonic() + _BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin(driver: sqlite3.Connection) -> None:
    """Begin to write, as soon as no other process does; sqlite3's own error after ``_BUSY``."""
    until = time.monotonic() + _BUSY
    driver.execute("PRAGMA busy_timeout=0")
    try:
        while True:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorname.startswith("SQLITE_BUSY")
                if not busy or time.monotonic() > until:
                    raise
            time.sleep(_GLANCE)
    finally:
        driver.execute(f"PRAGMA busy_timeout={_BUSY * 1000:.0f}")


def _damage(connection: sa.Connection) -> list[str]:
    found = [row[0] for row in connection.exec_driver_sql("PRAGMA quick_check")]
    lost = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return [line for line in found if line != "ok"] + [f"rows without a session: {r}" for r in lost]


# -- the schema --------------------------------------------------------------------------------


def _ensure_schema(kinds: cabc.Mapping[str, sa.Engine]) -> None:
    with kinds["read"].begin() as connection:
        version = _version(connection)
    if version is None or version in tables.MIGRATIONS:
        with kinds["boundary"].begin() as connection:
            version = _create_schema(connection)
    if version != tables.SCHEMA:
        raise WrongSchema(
            f"the database has schema {version}, this agentao-web knows {tables.SCHEMA}:"
            " install the agentao-web that wrote it, or use another AGENTAO_DATABASE_URL"
        )


def _version(connection: sa.Connection) -> int | None:
    if not sa.inspect(connection).has_table(tables.meta.name):
        return None
    found = sa.select(tables.meta.c.value).where(tables.meta.c.name == "schema")
    return t.cast(int, connection.execute(found).scalar_one())


def _create_schema(connection: sa.Connection) -> int:
    """Make every table that is missing; workers that start together do it one after another.

    An older schema becomes ours. Columns are only added, with NULL in them: a worker that opened
    the database before, of the version before, goes on with it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
    version = _version(connection)
    if version is not None and version not in tables.MIGRATIONS:
        return version
    tables.metadata.create_all(connection)
    if version is not None:
        return _migrate(connection, version)
    rows = [{"name": "schema", "value": tables.SCHEMA}, {"name": "generation", "value": 0}]
    connection.execute(sa.insert(tables.meta), rows)
    return tables.SCHEMA


def _migrate(connection: sa.Connection, version: int) -> int:
    while version in tables.MIGRATIONS:
        for statement in tables.MIGRATIONS[version]:
            connection.execute(sa.text(statement))
        version += 1
    mine = tables.meta.c.name == "schema"
    connection.execute(sa.update(tables.meta).where(mine).values(value=version))
    return version
