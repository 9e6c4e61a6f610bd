"""For a host's tests: agents that follow a script, without a model or a network.

web = AgentaoWeb(authenticate=..., agents=scripted(say("hi")))
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import threading
import typing as t
from types import SimpleNamespace

from agentao_web.agents.host import SessionInfo
from agentao_web.core.names import Principal

__all__ = [
    "Gate",
    "Scripted",
    "ScriptedAgent",
    "ask",
    "ask_user",
    "begin",
    "crash",
    "emit",
    "end",
    "pause",
    "say",
    "scripted",
    "use",
]

#: How long a script waits for a gate before it gives the test up, in seconds.
PATIENCE: t.Final = 30.0


class Gate:
    """A place in a script where a test meets the agent."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def reached(self, timeout: float = PATIENCE) -> None:
        """Wait until an agent stands here; AssertionError if none comes."""
        if not self._reached.wait(timeout):
            raise AssertionError("no agent came to the gate")

    def open(self) -> None:
        """Let everyone through, now and later."""
        self._opened.set()

    def _pass(self, agent: ScriptedAgent, *, stubborn: bool) -> None:
        self._reached.set()
        if not stubborn:
            agent.token.add_done_callback(self._opened.set)
        if not self._opened.wait(PATIENCE):
            raise AssertionError("nobody opened the gate")


Step = cabc.Callable[["ScriptedAgent"], None]


def say(*chunks: str) -> Step:
    """Stream *chunks*; together they are the answer."""

    def step(agent: ScriptedAgent) -> None:
        agent.text = "".join(chunks)
        for chunk in chunks:
            agent.emit("llm_text", chunk=chunk)

    return step


def use(tool: str, result: str | None = None, status: str = "ok", **args: t.Any) -> Step:
    """Use a tool: a function of ``tools=`` is called with *args*, and nobody is asked.

    With a *result*, or of any other tool, there are only the events of it.
    """

    def step(agent: ScriptedAgent) -> None:
        call = agent.next_call(tool)
        agent.emit("tool_start", args=args, **call)
        ended, text = agent.use(tool, args, result, status)
        agent.emit("tool_complete", status=ended, duration_ms=1, **call)
        agent.emit("tool_result", content=text, **call)

    return step


def ask(tool: str, result: str | None = None, **args: t.Any) -> Step:
    """Use a tool, as ``use`` does, if a person approves it; else it does not run."""

    def step(agent: ScriptedAgent) -> None:
        call = agent.next_call(tool)
        agent.emit("tool_confirmation", args=args, **call)
        approved = agent.transport.confirm_tool(tool, f"Runs {tool}.", args)
        agent.answers.append(approved)
        agent.emit("tool_start", args=args, **call)
        ended, error, text = "cancelled", "not approved", "not approved"
        if approved:
            error = ""
            ended, text = agent.use(tool, args, result)
        agent.emit("tool_complete", duration_ms=1, status=ended, error=error, **call)
        agent.emit("tool_result", content=text, **call)

    return step


def ask_user(
    question: str,
    *options: str,
    header: str | None = None,
    multiple: bool = False,
    allow_custom: bool = True,
) -> Step:
    """Ask a person; what the model would be told is appended to the agent's ``answers``."""

    def step(agent: ScriptedAgent) -> None:
        answer = agent.transport.ask_user(
            question,
            header=header,
            options=list(options),
            multiple=multiple,
            allow_custom=allow_custom,
        )
        agent.answers.append(answer)

    return step


def begin(tool: str, **args: t.Any) -> Step:
    """Start a tool that never completes."""

    def step(agent: ScriptedAgent) -> None:
        agent.emit("tool_start", args=args, tool=tool, call_id="call-begun")

    return step


def pause(gate: Gate, *, stubborn: bool = False) -> Step:
    """Wait at *gate* until it is opened or the turn is stopped; a *stubborn* one ignores a stop."""
    return lambda agent: gate._pass(agent, stubborn=stubborn)


def crash(error: BaseException) -> Step:
    """Raise *error* out of the agent."""

    def step(agent: ScriptedAgent) -> None:
        raise error

    return step


def end(reason: str) -> Step:
    """End without a whole answer: ``llm_error``, ``max_iterations``, ``length_truncated`` …"""

    def step(agent: ScriptedAgent) -> None:
        agent.reason = reason

    return step


def emit(kind: str, **data: t.Any) -> Step:
    """Emit any event of Agentao's."""
    return lambda agent: agent.emit(kind, **data)


@dataclasses.dataclass
class _LastTurn:
    """What ``agent.last_turn`` has (agentao/outcome.py)."""

    text: str
    status: str
    incomplete_reason: str | None
    tool_count: int
    finish_reason_missing: bool = False


class ScriptedAgent:
    """Shaped like an Agentao; runs one script a turn."""

    def __init__(self, scripts: Scripted, session: SessionInfo, transport: t.Any) -> None:
        self.messages: list[dict[str, t.Any]] = list(session.history)
        self.tools = {tool.name: tool for tool in session.tools}
        self.results: list[str] = []
        """What its tools gave, in order."""
        self.closed = False
        self.last_turn: _LastTurn | None = None
        self.token: t.Any = None
        self.text = ""
        self.reason: str | None = None
        self.tool_count = 0
        self.answers: list[t.Any] = []
        """What people said, oldest first: approvals, and answers in words."""
        self.transport = transport
        self._scripts = scripts

    def emit(self, kind: str, **data: t.Any) -> None:
        """Send an event the way Agentao does."""
        self.transport.emit(SimpleNamespace(type=kind, data=data))

    def next_call(self, tool: str) -> dict[str, t.Any]:
        """What the events of one call of *tool* have in common."""
        self.tool_count += 1
        return {"tool": tool, "call_id": f"call-{self.tool_count}"}

    def use(
        self, tool: str, args: dict[str, t.Any], result: str | None, status: str = "ok"
    ) -> tuple[str, str]:
        """How a call ends, and its result: a given one, or what the host's function returns."""
        if result is None and tool in self.tools:
            status, result = self.tools[tool].call(args, self.token)
        self.results.append(result or "")
        return status, result or ""

    def chat(
        self,
        message: str,
        max_iterations: int = 100,
        cancellation_token: t.Any = None,
        images: t.Any = None,
    ) -> str:
        self.token, self.text, self.reason, self.tool_count = cancellation_token, "", None, 0
        self.messages.append({"role": "user", "content": message})
        for step in self._scripts.script_for(message):
            if self.token.is_cancelled:
                break
            step(self)
        status = "cancelled" if self.token.is_cancelled else "ok"
        self.messages.append({"role": "assistant", "content": self.text})
        self.last_turn = _LastTurn(self.text, status, self.reason, self.tool_count)
        return self.text

    def close(self) -> None:
        self.closed = True


class Scripted:
    """The ``agents=`` of an AgentaoWeb that follows scripts; remembers what it built."""

    def __init__(self, default: tuple[Step, ...], by_message: dict[str, list[Step]]) -> None:
        self.agents: list[ScriptedAgent] = []
        self.principals: list[Principal] = []
        self._default = default
        self._by_message = by_message

    def __call__(self, principal: Principal, session: SessionInfo, transport: t.Any) -> t.Any:
        agent = ScriptedAgent(self, session, transport)
        self.agents.append(agent)
        self.principals.append(principal)
        return agent

    def script_for(self, message: str) -> cabc.Sequence[Step]:
        """The steps that answer *message*."""
        return self._by_message.get(message, list(self._default))


def scripted(*steps: Step, by: cabc.Mapping[str, list[Step]] | None = None) -> Scripted:
    """Agents that answer every message with *steps*, or with those *by* has for the message."""
    return Scripted(steps, dict(by or {}))
