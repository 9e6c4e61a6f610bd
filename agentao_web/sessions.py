"""Who is in: (tenant, user, id) -> session; admission, caps, deadlines, eviction, drain.

Never sees a request, and never runs an agent: that is the runner's.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import functools
import hashlib
import logging
import os
import threading
import time
import typing as t
import uuid

from agentao_web.core import limits
from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import Draining
from agentao_web.core.errors import Forbidden
from agentao_web.core.errors import IdempotencyConflict
from agentao_web.core.errors import NoModel
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import Quota
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import TooManySessions
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.errors import WebError
from agentao_web.core.log import Event
from agentao_web.core.log import is_ahead
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.question import Reply
from agentao_web.core.turn import ENDED
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn
from agentao_web.core.turn import TurnRequest
from agentao_web.core.turn import terminal
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.peers import Peers
from agentao_web.questions import ANSWERED
from agentao_web.readiness import Pulse
from agentao_web.runner import COMMIT_TIMEOUT
from agentao_web.runner import Agent
from agentao_web.runner import Agents
from agentao_web.runner import Books
from agentao_web.runner import Runner
from agentao_web.runner import steady_clock
from agentao_web.store import AlreadyAccepted
from agentao_web.store import KeyUse
from agentao_web.store import Spoken
from agentao_web.store import Store
from agentao_web.store.writer import Writer

#: How often deadlines are looked at while turns run, and otherwise, in seconds.
_TICK, _SLOW_TICK = 0.2, 1.0
#: How often a deletion asks whether another worker's turn has ended, in seconds.
_ASK: t.Final = 0.05
#: How long streams get to send the last of it when the worker goes, in seconds.
_FAREWELL: t.Final = 2.0
#: How long an event that was shown may be on its way into the store, in seconds.
_CATCH_UP: t.Final = 2.0
#: How long a batch grows, in seconds: with its commit the store is 0.1 behind.
_BATCH: t.Final = 0.09


class Caps(t.Protocol):
    """The settings this room reads (agentao_web.config.Settings)."""

    @property
    def turn_timeout(self) -> float: ...
    @property
    def max_waiting_time(self) -> float: ...
    @property
    def question_timeout(self) -> float: ...
    @property
    def stop_grace(self) -> float: ...
    @property
    def disconnect_grace(self) -> float: ...
    @property
    def drain_grace(self) -> float: ...
    @property
    def session_ttl(self) -> float: ...
    @property
    def conversation_ttl(self) -> float | None: ...
    @property
    def max_sessions(self) -> int: ...
    @property
    def max_sessions_per_tenant(self) -> int | None: ...
    @property
    def max_turns(self) -> int: ...
    @property
    def max_turns_per_tenant(self) -> int | None: ...
    @property
    def max_turns_per_user(self) -> int | None: ...
    @property
    def max_queue(self) -> int: ...
    @property
    def max_line(self) -> int: ...
    @property
    def log_bytes(self) -> int: ...
    @property
    def shell(self) -> str: ...
    @property
    def worker_lease(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Started:
    """A turn that was accepted, and the cursor just before its first event."""

    live: Live
    turn_id: str
    cursor: int
    status: str
    """``queued``, ``running``, or how it ended if it was accepted before."""
    turn: LiveTurn | None = None
    """The turn, if this worker runs it."""
    final: Event | None = None
    """Its last event, if it had ended before and was found in the store."""


class SessionPool:
    """Every session of a worker. Threads start with the first turn, never before a fork."""

    def __init__(
        self,
        store: Store,
        agents: Agents,
        caps: Caps,
        *,
        clock: cabc.Callable[[], float] | None = None,
        log: logging.Logger | None = None,
        exhausted: cabc.Callable[[], None] = lambda: None,
        may_spend: cabc.Callable[[SessionKey], None] = lambda key: None,
        observer: Observer | None = None,
    ) -> None:
        """*may_spend* raises BudgetExhausted if the tenant has no tokens left for a turn."""
        self.store = store
        self.clock = clock or steady_clock()
        self.exhausted = exhausted
        """Called when given-up turns hold half of the places: the worker should be replaced."""
        self._log = log or logging.getLogger("agentao_web")
        self._agents = agents
        self._observer = observer or Observer()
        self._caps = caps
        self._may_spend = may_spend
        self._books = Books()
        self._lock = self._books.lock
        self._map: dict[SessionKey, Live] = {}
        self._writer = Writer(store, interval=_BATCH, log=self._log, observer=self._observer)
        self._runner = Runner(
            store,
            self._writer,
            agents,
            self._books,
            max_turns=caps.max_turns,
            question_timeout=caps.question_timeout,
            patience=caps.worker_lease,
            clock=self.clock,
            log=self._log,
            observer=self._observer,
        )
        self._draining = False
        self._until = float("inf")
        self._closed = threading.Event()
        self._gone = threading.Event()
        self._nudge = threading.Event()
        self._janitor: threading.Thread | None = None
        self._peers = Peers(
            store,
            self._runner,
            self._books,
            self,
            lease=caps.worker_lease,
            ttl=caps.conversation_ttl,
            clock=self.clock,
            log=self._log,
        )
        self._pid: int | None = None
        self._starting = threading.Lock()

    # -- asking --------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether this worker is on its way out."""
        return self._draining

    @property
    def alias(self) -> str:
        """Tells this worker from others, and nothing else."""
        return hashlib.sha256(self._runner.worker.encode()).hexdigest()[:8]

    @property
    def ready(self) -> bool:
        """Whether new turns are welcome here."""
        return not self._draining and self._books.given_up * 2 < self._caps.max_turns

    @property
    def pulse(self) -> Pulse | None:
        """How this worker's heartbeat goes; None until it has begun."""
        return self._peers.pulse if self._pid == os.getpid() else None

    def find(self, key: SessionKey) -> Live:
        """The session as it is now, in memory; NotFound if there is none."""
        self.wake_up()
        live = self.peek(key)
        overslept = self._peers.overslept()
        if live is not None and live.owned and not overslept:
            return live
        if self._closed.is_set():
            raise Draining
        row = self.store.session(key)
        if row is None or row.deleting:
            raise NotFound("no such session")
        live = live or self._open(key, row.head)
        if overslept and live.owned:
            # We stood still for too long, and the janitor has not come yet.
            for turn in live.turns():
                self._runner.lose(live, turn)
        live.tail(row)
        return live

    def peek(self, key: SessionKey) -> Live | None:
        """The session if it is in memory."""
        with self._lock:
            return self._map.get(key)

    def counts(self) -> dict[str, int]:
        """Sizes: sessions in memory, turns accepted and not ended, slots taken, given_up."""
        with self._lock:
            books = self._books
            return {
                "sessions": len(self._map),
                "turns": len(books.turns),
                "slots": books.slots,
                "given_up": books.given_up,
            }

    def gauges(self) -> dict[str, float]:
        """Sizes of this moment, by the names of agentao_web.metrics."""
        running = self._books.running()
        begun = [turn for turn, _ in running if turn.claim is not None]
        found = {
            "agentao_turns_running": float(len(begun)),
            "agentao_turns_queued": float(len(running) - len(begun)),
            "agentao_questions_open": float(sum(len(turn.questions) for turn in begun)),
            "agentao_threads_given_up": float(self._books.given_up),
            "agentao_sessions_in_memory": float(len(self._map)),
            "agentao_store_lag_seconds": self._writer.lag,
            "agentao_cleanups_stuck": float(self._runner.endings.chores.stuck()),
        }
        if self._pid is not None and not self._closed.is_set():
            found["agentao_worker_heartbeat_age_seconds"] = self._peers.last_beat
        return found

    # -- starting ------------------------------------------------------------------------------

    def start(self, key: SessionKey, request: TurnRequest) -> Started:
        """Accept a turn: its message is committed when this returns.

        Raises SessionBusy, TooManyTurns, TooManySessions, BudgetExhausted, IdempotencyConflict,
        NoModel, Draining, Forbidden or StoreUnavailable; then nothing has changed.
        """
        self.wake_up()
        self._check_alone(key.tenant)
        deadline = min(request.timeout or self._caps.turn_timeout, self._caps.turn_timeout)
        turn = Turn(uuid.uuid4().hex, request, self.clock(), deadline)
        try:
            self._may_spend(key)
            return self._start(key, turn)
        except AlreadyAccepted as before:
            return self._join(key, before.turn_id)
        except (SessionBusy, TooManyTurns, BudgetExhausted, NoModel):
            # A repeated request is joined, also while its first one runs.
            joined = self._repeated(key, request)
            if joined is None:
                raise
            return joined
        finally:
            self._nudge.set()
            self._peers.nudge()

    def resume(self, key: SessionKey, seq: int, request: TurnRequest) -> Started:
        """The turn that event *seq* belongs to, from there on; never a new one.

        *request* is the one that started it, sent again: an Idempotency-Key in it names the turn.
        Raises NotFound, or IdempotencyConflict if the two do not belong together.
        """
        self.wake_up()
        live = self.find(key)
        if request.use is not None and (keyed := self._repeated(key, request)) is not None:
            return dataclasses.replace(keyed, cursor=seq)
        spoken = self._spoken(live, seq)
        if spoken is None:
            raise NotFound(
                "This session has no turn with the event that Last-Event-ID names. To start a new "
                "turn, send the request without that header."
            )
        if request.use is not None or spoken.message != request.message:
            raise IdempotencyConflict(
                "Last-Event-ID belongs to a turn that was started by another request. To resume "
                "that turn, send its own request again; to start a new one, leave the header out."
            )
        return dataclasses.replace(self._join(key, spoken.turn_id), cursor=seq)

    def _spoken(self, live: Live, seq: int) -> Spoken | None:
        """Whose event *seq* is. What another worker has shown may not be in the store yet."""
        part = live.take(seq - 1, limit=1, max_bytes=1)
        event = part.events[0] if part is not None and part.events else None
        found = self._books.find(event.turn_id or "") if event is not None else None
        if event is not None and event.seq == seq and found is not None:
            turn = found[0].turn
            return Spoken(turn.id, turn.request.message)
        until = self.clock() + _CATCH_UP
        while not live.owned and self._is_on_its_way(live, seq) and self.clock() < until:
            if self._closed.wait(_ASK):
                raise Draining
        return self.store.spoken(live.key, seq)

    def _is_on_its_way(self, live: Live, seq: int) -> bool:
        row = self.store.session(live.key)
        # Only of a turn that runs can there be more than is stored.
        if row is None or row.turn_id is None:
            return False
        return row.head < seq and not is_ahead(seq, row.head)

    def _check_alone(self, tenant: str) -> None:
        """An unconfined shell reads all there is on a server: it must be all of one tenant."""
        if self._caps.shell == "unconfined" and set(self.store.tenants(2)) - {tenant}:
            raise Forbidden(
                "this server gives its agents a shell outside of the sandbox, so it is for one "
                "tenant, and another one has sessions here"
            )

    def _start(self, key: SessionKey, turn: Turn) -> Started:
        live, admitted, holder, lines_up = self._admit(key, turn)
        self._observer.accepted(key, turn)
        runs = False
        try:
            if lines_up:
                self._enqueue(live, admitted, new=True)
            elif holder is None:
                runs = self._claim_or_queue(live, admitted)
            else:
                self._enqueue_behind(live, admitted, holder)
        except BaseException:
            self._take_back(live, admitted, runs=holder is None, lined_up=lines_up)
            raise
        if live.taken(admitted):
            self._runner.swept(live, [admitted])
        elif admitted.outcome is not None:
            # Given up before it had a row.
            self._runner.end_row(live, admitted)
        if runs:
            self._runner.start(live, admitted)
        elif holder is None and not lines_up:
            self._wait_elsewhere(live, admitted)
        elif holder is not None:
            if live.announce(admitted):
                self._writer.note(live, urgent=True)
            if turn.request.on_busy == "interrupt":
                self._runner.stop(live, holder, "interrupted")
        return Started(live, turn.id, admitted.cursor, _status(turn), admitted)

    def _claim_or_queue(self, live: Live, turn: LiveTurn) -> bool:
        """Claim for *turn*; False if it waits for another worker's, as its client wishes."""
        try:
            self._runner.claim(live, turn)
            return True
        except SessionBusy as busy:
            if turn.turn.request.on_busy == "reject" or "reason" in busy.details:
                raise
            self._enqueue(live, turn)
            return False

    def _enqueue_behind(self, live: Live, turn: LiveTurn, holder: LiveTurn) -> None:
        # The first turn of a session may still be on its way into the store.
        holder.accepted.wait(COMMIT_TIMEOUT)
        try:
            self._enqueue(live, turn)
        except NotFound:
            raise SessionBusy("the turn before was not taken; try again") from None

    def _enqueue(self, live: Live, turn: LiveTurn, *, new: bool = False) -> None:
        try:
            self.store.enqueue(
                live.key,
                self._runner.row(turn),
                limit=self._caps.max_queue,
                first=turn.turn.request.on_busy == "interrupt",
                new=new,
                use=self._runner.use(turn),
            )
        except AlreadyAccepted:
            raise
        except Exception as exc:
            if isinstance(exc, StoreUnavailable) or not isinstance(exc, WebError):
                # Its commit may have gone through all the same, and nobody would ever run it.
                self._runner.endings.end_later(live.key, turn.turn.id)
            raise

    def _wait_elsewhere(self, live: Live, turn: LiveTurn) -> None:
        """*turn* waits for another worker's claim to end; the tailer will see it."""
        self._books.park(turn, live)
        if turn.turn.request.on_busy == "interrupt":
            self.store.signal(live.key, "interrupted", but=self._runner.worker, running_only=True)
        if turn.turn.stop_reason is not None:
            self._runner.swept(live, [turn])

    def _repeated(self, key: SessionKey, request: TurnRequest) -> Started | None:
        """The turn that was accepted with the same Idempotency-Key, if there is one."""
        if request.use is None:
            return None
        live = self.peek(key)
        for turn in live.turns() if live is not None else ():
            if turn.turn.request.use == request.use:
                # Perhaps on its way into the store at this very moment.
                turn.accepted.wait(COMMIT_TIMEOUT)
        turn_id = self.store.accepted(key, KeyUse(*request.use))
        return None if turn_id is None else self._join(key, turn_id)

    def _join(self, key: SessionKey, turn_id: str) -> Started:
        """The turn *turn_id*, accepted before, wherever it runs or ran."""
        found = self._books.find(turn_id)
        if found is not None:
            turn, live = found
            return Started(live, turn_id, turn.cursor, _status(turn.turn), turn)
        live = self.find(key)
        # In this order: a turn that ends between the two questions is found by the second.
        for active in self.store.active(key):
            if active.id == turn_id:
                return Started(live, turn_id, active.cursor, active.state)
        ended = self.store.ended(key, turn_id)
        if ended is not None:
            status = str(ended.final.data["status"])
            return Started(live, turn_id, ended.cursor, status, final=ended.final)
        # It waited, and its row has gone before: the session is being deleted.
        return Started(live, turn_id, live.head, State.CANCELLED.value)

    def _admit(self, key: SessionKey, turn: Turn) -> tuple[Live, LiveTurn, LiveTurn | None, bool]:
        """Register *turn*: its session, the turn it has to wait for, whether it waits in line."""
        while True:
            live = self.peek(key) or self._open(key, self._head(key))
            # Registering and setting `_draining` take the same lock: refused or swept, not neither.
            with self._lock:
                full = self._refuse_if_full(key, turn.request, behind=bool(live.turns()))
                try:
                    admitted, holder = live.admit(turn, max_queue=self._caps.max_queue)
                except Draining:
                    continue  # Evicted between the two lines above: out of the map already.
                self._books.enter(admitted, live)
                lines_up = full and holder is None
                if lines_up:
                    self._books.line[admitted] = live
                elif holder is None:
                    self._books.slots += 1
            return live, admitted, holder, lines_up

    def _refuse_if_full(self, key: SessionKey, request: TurnRequest, *, behind: bool) -> bool:
        """Raise what refuses the turn; whether every place is taken.

        One *behind* another of its session, whose place it will have, needs none.
        """
        if self._draining:
            raise Draining
        caps = self._caps
        books = self._books
        full = books.slots >= caps.max_turns
        may_wait = behind or (request.on_busy == "queue" and len(books.line) < caps.max_line)
        if full and not may_wait:
            quota = Quota("turns", caps.max_turns)
            raise TooManyTurns("this worker runs as many turns as it may", quota=quota)
        tenants = [live.key for live in self._books.turns.values() if live.tenant == key.tenant]
        cap = caps.max_turns_per_tenant
        if cap is not None and len(tenants) >= cap:
            quota = Quota("tenant_turns", cap)
            raise TooManyTurns("this tenant runs as many turns as it may", quota=quota)
        cap = caps.max_turns_per_user
        if cap is not None and sum(one.user == key.user for one in tenants) >= cap:
            quota = Quota("user_turns", cap)
            raise TooManyTurns("this user runs as many turns as it may", quota=quota)
        return full

    def _take_back(self, live: Live, turn: LiveTurn, *, runs: bool, lined_up: bool) -> None:
        """The store refused *turn*: as if it had never been admitted."""
        turn.refused = True
        self._observer.withdrawn(turn.turn)
        if lined_up:
            # With a slot, unless its time has come already.
            runs = self._books.unpark(turn)
        if runs or live.waits(turn):
            if runs:
                self._books.give_back()
            following = live.withdraw(turn)
            self._books.leave(turn)
            self._runner.go_on(live, following)
            self._runner.next_in_line()
        # Otherwise its time has come already, and its thread does the same.
        turn.accepted.set()
        with self._lock:
            if live.head == 0 and self._map.get(live.key) is live and live.close():
                del self._map[live.key]

    def _head(self, key: SessionKey) -> int:
        row = self.store.session(key)
        return row.head if row is not None else 0

    def _open(self, key: SessionKey, head: int) -> Live:
        fresh = self._fresh(key, head)
        with self._lock:
            if self._closed.is_set():
                raise Draining
            live = self._map.setdefault(key, fresh)
            out = self._over_caps(spare=live) if live is fresh else []
            if live is fresh and len(self._map) - len(out) > self._caps.max_sessions:
                del self._map[key]
                quota = Quota("sessions", self._caps.max_sessions)
                raise TooManySessions("every session of this worker is in use", quota=quota)
        self._retire(out, "crowded")
        return live

    def read_here(self, live: Live) -> None:
        """A client is going to read a session that another worker may be running."""
        self._peers.read_here(live)

    def reader_came(self) -> None:
        """A reader is attached, and what it waits for may be written elsewhere."""
        self._peers.nudge()

    def _fresh(self, key: SessionKey, head: int) -> Live:
        return Live(key, head=head, log_bytes=self._caps.log_bytes, clock=self.clock)

    # -- stopping ------------------------------------------------------------------------------

    def cancel(self, key: SessionKey) -> int:
        """Stop the running turn and end the queued ones; how many that were."""
        self.wake_up()
        # One that waits elsewhere would begin when ours ends: it has to be told before. If none
        # waits, ours need not wait for the store.
        mine = 0 if self._is_queued(key) else self._cancel_ours(key)
        try:
            theirs = self.store.signal(key, "cancelled_by_user", but=self._runner.worker)
            return mine + theirs + self._cancel_ours(key)
        except StoreUnavailable:
            mine += self._cancel_ours(key)
            if not mine:
                raise
            return mine

    def _is_queued(self, key: SessionKey) -> bool:
        try:
            row = self.store.session(key)
        except StoreUnavailable:
            return False
        return row is not None and row.queued

    def _cancel_ours(self, key: SessionKey) -> int:
        live = self.peek(key)
        return 0 if live is None else self._runner.stop_all(live, "cancelled_by_user")

    def answer(self, key: SessionKey, question_id: str, reply: Reply, *, by: str) -> Question:
        """Close a question, whichever worker asked it; how it is closed.

        Raises NotFound, InvalidRequest, or QuestionClosed if it was closed in another way.
        """
        self.wake_up()
        question = self._runner.questions.answer(key, question_id, reply, by=by)
        live = self.peek(key)
        if live is not None and live.owned:
            live.look_again()
            return question
        try:
            self.store.signal(key, ANSWERED, but=self._runner.worker, running_only=True)
        except StoreUnavailable:
            pass  # The row has the answer, and its worker looks from time to time.
        return question

    def delete(self, key: SessionKey, *, timeout: float) -> bool:
        """Remove the session; False if its turn did not stop within *timeout* seconds.

        It is then removed as soon as the turn has ended or was given up.
        """
        self.wake_up()
        if not self.store.tombstone(key):
            return True
        until = time.monotonic() + timeout
        with self._lock:
            live = self._map.get(key)
            if live is None:
                # Not in memory: this one takes nobody's place, and goes in a moment.
                live = self._map[key] = self._fresh(key, 0)
            live.deleting = True
        self._runner.stop_all(live, "session_deleted")
        self.store.signal(key, "session_deleted", but=self._runner.worker)
        ended = self._books.wait_quiet(lambda: not live.turns(), until)
        while ended and self.store.active(key):
            ended = time.monotonic() < until and not self._closed.wait(_ASK)
        # What cannot be removed now is tried again by the janitor.
        chores = self._runner.endings.chores
        return ended and chores.attempt("remove_session", key, functools.partial(self.remove, key))

    def remove(self, key: SessionKey) -> None:
        """Finish the deletion of a session that has a tombstone and no turn."""
        row = self.store.session(key)
        if row is None or not row.deleting:
            return  # Somebody else was faster, and it may be a new session by now.
        # While the tombstone stands, so that no new session finds its folder going away.
        self._agents.forget(key)
        self.store.delete(key)
        with self._lock:
            live = self._map.get(key)
            if live is None or not live.deleting:
                return
            del self._map[key]
        self._bury(live)

    def forget(self, live: Live) -> None:
        """Another worker removed this session."""
        with self._lock:
            if live.turns() or self._map.get(live.key) is not live:
                return
            del self._map[live.key]
        self._bury(live)

    def _bury(self, live: Live) -> None:
        """Tell whoever reads a session that it is gone."""
        draft = terminal(Outcome(State.CANCELLED, "session_deleted"), duration_ms=0)
        live.bury(Event(None, None, draft.type, draft.data, self.clock(), draft.extra))
        self._aside(functools.partial(self._runner.drop_agent, live))

    # -- time ----------------------------------------------------------------------------------

    def wake_up(self) -> None:
        """Begin the heartbeat and the janitor, once per process and only in the one that serves."""
        if self._pid == os.getpid():
            return
        with self._starting:
            if self._pid == os.getpid():
                return
            if self._closed.is_set():
                raise Draining
            if self._pid is not None:
                raise RuntimeError(
                    "agentao-web was used before the fork. Start turns in the worker only, "
                    "not while the application is loaded."
                )
            self._peers.start(uuid.uuid4().hex)
            self._pid = os.getpid()
            self._janitor = threading.Thread(
                target=self._watch_time, name="agentao-janitor", daemon=True
            )
            self._janitor.start()

    def _watch_time(self) -> None:
        # Often enough for a heartbeat that is never late: see agentao_web.readiness.
        slow = min(_SLOW_TICK, self._caps.worker_lease / 10)
        while not self._closed.is_set():
            try:
                self.tick(self.clock())
            except StoreUnavailable:
                pass  # The store has said so in the log, and is asked again.
            except Exception:
                self._log.exception("the janitor stumbled")
            self._nudge.wait(_TICK if self._books.turns else slow)
            self._nudge.clear()
            if self._books.turns:
                self._closed.wait(_TICK / 2)

    def tick(self, now: float) -> None:
        """Look at every deadline once: turns, readers that left, idle sessions."""
        for turn, live in self._books.running():
            try:
                self._check(live, turn, now)
            except Exception:
                self._log.exception("a turn's deadlines could not be looked at")
        # Not every place that comes free has a thread at hand: who parks gives one back too.
        self._runner.next_in_line()
        with self._lock:
            idle = limits.expired(self._map.values(), now, self._caps.session_ttl)
            crowd = [e for e in self._over_caps() if e not in idle]
        self._retire(idle, "idle")
        self._retire(crowd, "crowded")
        self._peers.look(now)
        self._observer.ticked()

    def _check(self, live: Live, turn: LiveTurn, now: float) -> None:
        reason = limits.overdue(turn.turn, now, max_waiting=self._caps.max_waiting_time)
        if turn.lost:
            reason = "worker_lost"
        if reason is None and turn.turn.request.on_disconnect == "cancel" and not turn.kept:
            left_at = turn.left_at
            if left_at is not None:
                alone = turn.turn.awake_for(now) - left_at
                reason = "client_gone" if alone >= self._caps.disconnect_grace else None
        if reason is not None:
            self._runner.stop(live, turn, reason)
        stuck = limits.hopeless(turn.turn, now, grace=self._caps.stop_grace)
        if stuck and turn.claim is not None and not turn.closing:
            self._aside(functools.partial(self._give_up, live, turn))

    def _give_up(self, live: Live, turn: LiveTurn) -> None:
        if self._runner.give_up(live, turn) * 2 >= self._caps.max_turns:
            self.exhausted()

    def _over_caps(self, spare: Live | None = None) -> list[Live]:
        caps = self._caps
        entries = self._map.values()
        out = limits.victims(entries, caps.max_sessions, caps.max_sessions_per_tenant)
        return [live for live in out if live is not spare]

    def _retire(self, entries: cabc.Iterable[Live], reason: str) -> None:
        """Put idle sessions out of memory; what they were is in the store."""
        agents: list[Agent] = []
        gone = 0
        for live in entries:
            with self._lock:
                # Out of the map before it is closed, and only if nobody came meanwhile.
                if self._map.get(live.key) is not live or not live.close():
                    continue
                del self._map[live.key]
            gone += 1
            if live.agent is not None:
                agents.append(live.agent)
                live.agent = None
        if gone:
            self._observer.evicted(gone, reason)
        if agents:
            self._aside(functools.partial(self._close_agents, agents))

    def _close_agents(self, agents: list[Agent]) -> None:
        for agent in agents:
            self._runner.close_agent(agent)

    def _aside(self, work: cabc.Callable[[], None]) -> None:
        threading.Thread(target=work, name="agentao-aside", daemon=True).start()

    # -- the end -------------------------------------------------------------------------------

    def drain(self, grace: float | None = None) -> None:
        """Take no more turns, end those there are within *grace* seconds, close everything.

        Queued turns end at once, running ones are stopped a little before the grace is over and
        given up at its end. Harmless twice; a second call hurries the first, and waits for it.
        """
        grace = self._caps.drain_grace if grace is None else grace
        start = time.monotonic()
        with self._lock:
            first, self._draining = not self._draining, True
            # Whoever is in the greatest hurry decides for all.
            self._until = min(self._until, start + grace)
        if not first:
            self._gone.wait(grace + 2 * COMMIT_TIMEOUT)
            return
        try:
            self._empty(grace)
        finally:
            self.close()

    def _empty(self, grace: float) -> None:
        """End every turn, and let readers have the last of it."""
        self.wake_readers()
        self._wait_quiet(lambda: self._until - min(grace / 2, self._caps.stop_grace), leave=True)
        for turn, live in self._books.running():
            self._runner.stop(live, turn, "server_shutdown")
        self._wait_quiet(lambda: self._until)
        for turn, live in self._books.running():
            if turn.claim is not None:
                self._runner.give_up(live, turn)
        self._wait_readers(min(self._until, time.monotonic()) + _FAREWELL)

    def _wait_quiet(self, until: cabc.Callable[[], float], *, leave: bool = False) -> None:
        """Until no turn is left or the time is up, which a hastier drain may have moved.

        With *leave* queued turns are stopped, and those that wait for a person: nobody will answer
        in time.
        """
        while self._books.turns and time.monotonic() < until():
            # The last first: who is stopped lets the one behind it begin, unless that is stopped.
            for turn, live in reversed(self._books.running() if leave else []):
                # In this order: one that is just being accepted has a claim before it says so.
                queued = turn.accepted.is_set() and turn.claim is None
                if queued or turn.turn.state is State.WAITING:
                    self._runner.stop(live, turn, "server_shutdown")
            self._books.wait_quiet(
                lambda: not self._books.turns, min(until(), time.monotonic() + _TICK)
            )

    def _wait_readers(self, until: float) -> None:
        """Let streams send what they have; the store is still there to ask."""
        for live in self.sessions():
            live.wait_unread(max(0.0, until - time.monotonic()))

    def wake_readers(self) -> None:
        """Have every reader look around."""
        for live in self.sessions():
            live.wake()

    def sessions(self) -> list[Live]:
        """Every session in memory."""
        with self._lock:
            return list(self._map.values())

    def close(self) -> None:
        """Close every agent, the writer and the store; the turns must have ended."""
        with self._lock:
            self._draining = True
            sessions, self._map = list(self._map.values()), {}
            janitor = self._janitor
        self._closed.set()
        self._nudge.set()
        try:
            if janitor is not None:
                janitor.join(5)
            self._writer.close(timeout=COMMIT_TIMEOUT)
            for live in sessions:
                live.close(force=True)
                self._runner.drop_agent(live)
            self._agents.close()
            self._peers.close()
            self.store.close()
            self._observer.close()
        finally:
            self._gone.set()


def _status(turn: Turn) -> str:
    """What a client is told of a turn that was accepted."""
    if turn.state is State.QUEUED:
        return "queued"
    return turn.state.value if turn.state in ENDED else "running"
