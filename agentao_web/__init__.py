"""Agentao behind HTTP, in a Flask app on Gunicorn gthread."""

from __future__ import annotations

import importlib
import typing as t

if t.TYPE_CHECKING:
    from agentao_web.agents.functions import ToolError
    from agentao_web.agents.functions import tool
    from agentao_web.agents.host import SessionInfo
    from agentao_web.core.names import Principal
    from agentao_web.core.rules import Rules
    from agentao_web.extension import AgentaoWeb
    from agentao_web.extension import create_app
    from agentao_web.extension import shutdown

__all__ = [
    "AgentaoWeb",
    "Principal",
    "Rules",
    "SessionInfo",
    "ToolError",
    "create_app",
    "shutdown",
    "tool",
]

#: Where each name is. They are imported when they are asked for: a program that only wants
#: ``agentao_web.client`` loads no server.
_HOMES: t.Final = {
    "AgentaoWeb": "extension",
    "Principal": "core.names",
    "Rules": "core.rules",
    "SessionInfo": "agents.host",
    "ToolError": "agents.functions",
    "create_app": "extension",
    "shutdown": "extension",
    "tool": "agents.functions",
}


def __getattr__(name: str) -> t.Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
