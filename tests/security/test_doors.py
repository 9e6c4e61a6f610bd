"""Folders nobody else enters, answers nobody keeps or guesses at, and names a demo answers to."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask import jsonify

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import create_app
from agentao_web import shutdown
from agentao_web.agents.workspaces import Workspaces
from agentao_web.core.folders import make_private
from agentao_web.core.names import SessionKey
from agentao_web.doctor import machine
from agentao_web.extension import pool_of
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.views import ROUTES
from tests import test_views as views
from tests.test_views import Make
from tests.test_views import assert_error

web = views.web

METRICS = "the-token-of-prometheus"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def at(root: Path, **config: t.Any) -> Flask:
    app = Flask("doors")
    app.config.update(AGENTAO_ROOT=root, AGENTAO_SECRET_KEYS="k" * 16, **config)
    AgentaoWeb(agents=scripted(say("hi"))).init_app(app)
    return app


@contextlib.contextmanager
def umask(mask: int) -> t.Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# Folders


@pytest.mark.parametrize("first", ["metrics", "database", "workspace"])
def test_root_is_made_for_the_server_alone_whoever_makes_it(tmp_path: Path, first: str) -> None:
    with umask(0):
        root = tmp_path / "a" / "b" / "root"
        if first == "workspace":
            Workspaces(root, "user").make(SessionKey("acme", "ann", "s"))
        else:
            token = METRICS if first == "metrics" else None
            app = at(root, AGENTAO_METRICS_TOKEN=token)
            if first == "metrics":
                headers = {"Authorization": f"Bearer {METRICS}"}
                assert app.test_client().get("/metrics", headers=headers).status_code == 200
            pool_of(app).store.tenants(1)
            shutdown(app, grace=1)
    for folder in (root, root.parent, root.parent.parent):
        assert mode(folder) == 0o700, folder
    for path in root.rglob("*"):
        assert not mode(path) & 0o077, path


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    make_private(there)
    make_private(there / "more" / "inside")
    assert [mode(p) for p in (there, there / "more", there / "more" / "inside")] == [
        0o755,
        0o700,
        0o700,
    ]
    (there / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_private(there / "file")


@pytest.mark.parametrize("wide", [0o755, 0o750, 0o701, 0o777])
def test_a_root_that_others_can_enter_is_named_in_the_log_and_by_the_doctor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wide: int
) -> None:
    root = tmp_path / "wide"
    root.mkdir()
    root.chmod(wide)
    app = at(root)
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"chmod 700 {root}" in line.getMessage()
    settings = app.extensions["agentao_web"].settings
    found = [*machine._disk(machine.Case(settings, machine.Server(1, 1, 1), {}))]
    assert [one for one in found if one.level == "hint" and one.cure == f"chmod 700 {root}"]
    root.chmod(0o700)
    caplog.clear()
    shutdown(app, grace=1)
    shutdown(at(root), grace=1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# Answers


def test_no_json_is_kept_or_taken_for_something_else(web: Make) -> None:
    w = web(say("hi"), prefix="/agent", metrics_token=METRICS)
    w.ask()
    seen = []
    for route in ROUTES:
        for path in (route.path.replace("<sid>", "s"), route.path.replace("<sid>", "~bad")):
            path = "/agent" + path.replace("<path:file>", "nothing")
            for headers in ({}, w.headers()):
                if route.method == "DELETE" and headers:
                    continue
                for method in (route.method, "TRACE"):
                    answer = w.client.open(path, method=method, headers=headers)
                    assert answer.headers["X-Content-Type-Options"] == "nosniff", path
                    if answer.is_json:
                        assert answer.headers["Cache-Control"] == "no-store", path
                        seen.append(answer.status_code)
    assert {200, 400, 401, 404, 405, 415} <= set(seen)
    for path in ("/agent/nowhere", "/agent/no%0Awhere", "/agent/page/a%0Ab", "/agent/%ff/%00"):
        answer = w.client.get(path)
        assert_error(answer, 404, "not_found")
        assert answer.headers["Cache-Control"] == "no-store"


def test_an_error_of_the_ready_application_is_one_too(tmp_path: Path) -> None:
    app = create_app({"AGENTAO_DEMO": "1", "AGENTAO_ROOT": str(tmp_path / "root")})
    for path, status in (("/nowhere", 404), ("/%0A", 404), ("/chat/s/../..", 404)):
        answer = app.test_client().get(path)
        assert answer.status_code == status
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert set(json.loads(answer.data)) == {"code", "message", "details"}
    shutdown(app, grace=1)


def test_the_hosts_own_answers_are_left_alone(tmp_path: Path) -> None:
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=tmp_path / "root", AGENTAO_SECRET_KEYS="k" * 16)
    AgentaoWeb(agents=scripted(say("hi"))).init_app(app, url_prefix="/agent")
    app.add_url_rule("/own", "own", lambda: jsonify(ok=True))
    client = app.test_client()
    for path in ("/own", "/nowhere", "/agents/x%0Ay"):
        answer = client.get(path)
        assert "X-Content-Type-Options" not in answer.headers
        assert "Cache-Control" not in answer.headers
    assert client.get("/nowhere").mimetype == "text/html"
    shutdown(app, grace=1)


# Names


OURS = ["localhost", "localhost:8000", "LOCALHOST.", "demo.localhost:80", "127.0.0.1", "[::1]:8000"]
OURS += ["127.9.9.9:1", "[::1]", "192.168.1.5:8000", "agentao:8000"]
THEIRS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
THEIRS += ["localhost@evil.example", "evil.localhost.example:80", "0x7f.evil.example"]


@pytest.mark.parametrize("name", OURS)
def test_the_demo_answers_to_its_machine(web: Make, name: str) -> None:
    w = web(demo=True)
    for path in ("/healthz", "/", "/page/config.json"):
        assert w.client.get(path, headers={"Host": name}).status_code == 200
    answer = w.client.get("/sessions", headers={"Host": name, "Authorization": "Bearer dev"})
    assert answer.status_code == 200


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("path", ["/sessions", "/", "/page/config.json", "/healthz", "/nowhere"])
def test_a_page_whose_name_was_turned_to_it_gets_nothing_of_the_demo(
    web: Make, name: str, path: str
) -> None:
    """DNS rebinding: for the browser all of this is the attacker's own site."""
    w = web(demo=True, prefix="/agent")
    headers = {"Host": name, "Authorization": "Bearer dev"}
    answer = w.client.get("/agent" + path, headers=headers)
    error = assert_error(answer, 403, "forbidden")
    assert "AGENTAO_DEMO_HOSTS" in error["message"]
    started = w.client.post("/agent/chat/s", headers=headers, json={"message": "hi"})
    assert_error(started, 403, "forbidden")
    assert w.agents.agents == []


def test_an_operator_may_name_more(web: Make) -> None:
    w = web(demo=True, demo_hosts="demo.example.com, other.example.com")
    for name, status in (
        ("demo.example.com", 200),
        ("Other.Example.com:8443", 200),
        ("evil.example.com", 403),
    ):
        assert w.client.get("/healthz", headers={"Host": name}).status_code == status


def test_outside_of_the_demo_every_name_is_the_hosts(web: Make, tmp_path: Path) -> None:
    assert web().client.get("/healthz", headers={"Host": "evil.example"}).status_code == 200
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=tmp_path / "own", AGENTAO_DEMO=True)
    own = AgentaoWeb(authenticate=lambda request: Principal("acme", "ann"))
    own.init_app(app)
    named = {"Host": "shop.example.com", "Sec-Fetch-Site": "same-origin"}
    assert app.test_client().get("/sessions", headers=named).status_code == 200
    shutdown(app, grace=1)
