"""Questions on real workers: asked on one, answered on any, over cut streams and dying workers."""

from __future__ import annotations

import collections.abc as cabc
import json
import signal
import typing as t
from pathlib import Path

import httpx
import pytest

from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.test_workers import Client
from tests.live.test_workers import _speaks_to
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

WRITE = 'call write_file {"file_path": "a.txt", "content": "x"}\nsay written'


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def opened(client: Client, sid: str = "s") -> dict[str, t.Any]:
    """The question, as whatever worker answers sees it."""
    return t.cast(
        dict[str, t.Any],
        eventually(
            lambda: (client.request("GET", f"/session/{sid}").json().get("questions") or [None])[0],
            "nothing is asked",
        ),
    )


def reply(client: Client, question: dict[str, t.Any], sid: str = "s", **said: t.Any) -> t.Any:
    body = {"question_id": question["question_id"], **said}
    return client.request("POST", f"/chat/{sid}/answer", json=body)


@pytest.mark.long
def test_any_worker_takes_the_answer(tmp_path: Path, model: ModelServer) -> None:
    """Each request is a new connection: with 12 of them both workers have their part."""
    with Server(tmp_path, "--workers", "2", **model_env(model)) as server:
        client = Client(server)
        for n in range(12):
            sid = f"s{n}"
            client.begin(sid, WRITE)
            question = opened(client, sid)
            page = client.request("GET", f"/chat/{sid}/events?wait=0").json()
            assert page["state"] == "waiting"
            assert reply(client, question, sid, approve=n % 2 == 0).status_code == 200
            assert reply(client, question, sid, approve=n % 2 == 0).status_code == 200
            assert reply(client, question, sid, approve=n % 2 == 1).status_code == 409
            events = client.read(sid)
            assert events[-1]["reply"] == "written"
            status = [e["data"]["status"] for e in events if e["type"] == "tool_complete"]
            assert status == ["ok" if n % 2 == 0 else "denied"]
            assert [e["type"] for e in events].count("question_closed") == 1
        log = server.log.read_text().splitlines()
        assert len([x for x in log if "agentao_web.audit" in x]) == 12, "one for each decision"


def test_a_stream_ends_and_resumes_while_it_waits(tmp_path: Path, model: ModelServer) -> None:
    env = model_env(model, AGENTAO_STREAM_LEASE="1", AGENTAO_DISCONNECT_GRACE="0.5")
    with Server(tmp_path, "--workers", "2", **env) as server:
        client = Client(server)
        with server.stream("s", WRITE) as stream:
            events = list(stream)
        assert stream.retry is not None
        assert events[-1]["type"] == "tool_confirmation"
        with server.follow("s", Last_Event_ID=str(events[-1]["seq"])) as stream:
            assert list(stream) == []
        assert stream.retry is not None, "it waits still, and no thread with it"
        assert reply(client, opened(client), approve=True).status_code == 200
        cursor = str(events[-1]["seq"])
        while events[-1]["type"] != "done":
            with server.follow("s", Last_Event_ID=cursor) as stream:
                events += list(stream)
            cursor = str(events[-1]["seq"])
        assert events[-1]["data"]["status"] == "completed", "nobody left"
        seqs = [e["seq"] for e in events]
        assert seqs == sorted(set(seqs))


def test_a_killed_worker_takes_its_question_along_and_everybody_is_told(
    tmp_path: Path, model: ModelServer
) -> None:
    env = model_env(model, AGENTAO_WORKER_LEASE="5")
    with Server(tmp_path, "--workers", "2", **env) as server:
        client = Client(server)
        started = client.begin("s", WRITE)
        question = opened(client)
        owner = next(pid for pid in server.workers() if _speaks_to(pid, model))
        server.signal(signal.SIGKILL, owner)

        def read() -> list[dict[str, t.Any]] | None:
            try:
                page = client.request("GET", f"/chat/s/events?after={started['cursor']}&wait=1")
            except httpx.TransportError:
                return None
            events = page.json().get("events") or [{"type": ""}]
            return events if events[-1]["type"] == "error" else None

        events = eventually(read, "nobody closed it")
        assert [e["type"] for e in events[-2:]] == ["question_closed", "error"]
        assert events[-2]["data"] == {
            "question_id": question["question_id"],
            "outcome": "cancelled",
            "by": "worker_lost",
        }
        assert events[-1]["error"]["code"] == "worker_lost"
        late = reply(client, question, approve=True)
        assert (late.status_code, late.json()["details"]["outcome"]) == (409, "cancelled")
        assert client.request("GET", "/session/s").json()["questions"] == []
        client.begin("s", WRITE)
        assert reply(client, opened(client), approve=True).status_code == 200
        assert client.read("s")[-1]["reply"] == "written"


def test_a_worker_that_leaves_does_not_wait_for_people(tmp_path: Path, model: ModelServer) -> None:
    env = model_env(model, AGENTAO_DRAIN_GRACE="1000", AGENTAO_STOP_GRACE="900")
    with Server(tmp_path, "--graceful-timeout", "1000", **env) as server:
        with server.stream("s", WRITE) as stream:
            stream.until("tool_confirmation")
            server.signal(signal.SIGTERM)
            rest = list(stream)
        assert server.wait(PATIENCE) == 0
    assert [e["type"] for e in rest if e["type"] in ("question_closed", "done")] == [
        "question_closed",
        "done",
    ]
    last = rest[-1]["data"]
    assert (last["status"], last["reason"]) == ("cancelled", "server_shutdown")
    assert not list(tmp_path.rglob("a.txt"))


def test_a_remembered_approval_survives_a_restart(tmp_path: Path, model: ModelServer) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        client = Client(server)
        client.begin("s", WRITE)
        assert reply(client, opened(client), approve=True, remember="session").status_code == 200
        assert client.read("s")[-1]["reply"] == "written"
    with Server(tmp_path, "--workers", "2", **model_env(model)) as server:
        client = Client(server)
        for _ in range(3):
            assert client.ask("s", WRITE)["reply"] == "written"
        client.begin("other", WRITE)
        assert opened(client, "other"), "never another session's"
        told = json.dumps(client.read("s"))
        assert told.count('"tool_confirmation"') == 1
