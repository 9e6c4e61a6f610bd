"""Settings, store, model and this machine's limits, looked at before anybody is served.

Starts no server and makes no file: a database that is not there yet is not made.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import ipaddress
import os
import re
import secrets
import shutil
import statistics
import sys
import time
import typing as t
from pathlib import Path
from urllib.parse import urlsplit

from agentao_web.agents import trial
from agentao_web.config import Settings
from agentao_web.config import shells
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.folders import open_to_others
from agentao_web.doctor import Finding
from agentao_web.doctor import hint
from agentao_web.doctor import ok
from agentao_web.doctor import wrong
from agentao_web.store.sql import SqlStore

Findings = cabc.Iterator[Finding]

#: Commits that are timed; the middle one counts.
_COMMITS: t.Final = 5
#: Seconds: a commit that takes longer is felt in every turn.
_SLOW_COMMIT: t.Final = 0.1
#: Bytes and files that should be free below ROOT.
_FREE_BYTES: t.Final = 2**30
_FREE_FILES: t.Final = 10_000
#: Threads of a worker beside those of requests and turns, with some room.
_OTHER_THREADS: t.Final = 20
#: Descriptors of a worker beside its connections: the database, the model, files of tools.
_OTHER_FILES: t.Final = 200
#: Memory of a stream's thread, measured; docs/deploy.md.
_STREAM_KIB: t.Final = 28
#: Seconds two clocks may differ.
_CLOCKS_APART: t.Final = 2.0
#: No SQLite on these: its locks do not work there.
_NETWORK = re.compile(r"nfs|cifs|smb|ceph|gluster|lustre|afs|fuse\.(sshfs|s3fs|rclone)")
#: Seconds after which a deleted session should be gone: removing one takes a moment.
_STUCK: t.Final = 300
#: When this was written: an earlier clock is wrong.
_WRITTEN: t.Final = 1_767_225_600  # 2026-01-01


@dataclasses.dataclass(frozen=True)
class Server:
    """What Gunicorn is told: see agentao_web.workers."""

    threads: int
    worker_connections: int
    graceful_timeout: int


@dataclasses.dataclass(frozen=True)
class Case:
    """What is looked at."""

    settings: Settings
    server: Server
    environ: cabc.Mapping[str, str]
    own_login: bool = False
    """The host says who is asking."""
    own_agents: bool = False
    """The host builds its agents, so the environment need not name a model."""
    ask_model: bool = True
    pid: int | None = None
    """A running master, whose limits count instead of ours."""


def examine(case: Case) -> Findings:
    """Everything there is to say, check after check."""
    for check, look in CHECKS.items():
        try:
            yield from look(case)
        except (RuntimeError, OSError) as exc:
            yield wrong(check, str(exc))


def names_a_model(environ: cabc.Mapping[str, str]) -> bool:
    """Whether the environment says which model to ask."""
    try:
        trial.model(environ)
    except RuntimeError:
        return False
    return True


# -- settings ----------------------------------------------------------------------------------


def _settings(case: Case) -> Findings:
    found = [*_odd(case), *_open_doors(case)]
    yield from found
    if not found:
        yield ok("settings", "all are read, and fit together")


def _odd(case: Case) -> Findings:
    """Settings that are good alone and not together."""
    s = case.settings
    if s.stop_grace >= s.drain_grace:
        yield hint(
            "settings",
            f"AGENTAO_STOP_GRACE ({s.stop_grace:g}) is not below AGENTAO_DRAIN_GRACE "
            f"({s.drain_grace:g}): at shutdown every turn is stopped at once",
            f"set AGENTAO_DRAIN_GRACE to {2 * s.stop_grace:g} or more",
        )
    if s.heartbeat >= 60:
        yield hint(
            "settings",
            f"AGENTAO_HEARTBEAT ({s.heartbeat:g}) is as long as most proxies wait",
            "set AGENTAO_HEARTBEAT to 15",
        )
    if s.question_timeout > s.max_waiting_time:
        yield hint(
            "settings",
            "AGENTAO_QUESTION_TIMEOUT is longer than AGENTAO_MAX_WAITING_TIME: a turn ends before "
            "its question does",
            f"set AGENTAO_MAX_WAITING_TIME to {s.question_timeout:g} or more",
        )
    for name in ("llm_first_token_timeout", "llm_read_timeout"):
        if getattr(s, name) > s.turn_timeout:
            yield hint(
                "settings",
                f"AGENTAO_{name.upper()} is longer than AGENTAO_TURN_TIMEOUT: the turn times out "
                "before a silent model is given up",
                f"set AGENTAO_{name.upper()} below {s.turn_timeout:g}",
            )
    if s.max_images and s.max_image * 4 // 3 > s.max_body:
        yield wrong(
            "settings",
            "an image of AGENTAO_MAX_IMAGE bytes, in base64, does not fit into AGENTAO_MAX_BODY",
            f"set AGENTAO_MAX_BODY to {s.max_image * 4 // 3 + s.max_message} or more",
        )
    for small, large in (
        ("max_turns_per_user", "max_turns_per_tenant"),
        ("max_turns_per_tenant", "max_turns"),
        ("max_streams_per_user", "max_streams_per_tenant"),
    ):
        if (getattr(s, small) or 0) > (getattr(s, large) or getattr(s, small) or 0):
            names = [f"AGENTAO_{name.upper()}" for name in (small, large)]
            yield hint("settings", f"{names[0]} is above {names[1]}, and never reached")


def _open_doors(case: Case) -> Findings:
    s = case.settings
    if s.demo:
        yield hint(
            "settings",
            "AGENTAO_DEMO is on: "
            + ("" if case.own_login else "whoever says `dev` is let in, and ")
            + "no model is asked",
            "unset AGENTAO_DEMO to serve people",
        )
    elif not s.secret_keys and not case.own_login:
        yield wrong(
            "settings",
            "no AGENTAO_SECRET_KEYS: nobody can be let in",
            "set AGENTAO_SECRET_KEYS to a random text of 16 characters or more; for an app with a "
            "login of its own run: flask --app … agentao doctor",
        )
    if s.root == Settings.from_mapping({}).root:
        yield hint(
            "settings",
            f"AGENTAO_ROOT is not set: everything is below the folder of the start, {s.root}",
            "set AGENTAO_ROOT, for example to /var/lib/agentao-web",
        )
    if s.shell == "unconfined":
        yield hint(
            "settings",
            "AGENTAO_SHELL=unconfined: a command of an agent can read whatever the server can",
            "set AGENTAO_SHELL=sandbox",
        )
    for name, value in case.environ.items():
        if name.endswith("_BASE_URL") and _in_the_clear(value) and not s.demo:
            yield hint(
                "settings",
                f"{name} is http://: the model's key and every message travel in the clear",
                f"set {name} to an https:// URL",
            )


def _in_the_clear(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# -- store -------------------------------------------------------------------------------------


def _store(case: Case) -> Findings:
    settings = case.settings
    url = settings.database_url or ""
    if url.startswith("memory:"):
        cure = "unset AGENTAO_DATABASE_URL, or name a PostgreSQL database"
        yield wrong("store", "memory: keeps nothing, and each worker has its own", cure)
        return
    if url.startswith("postgresql"):
        yield from _commits(settings, url)
        return
    file = Path(url.partition("sqlite:///")[2]) if url else settings.root / "agentao-web.db"
    yield from _sqlite(settings, file)


def _sqlite(settings: Settings, file: Path) -> Findings:
    kind = filesystem(file, _mounts())
    if _NETWORK.match(kind):
        yield wrong(
            "store",
            f"{file} is on {kind}, a network's disk: SQLite's locks do not hold there",
            "set AGENTAO_DATABASE_URL=postgresql://…, or AGENTAO_ROOT to a disk of this machine",
        )
    if not file.exists():
        yield from _to_be_made(file)
    elif file.stat().st_uid != os.geteuid():
        # SQLite would make -wal and -shm as us, and the server could not open them.
        yield wrong(
            "store",
            f"{file} belongs to the user {file.stat().st_uid}, and this is {os.geteuid()}",
            "run the doctor as the server's user: sudo -u agentao-web agentao-web doctor",
        )
    else:
        yield from _commits(settings, file)


def _to_be_made(file: Path) -> Findings:
    there = next(folder for folder in file.parents if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield ok("store", f"{file} is not there yet; the server makes it")
    else:
        cure = f"chown the folder to the server's user: chown -R agentao-web {there}"
        yield wrong("store", f"{file} is not there, and {there} cannot be written", cure)


def _commits(settings: Settings, url: str | Path) -> Findings:
    lease = settings.worker_lease
    store = SqlStore(url)
    try:
        with contextlib.closing(store):
            yield ok("store", store.check())
            took, apart = _commit_time(store), store.clock() - time.time()
            stuck = len(store.doomed(before=time.time() - _STUCK))
    except StoreUnavailable as exc:
        where = "AGENTAO_DATABASE_URL" if settings.database_url else "AGENTAO_ROOT"
        cure = f"is {where} right, does it run, may this user write there?"
        yield wrong("store", f"cannot be opened or written: {exc.message}", cure)
        return
    if took > lease / 10:
        yield wrong(
            "store",
            f"a commit takes {took:.3f} s: workers may miss AGENTAO_WORKER_LEASE ({lease:g} s) "
            "and lose their turns",
            f"use a faster disk or database, or set AGENTAO_WORKER_LEASE to {took * 20:.0f}",
        )
    elif took > _SLOW_COMMIT:
        cure = "use a faster disk, or a database nearer by"
        yield hint("store", f"a commit takes {took:.3f} s; a few of them are in each turn", cure)
    else:
        yield ok("store", f"a commit takes {took * 1000:.1f} ms")
    if stuck:
        yield wrong(
            "store",
            f"{stuck} deleted {'session has' if stuck == 1 else 'sessions have'} been waiting for "
            f"more than {_STUCK // 60} minutes to be removed",
            'start the server if it is not running; otherwise look for "could not be removed" in '
            "its log, which says what is in the way",
        )
    if abs(apart) > _CLOCKS_APART:
        cure = "run a time service on both, such as systemd-timesyncd"
        yield wrong("clock", f"the database's clock is {apart:+.0f} s from ours", cure)


def _commit_time(store: SqlStore) -> float:
    """Seconds the middle one of a few commits takes: a worker's own sign of life."""
    name, times = f"doctor-{secrets.token_hex(8)}", []
    try:
        for _ in range(_COMMITS):
            begin = time.perf_counter()
            store.beat(name)
            times.append(time.perf_counter() - begin)
    finally:
        store.leave(name)
    return statistics.median(times)


def _mounts() -> str:
    """What is mounted; empty on a system that does not say so."""
    try:
        return Path("/proc/self/mountinfo").read_text()
    except FileNotFoundError:
        return ""


def filesystem(path: Path, mountinfo: str) -> str:
    """The kind of file system *path* is or will be on, by /proc/self/mountinfo; "" if unknown."""
    best, kind = "", ""
    real = os.path.realpath(path)
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


# -- model, shell, servers ---------------------------------------------------------------------


def _model(case: Case) -> Findings:
    if case.settings.demo:
        yield ok("model", "the demo model: offline, nothing to ask")
    elif case.own_agents:
        yield ok("model", "the application builds its own agents: not asked")
    elif not case.ask_model:
        trial.model(case.environ)
        yield ok("model", "is named; not asked")
    else:
        name, seconds = trial.ask_model(
            case.environ,
            first_token_timeout=case.settings.llm_first_token_timeout,
            read_timeout=case.settings.llm_read_timeout,
            call_timeout=case.settings.llm_call_timeout,
        )
        yield ok("model", f"{name} answered in {seconds:.1f} s")


def _agents(case: Case) -> Findings:
    settings = case.settings
    if "sandbox" in shells(settings):
        trial.sandbox(settings.root)
        yield ok("shell", "the sandbox works, and /proc is read-only inside it")
        if os.geteuid() == 0:
            cure = "run the server as a user of its own, as deploy/agentao-web.service does"
            yield hint("shell", "the server is root, and so is a command behind its walls", cure)
    if settings.skills is not None:
        yield ok("skills", f"{trial.skills(settings.skills)} can be read")
    if settings.mcp is not None:
        missing = trial.servers(settings.mcp, case.environ, settings.tool_timeout)
        for name, command in missing:
            cure = f"install {command}, or name it with its whole path in {settings.mcp}"
            yield wrong("mcp", f"the program {command!r} of the server {name!r} is not there", cure)
        if not missing:
            yield ok("mcp", f"{settings.mcp} can be read, and its programs are there")


# -- this machine ------------------------------------------------------------------------------


def _threads(case: Case) -> Findings:
    s, server = case.settings, case.server
    kept = min(s.thread_reserve, max(1, server.threads // 4))
    streams = server.threads - kept
    if streams < s.max_turns:
        yield hint(
            "threads",
            f"{server.threads} threads are {streams} streams, and AGENTAO_MAX_TURNS is "
            f"{s.max_turns}: not each turn can be watched",
            f"gunicorn: threads = {2 * s.max_turns + kept}",
        )
    if server.worker_connections <= server.threads:
        yield wrong(
            "threads",
            f"worker_connections ({server.worker_connections}) is not above threads "
            f"({server.threads}): keep-alive is off",
            f"gunicorn: worker_connections = {server.threads * 4}",
        )
    if server.graceful_timeout < s.drain_grace + 10:
        yield wrong(
            "threads",
            f"graceful_timeout ({server.graceful_timeout}) is too short for AGENTAO_DRAIN_GRACE "
            f"({s.drain_grace:g})",
            f"gunicorn: graceful_timeout = {int(s.drain_grace) + 10}",
        )
    memory = streams * _STREAM_KIB // 1024
    yield ok(
        "threads",
        f"{s.workers} × {server.threads} threads: {s.workers * streams} streams and waiting "
        f"requests at once ({s.workers * memory} MiB if all are taken), "
        f"{s.workers * s.max_turns} turns",
    )


def _limits(case: Case) -> Findings:
    if not sys.platform.startswith("linux"):
        cure = "compare `ulimit -a` with the table of sizes in docs/deploy.md"
        yield hint("limits", "only Linux shows the limits of a process", cure)
        return
    proc = Path("/proc") / (str(case.pid) if case.pid else "self")
    whose = f"of process {case.pid}" if case.pid else "of this shell; --pid tells the server's"
    told = (proc / "limits").read_text()
    files = soft_limit(told, "Max open files")
    need = case.server.worker_connections + _OTHER_FILES
    if files is not None and files < need:
        yield wrong(
            "files",
            f"nofile is {files} ({whose}), and a worker may need {need}: running out stops it",
            f"systemd: LimitNOFILE={max(8192, need)}; shell: ulimit -n {need}",
        )
    else:
        yield ok("files", f"nofile is {files or 'unlimited'} ({whose}); a worker may need {need}")
    memory = soft_limit(told, "Max address space")
    if memory is not None:
        cure = "systemd: no LimitAS, MemoryMax= instead; shell: ulimit -v unlimited"
        yield wrong("memory", f"address space is limited to {memory} bytes ({whose})", cure)
    yield from _tasks(case, proc, told)


def _tasks(case: Case, proc: Path, limits: str) -> Findings:
    each = case.server.threads + case.settings.max_turns + _OTHER_THREADS
    need = case.settings.workers * each + 10
    of_cgroup = pids_max((proc / "cgroup").read_text(), Path("/sys/fs/cgroup"))
    # Root is not bound by the limit of processes.
    of_user = soft_limit(limits, "Max processes") if os.geteuid() else None
    most = min((n for n in (of_cgroup, of_user) if n is not None), default=None)
    if most is not None and most < need:
        yield wrong(
            "tasks",
            f"{most} threads and processes are allowed, and {case.settings.workers} workers may "
            f"need {need}: a thread that cannot start stops its worker",
            f"systemd: TasksMax={max(4096, 2 * need)}; container: pids_limit; shell: ulimit -u",
        )
    else:
        yield ok("tasks", f"{most or 'any number of'} threads are allowed; {need} may be needed")


def soft_limit(limits: str, name: str) -> int | None:
    """A soft limit out of /proc/PID/limits; None for unlimited."""
    (value,) = re.findall(rf"^{name} +(\S+)", limits, re.MULTILINE)
    return None if value == "unlimited" else int(value)


def pids_max(cgroup: str, root: Path) -> int | None:
    """The lowest pids.max of a process's cgroups, by /proc/PID/cgroup; None for no limit."""
    found = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "pids"):
            continue
        top = root / controllers
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((place / "pids.max").read_text()))
            if place == top:
                break
    return min(found, default=None)


def _clock(case: Case) -> Findings:
    if time.time() < _WRITTEN:
        cure = "run a time service, such as systemd-timesyncd"
        yield wrong("clock", f"it is {time.strftime('%Y-%m-%d')} here: tokens would not do", cure)
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def _disk(case: Case) -> Findings:
    root = case.settings.root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir():
        yield wrong("disk", f"{there} is no folder", "set AGENTAO_ROOT to a folder")
        return
    if there == root and not os.access(root, os.W_OK | os.X_OK):
        cure = f"chown -R agentao-web {root}, and run the doctor as that user"
        yield wrong("disk", f"{root} cannot be written by this user", cure)
    if (wide := open_to_others(root)) is not None:
        message, _, cure = wide.rpartition(": ")
        yield hint("disk", message, cure)
    kind = filesystem(root, _mounts())
    if kind in ("tmpfs", "ramfs"):
        cure = "set AGENTAO_ROOT to a disk"
        yield hint("disk", f"{root} is in memory: a restart of the machine empties it", cure)
    free, files = shutil.disk_usage(there).free, os.statvfs(there)
    if free < _FREE_BYTES:
        cure = "make room, or move AGENTAO_ROOT to a larger disk"
        yield wrong("disk", f"{free // 2**20} MiB are free below {root}", cure)
    elif files.f_files and files.f_favail < _FREE_FILES:
        cure = "remove files, or move AGENTAO_ROOT to another disk"
        yield wrong("disk", f"{files.f_favail} more files can be made below {root}", cure)
    else:
        yield ok("disk", f"{free // 2**30} GiB are free below {root}")


CHECKS: t.Final[dict[str, cabc.Callable[[Case], Findings]]] = {
    "settings": _settings,
    "store": _store,
    "model": _model,
    "agents": _agents,
    "threads": _threads,
    "limits": _limits,
    "clock": _clock,
    "disk": _disk,
}
