"""/readyz of a real server whose database is taken away, in every way we could think of."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import os
import resource
import signal
import sqlite3
import typing as t
from pathlib import Path

import pytest

from agentao_web.store.sql import SqlStore
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.store.postgres import PostgresServer

pytestmark = pytest.mark.live

#: Short, so that a heartbeat is soon too old.
DEMO = {"AGENTAO_DEMO": "1", "AGENTAO_WORKER_LEASE": "5"}
Away = cabc.Callable[[Server], contextlib.AbstractContextManager[None]]


def reason(server: Server) -> str | None:
    """What /readyz says: None for ready; it always answers, and in our form."""
    answer = server.client.get("/readyz")
    body = answer.json()
    if answer.status_code == 200:
        assert body == {"ok": True}
        return None
    assert answer.status_code == 503 and body["ok"] is False
    assert body["message"] and body["details"] == {}
    return t.cast(str, body["code"])


def is_ready(server: Server) -> bool:
    return reason(server) is None


@contextlib.contextmanager
def full_disk(server: Server) -> cabc.Iterator[None]:
    """The kernel refuses every byte that the worker writes to a file."""
    (worker,) = server.workers()
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def moved_away(server: Server) -> cabc.Iterator[None]:
    root = server.folder / "root"
    root.rename(server.folder / "moved")
    try:
        yield
    finally:
        (server.folder / "moved").rename(root)


@contextlib.contextmanager
def held(server: Server) -> cabc.Iterator[None]:
    """Somebody else writes, and does not end."""
    file = server.folder / "root" / "agentao-web.db"
    with contextlib.closing(sqlite3.connect(file, timeout=PATIENCE)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.rollback()


@pytest.mark.parametrize(
    ("away", "used"),
    [
        (full_disk, True),
        (held, True),
        (moved_away, True),
        pytest.param(full_disk, False, marks=pytest.mark.long),
        pytest.param(held, False, marks=pytest.mark.long),
    ],
)
def test_a_database_that_cannot_be_written(tmp_path: Path, away: Away, used: bool) -> None:
    SqlStore(tmp_path / "root" / "agentao-web.db").check()
    with Server(tmp_path, **DEMO) as server:
        if used:
            eventually(lambda: is_ready(server), "it never is ready")
            assert server.ask("s", "say before")["reply"] == "before"
        with away(server):
            eventually(
                lambda: reason(server) == "store_unavailable", "a dead database goes unnoticed"
            )
            assert server.client.get("/healthz").status_code == 200
            refused = server.post("t", "say no")
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        eventually(lambda: is_ready(server), "it never is ready again")
        assert server.ask("s", "say after")["reply"] == "after"


def test_a_database_of_a_later_version(tmp_path: Path) -> None:
    file = tmp_path / "root" / "agentao-web.db"
    SqlStore(file).check()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE agentao_meta SET value = 9999 WHERE name = 'schema'")
        connection.commit()
    with Server(tmp_path, **DEMO) as server:
        assert reason(server) == "wrong_schema"
        assert server.post("s", "say no").json()["code"] == "wrong_schema"
    assert "another AGENTAO_DATABASE_URL" in server.log.read_text()


# -- PostgreSQL --------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(server: PostgresServer, url: str) -> cabc.Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def frozen(server: PostgresServer, url: str) -> cabc.Iterator[None]:
    """Every process of the server stands still: connections stay open, and nothing answers."""
    pids = family(server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def family(server: PostgresServer) -> list[int]:
    process = server._process
    assert process is not None
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [process.pid, *(int(pid) for task in tasks for pid in task.read_text().split())]


@contextlib.contextmanager
def closed(server: PostgresServer, url: str) -> cabc.Iterator[None]:
    """The server is there, and lets nobody in."""
    name = url.partition("@/")[2].partition("?")[0]
    server.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    server.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    try:
        yield
    finally:
        server.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@pytest.mark.parametrize("away", [stopped, frozen, closed])
@pytest.mark.parametrize(
    "used", [True, pytest.param(False, marks=pytest.mark.long)], ids=["used", "fresh"]
)
def test_a_postgresql_that_goes_away(
    tmp_path: Path,
    postgres_server: PostgresServer,
    postgres_url: str,
    away: t.Any,
    used: bool,
) -> None:
    SqlStore(postgres_url).check()
    with Server(tmp_path, AGENTAO_DATABASE_URL=postgres_url, **DEMO) as server:
        if used:
            eventually(lambda: is_ready(server), "it never is ready")
            assert server.ask("s", "say before")["reply"] == "before"
        with away(postgres_server, postgres_url):
            eventually(
                lambda: reason(server) == "store_unavailable", "a dead database goes unnoticed"
            )
            for _ in range(3):
                # It answers each time, although the database does not.
                assert reason(server) == "store_unavailable"
            assert server.client.get("/healthz").status_code == 200
        eventually(lambda: is_ready(server), "it never is ready again")
        assert server.ask("s", "say after")["reply"] == "after"
