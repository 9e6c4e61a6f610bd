"""An application for the tests behind nginx: every answer says which worker it is from."""

from __future__ import annotations

import os
import select
import threading
import typing as t

from flask import Flask
from flask import Response
from flask import jsonify
from flask import request

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import SessionInfo
from agentao_web.testing import Scripted
from agentao_web.testing import ScriptedAgent
from agentao_web.testing import say


class PacedAgent(ScriptedAgent):
    """Says words: one for each byte of a pipe ("gated PIPE COUNT"), or at a pace ("paced COUNT
    SECONDS"); or is silent until it is stopped ("hang"). Anything else is answered "hello".
    """

    def chat(self, message: str, *args: t.Any, **more: t.Any) -> str:
        verb, *rest = message.split()
        token = more["cancellation_token"]
        stopped = threading.Event()
        token.add_done_callback(stopped.set)
        pace = {"gated": self._gated, "paced": self._paced}.get(verb)
        if verb == "hang":
            assert stopped.wait(60)
        if pace is not None:
            self.words = pace(stopped, *rest)
        return super().chat(message, *args, **more)

    words: str | None = None

    def _gated(self, stopped: threading.Event, pipe: str, count: str) -> str:
        fd = os.open(pipe, os.O_RDWR)
        try:
            for number in range(int(count)):
                assert select.select([fd], [], [], 60)[0] and os.read(fd, 1)
                self.emit("llm_text", chunk=f"{number} ")
        finally:
            os.close(fd)
        return "".join(f"{number} " for number in range(int(count)))

    def _paced(self, stopped: threading.Event, count: str, seconds: str) -> str:
        said = ""
        for number in range(int(count)):
            if stopped.wait(float(seconds)):
                break
            self.emit("llm_text", chunk=f"{number} ")
            said += f"{number} "
        return said


class Paced(Scripted):
    def __call__(self, principal: Principal, session: SessionInfo, transport: t.Any) -> t.Any:
        return PacedAgent(self, session, transport)

    def script_for(self, message: str) -> t.Any:
        if message.split()[0] not in ("gated", "paced"):
            return super().script_for(message)

        def keep(agent: ScriptedAgent) -> None:
            agent.text = t.cast(PacedAgent, agent).words or ""

        return [keep]


app = Flask("behind")
app.config.update({k: v for k, v in os.environ.items() if k.startswith("AGENTAO_")})
PREFIX = os.environ.get("TEST_PREFIX", "")
AgentaoWeb(agents=Paced((say("hello"),), {})).init_app(app, url_prefix=PREFIX)
if PREFIX:
    # Where the harness looks.
    app.add_url_rule("/healthz", view_func=lambda: "ok")


@app.route("/host/<path:rest>", methods=["GET", "POST"])
@app.route("/host", methods=["GET", "POST"])
def host(rest: str = "") -> Response:
    """A page of the host's own: what came through."""
    return jsonify(
        url=request.url,
        headers=dict(request.headers),
        length=len(request.get_data()),
        remote=request.remote_addr,
    )


@app.after_request
def named(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response
