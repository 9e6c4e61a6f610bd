"""A catalogue of what providers send, and what is right. Each entry names where it was reported or
documented: a project and the number of its issue or pull request, or a page.

The bytes are ours, in the shape described there. Each is served over HTTP, in one
piece, byte by byte and cut at random, to the real client; and once to a real agent behind the
routes, for the ending of its turn.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import json
import logging
import pathlib
import random
import typing as t

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.agents.model.pool import ModelPool
from agentao_web.auth import Tokens
from tests.model_server import ModelServer
from tests.model_server import raw

LOGGER = logging.getLogger("test.streams")
KEY = "the-key-of-the-streams"
WAIT = 50

#: Nobody's report: what this project thought of, or ran into, by itself.
OURS = "agentao-web"

Chunk = dict[str, t.Any]
DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Case:
    """What came, and what is made of it."""

    source: str
    body: bytes
    text: str = ""
    thought: str = ""
    #: (tool, arguments) of each call.
    calls: tuple[tuple[str, str], ...] = ()
    #: As Agentao is told; None if the provider has not said.
    finish: str | None = "stop"
    #: Tokens of prompt and completion.
    usage: tuple[int | None, int | None] | None = None
    ending: str = "completed"
    #: Fields of the assistant's message in the next request, the first call's after a dot.
    sent_back: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    content_type: str = "text/event-stream"
    #: The error, if it is one.
    error: str | None = None


# ------------------------------------------------------------------------------ what is sent


def sse(*chunks: Chunk | str, end: bytes = DONE) -> bytes:
    return b"".join(map(event, chunks)) + end


def event(chunk: Chunk | str) -> bytes:
    data = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    return f"data: {data}\n\n".encode()


def of(delta: t.Any, finish: t.Any = None, **more: t.Any) -> Chunk:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def text(said: t.Any, **more: t.Any) -> Chunk:
    return of({"content": said}, **more)


def end(reason: t.Any = "stop") -> Chunk:
    return of({}, reason)


def used(prompt: t.Any, completion: t.Any, **more: t.Any) -> Chunk:
    numbers = {"prompt_tokens": prompt, "completion_tokens": completion, **more}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": numbers}


def part(name: str | None = None, arguments: t.Any = None, **more: t.Any) -> Chunk:
    """A delta with a piece of a tool call."""
    function = {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}
    return of({"tool_calls": [{"type": "function", "function": function, **more}]})


def completion(message: Chunk, finish: str | None = "stop", **more: t.Any) -> bytes:
    """A whole answer in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], **more}).encode()


HI = (text("he"), text("llo"))
ONE = '{"directory_path": "."}'
TWO = '{"directory_path": "a"}'
LIST = "list_directory"
CALL = part(LIST, ONE, index=0, id="c1")
BOTH = ((LIST, ONE), (LIST, TWO))
FAILED = "failed/llm_unavailable"
CUT = "incomplete/stream_cut"
FILTERED = "incomplete/content_filtered"
SIGNED = {"google": {"thought_signature": "c2ln"}}
DETAIL = {"type": "reasoning.text", "index": 0}
BLOCK = {"type": "thinking"}
DETAILS = [
    {"type": "reasoning.text", "text": "so I look", "index": 0, "format": "f", "signature": "s"},
    {"type": "reasoning.encrypted", "data": "eHl6", "index": 1, "id": "c1"},
]
THOUGHTS = [
    {"type": "thinking", "thinking": "so I look", "signature": "s"},
    {"type": "redacted_thinking", "data": "eHl6"},
]

CASES: dict[str, Case] = {
    # -- events --------------------------------------------------------------------------------
    "the usual": Case(
        "OpenAI, API reference",
        sse(of({"role": "assistant", "content": ""}), *HI, end(), used(9, 5)),
        text="hello",
        usage=(9, 5),
    ),
    "a block with nothing but retry": Case(
        "openai/openai-python#2722",
        b"retry: 3000\n\n" + sse(text("he"), end=b"id: 7\nretry: 1\n\n") + sse(text("llo"), end()),
        text="hello",
    ),
    "bare data and pings": Case(
        "NousResearch/hermes-agent#111887",
        b"data:\n\ndata\n\nevent: ping\n\nevent: ping\ndata: {}\n\n" + sse(*HI, end()),
        text="hello",
    ),
    "comments": Case(
        "openai/openai-go#227, OpenRouter",
        b": OPENROUTER PROCESSING\n\n:\n\n" + sse(*HI, end(), end=b": keep-alive\n\n" + DONE),
        text="hello",
    ),
    "no blank line after [DONE]": Case(
        "darshi1337/apogee#139, llama.cpp",
        sse(*HI, end(), end=b"data: [DONE]"),
        text="hello",
    ),
    "no blank line after the last chunk": Case(
        "darshi1337/apogee#139, llama.cpp; here for a chunk",
        sse(*HI, end(), end=b"").rstrip(b"\n"),
        text="hello",
    ),
    "single newlines between events": Case(
        "ggml-org/llama.cpp#14268",
        sse(*HI, end()).replace(b"\n\n", b"\n") + b"\n",
        text="hello",
    ),
    "lines that end with CRLF": Case(
        "sysid/sse-starlette, documentation: its default separator",
        sse(*HI, end()).replace(b"\n", b"\r\n"),
        text="hello",
    ),
    "lines that end with CR": Case(
        "WHATWG HTML, 9.2.5",
        sse(*HI, end()).replace(b"\n", b"\r"),
        text="hello",
    ),
    "a byte order mark": Case(
        "WHATWG HTML, 9.2.5", b"\xef\xbb\xbf" + sse(*HI, end()), text="hello"
    ),
    "no space after the colon": Case(
        "WHATWG HTML, 9.2.6",
        sse(*HI, end()).replace(b"data: ", b"data:"),
        text="hello",
    ),
    "a chunk over several lines": Case(
        "WHATWG HTML, 9.2.6",
        sse(
            "\ndata: ".join(json.dumps(text("hello"), indent=1).splitlines()),
            end(),
        ),
        text="hello",
    ),
    "an event with a name and an id": Case(
        "WHATWG HTML, 9.2.6",
        b"event: chunk\nid: 1\n" + sse(*HI, end()),
        text="hello",
    ),
    "chunks that are no objects": Case(
        OURS,
        sse("null", text("he"), "[]", '"ping"', "ping", "1", text("llo"), end()),
        text="hello",
    ),
    "[DONE] with spaces, and data after it": Case(
        OURS,
        sse(*HI, end(), end=b"data:   [DONE] \n\n") + sse(text("!"), "not JSON"),
        text="hello",
    ),
    "no [DONE]": Case("abetlen/llama-cpp-python#133", sse(*HI, end(), end=b""), text="hello"),
    "bytes that are no UTF-8": Case(
        "openai/openai-python#2960",
        sse(text("h\N{SNOWMAN}"), end()).replace(b"\xe2\x98\x83", b"\xe2\x98!"),
        text="h\ufffd!",
    ),
    "an emoji in halves": Case(
        "agentao, runtime/sanitize.py: Kimi K2.5, GLM-5, Qwen behind Ollama",
        sse('{"choices":[{"delta":{"content":"hi \\ud83c"}}]}')[: -len(DONE)]
        + sse('{"choices":[{"delta":{"content":"\\udf89"}}]}', end()),
        text="hi 🎉",
    ),
    "another content type": Case(
        OURS,
        sse(*HI, end()),
        text="hello",
        content_type="text/plain; charset=utf-8",
    ),
    "no content type": Case(OURS, sse(*HI, end()), text="hello", content_type=""),
    # -- text and thoughts -----------------------------------------------------------------------
    "thoughts of either name": Case(
        "agentao, llm/_openai_completions.py: DeepSeek, Kimi; Ollama, vLLM",
        sse(
            of({"reasoning_content": "so "}),
            of({"reasoning": "then", "content": None}),
            text("ok"),
            end(),
        ),
        text="ok",
        thought="so then",
    ),
    "thoughts under both names": Case(
        "agentao, llm/_openai_completions.py: some versions of vLLM",
        sse(of({"reasoning": "hm", "reasoning_content": "hm", "content": ""}), text("ok"), end()),
        text="ok",
        thought="hm",
    ),
    "content in parts": Case(
        "openclaw/openclaw#68418",
        sse(text([{"type": "text", "text": "he"}]), text(["l", {"text": "lo"}]), end()),
        text="hello",
    ),
    "thoughts as parts of the content": Case(
        "vercel/ai#8072, Mistral's Magistral",
        sse(
            text([{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}]),
            text([{"type": "text", "text": "ok"}, {"type": "reference", "reference_ids": [1]}]),
            text("!"),
            end(),
        ),
        text="ok!",
        thought="so",
    ),
    "<think> in the text": Case(
        "vercel/ai#8072, Magistral before its thoughts had a part of their own",
        sse(text("<think>so</think>"), text("ok"), end()),
        text="<think>so</think>ok",
    ),
    "a refusal": Case(
        "OpenAI, API reference: delta.refusal",
        sse(of({"role": "assistant", "content": None, "refusal": ""}), of({"refusal": "I "}))[
            : -len(DONE)
        ]
        + sse(of({"refusal": "can't."}), end()),
        text="I can't.",
    ),
    "a message in place of a delta": Case(
        OURS,
        sse({"choices": [{"message": {"role": "assistant", "content": "hello"}}]}, end()),
        text="hello",
    ),
    "deltas, and the message once more": Case(
        OURS,
        sse(*HI, {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}),
        text="hello",
    ),
    "text of the old completions": Case(
        "abetlen/llama-cpp-python#133",
        sse({"choices": [{"text": "hello", "index": 0, "finish_reason": None}]}, end()),
        text="hello",
    ),
    "several choices": Case(
        "OpenAI, API reference: n",
        sse(
            text("he"),
            text("no", index=1),
            {"choices": [text("llo")["choices"][0], text("no", index=1)["choices"][0]]},
            of({}, "length", index=1),
            end(),
        ),
        text="hello",
    ),
    "choices that are none": Case(
        OURS,
        sse({"choices": None}, {"choices": {"0": 1}}, {"choices": ["x", None]}, of("x"), of([1]))[
            : -len(DONE)
        ]
        + sse(*HI, end()),
        text="hello",
    ),
    "Azure's first and last chunk": Case(
        "AbanteAI/archive-old-cli-mentat#429, microsoft/autogen#6465",
        sse(
            {"id": "", "model": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
            *HI,
            end(),
            {
                "id": "",
                "choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {}}],
            },
        ),
        text="hello",
    ),
    # -- tool calls ------------------------------------------------------------------------------
    "a call in pieces": Case(
        "OpenAI, API reference",
        sse(
            part(LIST, "", index=0, id="c1"),
            part(None, '{"directory_', index=0),
            part(None, 'path": "."}', index=0),
            part(LIST, TWO, index=1, id="c2"),
            end("tool_calls"),
        ),
        calls=BOTH,
        finish="tool_calls",
    ),
    "parallel calls at one index": Case(
        "ollama/ollama#15457",
        sse(part(LIST, ONE, index=0, id="c1"), part(LIST, TWO, index=0, id="c2"), end()),
        calls=BOTH,
    ),
    "parallel calls at one index, without ids": Case(
        "ai-dynamo/dynamo#4723",
        sse(part(LIST, ONE, index=0), part(LIST, TWO, index=0), end("tool_calls")),
        calls=BOTH,
        finish="tool_calls",
    ),
    "calls without an index": Case(
        "ollama/ollama#7881, noho/dayu-agent#45 (Gemini)",
        sse(part(LIST, ONE, id="c1"), part(LIST, TWO, id="c2"), end()),
        calls=BOTH,
    ),
    "pieces without an index": Case(
        "openai/openai-python#2806, Gemini",
        sse(
            part(LIST, '{"directory_', id="c1"),
            part(None, 'path": "."}'),
            part(LIST, TWO[:9], id="c2"),
            part(None, TWO[9:], id="c2"),
            end(),
        ),
        calls=BOTH,
    ),
    "calls in one delta, without index and id": Case(
        "noho/dayu-agent#45",
        sse(
            of(
                {
                    "tool_calls": [
                        {"function": {"name": LIST, "arguments": ONE}},
                        {"function": {"name": LIST, "arguments": TWO}},
                    ]
                }
            ),
            end(),
        ),
        calls=BOTH,
    ),
    "arguments as an object": Case(
        "BerriAI/litellm#37792",
        sse(part(LIST, json.loads(ONE), index=0, id="c1"), end()),
        calls=((LIST, ONE),),
    ),
    "no arguments, as PHP says it": Case(
        "PHP, json_encode of an empty array",
        sse(part("todo_read", [], index=0, id="c1"), end("tool_calls")),
        calls=(("todo_read", "{}"),),
        finish="tool_calls",
    ),
    "the name in every piece": Case(
        "ggml-org/llama.cpp#13774, NousResearch/hermes-agent#11984 (MiniMax)",
        sse(
            part(LIST, "", index=0, id="c1"),
            part(LIST, ONE[:9], index=0, id="c1"),
            part(LIST, ONE[9:], index=0),
            part(LIST, "", index=0),
            end("tool_calls"),
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
    ),
    "the name in pieces": Case(
        "continuedev/continue#5849, Gemini",
        sse(
            part("list_", index=0, id="c1"),
            part("directory", index=0),
            part(None, ONE, index=0),
            end("tool_calls"),
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
    ),
    "a name that is null or empty afterwards": Case(
        "1CatAI/1Cat-vLLM#240, lmstudio-ai/lmstudio-bug-tracker#649",
        sse(part(LIST, None, index=0, id="c1"))[: -len(DONE)]
        + sse(
            of({"tool_calls": [{"index": 0, "function": {"name": None, "arguments": ONE[:5]}}]}),
            of({"tool_calls": [{"index": 0, "id": "", "function": {"name": "", "arguments": ""}}]}),
            of({"tool_calls": [{"index": 0, "function": {"arguments": ONE[5:]}}]}),
            end("tool_calls"),
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
    ),
    "the arguments once more as a whole": Case(
        OURS,
        sse(part(LIST, ONE[:9], index=0, id="c1"), part(None, ONE[9:], index=0))[: -len(DONE)]
        + sse(part(None, ONE, index=0), end("tool_calls")),
        calls=((LIST, ONE),),
        finish="tool_calls",
    ),
    "a call of nothing": Case(
        "lmstudio-ai/lmstudio-bug-tracker#830",
        sse(*HI, of({"tool_calls": [{"id": "", "type": "function"}, None, "x"]}), end()),
        text="hello",
    ),
    "the tool's name for an id": Case(
        OURS,
        sse(part(LIST, ONE, index=0, id=LIST), part(LIST, TWO, index=1, id=LIST), end()),
        calls=BOTH,
    ),
    "an index as text, an id as a number": Case(
        OURS,
        sse(part(LIST, ONE[:5], index="0", id=7), part(None, ONE[5:], index="0"), end()),
        calls=((LIST, ONE),),
    ),
    "an empty list of calls in each chunk": Case(
        "Portkey-AI/gateway#1338", sse(of({"content": "hello", "tool_calls": []}), end()), "hello"
    ),
    "the call of the API before tools": Case(
        "OpenAI, API reference: function_call",
        sse(
            of({"content": None, "function_call": {"name": LIST, "arguments": ""}}),
            of({"function_call": {"arguments": ONE}}),
            end("function_call"),
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
    ),
    # -- fields that have to be sent back ----------------------------------------------------------
    "Gemini's signature": Case(
        "earendil-works/pi#3234, 5ire#405",
        sse(
            part(LIST, ONE, index=0, id="c1", extra_content=SIGNED),
            part(LIST, TWO, index=1, id="c2"),
            end("tool_calls"),
        ),
        calls=BOTH,
        finish="tool_calls",
        sent_back={".extra_content": SIGNED},
    ),
    "LiteLLM's fields of the provider": Case(
        "langbot-app/LangBot#2265",
        sse(
            part(LIST, ONE, index=0, id="c1", provider_specific_fields={"thought_signature": "s"}),
            end("tool_calls"),
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
        sent_back={".provider_specific_fields": {"thought_signature": "s"}},
    ),
    "OpenRouter's details of the reasoning": Case(
        "home-assistant/core#159812",
        sse(
            of(
                {
                    "reasoning": "so ",
                    "reasoning_details": [{**DETAILS[0], "text": "so ", "signature": None}],
                }
            ),
            of(
                {
                    "reasoning": "I look",
                    "reasoning_details": [{"type": "reasoning.text", "text": "I look", "index": 0}],
                }
            ),
            of({"reasoning_details": [{"type": "reasoning.text", "signature": "s", "index": 0}]}),
            of({"reasoning_details": [DETAILS[1]]}),
            part(LIST, ONE, index=0, id="c1"),
            end("tool_calls"),
        ),
        thought="so I look",
        calls=((LIST, ONE),),
        finish="tool_calls",
        sent_back={"reasoning_details": DETAILS, "reasoning_content": "so I look"},
    ),
    "LiteLLM's blocks of thoughts": Case(
        "openai/openai-agents-python#4177",
        sse(
            of(
                {
                    "reasoning_content": "so ",
                    "thinking_blocks": [{"type": "thinking", "thinking": "so "}],
                }
            ),
            of(
                {
                    "reasoning_content": "I look",
                    "thinking_blocks": [{"type": "thinking", "thinking": "I look"}],
                }
            ),
            of({"thinking_blocks": [{"type": "thinking", "thinking": "", "signature": "s"}]}),
            of({"thinking_blocks": [THOUGHTS[1]]}),
            part(LIST, ONE, index=0, id="c1"),
            end("tool_calls"),
        ),
        thought="so I look",
        calls=((LIST, ONE),),
        finish="tool_calls",
        sent_back={"thinking_blocks": THOUGHTS},
    ),
    "DeepSeek's thoughts": Case(
        "continuedev/continue#10193",
        sse(
            of({"reasoning_content": "I look"}),
            part(LIST, ONE, index=0, id="c1"),
            end("tool_calls"),
        ),
        thought="I look",
        calls=((LIST, ONE),),
        finish="tool_calls",
        sent_back={"reasoning_content": "I look"},
    ),
    # -- the end -----------------------------------------------------------------------------------
    "filtered in the middle": Case(
        "BerriAI/litellm#8953, Azure",
        sse(*HI, end("content_filter")),
        text="hello",
        finish="content_filter",
        ending=FILTERED,
    ),
    "filtered before the first word": Case(
        "BerriAI/litellm#8953",
        sse(end("content_filter")),
        finish="content_filter",
        ending=FILTERED,
    ),
    "filtered beside a call": Case(
        OURS,
        sse(*HI, part(LIST, ONE, index=0, id="c1"), end("SAFETY")),
        text="hello",
        finish="content_filter",
        ending=FILTERED,
    ),
    "filtered, in Gemini's words": Case(
        "bespokelabsai/curator#261",
        sse(*HI, end("RECITATION")),
        text="hello",
        finish="content_filter",
        ending=FILTERED,
    ),
    "filtered, with the filter's name": Case(
        OURS,
        sse(*HI, end("content_filter: SAFETY")),
        text="hello",
        finish="content_filter",
        ending=FILTERED,
    ),
    "a filter in an error": Case(
        "Azure OpenAI, documentation: code content_filter",
        sse({"error": {"code": "content_filter", "message": "The response was filtered."}}),
        finish="content_filter",
        ending=FILTERED,
    ),
    "Mistral's length": Case(
        "Mistral, API reference: finish_reason model_length",
        sse(*HI, end("model_length")),
        text="hello",
        finish="length",
        ending="incomplete/length_truncated",
    ),
    "Gemini's length": Case(
        "mozilla-ai/any-llm#1202",
        sse(*HI, end("MAX_TOKENS")),
        text="hello",
        finish="length",
        ending="incomplete/length_truncated",
    ),
    "a finish reason nobody knows": Case(
        "togethercomputer/together-python: eos", sse(*HI, end("eos")), text="hello"
    ),
    "a finish reason that is empty until the end": Case(
        "ollama/ollama#4357",
        sse(text("he", finish=""), text("llo", finish=""), end()),
        text="hello",
    ),
    "no finish reason at all": Case(
        "sgl-project/sglang#4550",
        sse(*HI, used(9, 5)),
        text="hello",
        finish=None,
        usage=(9, 5),
        ending=CUT,
    ),
    "aborted, and then [DONE]": Case(
        "vllm-project/vllm#57082", sse(*HI, end("abort")), text="hello", finish=None, ending=CUT
    ),
    "aborted before the first word": Case(
        "vllm-project/vllm#57082",
        sse(end("abort")),
        error="BrokenOff",
        ending=FAILED,
    ),
    "no resources left": Case(
        "DeepSeek, API reference: insufficient_system_resource",
        sse(*HI, end("insufficient_system_resource")),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    "a malformed call": Case(
        "googleapis/python-genai#1836",
        sse(end("MALFORMED_FUNCTION_CALL")),
        error="BrokenOff",
        ending=FAILED,
    ),
    "the end in the middle of a word": Case(
        "ranxianglei/billion-context-omp#105",
        sse(*HI, end=b'data: {"choices":[{"delta":{"cont'),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    "the end in the middle of a call": Case(
        "CommandCodeAI/command-code#785",
        sse(
            *HI, part(LIST, ONE, index=0, id="c1"), part(LIST, TWO[:-1], index=1, id="c2"), end=b""
        ),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    "the end after a call": Case(
        "CommandCodeAI/command-code#785",
        sse(*HI, CALL, end=b""),
        text="hello",
        calls=((LIST, ONE),),
        finish=None,
        ending=CUT,
    ),
    "a chunk that is cut off": Case(
        "mpfaffenberger/code_puppy#770",
        sse(*HI, '{"choices":[{"delta":{"content":"!"', text("?"), end()),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    # -- errors ------------------------------------------------------------------------------------
    "an error in place of the answer": Case(
        "ggml-org/llama.cpp#14566",
        sse({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}),
        error="APIError",
        ending=FAILED,
    ),
    "an error in a field of its own": Case(
        "ggml-org/llama.cpp#16109",
        b'error: {"code":500,"message":"failed","type":"server_error"}\n\n' + DONE,
        error="APIError",
        ending=FAILED,
    ),
    "an event of the type error": Case(
        "sgl-project/sglang-omni#425",
        b'event: error\ndata: {"message":"Model unloaded."}\n\n',
        error="APIError",
        ending=FAILED,
    ),
    "an error that says it twice": Case(
        "zendev-sh/goai#110, LM Studio",
        sse({"error": {"message": "Compute error."}, "message": "Compute error."}),
        error="APIError",
        ending=FAILED,
    ),
    "an event of the type error, in words": Case(
        OURS,
        b"event: error\ndata: Model unloaded.\n\n",
        error="APIError",
        ending=FAILED,
    ),
    "an error with empty choices": Case(
        "diegosouzapw/OmniRoute#8210, OpenRouter",
        sse({"choices": [], "error": {"code": 502, "message": "no"}}),
        error="APIError",
        ending=FAILED,
    ),
    "an error that only has the shape of one": Case(
        "vllm-project/vllm, FastChat: object error",
        sse({"object": "error", "message": "no", "code": 50001}),
        error="APIError",
        ending=FAILED,
    ),
    "an error after some text": Case(
        "damianvtran/local-operator#223, OpenRouter",
        sse(
            *HI,
            part(LIST, TWO[:-1], index=0, id="c1"),
            {**text("", finish="error"), "error": {"code": 502, "message": "disconnected"}},
        ),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    "Groq's error": Case(
        "Groq, API reference: x_groq.error",
        sse(*HI, {"choices": [], "x_groq": {"id": "r", "error": "over capacity"}}),
        text="hello",
        finish=None,
        ending=CUT,
    ),
    "an error that is none": Case(
        OURS,
        sse({**text("hello"), "error": None}, {"error": {}}, end()),
        text="hello",
    ),
    "an error after the end": Case(
        OURS,
        sse(*HI, end(), {"error": {"message": "too late"}}),
        text="hello",
    ),
    # -- usage -------------------------------------------------------------------------------------
    "usage with every chunk": Case(
        "vllm-project/vllm: continuous_usage_stats",
        sse(
            {**text("he"), "usage": {"prompt_tokens": 9, "completion_tokens": 1}},
            {**text("llo"), "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
            end(),
        ),
        text="hello",
        usage=(9, 2),
    ),
    "usage that is null": Case(
        "openai/openai-openapi#240",
        sse({**text("hello"), "usage": None}, used(9, 5), {**end(), "usage": None}),
        text="hello",
        usage=(9, 5),
    ),
    "usage in x_groq": Case(
        "Portkey-AI/gateway#1072",
        sse(*HI, {**end(), "x_groq": {"usage": {"prompt_tokens": 9, "completion_tokens": 5}}}),
        text="hello",
        usage=(9, 5),
    ),
    "usage in the choice": Case(
        "earendil-works/pi#2017, Moonshot",
        sse(*HI, of({}, "stop", usage={"prompt_tokens": 9, "completion_tokens": 5})),
        text="hello",
        usage=(9, 5),
    ),
    "usage in Anthropic's words, in two parts": Case(
        "Anthropic, API reference: input_tokens, passed on by a gateway",
        sse(
            {**text("hello"), "usage": {"input_tokens": 9, "output_tokens": 0}},
            {**end(), "usage": {"input_tokens": 0, "output_tokens": 5}},
        ),
        text="hello",
        usage=(9, 5),
    ),
    "usage that is no number of tokens": Case(
        OURS,
        sse(*HI, end(), used(-1, True), used(10**4_000, 1.5), used("9", None), used(2**53 + 1, 5)),
        text="hello",
        usage=(None, 5),
    ),
    "a number too long for Python": Case(
        OURS,
        sse(*HI, end(), '{"choices":[],"usage":{"prompt_tokens":' + "9" * 4_400 + "}}"),
        text="hello",
    ),
    # -- no event stream ---------------------------------------------------------------------------
    "the whole answer as JSON": Case(
        OURS,
        completion(
            {"content": "hello", "reasoning_content": "so"},
            usage={"prompt_tokens": 9, "completion_tokens": 5},
        ),
        text="hello",
        thought="so",
        usage=(9, 5),
        content_type="application/json",
    ),
    "white space, and the whole answer as JSON": Case(
        "DeepSeek, API documentation: empty lines keep the connection",
        b"\n\n\n  \n" + completion({"content": "hello"}, None),
        text="hello",
        content_type="application/json",
    ),
    "a whole tool call as JSON": Case(
        "tinyhumansai/openhuman#3548",
        completion(
            {
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": LIST, "arguments": ONE},
                        "extra_content": SIGNED,
                    }
                ],
            },
            "tool_calls",
        ),
        calls=((LIST, ONE),),
        finish="tool_calls",
        sent_back={".extra_content": SIGNED},
        content_type="application/json",
    ),
    "an error as JSON, with status 200": Case(
        "OpenRouter, documentation: errors",
        b'{"error": {"code": 503, "message": "no provider"}}',
        error="APIError",
        ending=FAILED,
        content_type="application/json",
    ),
    "Gemini's list of errors": Case(
        "0xsline/OpenChatCut#6",
        b'[{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}]',
        error="APIError",
        ending=FAILED,
        content_type="application/json",
    ),
    "JSON of something else": Case(
        "ollama/ollama, its own API: a wrong base URL",
        b'{"model":"m","message":{"role":"assistant","content":"hello"},"done":false}\n'
        b'{"model":"m","message":{"role":"assistant","content":""},"done":true}\n',
        error="NotAnAnswer",
        ending=FAILED,
        content_type="application/x-ndjson",
    ),
    "a status page of JSON": Case(
        "a base URL without /v1",
        b'{"status": "ok", "version": "1.2"}',
        error="NotAnAnswer",
        ending=FAILED,
        content_type="application/json",
    ),
    "a page of HTML": Case(
        "a base URL without /v1",
        b"\n<!doctype html><title>Welcome</title>",
        error="NotAnAnswer",
        ending=FAILED,
        content_type="text/html; charset=utf-8",
    ),
    "words": Case(
        "ollama/ollama: its root says that it is running",
        b"Ollama is running",
        error="NotAnAnswer",
        ending=FAILED,
        content_type="text/plain; charset=utf-8",
    ),
    "nothing": Case(OURS, b"", error="BrokenOff", ending=FAILED),
    "nothing but a role": Case(
        OURS,
        sse(of({"role": "assistant", "content": ""}), end=b""),
        error="BrokenOff",
        ending=FAILED,
    ),
    "nothing but [DONE]": Case(OURS, DONE, finish=None, ending="incomplete/no_output"),
}


# ----------------------------------------------------------------------------------- the client


def in_one_piece(body: bytes, name: str) -> list[bytes]:
    return [body]


def byte_by_byte(body: bytes, name: str) -> list[bytes]:
    return [body[n : n + 1] for n in range(len(body))]


def at_random(body: bytes, name: str) -> list[bytes]:
    dice = random.Random(name)
    cuts = sorted(dice.sample(range(len(body) + 1), min(len(body), 12)))
    return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]


@pytest.fixture
def server() -> cabc.Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture
def pool() -> cabc.Iterator[ModelPool]:
    pool = ModelPool(attempts=1)
    yield pool
    pool.close()


def client(pool: ModelPool, server: ModelServer, **llm: t.Any) -> t.Any:
    llm = {"api_key": "sk-test", "base_url": server.base_url, "model": "asked", **llm}
    return pool.client(logger=LOGGER, **llm)


class Heard:
    """What a caller of Agentao's client gets to hear."""

    def __init__(self, client: t.Any, how: str = "chat_stream") -> None:
        self.told: list[str] = []
        self.thought: list[str] = []
        told: dict[str, t.Any] = {}
        if how == "chat_stream":
            told = {"on_text_chunk": self.told.append, "on_reasoning_chunk": self.thought.append}
        self.response = getattr(client, how)(
            [{"role": "user", "content": "go"}], tools=None, **told
        )
        self.choice = self.response.choices[0]
        self.message = self.choice.message

    @property
    def finish(self) -> str | None:
        said = self.response.finish_reason_reported
        return self.choice.finish_reason if said else None

    @property
    def calls(self) -> tuple[tuple[str, str], ...]:
        calls = self.message.tool_calls or ()
        return tuple((call.function.name, call.function.arguments) for call in calls)

    @property
    def usage(self) -> tuple[int | None, int | None] | None:
        usage = self.response.usage
        return None if usage is None else (usage.prompt_tokens, usage.completion_tokens)


@pytest.mark.parametrize("name", CASES)
def test_what_is_right(pool: ModelPool, server: ModelServer, name: str) -> None:
    case = CASES[name]
    for cut in (in_one_piece, byte_by_byte, at_random):
        server.script(raw(*cut(case.body, name), content_type=case.content_type))
        if case.error is not None:
            with pytest.raises(Exception) as raised:
                Heard(client(pool, server))
            assert type(raised.value).__name__ == case.error, cut
            continue

        heard = Heard(client(pool, server))

        said, thought = heard.message.content or "", heard.message.reasoning_content or ""
        assert ("".join(heard.told), said) == (case.text, case.text), cut
        assert ("".join(heard.thought), thought) == (case.thought, case.thought), cut
        assert heard.calls == case.calls, cut
        assert (heard.finish, heard.usage) == (case.finish, case.usage), cut


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.text and case.finish is not None]
)
def test_what_is_right_of_a_call_that_does_not_stream(
    pool: ModelPool, server: ModelServer, name: str
) -> None:
    """Gemini's turns and summaries: whatever a server answers to these is read the same way."""
    case = CASES[name]
    server.script(raw(case.body, content_type=case.content_type))

    heard = Heard(client(pool, server), "chat")

    assert "stream" not in server.requests[-1].body
    assert (heard.message.content, heard.message.reasoning_content or "") == (
        case.text,
        case.thought,
    )
    assert (heard.calls, heard.finish, heard.usage) == (case.calls, case.finish, case.usage)


# ------------------------------------------------------------------------------------- the turn


class Web:
    """A real agent behind the routes."""

    def __init__(self, root: pathlib.Path) -> None:
        self.app = Flask("streams")
        self.app.config.update(AGENTAO_ROOT=root, AGENTAO_SECRET_KEYS=KEY, AGENTAO_LLM_ATTEMPTS=1)
        AgentaoWeb().init_app(self.app)

    def ask(self) -> dict[str, t.Any]:
        token = Tokens([KEY]).issue(Principal("acme", "ann"), ttl=600)
        headers = {
            "Authorization": f"Bearer {token}",
            "Accept": "application/json",
            "Prefer": f"wait={WAIT}",
        }
        answer = self.app.test_client().post("/chat/s", json={"message": "go"}, headers=headers)
        return t.cast(dict[str, t.Any], answer.json)


@pytest.fixture
def web(
    tmp_path: pathlib.Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[Web]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "asked")
    web = Web(tmp_path)
    yield web
    shutdown(web.app)


@pytest.mark.parametrize("name", CASES)
def test_how_the_turn_ends(web: Web, server: ModelServer, name: str) -> None:
    case = CASES[name]
    server.script(raw(case.body, content_type=case.content_type))

    answer = web.ask()

    status, _, reason = case.ending.partition("/")
    assert (answer["status"], answer["reason"] or "") == (status, reason)
    asked = server.requests
    if case.calls:
        sent = asked[1].body["messages"]
        message = next(one for one in sent if one.get("tool_calls"))
        calls = message["tool_calls"]
        assert [one["tool_call_id"] for one in sent if one["role"] == "tool"] == [
            call["id"] for call in calls
        ]
        assert len({call["id"] for call in calls}) == len(case.calls)
        for name, value in case.sent_back.items():
            where, field = (calls[0], name[1:]) if name[0] == "." else (message, name)
            assert where[field] == value
        assert "of_message" not in json.dumps(sent)
    else:
        assert len(asked) == 1, "an answer is not asked for twice"
        assert (answer.get("reply") or "") == case.text


# -------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(
    ("body", "kind", "line"),
    [
        (
            b"<html>secret",
            "text/html",
            "NotAnAnswer, the model's server sent a page of HTML (text/html)",
        ),
        (b'{"ok":"secret"}', "application/json", "no chat completion (application/json)"),
        (b"secret", "secret; secret", "no chat completion (no content type)"),
        (sse({"error": {"code": "server_error", "message": "secret"}}), None, "server_error"),
        (
            sse({"error": {"code": 502, "type": "sk-s3cret", "message": "secret"}}),
            None,
            "APIError, 502, ",
        ),
        (
            sse(*HI, {"error": {"type": "overloaded_error", "message": "secret"}}),
            None,
            "overloaded_error",
        ),
        (b"", None, "BrokenOff, the answer is empty"),
        (sse(*HI, '{"choices":[{"delta":{"content":"secret'), None, "a chunk is not valid JSON"),
    ],
)
def test_the_log_names_what_came_and_never_its_text(
    pool: ModelPool,
    server: ModelServer,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    kind: str | None,
    line: str,
) -> None:
    server.script(raw(body, content_type=kind or "text/event-stream"))

    with contextlib.suppress(Exception):
        Heard(client(pool, server))

    (record,) = (record for record in caplog.records if record.name == LOGGER.name)
    assert record.levelname == "WARNING" and line in record.getMessage()
    assert "secret" not in caplog.text and "s3cret" not in caplog.text


def test_forty_of_these_were_seen_or_documented_elsewhere() -> None:
    assert sum(case.source != OURS for case in CASES.values()) >= 40
