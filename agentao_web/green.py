"""Gevent's side: its patches come before everything else of ours, and idle connections of its
workers end with them. Imports nothing of ours, as it has to be imported first.

What was made of an unpatched ``threading`` before is shared by all greenlets of a worker: one
user's call to the model would be taken for another's. So that is refused, not tried.
"""

from __future__ import annotations

import argparse
import collections.abc as cabc
import contextlib
import functools
import shlex
import threading
import typing as t

#: How gunicorn names its workers that are greenlets.
_CLASSES: t.Final = ("gevent", "gunicorn.workers.ggevent")

CURE: t.Final = (
    "agentao-web was imported before gevent patched the standard library, so nothing is answered. "
    "Put `from gevent import monkey; monkey.patch_all()` at the top of gunicorn.conf.py (or leave "
    "out --preload), or start with: gunicorn -k gevent -c python:agentao_web.workers"
)

_local: type = threading.local


def patch_for(arguments: cabc.Sequence[str], environ: cabc.Mapping[str, str]) -> None:
    """Patch now if gunicorn's command line asks for gevent: its workers do so after our import."""
    global _local
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-k", "--worker-class", default="")
    words = [*shlex.split(environ.get("GUNICORN_CMD_ARGS", "")), *arguments]
    if parser.parse_known_args(words)[0].worker_class.startswith(_CLASSES):
        from gevent import monkey

        monkey.patch_all()
        _local = threading.local


def is_late() -> bool:
    """Whether gevent has patched what we had imported before."""
    return threading.local is not _local


def is_green(worker: t.Any) -> bool:
    """Whether this worker of gunicorn's serves with greenlets."""
    return type(worker).__module__ == "gunicorn.workers.ggevent"


class Idle:
    """The connections of a gevent worker that are between two requests.

    Gunicorn waits for each as for a request, until the worker's time is over.
    """

    def __init__(self, worker: t.Any) -> None:
        self._seconds = worker.cfg.keepalive
        self._waiting: set[tuple[t.Any, t.Any]] = set()
        worker.timeout_ctx = self._between

    @contextlib.contextmanager
    def _between(self) -> cabc.Iterator[None]:
        import gevent

        with gevent.Timeout(self._seconds, False) as patience:
            entry = gevent.getcurrent(), patience
            self._waiting.add(entry)
            try:
                yield
            finally:
                self._waiting.discard(entry)

    def end(self) -> None:
        """Close them, and from now on every connection that has nothing to ask at once."""
        import gevent

        self._seconds = 0
        for entry in list(self._waiting):
            gevent.get_hub().loop.run_callback(functools.partial(self._end, entry))

    def _end(self, entry: tuple[t.Any, t.Any]) -> None:
        # It may have got a request since.
        if entry in self._waiting:
            greenlet, patience = entry
            greenlet.throw(patience)
