"""How turns end in the store: our own, those nobody runs, and those that never began.

Whatever the store, an agent or its history does, the end of a turn gets there: at once, within the
lease, or as that of a turn nobody runs.
"""

from __future__ import annotations

import collections.abc as cabc
import functools
import logging
import secrets
import time
import typing as t

from agentao_web.chores import Chores
from agentao_web.core import clean
from agentao_web.core import trail
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.question import closed
from agentao_web.core.transcript import Transcript
from agentao_web.core.transcript import lost_note
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import terminal
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.questions import LOST
from agentao_web.questions import Questions
from agentao_web.questions import record
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import Left
from agentao_web.store import Orphan
from agentao_web.store import Store
from agentao_web.store.writer import Writer

#: The first pause before an end is stored again, and the longest, in seconds.
_FIRST, _LONGEST = 0.05, 2.0
#: Failures that are not the store's absence, after which a turn's content is given up.
_TRIES: t.Final = 2


class Unsaved(t.Protocol):
    """What an agent has for the store (agentao_web.runner.Agent)."""

    def unsaved(self) -> tuple[list[dict[str, t.Any]], bool]: ...
    def state(self) -> dict[str, t.Any] | None: ...


class Ended(t.NamedTuple):
    """How a turn has ended."""

    outcome: Outcome
    final: Event | None = None
    """Its last event, if that is in the store."""
    others: bool = False
    """Queued turns of the session are left."""


class Endings:
    """Ends turns for one worker, each exactly once."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        questions: Questions,
        *,
        patience: float,
        worker: cabc.Callable[[], str],
        holder: cabc.Callable[[SessionKey], Live | None],
        clock: cabc.Callable[[], float],
        log: logging.Logger,
        observer: Observer,
    ) -> None:
        self.unclosed: dict[str, tuple[Live | None, Orphan, str]] = {}
        """Turns whose claim or end the store may not have, by id."""
        self.chores = Chores(clock=clock, log=log, observer=observer)
        self._store = store
        self._writer = writer
        self._questions = questions
        self._patience = patience
        self._worker = worker
        self._holder = holder
        self._clock = clock
        self._log = log
        self._observer = observer

    # -- a turn that ran here -------------------------------------------------------------------

    def commit(self, live: Live, turn: LiveTurn, outcome: Outcome, agent: Unsaved | None) -> Ended:
        """The terminal transaction, tried until the lease runs out.

        What cannot be stored is replaced by what can. If nothing can, the turn is left to be
        closed like one that nobody runs.
        """
        claim = t.cast(Claim, turn.claim)
        until, pause, failures = time.monotonic() + self._patience, _FIRST, 0
        tried = [self._all_of_it(live, turn, outcome, agent)]
        while True:
            finish = tried[-1]
            try:
                left = max(until - time.monotonic(), _FIRST)
                others = self._writer.finish(live, claim, finish, timeout=left)
                return Ended(finish.outcome, finish.events[-1], others)
            except ClaimLost:
                return self._found(live, turn, tried)
            except StoreUnavailable:
                failed = Outcome(State.FAILED, "store_unavailable")
            except Exception:
                # Perhaps only a connection that a pooler mixed up, so the same is tried again.
                failures, failed = failures + 1, self.broken(turn)
                if failures == _TRIES:
                    tried.append(self._without_agent(live, turn, failed))
            if time.monotonic() + pause >= until or self._writer.closing.wait(pause):
                self.leave_open(live, turn, t.cast(str, failed.reason))
                return Ended(failed)
            pause = min(pause * 2, _LONGEST)

    def lost(self, live: Live, turn: LiveTurn) -> Ended:
        """Its claim is good for nothing: what was not stored never was."""
        live.disown()
        # Should nobody else have taken it over, it is ours to close.
        self.leave_open(live, turn, LOST)
        return Ended(Outcome(State.FAILED, LOST))

    def broken(self, turn: LiveTurn) -> Outcome:
        """The outcome of a turn that something raised in; call it where that is caught."""
        error_id = secrets.token_hex(8)
        self._log.exception("turn %s failed, error_id %s", turn.turn.id, error_id)
        return Outcome(State.FAILED, "internal_error", details={"error_id": error_id})

    def terminal(self, turn: LiveTurn, outcome: Outcome) -> Draft:
        """Its last event."""
        now = self._clock()
        began = now if turn.turn.began is None else turn.turn.began
        return terminal(outcome, duration_ms=int((now - began) * 1000))

    def _all_of_it(
        self, live: Live, turn: LiveTurn, outcome: Outcome, agent: Unsaved | None
    ) -> Finish:
        if agent is None:
            return self._without_agent(live, turn, outcome)
        try:
            appended, rewritten = agent.unsaved()
            state = agent.state()
            if clean.nests(appended) or clean.nests(state):
                raise ValueError("its history nests too deeply: it could not be read again")
            return self._finish(live, turn, outcome, appended, rewritten, state)
        except BaseException:
            return self._without_agent(live, turn, self.broken(turn))

    def _without_agent(self, live: Live, turn: LiveTurn, outcome: Outcome) -> Finish:
        """Nobody can say what the model would remember: the message, and a note."""
        note = _note(turn.turn.request.message, turn.transcript)
        return self._finish(live, turn, outcome, note, False, None)

    def _finish(
        self,
        live: Live,
        turn: LiveTurn,
        outcome: Outcome,
        appended: list[dict[str, t.Any]],
        rewritten: bool,
        state: dict[str, t.Any] | None,
    ) -> Finish:
        final = live.number(turn, self.terminal(turn, outcome))
        said = turn.transcript.closed(outcome.status.value)
        return Finish([final], outcome, said, appended, rewritten, final.ts, state)

    def _found(self, live: Live, turn: LiveTurn, tried: list[Finish]) -> Ended:
        """The claim is gone: with one of our own attempts, perhaps, whose answer was lost."""
        try:
            ended = self._store.ended(live.key, turn.turn.id)
            for finish in tried if ended is not None else ():
                if ended is not None and finish.events[-1].seq == ended.final.seq:
                    others = bool(self._store.active(live.key))
                    return Ended(finish.outcome, finish.events[-1], others)
        except StoreUnavailable:
            pass  # Whoever closes it finds that there is nothing to close.
        except Exception:
            self._log.exception("turn %s: nobody can say how it ended", turn.turn.id)
        return self.lost(live, turn)

    # -- queued turns ---------------------------------------------------------------------------

    def end_queued(self, key: SessionKey, turn_id: str, ending: Draft) -> Left | None:
        """A queued turn ends; if the store cannot be told, it is told later."""
        try:
            return self._store.end_queued(key, turn_id, ending, self._clock())
        except StoreUnavailable:
            self._log.warning("turn %s: its end is not in the log yet", turn_id)
        except Exception:
            self._log.exception("turn %s: its end is not in the log yet", turn_id)
        self.end_later(key, turn_id, ending)
        return None

    def end_later(self, key: SessionKey, turn_id: str, ending: Draft | None = None) -> None:
        """The store may have a turn in its queue, and nobody here does: end it when it is back."""
        orphan = Orphan(key, turn_id, running=False, cursor=0, ending=ending)
        self.unclosed[turn_id] = None, orphan, "store_unavailable"

    def write_left(self, key: SessionKey) -> None:
        """Some have left the queue while the claim was ours, too late to be written under it."""
        try:
            for turn in self._store.active(key):
                if turn.ending is not None:
                    self._store.end_queued(key, turn.id, turn.ending, self._clock())
        except StoreUnavailable:
            pass  # The janitor finds them.
        except Exception:
            self._log.exception("the ends of queued turns are not in the log yet")

    def write_endings(self, key: SessionKey) -> None:
        """Write how turns that were queued elsewhere ended, if we hold the session."""
        live = self._holder(key)
        if live is None:
            return
        for turn in self._store.active(key):
            if turn.ending is not None and live.end_elsewhere(turn.id, turn.ending):
                self._writer.note(live, urgent=True)

    # -- turns nobody runs ----------------------------------------------------------------------

    def leave_open(self, live: Live, turn: LiveTurn, code: str) -> None:
        """The store may hold the claim of *turn*, which is over here: to be closed with *code*."""
        orphan = Orphan(live.key, turn.turn.id, True, turn.cursor)
        self.unclosed[turn.turn.id] = live, orphan, code

    def reap_later(self, orphan: Orphan) -> None:
        """Close another worker's turn when that can be done.

        It may be taken over already: then it is ours, and nobody takes it for lost any more.
        """
        again = Orphan(orphan.key, orphan.turn_id, orphan.running, orphan.cursor, orphan.ending)
        self.unclosed[orphan.turn_id] = None, again, LOST

    def close_ours(self) -> None:
        """Close what is left open, each on its own: one that cannot be closed holds up no other.

        One whose commit had gone through keeps its true outcome.
        """
        for turn_id, (live, orphan, code) in list(self.unclosed.items()):
            work = functools.partial(self._end_orphan, orphan, code)
            if not self.chores.attempt("close_turn", turn_id, work):
                continue
            self.unclosed.pop(turn_id, None)
            if live is not None and not live.owned:
                # What was shown here and never stored is no part of the log.
                live.disown()

    def reap(self, orphan: Orphan) -> None:
        """End a turn nobody runs: in its log, in the transcript, in what the model reads.

        Of a queued one that has ended already only the log has to hear.
        """
        try:
            self._end_orphan(orphan, LOST)
        except ClaimLost:
            raise
        except Exception:
            self.reap_later(orphan)
            raise

    def _end_orphan(self, orphan: Orphan, code: str) -> None:
        ended = self._close(orphan, code) if orphan.running else self._let_go(orphan, code)
        if ended and code == LOST:
            self._observer.reaped(orphan.key, orphan.turn_id)

    def _let_go(self, orphan: Orphan, code: str) -> bool:
        """End a queued turn; whether it had not ended before."""
        ending = orphan.ending or terminal(Outcome(State.FAILED, code), duration_ms=0)
        left = self._store.end_queued(orphan.key, orphan.turn_id, ending, self._clock())
        if left is not None and left.unwritten:
            self.write_endings(orphan.key)
        ended = left is not None and left.first and orphan.ending is None
        if ended:
            self._tell(orphan, code)
        return ended

    def _close(self, orphan: Orphan, code: str) -> bool:
        claim = self._store.take_over(orphan, self._worker())
        if claim is None:
            return False
        outcome = Outcome(State.FAILED, code)
        message, questions = "", list[Question]()
        try:
            message, transcript, asked = self._told(orphan)
            questions = self._abandoned(orphan, asked)
            self._store.finish(claim, self._last(claim, outcome, questions, message, transcript))
        except (ClaimLost, StoreUnavailable):
            raise
        except Exception:
            # What it said cannot be read, or not be kept; but it ends.
            self._log.exception("turn %s is closed without what it said", orphan.turn_id)
            self._store.finish(claim, self._last(claim, outcome, [], message, Transcript()))
        self._tell(orphan, code)
        for question in questions:
            if question.by == LOST:
                record(orphan.key, orphan.turn_id, question)
                self._observer.asked(orphan.key, question)
        return True

    def _last(
        self,
        claim: Claim,
        outcome: Outcome,
        questions: cabc.Iterable[Question],
        message: str,
        transcript: Transcript,
    ) -> Finish:
        now, first = self._clock(), t.cast(int, claim.opening.seq)
        drafts = [*map(closed, questions), terminal(outcome, duration_ms=0)]
        events = [
            Event(first + n, claim.turn_id, draft.type, draft.data, now, draft.extra)
            for n, draft in enumerate(drafts)
        ]
        entries = transcript.closed(outcome.status.value) if transcript.entries else []
        appended = _note(message, transcript) if message else []
        return Finish(events, outcome, entries, appended, False, now)

    def _told(self, orphan: Orphan) -> tuple[str, Transcript, list[str]]:
        """The turn's message, what it said, and which of its questions its log leaves open."""
        transcript = Transcript()
        message = ""
        asked: dict[str, bool] = {}
        for event in self._events_of(orphan):
            transcript.add(event)
            if event.type == "turn_begin":
                message = event.data["message"]
            elif "question_id" in event.data:
                asked[event.data["question_id"]] = event.type != "question_closed"
        return message, transcript, [q for q, is_open in asked.items() if is_open]

    def _abandoned(self, orphan: Orphan, asked: list[str]) -> list[Question]:
        """Its questions that nobody waits for any more, closed; also those answered unheard.

        *asked* are those that are open as its log has it; the rows say how they are closed.
        """
        mine = [q.id for q in self._store.questions(orphan.key) if q.turn_id == orphan.turn_id]
        ids = dict.fromkeys([*asked, *mine])
        return [self._questions.abandon(orphan.key, question_id) for question_id in ids]

    def _events_of(self, orphan: Orphan) -> cabc.Iterator[Event]:
        cursor = orphan.cursor
        while True:
            part = self._store.events(orphan.key, cursor, limit=1000, max_bytes=2**22)
            yield from (e for e in part.events if e.turn_id == orphan.turn_id)
            if not part.events:
                return
            cursor = part.cursor

    def _tell(self, orphan: Orphan, code: str) -> None:
        told = trail.of(orphan.key, orphan.turn_id)
        self._log.warning(
            "turn %s was left open, and is closed: %s", orphan.turn_id, code, extra=told
        )


def _note(message: str, transcript: Transcript) -> list[dict[str, t.Any]]:
    return [
        {"role": "user", "content": message},
        {"role": "assistant", "content": lost_note(transcript)},
    ]
