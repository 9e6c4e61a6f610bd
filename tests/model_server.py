"""A scripted OpenAI-compatible model on 127.0.0.1, for tests and benches: it answers by script or
by a tiny command language, and knows to the millisecond when a client hung up.

The command language: the lines of the last user message, one per request of that turn (what is
asked after a tool ran is the second line). Without a line left it says "done".

    say hello world        think why | answer      length cut sho
    tokens 100 50          (100 tokens, 50 a second; without a rate as fast as they go)
    stamped 100 50         (the same, each token is the moment it was sent, time.monotonic())
    hang                   hang_after some words   cut some words       drop some words
    slow_headers 2 hello   fail 500                call read_file {"file_path": "a.txt"}

Run alone (`python -m tests.model_server --port 0`) it prints its port; `GET /_requests` tells what
it saw.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc as cabc
import dataclasses
import itertools
import json
import re
import select
import socket
import ssl
import struct
import threading
import time
import typing as t

from tests.patience import PATIENCE

Delta = dict[str, t.Any]

_CLOSED = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>\s*", re.DOTALL)
#: How much of an unpaced answer goes out in one write.
_BATCH = 64


# ---------------------------------------------------------------------------------- replies


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model does with one request. Made by the functions below."""

    deltas: tuple[Delta, ...] = ()
    #: None: the stream ends without a finish reason.
    finish: str | None = "stop"
    #: Between the deltas, in seconds.
    delay: float = 0.0
    #: Before the headers; None is until released.
    wait: float | None = 0.0
    #: After the deltas: silent until released or closed.
    hangs: bool = False
    #: The connection goes away in the middle of the body, or before the first byte of it.
    drops: bool = False
    vanishes: bool = False
    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    pace: Pace | None = None
    #: Does all of it instead: what is sent, and how it ends.
    act: cabc.Callable[[Line], None] | None = None
    #: These very bytes, each piece an HTTP chunk of its own, whether a stream was asked for or not.
    raw: tuple[bytes, ...] | None = None
    content_type: str = "text/event-stream"


@dataclasses.dataclass(frozen=True)
class Pace:
    """Many equal tokens, and how fast."""

    count: int
    per_second: float | None
    text: str
    stamp: bool


def say(*chunks: str, delay: float = 0.0) -> Reply:
    return Reply(_texts(chunks), delay=delay)


def think(*thoughts: str, answer: tuple[str, ...] = ("ok",)) -> Reply:
    reasoning = tuple({"reasoning_content": thought} for thought in thoughts)
    return Reply(reasoning + _texts(answer))


def call(name: str, arguments: dict[str, t.Any], id: str = "call_1") -> Reply:
    return calls([(name, arguments, id)])


def calls(wanted: cabc.Sequence[tuple[str, dict[str, t.Any], str]]) -> Reply:
    deltas = tuple(
        {
            "tool_calls": [
                {
                    "index": index,
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                }
            ]
        }
        for index, (name, arguments, id) in enumerate(wanted)
    )
    return Reply(deltas, finish="tool_calls")


def hang() -> Reply:
    """No headers until released or closed."""
    return Reply(_texts(("released",)), wait=None)


def hang_after(*chunks: str) -> Reply:
    """These chunks, then silence until released or closed."""
    return Reply(_texts(chunks), hangs=True)


def cut(*chunks: str) -> Reply:
    """A stream that ends without a finish reason and without `[DONE]`."""
    return Reply(_texts(chunks), finish=None)


def drop(*chunks: str) -> Reply:
    """A stream whose connection goes away in the middle."""
    return Reply(_texts(chunks), finish=None, drops=True)


def vanish() -> Reply:
    """The connection goes away without a byte, as a kept one does that died while idle."""
    return Reply(vanishes=True)


def fail(status: int, body: str = "", *, retry_after: float | None = None) -> Reply:
    headers = () if retry_after is None else (("Retry-After", str(retry_after)),)
    text = body or json.dumps({"error": {"message": f"scripted {status}", "type": "scripted"}})
    return Reply(status=status, body=text, headers=headers)


def length(*chunks: str) -> Reply:
    return Reply(_texts(chunks), finish="length")


def act(what: cabc.Callable[[Line], None]) -> Reply:
    """Whatever *what* does with the line; it may return once its answer is complete."""
    return Reply(act=what)


def tokens(
    count: int, per_second: float | None = None, text: str = "tok ", *, stamp: bool = False
) -> Reply:
    return Reply(pace=Pace(count, per_second, text, stamp))


def raw(*pieces: bytes, content_type: str = "text/event-stream") -> Reply:
    return Reply(raw=pieces, content_type=content_type)


def slow_headers(seconds: float, *chunks: str) -> Reply:
    return Reply(_texts(chunks or ("ok",)), wait=seconds)


def _texts(chunks: cabc.Iterable[str]) -> tuple[Delta, ...]:
    return tuple({"content": chunk} for chunk in chunks)


# ------------------------------------------------------------------------- command language


def obey(body: dict[str, t.Any]) -> Reply:
    """What the last user message commands; anything else is answered with "ok"."""
    text, asked = last_command(body.get("messages") or body.get("input") or [])
    lines = [line for line in text.splitlines() if line.strip()]
    if asked >= len(lines):
        return say("done" if asked else "ok")
    verb, _, rest = lines[asked].strip().partition(" ")
    command = _COMMANDS.get(verb)
    return say("ok") if command is None else command(rest.strip())


def last_command(messages: list[dict[str, t.Any]]) -> tuple[str, int]:
    """The last user message without Agentao's reminders, and how often it was answered since."""
    answers = 0
    for message in reversed(messages):
        if message.get("role") == "assistant":
            answers += 1
        text = _REMINDER.sub("", _text(message.get("content"))).strip()
        if message.get("role") == "user" and text:
            return text, answers
    return "", 0


def _text(content: t.Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def _words(rest: str) -> list[str]:
    """Chunks that add up to exactly *rest*."""
    return re.findall(r"\S+\s*", rest)


def _think(rest: str) -> Reply:
    thought, _, answer = rest.partition("|")
    return think(*_words(thought.strip()), answer=tuple(_words(answer.strip() or "ok")))


def _tokens(rest: str, *, stamp: bool = False) -> Reply:
    count, *rate = rest.split()
    return tokens(int(count), float(rate[0]) if rate else None, stamp=stamp)


def _slow(rest: str) -> Reply:
    seconds, _, text = rest.partition(" ")
    return slow_headers(float(seconds), *_words(text))


def _fail(rest: str) -> Reply:
    status, _, body = rest.partition(" ")
    return fail(int(status), body)


_numbers = itertools.count(1)


def _call(rest: str) -> Reply:
    name, _, arguments = rest.partition(" ")
    return call(name, json.loads(arguments or "{}"), id=f"call_{next(_numbers)}")


_COMMANDS: dict[str, cabc.Callable[[str], Reply]] = {
    "say": lambda rest: say(*_words(rest)),
    "think": _think,
    "length": lambda rest: length(*_words(rest)),
    "tokens": _tokens,
    "stamped": lambda rest: _tokens(rest, stamp=True),
    "hang": lambda rest: hang(),
    "hang_after": lambda rest: hang_after(*_words(rest)),
    "cut": lambda rest: cut(*_words(rest)),
    "drop": lambda rest: drop(*_words(rest)),
    "slow_headers": _slow,
    "fail": _fail,
    "call": _call,
}


# ----------------------------------------------------------------------------------- server


@dataclasses.dataclass
class Request:
    """One request as the server saw it; times are `time.monotonic()`, the same in every process."""

    path: str
    headers: dict[str, str]
    body: dict[str, t.Any]
    connection: int
    started_at: float
    #: The connection went away before the answer was complete.
    closed_at: float | None = None
    finished: bool = False


class _Gone(Exception):
    """The client closed the connection, or the server is being closed."""


class ModelServer:
    """Answers on a free port from `with` to the end of it; its threads end with it."""

    def __init__(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        #: Wins when the script is empty.
        self.reply: cabc.Callable[[dict[str, t.Any]], Reply] = obey
        #: Sent with every answer that comes in one piece.
        self.cookie = ""
        self._script: collections.deque[Reply] = collections.deque()
        self._tls = tls
        self._changed = threading.Condition()
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._gate, self._hold = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.base_url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> t.Self:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._listener.shutdown(socket.SHUT_RDWR)
            self.disconnect()
        for thread in self._threads:
            thread.join(timeout=10)
        for sock in (self._listener, self._gate, self._hold):
            sock.close()

    # What tests ask for.

    def script(self, *replies: Reply) -> None:
        """Answer the next requests with these, in this order."""
        self._script.extend(replies)

    def release(self) -> None:
        """Let everything that hangs, now or later, go on."""
        with self._changed:
            self._hold.shutdown(socket.SHUT_RDWR)

    def disconnect(self) -> None:
        """Close every connection, also the idle ones, as a restarted server would."""
        with self._changed:
            for sock in self._open.values():
                _shutdown(sock)

    @property
    def connections(self) -> int:
        """How many connections the requests came over."""
        return len({request.connection for request in self.requests})

    @property
    def open_connections(self) -> int:
        """How many connections are open now, idle ones included."""
        return len(self._open)

    def wait_for_request(self, n: int, timeout: float = PATIENCE) -> Request:
        """The *n*-th request, counted from 1, when it has arrived."""
        self._wait(lambda: len(self.requests) >= n, timeout, f"no request number {n}")
        return self.requests[n - 1]

    def wait_closed(self, request: Request, timeout: float = PATIENCE) -> float:
        """Wait until the client has hung up on *request*; the seconds that took."""
        start = time.monotonic()
        self._wait(lambda: request.closed_at is not None, timeout, "the client is still there")
        return max(0.0, t.cast(float, request.closed_at) - start)

    def wait_finished(self, request: Request, timeout: float = PATIENCE) -> None:
        self._wait(lambda: request.finished, timeout, "the answer is not complete")

    def _wait(self, done: cabc.Callable[[], bool], timeout: float, complaint: str) -> None:
        with self._changed:
            if not self._changed.wait_for(done, timeout):
                raise TimeoutError(f"{complaint} after {timeout} s")

    # Connections.

    def _start(self, target: cabc.Callable[..., None], *args: t.Any) -> None:
        thread = threading.Thread(target=target, args=args, name="model-server", daemon=True)
        self._threads = [alive for alive in self._threads if alive.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        for number in itertools.count(1):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._closing:
                    sock.close()
                    return
                self._open[number] = sock
                self._start(self._serve, sock, number)

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                with self._changed:
                    self._open[number] = sock
            _Connection(self, sock, number).run()
        except (_Gone, OSError):
            pass
        finally:
            with self._changed:
                self._open.pop(number, None)
            sock.close()

    # What a connection asks of its server.

    def next_reply(self, body: dict[str, t.Any]) -> Reply:
        try:
            return self._script.popleft()
        except IndexError:
            return self.reply(body)

    def note(self, change: cabc.Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    @property
    def gate(self) -> socket.socket:
        """Readable once the hanging ones are released."""
        return self._gate

    def report(self) -> list[dict[str, t.Any]]:
        with self._changed:
            return [dataclasses.asdict(request) for request in self.requests]


def _shutdown(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


class _Connection:
    """One client connection: requests in, scripted answers out, one after the other."""

    def __init__(self, server: ModelServer, sock: socket.socket, number: int) -> None:
        self._server = server
        self._sock = sock
        self._number = number
        self._input = sock.makefile("rb")
        self._hang_up = select.poll()
        self._hang_up.register(sock, select.POLLRDHUP)

    def run(self) -> None:
        with self._input:
            while (head := self._read_head()) is not None:
                method, path, headers = head
                size = int(headers.get("content-length", "0"))
                raw = self._input.read(size)
                if len(raw) < size:
                    return  # Cut off while it was still asking.
                if method == "GET":
                    self._get(path)
                else:
                    self._post(path, headers, raw)

    def _read_head(self) -> tuple[str, str, dict[str, str]] | None:
        line = self._input.readline().decode("latin-1").split()
        if len(line) < 2:
            return None
        headers = {}
        while header := self._input.readline().strip():
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return line[0], line[1], headers

    def _get(self, path: str) -> None:
        if path == "/_requests":
            self._send_json(200, json.dumps(self._server.report()))
        else:
            self._send_json(404, json.dumps({"error": {"message": "no such page"}}))

    def _post(self, path: str, headers: dict[str, str], raw: bytes) -> None:
        body = json.loads(raw)
        request = Request(path, headers, body, self._number, time.monotonic())
        self._server.note(lambda: self._server.requests.append(request))
        try:
            self._answer(self._server.next_reply(body), body, request)
        except (_Gone, OSError):
            if not request.finished:
                self._server.note(lambda: setattr(request, "closed_at", time.monotonic()))
            raise _Gone from None

    def _answer(self, reply: Reply, body: dict[str, t.Any], request: Request) -> None:
        if reply.act is not None:
            reply.act(Line(self, body))
            self._finish(request)
            return
        if reply.vanishes:
            self._drop(request)
        if reply.wait is None:
            self._pause(None, released=True)
        elif reply.wait:
            self._pause(reply.wait)
        if reply.status != 200:
            self._send_json(reply.status, reply.body, reply.headers, request)
        elif reply.raw is not None:
            self._send_raw(reply.raw, reply.content_type, request)
        elif body.get("stream"):
            self._stream(reply, body, request)
        else:
            self._send_json(200, json.dumps(_whole(reply, body)), reply.headers, request)

    # Answers in one piece.

    def _send_json(
        self,
        status: int,
        text: str,
        headers: tuple[tuple[str, str], ...] = (),
        request: Request | None = None,
    ) -> None:
        data = text.encode()
        lines = [f"HTTP/1.1 {status} Scripted", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers]
        if self._server.cookie:
            lines.append(f"Set-Cookie: {self._server.cookie}")
        lines += [f"Content-Length: {len(data)}", "", ""]
        self._send("\r\n".join(lines).encode() + data)
        self._finish(request)

    def _send_raw(self, pieces: tuple[bytes, ...], content_type: str, request: Request) -> None:
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        self._send(f"HTTP/1.1 200 OK\r\n{kind}Transfer-Encoding: chunked\r\n\r\n".encode())
        self._send(b"".join(map(_http_chunk, filter(None, pieces))) + b"0\r\n\r\n")
        self._finish(request)

    # Answers in many.

    def _stream(self, reply: Reply, body: dict[str, t.Any], request: Request) -> None:
        self._send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = _Chunks(body)
        if reply.pace is None:
            self._send_deltas(reply, chunk)
        else:
            self._send_tokens(reply.pace, chunk)
        if reply.hangs:
            self._pause(None, released=True)
        if reply.drops:
            self._drop(request)
        self._send(chunk.ending(reply) + b"0\r\n\r\n")
        self._finish(request)

    def _send_deltas(self, reply: Reply, chunk: _Chunks) -> None:
        for index, delta in enumerate(reply.deltas):
            if index and reply.delay:
                self._pause(reply.delay)
            self._send(chunk.delta(delta))

    def _send_tokens(self, pace: Pace, chunk: _Chunks) -> None:
        """Paced by the clock, so that a late token does not delay the ones after it."""
        ready = chunk.delta({"content": pace.text})
        start, sent = time.monotonic(), 0
        while sent < pace.count:
            batch = 1 if pace.per_second else min(_BATCH, pace.count - sent)
            if pace.per_second:
                self._pause(start + sent / pace.per_second - time.monotonic())
            if pace.stamp:
                now = f"{time.monotonic():.6f} "
                self._send(chunk.delta({"content": now}) * batch)
            else:
                self._send(ready * batch)
            sent += batch

    def _finish(self, request: Request | None) -> None:
        if request is not None:
            self._server.note(lambda: setattr(request, "finished", True))

    def _drop(self, request: Request) -> t.NoReturn:
        self._finish(request)
        _shutdown(self._sock)
        raise _Gone

    # The line.

    def _send(self, data: bytes) -> None:
        if self._hang_up.poll(0):
            raise _Gone
        self._sock.sendall(data)

    def _pause(self, seconds: float | None, *, released: bool = False) -> None:
        """Wait; notice at once when the client goes away."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        if released:
            poll.register(self._server.gate, select.POLLIN)
        wait = None if seconds is None else max(0.0, seconds) * 1000
        for number, what in poll.poll(wait):
            if number == self._sock.fileno() and what & _CLOSED:
                raise _Gone


class Line:
    """The way to one client, for replies that do as they like."""

    def __init__(self, connection: _Connection, body: dict[str, t.Any]) -> None:
        self._connection = connection
        self._chunk = _Chunks(body)

    def send(self, data: bytes) -> None:
        self._connection._send(data)

    def head(self) -> None:
        """The head of a stream."""
        self.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    def chunk(self, data: bytes) -> None:
        """*data* as it is, as a piece of the body."""
        self.send(_http_chunk(data))

    def delta(self, **delta: t.Any) -> None:
        self.send(self._chunk.delta(delta))

    def finish(self, reason: str) -> None:
        """Why the model stops; the stream goes on."""
        end = [{"index": 0, "delta": {}, "finish_reason": reason}]
        self.send(self._chunk._event(end))

    def end(self) -> None:
        """The end of the body."""
        self.send(b"0\r\n\r\n")

    def pause(self, seconds: float | None = None) -> None:
        """Wait, for ever without *seconds*; ends when the client goes away, or all are released."""
        self._connection._pause(seconds, released=True)

    def hang_up(self) -> t.NoReturn:
        _shutdown(self._connection._sock)
        raise _Gone

    def reset(self) -> t.NoReturn:
        """The connection is reset, and what is on its way is lost with it."""
        sock = self._connection._sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection._input.close()
        sock.close()
        raise _Gone


class _Chunks:
    """The bytes of a streamed answer, one HTTP chunk per event."""

    def __init__(self, body: dict[str, t.Any]) -> None:
        self._body = body
        self._sent = 0

    def delta(self, delta: Delta) -> bytes:
        self._sent += 1
        return self._event([{"index": 0, "delta": delta, "finish_reason": None}])

    def ending(self, reply: Reply) -> bytes:
        if reply.finish is None:
            return b""
        end = self._event([{"index": 0, "delta": {}, "finish_reason": reply.finish}])
        if (self._body.get("stream_options") or {}).get("include_usage"):
            end += self._event([], usage=_usage(reply, self._body))
        return end + _http_chunk(b"data: [DONE]\n\n")

    def _event(self, choices: list[dict[str, t.Any]], **more: t.Any) -> bytes:
        event = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": self._body.get("model", ""),
            "choices": choices,
            **more,
        }
        return _http_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _usage(reply: Reply, body: dict[str, t.Any]) -> dict[str, int]:
    """Ten tokens per message in, one per delta out: easy to predict."""
    prompt = 10 * len(body.get("messages", ()))
    answer = len(reply.deltas) if reply.pace is None else reply.pace.count
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


def _whole(reply: Reply, body: dict[str, t.Any]) -> dict[str, t.Any]:
    """The same answer for a client that does not stream."""
    pace = reply.pace
    content = "".join(delta.get("content", "") for delta in reply.deltas)
    message: dict[str, t.Any] = {
        "role": "assistant",
        "content": content if pace is None else pace.text * pace.count,
    }
    if asked := [c for delta in reply.deltas for c in delta.get("tool_calls", ())]:
        message["tool_calls"] = asked
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
        "usage": _usage(reply, body),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 finds a free one")
    with ModelServer(port=parser.parse_args().port) as server:
        print(server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
