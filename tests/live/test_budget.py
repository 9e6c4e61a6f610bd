"""One budget, several real workers: never over, and a killed worker gives nothing back."""

from __future__ import annotations

import collections.abc as cabc
import datetime
import signal
import threading
import typing as t
from pathlib import Path

import httpx
import pytest

from agentao_web.store.sql import SqlStore
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.harness import token
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

LIMIT = 60_000


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> cabc.Iterator[SqlStore]:
    store = SqlStore(f"sqlite:///{tmp_path}/root/agentao-web.db")
    yield store
    store.close()


def spent(store: SqlStore) -> int:
    return store.spent("acme", datetime.datetime.now(datetime.UTC).date().isoformat())


def serve(folder: Path, model: ModelServer, **more: str) -> Server:
    settings = {"AGENTAO_TOKENS_PER_DAY": str(LIMIT), "LLM_MAX_TOKENS": "3000", **more}
    return Server(folder, "--workers", "2", **model_env(model, **settings))


def post(server: Server, sid: str, message: str, user: str = "ann", wait: int = 25) -> t.Any:
    """On a connection of its own, so that either worker may get it."""
    headers = {
        "Authorization": f"Bearer {token('acme', user)}",
        "Accept": "application/json",
        "Prefer": f"wait={wait}",
    }
    url = f"{server.url}/chat/{sid}"
    body = {"message": message}
    return httpx.post(url, json=body, headers=headers, timeout=PATIENCE, trust_env=False)


def answered(server: Server) -> bool:
    try:
        return bool(post(server, "t", "say hi").status_code == 200)
    except httpx.TransportError:
        return False


def test_two_workers_share_one_budget_and_never_go_over(
    tmp_path: Path, model: ModelServer, store: SqlStore
) -> None:
    seen: list[int] = []
    answers: list[t.Any] = []
    plain = model.reply

    def look(body: dict[str, t.Any]) -> t.Any:
        seen.append(spent(store))
        return plain(body)

    model.reply = look
    with serve(tmp_path, model) as server:

        def converse(n: int) -> None:
            for turn in range(8):
                answers.append(post(server, f"s{n}-{turn}", "tokens 2900", f"u{n}"))

        threads = [threading.Thread(target=converse, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE * 2)
        assert len(answers) == 48
        assert seen and max(seen) <= LIMIT and spent(store) <= LIMIT
        ended = [a.json().get("reason") for a in answers if a.status_code == 200]
        assert set(ended) <= {None, "budget_exhausted"} and None in ended
        refused = [a for a in answers if a.status_code == 429]
        assert {a.status_code for a in answers} <= {200, 429}
        assert all(a.headers["RateLimit-Policy"].startswith('"tokens"') for a in refused)
        assert "budget_exhausted" in {*ended, *(a.json()["code"] for a in refused)}


def test_what_a_killed_worker_had_set_aside_stays_counted(
    tmp_path: Path, model: ModelServer, store: SqlStore
) -> None:
    with serve(tmp_path, model) as server:
        assert post(server, "s", "hang", wait=0).status_code == 202
        model.wait_for_request(1, PATIENCE)
        held = spent(store)
        assert held > 3000
        for pid in server.workers():
            server.signal(signal.SIGKILL, pid)
        model.wait_closed(model.requests[0], PATIENCE)
        eventually(lambda: answered(server), "no worker came back")
        assert spent(store) > held
