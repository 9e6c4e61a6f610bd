"""What the other workers do: whose heart beats, what they wrote, what they ask of us.

One tailer thread asks the store a few times a second, and reads only what moved. It never writes
to a session's log.
"""

from __future__ import annotations

import collections.abc as cabc
import functools
import logging
import threading
import time
import typing as t

from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.names import SessionKey
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.questions import ANSWERED
from agentao_web.readiness import Pulse
from agentao_web.runner import Books
from agentao_web.runner import Runner
from agentao_web.store import LEFT
from agentao_web.store import Orphan
from agentao_web.store import Signal
from agentao_web.store import Store

#: How often the store is asked what other workers did, and otherwise whether to, in seconds.
_TAIL, _SLOW_TAIL = 0.2, 2.0
#: How often a worker shows a sign of life: this part of its lease, and at least so often (seconds).
_BEAT_PART, _BEAT = 0.3, 3.0
#: How often old sessions are looked for, in seconds.
_PRUNE: t.Final = 60.0
#: A worker's name is forgotten after so many leases without a beat.
_FORGET: t.Final = 100
#: A worker that cannot beat stops its own turns after this part of its lease.
_CAUTION: t.Final = 0.7


class Household(t.Protocol):
    """What the pool lets its peers' room do."""

    def sessions(self) -> list[Live]:
        """Every session in memory."""

    def forget(self, live: Live) -> None:
        """Another worker removed this session."""

    def remove(self, key: SessionKey) -> None:
        """Finish a deletion."""


class Peers:
    """One worker's view of all the others."""

    def __init__(
        self,
        store: Store,
        runner: Runner,
        books: Books,
        house: Household,
        *,
        lease: float,
        ttl: float | None = None,
        clock: cabc.Callable[[], float],
        log: logging.Logger,
    ) -> None:
        self._store = store
        self._runner = runner
        self._endings = runner.endings
        self._chores = runner.endings.chores
        self._books = books
        self._house = house
        self._lease = lease
        self._ttl = ttl
        self._interval = min(_BEAT, lease * _BEAT_PART)
        self._clock = clock
        self._log = log
        self._beaten = 0.0
        self._failed = False
        """Whether the store has refused a sign of life since."""
        self._beats: dict[str, tuple[float, float]] = {}
        """What each worker's last beat was, and since when we have known that one."""
        self._strays: dict[str, float] = {}
        """Turns of ours that only the store knows, and since when."""
        self._looked = 0.0
        self._pruned = float("-inf")
        self._aside_now: set[str] = set()
        """What the janitor has threads at work for, at most one for each kind of work."""
        self._seen: tuple[int, dict[SessionKey, Live], set[LiveTurn]] | None = None
        """The store's stamp when all of these were last asked for."""
        self._closed = threading.Event()
        self._nudge = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, worker: str) -> None:
        """Show the first sign of life: a worker nobody knows is taken for dead."""
        self._store.beat(worker)
        self._beaten, self._runner.worker = self._clock(), worker
        self._thread = threading.Thread(target=self._watch, name="agentao-tailer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; say goodbye if we were ever known."""
        self._closed.set()
        self._nudge.set()
        if self._thread is None:
            return
        self._thread.join(5)
        try:
            self._store.leave(self._runner.worker)
        except StoreUnavailable:
            pass  # Then the lease runs out.
        except Exception:
            self._log.exception("the store could not be told that this worker has gone")

    def nudge(self) -> None:
        """Somebody waits for another worker now: do not wait for the next slow look."""
        self._nudge.set()

    @property
    def last_beat(self) -> float:
        """When the store was last told that we live, as a moment of ``time.monotonic``."""
        return time.monotonic() - (self._clock() - self._beaten)

    @property
    def pulse(self) -> Pulse:
        """How the signs of life go."""
        return Pulse(self._clock() - self._beaten, self._failed)

    # -- signs of life -------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Beat, and close what dead workers left, each when its time has come."""
        if self.overslept():
            # This whole process stood still: others have taken over what was ours.
            for turn, live in self._books.running():
                self._runner.lose(live, turn)
        if now - self._beaten >= self._interval:
            self._beat(now)
        if now - self._looked >= self._interval / 2:
            self._looked = now
            self._endings.close_ours()
            orphans = self._nobodys(self._store.orphans({*self._dead(), self._runner.worker}))
            self._chores.only("reap_turn", {orphan.turn_id for orphan in orphans})
            if orphans:
                self._aside("reap", functools.partial(self._reap, orphans))
            doomed = self._store.doomed()
            self._chores.only("remove_session", set(doomed))
            if doomed:
                self._aside("remove", functools.partial(self._remove, doomed))
        if self._ttl is not None and now - self._pruned >= _PRUNE:
            self._pruned = now
            self._aside("prune", functools.partial(self._prune, now - self._ttl))

    def _prune(self, before: float) -> None:
        while not self._closed.is_set() and (keys := self._store.prune(before)):
            self._remove(keys)

    def _remove(self, keys: cabc.Iterable[SessionKey]) -> None:
        for key in keys:
            if self._closed.is_set():
                return
            self._chores.attempt("remove_session", key, functools.partial(self._house.remove, key))

    def _dead(self) -> set[str]:
        """The workers whose heart has not beaten for a lease, by no clock but our own."""
        now, before = self._clock(), self._beats
        self._beats = {}
        for worker, beat in self._store.beats().items():
            last = before.get(worker)
            self._beats[worker] = last if last is not None and last[0] == beat else (beat, now)
        silent = {w: now - at for w, (_, at) in self._beats.items() if w != self._runner.worker}
        for worker in [w for w, seconds in silent.items() if seconds >= _FORGET * self._lease]:
            # Nothing of it is left but its name.
            self._store.leave(worker)
        return {worker for worker, seconds in silent.items() if seconds >= self._lease}

    def _nobodys(self, found: list[Orphan]) -> list[Orphan]:
        """Those that nobody runs: of our own, the ones we have known nothing of for a while.

        There should be none of these. But a turn that is only in the store would make its session
        busy for as long as we live.
        """
        now, ours = self._clock(), self._runner.worker
        found = [orphan for orphan in found if orphan.turn_id not in self._endings.unclosed]
        known = {turn.turn.id for turn, _ in self._books.running()}
        strays = [o.turn_id for o in found if o.worker == ours and o.turn_id not in known]
        self._strays = {turn_id: self._strays.get(turn_id, now) for turn_id in strays}
        lost = {turn_id for turn_id, at in self._strays.items() if now - at >= self._lease}
        return [o for o in found if o.worker != ours or o.ending is not None or o.turn_id in lost]

    def overslept(self) -> bool:
        """Whether our last sign of life is so long ago that our claims are not ours any more."""
        return self._clock() - self._beaten >= self._lease

    def _beat(self, now: float) -> None:
        try:
            begun = self._clock()
            self._store.beat(self._runner.worker)
            self._beaten, self._failed = begun, False
        except Exception as exc:
            self._failed = True
            if not isinstance(exc, StoreUnavailable):
                self._log.exception("no sign of life could be given")
            if now - self._beaten < self._lease * _CAUTION:
                return
            # Before the others may take over.
            for turn, live in self._books.running():
                self._runner.stop(live, turn, "store_unavailable")

    def _reap(self, orphans: cabc.Iterable[Orphan]) -> None:
        for orphan in orphans:
            if self._closed.is_set():
                return
            work = functools.partial(self._endings.reap, orphan)
            self._chores.attempt("reap_turn", orphan.turn_id, work)

    def _aside(self, kind: str, work: cabc.Callable[[], None]) -> None:
        """Do *work* on a thread of its own, unless the last one of that *kind* is still at it."""
        if kind in self._aside_now:
            return

        def run() -> None:
            try:
                work()
            except StoreUnavailable:
                pass  # What is left to do is found again by the next look.
            except Exception:
                self._log.exception("stumbled while cleaning up")
            finally:
                self._aside_now.discard(kind)

        thread = threading.Thread(target=run, name="agentao-aside", daemon=True)
        self._aside_now.add(kind)
        try:
            thread.start()
        except RuntimeError:
            self._aside_now.discard(kind)

    # -- what they wrote -----------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.is_set():
            if not self._anyone_waits():
                self._seen = None
                self._nudge.wait(_SLOW_TAIL)
                self._nudge.clear()
                continue
            try:
                self.tail()
            except StoreUnavailable:
                pass  # The store has said so in the log, and is asked again below.
            except Exception:
                self._log.exception("the tailer stumbled")
            # Whose turn waits has to see two things happen: the other's end, and then its own.
            self._closed.wait(_TAIL / 2 if self._books.parked else _TAIL)

    def _anyone_waits(self) -> bool:
        return bool(self._books.turns) or any(map(_matters, self._house.sessions()))

    def tail(self) -> None:
        """Ask once: heads of what is watched here, ends of claims, signals to us."""
        parked = dict(self._books.parked)
        watched = {live.key: live for live in self._house.sessions() if _matters(live)}
        watched |= {live.key: live for live in parked.values()}
        stamp = self._store.stamp()
        if stamp is not None and self._seen == (stamp, watched, set(parked)):
            return
        self._seen = None
        rows = self._store.heads(watched.keys()) if watched else {}
        for key, live in watched.items():
            row = rows.get(key)
            if row is not None and (row.deleting or not live.deleting):
                live.tail(row)
            elif live.head or live.deleting:
                # Gone, and perhaps there is a new one: ours would refuse turns for ever.
                self._house.forget(live)
        # Asked after the heads and obeyed before anyone starts: who cancels a running turn and a
        # queued one does both at once, and must not see the queued one begin.
        for signal in self._asked() if self._books.turns else ():
            try:
                self._obey(signal)
            except Exception:
                # It was given once; the others are not to be lost with it.
                self._log.exception("a signal of another worker could not be obeyed")
        for turn, live in parked.items():
            row = rows.get(live.key)
            if row is not None and row.turn_id is None and self._books.unpark(turn):
                self._runner.start(live, turn)
        if stamp is not None:
            self._seen = stamp, watched, set(parked)

    def _asked(self) -> list[Signal]:
        """What others ask of us; who is further back in a queue comes first.

        Who is stopped lets the one behind it begin, unless that is stopped.
        """
        by_turn: dict[str, list[Signal]] = {}
        for signal in self._store.signals(self._runner.worker):
            by_turn.setdefault(signal.turn_id, []).append(signal)
        return [signal for group in reversed(by_turn.values()) for signal in group]

    def _obey(self, signal: Signal) -> None:
        if signal.reason == LEFT:
            self._endings.write_endings(signal.key)
            return
        found = self._books.find(signal.turn_id)
        if found is None:
            return
        turn, live = found
        if signal.reason == "read_elsewhere":
            live.keep(turn)
            return
        if signal.reason == ANSWERED:
            live.look_again()
            return
        if signal.reason == "session_deleted":
            live.deleting = True
        self._runner.stop(live, turn, signal.reason)

    def read_here(self, live: Live) -> None:
        """A client reads here what another worker runs: it is not alone there."""
        turn = live.elsewhere
        if turn is not None and live.noticed != turn:
            live.noticed = turn
            self._store.signal(live.key, "read_elsewhere", but=self._runner.worker)


def _matters(live: Live) -> bool:
    """Whether we have to know what becomes of this session elsewhere."""
    return live.watched or live.deleting
