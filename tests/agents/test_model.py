"""Real agents against a scripted model: a stop cuts off its own call, wherever it waits, and
nothing else; connections are shared and kept."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import gc
import http.server
import json
import logging
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import typing as t

import pytest
from agentao import Agentao
from agentao.cancellation import CancellationToken
from agentao.llm import LLMClient
from agentao.mcp.registry import InMemoryMCPRegistry
from agentao.transport import AgentEvent
from agentao.transport import SdkTransport

from agentao_web.agents.model.pool import ModelPool
from agentao_web.agents.model.pool import check_agentao
from tests.model_server import ModelServer
from tests.model_server import Reply
from tests.model_server import Request
from tests.model_server import call
from tests.model_server import cut
from tests.model_server import fail
from tests.model_server import hang
from tests.model_server import hang_after
from tests.model_server import last_command
from tests.model_server import length
from tests.model_server import obey
from tests.model_server import say
from tests.model_server import slow_headers
from tests.model_server import think
from tests.model_server import tokens
from tests.model_server import vanish
from tests.patience import PATIENCE

#: A stop takes about a millisecond; the rest is for machines that do something else meanwhile.
#: Still not what ends a call otherwise: the read timeout, after a minute.
SOON = 50.0
#: A self-signed certificate is cheap where there is an openssl.
SCHEMES = ["http", "https"] if shutil.which("openssl") else ["http"]


class Turn:
    """One turn on a thread of its own, to be watched and stopped from the test's."""

    def __init__(self, agent: Agent, message: str) -> None:
        self.agent = agent
        self.text: str | None = None
        self._token = CancellationToken()
        self._cancelled_at = 0.0
        self._thread = threading.Thread(target=self._run, args=(message,), daemon=True)
        agent.chunks.clear()
        self._thread.start()

    def _run(self, message: str) -> None:
        self.text = self.agent.chat(message, self._token)

    def cancel(self) -> None:
        self._cancelled_at = time.monotonic()
        self._token.cancel("test")

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the turn did not end"

    def assert_cancelled(self, request: Request | None = None) -> None:
        self.join()
        assert time.monotonic() - self._cancelled_at < SOON
        assert self.agent.status == "cancelled"
        if request is not None:
            assert request.closed_at is not None
            assert request.closed_at - self._cancelled_at < SOON


class Agent:
    """A real agent on the pool, and what it emitted."""

    def __init__(self, pool: ModelPool, base_url: str, root: pathlib.Path, **llm: t.Any) -> None:
        self.chunks: list[str] = []
        self.events: list[AgentEvent] = []
        self._emitted = threading.Condition()
        llm = {"api_key": "sk-test", "base_url": base_url, "model": "scripted", **llm}
        self._agent = Agentao(
            llm_client=pool.client(logger=LOGGER, **llm),
            working_directory=root,
            transport=SdkTransport(on_event=self._note),
            mcp_registry=InMemoryMCPRegistry(),
            project_instructions="",
            enabled_tools={"read_file"},
        )

    def _note(self, event: AgentEvent) -> None:
        with self._emitted:
            self.events.append(event)
            if event.type == "llm_text":
                self.chunks.append(event.data["chunk"])
            self._emitted.notify_all()

    def chat(self, message: str, token: CancellationToken | None = None) -> str:
        return str(self._agent.chat(message, cancellation_token=token))

    def start(self, message: str = "go") -> Turn:
        return Turn(self, message)

    def wait_for_chunks(self, count: int) -> None:
        with self._emitted:
            assert self._emitted.wait_for(lambda: len(self.chunks) >= count, PATIENCE)

    def wait_for_event(self, kind: str) -> AgentEvent:
        def found() -> AgentEvent | None:
            return next((event for event in self.events if event.type == kind), None)

        with self._emitted:
            assert self._emitted.wait_for(lambda: found() is not None, PATIENCE)
            return t.cast(AgentEvent, found())

    @property
    def status(self) -> str:
        return str(self._agent.last_turn.status)

    @property
    def outcome(self) -> tuple[str, str | None]:
        return self.status, self._agent.last_turn.incomplete_reason

    @property
    def missing_end(self) -> bool:
        return bool(self._agent.last_turn.finish_reason_missing)

    def close(self) -> None:
        self._agent.close()


LOGGER = logging.getLogger("test.model")

MakeAgent = cabc.Callable[..., Agent]
MakePool = cabc.Callable[..., ModelPool]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -nodes -days 2 -subj /CN=model -newkey ec"
    command += " -pkeyopt ec_paramgen_curve:prime256v1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True
    )
    return cert, key


@pytest.fixture(params=["http"])
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[ModelServer]:
    tls = None
    if request.param == "https":
        cert, key = request.getfixturevalue("certificate")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cert, key)
        monkeypatch.setenv("SSL_CERT_FILE", cert)
    with ModelServer(tls=tls) as model:
        yield model


@pytest.fixture
def make_pool(server: ModelServer) -> cabc.Iterator[MakePool]:
    """After the server's, so that a certificate of its own is already trusted."""
    with contextlib.ExitStack() as made:

        def make(**options: t.Any) -> ModelPool:
            return made.enter_context(contextlib.closing(ModelPool(**options)))

        yield make


@pytest.fixture
def pool(make_pool: MakePool) -> ModelPool:
    return make_pool()


@pytest.fixture
def make_agent(
    pool: ModelPool, server: ModelServer, tmp_path: pathlib.Path
) -> cabc.Iterator[MakeAgent]:
    with contextlib.ExitStack() as made:

        def make(*, on: ModelPool = pool, base_url: str = server.base_url, **llm: t.Any) -> Agent:
            agent = Agent(on, base_url, tmp_path, **llm)
            made.callback(agent.close)
            return agent

        yield make


@pytest.fixture
def agent(make_agent: MakeAgent) -> Agent:
    return make_agent()


@pytest.fixture(autouse=True)
def no_thread_left() -> cabc.Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert not left


@pytest.fixture
def no_collector() -> cabc.Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def both_schemes(test: cabc.Callable[..., None]) -> t.Any:
    return pytest.mark.parametrize("server", SCHEMES, indirect=True)(test)


def until(holds: cabc.Callable[[], bool]) -> None:
    """Look again and again; for what neither side can tell us."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


# -------------------------------------------------------------------------------- answers


@both_schemes
def test_an_answer_arrives_whole(agent: Agent, server: ModelServer) -> None:
    server.script(say("hello ", "world"))

    assert agent.chat("hi") == "hello world"
    assert agent.outcome == ("ok", None)
    assert agent.chunks == ["hello ", "world"]


def test_a_tool_call_and_its_answer(agent: Agent, server: ModelServer) -> None:
    server.script(call("read_file", {"file_path": "missing"}), say("done"))

    assert agent.chat("read it") == "done"
    assert server.requests[1].body["messages"][-1]["role"] == "tool"


def test_the_command_language_answers_line_by_line(agent: Agent) -> None:
    assert agent.chat('call read_file {"file_path": "missing"}\nsay all read') == "all read"
    assert agent.chat("tokens 3") == "tok tok tok "


@pytest.mark.parametrize(
    ("reply", "text", "outcome", "missing_end"),
    [
        (think("because", answer=("so",)), "so", ("ok", None), False),
        (length("cut sh"), "cut sh", ("ok", "length_truncated"), False),
        (cut("half"), "half", ("ok", None), True),
    ],
)
def test_other_ends_of_an_answer(
    agent: Agent,
    server: ModelServer,
    reply: Reply,
    text: str,
    outcome: tuple[str, str],
    missing_end: bool,
) -> None:
    server.script(reply)

    assert agent.chat("go") == text
    assert agent.outcome == outcome
    assert agent.missing_end is missing_end


def test_a_model_that_does_not_stream_answers_whole(make_agent: MakeAgent) -> None:
    assert make_agent(model="gemini-scripted").chat("say in one piece") == "in one piece"


def test_the_request_carries_what_was_configured(
    make_agent: MakeAgent, server: ModelServer
) -> None:
    make_agent(max_tokens=77, temperature=0.5, extra_body={"seed": 7}).chat("say hi")

    body = server.requests[0].body
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (77, 0.5, 7)
    assert server.requests[0].headers["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize("model", ["scripted", "gemini-scripted"])
def test_a_request_is_the_one_agentao_would_send(
    make_pool: MakePool, server: ModelServer, model: str
) -> None:
    """Messages, tool pairs, pictures and tools go past the SDK's search for names to change."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    asked = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]},
        {"role": "assistant", "content": None, "tool_calls": [asked], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "grün"},
    ]
    schema = {"type": "object", "properties": {"at": {"type": "string", "default": None}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    llm = {
        "api_key": "sk-test",
        "base_url": server.base_url,
        "model": model,
        "extra_body": {"seed": 7},
    }
    for client in (
        make_pool().client(logger=LOGGER, **llm),
        LLMClient(log_file=None, logger=LOGGER, **llm),
    ):
        server.script(say("a cat"))
        client.chat_stream(messages, tools=tools)

    ours, theirs = (request.body for request in server.requests)
    assert ours == theirs
    assert [message["role"] for message in ours["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
    ]


def _chunk(delta: t.Any, **more: t.Any) -> dict[str, t.Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
    return {"id": "c", "object": "chat.completion.chunk", "model": "other", "choices": [choice]}


def _call_part(**more: t.Any) -> dict[str, t.Any]:
    return _chunk({"tool_calls": [more]})


#: What is read just as the SDK and Agentao read it. The odd streams are in test_streams.py.
STREAMS: dict[str, list[t.Any]] = {
    "text and usage": [
        _chunk({"role": "assistant", "content": ""}),
        _chunk({"content": "he"}),
        _chunk({"content": "llo"}),
        _chunk({}, finish_reason="stop"),
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "total_tokens": 14,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
        },
    ],
    "usage beside the text": [
        {**_chunk({"content": "x"}), "usage": {"prompt_tokens": 1, "completion_tokens": None}},
        {"choices": None, "usage": {"prompt_tokens": 2, "prompt_tokens_details": None}},
    ],
    "reasoning of either name": [
        _chunk({"reasoning_content": "so "}),
        _chunk({"reasoning": "then"}),
        _chunk({"reasoning": "no", "reasoning_content": "yes"}),
        _chunk({"content": "ok"}, finish_reason="stop"),
    ],
    "a call in pieces": [
        _call_part(index=0, id="a", type="function", function={"name": "re", "arguments": ""}),
        _call_part(index=0, function={"name": "ad", "arguments": '{"p":'}),
        _call_part(index=1, id="b", function={"name": "ls", "arguments": "{}"}),
        _call_part(index=0, function={"arguments": " 1}"}),
        _chunk({}, finish_reason="tool_calls"),
    ],
    "no end": [_chunk({"content": "half"})],
    "fields nobody knows": [{**_chunk({"content": "a", "items": [1], "get": 2}), "keys": {"a": 1}}],
    "no delta": [_chunk(None), _chunk({"content": "x"}, finish_reason="length")],
    "names of methods at every level": [
        {
            **_chunk(
                {"content": "x", "get": 1, "__class__": 2, "__len__": 3, "__bool__": 0, "copy": 4},
                pop=5,
                __getattr__=6,
            ),
            "usage": {"prompt_tokens": 3, "items": 1, "__iter__": 2, "__dict__": {"a": 1}},
            "__getattribute__": 7,
        }
    ],
    "an empty object": [{}, _chunk({"content": "x"})],
    "deep below": [{**_chunk({"content": "x"}), "more": json.loads("[" * 300 + "]" * 300)}],
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_as_the_sdk_reads_it(make_pool: MakePool, name: str) -> None:
    """A token is JSON here and a model of the SDK's there: Agentao must see the same in both."""
    data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in STREAMS[name])
    answer = (data + "data: [DONE]\n\n").encode()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: t.Any) -> None:
            pass

    def read(client: LLMClient) -> t.Any:
        told: list[tuple[str, str]] = []
        try:
            got = client.chat_stream(
                [{"role": "user", "content": "hi"}],
                tools=None,
                on_text_chunk=lambda text: told.append(("text", text)),
                on_reasoning_chunk=lambda text: told.append(("thought", text)),
            )
        except Exception as exc:
            return told, type(exc), str(exc)
        message = got.choices[0].message
        calls = [
            (c.id, c.function.name, c.function.arguments, vars(c.function).get("thought_signature"))
            for c in message.tool_calls or ()
        ]
        return (
            *(told, calls, message.content, message.reasoning_content, got.model),
            *(got.choices[0].finish_reason, got.finish_reason_reported),
            *(getattr(got.usage, "prompt_tokens", None), client.usage_snapshot()),
        )

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as provider:
        serving = threading.Thread(target=provider.serve_forever, args=(0.01,))
        serving.start()
        try:
            url = f"http://127.0.0.1:{provider.server_address[1]}/v1"
            llm = {"api_key": "sk-test", "base_url": url, "model": "scripted"}
            ours = read(make_pool(attempts=1).client(logger=LOGGER, **llm))
            theirs = read(LLMClient(log_file=None, logger=LOGGER, **llm))
        finally:
            provider.shutdown()
            serving.join(PATIENCE)

    assert ours == theirs


# ---------------------------------------------------------------------------------- stops


@both_schemes
def test_a_stop_while_tokens_flow(agent: Agent, server: ModelServer) -> None:
    server.script(tokens(100_000, 200))
    turn = agent.start()
    agent.wait_for_chunks(3)

    turn.cancel()

    turn.assert_cancelled(_closed(server, 1))
    assert turn.text == "".join(agent.chunks)
    assert agent.chat("say again") == "again"


@both_schemes
def test_a_stop_in_the_middle_of_silence_keeps_the_text(agent: Agent, server: ModelServer) -> None:
    server.script(hang_after("so ", "far"))
    turn = agent.start()
    agent.wait_for_chunks(2)

    turn.cancel()

    turn.assert_cancelled(_closed(server, 1))
    assert turn.text == "so far"
    assert agent.chat("say again") == "again"


@both_schemes
@pytest.mark.parametrize("reply", [hang_after(), hang(), slow_headers(PATIENCE)])
def test_a_stop_before_the_first_token(agent: Agent, server: ModelServer, reply: Reply) -> None:
    server.script(reply)
    turn = agent.start()
    request = server.wait_for_request(1)

    turn.cancel()

    server.wait_closed(request)
    turn.assert_cancelled(request)
    assert agent.chat("say again") == "again"


def test_a_stop_on_a_kept_connection(agent: Agent, server: ModelServer) -> None:
    server.script(say("first"), hang())
    agent.chat("go")
    turn = agent.start()
    server.wait_for_request(2)

    turn.cancel()

    turn.assert_cancelled(_closed(server, 2))
    assert server.connections == 1
    assert agent.chat("say again") == "again"


@pytest.mark.parametrize("api_format", ["anthropic-messages", "openai-responses"])
@pytest.mark.parametrize("reply", [hang(), hang_after()])
def test_a_stop_in_the_other_wire_formats(
    make_agent: MakeAgent, server: ModelServer, api_format: str, reply: Reply
) -> None:
    server.script(reply)
    turn = make_agent(api_format=api_format).start()
    server.wait_for_request(1)

    turn.cancel()

    turn.assert_cancelled(_closed(server, 1))


def test_a_stop_of_a_call_that_does_not_stream(
    make_agent: MakeAgent, server: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script(hang())
    turn = make_agent(model="gemini-scripted").start()
    server.wait_for_request(1)

    turn.cancel()

    turn.assert_cancelled(_closed(server, 1))
    assert len(server.requests) == 1
    assert [record for record in caplog.records if record.name == LOGGER.name] == []


def test_a_stop_during_the_look_up_sends_nothing(
    agent: Agent, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up itself goes on, and the socket that comes of it is cut off at once."""
    token = CancellationToken()
    look_up = socket.getaddrinfo

    def slow_look_up(*args: t.Any, **kwargs: t.Any) -> t.Any:
        token.cancel("test")
        return look_up(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    server.script(hang())

    agent.chat("go", token)

    assert agent.status == "cancelled"
    assert server.requests == []


def test_a_stop_while_connecting(make_agent: MakeAgent) -> None:
    with _full_listener() as port:
        agent = make_agent(base_url=f"http://127.0.0.1:{port}/v1")
        turn = agent.start()
        until(lambda: _connecting(port))

        turn.cancel()

        turn.assert_cancelled()
    with ModelServer(port=port):
        assert agent.chat("say again") == "again"


def test_a_stop_in_the_tls_handshake(make_agent: MakeAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        turn = make_agent(base_url=f"https://127.0.0.1:{listener.getsockname()[1]}/v1").start()
        listener.settimeout(PATIENCE)
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(PATIENCE)
            assert peer.recv(1)

            turn.cancel()

            while peer.recv(4096):
                pass
        turn.assert_cancelled()


def test_a_stop_before_the_call_sends_nothing(agent: Agent, server: ModelServer) -> None:
    token = CancellationToken()
    token.cancel("test")

    agent.chat("go", token)

    assert agent.status == "cancelled"
    assert server.requests == []


def test_a_stop_while_waiting_to_try_again(agent: Agent, server: ModelServer) -> None:
    server.script(fail(503, retry_after=60))
    turn = agent.start()
    assert agent.wait_for_event("llm_retry").data["max_retries"] == 1

    turn.cancel()

    turn.assert_cancelled()
    assert len(server.requests) == 1


@both_schemes
def test_stops_leave_the_other_sessions_alone(make_agent: MakeAgent, server: ModelServer) -> None:
    """Eight answers stream over the same pool while a ninth session is stopped 40 times."""
    server.reply = _numbered
    others = [make_agent() for _ in range(8)]
    turns = [other.start(f"count 200 n{index}-") for index, other in enumerate(others)]
    for other in others:
        other.wait_for_chunks(1)
    victim = make_agent()
    for message in ["count 1000 v", "hang_after x"] * 20:
        turn = victim.start(message)
        victim.wait_for_chunks(1)
        turn.cancel()
        turn.assert_cancelled()

    for index, turn in enumerate(turns):
        turn.join()
        assert turn.text == "".join(f"n{index}-{i} " for i in range(200))
        assert turn.agent.outcome == ("ok", None)


@pytest.mark.parametrize("reply", [hang_after("x"), tokens(1_000_000)])
def test_stops_leave_no_descriptor_behind(
    agent: Agent, server: ModelServer, reply: Reply, no_collector: None
) -> None:
    """Not even until the collector runs: the SDK's streams are in cycles."""

    def stop_one() -> None:
        server.script(reply)
        turn = agent.start()
        agent.wait_for_chunks(1)
        turn.cancel()
        turn.assert_cancelled()

    stop_one()
    server.wait_closed(server.requests[0])
    until(lambda: server.open_connections == 0)
    before = _descriptors()
    for _ in range(30):
        stop_one()
    until(lambda: server.open_connections == 0)
    until(lambda: _descriptors() <= before)


# ---------------------------------------------------------------------------- connections


@both_schemes
def test_ten_turns_share_one_connection(make_agent: MakeAgent, server: ModelServer) -> None:
    for _ in range(5):
        assert make_agent().chat("say one") == "one"
    one = make_agent()
    for _ in range(5):
        assert one.chat("say two") == "two"

    assert server.connections == 1


def test_a_kept_connection_that_died_is_not_noticed(agent: Agent, server: ModelServer) -> None:
    """Agentao alone would wait at least 7.5 seconds before the second try."""
    server.script(say("first"), vanish(), say("second"))
    agent.chat("go")

    assert agent.chat("go") == "second"
    assert [request.connection for request in server.requests] == [1, 1, 2]
    assert all(event.type != "llm_retry" for event in agent.events)


def test_a_server_that_restarted_is_not_noticed(agent: Agent, server: ModelServer) -> None:
    agent.chat("say first")
    server.disconnect()
    until(lambda: server.open_connections == 0)

    assert agent.chat("say second") == "second"


def test_a_new_connection_that_dies_is_a_failure(
    make_agent: MakeAgent, make_pool: MakePool, server: ModelServer
) -> None:
    agent = make_agent(on=make_pool(attempts=1))
    server.script(vanish())

    agent.chat("go")

    assert agent.outcome == ("ok", "llm_error")
    assert len(server.requests) == 1


def test_cookies_are_not_kept(agent: Agent, server: ModelServer) -> None:
    """One tenant's calls must not be tied to another's by the provider's cookies."""
    server.script(fail(400), say("ok"))
    server.cookie = "who=tenant-a"
    agent.chat("go")
    agent.chat("go")

    assert "cookie" not in server.requests[1].headers


def test_a_proxy_from_the_environment(
    make_agent: MakeAgent,
    make_pool: MakePool,
    server: ModelServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://u:p@127.0.0.1:{server.port}")
    proxied = make_pool()
    agent = make_agent(on=proxied, base_url="http://model.invalid/v1")
    assert agent.chat("say far away") == "far away"
    assert server.requests[0].path == "http://model.invalid/v1/chat/completions"
    assert "proxy-authorization" in server.requests[0].headers

    server.script(hang())
    turn = agent.start()
    server.wait_for_request(2)
    turn.cancel()
    turn.assert_cancelled(_closed(server, 2))

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert make_agent(on=proxied).chat("say near") == "near"
    assert server.requests[-1].path == "/v1/chat/completions"


def test_closing_the_pool_ends_a_call_and_refuses_the_next(
    agent: Agent, pool: ModelPool, server: ModelServer
) -> None:
    server.script(hang_after("x"))
    turn = agent.start()
    agent.wait_for_chunks(1)

    pool.close()

    turn.join()
    assert (agent.outcome, agent.missing_end) == (("ok", None), True), "what was read stays"
    agent.chat("go")
    assert agent.outcome == ("ok", "llm_error")
    assert len(server.requests) == 1


# ------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("reply", "tries"),
    [
        (fail(400), 1),
        (fail(401), 1),
        (fail(404), 1),
        (fail(429, retry_after=0), 3),
        (fail(500, retry_after=0), 3),
        (fail(503, retry_after=0), 3),
    ],
)
def test_what_is_tried_again(
    make_agent: MakeAgent, make_pool: MakePool, server: ModelServer, reply: Reply, tries: int
) -> None:
    agent = make_agent(on=make_pool(attempts=3))
    server.reply = lambda body: reply

    agent.chat("go")

    assert agent.outcome == ("ok", "llm_error")
    assert len(server.requests) == tries


def test_the_second_try_may_succeed(agent: Agent, server: ModelServer) -> None:
    """In every turn anew: each call has its own count."""
    for _ in range(2):
        server.script(fail(500, retry_after=0), say("better"))

        assert agent.chat("go") == "better"
        assert agent.outcome == ("ok", None)


def test_a_model_that_never_begins_is_asked_once(
    make_agent: MakeAgent, make_pool: MakePool, server: ModelServer
) -> None:
    impatient = make_pool(first_token_timeout=0.1, attempts=3)
    agent = make_agent(on=impatient)
    server.script(hang())
    agent.chat("go")
    assert agent.outcome == ("ok", "llm_error")
    assert len(server.requests) == 1

    # A call that answers in one piece has the other timeout.
    server.script(slow_headers(0.3, "late"))
    assert make_agent(on=impatient, model="gemini-scripted").chat("go") == "late"


# ------------------------------------------------------------------------------------ logs


def test_no_prompt_and_no_provider_text_is_logged(
    make_agent: MakeAgent,
    server: ModelServer,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, LOGGER.name)
    caplog.set_level(logging.INFO)
    agentaos = logging.getLogger("agentao")
    level = agentaos.level
    agent = make_agent()
    server.script(
        say("answer-7f3a"),
        call("read_file", {"file_path": "argument-7f3a"}),
        say("answer-7f3a"),
        fail(400, '{"error": {"message": "provider-7f3a"}}'),
    )
    for _ in range(3):
        agent.chat("prompt-7f3a")

    assert "7f3a" not in caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name == LOGGER.name]
    assert ours == ["model call failed: BadRequestError, status 400, attempt 1 of 2"]
    assert agentaos.handlers == []
    assert agentaos.level == level
    assert list(tmp_path.rglob("agentao.log")) == []


# --------------------------------------------------------------------------------- Agentao


def test_an_agentao_without_a_private_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_agentao()
    monkeypatch.delattr(LLMClient, "_make_adapter")

    with pytest.raises(RuntimeError, match=r"_make_adapter.*pip install 'agentao==0\.5\.17'"):
        check_agentao()


def test_building_a_client_shares_the_sdk(pool: ModelPool, server: ModelServer) -> None:
    def build(key: str) -> t.Any:
        return pool.client(logger=LOGGER, api_key=key, base_url=server.base_url, model="m").client

    assert build("a") is build("a")
    assert build("a") is not build("b")


# ---------------------------------------------------------------------------------- pieces


def _closed(server: ModelServer, number: int) -> Request:
    request = server.wait_for_request(number)
    server.wait_closed(request)
    return request


def _numbered(body: dict[str, t.Any]) -> Reply:
    """`count 3 a` is answered with "a0 a1 a2 ", all else as always."""
    text, _ = last_command(body["messages"])
    if not text.startswith("count "):
        return obey(body)
    _, count, name = text.split()
    return say(*(f"{name}{i} " for i in range(int(count))), delay=0.005)


@contextlib.contextmanager
def _full_listener() -> cabc.Iterator[int]:
    """A port whose backlog is full: further connects hang."""
    with contextlib.ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        for _ in range(10):
            filler = socket.socket()
            filler.settimeout(0.2)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                filler.close()
                break
            open_sockets.enter_context(filler)
        yield port


def _connecting(port: int) -> bool:
    """Somebody's SYN to *port* is unanswered (state 02 in the kernel's table)."""
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(
        remote.endswith(f":{port:04X}") and state == "02"
        for _, _, remote, state, *_ in map(str.split, lines)
    )


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
