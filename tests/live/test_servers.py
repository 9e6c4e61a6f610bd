"""Other servers than Gunicorn's threads: what docs/servers.md says of each is tried with it."""

from __future__ import annotations

import collections.abc as cabc
import signal
import sys
import threading
import typing as t
from pathlib import Path

import psycopg
import pytest

from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

OURS = "python:agentao_web.workers"
WRITE = 'call write_file {"file_path": "a.txt", "content": "x"}\nsay written'
BIN = Path(sys.executable).parent


@pytest.fixture
def nothing(tmp_path: Path) -> str:
    """A config without a line: gunicorn would find the project's own."""
    (tmp_path / "nothing.py").touch()
    return str(tmp_path / "nothing.py")


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def said(server: Server, part: str) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if part in line]


def text(events: cabc.Iterable[dict[str, t.Any]]) -> str:
    return "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text")


def works(server: Server, model: ModelServer) -> None:
    """A stream, a cancel in the middle of one, a resume, a long-poll, and an approval."""
    with server.stream("s", "say hello world") as stream:
        first = list(stream)
    assert text(first) == first[-1]["reply"] == "hello world"
    with server.stream("s", "hang_after one two") as stream:
        begun = stream.until("llm_text")
        assert server.client.post("/chat/s/cancel").json()["cancelled"] == 1
        assert stream.until("done")["data"]["reason"] == "cancelled_by_user"
    with server.follow("s", Last_Event_ID=str(begun["seq"])) as stream:
        assert list(stream)[-1]["data"]["reason"] == "cancelled_by_user"
    assert server.post("s", WRITE).status_code == 202
    (question,) = eventually(
        lambda: server.client.get("/session/s").json()["questions"], "nothing is asked"
    )
    cursor = server.client.get("/session/s").json()["cursor"]
    page: dict[str, t.Any] = {}

    def poll() -> None:
        page.update(server.client.get(f"/chat/s/events?wait=25&after={cursor}").json())

    thread = threading.Thread(target=poll)
    thread.start()
    yes = {"question_id": question["question_id"], "approve": True}
    assert server.client.post("/chat/s/answer", json=yes).status_code == 200
    thread.join(PATIENCE)
    assert page["events"]
    eventually(lambda: server.client.get("/session/s").json()["state"] == "idle", "it goes on")
    assert server.ask("s", "say again")["reply"] == "again"


def notices_who_left(server: Server, model: ModelServer) -> None:
    """While the model is silent, and nothing is written that could fail."""
    before = len(model.requests)
    with server.stream("gone", "hang") as stream:
        stream.until("turn_begin")
        request = model.wait_for_request(before + 1)
    server.client.get("/healthz")
    model.wait_closed(request, PATIENCE)


# -- gevent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False])
def test_gevent_serves(tmp_path: Path, model: ModelServer, nothing: str, ours: bool) -> None:
    env = model_env(model, AGENTAO_DISCONNECT_GRACE="0.3")
    with Server(tmp_path, "-k", "gevent", conf=OURS if ours else nothing, **env) as server:
        works(server, model)
        notices_who_left(server, model)
        assert not said(server, "MonkeyPatchWarning") and not said(server, "Traceback")
        assert not said(server, "one request at a time")


def test_gevent_serves_while_it_waits_for_postgresql(
    tmp_path: Path, model: ModelServer, nothing: str, postgres_url: str
) -> None:
    """What one request waits for in the database stops no other of its worker."""
    env = model_env(model, AGENTAO_DATABASE_URL=postgres_url, AGENTAO_DISCONNECT_GRACE="0.3")
    page: dict[str, t.Any] = {}

    def ask() -> None:
        page.update(server.client.get("/sessions").json())

    with (
        psycopg.connect(postgres_url) as other,
        Server(tmp_path, "-k", "gevent", conf=OURS, **env) as server,
    ):
        works(server, model)
        notices_who_left(server, model)
        other.execute("LOCK TABLE agentao_sessions IN ACCESS EXCLUSIVE MODE")
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            eventually(lambda: waiting(other) > 0, "nobody waits for the database")
            assert server.client.get("/healthz").status_code == 200
            assert thread.is_alive() and not page, "that was answered meanwhile"
        finally:
            other.rollback()
            thread.join(PATIENCE)
        assert page["sessions"]
        assert not said(server, "Traceback")


def waiting(connection: psycopg.Connection[t.Any]) -> int:
    """How many statements wait for a lock."""
    found = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    return t.cast(int, found[0] if found else 0)


def test_gevent_tells_many_readers_the_end(tmp_path: Path, model: ModelServer) -> None:
    ends: list[str] = []

    def read() -> None:
        with server.client.stream(
            "GET", "/chat/s/events?follow=1", headers={"Accept": "text/event-stream"}
        ) as response:
            begun.release()
            for line in response.iter_lines():
                if '"type":"done"' in line:
                    ends.append(line)
                    return

    begun = threading.Semaphore(0)
    env = model_env(model, AGENTAO_MAX_STREAMS_PER_USER="90")
    with Server(tmp_path, "-k", "gevent", conf=OURS, **env) as server:
        server.post("s", "hang")
        threads = [threading.Thread(target=read) for _ in range(90)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=PATIENCE)
        assert server.client.post("/chat/s/cancel").json()["cancelled"] == 1
        for thread in threads:
            thread.join(PATIENCE)
    assert len(ends) == 90


def test_gevent_that_patches_too_late_is_refused_with_the_cure(tmp_path: Path) -> None:
    """Our hooks are imported by a config that chooses gevent only afterwards."""
    conf = tmp_path / "conf.py"
    conf.write_text(
        "from agentao_web.workers import post_worker_init, worker_exit, worker_int\n"
        'worker_class = "gevent"\n'
    )
    with pytest.raises(AssertionError, match=r"monkey\.patch_all\(\)"):
        Server(tmp_path, conf=str(conf), AGENTAO_DEMO="1")
    conf.write_text("from gevent import monkey\nmonkey.patch_all()\n" + conf.read_text())
    with Server(tmp_path, conf=str(conf), AGENTAO_DEMO="1") as server:
        assert server.ask("s", "say hi")["reply"] == "hi"


def test_gevent_that_patches_an_application_it_preloaded_answers_nothing(tmp_path: Path) -> None:
    """Its greenlets would share what each thread has of its own: whose call to the model it is."""
    conf = tmp_path / "conf.py"
    conf.write_text('worker_class = "gevent"\npreload_app = True\n')
    with Server(tmp_path, conf=str(conf), answers=500, AGENTAO_DEMO="1") as server:
        refused = server.post("s", "say hi")
        assert refused.status_code == 500 and "Its log says" in refused.json()["message"]
        assert len(said(server, "agentao-web was imported before gevent patched")) == 1


# -- one request at a time ---------------------------------------------------------------------


def test_a_sync_worker_says_once_what_to_do_and_nothing_hangs(
    tmp_path: Path, model: ModelServer, nothing: str
) -> None:
    with Server(tmp_path, conf=nothing, **model_env(model)) as server:
        with server.stream("s", "say hello world") as stream:
            assert list(stream)[-1]["reply"] == "hello world"
        # It would wait for the next turn for minutes, and nobody could start one.
        with server.follow("s", "?follow=1") as stream:
            list(stream)
        assert stream.retry is not None
        # Nor can it be answered while the stream of the question stays.
        with server.stream("s", WRITE) as stream:
            asked = [e for e in stream if e["type"] == "tool_confirmation"]
        assert stream.retry is not None and len(asked) == 1
        yes = {"question_id": asked[0]["data"]["question_id"], "approve": True}
        assert server.client.post("/chat/s/answer", json=yes).status_code == 200
        with server.follow("s", Last_Event_ID=str(asked[0]["seq"])) as stream:
            assert list(stream)[-1]["reply"] == "written"
        # A turn that takes longer than Gunicorn's patience: cut, not killed, and it goes on.
        worker = server.workers()
        with server.stream("s", "hang") as stream:
            assert [e["type"] for e in stream] == ["turn_begin"]
        assert stream.retry is not None
        page = server.client.get("/chat/s/events?wait=25").json()
        assert page["state"] == "running"
        assert server.client.post("/chat/s/cancel").json()["cancelled"] == 1
        assert server.workers() == worker, "nobody was killed"
        (line,) = said(server, "one request at a time")
        assert "gunicorn -c python:agentao_web.workers" in line


# -- the others --------------------------------------------------------------------------------


def test_waitress_serves_and_cannot_see_who_left(tmp_path: Path, model: ModelServer) -> None:
    command = [str(BIN / "waitress-serve"), "--listen=127.0.0.1:PORT", "--threads=16"]
    env = model_env(model, AGENTAO_DISCONNECT_GRACE="0", AGENTAO_HEARTBEAT="0.5")
    with Server(tmp_path, command=[*command, "wsgi_app:app"], **env) as server:
        works(server, model)
        # Only a write that fails tells: one heartbeat, and the grace.
        notices_who_left(server, model)
        assert not said(server, "one request at a time")
        with server.stream("end", "hang") as stream:
            stream.until("turn_begin")
            server.signal(signal.SIGTERM)
            with pytest.raises(Exception, match=r"peer closed|without done|reset"):
                stream.until("done")


def test_flask_run_serves_and_does_not_drain(tmp_path: Path, model: ModelServer) -> None:
    command = [sys.executable, "-m", "flask", "--app", "wsgi_app:app", "run", "--port", "PORT"]
    env = model_env(model, AGENTAO_DISCONNECT_GRACE="0.3")
    with Server(tmp_path, command=command, **env) as server:
        works(server, model)
        notices_who_left(server, model)
        assert not said(server, "one request at a time")
        with server.stream("end", "hang") as stream:
            stream.until("turn_begin")
            server.signal(signal.SIGTERM)
            with pytest.raises(Exception, match=r"peer closed|without done|reset"):
                stream.until("done")


def test_flask_run_without_threads_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flask", "--app", "wsgi_app:app", "run", "--port", "PORT"]
    with Server(tmp_path, command=[*command, "--without-threads"], AGENTAO_DEMO="1") as server:
        with server.stream("s", "say hi") as stream:
            assert list(stream)[-1]["reply"] == "hi"
        (line,) = said(server, "one request at a time")
        assert "without --without-threads" in line
