"""Cleaning up that may fail: each thing is tried on its own, again and again, with growing pauses.

What cannot be deleted or closed must never stand in the way of the rest, and the operator has to
hear of it: once for each pause in the log, and in the metrics.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import threading
import typing as t

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.observer import Observer

#: The first pause and the longest one, in seconds; and the longest while the store is away.
_FIRST, _LONGEST, _AWAY = 1.0, 600.0, 5.0

Kind = t.Literal["close_turn", "reap_turn", "remove_session"]
Thing = cabc.Hashable

_WORDS: t.Final[dict[Kind, str]] = {
    "close_turn": "a turn of this worker could not be closed",
    "reap_turn": "a turn that a lost worker left open could not be closed",
    "remove_session": "a deleted session could not be removed",
}


class _Failed(t.NamedTuple):
    pause: float
    again: float
    by_store: bool
    """The store was away: it has said so itself, and nothing is wrong with the thing."""


class Chores:
    """What one worker could not clean up yet."""

    def __init__(
        self, *, clock: cabc.Callable[[], float], log: logging.Logger, observer: Observer
    ) -> None:
        self._clock = clock
        self._log = log
        self._observer = observer
        self._lock = threading.Lock()
        self._failed: dict[tuple[Kind, Thing], _Failed] = {}

    def attempt(self, kind: Kind, thing: Thing, work: cabc.Callable[[], object]) -> bool:
        """Do *work* on *thing*, unless it failed a moment ago; whether it is done."""
        last = self._failed.get((kind, thing))
        if last is not None and self._clock() < last.again:
            return False
        try:
            work()
        except ClaimLost:
            pass  # Somebody else has it.
        except StoreUnavailable:
            self._fail(kind, thing, last, by_store=True)
            return False
        except Exception:
            pause = self._fail(kind, thing, last, by_store=False)
            self._log.exception("%s; the next try is in %.0f seconds", _WORDS[kind], pause)
            self._observer.stumbled(kind)
            return False
        with self._lock:
            self._failed.pop((kind, thing), None)
        return True

    def only(self, kind: Kind, things: cabc.Container[Thing]) -> None:
        """*things* are all there are: others have been done by somebody else."""
        with self._lock:
            for found in [f for f in self._failed if f[0] == kind and f[1] not in things]:
                del self._failed[found]

    def stuck(self) -> int:
        """How many things could not be done the last time, for other reasons than the store's."""
        with self._lock:
            return sum(not last.by_store for last in self._failed.values())

    def _fail(self, kind: Kind, thing: Thing, last: _Failed | None, *, by_store: bool) -> float:
        longest = _AWAY if by_store else _LONGEST
        pause = _FIRST if last is None else min(last.pause * 2, longest)
        with self._lock:
            self._failed[kind, thing] = _Failed(pause, self._clock() + pause, by_store)
        return pause
