"""How much a workspace holds, and whether more fits: one count for all who write there.

Knows the files of one folder; must never know tools, agents or HTTP.

The count is kept in a file beside the workspace, where no agent reaches it, and its lock is what
sessions, threads and workers meet at. Tools that write through it keep it exact; what changed
behind it (a command, a person) is seen by looking at every file, at the latest after STALE.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import fcntl
import json
import os
import stat
import time
import typing as t
from pathlib import Path

#: Seconds after which a count is not believed any more.
STALE: t.Final = 60.0
#: Seconds to wait for one who is writing.
PATIENCE: t.Final = 10.0
#: Folders within folders; deeper ones make a workspace count as full.
MAX_DEPTH: t.Final = 64
#: What a file may take on the disk beyond its length: above that it was set aside on purpose.
_SLACK: t.Final = 2**20

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Usage(t.NamedTuple):
    """Bytes of all files, and how many files, folders and links."""

    size: int = 0
    files: int = 0


class WorkspaceFull(OSError):
    """There is no room for it."""


class Quota:
    """The limits of one workspace, the same for everybody who makes one for it."""

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        max_files: int,
        clock: cabc.Callable[[], float] = time.time,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_files = max_files
        self._root = root
        self._book = book_of(root)
        self._clock = clock

    @contextlib.contextmanager
    def room(self, more: cabc.Callable[[], Usage]) -> cabc.Iterator[None]:
        """Hold the room for *more* while it is written; WorkspaceFull if there is none.

        *more* is asked when nobody else writes.
        """
        with self._locked() as book:
            used, counted = _read(book)
            if not 0 <= self._clock() - counted <= STALE:
                used = self._count(book)
            size, files = more()
            then = Usage(used.size + size, used.files + files)
            if (size > 0 or files > 0) and self.complaint(then):
                # Files may be gone since.
                used = self._count(book)
                then = Usage(used.size + size, used.files + files)
                if complaint := self.complaint(then):
                    raise WorkspaceFull(complaint)
            yield
            _write(book, then, _read(book)[1])

    def measure(self) -> Usage:
        """Look at every file now."""
        with self._locked() as book:
            return self._count(book)

    def complaint(self, used: Usage) -> str | None:
        """What is too much about *used*, if anything."""
        if used.size > self.max_bytes:
            return f"the workspace is full: more than {self.max_bytes:,} bytes in all"
        if used.files > self.max_files:
            return f"the workspace is full: more than {self.max_files:,} files and folders"
        return None

    def _count(self, book: int) -> Usage:
        counted = self._clock()
        used = usage(self._root, most=2 * self.max_files)
        _write(book, used, counted)
        return used

    @contextlib.contextmanager
    def _locked(self) -> cabc.Iterator[int]:
        fd = os.open(self._book, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            until = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > until:
                    raise OSError("the workspace is busy, try again")
                time.sleep(0.005)  # Between two looks at what another process may hold.
            yield fd
        finally:
            os.close(fd)


def book_of(root: Path) -> Path:
    """The file that keeps the count of the workspace *root*."""
    return root.with_name(f"{root.name}.usage")


def usage(root: Path, *, most: int) -> Usage:
    """What is below *root*; counting ends soon after *most* names.

    A folder that cannot be looked into counts as *most* and one: nothing is hidden that way.
    """
    size = files = 0
    try:
        for info in _walk(opened(os.fspath(root)), MAX_DEPTH):
            files += 1
            if stat.S_ISREG(info.st_mode):
                taken = info.st_blocks * 512
                size += taken if taken > info.st_size + _SLACK else info.st_size
            if files > most:
                break
    except FileNotFoundError:
        return Usage()
    except OSError:
        files += most + 1
    return Usage(size, files)


def _walk(fd: int, depth: int) -> cabc.Iterator[os.stat_result]:
    """Everything below the folder *fd*, which is closed in the end. No link is followed."""
    try:
        if depth == 0:
            raise OSError("too deep")
        with os.scandir(fd) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    yield info
                    if stat.S_ISDIR(info.st_mode):
                        yield from _walk(opened(entry.name, fd), depth - 1)
    finally:
        os.close(fd)


def opened(name: str, parent: int | None = None) -> int:
    """The folder *name*, no link, as a descriptor; FileNotFoundError if it is none."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except NotADirectoryError:  # another one by now
        raise FileNotFoundError(name) from None
    except PermissionError:
        # It is ours, its owner only took away its own right to look: give it back. Only Linux can
        # do so without following a link that has come in its place.
        if not hasattr(os, "O_PATH"):
            raise
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        return os.open(name, _DIRECTORY, dir_fd=parent)


def _read(book: int) -> tuple[Usage, float]:
    """The count and when all was looked at; a book that says nothing is older than any."""
    try:
        size, files, counted = json.loads(os.pread(book, 200, 0))
        return Usage(int(size), int(files)), float(counted)
    except (ValueError, TypeError):
        return Usage(), float("-inf")


def _write(book: int, used: Usage, counted: float) -> None:
    text = json.dumps([max(0, used.size), max(0, used.files), counted]).encode()
    os.ftruncate(book, 0)
    os.pwrite(book, text, 0)
