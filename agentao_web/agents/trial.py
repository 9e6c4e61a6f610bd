"""Tries out what agents need, once and without an agent, for the doctor."""

from __future__ import annotations

import collections.abc as cabc
import logging
import shutil
import time
import typing as t
from pathlib import Path

from agentao_web.agents import sandbox as bubblewrap
from agentao_web.agents.early import model
from agentao_web.agents.mcp import read_servers
from agentao_web.agents.model.plain import NotAnAnswer
from agentao_web.agents.model.pool import ModelPool
from agentao_web.agents.skills import read_skills

__all__ = ["ask_model", "model", "sandbox", "servers", "skills"]

#: Enough for every provider: some refuse less, and some think first.
_TOKENS: t.Final = 16
_MESSAGE: t.Final = {"role": "user", "content": "Say ok."}
#: Status of a failed call -> what to look at.
_CURES: t.Final = {
    401: "the key is not accepted: look at its …_API_KEY",
    403: "the key may not do that: look at its …_API_KEY",
    404: "nothing is there: look at its …_BASE_URL (does it end with /v1?) and …_MODEL",
    429: "the provider refuses for now: a quota, or no credit",
}


def ask_model(
    environ: cabc.Mapping[str, str],
    *,
    first_token_timeout: float,
    read_timeout: float,
    call_timeout: float,
) -> tuple[str, float]:
    """Ask the model the environment names for a few tokens; its name and the seconds it took.

    RuntimeError, with the cure and no text of the provider's, if there is no answer.
    """
    named = model(environ)
    quiet = logging.Logger("agentao_web.doctor", level=logging.CRITICAL + 1)
    pool = ModelPool(
        first_token_timeout=first_token_timeout,
        read_timeout=read_timeout,
        call_timeout=call_timeout,
        attempts=1,
    )
    begin = time.monotonic()
    try:
        client = pool.client(logger=quiet, **named)
        client.chat_stream([_MESSAGE], tools=None, max_tokens=_TOKENS, on_text_chunk=_nothing)
    except Exception as exc:  # Whatever an SDK raises; its text may quote the key.
        raise RuntimeError(f"no answer of {named['model']}: {_why(exc)}") from None
    finally:
        pool.let_go()
        pool.close()
    return str(named["model"]), time.monotonic() - begin


def _nothing(chunk: str) -> None:
    pass


def _why(exc: BaseException | None) -> str:
    while exc is not None:
        if isinstance(exc, NotAnAnswer):
            return f"{exc}: look at its …_BASE_URL (did you forget /v1?)"
        status = getattr(exc, "status_code", None)
        if isinstance(status, int):
            return f"status {status}; {_CURES.get(status, 'look at the provider')}"
        name = type(exc).__name__
        if "Timeout" in name:
            return f"{name}; is its …_BASE_URL right, does a firewall stand between?"
        if "Connect" in name:
            return f"{name}; nobody listens, or the name is unknown: look at its …_BASE_URL"
        last, exc = name, exc.__cause__ or exc.__context__
    return last


def sandbox(root: Path) -> None:
    """RuntimeError, with the cure, if a command cannot be confined here."""
    bubblewrap.check(root)


def skills(folder: Path) -> int:
    """How many skills can be read; RuntimeError, with the cure, for a bad one."""
    return len(read_skills(folder))


def servers(
    file: Path, environ: cabc.Mapping[str, str], call_timeout: float
) -> list[tuple[str, str]]:
    """(server, program) of those whose program is not there; RuntimeError for a bad file."""
    found = read_servers(file, environ, call_timeout=call_timeout)
    programs = [(name, str(server.config.get("command", ""))) for name, server in found.items()]
    return [(name, program) for name, program in programs if program and not shutil.which(program)]
