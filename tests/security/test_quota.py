"""A workspace has so many bytes and files, whoever writes there and however."""

from __future__ import annotations

import collections.abc as cabc
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from agentao_web.agents import quota as quotas
from agentao_web.agents.files import ConfinedFS
from agentao_web.agents.quota import STALE
from agentao_web.agents.quota import Quota
from agentao_web.agents.quota import Usage
from agentao_web.agents.quota import WorkspaceFull
from agentao_web.agents.quota import book_of
from agentao_web.agents.quota import usage
from agentao_web.agents.workspaces import Workspaces
from agentao_web.core.names import SessionKey
from tests.patience import PATIENCE
from tests.security.test_shell import Web
from tests.security.test_shell import model
from tests.security.test_shell import web

__all__ = ["model", "web"]

BYTES, FILES = 10_000, 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


STILL = Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "ws"
    folder.mkdir()
    return folder


def files_of(root: Path, clock: Clock = STILL) -> ConfinedFS:
    return ConfinedFS(root, quota=Quota(root, max_bytes=BYTES, max_files=FILES, clock=clock))


# Through the file tools


def test_bytes_of_all_files_count_together(root: Path) -> None:
    files = files_of(root)
    files.write_text(root / "a", "x" * 6000)
    with pytest.raises(OSError, match="the workspace is full: more than 10,000 bytes.*: b"):
        files.write_text(root / "b", "x" * 6000)
    assert not (root / "b").exists()
    files.write_text(root / "b", "x" * 4000)
    with pytest.raises(OSError, match="full"):
        files.write_text(root / "b", "x", append=True)
    files.write_text(root / "a", "shorter")
    files.write_text(root / "b", "x", append=True)


def test_files_and_folders_count(root: Path) -> None:
    files = files_of(root)
    for number in range(9):
        files.write_text(root / f"folder{number}" / "file", "")
    with pytest.raises(OSError, match="the workspace is full: more than 20 files and folders"):
        files.write_text(root / "a" / "b" / "c", "")
    assert not (root / "a").exists()
    files.write_text(root / "a" / "b", "")
    files.write_text(root / "a" / "b", "again")
    assert usage(root, most=100) == Usage(5, 20)


def test_the_books_are_kept_without_looking_at_every_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    count = quotas.usage
    monkeypatch.setattr(quotas, "usage", lambda *a, **k: looks.append(1) or count(*a, **k))
    clock = Clock()
    for number in range(50):
        files_of(root, clock).write_text(root / "same", "x" * number)
    assert len(looks) == 1
    clock.now += STALE + 1
    files_of(root, clock).write_text(root / "same", "y")
    assert len(looks) == 2
    assert book_of(root).read_text().startswith("[1, 1, ")


def test_what_was_removed_behind_its_back_is_room_again(root: Path) -> None:
    files = files_of(root)
    files.write_text(root / "a", "x" * 9000)
    (root / "a").unlink()
    files.write_text(root / "b", "x" * 9000)


def test_what_came_behind_its_back_is_seen_in_the_end(root: Path) -> None:
    clock = Clock()
    files_of(root, clock).write_text(root / "a", "x")
    (root / "b").write_text("x" * 20_000)
    clock.now += STALE + 1
    with pytest.raises(OSError, match="full"):
        files_of(root, clock).write_text(root / "a", "xx")
    files_of(root, clock).write_text(root / "b", "")


def test_a_book_that_makes_no_sense_is_written_anew(root: Path) -> None:
    (root / "a").write_text("x" * 9000)
    for nonsense in (b"", b"[1", b"[]", b'["x", 1, 2]', b"\xff" * 300, b"[0, 0, 1e99]"):
        book_of(root).write_bytes(nonsense)
        with pytest.raises(OSError, match="full"):
            files_of(root).write_text(root / "b", "x" * 2000)


def _write_many(root: Path, name: str) -> None:
    files = ConfinedFS(root, quota=Quota(root, max_bytes=BYTES, max_files=FILES))
    for number in range(20):
        try:
            files.write_text(root / f"{name}-{number}", "x" * 900)
        except OSError as error:
            assert "full" in str(error)


def test_threads_and_workers_share_one_limit(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        *(context.Process(target=_write_many, args=(root, f"p{n}")) for n in range(2)),
        *(threading.Thread(target=_write_many, args=(root, f"t{n}")) for n in range(4)),
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE)
    assert [w.exitcode for w in writers if not isinstance(w, threading.Thread)] == [0, 0]
    found = usage(root, most=1000)
    assert 9000 <= found.size <= BYTES
    assert book_of(root).read_text().startswith(f"[{found.size}, {found.files}, ")


# What may be in a workspace


def test_links_are_not_followed_and_hidden_folders_count(root: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_text("x" * 50_000)
    (root / "link").symlink_to(tmp_path / "large")
    (root / "folder").symlink_to("/")
    (root / "circle").symlink_to(root)
    (root / ".agentao").mkdir()
    (root / ".agentao" / "file").write_text("12345")
    os.mkfifo(root / "pipe")
    assert usage(root, most=1000) == Usage(5, 6)


def test_a_folder_nobody_may_look_into_is_opened(root: Path) -> None:
    (root / "shut" / "inner").mkdir(parents=True)
    (root / "shut" / "inner" / "file").write_text("12345")
    (root / "shut" / "inner").chmod(0)
    (root / "shut").chmod(0)
    assert usage(root, most=1000) == Usage(5, 3)


def test_what_is_too_deep_to_count_is_too_much(root: Path) -> None:
    deep = root.joinpath(*["d"] * 80)
    deep.mkdir(parents=True)
    assert usage(root, most=1000).files > 1000


def test_a_sparse_file_counts_as_long_as_it_is(root: Path) -> None:
    with (root / "sparse").open("wb") as file:
        file.truncate(2**30)
    assert usage(root, most=1000) == Usage(2**30, 1)


def test_a_session_that_goes_takes_its_books_along(tmp_path: Path) -> None:
    spaces = Workspaces(tmp_path, "session")
    key = SessionKey("acme", "ann", "s")
    path = spaces.make(key)
    Quota(path, max_bytes=1, max_files=1).measure()
    (path / "shut" / "inner").mkdir(parents=True)
    (path / "shut").chmod(0)
    spaces.forget(key)
    assert not path.exists()
    assert not book_of(path).exists()


def test_one_who_waits_too_long_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "PATIENCE", 0.05)
    quota = Quota(root, max_bytes=BYTES, max_files=FILES)
    with quota.room(lambda: Usage(1, 1)), pytest.raises(OSError, match="busy"):
        quota.measure()
    with pytest.raises(WorkspaceFull), quota.room(lambda: Usage(BYTES + 1, 1)):
        pass


# Through the shell


def test_the_model_is_told_that_its_workspace_is_full(web: cabc.Callable[..., Web]) -> None:
    w = web(workspace_bytes=1000)
    told = w.use("write_file", file_path="a.txt", content="x" * 2000)
    assert "the workspace is full: more than 1,000 bytes" in told
    assert str(w.root) not in told


def test_a_huge_file_ends_at_the_limit(web: cabc.Callable[..., Web]) -> None:
    w = web(workspace_bytes=2**20)
    w.run("head -c 1G /dev/zero > huge; truncate -s 1G sparse; fallocate -n -l 1G set-aside")
    assert usage(w.workspace(), most=100).size <= 2**20 + 4096


def test_many_files_end_the_command(web: cabc.Callable[..., Web]) -> None:
    w = web(workspace_bytes=2**20)
    told = w.run("for n in $(seq 40); do head -c 100K /dev/zero > f$n; done; sleep 1000")
    assert "stopped: the workspace is full" in told
    assert "full" in w.use("write_file", file_path="a.txt", content="x")
    # A full one can be emptied, and nothing else.
    told = w.run("echo more > f41; rm f1; echo more >> f2")
    assert "the workspace is full" in told
    assert usage(w.workspace(), most=1000).size == 39 * 100 * 1024
    assert "full" not in w.run("rm f*")
    assert "fine" in w.run("echo fine > f; cat f")


def test_many_names_end_the_command_too(web: cabc.Callable[..., Web]) -> None:
    w = web(workspace_files=50)
    told = w.run("mkdir -p d; for n in $(seq 60); do ln -s x d/l$n; done; chmod 0 d; sleep 1000")
    assert "stopped: the workspace is full: more than 50 files" in told
    assert "fine" in w.run("rm -rf d; echo fine")
    w.run("for n in $(seq 200); do mkdir d$n; done")
    assert "Error starting command: the workspace is full" in w.run("echo no")


def test_a_file_without_a_name_is_seen(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.agents.processes.MAX_MEMORY", 100 * 2**20)
    w = web()
    told = w.run("exec 3> gone; rm gone; head -c 200M /dev/zero >&3; sleep 1000")
    assert "files without a name" in told
