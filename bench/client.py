"""HTTP and SSE over plain sockets: one epoll loop reads every stream, cheaply.

A general client would cost more than the server under test; this one knows only what our server
and the scripted model send.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import json
import selectors
import socket
import time
import typing as t

Hear = cabc.Callable[["Stream", dict[str, t.Any], float], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go, and as whom."""

    port: int
    token: str = ""

    def request(self, method: str, path: str, body: t.Any = None, accept: str = "*/*") -> bytes:
        """The bytes of a request."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Authorization: Bearer {self.token}",
            f"Accept: {accept}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def call(self, method: str, path: str, body: t.Any = None) -> tuple[int, t.Any]:
        """Status and JSON of one whole answer."""
        with self.connect() as sock:
            sock.sendall(self.request(method, path, body, "application/json"))
            raw = b""
            while data := sock.recv(65536):
                raw += data
        head, _, rest = raw.partition(b"\r\n\r\n")
        return int(head.split(None, 2)[1]), json.loads(rest) if rest else None

    def turn(self, sid: str, message: str, hear: Hear | None = None) -> Stream:
        """Start a turn and stream it."""
        ask = self.request("POST", f"/chat/{sid}", {"message": message}, "text/event-stream")
        return Stream(self, ask, hear)

    def follow(self, sid: str, hear: Hear | None = None) -> Stream:
        """Read a session's log for ever."""
        path = f"/chat/{sid}/events?follow=1"
        return Stream(self, self.request("GET", path, accept="text/event-stream"), hear)


class Stream:
    """One SSE answer while it comes in; ``last`` is its terminal event."""

    def __init__(self, target: Target, request: bytes, hear: Hear | None) -> None:
        self.sock = target.connect()
        self.hear = hear
        self.status = 0
        self.code = ""
        self.started = time.monotonic()
        self.first: float | None = None
        self.opened: float | None = None
        self.ended: float | None = None
        self.last: dict[str, t.Any] | None = None
        self.frames = 0
        self.closed = False
        self._raw = b""
        self._text = b""
        self._chunked = False
        self.sock.sendall(request)

    def speaks(self) -> bool:
        """Whether the first text is here."""
        return self.first is not None

    def over(self) -> bool:
        """Whether the terminal event is here."""
        return self.last is not None

    def close(self) -> None:
        self.closed = True
        self.sock.close()

    def receive(self) -> None:
        """Take what has arrived; called when there is something."""
        data = self.sock.recv(262144)
        now = time.monotonic()
        if not data:
            self.closed = True
            self._refused()
            return
        self._raw += data
        if not self.status and not self._head():
            return
        self._unchunk()
        frames = self._text.split(b"\n\n")
        self._text = frames.pop()
        for frame in frames:
            self._frame(frame, now)

    def _head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            return False
        self.status = int(head.split(None, 2)[1])
        self._chunked = b"transfer-encoding: chunked" in head.lower()
        self._raw = rest
        return True

    def _unchunk(self) -> None:
        if not self._chunked:
            self._text, self._raw = self._text + self._raw, b""
            return
        at, raw, parts = 0, self._raw, [self._text]
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end], 16)
            if len(raw) < end + size + 4:
                break
            parts.append(raw[end + 2 : end + 2 + size])
            at = end + size + 4
            if not size:
                self.closed = True
        self._raw = raw[at:]
        self._text = b"".join(parts)

    def _frame(self, frame: bytes, now: float) -> None:
        # With or without an id, before or behind; a comment has no blank line of its own.
        body = next((line[6:] for line in frame.split(b"\n") if line.startswith(b"data: ")), b"")
        if not body or body == b"[DONE]":
            return
        self.frames += 1
        event = json.loads(body)
        kind = event.get("type")
        if self.opened is None:
            self.opened = now
        if kind == "llm_text" and self.first is None:
            self.first = now
        elif kind in ("done", "error"):
            self.last, self.ended = event, now
        if self.hear is not None:
            self.hear(self, event, now)

    def _refused(self) -> None:
        if self.status >= 400 and self._text:
            self.code = json.loads(self._text).get("error", {}).get("code", "") or json.loads(
                self._text
            ).get("code", "")


class Loop:
    """Reads many streams from one thread."""

    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.close()
        self._selector.close()

    def add(self, stream: Stream) -> Stream:
        self._selector.register(stream.sock, selectors.EVENT_READ, stream)
        return stream

    def run(self, done: cabc.Callable[[], bool], timeout: float) -> bool:
        """Read until *done* or *timeout* seconds are over; whether it was *done*."""
        until = time.monotonic() + timeout
        while not done():
            left = until - time.monotonic()
            if left <= 0:
                return False
            for key, _ in self._selector.select(left):
                stream = key.data
                stream.receive()
                if stream.closed:
                    self._selector.unregister(stream.sock)
                    stream.sock.close()
        return True


def read(stream: Stream, done: cabc.Callable[[], bool], timeout: float = 60.0) -> None:
    """Read one *stream* until *done*; TimeoutError if that does not come."""
    stream.sock.settimeout(timeout)
    while not done():
        if stream.closed:
            raise RuntimeError(f"the stream ended early: {stream.status} {stream.code}")
        stream.receive()


def whole(stream: Stream) -> Stream:
    """Read *stream* to its terminal event."""
    read(stream, stream.over)
    stream.close()
    if stream.last is None or stream.last["type"] != "done":
        raise RuntimeError(f"the turn did not end well: {stream.status} {stream.last}")
    return stream


class Late:
    """Collects how long stamped tokens took, from *since* (monotonic) on."""

    def __init__(self, since: float = 0.0) -> None:
        self.since = since
        self.seconds: list[float] = []

    def __call__(self, stream: Stream, event: dict[str, t.Any], now: float) -> None:
        if event.get("type") == "llm_text":
            text = event["data"]["chunk"]
        elif event.get("choices"):
            text = event["choices"][0]["delta"].get("content", "")
        else:
            return
        for stamp in text.split():
            sent = float(stamp)
            if sent >= self.since:
                self.seconds.append(now - sent)
