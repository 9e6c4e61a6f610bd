"""Builds the agents of one application: which model, which folder, which transport."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import logging
import os
import threading
import time
import typing as t
from pathlib import Path

from agentao.cancellation import CancellationToken

from agentao_web.agents import early
from agentao_web.agents import guards
from agentao_web.agents import sandbox
from agentao_web.agents import state
from agentao_web.agents.bridge import AgentaoAgent
from agentao_web.agents.bridge import Bridge
from agentao_web.agents.budget import Meter
from agentao_web.agents.budget import Metered
from agentao_web.agents.budget import Purse
from agentao_web.agents.build import build_agent
from agentao_web.agents.build import close_agent
from agentao_web.agents.early import model
from agentao_web.agents.host import Factory
from agentao_web.agents.host import SessionInfo
from agentao_web.agents.mcp import Server
from agentao_web.agents.mcp import read_servers
from agentao_web.agents.memory import open_memory
from agentao_web.agents.messages import Messages
from agentao_web.agents.model.pool import ModelPool
from agentao_web.agents.model.pool import check_agentao
from agentao_web.agents.quota import Quota
from agentao_web.agents.shell import Executor
from agentao_web.agents.shell import Unconfined
from agentao_web.agents.skills import Skill
from agentao_web.agents.skills import read_skills
from agentao_web.agents.tested import warn_untested
from agentao_web.agents.tools import Context
from agentao_web.agents.tools import HostTool
from agentao_web.agents.tools import HostTools
from agentao_web.agents.tools import ToolsFor
from agentao_web.agents.workspaces import Workspaces
from agentao_web.core.errors import NoModel
from agentao_web.core.history import History
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.core.rules import Rules
from agentao_web.demo import DemoModel

if t.TYPE_CHECKING:
    # The mcp package takes 70 MB: loaded only where there are servers.
    from agentao_web.agents.servers import Servers

#: Seconds the servers of all sessions together get to end when the worker goes.
_SERVERS_SECONDS: t.Final = 5.0


_Thing = t.TypeVar("_Thing")


class Options(early.Options, t.Protocol):
    """The settings this room reads (agentao_web.config.Settings)."""

    @property
    def workspace(self) -> str: ...
    @property
    def thinking(self) -> bool: ...
    @property
    def demo(self) -> bool: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def max_tool_calls(self) -> int: ...
    @property
    def max_turn_tokens(self) -> int | None: ...
    @property
    def shell(self) -> str: ...
    @property
    def shell_timeout(self) -> float: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def workspace_files(self) -> int: ...
    @property
    def llm_first_token_timeout(self) -> float: ...
    @property
    def llm_read_timeout(self) -> float: ...
    @property
    def llm_call_timeout(self) -> float: ...
    @property
    def llm_attempts(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def turn_text(self) -> int: ...
    @property
    def memory(self) -> bool: ...


class AgentaoAgents:
    """Builds the agents of one application (agentao_web.runner.Agents).

    *rules* says what the agents of a principal may do, *tools* which functions of the host's they
    have; both are asked whenever one is built. *context* is entered around the host's functions.
    *shells* are those the rules may say, as far as that is known; *alone* tells whether the server
    has one tenant only. The tokens of the day come out of *purse*.
    Raises RuntimeError at once if the operator's MCP servers or skills cannot be used, or one of
    *shells* does not work here. Without a model only turns are refused (``check``).
    """

    def __init__(
        self,
        options: Options,
        *,
        rules: cabc.Callable[[Principal], Rules],
        factory: Factory | None = None,
        tools: ToolsFor | None = None,
        context: Context = contextlib.nullcontext,
        purse: Purse | None = None,
        shells: cabc.Collection[str] = (),
        alone: cabc.Callable[[], bool] = lambda: True,
        environ: cabc.Mapping[str, str] = os.environ,
        log: logging.Logger,
    ) -> None:
        guards.check_agentao()
        check_agentao()
        warn_untested(log)
        self.workspaces = Workspaces(options.root, options.workspace)
        self.tools = HostTools(tools, context=context, timeout=options.tool_timeout, log=log)
        self._options = options
        self._rules = rules
        self._factory = factory
        self._purse = purse
        self._alone = alone
        self._environ = environ
        self._log = log
        self._lock = threading.Lock()
        self._models: ModelPool | None = None
        self._llm: dict[str, t.Any] | None = {}
        self._servers: dict[str, Server] = {}
        self._skills: dict[str, Skill] = {}
        self._leaving: set[Servers] = set()
        if options.mcp is not None:
            self._servers = _servers(options.mcp, environ, options.tool_timeout, log)
        if options.skills is not None:
            self._skills = read_skills(options.skills)
        if factory is None and "sandbox" in shells:
            sandbox.check(options.root)
        if factory is None and not options.demo:
            self._llm = self._named_model()

    def check(self) -> None:
        """NoModel if there is nothing to ask: a turn must not begin then."""
        if self._llm is None:
            raise NoModel

    def _named_model(self) -> dict[str, t.Any] | None:
        try:
            return model(self._environ)
        except RuntimeError as exc:
            self._log.warning("%s Until then every turn is refused (no_model).", exc)
            return None

    def build(self, key: SessionKey, history: History) -> AgentaoAgent:
        guards.install()
        principal = Principal(key.tenant, key.user)
        # One that was stored by an earlier version may have texts no model takes.
        history = dataclasses.replace(history, messages=Messages(history.messages))
        workspace = self.workspaces.make(key)
        rules = self._rules(principal)
        meter = self._meter(principal, rules)
        bridge = Bridge(
            str(workspace),
            thinking=self._options.thinking,
            approved=history.approved,
            meter=meter,
        )
        tools = self.tools.made_for(principal)
        steps = self._options.max_steps
        if self._factory is not None:
            info = SessionInfo(key.id, workspace, history.messages, tuple(tools))
            agent = self._factory(principal, info, bridge)
            return AgentaoAgent(
                agent, bridge, rules=rules, max_steps=steps, close=_close_theirs, log=self._log
            )
        agent = self._agentao(key, workspace, bridge, history, rules, tools, meter)
        servers = self._servers_of(rules)

        def prepare(token: CancellationToken) -> None:
            if servers is not None:
                servers.equip(agent, rules.policy, token, self._log)

        def close(agent: t.Any) -> None:
            if servers is not None:
                self._end(servers)
            close_agent(agent)

        return AgentaoAgent(
            agent,
            bridge,
            rules=rules,
            max_steps=steps,
            close=close,
            log=self._log,
            prepare=prepare,
            state=lambda: state.keep(agent),
        )

    def suits(self, key: SessionKey, agent: AgentaoAgent) -> bool:
        return agent.rules == self._rules(Principal(key.tenant, key.user))

    def warm(self) -> None:
        """Load what the first agent would load: the SDK, which takes most of a second."""
        import agentao.host.projection  # noqa: F401  The first turn would import it.

        guards.install()
        if self._llm:
            self._pool().client(logger=self._log, **self._llm)

    def forget(self, key: SessionKey) -> None:
        self.workspaces.forget(key)

    def close(self) -> None:
        with self._lock:
            models, self._models = self._models, None
            leaving, self._leaving = self._leaving, set()
        until = time.monotonic() + _SERVERS_SECONDS
        for servers in leaving:
            servers.wait_gone(until)
        if models is not None:
            models.close()

    def _agentao(
        self,
        key: SessionKey,
        workspace: Path,
        bridge: Bridge,
        history: History,
        rules: Rules,
        tools: list[HostTool],
        meter: Meter,
    ) -> t.Any:
        quiet = _quiet_logger()
        if self._options.demo:
            client: t.Any = _MeteredDemo(logger=quiet)
            client.meter = meter
        else:
            self.check()
            client = self._pool().client(logger=self._log, meter=meter, **(self._llm or {}))
        file = self.workspaces.memory(key) if self._options.memory else None
        quota = Quota(
            workspace,
            max_bytes=self._options.workspace_bytes,
            max_files=self._options.workspace_files,
        )
        agent = build_agent(
            workspace=workspace,
            transport=bridge,
            llm_client=client,
            logger=quiet,
            history=history.messages,
            session_id=key.id,
            policy=rules.policy,
            extra_tools=tools,
            skills=self._named(rules.skills, self._skills, "skill"),
            memory=open_memory(file, self._log) if file is not None else None,
            memory_asks=self._options.workspace == "tenant",
            quota=quota,
            shell=self._shell(workspace, quota, rules),
            max_context_tokens=self._options.context_tokens,
        )
        meter.scales = agent.context_manager
        state.restore(agent, history.state)
        return agent

    def _meter(self, principal: Principal, rules: Rules) -> Meter:
        return Meter(
            tenant=principal.tenant,
            purse=self._purse,
            tokens_per_day=rules.tokens_per_day,
            max_turn_tokens=self._options.max_turn_tokens,
            max_tool_calls=self._options.max_tool_calls,
            max_text=self._options.turn_text,
            log=self._log,
        )

    def _servers_of(self, rules: Rules) -> Servers | None:
        named = self._named(rules.mcp, self._servers, "MCP server")
        if not named:
            return None
        from agentao_web.agents.servers import Servers

        return Servers(named.values())

    def _named(
        self, names: tuple[str, ...], all_: cabc.Mapping[str, _Thing], what: str
    ) -> dict[str, _Thing]:
        """Those of *all_* that rules name; what is not there is only logged: less is safe."""
        if "*" in names:
            return dict(all_)
        for name in names:
            if name not in all_:
                self._log.warning("rules name the %s %r, and there is none", what, name)
        return {name: thing for name, thing in all_.items() if name in names}

    def _end(self, servers: Servers) -> None:
        """Begin to end *servers*; who goes last waits for them (``close``)."""
        servers.close()
        with self._lock:
            self._leaving = {other for other in self._leaving if not other.gone} | {servers}

    def _shell(self, workspace: Path, quota: Quota, rules: Rules) -> Executor | None:
        seconds = self._options.shell_timeout
        if rules.shell == "sandbox":
            # The host's own rules may say so where the settings do not.
            sandbox.check(self._options.root)
            return Executor(workspace, seconds=seconds, quota=quota)
        if rules.shell == "unconfined":
            if self._options.shell != "unconfined":
                raise RuntimeError(
                    'rules may say shell="unconfined" only if AGENTAO_SHELL=unconfined, which '
                    'is for a server with one tenant: use "sandbox"'
                )
            return Unconfined(
                workspace,
                seconds=seconds,
                quota=quota,
                alone=self._alone,
                environ=self._environ,
            )
        return None

    def _pool(self) -> ModelPool:
        """The shared HTTP pool, opened in the worker and not before the fork."""
        with self._lock:
            if self._models is None:
                guards.quicken()
                options = self._options
                self._models = ModelPool(
                    first_token_timeout=options.llm_first_token_timeout,
                    read_timeout=options.llm_read_timeout,
                    call_timeout=options.llm_call_timeout,
                    attempts=options.llm_attempts,
                    window=options.context_tokens,
                )
            return self._models


class _MeteredDemo(Metered, DemoModel):  # type: ignore[misc]
    """The demo model costs nothing, and is counted all the same: limits can be tried with it."""


def _servers(
    file: Path, environ: cabc.Mapping[str, str], call_timeout: float, log: logging.Logger
) -> dict[str, Server]:
    from agentao_web.agents import servers

    servers.check_agentao()
    if not servers.dies_with_us():
        log.warning(
            "MCP servers that ignore the end of their input would outlive a killed worker: "
            "install setpriv (util-linux)"
        )
    return read_servers(file, environ, call_timeout=call_timeout)


def _quiet_logger() -> logging.Logger:
    """Agentao logs prompts and tool output: its logger reaches nobody, and stays out of the tree.

    With one of its own for each agent nothing of logging's global state is touched either.
    """
    logger = logging.Logger("agentao_web.quiet", level=logging.CRITICAL + 1)
    logger.propagate = False
    return logger


def _close_theirs(agent: t.Any) -> None:
    close = getattr(agent, "close", None)
    if close is not None:
        close()
