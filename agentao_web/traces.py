"""A span for each turn, if OpenTelemetry's API is installed. No text goes into one.

A turn outlives the request that started it, so its span is no child of the request's but a trace
of its own with a link to it. Names follow the conventions for generative AI where there are some.
"""

from __future__ import annotations

import collections.abc as cabc
import importlib.util
import typing as t

from agentao_web.core.log import Draft
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn


def is_installed() -> bool:
    """Whether there is an OpenTelemetry to tell; it is not imported for that."""
    try:
        return importlib.util.find_spec("opentelemetry.trace") is not None
    except ModuleNotFoundError:
        return False


class Spans(Observer):
    """Tells OpenTelemetry of turns, of their calls to the model and of their tools."""

    def __init__(self, provider: t.Any = None) -> None:
        from opentelemetry import context
        from opentelemetry import trace

        self._trace = trace
        self._nothing = context.Context()
        self._tracer = trace.get_tracer("agentao_web", tracer_provider=provider)
        self._requests: dict[str, t.Any] = {}
        """Turns that have not begun -> the span of the request that asked for them."""
        self._turns: dict[str, t.Any] = {}

    def accepted(self, key: SessionKey, turn: Turn) -> None:
        asking = self._trace.get_current_span().get_span_context()
        if asking.is_valid:
            self._requests[turn.id] = asking

    def withdrawn(self, turn: Turn) -> None:
        self._requests.pop(turn.id, None)

    def began(self, key: SessionKey, turn: Turn, now: float) -> None:
        asking = self._requests.pop(turn.id, None)
        self._turns[turn.id] = self._tracer.start_span(
            "invoke_agent",
            self._nothing,
            links=[self._trace.Link(asking)] if asking is not None else [],
            attributes={
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.conversation.id": key.id,
                "agentao.turn.id": turn.id,
                "agentao.request.id": turn.request.request_id,
                "agentao.turn.queued_ms": int((now - turn.created) * 1000),
            },
            start_time=_nanoseconds(now),
        )

    def said(self, turn: Turn, draft: Draft, now: float) -> None:
        if draft.type != "tool_complete":
            return
        tool, status = draft.data["tool"], draft.data["status"]
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool,
            "gen_ai.tool.call.id": draft.data["call_id"],
            "agentao.tool.status": status,
        }
        failed = status == "error"
        self._child(turn, f"execute_tool {tool}", attributes, draft.data, now, failed)

    def called(
        self, key: SessionKey, turn: Turn, call: cabc.Mapping[str, t.Any], now: float
    ) -> None:
        model = str(call.get("model") or "")
        told = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": call.get("prompt_tokens"),
            "gen_ai.usage.output_tokens": call.get("completion_tokens"),
        }
        attributes = {name: value for name, value in told.items() if value is not None}
        failed = call.get("status") == "error"
        self._child(turn, f"chat {model}".strip(), attributes, call, now, failed)

    def ended(self, key: SessionKey, turn: Turn, outcome: Outcome, now: float) -> None:
        self._requests.pop(turn.id, None)
        span = self._turns.pop(turn.id, None)
        if span is None:
            return
        span.set_attribute("agentao.turn.status", outcome.status.value)
        if outcome.reason:
            span.set_attribute("agentao.turn.reason", outcome.reason)
        for name, kind in (("prompt_tokens", "input"), ("completion_tokens", "output")):
            if name in outcome.usage:
                span.set_attribute(f"gen_ai.usage.{kind}_tokens", outcome.usage[name])
        if outcome.status is State.FAILED:
            span.set_status(self._trace.StatusCode.ERROR, outcome.reason)
        span.end(_nanoseconds(now))

    def _child(
        self,
        turn: Turn,
        name: str,
        attributes: dict[str, t.Any],
        timed: cabc.Mapping[str, t.Any],
        now: float,
        failed: bool,
    ) -> None:
        """A span that has ended by now, of so many milliseconds."""
        parent = self._turns.get(turn.id)
        if parent is None:
            return
        took = timed.get("duration_ms")
        span = self._tracer.start_span(
            name,
            self._trace.set_span_in_context(parent, self._nothing),
            attributes=attributes,
            start_time=_nanoseconds(now - (took if isinstance(took, int | float) else 0) / 1000),
        )
        if failed:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(_nanoseconds(now))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
