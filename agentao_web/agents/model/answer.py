"""One answer of Chat Completions, put together from what a provider streams or sends at once.

Knows what providers send; must never know HTTP, agents or turns.

What is decided here, where providers differ:

1. Only the first choice counts, as only one was asked for. A ``message`` in place of a ``delta`` is
   read like one, unless deltas have come before: then it repeats them.
2. ``<think>`` inside the text stays text. A server that separates thoughts sends them in a field of
   their own; guessing would hide a part of an answer that is about the tag itself.
3. A refusal is text of the answer: it is all the model said.
4. A finish reason is one of four, or says that the answer was cut off (`_ENDS`). Neither the end of
   the stream nor ``[DONE]`` replaces it: vLLM and gateways send ``[DONE]`` after an aborted answer,
   too.
5. What was filtered calls no tools.
"""

from __future__ import annotations

import collections.abc as cabc
import json
import types
import typing as t

from agentao_web.agents.model.calls import ToolCall
from agentao_web.agents.model.calls import ToolCalls
from agentao_web.agents.model.calls import whole
from agentao_web.agents.model.usage import Usage

STOP: t.Final = "stop"
LENGTH: t.Final = "length"
TOOL_CALLS: t.Final = "tool_calls"
CONTENT_FILTER: t.Final = "content_filter"
#: The provider says that it did not get to the end.
CUT_OFF: t.Final = "cut_off"

#: How providers say it, in small letters -> what is meant. All other words are a `STOP`.
_ENDS: t.Final[dict[str, str]] = {
    **dict.fromkeys(("length", "max_tokens", "model_length", "max_output_tokens"), LENGTH),
    **dict.fromkeys(("max_new_tokens", "model_context_window_exceeded"), LENGTH),
    **dict.fromkeys(("tool_calls", "tool_call", "tool_use", "function_call"), TOOL_CALLS),
    **dict.fromkeys(("content_filter", "content_filtered", "refusal", "sensitive"), CONTENT_FILTER),
    **dict.fromkeys(("safety", "recitation", "blocklist", "prohibited_content"), CONTENT_FILTER),
    **dict.fromkeys(("spii", "image_safety", "guardrail_intervened"), CONTENT_FILTER),
    **dict.fromkeys(("error", "abort", "aborted", "cancelled", "canceled"), CUT_OFF),
    **dict.fromkeys(("insufficient_system_resource", "network_error", "timeout"), CUT_OFF),
    **dict.fromkeys(("malformed_function_call", "unexpected_tool_call"), CUT_OFF),
    **dict.fromkeys(("function_call_filter", "other", "finish_reason_unspecified"), CUT_OFF),
}

#: Codes of a refused request that mean the same as `CONTENT_FILTER`: the prompt was filtered.
FILTERED: t.Final = frozenset(
    {"content_filter", "content_policy_violation", "data_inspection_failed"}
)

#: Fields of a message that some providers want back with its tool calls.
CARRIED: t.Final = ("reasoning_details", "thinking_blocks", "extra_content")
#: Agentao keeps nothing of a message but text, thoughts and calls, and of a call everything. So the
#: first call carries these fields, under this name, until `restored` puts them back.
_CARRIER: t.Final = "of_message"

#: Parts of a content, or of thoughts, that are thoughts.
_THOUGHTS: t.Final = frozenset({"thinking", "reasoning", "reasoning.text", "reasoning.summary"})
#: Where the text of a part is.
_TEXTS: t.Final = ("text", "thinking", "reasoning", "summary", "refusal", "content")
_DEEPEST: t.Final = 8

#: `json.loads` without its care for white space, once per token.
_decode: t.Final = json.JSONDecoder().raw_decode


class Refused(Exception):
    """The provider sent an error where the answer should be."""

    def __init__(self, error: t.Any) -> None:
        self.error = error if isinstance(error, dict) else {"message": str(error)}
        super().__init__(str(self.error.get("message") or "the provider reported an error"))


class Garbled(Exception):
    """A piece of the answer cannot be read, so a part of it is lost."""


class Answer:
    """What has come so far, in *acc*, Agentao's accumulator. *on_text* is called with each piece of
    text at once; who hears the thoughts is up to *acc*."""

    def __init__(self, acc: t.Any, on_text: cabc.Callable[[str], None] | None) -> None:
        self.heard = False
        """Something came that belongs to a chat completion."""
        self.done = False
        """The provider said that nothing more comes."""
        self.finish: str | None = None
        self.usage = Usage()
        self._acc = acc
        self._on_text = on_text
        self._half = ""
        self._calls = ToolCalls(getattr(acc, "room", str))
        self._carried: dict[str, t.Any] = {}
        self._choice: t.Any = None
        self._streamed = False

    @property
    def complete(self) -> bool:
        """The provider said how it ended: what follows cannot take anything back."""
        return self.finish not in (None, CUT_OFF)

    @property
    def shown(self) -> bool:
        """Somebody has heard a part of the text."""
        return bool(self._acc.progress_made)

    # -- what comes ----------------------------------------------------------------------------

    def take_event(self, kind: str, data: str) -> bool:
        """Take an event of the stream; True if it is the last one."""
        if data.startswith("{"):
            try:
                chunk, end = _decode(data)
            except (ValueError, RecursionError):
                chunk, end = None, 0
            if chunk is None or (end < len(data) and not data[end:].isspace()):
                # Some servers end their events with a single newline: then these are several.
                return any([self._take_line(kind, line) for line in data.split("\n")])
            self.take(chunk, kind)
            return False
        return self._take_line(kind, data)

    def _take_line(self, kind: str, line: str) -> bool:
        line = line.strip()
        if line.startswith("[DONE]"):
            self.heard = self.done = True
            return True
        if line.startswith("{"):
            try:
                chunk = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise Garbled("a chunk is not valid JSON") from exc
            self.take(chunk, kind)
        elif kind == "error":
            raise Refused(line)
        # Anything else has no content: an empty event, a ping, null, a list.
        return False

    def take_complete(self, completion: dict[str, t.Any]) -> None:
        """Take an answer that came in one piece."""
        self.take(completion)
        # JSON that can be read is complete, with or without a finish reason.
        if self.heard and self.finish is None:
            self.finish = STOP

    def take(self, chunk: dict[str, t.Any], kind: str = "") -> None:
        choices = chunk.get("choices")
        if isinstance(choices, list):
            self.heard = True
            for choice in choices:
                if isinstance(choice, dict):
                    self._take_choice(choice)
        if usage := chunk.get("usage"):
            self.heard = True
            self.usage.take(usage)
        model = chunk.get("model")
        if model and isinstance(model, str):
            self._acc.response_model = model
        if "x_groq" in chunk and isinstance(chunk["x_groq"], dict):
            self.usage.take(chunk["x_groq"].get("usage"))
            self._take_error(chunk["x_groq"].get("error"))
        if "error" in chunk:
            self._take_error(chunk["error"])
        if not isinstance(choices, list):
            self._take_other(chunk, kind)

    def _take_other(self, chunk: dict[str, t.Any], kind: str) -> None:
        """An object without choices: perhaps an error that does not look like one."""
        if kind == "error" or "error" in (chunk.get("object"), chunk.get("type")):
            self._take_error(chunk)
        elif isinstance(chunk.get("message"), str):
            self._take_error(chunk)
        else:
            self._take_error(chunk.get("detail"))

    def _take_error(self, error: t.Any) -> None:
        if error and not self.complete:
            self.heard = True
            raise Refused(error)

    def _take_choice(self, choice: dict[str, t.Any]) -> None:
        index = choice.get("index")
        if index != self._choice and index is not None:
            if self._choice is not None:
                return
            self._choice = index
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._streamed = True
            self._take_delta(delta)
        elif not self._streamed:
            message = choice.get("message")
            self._take_delta(
                message if isinstance(message, dict) else {"content": choice.get("text")}
            )
        if reason := choice.get("finish_reason"):
            self._take_finish(reason)
        if "usage" in choice:
            self.usage.take(choice["usage"])
        if "error" in choice:
            self._take_error(choice["error"])

    def _take_delta(self, delta: dict[str, t.Any]) -> None:
        content = delta.get("content")
        if len(delta) == 1 and isinstance(content, str):
            # Nearly every delta is this.
            if content:
                self._say(content)
            return
        # Thoughts first: that is the order in which they were written.
        self._take_thoughts(delta)
        self._take_parts(content, self._say)
        self._take_parts(delta.get("refusal"), self._say)
        if calls := delta.get("tool_calls"):
            self._calls.take(calls)
        if call := delta.get("function_call"):
            self._calls.take_old(call)

    def _take_thoughts(self, delta: dict[str, t.Any]) -> None:
        # vLLM sends both, with the same text.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for name in CARRIED:
            if value := delta.get(name):
                _carry(self._carried, name, value)
                # It repeats the text of the fields above, unless they are missing.
                thought = thought or (value if isinstance(value, list) else None)
        if thought:
            self._take_parts(thought, self._acc.add_reasoning)

    def _take_parts(self, part: t.Any, tell: cabc.Callable[[str], None], depth: int = 0) -> None:
        """Text, or a list of parts, some of which may be thoughts."""
        if isinstance(part, str):
            if part:
                tell(part)
        elif isinstance(part, list) and depth < _DEEPEST:
            for inner in part:
                self._take_parts(inner, tell, depth + 1)
        elif isinstance(part, dict) and depth < _DEEPEST:
            tell = self._acc.add_reasoning if part.get("type") in _THOUGHTS else tell
            self._take_parts(next(filter(None, map(part.get, _TEXTS)), None), tell, depth + 1)

    def _take_finish(self, reason: t.Any) -> None:
        if isinstance(reason, dict):
            reason = reason.get("type")
        # Gemini's endpoint says "content_filter: SAFETY".
        word = reason.partition(":")[0].strip().lower() if isinstance(reason, str) else ""
        end = _ENDS.get(word.replace("-", "_"), STOP) if word else None
        if end and (self.finish is None or end == CONTENT_FILTER):
            self.finish = end

    def _say(self, text: str) -> None:
        if self._half:
            text = whole([self._half, text])
            self._half = ""
        if "\ud800" <= text[-1] <= "\udbff":
            # Half of an emoji: some models send it in two pieces.
            self._half = text[-1]
            text = text[:-1]
        if text:
            # Kept before anybody hears of it, who may shorten what is kept.
            self._acc.content_parts.append(text)
            if self._on_text is not None:
                self._on_text(text)
                self._acc.progress_made = True

    # -- what has come -------------------------------------------------------------------------

    def response(self) -> types.SimpleNamespace:
        """The answer in the shape that Agentao expects."""
        calls = self._finished_calls()
        message = types.SimpleNamespace(
            role="assistant",
            content=whole(self._acc.content_parts) or None,
            tool_calls=calls or None,
            reasoning_content=whole(self._acc.reasoning_parts) or None,
        )
        finish = self.finish if self.complete else STOP
        return types.SimpleNamespace(
            model=self._acc.response_model,
            choices=[types.SimpleNamespace(index=0, message=message, finish_reason=finish)],
            usage=self.usage.shape(),
            finish_reason_reported=self.complete,
        )

    def _finished_calls(self) -> list[ToolCall]:
        if self.finish == CONTENT_FILTER:
            return []
        calls = self._calls.finish(cut_off=not self.complete)
        if calls and self._carried:
            calls[0].carry(_CARRIER, self._carried)
        return calls

    @property
    def empty(self) -> bool:
        """There is neither text nor a call."""
        calls = self._calls.finish(cut_off=not self.complete)
        return not self._acc.content_parts and not calls


def restored(message: dict[str, t.Any]) -> dict[str, t.Any]:
    """*message* of a history as it has to be sent: with the fields that its first call carries."""
    calls = message.get("tool_calls")
    if not calls or not isinstance(calls[0], dict) or _CARRIER not in calls[0]:
        return message
    first = dict(calls[0])
    carried = first.pop(_CARRIER)
    fields = carried if isinstance(carried, dict) else {}
    return {**message, **fields, "tool_calls": [first, *calls[1:]]}


def _carry(carried: dict[str, t.Any], name: str, value: t.Any) -> None:
    if isinstance(value, dict):
        carried.setdefault(name, {}).update(value)
    elif isinstance(value, list):
        parts = carried.setdefault(name, [])
        for part in value:
            if isinstance(part, dict):
                _join(parts, part)


def _join(parts: list[dict[str, t.Any]], piece: dict[str, t.Any]) -> None:
    """Add *piece* to the part that it continues, or as a new one."""
    last = next((part for part in reversed(parts) if _continues(piece, part)), None)
    if last is None:
        parts.append(dict(piece))
        return
    for name, value in piece.items():
        if isinstance(value, str) and name in ("text", "summary", "thinking", "data"):
            last[name] = (last.get(name) or "") + value
        elif value is not None:
            last[name] = value


def _continues(piece: dict[str, t.Any], part: dict[str, t.Any]) -> bool:
    same = all(piece.get(name) == part.get(name) for name in ("type", "index"))
    ids = piece.get("id"), part.get("id")
    # What is signed is complete.
    return same and (None in ids or ids[0] == ids[1]) and not part.get("signature")
