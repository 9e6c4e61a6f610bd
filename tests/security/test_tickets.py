"""Tickets: what they open, what they do not, when they end, and that nobody writes one down."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import logging
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask import request
from itsdangerous import URLSafeTimedSerializer
from werkzeug.test import TestResponse

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import logs
from agentao_web import shutdown
from agentao_web.auth import TICKET_SECONDS
from agentao_web.auth import Revoked
from agentao_web.auth import Tickets
from agentao_web.auth import Tokens
from agentao_web.core.names import SessionKey
from agentao_web.extension import pool_of
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.views import ROUTES
from tests.live.harness import Server
from tests.live.harness import Stream

KEY = "the-ticket-tests-own-key"
JSON = {"Accept": "application/json"}
SSE = {"Accept": "text/event-stream"}
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
ANN = SessionKey("acme", "ann", "s")


class Site:
    """An application with ann's sessions ``s`` and ``other``, and bob's ``s``."""

    def __init__(self, folder: Path, prefix: str = "", **config: t.Any) -> None:
        self.prefix = prefix
        self.app = Flask("tickets")
        self.app.config.update(
            AGENTAO_ROOT=folder, AGENTAO_DATABASE_URL="memory:", AGENTAO_SECRET_KEYS=KEY
        )
        self.app.config.update(config)
        AgentaoWeb(agents=scripted(say("hi"))).init_app(self.app, url_prefix=prefix)
        self.seen: list[str] = []
        self.app.after_request(self._note)
        for user, sid in (("ann", "s"), ("ann", "other"), ("bob", "s")):
            headers = {**JSON, "Prefer": "wait=50"}
            started = self.call("POST", f"/chat/{sid}", user, headers, json={"message": "hello"})
            assert started.status_code == 200, started.text

    def _note(self, response: t.Any) -> t.Any:
        """What a host might write into a log of its own."""
        self.seen.append(repr(request.args))
        self.seen.append(f"{request.url} {request.full_path} {request.environ['RAW_URI']}")
        return response

    def token(self, user: str = "ann", ttl: float = 3600) -> str:
        return Tokens([KEY]).issue(Principal("acme", user), ttl=ttl)

    def call(
        self,
        method: str,
        path: str,
        user: str | None = None,
        headers: cabc.Mapping[str, str] = JSON,
        **given: t.Any,
    ) -> TestResponse:
        """A request with a token of *user*'s, or without any."""
        own = {"Authorization": f"Bearer {self.token(user)}"} if user else {}
        path = self.prefix + path
        client = self.app.test_client()
        return client.open(path, method=method, headers={**headers, **own}, **given)

    def ticket(self, user: str = "ann", sid: str = "s") -> str:
        answer = self.call("POST", f"/session/{sid}/ticket", user)
        assert answer.status_code == 200, answer.text
        assert answer.json is not None
        return str(answer.json["ticket"])

    def read(self, ticket: str, sid: str = "s", **given: t.Any) -> TestResponse:
        return self.call("GET", f"/chat/{sid}/events?wait=0&ticket={ticket}", **given)


@pytest.fixture
def site(tmp_path: Path) -> cabc.Iterator[Site]:
    made = Site(tmp_path)
    yield made
    shutdown(made.app, grace=2)


class Clock:
    """Time by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# -- what one opens ----------------------------------------------------------------------------


def test_a_ticket_reads_the_events_of_its_session(site: Site) -> None:
    before = time.time()
    answer = site.call("POST", "/session/s/ticket", "ann")
    assert answer.json is not None and set(answer.json) == {"ticket", "expires_at"}
    assert before + TICKET_SECONDS - 1 <= answer.json["expires_at"] <= time.time() + TICKET_SECONDS
    assert answer.headers["Cache-Control"] == "no-store"
    ticket = answer.json["ticket"]
    page = site.read(ticket)
    assert page.json is not None and page.json["events"][-1]["reply"] == "hi"
    stream = site.read(ticket, headers=SSE)
    assert stream.mimetype == "text/event-stream" and '"type":"done"' in stream.text


def test_it_opens_no_other_session_and_no_other_users(site: Site) -> None:
    assert site.read(site.ticket(), sid="other").status_code == 401
    bobs = site.read(site.ticket("bob"))
    ann = site.read(site.ticket())
    assert bobs.json is not None and ann.json is not None
    assert {e["turn_id"] for e in bobs.json["events"]}.isdisjoint(
        e["turn_id"] for e in ann.json["events"]
    )


def test_there_is_none_for_a_session_that_is_unknown_to_the_caller(site: Site) -> None:
    for sid in ("other", "nothing-by-that-name"):
        refused = site.call("POST", f"/session/{sid}/ticket", "bob")
        assert refused.status_code == 404
        assert refused.json is not None and refused.json["code"] == "not_found"
    assert site.call("POST", "/session/s/ticket").status_code == 401


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES if "<sid>" in route.path}))
def test_every_other_route_and_method_ignores_it(site: Site, path: str) -> None:
    ticket = site.ticket()
    address = path.replace("<sid>", "s")
    methods = {route.method for route in ROUTES if route.path == path} | {"HEAD"}
    for method in methods:
        if (method, path) == ("GET", "/chat/<sid>/events"):
            continue
        answer = site.call(method, f"{address}?ticket={ticket}", json={"message": "hi"})
        assert answer.status_code in (401, 405), (method, path)
    assert site.call("GET", f"/sessions?ticket={ticket}").status_code == 401
    assert site.call("GET", "/session/s", "ann").status_code == 200, "nothing was done"


def test_it_is_no_token_and_a_token_is_no_ticket(site: Site) -> None:
    for scheme in ("Bearer", "Ticket"):
        headers = {**JSON, "Authorization": f"{scheme} {site.ticket()}"}
        assert site.call("GET", "/chat/s/events?wait=0", headers=headers).status_code == 401
    assert site.read(site.token()).status_code == 401


def test_only_one_that_we_signed_opens(site: Site) -> None:
    ticket = site.ticket()
    forged = Tickets(["another-key-altogether"]).issue(ANN)[0]
    wrong = ["", "dev", ticket[:-1], ticket[1:], f"{ticket}x", "a.b.c", "%ED%A0%80", "%00", forged]
    for text in wrong:
        assert site.read(text).status_code == 401, text
    twice = site.call("GET", f"/chat/s/events?wait=0&ticket={ticket}&ticket={ticket}")
    assert twice.status_code == 401


def test_what_else_is_signed_with_our_key_is_no_ticket() -> None:
    tickets = Tickets([KEY])
    for value in ([1, 2], ["acme", "ann", "s", 0, "x"], {"a": 1}, None, ["", "", "s", 0, 9e9]):
        odd = tickets._serializer.dumps(value)
        assert tickets.read(str(odd), "s") is None, value
    other = URLSafeTimedSerializer([KEY], salt="somebody-elses")
    assert tickets.read(str(other.dumps([*ANN, 0, 9e9])), "s") is None


# -- its end -----------------------------------------------------------------------------------


def test_it_ends_after_its_minutes() -> None:
    clock = Clock()
    tickets = Tickets([KEY], clock=clock)
    ticket, end = tickets.issue(ANN)
    assert end == clock.now + TICKET_SECONDS
    clock.now = end - 1
    assert tickets.read(ticket, "s") == Principal("acme", "ann")
    clock.now = end
    assert tickets.read(ticket, "s") is None


def test_it_ends_with_the_token_it_was_got_with(site: Site) -> None:
    token = site.token(ttl=60)
    headers = {**JSON, "Authorization": f"Bearer {token}"}
    answer = site.call("POST", "/session/s/ticket", headers=headers)
    assert answer.json is not None
    found = Tokens([KEY]).look(token)
    assert found is not None and answer.json["expires_at"] == found[2]


def test_an_older_key_is_accepted_and_the_newest_one_signs() -> None:
    old, new = Tickets([KEY]), Tickets(["a-newer-key-than-that", KEY])
    assert new.read(old.issue(ANN)[0], "s") == Principal("acme", "ann")
    assert old.read(new.issue(ANN)[0], "s") is None


def test_revoked_with_the_tokens_of_its_user(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        anns, bobs = site.ticket("ann"), site.ticket("bob")
        pool_of(site.app).store.revoke("acme", "ann", time.time() + 2)
        _forget(site.app)
        assert site.read(anns).status_code == 401
        assert site.read(bobs).status_code == 200
        pool_of(site.app).store.revoke("acme", None, time.time() + 2)
        _forget(site.app)
        assert site.read(bobs).status_code == 401
    finally:
        shutdown(site.app, grace=2)


def _forget(app: Flask) -> None:
    """Have what was revoked asked for again, instead of waiting for that."""
    app.extensions["agentao_web"].tickets._revoked._asked = float("-inf")


def test_a_revoked_token_leaves_no_ticket_behind() -> None:
    """A worker may take a revoked token for 2 seconds more: the ticket it gives then is void."""
    clock, rows = Clock(), list[tuple[str, str | None, float]]()
    tokens = Tokens([KEY])
    token = tokens.issue(Principal("acme", "ann"), ttl=3600)
    issued = tokens.open(token)
    assert issued is not None
    clock.now = issued[1] + 10
    revoked = Revoked(lambda: rows, ttl=0)
    tickets = Tickets([KEY], tokens=tokens, revoked=revoked, clock=clock)
    ticket, _ = tickets.issue(ANN, token)
    assert tickets.read(ticket, "s") is not None
    rows.append(("acme", "ann", issued[1] + 5))
    assert tickets.read(ticket, "s") is None
    # Of a host's own login nothing is known but the moment.
    assert tickets.read(tickets.issue(ANN)[0], "s") is not None


# -- a host's own login ------------------------------------------------------------------------


def host(folder: Path, **config: t.Any) -> Flask:
    """An application whose login is a cookie."""
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=folder, AGENTAO_DATABASE_URL="memory:", **config)

    def who_is_it(request: t.Any) -> Principal | None:
        user = request.cookies.get("user")
        return Principal("shop", user) if user else None

    AgentaoWeb(authenticate=who_is_it, agents=scripted(say("hi"))).init_app(app, url_prefix="/a")
    return app


@pytest.mark.parametrize("secret", [None, "the-hosts-flask-secret", b"the-hosts-flask-secret"])
def test_it_carries_who_logged_in_by_cookie(tmp_path: Path, secret: t.Any) -> None:
    app = host(tmp_path, SECRET_KEY=secret)
    try:
        client = app.test_client()
        client.set_cookie("user", "ann")
        headers = {**JSON, **OWN_PAGE, "Prefer": "wait=50"}
        assert client.post("/a/chat/s", json={"message": "x"}, headers=headers).status_code == 200
        assert client.post("/a/session/s/ticket").status_code == 403, "another site's page"
        other = {"Sec-Fetch-Site": "cross-site"}
        assert client.post("/a/session/s/ticket", headers=other).status_code == 403
        got = client.post("/a/session/s/ticket", headers=OWN_PAGE)
        assert got.json is not None
        address = f"/a/chat/s/events?wait=0&ticket={got.json['ticket']}"
        without_cookie = app.test_client()
        assert without_cookie.get(address).status_code == 200
        assert without_cookie.get("/a/chat/s/events?wait=0").status_code == 401
    finally:
        shutdown(app, grace=2)


@contextlib.contextmanager
def tickets_of(*apps: Flask) -> cabc.Iterator[list[Tickets]]:
    """What each application issues and reads tickets with."""
    try:
        yield [app.extensions["agentao_web"].tickets for app in apps]
    finally:
        for app in apps:
            shutdown(app, grace=2)


def test_two_hosts_without_keys_do_not_take_each_others(tmp_path: Path) -> None:
    with tickets_of(*(host(tmp_path / name) for name in ("one", "two"))) as (one, two):
        assert one.read(one.issue(ANN)[0], "s") is not None
        assert two.read(one.issue(ANN)[0], "s") is None


def test_the_hosts_older_key_is_accepted(tmp_path: Path) -> None:
    before = host(tmp_path / "old", SECRET_KEY="the-old-flask-key")
    after = host(
        tmp_path / "new",
        SECRET_KEY="the-new-flask-key",
        SECRET_KEY_FALLBACKS=["the-old-flask-key"],
    )
    with tickets_of(before, after) as (old, new):
        assert new.read(old.issue(ANN)[0], "s") is not None
        assert old.read(new.issue(ANN)[0], "s") is None


# -- nobody writes one down --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/agent"])
def test_no_code_of_the_host_sees_one(tmp_path: Path, prefix: str) -> None:
    site = Site(tmp_path, prefix)
    try:
        ticket = site.ticket()
        site.seen.clear()
        for query in (f"ticket={ticket}&wait=0", f"wait=0&%74icke%74={ticket}&after=0"):
            raw = f"{prefix}/chat/s/events?{query}"
            answer = site.call("GET", raw[len(prefix) :], environ_overrides={"RAW_URI": raw})
            assert answer.status_code == 200
        assert site.call("GET", f"/session/s?ticket={ticket}").status_code == 401
        assert len(site.seen) == 6 and ticket not in "".join(site.seen)
        assert site.seen[1].endswith("/events?wait=0"), "the rest is as it was"
    finally:
        shutdown(site.app, grace=2)


@pytest.mark.parametrize("path", ["/chat/s/events", "//chat/s/events", "/chat/s/events/"])
def test_what_wrapped_the_app_before_sees_none(tmp_path: Path, path: str) -> None:
    seen: list[str] = []

    def instrumented(inner: t.Any) -> t.Any:
        def call(environ: dict[str, t.Any], start_response: t.Any) -> t.Any:
            seen.append(f"{environ['RAW_URI']} {environ['QUERY_STRING']}")
            return inner(environ, start_response)

        return call

    app = Flask("instrumented")
    app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_DATABASE_URL="memory:", AGENTAO_DEMO=True)
    app.wsgi_app = instrumented(app.wsgi_app)  # type: ignore[method-assign]
    AgentaoWeb().init_app(app)
    try:
        uri = f"{path}?ticket=secret&wait=0"
        base = {"RAW_URI": uri, "REQUEST_URI": uri, "PATH_INFO": path}
        answer = app.test_client().get(uri, environ_overrides=base)
        assert answer.status_code in (308, 401, 404)
        assert "secret" not in answer.headers.get("Location", "")
        assert seen == [f"{path}?wait=0 wait=0"]
    finally:
        shutdown(app, grace=2)


@pytest.mark.parametrize("path", ["/a//b/chat/s/events", "/a/b//chat/s/events"])
def test_no_redirect_to_fewer_slashes_says_it(tmp_path: Path, path: str) -> None:
    site = Site(tmp_path, "/a/b")
    try:
        ticket = site.ticket()
        site.seen.clear()
        uri = f"{path}?wait=0&ticket={ticket}"
        answer = site.app.test_client().get(uri, environ_overrides={"RAW_URI": uri})
        assert answer.status_code == 308 and answer.headers["Location"].endswith("/events?wait=0")
        assert ticket not in "".join(site.seen)
    finally:
        shutdown(site.app, grace=2)


def test_below_a_prefix_of_any_letters(tmp_path: Path) -> None:
    site = Site(tmp_path, "/ä b.+")
    try:
        ticket = site.ticket()
        site.seen.clear()
        assert site.read(ticket).status_code == 200
        assert ticket not in "".join(site.seen)
    finally:
        shutdown(site.app, grace=2)


def test_what_a_host_calls_a_ticket_stays_its_own(tmp_path: Path) -> None:
    app = host(tmp_path)
    app.add_url_rule("/concert", view_func=lambda: request.args["ticket"])
    try:
        assert app.test_client().get("/concert?ticket=row-7").text == "row-7"
    finally:
        shutdown(app, grace=2)


def test_no_error_says_it(site: Site) -> None:
    ticket = site.ticket()
    for query in (f"ticket={ticket}&wait=x", f"ticket={ticket}&after=-1", f"ticket={ticket}x"):
        answer = site.call("GET", f"/chat/s/events?{query}")
        assert answer.status_code in (400, 401) and ticket not in answer.text


def test_lines_of_gunicorn_lose_the_query() -> None:
    told = logging.LogRecord(
        "gunicorn.error",
        logging.ERROR,
        "",
        0,
        "Error handling request %s %s",
        ("GET", "/a/chat/s/events?x=1&%74icket=secret%20x"),
        None,
    )
    assert logs.NoQueries().filter(told)
    assert told.getMessage() == "Error handling request GET /a/chat/s/events"
    other = logging.LogRecord("gunicorn.error", logging.INFO, "", 0, "%d%%", (50,), None)
    assert logs.NoQueries().filter(other) and other.getMessage() == "50%"


@pytest.mark.live
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_whole_server_writes_none_down(tmp_path: Path, form: str) -> None:
    """With Gunicorn's access log on as it comes, our own of requests, and two workers."""
    access = tmp_path / "access.log"
    given = {"AGENTAO_LOG": form, "AGENTAO_LOG_REQUESTS": "1", "AGENTAO_DEMO": "1"}
    args = ("--access-logfile", str(access), "--workers", "2")
    with Server(tmp_path, *args, **given) as server:
        server.ask("s", "say hi")
        # Signed by one worker, read by any.
        for _ in range(8):
            ticket = server.client.post("/session/s/ticket").json()["ticket"]
            for query in (f"ticket={ticket}", f"after=0&%74icket={ticket}", f"ticket={ticket}x"):
                # Nothing but the ticket says who is asking.
                done = subprocess.run(
                    ["curl", "-sS", "--noproxy", "*", "--max-time", "30", "-w", "%{http_code}"]
                    + ["-H", "Accept: text/event-stream", f"{server.url}/chat/s/events?{query}"],
                    capture_output=True,
                    text=True,
                )
                assert done.stdout[-3:] == ("401" if query.endswith("x") else "200"), done
                assert ticket not in done.stdout
            server.client.get("/chat/s/events", params={"ticket": ticket, "wait": 0})
            # Gunicorn's own refusal, before any code of ours.
            _raw(server, f"GET /chat/s/events?ticket={ticket} HTTP/9.9\r\n\r\n")
            for file in (access, server.log):
                assert ticket not in file.read_text(), file
    lines = access.read_text()
    assert "GET /chat/s/events HTTP" in lines and "POST /session/s/ticket" in lines
    for file in (access, server.log):
        assert "ticket=" not in file.read_text(), file


def _raw(server: Server, text: str) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(text.encode())
        while sock.recv(4096):
            pass


@pytest.mark.live
def test_a_reader_with_a_ticket_follows_a_turn(tmp_path: Path) -> None:
    with Server(tmp_path, AGENTAO_DEMO="1") as server:
        server.ask("s", "say hi")
        ticket = server.client.post("/session/s/ticket").json()["ticket"]
        address = f"/chat/s/events?follow=1&ticket={ticket}"
        headers = {"Authorization": "", "Accept": "text/event-stream"}
        with server.client.stream("GET", address, headers=headers) as response:
            assert response.status_code == 200
            stream = Stream(response)
            assert stream.until("done")["reply"] == "hi"
            server.post("s", "say again")
            assert stream.until("done")["reply"] == "again"
        assert json.loads(server.client.get("/session/s").text)["turns"] == 2
