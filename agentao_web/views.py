"""Every route, each a few lines, and the one place where errors become answers."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import sys
import threading
import time
import typing as t

from flask import Blueprint
from flask import Response
from flask import after_this_request
from flask import current_app
from flask import jsonify
from flask import request
from flask import url_for
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import default_exceptions
from werkzeug.routing import Rule

from agentao_web import page as chat_page
from agentao_web import serving
from agentao_web.auth import Authenticate
from agentao_web.auth import Tickets
from agentao_web.auth import bearer
from agentao_web.auth import identify
from agentao_web.auth import ticket
from agentao_web.config import Settings
from agentao_web.core import trail
from agentao_web.core.errors import Draining
from agentao_web.core.errors import Forbidden
from agentao_web.core.errors import InternalError
from agentao_web.core.errors import InvalidRequest
from agentao_web.core.errors import MethodNotAllowed
from agentao_web.core.errors import NoStreamSlot
from agentao_web.core.errors import NotAcceptable
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import PayloadTooLarge
from agentao_web.core.errors import Quota
from agentao_web.core.errors import TooManyStreams
from agentao_web.core.errors import Unauthorized
from agentao_web.core.errors import UnsupportedMediaType
from agentao_web.core.errors import WebError
from agentao_web.core.errors import WrongSchema
from agentao_web.core.log import Event
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.core.names import is_session_id
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.turn import State
from agentao_web.live import Live
from agentao_web.readers import Reader
from agentao_web.readers import Watcher
from agentao_web.readers import ending
from agentao_web.readers import poll
from agentao_web.readers import stream
from agentao_web.readiness import Readiness
from agentao_web.sessions import SessionPool
from agentao_web.sessions import Started
from agentao_web.slots import NoPlace
from agentao_web.slots import Share
from agentao_web.slots import Slot
from agentao_web.slots import StreamSlots
from agentao_web.store import ActiveTurn
from agentao_web.store import SessionRow
from agentao_web.wire import Wire
from agentao_web.wire import native
from agentao_web.wire import openapi
from agentao_web.wire import requests

NAME: t.Final = "agentao"
#: How long DELETE waits for a running turn, in seconds.
_DELETE_WAIT: t.Final = 5.0
#: A long-poll's defaults and bounds: seconds, events, bytes.
_WAIT, _LIMIT, _MAX_LIMIT, _MAX_BYTES = 25, 500, 1000, 2**20
_PAGE, _MAX_PAGE = 50, 200
#: A page of the transcript ends after so many characters of JSON, but never before its first entry.
_PAGE_BYTES = 2**20
#: Bytes of a request body, by what it is: more than the rest is for images, as a setting says.
_BODIES: t.Final = {"TurnRequest": sys.maxsize, "Answer": requests.ANSWER_BODY}
#: Streams and waiting requests of one user, if no setting says how many, and at most this part of a
#: worker's places; that part for a tenant. A person with a dozen tabs is far from it.
_USER_STREAMS, _USER_PART, _TENANT_PART = 32, 1 / 2, 3 / 4
#: Streams that one ticket opens at once: one, and what is left of those before a reconnect.
TICKET_STREAMS: t.Final = 4

_BY_STATUS: t.Final[dict[int, type[WebError]]] = {
    cls.status: cls
    for cls in (Unauthorized, Forbidden, NotFound, NotAcceptable, UnsupportedMediaType)
}

_log = logging.getLogger("agentao_web")
_access = logging.getLogger("agentao_web.access")

#: A request id that a client or proxy may give: printable ASCII.
_REQUEST_ID: t.Final = re.compile(r"[!-~](?:[ -~]{0,126}[!-~])?")
#: The end of a Host that names its port; an IPv6 address is in brackets then.
_PORT: t.Final = re.compile(r":\d*$")
_ID, _BEGAN = "agentao_web.request_id", "agentao_web.began"


class Machinery(t.NamedTuple):
    """What runs the turns of one application. Loading it takes a second."""

    pool: SessionPool
    readiness: Readiness
    warm: cabc.Callable[[], None] = lambda: None
    """Loads what the first turn would load."""
    left: cabc.Callable[[], int] = lambda: 0
    """How many calls of the host's tools run on past their deadline."""


@dataclasses.dataclass
class Parts:
    """What belongs to one application; hangs in ``app.extensions["agentao_web"]``."""

    settings: Settings
    serving: serving.Serving
    authenticate: Authenticate
    tickets: Tickets
    build: cabc.Callable[[], Machinery]
    """Called once, by whoever needs the machinery first: a command of the host's does not."""
    watcher: Watcher
    slots: StreamSlots = dataclasses.field(default_factory=StreamSlots)
    wires: tuple[Wire, ...] = ()
    """Streams of the host's own making."""
    own_login: bool = False
    """Requests are identified by the host, not by tokens of ours."""
    own_agents: bool = False
    """The host builds its agents, so no model has to be named."""
    observer: Observer = dataclasses.field(default_factory=Observer)
    scrape: cabc.Callable[[str], tuple[bytes, str]] | None = None
    """The numbers of all workers in the form that an ``Accept`` asks for, and its name."""
    built: Machinery | None = None
    _building: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def machinery(self) -> Machinery:
        """What runs the turns, built by the first who asks."""
        if self.built is None:
            with self._building:
                if self.built is None:
                    self.built = self.build()
        return self.built

    @property
    def pool(self) -> SessionPool:
        """The sessions of this worker."""
        return self.machinery.pool

    def shut_down(self, grace: float | None) -> None:
        """End every turn within *grace* seconds, if there ever was one; none begins from now on."""
        with self._building:
            if self.built is None:
                self.build = _too_late
        if self.built is not None:
            self.built.pool.drain(grace)
        else:
            self.observer.close()
        self.watcher.close()


def _too_late() -> Machinery:
    raise Draining


_Seconds = t.TypeVar("_Seconds", int, float)

ROUTES: list[openapi.Route] = []
View = cabc.Callable[..., t.Any]


def route(method: str, path: str, summary: str, **doc: t.Any) -> cabc.Callable[[View], View]:
    """Add an endpoint: this line is the only place it is named."""

    def register(view: View) -> View:
        ROUTES.append(openapi.Route(method, path, view.__name__, summary, view, **doc))
        return view

    return register


def routes(settings: Settings) -> list[openapi.Route]:
    """The endpoints of an application: without the page if it is off, so that `/` is the host's."""
    return [entry for entry in ROUTES if settings.page or not entry.page]


def blueprint(settings: Settings) -> Blueprint:
    """A fresh blueprint with every route."""
    bp = Blueprint(NAME, __name__)
    for entry in routes(settings):
        bp.add_url_rule(
            entry.path,
            entry.name,
            _guarded(entry),
            methods=[entry.method],
            provide_automatic_options=False,
        )
    for code in default_exceptions:
        # By code as well: a host's own handler for a code would otherwise win inside our routes.
        bp.register_error_handler(code, _http_error)
    bp.register_error_handler(WebError, _web_error)
    bp.register_error_handler(Exception, _unexpected)
    bp.url_value_preprocessor(_spare_csrf_protection)
    bp.before_request(begin_request)
    bp.after_request(name_request)
    bp.teardown_request(lambda exc: trail.leave())
    return bp


def _spare_csrf_protection(endpoint: str | None, values: dict[str, t.Any] | None) -> None:
    """Exempt our routes from Flask-WTF's CSRFProtect, which expects a form's token in a POST.

    They lose nothing by it: auth.identify refuses what another site's page sends with a cookie.
    Here and not in init_app: Flask runs this for our routes only, and before any before_request
    function, so it does not matter which extension the host set up first.
    """
    flask_wtf = sys.modules.get("flask_wtf.csrf")
    csrf = current_app.extensions.get("csrf")
    if flask_wtf is not None and isinstance(csrf, flask_wtf.CSRFProtect):
        csrf.exempt(current_app.blueprints[NAME])


def _guarded(entry: openapi.Route) -> View:
    @functools.wraps(entry.view)
    def view(**arguments: str) -> t.Any:
        parts: Parts = current_app.extensions["agentao_web"]
        parts.serving.look(request.environ)
        largest = _BODIES.get(entry.request or "", requests.ROOM)
        _limit_body(min(largest, parts.settings.max_body))
        if (sock := _socket()) is not None:
            after_this_request(functools.partial(_give_back, sock, sock.gettimeout()))
            sock.settimeout(parts.settings.send_timeout)
        if entry.public or entry.scheme == "metrics":
            return entry.view(parts, **arguments)
        principal = _by_ticket(parts, entry, arguments) or identify(request, parts.authenticate)
        if "X-Agentao-Doctor" in request.headers:
            after_this_request(functools.partial(_name_worker, parts))
        trail.enter(tenant=principal.tenant, user=principal.user)
        if "sid" not in arguments:
            return entry.view(parts, principal)
        key = _key(principal, arguments["sid"])
        trail.enter(session_id=key.id)
        return entry.view(parts, key)

    return view


def _give_back(sock: socket.socket, timeout: float | None, response: Response) -> Response:
    """The server waits for the next request as it did for this one: under gevent ours would end
    an idle connection with a traceback."""

    def restore() -> None:
        with contextlib.suppress(OSError):  # It may be closed by now.
            sock.settimeout(timeout)

    response.call_on_close(restore)
    return response


def _limit_body(most: int) -> None:
    """Take no longer body than *most*. Before Flask 3.1 the limit was the application's alone."""
    try:
        request.max_content_length = most
    except AttributeError:
        own = t.cast(t.Any, request)._get_current_object()
        own.__class__ = _with_limit(t.cast(t.Any, type(own)))
        own.max_content_length = most


@functools.cache
def _with_limit(cls: t.Any) -> t.Any:
    return type(cls.__name__, (cls,), {"max_content_length": None})


def _by_ticket(parts: Parts, entry: openapi.Route, arguments: dict[str, str]) -> Principal | None:
    """Who the ticket of this request stands for; None where there is none, or none is taken."""
    given = ticket(request)
    if given is None or not entry.ticket or request.method != "GET":
        return None
    principal = parts.tickets.read(given, arguments["sid"])
    if principal is None:
        raise Unauthorized("the ticket is for another session, or its time is over; get a new one")
    return principal


def _name_worker(parts: Parts, response: Response) -> Response:
    """Say which worker this is, so that the doctor can tell them apart."""
    response.headers["X-Agentao-Worker"] = parts.pool.alias
    return response


def _key(principal: Principal, sid: str) -> SessionKey:
    if not is_session_id(sid):
        raise InvalidRequest(
            "a session id is 1 to 128 of A-Z a-z 0-9 . _ -, and begins with a letter or digit",
            field="session_id",
        )
    return SessionKey(principal.tenant, principal.user, sid)


# -- turns -------------------------------------------------------------------------------------


@route(
    "POST",
    "/chat/<sid>",
    "Start a turn; creates or restores the session",
    request="TurnRequest",
    query=("stream",),
    responses={200: "stream:TurnResult", 202: "Accepted"},
    errors=(400, 401, 403, 404, 406, 409, 413, 415, 429, 503),
    headers=("Prefer", "Idempotency-Key", "Last-Event-ID"),
)
def start_turn(parts: Parts, key: SessionKey) -> Response:
    wire = _wire(parts, default=True)
    streams = wire is not None
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    asked = requests.turn_request(
        _body(), parts.settings, streams=streams, key=request.headers.get("Idempotency-Key")
    )
    asked = dataclasses.replace(asked, request_id=request_id())
    last = requests.cursor(request.headers.get("Last-Event-ID"), "Last-Event-ID")
    wait = requests.preferred_wait(", ".join(request.headers.getlist("Prefer")))
    wait = None if wait is None else _allowed_wait(wait)
    # Asked for before anything starts.
    slot = None
    if streams:
        slot = _slot(parts, key)
    elif wait:
        try:
            slot = _slot(parts, key)
        except (NoStreamSlot, TooManyStreams):
            wait = None
    with _freed(slot, after=streams):
        # No event has the number 0: whoever sends that has seen none.
        started = parts.pool.resume(key, last, asked) if last else parts.pool.start(key, asked)
        reader = _reader(parts, started.live, started.cursor, of=started)
        if wire is not None:
            return _stream(reader, slot, wire)
        final = None
        if wait or started.status not in ("queued", "running"):
            final = ending(reader, wait=wait or 0)
    response = jsonify(_result(key, started, final)) if final else _accepted(parts, key, started)
    if wait is not None:
        response.headers["Preference-Applied"] = f"wait={wait}"
    return response


@route(
    "POST",
    "/chat/<sid>/cancel",
    "Stop the running turn and end the queued ones",
    responses={200: "Cancelled"},
    errors=(400, 401, 403),
)
def cancel(parts: Parts, key: SessionKey) -> Response:
    return jsonify(ok=True, cancelled=parts.pool.cancel(key))


@route(
    "POST",
    "/chat/<sid>/answer",
    "Answer a question: approve a tool or not, or say something",
    request="Answer",
    responses={200: "Answered"},
    errors=(400, 401, 403, 404, 409, 413, 415, 503),
)
def answer(parts: Parts, key: SessionKey) -> Response:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    question_id, reply = requests.answer(_body())
    question = parts.pool.answer(key, question_id, reply, by=key.user or "user")
    return jsonify(ok=True, question_id=question.id, outcome=question.outcome)


@route(
    "GET",
    "/chat/<sid>/events",
    "Read the session's log: long-poll, or SSE if text/event-stream is asked for",
    query=("after", "wait", "limit", "follow", "stream"),
    responses={200: "stream:EventPage", 204: ""},
    errors=(400, 401, 404, 406, 429, 503),
    headers=("Last-Event-ID",),
    ticket=True,
)
def events(parts: Parts, key: SessionKey) -> Response:
    query = request.args
    after = requests.cursor(query.get("after"), "after")
    wait = requests.wait(query.get("wait"))
    limit = requests.number(query.get("limit"), "limit", least=1, most=_MAX_LIMIT)
    follow = requests.flag(query.get("follow"), "follow")
    if (wire := _wire(parts, default=False)) is not None:
        # What an EventSource sends when it comes back is newer than its URL.
        last = requests.cursor(request.headers.get("Last-Event-ID"), "Last-Event-ID")
        return _follow(parts, key, after if last is None else last, wire, follow=follow)
    live = parts.pool.find(key)
    reader = _reader(parts, live, after)
    seconds = _allowed_wait(_WAIT if wait is None else wait)
    found = poll(reader, wait=0, limit=limit or _LIMIT, max_bytes=_MAX_BYTES)
    if seconds and not (found or reader.over):
        with _freed(_slot(parts, key, reader.cursor)):
            found = poll(reader, wait=seconds, limit=limit or _LIMIT, max_bytes=_MAX_BYTES)
    state = live.state()
    if state == "idle" and not reader.caught_up:
        state = "running"
    elif state == "running" and not live.owned and parts.pool.store.questions(key):
        state = "waiting"
    return _in_order(native.page(found, reader.cursor or 0, state))


def _follow(
    parts: Parts, key: SessionKey, after: int | None, wire: Wire, *, follow: bool
) -> Response:
    live = parts.pool.find(key)
    reader = _reader(parts, live, after)
    if reader.caught_up and not follow:
        return _nothing(204)
    slot = _slot(parts, key, reader.cursor)
    with _freed(slot, after=True):
        return _stream(reader, slot, wire, follow=follow)


# -- sessions ----------------------------------------------------------------------------------


@route(
    "DELETE",
    "/session/<sid>",
    "Stop the session's turn and remove it",
    responses={200: "Deleted", 202: "Deleted"},
    errors=(400, 401, 403, 503),
)
def delete_session(parts: Parts, key: SessionKey) -> Response:
    if parts.pool.delete(key, timeout=_DELETE_WAIT):
        return jsonify(ok=True)
    response = jsonify(ok=True, pending=True)
    response.status_code = 202
    return response


@route(
    "GET",
    "/session/<sid>",
    "A snapshot: state, running and queued turns, cursor, title, usage",
    responses={200: "Session"},
    errors=(400, 401, 404, 503),
)
def snapshot(parts: Parts, key: SessionKey) -> Response:
    live = parts.pool.find(key)
    row = parts.pool.store.session(key)
    if row is None:
        raise NotFound("no such session")
    states = {turn.turn.id: turn.turn.state.value for turn in live.turns()}
    turns = parts.pool.store.active(key)
    questions = parts.pool.store.questions(key)
    running = [_turn(turn, states) for turn in turns if turn.state == "running"]
    return _in_order(
        {
            **_session(row),
            "state": "waiting" if questions and running else live.state(),
            "turn": running[0] if running else None,
            "queued": [
                _turn(turn, states) for turn in turns if turn.state == "queued" and not turn.ending
            ],
            "questions": [_question(question) for question in questions],
            "cursor": live.shown,
        }
    )


@route(
    "PATCH",
    "/session/<sid>",
    "Give the session a title",
    request="Rename",
    responses={200: "Named"},
    errors=(400, 401, 403, 404, 413, 415, 503),
)
def rename(parts: Parts, key: SessionKey) -> Response:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    title = requests.title(_body())
    parts.pool.find(key)
    parts.pool.store.rename(key, title)
    return jsonify(session_id=key.id, title=title)


@route(
    "POST",
    "/session/<sid>/ticket",
    "A ticket to read the session's events with, for readers that cannot send headers",
    responses={200: "Ticket"},
    errors=(400, 401, 403, 404, 503),
)
def new_ticket(parts: Parts, key: SessionKey) -> Response:
    parts.pool.find(key)
    issued, expires_at = parts.tickets.issue(key, bearer(request))
    return jsonify(ticket=issued, expires_at=expires_at)


@route(
    "GET",
    "/sessions",
    "The caller's sessions, last updated first, a page at a time",
    query=("page", "page_limit"),
    responses={200: "SessionPage"},
    errors=(400, 401, 503),
)
def sessions(parts: Parts, principal: Principal) -> Response:
    limit = requests.number(request.args.get("limit"), "limit", least=1, most=_MAX_PAGE) or _PAGE
    before = requests.page_mark(request.args.get("page"))
    store = parts.pool.store
    rows = store.sessions(principal.tenant, principal.user, before=before, limit=limit + 1)
    page = rows[:limit]
    following = requests.mark(page[-1].updated, page[-1].key.id) if len(rows) > limit else None
    return jsonify(sessions=[_session(row) for row in page], next=following)


@route(
    "GET",
    "/session/<sid>/messages",
    "The transcript for display, a page at a time",
    query=("before", "after", "page_limit"),
    responses={200: "MessagePage"},
    errors=(400, 401, 404, 503),
)
def messages(parts: Parts, key: SessionKey) -> Response:
    before = requests.cursor(request.args.get("before"), "before")
    after = requests.cursor(request.args.get("after"), "after")
    limit = requests.number(request.args.get("limit"), "limit", least=1, most=_MAX_PAGE) or _PAGE
    parts.pool.find(key)
    page = parts.pool.store.transcript(
        key, before=before, after=after, limit=limit, max_bytes=_PAGE_BYTES
    )
    most = parts.settings.turn_text
    return _in_order({"messages": [_shortened(e, most) for e in page.messages], "more": page.more})


def _shortened(entry: dict[str, t.Any], most: int) -> dict[str, t.Any]:
    """*entry*, with no more text than a turn may have: it may be older than that bound."""
    content = entry.get("content", "")
    if entry["role"] != "assistant" or len(content) <= most:
        return entry
    return {**entry, "content": content[:most], "truncated": True}


# -- open to all -------------------------------------------------------------------------------


@route("GET", "/healthz", "Alive", public=True, responses={200: "Ok"})
def healthz(parts: Parts) -> Response:
    return jsonify(ok=True)


@route(
    "GET",
    "/readyz",
    "Whether new turns are taken, and if not, why",
    public=True,
    responses={200: "Ok", 503: "NotReady"},
)
def readyz(parts: Parts) -> Response:
    try:
        why = parts.machinery.readiness.why_not()
    except Draining as exc:
        why = exc  # It was shut down before it was ever used.
    if why is None:
        return jsonify(ok=True)
    response = _in_order({"ok": False, **why.as_dict()})
    response.status_code = why.status
    if why.retry_after is not None:
        response.headers["Retry-After"] = str(why.retry_after)
    return response


@route("GET", "/openapi.json", "This contract", public=True, responses={200: "Any"})
def openapi_json(parts: Parts) -> Response:
    prefix = url_for(".openapi_json").removesuffix("/openapi.json")
    return jsonify(openapi.document(routes(parts.settings), prefix or "/", parts.settings))


@route("GET", "/", "The chat page", public=True, page=True, responses={200: "text/html", 304: ""})
def page(parts: Parts) -> Response:
    return _page_file("index.html")


@route(
    "GET",
    "/page/<path:file>",
    "The page's files",
    public=True,
    page=True,
    responses={200: chat_page.KINDS, 304: ""},
    errors=(404,),
)
def page_file(parts: Parts, file: str) -> Response:
    return _page_file(file)


def _page_file(name: str) -> Response:
    found = chat_page.file(name)
    if found is None:
        raise NotFound
    return found


@route(
    "GET",
    "/page/config.json",
    "What the page is told: whose login it is, and whether this is the demo",
    public=True,
    page=True,
    responses={200: "PageConfig", 304: ""},
)
def page_config(parts: Parts) -> Response:
    login = "host" if parts.own_login else "token"
    return chat_page.told(jsonify(login=login, demo=parts.settings.demo))


@route(
    "GET",
    "/metrics",
    "Numbers for Prometheus, over all workers",
    scheme="metrics",
    responses={200: "text"},
    errors=(404, 503),
)
def metrics(parts: Parts) -> Response:
    token = parts.settings.metrics_token
    # Nobody else is told that it is here.
    if parts.scrape is None or token is None or not _is_equal(bearer(request) or "", token):
        raise NotFound
    body, content_type = parts.scrape(request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)


def _is_equal(given: str, wanted: str) -> bool:
    """Compares in the same time whatever was given, also if it is longer or no ASCII."""
    return hmac.compare_digest(_digest(given), _digest(wanted))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _body() -> bytes:
    """The request's body; PayloadTooLarge, or InvalidRequest for one that breaks off."""
    try:
        body = request.get_data()
    except HTTPException:
        raise
    except Exception as exc:
        # The server's own words for bad chunks, and for a client that is too slow or gone.
        raise InvalidRequest("the body cannot be read", field="body") from exc
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(body) >= limit:
        # Werkzeug cuts a chunked body at the limit without a word.
        raise PayloadTooLarge(limit=limit)
    return body


# -- every request -----------------------------------------------------------------------------


def request_id() -> str:
    """What this request is called: by its client or a proxy, or else by us."""
    environ = request.environ
    if _ID not in environ:
        given = request.headers.get("X-Request-Id", "").strip()
        environ[_ID] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    return t.cast(str, environ[_ID])


def begin_request() -> None:
    """From now on log lines of this thread name the request."""
    request.environ[_BEGAN] = time.monotonic()
    trail.leave()
    trail.enter(request_id=request_id())
    parts: Parts = current_app.extensions["agentao_web"]
    if parts.settings.demo and not parts.own_login:
        _refuse_other_names(parts.settings.demo_hosts)


def _refuse_other_names(allowed: cabc.Sequence[str]) -> None:
    """Forbidden for a name that may be another site's.

    Everybody knows the demo's token. A page of another site could use it, once that site's name
    stands for the address of this server (DNS rebinding). An address is no name, and one without a
    dot (localhost, a container, a machine of this network) is nobody's on the internet.
    """
    host = request.host.rpartition(":")[0] if _PORT.search(request.host) else request.host
    name = host.strip("[]").rstrip(".").lower()
    # What is no host at all is empty here.
    if (name and "." not in name) or name.endswith(".localhost") or name in map(str.lower, allowed):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise Forbidden(
            "The demo answers only to localhost, to IP addresses and to names without a dot. To "
            "use it by another name, set AGENTAO_DEMO_HOSTS to that name and restart the server."
        ) from None


def name_request(response: Response) -> Response:
    """Every answer says which request it is to. Harmless twice."""
    response.headers["X-Request-Id"] = request_id()
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "application/json":
        # It is one person's, and of this moment.
        response.headers["Cache-Control"] = "no-store"
    parts: Parts | None = current_app.extensions.get("agentao_web")
    began = request.environ.pop(_BEGAN, None)
    if parts is not None and parts.settings.log_requests and began is not None:
        # The rule: the path itself has the session's id, which is a field.
        rule = request.url_rule.rule if request.url_rule is not None else ""
        told = {
            "method": request.method,
            "route": rule,
            "status": response.status_code,
            "duration_ms": int((time.monotonic() - began) * 1000),
        }
        _access.info("%s %s %d", request.method, rule, response.status_code, extra=told)
    return response


class _Along:
    """The body of a stream: made on the server's time, under the log ids of its request."""

    def __init__(self, body: cabc.Iterator[bytes]) -> None:
        self._body = body
        self._trail = trail.here()

    def __iter__(self) -> cabc.Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with trail.along(self._trail):
            return next(self._body)

    def close(self) -> None:
        with trail.along(self._trail):
            t.cast(t.Any, self._body).close()


# -- what they share ---------------------------------------------------------------------------


def _wire(parts: Parts, *, default: bool) -> Wire | None:
    """What the answer is streamed as, by ``?stream=`` and ``Accept``; None is JSON.

    A wire of the host's is taken by those who name it and want nothing else more.
    """
    asked = request.args.get("stream")
    if asked is not None and not requests.flag(asked, "stream"):
        return None
    accept = request.accept_mimetypes
    named = {value.partition(";")[0].strip().lower() for value in accept.values()}
    for wire in parts.wires:
        kind = wire.CONTENT_TYPE.partition(";")[0].strip().lower()
        others = max(accept["text/event-stream"], accept["application/json"])
        if kind in named and accept[kind] and accept[kind] >= others:
            return wire
    return native if asked is not None or _wants_stream(default=default) else None


def _wants_stream(*, default: bool) -> bool:
    """Whether the answer is to be SSE, by ``Accept`` (RFC 9110, 12.5.1).

    The higher q wins. On a tie what is named beats ``*/*``, then *default* decides.
    """
    accept = request.accept_mimetypes
    if not accept:
        return default
    sse, json_ = accept["text/event-stream"], accept["application/json"]
    if not (sse or json_):
        raise NotAcceptable
    if sse != json_:
        return sse > json_
    named = {value.partition(";")[0].strip().lower() for value in accept.values()}
    if ("text/event-stream" in named) != ("application/json" in named):
        return "text/event-stream" in named
    return default


def _reader(parts: Parts, live: Live, cursor: int | None, of: Started | None = None) -> Reader:
    """A reader of the session, or *of* one turn."""
    sock = _socket()
    if sock is not None:
        # A reader that takes nothing must not hold its thread for ever.
        sock.settimeout(parts.settings.send_timeout)
    pool = parts.pool
    mine = of is not None and of.turn is not None
    if not mine:
        pool.read_here(live)
    return Reader(
        live,
        pool.store,
        cursor,
        turn=of.turn if of is not None else None,
        turn_id=of.turn_id if of is not None else None,
        ended=of.final if of is not None else None,
        watcher=parts.watcher,
        sock=sock,
        # The stream of our own turn lives as long as it; all others end when the worker goes.
        dismissed=(lambda: False) if mine else (lambda: pool.draining),
        entered=pool.reader_came,
    )


def _socket() -> socket.socket | None:
    """The client's connection, where the server shows it: Gunicorn and Werkzeug do."""
    for name in ("gunicorn.socket", "werkzeug.socket"):
        sock = request.environ.get(name)
        if isinstance(sock, socket.socket):
            return sock
    return None


def _allowed_wait(seconds: _Seconds) -> _Seconds:
    """How long a request may wait: less where nothing else is answered meanwhile."""
    if not serving.is_alone(request.environ):
        return seconds
    most = serving.POST_SECONDS if request.method == "POST" else serving.GET_SECONDS
    return min(seconds, type(seconds)(most))


def _slot(parts: Parts, key: SessionKey, after: int | None = None) -> Slot:
    """A place to wait in; NoStreamSlot or TooManyStreams, with where to ask without waiting."""
    try:
        return parts.slots.take(_shares(parts, key))
    except NoPlace as exc:
        share = exc.share
    instead = url_for(".events", sid=key.id, after=after, wait=0)
    if share is None:
        raise NoStreamSlot(poll_url=instead)
    raise TooManyStreams(quota=Quota(share.name, share.most), poll_url=instead)


def _shares(parts: Parts, key: SessionKey) -> list[Share]:
    """Of what a stream or waiting request of *key* takes a part."""
    settings, slots = parts.settings, parts.slots
    shares = []
    of_tenant = settings.max_streams_per_tenant or slots.part(_TENANT_PART)
    if of_tenant is not None:
        shares.append(Share("tenant_streams", key.tenant, of_tenant))
    of_user = settings.max_streams_per_user
    if of_user is None and key.user:
        # Tokens without a user may be those of many people, or of a service that asks for them.
        of_user = min(_USER_STREAMS, slots.part(_USER_PART) or _USER_STREAMS)
    if of_user is not None:
        shares.append(Share("user_streams", (key.tenant, key.user), of_user))
    if (shown := ticket(request)) is not None:
        # Without its signature, which can be spelled in more than one way.
        shares.append(Share("ticket_streams", shown.rpartition(".")[0], TICKET_STREAMS))
    return shares


@contextlib.contextmanager
def _freed(slot: Slot | None, *, after: bool = False) -> cabc.Iterator[None]:
    """Free *slot* at the end; *after* a success somebody else does."""
    try:
        yield
    except BaseException:
        after = False
        raise
    finally:
        if slot is not None and not after:
            slot.free()


def _stream(reader: Reader, slot: Slot | None, wire: Wire, *, follow: bool = False) -> Response:
    parts: Parts = current_app.extensions["agentao_web"]
    body = stream(
        reader,
        wire,
        heartbeat=parts.settings.heartbeat,
        lease=_allowed_wait(parts.settings.stream_lease),
        follow=follow,
        alone=serving.is_alone(request.environ),
    )
    response = Response(_Along(body), content_type=wire.CONTENT_TYPE, headers=dict(wire.HEADERS))
    if slot is not None:
        # Not in the generator: one that was never begun is never ended.
        response.call_on_close(slot.free)
    return response


def _asked(parts: Parts, key: SessionKey, started: Started) -> list[Question]:
    """What a turn that was accepted, here or on another worker, waits for."""
    turn = started.turn
    if turn is None:
        found = parts.pool.store.questions(key)
        return [question for question in found if question.turn_id == started.turn_id]
    return list(turn.questions.values()) if turn.turn.state is State.WAITING else []


def _in_order(body: cabc.Mapping[str, t.Any]) -> Response:
    """JSON with its keys as they are; a host may sort them, and a call reads file, then content."""
    return Response(json.dumps(body, separators=(",", ":")) + "\n", mimetype="application/json")


def _accepted(parts: Parts, key: SessionKey, started: Started) -> Response:
    url = url_for(".events", sid=key.id, after=started.cursor)
    questions = _asked(parts, key, started)
    response = _in_order(
        {
            "session_id": key.id,
            "turn_id": started.turn_id,
            "status": "waiting" if questions else started.status,
            "cursor": started.cursor,
            "events_url": url,
            "questions": [_question(question) for question in questions],
        }
    )
    response.status_code = 202
    response.headers["Location"] = url
    return response


def _result(key: SessionKey, started: Started, final: Event) -> dict[str, t.Any]:
    """How a turn ended, for a client that waited."""
    return {
        "session_id": key.id,
        "turn_id": started.turn_id,
        "reply": "",
        **final.data,
        **final.extra,
        "cursor": started.live.shown if final.seq is None else final.seq,
    }


def _turn(turn: ActiveTurn, states: dict[str, str]) -> dict[str, t.Any]:
    return {
        "turn_id": turn.id,
        # Ours may be waiting or stopping; of another worker's we know that it runs.
        "state": states.get(turn.id, turn.state),
        "message": turn.message,
        "created_at": turn.created,
        "cursor": turn.cursor,
    }


def _question(question: Question) -> dict[str, t.Any]:
    return {"turn_id": question.turn_id, "type": question.kind, **question.data}


def _session(row: SessionRow) -> dict[str, t.Any]:
    return {
        "session_id": row.key.id,
        "title": row.title,
        "created_at": row.created,
        "updated_at": row.updated,
        "turns": row.turns,
        "usage": dict(row.usage),
    }


def _nothing(status: int) -> Response:
    """An answer without a body, and so without a type of one."""
    response = Response(status=status)
    del response.headers["Content-Type"]
    return response


# -- errors ------------------------------------------------------------------------------------


def _web_error(error: WebError) -> Response:
    _count_refusal(error)
    if isinstance(error, WrongSchema):
        _log.error("%s", error.message)
    response = jsonify(error.as_dict())
    response.status_code = error.status
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.quota is not None:
        response.headers.extend(_rate_limit(error.quota, error.retry_after or 0))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="agentao"'
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(error.allowed)
    return response


def _count_refusal(error: WebError) -> None:
    parts: Parts | None = current_app.extensions.get("agentao_web")
    if parts is not None:
        parts.observer.refused(error.code)


def _rate_limit(quota: Quota, seconds: int) -> dict[str, str]:
    """What ran out, as draft-ietf-httpapi-ratelimit-headers says it: nothing remains of it."""
    window = "" if quota.window is None else f";w={quota.window}"
    return {
        "RateLimit-Policy": f'"{quota.name}";q={quota.allows}{window}',
        "RateLimit": f'"{quota.name}";r=0;t={seconds}',
    }


def _http_error(error: HTTPException) -> t.Any:
    """What Werkzeug or the host raised inside our routes, in our form."""
    code = error.code or 500
    if code < 400 or error.response is not None:
        return error
    if code == 413:
        return _web_error(PayloadTooLarge(limit=request.max_content_length))
    if code >= 500:
        return _unexpected(error)
    known = _BY_STATUS.get(code, InvalidRequest)
    response = _web_error(_by_the_host(known, error) if _is_the_hosts() else known())
    response.status_code = code
    return response


def _is_the_hosts() -> bool:
    """Whether a before_request function of the host refused a request of ours.

    The host's functions run before begin_request, which is our blueprint's first.
    """
    return request.blueprint == NAME and _BEGAN not in request.environ


def _by_the_host(known: type[WebError], error: HTTPException) -> WebError:
    """The host's refusal in our form, with its own words; a line in the log says whose it is."""
    _log.warning(
        "a before_request function of the application answered %s (%s) to %s %s, which never "
        "reached agentao-web: see docs/embed.md, Cookies and Origin",
        error.code,
        type(error).__name__,
        request.method,
        request.url_rule,
    )
    message = f"The application refused this request before agentao-web saw it: {error.description}"
    return known(message, refused_by="application")


def _unexpected(error: Exception) -> Response:
    """Anything else: an id for the client, the traceback for the log."""
    error_id = secrets.token_hex(8)
    _log.error("error_id %s at %s", error_id, request.url_rule, exc_info=error)
    return _web_error(InternalError(error_id=error_id))


def other_methods(**_: str) -> Response:
    """OPTIONS of a path of ours, and every method it does not take.

    Registered behind every route for any method; with such a rule in the map Werkzeug cannot tell
    the allowed methods any more, so they are looked up here.
    """
    path = t.cast(Rule, request.url_rule).rule
    rules = [rule for rule in current_app.url_map.iter_rules() if rule.rule == path]
    allowed = {"OPTIONS"}.union(*(rule.methods or () for rule in rules))
    if request.method != "OPTIONS":
        raise MethodNotAllowed(allowed)
    response = _nothing(200)
    response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def no_such_path(**_: str) -> t.Any:
    """Any other path below a prefix of our own."""
    raise NotFound
