"""What can be said of the settings of agents at once, without loading what runs them."""

from __future__ import annotations

import collections.abc as cabc
import os
import typing as t
from pathlib import Path


class Options(t.Protocol):
    """The settings this file reads (agentao_web.config.Settings)."""

    @property
    def root(self) -> Path: ...
    @property
    def tool_timeout(self) -> float: ...
    @property
    def mcp(self) -> Path | None: ...
    @property
    def skills(self) -> Path | None: ...


def check(
    options: Options,
    shells: cabc.Collection[str],
    *,
    own_agents: bool,
    environ: cabc.Mapping[str, str] = os.environ,
) -> None:
    """RuntimeError, with the cure, for MCP servers, skills or a shell that cannot be used.

    Each costs its imports only where the settings ask for it.
    """
    if not own_agents and {"sandbox", "unconfined"} & set(shells):
        from agentao_web.agents import sandbox

        sandbox.needs_linux()
        if "sandbox" in shells:
            sandbox.check(options.root)
    if options.mcp is not None:
        from agentao_web.agents.mcp import read_servers

        read_servers(options.mcp, environ, call_timeout=options.tool_timeout)
    if options.skills is not None:
        from agentao_web.agents.skills import read_skills

        read_skills(options.skills)


def model(environ: cabc.Mapping[str, str]) -> dict[str, t.Any]:
    """The model the environment names, in Agentao's own words for it; RuntimeError for none."""
    from agentao.embedding.factory import discover_llm_kwargs

    try:
        found = discover_llm_kwargs(env=environ)
    except ValueError as exc:
        raise RuntimeError(f"{exc} {_CURE}") from None
    provider = environ.get("LLM_PROVIDER", "OPENAI").strip().upper() or "OPENAI"
    missing = [
        f"{provider}_{name.upper()}"
        for name in ("api_key", "base_url", "model")
        if not found.get(name)
    ]
    if missing:
        raise RuntimeError(f"no model: {', '.join(missing)} not set. {_CURE}")
    return dict(found)


_CURE: t.Final = (
    "Set OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL (or another LLM_PROVIDER's), "
    "or AGENTAO_DEMO=1 for the offline demo model."
)
