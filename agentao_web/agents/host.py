"""What a host that builds its agents itself gives and is told. Loads nothing of agentao."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import typing as t
from pathlib import Path

from agentao_web.core.names import Principal

if t.TYPE_CHECKING:
    from agentao_web.agents.tools import HostTool


@dataclasses.dataclass(frozen=True)
class SessionInfo:
    """What a host's own ``agents(principal, session, transport)`` is told of the session."""

    id: str
    workspace: Path
    """A folder that exists."""
    history: list[dict[str, t.Any]]
    """What was said before; the agent's ``messages`` have to begin with these."""
    tools: tuple[HostTool, ...] = ()
    """What ``tools=`` gives this principal, for the ``extra_tools=`` of an Agentao."""


Factory = cabc.Callable[[Principal, SessionInfo, t.Any], t.Any]
