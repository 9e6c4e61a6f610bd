"""Clients in conversation through nginx and two workers, while those are reloaded and killed.

    python -m bench.soak [--seconds 600] [--clients 24]

Two parts of the same length. In the first workers are reloaded and killed; in the second nobody
touches them, and their memory, threads and descriptors are looked at. Prints Markdown, and exits 1
if a turn was lost, a request went unanswered, or something grew.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc as cabc
import json
import random
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import typing as t
from pathlib import Path

import httpx

from tests.live.clients import WAYS
from tests.live.clients import Lost
from tests.live.clients import Talker
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.nginx import Nginx
from tests.model_server import ModelServer

#: Turns of a session before its client compares what it was told, and begins another.
_TURNS: t.Final = 25
#: Seconds between two interventions.
_EVERY: t.Final = 10.0
#: Seconds workers get to grow to their working size before the second part is measured.
_WARM: t.Final = 0.25
#: What a worker may grow by in the second part: KiB, threads, descriptors.
ALLOWED: t.Final = {"KiB": 48 * 1024, "threads": 12, "descriptors": 24}

_WORDS: t.Final = "tokens 40 200"
_ANSWER: t.Final = 40


class Soaker(Talker):
    """A client that reads, asks for files to be written, cancels, leaves and comes back."""

    def __init__(self, http: httpx.Client, number: int) -> None:
        self.random = random.Random(number)
        self.number = number
        self.session = 0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.answered = 0
        self.left = 0
        self._leaves = self._overtakes = False
        self._overtaken_by: str | None = None
        super().__init__(http, self._sid(), WAYS[number % len(WAYS)])

    def _sid(self) -> str:
        return f"soak-{self.number}-{self.session}"

    def act(self) -> None:
        """One turn of some kind, and what must be true of it."""
        acts = [self.listen, self.ask, self.write, self.cancel, self.leave, self.overtake]
        self.random.choice(acts)()
        if len(self.ends) >= _TURNS:
            self.renew()

    def listen(self) -> None:
        turn = self._told(self.say(_WORDS))
        if turn is not None and self.text_of(turn).count("tok") != _ANSWER:
            raise Lost(f"{self.sid}: {self.text_of(turn)!r}")

    def ask(self) -> None:
        # Longer than a session stays in memory, now and then.
        time.sleep(self.random.choice((0.0, 0.1, 2.5)))
        end = self.say("say all is well")
        if self._told(end) is not None and end["reply"] != "all is well":
            raise Lost(f"{self.sid}: {end}")

    def write(self) -> None:
        """A tool that has to be approved, which ``_note`` does."""
        name = f"{self.sid}.txt"
        call = json.dumps({"file_path": name, "content": f"turn {len(self.ends)}"})
        self._told(self.say(f"call write_file {call}\nsay written"))

    def cancel(self) -> None:
        """``_note`` cancels at the first words."""
        end = self.say("hang_after some words")
        if end["type"] == "done" and end["data"]["status"] != "cancelled":
            raise Lost(f"{self.sid}: {end}")
        self.outcomes["cancelled"] += end["type"] == "done"
        self.outcomes["worker_lost"] += end["type"] == "error"

    def leave(self) -> None:
        """Hang up after the first words, and come back by the cursor."""
        self.left += 1
        way, self.way, self._leaves = self.way, "stream", True
        try:
            self.listen()
        finally:
            self.way, self._leaves = way, False

    def overtake(self) -> None:
        """A second message in the middle of an answer, which interrupts it."""
        # A stream of the first turn alone would not have the second one's ``turn_queued``.
        way, self.way, self._overtakes = self.way, "follow", True
        self._told(self.say("tokens 400 100"), "interrupted")
        turn, self._overtaken_by = self._overtaken_by, None
        self._overtakes = False
        until = time.monotonic() + self.patience
        while turn is not None and turn not in self.ends:
            self._check(until, "no end of a turn that interrupts")
            self._read(turn)
        self.way = way
        if turn is not None:
            self._told(self.ends[turn])

    def renew(self) -> None:
        """What was told is what is kept; then another session."""
        self.check()
        self._check_messages()
        self._asked("DELETE", f"/session/{self.sid}")
        self.session += 1
        fresh = Talker(self.http, self._sid(), self.way)
        self.sid, self.cursor, self.events, self.ends = fresh.sid, 0, fresh.events, fresh.ends

    def _check_messages(self) -> None:
        """Every message once, none twice."""
        url = f"/session/{self.sid}/messages?limit=200"
        response = self._asked("GET", url)
        found = response.json()["messages"]
        mine = [entry["turn_id"] for entry in found if entry["role"] == "user"]
        # One whose worker was killed while it was queued never was said.
        begun = {e["turn_id"] for e in self.events if e["type"] == "turn_begin"}
        if len(mine) != len(set(mine)) or not begun <= set(mine) <= set(self.ends):
            raise Lost(f"{self.sid}: {len(mine)} messages kept of {len(self.ends)}")

    def _told(self, end: dict[str, t.Any], reason_too: str | None = None) -> str | None:
        """The turn if it was completed; Lost for an end nobody can explain."""
        if end["type"] == "error":
            code = end["error"]["code"]
            self.outcomes[code] += 1
            if code not in ("worker_lost", "store_unavailable"):
                raise Lost(f"{self.sid}: {end}")
            return None
        reason = end["data"]["reason"]
        self.outcomes[reason or "completed"] += 1
        if reason not in (None, "server_shutdown", reason_too):
            raise Lost(f"{self.sid}: {end}")
        return None if reason else str(end["turn_id"])

    # -- while it reads ------------------------------------------------------------------------

    def _take(self, response: httpx.Response) -> None:
        if not self._leaves:
            return super()._take(response)
        for line in response.iter_lines():
            if line.startswith("data: "):
                self._up()
                self._note(json.loads(line[6:]))
                if self.events[-1]["type"] == "llm_text":
                    break
        self._leaves = False
        return None

    def _note(self, event: dict[str, t.Any]) -> None:
        super()._note(event)
        if event["type"] == "tool_confirmation":
            body = {"question_id": event["data"]["question_id"], "approve": True}
            self.answered += self._send("/answer", body).status_code == 200
        elif event["type"] != "llm_text":
            return
        elif event["data"]["chunk"].startswith("some"):
            self._send("/cancel", {})
        elif self._overtakes:
            self._overtakes = False
            body = {"message": "say next", "on_busy": "interrupt"}
            response = self._send("", body, secrets.token_hex(8))
            if response.status_code == 202:
                self._overtaken_by = response.json()["turn_id"]

    def _send(self, what: str, body: dict[str, t.Any], key: str | None = None) -> httpx.Response:
        """A small request beside the one that reads."""
        keys = {"Idempotency-Key": key} if key else {}
        return self._asked("POST", f"/chat/{self.sid}{what}", json=body, headers=keys)

    def _asked(self, method: str, url: str, **more: t.Any) -> httpx.Response:
        """Ask again while the session's worker is away."""
        until = time.monotonic() + self.patience
        more["headers"] = {"Accept": "application/json", **more.get("headers", {})}
        while True:
            self._check(until, f"{method} {url} is not answered")
            try:
                response = self.http.request(method, url, **more)
            except httpx.TransportError as exc:
                self._break(exc)
                continue
            if response.status_code < 500:
                return response
            self.refused[response.status_code] += 1
            time.sleep(0.2)


# -- the run -----------------------------------------------------------------------------------


class Soak:
    """Clients on threads of their own, and what happened to the workers meanwhile."""

    def __init__(self, server: Server, clients: list[Soaker]) -> None:
        self.server = server
        self.clients = clients
        self.failures: list[str] = []
        self.kills = 0
        self.reloads = 0
        self._over = threading.Event()

    def run(self, seconds: float) -> dict[int, tuple[Sizes, Sizes]]:
        """Both parts; for each worker of the second one its sizes at the begin and the end."""
        threads = [threading.Thread(target=self._talk, args=(one,)) for one in self.clients]
        for thread in threads:
            thread.start()
        try:
            self._trouble(seconds / 2)
            return self._calm(seconds / 2)
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _talk(self, client: Soaker) -> None:
        try:
            while not (self._over.is_set() or self.failures):
                client.act()
            if client.ends:
                client.renew()
        except Exception as exc:
            self.failures.append(f"{client.sid}: {exc!r}")
            self._over.set()

    def _trouble(self, seconds: float) -> None:
        chance = random.Random(0)
        until = time.monotonic() + seconds
        while time.monotonic() + _EVERY < until and not self._over.wait(_EVERY):
            old = self.server.workers()
            if self.kills > self.reloads:
                self.reloads += 1
                self.server.signal(signal.SIGHUP)
                self._until(lambda old=old: not set(old) & set(self.server.workers()))
            else:
                self.kills += 1
                victim = chance.choice(old)
                self.server.signal(signal.SIGKILL, victim)
                self._until(lambda victim=victim: victim not in self.server.workers())
        self._over.wait(max(0.0, until - time.monotonic()))

    def _until(self, condition: cabc.Callable[[], bool]) -> None:
        eventually(lambda: self._over.is_set() or condition(), "the workers are not replaced")

    def _calm(self, seconds: float) -> dict[int, tuple[Sizes, Sizes]]:
        self._over.wait(seconds * _WARM)
        if self._over.is_set():
            return {}
        before = {pid: sizes(pid) for pid in self.server.workers()}
        self._over.wait(seconds * (1 - _WARM))
        return {pid: (size, sizes(pid)) for pid, size in before.items()}


Sizes = dict[str, int]


def sizes(pid: int) -> Sizes:
    """Resident memory, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "KiB": int(status.split("VmRSS:")[1].split()[0]),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def soak(folder: Path, *, seconds: float, clients: int) -> Report:
    """Run it below *folder*, which is empty."""
    settings = {
        "AGENTAO_SESSION_TTL": "2",
        "AGENTAO_DRAIN_GRACE": "5",
        "AGENTAO_MAX_TURNS": str(4 * clients),
        "AGENTAO_MAX_STREAMS_PER_USER": "120",
        "AGENTAO_MAX_STREAMS_PER_TENANT": "120",
    }
    with (
        ModelServer() as model,
        Server(folder, "--threads", "128", addresses=2, **model_env(model, **settings)) as server,
        Nginx(folder, server.upstreams) as nginx,
        nginx.client(limits=httpx.Limits(max_connections=None)) as http,
    ):
        run = Soak(server, [Soaker(http, n) for n in range(clients)])
        grown = run.run(seconds)
        model.release()
        return Report(run, grown, server.log.read_text())


class Report:
    """What a run showed."""

    def __init__(self, run: Soak, grown: dict[int, tuple[Sizes, Sizes]], log: str) -> None:
        clients, tracebacks = run.clients, log.count("Traceback")
        self.outcomes = sum((one.outcomes for one in clients), collections.Counter[str]())
        self.refused = sum((one.refused for one in clients), collections.Counter[int]())
        self.grown = grown
        self.rows: list[tuple[str, t.Any]] = [
            ("clients", len(clients)),
            ("turns", sum(self.outcomes.values())),
            *((f"- ended {name}", n) for name, n in self.outcomes.most_common()),
            ("sessions compared with what is kept", sum(one.session for one in clients)),
            ("approvals answered", sum(one.answered for one in clients)),
            ("streams left and resumed", sum(one.left for one in clients)),
            ("kill -9; reloads", f"{run.kills}; {run.reloads}"),
            *((f"answers {status}, asked again", n) for status, n in sorted(self.refused.items())),
            ("connections that broke", sum(len(one.broken) for one in clients)),
            ("longest time nothing worked", f"{max(one.pause for one in clients):.1f} s"),
            ("longest turn", f"{max(one.slowest for one in clients):.1f} s"),
            ("tracebacks in the log", tracebacks),
        ]
        for number, (before, after) in enumerate(grown.values(), 1):
            for name, size in before.items():
                self.rows.append(
                    (f"worker {number}, second part: {name}", f"{size} -> {after[name]}")
                )
        self.wrong = [*run.failures]
        # What the server says of the turns that were lost.
        turns = {word for line in run.failures for word in re.findall(r"[0-9a-f]{32}", line)}
        self.wrong += [line for line in log.splitlines() if any(turn in line for turn in turns)]
        if tracebacks:
            self.wrong.append(f"{tracebacks} tracebacks")
        for before, after in grown.values():
            self.wrong += [
                f"{name} grew from {before[name]} to {after[name]}"
                for name, most in ALLOWED.items()
                if after[name] > before[name] + most
            ]

    def __str__(self) -> str:
        head = ["| what | seen |", "|---|---|"]
        return "\n".join([*head, *(f"| {name} | {value} |" for name, value in self.rows)])


def main(arguments: cabc.Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=24)
    told = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), seconds=told.seconds, clients=told.clients)
    print(report)
    for line in report.wrong:
        print(line, file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
