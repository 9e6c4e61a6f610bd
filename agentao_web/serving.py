"""What kind of server calls us. One that cannot work, or only badly, is told so once, in one line
with the cure: nobody reads documentation before the first stream hangs.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import typing as t

from agentao_web import green
from agentao_web.core.errors import InternalError

#: Seconds that a POST and a GET may keep a server which handles one request at a time. Gunicorn
#: kills a sync worker after 30, and whoever wants to answer a question has to get a turn.
POST_SECONDS: t.Final = 20.0
GET_SECONDS: t.Final = 5.0

_CURES: t.Final = (
    ("gunicorn", "gunicorn -c python:agentao_web.workers, or add --threads 128"),
    ("uwsgi", "uwsgi --threads 32"),
    ("werkzeug", "flask run, without --without-threads"),
)


class Serving:
    """The server of one application, as its requests show it."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._complained = False

    def look(self, environ: cabc.Mapping[str, t.Any]) -> None:
        """Warn, once, of a server that cannot do what it should; InternalError if it must not."""
        if green.is_late():
            self._complain(logging.ERROR, green.CURE)
            raise InternalError(
                "This server was started in a way that cannot work. Its log says how to start it."
            )
        if is_alone(environ) and not self._complained:
            self._complain(
                logging.WARNING,
                "This server handles one request at a time: while one is streamed, nothing else "
                f"is answered, not even a cancel. Start it like this: {_cure(environ)}",
            )

    def _complain(self, level: int, complaint: str) -> None:
        if not self._complained:
            self._complained = True
            self._log.log(level, "%s", complaint)


def is_alone(environ: cabc.Mapping[str, t.Any]) -> bool:
    """Whether a real server calls that handles one request at a time; a test client is none."""
    return not environ.get("wsgi.multithread") and _software(environ) is not None


def _software(environ: cabc.Mapping[str, t.Any]) -> str | None:
    return "uwsgi" if "uwsgi.version" in environ else environ.get("SERVER_SOFTWARE")


def _cure(environ: cabc.Mapping[str, t.Any]) -> str:
    software = (_software(environ) or "").lower()
    found = (cure for name, cure in _CURES if software.startswith(name))
    return next(found, "with threads, as docs/servers.md says")
