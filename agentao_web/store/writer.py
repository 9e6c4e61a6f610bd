"""The one thread of a worker that writes batches of events into the store.

It is at most ``interval`` seconds behind; a turn's terminal transaction goes through it too, so
that the writes of one session never overtake each other.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
import typing as t

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Event
from agentao_web.core.observer import Observer
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import Store

#: Sessions whose batches are written in one transaction: many small ones would keep the messages
#: of others waiting, one for all would too.
_TOGETHER: t.Final = 64


class Source(t.Protocol):
    """Something with events the store has not seen."""

    def unwritten(self) -> tuple[Claim | None, list[Event]]:
        """The present claim and what to write under it; no claim means nothing to write."""

    def written(self, through: int) -> None:
        """Everything up to *through* is in the store."""

    def lost(self, claim: Claim) -> None:
        """*claim*, which need not be the present one, was taken over: it is good for nothing."""


class _Job:
    __slots__ = ("source", "claim", "finish", "done", "error", "others", "withdrawn")

    def __init__(self, source: Source, claim: Claim, finish: Finish) -> None:
        self.source = source
        self.claim = claim
        self.finish = finish
        self.done = threading.Event()
        self.error: Exception | None = None
        self.others = False
        self.withdrawn = False
        """Nobody waits for it any more."""


class Writer:
    """Start it by using it; close it when the last turn has ended."""

    def __init__(
        self,
        store: Store,
        *,
        interval: float,
        log: logging.Logger,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._interval = interval
        self._log = log
        self._observer = observer or Observer()
        self._noted: float | None = None
        """Since when something waits to be taken; then since when that is being written."""
        self._writing: float | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._dirty: dict[int, Source] = {}
        self._jobs: collections.deque[_Job] = collections.deque()
        self._urgent = False
        self._closed = False
        self.closing = threading.Event()
        """Whoever waits to try something again need not wait any more."""
        self._thread: threading.Thread | None = None

    def note(self, source: Source, *, urgent: bool = False) -> None:
        """*source* has something to write, within the interval or, if *urgent*, at once."""
        if not urgent and id(source) in self._dirty:
            # Once per token: no lock here. Whoever finds itself noted is: the writer takes the
            # whole dictionary away before it asks a source what there is to write.
            return
        with self._lock:
            if self._noted is None:
                self._noted = time.monotonic()
            wake = not self._dirty or (urgent and not self._urgent)
            self._dirty[id(source)] = source
            self._urgent = self._urgent or urgent
            self._started()
        if wake:
            self._wake.set()

    def finish(self, source: Source, claim: Claim, finish: Finish, *, timeout: float) -> bool:
        """Commit the end of the turn of *claim* with all it has not written; as the store does it.

        ClaimLost also if *source* has another claim by now. After *timeout* seconds without an
        answer it is StoreUnavailable, and perhaps the commit went through all the same.
        """
        job = _Job(source, claim, finish)
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._jobs.append(job)
            if self._noted is None:
                self._noted = time.monotonic()
            self._started()
        self._wake.set()
        if not job.done.wait(timeout):
            job.withdrawn = True
            raise StoreUnavailable("the store did not answer in time")
        if job.error is not None:
            raise job.error
        return job.others

    @property
    def lag(self) -> float:
        """Age of the oldest thing that is not in the store yet, in seconds."""
        since = self._writing or self._noted
        return 0.0 if since is None else max(0.0, time.monotonic() - since)

    def close(self, *, timeout: float) -> None:
        """Write what is left and end the thread, within *timeout* seconds."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self.closing.set()
        self._wake.set()
        if thread is not None:
            thread.join(timeout)

    def _started(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="agentao-writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            with self._lock:
                hurry = self._urgent or bool(self._jobs) or self._closed
            if not hurry:
                self._pause()
            with self._lock:
                self._wake.clear()
                dirty, self._dirty = list(self._dirty.values()), {}
                jobs, self._jobs = self._jobs, collections.deque()
                self._urgent = False
                closed = self._closed
                # What could not be written the last time is still the oldest.
                self._writing, self._noted = self._writing or self._noted, None
            parts = [dirty[n : n + _TOGETHER] for n in range(0, len(dirty), _TOGETHER)]
            kept = [self._flush(part) for part in parts]
            kept += [self._commit(job) for job in jobs]
            if all(kept):
                self._writing = None
            if closed:
                if not jobs:
                    return
                self._wake.set()

    def _pause(self) -> None:
        """Let a batch grow, but not past the interval, and not while something is urgent."""
        until = time.monotonic() + self._interval
        while (left := until - time.monotonic()) > 0:
            self._wake.clear()
            with self._lock:
                if self._urgent or self._jobs or self._closed:
                    break
            self._wake.wait(left)
        self._wake.set()

    def _flush(self, sources: list[Source]) -> bool:
        """Write what they have, together; False if that has to be done again."""
        found = [(source, *source.unwritten()) for source in sources]
        batches = [(source, claim, events) for source, claim, events in found if claim and events]
        if not batches:
            return True
        try:
            lost = self._store.append([(claim, events) for _, claim, events in batches])
        except Exception as exc:
            if len(batches) > 1 and not isinstance(exc, StoreUnavailable):
                # Something in one of them: the others are not to wait for it.
                return all([self._flush([source]) for source, _, _ in batches])
            # Kept in the sources' logs: the next batch, or the terminal transaction, has them.
            self._log.warning("events not stored yet: %s", type(exc).__name__)
            return False
        gone = {claim.generation for claim in lost}
        for source, claim, events in batches:
            if claim.generation in gone:
                source.lost(claim)
                continue
            last = events[-1].seq
            assert last is not None
            source.written(last)
            self._observer.stored(events)
        return True

    def _commit(self, job: _Job) -> bool:
        """Commit the end of a turn; who waits for it is told, so that is not done again."""
        if job.withdrawn:
            return True
        try:
            claim, events = job.source.unwritten()
            if claim is None or claim.generation != job.claim.generation:
                raise ClaimLost
            finish = dataclasses.replace(job.finish, events=[*events, *job.finish.events])
            job.others = self._store.finish(claim, finish)
            self._observer.stored(finish.events)
        except Exception as exc:
            job.error = exc
        finally:
            job.done.set()
        return True
