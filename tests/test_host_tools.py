"""A host's functions called by real agents: through the routes, with a scripted model server."""

from __future__ import annotations

import collections.abc as cabc
import json
import logging
import threading
import time
import typing as t
from pathlib import Path

import pytest
from agentao import Agentao
from agentao.mcp import InMemoryMCPRegistry
from agentao.skills import SkillManager
from flask import Flask
from flask import current_app
from flask import g
from flask import has_request_context

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import SessionInfo
from agentao_web import ToolError
from agentao_web import shutdown
from agentao_web import testing
from agentao_web import tool
from tests.agents.scripted_llm import ScriptedLLM
from tests.agents.scripted_llm import call
from tests.agents.scripted_llm import say as said
from tests.model_server import ModelServer
from tests.model_server import calls
from tests.model_server import say
from tests.patience import PATIENCE

WAIT = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}


class Shop:
    """A host's application, and what happened in it."""

    def __init__(self, root: Path, tools: t.Any, agents: t.Any = None, **config: t.Any) -> None:
        self.notes: list[str] = []
        self.app = Flask("shop")
        self.app.config.update(
            TESTING=True,
            AGENTAO_ROOT=root,
            **{f"AGENTAO_{k.upper()}": v for k, v in config.items()},
        )
        self.app.teardown_appcontext(
            lambda exc: self.notes.append(f"teardown {type(exc).__name__}") if "call" in g else None
        )
        web = AgentaoWeb(authenticate=self.who, tools=tools, agents=agents)
        web.init_app(self.app, url_prefix="/agent")

    def who(self, request: t.Any) -> Principal:
        return Principal(*request.headers.get("X-User", "acme/ann").split("/"))

    def post(self, message: str, user: str = "acme/ann", **headers: str) -> t.Any:
        headers = {**WAIT, "X-User": user, **headers}
        client = self.app.test_client()
        return client.post("/agent/chat/s", json={"message": message}, headers=headers).json

    def events(self, user: str = "acme/ann") -> list[dict[str, t.Any]]:
        headers = {**WAIT, "X-User": user}
        page = self.app.test_client().get("/agent/chat/s/events?wait=0", headers=headers).json
        return t.cast(list[dict[str, t.Any]], page["events"])

    def until(self, *kinds: str) -> dict[str, t.Any]:
        cursor, until = 0, time.monotonic() + PATIENCE
        while True:
            url = f"/agent/chat/s/events?after={cursor}&wait=1"
            page = self.app.test_client().get(url, headers={**WAIT, "X-User": "acme/ann"}).json
            for event in page["events"]:
                if event["type"] in kinds:
                    return t.cast(dict[str, t.Any], event)
            cursor = page["cursor"]
            assert time.monotonic() < until, page


Make = cabc.Callable[..., Shop]


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def shop(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[Make]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-operator")
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted")
    made: list[Shop] = []

    def make(*functions: t.Any, **more: t.Any) -> Shop:
        more.setdefault("tools", lambda principal: list(functions))
        more.setdefault("policy", "trusted")
        made.append(Shop(tmp_path / str(len(made)), **more))
        return made[-1]

    yield make
    for one in made:
        shutdown(one.app, grace=2)


def told(model: ModelServer) -> str:
    """What the model was told by the last tool."""
    return str(model.requests[-1].body["messages"][-1]["content"])


@pytest.mark.parametrize("fails", [False, True])
def test_each_call_has_an_application_context_of_its_own_and_no_request(
    shop: Make, model: ModelServer, fails: bool
) -> None:
    def visit() -> dict[str, t.Any]:
        """Visit."""
        fresh, g.call = "call" not in g, 1
        made.notes.append("call")
        if fails:
            raise ToolError("closed")
        return {"app": current_app.name, "fresh": fresh, "request": has_request_context()}

    def reply(body: dict[str, t.Any]) -> t.Any:
        made.notes.append("model")
        steps = [calls([("visit", {}, f"c{n}")]) for n in range(2)]
        return [*steps, say("been there")][sum(m["role"] == "tool" for m in body["messages"])]

    made = shop(visit)
    model.reply = reply
    body = made.post("go")
    assert (body["status"], body["reply"], body["tool_count"]) == ("completed", "been there", 2)
    end = "teardown ToolError" if fails else "teardown NoneType"
    assert made.notes == ["model", *["call", end, "model"] * 2], "ended before the model hears"
    if fails:
        assert told(model) == "Error executing visit: closed"
    else:
        assert json.loads(told(model)) == {"app": "shop", "fresh": True, "request": False}


def test_the_tool_is_in_the_request_to_the_model_with_its_schema(
    shop: Make, model: ModelServer
) -> None:
    def count(word: str, letter: str = "a") -> int:
        """Count a letter in a word."""
        return word.count(letter)

    made = shop(count)
    made.post('call count {"word": "banana"}')
    sent = {x["function"]["name"]: x["function"] for x in model.requests[0].body["tools"]}
    assert sent["count"] == {
        "name": "count",
        "description": "Count a letter in a word.",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "letter": {"type": "string", "default": "a"},
            },
            "required": ["word"],
            "additionalProperties": False,
        },
    }
    assert told(model) == "3"
    made.post('call count {"wrod": "banana"}')
    assert "word: is missing; wrod: is not known" in told(model)


def test_the_policy_read_only_leaves_the_tools_that_only_read(
    shop: Make, model: ModelServer
) -> None:
    ran: list[str] = []

    @tool(read_only=True)
    def look() -> None:
        """Look."""
        ran.append("look")

    def change() -> None:
        """Change."""
        ran.append("change")

    made = shop(look, change, policy="read-only")
    assert made.post("call look {}\ncall change {}\nsay ok")["reply"] == "ok"
    assert ran == ["look"]


@pytest.mark.parametrize("approve", [True, False])
@pytest.mark.parametrize("real", [True, False])
def test_a_person_decides_about_what_changes_something(
    shop: Make, model: ModelServer, approve: bool, real: bool
) -> None:
    ran: list[int] = []

    def change(n: int) -> str:
        """Change it."""
        ran.append(n)
        return "changed"

    agents = None if real else testing.scripted(testing.ask("change", n=1), testing.say("ok"))
    made = shop(change, agents=agents, policy="ask")
    made.post('call change {"n": 1}\nsay ok', Prefer="wait=0")
    asked = made.until("tool_confirmation")["data"]
    assert (asked["tool"], asked["args"], ran) == ("change", {"n": 1}, [])
    answer = {"question_id": asked["question_id"], "approve": approve}
    client = made.app.test_client()
    assert client.post("/agent/chat/s/answer", json=answer, headers=WAIT).status_code == 200
    assert made.until("done", "error")["reply"] == "ok"
    assert ran == [1] * approve
    (end,) = [e["data"]["status"] for e in made.events() if e["type"] == "tool_complete"]
    assert end == ("ok" if approve else "denied")


def test_every_principal_has_its_own(shop: Make) -> None:
    def tools_for(principal: Principal) -> list[t.Any]:
        assert current_app.name == "shop", "so that it may look the principal up"

        def mine() -> str:
            """Mine."""
            return f"closure {principal.user}"

        def whoami(who: Principal) -> str:
            """Who."""
            return f"given {who.tenant}/{who.user}"

        return [mine, whoami]

    made = shop(tools=tools_for)
    users = ["acme/ann", "acme/bob", "other/ann"]
    turns = [
        threading.Thread(target=made.post, args=("call mine {}\ncall whoami {}", user))
        for user in users
    ]
    for turn in turns:
        turn.start()
    for turn in turns:
        turn.join(PATIENCE)
    for user in users:
        results = [e["data"]["content"] for e in made.events(user) if e["type"] == "tool_result"]
        assert results == [f"closure {user.split('/')[1]}", f"given {user}"]


def test_tools_of_one_answer_run_side_by_side_each_in_its_own_context(
    shop: Make, model: ModelServer
) -> None:
    together = threading.Barrier(3, timeout=PATIENCE)

    def meeting(name: str) -> t.Any:
        @tool(name=name, read_only=True)
        def meet() -> bool:
            """Meet the others."""
            g.name = name
            together.wait()
            return bool(g.name == name)

        return meet

    names = ["one", "two", "three"]
    made = shop(*map(meeting, names))
    model.script(calls([(name, {}, name) for name in names]), say("met"))
    assert made.post("go")["reply"] == "met"
    results = [m for m in model.requests[-1].body["messages"] if m["role"] == "tool"]
    assert [m["content"] for m in results] == ["true"] * 3


def test_a_cancel_does_not_wait_for_the_tool(shop: Make) -> None:
    entered, go, ended = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        """Hold on."""
        entered.set()
        assert go.wait(PATIENCE)
        ended.set()

    made = shop(hold)
    try:
        made.post("call hold {}", Prefer="wait=0")
        assert entered.wait(PATIENCE)
        client = made.app.test_client()
        assert client.post("/agent/chat/s/cancel", headers=WAIT).json == {
            "ok": True,
            "cancelled": 1,
        }
        done = made.until("done", "error")
        assert done["data"]["reason"] == "cancelled_by_user" and not ended.is_set()
        assert made.post("say next")["reply"] == "next"
        shutdown(made.app, grace=2)
        assert not ended.is_set(), "nor does the shutdown"
    finally:
        go.set()
    assert ended.wait(PATIENCE)


def test_a_deadline_is_told_to_the_model_and_the_turn_goes_on(
    shop: Make, model: ModelServer
) -> None:
    go = threading.Event()

    def hold() -> None:
        """Hold on."""
        go.wait(PATIENCE)

    made = shop(hold, tool_timeout=0.1)
    try:
        assert made.post("call hold {}\nsay on we go")["reply"] == "on we go"
        assert told(model).endswith("timed out after 0.1 seconds; it may still take effect")
    finally:
        go.set()


@pytest.mark.parametrize("value", ["\ud800", {"a": float("nan")}, b"\xff\x00", "x" * 1_000_000])
def test_no_result_spoils_the_session(shop: Make, model: ModelServer, value: t.Any) -> None:
    def odd() -> t.Any:
        """Odd."""
        return value

    made = shop(odd)
    assert made.post("call odd {}\nsay one")["reply"] == "one"
    assert made.post("say two")["reply"] == "two"
    result = next(e for e in made.events() if e["type"] == "tool_result")["data"]
    assert len(result["content"]) <= 4096
    assert len(json.dumps(model.requests[-1].body)) < 400_000


def test_what_cannot_be_a_tool_fails_the_turn_and_tells_the_host(
    shop: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def secret(*args: int) -> None:
        """Do."""

    made = shop(secret)
    body = made.post("say hi")
    assert (body["status"], body["reason"]) == ("failed", "internal_error")
    assert "cannot be a tool: it takes *args" in caplog.text
    assert "args" not in json.dumps([body, made.events()])


def test_tools_must_be_a_function() -> None:
    with pytest.raises(RuntimeError, match="lambda principal"):
        AgentaoWeb(tools=[len])  # type: ignore[arg-type]


def test_an_agent_of_the_hosts_own_has_them_too(shop: Make) -> None:
    def stock(who: Principal) -> str:
        """How many there are."""
        return f"{current_app.name} for {who.user}"

    llm = ScriptedLLM(call("stock"), said("done"))

    def make_agent(principal: Principal, session: SessionInfo, transport: t.Any) -> Agentao:
        return Agentao(
            working_directory=session.workspace,
            transport=transport,
            llm_client=llm,
            logger=logging.Logger("quiet"),
            mcp_registry=InMemoryMCPRegistry(),
            skill_manager=SkillManager(skills_dir=str(session.workspace / "none")),
            enabled_tools=[],
            extra_tools=session.tools,
            permission_mode="full-access",
        )

    made = shop(stock, agents=make_agent)
    assert made.post("go")["reply"] == "done"
    assert llm.results == ["shop for ann"]


def test_scripted_agents_use_the_hosts_tools(shop: Make) -> None:
    def stock(item: str, who: Principal) -> str:
        """How many there are."""
        if item == "gold":
            raise ToolError("no such thing")
        return f"{current_app.name} has 7 of {item} for {who.user}"

    agents = testing.scripted(
        testing.use("stock", item="tea"),
        testing.use("stock", item="gold"),
        testing.use("stock", "made up", item="tea"),
        testing.use("read_file", "42", file_path="a.txt"),
        testing.say("seven"),
    )
    made = shop(stock, agents=agents)
    assert made.post("how many?")["reply"] == "seven"
    answers = ["shop has 7 of tea for ann", "no such thing", "made up", "42"]
    assert agents.agents[0].results == answers
    ends = [e["data"]["status"] for e in made.events() if e["type"] == "tool_complete"]
    assert ends == ["ok", "error", "ok", "ok"]


def test_a_cancel_ends_the_tool_of_a_scripted_agent_too(shop: Make) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold() -> None:
        """Hold on."""
        entered.set()
        assert go.wait(PATIENCE)

    made = shop(hold, agents=testing.scripted(testing.use("hold"), testing.say("never")))
    try:
        made.post("go", Prefer="wait=0")
        assert entered.wait(PATIENCE)
        made.app.test_client().post("/agent/chat/s/cancel", headers=WAIT)
        assert made.until("done", "error")["data"]["reason"] == "cancelled_by_user"
    finally:
        go.set()
