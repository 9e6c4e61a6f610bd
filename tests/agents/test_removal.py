"""A folder is removed whatever an agent made in it, and nothing outside of it is touched."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agentao_web.agents import removal
from agentao_web.agents.removal import remove_folder
from agentao_web.agents.workspaces import Workspaces
from agentao_web.core.names import SessionKey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workspace, beside something that must stay."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    made = tmp_path / "workspace"
    made.mkdir()
    return made


def nested(folder: Path, depth: int, name: str = "d") -> int:
    """Folders within folders, made one by one: no path is that long. The last one's descriptor."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


def assert_gone(folder: Path) -> None:
    assert not os.path.lexists(folder)
    assert (folder.parent / "kept" / "file").read_text() == "kept"


@pytest.mark.parametrize("depth", [1500, 5000])
def test_any_depth_is_removed(folder: Path, depth: int) -> None:
    fd = nested(folder, depth)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    remove_folder(folder)
    assert_gone(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_are_removed_and_not_what_they_lead_to(folder: Path) -> None:
    kept = folder.parent / "kept"
    (folder / "a").mkdir()
    for place in (folder, folder / "a"):
        (place / "to-a-folder").symlink_to(kept)
        (place / "to-a-file").symlink_to(kept / "file")
        (place / "to-nothing").symlink_to("nowhere")
        (place / "to-itself").symlink_to("to-itself")
        (place / "upwards").symlink_to("..")
        os.link(kept / "file", place / "hard")
        os.mkfifo(place / "pipe")
    remove_folder(folder)
    assert_gone(folder)


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400, 0o500, 0o600])
def test_a_folder_without_permissions_is_removed(folder: Path, mode: int) -> None:
    inner = folder / "a" / "b" / "c"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    for place in (inner, inner.parent, inner.parent.parent, folder):
        place.chmod(mode)
    remove_folder(folder)
    assert_gone(folder)


def test_names_that_are_no_text_are_removed(folder: Path) -> None:
    for name in (b"\xff\x80", b"\x80", "né\n".encode(), b"-rf", b" "):
        path = os.path.join(os.fsencode(folder), name)
        os.mkdir(path)
        with open(os.path.join(path, name), "wb"):
            pass
    remove_folder(folder)
    assert_gone(folder)


def test_what_is_not_there_needs_no_removal(folder: Path) -> None:
    remove_folder(folder / "nothing")
    remove_folder(folder / "nothing" / "below")


def test_a_link_in_the_place_of_the_folder_is_not_followed(folder: Path) -> None:
    link = folder / "link"
    link.symlink_to(folder.parent / "kept")
    remove_folder(link)
    assert (folder.parent / "kept" / "file").read_text() == "kept"


def test_a_folder_swapped_for_a_link_meanwhile_leads_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment: it was just found to be a folder."""
    (folder / "a" / "inner").mkdir(parents=True)
    unlinked = removal._unlinked

    def swap(name: str, parent: int) -> bool:
        gone = unlinked(name, parent)
        if name == "inner":
            os.rmdir(name, dir_fd=parent)
            os.symlink(folder.parent / "kept", name, dir_fd=parent)
            monkeypatch.undo()
        return gone

    monkeypatch.setattr(removal, "_unlinked", swap)
    try:
        remove_folder(folder)
    except OSError:
        remove_folder(folder)  # As it is tried again later.
    assert_gone(folder)


def test_what_cannot_be_removed_does_not_keep_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "stuck", "z"):
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "file").write_text("x")
    unlink = os.unlink

    def refuse(name: str, *, dir_fd: int) -> None:
        if name == "file" and (folder / "stuck").stat().st_ino == os.fstat(dir_fd).st_ino:
            raise OSError(5, "Input/output error")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="Input/output"):
        remove_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["stuck"]
    monkeypatch.undo()
    remove_folder(folder)
    assert_gone(folder)


def test_a_session_of_any_depth_goes_with_its_folder_memory_and_count(tmp_path: Path) -> None:
    workspaces, key = Workspaces(tmp_path, "session"), SessionKey("acme", "ann", "s")
    folder = workspaces.make(key)
    os.close(nested(folder, 1500))
    memory = workspaces.memory(key)
    assert memory is not None
    memory.parent.mkdir(parents=True)
    memory.write_text("remembered")
    folder.with_name(f"{folder.name}.usage").write_text("[1, 1, 1]")
    workspaces.forget(key)
    left = [path for path in tmp_path.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    assert left == [] and not folder.exists()
