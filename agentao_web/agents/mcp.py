"""The operator's file of MCP servers, read and checked at start.

Knows the file and the environment its variables come from; must never read anything of a tenant's.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import json
import re
import typing as t
from pathlib import Path

from agentao.mcp.config import McpTransportConfigError
from agentao.mcp.config import resolve_transport

#: Seconds a server gets to start and say what it can, at most, and if the file says nothing.
STARTUP_SECONDS: t.Final = 10.0
#: What a server has of our environment. (The mcp package adds LOGNAME, SHELL, TERM and USER.)
ENVIRONMENT: t.Final = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")

_KEYS: t.Final[dict[str, type | tuple[type, ...]]] = {
    "type": str,
    "command": str,
    "args": list,
    "env": dict,
    "cwd": str,
    "url": str,
    "headers": dict,
    "timeout": (int, float, dict),
    "trust": bool,
    "trust_read_only": bool,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
#: Shorter values are no keys, and would be found in ordinary words.
_SHORTEST_SECRET: t.Final = 16


@dataclasses.dataclass(frozen=True)
class Server:
    """One server of the operator's file, with its variables filled in."""

    name: str
    config: dict[str, t.Any] = dataclasses.field(repr=False)
    """What agentao's client is given."""
    trust: bool = False
    """What the server says of its tools is believed, and only destructive ones ask."""
    trust_read_only: bool = False
    """A tool that says it only reads is believed."""
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Texts that no result may show, longest first: the keys, and where it is."""
    keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Values of variables, which no log line may show either, longest first."""


def without(text: str, secrets: cabc.Iterable[str]) -> str:
    """*text* with every one of *secrets*, longest first, left out."""
    for secret in secrets:
        text = text.replace(secret, "…")
    return text


def read_servers(
    path: Path, environ: cabc.Mapping[str, str], *, call_timeout: float
) -> dict[str, Server]:
    """The servers of the operator's file, by name; RuntimeError, with the cure, for a bad one."""
    try:
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise RuntimeError(f"AGENTAO_MCP={path}: {exc}") from None
    entries = told.get("mcpServers") if isinstance(told, dict) else None
    if not isinstance(entries, dict) or told.keys() != {"mcpServers"}:
        raise RuntimeError(f'AGENTAO_MCP={path}: must be {{"mcpServers": {{NAME: {{…}}, …}}}}')
    servers: dict[str, Server] = {}
    taken: dict[str, str] = {}
    for name, entry in entries.items():
        first = taken.setdefault(name.replace("-", "_"), name)
        if first != name:
            raise RuntimeError(f"AGENTAO_MCP: {first!r} and {name!r} are one name: rename one")
        try:
            servers[name] = _server(name, entry, environ, call_timeout)
        except ValueError as exc:
            raise RuntimeError(f"AGENTAO_MCP, server {name!r}: {exc}") from None
    return servers


def _server(
    name: str, entry: t.Any, environ: cabc.Mapping[str, str], call_timeout: float
) -> Server:
    _check(name, entry)
    secrets: list[str] = []
    filled = {key: _filled(key, value, environ, secrets) for key, value in entry.items()}
    trust, trust_read_only = filled.pop("trust", False), filled.pop("trust_read_only", False)
    filled["timeout"] = _timeout(entry.get("timeout"), call_timeout)
    if _transport(filled) == "stdio":
        filled["env"] = _environment(environ) | filled.get("env", {})
        filled.setdefault("cwd", "/")
    # No stored logins, no generic resources, no skills of a server.
    config = {**filled, "oauth": False, "resources": False, "skills": False, "trust": trust}
    # Where it is, too; a bare name like "python" is no secret.
    places = [text for key in ("url", "command") if "/" in (text := filled.get(key, ""))]
    keys = {text for text in secrets if len(text) >= _SHORTEST_SECRET}
    hidden, known = longest_first({*places, *keys}), longest_first(keys)
    return Server(name, config, trust, trust_read_only, hidden, known)


def longest_first(secrets: cabc.Iterable[str]) -> tuple[str, ...]:
    """So that none is found in another one first."""
    return tuple(sorted(secrets, key=len, reverse=True))


def _check(name: str, entry: t.Any) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 32 letters, digits, - and _")
    if not isinstance(entry, dict):
        raise ValueError("must be an object")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"{key!r} is none of {', '.join(_KEYS)}")
        kind = _KEYS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{key} has the wrong type")


def _transport(config: dict[str, t.Any]) -> str:
    try:
        transport = str(resolve_transport(config))
    except McpTransportConfigError as exc:
        raise ValueError(str(exc)) from None
    if transport == "unknown":
        raise ValueError("needs a 'command' or a 'url'")
    return transport


def _filled(where: str, value: t.Any, environ: cabc.Mapping[str, str], secrets: list[str]) -> t.Any:
    """*value* with every ``${NAME}`` replaced; what was put in is added to *secrets*."""

    def put_in(found: re.Match[str]) -> str:
        text = environ.get(found[1])
        if not text:
            raise ValueError(f"{where} names ${{{found[1]}}}, which is not set: set it")
        secrets.append(text)
        return text

    if isinstance(value, str):
        return _VARIABLE.sub(put_in, value)
    if where == "args":
        if not all(isinstance(item, str) for item in value):
            raise ValueError("args is a list of texts")
        return [_VARIABLE.sub(put_in, item) for item in value]
    if where in ("env", "headers"):
        if not all(isinstance(item, str) for item in value.values()):
            raise ValueError(f"{where} is an object of texts")
        return {name: _VARIABLE.sub(put_in, item) for name, item in value.items()}
    return value


def _timeout(value: t.Any, call_timeout: float) -> dict[str, float]:
    """agentao's timeouts: never without an end, and no longer start than ours."""
    told = value if isinstance(value, dict) else {} if value is None else {"startup": value}
    if unknown := told.keys() - {"startup", "request"}:
        raise ValueError(f"timeout has no {min(unknown)!r}: startup and request")
    for seconds in told.values():
        known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not known or not 0 < seconds < float("inf"):
            raise ValueError("a timeout is a number of seconds above 0")
    startup = min(told.get("startup", STARTUP_SECONDS), STARTUP_SECONDS)
    return {"startup": startup, "request": told.get("request", call_timeout)}


def _environment(environ: cabc.Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in ENVIRONMENT if name in environ}
