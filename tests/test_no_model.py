"""A host without a model: everything works but turns, and these say what is missing."""

from __future__ import annotations

import collections.abc as cabc
import logging
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from click.testing import CliRunner
from click.testing import Result
from flask import Flask
from flask.cli import FlaskGroup

import agentao_web
from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.cli import main
from agentao_web.doctor.proxy import Site
from agentao_web.doctor.proxy import examine
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests.test_csrf import served

KEY = "the-key-of-the-tests-without-a-model"
ASK = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
Make = cabc.Callable[..., Flask]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "LLM_", "AGENTAO_")):
            monkeypatch.delenv(name)


@pytest.fixture
def make(tmp_path: Path) -> cabc.Iterator[Make]:
    """A host with a login of its own, or with our tokens."""
    made: list[Flask] = []

    def build(*, own_login: bool = True, agents: t.Any = None, **config: t.Any) -> Flask:
        app = Flask("shop")
        app.config.update(AGENTAO_ROOT=tmp_path, **config)
        who = (lambda request: Principal("shop", "ann")) if own_login else None
        AgentaoWeb(authenticate=who, agents=agents).init_app(app, url_prefix="/agent")
        made.append(app)
        return app

    yield build
    for app in made:
        shutdown(app, grace=2)


def flask(app: Flask, *args: str) -> Result:
    """The `flask` command with that application."""
    return CliRunner().invoke(FlaskGroup(create_app=lambda: app), args)


def test_only_turns_need_a_model(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    client = make().test_client()
    for path in ("healthz", "openapi.json", "", "page/config.json", "sessions"):
        assert client.get(f"/agent/{path}").status_code == 200, path
    assert client.get("/agent/session/s").status_code == 404
    with caplog.at_level(logging.WARNING, "agentao_web"):
        for _ in range(2):
            answer = client.post("/agent/chat/s", json={"message": "hi"}, headers=ASK)
            assert answer.status_code == 503
            assert answer.json["code"] == "no_model"
            assert answer.json["details"] == {}
            assert "Retry-After" not in answer.headers, "it does not pass by itself"
    assert client.get("/agent/session/s").status_code == 404, "nothing was begun"
    assert client.get("/agent/sessions").json["sessions"] == []
    said = [r.getMessage() for r in caplog.records if "OPENAI_API_KEY" in r.getMessage()]
    assert len(said) <= 1, "a line for each worker, not for each request"
    assert "OPENAI" not in answer.text, "what is missing is the operator's business"


def test_the_log_says_once_what_to_set(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    app = make()
    with caplog.at_level(logging.WARNING, "agentao_web"):
        for _ in range(3):
            app.test_client().post("/agent/chat/s", json={"message": "hi"}, headers=ASK)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "agentao_web"]
    for word in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "AGENTAO_DEMO=1"):
        assert word in line


def test_streams_are_refused_before_they_begin(make: Make) -> None:
    headers = {"Accept": "text/event-stream", "Sec-Fetch-Site": "same-origin"}
    answer = make().test_client().post("/agent/chat/s", json={"message": "hi"}, headers=headers)
    assert (answer.status_code, answer.json["code"]) == (503, "no_model")


def test_readiness_says_so(make: Make) -> None:
    answer = make().test_client().get("/agent/readyz")
    assert answer.status_code == 503
    assert (answer.json["ok"], answer.json["code"]) == (False, "no_model")


def test_a_host_with_agents_of_its_own_needs_none(make: Make) -> None:
    client = make(agents=scripted(say("hello"))).test_client()
    answer = client.post("/agent/chat/s", json={"message": "hi"}, headers=ASK)
    assert answer.json["reply"] == "hello"
    assert client.get("/agent/readyz").json == {"ok": True}


def test_what_was_accepted_before_is_joined(make: Make) -> None:
    """The model may go away between a request and its repetition."""
    again = {**ASK, "Idempotency-Key": "once"}
    first = make(agents=scripted(say("hello"))).test_client()
    before = first.post("/agent/chat/s", json={"message": "hi"}, headers=again)
    assert before.json["reply"] == "hello"
    after = make().test_client().post("/agent/chat/s", json={"message": "hi"}, headers=again)
    assert (after.status_code, after.json["turn_id"]) == (200, before.json["turn_id"])


def test_a_model_that_is_half_named_says_which_half(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("LLM_MAX_TOKENS", "many")
    with caplog.at_level(logging.WARNING, "agentao_web"):
        answer = make().test_client().get("/agent/readyz")
    assert answer.json["code"] == "no_model"
    assert "sk-secret" not in caplog.text + answer.text


@pytest.mark.parametrize("command", [["routes"], ["agentao", "--help"], ["agentao", "db", "check"]])
def test_the_hosts_commands_work(make: Make, command: list[str]) -> None:
    done = flask(make(), *command)
    assert done.exit_code == 0, done.output


def test_the_ready_application_is_made_without_one(tmp_path: Path) -> None:
    environ = {"AGENTAO_ROOT": str(tmp_path), "AGENTAO_SECRET_KEYS": KEY, "AGENTAO_LOG": "off"}
    app = agentao_web.create_app(environ)
    token = Tokens([KEY]).issue(Principal("acme"), ttl=60)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        answer = app.test_client().post("/chat/s", json={"message": "hi"}, headers=headers)
        assert (answer.status_code, answer.json["code"]) == (503, "no_model")
    finally:
        shutdown(app, grace=2)


def test_serve_says_it_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from agentao_web.cli import main; main()", "serve"],
        env={**os.environ, "AGENTAO_ROOT": str(tmp_path), "AGENTAO_SECRET_KEYS": KEY},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "OPENAI_API_KEY" in line and "AGENTAO_DEMO=1" in line


def test_the_doctor_says_it_in_one_line(tmp_path: Path) -> None:
    environ = {"AGENTAO_ROOT": str(tmp_path), "AGENTAO_SECRET_KEYS": KEY}
    done = CliRunner().invoke(main, ["doctor"], env=environ)
    (line,) = [line for line in done.output.splitlines() if "no model" in line]
    assert done.exit_code == 1 and "OPENAI_API_KEY" in line


def test_the_doctor_of_another_machine_says_it_too(make: Make) -> None:
    with served(make()) as url:
        site = Site(f"{url}/agent", {}, max_body=2**20, patience=5)
        found = next(one for one in examine(site) if one.level == "wrong")
    assert "No model is set up" in found.message and "OPENAI_API_KEY" in found.cure


def test_the_hosts_doctor_says_it_too(make: Make) -> None:
    done = flask(make(), "agentao", "doctor")
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if "no model" in line]
    assert "OPENAI_API_KEY" in line
    own = flask(make(agents=scripted(say("hello"))), "agentao", "doctor")
    assert "builds its own agents" in own.output


# -- the demo ----------------------------------------------------------------------------------


def test_the_environment_turns_the_demo_model_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTAO_DEMO", "1")
    client = make().test_client()
    answer = client.post("/agent/chat/s", json={"message": "say it works"}, headers=ASK)
    assert (answer.status_code, answer.json["reply"]) == (200, "it works")
    assert client.get("/agent/readyz").json == {"ok": True}


def test_the_hosts_own_word_on_the_demo_wins(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTAO_DEMO", "1")
    client = make(AGENTAO_DEMO=False).test_client()
    answer = client.post("/agent/chat/s", json={"message": "say it works"}, headers=ASK)
    assert answer.json["code"] == "no_model"


def test_the_demos_token_is_none_where_the_host_has_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTAO_DEMO", "1")
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path)
    AgentaoWeb(authenticate=lambda request: None).init_app(app, url_prefix="/agent")
    try:
        headers = {"Authorization": "Bearer dev"}
        client = app.test_client()
        assert client.get("/agent/sessions", headers=headers).status_code == 401
        answer = client.post("/agent/chat/s", json={"message": "hi"}, headers=headers)
        assert answer.status_code == 401
    finally:
        shutdown(app, grace=2)


def test_other_settings_stay_the_hosts_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a model is named in the environment; limits and doors are the application's config."""
    monkeypatch.setenv("AGENTAO_DEMO", "1")
    monkeypatch.setenv("AGENTAO_POLICY", "trusted")
    monkeypatch.setenv("AGENTAO_SECRET_KEYS", KEY)
    settings = make().extensions["agentao_web"].settings
    assert settings.demo and settings.policy == "ask" and settings.secret_keys == ()
