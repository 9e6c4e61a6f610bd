"""Events as typed, frozen facts. What is not known here still comes through, as an ``Event``."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t

#: Numbers from here on are none of ours: they are below 2^53.
_MOST: t.Final = 2**63


@dataclasses.dataclass(frozen=True)
class Event:
    """One entry of a session's log, as the server sent it."""

    seq: int | None
    """Its number, the cursor; None for what was never stored."""
    turn_id: str | None
    type: str
    data: cabc.Mapping[str, t.Any]
    ts: float
    """Unix seconds."""
    raw: cabc.Mapping[str, t.Any] = dataclasses.field(default_factory=dict, compare=False)
    """The whole JSON object."""

    @property
    def ends(self) -> bool:
        """Whether it is the last event of its turn."""
        return self.type in ("done", "error")

    def _text(self, name: str) -> str:
        value = self.data.get(name)
        return value if isinstance(value, str) else ""

    def _number(self, name: str) -> int:
        value = self.data.get(name)
        return value if isinstance(value, int) and abs(value) < _MOST else 0

    def _object(self, name: str) -> dict[str, t.Any]:
        value = self.data.get(name)
        return dict(value) if isinstance(value, dict) else {}

    def _list(self, name: str) -> list[str]:
        value = self.data.get(name)
        return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


class TurnQueued(Event):
    """The turn waits for others of its session."""

    @property
    def message(self) -> str:
        return self._text("message")

    @property
    def position(self) -> int:
        return self._number("position")


class TurnBegin(Event):
    """The turn starts."""

    @property
    def message(self) -> str:
        return self._text("message")

    @property
    def images(self) -> int:
        return self._number("images")

    @property
    def queued_ms(self) -> int:
        return self._number("queued_ms")


class Text(Event):
    """A piece of what the model says."""

    @property
    def chunk(self) -> str:
        return self._text("chunk")


class Thinking(Event):
    """A piece of the model's reasoning."""

    @property
    def text(self) -> str:
        return self._text("text")


class ToolEvent(Event):
    """Something about one call of a tool."""

    @property
    def call_id(self) -> str:
        return self._text("call_id")

    @property
    def tool(self) -> str:
        return self._text("tool")


class ToolStart(ToolEvent):
    """A tool is about to run."""

    @property
    def args(self) -> dict[str, t.Any]:
        return self._object("args")


class ToolOutput(ToolEvent):
    """A piece of what a running tool prints."""

    @property
    def chunk(self) -> str:
        return self._text("chunk")


class ToolComplete(ToolEvent):
    """The tool has ended: ok, error, cancelled or denied."""

    @property
    def status(self) -> str:
        return self._text("status")

    @property
    def duration_ms(self) -> int:
        return self._number("duration_ms")


class ToolResult(ToolEvent):
    """What the model gets to see of it."""

    @property
    def content(self) -> str:
        return self._text("content")

    @property
    def truncated(self) -> bool:
        return bool(self.data.get("truncated"))


class Question(Event):
    """The turn waits for a person: a ``ToolConfirmation`` or an ``AskUser``."""

    @property
    def question_id(self) -> str:
        return self._text("question_id")

    @property
    def expires_at(self) -> float:
        """Unix seconds, of the server's clock."""
        return _moment(self.data.get("expires_at"))


class ToolConfirmation(Question):
    """May this call run?"""

    @property
    def call_id(self) -> str:
        return self._text("call_id")

    @property
    def tool(self) -> str:
        return self._text("tool")

    @property
    def description(self) -> str:
        return self._text("description")

    @property
    def args(self) -> dict[str, t.Any]:
        return self._object("args")

    @property
    def truncated(self) -> bool:
        """The arguments are not shown completely, or not as they are."""
        return bool(self.data.get("truncated"))

    @property
    def remember(self) -> list[str]:
        """How long an approval may hold: any of turn, session."""
        return self._list("remember")


class AskUser(Question):
    """The agent asks something."""

    @property
    def question(self) -> str:
        return self._text("question")

    @property
    def header(self) -> str:
        return self._text("header")

    @property
    def options(self) -> list[str]:
        return self._list("options")

    @property
    def multiple(self) -> bool:
        return bool(self.data.get("multiple"))

    @property
    def allow_custom(self) -> bool:
        return bool(self.data.get("allow_custom", True))


class QuestionOver(Event):
    """A question is over: approved, denied, answered, expired or cancelled."""

    @property
    def question_id(self) -> str:
        return self._text("question_id")

    @property
    def outcome(self) -> str:
        return self._text("outcome")

    @property
    def by(self) -> str:
        return self._text("by")


class Gap(Event):
    """What was after ``first`` and up to ``last`` is not there any more."""

    @property
    def first(self) -> int:
        return self._number("from")

    @property
    def last(self) -> int:
        return self._number("to")

    @property
    def reason(self) -> str:
        return self._text("reason")


class End(Event):
    """The last event of a turn: ``Done`` or ``Failed``."""

    @property
    def status(self) -> str:
        return self._text("status")

    @property
    def reason(self) -> str | None:
        return self._text("reason") or None

    @property
    def usage(self) -> dict[str, int]:
        return self._object("usage")

    @property
    def tool_count(self) -> int:
        return self._number("tool_count")

    @property
    def duration_ms(self) -> int:
        return self._number("duration_ms")

    @property
    def reply(self) -> str:
        """The last answer, also of a turn that was stopped in the middle of it."""
        value = self.raw.get("reply")
        return value if isinstance(value, str) else ""


class Done(End):
    """The turn is over: completed, incomplete, cancelled or timed_out."""


class Failed(End):
    """The turn failed."""

    @property
    def error(self) -> dict[str, t.Any]:
        """code, message, details."""
        value = self.raw.get("error")
        return dict(value) if isinstance(value, dict) else {}


#: The class of each type; what has no fields worth a name is an ``Event``.
TYPES: t.Final[dict[str, type[Event]]] = {
    "turn_queued": TurnQueued,
    "turn_begin": TurnBegin,
    "llm_text": Text,
    "thinking": Thinking,
    "tool_start": ToolStart,
    "tool_output": ToolOutput,
    "tool_complete": ToolComplete,
    "tool_result": ToolResult,
    "tool_confirmation": ToolConfirmation,
    "ask_user_requested": AskUser,
    "question_closed": QuestionOver,
    "gap": Gap,
    "done": Done,
    "error": Failed,
}


def event(fields: t.Any) -> Event:
    """The event that the JSON object *fields* is; ValueError if it is none."""
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise ValueError("not an event")
    seq, turn_id, data = fields.get("seq"), fields.get("turn_id"), fields.get("data")
    if not _is_cursor(seq) or not isinstance(turn_id, str | None):
        raise ValueError("an event's seq is a number, and its turn_id a text")
    kind = fields["type"]
    data = data if isinstance(data, dict) else {}
    return TYPES.get(kind, Event)(seq, turn_id, kind, data, _moment(fields.get("ts")), fields)


def _is_cursor(seq: t.Any) -> bool:
    return seq is None or (type(seq) is int and 0 <= seq < _MOST)


def _moment(value: t.Any) -> float:
    """Unix seconds; 0 for what is no such number."""
    return float(value) if isinstance(value, int | float) and abs(value) < _MOST else 0.0
