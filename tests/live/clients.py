"""Clients in conversation: they come back with their cursor, and remember all they were told."""

from __future__ import annotations

import collections
import json
import secrets
import threading
import time
import typing as t

import httpx

#: How a client reads its answers.
WAYS = ("stream", "follow", "poll")


class Lost(AssertionError):
    """Something that was promised did not hold."""


class Talker:
    """One client and its session: a turn at a time, over reloads and dying workers."""

    def __init__(
        self, http: httpx.Client, sid: str, way: str = "stream", *, patience: float = 60.0
    ) -> None:
        self.http = http
        self.sid = sid
        self.way = way
        self.patience = patience
        self.cursor = 0
        self.events: list[dict[str, t.Any]] = []
        """Everything it was told, once."""
        self.ends: dict[str, dict[str, t.Any]] = {}
        """The last event of each turn, by the turn's id."""
        self.refused: collections.Counter[int] = collections.Counter()
        """Answers other than the one that was wanted, by status."""
        self.broken: list[str] = []
        """Connections that ended in the middle."""
        self.pause = 0.0
        """The longest time in which nothing worked, in seconds."""
        self.slowest = 0.0
        """The longest turn, from its POST to its end, in seconds."""
        self._down: float | None = None

    def say(self, message: str) -> dict[str, t.Any]:
        """Have *message* answered: the turn's last event. Lost if that does not come."""
        key = secrets.token_hex(8)
        begun = time.monotonic()
        until = begun + self.patience
        turn = None
        while turn is None:
            self._check(until, "no answer to a POST")
            turn = self._post(message, key)
        while turn not in self.ends:
            self._check(until, "no end of a turn")
            self._read(turn)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        return self.ends[turn]

    def _post(self, message: str, key: str) -> str | None:
        """The turn's id, once it is known that it was taken."""
        sse = self.way == "stream"
        accept = "text/event-stream" if sse else "application/json"
        headers = {"Accept": accept, "Idempotency-Key": key}
        seen = len(self.events)
        try:
            with self.http.stream(
                "POST", f"/chat/{self.sid}", json={"message": message}, headers=headers
            ) as response:
                if response.status_code not in (200, 202):
                    self._refuse(response)
                elif sse:
                    self._take(response)
                else:
                    self._up()
                    return str(json.loads(response.read())["turn_id"])
        except httpx.TransportError as exc:
            self._break(exc)
        return str(self.events[-1]["turn_id"]) if len(self.events) > seen else None

    def _read(self, turn: str) -> None:
        """Read on from the cursor, once."""
        url = f"/chat/{self.sid}/events?after={self.cursor}"
        try:
            if self.way == "poll":
                response = self.http.get(url + "&wait=5", headers={"Accept": "application/json"})
                if response.status_code != 200:
                    return self._refuse(response)
                self._up()
                for event in response.json()["events"]:
                    self._note(event)
                return None
            headers = {"Accept": "text/event-stream"}
            with self.http.stream("GET", url, headers=headers) as response:
                if response.status_code == 204:
                    raise Lost(f"{self.sid}: idle without the end of {turn}")
                if response.status_code != 200:
                    return self._refuse(response)
                self._take(response)
        except httpx.TransportError as exc:
            self._break(exc)
        return None

    def _take(self, response: httpx.Response) -> None:
        for line in response.iter_lines():
            if line.startswith("data: "):
                self._up()
                self._note(json.loads(line[6:]))
            elif line.startswith("retry: "):
                # Told to come back: that is no break.
                time.sleep(int(line[7:]) / 1000)

    def _note(self, event: dict[str, t.Any]) -> None:
        seq = event["seq"]
        if seq is not None:
            if seq <= self.cursor:
                raise Lost(f"{self.sid}: {seq} again, after {self.cursor}")
            self.cursor = seq
        self.events.append(event)
        if event["type"] in ("done", "error"):
            if event["turn_id"] in self.ends:
                raise Lost(f"{self.sid}: two ends of {event['turn_id']}")
            self.ends[event["turn_id"]] = event

    def _refuse(self, response: httpx.Response) -> None:
        self.refused[response.status_code] += 1
        self._down = self._down or time.monotonic()
        time.sleep(min(1.0, float(response.headers.get("Retry-After", 0.2))))

    def _break(self, exc: Exception) -> None:
        self.broken.append(repr(exc))
        self._down = self._down or time.monotonic()
        time.sleep(0.1)  # As a client that reconnects would.

    def _up(self) -> None:
        if self._down is not None:
            self.pause = max(self.pause, time.monotonic() - self._down)
            self._down = None

    def _check(self, until: float, complaint: str) -> None:
        if time.monotonic() > until:
            raise Lost(f"{self.sid}: {complaint}; {self.refused} {self.broken[-3:]}")

    # -- afterwards --------------------------------------------------------------------------

    def text_of(self, turn: str) -> str:
        """What was streamed of a turn's answer."""
        mine = (e for e in self.events if e["turn_id"] == turn and e["type"] == "llm_text")
        return "".join(event["data"]["chunk"] for event in mine)

    def check(self) -> None:
        """What it was told is what is kept: Lost if not."""
        # Of a turn whose worker was killed the last moment was told and is not kept.
        lost = {turn for turn, end in self.ends.items() if end["type"] == "error"}
        kept = [event for event in self._kept() if event["turn_id"] not in lost]
        told = [e for e in self.events if e["seq"] is not None and e["turn_id"] not in lost]
        if gaps := [event for event in told if event["type"] == "gap"]:
            raise Lost(f"{self.sid}: {gaps}")
        # Text is joined on the way out, differently for every reader.
        if (a := _telling(told)) != (b := _telling(kept)):
            raise Lost(f"{self.sid}: told {a[-5:]}, kept {b[-5:]}")

    def _kept(self) -> list[dict[str, t.Any]]:
        events: list[dict[str, t.Any]] = []
        cursor = 0
        until = time.monotonic() + self.patience
        while True:
            self._check(until, "its log cannot be read")
            try:
                response = self.http.get(
                    f"/chat/{self.sid}/events?after={cursor}&wait=0",
                    headers={"Accept": "application/json"},
                )
            except httpx.TransportError as exc:
                self._break(exc)
                continue
            if response.status_code != 200:
                self._refuse(response)
                continue
            self._up()
            page = response.json()
            events += page["events"]
            cursor = page["cursor"]
            if not page["events"]:
                return events


def _telling(events: list[dict[str, t.Any]]) -> list[tuple[str, str, str]]:
    """(turn, type, text) of *events*, with neighbouring text joined."""
    found: list[tuple[str, str, str]] = []
    for event in events:
        turn, kind = event["turn_id"], event["type"]
        text = event["data"].get("chunk", "") if kind == "llm_text" else ""
        if found and kind == "llm_text" and found[-1][:2] == (turn, kind):
            text = found.pop()[2] + text
        found.append((turn, kind, text))
    return found


class Crowd:
    """Talkers that converse from `with` to ``stop``, each on a thread of its own."""

    def __init__(self, talkers: list[Talker], message: str) -> None:
        self.talkers = talkers
        self.failures: list[BaseException] = []
        self._message = message
        self._stopped = threading.Event()
        self._turned = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in talkers]

    def __enter__(self) -> t.Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let everyone finish its turn."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def after(self, turns: int, timeout: float) -> None:
        """Wait until everyone has had that many more turns, or somebody failed."""
        wanted = {one.sid: len(one.ends) + turns for one in self.talkers}
        with self._turned:
            self._turned.wait_for(
                lambda: self.failures or all(len(o.ends) >= wanted[o.sid] for o in self.talkers),
                timeout,
            )
        slow = [one.sid for one in self.talkers if len(one.ends) < wanted[one.sid]]
        assert not (slow or self.failures), (slow, self.failures)

    def _run(self, talker: Talker) -> None:
        try:
            while not (self._stopped.is_set() or self.failures):
                talker.say(self._message)
                with self._turned:
                    self._turned.notify_all()
        except BaseException as exc:
            self.failures.append(exc)
            with self._turned:
                self._turned.notify_all()
