"""A real server with the demo model, and clients of it."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import typing as t
import uuid

import httpx
import pytest

from agentao_web.client import Client
from agentao_web.client import Event
from tests.live.harness import Server
from tests.live.harness import token
from tests.patience import PATIENCE

#: Silence is waited for where a connection is dead, so it is shorter here than it is for people. On
#: a busy machine a live one may be as silent, and is then read again.
QUICK = {"timeout": 30.0, "silence": 8.0, "patience": PATIENCE}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, AGENTAO_DEMO="1", AGENTAO_HEARTBEAT="1") as running:
        yield running


@pytest.fixture
def sid() -> str:
    return f"s-{uuid.uuid4().hex}"


@contextlib.contextmanager
def client_of(url: str, **options: t.Any) -> cabc.Iterator[Client]:
    with httpx.Client(trust_env=False) as http:
        yield Client(url, **{"token": token(), "http": http, **QUICK, **options})


@pytest.fixture
def client(server: Server) -> cabc.Iterator[Client]:
    with client_of(server.url) as made:
        yield made


def log_of(server: Server, sid: str, turn: str | None = None) -> list[tuple[t.Any, ...]]:
    """What the server keeps of the session, or of one turn, as ``merged`` has it."""
    kept: list[t.Any] = []
    cursor = 0
    while True:
        answer = server.client.get(
            f"/chat/{sid}/events?after={cursor}&wait=0", headers={"Accept": "application/json"}
        )
        assert answer.status_code == 200, answer.text
        page = answer.json()
        if not page["events"]:
            return merged(e for e in kept if turn in (None, e["turn_id"]))
        kept += page["events"]
        cursor = page["cursor"]


def merged(events: cabc.Iterable[Event | dict[str, t.Any]]) -> list[tuple[t.Any, ...]]:
    """(type, seq, data) of each event, text that follows text made one: the server may join it."""
    found: list[tuple[t.Any, ...]] = []
    last = -1
    for event in events:
        raw: t.Any = event.raw if isinstance(event, Event) else event
        kind, seq, data = raw["type"], raw["seq"], raw["data"]
        if seq is not None:
            assert seq > last, f"{seq} again, after {last}"
            last = seq
        if kind == "llm_text" and found and found[-1][0] == kind:
            data = {"chunk": found.pop()[2]["chunk"] + data["chunk"]}
        found.append((kind, seq, data))
    return found


def counted(server: Server, sid: str) -> int:
    """How many turns the session has had."""
    return int(server.client.get(f"/session/{sid}").json()["turns"])


__all__ = ["client_of", "counted", "log_of", "merged"]
