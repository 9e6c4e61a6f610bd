"""A server seen from outside: what the proxy before it does to streams, bodies and headers.

It speaks to itself as a client would: one session of its own, removed at the end. Cures are said in
nginx's words; another proxy has others for the same.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import email.utils
import json
import secrets
import socket
import ssl
import statistics
import time
import typing as t

import httpx2

from agentao_web.doctor import MESSAGE
from agentao_web.doctor import Finding
from agentao_web.doctor import hint
from agentao_web.doctor import ok
from agentao_web.doctor import wrong
from agentao_web.doctor.machine import is_loopback

Findings = cabc.Iterator[Finding]

#: Asked for with a header, so that nobody else is told.
ASKING, WORKER = "X-Agentao-Doctor", "X-Agentao-Worker"
#: What takes the demo model a minute, if nobody stops it.
_LONG_MESSAGE: t.Final = "take 60 seconds"
#: Seconds the longest long-poll waits: less than the 60 s after which proxies give up.
WAIT: t.Final = 55
#: Seconds until a stream has begun.
_SOON: t.Final = 5.0
#: Seconds a turn may go on after the grace, and between two looks at it.
_MARGIN, _GLANCE = 10.0, 0.3
#: Seconds an answer may take that waits for nothing.
_PATIENCE: t.Final = 30.0
#: Seconds by which the middle event may come later than the fastest, and still be a stream.
_LATE: t.Final = 0.4
#: Seconds a model has to talk for that to be seen.
_LONG_ENOUGH: t.Final = 0.5
#: Seconds without a line that are silence.
_SILENCE: t.Final = 0.5
#: Sessions asked for their worker, and how often each.
_SESSIONS, _TIMES = 12, 3
#: Seconds the server's clock may be off, and until a certificate ends.
_CLOCKS_APART: t.Final = 5.0
_CERTIFICATE_ENDS: t.Final = 14 * 86_400.0
_JSON: t.Final = {"Accept": "application/json"}
_SSE: t.Final = {"Accept": "text/event-stream"}


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the server is, and how to be let in."""

    url: str
    headers: cabc.Mapping[str, str] = dataclasses.field(repr=False)
    max_body: int
    """AGENTAO_MAX_BODY there."""
    patience: float
    """Seconds of silence to sit through: more than AGENTAO_HEARTBEAT there."""
    grace: float = 10.0
    """AGENTAO_DISCONNECT_GRACE there."""
    wait: int = WAIT
    """Seconds a long-poll is tried for."""
    message: str = MESSAGE
    metrics_token: str | None = dataclasses.field(default=None, repr=False)
    ca: str | None = None
    """A file of certificates to trust."""

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)


class Unreachable(Exception):
    """There is no server to look at."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


class Visit:
    """One visit to a site: a client, and the session it talks in."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.sid = f"doctor-{secrets.token_hex(6)}"
        self.cursor = 0
        self.http = httpx2.Client(
            base_url=site.url.rstrip("/"),
            headers={**site.headers},
            verify=site.tls if site.url.startswith("https:") else True,
            timeout=_PATIENCE,
            # It is this server that is looked at, and no proxy on our side.
            trust_env=False,
        )

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.http.get(path, headers={**_JSON, **headers})


def examine(site: Site) -> Findings:
    """Everything there is to say; begins with whether there is a server at all."""
    try:
        visit = Visit(site)
        with contextlib.closing(visit.http):
            try:
                yield from _reach(visit)
                yield from _let_in(visit)
            except Unreachable as exc:
                yield exc.finding
                return
            try:
                for look in CHECKS:
                    yield from _looked(look, visit)
            finally:
                left = list(_looked(_leave, visit))
            yield from left
    except httpx2.InvalidURL as exc:
        yield wrong("url", f"{site.url}: {exc}", "--url https://agents.example.com")


def _looked(look: cabc.Callable[[Visit], Findings], visit: Visit) -> Findings:
    try:
        yield from look(visit)
    except httpx2.TransportError as exc:
        yield wrong(
            look.__name__.strip("_"),
            f"the connection broke: {type(exc).__name__}",
            "look into the proxy's error log",
        )


# -- is it there -------------------------------------------------------------------------------


def _reach(visit: Visit) -> Findings:
    url = visit.site.url
    try:
        response = visit.get("/healthz")
    except httpx2.TransportError as exc:
        raise Unreachable(_unreachable(url, exc)) from None
    if response.is_redirect:
        where = response.headers.get("Location", "")
        raise Unreachable(wrong("url", f"{url} is redirected to {where}", "give that as --url"))
    if response.status_code in (502, 503, 504) and not _ours(response):
        raise Unreachable(
            wrong(
                "url",
                f"the proxy answers {response.status_code}: it does not reach the server",
                "nginx: is the address in `proxy_pass` or `upstream` the one Gunicorn binds?",
            )
        )
    if response.status_code != 200 or not _ours(response):
        raise Unreachable(
            wrong(
                "url",
                f"{url}/healthz answers {response.status_code}, and not as agentao-web does",
                "does --url end with the url_prefix of the blueprint?",
            )
        )
    yield ok("url", f"{url} is there, over {response.http_version}")
    ready = visit.get("/readyz")
    if ready.status_code != 200:
        yield _not_ready(ready)
    yield from _clock(response)
    yield from _protection(visit, response)


#: Code of a server that takes no turns -> what to do.
_NOT_READY: t.Final = {
    "draining": "ask again when it has restarted; if it says so for long, reload it",
    "no_model": "name a model for it: OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL",
    "store_unavailable": "does its database run, is the disk full, may its user write there?",
    "wrong_schema": "run the agentao-web there that wrote the database",
}


def _not_ready(response: httpx2.Response) -> Finding:
    told = response.json() if _ours(response) else {}
    code = told.get("code", "")
    said = told.get("message") or f"/readyz answers {response.status_code}"
    cure = _NOT_READY.get(code, "look into the server's log")
    return wrong("url", f"it takes no turns: {said}", cure)


def _unreachable(url: str, exc: httpx2.TransportError) -> Finding:
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            message = f"{url}: the certificate does not hold: {cause.verify_message}"
            cure = "nginx: `ssl_certificate` needs the whole chain; for an authority of your own "
            return wrong("tls", message, cure + "give --ca")
        cause = cause.__cause__ or cause.__context__
    cure = "does the proxy run, is the port open, is the name right?"
    return wrong("url", f"{url} does not answer: {type(exc).__name__}", cure)


def _ours(response: httpx2.Response) -> bool:
    """Whether the body is one of ours, and not a page of the proxy's."""
    try:
        return isinstance(response.json(), dict)
    except ValueError:
        return False


def _clock(response: httpx2.Response) -> Findings:
    with contextlib.suppress(TypeError, ValueError):
        there = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
        apart = there - time.time()
        if abs(apart) > _CLOCKS_APART:
            cure = "run a time service there, such as systemd-timesyncd"
            yield wrong("clock", f"the server's clock is {apart:+.0f} s from ours", cure)


def _protection(visit: Visit, response: httpx2.Response) -> Findings:
    url = response.url
    if url.scheme != "https":
        if not is_loopback(url.host):
            cure = "nginx: `listen 443 ssl;`, and `return 308 https://…` on port 80"
            yield wrong("tls", "http: tokens and messages travel in the clear", cure)
        return
    if "strict-transport-security" not in response.headers:
        line = 'add_header Strict-Transport-Security "max-age=31536000" always;'
        yield hint("tls", "no Strict-Transport-Security", f"nginx: `{line}` in the server")
    context = visit.site.tls
    context.set_alpn_protocols(["h2", "http/1.1"])
    address = (url.host, url.port or 443)
    with (
        socket.create_connection(address, _PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=url.host) as sock,
    ):
        version, protocol = sock.version(), sock.selected_alpn_protocol()
        certificate = sock.getpeercert() or {}
    if protocol != "h2":
        yield hint(
            "tls",
            "no HTTP/2: a browser opens six connections, so six streams, in all",
            "nginx: `listen 443 ssl http2;`, or `http2 on;` from 1.25.1",
        )
    ends = ssl.cert_time_to_seconds(str(certificate.get("notAfter"))) - time.time()
    if ends < _CERTIFICATE_ENDS:
        yield hint("tls", f"the certificate ends in {ends / 86_400:.0f} days", "renew it")
    yield ok("tls", f"{version}, {'HTTP/2' if protocol == 'h2' else 'HTTP/1.1'} for browsers")


def _let_in(visit: Visit) -> Findings:
    response = visit.get("/sessions?limit=1")
    if response.status_code == 200 and _ours(response):
        yield ok("token", "is accepted")
        return
    if response.status_code == 401 and _ours(response):
        cure = (
            "make one with the server's AGENTAO_SECRET_KEYS (agentao-web token), or with a login "
            "of the host's own --header 'Cookie: …' --header 'Origin: …'; does the proxy take "
            "Authorization away? nginx: no `proxy_set_header Authorization`"
        )
    else:
        cure = "nginx: no `auth_basic`, `allow` or `deny` where our paths are"
    raise Unreachable(wrong("token", f"is refused with {response.status_code}", cure))


# -- streams -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Heard:
    """What a stream brought, and when."""

    response: httpx2.Response
    events: list[tuple[float, dict[str, t.Any]]] = dataclasses.field(default_factory=list)
    broken: bool = False
    body: bytes = b""
    """What came in place of a stream."""


def _listen(visit: Visit) -> _Heard:
    """Start a turn and read its stream to the end."""
    body = {"message": visit.site.message}
    request = visit.http.build_request("POST", f"/chat/{visit.sid}", json=body, headers=_SSE)
    response = visit.http.send(request, stream=True)
    heard, rest = _Heard(response), b""
    with contextlib.closing(response):
        try:
            if response.status_code != 200:
                heard.body = response.read()
                return heard
            for chunk in response.iter_bytes():
                *frames, rest = (rest + chunk).split(b"\n\n")
                heard.events += [(time.time(), event) for event in map(_event, frames) if event]
        except (httpx2.TransportError, httpx2.DecodingError):
            heard.broken = True
    return heard


def _event(frame: bytes) -> dict[str, t.Any] | None:
    for line in frame.split(b"\n"):
        if line.startswith(b"data: "):
            with contextlib.suppress(ValueError):
                found = json.loads(line[6:])
                return found if isinstance(found, dict) else None
    return None


def _stream(visit: Visit) -> Findings:
    heard = _listen(visit)
    response = heard.response
    if response.status_code != 200:
        yield _refused(response, heard.body)
        return
    numbers = [event["seq"] for _, event in heard.events if isinstance(event.get("seq"), int)]
    visit.cursor = max(numbers, default=0)
    yield from _headers(response)
    types = [event.get("type") for _, event in heard.events]
    if heard.broken or not {"done", "error"} & set(types):
        yield wrong(
            "stream",
            "was cut before its end",
            "nginx: `proxy_read_timeout 90s;` where it says `proxy_pass`, and no "
            "`proxy_max_temp_file_size` that is too small",
        )
    elif "error" in types:
        code = next(e["error"]["code"] for _, e in heard.events if e.get("type") == "error")
        yield wrong("stream", f"the turn ended with {code}", "look into the server's log")
    yield from _flow(heard)


def _refused(response: httpx2.Response, body: bytes) -> Finding:
    """Who refused a POST: the server, the application around it, or the proxy before both."""
    told: t.Any = None
    with contextlib.suppress(ValueError):
        told = json.loads(body)
    answer = told if isinstance(told, dict) else {}
    details = answer.get("details")
    answered = f"POST /chat/… answers {response.status_code}"
    if isinstance(details, dict) and details.get("refused_by") == "application":
        return wrong(
            "stream",
            f"{answered}, from a before_request function of the application: {answer['message']}",
            'leave out our routes there, such as `if request.blueprint != "agentao"`; see '
            "docs/embed.md, Cookies and Origin",
        )
    if "code" in answer:
        if response.status_code in (429, 503):
            cure = "ask again later"
        elif response.status_code == 403:
            cure = "a login by cookie needs --header 'Origin: …' too"
        else:
            cure = "look into the server's log, at its X-Request-Id"
        return wrong("stream", f"{answered}: {answer.get('message')}", cure)
    if "x-request-id" in response.headers:
        return wrong(
            "stream",
            f"{answered}, and not in our form: the application's own code answers for our route",
            "look for a before_request function that returns a page or a redirect, and leave out "
            'our routes there: `if request.blueprint != "agentao"`',
        )
    return wrong("stream", answered, "nginx: is POST let through?")


def _headers(response: httpx2.Response) -> Findings:
    told = response.headers
    if told.get("content-encoding", "identity") != "identity":
        yield wrong(
            "gzip",
            f"streams are compressed ({told['content-encoding']}): words are collected first",
            "nginx: take text/event-stream out of `gzip_types`, or `gzip off;` in the location "
            "of /chat/",
        )
    if not told.get("content-type", "").startswith("text/event-stream"):
        cure = "nginx: no `add_header Content-Type` or `proxy_hide_header Content-Type`"
        yield wrong("headers", f"a stream's Content-Type is {told.get('content-type')}", cure)
    control = told.get("cache-control", "")
    if "no-cache" not in control or "no-transform" not in control:
        yield wrong(
            "headers",
            f"a stream's Cache-Control is {control or 'missing'}, not no-cache, no-transform",
            "nginx: no `proxy_hide_header Cache-Control`, `expires` or `add_header Cache-Control` "
            "in the location of /chat/",
        )
    if "x-request-id" not in told:
        yield hint(
            "headers",
            "no X-Request-Id: a complaint cannot be found in the logs",
            "nginx: `proxy_set_header X-Request-Id $request_id;`, and no `proxy_hide_header`",
        )


def _flow(heard: _Heard) -> Findings:
    """Each event says when it happened: in a stream all are equally late."""
    said = [(at, event["ts"]) for at, event in heard.events if event.get("type") == "llm_text"]
    if not said or said[-1][1] - said[0][1] < _LONG_ENOUGH:
        yield hint("buffering", "the model was too quick to tell", 'give a longer --message "…"')
        return
    late = [at - ts for at, ts in said]
    usual = statistics.median(late) - min(late)
    if usual > _LATE:
        yield wrong(
            "buffering",
            f"words come in lumps, {usual:.1f} s late",
            "nginx: `proxy_buffering off;` in the location of /chat/, or no "
            "`proxy_ignore_headers X-Accel-Buffering`",
        )
    else:
        yield ok("buffering", f"{len(said)} pieces came as they were said")


def _silence(visit: Visit) -> Findings:
    """A stream that says nothing gets a comment before the proxy loses its patience."""
    path = f"/chat/{visit.sid}/events?follow=1&after={visit.cursor}"
    patience, begin = visit.site.patience, time.monotonic()
    how, before = "ended", begin
    try:
        with visit.http.stream("GET", path, headers=_SSE, timeout=patience) as response:
            if response.status_code != 200:
                yield wrong("timeout", f"GET …/events answers {response.status_code}")
                return
            for line in response.iter_lines():
                now = time.monotonic()
                # Not the one a stream begins with.
                if line.startswith(":") and now - before > _SILENCE:
                    yield ok(
                        "timeout", f"a silent stream gets a comment after {now - before:.0f} s"
                    )
                    return
                if now - begin > patience:
                    how = "silent"
                    break
                before = now
    except httpx2.ReadTimeout:
        how = "silent"
    except httpx2.TransportError:
        how = "cut"
    took = time.monotonic() - begin
    if how == "cut":
        yield wrong(
            "timeout",
            f"the proxy cut a silent stream after {took:.0f} s",
            "nginx: `proxy_read_timeout 90s;` where it says `proxy_pass`: more than "
            "AGENTAO_HEARTBEAT",
        )
    elif how == "silent":
        yield wrong(
            "timeout",
            f"no comment in {took:.0f} s of silence",
            "AGENTAO_HEARTBEAT is longer there: give a longer --patience; or nginx buffers: "
            "`proxy_buffering off;` in the location of /chat/",
        )
    else:
        yield hint("timeout", "the server ended the stream itself: it drains", "try again")


def _leaving(visit: Visit) -> Findings:
    """Who leaves a stream is missed: its turn is stopped, and not paid for in vain."""
    body = {"message": _LONG_MESSAGE, "on_disconnect": "cancel"}
    path = f"/chat/{visit.sid}"
    # What is buffered does not come: then it is the waiting that is given up.
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        visit.http.stream("POST", path, json=body, headers=_SSE, timeout=_SOON) as response,
    ):
        if response.status_code != 200:
            return
        next((line for line in response.iter_lines() if line.startswith("data: ")), None)
    grace = visit.site.grace
    until = time.monotonic() + grace + _MARGIN
    # Not by reading the log: that would be a reader who has come back.
    while visit.get(f"/session/{visit.sid}").json().get("state") != "idle":
        if time.monotonic() > until:
            visit.http.post(f"/chat/{visit.sid}/cancel", headers=_JSON)
            yield wrong(
                "leaving",
                f"a turn whose reader left ran on for {grace + _MARGIN:.0f} s",
                "nginx: no `proxy_ignore_client_abort on;`; or AGENTAO_DISCONNECT_GRACE is longer "
                "there",
            )
            return
        time.sleep(_GLANCE)  # Between two looks at the server.
    page = visit.get(f"/chat/{visit.sid}/events?wait=0&after={visit.cursor}").json()
    if any(event["data"].get("reason") == "client_gone" for event in page.get("events", ())):
        yield ok("leaving", "a turn whose reader leaves is stopped")
    # Any other end was the model's own, too quick to tell.


def _waiting(visit: Visit) -> Findings:
    """A long-poll sits in silence, with nothing on the line."""
    wait = visit.site.wait
    path = f"/chat/{visit.sid}/events?wait={wait}&after={visit.cursor}"
    begin = time.monotonic()
    try:
        response = visit.http.get(path, headers=_JSON, timeout=wait + _PATIENCE)
        status = response.status_code
    except httpx2.TransportError:
        status = 504
    took = time.monotonic() - begin
    if status == 200:
        yield ok("timeout", f"a long-poll of {wait} s is kept")
    elif status == 504:
        yield wrong(
            "timeout",
            f"the proxy ended a long-poll of {wait} s after {took:.0f} s",
            "nginx: `proxy_read_timeout 90s;` where it says `proxy_pass`: long-polls wait up to "
            f"{WAIT} s",
        )
    else:
        yield wrong("timeout", f"a long-poll answers {status}")


# -- the rest ----------------------------------------------------------------------------------


def _sticky(visit: Visit) -> Findings:
    """Is a session always answered by the same worker? Each request on a connection of its own."""
    asked = {ASKING: "1", "Connection": "close"}
    seen: list[set[str]] = []
    for number in range(_SESSIONS):
        answers = [visit.get(f"/session/{visit.sid}-{number}", **asked) for _ in range(_TIMES)]
        seen.append({answer.headers.get(WORKER, "") for answer in answers})
    workers = set[str]().union(*seen)
    moved = sum(len(found) > 1 for found in seen)
    if "" in workers:
        cure = f"nginx: no `proxy_hide_header {WORKER}`, and the same agentao-web on both sides"
        yield hint("sticky", "the server does not say which worker answers", cure)
    elif moved:
        yield hint(
            "sticky",
            f"{moved} of {_SESSIONS} sessions were answered by more than one worker: right, but "
            "slower than it could be",
            "nginx: `hash $agentao_key consistent;` in the `upstream`, and a socket for each "
            "worker (AGENTAO_WORKERS)",
        )
    elif len(workers) == 1:
        yield ok("sticky", "one worker answers everything")
    else:
        yield ok("sticky", f"{_SESSIONS} sessions on {len(workers)} workers, each always on one")


def _body(visit: Visit) -> Findings:
    """A body of the largest size is refused by us for what it says, and not by the proxy."""
    size = visit.site.max_body
    headers = {**_JSON, "Content-Type": "application/json"}
    # Text of an image's kind, as no other may be so large; and no message, so that no turn starts.
    content = b'{"doctor":"' + b"A" * (size - 13) + b'"}'
    try:
        response = visit.http.post(f"/chat/{visit.sid}", content=content, headers=headers)
    except httpx2.TransportError:
        status, code, limit = 413, None, None
    else:
        status = response.status_code
        told = response.json() if _ours(response) else {}
        code, limit = told.get("code"), (told.get("details") or {}).get("limit")
    if status == 400 and code == "invalid_request":
        yield ok("body", f"{size} bytes get through")
    elif code == "payload_too_large" and limit is not None:
        cure = f"set AGENTAO_MAX_BODY={size} there, or for the doctor what the server has"
        yield hint("body", f"the server takes {limit} bytes, not {size}", cure)
    elif status == 413:
        yield wrong(
            "body",
            f"the proxy refuses a body of {size} bytes, AGENTAO_MAX_BODY",
            f"nginx: `client_max_body_size {-(-size // 2**20)}m;` in the server",
        )
    else:
        cure = "nginx: longer `proxy_send_timeout` and `client_body_timeout`"
        yield wrong("body", f"a body of {size} bytes is answered with {status}", cure)


def _errors(visit: Visit) -> Findings:
    response = visit.get(f"/session/{visit.sid}-unknown")
    if response.status_code == 404 and _ours(response):
        yield ok("errors", "reach the client as they are")
    else:
        cure = "nginx: `proxy_intercept_errors off;`, and no `error_page 404`"
        yield wrong("errors", "a 404 of ours is replaced by a page of the proxy's", cure)


def _metrics(visit: Visit) -> Findings:
    cure = "nginx: `location ~ /metrics$ { return 404; }` before the one with `proxy_pass`"
    token = visit.site.metrics_token
    with httpx2.Client(
        base_url=visit.http.base_url,
        verify=visit.site.tls if visit.site.url.startswith("https:") else True,
        timeout=_PATIENCE,
        trust_env=False,
    ) as stranger:
        if stranger.get("/metrics").status_code == 200:
            yield wrong("metrics", "/metrics is open to everybody", cure)
            return
        if token is not None:
            bearer = {"Authorization": f"Bearer {token}"}
            if stranger.get("/metrics", headers=bearer).status_code == 200:
                yield hint("metrics", "/metrics can be reached from here, with its token", cure)
                return
    yield ok("metrics", "/metrics is not for strangers")


def _methods(visit: Visit) -> Findings:
    response = visit.http.patch(f"/session/{visit.sid}", json={"title": "doctor"}, headers=_JSON)
    if response.status_code != 200 or not _ours(response):
        cure = "nginx: no `limit_except` or `dav_methods` where our paths are"
        yield wrong("methods", f"PATCH is answered with {response.status_code}", cure)


def _leave(visit: Visit) -> Findings:
    """Remove what we talked in."""
    response = visit.http.delete(f"/session/{visit.sid}", headers=_JSON)
    if response.status_code not in (200, 202) or not _ours(response):
        cure = "nginx: no `limit_except` or `dav_methods` where our paths are"
        yield wrong("methods", f"DELETE is answered with {response.status_code}", cure)


CHECKS: t.Final = (
    _stream,
    _silence,
    _waiting,
    _leaving,
    _sticky,
    _body,
    _errors,
    _metrics,
    _methods,
)
