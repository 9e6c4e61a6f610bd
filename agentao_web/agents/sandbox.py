"""The bubblewrap sandbox a command runs in, and whether it works on this machine.

Knows bwrap's arguments and the kernel's; must never know agents, tools or HTTP.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import typing as t
from pathlib import Path

#: Where a command finds its workspace.
INSIDE: t.Final = "/workspace"
#: Bounds of one process, and how many of them (threads count too, unless the server is root).
DATA: t.Final = 2 * 2**30
OPEN_FILES: t.Final = 1024
PROCESSES: t.Final = 512
#: Bytes of /tmp and of /dev/shm, which are memory.
SCRATCH: t.Final = 64 * 2**20

#: What programs need from /etc. Nothing in there is a secret.
_ETC: t.Final = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")
_ENVIRON: t.Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PAGER": "cat",
    "USER": "agent",
}
_PASSWD: t.Final = b"agent:x:1000:1000:agent:/tmp:/bin/sh\n"
#: Says on its input, a socket, that all is in place, and goes on when it is answered. A server that
#: is killed while a command starts never answers: the kernel would only see to what came later.
_GATE: t.Final = 'echo ready >&0; read -r go || exit 1; exec "$@" </dev/null'
GO: t.Final = b"go\n"
_CHECK_SECONDS: t.Final = 15.0
_SYSTEM: t.Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")

#: machine -> its audit number.
_AUDIT: t.Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ENOSYS, _EOPNOTSUPP, _EAFNOSUPPORT = 38, 95, 97
#: machine -> error -> the system calls a command does not get.
#: "Not supported" are those that set disk space aside behind the limits (fallocate; io_uring could
#: do it too), and doors into the kernel. Of those that are "not implemented" programs know how to
#: do without: SysV memory, queues and semaphores, memfds, and Landlock, whose rules keep a deleted
#: file. What they hold is in no process and no folder, so nothing here could count it.
_DENIED: t.Final[dict[str, dict[int, tuple[int, ...]]]] = {
    "x86_64": {
        _EOPNOTSUPP: (285, 425, 426, 427, 103, 248, 249, 250, 298, 321, 323),
        _ENOSYS: (29, 30, 31, 64, 66, 68, 71, 319, 447, 444, 445, 446),
    },
    "aarch64": {
        _EOPNOTSUPP: (47, 425, 426, 427, 116, 217, 218, 219, 241, 280, 282),
        _ENOSYS: (194, 195, 196, 190, 191, 186, 187, 279, 447, 444, 445, 446),
    },
}
#: machine -> mmap and socket, of which the arguments decide.
_LOOKED_AT: t.Final = {"x86_64": (9, 41), "aarch64": (222, 198)}
#: AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK: a network namespace holds these. AF_VSOCK for one
#: would reach the machine below a virtual one.
_FAMILIES: t.Final = (1, 2, 10, 16)
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32 = 0x40000000


class Launch(t.NamedTuple):
    """How to start one command: arguments, and descriptors it inherits."""

    argv: list[str]
    fds: tuple[int, ...]


@contextlib.contextmanager
def launch(workspace: Path, folder: str, command: str, *, file_size: int) -> t.Iterator[Launch]:
    """How to run *command* by the shell in *folder*, a path below *workspace*; "" for itself.

    No file it writes gets larger than *file_size*.
    """
    with contextlib.ExitStack() as stack:
        passwd, seccomp = (stack.enter_context(_ready(data)) for data in (_PASSWD, _filter()))
        argv = [_bwrap(), *_walls(), "--ro-bind-data", str(passwd), "/etc/passwd"]
        argv += ["--bind", str(workspace), INSIDE, "--remount-ro", "/"]
        argv += ["--chdir", os.path.join(INSIDE, folder), "--seccomp", str(seccomp)]
        argv += ["--", *limited(command, file_size=file_size, data=DATA, nproc=PROCESSES)]
        yield Launch(argv, (passwd, seccomp))


def limited(command: str, **limits: int) -> list[str]:
    """*command* by the shell, with resource limits; one the server has itself is not raised."""
    names = {"file_size": "fsize", "data": "data", "nproc": "nproc"}
    wanted = {names[k]: v for k, v in limits.items()} | {"core": 0, "nofile": OPEN_FILES}
    # Below the server, so that it can still end what gets out of hand.
    argv = ["/usr/bin/nice", "-n", "10", "/usr/bin/prlimit"]
    for name, value in wanted.items():
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        argv.append(f"--{name}={value if hard == resource.RLIM_INFINITY else min(value, hard)}")
    shell = "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"
    # "File too large" is an error of one write then, and not the end of the shell.
    argv += ["--", "/usr/bin/env", "--ignore-signal=XFSZ", shell, "-c", command]
    return ["/bin/sh", "-c", _GATE, "sh", *argv]


def needs_linux() -> None:
    """RuntimeError, with the cure, where what a command has started cannot be seen and ended."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError(
            "AGENTAO_SHELL works on Linux only, where all that a command has started can be seen "
            "and ended: set AGENTAO_SHELL=off"
        )


def check(root: Path) -> None:
    """RuntimeError, with the cure, if a command of a workspace below *root* cannot be confined."""
    needs_linux()
    if platform.machine() not in _AUDIT:
        raise RuntimeError(
            f"the sandbox is made for {' and '.join(_AUDIT)}, not for {platform.machine()}: "
            "set AGENTAO_SHELL=off"
        )
    real = os.path.realpath(root)
    for shown in {os.path.realpath(name) for name in (*_SYSTEM, INSIDE)}:
        if real == shown or real.startswith(shown + "/"):
            raise RuntimeError(
                f"AGENTAO_ROOT is below {shown}, which every sandboxed command can read: "
                "move it, for example to /var/lib/agentao-web"
            )
    _try_out(_bwrap())


@functools.cache
def _try_out(bwrap: str) -> None:
    """Run the real thing once. What raises is not remembered, so a repaired machine is seen."""
    with (
        tempfile.TemporaryDirectory(prefix="agentao-web-") as folder,
        launch(Path(folder), "", _PROOF, file_size=4096) as tried,
        contextlib.ExitStack() as stack,
    ):
        ours, theirs = map(stack.enter_context, socket.socketpair())
        ours.send(GO)
        try:
            done = subprocess.run(
                tried.argv,
                pass_fds=tried.fds,
                stdin=theirs.fileno(),
                capture_output=True,
                env={},
                timeout=_CHECK_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise RuntimeError(f"{_BROKEN}: {exc}. {_cure('')}") from None
    works, _, mounts = done.stdout.decode("utf-8", "replace").partition("\n")
    if works != "works":
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise RuntimeError(f"{_BROKEN}: {said or f'exit code {done.returncode}'}. {_cure(said)}")
    if not _is_proc_read_only(mounts):
        raise RuntimeError(
            f"{_BROKEN}: /proc can be written in there, and with it the settings of the machine "
            "below /proc/sys, if the server is root. Use bubblewrap 0.8 or newer as the "
            "distribution ships it, or set AGENTAO_SHELL=off."
        )


def _is_proc_read_only(mounts: str) -> bool:
    """Whether all that is mounted at and below /proc is, by the text of a mountinfo."""
    found = [line.split() for line in mounts.splitlines()]
    flags = {row[4]: row[5].split(",") for row in found if len(row) > 5}
    below = [flags[point] for point in flags if f"{point}/".startswith("/proc/")]
    return "/proc" in flags and all("ro" in given for given in below)


#: What is run to see that commands run, and that they are behind the walls. Nothing is written.
_PROOF: t.Final = "echo works; cat /proc/self/mountinfo"
_BROKEN: t.Final = "AGENTAO_SHELL=sandbox does not work here"


def _cure(said: str) -> str:
    if "prlimit" in said:
        return "Install util-linux, or set AGENTAO_SHELL=off."
    if "nknown option" in said:
        return "Install bubblewrap 0.8 or newer, or set AGENTAO_SHELL=off."
    return (
        "Unprivileged user namespaces must be allowed (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), "
        "and in a container also mounting /proc; or set AGENTAO_SHELL=off."
    )


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise RuntimeError(
            "AGENTAO_SHELL=sandbox needs bubblewrap: install it (apt-get install bubblewrap), "
            "or set AGENTAO_SHELL=off"
        )
    return found


def _walls() -> list[str]:
    argv = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    argv += ["--new-session", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
    argv += ["--hostname", "sandbox", "--clearenv"]
    for name, value in _ENVIRON.items():
        argv += ["--setenv", name, value]
    for name in _SYSTEM:
        if os.path.islink(name):
            argv += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            argv += ["--ro-bind", name, name]
    for name in _ETC:
        argv += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    # For a server that is root the files of /proc are its own: those of /proc/sys are settings of
    # the machine. Read-only they are nobody's.
    argv += ["--proc", "/proc", "--remount-ro", "/proc"]
    # A /dev/zero that can be read and not mapped: its shared memory would count for no process.
    argv += ["--dev", "/dev", "--dev-bind", "/dev/full", "/dev/zero", "--remount-ro", "/dev"]
    for name in ("/dev/shm", "/tmp"):
        argv += ["--size", str(SCRATCH), "--perms", "1777", "--tmpfs", name]
    return argv


@contextlib.contextmanager
def _ready(data: bytes) -> t.Iterator[int]:
    """A descriptor from which *data* can be read. It fits into a pipe."""
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


@functools.cache
def _filter() -> bytes:
    """The seccomp program: what is denied here, and every call of another machine."""
    machine = platform.machine()
    load, equal, at_least, both, answer = 0x20, 0x15, 0x35, 0x54, 0x06
    refuse = {error: (answer, 0, 0, _ERRNO | error) for error in (_EOPNOTSUPP, _EAFNOSUPPORT)}
    allow = (answer, 0, 0, _ALLOW)
    mmap, socket_ = _LOOKED_AT[machine]
    # 1. Another machine's calls have other numbers.
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT[machine]), refuse[_EOPNOTSUPP]]
    program += [(load, 0, 0, 0), (at_least, 0, 1, _X32), refuse[_EOPNOTSUPP]]
    # 2. By number.
    for error, numbers in _DENIED[machine].items():
        for number in numbers:
            program += [(equal, 0, 1, number), (answer, 0, 0, _ERRNO | error)]
    # 3. MAP_SHARED | MAP_ANONYMOUS: this memory counts for no process once it has let go of a page.
    program += [(equal, 0, 5, mmap), (load, 0, 0, _argument(3)), (both, 0, 0, 0x2F)]
    program += [(equal, 0, 1, 0x21), refuse[_EOPNOTSUPP], allow]
    # 4. Kinds of sockets.
    program += [(equal, 0, 2 * len(_FAMILIES) + 2, socket_), (load, 0, 0, _argument(0))]
    for family in _FAMILIES:
        program += [(equal, 0, 1, family), allow]
    program += [refuse[_EAFNOSUPPORT], allow]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _argument(number: int) -> int:
    """Where the lower half of a system call's argument is; both machines put it first."""
    return 16 + 8 * number
