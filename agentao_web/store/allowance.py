"""What tenants may still spend today. Knows the store, the limits and the calendar (UTC)."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import datetime
import time
import typing as t

from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import Quota
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.store import Store

_DAY: t.Final = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Reserved:
    """Tokens that were set aside for one call to a model, on the day they belong to."""

    tenant: str
    day: str
    tokens: int


class Allowance:
    """Tokens per tenant and day, shared by every worker on one store.

    *limit* says what a principal's tenant may spend in a day; None is no limit, and then nothing
    is written.
    """

    def __init__(
        self,
        store: Store,
        limit: cabc.Callable[[Principal], int | None],
        *,
        clock: cabc.Callable[[], float] = time.time,
    ) -> None:
        self.limit = limit
        self._store = store
        self._clock = clock

    def check(self, key: SessionKey) -> None:
        """Raise BudgetExhausted if nothing is left today."""
        limit = self.limit(Principal(key.tenant, key.user))
        if limit is not None and self._store.spent(key.tenant, self._today()) >= limit:
            raise self._refusal(limit)

    def reserve(self, tenant: str, *, least: int, most: int, limit: int) -> Reserved:
        """Set up to *most* tokens aside; BudgetExhausted if fewer than *least* are left."""
        day = self._today()
        try:
            tokens = self._store.reserve(tenant, day, least=least, most=most, limit=limit)
        except BudgetExhausted:
            raise self._refusal(limit) from None
        return Reserved(tenant, day, tokens)

    def settle(self, reserved: Reserved, used: int) -> None:
        """Of what was set aside, *used* tokens were used; more than that is counted too."""
        self._store.spend(reserved.tenant, reserved.day, used - reserved.tokens)

    def spend(self, tenant: str, tokens: int) -> None:
        """Count tokens nobody had set aside."""
        self._store.spend(tenant, self._today(), tokens)

    def _today(self) -> str:
        return datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date().isoformat()

    def _refusal(self, limit: int) -> BudgetExhausted:
        seconds = _DAY - int(self._clock()) % _DAY
        return BudgetExhausted(retry_after=seconds, quota=Quota("tokens", limit, _DAY))
