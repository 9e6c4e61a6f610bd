"""Between one Agentao and the turn it runs: events out by allow-list, questions to people.

A bridge is made before its agent and stays its transport for ever: agentao captures the transport
at construction, so assigning another one later does nothing. What turn it serves changes inside.
"""

from __future__ import annotations

import collections.abc as cabc
import hashlib
import itertools
import json
import logging
import os
import typing as t

from agentao import Agentao
from agentao.cancellation import AgentCancelledError
from agentao.cancellation import CancellationToken
from agentao.context_manager import is_context_too_long_error
from agentao.transport.confirmation import APPROVAL_UNAVAILABLE
from agentao.transport.confirmation import gate_note
from agentao.transport.confirmation import record_decline

from agentao_web.agents.approvals import SPANS
from agentao_web.agents.approvals import Approvals
from agentao_web.agents.approvals import rememberable
from agentao_web.agents.budget import Meter
from agentao_web.agents.messages import Messages
from agentao_web.agents.model.refusals import Failure
from agentao_web.agents.relative import Pieces
from agentao_web.agents.relative import relative
from agentao_web.core import clean
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.question import Question
from agentao_web.core.rules import Rules
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest

#: Bounds of what one event may carry, in characters.
RESULT_LIMIT: t.Final = 4096
TEXT_LIMIT: t.Final = 16_384
_DEPTH_LIMIT: t.Final = 6
_ITEMS_LIMIT: t.Final = 64
_NAME_LIMIT: t.Final = 256
#: Tools that write the file their file_path leads to. (Of a command agentao itself keeps the folder
#: that was asked about.)
_WRITERS: t.Final = ("write_file", "replace")
_CHOICE_LIMIT: t.Final = 1024

#: Agentao's words for a turn without a whole answer that are shown as they are.
_INCOMPLETE: t.Final = frozenset(
    {"no_output", "reasoning_only", "length_truncated", "doom_loop", "max_iterations"}
)
#: Events after which the past of a history may have been rewritten.
_REWRITES: t.Final = frozenset({"context_compressed", "compaction_settled", "images_removed"})
#: What the model reads when it asked and was not answered.
_NOBODY: t.Final = (
    "[ask_user: nobody answered in time. Go on without an answer, or say what you need.]"
)
_STOPPED: t.Final = "[ask_user: the turn was stopped.]"
#: Why a call that was not run did not, in agentao's words (agentao/runtime/tool_executor.py).
_NOT_RUN: t.Final = ("not approved", "approval unavailable", "denied")
#: Events whose text is part of a longer one, and the field it is in.
_IN_PIECES: t.Final = {"llm_text": "chunk", "thinking": "text"}
_MORE_STEPS: t.Final = ("continue", "stop")
#: Events a meter counts by.
_METERED: t.Final = frozenset({"llm_call_started", "llm_call_completed", "tool_start"})
_NO_ANSWER: t.Final = "[No answer: the model could not be reached.]"
_NO_ROOM: t.Final = "[No answer: this turn did not fit into the model's context window."
#: How much of a message is kept in the history if it did not fit, in characters.
_KEPT_OF_MESSAGE: t.Final = 1_000

Data = cabc.Mapping[str, t.Any]


class Stage(t.Protocol):
    """The turn an agent runs, as far as a bridge sees it."""

    turn_id: str

    def publish(self, draft: Draft) -> None: ...
    def on_stop(self, callback: cabc.Callable[[str], None]) -> None: ...
    def ask(self, kind: str, data: cabc.Mapping[str, t.Any]) -> Question: ...
    def approved(self, data: cabc.Mapping[str, t.Any], by: str) -> None: ...
    def stop(self, reason: str) -> None: ...
    def called(self, call: cabc.Mapping[str, t.Any]) -> None: ...


class Bridge:
    """agentao's CoreTransport (agentao/transport/base.py) for one session."""

    def __init__(
        self,
        workspace: str,
        *,
        thinking: bool,
        approved: cabc.Iterable[Question] = (),
        meter: Meter | None = None,
    ) -> None:
        self.rewritten = False
        """The history was rewritten since this was last set to False."""
        self.filtered = False
        """A content filter ended the last answer of the model."""
        self._workspace = workspace
        self._thinking = thinking
        self._meter = meter or Meter()
        self._stage: Stage | None = None
        self._usage: dict[str, int] = {}
        self._calls: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._approvals = Approvals(approved)
        self._confirming: str | None = None
        self._asked: set[str] = set()
        self._targets: dict[str, list[str]] = {}
        # What is said, and thought, comes in pieces: type and field of their events.
        self._said = {kind: Pieces(workspace) for kind in _IN_PIECES}
        self._model = ""
        self.ran: list[str] = []
        """The tools that ran in this turn."""
        self.cut_down = False
        """In this turn the history was cut to its last messages, without a summary."""
        self.images_removed = False
        """In this turn the model refused pictures, and they were taken out of the history."""
        self.failed: Data = {}
        """The event of the last call to the model, if it failed."""
        self.shown: list[str] = []
        """What that call had said by then; known only of clients that are not ours."""

    def attach(self, stage: Stage) -> None:
        """From now on events go to *stage*."""
        self._usage, self._calls, self._asked = {}, {}, set()
        self.ran, self.failed, self.shown = [], {}, []
        self.cut_down = self.images_removed = False
        self.filtered = False
        self._approvals.begin()
        self._targets = {}
        self._numbers = itertools.count(1)
        self._stage = stage
        self._meter.attach(stage)

    def detach(self) -> dict[str, int]:
        """Events go nowhere; returns what the turn used."""
        if self._stage is not None:
            for draft in self._rest():
                self._stage.publish(draft)
        self._stage = None
        self._meter.detach()
        return self._usage

    # -- agentao.transport.base.CoreTransport --------------------------------------------------

    def emit(self, event: t.Any) -> None:
        """Send *event* on if it is on the list, and only its listed fields."""
        stage = self._stage
        kind = str(getattr(event.type, "value", event.type))
        if kind in _REWRITES:
            self.rewritten = True
            self._note_rewrite(kind, event.data)
        elif kind == "tool_confirmation":
            # Just before confirm_tool, which is not told which call it is about.
            self._confirming = str(event.data.get("call_id"))
        elif kind in _METERED:
            self._meter.hear(kind, event.data)
        if kind == "llm_call_completed":
            self.filtered = event.data.get("finish_reason") == "content_filter"
        if kind == "llm_call_started":
            self._model = self.text(event.data.get("model", ""), 128)
            self.failed, self.shown = {}, []
        elif kind == "llm_call_completed" and stage is not None:
            told = {name: event.data.get(name) for name in _CALLED}
            stage.called({**told, "model": self._model})
            self.failed = event.data if event.data.get("status") == "error" else {}
        shape = _SHAPES.get(kind)
        if stage is None or shape is None:
            return
        data = event.data
        if kind in _IN_PIECES and not self._meter.hears_all:
            data = self._bounded(kind, data)
        for draft in (*self._rest(but=kind), *shape(self, data)):
            stage.publish(draft)

    def _note_rewrite(self, kind: str, data: Data) -> None:
        if kind == "images_removed":
            self.images_removed = self.images_removed or data.get("reason") == "provider_rejected"
        elif data.get("kind") == "minimal_history" and data.get("status") == "success":
            self.cut_down = True

    def _bounded(self, kind: str, data: Data) -> Data:
        """What a client that is not ours says, as far as the turn has room for it."""
        field = _IN_PIECES[kind]
        said = self._meter.room(str(data.get(field, "")))
        if kind == "llm_text":
            self.shown.append(said)
        return {**data, field: said}

    def confirm_tool(self, tool_name: str, description: str, args: dict[str, t.Any]) -> bool:
        """Ask a person whether this call may run, unless that is remembered.

        No answer in time means no, and the model is told so in a way that lets it go on.
        """
        stage = self._stage
        if stage is None:
            return False
        shown = self.plain(args)
        # Before it is asked: what leads elsewhere by the time it runs was not approved.
        target = self._target(tool_name, args)
        # What is gated is asked for one call only (agentao/transport/confirmation.py).
        spans = list(SPANS) if gate_note() is None and rememberable(tool_name, args, shown) else []
        data = {
            "call_id": self._confirmed_call(),
            "tool": self.text(tool_name, 128),
            "description": self.text(description, RESULT_LIMIT),
            "args": shown,
            "truncated": not (
                _fits(args) and len(tool_name) <= 128 and len(description) <= RESULT_LIMIT
            ),
            "remember": spans,
        }
        if spans and (span := self._approvals.covers(tool_name, shown)):
            stage.approved(data, f"an approval for this {span}")
            self._bind(tool_name, args, target)
            return True
        question = stage.ask("tool_confirmation", data)
        if question.outcome == "approved":
            if (span := question.answer.get("remember")) in spans:
                self._approvals.add(span, tool_name, shown)
            self._bind(tool_name, args, target)
            return True
        if question.outcome == "expired":
            record_decline(APPROVAL_UNAVAILABLE)
        return False

    def approved_target(self, tool: str, args: dict[str, t.Any]) -> str | None:
        """The file an approved call of a tool was about to write; None if nobody was asked."""
        try:
            return self._targets[_call(tool, args)].pop(0)
        except (KeyError, IndexError):
            return None

    def _target(self, tool: str, args: dict[str, t.Any]) -> str | None:
        """The real path a call is about, as it is now."""
        path = args.get("file_path") if tool.rpartition("] ")[2] in _WRITERS else None
        if not isinstance(path, str) or "\0" in path:
            return None
        return os.path.realpath(os.path.join(self._workspace, path))

    def _bind(self, tool: str, args: dict[str, t.Any], target: str | None) -> None:
        if target is not None:
            self._targets.setdefault(_call(tool, args), []).append(target)

    def ask_user(
        self,
        question: str,
        *,
        header: t.Any = None,
        options: t.Any = None,
        multiple: t.Any = False,
        allow_custom: t.Any = True,
    ) -> str:
        """Ask a person something; what the model is told. Possibly on several threads at once."""
        stage = self._stage
        if stage is None:
            return _STOPPED
        choices = options if isinstance(options, list) else []
        choices = [self.text(choice, _CHOICE_LIMIT) for choice in choices[:_ITEMS_LIMIT]]
        data = {
            "question": self.text(question, TEXT_LIMIT),
            "header": None if header is None else self.text(header, _CHOICE_LIMIT),
            "options": choices,
            "multiple": bool(multiple),
            "allow_custom": bool(allow_custom) or not choices,
        }
        try:
            closed = stage.ask("ask_user_requested", data)
        except StoreUnavailable:
            # Raised here it would only be one more tool that failed.
            stage.stop("store_unavailable")
            return _STOPPED
        if closed.outcome == "answered":
            return str(closed.answer["answer"])
        return _NOBODY if closed.outcome == "expired" else _STOPPED

    def on_max_iterations(self, count: int, messages: list[t.Any]) -> dict[str, t.Any]:
        """Ask whether to go on: ``continue``, ``stop``, or what to do instead."""
        answer = self.ask_user(
            f"Not done after {count} calls to the model. Go on? Or say what to do instead.",
            header="More steps?",
            options=list(_MORE_STEPS),
        )
        if answer in (_NOBODY, _STOPPED, "stop"):
            return {"action": "stop"}
        if answer == "continue":
            return {"action": "continue"}
        return {"action": "new_instruction", "message": answer}

    def _confirmed_call(self) -> str:
        theirs = self._confirming or ""
        self._confirming = None
        self._asked.add(theirs)
        return self.call_id(theirs, fresh=True)

    # -- what leaves the server ----------------------------------------------------------------

    def text(self, value: t.Any, limit: int | None = None) -> str:
        """*value* as text that can be sent: encodable, workspace paths relative, bounded."""
        text = clean.text(value) if isinstance(value, str) else clean.words(value)
        text = relative(text, self._workspace)
        return text if limit is None or len(text) <= limit else text[:limit]

    def plain(self, value: t.Any, depth: int = 0) -> t.Any:
        """*value* as bounded JSON: what is no JSON becomes text."""
        if isinstance(value, int) and abs(value) >= 2**53:
            # A browser rounds it.
            return self.text(_digits(value), RESULT_LIMIT)
        if value is None or isinstance(value, int | float):
            return clean.plain(value)
        if isinstance(value, cabc.Mapping) and depth < _DEPTH_LIMIT:
            shown: dict[str, t.Any] = {}
            for number, (k, v) in enumerate(itertools.islice(value.items(), _ITEMS_LIMIT), 1):
                name = self.text(k, _NAME_LIMIT)
                # Two names that begin alike are two.
                name = name if name not in shown else f"{name}… ({number})"
                shown[name] = self.plain(v, depth + 1)
            return shown
        if isinstance(value, list | tuple) and depth < _DEPTH_LIMIT:
            return [self.plain(v, depth + 1) for v in value[:_ITEMS_LIMIT]]
        return self.text(value, RESULT_LIMIT)

    def call_id(self, theirs: t.Any, *, fresh: bool = False) -> str:
        """Our id of a tool call: providers repeat theirs from turn to turn."""
        key = str(theirs)
        if fresh or key not in self._calls:
            turn = self._stage.turn_id[:8] if self._stage is not None else ""
            self._calls[key] = f"{turn}.{next(self._numbers)}"
        return self._calls[key]

    def _pieces(self, kind: str, field: str, value: t.Any, **more: t.Any) -> cabc.Iterator[Draft]:
        """Text of any length as events of bounded length; none of it is lost."""
        text = self.text(value)
        for start in range(0, len(text), TEXT_LIMIT):
            yield Draft(kind, {**more, field: text[start : start + TEXT_LIMIT]})

    def _llm_text(self, data: Data) -> cabc.Iterator[Draft]:
        said = self._said["llm_text"].add(str(data.get("chunk", "")))
        return self._pieces("llm_text", "chunk", said)

    def _think(self, data: Data) -> cabc.Iterator[Draft]:
        if self._thinking:
            thought = self._said["thinking"].add(str(data.get("text", "")))
            yield from self._pieces("thinking", "text", thought)

    def _rest(self, *, but: str = "") -> cabc.Iterator[Draft]:
        """What was held back of a text that has ended: something else has begun."""
        for kind, said in self._said.items():
            # Once per token, and nearly always nothing.
            if kind != but and said.held:
                yield from self._pieces(kind, _IN_PIECES[kind], said.rest())

    def _call_completed(self, data: Data) -> cabc.Iterator[Draft]:
        used = clean.usage({name: data.get(name) for name in _USAGE})
        self._usage = clean.usage(self._usage, used)
        if used:
            yield Draft("usage", used)

    def _retry(self, data: Data) -> cabc.Iterator[Draft]:
        fields = {k: self.plain(data.get(k)) for k in ("retry", "max_retries", "delay_s")}
        yield Draft("llm_retry", {**fields, "reason": self.text(data.get("reason", ""), 64)})

    def _tool_start(self, data: Data) -> cabc.Iterator[Draft]:
        theirs = str(data.get("call_id"))
        # One that was asked about has its id already.
        fields = self._tool(data, fresh=theirs not in self._asked)
        self._asked.discard(theirs)
        yield Draft("tool_start", {**fields, "args": self.plain(data.get("args", {}))})

    def _tool_output(self, data: Data) -> cabc.Iterator[Draft]:
        return self._pieces("tool_output", "chunk", data.get("chunk", ""), **self._tool(data))

    def _tool_complete(self, data: Data) -> cabc.Iterator[Draft]:
        status = str(data.get("status"))
        if status == "cancelled" and str(data.get("error", "")).startswith(_NOT_RUN):
            status = "denied"
        if status in ("ok", "error"):
            self.ran.append(self.text(data.get("tool", ""), 128))
        told = {"status": status, "duration_ms": self.plain(data.get("duration_ms"))}
        yield Draft("tool_complete", {**self._tool(data), **told})

    def _tool_result(self, data: Data) -> cabc.Iterator[Draft]:
        content = self.text(data.get("content", ""))
        fields = {"content": content[:RESULT_LIMIT], "truncated": len(content) > RESULT_LIMIT}
        yield Draft("tool_result", {**self._tool(data), **fields})

    def _tool(self, data: Data, *, fresh: bool = False) -> dict[str, t.Any]:
        call_id = self.call_id(data.get("call_id"), fresh=fresh)
        return {"call_id": call_id, "tool": self.text(data.get("tool", ""), 128)}

    def _compressed(self, data: Data) -> cabc.Iterator[Draft]:
        names = ("type", "reason", "pre_msgs", "post_msgs", "pre_est_tokens", "post_est_tokens")
        yield self._listed("context_compressed", data, (*names, "duration_ms"))

    def _agent_start(self, data: Data) -> cabc.Iterator[Draft]:
        yield self._listed("agent_start", data, ("agent", "task", "max_turns", "child_task_id"))

    def _agent_end(self, data: Data) -> cabc.Iterator[Draft]:
        names = ("agent", "state", "turns", "tool_calls", "tokens", "duration_ms", "child_task_id")
        yield self._listed("agent_end", data, names)

    def _listed(self, kind: str, data: Data, names: cabc.Iterable[str]) -> Draft:
        return Draft(kind, {k: self.plain(data[k]) for k in names if k in data})


def _call(tool: str, args: cabc.Mapping[str, t.Any]) -> str:
    """A call as it was approved: the tool, and a hash of its arguments."""
    told = json.dumps(args, sort_keys=True, default=repr)
    return f"{tool.rpartition('] ')[2]} {hashlib.sha256(told.encode()).hexdigest()}"


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:
        return hex(value)


def _fits(value: t.Any, depth: int = 0) -> bool:
    """Whether ``plain`` shows all of *value*, and as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return len(_digits(value)) <= RESULT_LIMIT
    if isinstance(value, cabc.Mapping):
        for name in value:
            if not isinstance(name, str) or len(name) > _NAME_LIMIT or not _is_text(name):
                return False
    if isinstance(value, cabc.Mapping | list | tuple):
        inner = value.values() if isinstance(value, cabc.Mapping) else value
        short = depth < _DEPTH_LIMIT and len(value) <= _ITEMS_LIMIT
        return short and all(_fits(v, depth + 1) for v in inner)
    if value is None or isinstance(value, bool | int | float):
        return True
    return isinstance(value, str) and len(value) <= RESULT_LIMIT and _is_text(value)


def _is_text(value: str) -> bool:
    """Whether it can be sent as it is: half of a character is shown as a question mark."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_USAGE: t.Final = (
    "prompt_tokens",
    "completion_tokens",
    "cache_read_tokens",
    "cache_creation_tokens",
    "reasoning_tokens",
)

#: What is told of a call to the model besides its name; never what was said.
_CALLED: t.Final = ("status", "duration_ms", "prompt_tokens", "completion_tokens")

#: The allow-list: agentao's event type -> what a client sees of it. All else stays here.
_SHAPES: t.Final[dict[str, cabc.Callable[[Bridge, Data], cabc.Iterator[Draft]]]] = {
    "llm_text": Bridge._llm_text,
    "thinking": Bridge._think,
    "llm_call_completed": Bridge._call_completed,
    "llm_retry": Bridge._retry,
    "tool_start": Bridge._tool_start,
    "tool_output": Bridge._tool_output,
    "tool_complete": Bridge._tool_complete,
    "tool_result": Bridge._tool_result,
    "context_compressed": Bridge._compressed,
    "agent_start": Bridge._agent_start,
    "agent_end": Bridge._agent_end,
}


class AgentaoAgent:
    """An Agentao (or something shaped like one) as the runner wants an agent."""

    def __init__(
        self,
        agent: t.Any,
        bridge: Bridge,
        *,
        rules: Rules,
        max_steps: int,
        close: cabc.Callable[[t.Any], None],
        log: logging.Logger,
        prepare: cabc.Callable[[CancellationToken], None] = lambda token: None,
        state: cabc.Callable[[], dict[str, t.Any] | None] = lambda: None,
    ) -> None:
        self.rules = rules
        """What it may do; the rules it was built with."""
        self._agent = agent
        self._prepare = prepare
        self._state = state
        self._bridge = bridge
        self._max_steps = max_steps
        self._close = close
        self._log = log
        self._mend()
        # The very objects: a compaction replaces them, and that has to be seen.
        self._kept: list[t.Any] = list(agent.messages)

    def run(self, request: TurnRequest, stage: Stage) -> Outcome:
        """One ``agent.chat()``; see agentao_web.runner.Agent."""
        token = CancellationToken()
        self._mend()
        before, rewritten = list(self._agent.messages), self._bridge.rewritten
        self._bridge.attach(stage)
        stage.on_stop(token.cancel)
        images = [dict(image) for image in request.images] or None
        try:
            self._prepare(token)
            self._agent.chat(
                request.message,
                max_iterations=self._max_steps,
                cancellation_token=token,
                images=images,
            )
        except AgentCancelledError:
            pass  # The outcome says so.
        finally:
            usage = self._bridge.detach()
            self._mend()
        outcome = self._outcome(usage)
        kept = self._whole(request, before, outcome)
        if kept is not None:
            self._agent.messages[:] = kept
            self._bridge.rewritten = rewritten
            if manager := getattr(self._agent, "context_manager", None):
                # It knew the length of another history.
                manager.invalidate_token_anchor()
        return outcome

    def _mend(self) -> None:
        """Also a host's own agent: what its tools bring must not spoil its history."""
        messages = self._agent.messages
        if isinstance(messages, Messages) or not isinstance(messages, list):
            return
        if isinstance(self._agent, Agentao):
            self._agent.messages = Messages(messages)
        else:
            # Of what is not Agentao nobody knows who else holds the list.
            messages[:] = Messages(messages)

    def _outcome(self, usage: dict[str, int]) -> Outcome:
        """What ``agent.last_turn`` says, never the text: that may be empty, or cut."""
        last = self._agent.last_turn
        tools = last.tool_count if isinstance(last.tool_count, int) else 0
        counts: dict[str, t.Any] = {"usage": usage, "tool_count": tools}
        reason = last.incomplete_reason
        if reason == "llm_error":
            return self._failed(counts)
        if last.status != "ok":
            if event := self._bridge.failed:
                # It was stopped while it waited to ask again: the provider's words are not kept.
                self._answer("".join(self._bridge.shown) if event.get("streamed") else _NO_ANSWER)
            # Cancelled from within, by nobody who asked us: the runner's reason wins if it has one.
            return Outcome(State.INCOMPLETE, "cancelled", **counts)
        if self._bridge.filtered:
            return Outcome(State.INCOMPLETE, "content_filtered", **counts)
        if reason is not None:
            known = reason if reason in _INCOMPLETE else "incomplete"
            return Outcome(State.INCOMPLETE, known, **counts)
        if getattr(last, "finish_reason_missing", False):
            return Outcome(State.INCOMPLETE, "stream_cut", **counts)
        reply = self._bridge.text(last.text or "")
        return Outcome(State.COMPLETED, None, reply, **counts)

    def _failed(self, counts: dict[str, t.Any]) -> Outcome:
        """How a turn ends whose last call to the model came to nothing."""
        event = self._bridge.failed
        if event.get("streamed"):
            # Of a client that is not ours: what was read stays.
            self._answer("".join(self._bridge.shown))
            return Outcome(State.INCOMPLETE, "stream_cut", **counts)
        # The provider's raw words, which may hold a key fragment, are not for the history.
        self._answer(_NO_ANSWER)
        failure = getattr(getattr(self._agent, "llm", None), "failure", None)
        if failure is None:
            too_long = is_context_too_long_error(Exception(str(event.get("error_message", ""))))
            failure = Failure(too_long)
        if failure.too_long:
            return Outcome(State.INCOMPLETE, "context_too_long", **counts)
        wait = failure.retry_after
        details = {} if wait is None else {"retry_after": wait}
        return Outcome(State.FAILED, "llm_unavailable", details=details, **counts)

    def _answer(self, text: str) -> None:
        messages = self._agent.messages
        if messages and messages[-1].get("role") == "assistant":
            messages[-1] = {"role": "assistant", "content": text}

    # -- the history ---------------------------------------------------------------------------

    def _whole(
        self, request: TurnRequest, before: list[t.Any], outcome: Outcome
    ) -> list[t.Any] | None:
        """The history as it should be, where Agentao has thrown some of it away in its distress;
        None if it is good as it is. A summary of old messages is."""
        if outcome.reason == "context_too_long":
            return [*before, *self._note(request, [_NO_ROOM, *self._tools_that_ran()])]
        if self._bridge.images_removed and request.images:
            # The older ones were good until now: it is this turn's that the model refuses.
            return [*before, *self._note(request, [_NO_ANSWER.rstrip("]")])]
        if self._bridge.cut_down:
            return [*before, *_of_turn(self._agent.messages, before, request.message)]
        return None

    def _tools_that_ran(self) -> list[str]:
        names = list(dict.fromkeys(self._bridge.ran))
        return [f"Tools that ran in it: {', '.join(names)}."] if names else []

    @staticmethod
    def _note(request: TurnRequest, answer: list[str]) -> list[dict[str, t.Any]]:
        message = request.message
        if len(message) > _KEPT_OF_MESSAGE:
            left = len(message) - _KEPT_OF_MESSAGE
            message = f"{message[:_KEPT_OF_MESSAGE]}\n[The other {left} characters were left out.]"
        if request.images:
            message += f"\n[Pictures that came with it were left out: {len(request.images)}.]"
        return [
            {"role": "user", "content": message},
            {"role": "assistant", "content": " ".join(answer) + "]"},
        ]

    def unsaved(self) -> tuple[list[dict[str, t.Any]], bool]:
        """See agentao_web.runner.Agent."""
        messages, kept = self._agent.messages, self._kept
        same = len(messages) >= len(kept) and all(a is b for a, b in zip(messages, kept))  # noqa: B905
        if self._bridge.rewritten or not same:
            return clean.texts(list(messages)), True
        return clean.texts(messages[len(kept) :]), False

    def saved(self) -> None:
        """See agentao_web.runner.Agent."""
        self._kept = list(self._agent.messages)
        self._bridge.rewritten = False

    def state(self) -> dict[str, t.Any] | None:
        """See agentao_web.runner.Agent."""
        return self._state()

    def close(self) -> None:
        """See agentao_web.runner.Agent."""
        self._close(self._agent)


def _of_turn(messages: list[t.Any], before: list[t.Any], message: str) -> list[t.Any]:
    """What of *messages* was said in the turn that *message* began, which may be cut off too."""
    old = {id(one) for one in before}
    new = [one for one in messages if id(one) not in old]
    for start, one in enumerate(new):
        if one.get("role") == "user" and _says(one, message):
            return new[start:]
    return [{"role": "user", "content": message}, *new]


def _says(one: Data, message: str) -> bool:
    content = one.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return any(str(part.get("text", "")).endswith(message) for part in parts)
