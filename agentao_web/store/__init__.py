"""What survives a restart: the Store protocol, and the rows that go through it.

Every turn goes claim -> append -> finish through a store. Only the holder of a claim writes to a
session's log; a claim is named by its generation, and nothing is written under an older one.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

from agentao_web.core.history import History
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import Slice
from agentao_web.core.names import SessionKey
from agentao_web.core.question import NO_ANSWER
from agentao_web.core.question import Question
from agentao_web.core.turn import Outcome

#: Reason of a signal: a queued turn has ended elsewhere, and its end is to be put into the log.
LEFT: t.Final = "left_queue"


#: What a database URL may begin with -> what SQLAlchemy calls it.
DRIVERS: t.Final = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
}


def check_url(url: str) -> None:
    """RuntimeError, with the cure, for a database URL that no store of ours takes.

    It needs no database and no SQLAlchemy, so that init_app can ask it.
    """
    name, colon, rest = url.partition("://")
    if url.startswith("memory:"):
        return
    if not colon or not name:
        raise RuntimeError("the database URL cannot be read. Is it a URL?")
    if name not in DRIVERS:
        raise RuntimeError(f"no store for {name}: use sqlite:///path or postgresql://…")
    file = rest.partition("?")[0].partition("/")[2]
    if name.startswith("sqlite") and file in ("", ":memory:"):
        raise RuntimeError("an SQLite database needs a path: sqlite:////srv/agentao/web.db")


@dataclasses.dataclass(frozen=True)
class TurnRow:
    """A turn as it is written before anyone is told about it."""

    id: str
    message: str
    images: int
    created: float
    worker: str
    """Who accepted it: the only worker that may run it."""


@dataclasses.dataclass(frozen=True)
class KeyUse:
    """An ``Idempotency-Key`` and the SHA-256 of the body it came with, in hexadecimal."""

    key: str
    body: str


class AlreadyAccepted(Exception):
    """The same key with the same body was accepted before, as turn ``turn_id``."""

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        super().__init__(turn_id)


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
    head: int = 0
    """The last ``seq`` of the log before this claim; 0 for a new session."""


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
    """The generation of the last finished turn, so never the same twice; 0 before the first."""
    turns: int
    usage: cabc.Mapping[str, int]
    deleting: bool = False
    turn_id: str | None = None
    """The running turn, whoever runs it."""
    queued: bool = False
    """Whether turns wait; a page of sessions does not say."""


@dataclasses.dataclass(frozen=True)
class ActiveTurn:
    """A turn that is queued or runs, on whichever worker."""

    id: str
    worker: str
    state: t.Literal["queued", "running"]
    message: str
    created: float
    cursor: int
    """The place in the log just before its first event."""
    ending: Draft | None = None
    """It has left the queue, and this is to be its last event: whoever holds the session writes."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What became of a queued turn that ended."""

    first: bool
    """Nobody had ended it before."""
    final: Event | None = None
    """Its last event, if this wrote it."""
    unwritten: bool = False
    """Whoever holds the session is to write it, or the next one to claim it."""


@dataclasses.dataclass(frozen=True)
class EndedTurn:
    """How a turn ended: its terminal event, and the place just before its first event."""

    final: Event
    cursor: int


class Spoken(t.NamedTuple):
    """Whose event it was: a turn, and the message that started it."""

    turn_id: str
    message: str


class Revocation(t.NamedTuple):
    """Tokens of a tenant, or of one user of it (None: of all), issued before a moment are void."""

    tenant: str
    user: str | None
    before: float


class Signal(t.NamedTuple):
    """Another worker asks something of ours: mostly to stop a turn it accepted."""

    key: SessionKey
    turn_id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Orphan:
    """A turn that its worker does not end: it gave no sign of life for too long.

    Or a queued one that has ended, and whose last event is not in the log yet.
    """

    key: SessionKey
    turn_id: str
    running: bool
    """It held the claim; otherwise it was queued."""
    cursor: int
    """The place in the log just before its first event."""
    ending: Draft | None = None
    """Its last event, if that is known."""
    worker: str = ""
    """Who accepted it, or has taken it over."""


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
    state: cabc.Mapping[str, t.Any] | None = None
    """What else the agent keeps (History.state); None if that is not known."""


@dataclasses.dataclass(frozen=True)
class MessagePage:
    """A page of the transcript, oldest first; ids are 1, 2, 3 … per session."""

    messages: list[dict[str, t.Any]]
    more: bool


class Store(t.Protocol):
    """Where sessions live. All methods are thread-safe; every one may raise StoreUnavailable."""

    # -- turns ---------------------------------------------------------------------------------

    def claim(
        self,
        key: SessionKey,
        turn: TurnRow,
        opening: Draft,
        now: float,
        use: KeyUse | None = None,
    ) -> Claim:
        """Commit *turn*, its message and its first event, and take the session for it.

        Creates the session if need be. A queued turn's row becomes the running one; only a turn of
        the worker whose turn is first in the queue may claim (which of its own that is it knows
        best: their rows may have come in another order), and one that was not queued only if the
        queue is empty. The ends of queued turns that nobody has written yet are written before.

        Raises SessionBusy if another turn holds the claim or is before this one, or if the session
        is being deleted (details ``reason: "deleting"``); TooManySessions if the tenant has no
        room for a new one; AlreadyAccepted or IdempotencyConflict for a *use* that is not new.
        """

    def enqueue(
        self,
        key: SessionKey,
        turn: TurnRow,
        *,
        limit: int,
        first: bool = False,
        new: bool = False,
        use: KeyUse | None = None,
    ) -> int:
        """Commit a turn that waits for the running one, behind the others or as the *first*.

        With *new* the session is created if need be, and TooManySessions may be raised.

        Returns its position, 1 for the next to run. Raises TooManyTurns if *limit* turns wait,
        SessionBusy for a session being deleted, NotFound for an unknown one; *use* as above.
        """

    def accepted(self, key: SessionKey, use: KeyUse) -> str | None:
        """The turn that was accepted with *use*; None for a new key, IdempotencyConflict."""

    def end_queued(self, key: SessionKey, turn_id: str, ending: Draft, now: float) -> Left | None:
        """A queued turn ends without having begun; *ending* is to be its last event.

        If nobody holds the session it is written at once. Otherwise the row keeps it, the worker
        that holds the session is told (``LEFT``), and the turn waits for nothing any more. Of
        several endings the first counts. None if the turn is not queued, or not any more.
        """

    def append(self, batches: cabc.Sequence[tuple[Claim, cabc.Sequence[Event]]]) -> list[Claim]:
        """Write events to the logs of several sessions together.

        The last event of a queued turn among them ends that turn. Returns the claims that are no
        longer ours, of which nothing was written.
        """

    def finish(self, claim: Claim, finish: Finish) -> bool:
        """The terminal transaction, which also releases the claim; ClaimLost as above.

        Questions of the turn that are still open are cancelled, by ``turn_ended``. Returns whether
        queued turns are left, of whichever worker.
        """

    def active(self, key: SessionKey) -> list[ActiveTurn]:
        """The running turn, if any, then the queued ones in their order.

        Also those that have left the queue and whose end is not in the log yet.
        """

    def ended(self, key: SessionKey, turn_id: str) -> EndedTurn | None:
        """How a turn ended, for one who joins it later; None if it has not, or is unknown."""

    def spoken(self, key: SessionKey, seq: int) -> Spoken | None:
        """The turn that event *seq* belongs to, also if the event is no longer in the log.

        None for a number that was never one of this session's.
        """

    # -- questions -----------------------------------------------------------------------------

    def ask(self, claim: Claim, question: Question) -> None:
        """Commit an open question of the claim's turn; ClaimLost if the claim is no longer ours.

        Harmless twice: one that was closed meanwhile stays closed.
        """

    def questions(self, key: SessionKey) -> list[Question]:
        """The open ones, oldest first; empty for an unknown session."""

    def question(self, key: SessionKey, question_id: str) -> Question | None:
        """One of them, open or closed; None if there is none."""

    def settle(
        self,
        key: SessionKey,
        question_id: str,
        outcome: str,
        *,
        by: str,
        answer: cabc.Mapping[str, t.Any] = NO_ANSWER,
    ) -> Question:
        """Close the question if it is open; NotFound for an unknown one.

        Returns the row as it stands then, whoever closed it: of several at once, one wins.
        """

    # -- reading -------------------------------------------------------------------------------

    def session(self, key: SessionKey) -> SessionRow | None:
        """The session's row, or None if there is none."""

    def sessions(
        self,
        tenant: str | None,
        user: str | None,
        *,
        before: tuple[float, str] | None,
        limit: int,
    ) -> list[SessionRow]:
        """Sessions without a tombstone, last updated first.

        *before* is (updated, id) of the last one seen.
        None for *tenant* or *user* means all of them: for the operator, never for a request.
        """

    def tenants(self, limit: int) -> list[str]:
        """Tenants that have sessions, deleted ones until they are gone; the first so many."""

    def heads(self, keys: cabc.Collection[SessionKey]) -> dict[SessionKey, SessionRow]:
        """The rows of those of *keys* that exist, in one question."""

    def stamp(self) -> int | None:
        """The same number as the last time only if nothing was written since; None: ask it all."""

    def events(self, key: SessionKey, after: int | None, *, limit: int, max_bytes: int) -> Slice:
        """A part of the log, as EventLog.after gives it; NotFound for an unknown session."""

    def transcript(
        self,
        key: SessionKey,
        *,
        before: int | None,
        after: int | None,
        limit: int,
        max_bytes: int | None = None,
    ) -> MessagePage:
        """The newest entries before *before*, or the oldest after *after*; NotFound as above.

        With *max_bytes* of JSON the page ends earlier, but never before its first entry.
        """

    def history(self, key: SessionKey) -> History:
        """What the model is to get; empty for an unknown session."""

    # -- changing ------------------------------------------------------------------------------

    def rename(self, key: SessionKey, title: str) -> None:
        """Give the session a title; NotFound for an unknown one."""

    def tombstone(self, key: SessionKey) -> bool:
        """Refuse new turns from now on; False if there is no such session.

        What has left the queue is forgotten: nobody will read its end.
        """

    def delete(self, key: SessionKey) -> None:
        """Remove every row of a session with a tombstone, its idempotency keys too.

        Harmless twice, and for one without: it may be a new session of that name by now.
        """

    def revoke(self, tenant: str, user: str | None, before: float) -> None:
        """Tokens of the tenant, or of one *user* of it, issued before that moment are void."""

    def revocations(self) -> list[Revocation]:
        """Everything that was revoked."""

    def prune(self, before: float) -> list[SessionKey]:
        """Put a tombstone on sessions not updated since *before*, but on none with a turn; which.

        It takes so many at a time, the oldest first, and none twice. The caller removes them, their
        own folders too; until then they are doomed.
        """

    # -- tokens --------------------------------------------------------------------------------

    def reserve(self, tenant: str, day: str, *, least: int, most: int, limit: int) -> int:
        """Set aside up to *most* tokens of what the tenant has left of *limit* that day; how many.

        They count as spent from now on, whatever becomes of who reserved them. Raises
        BudgetExhausted, and sets nothing aside, if fewer than *least* are left. *day* is a date
        like ``2026-02-28``; days long gone are forgotten on the way.
        """

    def spend(self, tenant: str, day: str, tokens: int) -> None:
        """Add to what the tenant has spent that day; a negative number gives back."""

    def spent(self, tenant: str, day: str) -> int:
        """Tokens of the tenant that day, used or set aside."""

    # -- workers -------------------------------------------------------------------------------

    def beat(self, worker: str) -> None:
        """*worker* is alive: its number grows.

        The number says nothing of a time. Whoever wants to know whether *worker* lives looks
        whether it changes, and measures with a clock of its own for how long it did not.
        """

    def beats(self) -> dict[str, float]:
        """The number of every worker that has not left."""

    def leave(self, worker: str) -> None:
        """*worker* has gone: its heartbeat and its signals are removed."""

    def signal(self, key: SessionKey, reason: str, *, but: str, running_only: bool = False) -> int:
        """Tell the workers of the session's active turns *reason*, all but worker *but*'s own.

        With *running_only* the queued ones are spared; those that have left the queue are in any
        case. Returns how many turns that are.
        """

    def signals(self, worker: str) -> list[Signal]:
        """What others asked of *worker* since the last time; each is given once."""

    def doomed(self, before: float | None = None) -> list[SessionKey]:
        """Sessions with a tombstone and no active turn: somebody has to remove them.

        With *before*, those that got it before that moment (of the wall clock).
        """

    def orphans(self, workers: cabc.Collection[str]) -> list[Orphan]:
        """Active turns of those *workers*, and of such that have left or never showed a beat.

        Also every turn that has left the queue and whose end is not in the log yet.
        """

    def take_over(self, orphan: Orphan, worker: str) -> Claim | None:
        """Take the session from a dead worker to end *orphan*, in a new generation.

        The claim has an opening that was not written: the caller finishes at once. None for one
        that somebody else has taken over already, and for one that does not hold the session.
        """

    def close(self) -> None:
        """Give back what the store holds open."""
