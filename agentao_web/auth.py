"""Who is asking: signed bearer tokens, the host's own word for it, or a ticket for one session."""

from __future__ import annotations

import collections.abc as cabc
import hashlib
import re
import secrets
import time
import typing as t
import urllib.parse

from flask import Request
from itsdangerous import BadData
from itsdangerous import URLSafeTimedSerializer

from agentao_web.core.errors import Forbidden
from agentao_web.core.errors import Unauthorized
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey

if t.TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse
    from _typeshed.wsgi import WSGIApplication
    from _typeshed.wsgi import WSGIEnvironment

Authenticate = cabc.Callable[[Request], Principal | None]
Keys = cabc.Sequence[str | bytes]

#: What a signature is for is part of it: a ticket is never a token, nor a token a ticket.
_TOKEN: t.Final = "agentao-web.token"
_TICKET: t.Final = "agentao-web.ticket"
#: How long a ticket is good, in seconds.
TICKET_SECONDS: t.Final = 300
#: Signs tickets where there is no other key. Made in Gunicorn's master, it is that of all workers.
_SERVERS_OWN: t.Final = secrets.token_hex(32)
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
        self._serializer = _signed(keys, _TOKEN)
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
        found = self.look(token)
        return found[:2] if found is not None else None

    def look(self, token: str) -> tuple[Principal, float, float] | None:
        """The same, with its end too."""
        try:
            (tenant, user, end), issued = self._serializer.loads(token, return_timestamp=True)
            if self._clock() >= end:
                return None
            return Principal(tenant, user), issued.timestamp(), end
        except (BadData, ValueError, TypeError):
            return None


def _signed(keys: Keys, purpose: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(
        # itsdangerous wants them oldest first.
        [key.encode() if isinstance(key, str) else key for key in reversed(keys)],
        salt=purpose,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )


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


class Tickets:
    """What a reader that cannot send headers shows in its URL, to read one session's events.

    Signed with *keys*, newest first. A ticket is worth no more than the login it was got with: it
    ends with its token if that is one of *tokens*, and is *revoked* with it.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        tokens: Tokens | None = None,
        revoked: cabc.Callable[[Principal, float], bool] = lambda principal, issued: False,
        clock: cabc.Callable[[], float] = time.time,
    ) -> None:
        self._serializer = _signed(keys, _TICKET)
        self._tokens = tokens
        self._revoked = revoked
        self._clock = clock

    def issue(self, key: SessionKey, token: str | None = None) -> tuple[str, int]:
        """A ticket for the session *key* and its end in Unix seconds; got with *token*, if any."""
        since = self._clock()
        end = since + TICKET_SECONDS
        found = self._tokens.look(token) if self._tokens is not None and token else None
        if found is not None:
            # Else a token could make itself good for longer, a ticket at a time.
            since, end = found[1], min(end, found[2])
        ticket = self._serializer.dumps([*key, since, int(end)])
        return str(ticket), int(end)

    def read(self, ticket: str, sid: str) -> Principal | None:
        """Whose session *sid* the ticket opens; None if it is not ours, of another one, or void."""
        try:
            tenant, user, name, since, end = self._serializer.loads(ticket)
            principal = Principal(tenant, user)
            if name != sid or self._clock() >= end:
                return None
        except (BadData, ValueError, TypeError):
            return None
        return None if self._revoked(principal, since) else principal


def ticket_keys(keys: Keys, hosts: Keys, place: str) -> Keys:
    """What signs tickets: our *keys*, else the *hosts*; else a key for this run and *place*."""
    return keys or hosts or (f"{_SERVERS_OWN} {place}",)


def ticket(request: Request) -> str | None:
    """The ticket that came with this request, or None."""
    return t.cast("str | None", request.environ.get(_TICKET))


def taking_tickets(app: WSGIApplication, prefix: str) -> WSGIApplication:
    """*app*, for which a ticket is in no URL any more: nothing in it can write one down.

    The environment is changed in place, so the server's own access log does not see it either.
    """
    # As WSGI has paths, and with any number of slashes: Werkzeug redirects those.
    names = [*prefix.encode().decode("latin-1").split("/"), "(?:chat|session)/"]
    ours = re.compile("/+".join([*map(re.escape, names[:-1]), names[-1]]))

    def taking(environ: WSGIEnvironment, start_response: StartResponse) -> cabc.Iterable[bytes]:
        if environ.get("QUERY_STRING") and ours.match(environ.get("PATH_INFO", "")):
            _take_ticket(environ)
        return app(environ, start_response)

    return taking


def _take_ticket(environ: WSGIEnvironment) -> None:
    fields = environ["QUERY_STRING"].split("&")
    found = [f for f in fields if urllib.parse.unquote_plus(f.partition("=")[0]) == "ticket"]
    if not found:
        return
    # Two are none: nobody should have to guess which one counts.
    value = found[0].partition("=")[2] if len(found) == 1 else ""
    environ[_TICKET] = urllib.parse.unquote_plus(value)
    query = environ["QUERY_STRING"] = "&".join(f for f in fields if f not in found)
    for name in ("RAW_URI", "REQUEST_URI"):
        if name in environ:
            path = environ[name].partition("?")[0]
            environ[name] = f"{path}?{query}" if query else path


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
        why = "send Origin, or Sec-Fetch-Site: same-origin"
        if site is not None:
            why = "its Sec-Fetch-Site says that it comes from another site"
        elif origin is not None:
            why = (
                "its Origin is not the host that it was sent to "
                "(behind a proxy, check that it passes Host on)"
            )
        raise Forbidden(
            f"a request without a bearer token has to come from this site's own pages: {why}"
        )
