"""An application for the live tests whose agents tell a file what becomes of them."""

from __future__ import annotations

import os
import threading
import typing as t
from pathlib import Path

from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import SessionInfo
from agentao_web.testing import Scripted
from agentao_web.testing import ScriptedAgent
from agentao_web.testing import say

DIARY = Path(os.environ["TEST_DIARY"])


def note(line: str) -> None:
    with DIARY.open("a") as diary:
        diary.write(line + "\n")


class NotedAgent(ScriptedAgent):
    """ "hang" runs until it is stopped, "stuck" ignores that; anything else is answered."""

    def chat(self, message: str, *args: t.Any, **more: t.Any) -> str:
        token = more["cancellation_token"]
        if message == "hang":
            stopped = threading.Event()
            token.add_done_callback(stopped.set)
            assert stopped.wait(60)
        elif message == "stuck":
            threading.Event().wait(60)
        return super().chat(message, *args, **more)

    def close(self) -> None:
        note("closed")


class Noted(Scripted):
    def __call__(self, principal: Principal, session: SessionInfo, transport: t.Any) -> t.Any:
        note("built")
        return NotedAgent(self, session, transport)


app = Flask("live")
app.config.update(
    AGENTAO_ROOT=os.environ["AGENTAO_ROOT"],
    AGENTAO_SECRET_KEYS=os.environ["AGENTAO_SECRET_KEYS"],
    AGENTAO_DRAIN_GRACE=float(os.environ.get("TEST_DRAIN_GRACE", "3")),
    AGENTAO_STOP_GRACE=1,
    AGENTAO_MAX_TURNS=int(os.environ.get("TEST_MAX_TURNS", "64")),
)
AgentaoWeb(agents=Noted((say("hello"),), {})).init_app(app)
note(f"loaded with {threading.active_count()} thread")
