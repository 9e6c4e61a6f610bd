"""Who is asking, and what their agent can do."""

from __future__ import annotations

import datetime
import typing as t

from flask import Request
from flask_login import current_user

from agentao_web import Principal
from agentao_web import ToolError
from agentao_web import tool
from shop.models import Customer
from shop.models import Order
from shop.models import db

#: Where the agent is, with its page.
PREFIX: t.Final = "/agent"


def who_is_it(request: Request) -> Principal | None:
    """The customer who is logged in: by number, as a name may change hands."""
    return Principal("shop", current_user.get_id()) if current_user.is_authenticated else None


def tools_for(principal: Principal) -> list[t.Callable[..., t.Any]]:
    return [my_orders, order, change_delivery]


@tool(read_only=True)
def my_orders(who: Principal) -> list[dict[str, t.Any]]:
    """List the customer's orders, the oldest first."""
    customer = db().get(Customer, int(who.user))
    return [_told(found) for found in customer.orders] if customer is not None else []


@tool(read_only=True)
def order(number: int, who: Principal) -> dict[str, t.Any]:
    """Look up one order of the customer."""
    return _told(_own(number, who))


@tool
def change_delivery(number: int, day: datetime.date, who: Principal) -> dict[str, t.Any]:
    """Change the day an order is delivered. Only one that was not sent yet can be changed."""
    found = _own(number, who)
    if found.state != "packed":
        raise ToolError(f"it is {found.state} already")
    found.delivery = day
    db().commit()
    return _told(found)


def _own(number: int, who: Principal) -> Order:
    found = db().get(Order, number)
    if found is None or str(found.customer_id) != who.user:
        # The same words for both: nobody learns which numbers there are.
        raise ToolError("this customer has no such order")
    return found


def _told(found: Order) -> dict[str, t.Any]:
    return {
        "number": found.id,
        "item": found.item,
        "state": found.state,
        "delivery": found.delivery,
    }
