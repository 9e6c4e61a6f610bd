"""Whether a new turn would be taken now: the answer of /readyz, and its reason.

A probe may come every second and must not write, wait or hang with the database. So it is told
from what the worker does anyway: its heartbeat, which is a write.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import threading
import time
import typing as t

from agentao_web.core.errors import Draining
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WebError

_LOG = logging.getLogger("agentao_web")

#: Seconds a probe waits for the first heartbeat of a worker, and between two attempts at it.
_PATIENCE: t.Final = 2.0
_PAUSE: t.Final = 1.0


class Pulse(t.NamedTuple):
    """What is known of a worker's heartbeat."""

    age: float
    """Seconds since the last one was stored."""
    failed: bool
    """Whether the store has refused one since."""


class Worker(t.Protocol):
    """What has to be known of the pool (agentao_web.sessions.SessionPool)."""

    @property
    def draining(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def pulse(self) -> Pulse | None:
        """None until the first heartbeat is stored."""

    def wake_up(self) -> None:
        """Store the first heartbeat, and go on with it."""


class Readiness:
    """See the module. *check* raises what a turn would be refused with, whoever asks for it."""

    def __init__(
        self,
        worker: Worker,
        *,
        lease: float,
        check: cabc.Callable[[], None],
        clock: cabc.Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._oldest = lease / 2
        self._check = check
        self._clock = clock
        self._lock = threading.Lock()
        self._attempt: threading.Thread | None = None
        self._tried = float("-inf")
        self._why: WebError | None = None

    def why_not(self) -> WebError | None:
        """Why no new turn is taken here; None if one is. Answers within *_PATIENCE* seconds."""
        if self._worker.draining:
            return Draining()
        try:
            self._check()
        except WebError as exc:
            return exc
        if not self._worker.ready:
            return Draining(
                "Half of this worker's places are lost to turns that do not end; it is being "
                "replaced."
            )
        return self._asleep() or self._faint()

    def _faint(self) -> WebError | None:
        """Why the heartbeat of a worker that is awake is not good enough."""
        pulse = self._worker.pulse
        if pulse is None or pulse.failed:
            return StoreUnavailable("The conversation store cannot be written; try again later.")
        if pulse.age > self._oldest:
            return StoreUnavailable(
                f"This worker has written nothing to the conversation store for {pulse.age:.0f} "
                "seconds; try again later."
            )
        return None

    def _asleep(self) -> WebError | None:
        """Wake the worker up if nobody has; why it does not wake up."""
        if self._worker.pulse is not None:
            return None
        with self._lock:
            attempt = self._attempt
            begins = attempt is None or not attempt.is_alive()
            if begins and self._clock() - self._tried >= _PAUSE:
                self._tried = self._clock()
                attempt = self._attempt = threading.Thread(
                    target=self._wake_up, name="agentao-readiness", daemon=True
                )
                attempt.start()
        if attempt is not None:
            attempt.join(_PATIENCE)
            if attempt.is_alive():
                return StoreUnavailable("The conversation store does not answer; try again later.")
        return self._why

    def _wake_up(self) -> None:
        try:
            self._worker.wake_up()
            self._why = None
        except WebError as exc:
            self._why = exc
        except Exception:
            self._why = StoreUnavailable()
            _LOG.exception("this worker cannot begin its heartbeat")
