"""One worker, one address: every worker has a unix socket of its own, so that a proxy can choose.

These are hooks of Gunicorn's. They act if there are several workers and as many unix sockets; any
other binding is left to Gunicorn. What has to last is kept on Gunicorn's own objects: it loads its
config anew at SIGHUP.
"""

from __future__ import annotations

import collections.abc as cabc
import fcntl
import os
import socket
import typing as t
from pathlib import Path

from agentao_web.config import Settings

#: The longest path of a unix socket: sun_path of unix(7), less its zero.
_LONGEST: t.Final = 107


def bind(settings: Settings, environ: cabc.Mapping[str, str] = os.environ) -> list[str]:
    """What to bind: a socket for each worker if there are several, else what Gunicorn would.

    With PORT, by which platforms say where they expect a server, it is that for all of them.
    """
    if "PORT" in environ:
        return [f"0.0.0.0:{environ['PORT']}"]
    if settings.workers == 1:
        return ["127.0.0.1:8000"]
    # systemd names the RuntimeDirectory= of a unit so; there may be several.
    ours = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "agentao-sockets"
    folder = settings.sockets or Path(ours).absolute()
    return [f"unix:{folder / f'{number}.sock'}" for number in range(settings.workers)]


def on_starting(server: t.Any) -> None:
    """Make the folder of the sockets, and see that no other server has it."""
    paths = [Path(a) for a in server.cfg.address if isinstance(a, str) and a.startswith("/")]
    if len(paths) < 2 or server.master_pid:  # An upgrade takes its listeners over.
        return
    if server.cfg.workers != len(paths):
        server.log.warning(
            "AGENTAO_WORKERS is %s and Gunicorn has workers = %s: they share all sockets, and a "
            "proxy cannot choose one",
            len(paths),
            server.cfg.workers,
        )
    if any(len(os.fsencode(path)) > _LONGEST for path in paths):
        raise SystemExit(f"{paths[0]} is too long for a socket; set AGENTAO_SOCKETS")
    try:
        server.agentao_lock = _lock(paths[0].parent)
    except BlockingIOError:
        raise SystemExit(
            f"another server has its sockets in {paths[0].parent}; set AGENTAO_SOCKETS"
        ) from None
    except OSError as exc:
        raise SystemExit(f"AGENTAO_SOCKETS: {exc}") from None


def _lock(folder: Path) -> int:
    """A second server would take the names of the first one's sockets away, without a word.

    The lock ends with the master: its workers may still be leaving when the next one starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def nworkers_changed(server: t.Any, new: int, old: int | None) -> None:
    """As many workers as sockets, whatever SIGTTIN, SIGTTOU or gunicornc say; or none at all."""
    count = _count(server)
    if count and new not in (0, count):
        server.log.warning("one worker for each of %s sockets: the number stays", count)
        server.num_workers = count


def pre_fork(server: t.Any, worker: t.Any) -> None:
    """Give a new worker the address with the fewest owners.

    Not a free one: during a reload there is none, since the old workers still have theirs.
    """
    if count := _count(server):
        owned = [getattr(other, "agentao_address", None) for other in server.WORKERS.values()]
        worker.agentao_address = min(range(count), key=owned.count)


def post_fork(server: t.Any, worker: t.Any) -> None:
    """Leave the worker its own listener; the master keeps all, so that a dead one's queues."""
    lock = getattr(server, "agentao_lock", None)
    if lock is not None:
        os.close(lock)
    number = getattr(worker, "agentao_address", None)
    if number is None:
        return
    others = list(worker.sockets)
    # A new list: the old one is the master's.
    worker.sockets = [others.pop(number)]
    for listener in others:
        listener.close()
    worker.log.info("Worker %s is alone at %s", worker.pid, worker.sockets[0])


def _count(server: t.Any) -> int:
    """How many addresses there are; 0 if the workers share what Gunicorn binds."""
    listeners = server.LISTENERS
    if len(listeners) < 2 or len(listeners) != server.cfg.workers:
        return 0
    unix = all(listener.family == socket.AF_UNIX for listener in listeners)
    return len(listeners) if unix else 0
