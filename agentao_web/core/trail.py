"""Whose work a thread is doing: the request, the session and the turn that its log lines name."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import contextvars
import types
import typing as t

from agentao_web.core.names import SessionKey

#: What a log line may say of them, in this order.
FIELDS: t.Final = ("request_id", "session_id", "turn_id", "tenant", "user")

_NOWHERE: t.Final[cabc.Mapping[str, str]] = types.MappingProxyType({})
_here: contextvars.ContextVar[cabc.Mapping[str, str]] = contextvars.ContextVar(
    "agentao_web.trail", default=_NOWHERE
)


def here() -> cabc.Mapping[str, str]:
    """What is known of the present thread's work."""
    return _here.get()


def leave() -> None:
    """What follows on this thread is somebody else's."""
    _here.set(_NOWHERE)


def enter(**fields: str) -> None:
    """From now on this thread's work is also known by *fields*."""
    _here.set({**_here.get(), **fields})


@contextlib.contextmanager
def along(fields: cabc.Mapping[str, str]) -> cabc.Iterator[None]:
    """Inside, this thread's work is known by *fields* only."""
    before = _here.set(fields)
    try:
        yield
    finally:
        _here.reset(before)


def of(key: SessionKey, turn_id: str = "", request_id: str = "") -> dict[str, str]:
    """The fields of a session, and of one turn of it."""
    fields = {"session_id": key.id, "tenant": key.tenant, "user": key.user}
    if turn_id:
        fields["turn_id"] = turn_id
    if request_id:
        fields["request_id"] = request_id
    return fields
