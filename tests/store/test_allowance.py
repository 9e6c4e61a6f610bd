"""Tokens per tenant and day, over a store in memory and a clock moved by hand."""

from __future__ import annotations

import pytest

from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.store.allowance import Allowance
from agentao_web.store.memory import MemoryStore

KEY = SessionKey("acme", "ann", "s")
#: 2026-03-01, one minute before midnight UTC.
LATE = 1_772_409_600.0 - 60


class Clock:
    time = LATE

    def __call__(self) -> float:
        return self.time


def test_nothing_left_is_refused_until_midnight_utc() -> None:
    clock, store = Clock(), MemoryStore(seed=1)
    allowance = Allowance(store, lambda principal: 100, clock=clock)
    allowance.check(KEY)
    allowance.spend("acme", 100)
    with pytest.raises(BudgetExhausted) as refused:
        allowance.check(KEY)
    assert refused.value.retry_after == 60
    assert refused.value.details == {"limit": "tokens", "quota": 100}
    assert store.spent("acme", "2026-03-01") == 100
    with pytest.raises(BudgetExhausted) as again:
        allowance.reserve("acme", least=1, most=1, limit=100)
    assert again.value.retry_after == 60
    clock.time += 60
    allowance.check(KEY)
    assert allowance.reserve("acme", least=1, most=500, limit=100).tokens == 100


def test_a_call_over_midnight_is_settled_where_it_began() -> None:
    clock, store = Clock(), MemoryStore(seed=1)
    allowance = Allowance(store, lambda principal: 100, clock=clock)
    held = allowance.reserve("acme", least=1, most=80, limit=100)
    clock.time += 120
    allowance.settle(held, 30)
    assert (store.spent("acme", "2026-03-01"), store.spent("acme", "2026-03-02")) == (30, 0)


def test_the_limit_is_the_principals() -> None:
    limits = {"ann": 10, "bob": None}
    allowance = Allowance(MemoryStore(seed=1), lambda p: limits[p.user], clock=Clock())
    allowance.spend("acme", 10)
    allowance.check(SessionKey("acme", "bob", "s"))
    with pytest.raises(BudgetExhausted):
        allowance.check(KEY)
    assert Allowance(MemoryStore(seed=1), lambda p: None).limit(Principal("acme")) is None
