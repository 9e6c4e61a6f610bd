"""Who is asking: signed bearer tokens, or the host's own word for it."""

from __future__ import annotations

import collections.abc as cabc
import hashlib
import time
import typing as t

from flask import Request
from itsdangerous import BadData
from itsdangerous import URLSafeTimedSerializer

from agentao_web.core.errors import Forbidden
from agentao_web.core.errors import Unauthorized
from agentao_web.core.names import Principal

Authenticate = cabc.Callable[[Request], Principal | None]

_SALT: t.Final = "agentao-web.token"
_SAFE_METHODS: t.Final = frozenset({"GET", "HEAD", "OPTIONS"})
DEMO_TOKEN: t.Final = "dev"
DEMO_PRINCIPAL: t.Final = Principal("demo-tenant")


class Tokens:
    """Bearer tokens signed with itsdangerous; each carries its own end.

    *keys* are newest first: the first signs, all of them are accepted.
    """

    def __init__(
        self, keys: cabc.Sequence[str], clock: cabc.Callable[[], float] = time.time
    ) -> None:
        if not keys:
            raise RuntimeError("no keys: set AGENTAO_SECRET_KEYS")
        # itsdangerous wants them oldest first.
        self._serializer = URLSafeTimedSerializer(
            list(reversed(keys)),
            salt=_SALT,
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )
        self._clock = clock

    def issue(self, principal: Principal, *, ttl: float) -> str:
        """A token for *principal*, good for *ttl* seconds."""
        end = int(self._clock() + ttl)
        return str(self._serializer.dumps([principal.tenant, principal.user, end]))

    def read(self, token: str) -> Principal | None:
        """Whom *token* names; None if it is not ours, altered, or past its end."""
        found = self.open(token)
        return found[0] if found is not None else None

    def open(self, token: str) -> tuple[Principal, float] | None:
        """The same, with the moment it was issued, in Unix seconds."""
        try:
            (tenant, user, end), issued = self._serializer.loads(token, return_timestamp=True)
            if self._clock() >= end:
                return None
            return Principal(tenant, user), issued.timestamp()
        except (BadData, ValueError, TypeError):
            return None


def bearer(request: Request) -> str | None:
    """The token of ``Authorization: Bearer …`` (RFC 6750, 2.1), or None."""
    try:
        auth = request.authorization
    except ValueError:
        return None  # Werkzeug chokes on what is no Basic.
    if auth is None or auth.type != "bearer":
        return None
    return auth.token or None


class Revoked:
    """Which tokens are void, asked of *source* at most every *ttl* seconds."""

    def __init__(
        self,
        source: cabc.Callable[[], cabc.Iterable[tuple[str, str | None, float]]],
        *,
        ttl: float = 2.0,
        clock: cabc.Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._ttl = ttl
        self._clock = clock
        self._asked = float("-inf")
        self._before: dict[tuple[str, str | None], float] = {}

    def __call__(self, principal: Principal, issued: float) -> bool:
        """Whether a token of *principal* issued at that moment is void."""
        now = self._clock()
        if now - self._asked >= self._ttl:
            # Two threads may both ask: harmless, and cheaper than a lock around a query.
            self._before = {(tenant, user): before for tenant, user, before in self._source()}
            self._asked = now
        keys = ((principal.tenant, None), (principal.tenant, principal.user))
        return any(issued < self._before.get(key, 0.0) for key in keys)


def by_token(
    tokens: Tokens | None,
    *,
    demo: bool,
    revoked: cabc.Callable[[Principal, float], bool] = lambda principal, issued: False,
) -> Authenticate:
    """The built-in ``authenticate``; in the demo ``dev`` is a token too."""

    def authenticate(request: Request) -> Principal | None:
        token = bearer(request)
        if token is None:
            return None
        if demo and token == DEMO_TOKEN:
            return DEMO_PRINCIPAL
        found = tokens.open(token) if tokens is not None else None
        if found is None or revoked(*found):
            return None
        return found[0]

    return authenticate


def identify(request: Request, authenticate: Authenticate) -> Principal:
    """Who makes this request; Unauthorized, or Forbidden for another site's page."""
    principal = authenticate(request)
    if principal is None:
        raise Unauthorized
    if not isinstance(principal, Principal):
        raise RuntimeError(
            f"authenticate() returned {type(principal).__name__}. "
            "Return an agentao_web.Principal, or None for nobody."
        )
    # A page of another site can make a browser send cookies, but not an Authorization header
    # without asking first, and there is no CORS here to say yes.
    if request.method not in _SAFE_METHODS and bearer(request) is None:
        _refuse_other_sites(request)
    return principal


def _refuse_other_sites(request: Request) -> None:
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is not None:
        same = site == "same-origin"
    else:
        # Behind a proxy that ends TLS the scheme may differ; the host does not.
        same = origin is not None and origin.partition("://")[2] == request.host
    if not same:
        raise Forbidden(
            "a request without a bearer token has to come from this site's own pages: "
            "send Origin, or Sec-Fetch-Site: same-origin"
        )
