"""A store that goes away in the middle of a turn, and comes back."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import json
import typing as t
from pathlib import Path

import httpx
import pytest

from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.test_workers import Client
from tests.model_server import ModelServer
from tests.store.postgres import PostgresServer

pytestmark = pytest.mark.live

#: A turn is stopped for the store when its claim would be lost. Whoever stops it before has to be
#: there before, on any machine; where nobody does, that is what is waited for.
LEASES = {"cancel": "30", "release": "30", "nothing": "5"}


@dataclasses.dataclass
class Database:
    """A database that can be taken away."""

    url: str
    take: cabc.Callable[[], object]
    restore: cabc.Callable[[], object]

    @contextlib.contextmanager
    def away(self) -> cabc.Iterator[None]:
        self.take()
        try:
            yield
        finally:
            self.restore()


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    if request.param == "sqlite":
        # A folder of its own, so that the file, -wal and -shm go in one moment.
        here, there = tmp_path / "data", tmp_path / "moved"
        url = f"sqlite:///{here}/agentao-web.db"
        return Database(url, lambda: here.rename(there), lambda: there.rename(here))
    server = t.cast(PostgresServer, request.getfixturevalue("postgres_server"))
    url = t.cast(str, request.getfixturevalue("postgres_url"))
    return Database(url, server.stop, server.start)


def unavailable(response: httpx.Response) -> bool:
    body = response.json()
    told = response.status_code == 503 and body["code"] == "store_unavailable"
    return told and int(response.headers["Retry-After"]) > 0


def messages(lines: cabc.Iterator[str]) -> cabc.Iterator[dict[str, str]]:
    """Server-Sent Events as their fields; a stream that breaks raises."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        else:
            if "data" in fields:
                yield fields
            fields = {}
    assert not fields, f"cut off within a message: {fields}"


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=[] if end == "nothing" else pytest.mark.long) for end in LEASES]
)
def test_a_turn_that_cannot_be_stored_is_told_and_closed_when_the_store_is_back(
    tmp_path: Path, model: ModelServer, database: Database, end: str
) -> None:
    env = model_env(model, AGENTAO_DATABASE_URL=database.url, AGENTAO_WORKER_LEASE=LEASES[end])
    with Server(tmp_path, **env) as server:
        client = Client(server)
        client.ask("s", "say before")
        begin = {"message": "hang_after some words"}
        with server.client.stream("POST", "/chat/s", json=begin) as response:
            assert response.status_code == 200
            stream = messages(response.iter_lines())
            first = next(json.loads(m["data"]) for m in stream if '"llm_text"' in m["data"])
            with database.away():
                assert unavailable(client.request("POST", "/chat/t", json={"message": "say no"}))
                assert client.request("GET", "/healthz").status_code == 200
                if end == "cancel":
                    # What runs here is stopped; whether others run something nobody can say.
                    answer = client.request("POST", "/chat/s/cancel")
                    assert answer.json() == {"ok": True, "cancelled": 1}
                elif end == "release":
                    model.release()
                *_, last = stream
                final = json.loads(last["data"])
                assert unavailable(client.request("POST", "/chat/s", json={"message": "say no"}))
                assert client.request("GET", "/healthz").status_code == 200
        assert "id" not in last and final["seq"] is None
        assert (final["type"], final["turn_id"]) == ("error", first["turn_id"])
        assert final["error"]["code"] == "store_unavailable"

        def idle() -> bool:
            answer = client.request("GET", "/session/s")
            return answer.status_code == 200 and answer.json()["state"] == "idle"

        eventually(idle, "the session is never idle again")
        events = client.read("s")
        seqs = [e["seq"] for e in events]
        assert seqs == sorted(set(seqs))
        ends = [e for e in events if e["type"] in ("done", "error")]
        assert [e["type"] for e in ends] == ["done", "error"], "nothing of what was refused"
        assert ends[1]["turn_id"] == first["turn_id"]
        assert ends[1]["data"]["status"] == "failed"
        assert ends[1]["error"]["code"] == "store_unavailable"

        assert client.ask("s", "say after")["reply"] == "after"
        told = json.dumps(model.requests[-1].body["messages"])
        assert "say before" in told and "hang_after some words" in told and "cut off" in told
        assert "say no" not in told
        assert client.read("s")[: len(events)] == events
        assert client.request("GET", "/session/t").status_code == 404
