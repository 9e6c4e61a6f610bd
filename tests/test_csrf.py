"""A host that protects its forms with Flask-WTF: our routes have a rule of their own."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import logging
import re
import threading
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask import abort
from flask import redirect
from flask import request
from flask import session
from flask.testing import FlaskClient
from flask_wtf.csrf import CSRFProtect
from flask_wtf.csrf import generate_csrf
from werkzeug.serving import make_server

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.doctor.proxy import Site
from agentao_web.doctor.proxy import examine
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.wire.requests import MAX_WAIT

BODY = {"message": "hi"}
OWN_PAGE = {"Accept": "application/json", "Prefer": f"wait={MAX_WAIT}"}
Make = cabc.Callable[..., Flask]


def csrf_first(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    CSRFProtect(app)
    web.init_app(app, url_prefix=prefix)


def csrf_last(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    web.init_app(app, url_prefix=prefix)
    CSRFProtect(app)


def csrf_by_init_app(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    csrf = CSRFProtect()
    web.init_app(app, url_prefix=prefix)
    csrf.init_app(app)


def csrf_of_a_kind(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    class Stricter(CSRFProtect):  # type: ignore[misc]
        pass

    csrf = Stricter()
    csrf.init_app(app)
    web.init_app(app, url_prefix=prefix)


ORDERS = (csrf_first, csrf_last, csrf_by_init_app, csrf_of_a_kind)


@pytest.fixture
def make(tmp_path: Path) -> cabc.Iterator[Make]:
    """A shop with a login by cookie, a form of its own and an agent."""
    made: list[Flask] = []

    def build(
        put_together: cabc.Callable[[Flask, AgentaoWeb, str], None] = csrf_first,
        prefix: str = "/agent",
    ) -> Flask:
        app = Flask("shop")
        app.secret_key = "the-csrf-tests-own-key"
        app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_PAGE=False)

        def who(request: t.Any) -> Principal | None:
            user = session.get("user") or request.headers.get("X-User")
            return Principal("shop", user) if user else None

        @app.get("/form")
        def form() -> str:
            return str(generate_csrf())

        @app.post("/login")
        def login() -> str:
            session["user"] = "ann"
            return "in"

        put_together(app, AgentaoWeb(authenticate=who, agents=scripted(say("hello"))), prefix)
        made.append(app)
        return app

    yield build
    for app in made:
        shutdown(app, grace=2)


def log_in(app: Flask, base: str = "http://localhost") -> FlaskClient:
    client = app.test_client()
    token = client.get("/form", base_url=base).text
    data = {"csrf_token": token}
    answer = client.post("/login", data=data, base_url=base, headers={"Referer": f"{base}/form"})
    assert answer.text == "in"
    return client


@pytest.mark.parametrize("prefix", ["/agent", ""])
@pytest.mark.parametrize("put_together", ORDERS)
def test_it_works_with_csrf_protection_in_any_order(
    make: Make, put_together: t.Any, prefix: str
) -> None:
    client = log_in(make(put_together, prefix))
    for own in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://localhost"}):
        headers = {**OWN_PAGE, **own}
        answer = client.post(f"{prefix}/chat/s", json=BODY, headers=headers)
        assert (answer.status_code, answer.json["reply"]) == (200, "hello")
        title = {"title": "mine"}
        assert client.patch(f"{prefix}/session/s", json=title, headers=headers).status_code == 200
        assert client.post(f"{prefix}/session/s/ticket", headers=headers).status_code == 200
        assert client.post(f"{prefix}/chat/s/cancel", headers=headers).status_code == 200
        assert client.put(f"{prefix}/chat/s", headers=headers).status_code == 405
        assert client.delete(f"{prefix}/session/s", headers=headers).status_code == 200


@pytest.mark.parametrize("put_together", ORDERS)
def test_it_works_behind_tls(make: Make, put_together: t.Any) -> None:
    """Flask-WTF looks at the Referer there, too."""
    base = "https://shop.example"
    client = log_in(make(put_together), base)
    headers = {**OWN_PAGE, "Sec-Fetch-Site": "same-origin"}
    answer = client.post("/agent/chat/s", json=BODY, base_url=base, headers=headers)
    assert (answer.status_code, answer.json["reply"]) == (200, "hello")


@pytest.mark.parametrize("put_together", ORDERS)
def test_other_sites_are_refused_by_our_own_rule(make: Make, put_together: t.Any) -> None:
    client = log_in(make(put_together))
    foreign: list[dict[str, str]] = [
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ]
    for headers in foreign:
        for method, path in (
            ("POST", "/agent/chat/s"),
            ("POST", "/agent/chat/s/cancel"),
            ("POST", "/agent/chat/s/answer"),
            ("PATCH", "/agent/session/s"),
            ("DELETE", "/agent/session/s"),
        ):
            # A form of another site's, and what a script there can send without being asked.
            for body in ({"data": {"message": "hi"}}, {"json": BODY}):
                answer = client.open(path, method=method, headers=headers, **body)
                assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert client.get("/agent/sessions").json["sessions"] == []


@pytest.mark.parametrize("put_together", ORDERS)
def test_the_hosts_own_forms_stay_protected(make: Make, put_together: t.Any) -> None:
    app = make(put_together)
    client = log_in(app)
    headers = {**OWN_PAGE, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/agent/chat/s", json=BODY, headers=headers).status_code == 200
    assert client.post("/login", headers=headers).status_code == 400
    assert app.test_client().post("/login").status_code == 400


def test_a_host_without_it_gets_none(make: Make) -> None:
    app = make(lambda app, web, prefix: web.init_app(app, url_prefix=prefix))
    app.extensions["csrf"] = object()  # Somebody else's, of the same name.
    client = app.test_client()
    client.post("/login")
    headers = {**OWN_PAGE, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/agent/chat/s", json=BODY, headers=headers).json["reply"] == "hello"


# -- what a host refuses itself ----------------------------------------------------------------


def by_hand(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    """A host that calls the protection itself asks it of every route."""
    app.config["WTF_CSRF_CHECK_DEFAULT"] = False
    csrf = CSRFProtect(app)
    app.before_request(csrf.protect)
    web.init_app(app, url_prefix=prefix)


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "invalid_request"), (401, "unauthorized"), (403, "forbidden"), (429, "invalid_request")],
)
def test_what_the_host_refuses_is_called_that(
    make: Make, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    def put_together(app: Flask, web: AgentaoWeb, prefix: str) -> None:
        web.init_app(app, url_prefix=prefix)

        @app.before_request
        def refuse() -> None:
            abort(status, "Not at this time of day.")

    client = make(put_together).test_client()
    with caplog.at_level(logging.WARNING, "agentao_web"):
        answer = client.post("/agent/chat/s", json=BODY)
    assert (answer.status_code, answer.json["code"]) == (status, code)
    assert answer.json["details"] == {"refused_by": "application"}
    assert "application" in answer.json["message"]
    assert "Not at this time of day." in answer.json["message"]
    (line,) = [r.getMessage() for r in caplog.records if r.name == "agentao_web"]
    assert re.search(rf"before_request.* {status} .*POST /agent/chat/<sid>", line)


def test_a_protection_that_is_called_by_hand_says_what_is_missing(make: Make) -> None:
    app = make(by_hand)
    answer = app.test_client().post("/agent/chat/s", json=BODY)
    assert answer.status_code == 400
    assert "The CSRF token is missing." in answer.json["message"]
    assert answer.json["details"] == {"refused_by": "application"}


def test_what_we_refuse_ourselves_is_not_the_hosts(make: Make) -> None:
    answer = make().test_client().get("/agent/nowhere")
    assert answer.json == {
        "code": "not_found",
        "message": "There is nothing here by that name.",
        "details": {},
    }


# -- the doctor --------------------------------------------------------------------------------


@contextlib.contextmanager
def served(app: Flask) -> cabc.Iterator[str]:
    """*app* on a port of its own."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def abort_posts(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    web.init_app(app, url_prefix=prefix)

    @app.before_request
    def refuse() -> None:
        if request.method == "POST" and "X-User" in request.headers:
            abort(400, "No token in this form.")


def redirect_posts(app: Flask, web: AgentaoWeb, prefix: str) -> None:
    web.init_app(app, url_prefix=prefix)

    @app.before_request
    def to_login() -> t.Any:
        return redirect("/login") if request.method == "POST" else None


@pytest.mark.parametrize(
    ("put_together", "user", "message", "cure"),
    [
        (by_hand, "ann", "The CSRF token is missing.", "docs/embed.md"),
        (abort_posts, "ann", "No token in this form.", "docs/embed.md"),
        (redirect_posts, "ann", "the application's own code", "before_request"),
    ],
)
def test_the_doctor_says_who_refuses(
    make: Make, put_together: t.Any, user: str, message: str, cure: str
) -> None:
    app = make(put_together)
    with served(app) as url:
        headers = {"X-User": user, "Sec-Fetch-Site": "same-origin"}
        site = Site(f"{url}/agent", headers, max_body=2**20, patience=5)
        found = next(f for f in examine(site) if f.check == "stream")
    assert found.level == "wrong"
    assert message in found.message and cure in found.cure
    assert "nginx" not in found.message + found.cure
