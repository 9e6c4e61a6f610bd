"""Requests that some providers refuse, and how each is repaired.

Knows request bodies and words of refusals; must never know HTTP or agents.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

from agentao_web.agents.model.answer import CARRIED

Body = dict[str, t.Any]

#: Words for a field that is not known. A refusal has one of them beside the name of the field.
_UNKNOWN: t.Final = (
    "unrecognized",
    "unknown",
    "unsupported",
    "not supported",
    "not permitted",
    "not allowed",
    "unexpected",
    "extra_forbidden",
    "additional propert",
)


@dataclasses.dataclass(frozen=True)
class Repair:
    """One kind of refusal: its words in small letters, and the cure."""

    name: str
    words: tuple[str, ...]
    cure: cabc.Callable[[Body], Body]

    def cures(self, refusal: str, body: Body) -> bool:
        return (
            self.name in refusal
            and any(word in refusal for word in self.words)
            and self.cure(body) != body
        )


def without(name: str) -> cabc.Callable[[Body], Body]:
    """The request without the field *name*."""
    return lambda body: {field: value for field, value in body.items() if field != name}


def without_in_messages(name: str) -> cabc.Callable[[Body], Body]:
    """The request without *name* in its messages and their tool calls."""

    def cleaned(message: Body) -> Body:
        message = {field: value for field, value in message.items() if field != name}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {field: value for field, value in call.items() if field != name} for call in calls
            ]
        return message

    return lambda body: {**body, "messages": [cleaned(m) for m in body["messages"]]}


def with_reasoning(body: Body) -> Body:
    """The request with a ``reasoning_content`` in each message of the assistant."""
    messages = [
        {**m, "reasoning_content": ""}
        if m.get("role") == "assistant" and "reasoning_content" not in m
        else m
        for m in body["messages"]
    ]
    return {**body, "messages": messages}


#: In the order in which they are tried. `max_tokens` and `temperature` are Agentao's own repairs.
REPAIRS: t.Final = (
    # Azure until 2024-08, Groq and one-api of the time, old vLLM.
    Repair("stream_options", (*_UNKNOWN, "invalid"), without("stream_options")),
    # Agentao sends "auto", which is the default.
    Repair("tool_choice", _UNKNOWN, without("tool_choice")),
    # DeepSeek, if an answer in the history came without thoughts.
    Repair("reasoning_content", ("missing",), with_reasoning),
    # Groq, Cerebras and Mistral, after the model was changed.
    Repair("reasoning_content", _UNKNOWN, without_in_messages("reasoning_content")),
    *(
        Repair(name, _UNKNOWN, without_in_messages(name))
        for name in (*CARRIED, "provider_specific_fields", "thought_signature")
    ),
)
