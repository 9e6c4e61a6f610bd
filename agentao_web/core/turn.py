"""A turn: its states, why it stopped, how it ended. Time is always an argument."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import enum
import typing as t

from agentao_web.core import clean
from agentao_web.core.errors import FAILURES
from agentao_web.core.log import Draft


class State(enum.StrEnum):
    """Where a turn is."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    STOPPING = "stopping"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


_S = State

#: state -> step -> next state. A step that is not in the row is illegal.
TRANSITIONS: t.Final[dict[State, dict[str, State]]] = {
    _S.QUEUED: {
        "begin": _S.RUNNING,
        "cancelled": _S.CANCELLED,
        "failed": _S.FAILED,
    },
    _S.RUNNING: {
        "ask": _S.WAITING,
        "stop": _S.STOPPING,
        "completed": _S.COMPLETED,
        "incomplete": _S.INCOMPLETE,
        "failed": _S.FAILED,
    },
    _S.WAITING: {
        "answer": _S.RUNNING,
        "stop": _S.STOPPING,
        "failed": _S.FAILED,
    },
    _S.STOPPING: {
        "incomplete": _S.INCOMPLETE,
        "cancelled": _S.CANCELLED,
        "timed_out": _S.TIMED_OUT,
        "failed": _S.FAILED,
    },
    _S.COMPLETED: {},
    _S.INCOMPLETE: {},
    _S.CANCELLED: {},
    _S.TIMED_OUT: {},
    _S.FAILED: {},
}

#: The events that end a turn.
ENDS: t.Final = frozenset({"done", "error"})

ENDED: t.Final = frozenset(state for state, row in TRANSITIONS.items() if not row)

#: Why a turn was stopped -> the state that makes of it.
STOP_REASONS: t.Final[dict[str, State]] = {
    "cancelled_by_user": _S.CANCELLED,
    "client_gone": _S.CANCELLED,
    "interrupted": _S.CANCELLED,
    "session_deleted": _S.CANCELLED,
    "server_shutdown": _S.CANCELLED,
    "turn_timeout": _S.TIMED_OUT,
    "waiting_timeout": _S.TIMED_OUT,
    "event_limit": _S.INCOMPLETE,
    "tool_limit": _S.INCOMPLETE,
    "token_limit": _S.INCOMPLETE,
    "text_limit": _S.INCOMPLETE,
    "budget_exhausted": _S.INCOMPLETE,
    "worker_lost": _S.FAILED,
    "store_unavailable": _S.FAILED,
}


class IllegalStep(RuntimeError):
    """A turn was asked for a step its state does not know; nothing changed."""


@dataclasses.dataclass(frozen=True)
class TurnRequest:
    """What a client asked for, already checked."""

    message: str
    images: tuple[cabc.Mapping[str, str], ...] = ()
    on_busy: t.Literal["reject", "queue", "interrupt"] = "reject"
    on_disconnect: t.Literal["cancel", "continue"] = "continue"
    timeout: float | None = None
    """Seconds of running time, at most the server's ``TURN_TIMEOUT``."""
    use: tuple[str, str] | None = None
    """The Idempotency-Key, and the SHA-256 of the body it came with."""
    request_id: str = ""
    """The X-Request-Id that its log lines carry."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a turn ended, before and after a stop reason had its say."""

    status: State
    reason: str | None = None
    """An ``incomplete`` reason, a stop reason, or the code of a failure."""
    reply: str = ""
    usage: cabc.Mapping[str, int] = dataclasses.field(default_factory=dict)
    tool_count: int = 0
    details: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Turn:
    """One message and what becomes of it."""

    id: str
    request: TurnRequest
    created: float
    deadline: float
    """Seconds of running time this turn may take."""
    state: State = State.QUEUED
    stop_reason: str | None = None
    stopped: float | None = None
    began: float | None = None
    ended: float | None = None
    _waited: float = 0.0
    _waiting_since: float | None = None

    def step(self, name: str, now: float) -> None:
        """Go where the table says; IllegalStep if it says nothing."""
        following = TRANSITIONS[self.state].get(name)
        if following is None:
            raise IllegalStep(f"a turn that is {self.state} cannot {name}")
        if self._waiting_since is not None:
            self._waited += now - self._waiting_since
            self._waiting_since = None
        self.state = following
        if following is State.WAITING:
            self._waiting_since = now
        elif name == "begin":
            self.began = now
        elif following in ENDED:
            self.ended = now

    def stop(self, reason: str, now: float) -> bool:
        """Ask it to stop; False if it has ended or was stopped before: the first reason wins."""
        STOP_REASONS[reason]
        if self.stop_reason is not None or self.state in ENDED:
            return False
        self.stop_reason, self.stopped = reason, now
        if self.state is not State.QUEUED:
            self.step("stop", now)
        return True

    def end(self, outcome: Outcome, now: float) -> None:
        """Enter the state of *outcome*, by way of other steps where the table asks for them."""
        if self.state is State.QUEUED and outcome.status.value not in TRANSITIONS[State.QUEUED]:
            self.step("begin", now)
            if self.stop_reason is not None:
                self.step("stop", now)
        elif self.state is State.WAITING and outcome.status.value not in TRANSITIONS[self.state]:
            # Its agent ended with a question still open on another thread.
            self.step("answer" if self.stop_reason is None else "stop", now)
        self.step(outcome.status.value, now)

    def waited_for(self, now: float) -> float:
        """Seconds spent waiting for people."""
        open_wait = 0.0 if self._waiting_since is None else now - self._waiting_since
        return self._waited + open_wait

    def ran_for(self, now: float) -> float:
        """Seconds of running time: since it began, less the waiting."""
        return 0.0 if self.began is None else now - self.began - self.waited_for(now)

    def awake_for(self, now: float) -> float:
        """Seconds since it was accepted, less the waiting: a clock questions hold still."""
        return now - self.created - self.waited_for(now)


def checked(outcome: object) -> Outcome:
    """What an agent says of its turn, as far as it can be told and kept; TypeError if it cannot."""
    if not isinstance(outcome, Outcome):
        raise TypeError(f"an agent ends a turn with an Outcome, not {type(outcome).__name__}")
    tools = outcome.tool_count
    return dataclasses.replace(
        outcome,
        reason=None if outcome.reason is None else clean.words(outcome.reason),
        reply=clean.words(outcome.reply),
        usage=clean.usage(outcome.usage),
        tool_count=tools if clean.is_tokens(tools) else 0,
        details=clean.fields(outcome.details),
    )


def settle(outcome: Outcome, stop_reason: str | None) -> Outcome:
    """*outcome* as a turn stopped for *stop_reason* ends: the reason wins over what came out.

    One that no agent may end with, stopped by nobody, is a failure.
    """
    if stop_reason is None:
        failed = outcome.status is State.FAILED
        known = (outcome.reason or "internal_error") in FAILURES if failed else True
        if known and outcome.status in (State.COMPLETED, State.INCOMPLETE, State.FAILED):
            return outcome
        return dataclasses.replace(outcome, status=State.FAILED, reason="internal_error")
    status = STOP_REASONS[stop_reason]
    return dataclasses.replace(outcome, status=status, reason=stop_reason)


def terminal(outcome: Outcome, *, duration_ms: int) -> Draft:
    """The one ``done`` or ``error`` event that ends a turn."""
    data: dict[str, t.Any] = {
        "status": outcome.status.value,
        "reason": outcome.reason,
        "usage": clean.usage(outcome.usage),
        "tool_count": outcome.tool_count,
        "duration_ms": duration_ms,
    }
    if outcome.status is not State.FAILED:
        if outcome.details:
            data["details"] = dict(outcome.details)
        return Draft("done", data, {"reply": outcome.reply})
    code = outcome.reason or "internal_error"
    error = {"code": code, "message": FAILURES[code], "details": dict(outcome.details)}
    return Draft("error", data, {"error": error})
