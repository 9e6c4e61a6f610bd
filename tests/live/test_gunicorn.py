"""Real gunicorn: both command lines, the fork, streams, readers that leave, and the end."""

from __future__ import annotations

import collections.abc as cabc
import json
import signal
import socket
import threading
import typing as t
from pathlib import Path

import httpx
import pytest

from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

#: What holds with threads holds with greenlets.
KINDS = pytest.mark.parametrize("kind", ["gthread", "gevent"])
#: Both, where one of them takes its time and the other is much the same.
SLOW_KINDS = pytest.mark.parametrize(
    "kind", ["gthread", pytest.param("gevent", marks=pytest.mark.long)]
)


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def diary(folder: Path) -> list[str]:
    path = folder / "diary"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def scripted(folder: Path, *args: str, **options: t.Any) -> Server:
    return Server(
        folder,
        *args,
        app="tests.live.scripted_app:app",
        TEST_DIARY=str(folder / "diary"),
        **options,
    )


# -- serving -----------------------------------------------------------------------------------


def test_the_config_serves_real_agents_over_sse(tmp_path: Path, model: ModelServer) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        with server.stream("s", "say hello world") as stream:
            events = list(stream)
        assert [e["type"] for e in events][0] == "turn_begin"
        assert (
            "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text") == "hello world"
        )
        assert events[-1]["reply"] == "hello world"
        assert not list((tmp_path / "home").rglob("*")), "nothing is left in the home directory"
        assert not list((tmp_path / "root").rglob("agentao.log"))


def test_the_templates_own_line_serves(tmp_path: Path, model: ModelServer) -> None:
    """Two workers on one port: each session lives in one of them until there is a shared store."""
    line = ["--worker-class", "gthread", "--threads", "8", "--workers", "2"]
    with Server(tmp_path, *line, conf=None, **model_env(model)) as server:
        assert server.ask("s", "say hi")["reply"] == "hi"
        assert len(server.workers()) == 2


@KINDS
def test_tokens_arrive_while_the_model_still_speaks(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    with (
        Server(tmp_path, "-k", kind, **model_env(model)) as server,
        server.stream("s", "hang_after one two") as s,
    ):
        assert s.until("llm_text")["data"]["chunk"].startswith("one")
        assert model.requests[0].closed_at is None
        assert server.client.post("/chat/s/cancel").json()["cancelled"] == 1
        assert s.until("done")["data"]["reason"] == "cancelled_by_user"


@pytest.mark.parametrize("preload", [False, True])
def test_nothing_starts_before_the_fork(tmp_path: Path, preload: bool) -> None:
    with scripted(tmp_path, *(["--preload"] if preload else [])) as server:
        assert server.ask("s", "hi")["reply"] == "hello"
        tasks = list(Path(f"/proc/{server.process.pid}/task").iterdir())
        assert len(tasks) == 1, "the master has no thread of ours"
        assert "loaded with 1 thread" in diary(tmp_path)


def test_a_stalled_reader_costs_little_and_stops_nothing(
    tmp_path: Path, model: ModelServer
) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        server.ask("warm", "say hi")
        before = rss(server.workers()[0])
        request = server.client.build_request("POST", "/chat/s", json={"message": "tokens 100000"})
        response = server.client.send(request, stream=True)  # And never read.
        done = eventually(
            lambda: server.client.get("/session/s").json()["state"] == "idle" or None,
            "the turn waits for its reader",
        )
        assert done
        assert rss(server.workers()[0]) - before < 64 * 2**20
        response.close()


def rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


# -- who left ----------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("command", ["hang", "hang_after some words", "tokens 100000 50"])
def test_a_reader_that_leaves_ends_the_turn_and_the_models_request(
    tmp_path: Path, model: ModelServer, command: str, kind: str
) -> None:
    with Server(tmp_path, "-k", kind, **model_env(model), AGENTAO_DISCONNECT_GRACE="0.3") as server:
        with server.stream("s", command) as stream:
            stream.until("turn_begin")
            model.wait_for_request(1)
        server.client.get("/healthz")
        model.wait_closed(model.requests[0], PATIENCE)
        eventually(
            lambda: server.client.get("/session/s").json()["state"] == "idle", "the turn goes on"
        )
        page = server.client.get("/chat/s/events").json()
        assert page["events"][-1]["data"]["reason"] == "client_gone"
        assert server.ask("s", "say again")["reply"] == "again"


@SLOW_KINDS
def test_a_reader_that_comes_back_in_time_reads_on(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    with Server(tmp_path, "-k", kind, **model_env(model), AGENTAO_DISCONNECT_GRACE="20") as server:
        with server.stream("s", "tokens 100 100") as stream:
            last = stream.until("llm_text")["seq"]
        with server.follow("s", Last_Event_ID=str(last)) as again:
            events = list(again)
        assert events[-1]["data"]["status"] == "completed"
        assert events[0]["seq"] > last
        text = "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text")
        assert text.count("tok") == 100 - 1


def test_a_turn_started_as_json_does_not_need_a_reader(tmp_path: Path, model: ModelServer) -> None:
    with Server(tmp_path, **model_env(model), AGENTAO_DISCONNECT_GRACE="0") as server:
        started = server.post("s", "tokens 30 50").json()
        with server.follow("s", f"?after={started['cursor']}") as stream:
            stream.until("llm_text")
        page = eventually(
            lambda: (
                (p := server.client.get(f"/chat/s/events?after={started['cursor']}").json())[
                    "state"
                ]
                == "idle"
                and p
            ),
            "the turn does not end",
        )
        assert page["events"][-1]["data"]["status"] == "completed"


# -- the end -----------------------------------------------------------------------------------


@KINDS
def test_sigterm_ends_turns_streams_and_agents(tmp_path: Path, kind: str) -> None:
    with scripted(tmp_path, "-k", kind) as server:
        ends: dict[str, list[dict[str, t.Any]]] = {}
        begun = threading.Semaphore(0)

        def read(sid: str, message: str) -> None:
            with server.stream(sid, message) as stream:
                stream.until("turn_begin")
                begun.release()
                ends[sid] = list(stream)

        def follow() -> None:
            with server.follow("a", "?follow=1") as stream:
                stream.until("turn_begin")
                begun.release()
                ends["follower"] = list(stream)
                ends["follower"].append({"retry": stream.retry})

        threads = [threading.Thread(target=read, args=(sid, "hang")) for sid in "abc"]
        threads.append(threading.Thread(target=read, args=("d", "stuck")))
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=PATIENCE)
        threads.append(threading.Thread(target=follow))
        threads[-1].start()
        assert begun.acquire(timeout=PATIENCE)
        queued = server.post("a", "later", on_busy="queue")
        assert queued.json()["status"] == "queued"

        server.signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)
        assert server.wait() == 0, "gone within its graceful timeout"
        for sid in "abcd":
            assert ends[sid][-1]["data"]["reason"] == "server_shutdown"
        assert ends["d"][-1]["data"]["details"] == {"abandoned": True}
        assert 500 <= ends["follower"][-1]["retry"] <= 2000
        assert diary(tmp_path).count("built") == 4
        assert diary(tmp_path).count("closed") == 3, "all but the stuck one, which still runs"
        assert "Traceback" not in server.log.read_text()


@KINDS
def test_sigterm_with_a_hung_model_leaves_no_request_behind(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    env = model_env(model, AGENTAO_DRAIN_GRACE="1")
    with Server(tmp_path, "-k", kind, **env) as server, server.stream("s", "hang") as stream:
        stream.until("turn_begin")
        request = model.wait_for_request(1)
        server.signal(signal.SIGTERM)
        assert stream.until("done")["data"]["reason"] == "server_shutdown"
        model.wait_closed(request, PATIENCE)
        assert server.wait() == 0


@KINDS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_still_tells_everyone(tmp_path: Path, number: int, kind: str) -> None:
    with scripted(tmp_path, "-k", kind) as server, server.stream("s", "hang") as stream:
        stream.until("turn_begin")
        server.signal(number)
        assert stream.until("done")["data"]["reason"] == "server_shutdown"
        server.wait()
        assert diary(tmp_path).count("closed") == 1


@SLOW_KINDS
def test_hup_replaces_the_worker_and_ends_its_streams(tmp_path: Path, kind: str) -> None:
    with scripted(tmp_path, "-k", kind) as server, server.stream("s", "hang") as stream:
        stream.until("turn_begin")
        old = server.workers()
        server.signal(signal.SIGHUP)
        assert stream.until("done")["data"]["reason"] == "server_shutdown"
        eventually(lambda: not set(old) & set(server.workers()), "the old worker stays")
        assert server.ask("t", "hi")["reply"] == "hello"


@SLOW_KINDS
def test_a_worker_whose_master_died_leaves(tmp_path: Path, kind: str) -> None:
    with scripted(tmp_path, "-k", kind) as server, server.stream("s", "hang") as stream:
        stream.until("turn_begin")
        (worker,) = server.workers()
        server.signal(signal.SIGKILL)
        assert stream.until("done")["data"]["reason"] == "server_shutdown"
        eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker stays")


@SLOW_KINDS
def test_half_of_the_threads_lost_brings_a_fresh_worker(tmp_path: Path, kind: str) -> None:
    with scripted(tmp_path, "-k", kind, TEST_MAX_TURNS="2") as server:
        old = server.workers()
        assert server.post("s", "stuck").status_code == 202
        server.client.post("/chat/s/cancel")
        eventually(lambda: not set(old) & set(server.workers()), "the spoiled worker stays")
        assert server.ask("t", "hi")["reply"] == "hello"


def test_a_second_signal_hurries_but_still_tells_everyone(tmp_path: Path) -> None:
    with scripted(tmp_path, TEST_DRAIN_GRACE="60") as server, server.stream("s", "hang") as stream:
        stream.until("turn_begin")
        server.signal(signal.SIGTERM)
        eventually(
            lambda: "Handling signal: term" in server.log.read_text(), "SIGTERM is not handled"
        )
        server.signal(signal.SIGINT)
        assert stream.until("done")["data"]["reason"] == "server_shutdown"
        server.wait()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"message": "say hi"' + b" " * 21 * 2**20 + b"GARBAGE", 413),
        (b'{"message": "say hi"}', 200),
    ],
)
def test_a_chunked_body_is_whole_or_refused(
    tmp_path: Path, model: ModelServer, body: bytes, status: int
) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        headers = {"Content-Type": "application/json"}
        chunks = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
        answer = server.client.post("/chat/s", content=chunks, headers=headers)
        assert answer.status_code == status
        if status == 413:
            assert answer.json()["code"] == "payload_too_large"


@pytest.mark.parametrize("size", [b"zz", b"-5"])
def test_a_broken_chunk_is_400(tmp_path: Path, model: ModelServer, size: bytes) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
            sock.sendall(
                b"POST /chat/s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: " + server.client.headers["Authorization"].encode() + b"\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nabc\r\n"
            )
            assert sock.recv(65_536).startswith(b"HTTP/1.1 400")


# -- a client of the template ------------------------------------------------------------------


def test_a_client_written_for_the_template_works(tmp_path: Path, model: ModelServer) -> None:
    """What its README shows: POST and read data lines, cancel, DELETE, healthz."""
    with Server(tmp_path, **model_env(model)) as server:
        headers = {"Authorization": server.client.headers["Authorization"]}
        answer = httpx.post(
            f"{server.url}/chat/chat-1",
            headers=headers,
            json={"message": "say hello there"},
            timeout=PATIENCE,
            trust_env=False,
        )
        text, reply = "", None
        for line in answer.text.splitlines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if event["type"] == "llm_text":
                    text += event["data"]["chunk"]
                elif event["type"] == "done":
                    reply = event["reply"]
        assert (text, reply) == ("hello there", "hello there")
        for method, path in (("POST", "/chat/chat-1/cancel"), ("DELETE", "/session/chat-1")):
            body = httpx.request(method, server.url + path, headers=headers, trust_env=False).json()
            assert body["ok"] is True


def test_the_project_has_both_entry_points() -> None:
    assert (PROJECT / "wsgi_app.py").is_file() and (PROJECT / "gunicorn.conf.py").is_file()


# -- never deaf --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "four", [("--threads", "4"), ("-k", "gevent", "--worker-connections", "4")]
)
def test_with_every_place_taken_the_rest_still_answers(
    tmp_path: Path, model: ModelServer, four: tuple[str, ...]
) -> None:
    """Four threads: three may stream, one is for everybody else."""
    shares = {"AGENTAO_MAX_STREAMS_PER_USER": "3", "AGENTAO_MAX_STREAMS_PER_TENANT": "3"}
    with (
        Server(tmp_path, *four, **model_env(model, **shares)) as server,
        server.stream("a", "hang") as a,
        server.stream("b", "hang"),
        server.stream("c", "hang"),
    ):
        refused = server.client.post("/chat/d", json={"message": "say hi"})
        assert (refused.status_code, refused.json()["code"]) == (503, "no_stream_slot")
        started = server.post("d", "say hi")
        assert started.status_code == 202
        polled = refused.json()["details"]["poll_url"]
        eventually(
            lambda: server.client.get(polled).json()["events"][-1:][0]["type"] == "done",
            "the turn does not end",
        )
        assert server.client.get("/healthz").status_code == 200
        assert server.client.post("/chat/a/cancel").json()["cancelled"] == 1
        assert a.until("done")["data"]["reason"] == "cancelled_by_user"
        eventually(
            lambda: server.client.post("/chat/e", json={"message": "say hi"}).status_code == 200,
            "the place of a stream that ended is not free again",
        )
        model.release()
