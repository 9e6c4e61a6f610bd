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

#: machine -> its audit number and the system calls a command does not get: those that set disk
#: space aside behind the limits (fallocate; io_uring could do it too), and doors into the kernel.
_DENIED: t.Final[dict[str, tuple[int, tuple[int, ...]]]] = {
    "x86_64": (0xC000003E, (285, 425, 426, 427, 103, 248, 249, 250, 298, 321, 323)),
    "aarch64": (0xC00000B7, (47, 425, 426, 427, 116, 217, 218, 219, 241, 280, 282)),
}
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EOPNOTSUPP = 95
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
    if platform.machine() not in _DENIED:
        raise RuntimeError(
            f"the sandbox is made for {' and '.join(_DENIED)}, not for {platform.machine()}: "
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
        launch(Path(folder), "", "echo works", file_size=4096) as tried,
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
    if done.stdout != b"works\n":
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise RuntimeError(f"{_BROKEN}: {said or f'exit code {done.returncode}'}. {_cure(said)}")


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
    argv += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
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
    """The seccomp program: the denied calls, and those of another machine, are not supported."""
    audit, denied = _DENIED[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    checks = [(at_least, _X32), *((equal, number) for number in denied)]
    program = [(load, 0, 0, 4), (equal, 0, len(checks) + 2, audit), (load, 0, 0, 0)]
    for place, (code, value) in enumerate(checks):
        program.append((code, len(checks) - place, 0, value))
    program += [(answer, 0, 0, _ALLOW), (answer, 0, 0, _ERRNO | _EOPNOTSUPP)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)
