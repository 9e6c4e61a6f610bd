"""Each limit: who runs into it, what the client sees, and that another tenant is not affected."""

from __future__ import annotations

import base64
import collections.abc as cabc
import datetime
import json
import threading
import typing as t
from pathlib import Path

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.core.errors import StoreUnavailable
from agentao_web.extension import pool_of
from agentao_web.testing import Gate
from agentao_web.testing import Step
from agentao_web.testing import emit
from agentao_web.testing import pause
from agentao_web.testing import say as says
from agentao_web.testing import scripted
from agentao_web.testing import use
from tests.model_server import ModelServer
from tests.model_server import call
from tests.model_server import calls
from tests.model_server import cut
from tests.model_server import fail
from tests.model_server import hang
from tests.model_server import length
from tests.model_server import say
from tests.patience import PATIENCE

KEY = "the-limits-test-key"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
JSON = {"Accept": "application/json"}


class Web:
    """An application, its clients, and what it has counted."""

    def __init__(self, folder: Path, agents: t.Any, config: dict[str, t.Any]) -> None:
        self.app = Flask("limits")
        self.app.config.update(
            AGENTAO_ROOT=folder / "root",
            AGENTAO_SECRET_KEYS=KEY,
            **{f"AGENTAO_{name.upper()}": value for name, value in config.items()},
        )
        AgentaoWeb(agents=agents).init_app(self.app)
        self.client = self.app.test_client()
        self.store: t.Any = pool_of(self.app).store

    def post(
        self, message: str, sid: str = "s", *, who: str = "acme/ann", wait: int = 0, **fields: t.Any
    ) -> t.Any:
        more = fields.pop("headers", {})
        headers = self.headers(who) | ({"Prefer": f"wait={wait}"} if wait else {}) | more
        return self.client.post(
            f"/chat/{sid}", json={"message": message, **fields}, headers=headers
        )

    def ask(self, message: str, sid: str = "s", **options: t.Any) -> dict[str, t.Any]:
        answer = self.post(message, sid, wait=PATIENCE, **options)
        assert answer.status_code == 200, answer.text
        return t.cast(dict[str, t.Any], answer.json)

    def get(self, path: str, who: str = "acme/ann") -> t.Any:
        return self.client.get(path, headers=self.headers(who)).json

    def types(self, sid: str = "s") -> list[str]:
        return [event["type"] for event in self.get(f"/chat/{sid}/events?wait=0")["events"]]

    def headers(self, who: str) -> dict[str, str]:
        token = Tokens([KEY]).issue(Principal(*who.split("/")), ttl=600)
        return {"Authorization": f"Bearer {token}"} | JSON

    def spent(self, tenant: str = "acme") -> int:
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        return t.cast(int, self.store.spent(tenant, day))

    def evict(self) -> None:
        pool = pool_of(self.app)
        pool.tick(pool.clock() + 10_000)
        assert pool.counts()["sessions"] == 0


Make = cabc.Callable[..., Web]


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def web(tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Make]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", model.base_url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted")
    made: list[Web] = []

    def make(*, agents: t.Any = None, max_answer: int | None = None, **config: t.Any) -> Web:
        if max_answer is not None:
            monkeypatch.setenv("LLM_MAX_TOKENS", str(max_answer))
        made.append(Web(tmp_path, agents, config))
        return made[-1]

    yield make
    model.release()
    for one in made:
        shutdown(one.app, grace=2)


def assert_refused(answer: t.Any, code: str, limit: str, quota: int) -> int:
    """A 429 that says which limit it is; the seconds to wait."""
    assert answer.status_code == 429, answer.text
    body = answer.json
    assert body["code"] == code
    assert (body["details"]["limit"], body["details"]["quota"]) == (limit, quota)
    wait = int(answer.headers["Retry-After"])
    window = ";w=86400" if limit == "tokens" else ""
    assert answer.headers["RateLimit-Policy"] == f'"{limit}";q={quota}{window}'
    assert answer.headers["RateLimit"] == f'"{limit}";r=0;t={wait}'
    return wait


# -- turns, sessions, queue --------------------------------------------------------------------


def paused(*steps: Step) -> tuple[Gate, t.Any]:
    gate = Gate()
    return gate, scripted(pause(gate), *steps)


def test_running_turns_of_a_worker(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_turns=2)
    assert w.post("a", "1").status_code == 202
    assert w.post("b", "1", who="other/eve").status_code == 202
    assert_refused(w.post("c", "3"), "too_many_turns", "turns", 2)
    gate.open()


def test_running_turns_of_a_tenant(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_turns_per_tenant=2)
    assert w.post("a", "1").status_code == 202
    assert w.post("b", "2", who="acme/bob").status_code == 202
    assert_refused(w.post("c", "3"), "too_many_turns", "tenant_turns", 2)
    assert w.post("d", "1", who="other/ann").status_code == 202
    gate.open()


def test_running_turns_of_a_user(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_turns_per_user=1)
    assert w.post("a", "1").status_code == 202
    assert_refused(w.post("b", "2"), "too_many_turns", "user_turns", 1)
    assert w.get("/sessions")["sessions"][0]["session_id"] == "1", "and nothing was stored"
    assert len(w.get("/sessions")["sessions"]) == 1
    assert w.post("c", "2", who="acme/bob").status_code == 202
    assert w.post("d", "1", who="other/ann").status_code == 202
    gate.open()


def test_a_queued_turn_counts_for_its_user(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_turns_per_user=2)
    for _ in range(2):
        assert w.post("a", on_busy="queue").status_code == 202
    assert_refused(w.post("b", "2"), "too_many_turns", "user_turns", 2)
    gate.open()


def test_a_queue(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_queue=1)
    for _ in range(2):
        assert w.post("a", on_busy="queue").status_code == 202
    assert_refused(w.post("c", on_busy="queue"), "too_many_turns", "queue", 1)
    assert w.post("d", "2").status_code == 202
    gate.open()


def test_sessions_of_a_tenant(web: Make) -> None:
    w = web(agents=scripted(says("hi")), max_sessions_per_tenant=1)
    w.ask("a", "1")
    assert_refused(w.post("b", "2"), "too_many_sessions", "sessions", 1)
    w.ask("c", "1", who="other/ann")


def test_sessions_of_a_worker(web: Make) -> None:
    gate, agents = paused()
    w = web(agents=agents, max_sessions=1)
    assert w.post("a", "1").status_code == 202
    assert_refused(w.post("b", "2"), "too_many_sessions", "sessions", 1)
    gate.open()


# -- tool calls --------------------------------------------------------------------------------


def write(n: int) -> tuple[str, dict[str, t.Any], str]:
    return ("write_file", {"file_path": f"{n}.txt", "content": "x"}, f"call_{n}")


def test_a_tool_call_too_many_does_not_run(web: Make, model: ModelServer, tmp_path: Path) -> None:
    w = web(max_tool_calls=2, policy="trusted")
    model.script(*(call(*write(n)[:2], id=f"call_{n}") for n in range(4)))
    body = w.ask("go")
    assert (body["status"], body["reason"]) == ("incomplete", "tool_limit")
    assert sorted(p.name for p in tmp_path.rglob("?.txt")) == ["0.txt", "1.txt"]
    assert len(model.requests) == 3
    model.script(say("still here"))
    assert w.ask("and now")["reply"] == "still here", "the count is the turn's"


def test_of_a_batch_that_goes_over_nothing_runs(
    web: Make, model: ModelServer, tmp_path: Path
) -> None:
    w = web(max_tool_calls=3, policy="trusted")
    model.script(calls([write(0), write(1)]), calls([write(2), write(3)]))
    body = w.ask("go")
    assert (body["status"], body["reason"]) == ("incomplete", "tool_limit")
    assert sorted(p.name for p in tmp_path.rglob("?.txt")) == ["0.txt", "1.txt"]
    assert len(model.requests) == 2


def test_nobody_is_asked_about_a_batch_that_goes_over(web: Make, model: ModelServer) -> None:
    w = web(max_tool_calls=1, policy="ask")
    model.script(calls([write(0), write(1)]))
    body = w.ask("go")
    assert (body["status"], body["reason"]) == ("incomplete", "tool_limit")
    assert "tool_confirmation" not in w.types()
    assert w.get("/session/s")["questions"] == []


def test_as_many_as_allowed_do_run(web: Make, model: ModelServer, tmp_path: Path) -> None:
    w = web(max_tool_calls=2, policy="trusted")
    model.script(calls([write(0), write(1)]), say("both"))
    assert w.ask("go")["reply"] == "both"
    assert len(list(tmp_path.rglob("?.txt"))) == 2


def test_tool_calls_of_a_hosts_own_agent_are_counted_too(web: Make) -> None:
    w = web(agents=scripted(*[use("look")] * 9), max_tool_calls=3)
    body = w.ask("go")
    assert (body["reason"], body["tool_count"]) == ("tool_limit", 4)


# -- tokens of a turn --------------------------------------------------------------------------


def test_a_turn_that_cannot_afford_the_call_makes_none(web: Make, model: ModelServer) -> None:
    w = web(max_turn_tokens=300)
    body = w.ask("say hi")
    assert (body["status"], body["reason"], body["reply"]) == ("incomplete", "token_limit", "")
    assert model.requests == []


def test_the_model_is_told_what_is_left_of_the_turn(web: Make, model: ModelServer) -> None:
    w = web(max_turn_tokens=12_000, max_answer=50_000)
    model.script(length("half an ans"))
    body = w.ask("go")
    assert (body["status"], body["reason"]) == ("incomplete", "token_limit")
    assert body["reply"] == "half an ans"
    assert 256 <= model.requests[0].body["max_tokens"] < 12_000


def test_an_answer_cut_by_the_models_own_limit_is_not_the_turns(
    web: Make, model: ModelServer
) -> None:
    w = web(max_turn_tokens=100_000, tokens_per_day=1_000_000, max_answer=500)
    model.script(length("half an ans"))
    assert w.ask("go")["reason"] == "length_truncated"
    assert model.requests[0].body["max_tokens"] == 500


def costly(monkeypatch: pytest.MonkeyPatch, prompt: int) -> None:
    """From now on the model's server reports so many tokens a call."""
    usage = {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}
    monkeypatch.setattr("tests.model_server._usage", lambda reply, body: usage)


def test_tokens_of_a_turn_add_up(
    web: Make, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    costly(monkeypatch, 10_000)
    w = web(max_turn_tokens=31_000, max_answer=500, max_steps=50)
    model.script(*(call("list_directory", {"directory_path": f"./{n}"}) for n in range(3)))
    body = w.ask("go")
    assert (body["status"], body["reason"]) == ("incomplete", "token_limit")
    asked = len(model.requests)
    assert asked == 3, "the fourth would have been too much"
    model.script(say("fresh"))
    assert w.ask("again")["reply"] == "fresh", "and the next turn begins at nothing"


def test_no_tool_runs_after_a_call_that_used_too_much(
    web: Make, model: ModelServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    costly(monkeypatch, 40_000)
    w = web(max_turn_tokens=35_000, max_answer=500, policy="trusted")
    model.script(calls([write(0)]))
    assert w.ask("go")["reason"] == "token_limit"
    assert not list(tmp_path.rglob("?.txt"))
    model.script(say("all of it"))
    assert w.ask("more")["status"] == "completed", "an answer that is whole is an answer"


# -- tokens of a day ---------------------------------------------------------------------------


def test_what_a_call_used_is_counted_for_the_tenant(web: Make) -> None:
    w = web(tokens_per_day=1_000_000)
    first = w.ask("say one two")["usage"]
    assert w.spent() == first["prompt_tokens"] + first["completion_tokens"] == 22
    w.ask("say one", "other", who="acme/bob")
    assert w.spent() == 22 + 21
    assert w.spent("other") == 0


def test_without_a_limit_nothing_is_written(web: Make) -> None:
    w = web()
    w.ask("say hi")
    assert w.spent() == 0


def test_nothing_left_is_a_429_and_nothing_is_stored(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=1_000)
    w.store.spend("acme", datetime.datetime.now(datetime.UTC).date().isoformat(), 1_000)
    wait = assert_refused(w.post("say hi"), "budget_exhausted", "tokens", 1_000)
    assert 0 < wait <= 24 * 3600
    assert w.get("/sessions")["sessions"] == []
    assert model.requests == []
    w2 = w.post("say hi", who="other/ann")
    assert w2.status_code == 202, "another tenant has tokens of its own"


def test_a_repeated_message_is_joined_though_nothing_is_left(web: Make) -> None:
    w = web(tokens_per_day=1_000_000)
    key = {"headers": {"Idempotency-Key": "k"}}
    first = w.ask("say hi", **key)
    w.store.spend("acme", datetime.datetime.now(datetime.UTC).date().isoformat(), 1_000_000)
    assert w.ask("say hi", **key)["turn_id"] == first["turn_id"]
    assert w.post("say more", **key).status_code == 409


def test_a_budget_too_small_for_the_prompt_makes_no_call(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=300)
    body = w.ask("say hi")
    assert (body["status"], body["reason"]) == ("incomplete", "budget_exhausted")
    assert model.requests == [] and w.spent() == 0
    assert w.ask("say hi", who="other/ann")["reason"] == "budget_exhausted"


def test_a_budget_that_ends_in_the_middle_keeps_what_was_said(
    web: Make, model: ModelServer
) -> None:
    w = web(tokens_per_day=1_000_000)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    plain = model.reply

    def others_spend(body: dict[str, t.Any]) -> t.Any:
        w.store.spend("acme", day, 1_000_000)
        return plain(body)

    model.reply = others_spend
    body = w.ask("call list_directory {}\nsay never")
    assert (body["status"], body["reason"]) == ("incomplete", "budget_exhausted")
    assert len(model.requests) == 1, "refused, and not tried again"
    types = w.types()
    assert "tool_result" in types and "llm_retry" not in types and types[-1] == "done"
    assert "API error" not in json.dumps(w.get("/session/s/messages"))
    history = w.store.history(pool_of(w.app).sessions()[0].key).messages
    assert "API error" not in json.dumps(history)


def test_the_answer_is_cut_where_the_budget_ends(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=50_000, max_answer=50_000)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    model.script(say("ok"), length("half"))
    w.ask("a")
    assert model.requests[0].body["max_tokens"] == 5_000, "a tenth of the day's at most"
    w.store.spend("acme", day, 50_000 - w.spent() - 6_000)
    body = w.ask("b")
    assert 256 <= model.requests[1].body["max_tokens"] < 5_000
    assert (body["reason"], body["reply"]) == ("budget_exhausted", "half")


@pytest.mark.parametrize("how", ["cancel", "cut"])
def test_a_call_that_is_cut_off_costs_the_estimate(web: Make, model: ModelServer, how: str) -> None:
    w = web(tokens_per_day=1_000_000, max_answer=2_000)
    if how == "cancel":
        model.script(hang())
        w.post("go")
        model.wait_for_request(1)
        assert w.spent() > 2_000, "set aside before it was made"
        w.client.post("/chat/s/cancel", headers=w.headers("acme/ann"))
        page = {"state": "running"}
        while page["state"] != "idle":
            page = w.get("/chat/s/events?wait=1&after=0")
    else:
        model.script(cut("so far"))
        assert w.ask("go")["reason"] == "stream_cut"
    assert w.spent() > 2_000


def test_a_call_the_provider_refused_costs_nothing(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=1_000_000, llm_attempts=1)
    model.script(fail(503))
    assert w.ask("go")["reason"] == "llm_unavailable"
    assert w.spent() == 0


def test_a_provider_that_reports_nothing_is_estimated(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=1_000_000, max_answer=50_000)
    plain = model.next_reply

    def silent(body: dict[str, t.Any]) -> t.Any:
        body.pop("stream_options", None)
        return plain(body)

    model.next_reply = silent  # type: ignore[method-assign]
    assert w.ask("say one two three")["status"] == "completed"
    assert 300 < w.spent() < 40_000, "the prompt and the answer, not all that was set aside"


def test_turns_at_once_never_set_aside_more_than_there_is(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=60_000, max_answer=6_000)
    seen: list[int] = []
    plain = model.reply

    def look(body: dict[str, t.Any]) -> t.Any:
        seen.append(w.spent())
        return plain(body)

    model.reply = look
    bodies: list[t.Any] = []

    def converse(n: int) -> None:
        client = w.app.test_client()
        for _ in range(4):
            answer = client.post(
                f"/chat/s{n}",
                json={"message": "call list_directory {}\nsay done"},
                headers=w.headers(f"acme/u{n}") | {"Prefer": f"wait={PATIENCE}"},
            )
            bodies.append(answer.json)

    threads = [threading.Thread(target=converse, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(bodies) == 24
    assert {b.get("status", b.get("code")) for b in bodies} <= {
        "completed",
        "incomplete",
        "budget_exhausted",
    }
    assert max(seen) <= 60_000 and w.spent() <= 60_000


def test_a_store_that_cannot_count_stops_the_turn(
    web: Make, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = web(tokens_per_day=1_000_000)

    def down(*args: t.Any, **more: t.Any) -> int:
        raise StoreUnavailable

    monkeypatch.setattr(w.store, "reserve", down)
    body = w.ask("say hi")
    assert (body["status"], body["error"]["code"]) == ("failed", "store_unavailable")
    assert model.requests == []


def test_a_tenant_has_the_tokens_of_its_own_rules(web: Make, tmp_path: Path) -> None:
    rules = tmp_path / "tenants.toml"
    rules.write_text("[tenants.small]\ntokens_per_day = 0\n")
    w = web(tenants=rules, tokens_per_day=1_000_000)
    assert_refused(w.post("say hi", who="small/ann"), "budget_exhausted", "tokens", 0)
    assert w.ask("say hi", who="big/ann")["reply"] == "hi"


def test_tokens_of_a_hosts_own_agent_are_counted_after_each_call(web: Make) -> None:
    def model_call(used: int) -> list[Step]:
        after = emit("llm_call_completed", prompt_tokens=used, completion_tokens=0)
        return [emit("llm_call_started"), says("x"), after]

    w = web(agents=scripted(*model_call(600), *model_call(600), says("never")), tokens_per_day=500)
    body = w.ask("go")
    assert (body["reason"], body["reply"]) == ("budget_exhausted", "x")
    assert_refused(w.post("again"), "budget_exhausted", "tokens", 500)
    assert w.spent() >= 600


@pytest.mark.parametrize("reported", [-600, True, 2**70, "600", None])
def test_what_is_no_number_of_tokens_is_not_counted(web: Make, reported: t.Any) -> None:
    """A provider that reports less than nothing would fill a budget up again."""
    calls = [emit("llm_call_started"), says("x")]
    odd = emit("llm_call_completed", prompt_tokens=reported, completion_tokens=20)
    w = web(agents=scripted(*calls, odd), tokens_per_day=500)
    assert w.ask("go")["status"] == "completed"
    assert w.spent() == 20


def test_a_demo_has_limits_too(web: Make) -> None:
    w = web(demo=True, tokens_per_day=1_000_000)
    w.ask("say hi")
    assert w.spent() > 0


# -- images ------------------------------------------------------------------------------------


def image(data: bytes = PNG, kind: str = "image/png") -> dict[str, str]:
    return {"data": base64.b64encode(data).decode(), "mimeType": kind}


def seen(request: t.Any) -> list[str]:
    """The pictures in what the model was sent."""
    contents = [m["content"] for m in request.body["messages"] if isinstance(m["content"], list)]
    parts = [part for content in contents for part in content]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def test_images_reach_the_model_and_stay_in_the_conversation(web: Make, model: ModelServer) -> None:
    w = web()
    assert w.ask("say nice", images=[image(), image(PNG + b"2")])["reply"] == "nice"
    first = [f"data:image/png;base64,{image(d)['data']}" for d in (PNG, PNG + b"2")]
    assert seen(model.requests[0]) == first
    begin = w.get("/chat/s/events?wait=0")["events"][0]
    assert begin["data"]["images"] == 2
    assert w.get("/session/s/messages")["messages"][0]["images"] == 2
    w.ask("say next")
    assert seen(model.requests[1]) == first
    w.evict()
    w.ask("say restored")
    assert seen(model.requests[2]) == first
    everything = json.dumps([w.get("/session/s/messages"), w.get("/chat/s/events?wait=0")])
    assert first[0] not in everything, "what people see has the number only"


def test_images_a_model_does_not_take_are_left_out_for_good(web: Make, model: ModelServer) -> None:
    w = web(llm_attempts=1)
    refusal = json.dumps({"error": {"message": "this model does not support image input"}})
    model.script(fail(400, refusal), say("I see none"))
    assert w.ask("look", images=[image()])["reply"] == "I see none"
    assert seen(model.requests[0]) and not seen(model.requests[1])
    w.evict()
    w.ask("say later")
    assert not seen(model.requests[2])


def test_an_image_weighs_on_the_budget(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=1_000_000, max_answer=1_000)
    set_aside: list[int] = []
    plain = model.reply

    def look(body: dict[str, t.Any]) -> t.Any:
        set_aside.append(w.spent())
        return plain(body)

    model.reply = look
    w.ask("say x", "plain")
    before = w.spent()
    w.ask("say x", "image", images=[image()])
    assert set_aside[1] - before >= set_aside[0] + 2_000


@pytest.mark.parametrize(
    "kind, data",
    [
        ("image/png", PNG),
        ("image/jpeg", b"\xff\xd8\xff\xe0" + b"x" * 20),
        ("image/gif", b"GIF89a" + b"x" * 20),
        ("image/webp", b"RIFF\x10\x00\x00\x00WEBPVP8 "),
    ],
)
def test_each_kind_of_image_is_what_it_says(web: Make, kind: str, data: bytes) -> None:
    w = web(agents=scripted(says("ok")))
    assert w.ask("look", images=[image(data, kind)])["status"] == "completed"
    others = {"image/png", "image/jpeg", "image/gif", "image/webp"} - {kind}
    for other in others:
        refused = w.post("look", images=[image(data, other)])
        assert (refused.status_code, refused.json["details"]["field"]) == (400, "images[0]")


@pytest.mark.parametrize(
    "sent, field",
    [
        ({"data": "%%%%", "mimeType": "image/png"}, "images[1]"),
        ({"data": 7, "mimeType": "image/png"}, "images[1]"),
        ({"data": "AAAA", "mimeType": "image/svg+xml"}, "images[1]"),
        ({"data": "AAAA", "mimeType": "text/html"}, "images[1]"),
        ({"data": "AAAA"}, "images[1]"),
        (image(b"RIFF\x10\x00\x00\x00WAVEfmt ", "image/webp"), "images[1]"),
        (image(b"<svg onload=alert(1)>"), "images[1]"),
    ],
)
def test_what_is_no_image_is_refused_and_named(
    web: Make, sent: dict[str, t.Any], field: str
) -> None:
    w = web(agents=scripted(says("ok")))
    refused = w.post("look", images=[image(), sent])
    assert (refused.status_code, refused.json["code"]) == (400, "invalid_request")
    assert refused.json["details"]["field"] == field
    assert w.get("/sessions")["sessions"] == []


def test_an_image_too_large_and_images_too_many(web: Make) -> None:
    w = web(agents=scripted(says("ok")), max_image=len(PNG), max_images=2)
    assert w.ask("look", images=[image(), image()])["status"] == "completed"
    large = w.post("look", images=[image(), image(PNG + b"x")])
    assert (large.status_code, large.json["code"]) == (413, "payload_too_large")
    assert large.json["details"] == {
        "field": "images[1]",
        "bytes": len(PNG) + 1,
        "limit": len(PNG),
    }
    many = w.post("look", images=[image()] * 3)
    assert (many.status_code, many.json["details"]["count"]) == (413, 3)


def test_the_summary_of_old_messages_is_counted(web: Make, model: ModelServer) -> None:
    w = web(tokens_per_day=10_000_000)
    model.reply = lambda body: say("word " * 2_000)
    for _ in range(8):
        w.ask("go on")
    agent: t.Any = pool_of(w.app).sessions()[0].agent
    # As if the model took little: what was said is summed up before the next answer.
    context = agent._agent.context_manager
    context.max_tokens = 15_000
    context.invalidate_token_anchor()
    seen_before, asked = w.spent(), len(model.requests)
    w.ask("go on")
    summary, answer = model.requests[asked:]
    assert not summary.body.get("stream") and answer.body["stream"]
    used = sum(10 * len(r.body["messages"]) + 1 for r in (summary, answer))
    assert w.spent() - seen_before == used
