"""Gunicorn's side: its settings for us, and the hooks that make a worker leave cleanly.

Use it as it is (``-c python:agentao_web.workers``) or import the hooks into a config of your own.
Gunicorn calls no hook when SIGTERM arrives and never closes a stream by itself, so the drain is
ours: SIGTERM is seen through the handler we wrap, max_requests and a dead master by looking.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import gc
import logging
import os
import select
import shlex
import signal
import sys
import threading
import types
import typing as t

from gunicorn.config import Config

from agentao_web import green

green.patch_for(sys.argv[1:], os.environ)  # Before anything below is imported.

from agentao_web import addresses  # noqa: E402
from agentao_web import extension  # noqa: E402
from agentao_web import logs  # noqa: E402
from agentao_web.config import Settings  # noqa: E402
from agentao_web.config import from_environment  # noqa: E402

_settings = Settings.from_mapping(from_environment())

worker_class = "gthread"
workers = _settings.workers
bind = addresses.bind(_settings)
threads = 128
worker_connections = 1000
keepalive = 75
# As much as nginx lets through, so that it is nginx that refuses more, in our form.
limit_request_line = 8190
# Longer than a drain takes; it bounds a worker's main thread, never a stream.
graceful_timeout = int(_settings.drain_grace) + 10  # And the margin of _compare() below.
timeout = graceful_timeout + 10
# Otherwise a socket in the home directory.
control_socket_disable = True

_NO_QUERIES: t.Final = logs.NoQueries()
#: How often worker.alive and the master are looked at, in seconds.
_GLANCE: t.Final = 0.25
#: Seconds a worker needs after its drain.
_MARGIN: t.Final = 10
#: Seconds turns get when the worker has to leave at once (SIGINT, SIGQUIT).
_QUICK_GRACE: t.Final = 1.0

# One worker, one address.
nworkers_changed = addresses.nworkers_changed
pre_fork = addresses.pre_fork
post_fork = addresses.post_fork


def on_starting(server: t.Any) -> None:
    """Claim the sockets, and import what every worker needs.

    Here and not in each worker: they start faster, share its memory, and all have the same
    agentao-web, also one that takes the place of another while a new version is being installed.
    """
    addresses.on_starting(server)
    extension.load()


def told(environ: cabc.Mapping[str, str] = os.environ) -> dict[str, int]:
    """The sizes Gunicorn would take: ours, or those of GUNICORN_CMD_ARGS."""
    words = shlex.split(environ.get("GUNICORN_CMD_ARGS", ""))
    given = vars(Config().parser().parse_known_args(words)[0])
    ours = {
        "threads": threads,
        "worker_connections": worker_connections,
        "graceful_timeout": graceful_timeout,
    }
    return {name: ours[name] if given[name] is None else int(given[name]) for name in ours}


def post_worker_init(worker: t.Any) -> None:
    """Watch for the end of this worker: after the fork, once the application is loaded."""
    if green.is_late():
        raise RuntimeError(green.CURE)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.getsignal(signal.SIGTERM)

    def on_term(signum: int, frame: types.FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(write_end, b"x")
        if callable(before):
            before(signum, frame)

    signal.signal(signal.SIGTERM, on_term)
    signal.siginterrupt(signal.SIGTERM, False)
    for name in ("gunicorn.access", "gunicorn.error"):
        logging.getLogger(name).addFilter(_NO_QUERIES)
    idle = green.Idle(worker) if green.is_green(worker) else None
    # Of greenlets there is one for each connection.
    extension.reserve_threads(worker.cfg.worker_connections if idle else worker.cfg.threads)
    for app in extension.apps():
        extension.pool_of(app).exhausted = _replace_me
        _compare(worker, app.config)
        extension.warm(app)
    # What is here now stays: a full collection over it would stop every stream for 100 ms.
    gc.collect()
    gc.freeze()
    threading.Thread(
        target=_watch,
        args=(worker, os.getppid(), read_end, idle),
        name="agentao-drain",
        daemon=True,
    ).start()


def _compare(worker: t.Any, config: t.Mapping[str, t.Any]) -> None:
    """An application may drain longer than Gunicorn waits: then turns are cut short."""
    grace = Settings.from_mapping(config).drain_grace
    if worker.cfg.graceful_timeout < grace + _MARGIN:
        logging.getLogger("agentao_web").warning(
            "graceful_timeout %s is too short for AGENTAO_DRAIN_GRACE %s; set it to %s",
            worker.cfg.graceful_timeout,
            grace,
            int(grace) + _MARGIN,
        )


def worker_int(worker: t.Any) -> None:
    """SIGINT or SIGQUIT: leave at once, but tell everyone."""
    _shutdown_all(_QUICK_GRACE)


def worker_exit(server: t.Any, worker: t.Any) -> None:
    """The last of this process; Gunicorn calls it in the master too, for a worker that is gone."""
    if os.getpid() != worker.pid:
        return
    _shutdown_all(None)
    if threading.active_count() > 1:
        # A thread that does not end would keep the interpreter from leaving.
        logging.shutdown()
        os._exit(0)


def _watch(worker: t.Any, master: int, pipe: int, idle: green.Idle | None) -> None:
    while not select.select([pipe], [], [], _GLANCE)[0]:
        if not worker.alive:
            break
        if os.getppid() != master:
            worker.alive = False
            break
    _shutdown_all(None)
    if idle is not None:
        idle.end()


def _shutdown_all(grace: float | None) -> None:
    threads = [
        threading.Thread(target=extension.shutdown, args=(app, grace), daemon=True)
        for app in extension.apps()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(graceful_timeout)


def _replace_me() -> None:
    """Too many threads are lost to turns that do not end: have the master start a fresh worker."""
    logging.getLogger("agentao_web").error("half of the turn slots are lost; leaving")
    os.kill(os.getpid(), signal.SIGTERM)
