"""A server that is broken, or not ours at all: the client stays small, and keeps its secrets."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import gzip
import http.server
import json
import threading
import traceback
import typing as t

import pytest

from agentao_web.client import Client
from agentao_web.client import ClientError
from agentao_web.client import ConnectionLost
from agentao_web.client import NotOurs
from agentao_web.client import TurnFailed
from agentao_web.client import Unavailable
from agentao_web.client import api
from tests.patience import PATIENCE

Script = cabc.Callable[["Request"], None]
SECRET = "the-secret-token"
EVENT = {"seq": 1, "turn_id": "t", "type": "llm_text", "data": {"chunk": "x"}, "ts": 1}
END = {**EVENT, "seq": 9, "type": "done", "data": {"status": "completed"}, "reply": "r"}


class Request(http.server.BaseHTTPRequestHandler):
    """One request of the client's, and how it is answered."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = t.cast("Hostile", self.server)
        server.seen.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
        with contextlib.suppress(OSError):
            server.script(self)

    do_POST = do_DELETE = do_PATCH = do_GET

    def begin(self, kind: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def stream(self, *events: t.Any, more: bytes = b"") -> None:
        self.begin("text/event-stream")
        for event in events:
            body = event if isinstance(event, bytes) else json.dumps(event).encode()
            self.wfile.write(b"data: " + body + b"\n\n")
        self.wfile.write(more)

    def json(self, body: t.Any, status: int = 200, **headers: str) -> None:
        self.begin("application/json", status, **headers)
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args: t.Any) -> None:
        pass


class Hostile(http.server.ThreadingHTTPServer):
    """Answers every request with *script*."""

    script: Script
    seen: list[str]

    def client(self, script: Script, **options: t.Any) -> Client:
        self.script, self.seen = script, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        told = {"token": SECRET, "patience": 0.5, "timeout": 20, "silence": 20, **options}
        return Client(self.url, **told)


@pytest.fixture
def server() -> cabc.Iterator[Hostile]:
    with Hostile(("127.0.0.1", 0), Request) as made:
        serving = threading.Thread(target=made.serve_forever, args=(0.01,))
        serving.start()
        yield made
        made.shutdown()
        serving.join()


ODD_EVENTS: dict[str, t.Any] = {
    "nested too deep": b"[" * 100_000,
    "seq is no number": {**EVENT, "seq": True},
    "seq is negative": {**EVENT, "seq": -5},
    "seq has no end": {**EVENT, "seq": 10**30},
    "ts has no end": {**EVENT, "ts": 10**400},
    "expires has no end": {**EVENT, "type": "ask_user_requested", "data": {"expires_at": 10**400}},
    "options are no texts": {**EVENT, "type": "ask_user_requested", "data": {"options": [1, {}]}},
    "not an event": [1],
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("name", ODD_EVENTS)
@pytest.mark.parametrize("stream", [True, False])
def test_an_odd_event_is_skipped_or_an_error_of_ours(
    server: Hostile, name: str, stream: bool
) -> None:
    def script(request: Request) -> None:
        if request.headers["Accept"] == "text/event-stream":
            request.stream(ODD_EVENTS[name])
            return
        if len(server.seen) > 8:
            request.json({"events": [], "cursor": 9, "state": "idle"})
            return
        odd = ODD_EVENTS[name]
        body = odd.decode("latin-1") if isinstance(odd, bytes) else json.dumps(odd)
        request.json(f'{{"events": [{body}], "cursor": 9, "state": "idle"}}'.encode("latin-1"))

    with server.client(script, stream=stream) as client:
        seen: list[t.Any] = []
        with contextlib.suppress(ClientError):
            for event in client.events("s", after=0):
                seen.append(
                    (event.ts, getattr(event, "expires_at", 0), getattr(event, "options", []))
                )
                if len(seen) > 3:
                    break
    assert all(type(seq) is float for seq, *_ in seen)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        {"events": 5, "cursor": "x", "state": 5},
        {"turn_id": 5, "cursor": "x"},
        {"messages": 5, "more": True, "sessions": [1], "next": {}, "cancelled": "x", "ok": []},
        b'{"cancelled": 1e999, "state": [], "cursor": {}, "title": 5, "outcome": 7}',
    ],
)
def test_an_odd_answer_is_an_error_of_ours(server: Hostile, body: t.Any) -> None:
    with server.client(lambda request: request.json(body), stream=False) as client:
        for ask in (
            lambda: client.session("s"),
            lambda: client.cancel("s"),
            lambda: client.delete("s"),
            lambda: client.ask("s", "x"),
            lambda: client.answer("s", "q", True),
            lambda: client.rename("s", "x"),
            lambda: list(client.sessions()),
            lambda: list(client.messages("s")),
            lambda: list(client.events("s")),
        ):
            with pytest.raises(ClientError):
                ask()


def test_pages_that_bring_nothing_end(server: Hostile) -> None:
    with server.client(lambda request: request.json({"messages": [], "more": True})) as client:
        assert list(client.messages("s")) == []


def test_an_error_of_any_form_is_one(server: Hostile) -> None:
    error = {**END, "type": "error", "error": {"code": [1], "details": 5}}
    with server.client(lambda request: request.stream(error)) as client:
        with pytest.raises(TurnFailed) as raised:
            client.ask("s", "x")
        assert raised.value.details == {}
    with server.client(lambda request: request.json(b"[" * 100_000, 400)) as client:
        with pytest.raises(NotOurs):
            client.session("s")


@pytest.mark.parametrize("hint", ["-5", "0", "9" * 400, "9" * 5000])
def test_no_hint_when_to_come_back_is_believed_blindly(
    server: Hostile, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(api.time, "sleep", pauses.append)

    def script(request: Request) -> None:
        end = [END] if len(server.seen) > 2 else []
        request.stream(EVENT, *end, more=f"retry: {hint}\n\n".encode())

    with server.client(script, patience=20) as client:
        assert client.ask("s", "x").text == "r"
    assert 0.1 <= min(pauses) <= max(pauses) <= 10


@pytest.mark.parametrize("way", ["stream", "refusal", "page"])
def test_who_says_come_back_at_once_is_not_asked_without_end(
    server: Hostile, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(api.time, "sleep", pauses.append)

    def script(request: Request) -> None:
        if len(server.seen) > 3:
            request.json({}, 404)
        elif way == "stream":
            request.stream(more=b"retry: 0\n\n")
        elif way == "page":
            request.json({"events": [EVENT], "cursor": 1, "state": "idle"})
        else:
            request.json({}, 503, Retry_After="0")

    with server.client(script, patience=20, stream=way != "page") as client:
        with pytest.raises(NotOurs):
            list(client.events("s", after=1))
    assert len(pauses) == 3 and min(pauses) >= 0.1


@pytest.mark.parametrize("part", [b"x" * 2**16, b"data: " + b"x" * 2**16 + b"\n"])
def test_an_event_without_an_end_is_given_up(
    server: Hostile, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.client.reading.MOST", 2**20)
    gone = threading.Event()

    def script(request: Request) -> None:
        request.stream(EVENT)
        try:
            while True:
                request.wfile.write(part)
        except OSError:
            gone.set()

    with server.client(script) as client, pytest.raises(NotOurs, match="does not end"):
        client.ask("s", "x")
    assert gone.wait(PATIENCE)


def test_many_events_may_be_more_than_one(server: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentao_web.client.reading.MOST", 2**17)
    texts = [{**EVENT, "seq": n, "data": {"chunk": "x" * 2**10}} for n in range(1, 900)]
    with server.client(lambda request: request.stream(*texts, {**END, "seq": 1000})) as client:
        assert client.ask("s", "x").text == "r"


@pytest.mark.parametrize("status", [200, 400])
def test_what_is_compressed_does_not_come_out_without_end(
    server: Hostile, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.client.api.MOST", 2**20)
    bomb = gzip.compress(b" " * 2**26)
    script: Script = lambda request: request.json(bomb, status, Content_Encoding="gzip")  # noqa: E731
    with server.client(script) as client, pytest.raises(NotOurs, match="does not end"):
        client.session("s")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: Hostile, status: int) -> None:
    with Hostile(("127.0.0.1", 0), Request) as other:
        elsewhere = f"http://localhost:{other.server_address[1]}/chat/s"
        script: Script = lambda request: request.begin("text/html", status, Location=elsewhere)  # noqa: E731
        with server.client(script) as client:
            for ask in (lambda: client.ask("s", "x"), lambda: client.session("s")):
                with pytest.raises(NotOurs):
                    ask()
        assert len(server.seen) == 2


@pytest.mark.parametrize(
    "token", [f"{SECRET} ", f" {SECRET}", "", f"{SECRET}\r\nX: y", f"{SECRET}é"]
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_token_that_cannot_be_sent_is_in_no_error(
    server: Hostile, token: str, fresh: bool
) -> None:
    with pytest.raises(ValueError) as raised:
        with server.client(lambda request: None, token=(lambda: token) if fresh else token) as made:
            made.session("s")
    assert SECRET not in str(raised.value) and server.seen == []


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500, 503])
def test_the_token_is_in_no_error_and_no_repr(server: Hostile, status: int) -> None:
    with server.client(lambda request: request.json({"state": 1}, status)) as client:
        assert SECRET not in repr(client) + repr(client._api) + repr(client.chat("s", "x"))
        for ask in (lambda: client.session("s"), lambda: client.ask("s", "x")):
            with pytest.raises(ClientError) as raised:
                ask()
            told = repr(raised.value) + "".join(traceback.format_exception(raised.value))
            assert SECRET not in told


@pytest.mark.parametrize("sid", ["../x", "a/b", "a?x=1", "a#b", "a\n", "", ".", "é", "a" * 129])
def test_no_session_is_another_path(server: Hostile, sid: str) -> None:
    with server.client(lambda request: request.stream(END)) as client:
        for ask in (
            lambda: client.ask(sid, "x"),
            lambda: client.session(sid),
            lambda: client.cancel(sid),
            lambda: client.delete(sid),
            lambda: client.rename(sid, "x"),
            lambda: list(client.messages(sid)),
            lambda: list(client.events(sid)),
            lambda: client.answer(sid, "q", True),
        ):
            with pytest.raises(ValueError):
                ask()
        assert server.seen == []


@pytest.mark.parametrize("key", ["a\r\nX: y", "a ", "é"])
def test_no_key_is_another_header(server: Hostile, key: str) -> None:
    with server.client(lambda request: request.stream(END)) as client:
        with pytest.raises(ValueError):
            client.ask("s", "x", idempotency_key=key)
        assert server.seen == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/", "http://", "//h/x", "http://h/?x=1", "http://h/#x"]
)
def test_no_other_address_is_taken(url: str) -> None:
    with pytest.raises(ValueError):
        Client(url)


def test_who_has_no_end_of_news_is_left_by_the_caller_only(server: Hostile) -> None:
    """Numbers that go back are seen once; a refusal ends it."""
    back = [{**EVENT, "seq": n} for n in (5, 4, 5, 3, 6)]

    def script(request: Request) -> None:
        if len(server.seen) == 1:
            request.stream(*back)
        else:
            request.json(
                {"code": "not_found", "message": "gone", "details": {}}, 503, Retry_After="9" * 400
            )

    with server.client(script) as client:
        seen: list[t.Any] = []
        with pytest.raises((Unavailable, ConnectionLost)):
            for event in client.events("s"):
                seen.append(event.seq)
    assert seen == [5, 6]
