"""Asks people on behalf of running turns, and takes their answers, on any worker.

The row in the store decides: answer, expiry and stop are the same compare-and-set on it, and
whoever asked obeys the row, never a clock of its own. No request thread waits for a person.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import threading
import typing as t
import uuid

from agentao_web.core import trail
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import QuestionClosed
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.question import Reply
from agentao_web.core.question import cancelled
from agentao_web.core.question import closing
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.store import Store

#: The signal to a worker that one of its questions was answered elsewhere.
ANSWERED: t.Final = "question_answered"
#: Who closes what a lost worker asked.
LOST: t.Final = "worker_lost"
#: How often an open question's row is looked at without being told to, in seconds.
_LOOK: t.Final = 5.0
#: How often a store that is away is asked again, in seconds.
_RETRY: t.Final = 0.5

_audit = logging.getLogger("agentao_web.audit")


class Questions:
    """What the agents of one worker asked people."""

    def __init__(
        self,
        store: Store,
        *,
        timeout: float,
        clock: cabc.Callable[[], float],
        note: cabc.Callable[[Live], None],
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._store = store
        self._timeout = timeout
        self._clock = clock
        self._note = note

    def ask(
        self, live: Live, turn: LiveTurn, kind: str, data: cabc.Mapping[str, t.Any]
    ) -> Question:
        """Ask, and wait until the question is closed; how it was. On a thread of the turn.

        Raises StoreUnavailable or ClaimLost if it cannot be asked.
        """
        expires = self._clock() + self._timeout
        question_id = uuid.uuid4().hex
        told = {"question_id": question_id, **data, "expires_at": expires}
        question = Question(question_id, turn.turn.id, kind, told, expires)
        claim = turn.claim
        if claim is None or _over(turn):
            return cancelled(question, _over(turn) or "turn_ended")
        with live.looking() as look:
            # The row first: whoever sees the event may answer at once.
            self._store.ask(claim, question)
            live.ask(turn, question)
            self._note(live)
            live.on_stop(turn, lambda reason: look.set())
            question = self._wait(live, turn, question, look)
        live.settled(turn, question)
        self._note(live)
        if question.by != LOST:
            # Of those whoever closes the turn tells.
            record(live.key, turn.turn.id, question)
            self._observer.asked(live.key, question)
        if over := _over(turn):
            # What was approved in the very moment of the stop is not done any more.
            return cancelled(question, over)
        return question

    def _wait(
        self, live: Live, turn: LiveTurn, question: Question, look: threading.Event
    ) -> Question:
        while True:
            over = _over(turn)
            try:
                if over is not None:
                    return self._store.settle(live.key, question.id, "cancelled", by=over)
                left = question.expires - self._clock()
                if left <= 0:
                    return self._store.settle(live.key, question.id, "expired", by="timeout")
                row = self._store.question(live.key, question.id)
                if row is None:
                    return cancelled(question, _over(turn) or "turn_ended")
                if row.outcome is not None:
                    return row
                look.wait(min(left, _LOOK))
                look.clear()
            except NotFound:
                # The session was deleted.
                return cancelled(question, _over(turn) or "turn_ended")
            except StoreUnavailable:
                if over is not None:
                    return cancelled(question, over)
                look.wait(_RETRY)
                look.clear()

    def abandon(self, key: SessionKey, question_id: str) -> Question:
        """Nobody waits for it any more, its worker is lost; how it is closed."""
        return self._store.settle(key, question_id, "cancelled", by=LOST)

    def answer(self, key: SessionKey, question_id: str, reply: Reply, *, by: str) -> Question:
        """Close a question of the session; how it is closed, also if that was so before.

        Raises NotFound, InvalidRequest for a reply that is no answer to it, and QuestionClosed if
        it was closed in another way.
        """
        question = self._store.question(key, question_id)
        if question is None:
            raise NotFound("no such question")
        outcome, answer = closing(question, reply)
        row = question
        if row.outcome is None:
            row = self._store.settle(key, question_id, outcome, by=by, answer=answer)
        if (row.outcome, dict(row.answer)) != (outcome, answer):
            raise QuestionClosed(question_id=question_id, outcome=row.outcome, by=row.by)
        return row


def _over(turn: LiveTurn) -> str | None:
    """Why *turn* does not wait any more, or None."""
    return turn.turn.stop_reason or ("turn_ended" if turn.closing or turn.lost else None)


def record(key: SessionKey, turn_id: str, question: Question) -> None:
    """One line for the audit: who, what, and how it was decided."""
    span = question.answer.get("remember")
    told = {
        **trail.of(key, turn_id),
        "outcome": question.outcome,
        "tool": question.data.get("tool", "ask_user"),
        "by": question.by,
        "question_id": question.id or None,
        "remember": span,
    }
    _audit.info(
        "%s: %r by %r; tenant %r, user %r, session %r, turn %s, question %s%s",
        question.outcome,
        told["tool"],
        question.by,
        key.tenant,
        key.user,
        key.id,
        turn_id,
        question.id or "none",
        f", remembered for this {span}" if span else "",
        extra=told,
    )
