"""Real gunicorn: a host's function runs in a worker, and cannot keep it from ending."""

from __future__ import annotations

import collections.abc as cabc
import json
import signal
from pathlib import Path

import pytest

from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.model_server import ModelServer

pytestmark = pytest.mark.live


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


KINDS = pytest.mark.parametrize("kind", ["gthread", "gevent"])


def serve(folder: Path, model: ModelServer, kind: str) -> Server:
    diary, app = str(folder / "diary"), "tests.live.tools_app:app"
    return Server(folder, "-k", kind, app=app, TEST_DIARY=diary, **model_env(model))


def diary(folder: Path) -> list[str]:
    path = folder / "diary"
    return path.read_text().splitlines() if path.exists() else []


@KINDS
def test_a_tool_runs_in_an_application_context_of_its_own(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    with serve(tmp_path, model, kind) as server:
        message = 'call visit {"name": "bob"}\ncall visit {"name": "eve"}\nsay home'
        with server.stream("s", message) as stream:
            events = list(stream)
    assert events[-1]["reply"] == "home"
    results = [json.loads(e["data"]["content"]) for e in events if e["type"] == "tool_result"]
    assert results == [{"app": "live", "visits": 1, "request": False, "for": "ann"}] * 2
    assert diary(tmp_path) == ["visit bob", "end None", "visit eve", "end None"]


@KINDS
def test_a_tool_that_never_ends_does_not_keep_the_worker(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    with serve(tmp_path, model, kind) as server:
        with server.stream("s", "call hang {}\nsay never") as stream:
            stream.until("tool_start")
            eventually(lambda: "hang" in diary(tmp_path), "the tool did not start")
            (worker,) = server.workers()
            server.signal(signal.SIGTERM, worker)
            assert stream.until("done")["data"]["reason"] == "server_shutdown"
        eventually(lambda: worker not in server.workers(), "the worker is still there")
