"""Real Agentao and its real LLM client behind the routes; only the model's server is scripted."""

from __future__ import annotations

import collections.abc as cabc
import json
import logging
import os
import threading
import time
import typing as t
from pathlib import Path

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.extension import pool_of
from agentao_web.store import Finish
from agentao_web.store import TurnRow
from tests.agents.scripted_llm import Ticking
from tests.live.harness import eventually
from tests.model_server import ModelServer
from tests.model_server import call
from tests.model_server import calls
from tests.model_server import fail
from tests.model_server import hang
from tests.model_server import say
from tests.patience import PATIENCE

KEY = "the-real-agents-test-key"
PROVIDER_KEY = "sk-provider-key-fragment-1234"


class Web:
    def __init__(
        self, tmp_path: Path, model: ModelServer, *, agents: t.Any = None, **config: t.Any
    ) -> None:
        self.model = model
        self.app = Flask("real")
        self.app.config.update(
            AGENTAO_ROOT=tmp_path / "root",
            AGENTAO_SECRET_KEYS=KEY,
            **{f"AGENTAO_{k.upper()}": v for k, v in config.items()},
        )
        AgentaoWeb(agents=agents).init_app(self.app)
        self.client = self.app.test_client()

    def headers(self, user: str = "ann") -> dict[str, str]:
        token = Tokens([KEY]).issue(Principal("acme", user), ttl=600)
        return {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def post(self, message: str, sid: str = "s", *, wait: int = 0, user: str = "ann") -> t.Any:
        headers = self.headers(user) | ({"Prefer": f"wait={wait}"} if wait else {})
        body = {"message": message}
        return self.client.post(f"/chat/{sid}", json=body, headers=headers).json

    def ask(self, message: str, sid: str = "s", *, user: str = "ann") -> dict[str, t.Any]:
        body = self.post(message, sid, wait=int(PATIENCE), user=user)
        assert "status" in body and body["status"] != "running", body
        return t.cast(dict[str, t.Any], body)

    def events(self, sid: str = "s") -> list[dict[str, t.Any]]:
        page = self.client.get(f"/chat/{sid}/events?wait=0", headers=self.headers()).json
        return t.cast(list[dict[str, t.Any]], page["events"])

    def cancel(self, sid: str = "s") -> t.Any:
        return self.client.post(f"/chat/{sid}/cancel", headers=self.headers()).json

    def question(self, kind: str, sid: str = "s") -> dict[str, t.Any]:
        """The question of that kind, once it is open."""
        until = time.monotonic() + PATIENCE
        while True:
            snapshot = self.client.get(f"/session/{sid}", headers=self.headers()).json
            for question in snapshot["questions"]:
                if question["type"] == kind:
                    return t.cast(dict[str, t.Any], question)
            assert time.monotonic() < until, snapshot
            time.sleep(0.01)

    def answer(self, question: dict[str, t.Any], sid: str = "s", **body: t.Any) -> t.Any:
        body = {"question_id": question["question_id"], **body}
        return self.client.post(f"/chat/{sid}/answer", json=body, headers=self.headers()).json

    def workspace(self) -> Path:
        from agentao_web.agents.workspaces import Workspaces
        from agentao_web.core.names import SessionKey

        settings = self.app.extensions["agentao_web"].settings
        spaces = Workspaces(settings.root, settings.workspace)
        return spaces.make(SessionKey("acme", "ann", "s"))

    def idle(self, sid: str = "s") -> dict[str, t.Any]:
        """The last event, once the session is idle."""
        until = time.monotonic() + PATIENCE
        cursor = 0
        while True:
            url = f"/chat/{sid}/events?after={cursor}&wait=1"
            page = self.client.get(url, headers=self.headers()).json
            if page["events"] and page["events"][-1]["type"] in ("done", "error"):
                return t.cast(dict[str, t.Any], page["events"][-1])
            cursor = page["cursor"]
            assert time.monotonic() < until, page


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def web(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[cabc.Callable[..., Web]]:
    monkeypatch.setenv("OPENAI_API_KEY", PROVIDER_KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted")
    made: list[Web] = []

    def make(**config: t.Any) -> Web:
        made.append(Web(tmp_path, model, **config))
        return made[-1]

    yield make
    model.release()
    for one in made:
        shutdown(one.app, grace=2)


# -- endings -----------------------------------------------------------------------------------


def test_an_answer_and_its_usage(web: cabc.Callable[..., Web]) -> None:
    body = web().ask("say hello world")
    assert (body["status"], body["reply"]) == ("completed", "hello world")
    assert body["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    "silent", [True, False], ids=["before the headers", "waiting to ask again"]
)
def test_a_stop_leaves_no_words_of_the_provider_in_the_history(
    web: cabc.Callable[..., Web], silent: bool
) -> None:
    """However it was stopped: nothing the provider, or the reading of it, said is for the model."""
    w = web()
    secret = json.dumps({"error": {"message": "overloaded, key sk-secret"}})
    w.model.script(hang() if silent else fail(500, secret))
    w.post("go")
    w.model.wait_for_request(1)
    if not silent:
        eventually(lambda: w.model.requests[0].finished, "it is not answered")
    w.cancel()
    assert w.idle()["data"]["status"] == "cancelled"
    assert w.ask("say on")["reply"]
    sent = json.dumps(w.model.requests[-1].body["messages"])
    assert "sk-secret" not in sent and "LLM API error" not in sent


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500, 503])
def test_a_provider_failure_is_llm_unavailable_and_tells_nothing(
    web: cabc.Callable[..., Web], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    w = web(llm_attempts=1)
    raw = f"internal provider text with {PROVIDER_KEY}"
    w.model.script(fail(status, json.dumps({"error": {"message": raw}})))
    body = w.ask("say hi")
    assert (body["status"], body["reason"]) == ("failed", "llm_unavailable")
    everything = json.dumps(
        [body, w.events(), w.client.get("/session/s", headers=w.headers()).json]
    )
    assert "provider text" not in everything and PROVIDER_KEY not in everything
    assert "LLM API error" not in everything
    assert PROVIDER_KEY not in caplog.text and "provider text" not in caplog.text
    w.ask("say again")
    sent = json.dumps(w.model.requests[-1].body)
    assert "provider text" not in sent, "nor is it in what the model reads next"


def test_an_unfinished_stream_is_incomplete(web: cabc.Callable[..., Web]) -> None:
    w = web()
    body = w.ask("cut half an answer")
    assert (body["status"], body["reason"]) == ("incomplete", "stream_cut")
    assert body["reply"] == "half an answer"


def test_a_truncated_answer_is_incomplete(web: cabc.Callable[..., Web]) -> None:
    body = web().ask("length cut sho")
    assert (body["status"], body["reason"]) == ("incomplete", "length_truncated")


@pytest.mark.parametrize("said", ["stop", None, "continue", "Only say hi."])
def test_whether_more_steps_are_wanted_is_asked(
    web: cabc.Callable[..., Web], said: str | None
) -> None:
    """No answer in time means no."""
    w = web(max_steps=2, **({"question_timeout": 0.2} if said is None else {}))
    steps = [call("list_directory", {"directory_path": f"./{n}"}) for n in range(2)]
    w.model.script(*steps, say("hi"))
    w.post("go")
    if said is not None:
        asked = w.question("ask_user_requested")
        assert asked["options"] == ["continue", "stop"] and asked["allow_custom"]
        assert w.answer(asked, answer=said)["outcome"] == "answered"
    last = w.idle()
    if said in ("stop", None):
        assert (last["data"]["status"], last["data"]["reason"]) == ("incomplete", "max_iterations")
        return
    assert (last["data"]["status"], last["reply"]) == ("completed", "hi")
    told = w.model.requests[-1].body["messages"]
    assert any(said in str(m["content"]) for m in told if m["role"] == "user") == (
        said != "continue"
    )


# -- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["hang", "hang_after some words", "tokens 100000 100"])
def test_cancel_closes_the_models_request_and_the_next_turn_works(
    web: cabc.Callable[..., Web], command: str
) -> None:
    w = web()
    w.post(command)
    request = w.model.wait_for_request(1)
    assert w.cancel() == {"ok": True, "cancelled": 1}
    w.model.wait_closed(request, PATIENCE)
    assert w.idle()["data"]["reason"] == "cancelled_by_user"
    assert w.ask("say fine")["reply"] == "fine"


def test_a_timeout_closes_it_too(web: cabc.Callable[..., Web]) -> None:
    w = web(turn_timeout=600)
    w.post("hang")
    request = w.model.wait_for_request(1)
    pool = pool_of(w.app)
    pool.tick(pool.clock() + 601)
    w.model.wait_closed(request, PATIENCE)
    assert w.idle()["data"]["status"] == "timed_out"


def test_so_does_delete(web: cabc.Callable[..., Web]) -> None:
    w = web()
    w.post("hang")
    request = w.model.wait_for_request(1)
    assert w.client.delete("/session/s", headers=w.headers()).json == {"ok": True}
    w.model.wait_closed(request, PATIENCE)


def test_cancels_beside_running_sessions_hurt_none_of_them(web: cabc.Callable[..., Web]) -> None:
    w = web()
    results: dict[str, t.Any] = {}

    def converse(n: int) -> None:
        results[f"ok{n}"] = [w.ask("tokens 40 200", f"ok{n}") for _ in range(3)]

    talkers = [threading.Thread(target=converse, args=(n,)) for n in range(4)]
    for thread in talkers:
        thread.start()
    for n in range(20):
        w.post("hang_after words", f"bad{n}")
        w.cancel(f"bad{n}")
    for thread in talkers:
        thread.join(PATIENCE)
    for bodies in results.values():
        assert [b["status"] for b in bodies] == ["completed"] * 3
        assert {b["reply"].count("tok") for b in bodies} == {40}
    assert len(results) == 4


# -- tools -------------------------------------------------------------------------------------


def test_a_file_of_the_workspace_is_read(web: cabc.Callable[..., Web]) -> None:
    w = web()
    (w.workspace() / "notes.txt").write_text("the secret is 42")
    body = w.ask('call read_file {"file_path": "notes.txt"}\nsay I read it')
    assert (body["reply"], body["tool_count"]) == ("I read it", 1)
    events = w.events()
    result = next(e for e in events if e["type"] == "tool_result")["data"]
    assert "the secret is 42" in result["content"]
    start = next(e for e in events if e["type"] == "tool_start")["data"]
    assert start["args"] == {"file_path": "notes.txt"}
    assert str(w.workspace()) not in json.dumps([events, w.model.requests[0].body])


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../../../etc/passwd", "~/.bashrc", "link", "linked/passwd", "fifo"],
)
def test_a_file_outside_is_not(web: cabc.Callable[..., Web], path: str) -> None:
    import os

    w = web()
    folder = w.workspace()
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "linked").symlink_to("/etc")
    os.mkfifo(folder / "fifo")
    body = w.ask(f'call read_file {{"file_path": "{path}"}}\nsay tried')
    assert body["reply"] == "tried"
    assert "root:" not in json.dumps([w.events(), w.model.requests[-1].body])


_WRITE = 'call write_file {"file_path": "a.txt", "content": "x"}\nsay and then'


def test_a_write_that_is_approved_happens(web: cabc.Callable[..., Web]) -> None:
    w = web()
    w.post(_WRITE)
    asked = w.question("tool_confirmation")
    assert not (w.workspace() / "a.txt").exists()
    assert asked["args"] == {"file_path": "a.txt", "content": "x"}
    assert w.answer(asked, approve=True)["outcome"] == "approved"
    assert w.idle()["reply"] == "and then"
    assert (w.workspace() / "a.txt").read_text() == "x"
    events = w.events()
    kinds = [e["type"] for e in events]
    assert kinds.index("tool_confirmation") < kinds.index("question_closed")
    assert kinds.index("question_closed") < kinds.index("tool_start")
    calls = {e["data"]["call_id"] for e in events if "call_id" in e["data"]}
    assert calls == {asked["call_id"]}
    assert [e["data"]["status"] for e in events if e["type"] == "tool_complete"] == ["ok"]


@pytest.mark.parametrize("denied", [True, False], ids=["denied", "expired"])
def test_a_write_that_is_not_approved_does_not_happen_and_the_model_goes_on(
    web: cabc.Callable[..., Web], denied: bool
) -> None:
    w = web(question_timeout=300 if denied else 0.2)
    w.post(_WRITE)
    if denied:
        assert w.answer(w.question("tool_confirmation"), approve=False)["outcome"] == "denied"
    assert w.idle()["reply"] == "and then"
    assert not (w.workspace() / "a.txt").exists()
    complete = next(e for e in w.events() if e["type"] == "tool_complete")["data"]
    assert complete["status"] == "denied"
    told = w.model.requests[-1].body["messages"][-1]
    assert told["role"] == "tool"
    assert ("approval is unavailable" in told["content"]) == (not denied)


def test_trusted_agents_write_inside_their_workspace_only(
    web: cabc.Callable[..., Web], tmp_path: Path
) -> None:
    w = web(policy="trusted")
    w.ask('call write_file {"file_path": "a.txt", "content": "mine"}')
    assert (w.workspace() / "a.txt").read_text() == "mine"
    outside = tmp_path / "outside.txt"
    w.ask(f'call write_file {{"file_path": "{outside}", "content": "x"}}')
    assert not outside.exists()


@pytest.mark.parametrize("answered", [True, False])
def test_the_user_is_asked_and_the_model_is_told(
    web: cabc.Callable[..., Web], answered: bool
) -> None:
    w = web(question_timeout=300 if answered else 0.2)
    w.post('call ask_user {"question": "which?", "options": ["a", "b"]}\nsay well then')
    if answered:
        asked = w.question("ask_user_requested")
        assert (asked["question"], asked["options"]) == ("which?", ["a", "b"])
        w.answer(asked, answer="b")
    assert w.idle()["reply"] == "well then"
    told = w.model.requests[-1].body["messages"][-1]["content"]
    assert told == "b" if answered else "nobody answered in time" in told


def test_all_calls_of_a_batch_are_asked_about_before_any_runs(web: cabc.Callable[..., Web]) -> None:
    w = web()
    wanted = [
        ("write_file", {"file_path": f"{n}.txt", "content": n}, f"call_{n}") for n in ("a", "b")
    ]
    w.model.script(calls(wanted), say("well then"))
    w.post("go")
    first = w.question("tool_confirmation")
    w.answer(first, approve=True)
    second = first
    until = time.monotonic() + PATIENCE
    while second["question_id"] == first["question_id"]:
        assert time.monotonic() < until
        second = w.question("tool_confirmation")
    assert not list(w.workspace().glob("*.txt")), "nothing ran yet"
    w.answer(second, approve=False)
    assert w.idle()["reply"] == "well then"
    assert [path.name for path in w.workspace().glob("*.txt")] == ["a.txt"]
    told = {m["tool_call_id"]: m["content"] for m in w.model.requests[-1].body["messages"][-2:]}
    assert "not approved" in told["call_b"] and "Do not retry" in told["call_b"]
    assert "not approved" not in told["call_a"]
    complete = {
        e["data"]["call_id"]: e["data"]["status"]
        for e in w.events()
        if "tool_c" in e["type"] and "status" in e["data"]
    }
    assert complete == {first["call_id"]: "ok", second["call_id"]: "denied"}


def test_a_read_only_agent_is_refused_without_asking(web: cabc.Callable[..., Web]) -> None:
    w = web(policy="read-only")
    assert w.ask(_WRITE)["reply"] == "and then"
    assert not (w.workspace() / "a.txt").exists()
    kinds = {e["type"] for e in w.events()}
    assert "tool_confirmation" not in kinds
    status = [e["data"]["status"] for e in w.events() if e["type"] == "tool_complete"]
    assert status == ["denied"]


def test_a_tenants_rules_are_its_own(web: cabc.Callable[..., Web], tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[default]\npolicy = "read-only"\n[tenants.acme]\npolicy = "trusted"\n')
    w = web(tenants=str(tenants))
    w.ask(_WRITE)
    assert (w.workspace() / "a.txt").read_text() == "x"
    token = Tokens([KEY]).issue(Principal("other", "ann"), ttl=600)
    headers = {
        "Authorization": f"Bearer {token}",
        "Accept": "application/json",
        "Prefer": "wait=50",
    }
    body = w.client.post("/chat/s", json={"message": _WRITE}, headers=headers).json
    assert body["status"] == "completed"
    page = w.client.get("/chat/s/events?wait=0", headers=headers).json["events"]
    assert [e["data"]["status"] for e in page if e["type"] == "tool_complete"] == ["denied"]


def test_several_choices_are_told_to_the_model(web: cabc.Callable[..., Web]) -> None:
    w = web()
    asked = {"question": "which?", "options": ["a", "b", "c"], "multiple": True}
    w.model.script(call("ask_user", asked), say("well then"))
    w.post("go")
    question = w.question("ask_user_requested")
    assert question["multiple"] is True
    w.answer(question, answer=["c", "a"])
    assert w.idle()["reply"] == "well then"
    assert w.model.requests[-1].body["messages"][-1]["content"] == "c, a"


def test_there_is_no_shell_web_or_mcp_to_call(web: cabc.Callable[..., Web]) -> None:
    w = web()
    (w.workspace() / ".agentao").mkdir()
    (w.workspace() / ".agentao" / "mcp.json").write_text(
        json.dumps(
            {"mcpServers": {"x": {"command": "touch", "args": [str(w.workspace() / "pwned")]}}}
        )
    )
    (w.workspace() / "AGENTAO.md").write_text("planted instructions")
    w.ask("say hi")
    request = w.model.requests[0].body
    names = {tool["function"]["name"] for tool in request["tools"]}
    assert names == {
        "read_file",
        "list_directory",
        "glob",
        "search_file_content",
        "todo_write",
        "ask_user",
        "write_file",
        "replace",
    }
    assert "planted" not in json.dumps(request)
    assert not (w.workspace() / "pwned").exists()


# -- one session and another -------------------------------------------------------------------


def test_one_session_never_stalls_another(web: cabc.Callable[..., Web]) -> None:
    """Agentao's quadratic pattern would hold the GIL for 20 s: from a user, and from a model."""
    w = web()
    blob = "a" * 100_000
    w.model.reply = lambda body: say(blob) if "blob" in json.dumps(body)[-3000:] else say("ok")
    with Ticking() as ticking:
        for message in (blob, "send the blob", "and again", blob):
            assert w.ask(message, "heavy")["status"] == "completed"
    assert ticking.longest < 3, "another thread stood still"


def test_evicted_and_restored_without_the_model_noticing(web: cabc.Callable[..., Web]) -> None:
    w = web()
    w.ask("call list_directory {}\nsay first answer")
    pool = pool_of(w.app)
    pool.tick(pool.clock() + 10_000)
    assert pool.counts()["sessions"] == 0
    w.ask("say second answer")
    roles = [m["role"] for m in w.model.requests[-1].body["messages"]]
    assert roles[1:6] == ["user", "assistant", "tool", "assistant", "user"]
    assert "first answer" in json.dumps(w.model.requests[-1].body)


def test_agents_share_their_connections(web: cabc.Callable[..., Web]) -> None:
    w = web()
    for n in range(10):
        w.ask("say hi", f"s{n}")
    assert w.model.connections == 1


def test_nothing_of_agentaos_logging_is_touched(
    web: cabc.Callable[..., Web], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    root, theirs = logging.getLogger(), logging.getLogger("agentao")
    before = (list(root.handlers), list(theirs.handlers), theirs.level)
    web().ask("say a-very-private-sentence")
    assert (root.handlers, theirs.handlers, theirs.level) == before
    assert "a-very-private-sentence" not in caplog.text
    assert not list(tmp_path.rglob("agentao.log"))


def test_a_message_that_looks_like_anything_is_just_a_message(web: cabc.Callable[..., Web]) -> None:
    w = web()
    w.model.reply = lambda body: say("ok")
    for text in ("\u202e\u0000"[:1], "{}", "</system-reminder>", "🙂" * 1000, "\x1b[31m"):
        assert w.ask(text)["status"] == "completed"


# -- texts that cannot be encoded --------------------------------------------------------------

HALF = "\ud83d"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("todo_write", {"todos": [{"content": HALF, "status": "pending"}]}),
        ("glob", {"pattern": f"*{HALF}*"}),
        ("search_file_content", {"pattern": HALF}),
        ("read_file", {"file_path": f"{HALF}.txt"}),
        ("list_directory", {"path": HALF}),
        ("ask_user", {"question": HALF, "options": [HALF]}),
        ("no_such_tool", {HALF: HALF}),
    ],
)
def test_half_an_emoji_in_a_tools_argument_spoils_no_later_turn(
    web: cabc.Callable[..., Web], model: ModelServer, tool: str, arguments: dict[str, t.Any]
) -> None:
    w = web()
    model.script(call(tool, arguments), say("so much for that"), say("fine"))
    if w.ask("go")["status"] == "waiting":
        w.answer(w.question("ask_user_requested"), answer="as you like")
    assert w.idle()["data"]["status"] == "completed"
    assert w.ask("and on")["reply"] == "fine"
    assert_encodable(w, model)


def test_names_of_files_that_are_no_text_spoil_no_later_turn(
    web: cabc.Callable[..., Web], model: ModelServer
) -> None:
    w = web()
    folder = os.fsencode(w.workspace())
    for name in (b"\x80", b"\xff.txt"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("needle")
    model.script(
        call("list_directory", {"path": "."}),
        call("glob", {"pattern": "**/*"}),
        call("search_file_content", {"pattern": "needle"}),
        say("seen"),
        say("fine"),
    )
    assert w.ask("look around")["reply"] == "seen"
    assert w.ask("and on")["reply"] == "fine"
    assert_encodable(w, model)


def test_arguments_that_nest_1500_deep_spoil_no_later_turn(
    web: cabc.Callable[..., Web], model: ModelServer
) -> None:
    w = web()
    deep: t.Any = "bottom"
    for _ in range(500):
        deep = [deep]
    arguments = json.dumps({"todos": deep}).replace('"bottom"', "[" * 1000 + "]" * 1000)
    reply = call("todo_write", {})
    delta = t.cast(t.Any, reply.deltas[0])
    delta["tool_calls"][0]["function"]["arguments"] = arguments
    model.script(reply, say("so much for that"), say("fine"))
    assert w.ask("go")["status"] == "completed"
    assert w.ask("and on")["reply"] == "fine"


def test_a_history_of_the_first_version_with_half_an_emoji_goes_on(
    web: cabc.Callable[..., Web], model: ModelServer
) -> None:
    """As it lies in a database that was written before such texts were mended."""
    w = web()
    model.script(say("before"), say("fine"))
    assert w.ask("one")["status"] == "completed"
    house = w.app.extensions["agentao_web"]
    key = SessionKey("acme", "ann", "s")
    store = house.pool.store
    row = TurnRow("t-old", "old", 0, 1.0, "w")
    held = store.claim(key, row, Draft("turn_begin", {"message": "old", "images": 0}), 1.0)
    final = Event(held.opening.seq + 1, "t-old", "done", {}, 2.0)
    old = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": f"half {HALF}"},
    ]
    state = {"skills": [], "todos": [{"content": HALF, "status": "pending"}]}
    outcome = Outcome(State.COMPLETED)
    store.finish(held, Finish([final], outcome, [], old, False, 2.0, state))
    assert w.ask("two")["reply"] == "fine"
    assert_encodable(w, model)


def assert_encodable(w: Web, model: ModelServer) -> None:
    """Nothing that was sent, told or kept of this session has half an emoji in it."""
    for request in model.requests:
        json.dumps(request.body, ensure_ascii=False).encode()
    for path in ("/chat/s/events?wait=0", "/session/s/messages", "/session/s"):
        answer = w.client.get(path, headers=w.headers())
        json.dumps(answer.json, ensure_ascii=False).encode()
