"""What the rooms tell whoever looks on: metrics, logs, spans. None of them decides anything.

Told on the thread where it happened, never under a lock; an observer returns at once.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import typing as t

from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.question import Question
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import Turn


class Observer:
    """Sees everything and does nothing: the base of those that do something with it."""

    def accepted(self, key: SessionKey, turn: Turn) -> None:
        """A request asks for *turn*; on the request's thread, before the store has it."""

    def withdrawn(self, turn: Turn) -> None:
        """A limit or the store refused *turn*: as if nobody had asked."""

    def began(self, key: SessionKey, turn: Turn, now: float) -> None:
        """*turn* holds its session."""

    def said(self, turn: Turn, draft: Draft, now: float) -> None:
        """The agent of *turn* published *draft*: its first text, and all that is no text."""

    def called(
        self, key: SessionKey, turn: Turn, call: cabc.Mapping[str, t.Any], now: float
    ) -> None:
        """A call to the model has ended: its ``model``, ``status``, ``duration_ms``, tokens."""

    def ended(self, key: SessionKey, turn: Turn, outcome: Outcome, now: float) -> None:
        """*turn* ends like this; also one that never began. Its readers are told next."""

    def reaped(self, key: SessionKey, turn_id: str) -> None:
        """A turn that another worker left open was ended here."""

    def given_up(self, key: SessionKey, turn: Turn) -> None:
        """*turn* ignored its stop; its thread is lost for now."""

    def asked(self, key: SessionKey, question: Question) -> None:
        """A *question* of a turn of ours was closed."""

    def evicted(self, sessions: int, reason: str) -> None:
        """So many sessions went out of memory: they were ``idle``, or there were too many."""

    def refused(self, code: str) -> None:
        """A request was answered with this error."""

    def stored(self, events: cabc.Sequence[Event]) -> None:
        """These went into the store."""

    def store_failed(self) -> None:
        """The store could not be asked."""

    def stumbled(self, kind: str) -> None:
        """Cleaning up failed, and will be tried again; *kind* is one of agentao_web.chores."""

    def ticked(self) -> None:
        """Some time has passed: sizes may be looked at."""

    def close(self) -> None:
        """Nothing happens any more."""


class Observers(Observer):
    """Tells several; what one of them raises is logged and stops nobody."""

    def __init__(self, observers: cabc.Iterable[Observer], log: logging.Logger) -> None:
        everyone = list(observers)
        for name in vars(Observer):
            # Only those who listen: a call nobody listens to stays an empty function.
            ears = [getattr(one, name) for one in everyone if _listens(one, name)]
            if ears and not name.startswith("_"):
                setattr(self, name, _Tell(ears, log))


class _Tell:
    def __init__(self, ears: list[cabc.Callable[..., None]], log: logging.Logger) -> None:
        self._ears = ears
        self._log = log

    def __call__(self, *told: object) -> None:
        for ear in self._ears:
            try:
                ear(*told)
            except Exception:
                self._log.exception("an observer failed")


def _listens(observer: Observer, name: str) -> bool:
    return getattr(type(observer), name) is not getattr(Observer, name)
