"""What an agent's model calls and tool calls cost, and the stop when that is too much.

A meter sits in the agent's own model client, so it sees every call, summaries of old messages
too, before it is made: what the call may cost is set aside first, and the model is told by
``max_tokens`` to stay within it. Agents of a host's own bring their own clients; of those it only
hears afterwards, through the bridge.

A turn that goes over is stopped, and then the call is not made: the model seems to have said
nothing, which is how Agentao sees a call that was cancelled before it went out.
"""

from __future__ import annotations

import collections.abc as cabc
import logging
import threading
import types
import typing as t

import httpx2
from agentao.cancellation import AgentCancelledError

from agentao_web.core import clean
from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import StoreUnavailable

#: What Agentao's estimate of a prompt leaves out, in tokens: a picture, and the frame of a message.
IMAGE_TOKENS: t.Final = 2_000
_FRAME: t.Final = 4
#: An answer shorter than this is not worth a call.
_LEAST_ANSWER: t.Final = 256
#: The part of a day's tokens one answer may take, so that calls can run side by side and one that
#: is cut off does not cost the day; but never less than so many.
_SHARE: t.Final = 10
_LEAST_SHARE: t.Final = 1_024

_LENGTH: t.Final = frozenset({"length", "max_tokens", "max_output_tokens"})

Data = cabc.Mapping[str, t.Any]
Messages = cabc.Sequence[dict[str, t.Any]]


class Stage(t.Protocol):
    """What a meter needs of a turn (agentao_web.runner.Stage)."""

    def stop(self, reason: str) -> None: ...


class Reserved(t.Protocol):
    """Tokens that were set aside (agentao_web.store.allowance.Reserved)."""

    @property
    def tokens(self) -> int: ...


class Purse(t.Protocol):
    """Where a tenant's tokens of the day are (agentao_web.store.allowance.Allowance)."""

    def reserve(self, tenant: str, *, least: int, most: int, limit: int) -> t.Any: ...
    def settle(self, reserved: t.Any, used: int) -> None: ...
    def spend(self, tenant: str, tokens: int) -> None: ...


class Scales(t.Protocol):
    """Estimates tokens (agentao.context_manager.ContextManager)."""

    def estimate_tokens_breakdown(self, messages: t.Any, tools: t.Any) -> dict[str, int]: ...
    def count_tokens_in_text(self, text: str) -> int: ...


class Meter:
    """Counts for one agent, turn by turn.

    None for *tokens_per_day*, or no *purse*, is no limit of the day.
    """

    def __init__(
        self,
        *,
        tenant: str = "",
        purse: Purse | None = None,
        tokens_per_day: int | None = None,
        max_turn_tokens: int | None = None,
        max_tool_calls: int | None = None,
        max_text: int | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self.scales: Scales | None = None
        """Set once the agent is there, if its client is metered."""
        self.hears_all = False
        """The client asks for `room` itself, for tool calls too."""
        self.max_text = max_text
        self._tenant = tenant
        self._purse = purse
        self._limit = tokens_per_day if purse is not None else None
        self._max_turn_tokens = max_turn_tokens
        self._max_tool_calls = max_tool_calls
        self._log = log or logging.getLogger("agentao_web")
        self._stage: Stage | None = None
        self._tokens = 0
        self._tool_calls = 0
        self._text = 0
        self._calling = False
        # Tools of a batch start on threads of their own.
        self._lock = threading.Lock()

    # -- a turn --------------------------------------------------------------------------------

    def attach(self, stage: Stage) -> None:
        """A turn begins."""
        self._tokens = self._tool_calls = self._text = 0
        self._calling = False
        self._stage = stage

    def detach(self) -> None:
        """It has ended."""
        self._stage = None

    def hear(self, kind: str, data: Data) -> None:
        """An event of the agent's."""
        stage = self._stage
        if stage is None:
            return
        if kind == "tool_start":
            with self._lock:
                self._tool_calls += 1
            if self._too_many_tools(0):
                stage.stop("tool_limit")
        elif self.scales is not None:
            return
        elif kind == "llm_call_started":
            self._look_before(stage)
        elif kind == "llm_call_completed":
            self._count_after(data)

    def _too_many_tools(self, more: int) -> bool:
        return self._max_tool_calls is not None and self._tool_calls + more > self._max_tool_calls

    # -- what the model says -------------------------------------------------------------------

    def room(self, text: str) -> str:
        """As much of *text*, said in this turn, as fits; the turn is stopped if that is not all."""
        if self.max_text is None or self._stage is None:
            return text
        size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        left = self.max_text - self._text
        self._text += size
        if size <= left:
            return text
        self._stage.stop("text_limit")
        return text.encode("utf-8", "replace")[: max(left, 0)].decode("utf-8", "ignore")

    def flooded(self) -> None:
        """More has come in one piece than would fit."""
        if self._stage is not None:
            self._stage.stop("text_limit")

    def time_left(self) -> float | None:
        """Seconds the turn may still run; None if nobody says so."""
        asked = getattr(self._stage, "time_left", None)
        return None if asked is None else t.cast(float, asked())

    # -- clients that are not ours -------------------------------------------------------------

    def _look_before(self, stage: Stage) -> None:
        if self._max_turn_tokens is not None and self._tokens >= self._max_turn_tokens:
            stage.stop("token_limit")
        elif self._limit is not None:
            # Nothing is set aside, as nobody knows how much: only whether there is any.
            self._reserved(stage, self._limit, least=1, most=0)

    def _count_after(self, data: Data) -> None:
        used = _reported((data.get("prompt_tokens"), data.get("completion_tokens")))
        self._tokens += used
        if self._limit is not None and used:
            self._counted(lambda purse: purse.spend(self._tenant, used))

    # -- our own -------------------------------------------------------------------------------

    def call(
        self,
        send: cabc.Callable[..., t.Any],
        messages: Messages,
        tools: t.Any,
        max_tokens: int,
        options: dict[str, t.Any],
    ) -> t.Any:
        """``send(messages, tools=…, max_tokens=…, …)``, if the turn can afford it.

        Raises AgentCancelledError if it cannot; the turn is stopped then.
        """
        stage = self._stage
        if stage is None or self._calling:
            # Of no turn, or a streaming call that goes on as one that does not stream.
            return send(messages, tools=tools, max_tokens=max_tokens, **options)
        if getattr(options.get("cancellation_token"), "is_cancelled", False):
            raise AgentCancelledError("stopped")
        prompt = self._weigh(messages, tools)
        answer, held, reason = self._afford(stage, prompt, max_tokens)
        tried = [0]
        options["on_retry"] = _counting(options.get("on_retry"), tried)
        self._calling = True
        try:
            response = send(messages, tools=tools, max_tokens=answer, **options)
        except Exception as exc:
            if not _was_refused(exc):
                self._tokens += prompt + answer
            elif held is not None:
                self._settle(held, prompt * tried[0])
            raise
        finally:
            self._calling = False
        used = self._used(response, prompt, options.get("cancellation_token"))
        if held is not None and used is not None:
            self._settle(held, used + prompt * tried[0])
        self._tokens += prompt + answer if used is None else used
        self._look_after(stage, response, reason)
        return response

    def _afford(self, stage: Stage, prompt: int, answer: int) -> tuple[int, t.Any, str | None]:
        """How long the answer may be, what was set aside for the call, and what made it shorter."""
        reason = None
        if self._max_turn_tokens is not None:
            left = self._max_turn_tokens - self._tokens - prompt
            if left < min(answer, _LEAST_ANSWER):
                stage.stop("token_limit")
                raise AgentCancelledError("token_limit")
            if left < answer:
                answer, reason = left, "token_limit"
        if self._limit is None:
            return answer, None, reason
        share = max(self._limit // _SHARE, _LEAST_SHARE)
        if share < answer:
            # Not a limit that is reached: the answer is cut, and the turn says so.
            answer, reason = share, None
        least = prompt + min(answer, _LEAST_ANSWER)
        held = self._reserved(stage, self._limit, least=least, most=prompt + answer)
        if held is None:
            raise AgentCancelledError("budget_exhausted")
        if held.tokens < prompt + answer:
            answer, reason = held.tokens - prompt, "budget_exhausted"
        return answer, held, reason

    def _reserved(self, stage: Stage, limit: int, *, least: int, most: int) -> t.Any:
        """What was set aside; None if the turn had to be stopped instead."""
        assert self._purse is not None
        try:
            return self._purse.reserve(self._tenant, least=least, most=most, limit=limit)
        except BudgetExhausted:
            stage.stop("budget_exhausted")
        except StoreUnavailable:
            # What cannot be counted is not spent.
            stage.stop("store_unavailable")
        return None

    def _settle(self, held: t.Any, used: int) -> None:
        self._counted(lambda purse: purse.settle(held, used))

    def _counted(self, count: cabc.Callable[[Purse], None]) -> None:
        assert self._purse is not None
        try:
            count(self._purse)
        except StoreUnavailable:
            self._log.warning("tokens of a model call could not be settled: the estimate stays")

    def _used(self, response: t.Any, prompt: int, token: t.Any) -> int | None:
        """What the call cost; None if it was cut off, when only the estimate is sure."""
        message, finish = _said(response)
        if getattr(token, "is_cancelled", False) or finish is None:
            return None
        usage = getattr(response, "usage", None)
        names = ("prompt_tokens", "completion_tokens")
        reported = _reported(getattr(usage, name, None) for name in names)
        return reported or prompt + self._weigh_answer(message)

    def _look_after(self, stage: Stage, response: t.Any, reason: str | None) -> None:
        message, finish = _said(response)
        calls = len(getattr(message, "tool_calls", None) or ())
        if self._too_many_tools(calls):
            # Before the first of them: a batch runs as a whole or not at all.
            stage.stop("tool_limit")
        if reason is not None and str(finish).lower() in _LENGTH:
            stage.stop(reason)
        if calls and self._max_turn_tokens is not None and self._tokens >= self._max_turn_tokens:
            stage.stop("token_limit")

    # -- estimates -----------------------------------------------------------------------------

    def _weigh(self, messages: Messages, tools: t.Any) -> int:
        if self.scales is None or (self._limit is None and self._max_turn_tokens is None):
            return 0
        return (
            self.scales.estimate_tokens_breakdown(messages, tools)["total"]
            + _FRAME * len(messages)
            + IMAGE_TOKENS * sum(map(_images, messages))
        )

    def _weigh_answer(self, message: t.Any) -> int:
        if self.scales is None:
            return 0
        parts = [getattr(message, name, None) for name in ("content", "reasoning_content")]
        parts += [call.function.arguments for call in getattr(message, "tool_calls", None) or ()]
        return sum(self.scales.count_tokens_in_text(p) for p in parts if isinstance(p, str))


def _images(message: dict[str, t.Any]) -> int:
    content = message.get("content")
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") == "image_url" for part in content)


def _reported(counts: cabc.Iterable[t.Any]) -> int:
    """The sum of what a provider reports, as far as these are numbers of tokens."""
    return min(sum(filter(clean.is_tokens, counts)), clean.MAX_TOKENS)


def _said(response: t.Any) -> tuple[t.Any, str | None]:
    """The message of a response, and why it ended if the provider said so."""
    choice = response.choices[0]
    reported = getattr(response, "finish_reason_reported", True)
    return choice.message, choice.finish_reason if reported and choice.finish_reason else None


def _counting(on_retry: cabc.Callable[..., None] | None, tried: list[int]) -> t.Any:
    """*on_retry* that also counts attempts the provider may have begun to work on."""

    def counted(info: dict[str, t.Any]) -> None:
        if not str(info.get("reason", "")).startswith(("status=", "parameter", "streaming")):
            tried[0] += 1
        if on_retry is not None:
            on_retry(info)

    return counted


def _was_refused(exc: Exception) -> bool:
    """Whether the provider said no, or was not there: then it has not done anything."""
    if getattr(exc, "streamed", False):
        return False
    status = getattr(exc, "status_code", None)
    refused = isinstance(status, int) and status >= 400
    return refused or isinstance(exc.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)


class Metered:
    """Put before a model client's class: its calls go through ``meter``, if it has one."""

    meter: Meter | None = None
    model: str
    max_tokens: int

    def chat(
        self,
        messages: Messages,
        tools: t.Any = None,
        max_tokens: int | None = None,
        **options: t.Any,
    ) -> t.Any:
        return self._metered(super().chat, messages, tools, max_tokens, options)  # type: ignore[misc]

    def chat_stream(
        self,
        messages: Messages,
        tools: t.Any = None,
        max_tokens: int | None = None,
        **options: t.Any,
    ) -> t.Any:
        send = super().chat_stream  # type: ignore[misc]
        try:
            return self._metered(send, messages, tools, max_tokens, options)
        except AgentCancelledError:
            # Agentao would take an error here for one of the provider's.
            return _nothing(self.model)

    def _metered(
        self,
        send: cabc.Callable[..., t.Any],
        messages: Messages,
        tools: t.Any,
        max_tokens: int | None,
        options: dict[str, t.Any],
    ) -> t.Any:
        if self.meter is None:
            response = send(messages, tools=tools, max_tokens=max_tokens, **options)
        else:
            most = max_tokens or self.max_tokens
            response = self.meter.call(send, messages, tools, most, options)
        _clean_arguments(response)
        return response


def _clean_arguments(response: t.Any) -> None:
    """A tool gets clean texts, and so does the history: half an emoji would spoil both."""
    message, _ = _said(response)
    for call in getattr(message, "tool_calls", None) or ():
        if isinstance(call.function.arguments, str):
            call.function.arguments = clean.arguments(call.function.arguments)


def _nothing(model: str) -> t.Any:
    message = types.SimpleNamespace(
        role="assistant", content="", tool_calls=None, reasoning_content=None
    )
    choice = types.SimpleNamespace(message=message, finish_reason="stop")
    return types.SimpleNamespace(
        model=model, choices=[choice], usage=None, finish_reason_reported=False
    )
