"""The MCP servers of one agent: how they are started, bounded and ended.

Importing this loads the mcp package, 70 MB: only where there are servers. Different from agentao's
own way on purpose:

1. A server gets a short list of environment variables and what its file says, never the rest.
2. An agent is built without waiting; its first turn waits, no longer than a bound or its stop.
3. On Linux with setpriv, a server dies with the thread that started it, also if it ignores the
   end of its input and the worker is killed.
4. Only tools: no resources, prompts, skills, nor logins (OAuth).
"""

from __future__ import annotations

import asyncio
import collections.abc as cabc
import contextlib
import contextvars
import functools
import logging
import shutil
import subprocess
import threading
import time
import typing as t
from concurrent.futures import Future

from agentao.cancellation import CancellationToken
from agentao.mcp.client import McpClient
from agentao.mcp.client import McpClientManager
from agentao.mcp.client import ServerStatus
from agentao.mcp.resources import render_call_result
from agentao.mcp.tool import McpTool
from mcp import ClientSession
from mcp import StdioServerParameters
from mcp.client.stdio import stdio_client

from agentao_web.agents import guards
from agentao_web.agents.mcp import Server
from agentao_web.agents.mcp import longest_first
from agentao_web.agents.mcp import without

#: Characters of one result.
MAX_RESULT: t.Final = 200_000
#: Tools of one server, and characters of what it says of one.
MAX_TOOLS: t.Final = 128
MAX_DESCRIPTION: t.Final = 4096
_NOTICE: t.Final = "\n\nNot available in this session, as they could not be started: {}."
#: Seconds the servers of an agent get to end, a little more than they are given to do so.
CLOSING_SECONDS: t.Final = 10.0


@functools.cache
def _reins() -> tuple[str, ...]:
    """What to put before a command so that it dies with us; nothing where that cannot be had."""
    setpriv = shutil.which("setpriv")
    words = (setpriv or "", "--pdeathsig", "KILL")
    if setpriv and not subprocess.run([*words, "true"], capture_output=True).returncode:
        return words
    return ()


def dies_with_us() -> bool:
    """Whether a server that ignores the end of its input is ended by a killed worker too."""
    return bool(_reins())


#: What agentao's classes are used for here, and nobody promised.
_PRIVATE: t.Final = (
    (McpClient, ("_connect_stdio",)),
    (McpClientManager, ("_connect_all_async", "_shutdown", "_start_loop", "_tracked")),
)


def check_agentao() -> None:
    """Whether every private name we use is there: RuntimeError with the cure if not."""
    for owner, names in _PRIVATE:
        for name in names:
            if not callable(getattr(owner, name, None)):
                raise RuntimeError(f"{owner.__name__}.{name} of agentao is gone: {guards.CURE}")


class _Hidden(logging.Filter):
    """Leaves the keys of all servers out of what libraries log."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: tuple[str, ...] = ()

    def know(self, servers: cabc.Iterable[Server]) -> None:
        """Hide the keys of these too. Harmless twice."""
        keys = {key for server in servers for key in server.keys}
        if not keys <= set(self._keys):
            self._keys = longest_first(keys.union(self._keys))
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(TypeError, ValueError):  # A line that cannot be formatted.
            said = record.getMessage()
            shown = without(said, self._keys)
            if shown != said:
                record.msg, record.args = shown, ()
        return True


#: Loggers that quote the URL of a server, with the key that may be in it.
_TALKATIVE: t.Final = (
    *("agentao.mcp", "httpx", "httpx2"),
    *("mcp.client.sse", "mcp.client.streamable_http"),
)
_HIDDEN: t.Final = _Hidden()


class _Client(McpClient):
    """agentao's client of one server, which starts it with the environment of its file alone."""

    async def _connect_stdio(self) -> None:
        stack = t.cast(contextlib.AsyncExitStack, self._exit_stack)
        command = [*_reins(), self.config["command"], *self.config.get("args", [])]
        server = StdioServerParameters(
            command=command[0],
            args=command[1:],
            env=self.config["env"],
            cwd=self.config["cwd"],
        )
        streams = await stack.enter_async_context(stdio_client(server))
        self._session = await stack.enter_async_context(ClientSession(*streams))


class Servers(McpClientManager):
    """The servers of one agent, on a thread of their own; nothing starts before ``begin``."""

    def __init__(self, servers: cabc.Iterable[Server]) -> None:
        self.servers = {server.name: server for server in servers}
        super().__init__({name: server.config for name, server in self.servers.items()})
        _HIDDEN.know(self.servers.values())
        self._connecting: Future[None] | None = None
        self._until = 0.0
        self._equipped = False

    def begin(self) -> None:
        """Start them all, each beside the others, and do not wait. Harmless twice."""
        with self._state_lock:
            if self._connecting or self._closed or not self.servers:
                return
            longest = max(config["timeout"]["startup"] for config in self._configs.values())
            self._until = time.monotonic() + longest
            # An empty context: a turn's own must not live as long as its servers.
            self._connecting = contextvars.Context().run(
                asyncio.run_coroutine_threadsafe,
                self._tracked(self._connect_all_async()),  # type: ignore[no-untyped-call]
                self._start_loop(),
            )

    async def _connect_all_async(self) -> None:
        # All of them are known before the first is waited for.
        for name, config in self._configs.items():
            self._clients[name] = _Client(name, config, oauth=self._oauth)
        connecting = [client.connect() for client in list(self._clients.values())]
        await asyncio.gather(*connecting, return_exceptions=True)

    def settle(self, token: CancellationToken) -> bool:
        """Wait until each has started or failed, or has had its time.

        False if *token* was cancelled before; then ask again at the next turn.
        """
        connecting = self._connecting
        if connecting is None:
            return True
        woken = threading.Event()
        connecting.add_done_callback(lambda _: woken.set())
        forget = token.add_done_callback(woken.set)
        try:
            woken.wait(max(0.0, self._until - time.monotonic()))
        finally:
            forget()
        return connecting.done() or time.monotonic() >= self._until

    def equip(
        self, agent: t.Any, policy: str, token: CancellationToken, log: logging.Logger
    ) -> None:
        """Give *agent* the tools of those that start, once; not yet if *token* is cancelled."""
        if self._equipped:
            return
        self.begin()
        if not self.settle(token):
            return
        self._equipped = True
        missing = self.missing()
        for name in missing:
            client = self.get_client(name)
            reason = (client.error_message if client else None) or "no answer in time"
            # In the words of whoever answered, and of a library that quotes the whole URL.
            reason = without(reason, self.servers[name].keys)
            log.error("MCP server %s is not there: %r", name, reason)
        for tool in self.tools(policy, log):
            if tool.name in agent.tools.tools:
                log.error("MCP: the name %s is taken by another tool", tool.name)
            else:
                agent.tools.register(tool, origin="mcp")
        if missing:
            agent.notice = _NOTICE.format(", ".join(missing))

    def missing(self) -> list[str]:
        """Names of the servers that are not there."""
        there = {
            name
            for name, client in list(self._clients.items())
            if client.status is ServerStatus.CONNECTED
        }
        return [name for name in self.servers if name not in there]

    def close(self) -> None:
        """Begin to end them all, and do not wait. Harmless twice."""
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
            self._close_deadline = time.monotonic() + CLOSING_SECONDS
            if self._loop is not None:
                self._closing = asyncio.run_coroutine_threadsafe(self._shutdown(0), self._loop)

    @property
    def gone(self) -> bool:
        """Whether nothing is left of them."""
        return self._closed and (self._thread is None or not self._thread.is_alive())

    def wait_gone(self, until: float) -> None:
        """Wait for the end of what ``close`` began, until this moment of time.monotonic()."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))

    def tools(self, policy: str, log: logging.Logger) -> list[ServerTool]:
        """The tools of those that are there. Of two with one name the first in the file stays."""
        found: dict[str, ServerTool] = {}
        order = list(self.servers)
        counts = dict.fromkeys(order, 0)
        for name, told in sorted(self.get_all_tools(), key=lambda pair: order.index(pair[0])):
            counts[name] += 1
            if counts[name] > MAX_TOOLS:
                continue
            tool = ServerTool(self, self.servers[name], told, policy)
            if found.setdefault(tool.name, tool) is not tool:
                log.error("MCP server %s: the name %s is taken", name, tool.name)
        for name, count in counts.items():
            if count > MAX_TOOLS:
                log.error("MCP server %s: %d tools, the first %d are used", name, count, MAX_TOOLS)
        return list(found.values())


class ServerTool(McpTool):
    """A tool of a server: bounded, asking as *policy* and the operator's file say."""

    def __init__(self, servers: Servers, server: Server, told: t.Any, policy: str) -> None:
        super().__init__(server.name, told, call_fn=servers.call_tool, trusted=server.trust)
        self._servers = servers
        self._server = server
        self._policy = policy

    @property
    def description(self) -> str:
        return super().description[:MAX_DESCRIPTION]

    @property
    def is_read_only(self) -> bool:
        said = self.mcp_annotations
        only_reads = said.get("readOnlyHint") is True and said.get("destructiveHint") is not True
        return only_reads and (self._server.trust or self._server.trust_read_only)

    @property
    def requires_confirmation(self) -> bool:
        if self._policy == "trusted" or self.is_read_only:
            return False
        return super().requires_confirmation

    def execute(self, **given: t.Any) -> str:
        result = self._servers.call_tool_result(self._server_name, self._mcp_tool.name, given)
        text = result if isinstance(result, str) else render_call_result(result)
        text = without(text, self._server.secrets)
        if isinstance(result, str) and result.startswith(("MCP connection error", "MCP auth")):
            # Why is for the operator, and in the log.
            return f"Error: the server {self._server_name} cannot be reached. Nothing was done."
        if len(text) > MAX_RESULT:
            text = f"{text[:MAX_RESULT]}\n[cut off: {len(text):,} characters]"
        return text
