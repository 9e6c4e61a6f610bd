"""An application for the live tests whose agents have tools of the host's."""

from __future__ import annotations

import os
import threading
import typing as t
from pathlib import Path

from flask import Flask
from flask import current_app
from flask import g
from flask import has_request_context

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import tool

DIARY = Path(os.environ["TEST_DIARY"])


def note(line: str) -> None:
    with DIARY.open("a") as diary:
        diary.write(line + "\n")


app = Flask("live")
app.config.update(
    AGENTAO_ROOT=os.environ["AGENTAO_ROOT"],
    AGENTAO_SECRET_KEYS=os.environ["AGENTAO_SECRET_KEYS"],
    AGENTAO_DRAIN_GRACE=1,
    AGENTAO_STOP_GRACE=1,
)


@app.teardown_appcontext
def end(error: BaseException | None) -> None:
    if "visits" in g:
        note(f"end {error}")


@tool(read_only=True)
def visit(who: Principal, name: str) -> dict[str, t.Any]:
    """Visit someone."""
    g.visits = g.get("visits", 0) + 1
    note(f"visit {name}")
    return {
        "app": current_app.name,
        "visits": g.visits,
        "request": has_request_context(),
        "for": who.user,
    }


@tool(read_only=True)
def hang() -> None:
    """Never come back."""
    note("hang")
    threading.Event().wait()


AgentaoWeb(tools=lambda principal: [visit, hang]).init_app(app)
