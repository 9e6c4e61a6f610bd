"""What the client makes of bytes, answers and refusals, without a server."""

from __future__ import annotations

import collections.abc as cabc
import logging
import subprocess
import sys
import threading
import time
import typing as t

import httpx
import pytest
from flask import Flask
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import client as api
from agentao_web import shutdown
from agentao_web import testing
from agentao_web.client.events import TYPES
from agentao_web.core.log import Event
from agentao_web.wire import native
from agentao_web.wire import openapi
from docs import build
from tests.patience import PATIENCE

SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
#: Characters that end a line elsewhere, but not in SSE.
NASTY = "\u2028\u2029\x85\x0b\x0c\x1c\ufeff\U0001f600e\u0301:\r\n data"

texts = st.lists(st.text(st.sampled_from(NASTY) | st.characters(codec="utf-8")), max_size=5)


class Pieces(httpx.SyncByteStream):
    """A body as it comes; *broken* is how it ends, if not well."""

    def __init__(self, pieces: cabc.Iterable[bytes], broken: Exception | None = None) -> None:
        self.pieces = pieces
        self.broken = broken

    def __iter__(self) -> cabc.Iterator[bytes]:
        yield from self.pieces
        if self.broken is not None:
            raise self.broken


def client_of(handler: t.Callable[[httpx.Request], httpx.Response], **options: t.Any) -> api.Client:
    http = httpx.Client(transport=httpx.MockTransport(handler))
    return api.Client("http://test", http=http, **{"patience": PATIENCE, **options})


def a_turn(chunks: cabc.Iterable[str]) -> list[Event]:
    chunks = list(chunks)
    data = {"status": "completed", "reason": None, "usage": {}, "tool_count": 0, "duration_ms": 1}
    return [
        Event(10, "t", "turn_begin", {"message": "m", "images": 0, "queued_ms": 0}, 1.0),
        *(Event(11 + n, "t", "llm_text", {"chunk": c}, 1.0) for n, c in enumerate(chunks)),
        Event(99, "t", "done", data, 2.0, {"reply": "".join(chunks)}),
    ]


def polled(events: list[Event], request: httpx.Request) -> httpx.Response:
    """What a server with these *events* says to one who polls, two at a time."""
    if request.method == "POST":
        return httpx.Response(202, json={"turn_id": "t", "cursor": 9, "status": "running"})
    after = int(request.url.params["after"])
    found = [event.as_dict() for event in events if t.cast(int, event.seq) > after][:2]
    page = {"events": found, "cursor": found[-1]["seq"], "state": "running"}
    return httpx.Response(200, json=page)


def split(body: bytes, at: cabc.Iterable[int]) -> list[bytes]:
    marks = [0, *sorted({n % (len(body) + 1) for n in at}), len(body)]
    return [body[a:b] for a, b in zip(marks, marks[1:], strict=False) if a < b]


@given(texts, st.lists(st.integers(0, 5000)), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_however_the_bytes_are_cut_the_events_are_the_same(
    chunks: list[str], at: list[int], newline: bytes
) -> None:
    events = a_turn(chunks)
    body = native.KEEP_ALIVE.join(native.frame(event) for event in events) + native.retry(500)
    pieces = split(body.replace(b"\n", newline), at)
    client = client_of(lambda request: httpx.Response(200, headers=SSE, stream=Pieces(pieces)))
    assert [event.raw for event in client.chat("s", "m")] == [e.as_dict() for e in events]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(texts, st.lists(st.integers(0, 1200), max_size=3), st.booleans())
def test_wherever_a_stream_breaks_the_rest_follows(
    chunks: list[str], cuts: list[int], clean: bool
) -> None:
    events = a_turn(chunks)
    left = list(cuts)

    def serve(request: httpx.Request) -> httpx.Response:
        if request.headers["Accept"] != "text/event-stream":
            return polled(events, request)
        after = int(request.url.params.get("after", 0))
        body = native.frames(event for event in events if t.cast(int, event.seq) > after)
        if not left:
            return httpx.Response(200, headers=SSE, content=body)
        broken = None if clean else httpx.ReadError("cut")
        pieces = [body[: left.pop() % len(body)]]
        return httpx.Response(200, headers=SSE, stream=Pieces(pieces, broken))

    client = client_of(serve, patience=30.0)
    assert [event.raw for event in client.chat("s", "m")] == [e.as_dict() for e in events]


def test_a_stream_may_be_quiet_for_longer_than_patience_lasts() -> None:
    """Patience is for what does not get through; a turn may think for as long as it likes."""
    events = a_turn(["x"])
    asked: list[str] = []

    def quiet() -> cabc.Iterator[bytes]:
        yield native.frames(events[:1])
        time.sleep(3.2)  # Longer than its patience is the point.
        yield native.KEEP_ALIVE

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) == 3:
            return httpx.Response(200, headers=SSE, content=native.frames(events[1:]))
        return httpx.Response(200, headers=SSE, stream=Pieces(quiet(), httpx.ReadError("cut")))

    assert client_of(serve, patience=3.0).ask("s", "m").text == "x"
    assert asked == ["POST", "GET", "GET"]


def test_what_answers_in_json_but_is_no_server_of_ours_is_not_asked_for_ever() -> None:
    asked: list[str] = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if request.method == "POST":
            return httpx.Response(202, json={"turn_id": "t", "cursor": 0})
        return httpx.Response(200, json={"hello": 1})

    with pytest.raises(api.NotOurs):
        client_of(serve, stream=False).ask("s", "m")
    with pytest.raises(api.NotOurs):
        list(client_of(serve).sessions())
    with pytest.raises(api.NotOurs):
        client_of(lambda request: httpx.Response(200, json={})).cancel("s")
    assert len(asked) == 3


def test_polls_that_come_back_at_once_are_not_repeated_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker that leaves does not wait."""
    pages = [{"events": [], "cursor": 9, "state": "running"}] * 2

    def serve(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and pages:
            return httpx.Response(200, json=pages.pop())
        return polled(a_turn(["x"]), request)

    with caplog.at_level(logging.INFO, "agentao_web.client"):
        assert client_of(serve, stream=False).ask("s", "m").text == "x"
    assert caplog.text.count("in 0.2 s") == 2


def test_a_garbled_event_counts_as_a_cut() -> None:
    bodies = [native.frames(a_turn([])[:1]) + b"data: {oops\n\n", native.frames(a_turn([])[1:])]
    client = client_of(lambda request: httpx.Response(200, headers=SSE, content=bodies.pop(0)))
    assert [event.type for event in client.chat("s", "m")] == ["turn_begin", "done"]


def test_unknown_events_and_fields_come_through() -> None:
    events = a_turn(["x"])
    events.insert(1, Event(11, "t", "hologram", {"beams": [1]}, 1.0))
    events[2] = Event(12, "t", "llm_text", {"chunk": "x", "more": 1}, 1.0)
    body = native.frames(events)
    client = client_of(lambda request: httpx.Response(200, headers=SSE, content=body))
    seen = list(client.chat("s", "m"))
    assert type(seen[1]) is api.Event and seen[1].data == {"beams": [1]}
    assert seen[2].data["more"] == 1


def test_an_end_that_was_never_stored_is_an_end() -> None:
    error = {"code": "store_unavailable", "message": "gone", "details": {}}
    last = Event(None, "t", "error", {"status": "failed"}, 1.0, {"error": error})
    body = native.frames([*a_turn(["x"])[:2], last])
    client = client_of(lambda request: httpx.Response(200, headers=SSE, content=body))
    with pytest.raises(api.TurnFailed, match="gone") as caught:
        client.ask("s", "m")
    assert caught.value.code == "store_unavailable" and caught.value.reply.cursor == 11


def test_a_turn_that_failed_says_when_to_come_back() -> None:
    error = {"code": "llm_unavailable", "message": "busy", "details": {"retry_after": 90}}
    last = Event(12, "t", "error", {"status": "failed"}, 1.0, {"error": error})
    body = native.frames([*a_turn(["x"])[:2], last])
    client = client_of(lambda request: httpx.Response(200, headers=SSE, content=body))
    with pytest.raises(api.TurnFailed, match="busy") as caught:
        client.ask("s", "m")
    assert caught.value.retry_after == 90


def test_a_gap_moves_the_cursor_also_back() -> None:
    """A database restored from a backup: the log ends before what the client has seen."""
    gap = Event(5, None, "gap", {"from": 10, "to": 5, "reason": "restored"}, 0.0)
    asked: list[str | None] = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("after"))
        if len(asked) == 1:
            return httpx.Response(200, headers=SSE, content=native.frames([a_turn([])[0]]))
        if len(asked) == 2:
            return httpx.Response(200, headers=SSE, content=native.frame(gap))
        end = Event(6, "t", "done", {"status": "completed"}, 1.0, {"reply": "ok"})
        return httpx.Response(200, headers=SSE, content=native.frame(end))

    events = list(client_of(serve).chat("s", "m"))
    assert [event.seq for event in events] == [10, 5, 6] and asked == [None, "10", "5"]
    assert isinstance(events[1], api.Gap) and (events[1].first, events[1].last) == (10, 5)


def test_every_type_of_the_contract_is_one_of_ours_and_names_every_field() -> None:
    plain = {"usage", "llm_retry", "context_compressed", "agent_start", "agent_end"}
    assert set(TYPES) | plain == set(openapi.EVENT_TYPES)
    other = {"from": "first", "to": "last"}
    for kind, (data, beside) in build.sample().items():
        if kind in TYPES:
            for name in [*data, *beside]:
                assert hasattr(TYPES[kind], other.get(name, name)), (kind, name)


def refused(status: int, code: str, **more: t.Any) -> httpx.Response:
    body = {"code": code, "message": f"It is {code}.", "details": more.pop("details", {})}
    return httpx.Response(status, json=body, **more)


def good() -> httpx.Response:
    return httpx.Response(200, headers=SSE, content=native.frames(a_turn(["hi"])))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (lambda: refused(503, "draining", headers={"Retry-After": "1"}), "in 1.0 s"),
        (lambda: refused(429, "too_many_turns", headers={"Retry-After": "1"}), "in 1.0 s"),
        (lambda: refused(503, "store_unavailable"), "store_unavailable"),
        (lambda: refused(409, "session_busy", headers={"Retry-After": "0"}), "in 0.2 s"),
        (lambda: refused(409, "session_busy", details={"reason": "deleting"}), "session_busy"),
        (lambda: httpx.Response(502, html="<h1>Bad gateway</h1>"), "Bad Gateway"),
        (lambda: httpx.Response(503, text="", headers={"Retry-After": "1"}), "in 1.0 s"),
    ],
)
def test_what_passes_is_tried_again_with_the_same_key(
    first: t.Callable[[], httpx.Response], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys: list[str] = []
    bodies: list[bytes] = []

    def serve(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        bodies.append(request.content)
        return first() if len(keys) == 1 else good()

    with caplog.at_level(logging.INFO, "agentao_web.client"):
        assert client_of(serve).ask("s", "m").text == "hi"
    assert len(keys) == 2 and len(set(keys)) == 1 and len(set(bodies)) == 1
    assert said in caplog.text


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (lambda: refused(409, "session_busy", details={"turn_id": "t"}), api.SessionBusy, "queue"),
        (lambda: refused(429, "budget_exhausted"), api.TooMany, "budget_exhausted"),
        (lambda: refused(429, "too_many_sessions"), api.TooMany, "too_many_sessions"),
        (lambda: refused(400, "invalid_request"), api.InvalidRequest, "It is invalid_request"),
        (lambda: refused(403, "forbidden"), api.Forbidden, "403"),
        (lambda: refused(503, "no_model"), api.Unavailable, "It is no_model"),
        (lambda: refused(503, "wrong_schema"), api.Unavailable, "It is wrong_schema"),
        (lambda: refused(500, "internal_error"), api.ApiError, "500 internal_error"),
        (lambda: refused(409, "idempotency_conflict"), api.ApiError, "409"),
        (lambda: httpx.Response(404, html="<h1>nginx</h1>"), api.NotOurs, "Is the URL right"),
        (lambda: httpx.Response(302, headers={"Location": "/login"}), api.NotOurs, "login"),
        (lambda: httpx.Response(200, html="<form>"), api.NotOurs, "text/html"),
        (lambda: httpx.Response(401, text="no"), api.Unauthorized, "token="),
    ],
)
def test_what_does_not_pass_is_told_at_once(
    answer: t.Callable[[], httpx.Response], kind: type[api.ApiError], words: str
) -> None:
    asked: list[str] = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        return answer()

    with pytest.raises(kind, match=words) as caught:
        client_of(serve).ask("s", "m")
    assert caught.value.status == answer().status_code
    assert len(asked) <= 2


def test_what_does_not_pass_soon_enough_is_told() -> None:
    wait = {"Retry-After": "3600"}
    with pytest.raises(api.Unavailable, match="503 draining") as caught:
        client_of(lambda request: refused(503, "draining", headers=wait)).ask("s", "m")
    assert caught.value.retry_after == 3600


@pytest.mark.parametrize(
    "odd",
    [
        lambda: refused(406, "not_acceptable"),
        lambda: httpx.Response(200, json={"hello": 1}),
        lambda: refused(503, "no_stream_slot", headers={"Retry-After": "2"}),
        lambda: refused(429, "too_many_streams", headers={"Retry-After": "2"}),
    ],
)
def test_where_there_are_no_streams_it_polls(odd: t.Callable[[], httpx.Response]) -> None:
    events = a_turn(["a", "b"])

    def serve(request: httpx.Request) -> httpx.Response:
        streams = request.headers["Accept"] == "text/event-stream"
        return odd() if streams else polled(events, request)

    assert [e.raw for e in client_of(serve).chat("s", "m")] == [e.as_dict() for e in events]


def test_a_login_by_cookies_or_headers() -> None:
    seen: list[httpx.Headers] = []

    def serve(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return good()

    client_of(serve, cookies={"session": "x"}, headers={"X-Shop": "1"}).ask("s", "m")
    (headers,) = seen
    assert headers["Cookie"] == "session=x" and headers["X-Shop"] == "1"
    assert headers["Sec-Fetch-Site"] == "same-origin" and "Authorization" not in headers


def test_it_closes_what_it_opened_and_nothing_else() -> None:
    with httpx.Client(transport=httpx.MockTransport(lambda request: good())) as http:
        with api.Client("http://test", http=http) as client:
            client.ask("s", "m")
        assert not http.is_closed
    with api.Client("http://test") as client:
        pass
    assert client._http.is_closed


def test_importing_it_loads_no_server() -> None:
    code = (
        "import sys, agentao_web.client; "
        "print(sorted({'flask', 'sqlalchemy', 'agentao', 'openai', 'pydantic', 'werkzeug', 'mcp'}"
        " & set(sys.modules)), [m for m in sys.modules if m.startswith('agentao_web') and "
        "not m.startswith('agentao_web.client')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == "[] ['agentao_web']", done.stdout + done.stderr


def test_the_package_has_its_names_when_they_are_asked_for() -> None:
    import agentao_web

    for name in agentao_web.__all__:
        assert getattr(agentao_web, name) is not None and name in dir(agentao_web)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(agentao_web, "nonsense")  # noqa: B009


# -- in a host's tests -------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: t.Any) -> cabc.Iterator[Flask]:
    made = Flask("host")
    made.config.update(AGENTAO_ROOT=str(tmp_path))
    AgentaoWeb(
        authenticate=lambda request: Principal("shop", "ann"),
        agents=testing.scripted(
            testing.say("hello"), testing.ask("write_file", path="a"), testing.say(" there")
        ),
    ).init_app(made, url_prefix="/agent")
    yield made
    shutdown(made, grace=2)


@pytest.mark.parametrize("stream", [True, False])
def test_without_a_network_in_a_hosts_tests(app: Flask, stream: bool) -> None:
    with (
        httpx.Client(transport=httpx.WSGITransport(app=app)) as http,
        api.Client("http://test/agent", http=http, stream=stream) as client,
    ):
        reply = client.ask("s", "hi", on_question=lambda question: True)
        assert reply.text.endswith("there") and reply.ok and reply.tool_count == 1
        assert [s["session_id"] for s in client.sessions()] == ["s"]


def test_threads_may_share_a_client(app: Flask) -> None:
    replies: list[str] = []
    with httpx.Client(transport=httpx.WSGITransport(app=app)) as http:
        client = api.Client("http://test/agent", http=http)

        def talk(n: int) -> None:
            reply = client.ask(f"s{n}", "hi", on_question=lambda question: True)
            replies.append(reply.text)

        threads = [threading.Thread(target=talk, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(replies) == 4
