"""Whatever the provider does: the turn ends once, in words that are true, and the next turn of the
session works and has the whole conversation. Real Agentao behind the routes; the model is scripted.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import email.utils
import itertools
import json
import logging
import os
import time
import typing as t
from pathlib import Path

import pytest
from agentao import Agentao
from agentao.mcp.registry import InMemoryMCPRegistry

from agentao_web import shutdown
from tests.model_server import Line
from tests.model_server import ModelServer
from tests.model_server import Reply
from tests.model_server import act
from tests.model_server import calls
from tests.model_server import cut
from tests.model_server import drop
from tests.model_server import fail
from tests.model_server import hang
from tests.model_server import hang_after
from tests.model_server import obey
from tests.model_server import say
from tests.model_server import think
from tests.model_server import tokens
from tests.model_server import vanish
from tests.test_real_agents import Web

#: Long enough for an answer on a busy machine, short enough to be waited out.
SILENCE = 5.0
#: A safety net, never a measure.
LONG = 300.0


class Patient(Web):
    """Waits for the end of a turn for as long as it takes."""

    def ask(self, message: str, sid: str = "s", *, user: str = "ann") -> dict[str, t.Any]:
        return self.ending(self.post(message, sid, wait=20, user=user), sid)

    def ending(self, body: dict[str, t.Any], sid: str = "s") -> dict[str, t.Any]:
        """How the turn ended that was answered with *body*, which may have come before."""
        until = time.monotonic() + LONG
        after = body["cursor"]
        while body["status"] == "running":
            assert time.monotonic() < until, body
            url = f"/chat/{sid}/events?after={after}&wait=5"
            page = self.client.get(url, headers=self.headers()).json
            after = page["cursor"]
            for event in page["events"]:
                if event["type"] in ("done", "error") and event["turn_id"] == body["turn_id"]:
                    body = {"reply": "", **body, **event, **event["data"]}
        return body


Make = cabc.Callable[..., Patient]


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def web(tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Make]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted")
    made: list[Patient] = []

    def make(*, agents: t.Any = None, **config: t.Any) -> Patient:
        made.append(Patient(tmp_path, model, agents=agents, **config))
        return made[-1]

    yield make
    model.release()
    for one in made:
        shutdown(one.app, grace=2)


def events(web: Web, sid: str = "s") -> list[dict[str, t.Any]]:
    """The whole log of the session."""
    found: list[dict[str, t.Any]] = []
    after = 0
    while True:
        url = f"/chat/{sid}/events?wait=0&after={after}"
        page = web.client.get(url, headers=web.headers()).json
        if not page["events"]:
            return found
        found += page["events"]
        after = page["cursor"]


def ended(web: Web, sid: str = "s") -> list[tuple[str, str | None]]:
    """(status, reason) of every turn of the session, as the log has it."""
    log = events(web, sid)
    ends = [e for e in log if e["type"] in ("done", "error")]
    assert len({e["turn_id"] for e in ends}) == len(ends), "each turn ends once"
    assert {e["turn_id"] for e in log if e["turn_id"]} == {e["turn_id"] for e in ends}
    return [(e["data"]["status"], e["data"]["reason"]) for e in ends]


def _until_idle(web: Web) -> None:
    until = time.monotonic() + LONG
    while web.client.get("/session/s", headers=web.headers()).json["state"] != "idle":
        assert time.monotonic() < until
        time.sleep(0.02)


def said(body: dict[str, t.Any], role: str = "user") -> list[str]:
    """What a request has of *role*: its last line, as Agentao puts reminders before."""
    found = []
    for message in body["messages"]:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        text = "".join(part.get("text", "") for part in parts).strip()
        if message["role"] == role and not text.endswith("</system-reminder>"):
            found.append(text.rpartition("\n")[2])
    return found


# -- what a provider may do ----------------------------------------------------------------------


def _headers_first(then: cabc.Callable[[Line], None]) -> Reply:
    def answer(line: Line) -> None:
        line.head()
        then(line)

    return act(answer)


def _after_words(then: cabc.Callable[[Line], None]) -> Reply:
    def answer(line: Line) -> None:
        line.delta(content="some ")
        line.delta(content="words")
        then(line)

    return _headers_first(answer)


def _half_a_call(then: cabc.Callable[[Line], None], *, words: bool = False) -> Reply:
    """The model was about to write a file."""

    def answer(line: Line) -> None:
        line.delta(
            tool_calls=[
                {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "write_file", "arguments": '{"file_path": "a", "con'},
                }
            ]
        )
        then(line)

    return _after_words(answer) if words else _headers_first(answer)


def _hang(line: Line) -> None:
    line.pause()


def _reset(line: Line) -> None:
    line.reset()


def _reset_later(line: Line) -> None:
    """When what was sent before has been read: it would be lost with the connection."""
    line.pause(0.5)
    line.reset()


def _hang_up(line: Line) -> None:
    line.hang_up()


def _end(line: Line) -> None:
    line.end()


def _finish_and_reset(line: Line) -> None:
    line.finish("stop")
    # The client reads that before the reset can overtake it.
    line.pause(0.5)
    line.reset()


def _role_then_hang(line: Line) -> None:
    """As servers do that read the prompt after their first chunk."""
    line.delta(role="assistant", content="")
    line.pause()


def _keep_alive(line: Line) -> None:
    while True:
        line.chunk(b": still processing\n\n")
        line.pause(0.05)


def _error_event(line: Line) -> None:
    error = {"error": {"message": "the upstream is gone", "code": 502}}
    line.chunk(b"data: " + json.dumps(error).encode() + b"\n\n")
    line.end()


def _trickling_headers(line: Line) -> None:
    line.send(b"HTTP/1.1 200 OK\r\n")
    for n in itertools.count():
        line.send(b"X-More-%d: yes\r\n" % n)
        line.pause(0.05)


def _endless_headers(line: Line) -> None:
    line.send(b"HTTP/1.1 200 OK\r\n")
    for n in itertools.count():
        line.send(b"X-More-%d: %b\r\n" % (n, b"x" * 1000))


def _endless_arguments(line: Line) -> None:
    while True:
        line.delta(tool_calls=[{"index": 0, "function": {"arguments": "x" * 500}}])


def _endless_name(line: Line) -> None:
    while True:
        line.delta(tool_calls=[{"index": 0, "function": {"name": "x" * 500}}])


def _endless_calls(line: Line) -> None:
    for n in itertools.count(1):
        function = {"name": "read_file", "arguments": "{}"}
        line.delta(tool_calls=[{"index": n, "id": f"c{n}", "function": function}])


def _one_endless_event(line: Line) -> None:
    line.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"')
    while True:
        line.chunk(b"x" * 1000)


def _one_large_event(line: Line) -> None:
    line.delta(content="x" * 60_000)
    line.pause()


FAILED = ("failed", "llm_unavailable")
CUT = ("incomplete", "stream_cut")
TOO_MUCH = ("incomplete", "text_limit")


@dataclasses.dataclass(frozen=True)
class Case:
    """What the model's server does with one turn, and what becomes of the turn."""

    name: str
    replies: tuple[Reply, ...]
    end: tuple[str, str | None]
    reply: str = ""
    #: How many requests the turn makes.
    asks: int = 1
    config: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    details: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)


def _storm(status: int) -> Case:
    replies = (fail(status, retry_after=0),) * 2
    return Case(f"{status} again and again", replies, FAILED, "", 2, {"llm_attempts": 2},
                {"retry_after": 0})  # fmt: skip


ONCE = {"llm_attempts": 1}
IMPATIENT = {"llm_first_token_timeout": SILENCE, "llm_read_timeout": SILENCE, "llm_attempts": 2}
SHORT = {"turn_text": 20_000}

CASES = [
    # The first of them is taken for a kept connection that died while idle.
    Case("closed before the headers", (vanish(), vanish()), FAILED, asks=2, config=ONCE),
    Case("reset before the headers", (act(_reset), act(_reset)), FAILED, asks=2, config=ONCE),
    Case("reset after the headers", (_headers_first(_reset),), FAILED, config=ONCE),
    Case("an end in the middle", (cut("some ", "words"),), CUT, "some words"),
    Case("closed in the middle", (drop("some ", "words"),), CUT, "some words"),
    Case("hung up in the middle", (_after_words(_hang_up),), CUT, "some words"),
    Case("an error in the middle", (_after_words(_error_event),), CUT, "some words"),
    Case("reset when all was said", (_after_words(_finish_and_reset),), ("completed", None),
         "some words"),
    Case("reset in a tool call", (_half_a_call(_reset),), FAILED, config=ONCE),
    Case("closed in a tool call", (_half_a_call(_hang_up),), FAILED, config=ONCE),
    Case("an end in a tool call", (_half_a_call(_end),), FAILED, config=ONCE),
    Case("reset in the middle", (_after_words(_reset_later),), CUT, "some words"),
    Case("words, and an end in a tool call", (_half_a_call(_end, words=True),), CUT, "some words"),
    Case("words, and closed in a tool call", (_half_a_call(_hang_up, words=True),), CUT,
         "some words"),
    Case("silence before the headers", (hang(),), FAILED, config=IMPATIENT),
    Case("silence after the headers", (_headers_first(_hang),), FAILED, config=IMPATIENT),
    Case("silence after the role", (_headers_first(_role_then_hang),), FAILED, config=IMPATIENT),
    Case("silence after words", (hang_after("some ", "words"),), CUT, "some words",
         config=IMPATIENT),
    Case("silence in a tool call", (_half_a_call(_hang, words=True),), CUT, "some words",
         config=IMPATIENT),
    Case("keep-alives for ever", (_headers_first(_keep_alive),), FAILED, config=IMPATIENT),
    Case("keep-alives for ever after words", (_after_words(_keep_alive),), CUT, "some words",
         config=IMPATIENT),
    Case("headers for ever, slowly", (act(_trickling_headers),), FAILED, config=IMPATIENT),
    Case("headers for ever", (act(_endless_headers),), FAILED, config=ONCE),
    *map(_storm, (429, 500, 503, 529)),
    Case("later", (fail(429, retry_after=3600),), FAILED, details={"retry_after": 3600}),
    Case("a little later than the turn lives", (fail(503, retry_after=50),), FAILED,
         details={"retry_after": 50}, config={"turn_timeout": 30}),
    Case("text for ever", (tokens(10**9),), TOO_MUCH, "tok " * 5000, config=SHORT),
    Case("thoughts for ever", (think(*["hm " * 100] * 200),), TOO_MUCH, config=SHORT),
    Case("one large event", (_headers_first(_one_large_event),), TOO_MUCH, "x" * 20_000,
         config=SHORT),
    Case("one event for ever", (_headers_first(_one_endless_event),), TOO_MUCH, config=SHORT),
    Case("arguments for ever", (_half_a_call(_endless_arguments),), TOO_MUCH, config=SHORT),
    Case("a name for ever", (_half_a_call(_endless_name),), TOO_MUCH, config=SHORT),
    Case("calls for ever", (_half_a_call(_endless_calls),), TOO_MUCH, config=SHORT),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whatever_the_provider_does_the_turn_ends_and_the_next_one_works(
    web: Make, model: ModelServer, case: Case
) -> None:
    w = web(policy="trusted", **case.config)
    assert w.ask("say first")["reply"] == "first"
    model.script(*case.replies)

    body = w.ask("the odd one")

    assert (body["status"], body["reason"]) == case.end
    assert body["reply"] == case.reply
    assert (body.get("error") or body).get("details", {}) == case.details
    requests = model.requests[1:]
    assert len(requests) == case.asks
    assert w.ask("say fine")["reply"] == "fine"
    after = model.requests[-1].body
    assert said(after) == ["say first", "the odd one", "say fine"]
    assert len(json.dumps(after)) < 200_000
    assert ended(w) == [("completed", None), case.end, ("completed", None)]
    assert not any(event["type"] == "tool_start" for event in events(w)), "nothing half runs"
    assert not (w.workspace() / "a").exists()
    for request in requests:
        # No call goes on behind the turn's back.
        assert request.finished or model.wait_closed(request) >= 0


# -- a window that is too small ------------------------------------------------------------------


def _counted(body: dict[str, t.Any]) -> int:
    """Tokens of a request, as the server counts them: no tools, so that the tests can do it too."""
    return len(json.dumps(body["messages"], ensure_ascii=False)) // 4


Refusal = cabc.Callable[[int, int], Reply]


def _refuses(
    limit: int, refusal: Refusal, then: cabc.Callable[[dict[str, t.Any]], Reply] = obey
) -> cabc.Callable[[dict[str, t.Any]], Reply]:
    """A model with a window of *limit* tokens."""

    def reply(body: dict[str, t.Any]) -> Reply:
        count = _counted(body)
        # Its usage would be an invented one, and Agentao believes it.
        body.pop("stream_options", None)
        return refusal(count, limit) if count > limit else then(body)

    return reply


def _error(http: int, **error: t.Any) -> Reply:
    return fail(http, json.dumps({"error": error}))


def _in_a_stream(message: str) -> Reply:
    def answer(line: Line) -> None:
        line.chunk(b"data: " + json.dumps({"error": {"message": message}}).encode() + b"\n\n")
        line.end()

    return _headers_first(answer)


#: Provider -> its words, and whether they have the size of the window.
REFUSALS: dict[str, tuple[Refusal, bool]] = {
    "openai": (
        lambda n, most: _error(
            400,
            code="context_length_exceeded",
            message=f"This model's maximum context length is {most} tokens. However, your "
            f"messages resulted in {n} tokens. Please reduce the length of the messages.",
        ),
        True,
    ),
    "openai responses": (
        lambda n, most: _error(
            400,
            code="context_length_exceeded",
            message="Your input exceeds the context window of this model.",
        ),
        False,
    ),
    "vllm": (
        lambda n, most: _error(
            400,
            code=400,
            type="BadRequestError",
            message=f"This model's maximum context length is {most} tokens. However, you requested "
            f"10 output tokens and your prompt contains at least {n} input tokens, for a total of "
            f"at least {n + 10} tokens.",
        ),
        True,
    ),
    "vllm, older": (
        lambda n, most: _error(
            400,
            message=f"The decoder prompt (length {n}) is longer than the maximum model length of "
            f"{most}. Make sure that `max_model_len` is no smaller than the number of text tokens.",
        ),
        True,
    ),
    "llama.cpp": (
        lambda n, most: _error(
            400,
            code=400,
            type="exceed_context_size_error",
            message=f"request ({n} tokens) exceeds the available context size ({most} tokens), "
            "try increasing it",
            n_prompt_tokens=n,
            n_ctx=most,
        ),
        True,
    ),
    "llama.cpp, older": (
        lambda n, most: _error(
            500,
            type="exceed_context_size_error",
            message="the request exceeds the available context size. try increasing the context "
            "size or enable context shift",
            n_prompt_tokens=n,
            n_ctx=most,
        ),
        True,
    ),
    "llama-cpp-python": (
        lambda n, most: _error(
            400, message=f"Requested tokens ({n}) exceed context window of {most}"
        ),
        True,
    ),
    "lm studio": (
        lambda n, most: fail(
            400,
            json.dumps(
                {
                    "error": "The number of tokens to keep from the initial prompt is greater than "
                    f"the context length (n_keep: {n}>= n_ctx: {most}). Try to load the model with "
                    "a larger context length, or provide a shorter input."
                }
            ),
        ),
        True,
    ),
    "lm studio, in a stream": (
        lambda n, most: _in_a_stream(
            f"Trying to keep the first {n} tokens when context the overflows. However, the model "
            f"is loaded with context length of only {most} tokens, which is not enough."
        ),
        True,
    ),
    "ollama": (
        lambda n, most: _error(
            400, message=f"prompt too long; exceeded max context length by {n - most} tokens"
        ),
        False,
    ),
    "anthropic": (
        lambda n, most: _error(
            400,
            type="invalid_request_error",
            message=f"prompt is too long: {n} tokens > {most} maximum",
        ),
        True,
    ),
    "gemini": (
        lambda n, most: _error(
            400,
            code=400,
            status="INVALID_ARGUMENT",
            message=f"The input token count ({n}) exceeds the maximum number of tokens allowed "
            f"({most}).",
        ),
        True,
    ),
    "mistral": (
        lambda n, most: _error(
            400,
            message=f"Prompt contains {n} tokens and 0 draft tokens, too large for model with "
            f"{most} maximum context length",
        ),
        True,
    ),
    "deepseek": (
        lambda n, most: _error(
            400,
            code="invalid_request_error",
            message=f"This model's maximum context length is {most} tokens. However, you requested "
            f"{n} tokens ({n} in the messages, 0 in the completion). Please reduce the length of "
            "the messages or completion.",
        ),
        True,
    ),
    "groq": (
        lambda n, most: _error(
            400,
            code="context_length_exceeded",
            message="Please reduce the length of the messages or completion.",
        ),
        False,
    ),
    "groq, per minute": (
        lambda n, most: _error(
            413,
            code="rate_limit_exceeded",
            type="tokens",
            message="Request too large for model `some` in organization `org` on tokens per minute "
            f"(TPM): Limit {most}, Requested {n}, please reduce your message size and try again.",
        ),
        False,
    ),
    "xai": (
        lambda n, most: _error(
            400,
            message=f"This model's maximum prompt length is {most} but the request contains {n} "
            "tokens.",
        ),
        True,
    ),
    "dashscope": (
        lambda n, most: _error(
            400,
            code="invalid_parameter_error",
            message=f"Range of input length should be [1, {most}]",
        ),
        True,
    ),
    "tgi": (
        lambda n, most: _error(
            422,
            message=f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {most}."
            f" Given: {n} `inputs` tokens and 20 `max_new_tokens`",
        ),
        True,
    ),
    "github models": (
        lambda n, most: _error(
            413,
            code="tokens_limit_reached",
            message=f"Request body too large for some model. Max size: {most} tokens.",
        ),
        True,
    ),
    "a proxy in between": (
        lambda n, most: fail(413, "<html>413 Request Entity Too Large</html>"),
        False,
    ),
}
WINDOW = 8192
#: Characters of a message that no window of that size takes.
HUGE = "lorem ipsum " * 6_000


def _talk(web: Web, turns: int) -> None:
    for n in range(turns):
        assert web.ask(f"say word {n}")["reply"] == f"word {n}"


def _conversation(body: dict[str, t.Any], count: int) -> list[t.Any]:
    """The first *count* messages of a request, without what is not part of the history."""
    assert body["messages"][0]["role"] == "system"
    return t.cast(list[t.Any], body["messages"][1 : count + 1])


@pytest.mark.parametrize("provider", REFUSALS)
def test_a_message_longer_than_the_window_leaves_the_history_as_it_was(
    web: Make, model: ModelServer, provider: str
) -> None:
    refusal, _ = REFUSALS[provider]
    model.reply = _refuses(WINDOW, refusal)
    w = web(llm_attempts=1)
    _talk(w, 11)
    history = [*_conversation(model.requests[-1].body, 21), {"role": "assistant"}]

    body = w.ask(HUGE)

    assert (body["status"], body["reason"]) == ("incomplete", "context_too_long")
    assert "lorem" not in body["reply"] and "context" not in body["reply"]
    assert w.ask("say fine")["reply"] == "fine"
    after = _conversation(model.requests[-1].body, 25)
    assert after[:21] == history[:21]
    assert after[21]["content"] == "word 10"
    assert after[22]["role"] == "user" and after[22]["content"].startswith("lorem ipsum")
    assert len(after[22]["content"]) < 2_000, "not what the model could not read"
    assert after[23]["role"] == "assistant" and "did not fit" in after[23]["content"]
    assert after[24]["content"].endswith("say fine")
    assert w.ask("say on")["reply"] == "on"


def test_a_new_worker_has_the_history_too(web: Make, model: ModelServer) -> None:
    model.reply = _refuses(WINDOW, REFUSALS["openai"][0])
    w = web()
    _talk(w, 11)
    assert w.ask(HUGE)["reason"] == "context_too_long"
    assert w.ask("say fine")["reply"] == "fine"
    here = _conversation(model.requests[-1].body, 25)
    shutdown(w.app, grace=2)

    assert web().ask("say there")["reply"] == "there"

    assert _conversation(model.requests[-1].body, 25)[:24] == here[:24]


def _a_long_talk(web: Web) -> None:
    """Turns that add up to more than a window of 14,000 tokens."""
    for _ in range(10):
        assert web.ask("tokens 1500")["status"] == "completed"


def test_a_long_conversation_is_summed_up_and_that_is_kept(web: Make, model: ModelServer) -> None:
    model.reply = _refuses(14_000, REFUSALS["openai"][0])
    w = web()
    _a_long_talk(w)

    assert w.ask("say still here")["reply"] == "still here"

    assert "context_compressed" in [event["type"] for event in events(w)]
    short = model.requests[-1].body["messages"]
    assert _counted({"messages": short}) < 14_000
    asked = len(model.requests)
    shutdown(w.app, grace=2)
    assert web().ask("say again")["reply"] == "again"
    assert len(model.requests) == asked + 1, "what was summed up is not summed up again"
    assert _conversation(model.requests[-1].body, len(short) - 2) == short[1:-1]


@pytest.mark.parametrize("provider", [p for p, (_, told) in REFUSALS.items() if told])
def test_the_window_is_learned_for_every_session_of_the_worker(
    web: Make, model: ModelServer, provider: str
) -> None:
    """Before the second session is refused, its old messages are summed up."""
    model.reply = _refuses(WINDOW, REFUSALS[provider][0])
    w = web(llm_attempts=1)
    assert w.ask(HUGE, "first")["reason"] == "context_too_long"
    for _ in range(6):
        w.ask("tokens 1000", "second")
    before = len(model.requests)

    assert w.ask("say short", "second")["reply"] == "short"

    bodies = [request.body for request in model.requests[before:]]
    assert all(_counted(body) <= WINDOW for body in bodies), "none was refused"
    assert len(bodies) == 2, "a summary, and the answer"


def test_the_window_can_be_set(web: Make, model: ModelServer) -> None:
    model.reply = _refuses(10**9, REFUSALS["openai"][0])
    w = web(context_tokens=WINDOW)
    for _ in range(6):
        w.ask("tokens 1000")
    before = len(model.requests)

    assert w.ask("say short")["reply"] == "short"

    assert len(model.requests) == before + 2, "a summary, and the answer"
    assert model.requests[-1].body["max_tokens"] < WINDOW


def _with_room(body: dict[str, t.Any]) -> Reply:
    """vLLM counts what may be answered, too."""
    asked = body.get("max_tokens") or body["max_completion_tokens"]
    count = _counted(body)
    if count + asked > WINDOW:
        return _error(
            400,
            message=f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's "
            f"maximum context length is {WINDOW} tokens and your request has {count} input tokens "
            f"({asked} > {WINDOW} - {count}).",
        )
    return obey(body)


def test_an_answer_is_not_given_more_room_than_the_window_has(
    web: Make, model: ModelServer
) -> None:
    model.reply = _with_room
    w = web()

    assert w.ask("say hi")["reply"] == "hi"
    assert len(model.requests) == 2, "asked again at once, with a smaller answer"
    assert w.ask("say hi", "another")["reply"] == "hi"
    assert len(model.requests) == 3, "and never again with a larger one"


def test_a_tool_result_that_does_not_fit_is_made_to_fit(web: Make, model: ModelServer) -> None:
    """In mid-turn the older messages go, and the model goes on."""
    model.reply = _refuses(12_000, REFUSALS["openai"][0])
    w = web()
    for _ in range(6):
        w.ask("tokens 1000")
    (w.workspace() / "big.txt").write_text("line of a file\n" * 1_200)

    body = w.ask('call read_file {"file_path": "big.txt"}\nsay read')

    assert body["status"] == "completed"
    assert "context_compressed" in [event["type"] for event in events(w)]
    assert model.requests[-1].body["messages"][-1]["role"] == "tool", "with what it has read"
    assert w.ask("say fine")["reply"] == "fine"


def test_a_turn_whose_tool_result_never_fits_tells_what_ran(web: Make, model: ModelServer) -> None:
    model.reply = _refuses(WINDOW, REFUSALS["openai"][0])
    w = web(policy="trusted")
    _talk(w, 3)
    (w.workspace() / "big.txt").write_text("line of a file\n" * 2_500)
    written = 'call write_file {"file_path": "new.txt", "content": "new"}'

    body = w.ask(f'{written}\ncall read_file {{"file_path": "big.txt"}}\nsay read')

    assert (body["status"], body["reason"]) == ("incomplete", "context_too_long")
    assert (w.workspace() / "new.txt").read_text() == "new"
    assert w.ask("say fine")["reply"] == "fine"
    after = _conversation(model.requests[-1].body, 9)
    assert said({"messages": after})[:3] == ["say word 0", "say word 1", "say word 2"]
    note = after[7]["content"]
    assert "write_file" in note and "read_file" in note, "what has happened is not forgotten"


def test_the_last_resort_costs_no_memory(web: Make, model: ModelServer) -> None:
    """Agentao may send only the last messages; the conversation is kept whole all the same."""
    w = web()
    _talk(w, 6)
    full = model.requests[-1].body["messages"]

    def reply(body: dict[str, t.Any]) -> Reply:
        if not body.get("stream"):
            return say("a summary")
        if len(body["messages"]) > 4:
            return _error(400, message="Please reduce the length of the messages or completion.")
        return obey(body)

    model.reply = reply
    assert w.ask("say short")["reply"] == "short"
    assert len(model.requests[-1].body["messages"]) <= 4

    model.reply = obey
    assert w.ask("say fine")["reply"] == "fine"
    after = model.requests[-1].body["messages"]
    assert after[1:12] == full[1:12]
    assert said({"messages": after})[-2:] == ["say short", "say fine"]


PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def _look(web: Patient, message: str) -> dict[str, t.Any]:
    headers = web.headers() | {"Prefer": "wait=20"}
    body = {"message": message, "images": [{"mimeType": "image/png", "data": PICTURE}]}
    answer = web.client.post("/chat/s", json=body, headers=headers).json
    return web.ending(t.cast(dict[str, t.Any], answer))


@pytest.mark.parametrize(
    ("refusal", "end"),
    [
        (fail(413, "too large"), ("incomplete", "context_too_long")),
        (
            _error(400, message="image exceeds 5 MB maximum: 5316852 bytes > 5242880 bytes"),
            ("failed", "llm_unavailable"),
        ),
    ],
)
def test_a_picture_that_is_too_large_leaves_the_history_as_it_was(
    web: Make, model: ModelServer, refusal: Reply, end: tuple[str, str]
) -> None:
    """The pictures of earlier turns too, which the model has seen."""
    w = web(llm_attempts=1)
    assert _look(w, "say a cat")["reply"] == "a cat"
    _talk(w, 3)
    seen = json.dumps(_conversation(model.requests[-1].body, 3))
    assert PICTURE in seen
    model.reply = lambda body: refusal if body.get("stream") else say("a summary")

    body = _look(w, "say a larger cat")

    assert (body["status"], body["reason"]) == end
    model.reply = obey
    assert w.ask("say fine")["reply"] == "fine"
    after = model.requests[-1].body
    assert json.dumps(_conversation(after, 3)) == seen
    assert json.dumps(after).count(PICTURE) == 1
    assert "Pictures that came with it were left out: 1." in json.dumps(after)


# -- how long a model may be silent --------------------------------------------------------------


def test_a_slow_first_token_is_waited_for_and_asked_for_once(web: Make, model: ModelServer) -> None:
    """Longer than the silence that ends a call later on."""

    def slow(line: Line) -> None:
        line.delta(role="assistant", content="")
        line.pause(2 * gap)
        line.delta(content="at last")
        line.finish("stop")
        line.end()

    gap = 2.0
    w = web(llm_read_timeout=gap)
    model.script(_headers_first(slow))

    assert w.ask("go")["reply"] == "at last"
    assert len(model.requests) == 1


def test_each_call_has_its_own_patience_on_a_kept_connection(web: Make, model: ModelServer) -> None:
    """Impatient after the first token, and patient again before the next call's."""

    def slow(line: Line) -> None:
        line.pause(3.0)
        line.head()
        line.delta(content="slow")
        line.finish("stop")
        line.end()

    w = web(llm_read_timeout=2.0)
    for n in range(2):
        model.script(act(slow))
        assert w.ask("go")["reply"] == "slow", n
    assert model.connections == 1
    model.script(hang_after("half"))
    assert w.ask("go")["reason"] == "stream_cut"
    model.script(act(slow))
    assert w.ask("go")["reply"] == "slow"


# -- come back later -----------------------------------------------------------------------------


def test_a_date_is_understood_as_well(web: Make, model: ModelServer) -> None:
    when = email.utils.formatdate(time.time() + 7200, usegmt=True)
    model.script(dataclasses.replace(fail(429), headers=(("Retry-After", when),)))

    body = web().ask("go")

    assert (body["status"], body["reason"]) == ("failed", "llm_unavailable")
    assert 7000 < body["error"]["details"]["retry_after"] <= 7200
    assert len(model.requests) == 1


def test_the_event_says_when_too(web: Make, model: ModelServer) -> None:
    model.script(fail(503, retry_after=90.5))
    w = web()
    w.ask("go")
    (error,) = [event for event in events(w) if event["type"] == "error"]
    assert error["error"]["details"] == {"retry_after": 91}
    assert error["error"]["code"] == "llm_unavailable"


@pytest.mark.parametrize(
    "value",
    [
        *("-5", "9" * 400, "1e9", "nan", "inf", "soon", "", "3,600", "١٢"),
        "Mon, 99 Foo 9999999 25:61:61 GMT",
    ],
)
def test_nonsense_is_no_time_to_come_back(web: Make, model: ModelServer, value: str) -> None:
    raw = value.encode().decode("latin-1")
    model.script(dataclasses.replace(fail(429), headers=(("Retry-After", raw),)))
    w = web(llm_attempts=1)

    body = w.ask("go")

    assert (body["status"], body["reason"]) == ("failed", "llm_unavailable")
    assert body["error"]["details"] == {}
    assert w.ask("say fine")["reply"] == "fine"


def test_a_short_wait_is_obeyed_and_can_be_cancelled(web: Make, model: ModelServer) -> None:
    model.script(fail(429, retry_after=1), say("patience"))
    w = web()
    assert w.ask("go")["reply"] == "patience"
    first, second = model.requests
    assert second.started_at - first.started_at >= 1

    model.script(fail(429, retry_after=59))
    w.post("go")
    model.wait_for_request(3)
    w.cancel()
    _until_idle(w)
    assert ended(w)[-1] == ("cancelled", "cancelled_by_user")
    assert w.ask("say fine")["reply"] == "fine"
    assert len(model.requests) == 4


# -- how much a model may say --------------------------------------------------------------------


def test_the_bound_is_for_the_turn_and_not_for_a_call(web: Make, model: ModelServer) -> None:
    look = calls([("list_directory", {"directory_path": "."}, "c1")])
    first = dataclasses.replace(look, deltas=({"content": "x" * 1500}, *look.deltas))
    model.script(first, say("y" * 1500))
    w = web(turn_text=2048)

    body = w.ask("go")

    assert (body["status"], body["reason"]) == ("incomplete", "text_limit")
    assert 2048 - 1500 - 200 < len(body["reply"]) <= 2048 - 1500
    assert w.ask("say " + "z" * 1500)["status"] == "completed", "each turn has its own"


def _resident() -> int:
    """Bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _one_huge_event(line: Line) -> None:
    line.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"')
    while True:
        line.chunk(b"x" * 2**16)


@pytest.mark.parametrize(
    "reply",
    [
        tokens(10**9, text="x" * 4096),
        _headers_first(_one_huge_event),
        _half_a_call(_endless_arguments),
    ],
    ids=["text", "event", "arguments"],
)
def test_a_flood_is_stopped_before_it_fills_the_memory(
    web: Make, model: ModelServer, reply: Reply
) -> None:
    """With the bound as it is unless set. Without one each of these takes all there is."""
    # With less the log would forget the turn's end, which has the whole reply.
    w = web(turn_timeout=300, log_bytes=2**24)
    assert w.ask("say first")["reply"] == "first"
    model.script(reply)
    before = _resident()

    w.post("go")
    _until_idle(w)

    assert _resident() - before < 150 * 2**20
    assert ended(w)[-1] == TOO_MUCH
    page = w.client.get("/session/s/messages", headers=w.headers()).json
    assert sum(len(entry.get("content", "")) for entry in page["messages"]) < 2**22 + 1000
    model.wait_closed(model.requests[1])
    assert w.ask("say fine")["reply"] == "fine"


def test_a_page_of_messages_is_never_larger_than_it_should_be(
    web: Make, model: ModelServer
) -> None:
    w = web()
    for n in range(4):
        model.script(say(f"{n}", "long " * 100_000))
        assert w.ask(f"say {n}")["status"] == "completed"

    def page(**query: t.Any) -> tuple[list[int], bool, int]:
        answer = w.client.get("/session/s/messages", query_string=query, headers=w.headers())
        found = answer.json
        return [m["id"] for m in found["messages"]], found["more"], len(answer.data)

    ids, more, size = page()
    assert (ids[-1], more) == (8, True) and size < 2**20
    seen = list(ids)
    while more:
        ids, more, size = page(before=seen[0])
        assert ids and size < 2**20
        seen = ids + seen
    assert seen == [*range(1, 9)]
    forward: list[int] = []
    more = True
    while more:
        ids, more, size = page(after=forward[-1] if forward else 0)
        assert ids and size < 2**20
        forward += ids
    assert forward == seen
    assert page(limit=1)[0] == [8]


# -- other wires, and agents of the host's own ---------------------------------------------------


def _event(line: Line, kind: str, **data: t.Any) -> None:
    line.chunk(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode())


def _anthropic(then: cabc.Callable[[Line], None]) -> Reply:
    """Words, and the beginning of a tool call."""

    def answer(line: Line) -> None:
        usage = {"input_tokens": 1, "output_tokens": 1}
        message = {"id": "m", "role": "assistant", "model": "scripted", "usage": usage}
        message |= {"type": "message", "content": [], "stop_reason": None}
        _event(line, "message_start", message=message)
        _event(line, "ping")
        block: dict[str, t.Any] = {"type": "text", "text": ""}
        _event(line, "content_block_start", index=0, content_block=block)
        delta = {"type": "text_delta", "text": "some words"}
        _event(line, "content_block_delta", index=0, delta=delta)
        _event(line, "content_block_stop", index=0)
        block = {"type": "tool_use", "id": "c1", "name": "write_file", "input": {}}
        _event(line, "content_block_start", index=1, content_block=block)
        then(line)

    return _headers_first(answer)


def _anthropic_calls(line: Line) -> None:
    for n in itertools.count(2):
        block = {"type": "tool_use", "id": "", "name": "", "input": {}}
        _event(line, "content_block_start", index=n, content_block=block)


def _anthropic_arguments(line: Line) -> None:
    while True:
        delta = {"type": "input_json_delta", "partial_json": '{"file_path": "a", ' + "x" * 500}
        _event(line, "content_block_delta", index=1, delta=delta)


def _responses(then: cabc.Callable[[Line], None]) -> Reply:
    def answer(line: Line) -> None:
        at = {"output_index": 0, "content_index": 0, "item_id": "i0", "sequence_number": 1}
        _event(line, "response.output_text.delta", delta="some words", logprobs=[], **at)
        item = {"type": "function_call", "id": "i1", "call_id": "c1", "name": "write_file"}
        item |= {"arguments": "", "status": "in_progress"}
        _event(line, "response.output_item.added", output_index=1, item=item, sequence_number=2)
        then(line)

    return _headers_first(answer)


def _responses_arguments(line: Line) -> None:
    at = {"output_index": 1, "item_id": "i1", "sequence_number": 3}
    while True:
        _event(line, "response.function_call_arguments.delta", delta="x" * 500, **at)


@pytest.mark.parametrize(
    ("wire", "reply", "end"),
    [
        ("anthropic-messages", _anthropic(_hang_up), CUT),
        ("anthropic-messages", _anthropic(_reset_later), CUT),
        ("anthropic-messages", _anthropic(_end), CUT),
        ("anthropic-messages", _anthropic(_hang), CUT),
        ("anthropic-messages", _anthropic(_anthropic_arguments), TOO_MUCH),
        ("anthropic-messages", _anthropic(_anthropic_calls), TOO_MUCH),
        ("openai-responses", _responses(_hang_up), CUT),
        ("openai-responses", _responses(_reset_later), CUT),
        ("openai-responses", _responses(_end), CUT),
        ("openai-responses", _responses(_hang), CUT),
        ("openai-responses", _responses(_responses_arguments), TOO_MUCH),
    ],
)
def test_the_other_wires_end_in_the_same_way(
    web: Make,
    model: ModelServer,
    monkeypatch: pytest.MonkeyPatch,
    wire: str,
    reply: Reply,
    end: tuple[str, str],
) -> None:
    pytest.importorskip("anthropic" if wire == "anthropic-messages" else "openai")
    monkeypatch.setenv("OPENAI_API_FORMAT", wire)
    w = web(policy="trusted", **IMPATIENT, **SHORT)
    model.script(reply)

    body = w.ask("go")

    assert (body["status"], body["reason"]) == end
    assert body["reply"] == "some words"
    assert not any(event["type"] == "tool_start" for event in events(w)), "nothing half runs"
    model.script(reply)
    assert (w.ask("again")["reason"], len(model.requests)) == (end[1], 2)
    assert "some words" in json.dumps(model.requests[-1].body)


def _their_own(model: ModelServer) -> t.Any:
    def build(principal: t.Any, session: t.Any, transport: t.Any) -> t.Any:
        agent = Agentao(
            api_key="sk-test",
            base_url=model.base_url,
            model="scripted",
            working_directory=session.workspace,
            transport=transport,
            mcp_registry=InMemoryMCPRegistry(),
            logger=logging.Logger("quiet", logging.CRITICAL + 1),
            enabled_tools={"list_directory"},
        )
        agent.messages[:] = session.history
        return agent

    return build


@pytest.mark.parametrize(
    ("answer", "end", "reply"),
    [
        (lambda body: _after_words(_hang_up), CUT, "some words"),
        (lambda body: tokens(10**9), TOO_MUCH, "tok " * 5000),
        (
            lambda body: REFUSALS["openai"][0](9999, 8192) if body.get("stream") else say("sum"),
            ("incomplete", "context_too_long"),
            "",
        ),
    ],
    ids=["cut", "flood", "too long"],
)
def test_agents_of_the_hosts_own_end_in_the_same_way(
    web: Make,
    model: ModelServer,
    answer: cabc.Callable[[dict[str, t.Any]], Reply],
    end: tuple[str, str],
    reply: str,
) -> None:
    """Their clients are not ours, so it is their events that say so."""
    w = web(agents=_their_own(model), **SHORT)
    _talk(w, 5)
    history = _conversation(model.requests[-1].body, 9)
    model.reply = answer

    body = w.ask("the odd one")

    assert (body["status"], body["reason"]) == end
    assert body["reply"] == reply
    model.reply = obey
    assert w.ask("say fine")["reply"] == "fine"
    after = model.requests[-1].body
    assert _conversation(after, 9) == history
    assert said(after)[-2:] == ["the odd one", "say fine"]
    assert ("some words" in json.dumps(after)) is (end == CUT)
