"""A database that version 1 filled and left by a kill goes on working, on SQLite and PostgreSQL.

``store/version1.json`` was written by the code before version 2 (schema 2): chats of three users,
an approval remembered for a session, a history with half an emoji in it, a session that waits to
be deleted, and, from a killed worker, a running turn with one queued behind it and an open
question.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import time
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from tests.live.harness import eventually
from tests.model_server import ModelServer

FILLED = Path(__file__).parent / "store" / "version1.json"
KEY = "the-fixtures-own-secret-key"


def fill(url: str) -> None:
    """Make of an empty database what version 1 left."""
    told = json.loads(FILLED.read_text())
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as db:
        for statement in told["schema"][engine.dialect.name]:
            db.execute(sa.text(statement))
        for table, rows in told["rows"].items():
            for row in rows:
                if table == "agentao_keys":
                    row["created"] = time.time()  # They are kept for a day only.
                names = ", ".join(f'"{name}"' for name in row)
                places = ", ".join(f":{name}" for name in row)
                db.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})"), row)
        for table, column in (("sessions", "id"), ("questions", "n"), ("signals", "id")):
            if engine.dialect.name == "postgresql":
                last = f"(SELECT coalesce(max({column}), 1) FROM agentao_{table})"
                serial = f"pg_get_serial_sequence('agentao_{table}', '{column}')"
                db.execute(sa.text(f"SELECT setval({serial}, {last})"))
    engine.dispose()


class Web:
    """The server of today on that database."""

    def __init__(self, app: Flask) -> None:
        self._client = app.test_client()

    def call(self, method: str, path: str, user: str = "ann", **options: t.Any) -> t.Any:
        tenant = "other" if user == "eve" else "acme"
        token = Tokens([KEY]).issue(Principal(tenant, user), ttl=600)
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        headers |= options.pop("headers", {})
        return self._client.open(path, method=method, headers=headers, **options)

    def ask(self, sid: str, message: str, user: str = "ann", **headers: str) -> t.Any:
        # A key goes with the very bytes it came with.
        body = json.dumps({"message": message}, separators=(",", ":"))
        told = {"Prefer": "wait=30", "Content-Type": "application/json", **headers}
        response = self.call("POST", f"/chat/{sid}", user, data=body, headers=told)
        assert response.status_code == 200, response.text
        return response.json

    def messages(self, sid: str) -> list[tuple[str, str]]:
        page = self.call("GET", f"/session/{sid}/messages").json
        return [(m["role"], m.get("content", "")) for m in page["messages"]]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/filled.db"
    return t.cast(str, request.getfixturevalue("postgres_url"))


@pytest.fixture
def web(url: str, tmp_path: Path) -> cabc.Iterator[tuple[Web, ModelServer]]:
    fill(url)
    with ModelServer() as model, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-nobody")
        patch.setenv("OPENAI_BASE_URL", model.base_url)
        patch.setenv("OPENAI_MODEL", "scripted")
        app = Flask("version2")
        app.config.update(
            AGENTAO_ROOT=tmp_path / "root",
            AGENTAO_SECRET_KEYS=KEY,
            AGENTAO_DATABASE_URL=url,
            AGENTAO_WORKER_LEASE=1.5,
        )
        AgentaoWeb().init_app(app)
        with contextlib.ExitStack() as stack:
            stack.callback(shutdown, app, grace=2)
            yield Web(app), model


def test_what_was_said_is_there_and_goes_on(web: tuple[Web, ModelServer]) -> None:
    server, model = web
    listed = {s["session_id"]: s["title"] for s in server.call("GET", "/sessions").json["sessions"]}
    assert listed["talk"] == "Bolts — café 😀"
    assert set(listed) == {"talk", "wounded", "asking", "busy"}
    before = server.messages("talk")
    assert before[0] == ("user", "say the first answer")
    assert ("assistant", "the first answer") in before
    first = server.ask("talk", "say the first answer", **{"Idempotency-Key": "first-key"})
    assert first["reply"] == "the first answer" and model.requests == []
    assert server.ask("talk", "say more")["reply"] == "more"
    sent = [
        m.get("content") for m in model.requests[-1].body["messages"] if m["role"] == "assistant"
    ]
    assert "the first answer" in sent
    assert server.messages("talk")[: len(before)] == before


def test_an_approval_remembered_for_the_session_is_still_good(
    web: tuple[Web, ModelServer],
) -> None:
    server, _ = web
    call = 'call write_file {"file_path": "plan.txt", "content": "buy nuts"}'
    assert server.ask("talk", call)["status"] == "completed"


def test_half_an_emoji_in_a_history_costs_no_turn(web: tuple[Web, ModelServer]) -> None:
    server, _ = web
    assert server.ask("wounded", "say well again")["reply"] == "well again"


@pytest.mark.parametrize("sid", ["asking", "busy"])
def test_what_the_killed_worker_left_ends_and_the_session_goes_on(
    web: tuple[Web, ModelServer], sid: str
) -> None:
    server, _ = web
    server.call("GET", "/sessions")
    eventually(
        lambda: server.call("GET", f"/session/{sid}").json["state"] == "idle", "it is busy still"
    )
    events = server.call("GET", f"/chat/{sid}/events?after=0").json["events"]
    ends = [e for e in events if e["type"] in ("done", "error")]
    assert {e["turn_id"] for e in ends} == {e["turn_id"] for e in events}
    assert server.call("GET", f"/session/{sid}").json["questions"] == []
    assert server.ask(sid, "say on")["reply"] == "on"


def test_a_deletion_that_was_begun_is_finished(web: tuple[Web, ModelServer]) -> None:
    server, _ = web
    server.call("GET", "/sessions", "eve")
    again = {"json": {"message": "say new"}, "headers": {"Prefer": "wait=30"}}
    answer = eventually(
        lambda: (a := server.call("POST", "/chat/gone", "eve", **again)).status_code == 200 and a,
        "it is being deleted still",
    )
    assert answer.json["reply"] == "new"
    listed = server.call("GET", "/sessions", "eve").json["sessions"]
    assert {s["session_id"] for s in listed} == {"talk", "gone"}
