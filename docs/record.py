"""Records one of every event and answer from a real run: ``python -m docs.record``.

Real gunicorn, real agents and a scripted model, all on this machine; it takes half a minute and
writes docs/recorded.json, which ``python -m docs.build`` shows in protocol.md. A test does the same
and compares the shapes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import typing as t
from pathlib import Path

import httpx
from agentao import Agentao
from agentao.embedding.factory import discover_llm_kwargs
from agentao.llm.client import LLMClient
from agentao.mcp import InMemoryMCPRegistry
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import SessionInfo
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import model_env
from tests.model_server import ModelServer
from tests.model_server import Reply
from tests.model_server import call
from tests.model_server import fail
from tests.model_server import hang
from tests.model_server import hang_after
from tests.model_server import length
from tests.model_server import say
from tests.model_server import think

FILE: t.Final = Path(__file__).parent / "recorded.json"
Json = dict[str, t.Any]

#: A worker that is silent for so long has lost its turns; short, as it is waited for.
_LEASE: t.Final = "5"


class Recording:
    """What was seen: events by type, or "type, status or code"; answers by their request."""

    def __init__(self) -> None:
        self.events: dict[str, Json] = {}
        self.answers: dict[str, t.Any] = {}

    def see(self, event: Json) -> None:
        """Keep the first event of each kind."""
        kind = str(event["type"])
        if kind == "done":
            kind += f", {event['data']['status']}"
        if kind == "error":
            kind += f", {event['error']['code']}"
        names = ("seq", "turn_id", "type", "reply", "error", "data", "ts")  # As in a stream.
        self.events.setdefault(kind, {name: event[name] for name in names if name in event})

    def as_dict(self) -> Json:
        return {"events": self.events, "answers": self.answers}


def run(folder: Path) -> Json:
    """Do everything once in *folder*; what was seen."""
    seen = Recording()
    for name, story in (("ready", _of_the_ready_app), ("host", _of_a_host)):
        (folder / name).mkdir()
        with ModelServer() as model:
            try:
                story(folder / name, model, seen)
            finally:
                model.release()
    return seen.as_dict()


def shape(value: t.Any) -> t.Any:
    """The keys of *value*, all the way down; of a list those of its first element."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None


class _Client:
    """A client of one session that keeps all it sees."""

    def __init__(self, server: Server, model: ModelServer, seen: Recording, sid: str) -> None:
        self.http = server.client
        self.model = model
        self.seen = seen
        self.sid = sid
        self.cursor = 0

    def call(self, method: str, path: str, name: str = "", **given: t.Any) -> t.Any:
        """The answer to a request, kept under *name*."""
        headers = {"Accept": "application/json", **given.pop("headers", {})}
        response = self.http.request(method, path, headers=headers, **given)
        assert response.status_code < 400 or name, response.text
        body = response.json()
        if name:
            self.seen.answers.setdefault(name, body)
        return body

    def post(self, message: str, *replies: Reply, name: str = "", **fields: t.Any) -> Json:
        """Start a turn that the model answers with *replies*."""
        self.model.script(*replies)
        body = {"message": message, **fields}
        return t.cast(Json, self.call("POST", f"/chat/{self.sid}", name, json=body))

    def until(self, *kinds: str) -> Json:
        """Read on to the next event of *kinds*."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                page = self.call("GET", f"/chat/{self.sid}/events?after={self.cursor}&limit=1")
            except (httpx.TransportError, AssertionError):
                time.sleep(0.1)  # A worker or the store is gone for a moment.
                continue
            for event in page["events"]:
                self.cursor = event["seq"]
                self.seen.see(event)
                if event["type"] in kinds:
                    return t.cast(Json, event)
        raise AssertionError(f"no {kinds} came")

    def turn(self, message: str, *replies: Reply, **fields: t.Any) -> Json:
        """Start a turn and read it to its end."""
        self.post(message, *replies, **fields)
        return self.until("done", "error")

    def answer(self, **reply: t.Any) -> None:
        """Answer the next question."""
        asked = self.until("tool_confirmation", "ask_user_requested")["data"]
        body = {"question_id": asked["question_id"], **reply}
        self.call("POST", f"/chat/{self.sid}/answer", "answered", json=body)


def _of_the_ready_app(folder: Path, model: ModelServer, seen: Recording) -> None:
    data = folder / "data"
    env = model_env(
        model,
        AGENTAO_DATABASE_URL=f"sqlite:///{data}/agentao-web.db",
        AGENTAO_WORKER_LEASE=_LEASE,
        AGENTAO_THINKING="1",
        AGENTAO_SHELL="unconfined",
    )
    data.mkdir()
    with Server(folder, **env) as server:
        client = _Client(server, model, seen, "launch")
        _answers_and_questions(client)
        _endings(client)
        _looks(client)
        _gaps_and_losses(client, server, data)


def _answers_and_questions(client: _Client) -> None:
    note = {"file_path": "notes.txt", "content": "The launch is on Friday."}
    asked = {"question": "Which day?", "header": "Launch", "options": ["Thursday", "Friday"]}
    shell = {"command": "wc -w notes.txt", "description": "Count the words"}
    client.post(
        "Note that the launch is on Friday.",
        call("write_file", note),
        say("It is ", "noted."),
        name="accepted",
    )
    client.answer(approve=True)
    client.until("done")
    client.post("Count the words of my notes.", call("run_shell_command", shell), say("Five."))
    client.answer(approve=True, remember="turn")
    client.until("done")
    client.post("Plan the launch.", call("ask_user", asked), say("Friday ", "it is."))
    client.answer(answer="Friday")
    client.until("done")
    client.turn("Why Friday?", think("They said ", "Friday.", answer=("You ", "said so.")))
    body = {"message": "When is the launch?"}
    client.model.script(say("On ", "Friday."))
    client.call("POST", f"/chat/{client.sid}", "result", json=body, headers={"Prefer": "wait=25"})
    client.until("done")


def _endings(client: _Client) -> None:
    client.post("Write a long text.", hang_after("Once "))
    client.until("llm_text")
    client.post("And a short one.", name="busy")
    client.post("And a short one.", name="queued", on_busy="queue")
    client.until("turn_queued")
    client.call("GET", f"/session/{client.sid}", "running")
    client.call("POST", f"/chat/{client.sid}/cancel", "cancelled")
    client.until("done")
    client.until("done")
    client.turn("Tell me all of it.", length("All ", "of"))
    client.turn("Take your time.", hang(), timeout=1)
    client.turn("Try again.", fail(503, retry_after=1), say("There ", "it is."))
    client.turn("And now?", fail(400, "{}"))


def _looks(client: _Client) -> None:
    sid = client.sid
    client.call("GET", f"/chat/{sid}/events?after={client.cursor - 2}&wait=0", "page")
    client.call("GET", f"/session/{sid}", "session")
    client.call("GET", f"/session/{sid}/messages?limit=6&after=0", "messages")
    client.call("PATCH", f"/session/{sid}", "named", json={"title": "The launch"})
    client.call("POST", f"/session/{sid}/ticket", "ticket")
    client.call("GET", "/sessions", "sessions")


def _gaps_and_losses(client: _Client, server: Server, data: Path) -> None:
    page = client.call("GET", f"/chat/{client.sid}/events?after={2**53 - 1}&wait=0&limit=1")
    client.seen.see(page["events"][0])
    client.post("Write on.", hang_after("More "))
    client.until("llm_text")
    server.signal(signal.SIGKILL, server.workers()[0])
    client.until("error")
    # A folder of its own, so that all the database's files go in one moment.
    client.model.script(hang_after("More "))
    with server.stream(client.sid, "Write on.") as stream:
        stream.until("turn_begin")
        data.rename(data.with_name("away"))
        try:
            client.seen.see(stream.until("error"))
        finally:
            data.with_name("away").rename(data)


def _of_a_host(folder: Path, model: ModelServer, seen: Recording) -> None:
    with Server(folder, app="docs.record:host()", **model_env(model)) as server:
        client = _Client(server, model, seen, "host")
        client.turn(
            "Have the files counted.",
            call("agent_generalist", {"task": "Count the files."}),
            say("There are ", "three."),
            say("Three ", "files."),
        )
        client.turn("word " * 9000, say("A summary of it."), say("All ", "right."))
        client.turn("crash")


def host() -> Flask:
    """A host with agents of its own: they have sub-agents, little room, and may crash."""
    quiet = logging.Logger("agents", logging.CRITICAL + 1)

    def make(principal: Principal, session: SessionInfo, transport: t.Any) -> t.Any:
        agent = _Crashing(
            working_directory=session.workspace,
            transport=transport,
            llm_client=LLMClient(**discover_llm_kwargs(), logger=quiet, log_file=None),
            logger=quiet,
            max_context_tokens=12_000,
            mcp_registry=InMemoryMCPRegistry(),
            enabled_tools=["agent_generalist"],
            enable_builtin_agents=True,
            relay_subagent_events=True,
        )
        agent.messages = list(session.history)
        return agent

    app = Flask("host")
    keys = ("AGENTAO_ROOT", "AGENTAO_SECRET_KEYS")
    app.config.update({key: os.environ[key] for key in keys})
    AgentaoWeb(agents=make).init_app(app)
    return app


class _Crashing(Agentao):
    def chat(self, user_message: str, *args: t.Any, **given: t.Any) -> str:
        if user_message == "crash":
            raise RuntimeError("as it was told to")
        return str(super().chat(user_message, *args, **given))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"docs/{FILE.name} written: {', '.join(found['events'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
