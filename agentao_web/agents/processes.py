"""What the processes of one command hold: their number, their memory, and files without a name.

Reads /proc and nothing else; must never know commands, agents or quotas. Memory that could hide
from a look at /proc is closed to a command by the sandbox (sandbox._filter).
"""

from __future__ import annotations

import contextlib
import os
import stat
import typing as t

#: Processes of one command, their threads together, and their memory together.
MAX_PROCESSES: t.Final = 256
MAX_THREADS: t.Final = 1024
MAX_MEMORY: t.Final = 4 * 2**30
#: What the kernel may keep for one socket (twice net.core.wmem_max), and for one file of a tmpfs.
SOCKET: t.Final = 416 * 2**10
INODE: t.Final = 2**10
#: Folders of a command that are memory: without a limit of their own for the number of files.
_TMPFS: t.Final = ("tmp", "dev/shm")


def too_much(pid: int) -> str | None:
    """Why the processes below *pid* are too many or hold too much, if that is so."""
    tree: dict[int, list[str]] = {}
    todo, threads = [pid], 0
    for one in todo:
        tree[one] = _tasks(one)
        threads += len(tree[one])
        todo += _children(one, tree[one])
        # The number first: while they multiply there is no time for more.
        if len(todo) > MAX_PROCESSES:
            return f"stopped: more than {MAX_PROCESSES} processes"
        if threads > MAX_THREADS:
            return f"stopped: more than {MAX_THREADS:,} threads"
    memory = sum(_resident(one, tasks) for one, tasks in tree.items())
    memory += INODE * _inodes(todo[-1])
    nameless: dict[tuple[int, int], int] = {}
    for one, tasks in tree.items():
        nameless.update(_nameless(one, tasks))
    if memory + sum(nameless.values()) > MAX_MEMORY:
        return f"stopped: more than {MAX_MEMORY:,} bytes of memory and of files without a name"
    return None


def hide_files(pid: int) -> bool:
    """Whether a process below *pid* keeps files that have no name and are open nowhere.

    They are on their way over a socket, or mapped. Nobody can see how large they are.
    """
    todo = [pid]
    for one in todo:
        tasks = _tasks(one)
        todo += _children(one, tasks)
        if len(todo) > MAX_PROCESSES:
            break
        if _maps_deleted(one) or _sends_files(one, tasks):
            return True
    return False


def first_to_go(pid: int) -> None:
    """Of all processes the kernel ends those below *pid* first if memory runs out."""
    todo = [pid]
    for one in todo:
        todo += _children(one, _tasks(one))
        with contextlib.suppress(OSError), open(f"/proc/{one}/oom_score_adj", "w") as score:
            score.write("1000")


def with_environment(wanted: bytes) -> list[int]:
    """Processes that were started with *wanted* in their environment, wherever they hid since."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                if wanted in environ.read(2**18).split(b"\0"):
                    found.append(int(name))
    return found


def _tasks(pid: int) -> list[str]:
    """The threads of a process. Its first one may have ended, and then shows nothing any more."""
    with contextlib.suppress(OSError):
        return os.listdir(f"/proc/{pid}/task")
    return []


def _children(pid: int, tasks: list[str]) -> list[int]:
    found: list[int] = []
    for task in tasks:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/task/{task}/children") as children,
        ):
            found += map(int, children.read().split())
    return found


def _resident(pid: int, tasks: list[str]) -> int:
    """They share it, so the first that says something says all."""
    for task in tasks:
        with (
            contextlib.suppress(OSError, IndexError),
            open(f"/proc/{pid}/task/{task}/statm") as statm,
        ):
            if pages := int(statm.read().split()[1]):
                return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _inodes(pid: int) -> int:
    """How many files there are in the memory that *pid* sees as folders."""
    found = 0
    for name in _TMPFS:
        with contextlib.suppress(OSError):
            # Outside of the sandbox this is the machine's own, which is not the command's.
            if os.stat(f"/proc/{pid}/root").st_dev != os.stat("/").st_dev:
                there = os.statvfs(f"/proc/{pid}/root/{name}")
                found += there.f_files - there.f_ffree
    return found


def _nameless(pid: int, tasks: list[str]) -> dict[tuple[int, int], int]:
    """Open files without a name, and sockets: no walk through folders would find them.

    Each thread is asked, as it can have open files of its own.
    """
    found = {}
    for task in tasks:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task/{task}/fd"):
                with contextlib.suppress(OSError):
                    info = os.stat(f"/proc/{pid}/task/{task}/fd/{name}")
                    if stat.S_ISSOCK(info.st_mode):
                        found[info.st_dev, info.st_ino] = SOCKET
                    elif stat.S_ISREG(info.st_mode) and info.st_nlink == 0:
                        found[info.st_dev, info.st_ino] = info.st_blocks * 512
    return found


def _maps_deleted(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
        return any(line.endswith("(deleted)\n") for line in maps)
    return False


def _sends_files(pid: int, tasks: list[str]) -> bool:
    """Whether open files are on their way in a socket of this process (Linux 5.11 and newer)."""
    for task in tasks:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task/{task}/fdinfo"):
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{pid}/task/{task}/fdinfo/{name}") as info,
                ):
                    for line in info:
                        if line.startswith("scm_fds:") and line.split()[1] != "0":
                            return True
    return False
