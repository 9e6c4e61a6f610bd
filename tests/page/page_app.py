"""An application for the page's tests: agents that follow the script their message names.

What comes behind the name is a gate the test opens (``POST /test/gate/NAME``), so that it sees the
page in between.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import typing as t
from collections import defaultdict

from flask import Flask
from flask import Request
from flask import Response
from flask import jsonify
from flask import session

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web.testing import Scripted
from agentao_web.testing import ScriptedAgent
from agentao_web.testing import Step
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import crash
from agentao_web.testing import emit
from agentao_web.testing import end
from agentao_web.testing import say
from tests.page import scripts

GATES: dict[str, threading.Event] = defaultdict(threading.Event)


def hold(name: str) -> Step:
    """Wait until the gate is opened or the turn is stopped."""

    def step(agent: ScriptedAgent) -> None:
        gate = GATES[name]
        agent.token.add_done_callback(gate.set)
        assert gate.wait(60), name

    return step


def answered(agent: ScriptedAgent) -> None:
    say(f"You said: {agent.answers[-1]}")(agent)


def both(agent: ScriptedAgent) -> None:
    """Two questions at once, as tools that run side by side ask them."""
    steps = [ask_user(f"Question {name}?", header=f"Header {name}") for name in "AB"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda step: step(agent), steps))


def tool(gate: str) -> list[Step]:
    call = {"tool": "run_shell_command", "call_id": "call-1"}
    return [
        say("Let me look."),
        emit("tool_start", args={"command": "make test", "description": "Runs them"}, **call),
        emit("tool_output", chunk="first line\n", **call),
        hold(gate),
        emit("tool_output", chunk="second line\n", **call),
        emit("tool_complete", status="ok", duration_ms=1234, **call),
        emit("tool_result", content="STDOUT:\nfirst line\nsecond line\n", **call),
        say("All green."),
    ]


SCRIPTS: dict[str, t.Callable[[str], list[Step]]] = {
    "slow": lambda gate: [say("first half, "), hold(gate), say("second half")],
    "markdown": lambda gate: (
        [say(*scripts.MARKDOWN), hold(gate)] if gate else [say(*scripts.MARKDOWN)]
    ),
    "tool": tool,
    "approve": lambda gate: [ask("write_file", file_path=f"{gate}.txt", content="x"), answered],
    "twice": lambda gate: [
        *[ask("write_file", file_path=f"{gate}.txt", content="x")] * 2,
        answered,
    ],
    "choose": lambda gate: [ask_user("Which colour?", "red", "green", header="Colour"), answered],
    "strict": lambda gate: [ask_user("Which one?", "this", "that", allow_custom=False), answered],
    "several": lambda gate: [ask_user("Which ones?", "a", "b", "c", multiple=True), answered],
    "both": lambda gate: [both, say("both")],
    "open": lambda gate: [ask_user("What is your name?"), answered],
    "crash": lambda gate: [say("half an "), crash(RuntimeError("secret"))],
    "cut": lambda gate: [say("half an "), end("length_truncated")],
    "think": lambda gate: [emit("thinking", text="Let me see."), hold(gate), say("thought")],
    "retry": lambda gate: [
        emit("llm_retry", retry=1, max_retries=2, delay_s=9.4, reason="status=500"),
        hold(gate),
        say("there"),
    ],
    "hostile": lambda gate: scripts.hostile(hold(gate)),
    "unseen": lambda gate: scripts.unseen(hold(gate)),
    "launch": lambda gate: scripts.launch(hold(gate)),
    "flood": lambda gate: [
        emit("tool_start", tool="t", call_id="c", args={}),
        *[
            emit("tool_output", tool="t", call_id="c", chunk=f"{n} {'x' * 900}\n")
            for n in range(20)
        ],
        emit("tool_complete", tool="t", call_id="c", status="ok", duration_ms=1),
        emit("llm_text", chunk="flooded "),
        hold(gate),
        say("the end"),
    ],
    "long": lambda gate: [say(*[f"Paragraph {n}.\n\n" for n in range(200)])],
}


class Stage(Scripted):
    def script_for(self, message: str) -> list[Step]:
        name, _, rest = message.partition(" ")
        if message in scripts.PICTURED:
            return SCRIPTS["launch"]("launch")
        return SCRIPTS[name](rest.strip()) if name in SCRIPTS else [say("You wrote: ", message)]


def who_is_it(request: Request) -> Principal | None:
    return Principal("shop", session["user"]) if "user" in session else None


PREFIX = os.environ.get("TEST_PREFIX", "")
app = Flask("page")
app.secret_key = "the-hosts-own"
app.config.update({k: v for k, v in os.environ.items() if k.startswith("AGENTAO_")})
own_login: dict[str, t.Any] = {"authenticate": who_is_it} if "TEST_LOGIN" in os.environ else {}
AgentaoWeb(agents=Stage((), {}), **own_login).init_app(app, url_prefix=PREFIX)
if PREFIX:
    app.add_url_rule("/healthz", view_func=lambda: "ok")


@app.post("/test/gate/<name>")
def gate(name: str) -> Response:
    GATES[name].set()
    return jsonify(ok=True)


@app.get("/login/<user>")
def login(user: str) -> Response:
    session["user"] = user
    return jsonify(ok=True)


@app.get("/logout")
def logout() -> Response:
    session.clear()
    return jsonify(ok=True)
