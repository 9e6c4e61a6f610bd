"""The native dialect: events as JSON, as Server-Sent Events or in a long-poll's answer.

SSE: WHATWG HTML, section 9.2. What we do on purpose:

1. No ``event:`` line: the type is in the JSON.
2. ``id:`` comes after ``data:``. Some clients take the id as soon as they have read its line. If
   the connection breaks within a message, they then come back for the event they did not get.
3. A comment and a ``retry:`` are one line without a blank line behind them. Neither needs one, and
   some clients pass every blank line on as an empty message.
"""

from __future__ import annotations

import collections.abc as cabc
import json
import typing as t

from agentao_web.core.log import Event

CONTENT_TYPE: t.Final = "text/event-stream; charset=utf-8"
HEADERS: t.Final = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
KEEP_ALIVE: t.Final = b": keep-alive\n"

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def frame(event: Event) -> bytes:
    """*event* as one SSE message; no ``id:`` for what was never stored."""
    number = "" if event.seq is None else f"id: {event.seq}\n"
    return f"data: {_encode(event.as_dict())}\n{number}\n".encode()


def frames(events: cabc.Iterable[Event]) -> bytes:
    """All of *events* in one piece, so that they are one write."""
    return b"".join(map(frame, events))


def retry(milliseconds: int) -> bytes:
    """The hint when to connect again."""
    return b"retry: %d\n" % milliseconds


def page(events: cabc.Iterable[Event], cursor: int, state: str) -> dict[str, t.Any]:
    """A long-poll's answer."""
    return {"events": [event.as_dict() for event in events], "cursor": cursor, "state": state}
