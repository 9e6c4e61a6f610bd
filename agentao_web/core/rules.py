"""What an agent may do and spend, for one principal. Every field has the safe side as default."""

from __future__ import annotations

import dataclasses
import typing as t

POLICIES: t.Final = ("read-only", "ask", "trusted")
SHELLS: t.Final = ("off", "sandbox", "unconfined")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of one principal; ValueError for a value that is not one.

    A host changes them with ``dataclasses.replace`` in its ``rules=`` function, an operator per
    tenant in the file of the setting TENANTS.
    """

    policy: str = "ask"
    """``read-only``, ``ask`` before anything is changed, or ``trusted``."""
    shell: str = "off"
    """``off``, ``sandbox`` or ``unconfined``."""
    mcp: tuple[str, ...] = ()
    """Names of servers in the operator's MCP file."""
    skills: tuple[str, ...] = ()
    """Names of skills in the operator's folder."""
    tokens_per_day: int | None = None
    """Tokens of the whole tenant per day (UTC), prompt and completion; None for no limit."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {self.policy!r}")
        if self.shell not in SHELLS:
            raise ValueError(f"shell is one of {', '.join(SHELLS)}, not {self.shell!r}")
        for name in ("mcp", "skills"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
                raise ValueError(f"{name} is a list of names, not {names!r}")
        tokens = self.tokens_per_day
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
            raise ValueError(f"tokens_per_day is a whole number, not {tokens!r}")
