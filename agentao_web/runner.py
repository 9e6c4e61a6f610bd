"""One turn on its thread: claim, agent, terminal transaction, release; or giving it up."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import logging
import threading
import time
import typing as t

from agentao_web.core import clean
from agentao_web.core import trail
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import Draining
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WebError
from agentao_web.core.history import History
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.transcript import Transcript
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.core.turn import checked
from agentao_web.core.turn import settle
from agentao_web.endings import Ended
from agentao_web.endings import Endings
from agentao_web.live import Callback
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.questions import Questions
from agentao_web.questions import record
from agentao_web.store import AlreadyAccepted
from agentao_web.store import KeyUse
from agentao_web.store import Store
from agentao_web.store import TurnRow
from agentao_web.store.writer import Writer

_LOG = logging.getLogger(__name__)

#: Events that must not wait for the writer's next batch.
_AT_ONCE: t.Final = frozenset({"tool_start", "turn_queued"})
#: How long a terminal transaction may take, in seconds.
COMMIT_TIMEOUT: t.Final = 10.0


class Stage(t.Protocol):
    """What an agent has of the turn it runs."""

    turn_id: str

    def publish(self, draft: Draft) -> None:
        """Put an event into the session's log."""

    def on_stop(self, callback: Callback) -> None:
        """Call *callback* with the reason, from any thread, when the turn has to stop."""

    def ask(self, kind: str, data: cabc.Mapping[str, t.Any]) -> Question:
        """Ask a person with an event of that type, and wait; the question as it was closed.

        Only ``approved`` and ``answered`` are yes; raises what makes the turn fail.
        """

    def approved(self, data: cabc.Mapping[str, t.Any], by: str) -> None:
        """A tool runs without being asked about, by an approval that is remembered."""

    def stop(self, reason: str) -> None:
        """Stop the turn, for one of agentao_web.core.turn.STOP_REASONS."""

    def called(self, call: cabc.Mapping[str, t.Any]) -> None:
        """A call to the model has ended; see agentao_web.core.observer."""

    def time_left(self) -> float:
        """Seconds the turn may still run before its timeout stops it."""


class Agent(t.Protocol):
    """One conversation with a model. Used by one thread at a time."""

    def run(self, request: TurnRequest, stage: Stage) -> Outcome:
        """Run one turn, blocking; the outcome's status is completed, incomplete or failed."""

    def unsaved(self) -> tuple[list[dict[str, t.Any]], bool]:
        """History since ``saved``, or all of it and True if the past was rewritten."""

    def saved(self) -> None:
        """What ``unsaved`` gave is in the store."""

    def state(self) -> dict[str, t.Any] | None:
        """What else has to survive, as JSON: History.state of the agent built after this one."""

    def close(self) -> None:
        """Give back everything. Not called while ``run`` runs."""


class Agents(t.Protocol):
    """Builds agents; thread-safe."""

    def build(self, key: SessionKey, history: History) -> Agent:
        """An agent for the session, with what was said before."""

    def suits(self, key: SessionKey, agent: t.Any) -> bool:
        """Whether *agent*, built before, is still what the session should have."""

    def forget(self, key: SessionKey) -> None:
        """Remove what the session left outside of the store: its own workspace."""

    def close(self) -> None:
        """No agent is used any more: give back what they shared."""


def steady_clock() -> cabc.Callable[[], float]:
    """Unix seconds that never jump: the wall clock at the start, and monotonic time since."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Books:
    """Which turns there are, and how many of them hold a thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns: dict[LiveTurn, Live] = {}
        """Turns accepted and not ended."""
        self.slots = 0
        """Turns that run, given-up ones included until their thread ends."""
        self.given_up = 0
        """Turns that were given up and whose thread is alive."""
        self.parked: dict[LiveTurn, Live] = {}
        """Queued turns that wait, without a thread, for another worker's claim to end."""
        self.line: dict[LiveTurn, Live] = {}
        """Turns that wait, without a thread, for a place on this worker; oldest first."""
        self.quiet = threading.Condition(self.lock)

    def enter(self, turn: LiveTurn, live: Live) -> None:
        """Register a turn. The caller holds the lock, and has asked whether there is room."""
        self.turns[turn] = live

    def leave(self, turn: LiveTurn) -> None:
        """*turn* has ended."""
        with self.lock:
            self.turns.pop(turn, None)
            self.parked.pop(turn, None)
            self.line.pop(turn, None)
            self.quiet.notify_all()

    def give_back(self) -> None:
        """A running turn leaves its place."""
        with self.lock:
            self.slots -= 1

    def abandon(self, change: int) -> int:
        """Count a thread that was given up (1), or came back after all (-1)."""
        with self.lock:
            self.given_up += change
            return self.given_up

    def park(self, turn: LiveTurn, live: Live) -> None:
        """*turn* gives its slot back until another worker's claim has ended."""
        with self.lock:
            self.slots -= 1
            self.parked[turn] = live

    def unpark(self, turn: LiveTurn) -> bool:
        """Give *turn* a slot again; False if somebody else has done so, or ended it."""
        with self.lock:
            if self.parked.pop(turn, None) is None and self.line.pop(turn, None) is None:
                return False
            self.slots += 1
            return True

    def place(self, turn: LiveTurn, live: Live, most: int) -> bool:
        """*turn* gets a slot if fewer than *most* are taken; otherwise False, and it is in line."""
        with self.lock:
            if self.slots >= most:
                self.line[turn] = live
                return False
            self.slots += 1
            return True

    def take(self) -> None:
        """A place for somebody who needs it for a moment only."""
        with self.lock:
            self.slots += 1

    def advance(self, most: int) -> tuple[LiveTurn, Live] | None:
        """The first in line gets a slot, if fewer than *most* are taken."""
        with self.lock:
            if not self.line or self.slots >= most:
                return None
            turn = next(iter(self.line))
            self.slots += 1
            return turn, self.line.pop(turn)

    def find(self, turn_id: str) -> tuple[LiveTurn, Live] | None:
        """The registered turn of that id."""
        with self.lock:
            for turn, live in self.turns.items():
                if turn.turn.id == turn_id:
                    return turn, live
        return None

    def running(self) -> list[tuple[LiveTurn, Live]]:
        """Every registered turn and its session."""
        with self.lock:
            return list(self.turns.items())

    def holder(self, key: SessionKey) -> Live | None:
        """The session, if one of our turns holds it."""
        with self.lock:
            mine = (live for turn, live in self.turns.items() if live.key == key and turn.claim)
            return next(mine, None)

    def wait_quiet(self, condition: cabc.Callable[[], bool], until: float) -> bool:
        """Wait until *condition* holds, asked whenever a turn ended, or *until* (monotonic)."""
        with self.lock:
            return self.quiet.wait_for(condition, max(0.0, until - time.monotonic()))


class _Stage:
    def __init__(self, runner: Runner, live: Live, turn: LiveTurn) -> None:
        self.turn_id = turn.turn.id
        self._runner, self._live, self._turn = runner, live, turn
        self._spoke = False

    def publish(self, draft: Draft) -> None:
        live = self._live
        data = clean.fields(draft.data)
        if data is not draft.data:
            # What is no JSON would be in the way of all that is written with it.
            draft = draft._replace(data=data)
        if not live.publish(self._turn, draft):
            return
        if draft.type != "llm_text" or not self._spoke:
            self._spoke = self._spoke or draft.type == "llm_text"
            self._runner.observer.said(self._turn.turn, draft, live.clock())
        if live.crowded:
            self._runner.stop(live, self._turn, "event_limit")
        self._runner.writer.note(live, urgent=draft.type in _AT_ONCE)

    def on_stop(self, callback: Callback) -> None:
        self._live.on_stop(self._turn, callback)

    def ask(self, kind: str, data: cabc.Mapping[str, t.Any]) -> Question:
        return self._runner.questions.ask(self._live, self._turn, kind, clean.fields(data))

    def approved(self, data: cabc.Mapping[str, t.Any], by: str) -> None:
        question = Question("", self.turn_id, "tool_confirmation", data, 0.0, "approved", by)
        record(self._live.key, self.turn_id, question)

    def stop(self, reason: str) -> None:
        self._runner.stop(self._live, self._turn, reason)

    def time_left(self) -> float:
        turn = self._turn.turn
        return turn.deadline - turn.ran_for(self._live.clock())

    def called(self, call: cabc.Mapping[str, t.Any]) -> None:
        live = self._live
        self._runner.observer.called(live.key, self._turn.turn, call, live.clock())


class Runner:
    """Runs turns, each on a thread of its own, and sees that each ends exactly once."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        agents: Agents,
        books: Books,
        *,
        max_turns: int,
        question_timeout: float,
        patience: float,
        clock: cabc.Callable[[], float],
        log: logging.Logger,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer or Observer()
        self.questions = Questions(
            store,
            observer=self.observer,
            timeout=question_timeout,
            clock=clock,
            note=lambda live: writer.note(live, urgent=True),
        )
        self.worker = ""
        """Who writes the rows: a fresh name per process."""
        self.writer = writer
        self.endings = Endings(
            store,
            writer,
            self.questions,
            patience=patience,
            worker=lambda: self.worker,
            holder=books.holder,
            clock=clock,
            log=log,
            observer=self.observer,
        )
        self._store = store
        self._agents = agents
        self._books = books
        self._max_turns = max_turns
        self._clock = clock
        self._log = log

    def row(self, turn: LiveTurn) -> TurnRow:
        """*turn* as the store keeps it."""
        request = turn.turn.request
        return TurnRow(
            turn.turn.id, request.message, len(request.images), turn.turn.created, self.worker
        )

    @staticmethod
    def use(turn: LiveTurn) -> KeyUse | None:
        """The idempotency key of *turn* as the store keeps it."""
        use = turn.turn.request.use
        return KeyUse(*use) if use is not None else None

    def claim(self, live: Live, turn: LiveTurn) -> None:
        """Take the session for *turn* and show its beginning; raises what the store raises."""
        now = self._clock()
        request = turn.turn.request
        data = {
            "message": request.message,
            "images": len(request.images),
            "queued_ms": int((now - turn.turn.created) * 1000),
        }
        opening = Draft("turn_begin", data)
        try:
            claim = self._store.claim(live.key, self.row(turn), opening, now, self.use(turn))
        except (AlreadyAccepted, ClaimLost):
            raise
        except Exception as exc:
            if isinstance(exc, StoreUnavailable) or not isinstance(exc, WebError):
                # Its commit may have gone through all the same.
                self.endings.leave_open(live, turn, "store_unavailable")
            raise
        if live.agent is not None and live.agent_version != claim.version:
            # Another worker went on with this conversation.
            self.drop_agent(live)
        try:
            callbacks = live.begin(turn, claim)
        except Draining:
            self.endings.leave_open(live, turn, "store_unavailable")
            raise
        self.observer.began(live.key, turn.turn, now)
        call(callbacks, turn.turn.stop_reason or "")

    def start(self, live: Live, turn: LiveTurn) -> None:
        """Run *turn*, which holds a slot, and those queued behind it."""
        thread = threading.Thread(
            target=self._work, args=(live, turn), name="agentao-turn", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # No thread to be had; but the turn was accepted, so it must end.
            self._log.exception("cannot start a thread")
            self.go_on(live, self._conclude(live, turn, self.endings.broken(turn), None))

    def next_in_line(self) -> None:
        """Places may be free: start those that wait for one."""
        while (found := self._books.advance(self._max_turns)) is not None:
            turn, live = found
            self.start(live, turn)

    def go_on(self, live: Live, turn: LiveTurn | None) -> None:
        """Run *turn*, whose time has come, on a new thread, as soon as there is a place."""
        if turn is not None and self._placed(live, turn):
            self.start(live, turn)

    def _placed(self, live: Live, turn: LiveTurn) -> bool:
        """Give *turn* a slot, or put it in line: who was before it may have none to leave."""
        if self._books.place(turn, live, self._max_turns):
            return True
        if turn.turn.stop_reason is not None:
            # Stopped while it was queued: it does not wait any more.
            self.swept(live, [turn])
        return False

    def stop(self, live: Live, turn: LiveTurn, reason: str) -> bool:
        """Stop one turn; False if it had ended or was stopped before."""
        news, callbacks = live.stop(turn, reason)
        call(callbacks, reason)
        if news:
            self.swept(live, [turn])
        return news

    def stop_all(self, live: Live, reason: str) -> int:
        """Stop the running turn and end the queued ones; how many that were."""
        stopped, callbacks = live.stop_all(reason)
        call(callbacks, reason)
        self.swept(live, stopped)
        return len(stopped)

    def swept(self, live: Live, turns: cabc.Iterable[LiveTurn]) -> None:
        """Take turns that were stopped while they were queued off the books."""
        for turn in turns:
            if turn.claim is not None:
                continue
            if turn.outcome is not None:
                self.observer.ended(live.key, turn.turn, turn.outcome, self._clock())
                self._books.leave(turn)
                self.writer.note(live, urgent=True)
                self.end_row(live, turn)
            elif self._books.unpark(turn):
                # It waits for another worker, so nobody of ours would end it.
                outcome = Outcome(State.CANCELLED, turn.turn.stop_reason)
                self.go_on(live, self._conclude(live, turn, outcome, None))
            elif live.step_out(turn):
                # The one before it waits for another worker, perhaps for long.
                self._books.take()
                outcome = Outcome(State.CANCELLED, turn.turn.stop_reason)
                self._conclude(live, turn, outcome, None)

    def end_row(self, live: Live, turn: LiveTurn) -> None:
        """See that the end of a queued turn gets into the log, whatever becomes of us."""
        if (final := turn.final) is not None:
            draft = Draft(final.type, final.data, final.extra)
            self.endings.end_queued(live.key, turn.turn.id, draft)

    def give_up(self, live: Live, turn: LiveTurn) -> int:
        """*turn* does not end: close its log, retire its agent, count its thread.

        Returns how many threads are lost that way by now. History is what was before, the message
        and a note: it is never read from an agent whose thread still lives.
        """
        if not live.close_turn(turn, abandoned=True):
            return self._books.given_up
        told = _told(live, turn)
        self._log.error("turn %s ignored its stop and was given up", turn.turn.id, extra=told)
        self.observer.given_up(live.key, turn.turn)
        lost = self._books.abandon(1)
        # The reason it was stopped for decides the status.
        outcome = self._worded(turn, Outcome(State.FAILED, "internal_error"))
        outcome = dataclasses.replace(outcome, details={"abandoned": True})
        self.go_on(live, self._commit(live, turn, outcome, None))
        return lost

    def lose(self, live: Live, turn: LiveTurn) -> None:
        """Another worker has taken *turn*'s session over: stop it, and forget what was not stored.

        Its thread ends by itself, and writes nothing any more.
        """
        if turn.claim is None:
            return
        _, callbacks = live.stop(turn, "worker_lost")
        # Closed before it is stopped: it must not come to an end of its own.
        if live.close_turn(turn, abandoned=True):
            self._books.abandon(1)
            self.go_on(live, self._show(live, turn, self.endings.lost(live, turn)))
        call(callbacks, "worker_lost")

    def drop_agent(self, live: Live) -> None:
        """Close the session's agent, if it has one."""
        agent, live.agent = live.agent, None
        if agent is not None:
            self.close_agent(agent)

    def close_agent(self, agent: Agent) -> None:
        """Close *agent*; what it raises is only logged."""
        try:
            agent.close()
        except BaseException:
            self._log.exception("an agent could not be closed")

    # -- the thread ----------------------------------------------------------------------------

    def _work(self, live: Live, turn: LiveTurn) -> None:
        following: LiveTurn | None = turn
        while following is not None:
            turn = following
            with trail.along(_told(live, turn)):
                try:
                    following = self._run(live, turn)
                except BaseException:
                    # A mistake of ours, for which the session must not pay.
                    following = self._fallen(live, turn)
            if following is not None and not self._placed(live, following):
                following = None
        if turn.abandoned:
            self._books.give_back()
            self._books.abandon(-1)
        self.next_in_line()

    def _fallen(self, live: Live, turn: LiveTurn) -> LiveTurn | None:
        outcome = self.endings.broken(turn)
        if turn.outcome is not None:
            return None  # It has ended all the same.
        live.close_turn(turn)
        if turn.claim is not None:
            self.endings.lost(live, turn)
        self.drop_agent(live)
        return self._show(live, turn, Ended(outcome))

    def _run(self, live: Live, turn: LiveTurn) -> LiveTurn | None:
        agent: Agent | None = None
        if turn.claim is None:
            # The store is asked by the thread that accepts it, whose client is to hear of the end.
            if not turn.accepted.wait(COMMIT_TIMEOUT):
                outcome = Outcome(State.FAILED, "store_unavailable")
                return self._conclude(live, turn, outcome, None)
            if turn.refused:
                return self._withdrawn(live, turn)
        try:
            if turn.claim is None and not self._claimed(live, turn):
                return None
            if turn.turn.stop_reason is not None:
                outcome = Outcome(State.CANCELLED, turn.turn.stop_reason)
            else:
                agent = self._agent(live, turn)
                outcome = checked(agent.run(turn.turn.request, _Stage(self, live, turn)))
        except (ClaimLost, SessionBusy):
            outcome = Outcome(State.FAILED, "worker_lost")
        except StoreUnavailable:
            outcome = Outcome(State.FAILED, "store_unavailable")
        except BaseException:
            # Also SystemExit out of a tool: an agent that raised is not trusted again.
            outcome = self.endings.broken(turn)
            if agent is not None:
                if live.agent is agent:
                    live.agent = None
                self.close_agent(agent)
                agent = None
        return self._conclude(live, turn, outcome, agent)

    def _claimed(self, live: Live, turn: LiveTurn) -> bool:
        """Claim for a turn whose time had come; False if another worker was faster."""
        try:
            self.claim(live, turn)
        except SessionBusy:
            if live.deleting:
                raise
            self._books.park(turn, live)
            if turn.turn.stop_reason is not None:
                # Stopped in that very moment, when it was not parked yet.
                self.swept(live, [turn])
            return False
        return True

    def _withdrawn(self, live: Live, turn: LiveTurn) -> LiveTurn | None:
        self._books.give_back()
        following = live.withdraw(turn)
        self._books.leave(turn)
        return following

    def _agent(self, live: Live, turn: LiveTurn) -> Agent:
        if live.agent is not None and not self._agents.suits(live.key, live.agent):
            # Its principal may do something else by now.
            self.drop_agent(live)
        if live.agent is None:
            history = self._store.history(live.key)
            agent = self._agents.build(live.key, history)
            if not live.adopt(turn, agent, history.version):
                # Given up while it was built: nobody else will close it.
                self.close_agent(agent)
                raise ClaimLost
        return t.cast(Agent, live.agent)

    # -- the end -------------------------------------------------------------------------------

    def _conclude(
        self, live: Live, turn: LiveTurn, outcome: Outcome, agent: Agent | None
    ) -> LiveTurn | None:
        """Commit and show how *turn* ended; the one to run next, if any."""
        if not live.close_turn(turn):
            # Its log is closed already, and this agent is nobody's.
            if agent is not None:
                self.close_agent(agent)
            return None
        return self._commit(live, turn, self._worded(turn, outcome), agent)

    def _worded(self, turn: LiveTurn, outcome: Outcome) -> Outcome:
        outcome = settle(outcome, turn.turn.stop_reason)
        if outcome.status is State.COMPLETED:
            return outcome
        # Placeholders of the runtime are not what the agent said.
        return dataclasses.replace(outcome, reply=turn.transcript.reply())

    def _commit(
        self, live: Live, turn: LiveTurn, outcome: Outcome, agent: Agent | None
    ) -> LiveTurn | None:
        """The terminal transaction, then the terminal event; the one to run next, if any."""
        if turn.claim is None:
            return self._show(live, turn, self._end_unclaimed(live, turn, outcome))
        # A claim the writer found lost: what was not stored never was.
        ended = (
            self.endings.lost(live, turn)
            if turn.lost
            else self.endings.commit(live, turn, outcome, agent)
        )
        if ended.final is not None:
            # All it said is in the store now, and a reader may hold on to the turn.
            turn.transcript = Transcript()
        if ended.outcome is outcome and agent is not None and self._saved(agent):
            live.agent_version = turn.claim.generation
        else:
            self.drop_agent(live)
        if live.deleting:
            # What is deleted has no log any more: its last event goes without a number.
            ended = ended._replace(final=None)
        following = self._show(live, turn, ended)
        if ended.others and following is None:
            self.endings.write_left(live.key)
        return following

    def _saved(self, agent: Agent) -> bool:
        """Tell *agent* that its history is stored; False if it cannot go on with it."""
        try:
            agent.saved()
            return True
        except BaseException:
            self._log.exception("an agent failed after its turn, and is built anew")
            return False

    def _end_unclaimed(self, live: Live, turn: LiveTurn, outcome: Outcome) -> Ended:
        """End a turn that has no claim: who reads the log hears of it from whoever has."""
        draft = self.endings.terminal(turn, outcome)
        left = self.endings.end_queued(live.key, turn.turn.id, draft)
        final = left.final if left is not None else None
        if final is None:
            final = Event(None, turn.turn.id, draft.type, draft.data, self._clock(), draft.extra)
        return Ended(outcome, final, left is not None and left.unwritten)

    def _show(self, live: Live, turn: LiveTurn, ended: Ended) -> LiveTurn | None:
        """Tell the readers. If the log does not have its last event, that has no number."""
        outcome, final, others = ended
        if final is None:
            draft = self.endings.terminal(turn, outcome)
            final = Event(None, turn.turn.id, draft.type, draft.data, self._clock(), draft.extra)
        # Before anyone is told, all that is left to do: whoever asks then has to find it counted.
        self.observer.ended(live.key, turn.turn, outcome, self._clock())
        if not turn.abandoned:
            # Before anyone is told: whoever reacts with the next turn finds room for it.
            self._books.give_back()
        following = live.end(turn, outcome, final, others=others)
        self._books.leave(turn)
        return following


def _told(live: Live, turn: LiveTurn) -> dict[str, str]:
    """What a log line says of *turn*."""
    return trail.of(live.key, turn.turn.id, turn.turn.request.request_id)


def call(callbacks: cabc.Iterable[Callback], reason: str) -> None:
    """Call every one of *callbacks* with *reason*. Hold no lock."""
    for callback in callbacks:
        try:
            callback(reason)
        except Exception:
            # The others have to hear of it all the same, and so have other turns.
            _LOG.exception("a callback of a turn that is to stop failed")
