"""What a deployment may change: one frozen Settings, read once from ``AGENTAO_…`` names."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import difflib
import logging
import os
import tomllib
import typing as t
from pathlib import Path

from agentao_web.core.rules import POLICIES
from agentao_web.core.rules import SHELLS
from agentao_web.core.rules import Rules

PREFIX: t.Final = "AGENTAO_"
#: Read by ``agentao-web chat``, and no setting.
CLIENT_TOKEN: t.Final = "AGENTAO_TOKEN"


def _setting(default: t.Any, help_: str, **limits: t.Any) -> t.Any:
    return dataclasses.field(default=default, metadata={"help": help_, **limits})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting: its name without ``AGENTAO_``, in lower case; seconds, counts, bytes."""

    root: Path = _setting(
        Path("agentao-root"), "Folder of the workspaces and the database; made if need be."
    )
    database_url: str | None = _setting(
        None,
        "Where sessions live: postgresql://…, sqlite:///…, or memory: for tests; unset means "
        "agentao-web.db in ROOT.",
        kinds=("postgresql", "sqlite", "memory"),
    )
    metrics_token: str | None = _setting(
        None,
        "What Prometheus has to show to read /metrics; 16 characters or more; unset means no "
        "/metrics.",
        characters=16,
    )
    metrics_tenants: bool = _setting(
        False, "Whether /metrics names tenants: a line for each, to be read by whoever scrapes."
    )
    log: str = _setting(
        "text",
        "How the ready application writes its log to standard error.",
        choices=("text", "json", "off"),
    )
    log_requests: bool = _setting(False, "Whether every request is a line of the log.")
    log_text: bool = _setting(
        False, "Whether the log says what users and agents said. It is then as private as they."
    )
    workers: int = _setting(1, "Worker processes of the Gunicorn config.", least=1)
    sockets: Path | None = _setting(
        None,
        "Folder of the workers' sockets, if there are several and no --bind; unset means systemd's "
        "$RUNTIME_DIRECTORY, else agentao-sockets.",
    )
    secret_keys: tuple[str, ...] = _setting(
        (),
        "Keys that sign bearer tokens, comma-separated, newest first; 16 characters or more.",
        each=16,
    )
    turn_timeout: float = _setting(600.0, "Running time of a turn, in seconds.", above=0)
    max_waiting_time: float = _setting(
        1800.0, "Time a turn may wait for people in all, in seconds.", above=0
    )
    stop_grace: float = _setting(
        5.0, "Seconds a stopped turn gets to end before it is given up.", above=0
    )
    llm_first_token_timeout: float = _setting(
        300.0, "Seconds a streaming call to the model may take to its first token.", above=0
    )
    llm_read_timeout: float = _setting(
        60.0,
        "Seconds without data, after the first token, that end a streaming call to the model.",
        above=0,
    )
    llm_call_timeout: float = _setting(
        300.0, "Time for a call to the model that does not stream, in seconds.", above=0
    )
    llm_attempts: int = _setting(2, "Attempts at a call to the model.", least=1)
    context_tokens: int = _setting(
        200_000,
        "The model's context window, in tokens; a smaller one that the model itself states wins.",
        least=1024,
    )
    max_steps: int = _setting(100, "Calls to the model in one turn.", least=1)
    max_tool_calls: int = _setting(200, "Tool calls in one turn.", least=1)
    max_turn_tokens: int | None = _setting(
        None, "Tokens of one turn, prompt and completion; unset means no limit.", least=1
    )
    tokens_per_day: int | None = _setting(
        None, "Tokens of one tenant per day (UTC); unset means no limit.", least=1
    )
    turn_text: int = _setting(
        4 * 2**20,
        "Bytes of text, reasoning and tool arguments that the model may send in one turn.",
        least=1024,
    )
    question_timeout: float = _setting(
        300.0, "Seconds a question stays open; no answer means no.", above=0
    )
    tool_timeout: float = _setting(60.0, "Seconds one call of a host's own tool may take.", above=0)
    shell_timeout: float = _setting(120.0, "Seconds one shell command may take.", above=0)
    disconnect_grace: float = _setting(
        10.0, "Seconds a turn goes on after its last reader left.", least=0
    )
    drain_grace: float = _setting(20.0, "Seconds running turns get at shutdown.", least=0)
    worker_lease: float = _setting(
        10.0, "Seconds after a worker's last sign of life until its turns are lost.", least=1.5
    )
    thread_reserve: int = _setting(
        8,
        "Threads of a worker kept free of streams and waiting requests, at most a quarter.",
        least=1,
    )
    heartbeat: float = _setting(
        15.0, "Silence after which a stream gets a comment, in seconds.", above=0
    )
    stream_lease: float = _setting(
        300.0, "Seconds after which a GET stream is ended on purpose.", above=0
    )
    send_timeout: float = _setting(
        30.0, "Seconds a stalled reader may block a stream before it is dropped.", above=0
    )
    session_ttl: float = _setting(1800.0, "Seconds an idle session stays in memory.", above=0)
    conversation_ttl: float | None = _setting(
        None, "Seconds after which an unused session is deleted; unset means never.", above=0
    )
    max_sessions: int = _setting(500, "Sessions in memory per worker.", least=1)
    max_sessions_per_tenant: int | None = _setting(
        None, "Stored sessions per tenant; unset means no limit.", least=1
    )
    max_turns: int = _setting(64, "Turns running at once per worker.", least=1)
    max_turns_per_tenant: int | None = _setting(
        None, "Turns of one tenant at once per worker; unset means no limit.", least=1
    )
    max_turns_per_user: int | None = _setting(
        None, "Turns of one user of a tenant at once per worker; unset means no limit.", least=1
    )
    max_streams_per_tenant: int | None = _setting(
        None,
        "Streams and waiting requests of one tenant at once per worker; unset means three quarters "
        "of the worker's places.",
        least=1,
    )
    max_streams_per_user: int | None = _setting(
        None,
        "Streams and waiting requests of one user of a tenant at once per worker; unset means 32, "
        "at most half of the worker's places.",
        least=1,
    )
    max_queue: int = _setting(4, "Turns waiting per session.", least=0)
    max_line: int = _setting(
        64,
        "Turns waiting for a place on a worker, for clients that ask to (`on_busy`: queue).",
        least=0,
    )
    max_message: int = _setting(131_072, "Bytes of a message, in UTF-8.", least=1)
    max_body: int = _setting(
        20 * 2**20,
        "Bytes of the body of a message, images included; other bodies have small limits.",
        least=1,
    )
    max_images: int = _setting(8, "Images in one message.", least=0)
    max_image: int = _setting(5 * 2**20, "Bytes of one image, decoded.", least=1)
    workspace_bytes: int = _setting(
        256 * 2**20, "Bytes of all files of a workspace together.", least=1
    )
    workspace_files: int = _setting(10_000, "Files and folders of a workspace.", least=1)
    log_bytes: int = _setting(
        4 * 2**20, "Bytes of a session's log that are kept; older events become a gap.", least=4096
    )
    policy: str = _setting("ask", "What agents may change.", choices=POLICIES)
    shell: str = _setting("off", "Whether agents have a shell, and where it runs.", choices=SHELLS)
    mcp: Path | None = _setting(None, "The operator's file of MCP servers, JSON; unset means none.")
    skills: Path | None = _setting(
        None, "The operator's folder of skills, a folder with a SKILL.md each; unset means none."
    )
    tenants: Path | None = _setting(
        None, "The operator's file of rules per tenant, TOML; unset means the same for all."
    )
    memory: bool = _setting(
        False, "Whether agents keep memories, in their workspace's own; shared as WORKSPACE says."
    )
    workspace: str = _setting("user", "Who shares a folder.", choices=("user", "tenant", "session"))
    thinking: bool = _setting(False, "Whether the model's reasoning is sent to clients.")
    page: bool = _setting(True, "Whether the chat page is served at `/`.")
    demo: bool = _setting(
        False, "Accept the token `dev` and answer through the offline demo model."
    )
    demo_hosts: tuple[str, ...] = _setting(
        (),
        "Names with a dot that the demo answers to, comma-separated, besides IP addresses.",
    )

    @classmethod
    def from_mapping(cls, values: cabc.Mapping[str, t.Any]) -> Settings:
        """Settings from an application's config; RuntimeError for an unknown or bad value."""
        ours = {k: v for k, v in values.items() if k.startswith(PREFIX)}
        names = _names()
        for name in ours:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                cure = f" Did you mean {close[0]}?" if close else ""
                raise RuntimeError(f"{name} is not a setting of agentao-web.{cure}")
        read = {names[k].name: _read(k, names[k], v) for k, v in ours.items()}
        settings = cls(**read)
        return dataclasses.replace(settings, root=settings.root.expanduser().absolute())


def rules_per_tenant(settings: Settings) -> cabc.Callable[[str], Rules]:
    """The rules of a tenant: its table in the file TENANTS, then ``[default]``, then the settings.

    Raises RuntimeError, with the cure, for a file that cannot be read or says what is no rule.
    """
    return _tables(settings)[0]


def shells(settings: Settings) -> set[str]:
    """Every kind of shell the settings and the file TENANTS name; RuntimeError as above."""
    return {settings.shell, *(rules.shell for rules in _tables(settings)[1])}


def _tables(settings: Settings) -> tuple[cabc.Callable[[str], Rules], list[Rules]]:
    base = Rules(
        policy=settings.policy,
        shell=settings.shell,
        mcp=("*",) if settings.mcp else (),
        skills=("*",) if settings.skills else (),
        tokens_per_day=settings.tokens_per_day,
    )
    if settings.tenants is None:
        return lambda tenant: base, [base]
    try:
        told = tomllib.loads(settings.tenants.read_text())
    except (OSError, ValueError) as exc:
        raise RuntimeError(f"AGENTAO_TENANTS={settings.tenants}: {exc}") from None
    if unknown := told.keys() - {"default", "tenants"}:
        raise RuntimeError(
            f"AGENTAO_TENANTS: {min(unknown)!r} is neither [default] nor in [tenants.…]"
        )
    tables = told.get("tenants", {})
    if not isinstance(tables, dict):
        raise RuntimeError("AGENTAO_TENANTS: tenants must be tables, [tenants.…]")
    base = _changed(base, "default", told.get("default", {}))
    own = {name: _changed(base, f"tenants.{name}", table) for name, table in tables.items()}
    _check_shells(settings, [base, *own.values()], len(own))
    return lambda tenant: own.get(tenant, base), [base, *own.values()]


def _check_shells(settings: Settings, rules: list[Rules], tenants: int) -> None:
    unconfined = settings.shell == "unconfined"
    if not unconfined and any(one.shell == "unconfined" for one in rules):
        raise RuntimeError(
            "AGENTAO_TENANTS: shell may be unconfined only if AGENTAO_SHELL=unconfined, which is "
            "for a server with one tenant: use sandbox"
        )
    if unconfined and tenants > 1:
        raise RuntimeError(
            "AGENTAO_TENANTS names several tenants, and a shell outside of the sandbox could read "
            "everything of each: use AGENTAO_SHELL=sandbox"
        )


def _changed(rules: Rules, where: str, table: t.Any) -> Rules:
    try:
        values: dict[str, t.Any]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        return dataclasses.replace(rules, **values)
    except (AttributeError, TypeError, ValueError) as exc:
        raise RuntimeError(f"AGENTAO_TENANTS, [{where}]: {exc}") from None


def from_environment(environ: cabc.Mapping[str, str] = os.environ) -> dict[str, str]:
    """The ``AGENTAO_…`` variables that are settings, for ``app.config.from_mapping``.

    Agentao has names of its own there, so an unknown one is only logged, unless it is so close to
    one of ours that it must be a slip: then RuntimeError.
    """
    names = _names()
    found: dict[str, str] = {}
    for name, value in environ.items():
        if name in names:
            found[name] = value
        elif name.startswith(PREFIX) and name != CLIENT_TOKEN:
            close = difflib.get_close_matches(name, names, 1, cutoff=0.9)
            if close:
                raise RuntimeError(f"{name} is not a setting. Did you mean {close[0]}?")
            logging.getLogger("agentao_web").warning("%s is not a setting of ours", name)
    return found


def table() -> list[tuple[str, str, str]]:
    """(name, default, help) of every setting, for the docs."""
    rows = []
    for name, field in _names().items():
        default = field.default
        shown = "" if default in (None, ()) else str(default)
        choices = field.metadata.get("choices")
        help_ = field.metadata["help"]
        rows.append((name, shown, f"{help_} One of {', '.join(choices)}." if choices else help_))
    return rows


def _names() -> dict[str, dataclasses.Field[t.Any]]:
    return {PREFIX + f.name.upper(): f for f in dataclasses.fields(Settings)}


def _read(name: str, field: dataclasses.Field[t.Any], value: t.Any) -> t.Any:
    kind = str(field.type)
    try:
        read = _READERS[kind](value)
    except (TypeError, ValueError) as exc:
        raise RuntimeError(f"{name}={value!r}: {exc}") from None
    _check(name, field.metadata, read)
    return read


def _check(name: str, limits: cabc.Mapping[str, t.Any], value: t.Any) -> None:
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise RuntimeError(f"{name} must be one of {', '.join(limits['choices'])}")
    if "kinds" in limits and value.partition(":")[0].partition("+")[0] not in limits["kinds"]:
        raise RuntimeError(f"{name} must begin with one of {', '.join(limits['kinds'])}")
    if "least" in limits and value < limits["least"]:
        raise RuntimeError(f"{name} must be at least {limits['least']}")
    if "characters" in limits and len(value) < limits["characters"]:
        raise RuntimeError(f"{name} needs {limits['characters']} characters or more")
    if "above" in limits and not value > limits["above"]:
        raise RuntimeError(f"{name} must be more than {limits['above']}")
    if "each" in limits and any(len(key) < limits["each"] for key in value):
        raise RuntimeError(f"{name}: each key needs {limits['each']} characters or more")


def _number(value: t.Any) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if isinstance(value, bool) or number != number or number in (float("inf"), float("-inf")):
        raise ValueError("must be a number of seconds")
    return number


def _count(value: t.Any) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise ValueError("must be a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _maybe_number(value: t.Any) -> float | None:
    return None if value in (None, "") else _number(value)


def _maybe_text(value: t.Any) -> str | None:
    return None if value in (None, "") else str(value)


def _maybe_count(value: t.Any) -> int | None:
    return None if value in (None, "") else _count(value)


_FLAGS = {"1": True, "true": True, "on": True, "yes": True}
_FLAGS |= {"0": False, "false": False, "off": False, "no": False, "": False}


def _flag(value: t.Any) -> bool:
    if isinstance(value, bool):
        return value
    flag = _FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise ValueError("must be 1 or 0")
    return flag


def _keys(value: t.Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else list(value)
    return tuple(part.strip() for part in parts if part.strip())


def _maybe_path(value: t.Any) -> Path | None:
    return None if value in (None, "") else Path(value).expanduser().absolute()


def _path(value: t.Any) -> Path:
    if not str(value):
        raise ValueError("must be a folder")
    return Path(value)


_READERS: dict[str, cabc.Callable[[t.Any], t.Any]] = {
    "Path": _path,
    "Path | None": _maybe_path,
    "tuple[str, ...]": _keys,
    "float": _number,
    "float | None": _maybe_number,
    "int": _count,
    "int | None": _maybe_count,
    "str | None": _maybe_text,
    "str": str,
    "bool": _flag,
}
