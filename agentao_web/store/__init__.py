"""What survives a restart: the Store protocol, and the rows that go through it.

Every turn goes claim -> append -> finish through a store. Only the holder of a claim writes to a
session's log; a claim is named by its generation, and nothing is written under an older one.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import Slice
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome


@dataclasses.dataclass(frozen=True)
class TurnRow:
    """A turn as it is written before anyone is told about it."""

    id: str
    message: str
    images: int
    created: float
    worker: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """The right to write to one session, for one turn."""

    key: SessionKey
    generation: int
    turn_id: str
    opening: Event
    """The first event of the claim, written with it."""
    version: int = 0
    """The session's version: an agent that has another one is out of date."""


@dataclasses.dataclass(frozen=True)
class SessionRow:
    """A session as the store knows it."""

    key: SessionKey
    title: str
    created: float
    updated: float
    head: int
    """The last ``seq`` written."""
    version: int
    """Grows by one with each finished turn; an agent behind it is rebuilt."""
    turns: int
    usage: cabc.Mapping[str, int]
    deleting: bool = False


@dataclasses.dataclass(frozen=True)
class History:
    """What the model gets. ``epoch`` grows when the past was rewritten (a compaction)."""

    messages: list[dict[str, t.Any]]
    epoch: int
    version: int


@dataclasses.dataclass(frozen=True)
class Finish:
    """All that the terminal transaction writes, or none of it."""

    events: list[Event]
    """The remaining events of the turn, put in front by the writer; the terminal one is last."""
    outcome: Outcome
    transcript: list[dict[str, t.Any]]
    appended: list[dict[str, t.Any]]
    """New history messages; the whole history if *rewritten*."""
    rewritten: bool
    now: float


@dataclasses.dataclass(frozen=True)
class MessagePage:
    """A page of the transcript, oldest first; ids are 1, 2, 3 … per session."""

    messages: list[dict[str, t.Any]]
    more: bool


class Store(t.Protocol):
    """Where sessions live. All methods are thread-safe; every one may raise StoreUnavailable."""

    def claim(self, key: SessionKey, turn: TurnRow, opening: Draft, now: float) -> Claim:
        """Commit *turn*, its message and its first event, and take the session for it.

        Creates the session if need be. A queued turn's row becomes the running one.
        Raises SessionBusy if another turn holds the claim or the session is being deleted, and
        TooManySessions if the tenant has no room for a new one.
        """

    def enqueue(self, key: SessionKey, turn: TurnRow) -> None:
        """Commit a turn that waits for the running one, in a new session if that is not yet there.

        Raises SessionBusy for a session being deleted, and TooManySessions.
        """

    def dequeue(self, key: SessionKey, turn_id: str, outcome: Outcome) -> None:
        """A queued turn ended without having begun."""

    def append(self, claim: Claim, events: cabc.Sequence[Event]) -> None:
        """Write a batch to the log; ClaimLost if the claim is no longer ours."""

    def finish(self, claim: Claim, finish: Finish) -> None:
        """The terminal transaction, which also releases the claim; ClaimLost as above."""

    def session(self, key: SessionKey) -> SessionRow | None:
        """The session's row, or None if there is none."""

    def events(self, key: SessionKey, after: int | None, *, limit: int, max_bytes: int) -> Slice:
        """A part of the log, as EventLog.after gives it; NotFound for an unknown session."""

    def transcript(
        self, key: SessionKey, *, before: int | None, after: int | None, limit: int
    ) -> MessagePage:
        """The newest entries before *before*, or the oldest after *after*; NotFound as above."""

    def history(self, key: SessionKey) -> History:
        """What the model is to get; empty for an unknown session."""

    def tombstone(self, key: SessionKey) -> bool:
        """Refuse new turns from now on; False if there is no such session."""

    def delete(self, key: SessionKey) -> None:
        """Remove every row of the session. Harmless twice."""

    def close(self) -> None:
        """Give back what the store holds open."""
