"""A real PostgreSQL of the tests' own: Debian's binaries, a Unix socket, nothing kept on a disk.

One server per pytest process, started by the first test that asks for it; one database per test.
It is told to end when its parent does, so that a killed test run leaves none behind.
"""

from __future__ import annotations

import collections.abc as cabc
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

_PATIENCE = 60.0
_USER = "agentao"
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "autovacuum_naptime": "10s",
    # Not by the database's default: the store has to ask for what it needs.
    "default_transaction_isolation": "serializable",
    "timezone": "Asia/Kolkata",
}


class PostgresServer:
    """A server that can be stopped and started again; ``url()`` makes a new database."""

    def __init__(self, folder: Path, *, settings: cabc.Mapping[str, str] = _SETTINGS) -> None:
        self._bin = _binaries()
        self._folder = folder
        self._data = folder / "data"
        self._settings = settings
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._unprivileged = _unprivileged(folder)
        self._run("initdb", "-D", str(self._data), "-U", _USER, "-A", "trust", "-N", "-E", "UTF8")

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = [f"-c{name}={value}" for name, value in self._settings.items()]
        command = [str(self._bin / "postgres"), "-D", str(self._data), f"-k{self._folder}"]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._unprivileged, *command, *options], stdout=log, stderr=log
            )
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return self.sql("SELECT 1")
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > until:
                    pytest.fail((self._folder / "log").read_text())
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End every connection and the server; SIGQUIT to end it as a crash does."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(_PATIENCE)

    def url(self) -> str:
        """A fresh database."""
        name = f"test{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE template0")
        return f"postgresql://{_USER}@/{name}?host={self._folder}"

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        name = url.partition("@/")[2].partition("?")[0]
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def sql(self, statement: str, database: str = "postgres") -> None:
        """Do something as the database's owner."""
        where = f"host={self._folder} user={_USER} dbname={database}"
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _run(self, name: str, *args: str) -> None:
        command = [*self._unprivileged, str(self._bin / name), *args]
        done = subprocess.run(command, capture_output=True, cwd=self._folder, timeout=_PATIENCE)
        assert done.returncode == 0, done.stderr.decode()


def _binaries() -> Path:
    """Where Debian keeps them, newest first; they are not in PATH."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(found, key=lambda path: int(path.parts[-3]))
    if not newest:
        pytest.fail("there is no PostgreSQL here: apt-get install postgresql")
    return newest[-1].parent


def _unprivileged(folder: Path) -> list[str]:
    """The command in front of a command that must not be root's."""
    command = ["setpriv", "--pdeathsig", "SIGINT"]
    if os.geteuid() != 0:
        return command
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    ids = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
    return [*command, *ids]


@pytest.fixture(scope="session")
def postgres_server() -> cabc.Iterator[PostgresServer]:
    """The server of this pytest process."""
    # Not pytest's folder: the path of a socket has at most 107 bytes, and its user must get there.
    folder = Path(tempfile.mkdtemp(prefix="agentao-pg-", dir="/tmp"))
    try:
        server = PostgresServer(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> cabc.Iterator[str]:
    """A database of the test's own."""
    url = postgres_server.url()
    yield url
    postgres_server.drop(url)
