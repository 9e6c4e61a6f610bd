"""Metrics over real workers, and over their ends: HUP, kill -9; ids over a real connection."""

from __future__ import annotations

import json
import os
import signal
import typing as t
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import token

pytestmark = pytest.mark.live

TOKEN = "the-scrapers-own-token"
ENV = {
    "AGENTAO_DEMO": "1",
    "AGENTAO_WORKERS": "2",
    "AGENTAO_METRICS_TOKEN": TOKEN,
    "AGENTAO_LOG": "json",
    "AGENTAO_DRAIN_GRACE": "2",
    "AGENTAO_WORKER_LEASE": "5",
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def request(server: Server, method: str, path: str, **given: t.Any) -> httpx.Response:
    """On a connection of its own, so that any worker may get it."""
    headers = {"Authorization": f"Bearer {token()}", "Accept": "application/json"}
    headers |= given.pop("headers", {})
    return httpx.request(
        method, server.url + path, headers=headers, timeout=PATIENCE, trust_env=False, **given
    )


def scrape(server: Server) -> Samples:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    response = request(server, "GET", "/metrics", headers=headers)
    assert response.status_code == 200, response.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def completed(server: Server) -> float:
    return value(scrape(server), "agentao_turns_total", status="completed", reason="")


def ask(server: Server, sid: str) -> None:
    response = request(
        server,
        "POST",
        f"/chat/{sid}",
        json={"message": "hello"},
        headers={"Prefer": "wait=50", "X-Request-Id": f"r-{sid}"},
    )
    assert response.status_code == 200 and response.json()["status"] == "completed", response.text
    assert response.headers["X-Request-Id"] == f"r-{sid}"


def books(server: Server) -> list[Path]:
    return list((server.folder / "root" / "metrics").glob("*/*.book"))


def workers(server: Server, count: int) -> bool:
    return value(scrape(server), "agentao_workers") == count


@pytest.mark.parametrize(
    "preload",
    [
        pytest.param((), id="plain"),
        pytest.param(("--preload",), id="preload", marks=pytest.mark.long),
    ],
)
def test_numbers_are_of_all_workers_and_survive_their_ends(
    tmp_path: Path, preload: tuple[str, ...]
) -> None:
    with Server(tmp_path, *preload, **ENV) as server:
        eventually(lambda: workers(server, 2), "both workers show themselves")
        # Until each worker has had some: then the sum is of both.
        asked = 0
        while asked < 8 or len(_busy(server)) < 2:
            ask(server, f"s{asked}")
            asked += 1
            assert asked < 500, "one worker gets everything"
        assert {completed(server) for _ in range(6)} == {asked}
        in_memory = value(scrape(server), "agentao_sessions_in_memory")
        assert in_memory == asked

        # kill -9: what it counted stays, what it held does not.
        victim = server.workers()[0]
        server.signal(signal.SIGKILL, victim)
        eventually(
            lambda: victim not in server.workers() and workers(server, 2), "a new one is there"
        )
        found = scrape(server)
        assert value(found, "agentao_turns_total", status="completed", reason="") == asked
        assert value(found, "agentao_sessions_in_memory") < in_memory
        assert value(found, "agentao_worker_heartbeat_age_seconds") < PATIENCE
        assert len(books(server)) == 2

        # HUP: all of them go.
        before = set(server.workers())
        server.signal(signal.SIGHUP)
        eventually(lambda: not before & set(server.workers()), "all workers are new")
        eventually(lambda: workers(server, 2), "the new ones show themselves")
        found = scrape(server)
        assert value(found, "agentao_turns_total", status="completed", reason="") == asked
        assert value(found, "agentao_sessions_in_memory") == 0
        assert value(found, "agentao_turns_running") == 0
        ask(server, "after")
        assert completed(server) == asked + 1
        assert len(books(server)) == 2, "files do not grow with the number of workers that were"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    # Started anew it goes on counting, and clears away what is left.
    lines = server.log.read_text().splitlines()
    with Server(tmp_path, *preload, **ENV) as server:
        eventually(lambda: workers(server, 2), "both workers show themselves")
        assert completed(server) == asked + 1
        assert len(books(server)) == 2
    told_lines = [json.loads(line) for line in lines if line.startswith("{")]
    ends = [told for told in told_lines if told["logger"] == "agentao_web.turns"]
    assert len(ends) == asked + 1
    for told in ends:
        assert told["request_id"] == f"r-{told['session_id']}"
        assert (told["tenant"], told["status"]) == ("acme", "completed")
        assert "hello" not in json.dumps(told)


def _busy(server: Server) -> set[int]:
    """Workers that have had a session."""
    return {pid for pid in server.workers() if _has_database(pid)}


def _has_database(pid: int) -> bool:
    """Whether the worker has opened the database, which it does with its first session."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.endswith("agentao-web.db") for link in links)


def test_a_worker_lost_turn_is_counted_once(tmp_path: Path) -> None:
    with Server(tmp_path, **ENV) as server:
        eventually(lambda: workers(server, 2), "both workers show themselves")
        body = request(server, "POST", "/chat/s", json={"message": "take 60 seconds"}).json()
        assert body["status"] == "running", body
        eventually(lambda: value(scrape(server), "agentao_turns_running") == 1, "the turn is seen")
        labels = {"status": "failed", "reason": "worker_lost"}
        for pid in server.workers():
            server.signal(signal.SIGKILL, pid)
        # Somebody has to come for a worker to look around.
        eventually(
            lambda: (
                request(server, "GET", "/session/s").is_success
                and value(
                    scrape(server), "agentao_turns_total", status="failed", reason="worker_lost"
                )
            ),
            "the turn is closed",
        )
        found = scrape(server)
        assert value(found, "agentao_turns_total", **labels) == 1
        assert value(found, "agentao_turns_running") == 0


def test_open_streams_are_counted_while_they_are_open(tmp_path: Path) -> None:
    with Server(tmp_path, **ENV) as server:
        ask(server, "s")
        with server.follow("s", "?after=0&follow=1") as stream:
            assert stream.response.headers["X-Request-Id"]
            stream.until("done")
            eventually(
                lambda: value(scrape(server), "agentao_streams_open") == 1, "the stream is seen"
            )
        eventually(
            lambda: value(scrape(server), "agentao_streams_open") == 0, "and that it was closed"
        )
