"""What is seen from outside: who may look, and what is never shown."""

from __future__ import annotations

import collections.abc as cabc
import logging
import typing as t
from pathlib import Path

import pytest

from agentao_web import Principal
from agentao_web.auth import Tokens
from tests.model_server import ModelServer
from tests.security.house import KEY
from tests.security.house import House
from tests.security.house import model_here

METRICS_TOKEN = "the-scrapers-own-token"
SECRET = "the-plans-for-the-island"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[ModelServer]:
    with model_here(monkeypatch) as server:
        yield server


@pytest.fixture
def house(tmp_path: Path, model: ModelServer) -> cabc.Iterator[House]:
    with House(tmp_path, model, metrics_token=METRICS_TOKEN, policy="trusted") as house:
        yield house


def get(house: House, token: str | None, **headers: str) -> t.Any:
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return house.apps[-1].test_client().get("/metrics", headers=headers)


def test_only_the_metrics_token_reads_metrics(house: House) -> None:
    tenants = Tokens([KEY]).issue(Principal("acme", "ann"), ttl=600)
    nothing = house.apps[-1].test_client().get("/chat")
    for token in (None, "", tenants, "dev", METRICS_TOKEN[:-1], METRICS_TOKEN + "x", "ü" * 300):
        try:
            response = get(house, token)
        except UnicodeError:
            continue
        assert response.status_code == 404
        assert response.json["code"] == "not_found" and nothing.status_code == 404
    assert get(house, METRICS_TOKEN).status_code == 200
    assert get(house, None, Authorization=f"Basic {METRICS_TOKEN}").status_code == 404


def test_the_metrics_token_opens_nothing_else(house: House) -> None:
    headers = {"Authorization": f"Bearer {METRICS_TOKEN}"}
    client = house.apps[-1].test_client()
    for path in ("/sessions", "/session/s", "/session/s/messages", "/chat/s/events"):
        assert client.get(path, headers=headers).status_code == 401
    assert client.post("/chat/s", json={"message": "hi"}, headers=headers).status_code == 401


def test_metrics_name_no_tenant_user_session_or_word(house: House) -> None:
    house.ask(
        f'call write_file {{"file_path": "{SECRET}", "content": "{SECRET}"}}\nsay done',
        "umbrella/wesker",
        f"s-{SECRET}",
    )
    house.ask(f"say {SECRET}", "umbrella/wesker", f"s-{SECRET}")
    text = get(house, METRICS_TOKEN).text
    assert 'agentao_tokens_total{kind="prompt"}' in text
    for word in ("umbrella", "wesker", SECRET):
        assert word not in text


def test_nor_do_the_files_between_the_workers(house: House) -> None:
    house.ask(f"say {SECRET}", "umbrella/wesker", f"s-{SECRET}")
    get(house, METRICS_TOKEN)
    files = [path for path in (house.folder / "root" / "metrics").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path
        for word in (b"umbrella", b"wesker", SECRET.encode()):
            assert word not in path.read_bytes()


def test_tenants_are_named_if_the_operator_asks(tmp_path: Path, model: ModelServer) -> None:
    config = {"metrics_token": METRICS_TOKEN, "metrics_tenants": True}
    with House(tmp_path, model, **config) as house:
        house.ask("say hi", "umbrella/wesker")
        text = get(house, METRICS_TOKEN).text
        assert 'tenant="umbrella"' in text
        assert "wesker" not in text


def test_log_lines_carry_no_words(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agentao_web")
    house.ask(f'call write_file {{"file_path": "f", "content": "{SECRET}"}}\nsay {SECRET}')
    house.ask('call read_file {"file_path": "f"}\nsay done')
    ours = [record for record in caplog.records if record.name.startswith("agentao_web")]
    assert {record.name for record in ours} >= {"agentao_web.turns"}
    for record in ours:
        assert SECRET not in str(vars(record)), record


def test_a_request_id_cannot_forge_a_line(house: House, caplog: pytest.LogCaptureFixture) -> None:
    response = get(house, None, **{"X-Request-Id": "a" * 129})
    assert response.headers["X-Request-Id"] != "a" * 129
    environ = {"HTTP_X_REQUEST_ID": "r-1\nWARNING agentao_web: forged"}
    response = house.apps[-1].test_client().get("/healthz", environ_overrides=environ)
    assert len(response.headers["X-Request-Id"]) == 32
