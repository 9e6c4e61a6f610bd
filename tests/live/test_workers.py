"""Several real workers on one port, and workers that are killed, stopped and restarted."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import os
import random
import signal
import threading
import time
import typing as t
from pathlib import Path

import httpx
import pytest

from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.harness import token
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

#: Long enough that a worker that lives is never late with its sign of life.
LEASE = "5"


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


class Client:
    """Every request on a connection of its own, so that any worker may get it."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.headers = {"Authorization": f"Bearer {token()}", "Accept": "application/json"}

    def request(self, method: str, path: str, **options: t.Any) -> httpx.Response:
        headers = self.headers | options.pop("headers", {})
        return httpx.request(
            method, self.url + path, headers=headers, timeout=PATIENCE, trust_env=False, **options
        )

    def ask(self, sid: str, message: str, **fields: t.Any) -> dict[str, t.Any]:
        response = self.request(
            "POST",
            f"/chat/{sid}",
            json={"message": message, **fields},
            headers={"Prefer": "wait=50"},
        )
        assert response.status_code == 200, response.text
        return t.cast(dict[str, t.Any], response.json())

    def begin(self, sid: str, message: str, **fields: t.Any) -> dict[str, t.Any]:
        response = self.request("POST", f"/chat/{sid}", json={"message": message, **fields})
        assert response.status_code == 202, response.text
        return t.cast(dict[str, t.Any], response.json())

    def read(self, sid: str, cursor: int = 0) -> list[dict[str, t.Any]]:
        """Long-poll from *cursor* until the session is idle, over whatever happens to workers."""
        events: list[dict[str, t.Any]] = []
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                response = self.request("GET", f"/chat/{sid}/events?after={cursor}&wait=2")
            except httpx.TransportError:
                continue
            if response.status_code != 200:
                continue
            page = response.json()
            events += page["events"]
            cursor = page["cursor"]
            if page["state"] == "idle" and not page["events"]:
                return events
        raise AssertionError(f"never idle: {events[-3:]}")


def texts(request: t.Any) -> list[str]:
    """What the model was told, as text, without what Agentao adds to it."""
    return [json.dumps(m.get("content")) for m in request.body["messages"] if m["role"] == "user"]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_long_conversation_with_any_workers_is_never_forgotten(
    tmp_path: Path, model: ModelServer, workers: int
) -> None:
    turns = 200
    with Server(tmp_path, "--workers", str(workers), **model_env(model)) as server:
        client = Client(server)
        for n in range(turns):
            body = client.ask("s", f"say answer-{n}-.")
            assert body["reply"] == f"answer-{n}-."
        told = json.dumps(model.requests[-1].body["messages"])
        for n in range(turns):
            assert told.count(f"answer-{n}-.") == (2 if n < turns - 1 else 1), (
                "not forgotten, not twice"
            )
        assert model.connections >= 2, "more than one worker took part"
        events = client.read("s")
        seqs = [e["seq"] for e in events]
        assert seqs == sorted(set(seqs))
        assert len([e for e in events if e["type"] == "done"]) == turns


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_everything_works_at_any_worker(tmp_path: Path, model: ModelServer, kind: str) -> None:
    with Server(tmp_path, "-k", kind, "--workers", "4", **model_env(model)) as server:
        client = Client(server)
        for n in range(12):
            started = client.begin(f"s{n}", "hang_after some words")
            assert client.request("GET", f"/session/s{n}").json()["state"] == "running"
            queued = client.begin(f"s{n}", "say queued", on_busy="queue")
            begun = time.monotonic()
            cancelled = client.request("POST", f"/chat/s{n}/cancel").json()["cancelled"]
            assert cancelled == 2
            events = client.read(f"s{n}", started["cursor"])
            assert time.monotonic() - begun < PATIENCE
            ends = {e["turn_id"]: e["data"]["reason"] for e in events if e["type"] == "done"}
            assert ends[started["turn_id"]] == "cancelled_by_user"
            assert ends.get(queued["turn_id"], "cancelled_by_user") == "cancelled_by_user"
            client.begin(f"s{n}", "hang")
            interrupting = client.request(
                "POST",
                f"/chat/s{n}",
                json={"message": "say instead", "on_busy": "interrupt"},
                headers={"Prefer": "wait=50"},
            )
            assert interrupting.json()["reply"] == "instead"
            assert client.request("DELETE", f"/session/s{n}").json() == {"ok": True}
            assert client.request("GET", f"/session/s{n}").status_code == 404


class Desk:
    """A client whose requests all go to one worker, as long as its connection is kept."""

    def __init__(self, server: Server) -> None:
        headers = {"Authorization": f"Bearer {token()}", "Accept": "application/json"}
        self._client = httpx.Client(
            base_url=server.url,
            headers=headers,
            timeout=PATIENCE,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=None),
        )
        self._server = server
        self.pid = self._worker(self._client.get("/healthz"))

    def _worker(self, response: httpx.Response) -> int:
        """Who has the other end of the connection *response* came by."""
        mine = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        ends = (f":{self._server.port:04X}", f":{mine:04X}")
        return next(pid for pid in self._server.workers() if _is_connected(pid, *ends))

    def call(self, method: str, path: str, **options: t.Any) -> httpx.Response:
        response = self._client.request(method, path, **options)
        assert self._worker(response) == self.pid
        return response

    def begin(self, sid: str, message: str, **fields: t.Any) -> dict[str, t.Any]:
        response = self.call("POST", f"/chat/{sid}", json={"message": message, **fields})
        assert response.status_code == 202, response.text
        return t.cast(dict[str, t.Any], response.json())

    def until(self, sid: str, cursor: int, turn_id: str, *kinds: str) -> dict[str, t.Any]:
        """The first event of one of *kinds* of that turn."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            page = self.call("GET", f"/chat/{sid}/events?after={cursor}&wait=5").json()
            for event in page["events"]:
                if event["type"] in kinds and event["turn_id"] == turn_id:
                    return t.cast(dict[str, t.Any], event)
            cursor = page["cursor"]
        raise AssertionError(f"no {kinds} was to be read")

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def desk_at_every_worker(server: Server, workers: int) -> cabc.Iterator[list[Desk]]:
    """One client for each worker; the kernel decides which one a connection goes to."""
    made: list[Desk] = []
    found: dict[int, Desk] = {}

    def complete() -> bool:
        desk = Desk(server)
        made.append(desk)
        found.setdefault(desk.pid, desk)
        return len(found) == workers

    try:
        eventually(complete, "some worker never gets a connection")
        yield list(found.values())
    finally:
        for desk in made:
            desk.close()


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_what_one_worker_runs_each_may_read_stop_follow_and_answer(
    tmp_path: Path, model: ModelServer, workers: int
) -> None:
    ends = ("done", "error")
    with (
        Server(tmp_path, "--workers", str(workers), **model_env(model)) as server,
        desk_at_every_worker(server, workers) as desks,
    ):
        here = desks[0]
        for n, there in enumerate(desks):
            # Read, and cancel.
            turn = here.begin(f"c{n}", "hang_after some words")
            sid, cursor, turn_id = turn["session_id"], turn["cursor"], turn["turn_id"]
            there.until(sid, cursor, turn_id, "llm_text")
            assert there.call("POST", f"/chat/{sid}/cancel").json()["cancelled"] == 1
            for desk in (here, there):
                end = desk.until(sid, cursor, turn_id, *ends)
                assert end["data"]["reason"] == "cancelled_by_user"
            # Interrupt.
            old = here.begin(sid, "hang_after some words")
            new = there.begin(sid, "say instead", on_busy="interrupt")
            end = there.until(sid, old["cursor"], old["turn_id"], *ends)
            assert end["data"]["reason"] == "interrupted"
            end = here.until(sid, old["cursor"], new["turn_id"], *ends)
            assert end["reply"] == "instead"
            # Queue.
            first = here.begin(sid, "tokens 20 20")
            second = there.begin(sid, "say second", on_busy="queue")
            assert second["status"] == "queued"
            assert there.until(sid, first["cursor"], second["turn_id"], *ends)["reply"] == "second"
            page = here.call("GET", f"/chat/{sid}/events?after={first['cursor']}").json()
            told = [e["turn_id"] for e in page["events"] if e["type"] != "turn_queued"]
            last = len(told) - told[::-1].index(first["turn_id"])
            assert second["turn_id"] not in told[:last], "one after the other"
            # Answer.
            turn = here.begin(sid, 'call write_file {"file_path": "a.txt", "content": "x"}\nsay ok')
            question = there.until(sid, turn["cursor"], turn["turn_id"], "tool_confirmation")
            given = {"question_id": question["data"]["question_id"], "approve": True}
            assert there.call("POST", f"/chat/{sid}/answer", json=given).status_code == 200
            assert there.until(sid, turn["cursor"], turn["turn_id"], *ends)["reply"] == "ok"
            # Delete.
            here.begin(sid, "hang_after some words")
            assert there.call("DELETE", f"/session/{sid}").json() == {"ok": True}
            for desk in desks:
                assert desk.call("GET", f"/session/{sid}").status_code == 404


def end_of(client: Client | Desk, turn: dict[str, t.Any]) -> dict[str, t.Any]:
    """The only end of a turn for a client that polls; it is not told before that nothing runs."""
    ask = client.request if isinstance(client, Client) else client.call
    sid, cursor, until = turn["session_id"], turn["cursor"], time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            response = ask("GET", f"/chat/{sid}/events?after={cursor}&wait=2")
        except httpx.TransportError:
            continue  # That worker is just leaving.
        if response.status_code != 200:
            continue
        page = response.json()
        cursor = page["cursor"]
        ends = [e for e in page["events"] if e["type"] in ("done", "error")]
        mine = [e for e in ends if e["turn_id"] == turn["turn_id"]]
        if mine:
            assert len(mine) == 1 and mine[0]["seq"] is not None
            return t.cast(dict[str, t.Any], mine[0])
        assert page["state"] != "idle" or page["events"], "idle, and its end was not told"
    raise AssertionError("its end was never told")


def one_end_each(client: Client, sid: str, turns: cabc.Iterable[dict[str, t.Any]]) -> None:
    events = [e for e in client.read(sid) if e["type"] in ("done", "error")]
    assert sorted(e["turn_id"] for e in events) == sorted(turn["turn_id"] for turn in turns)


def gone(server: Server, at: Desk, sid: str) -> dict[str, t.Any]:
    """A turn that waits at that desk's worker, whose client streams it, and hangs up."""
    made: list[Desk] = []

    def complete() -> bool:
        made.append(Desk(server))
        return made[-1].pid == at.pid

    eventually(complete, "no connection to that worker")
    body = {"message": "say later", "on_busy": "queue"}
    headers = {"Accept": "text/event-stream"}
    with made[-1]._client.stream("POST", f"/chat/{sid}", json=body, headers=headers) as response:
        assert response.status_code == 200
        queued = at.call("GET", f"/session/{sid}").json()["queued"][0]
    for desk in made:
        desk.close()
    return {"session_id": sid, "turn_id": queued["turn_id"], "cursor": queued["cursor"]}


def test_a_queued_turn_that_ends_is_told_whoever_holds_the_session(
    tmp_path: Path, model: ModelServer
) -> None:
    """Its worker may not write to the log: the one that holds the session does."""
    env = model_env(model, AGENTAO_DISCONNECT_GRACE="0.2", AGENTAO_DRAIN_GRACE="3")
    with (
        Server(tmp_path, "--workers", "2", **env) as server,
        desk_at_every_worker(server, 2) as (here, there),
    ):
        client = Client(server)
        # Its client goes, while the other turn runs on.
        first = here.begin("left", "hang_after some words")
        here.until("left", first["cursor"], first["turn_id"], "llm_text")
        second = gone(server, there, "left")
        for desk in (here, there):
            assert end_of(desk, second)["data"]["reason"] == "client_gone"
        running = here.call("GET", "/session/left").json()
        assert (running["turn"]["turn_id"], running["queued"]) == (first["turn_id"], [])
        # Both are cancelled, by either worker.
        for n, desk in enumerate((here, there)):
            both = [here.begin(f"c{n}", "hang_after some words")]
            both.append(there.begin(f"c{n}", "hang_after more", on_busy="queue"))
            assert desk.call("POST", f"/chat/c{n}/cancel").json()["cancelled"] == 2
            for turn in both:
                for reader in (here, there):
                    assert end_of(reader, turn)["data"]["reason"] == "cancelled_by_user"
            one_end_each(client, f"c{n}", both)
        # The session is deleted.
        here.begin("d", "hang_after some words")
        there.begin("d", "say later", on_busy="queue")
        assert here.call("DELETE", "/session/d").json() == {"ok": True}
        for desk in (here, there):
            assert desk.call("GET", "/session/d").status_code == 404
        # Its worker leaves, while the other turn runs on.
        first = here.begin("s", "hang_after some words")
        here.until("s", first["cursor"], first["turn_id"], "llm_text")
        second = there.begin("s", "hang_after more", on_busy="queue")
        server.signal(signal.SIGTERM, there.pid)
        assert end_of(here, second)["data"]["reason"] == "server_shutdown"
        # All of them do.
        eventually(lambda: len(server.workers()) == 2, "no new worker comes")
        third = client.begin("s", "say at last", on_busy="queue")
        server.signal(signal.SIGHUP)
        assert end_of(client, first)["type"] == "done"
        assert end_of(client, third)["data"]["reason"] in (None, "server_shutdown")
        one_end_each(client, "s", [first, second, third])


@pytest.mark.long
def test_a_restart_forgets_nothing(tmp_path: Path, model: ModelServer) -> None:
    with Server(tmp_path, **model_env(model)) as server:
        client = Client(server)
        client.ask("s", "say remember-this")
        before = client.read("s")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    with Server(tmp_path, **model_env(model)) as server:
        client = Client(server)
        assert client.read("s") == before
        client.ask("s", "say and")
        assert "remember-this" in json.dumps(model.requests[-1].body)
        assert client.request("GET", "/sessions").json()["sessions"][0]["session_id"] == "s"
    database = tmp_path / "root" / "agentao-web.db"
    assert database.stat().st_mode & 0o077 == 0


def test_a_killed_workers_turn_is_told_and_the_next_one_works(
    tmp_path: Path, model: ModelServer
) -> None:
    with Server(tmp_path, **model_env(model, AGENTAO_WORKER_LEASE=LEASE)) as server:
        client = Client(server)
        client.ask("s", "say before")
        started = client.begin("s", "hang_after half")
        eventually(lambda: len(model.requests) == 2, "the model is not asked")
        server.signal(signal.SIGKILL, server.workers()[0])
        events = client.read("s", started["cursor"])
        assert events[-1]["error"]["code"] == "worker_lost"
        assert client.ask("s", "say after")["reply"] == "after"
        told = json.dumps(model.requests[-1].body["messages"])
        assert "before" in told and "hang_after half" in told and "cut off" in told


@pytest.mark.long
def test_a_worker_that_slept_past_its_lease_cannot_write(
    tmp_path: Path, model: ModelServer
) -> None:
    env = model_env(model, AGENTAO_WORKER_LEASE=LEASE)
    with Server(tmp_path, "--workers", "2", "--timeout", "300", **env) as server:
        client = Client(server)
        started = client.begin("s", "hang_after half")
        eventually(lambda: len(model.requests) == 1, "the model is not asked")
        sleeper = next(pid for pid in server.workers() if _speaks_to(pid, model))
        server.signal(signal.SIGSTOP, sleeper)
        try:
            # The kernel may hand a connection to the sleeper: short patience, and again.
            def closed() -> bool:
                try:
                    page = httpx.get(
                        f"{server.url}/chat/s/events?after={started['cursor']}&wait=0",
                        headers=client.headers,
                        timeout=3,
                        trust_env=False,
                    ).json()
                except httpx.TransportError:
                    return False
                return bool(page["events"]) and page["events"][-1]["type"] == "error"

            eventually(closed, "nobody closed the sleeper's turn")
        finally:
            server.signal(signal.SIGCONT, sleeper)
        before = client.read("s")
        model.release()
        assert client.ask("s", "say the other worker went on")["status"] == "completed"
        after = client.read("s")
        assert after[: len(before)] == before, json.dumps([before, after], indent=1)
        assert [e["type"] for e in after if e["type"] in ("done", "error")] == ["error", "done"]


def _speaks_to(pid: int, model: ModelServer) -> bool:
    """Whether that process has a connection to the model's port."""
    port = int(model.base_url.split(":")[2].split("/")[0])
    return _is_connected(pid, "", f":{port:04X}")


def _is_connected(pid: int, local: str, remote: str) -> bool:
    """Whether that process has a connection between two addresses that end so."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(local) and fields[2].endswith(remote) and fields[3] == "01":
            inodes.add(fields[9])
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(fd).removeprefix("socket:[").rstrip("]") in inodes:
                return True
        except OSError:
            continue
    return False


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killing_workers_at_random_moments_loses_nothing_that_was_told(
    tmp_path: Path, model: ModelServer, workers: int
) -> None:
    """No finished turn is missing, no message twice, no half tool pair; every loss is told."""
    rounds = 25
    # A worker that is late with its sign of life here is one more that is lost.
    env = model_env(model, AGENTAO_WORKER_LEASE="1.5", AGENTAO_POLICY="trusted")
    with Server(tmp_path, "--workers", str(workers), **env) as server:
        client = Client(server)
        chance = random.Random(workers)
        stop = threading.Event()

        def assassin() -> None:
            while not stop.wait(chance.uniform(1.0, 7.0)):
                victims = server.workers()
                if not victims:
                    continue
                # One of them, or with three workers all at once.
                for pid in victims if workers == 3 else [chance.choice(victims)]:
                    with contextlib.suppress(ProcessLookupError):
                        server.signal(signal.SIGKILL, pid)

        killer = threading.Thread(target=assassin)
        killer.start()
        told: dict[str, str] = {}
        cursor = 0
        try:
            for n in range(rounds):
                message = (
                    f'call list_directory {{"directory_path": "."}}\ntokens 30 60\nsay end-{n}-.'
                )
                turn_id, cursor = _start(client, message, cursor, told)
                assert turn_id
        finally:
            stop.set()
            killer.join(PATIENCE)
        _settle(client, cursor, told)
        assert set(told.values()) <= {"completed", "failed"}
        assert "completed" in told.values()
        _check_history(client, model, told)


def _start(client: Client, message: str, cursor: int, told: dict[str, str]) -> tuple[str, int]:
    """Start a turn and read until it ended, over dying workers."""
    until = time.monotonic() + PATIENCE
    key = f"key-{len(told)}-{random.random()}"
    while time.monotonic() < until:
        try:
            response = client.request(
                "POST", "/chat/s", json={"message": message}, headers={"Idempotency-Key": key}
            )
        except httpx.TransportError:
            continue
        if response.status_code in (200, 202):
            turn_id = response.json()["turn_id"]
            return turn_id, _settle(client, cursor, told)
        assert response.status_code in (409, 503), response.text
        time.sleep(0.05)  # As Retry-After says, only faster.
    raise AssertionError("no worker takes the turn")


def _settle(client: Client, cursor: int, told: dict[str, str]) -> int:
    events = client.read("s", cursor)
    for event in events:
        if event["type"] in ("done", "error") and event["seq"] is not None:
            assert event["turn_id"] not in told, "ended twice"
            told[event["turn_id"]] = event["data"]["status"]
    return events[-1]["seq"] if events else cursor


def _check_history(client: Client, model: ModelServer, told: dict[str, str]) -> None:
    assert client.ask("s", "say last")["reply"] == "last"
    messages = model.requests[-1].body["messages"]
    open_calls: set[str] = set()
    for message in messages:
        for call in message.get("tool_calls") or []:
            open_calls.add(call["id"])
        if message["role"] == "tool":
            open_calls.discard(message["tool_call_id"])
    assert not open_calls, "half a tool pair"
    page = client.request("GET", "/session/s/messages?limit=200").json()
    entries = list(page["messages"])
    while page["more"]:
        before = page["messages"][0]["id"]
        page = client.request("GET", f"/session/s/messages?limit=200&before={before}").json()
        entries = page["messages"] + entries
    users = [e["turn_id"] for e in entries if e["role"] == "user"]
    assert len(users) == len(set(users)), "no message twice"
    assert set(told) <= set(users), "no turn that was told is missing"
