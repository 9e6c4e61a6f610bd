"""What things are called: who asks, and which session."""

from __future__ import annotations

import dataclasses
import re
import typing as t

_SESSION_ID: t.Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_LIMIT: t.Final = 256


@dataclasses.dataclass(frozen=True)
class Principal:
    """Who is asking: a tenant, and a user of it, "" if the token names none.

    Raises ValueError for names that are no text of 1 to 256 printable characters.
    """

    tenant: str
    user: str = ""

    def __post_init__(self) -> None:
        if not self.tenant:
            raise ValueError("a principal needs a tenant")
        for name in (self.tenant, self.user):
            if not isinstance(name, str) or len(name) > _NAME_LIMIT or not name.isprintable():
                raise ValueError("tenant and user are printable text of at most 256 characters")


class SessionKey(t.NamedTuple):
    """A session is unique per tenant and user; another one's id is simply unknown."""

    tenant: str
    user: str
    id: str


def is_session_id(text: str) -> bool:
    """Whether *text* may name a session: ``[A-Za-z0-9][A-Za-z0-9._-]{0,127}``."""
    return _SESSION_ID.fullmatch(text) is not None
