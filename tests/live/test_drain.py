"""Workers at addresses of their own leave: nothing of theirs is left, and everyone is told."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest

from tests import mcp_server
from tests.live.harness import Server
from tests.live.harness import Stream
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.model_server import ModelServer
from tests.security.house import alive
from tests.security.house import pids

pytestmark = pytest.mark.live


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def by_requests(server: Server) -> None:
    """As many requests as a worker may have."""
    for number in range(len(server.sockets)):
        with server.at(number) as client:
            for _ in range(12):
                assert client.get("/healthz").status_code == 200


WAYS: dict[str, cabc.Callable[[Server], None]] = {
    "TERM": lambda server: server.signal(signal.SIGTERM),
    "HUP": lambda server: server.signal(signal.SIGHUP),
    "max_requests": by_requests,
    "dead master": lambda server: server.signal(signal.SIGKILL),
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(w, marks=[pytest.mark.long] if w == "max_requests" else []) for w in WAYS],
)
def test_nothing_is_left_of_workers_that_leave(
    tmp_path: Path, model: ModelServer, way: str
) -> None:
    """Each of two has a turn in the middle of a shell command, and an MCP server."""
    mcp = {"command": sys.executable, "args": ["-I", "-S", str(mcp_server.PATH)]}
    mcp["args"] = [*mcp["args"], "pid", str(tmp_path / "mcp"), "ignore-eof"]
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": mcp}}))
    # The command says who it is, so that it can be looked for; what it leaves behind, too.
    command = f"echo $$ >> {tmp_path}/sh; sleep 1000 & echo $! >> {tmp_path}/sh; wait"
    message = (
        'call mcp_a_echo {"text": "hi"}\n'
        f"call run_shell_command {json.dumps({'command': command})}\n"
    )
    env = model_env(
        model,
        AGENTAO_MCP=str(tmp_path / "mcp.json"),
        AGENTAO_POLICY="trusted",
        AGENTAO_SHELL="unconfined",
        AGENTAO_DRAIN_GRACE="3",
        AGENTAO_STOP_GRACE="1.5",
    )
    with (
        Server(tmp_path, "--max-requests", "12", addresses=2, **env) as server,
        contextlib.ExitStack() as stack,
    ):
        old = server.workers()
        streams = []
        for number in range(2):
            client = stack.enter_context(server.at(number))
            response = stack.enter_context(
                client.stream("POST", f"/chat/s{number}", json={"message": message})
            )
            streams.append(Stream(response))
        eventually(lambda: len(pids(tmp_path / "sh")) == 4, "the commands do not start")
        children = pids(tmp_path / "mcp") + pids(tmp_path / "sh")
        assert len(children) == 6 and all(alive(pid) for pid in children)
        WAYS[way](server)
        for stream in streams:
            assert stream.until("done")["data"]["reason"] == "server_shutdown"
        eventually(lambda: not any(alive(pid) for pid in old), "a worker stays")
        eventually(lambda: not any(alive(pid) for pid in children), "children are left")
        if way == "TERM":
            assert server.wait() == 0
        elif way != "dead master":
            assert server.ask("s0", "say again")["reply"] == "again"
            eventually(lambda: len(server.workers()) == 2, "they do not come back")
        # Nobody had to be killed, or was too late for Gunicorn's own patience.
        told = server.log.read_text()
        assert "was sent SIG" not in told and "TIMEOUT" not in told, told
