"""What a model, or who speaks through it, can do to the host by way of its tools."""

from __future__ import annotations

import collections.abc as cabc
import json
import re
import typing as t
from pathlib import Path

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from tests.model_server import ModelServer

WAIT = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
SECRET = "postgresql://shop:hunter2@db.internal/shop"


def whoami(who: Principal) -> str:
    """Say who is asking."""
    return f"{who.tenant}/{who.user}"


def fail(how: str) -> str:
    """Fail."""
    if how == "exit":
        raise SystemExit(SECRET)
    if how == "interrupt":
        raise KeyboardInterrupt(SECRET)
    raise LookupError(SECRET) from ValueError(SECRET)


def pick(number: int) -> str:
    """Pick one."""
    return str(number)


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def app(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[Flask]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-operator")
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted")
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_POLICY="trusted")
    AgentaoWeb(
        authenticate=lambda request: Principal("acme", "ann"),
        tools=lambda principal: [whoami, fail, pick],
    ).init_app(app)
    yield app
    shutdown(app, grace=2)


def use(app: Flask, name: str, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
    message = f"call {name} {json.dumps(arguments)}\nsay done"
    answer = app.test_client().post("/chat/s", json={"message": message}, headers=WAIT)
    assert answer.json is not None
    return t.cast(dict[str, t.Any], answer.json)


def everything(app: Flask, model: ModelServer) -> str:
    """All that left the host's own code: to the client, and to the model."""
    client = app.test_client()
    pages = ["/chat/s/events?wait=0", "/session/s", "/session/s/messages"]
    shown = [client.get(page, headers=WAIT).get_data(as_text=True) for page in pages]
    return json.dumps([shown, [request.body for request in model.requests]])


@pytest.mark.parametrize("how", ["raise", "exit", "interrupt"])
def test_nothing_of_an_exception_leaves(
    app: Flask, model: ModelServer, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    body = use(app, "fail", {"how": how})
    assert (body["status"], body["reply"]) == ("completed", "done")
    seen = everything(app, model)
    for word in ("hunter2", "LookupError", "SystemExit", "Traceback", __file__, "site-packages"):
        assert word not in seen
    (error_id,) = set(re.findall(r"the tool failed \(error_id ([0-9a-f]{16})\)", seen))
    (record,) = [r for r in caplog.records if error_id in r.getMessage()]
    assert "hunter2" not in record.getMessage() and "hunter2" in caplog.text


@pytest.mark.parametrize(
    "forged",
    [
        {"who": {"tenant": "other", "user": "bob"}},
        {"who": "other/bob"},
        {"principal": {"tenant": "other"}},
        {"self": 1},
        {"_decided": 1},
    ],
)
def test_a_model_cannot_say_who_is_asking(
    app: Flask, model: ModelServer, forged: dict[str, t.Any]
) -> None:
    use(app, "whoami", forged)
    told = model.requests[-1].body["messages"][-1]["content"]
    assert "bad arguments" in told and "is not known" in told
    assert "acme" not in told and "HostTool" not in told
    use(app, "whoami", {})
    assert model.requests[-1].body["messages"][-1]["content"] == "acme/ann"


@pytest.mark.parametrize(
    "arguments",
    [
        {"number": "x" * 100_000},
        {"number": [[[]]] * 1000},
        {"number": {"__class__": "os"}},
        {"number": "\ud800"},
        {"\ud800": 1},
        {"number": None},
        {"number": 1, "\x00": 2},
    ],
)
def test_odd_arguments_are_told_in_short_and_the_session_lives(
    app: Flask, model: ModelServer, arguments: dict[str, t.Any]
) -> None:
    assert use(app, "pick", arguments)["reply"] == "done"
    told = model.requests[-1].body["messages"][-1]["content"]
    assert len(told) < 2000 and "Traceback" not in told and "pydantic" not in told
    assert use(app, "pick", {"number": 4})["reply"] == "done"
    assert model.requests[-1].body["messages"][-1]["content"] == "4"
