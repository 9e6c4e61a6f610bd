"""One session seen by many threads: its log, its running turn, its queue, and who reads.

The lock all of them share is here, and a bell for each reader. It is held for a few lines at a
time and never while an agent, a store or a callback runs; what has to be called afterwards is
handed back to the caller.
"""

from __future__ import annotations

import collections
import collections.abc as cabc
import contextlib
import dataclasses
import threading
import typing as t

from agentao_web.core.errors import Draining
from agentao_web.core.errors import Quota
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import EventLog
from agentao_web.core.log import Slice
from agentao_web.core.log import is_ahead
from agentao_web.core.question import Question
from agentao_web.core.question import cancelled
from agentao_web.core.question import closed
from agentao_web.core.transcript import Transcript
from agentao_web.core.turn import ENDED
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn
from agentao_web.core.turn import settle
from agentao_web.core.turn import terminal

if t.TYPE_CHECKING:
    from agentao_web.core.names import SessionKey
    from agentao_web.store import Claim
    from agentao_web.store import SessionRow

Callback = cabc.Callable[[str], None]
Clock = cabc.Callable[[], float]

#: Numbers kept free in a claim for the terminal event and the queue's.
_ROOM_FOR_ENDINGS: t.Final = 1024
#: How long readers of a turn wait for another worker to put its end into the log, in seconds.
_LATE: t.Final = 1.0


class LiveTurn:
    """A turn with what only a running one has: its claim, its stop callbacks, its last event."""

    __slots__ = (
        "turn",
        "claim",
        "cursor",
        "transcript",
        "final",
        "late",
        "outcome",
        "left_at",
        "closing",
        "lost",
        "abandoned",
        "kept",
        "accepted",
        "refused",
        "questions",
        "_callbacks",
    )

    def __init__(self, turn: Turn, cursor: int) -> None:
        self.turn = turn
        self.cursor = cursor
        """The place in the log just before this turn's first event."""
        self.claim: Claim | None = None
        self.transcript = Transcript()
        self.final: Event | None = None
        """Its ``done`` or ``error``; without ``seq`` if it could not be stored."""
        self.late: tuple[float, Event] | None = None
        """When to show what instead, if its end does not come from another worker by then."""
        self.outcome: Outcome | None = None
        self.left_at: float | None = None
        """The turn's waking clock when its last reader left; None while one is there."""
        self.closing = False
        """Its outcome is settled: nothing it says any more is heard."""
        self.lost = False
        """Its claim is another worker's: nothing it says is heard, and it has to be stopped."""
        self.abandoned = False
        """It was given up: its thread is still alive somewhere."""
        self.kept = False
        """Somebody reads it on another worker, so our readers decide nothing."""
        self.accepted = threading.Event()
        """The store has said whether it takes a queued turn: nobody claims for it before."""
        self.refused = False
        """The store did not take it: it ends as if it had never been."""
        self.questions: dict[str, Question] = {}
        """What it waits for a person to answer, as far as is known here."""
        self._callbacks: list[Callback] | None = []


class Audience(t.Protocol):
    """What a session has to know of one of its readers."""

    turn: LiveTurn | None
    cursor: int | None
    saw_idle: bool
    found_nothing: int | None

    @property
    def over(self) -> bool: ...


class Live:
    """A session in memory."""

    def __init__(self, key: SessionKey, *, head: int, log_bytes: int, clock: Clock) -> None:
        self.key = key
        self.tenant = key.tenant
        self.used = clock()
        self.agent: t.Any = None
        """The agent, owned by the pool; touched only by the thread of the running turn."""
        self.agent_version = -1
        self.closed = False
        self.deleting = False
        self.queued_elsewhere = False
        """Whether turns wait in the store that are none of ours, as far as is known."""
        self.elsewhere: str | None = None
        """The turn that another worker runs here, as far as is known."""
        self.noticed: str | None = None
        """The turn elsewhere whose worker knows that it is read here."""
        self.farewell: Event | None = None
        """What readers are told when the session is deleted under them."""
        self.clock = clock
        self._remote_head = head
        self._lock = threading.RLock()
        self._cond = threading.Condition(self._lock)
        """Rung when nobody reads any more."""
        self._log_bytes = log_bytes
        self._log = EventLog(max_bytes=log_bytes, head=head)
        self._stored = head
        self._current: LiveTurn | None = None
        self._queue: collections.deque[LiveTurn] = collections.deque()
        self._told: set[str] = set()
        """Queued turns whose end was written under the present claim."""
        self._ends: dict[int, LiveTurn | None] = {}
        """The numbers of those ends that the store does not have yet, and which are of ours."""
        self._sealed: int | None = None
        """The first of them: it is shown when it is in the store, and so is what follows."""
        self._readers: dict[Audience, threading.Condition] = {}
        """Who reads, and the bell that wakes each of them alone: there may be a thousand."""
        self.rings = 0
        """How often readers were told that something is new."""
        self._looks: set[threading.Event] = set()

    # -- the pool's side -----------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nobody runs, waits or reads here."""
        return not (self._current or self._queue or self._readers or self.deleting)

    @property
    def head(self) -> int:
        """The last number there is, here or written by another worker."""
        return max(self._log.head, self._remote_head)

    @property
    def shown(self) -> int:
        """The last number that may be shown."""
        sealed = self._sealed
        return self.head if sealed is None else sealed - 1

    @property
    def owned(self) -> bool:
        """Whether the claim on this session is ours."""
        return self._current is not None and self._current.claim is not None

    @property
    def watched(self) -> bool:
        """Whether someone here waits for what another worker writes."""
        return bool(self._readers) and not self.owned

    def tail(self, row: SessionRow) -> None:
        """What the store says of this session, where another worker may be writing."""
        with self._cond:
            if self.owned:
                return
            known = (self.elsewhere, self.queued_elsewhere, self._remote_head)
            if known == (row.turn_id, row.queued, row.head):
                return  # Nobody is woken for nothing: there may be a thousand of them.
            self.elsewhere, self.queued_elsewhere = row.turn_id, row.queued
            self._remote_head = row.head
            self._ring()

    def close(self, *, force: bool = False) -> bool:
        """Take no one in any more; False (and nothing happened) if it is in use."""
        with self._cond:
            if not force and not self.idle:
                return False
            self.closed = True
            self._ring()
            return True

    def turns(self) -> list[LiveTurn]:
        """The running turn, if any, then the queued ones in their order."""
        with self._cond:
            return [*([self._current] if self._current else []), *self._queue]

    def state(self) -> str:
        """``idle``, ``running`` or ``waiting``."""
        current = self._current
        if current is None:
            # Who waits for a turn that is queued is not to be sent away as from an idle session.
            busy = self.elsewhere is not None or self.queued_elsewhere
            return "running" if busy else "idle"
        return "waiting" if current.turn.state is State.WAITING else "running"

    # -- starting ------------------------------------------------------------------------------

    def admit(self, turn: Turn, *, max_queue: int) -> tuple[LiveTurn, LiveTurn | None]:
        """Make *turn* the running one, or queue it as it asks.

        Returns it, and the turn it has to wait for, if any. Raises SessionBusy, TooManyTurns (the
        queue is full), or Draining if the session was closed a moment ago and has to be opened
        anew.
        """
        with self._cond:
            if self.deleting:
                raise SessionBusy("this session is being deleted", reason="deleting")
            if self.closed:
                raise Draining
            live = LiveTurn(turn, self.head)
            self.used = self.clock()
            if self._current is None:
                self._current = live
                return live, None
            on_busy = turn.request.on_busy
            if on_busy == "reject":
                raise SessionBusy(
                    "this session is already answering; cancel that turn, or send on_busy",
                    turn_id=self._current.turn.id,
                )
            if len(self._queue) >= max_queue:
                raise TooManyTurns(
                    "the queue of this session is full",
                    quota=Quota("queue", max_queue),
                    queued=len(self._queue),
                )
            if on_busy == "queue":
                self._queue.append(live)
            else:
                self._queue.appendleft(live)
            return live, self._current

    def withdraw(self, live: LiveTurn) -> LiveTurn | None:
        """*live* was not taken: as if it had never been. Returns the next in its place."""
        with self._cond:
            live.closing = True
            return self._follow(live)

    def waits(self, live: LiveTurn) -> bool:
        """Whether *live* is in the queue still."""
        with self._cond:
            return live in self._queue

    def taken(self, live: LiveTurn) -> bool:
        """The store has taken *live*; whether that ends it, since it was stopped meanwhile."""
        with self._cond:
            live.accepted.set()
            if live.turn.stop_reason is None or live not in self._queue:
                return False
            return self._end_under_claim(live)

    def step_out(self, live: LiveTurn) -> bool:
        """Take *live* out of the queue, if nobody here has the claim to write its end under."""
        with self._cond:
            holder = self._current
            stuck = holder is not None and holder.claim is None and live.accepted.is_set()
            if not stuck or live not in self._queue:
                return False
            self._queue.remove(live)
            return True

    def announce(self, live: LiveTurn) -> bool:
        """Publish that *live* is queued, unless the running turn is just ending."""
        with self._cond:
            holder = self._current
            if live not in self._queue or holder is None or not self._may_write(holder):
                return False
            position = self._queue.index(live) + 1
            data = {"position": position, "message": live.turn.request.message}
            live.cursor = self.head
            return self._write(live.turn.id, Draft("turn_queued", data)) is not None

    def begin(self, live: LiveTurn, claim: Claim) -> list[Callback]:
        """*live* holds the session: show its first event.

        If it was told to stop while it waited, its callbacks come back to be called.
        """
        with self._cond:
            if live.closing:
                raise Draining  # Ended while it was being claimed.
            live.claim = claim
            opening = t.cast(int, claim.opening.seq)
            if self._stored != self._log.head or claim.head != self._log.head:
                # Another worker wrote in between, or the store missed the end of our last turn:
                # what the store says is the truth.
                self._log = EventLog(max_bytes=self._log_bytes, head=opening - 1)
            else:
                self._log.claim(claim.generation)
            self._log.add(claim.opening)
            self._told = set()
            self._unseal(opening)
            self._stored = self._remote_head = opening
            self.elsewhere, self.queued_elsewhere = None, False
            live.transcript.add(claim.opening)
            now = self.clock()
            live.turn.step("begin", now)
            reason = live.turn.stop_reason
            if reason is not None:
                live.turn.stopped = now
                live.turn.step("stop", now)
            self._ring()
            return self._taken(live) if reason is not None else []

    # -- the turn's side -----------------------------------------------------------------------

    def publish(self, live: LiveTurn, draft: Draft) -> bool:
        """Append what the agent of *live* says; False if it is not heard any more."""
        with self._cond:
            if live is not self._current or not self._may_write(live):
                return False
            event = self._write(live.turn.id, draft)
            if event is None:
                return False
            live.transcript.add(event)
            return True

    @property
    def crowded(self) -> bool:
        """Whether the claim is nearly out of numbers."""
        return self._log.room <= _ROOM_FOR_ENDINGS

    def on_stop(self, live: LiveTurn, callback: Callback) -> None:
        """Call *callback* with the reason once *live* is stopped, at once if it is already."""
        with self._cond:
            if live._callbacks is not None:
                live._callbacks.append(callback)
                return
            reason = live.turn.stop_reason
        if reason is not None:
            callback(reason)

    def ask(self, live: LiveTurn, question: Question) -> None:
        """Show that *live* waits for a person, unless it is to stop, or not heard any more."""
        with self._cond:
            turn = live.turn
            if live is not self._current or not self._may_write(live) or turn.stop_reason:
                return
            live.questions[question.id] = question
            if turn.state is State.RUNNING:
                turn.step("ask", self.clock())
            self._write(turn.id, Draft(question.kind, question.data))

    def settled(self, live: LiveTurn, question: Question) -> None:
        """Show how *question*, one of *live*'s, was closed; without any left it goes on."""
        with self._cond:
            if live.questions.pop(question.id, None) is None:
                return
            if not live.questions and live.turn.state is State.WAITING:
                live.turn.step("answer", self.clock())
            if self._may_write(live):
                self._write(live.turn.id, closed(question))
            self._ring()

    def look_again(self) -> None:
        """A question of the running turn may have been answered: whoever asked it has a look."""
        with self._cond:
            looks = list(self._looks)
        for look in looks:
            look.set()

    @contextlib.contextmanager
    def looking(self) -> cabc.Iterator[threading.Event]:
        """An event that is set whenever a question may have been answered."""
        look = threading.Event()
        with self._cond:
            self._looks.add(look)
        try:
            yield look
        finally:
            with self._cond:
                self._looks.discard(look)

    def adopt(self, live: LiveTurn, agent: t.Any, version: int) -> bool:
        """Keep *agent* for this session; False if *live*, for which it was built, is over."""
        with self._cond:
            if live.closing or live.lost:
                return False
            self.agent, self.agent_version = agent, version
            return True

    def close_turn(self, live: LiveTurn, *, abandoned: bool = False) -> bool:
        """Hear no more of *live*: its outcome is settled. False if someone else did so first."""
        with self._cond:
            if live.closing:
                return False
            for question in live.questions.values():
                # Its thread may never come back to say so.
                self._write(live.turn.id, closed(cancelled(question)))
            live.questions = {}
            live.closing = True
            if abandoned:
                # Its thread may still use the agent: nobody else may.
                live.abandoned, self.agent = True, None
            live._callbacks = None
            return True

    def number(self, live: LiveTurn, draft: Draft) -> Event:
        """The terminal event of a closed turn, not yet shown."""
        with self._cond:
            return self._log.number(draft, live.turn.id, self.clock())

    def disown(self) -> None:
        """Somebody else writes here now: only what is in the store ever was."""
        with self._cond:
            self._leave_ends()
            self._unseal(self.head)
            self._log = EventLog(max_bytes=self._log_bytes, head=self._stored)
            self._remote_head = self._stored
            self._ring()

    def end(
        self, live: LiveTurn, outcome: Outcome, final: Event, *, others: bool = False
    ) -> LiveTurn | None:
        """Show how *live* ended and return the turn whose time has come, if any.

        With *others* the store has queued turns of this session that are none of ours, or whose
        end is not in the log yet: who reads is not to be told that it is idle.
        """
        with self._cond:
            if final.seq is not None and live.claim is not None:
                if final.seq > self._log.head:
                    self._log.add(final)
                self._stored = final.seq
                self._unseal(final.seq)
            elif live.claim is not None:
                self._leave_ends()
            elif final.seq is not None:
                # Written without a claim of ours: others may have written before it.
                self._remote_head = max(self._remote_head, final.seq)
            self.queued_elsewhere = self.queued_elsewhere or others
            live.turn.end(outcome, self.clock())
            live.outcome = outcome
            if final.seq is None and live.claim is None and others:
                # It is going to be in the log, and nobody is to be told twice.
                live.late = self.clock() + _LATE, final
            else:
                live.final = final
            self.used = self.clock()
            return self._follow(live)

    # -- stopping ------------------------------------------------------------------------------

    def stop(self, live: LiveTurn, reason: str) -> tuple[bool, list[Callback]]:
        """Ask *live* to stop; whether that was news, and the callbacks to call without a lock."""
        with self._cond:
            if live in self._queue:
                return self._end_queued(live, reason), []
            before = live.turn.stop_reason
            callbacks = self._stop(live, reason)
            return live.turn.stop_reason is not None and before is None, callbacks

    def stop_all(self, reason: str) -> tuple[list[LiveTurn], list[Callback]]:
        """Stop the running turn and end the queued ones; who was stopped, and the callbacks."""
        with self._cond:
            stopped = [q for q in list(self._queue) if self._end_queued(q, reason)]
            current, callbacks = self._current, []
            if current is not None and current.turn.stop_reason is None and not current.closing:
                callbacks = self._stop(current, reason)
                stopped.insert(0, current)
            return stopped, callbacks

    def _stop(self, live: LiveTurn, reason: str) -> list[Callback]:
        if live.closing or not live.turn.stop(reason, self.clock()):
            return []
        self._ring()
        return [] if live.turn.state is State.QUEUED else self._taken(live)

    def _taken(self, live: LiveTurn) -> list[Callback]:
        callbacks, live._callbacks = live._callbacks or [], None
        return callbacks

    def keep(self, live: LiveTurn) -> None:
        """Somebody reads *live* on another worker: it goes on without readers here."""
        with self._cond:
            live.kept, live.left_at = True, None

    def _end_queued(self, live: LiveTurn, reason: str) -> bool:
        """End a waiting turn under the running one's claim; False if it was stopped before.

        Without one to write under it stays in the queue, and ends as soon as its time comes. So
        does one that has no row yet: its end would be written, and then its row.
        """
        if not live.turn.stop(reason, self.clock()):
            return False
        self._end_under_claim(live)
        return True

    def _end_under_claim(self, live: LiveTurn) -> bool:
        holder = self._current
        if holder is None or not self._may_write(holder) or not live.accepted.is_set():
            return False
        now = self.clock()
        outcome = settle(Outcome(State.CANCELLED), live.turn.stop_reason)
        duration = int((now - live.turn.created) * 1000)
        final = self._write_end(live.turn.id, terminal(outcome, duration_ms=duration), live)
        if final is None:
            return False
        self._queue.remove(live)
        live.closing = True
        live.final, live.outcome = final, outcome
        live.turn.end(outcome, now)
        self._ring()
        return True

    def end_elsewhere(self, turn_id: str, ending: Draft) -> bool:
        """A turn queued at another worker has ended: put that into the log, if it is ours.

        Once for each claim: the store takes the turn for ended as soon as it has the event.
        """
        with self._cond:
            current = self._current
            if current is None or not self._may_write(current) or turn_id in self._told:
                return False
            return self._write_end(turn_id, ending) is not None

    def _write_end(self, turn_id: str, ending: Draft, live: LiveTurn | None = None) -> Event | None:
        final = self._write(turn_id, ending)
        if final is not None and final.seq is not None:
            self._told.add(turn_id)
            self._ends[final.seq] = live
            self._sealed = self._sealed or final.seq
        return final

    def _leave_ends(self) -> None:
        """Whoever writes here next has the ends that we could not store from their rows."""
        for number, live in self._ends.items():
            if live is not None and live.final is not None:
                unnumbered = dataclasses.replace(live.final, seq=None)
                live.final, live.late = None, (self.clock() + _LATE, unnumbered)
                self._ends[number] = None

    def _unseal(self, through: int) -> None:
        """What has a number up to *through* is in the store, or no part of the log any more."""
        if self._sealed is not None and self._sealed <= through:
            self._ends = {number: live for number, live in self._ends.items() if number > through}
            self._sealed = next(iter(self._ends), None)
            self._ring()

    def _follow(self, live: LiveTurn) -> LiveTurn | None:
        """*live* is done with: the one whose time has come in its place, if any."""
        self._ring()
        if live in self._queue:
            self._queue.remove(live)
        if live is not self._current:
            return None
        self._current = self._queue.popleft() if self._queue else None
        return self._current

    # -- deletion ------------------------------------------------------------------------------

    def bury(self, farewell: Event) -> None:
        """The session is gone: tell everyone who still reads, and take no one in."""
        with self._cond:
            self.farewell = farewell
            self.closed = True
            self._ring()

    # -- the store's side (agentao_web.store.writer.Source) -------------------------------------

    def unwritten(self) -> tuple[Claim | None, list[Event]]:
        with self._cond:
            current = self._current
            claim = current.claim if current is not None and not current.lost else None
            return claim, self._log.since(self._stored) if claim is not None else []

    def written(self, through: int) -> None:
        with self._cond:
            self._stored = max(self._stored, through)
            self._unseal(self._stored)
            self._log.trim(through=self._stored)

    def lost(self, claim: Claim) -> None:
        with self._cond:
            current = self._current
            if current is None or current.claim is None:
                return
            if current.claim.generation != claim.generation:
                return  # That was an earlier turn: what runs now has a good claim.
            # Not `closing`: it runs still, and what stops it or gives it up has to work.
            current.lost = True
            looks = list(self._looks)
        for look in looks:
            look.set()

    # -- readers -------------------------------------------------------------------------------

    def attach(self, reader: Audience) -> None:
        """*reader* is here: turns that were left alone are not any more."""
        with self._cond:
            self._readers[reader] = threading.Condition(self._lock)
            self.used = self.clock()
            for live in self._served(reader):
                live.left_at = None

    def detach(self, reader: Audience, *, left: bool) -> None:
        """*reader* is gone; *left* if the client went, not we."""
        with self._cond:
            self._readers.pop(reader, None)
            if not self._readers:
                self._cond.notify_all()
            self.used = self.clock()
            if not left:
                return
            for live in self._served(reader):
                if not any(r.turn in (None, live) for r in self._readers):
                    live.left_at = live.turn.awake_for(self.clock())

    def _served(self, reader: Audience) -> list[LiveTurn]:
        turns = [*([self._current] if self._current else []), *self._queue]
        return [live for live in turns if reader.turn in (None, live)]

    def wake(self, reader: Audience | None = None) -> None:
        """Have every reader look around, or that one alone."""
        with self._cond:
            if reader is None:
                self._ring()
            elif reader in self._readers:
                self._readers[reader].notify()

    def wait_unread(self, timeout: float) -> bool:
        """Wait until nobody reads any more; False after *timeout* seconds."""
        with self._cond:
            return self._cond.wait_for(lambda: not self._readers, timeout)

    def wait(self, reader: Audience, until: float) -> None:
        """Wait until there is something for *reader*, or its time (of the clock) is up."""
        with self._cond:
            while not (self._news(reader) or reader.over):
                late = reader.turn.late if reader.turn is not None else None
                left = (until if late is None else min(until, late[0])) - self.clock()
                if left <= 0:
                    return
                self._readers[reader].wait(left)

    def _news(self, reader: Audience) -> bool:
        if reader.found_nothing == self.rings:
            # It may have read in the store what is not known here yet, and be ahead of us: it
            # waits until we are told, as its looking again and again would keep a greenlet from
            # telling us.
            return False
        cursor, head = reader.cursor, self.shown
        if self.closed or cursor is None or cursor < head or is_ahead(cursor, head):
            return True
        if not reader.saw_idle and self.state() == "idle":
            # It may have read the last event in the store before we heard of that end.
            return True
        final = reader.turn.final if reader.turn is not None else None
        return final is not None and (final.seq is None or final.seq <= head)

    def take(self, cursor: int, *, limit: int, max_bytes: int) -> Slice | None:
        """What follows *cursor*, or None if the store has to be asked."""
        with self._cond:
            if not self._log.covers(cursor):
                return None
            if cursor == self._log.head < self._remote_head:
                return None  # The rest is another worker's.
            part = self._log.after(cursor, limit=limit, max_bytes=max_bytes)
            if part.cursor <= self.shown:
                return part
            events = [event for event in part.events if (event.seq or 0) <= self.shown]
            return Slice(events, (events[-1].seq if events else None) or cursor)

    # -- inside --------------------------------------------------------------------------------

    def _may_write(self, live: LiveTurn) -> bool:
        silent = live.claim is None or live.closing or live.lost
        return not silent and live.turn.state not in ENDED

    def _write(self, turn_id: str, draft: Draft) -> Event | None:
        if self._log.room <= 1:
            return None
        event = self._log.number(draft, turn_id, self.clock())
        self._log.add(event)
        self._ring()
        return event

    def _ring(self) -> None:
        self.rings += 1
        for bell in self._readers.values():
            bell.notify()
