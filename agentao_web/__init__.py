"""Agentao behind HTTP, in a Flask app on Gunicorn gthread."""

from agentao_web.agents.factory import SessionInfo
from agentao_web.agents.functions import ToolError
from agentao_web.agents.functions import tool
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
