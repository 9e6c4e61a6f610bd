"""What goes wrong at the command line is told in a line, and never as a traceback."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import typing as t
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from click.testing import Result

from agentao_web import workers
from agentao_web.cli import main
from agentao_web.core.history import History
from agentao_web.doctor import machine
from agentao_web.doctor import proxy
from agentao_web.store.sql import SqlStore

KEY = "the-key-of-the-tests-of-failures"
#: No file system takes a name of this length.
LONG = "x" * 300
NOWHERE = "http://127.0.0.1:1"
#: Loaded now: whoever has no rights later cannot load them.
LOADED = (workers, machine, proxy, History, SqlStore)


def invoke(*args: str, **env: str) -> Result:
    """A command as a shell would run it: what click does not know stays an exception."""
    told: dict[str, str | None] = {name: None for name in os.environ if name[:8] == "AGENTAO_"}
    told |= {"AGENTAO_SECRET_KEYS": KEY, "AGENTAO_DEMO": "1", **env}
    return CliRunner().invoke(main, args, env=told)


def complaint(result: Result, status: int = 1) -> str:
    """The last line, of a command that failed in good order."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return str(result.output.strip().splitlines()[-1])


@contextlib.contextmanager
def as_nobody() -> cabc.Iterator[None]:
    """Without root's rights; who runs the tests as somebody has none."""
    if os.geteuid() != 0:
        yield
        return
    nobody = pwd.getpwnam("nobody").pw_uid
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place() -> cabc.Iterator[Path]:
    """A folder everybody may enter: pytest's own is its user's alone."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    for inner in folder.rglob("*"):
        if inner.is_dir():
            inner.chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def database(place: Path) -> str:
    """A database that everybody may read and write."""
    (place / "data").mkdir()
    (place / "data").chmod(0o777)
    with contextlib.closing(SqlStore(place / "data" / "web.db")) as store:
        store.check()
    for file in (place / "data").iterdir():
        file.chmod(0o666)
    return f"sqlite:///{place}/data/web.db"


def test_it_says_its_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"agentao-web {version('agentao-web')}\n")


# -- folders and files -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o555], ids=["none", "read", "enter"])
def test_a_backup_into_a_folder_one_may_not_use(place: Path, database: str, mode: int) -> None:
    closed = place / "closed"
    closed.mkdir()
    closed.chmod(mode)
    with as_nobody():
        result = invoke("db", "backup", str(closed / "copy.db"), AGENTAO_DATABASE_URL=database)
    assert f"{closed / 'copy.db'} cannot be written: Permission denied" in complaint(result)
    closed.chmod(0o700)
    assert not list(closed.iterdir())


@pytest.mark.parametrize("name", [LONG, "/proc/copy.db", "/etc/passwd/copy.db"])
def test_a_backup_to_where_no_file_can_be(database: str, name: str) -> None:
    result = invoke("db", "backup", name, AGENTAO_DATABASE_URL=database)
    assert "cannot be written" in complaint(result)


def test_a_backup_that_may_be_made_is_made(place: Path, database: str) -> None:
    with as_nobody():
        result = invoke("db", "backup", str(place / "copy.db"), AGENTAO_DATABASE_URL=database)
    assert result.exit_code == 0, result.output
    assert SqlStore(place / "copy.db").check().endswith("ok")


COMMANDS: list[list[str]] = [
    ["db", "check"],
    ["db", "prune", "--days", "1"],
    ["db", "backup", "copy.db"],
    ["sessions", "list"],
    ["sessions", "show", "--tenant", "acme", "s"],
    ["sessions", "export", "--tenant", "acme", "s"],
    ["sessions", "delete", "--tenant", "acme", "s"],
    ["revoke", "--tenant", "acme"],
    ["budget", "--tenant", "acme"],
    ["workspace", "--tenant", "acme"],
    ["serve", "--bind", "127.0.0.1:0"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("root", [f"/tmp/{LONG}", "/proc/agentao", "/etc/passwd"])
def test_a_root_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = complaint(invoke(*command, AGENTAO_ROOT=root))
    assert root in said or "AGENTAO_ROOT" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS[:-1], ids=" ".join)
def test_a_root_one_may_not_enter(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    root = place / "root"
    root.mkdir()
    with contextlib.closing(SqlStore(root / "agentao-web.db")) as store:
        store.check()
    root.chmod(0)
    monkeypatch.chdir(place)
    with as_nobody():
        said = complaint(invoke(*command, AGENTAO_ROOT=str(root)))
    assert str(root) in said or "AGENTAO_ROOT" in said


@pytest.mark.parametrize("command", COMMANDS[:-2], ids=" ".join)
def test_a_database_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    garbage = tmp_path / "garbage.db"
    garbage.write_text("not a database\n" * 100)
    for url in (f"sqlite:///{garbage}", "sqlite:////tmp", "postgresql://127.0.0.1:1/nothing"):
        said = complaint(invoke(*command, AGENTAO_DATABASE_URL=url))
        assert "AGENTAO_DATABASE_URL" in said or "pg_dump" in said


# -- what is given -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["token", "--tenant", "acme", "--ttl", "9" * 40], 2),
        (["revoke", "--tenant", "acme", "--before", "1e999"], 2),
        (["revoke", "--tenant", "acme", "--before", "nan"], 2),
        (["revoke", "--tenant", "acme", "--before", "1795685088000"], 2),
        (["db", "prune", "--days", "nan"], 2),
        (["db", "prune", "--days", "inf"], 2),
        (["sessions", "delete", "--tenant", "acme", "s", "--timeout", "nan"], 2),
        (["doctor", "--no-model", "--patience", "nan"], 2),
        (["doctor", "--no-model", "--url", NOWHERE, "--ca", "/tmp"], 2),
        (["doctor", "--no-model", "--url", NOWHERE, "--ca", "/etc/passwd"], 2),
        (["doctor", "--no-model", "--url", NOWHERE, "--header", "X: \u00fc"], 2),
        (["doctor", "--no-model", "--url", NOWHERE, "--header", "A b: c"], 2),
        (["doctor", "--no-model", "--url", NOWHERE, "--token", "\u00fc"], 2),
        (["doctor", "--no-model", "--url", "http://[::1"], 1),
        (["doctor", "--no-model", "--url", "nonsense"], 1),
        (["serve", "--bind", "127.0.0.1:99999"], 2),
        (["serve", "--bind", "nobody-has-this-name.localhost.:70000"], 2),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_said(tmp_path: Path, command: list[str], status: int) -> None:
    assert complaint(invoke(*command, AGENTAO_ROOT=str(tmp_path)), status)


def test_an_address_of_another_machine_is_said_at_once(tmp_path: Path) -> None:
    said = complaint(invoke("serve", "--bind", "192.0.2.1:8000", AGENTAO_ROOT=str(tmp_path)))
    assert "192.0.2.1:8000 cannot be used" in said


# -- where it goes -----------------------------------------------------------------------------


def run(
    folder: Path, *args: str, stdout: t.Any = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "from agentao_web.cli import main; main()", *args],
        env={**os.environ, "AGENTAO_ROOT": str(folder), "AGENTAO_SECRET_KEYS": KEY, **env},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
    )


@pytest.mark.parametrize("args", [("--help",), ("token", "--tenant", "acme"), ("doctor",)])
def test_a_full_disk_under_the_output_is_said(tmp_path: Path, args: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(tmp_path, *args, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == "Error: No space left on device\n"


def test_an_output_nobody_reads_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nobody:
        done = run(tmp_path, "token", "--tenant", "acme", stdout=nobody)
    assert b"Traceback" not in done.stderr


def test_a_terminal_without_unicode_gets_json_all_the_same(tmp_path: Path) -> None:
    with contextlib.closing(SqlStore(tmp_path / "agentao-web.db")) as store:
        store.check()
    done = run(tmp_path, "budget", "--tenant", "caf\u00e9 \U0001f600", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tenant"] == "caf\u00e9 \U0001f600"
