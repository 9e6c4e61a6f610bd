"""What goes out to a model: where, with which key, and without what its provider refuses."""

from __future__ import annotations

import collections.abc as cabc
import json
import logging
import typing as t

import openai
import pytest

from agentao_web.agents.model.pool import ModelPool
from tests.model_server import ModelServer
from tests.model_server import Reply
from tests.model_server import fail
from tests.model_server import raw
from tests.model_server import say

LOGGER = logging.getLogger("test.requests")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
HISTORY: list[dict[str, t.Any]] = [
    {"role": "user", "content": "go"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": "s"}}}],
        "reasoning_content": "so",
    },
    {"role": "tool", "tool_call_id": "c1", "content": "seen"},
]


@pytest.fixture
def server() -> cabc.Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture
def pool() -> cabc.Iterator[ModelPool]:
    pool = ModelPool(attempts=1)
    yield pool
    pool.close()


def client(pool: ModelPool, base_url: str, **llm: t.Any) -> t.Any:
    llm = {"api_key": "sk-test", "base_url": base_url, "model": "m", **llm}
    return pool.client(logger=LOGGER, **llm)


def ask(client: t.Any, messages: list[dict[str, t.Any]] | None = None) -> str | None:
    asked = messages or [{"role": "user", "content": "go"}]
    answer = client.chat_stream(asked, tools=TOOLS, on_text_chunk=lambda text: None)
    return t.cast("str | None", answer.choices[0].message.content)


# ------------------------------------------------------------------------------------- where to


@pytest.mark.parametrize("given", ["", "/", "/chat/completions"])
def test_a_query_of_the_base_url_stays_one(
    pool: ModelPool, server: ModelServer, given: str
) -> None:
    """Azure's address of a deployment, with and without the method that its portal shows."""
    root = server.base_url.removesuffix("/v1")
    url = f"{root}/openai/deployments/gpt{given}?api-version=2024-10-21&x=a%20b"

    assert ask(client(pool, url)) == "ok"

    (request,) = server.requests
    path, _, query = request.path.partition("?")
    assert path == "/openai/deployments/gpt/chat/completions"
    assert query.replace("+", "%20") == "api-version=2024-10-21&x=a%20b"
    assert request.headers["api-key"] == "sk-test"
    assert request.headers["authorization"] == "Bearer sk-test"


def test_a_token_of_entra_is_no_key(pool: ModelPool, server: ModelServer) -> None:
    ask(client(pool, f"{server.base_url}?api-version=1", api_key="eyJ0eXAi.e30.s"))

    assert "api-key" not in server.requests[0].headers
    assert server.requests[0].headers["authorization"] == "Bearer eyJ0eXAi.e30.s"


def test_other_providers_get_their_key_once(pool: ModelPool, server: ModelServer) -> None:
    ask(client(pool, server.base_url))

    assert server.requests[0].path == "/v1/chat/completions"
    assert "api-key" not in server.requests[0].headers


def test_the_query_is_in_the_other_wire_of_openai_too(pool: ModelPool, server: ModelServer) -> None:
    with pytest.raises(openai.APIStatusError):
        server.script(fail(400))
        ask(client(pool, f"{server.base_url}?api-version=1", api_format="openai-responses"))

    assert server.requests[0].path == "/v1/responses?api-version=1"


# ---------------------------------------------------------------------------------- what of it


def refused(message: str, status: int = 400) -> Reply:
    return fail(status, json.dumps({"error": {"message": message}}))


@pytest.mark.parametrize(
    "refusal",
    [
        # songquanpeng/one-api#1423, agno-agi/agno#1066, vercel/ai#1578 (Groq), old vLLM
        refused("Unrecognized request argument supplied: stream_options"),
        refused("Unknown parameter: 'stream_options'."),
        refused("property 'stream_options' is unsupported, did you mean 'stream'?"),
        fail(
            422, '{"detail":[{"loc":["body","stream_options"],"msg":"extra fields not permitted"}]}'
        ),
    ],
)
def test_a_refused_option_is_left_out_from_then_on(
    pool: ModelPool, server: ModelServer, refusal: Reply
) -> None:
    server.script(refusal, say("hello"), say("again"), say("and again"))

    assert ask(client(pool, server.base_url)) == "hello"
    assert ask(client(pool, server.base_url)) == "again", "each agent has a client of its own"
    assert ask(client(pool, server.base_url, api_key="sk-other")) == "and again"

    sent = ["stream_options" in request.body for request in server.requests]
    assert sent == [True, False, False, True]


def test_a_refusal_that_leaving_out_does_not_cure_is_not_remembered(
    pool: ModelPool, server: ModelServer
) -> None:
    unknown = refused("unknown parameter; the request was {stream_options: …}")
    server.script(unknown, unknown, say("hello"))

    with pytest.raises(openai.BadRequestError):
        ask(client(pool, server.base_url))
    assert ask(client(pool, server.base_url)) == "hello"

    sent = ["stream_options" in request.body for request in server.requests]
    assert sent == [True, False, True]


@pytest.mark.parametrize(
    "refusal",
    [
        refused("Invalid model name; stream_options were sent", 404),
        refused("stream_options is required"),
        refused("The messages are too long."),
        refused("upstream failed: unknown stream_options", 500),
    ],
)
def test_other_refusals_are_refusals(pool: ModelPool, server: ModelServer, refusal: Reply) -> None:
    server.script(refusal)

    with pytest.raises(openai.APIStatusError):
        ask(client(pool, server.base_url))

    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("refusal", "path"),
    [
        # janhq/jan#8136 (Groq), charmbracelet/crush#1590 (Mistral)
        (refused("property 'reasoning_content' is unsupported"), ("reasoning_content",)),
        (
            fail(
                422,
                '{"detail":[{"type":"extra_forbidden","loc":["body","messages",1,"assistant",'
                '"tool_calls",0,"extra_content"],"msg":"Extra inputs are not permitted"}]}',
            ),
            ("tool_calls", 0, "extra_content"),
        ),
    ],
)
def test_fields_of_another_model_are_left_out_if_refused(
    pool: ModelPool, server: ModelServer, refusal: Reply, path: tuple[t.Any, ...]
) -> None:
    """The history is older than the operator's change of the model."""
    server.script(refusal, say("hello"))

    assert ask(client(pool, server.base_url), HISTORY) == "hello"

    def has(message: t.Any) -> bool:
        for step in path[:-1]:
            message = message[step]
        return path[-1] in message

    first, second = (request.body["messages"] for request in server.requests)
    assert has(first[1]) and not has(second[1])
    assert has(HISTORY[1]), "the history itself is as it was"
    assert second[1]["tool_calls"][0]["id"] == "c1"


def test_thoughts_that_are_missing_are_added_where_they_are_required(
    pool: ModelPool, server: ModelServer
) -> None:
    """continuedev/continue#11285: DeepSeek wants the field in each message of the assistant."""
    words = "Missing `reasoning_content` field in the assistant message at message index 1."
    history = [{k: v for k, v in HISTORY[1].items() if k != "reasoning_content"}, HISTORY[1]]
    server.script(refused(words), say("hello"))

    assert ask(client(pool, server.base_url), history) == "hello"

    messages = server.requests[1].body["messages"]
    assert [message["reasoning_content"] for message in messages] == ["", "so"]


def test_two_refusals_one_after_the_other(pool: ModelPool, server: ModelServer) -> None:
    server.script(
        refused("Unknown parameter: 'stream_options'."),
        refused("Unknown parameter: 'tool_choice'."),
        say("hello"),
        say("again"),
    )

    assert ask(client(pool, server.base_url)) == "hello"
    assert ask(client(pool, server.base_url)) == "again"

    assert len(server.requests) == 4
    assert not {"stream_options", "tool_choice"} & set(server.requests[-1].body)
    assert server.requests[-1].body["tools"] == TOOLS


def test_gemini_gets_back_what_it_signed(pool: ModelPool, server: ModelServer) -> None:
    """Agentao does not stream its answers."""
    signed = HISTORY[1]["tool_calls"][0]
    message = {"role": "assistant", "content": None, "tool_calls": [signed]}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    server.script(raw(json.dumps(answer).encode(), content_type="application/json"))

    response = client(pool, server.base_url, model="gemini-3").chat_stream(
        [{"role": "user", "content": "go"}]
    )

    (call,) = response.choices[0].message.tool_calls
    assert call.model_dump() == signed


def test_a_filtered_message_is_no_failure(pool: ModelPool, server: ModelServer) -> None:
    """Azure refuses it with a status of 400."""
    server.script(fail(400, '{"error":{"code":"content_filter","message":"filtered"}}'))

    answer = client(pool, server.base_url).chat_stream([{"role": "user", "content": "go"}])

    assert answer.choices[0].finish_reason == "content_filter"


def test_a_connection_is_kept_when_the_answer_is_whole(
    pool: ModelPool, server: ModelServer
) -> None:
    body = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'
    done = body + b"data: [DONE]\n\n"
    whole = b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}'
    server.script(raw(body), raw(done), raw(whole, content_type="application/json"), raw(done))

    for _ in range(4):
        assert ask(client(pool, server.base_url)) == "x"

    assert server.connections == 1
