"""The shell of an agent: one command at a time, watched while it runs, and gone when it ends.

Knows processes, their output and their bounds; must never know turns, HTTP or the store.

Different from agentao's LocalShellExecutor on purpose:

1. The time is the whole time of a command, not that of its silence.
2. No threads: the thread that starts a command reads it and ends it. In the sandbox the kernel
   ends a command with the very thread that started it.
3. Nothing is left running: no background commands, and what a command left behind is killed.
"""

from __future__ import annotations

import codecs
import collections.abc as cabc
import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import time
import typing as t
from pathlib import Path

from agentao.capabilities import BackgroundHandle
from agentao.capabilities import ShellRequest
from agentao.capabilities import ShellResult
from agentao.security import PathPolicyError
from agentao.tools import ShellTool

from . import processes
from . import sandbox
from .quota import Quota
from .quota import Usage
from .relative import Pieces

#: Characters of a command; the kernel takes 128 KiB of one argument.
MAX_COMMAND: t.Final = 32_768
#: Bytes of output: kept of each stream, sent as events, and after which a command is stopped.
KEPT_HEAD: t.Final = 64 * 2**10
KEPT_TAIL: t.Final = 192 * 2**10
SHOWN: t.Final = 256 * 2**10
MAX_OUTPUT: t.Final = 16 * 2**20
#: Bytes that may go from the disk while a command runs that keeps files nobody can measure.
MAX_LOST: t.Final = 4 * 2**30
#: Bytes of the workspace's disk that no command gets, or this part of a small one.
KEPT_FREE: t.Final = 512 * 2**20
KEPT_PART: t.Final = 20
#: Seconds between two looks at the processes, and at the workspace.
LOOK: t.Final = 0.2
MEASURE: t.Final = 1.0
#: Seconds to wait for what was killed.
REAP: t.Final = 5.0

#: Of the server's environment, what an unconfined command gets.
KEPT_ENVIRON: t.Final = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "USER")
_MARK: t.Final = "AGENTAO_WEB_COMMAND"
_CUT: t.Final = "\n[more output is not shown]\n"


class Launch(t.NamedTuple):
    """Arguments, descriptors and environment of a process about to be started."""

    argv: list[str]
    fds: tuple[int, ...]
    environ: dict[str, str]
    folder: str
    mark: str = ""
    """What the environment of all that descends from it has in it, if anything."""


class Executor:
    """agentao's ShellExecutor for one workspace, in the sandbox."""

    #: What the model is told of it.
    about = (
        f"The workspace is {sandbox.INSIDE} there: give other tools relative paths. "
        "There is no network, and nothing but the workspace is kept."
    )

    def __init__(self, workspace: Path, *, seconds: float, quota: Quota) -> None:
        self._workspace = workspace
        self.seconds = seconds
        self._quota = quota

    def run(self, request: ShellRequest) -> ShellResult:
        """Run one command to its end, which the turn's stop or a bound may be.

        Raises RuntimeError or OSError for one that is not started; agentao words that.
        """
        self.admit()
        used = self._quota.measure()
        full = self._quota.complaint(used) or _scarce(self._workspace)
        if used.files > 2 * self._quota.max_files:
            raise RuntimeError(full)
        folder = os.path.relpath(request.cwd, self._workspace)
        # In a full workspace files can be removed, but none grows.
        room = 0 if full else self._quota.max_bytes
        with self._launch("" if folder == "." else folder, request.command, room) as launch:
            process, gate = _start(launch)
        with _Command(process, gate, launch.mark, request, str(self._workspace)) as command:
            free = _free(self._workspace)
            why = command.watch(self.seconds, lambda: self._grown(used, free, process.pid))
        full = self._quota.complaint(self._quota.measure()) or _scarce(self._workspace)
        return command.result(why or full)

    def run_background(self, request: ShellRequest) -> BackgroundHandle:
        """Nothing outlives its command."""
        raise NotImplementedError

    def admit(self) -> None:
        """RuntimeError if no command may run now."""

    @contextlib.contextmanager
    def _launch(self, folder: str, command: str, room: int) -> cabc.Iterator[Launch]:
        """How to start *command* in *folder* of the workspace, with *room* bytes for a file."""
        with sandbox.launch(self._workspace, folder, command, file_size=room) as ready:
            yield Launch(ready.argv, ready.fds, {}, "/")

    def _grown(self, before: Usage, free: int, pid: int) -> str | None:
        """Why the workspace or its disk is too full to go on, and fuller than *before*."""
        used, left = self._quota.measure(), _free(self._workspace)
        lost = free - left - max(0, used.size - before.size)
        if lost > MAX_LOST and processes.hide_files(pid):
            return f"the disk has lost {MAX_LOST:,} bytes to files without a name"
        if left < free and (scarce := _scarce(self._workspace)):
            return scarce
        if used.size <= before.size and used.files <= before.files:
            return None
        return self._quota.complaint(used)


def _free(workspace: Path) -> int:
    """Bytes free on the workspace's disk."""
    disk = os.statvfs(workspace)
    return disk.f_bavail * disk.f_frsize


def _scarce(workspace: Path) -> str | None:
    """Why no file may grow, if the disk is almost full: the server itself needs the rest."""
    disk = os.statvfs(workspace)
    kept = min(KEPT_FREE, disk.f_blocks * disk.f_frsize // KEPT_PART)
    if disk.f_bavail * disk.f_frsize >= kept:
        return None
    return "the server's disk is almost full: free some space"


class Unconfined(Executor):
    """The same without the sandbox: a command can do whatever the server can.

    *alone* says whether the server has only the one tenant; otherwise nothing runs.
    """

    about = "It starts in the workspace."

    def __init__(
        self,
        workspace: Path,
        *,
        seconds: float,
        quota: Quota,
        alone: cabc.Callable[[], bool],
        environ: cabc.Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__(workspace, seconds=seconds, quota=quota)
        self._alone = alone
        self._environ = {name: environ[name] for name in KEPT_ENVIRON if name in environ}

    def admit(self) -> None:
        if not self._alone():
            raise RuntimeError("a shell outside of the sandbox is for a server with one tenant")

    @contextlib.contextmanager
    def _launch(self, folder: str, command: str, room: int) -> cabc.Iterator[Launch]:
        argv = sandbox.limited(command, file_size=room)
        with contextlib.suppress(OSError):
            # The shell itself ends with the thread that started it, whatever becomes of us.
            os.stat("/usr/bin/setpriv")
            argv = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--", *argv]
        mark = secrets.token_hex(8)
        environ = {"TERM": "dumb", "PAGER": "cat", **self._environ, _MARK: mark}
        yield Launch(argv, (), environ, os.path.join(self._workspace, folder), mark)


def _start(launch: Launch) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and the socket at which it waits to be let go."""
    gate, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            launch.argv,
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=launch.folder,
            env=launch.environ,
            pass_fds=launch.fds,
            start_new_session=True,
        )
        return process, gate
    except OSError as exc:
        gate.close()
        # Its own words have the path in them.
        raise RuntimeError(exc.strerror or "it cannot be started") from None
    finally:
        theirs.close()


class _Command:
    """A process that was started: read, watched, and dead when the block is left."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        gate: socket.socket,
        mark: str,
        request: ShellRequest,
        path: str,
    ) -> None:
        self._process = process
        self._gate = gate
        self._mark = mark
        self._token = request.cancellation_token
        self._shown = _Shown(request.on_chunk, path)
        self._path = path.encode()
        self._read = 0
        assert process.stdout is not None and process.stderr is not None
        self._pipes = {process.stdout: _Kept(), process.stderr: _Kept()}
        self._cancelled = False
        self._wake, self._waker = socket.socketpair()
        for end in (self._gate, self._wake, self._waker):
            end.setblocking(False)

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill()
        self._shown.end()
        for pipe in self._pipes:
            pipe.close()
        for end in (self._gate, self._wake, self._waker):
            end.close()

    def watch(self, seconds: float, grown: cabc.Callable[[], str | None]) -> str | None:
        """Read until the command has ended; why it was stopped, if it was."""
        unregister = None
        if self._token is not None:
            unregister = self._token.add_done_callback(self._poke)
        try:
            why = self._watch(time.monotonic() + seconds, grown)
        finally:
            if unregister is not None:
                unregister()
        if why == "":
            self._cancelled = True
            why = None
        elif why == "time":
            why = f"stopped after {seconds:g} seconds"
        self._kill()
        self._drain()
        return why

    def _watch(self, ends: float, grown: cabc.Callable[[], str | None]) -> str | None:
        measure = time.monotonic() + MEASURE
        with selectors.DefaultSelector() as ready, _exit_of(self._process) as ended:
            for pipe in self._pipes:
                os.set_blocking(pipe.fileno(), False)
                ready.register(pipe, selectors.EVENT_READ)
            for other in (self._gate, self._wake, ended):
                ready.register(other, selectors.EVENT_READ)
            look = 0.0
            while True:
                found = {key.fileobj for key, _ in ready.select(LOOK)}
                if ended in found:
                    return None
                if self._token is not None and self._token.is_cancelled:
                    return ""
                if self._gate in found:
                    self._let_go()
                    ready.unregister(self._gate)
                for pipe in self._pipes:
                    if pipe in found and not self._take(pipe):
                        ready.unregister(pipe)
                now = time.monotonic()
                if now > ends:
                    return "time"
                if self._read > MAX_OUTPUT:
                    return f"stopped after {MAX_OUTPUT:,} bytes of output"
                if now > look:
                    if too_much := processes.too_much(self._process.pid):
                        return too_much
                    # Where looking takes long it is done less often.
                    then = time.monotonic()
                    look = then + max(LOOK, 5 * (then - now))
                if now > measure:
                    if full := grown():
                        return f"stopped: {full}"
                    then = time.monotonic()
                    measure = then + max(MEASURE, 10 * (then - now))

    def _let_go(self) -> None:
        """It is in place, so it ends with us from now on, and before us."""
        processes.first_to_go(self._process.pid)
        with contextlib.suppress(OSError):
            self._gate.send(sandbox.GO)

    def _take(self, pipe: t.IO[bytes]) -> bool:
        """Read what is there; False at the end of it."""
        try:
            data = os.read(pipe.fileno(), 65_536)
        except BlockingIOError:
            return True
        self._read += len(data)
        self._pipes[pipe].add(data)
        self._shown.add(pipe, data)
        return bool(data)

    def _drain(self) -> None:
        """What was written before the end; nobody is left who could write more for long."""
        for pipe in self._pipes:
            until = self._read + MAX_OUTPUT
            while self._read < until and _readable(pipe) and self._take(pipe):
                pass

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def _kill(self) -> None:
        """End the command and what it left behind."""
        if self._process.returncode is not None:
            return  # its number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in self._strays():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP)

    def _strays(self) -> list[int]:
        """What began with the command's mark, if it has one, and is not in its group any more."""
        if not self._mark:
            return []
        return processes.with_environment(f"{_MARK}={self._mark}".encode())

    def result(self, note: str | None) -> ShellResult:
        """What agentao gets, with *note* as the last line of the errors."""
        out, err = (kept.result(self._path) for kept in self._pipes.values())
        said = err[0] + (f"\n[{note}]\n".encode() if note else b"")
        code = self._process.returncode
        return ShellResult(
            returncode=-signal.SIGKILL if code is None else code,
            stdout=out[0],
            stderr=said,
            stdout_omitted_bytes=out[1],
            stderr_omitted_bytes=err[1],
            stdout_omitted_at=out[2],
            stderr_omitted_at=err[2],
            cancelled=self._cancelled,
        )


class _Kept:
    """The first and the last bytes of a stream of any length."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        room = KEPT_HEAD - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * KEPT_TAIL:
            self._drop()

    def _drop(self) -> None:
        surplus = max(0, len(self._tail) - KEPT_TAIL)
        del self._tail[:surplus]
        self._dropped += surplus

    def result(self, path: bytes) -> tuple[bytes, int, int]:
        """The bytes with *path* made relative, how many are missing, and where."""
        self._drop()
        if not self._dropped:
            return _relative(bytes(self._head + self._tail), path), 0, 0
        head, tail = (_relative(bytes(part), path) for part in (self._head, self._tail))
        return head + tail, self._dropped, len(head)


def _relative(data: bytes, path: bytes) -> bytes:
    return data.replace(path + b"/", b"").replace(path, b".")


class _Shown:
    """Output as events: text, with the workspace's path made relative, up to a limit."""

    def __init__(self, on_chunk: cabc.Callable[[str], None] | None, path: str) -> None:
        self._on_chunk = on_chunk
        self._path = path
        self._left = SHOWN
        self._pipes: dict[object, tuple[codecs.IncrementalDecoder, Pieces]] = {}

    def add(self, pipe: object, data: bytes) -> None:
        if self._on_chunk is None or self._left <= 0:
            return
        if pipe not in self._pipes:
            fresh = codecs.getincrementaldecoder("utf-8")("replace")
            self._pipes[pipe] = fresh, Pieces(self._path)
        decoder, pieces = self._pipes[pipe]
        self._send(pieces.add(decoder.decode(data)))

    def end(self) -> None:
        for decoder, pieces in self._pipes.values():
            self._send(pieces.add(decoder.decode(b"", final=True)) + pieces.rest())

    def _send(self, text: str) -> None:
        if text and self._left > 0 and self._on_chunk is not None:
            shown = text[: self._left]
            self._left -= len(text)
            self._on_chunk(shown + _CUT if self._left <= 0 else shown)


def _readable(pipe: t.IO[bytes]) -> bool:
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        return bool(ready.select(0))


@contextlib.contextmanager
def _exit_of(process: subprocess.Popen[bytes]) -> cabc.Iterator[int]:
    """A descriptor that gets readable when the process has ended."""
    fd = os.pidfd_open(process.pid)
    try:
        yield fd
    finally:
        os.close(fd)


class CommandTool(ShellTool):
    """run_shell_command as this server runs it: nothing in the background, time by setting."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._executor = executor

    @property
    def description(self) -> str:
        return (
            f"Run a shell command as `{self._invocation()}`. {self._executor.about}\n"
            f"It may take {self._executor.seconds:g} seconds, has no input, and all it started "
            "ends with it. Use quiet flags where there are some. The result has the output and "
            "the errors, and the exit code if it is not zero."
        )

    @property
    def parameters(self) -> dict[str, t.Any]:
        theirs = super().parameters
        kept = ("command", "description", "working_directory")
        return {**theirs, "properties": {name: theirs["properties"][name] for name in kept}}

    def execute(self, command: str, **given: t.Any) -> str:  # type: ignore[override]
        if len(command) > MAX_COMMAND or "\0" in command:
            return f"Error: a command has at most {MAX_COMMAND:,} characters, and no NUL"
        try:
            if not self.resolve_cwd(str(given.get("working_directory", "."))).is_dir():
                return "Error: there is no such folder in the workspace"
        except (PathPolicyError, OSError, RuntimeError, ValueError):
            return "Error: that path is outside the workspace"
        kept = ("description", "working_directory", "_decided")
        return super().execute(command, **{k: v for k, v in given.items() if k in kept})
