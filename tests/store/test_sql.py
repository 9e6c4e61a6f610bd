"""The SQL store beside its contract: files, forks, crashes, and databases that go away."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import database
from agentao_web.store import tables
from agentao_web.store.sql import SqlStore
from tests.store.postgres import PostgresServer
from tests.store.test_contract import KEY
from tests.store.test_contract import USE
from tests.store.test_contract import append
from tests.store.test_contract import at_once
from tests.store.test_contract import claim
from tests.store.test_contract import ending
from tests.store.test_contract import enqueue
from tests.store.test_contract import log
from tests.store.test_contract import remove
from tests.store.test_contract import run
from tests.store.test_contract import text

PATIENCE = 60.0
ROOT = Path(__file__).parents[2]
Open = cabc.Callable[..., SqlStore]


class Clock:
    """Time that is moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{folder}/store.db"
    return t.cast(str, request.getfixturevalue("postgres_url"))


@pytest.fixture
def open_store() -> cabc.Iterator[Open]:
    made: list[SqlStore] = []

    def make(url: str | Path, **options: t.Any) -> SqlStore:
        made.append(SqlStore(url, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@contextlib.contextmanager
def raw(url: str) -> cabc.Iterator[sa.Connection]:
    """The database without the store."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def child(script: str, *args: str) -> subprocess.Popen[str]:
    """A Python of its own that runs *script* with the tests' helpers."""
    code = f"import sys\nfrom tests.store.test_sql import *\n{script}"
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def turn(store: SqlStore, n: int) -> tuple[Claim, Finish]:
    """A turn of a session of its own, not finished."""
    held = claim(store, "t1", SessionKey("acme", "", f"s{n}"))
    return held, ending(held, 2)


# -- opening -----------------------------------------------------------------------------------


def test_everything_is_there_after_a_restart_and_no_number_is_used_again(
    url: str, open_store: Open
) -> None:
    before = open_store(url)
    first = run(before, "t1")
    run(before, "t2", SessionKey("acme", "ann", "gone"))
    remove(before, SessionKey("acme", "ann", "gone"))
    kept = before.session(KEY), log(before), before.history(KEY), before.ended(KEY, "t1")
    before.close()
    store = open_store(url)
    assert (store.session(KEY), log(store), store.history(KEY), store.ended(KEY, "t1")) == kept
    remove(store, KEY)
    assert run(store, "t3").generation >= first.generation + 2


@pytest.mark.parametrize("claims", [1, 40])
def test_an_older_copy_gives_no_number_out_again(
    folder: Path, tmp_path: Path, open_store: Open, claims: int
) -> None:
    """Also if there were more turns after the backup than the time until it was restored has."""
    clock = Clock(2_000_000_000.0)
    url = f"sqlite:///{folder}/store.db"
    before = open_store(url, clock=clock)
    run(before, "t0")
    before.backup(tmp_path / "backup.db")
    lost = {run(before, f"lost{n}").generation for n in range(claims)}
    before.close()
    clock.now += 60
    (tmp_path / "backup.db").rename(folder / "store.db")
    for name in ("store.db-wal", "store.db-shm"):
        (folder / name).unlink(missing_ok=True)
    store = open_store(url, clock=clock)
    again = {run(store, f"again{n}").generation for n in range(claims)}
    assert min(again) > max(lost)
    assert log(store, max(lost) << 20)[0].type == "turn_begin", "and nobody misses what is new"


def test_numbers_only_go_up_when_the_clock_jumps_back(url: str, open_store: Open) -> None:
    clock = Clock(2_000_000_000.0)
    store = open_store(url, clock=clock)
    first = run(store, "t1").generation
    clock.now = 1_900_000_000.0
    assert run(store, "t2").generation == first + 1
    clock.now = 9e12
    assert first_seq(run(store, "t3").generation) < 2**53, "nor is a mad one believed for ever"


def test_the_stamp_tells_whether_anybody_wrote(
    folder: Path, tmp_path: Path, open_store: Open
) -> None:
    url = f"sqlite:///{folder}/store.db"
    one, other = open_store(url), open_store(url)
    seen = {one.stamp()}
    for write in (lambda: run(other, "t1"), lambda: run(one, "t2"), lambda: other.beat("w")):
        write()
        stamp = one.stamp()
        assert stamp not in seen
        seen.add(stamp)
        log(one), one.heads([KEY]), one.signals("w")
        assert one.stamp() == stamp, "reading is not writing"
    one.backup(tmp_path / "copy.db")
    (tmp_path / "copy.db").rename(folder / "store.db")
    assert one.stamp() not in seen, "another file"
    one.close()
    assert one.stamp() not in seen


def test_postgresql_has_no_stamp(postgres_url: str, open_store: Open) -> None:
    assert open_store(postgres_url).stamp() is None


def test_a_closed_store_opens_again(url: str, open_store: Open) -> None:
    store = open_store(url)
    run(store, "t1")
    store.close()
    run(store, "t2")


def test_nothing_is_opened_before_it_is_used(folder: Path) -> None:
    SqlStore(f"sqlite:///{folder}/store.db")
    SqlStore("postgresql://nobody@127.0.0.1:1/nothing")
    assert not folder.exists()


def test_check_opens_and_leaves_nothing_open(url: str, folder: Path, open_store: Open) -> None:
    store = open_store(url)
    assert store.check().endswith("schema 2: ok")
    assert [path.name for path in folder.glob("*")] in ([], ["store.db"]), "no -wal, no -shm"
    run(store, "t1")
    assert store.check().endswith("ok")


def test_workers_that_start_together_make_one_schema(url: str, open_store: Open) -> None:
    stores = [open_store(url) for _ in range(8)]
    at_once(8, lambda n: stores[n].finish(*turn(stores[n], n)))
    generations = [row.version for row in stores[0].sessions("acme", "", before=None, limit=9)]
    assert len(set(generations)) == 8


def test_a_schema_from_the_future_is_refused(url: str, open_store: Open) -> None:
    store = open_store(url)
    run(store, "t1")
    store.close()
    with raw(url) as connection:
        connection.execute(sa.text("UPDATE agentao_meta SET value = 99 WHERE name = 'schema'"))
    for ask in (store.check, lambda: store.session(KEY)):
        with pytest.raises(RuntimeError, match="schema 99.*install the agentao-web that wrote it"):
            ask()


def test_an_older_schema_becomes_ours(url: str, open_store: Open) -> None:
    """Also with four workers that open it at the same moment."""
    store = open_store(url)
    run(store, "t1")
    store.close()
    with raw(url) as connection:
        connection.execute(sa.text("ALTER TABLE agentao_sessions DROP COLUMN agent"))
        connection.execute(sa.text("UPDATE agentao_meta SET value = 1 WHERE name = 'schema'"))
    stores = [open_store(url) for _ in range(4)]
    at_once(4, lambda n: stores[n].session(KEY))
    assert stores[0].check().endswith("schema 2: ok")
    assert len(stores[0].history(KEY).messages) == 2
    run(stores[0], "t2")


def test_workers_of_the_first_version_and_ours_take_each_other_for_alive(
    url: str, open_store: Open
) -> None:
    """Those compare a beat with the clock; ours look whether it changes."""
    store = open_store(url)
    for _ in range(3):
        store.beat("ours")
    assert abs(store.beats()["ours"] - store.clock()) < PATIENCE
    insert = sa.text("INSERT INTO agentao_workers (id, beat) VALUES ('theirs', :now)")
    again = sa.text("UPDATE agentao_workers SET beat = beat + 3 WHERE id = 'theirs'")
    with raw(url) as connection:
        connection.execute(insert, {"now": store.clock()})
    before = store.beats()
    with raw(url) as connection:
        connection.execute(again)
    after = store.beats()
    assert after["theirs"] > before["theirs"] and after["ours"] == before["ours"]


@pytest.mark.parametrize(
    "bad", ["sqlite://", "sqlite:///:memory:", "mysql://u:hunter2@h/db", "hunter2"]
)
def test_a_url_that_is_no_store_is_refused_with_the_cure(bad: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        SqlStore(bad)
    assert "hunter2" not in str(refused.value)


def test_a_database_has_other_tables_too(url: str, open_store: Open) -> None:
    """A host may give us its own database."""
    if url.startswith("sqlite"):
        open_store(url).check()
    with raw(url) as connection:
        for name in ("sessions", "events", "turns"):
            connection.execute(sa.text(f"CREATE TABLE {name} (id text)"))
    run(open_store(url), "t1")


def test_delete_leaves_no_row_behind(url: str, open_store: Open) -> None:
    store = open_store(url)
    held = claim(store, "t1", use=USE)
    store.finish(held, ending(held, 2))
    claim(store, "t2")
    enqueue(store, "t3")
    store.signal(KEY, "cancelled_by_user", but="")
    remove(store, KEY)
    with raw(url) as connection:
        for table in tables.metadata.sorted_tables:
            count = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            assert count == (2 if table is tables.meta else 0), table.name


# -- forks -------------------------------------------------------------------------------------

_FORK = """
store = SqlStore(sys.argv[1])
run(store, "t0")
pids = []
for n in range(3):
    if (pid := os.fork()) == 0:
        for i in range(20):
            run(store, f"t{n}-{i}", SessionKey("acme", "ann", f"s{n}"))
        store.close()
        os._exit(0)
    pids.append(pid)
for i in range(20):
    run(store, f"t{i}-")
codes = [os.waitpid(pid, 0)[1] for pid in pids]
store.close()
print(codes)
"""


@pytest.mark.filterwarnings("default")
def test_a_fork_opens_its_own_connections(url: str, open_store: Open) -> None:
    process = child(_FORK, url)
    assert process.communicate(timeout=PATIENCE)[0] == "[0, 0, 0]\n"
    rows = open_store(url).sessions("acme", "ann", before=None, limit=9)
    assert sorted(row.turns for row in rows) == [20, 20, 20, 21]
    assert open_store(url).check().endswith("ok")


# -- files -------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_for_their_owner_only(folder: Path, open_store: Open) -> None:
    before = os.umask(0)
    try:
        run(open_store(f"sqlite:///{folder}/store.db"), "t1")
        names = {"store.db", "store.db-wal", "store.db-shm"}
        assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(names, 0o600)
        assert mode(folder) == 0o700
    finally:
        os.umask(before)


def test_a_folder_of_the_operator_keeps_its_mode(folder: Path, open_store: Open) -> None:
    folder.mkdir(mode=0o750)
    run(open_store(f"sqlite:///{folder}/store.db"), "t1")
    assert mode(folder) == 0o750


def test_a_path_may_have_any_character(folder: Path, open_store: Open) -> None:
    odd = folder / "a b?c#d%20e'ü" / "store.db"
    run(open_store(odd), "t1")
    assert odd.exists()


def test_a_folder_that_vanished_is_not_written_elsewhere(
    folder: Path, open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite would write on into a file nobody finds again."""
    store = open_store(f"sqlite:///{folder}/store.db")
    held = claim(store, "t1")
    folder.rename(folder.with_name("away"))
    for ask in (
        lambda: append(store, held, [text(held, 2, "secret")]),
        lambda: store.finish(held, ending(held, 3)),
        lambda: store.session(KEY),
        lambda: claim(store, "t2"),
    ):
        with pytest.raises(StoreUnavailable):
            ask()
    assert not folder.exists(), "no empty database in its place"
    assert {record.getMessage() for record in caplog.records} == {
        "the store is unavailable: FileNotFoundError"
    }
    folder.with_name("away").rename(folder)
    store.finish(held, ending(held, 2))
    assert [e.type for e in log(store)] == ["turn_begin", "done"]


def test_a_backup_put_in_place_is_what_is_read(
    folder: Path, tmp_path: Path, open_store: Open
) -> None:
    store = open_store(f"sqlite:///{folder}/store.db")
    run(store, "t1")
    store.backup(tmp_path / "backup.db")
    assert mode(tmp_path / "backup.db") == 0o600
    run(store, "t2")
    for name in ("store.db-wal", "store.db-shm"):
        (folder / name).unlink()
    (tmp_path / "backup.db").rename(folder / "store.db")
    session = store.session(KEY)
    assert session is not None and session.turns == 1
    run(store, "t3")


def test_another_writer_is_waited_for_only_so_long(
    folder: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY", 0.1)
    store = open_store(f"sqlite:///{folder}/store.db")
    held = claim(store, "t1")
    with contextlib.closing(sqlite3.connect(folder / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for ask in (lambda: append(store, held, []), lambda: claim(store, "t2")):
            with pytest.raises(StoreUnavailable):
                ask()
        assert store.session(KEY) is not None, "readers do not wait"
        other.execute("ROLLBACK")
    store.finish(held, ending(held, 2))


_READ_ONLY = """
import pwd
folder, other = Path(sys.argv[1]), Path(sys.argv[2])
store = SqlStore(f"sqlite:///{other}/store.db")
run(store, "t0")  # So that all that is imported late has been.
store.close()
if os.geteuid() == 0:
    who = pwd.getpwnam("nobody")
    os.chown(folder, who.pw_uid, who.pw_gid)
    os.setgroups([]), os.setgid(who.pw_gid), os.setuid(who.pw_uid)
data = folder / "data"
store = SqlStore(f"sqlite:///{data}/store.db")
run(store, "t1")
for forbid in ((data / "store.db", 0o400), (data, 0o500)):
    forbid[0].chmod(forbid[1])
store.close()
try:
    run(store, "t2")
except StoreUnavailable:
    print("unavailable")
for path in (data, data / "store.db"):
    path.chmod(0o700)
run(store, "t3")
store.close()
"""


def test_a_read_only_folder_is_unavailable_until_it_is_writable(tmp_path: Path) -> None:
    """As somebody else than root, whom no mode stops."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        process = child(_READ_ONLY, name, str(tmp_path))
        assert process.communicate(timeout=PATIENCE)[0] == "unavailable\n"
        assert process.returncode == 0


_FULL = """
import resource
store = SqlStore(sys.argv[1])
run(store, "t0")
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
done = 0
try:
    while True:
        run(store, f"t{done + 1}", appended=[{"content": "x" * 20_000}])
        done += 1
except StoreUnavailable:
    print("unavailable")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
orphans = store.orphans(())
for orphan in orphans:
    held = store.take_over(orphan, "w")
    store.finish(held, ending(held, 2, appended=[]))
run(store, "after", appended=[])
print(len(store.history(KEY).messages) == done + 2, store.check())
store.close()
"""


def test_a_full_disk_is_unavailable_until_there_is_room(folder: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    process = child(_FULL, f"sqlite:///{folder}/store.db")
    printed = process.communicate(timeout=PATIENCE)[0]
    assert printed == "unavailable\nTrue sqlite, schema 2: ok\n"


def test_a_damaged_file_is_said_to_be_one(folder: Path, open_store: Open) -> None:
    store = open_store(f"sqlite:///{folder}/store.db")
    for n in range(50):
        run(store, f"t{n}", appended=[{"content": "x" * 3000}])
    store.close()
    with open(folder / "store.db", "r+b") as file:
        file.seek(20 * 4096)
        file.write(b"\xff" * 4096 * 3)
    with pytest.raises((RuntimeError, StoreUnavailable)):
        store.check()


# -- crashes and copies ------------------------------------------------------------------------

_WRITES = """
store = SqlStore(sys.argv[1], log_bytes=50_000)
for n in range(int(sys.argv[2]), 10**6):
    for orphan in store.orphans(()):
        held = store.take_over(orphan, "w")
        store.finish(held, ending(held, 2, transcript=[], appended=[]))
    held = claim(store, f"t{n}")
    append(store, held, [text(held, i, "x" * 200) for i in range(2, 12)])
    append(store, held, [text(held, i, "x" * 200) for i in range(12, 22)])
    store.finish(held, ending(held, 22))
    print(n, flush=True)
"""


def is_whole(store: SqlStore, told: int) -> None:
    """Whole turns only, and every one somebody was told about."""
    history = store.history(KEY).messages
    transcript = store.transcript(KEY, before=None, after=0, limit=10**6).messages
    assert [m["id"] for m in transcript] == list(range(1, len(transcript) + 1))
    assert len(history) == len(transcript) >= 2 * told
    assert len(history) % 2 == 0
    session, events = store.session(KEY), log(store)
    assert session is not None and session.head == events[-1].seq
    seqs = [t.cast(int, e.seq) for e in events]
    assert seqs == sorted(set(seqs))
    kinds = [e.type for e in events if e.type in ("turn_begin", "done")]
    if kinds and kinds[0] == "done":
        kinds = kinds[1:]
    assert kinds[::2] == ["turn_begin"] * len(kinds[::2])
    assert store.check().endswith("ok")


def test_kill_9_in_the_middle_of_writes_leaves_whole_turns(url: str, open_store: Open) -> None:
    told = 0
    for n in range(4):
        process = child(_WRITES, url, str(n * 10**5))
        assert process.stdout is not None
        for _ in range(15):
            process.stdout.readline()
        # Wherever it is now.
        process.kill()
        rest, _ = process.communicate(timeout=PATIENCE)
        told += 15 + len(rest.splitlines())
        store = open_store(url)
        is_whole(store, told)
        store.close()


def test_a_copy_taken_while_it_runs_opens(folder: Path, tmp_path: Path, open_store: Open) -> None:
    """`backup` does it in one step; file by file it needs a reader that holds the -wal."""
    url = f"sqlite:///{folder}/store.db"
    store = open_store(url, log_bytes=50_000)
    run(store, "first")
    stop, written = threading.Event(), [1]

    def write() -> None:
        while not stop.is_set():
            held = claim(store, f"t{written[0]}")
            append(store, held, [text(held, i, "x" * 200) for i in range(2, 22)])
            store.finish(held, ending(held, 22))
            written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for n in range(10):
            copy = tmp_path / f"copy{n}"
            copy.mkdir()
            at_least = written[0]
            if n % 2:
                store.backup(copy / "store.db")
            else:
                _copy_files(folder, copy)
            is_whole(open_store(f"sqlite:///{copy}/store.db"), at_least)
            until = time.monotonic() + PATIENCE
            while written[0] < at_least + 5:
                assert writer.is_alive() and time.monotonic() < until
                time.sleep(0.005)
    finally:
        stop.set()
        writer.join(PATIENCE)


def _copy_files(folder: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "store.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM agentao_meta").fetchall()
        for name in ("store.db", "store.db-wal"):
            shutil.copyfile(folder / name, copy / name)
        reader.execute("ROLLBACK")


# -- PostgreSQL --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_a_server_that_went_away_is_unavailable_until_it_is_back(
    postgres_server: PostgresServer,
    postgres_url: str,
    open_store: Open,
    how: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = open_store(postgres_url)
    held = claim(store, "t1")
    asks: list[cabc.Callable[[], object]] = [
        lambda: append(store, held, [text(held, 2, "secret")]),
        lambda: store.session(KEY),
    ]
    postgres_server.stop(how)
    try:
        for ask in asks:
            with pytest.raises(StoreUnavailable) as told:
                ask()
            assert told.value.__cause__ is None
    finally:
        postgres_server.start()
    assert {record.getMessage() for record in caplog.records} == {
        "the store is unavailable: OperationalError"
    }
    store.finish(held, ending(held, 2))
    assert [e.type for e in log(store)] == ["turn_begin", "done"]


def test_connections_the_server_ended_are_not_noticed(
    postgres_server: PostgresServer, postgres_url: str, open_store: Open
) -> None:
    store = open_store(postgres_url)
    run(store, "t1")
    postgres_server.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test%'"
    )
    run(store, "t2")


def test_what_stands_in_the_way_is_waited_for_only_so_long(
    postgres_url: str, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_POSTGRES_TIMEOUTS", "SET lock_timeout = '100ms'")
    store = open_store(postgres_url)
    held = claim(store, "t1")
    with raw(postgres_url) as connection:
        connection.execute(sa.text("SELECT * FROM agentao_sessions FOR UPDATE"))
        with pytest.raises(StoreUnavailable):
            append(store, held, [])
    store.finish(held, ending(held, 2))


def test_a_backup_of_postgresql_is_pg_dumps(
    postgres_url: str, open_store: Open, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="pg_dump"):
        open_store(postgres_url).backup(tmp_path / "x")


# -- cost --------------------------------------------------------------------------------------


def test_no_statement_of_a_turn_reads_a_whole_table(folder: Path, open_store: Open) -> None:
    """Nothing a turn does may cost more in its session's five hundredth turn than in its first."""
    url = f"sqlite:///{folder}/store.db"
    store = open_store(url, log_bytes=3000)
    seen: dict[str, t.Any] = {}

    def note(*args: t.Any) -> None:
        seen[args[2]] = args[3][0] if args[5] else args[3]

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for n in range(3):
            held = claim(store, f"t{n}", use=USE if n == 0 else None)
            enqueue(store, f"q{n}")
            store.end_queued(KEY, f"q{n}", Draft("done", {}), 1.0)
            append(store, held, [text(held, i, "x" * 300) for i in range(2, 20)])
            store.finish(held, ending(held, 20))
            log(store, held.head)
            store.sessions("acme", "ann", before=(9.0, "x"), limit=5)
            store.heads([KEY, SessionKey("acme", "ann", "y")])
            store.doomed()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as connection:
        for statement, values in seen.items():
            if not statement.startswith(("SELECT", "UPDATE", "DELETE")):
                continue
            plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
            scans = [row[3] for row in plan if row[3].startswith("SCAN agentao_")]
            assert not scans, f"{statement}: {scans}"


def test_a_batch_is_few_rows_and_none_of_them_long(url: str, open_store: Open) -> None:
    store = open_store(url)
    held = claim(store, "t1")
    append(store, held, [text(held, n, "a token") for n in range(2, 502)])
    append(store, held, [text(held, n, "x" * 10_000) for n in range(502, 512)])
    with raw(url) as connection:
        sizes = connection.execute(sa.text("SELECT size FROM agentao_events")).scalars().all()
    assert len(sizes) < 20
    assert max(sizes) < 50_000
    assert len(log(store)) == 511


def test_a_late_turn_costs_no_more_than_an_early_one(folder: Path, open_store: Open) -> None:
    """In steps of SQLite's machine, which no other load on this computer changes."""
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.set_progress_handler(count, 10)

    sa.event.listen(sa.Pool, "connect", connected)
    try:
        store = open_store(f"sqlite:///{folder}/store.db", log_bytes=100_000)
        costs = []
        for n in range(60):
            before = steps[0]
            held = claim(store, f"t{n}")
            append(store, held, [text(held, i, "x" * 50) for i in range(2, 52)])
            store.finish(held, ending(held, 52))
            costs.append(steps[0] - before)
    finally:
        sa.event.remove(sa.Pool, "connect", connected)
    assert len(log(store)) < 1000, "it was pruned for some time"
    # Twice, because by now each turn also deletes as much as it writes.
    assert max(costs[-5:]) <= 2 * costs[4] + costs[4] // 2, costs
