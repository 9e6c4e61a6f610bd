"""Who is over a limit: functions of (entries, now, caps), nothing else."""

from __future__ import annotations

import collections
import collections.abc as cabc
import typing as t

from agentao_web.core.turn import ENDED
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn


class Entry(t.Protocol):
    """What eviction needs to know of a session in memory."""

    @property
    def tenant(self) -> str: ...
    @property
    def idle(self) -> bool: ...
    @property
    def used(self) -> float: ...


E = t.TypeVar("E", bound=Entry)


def expired(entries: cabc.Iterable[E], now: float, ttl: float) -> list[E]:
    """Idle entries not used for *ttl* seconds."""
    return [e for e in entries if e.idle and now - e.used >= ttl]


def victims(entries: cabc.Collection[E], cap: int, per_tenant: int | None = None) -> list[E]:
    """The idle entries to put out, least recently used first, so that the caps hold."""
    over = len(entries) - cap
    count = collections.Counter(e.tenant for e in entries)
    out: list[E] = []
    for entry in sorted((e for e in entries if e.idle), key=lambda e: e.used):
        crowded = per_tenant is not None and count[entry.tenant] > per_tenant
        if over > 0 or crowded:
            out.append(entry)
            over -= 1
            count[entry.tenant] -= 1
    return out


def overdue(turn: Turn, now: float, *, max_waiting: float) -> str | None:
    """The stop reason of a turn that took too long, or None."""
    if turn.state in ENDED or turn.stop_reason is not None:
        return None
    if turn.ran_for(now) >= turn.deadline:
        return "turn_timeout"
    if turn.state is State.WAITING and turn.waited_for(now) >= max_waiting:
        return "waiting_timeout"
    return None


def hopeless(turn: Turn, now: float, *, grace: float) -> bool:
    """Whether a turn was told to stop *grace* seconds ago and still has not ended."""
    return turn.state not in ENDED and turn.stopped is not None and now - turn.stopped >= grace
