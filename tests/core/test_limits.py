"""Who is over a limit."""

from __future__ import annotations

import dataclasses

from agentao_web.core import limits
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn
from agentao_web.core.turn import TurnRequest


@dataclasses.dataclass(frozen=True)
class Entry:
    tenant: str
    used: float
    idle: bool = True


def test_only_idle_entries_expire() -> None:
    old, busy, young = Entry("a", 0.0), Entry("a", 0.0, idle=False), Entry("a", 95.0)
    assert limits.expired([old, busy, young], 100.0, 10.0) == [old]


def test_the_least_recently_used_idle_ones_go_first() -> None:
    entries = [Entry("a", 3.0), Entry("a", 1.0, idle=False), Entry("a", 2.0), Entry("a", 4.0)]
    assert [e.used for e in limits.victims(entries, 2)] == [2.0, 3.0]


def test_nobody_goes_while_there_is_room() -> None:
    assert limits.victims([Entry("a", 1.0), Entry("b", 2.0)], 2) == []


def test_a_tenant_over_its_own_cap_pays_for_itself() -> None:
    entries = [Entry("small", 1.0), *(Entry("big", float(i)) for i in range(2, 6))]
    gone = limits.victims(entries, 100, per_tenant=2)
    assert [(e.tenant, e.used) for e in gone] == [("big", 2.0), ("big", 3.0)]


def turn() -> Turn:
    made = Turn("t", TurnRequest("hi"), created=0.0, deadline=10.0)
    made.step("begin", 0.0)
    return made


def test_a_turn_is_overdue_after_its_running_time() -> None:
    assert limits.overdue(turn(), 9.9, max_waiting=5.0) is None
    assert limits.overdue(turn(), 10.0, max_waiting=5.0) == "turn_timeout"


def test_waiting_has_a_limit_of_its_own() -> None:
    waiting = turn()
    waiting.step("ask", 1.0)
    assert limits.overdue(waiting, 5.9, max_waiting=5.0) is None
    assert limits.overdue(waiting, 6.0, max_waiting=5.0) == "waiting_timeout"


def test_a_stopped_or_ended_turn_is_not_overdue_again() -> None:
    stopped, over = turn(), turn()
    stopped.stop("cancelled_by_user", 1.0)
    over.end(Outcome(State.COMPLETED), 1.0)
    assert limits.overdue(stopped, 99.0, max_waiting=5.0) is None
    assert limits.overdue(over, 99.0, max_waiting=5.0) is None


def test_a_turn_that_does_not_end_after_its_stop_is_hopeless() -> None:
    stopped = turn()
    assert not limits.hopeless(stopped, 99.0, grace=5.0)
    stopped.stop("cancelled_by_user", 1.0)
    assert not limits.hopeless(stopped, 5.9, grace=5.0)
    assert limits.hopeless(stopped, 6.0, grace=5.0)
    stopped.end(Outcome(State.CANCELLED), 6.5)
    assert not limits.hopeless(stopped, 99.0, grace=5.0)
