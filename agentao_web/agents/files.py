"""The only files an agent can reach: those of its own workspace.

Knows paths, limits and names nobody may write; must never know tools, agents or HTTP.

Different from agentao's LocalFileSystem on purpose (and no subclass of it: for that class the
search tool runs git and rg on the disk, past every check here):

1. A path is resolved first, then walked from the root with one O_NOFOLLOW open per name, so a
   link put there in between leads nowhere.
2. Only regular files are read or replaced, each up to a limit; walks end at a limit too.
3. No error names a path of the server, only names inside the workspace.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import contextvars
import errno
import fnmatch
import io
import os
import re
import secrets
import stat
import time
import typing as t
import unicodedata
from pathlib import Path

import regex
from agentao.capabilities.filesystem import FileEntry
from agentao.capabilities.filesystem import FileStat

from .quota import Quota
from .quota import Usage

MAX_FILE = 10 * 1024 * 1024
#: A list of Python strings is many times its file: ten million empty lines are 500 MB.
MAX_LINES = 250_000
MAX_ENTRIES = 20_000
MAX_WALK = 2.0
MAX_PATTERN = 1024
MAX_DEPTH = 32

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_HIDDEN = ".agentao"
#: What a file system that folds case may pass over: ext4 does (Default_Ignorable_Code_Point).
_UNSEEN = regex.compile(r"[\p{DI}\p{Cf}\p{Cc}]+")
#: Controls, marks of direction and what is invisible; and the start of "<U+".
_UNSAFE = regex.compile(r"(?![\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]|<(?=U\+)")
_MOVED = (
    "this path leads to another file than when it was approved, so nothing was written. "
    "Ask again if it is still wanted"
)
#: The file that was approved to be written by the present call, if that was asked.
_approved: contextvars.ContextVar[str | None] = contextvars.ContextVar("approved", default=None)
_OUTSIDE = "that path is outside the workspace"

Clock = cabc.Callable[[], float]
#: The real path that was approved for a call of a tool, by its name and arguments.
Approved = cabc.Callable[[str, dict[str, t.Any]], "str | None"]


def unasked(tool: str, given: dict[str, t.Any]) -> None:
    """Nobody was asked: the policy lets it run."""


@contextlib.contextmanager
def bound_to(target: str | None) -> cabc.Iterator[None]:
    """Inside, nothing but the file *target*, a real path, is written; anything if it is None."""
    before = _approved.set(target)
    try:
        yield
    finally:
        _approved.reset(before)


class BudgetSpent(Exception):
    """One tool call has read or waited as much as it may.

    Not an OSError: the search tool takes those for one unreadable file and goes on.
    """


class Budget:
    """What one tool call may still spend on files, in seconds and bytes."""

    def __init__(self, seconds: float, size: int, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._ends = clock() + seconds
        self._left = size

    def spend(self, size: int = 0) -> None:
        self._left -= size
        if self._left < 0:
            raise BudgetSpent("too much to read in one call: name a narrower directory or pattern")
        if self._clock() > self._ends:
            raise BudgetSpent("this took too long: name a narrower directory or pattern")


class ConfinedFS:
    """agentao's FileSystem for one workspace; everything else is refused.

    A path outside raises PermissionError whether or not it exists; `.agentao` is not there.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_file: int = MAX_FILE,
        max_entries: int = MAX_ENTRIES,
        max_walk: float = MAX_WALK,
        clock: Clock = time.monotonic,
        budget: Budget | None = None,
        quota: Quota | None = None,
    ) -> None:
        if not root.is_absolute():
            raise ValueError("a workspace is an absolute path: pass Path(...).resolve()")
        self._root = os.path.realpath(root)
        self._given = os.path.normpath(root)
        self._max_file = max_file
        self._max_entries = max_entries
        self._max_walk = max_walk
        self._clock = clock
        self._budget = budget
        self._quota = quota

    def within(self, seconds: float, size: int) -> ConfinedFS:
        """The same workspace for one call that may take so long and read so much."""
        return ConfinedFS(
            Path(self._root),
            max_file=self._max_file,
            max_entries=self._max_entries,
            max_walk=min(self._max_walk, seconds),
            clock=self._clock,
            budget=Budget(seconds, size, self._clock),
            quota=self._quota,
        )

    # Reading

    def read_bytes(self, path: Path) -> bytes:
        with self._file(path) as file:
            data = file.read(self._max_file + 1)
            if len(data) > self._max_file:  # it grew since it was looked at
                raise _too_large(self._max_file)
            return data

    def read_partial(self, path: Path, n: int) -> bytes:
        with self._file(path, any_size=True) as file:
            return file.read(max(0, min(n, self._max_file)))

    def open_text(self, path: Path) -> cabc.Iterator[str]:
        with self._file(path) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
            left = self._max_file
            for number, line in enumerate(text):
                left -= len(line)
                if number >= MAX_LINES or left < 0:
                    raise OSError(f"more than {MAX_LINES:,} lines, or larger than the limit")
                if number % 1024 == 0:
                    self._spend()
                yield line

    @contextlib.contextmanager
    def _file(self, path: Path, *, any_size: bool = False) -> cabc.Iterator[io.BufferedReader]:
        names = self._visible(path)
        with _plainly(names), self._parent(names) as parent:
            if not names or not stat.S_ISREG(_lstat(names[-1], parent).st_mode):
                raise OSError("not a regular file")
            fd = os.open(names[-1], _READ, dir_fd=parent)
            with open(fd, "rb") as file:
                now = os.fstat(fd)
                # Looked at twice: opening a device can already do something, and between the
                # look and the open the name may have got another owner.
                if not stat.S_ISREG(now.st_mode):
                    raise OSError("not a regular file")
                if now.st_size > self._max_file and not any_size:
                    raise _too_large(self._max_file)
                self._spend(0 if any_size else now.st_size)
                yield file

    # Writing

    def write_text(self, path: Path, data: str, *, append: bool = False) -> None:
        names = self._writable(path)
        # From here on no link is followed.
        if _approved.get() not in (None, os.path.join(self._root, *names)):
            raise PermissionError(_MOVED)
        new = data.encode("utf-8")
        if append and self.exists(path):
            new = self.read_bytes(path) + new
        if len(new) > self._max_file:
            raise _too_large(self._max_file)
        with (
            _plainly(names),
            self._room(names, len(new)),
            self._parent(names, create=True) as parent,
        ):
            self._replace(names[-1], parent, new)

    def _room(self, names: tuple[str, ...], size: int) -> contextlib.AbstractContextManager[None]:
        if self._quota is None:
            return contextlib.nullcontext()
        return self._quota.room(lambda: self._more(names, size))

    def _more(self, names: tuple[str, ...], size: int) -> Usage:
        """What the workspace has more when *names* is a file of *size* bytes."""
        there = len(names)
        while there and not os.path.lexists(os.path.join(self._root, *names[:there])):
            there -= 1
        if there == len(names):
            with self._parent(names) as parent:
                size -= _lstat(names[-1], parent).st_size
        return Usage(size, len(names) - there)

    def _replace(self, name: str, parent: int, data: bytes) -> None:
        mode = _mode_to_keep(name, parent)
        temporary = f".{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, _CREATE, 0o600, dir_fd=parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                os.fchmod(fd, mode)
            os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise

    # Looking around

    def list_dir(self, path: Path) -> list[FileEntry]:
        names = self._visible(path)
        with _plainly(names):
            return [self._entry(names, found) for found in self._scan(names, _Walk(self))]

    def glob(self, base: Path, pattern: str, *, recursive: bool) -> list[Path]:
        """Paths under *base*, as given, that match; a trailing `**` takes files too."""
        steps = _steps(pattern, recursive)
        start = self._visible(base)
        with _plainly(start):
            return [base.joinpath(*names) for names in self._matches(start, steps)]

    def stat(self, path: Path) -> FileStat:
        names = self._visible(path)
        with _plainly(names):
            info = self._info(names)
        return FileStat(
            size=info.st_size,
            mtime=info.st_mtime,
            is_dir=stat.S_ISDIR(info.st_mode),
            is_file=stat.S_ISREG(info.st_mode),
        )

    def exists(self, path: Path) -> bool:
        return self._kind(path) is not None

    def is_dir(self, path: Path) -> bool:
        return self._kind(path) == stat.S_IFDIR

    def is_file(self, path: Path) -> bool:
        return self._kind(path) == stat.S_IFREG

    def _kind(self, path: Path) -> int | None:
        names = self._inside(path)
        if _is_hidden(names):
            return None
        try:
            return stat.S_IFMT(self._info(names).st_mode)
        except OSError:
            return None

    def _info(self, names: tuple[str, ...]) -> os.stat_result:
        with self._parent(names) as parent:
            info = _lstat(names[-1], parent) if names else os.fstat(parent)
        if stat.S_ISLNK(info.st_mode):  # a real path ends in none, unless in a circle
            raise FileNotFoundError(os.strerror(errno.ELOOP))
        return info

    def _entry(self, names: tuple[str, ...], found: os.DirEntry[str]) -> FileEntry:
        is_dir = is_file = False
        size = 0
        # A link that leads out, or nowhere, is shown as a name and no more.
        with contextlib.suppress(OSError):
            info = self.stat(Path(self._root, *names, found.name))
            is_dir, is_file = info.is_dir, info.is_file
            size = info.size if is_file else 0
        return FileEntry(name=_readable(found.name), is_dir=is_dir, is_file=is_file, size=size)

    def _matches(
        self, start: tuple[str, ...], steps: list[_Step]
    ) -> cabc.Iterator[tuple[str, ...]]:
        walk = _Walk(self)
        todo: list[tuple[tuple[str, ...], frozenset[int]]] = [((), _closure({0}, steps))]
        while todo:
            below, states = todo.pop()
            for found in self._scan(start + below, walk):
                names = (*below, found.name)
                after = _advance(found.name, states, steps)
                if not after or _readable(found.name) != found.name:
                    continue
                if len(steps) in after and self._may_return(start + names, found):
                    yield names
                if found.is_dir(follow_symlinks=False):
                    todo.append((names, after))

    def _may_return(self, names: tuple[str, ...], found: os.DirEntry[str]) -> bool:
        """The tools ask about every path they get; one that leads out would end the call."""
        if not found.is_symlink():
            return True
        try:
            return self.is_file(Path(self._root, *names))
        except PermissionError:
            return False

    def _scan(self, names: tuple[str, ...], walk: _Walk) -> list[os.DirEntry[str]]:
        with self._directory(names) as fd, os.scandir(fd) as entries:
            found = []
            for entry in entries:
                walk.step()
                if not _is_hidden((*names, entry.name)):
                    found.append(entry)
            # Looked up now: an entry of a scanned descriptor can ask nothing once it is closed.
            for entry in found:
                with contextlib.suppress(OSError):
                    entry.is_dir(follow_symlinks=False)
        return sorted(found, key=lambda entry: entry.name)

    # Paths

    def _inside(self, path: Path) -> tuple[str, ...]:
        """The real names below the root that *path* stands for."""
        if not path.is_absolute():
            raise PermissionError(_OUTSIDE)
        try:
            return _below(self._root, os.path.realpath(path))
        except ValueError:  # a NUL, or text that is no file name
            raise PermissionError(_OUTSIDE) from None

    def _visible(self, path: Path) -> tuple[str, ...]:
        names = self._inside(path)
        if _is_hidden(names):
            # The words a missing file gets.
            text = os.strerror(errno.ENOENT)
            raise FileNotFoundError(f"{text}: {_readable('/'.join(names))}")
        return names

    def _writable(self, path: Path) -> tuple[str, ...]:
        names = self._inside(path)
        # Both the name that was asked for and the one a link makes of it.
        for asked in (names, self._lexical(path)):
            if protected(asked):
                raise PermissionError(f"writing here is not allowed: {_readable('/'.join(asked))}")
        if not names or len(names) > MAX_DEPTH:
            raise PermissionError(f"not a file name, or more than {MAX_DEPTH} folders deep")
        return names

    def _lexical(self, path: Path) -> tuple[str, ...]:
        plain = os.path.normpath(path)
        for root in (self._root, self._given):
            with contextlib.suppress(PermissionError):
                return _below(root, plain)
        return ()

    @contextlib.contextmanager
    def _parent(self, names: tuple[str, ...], *, create: bool = False) -> cabc.Iterator[int]:
        with self._directory(names[:-1], create=create) as fd:
            yield fd

    @contextlib.contextmanager
    def _directory(self, names: tuple[str, ...], *, create: bool = False) -> cabc.Iterator[int]:
        fd = os.open(self._root, _DIRECTORY)
        try:
            for name in names:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                inner = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _spend(self, size: int = 0) -> None:
        if self._budget is not None:
            self._budget.spend(size)


class _Walk:
    """How far one walk may still go."""

    def __init__(self, files: ConfinedFS) -> None:
        self._clock = files._clock
        self._ends = files._clock() + files._max_walk
        self._most = files._max_entries
        self._seen = 0

    def step(self) -> None:
        self._seen += 1
        if self._seen > self._most:
            raise OSError(f"more than {self._most:,} files: name a narrower directory or pattern")
        if self._seen % 64 == 1 and self._clock() > self._ends:
            raise OSError("too many files to look at in time: name a narrower directory")


def protected(names: cabc.Sequence[str]) -> bool:
    """Whether no tool may write there: what configures agents, git or the server."""
    folded = [_fold(name) for name in names]
    if not folded:
        return False
    if any(name in (_HIDDEN, ".git") or name.startswith(".env") for name in folded):
        return True
    return folded[0] == "skills" or folded[-1] in ("agentao.md", "agents.md")


def _fold(name: str) -> str:
    """One spelling for all that some file system or reader takes for the same name."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    seen = _UNSEEN.sub("", plain)
    return unicodedata.normalize("NFKC", seen).strip().rstrip(".")


def _is_hidden(names: tuple[str, ...]) -> bool:
    return bool(names) and _fold(names[0]) == _HIDDEN


def _below(root: str, path: str) -> tuple[str, ...]:
    if path == root:
        return ()
    prefix = root.rstrip("/") + "/"
    if not path.startswith(prefix):
        raise PermissionError(_OUTSIDE)
    return tuple(path[len(prefix) :].split("/"))


def _readable(name: str) -> str:
    """*name* as one piece of one line: what is no visible character in it as ``<U+000A>``.

    A line break would let a name speak to the model as a line of its own. Undecodable bytes would
    be lone surrogates: no JSON, no UTF-8. Of all others no two look the same.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return _UNSAFE.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def _lstat(name: str, parent: int) -> os.stat_result:
    return os.stat(name, dir_fd=parent, follow_symlinks=False)


def _mode_to_keep(name: str, parent: int) -> int:
    try:
        old = _lstat(name, parent)
    except FileNotFoundError:
        return 0o600
    if not stat.S_ISREG(old.st_mode):
        raise OSError("not a regular file")
    if not old.st_mode & 0o222:
        raise PermissionError("the file is read-only")
    return stat.S_IMODE(old.st_mode) & 0o777


def _too_large(limit: int) -> OSError:
    return OSError(f"larger than the limit of {limit:,} bytes")


@contextlib.contextmanager
def _plainly(names: tuple[str, ...]) -> cabc.Iterator[None]:
    """OSError's own text holds the path it was given: say which file of the workspace instead."""
    try:
        yield
    except OSError as error:
        path = "/".join(names)
        shown = _readable(path) or "."
        text = error.strerror or str(error)
        if isinstance(error, FileNotFoundError) and "<U+" in path:
            text = "A name that is shown with <U+…> cannot be used by tools: rename the file"
        raise type(error)(f"{text}: {shown}") from None


# Patterns. A set of positions is carried along each path, so that no number of `**` makes the
# walk try a name twice.

_Step = cabc.Callable[[str], object] | None  # None is `**`


def _steps(pattern: str, recursive: bool) -> list[_Step]:
    if len(pattern) > MAX_PATTERN or "\0" in pattern:
        raise ValueError("the pattern is too long or holds a NUL")
    parts = pattern.split("/")
    if pattern.startswith("/") or ".." in parts:
        raise ValueError("a pattern is relative and has no '..' in it")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts or len(parts) > MAX_DEPTH:
        raise ValueError(f"a pattern has 1 to {MAX_DEPTH} parts")
    return [_step(part) for part in (["**", *parts] if recursive else parts)]


def _step(part: str) -> _Step:
    return None if part == "**" else re.compile(fnmatch.translate(part)).match


def _closure(states: set[int], steps: list[_Step]) -> frozenset[int]:
    for position in range(len(steps)):
        if position in states and steps[position] is None:
            states.add(position + 1)
    return frozenset(states)


def _advance(name: str, states: frozenset[int], steps: list[_Step]) -> frozenset[int]:
    after = set()
    for position in states:
        if position == len(steps):
            continue
        step = steps[position]
        if step is None:
            after.add(position)
        elif step(name):
            after.add(position + 1)
    return _closure(after, steps)
