"""The host's own functions as tools of an agent: each call on a thread of its own, with an end.

A call has the context the host's code expects (an application context of its own) and never a
request. Must never know Flask: what the context is, it is given.
"""

from __future__ import annotations

import collections
import collections.abc as cabc
import contextlib
import contextvars
import inspect
import itertools
import logging
import secrets
import threading
import typing as t

from agentao.cancellation import AgentCancelledError
from agentao.cancellation import CancellationToken
from agentao.cancellation import bind_cancellation_token
from agentao.cancellation import current_cancellation_token
from agentao.tooling.registry import BUILTIN_TOOL_NAMES
from agentao.tooling.registry import MCP_RESOURCE_TOOL_NAMES
from agentao.tooling.registry import MCP_SKILL_TOOL_NAMES
from agentao.tools.base import Tool

from agentao_web.agents.functions import Description
from agentao_web.agents.functions import ToolError
from agentao_web.agents.functions import describe
from agentao_web.agents.results import as_text
from agentao_web.core import clean
from agentao_web.core.names import Principal

#: Functions for the agents of a principal; asked whenever an agent is built.
ToolsFor = cabc.Callable[[Principal], cabc.Iterable[cabc.Callable[..., t.Any]]]
#: Makes what is entered around each call.
Context = cabc.Callable[[], contextlib.AbstractContextManager[t.Any]]

#: Calls that may run on after nobody waits for them: of one tenant, and in the whole process.
MAX_LEFT_PER_TENANT: t.Final = 8
MAX_LEFT: t.Final = 32
#: Items of a result that only yields them.
MAX_ITEMS: t.Final = 10_000
#: Characters of a ToolError's text.
MAX_ERROR: t.Final = 4096

#: Names that mean something to agentao, whether or not our agents have the tool.
_TAKEN: t.Final = (
    BUILTIN_TOOL_NAMES
    | MCP_RESOURCE_TOOL_NAMES
    | MCP_SKILL_TOOL_NAMES
    | {"plan_save", "plan_finalize", "complete_task", "update_goal"}
    | {"cli_help", "codebase_investigator"}
)
_TAKEN_PREFIXES: t.Final = ("mcp_", "agent_")

_BUSY: t.Final = "not started: too many earlier calls are still running; try again later"


class Answer(t.NamedTuple):
    """How a call ended: ``ok``, ``error`` or ``cancelled``, and what the model is told."""

    status: str
    text: str


class HostTools:
    """The tools a host gives the agents of one application."""

    def __init__(
        self,
        chosen: ToolsFor | None,
        *,
        context: Context = contextlib.nullcontext,
        timeout: float,
        log: logging.Logger,
    ) -> None:
        self._chosen = chosen
        self._context = context
        self._timeout = timeout
        self._log = log
        self._left = Left()

    @property
    def left(self) -> int:
        """Calls that run on although nobody waits for them any more."""
        return self._left.count

    def made_for(self, principal: Principal) -> list[HostTool]:
        """The tools of *principal*; RuntimeError with the cure for what cannot be one."""
        if self._chosen is None:
            return []
        with self._context():
            chosen: t.Any = self._chosen(principal)
            if not isinstance(chosen, cabc.Iterable):
                raise RuntimeError(f"tools= returned {type(chosen).__name__}, not a list")
            functions = list(chosen)
        tools = [self._tool(function, principal) for function in functions]
        _check_names([tool.name for tool in tools])
        return tools

    def _tool(self, function: t.Any, principal: Principal) -> HostTool:
        return HostTool(
            function,
            describe(function),
            principal,
            context=self._context,
            timeout=self._timeout,
            left=self._left,
            log=self._log,
        )


def _check_names(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        # Agentao reads "Read_File" as read_file.
        plain = name.lower().replace("-", "_")
        if plain in _TAKEN or plain.startswith(_TAKEN_PREFIXES):
            raise RuntimeError(f"the name {name} belongs to agentao; say tool(name=…)")
        if plain in seen:
            raise RuntimeError(f"two tools are called {name}; say tool(name=…)")
        seen.add(plain)


class HostTool(Tool):
    """One function of the host's, for one principal."""

    def __init__(
        self,
        function: cabc.Callable[..., t.Any],
        description: Description,
        principal: Principal,
        *,
        context: Context,
        timeout: float,
        left: Left,
        log: logging.Logger,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._function = function
        self._description = description
        self._principal = principal
        self._context = context
        self._timeout = timeout if description.timeout is None else description.timeout
        self._left = left
        self._log = log

    @property
    def name(self) -> str:
        return self._description.name

    @property
    def description(self) -> str:
        return self._description.text

    @property
    def parameters(self) -> dict[str, t.Any]:
        return self._description.schema

    @property
    def requires_confirmation(self) -> bool:
        return not self._description.read_only

    @property
    def is_read_only(self) -> bool:
        return self._description.read_only

    # The slash: an argument of the model's may be called "self".
    def execute(self, /, **arguments: t.Any) -> str:
        """What agentao calls: the text, or an exception whose text is the error."""
        token = current_cancellation_token()
        answer = self.call(arguments, token)
        if answer.status == "cancelled":
            raise AgentCancelledError(token.reason if token is not None else "")
        if answer.status == "error":
            raise ToolError(answer.text)
        return answer.text

    def call(
        self, arguments: cabc.Mapping[str, t.Any], token: CancellationToken | None = None
    ) -> Answer:
        """Call the function and wait for it: until its deadline, and no longer than *token*."""
        tenant = self._principal.tenant
        if self._left.full(tenant):
            return Answer("error", _BUSY)
        run = _Run(tenant)
        forget = token.add_done_callback(run.over.set) if token is not None else None
        try:
            if not self._start(run, arguments, token):
                return Answer("error", _BUSY)
            run.over.wait(min(self._timeout, threading.TIMEOUT_MAX))
        finally:
            if forget is not None:
                forget()
        return self._left.leave(run) or self._unanswered(token)

    def _start(
        self, run: _Run, arguments: cabc.Mapping[str, t.Any], token: CancellationToken | None
    ) -> bool:
        def work() -> None:
            answer = Answer("error", "the tool failed")
            try:
                # A context without anything of the turn's, whatever this Python hands down.
                answer = contextvars.Context().run(self._answer, arguments, token)
            finally:
                self._left.end(run, answer)

        thread = threading.Thread(target=work, name=f"agentao-tool-{self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._log.exception("cannot start a thread")
            return False
        return True

    def _answer(
        self, arguments: cabc.Mapping[str, t.Any], token: CancellationToken | None
    ) -> Answer:
        answer = Answer("error", "the tool failed")
        try:
            with bind_cancellation_token(token), self._context():
                answer = self._shown(self._called(arguments))
        except ToolError as exc:
            return Answer("error", _said(exc))
        except BaseException as exc:
            # SystemExit too: it would end this thread, and the model would wait for nothing.
            return Answer("error", f"the tool failed (error_id {self._logged(exc)})")
        return answer

    def _called(self, arguments: cabc.Mapping[str, t.Any]) -> t.Any:
        args, kwargs = self._description.read(arguments, self._principal)
        result = self._function(*args, **kwargs)
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(f"{self.name} returned a coroutine, which nobody runs")
        if isinstance(result, cabc.Iterator):
            # An endless one would take all memory, and nothing can stop pydantic.
            return list(itertools.islice(result, MAX_ITEMS))
        return result

    def _shown(self, result: t.Any) -> Answer:
        """Inside the context: showing a row of a database may still ask the database."""
        try:
            return Answer("ok", as_text(result))
        except Exception as exc:
            # Not an error: what the function did is done, and must not be tried again.
            error_id = self._logged(exc)
            return Answer("ok", f"done, but the result cannot be shown (error_id {error_id})")

    def _logged(self, exc: BaseException) -> str:
        error_id = secrets.token_hex(8)
        self._log.error("the tool %s failed, error_id %s", self.name, error_id, exc_info=exc)
        return error_id

    def _unanswered(self, token: CancellationToken | None) -> Answer:
        if token is not None and token.is_cancelled:
            return Answer("cancelled", "cancelled; it may still take effect")
        self._log.warning("the tool %s runs on after %g seconds", self.name, self._timeout)
        return Answer(
            "error", f"timed out after {self._timeout:g} seconds; it may still take effect"
        )


def _said(exc: ToolError) -> str:
    try:
        return clean.text(str(exc))[:MAX_ERROR] or "the tool failed"
    except Exception:
        return "the tool failed"


class _Run:
    """One call, as the two threads it has to do with see it."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.over = threading.Event()
        """It has ended, or the turn has."""
        self.answer: Answer | None = None
        self.left = False


class Left:
    """Counts the calls that run on after nobody waits for them: threads cannot be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: collections.Counter[str] = collections.Counter()

    @property
    def count(self) -> int:
        with self._lock:
            return self._tenants.total()

    def full(self, tenant: str) -> bool:
        """Whether *tenant* may start no more for now."""
        with self._lock:
            mine, all_ = self._tenants[tenant], self._tenants.total()
            return mine >= MAX_LEFT_PER_TENANT or all_ >= MAX_LEFT

    def leave(self, run: _Run) -> Answer | None:
        """Wait no longer: its answer, or None if it runs on, counted from now."""
        with self._lock:
            if run.answer is None:
                run.left = True
                self._tenants[run.tenant] += 1
            return run.answer

    def end(self, run: _Run, answer: Answer) -> None:
        with self._lock:
            run.answer = answer
            if run.left:
                self._tenants[run.tenant] -= 1
                self._tenants += collections.Counter()  # Forgets who has none.
        run.over.set()
