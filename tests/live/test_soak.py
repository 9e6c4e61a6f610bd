"""A minute of conversing clients that cancel, leave, interrupt and delete: nothing grows."""

from __future__ import annotations

import random
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
from tests.model_server import ModelServer

pytestmark = [pytest.mark.live, pytest.mark.long]

SECONDS = 60.0
CLIENTS = 12


class Conversation:
    """One client and its session; counts what it saw, and keeps what it must not see."""

    def __init__(self, server: Server, number: int) -> None:
        self.server = server
        self.sid = f"soak-{number}"
        self.random = random.Random(number)
        self.turns = 0
        self.wrong: list[str] = []

    def converse(self, until: float) -> None:
        acts = (
            self.read_it,
            self.read_it,
            self.ask,
            self.cancel,
            self.leave,
            self.queue,
            self.delete,
        )
        while time.monotonic() < until and not self.wrong:
            try:
                self.random.choice(acts)()
            except Exception as exc:
                self.wrong.append(f"{self.sid}: {exc!r}")

    def settle(self) -> None:
        """Wait until nothing runs here."""
        self.server.client.post(f"/chat/{self.sid}/cancel")
        eventually(lambda: self.state() in ("idle", None), f"{self.sid} does not settle")

    def state(self) -> str | None:
        response = self.server.client.get(f"/session/{self.sid}")
        return response.json()["state"] if response.status_code == 200 else None

    def read_it(self) -> None:
        """A stream read to its end: whole, in order, ended once."""
        self.settle()
        with self.server.stream(self.sid, "tokens 40 400") as stream:
            events = list(stream)
        self.turns += 1
        seqs = [e["seq"] for e in events]
        text = "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text")
        ends = [e for e in events if e["type"] in ("done", "error")]
        if seqs != sorted(set(seqs)) or text.count("tok") != 40 or len(ends) != 1:
            self.wrong.append(f"{self.sid}: {[e['type'] for e in events]}")

    def ask(self) -> None:
        self.settle()
        body = self.server.ask(self.sid, "say all is well")
        self.turns += 1
        if body.get("reply") != "all is well":
            self.wrong.append(f"{self.sid}: {body}")

    def cancel(self) -> None:
        self.settle()
        with self.server.stream(self.sid, "hang_after some words") as stream:
            stream.until("turn_begin")
            self.server.client.post(f"/chat/{self.sid}/cancel")
            end = stream.until("done")
        self.turns += 1
        if end["data"]["reason"] != "cancelled_by_user":
            self.wrong.append(f"{self.sid}: {end}")

    def leave(self) -> None:
        self.settle()
        with self.server.stream(self.sid, "tokens 400 100") as stream:
            stream.until("turn_begin")
        self.turns += 1

    def queue(self) -> None:
        self.settle()
        self.server.post(self.sid, "tokens 20 200")
        for kind in ("queue", "interrupt"):
            self.server.post(self.sid, "say next", on_busy=kind)
        self.turns += 3

    def delete(self) -> None:
        self.server.client.delete(f"/session/{self.sid}")


def sizes(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "KiB": int(status.split("VmRSS:")[1].split()[0]),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def test_a_minute_of_everything_leaves_nothing_behind(tmp_path: Path) -> None:
    with ModelServer() as model:
        env = model_env(model, AGENTAO_DISCONNECT_GRACE="0.2", AGENTAO_SESSION_TTL="2")
        with Server(tmp_path, "--threads", "64", **env) as server:
            server.client.close()
            limits = httpx.Limits(max_connections=None)
            server.client = httpx.Client(
                base_url=server.url,
                headers=server.client.headers,
                timeout=PATIENCE,
                limits=limits,
                trust_env=False,
            )
            (worker,) = server.workers()
            _talk(server, 5.0)
            before = sizes(worker)
            talks = _talk(server, SECONDS)
            for talk in talks:
                talk.settle()
            after = sizes(worker)
            print(before, after, "turns:", sum(talk.turns for talk in talks))
            assert [w for talk in talks for w in talk.wrong] == []
            assert after["threads"] <= before["threads"] + 8
            assert after["descriptors"] <= before["descriptors"] + 20
            assert after["KiB"] < before["KiB"] + 64 * 1024
            assert "Traceback" not in server.log.read_text()


def _talk(server: Server, seconds: float) -> list[t.Any]:
    talks = [Conversation(server, n) for n in range(CLIENTS)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=talk.converse, args=(until,)) for talk in talks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 4 * PATIENCE)
    return talks
