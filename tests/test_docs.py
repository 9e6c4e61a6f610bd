"""What the docs say is so: tables from code, names that exist, examples and commands that run."""

from __future__ import annotations

import collections.abc as cabc
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
import typing as t
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from flask import Flask
from werkzeug.test import Client

import agentao_web
from agentao_web import Principal
from agentao_web import config
from agentao_web import metrics
from agentao_web import shutdown
from agentao_web import testing
from agentao_web import workers
from agentao_web.cli import main
from agentao_web.core.errors import FAILURES
from agentao_web.wire import openapi
from docs import build
from docs import record
from tests.live.harness import Server

PROJECT = Path(__file__).parent.parent
PAGES = [
    PROJECT / "README.md",
    PROJECT / "CHANGES.md",
    *sorted(build.HERE.glob("*.md")),
    *sorted(PROJECT.glob("examples/*/README.md")),
]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
#: In an error message that the docs show.
SLIPS = {"AGENTAO_MAXTURNS"}

WAIT = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}

_BLOCK = re.compile(r"(?:<!-- ([\w: -]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(t.NamedTuple):
    """A fenced block, and the comment just before it."""

    page: str
    marker: str
    language: str
    text: str


BLOCKS = [
    Block(page.relative_to(PROJECT).as_posix(), *found.groups(default=""))
    for page in PAGES
    for found in _BLOCK.finditer(page.read_text("utf-8"))
]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def run(name: str) -> dict[str, t.Any]:
    """The names of the block marked ``run: name``, after running it."""
    (block,) = (block for block in BLOCKS if block.marker == f"run: {name}")
    names: dict[str, t.Any] = {"__name__": "shop"}
    exec(compile(block.text, f"{block.page}: {name}", "exec"), names)
    return names


@pytest.fixture
def ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[cabc.Callable[[Flask], Flask]]:
    """An empty folder to be in, and a list of applications to shut down after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    apps: list[Flask] = []

    def remember(app: Flask) -> Flask:
        apps.append(app)
        return app

    yield remember
    for app in apps:
        shutdown(app, grace=2)


# -- the words ---------------------------------------------------------------------------------


def test_no_table_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_shown() -> None:
    for name in build.TABLES:
        assert f"<!-- table: {name} -->" in TEXT


def test_every_setting_the_docs_name_is_one() -> None:
    named = set(re.findall(r"\b(AGENTAO_[A-Z_]*[A-Z])(?![A-Z_…])", TEXT))
    assert named - SLIPS - {config.CLIENT_TOKEN} == {name for name, _, _ in config.table()}


def test_the_slip_is_caught_in_the_words_shown() -> None:
    with pytest.raises(RuntimeError) as caught:
        config.Settings.from_mapping({"AGENTAO_MAXTURNS": 3})
    assert f"\n{caught.value}\n" in TEXT


def test_every_public_name_is_in_the_docs() -> None:
    steps = [
        name
        for name, function in inspect.getmembers(testing, inspect.isfunction)
        if function.__module__ == testing.__name__ and not name.startswith("_")
    ]
    for name in [*agentao_web.__all__, *steps, "Gate", "Scripted", "ScriptedAgent"]:
        assert re.search(rf"\b{name}\b", TEXT), name


def test_every_page_is_in_the_index() -> None:
    index = (build.HERE / "README.md").read_text("utf-8")
    readme = (PROJECT / "README.md").read_text("utf-8")
    for page in build.HERE.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
        assert f"(docs/{page.name})" in readme, page.name


def test_links_resolve() -> None:
    for page in PAGES:
        for link in _LINK.findall(page.read_text("utf-8")):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / path) if path else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_page_names_a_place_of_this_machine() -> None:
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|root|home)/\S*", TEXT)


def test_the_readme_is_short_and_has_room_for_the_numbers() -> None:
    text = (PROJECT / "README.md").read_text("utf-8")
    before, _, after = text.partition("<!-- numbers -->\n")
    numbers, marker, rest = after.partition("<!-- /numbers -->")
    assert marker, "the markers of the numbers are gone"
    assert len((before + rest).splitlines()) <= 150


# -- the examples ------------------------------------------------------------------------------


def test_there_is_an_example_of_every_event_and_ending() -> None:
    events = build.recorded()["events"].values()
    assert {event["type"] for event in events} == set(openapi.EVENT_TYPES)
    fields = build.sample()
    for event in events:
        data, beside = fields[event["type"]]
        # An agent says what it knows, so something may be missing; nothing is made up.
        assert set(event["data"]) <= set(data), event["type"]
        assert set(event) - {"seq", "turn_id", "type", "data", "ts"} == set(beside)
    ends = {event["data"]["status"] for event in events if event["type"] in ("done", "error")}
    assert ends == {"completed", "incomplete", "cancelled", "timed_out", "failed"}
    codes = {event["error"]["code"] for event in events if event["type"] == "error"}
    assert codes == set(FAILURES)


@pytest.mark.live
def test_what_the_protocol_page_shows_is_what_a_run_gives(tmp_path: Path) -> None:
    """Written anew by python -m docs.record, then python -m docs.build."""
    assert record.shape(record.run(tmp_path)) == record.shape(build.recorded())


def test_json_is_json() -> None:
    for block in blocks("json"):
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}")
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.page, "exec")


def test_the_whole_app_of_the_readme(ended: cabc.Callable[[Flask], Flask]) -> None:
    app = ended(run("app")["app"])
    client = app.test_client()
    assert client.get("/agent/session/a").status_code == 401
    shown = client.get("/login", follow_redirects=True)
    assert shown.request.path == "/agent/" and shown.mimetype == "text/html"
    body = {"message": "say hi"}
    assert client.post("/agent/chat/a", json=body).status_code == 403
    answer = client.post("/agent/chat/a", json=body, headers=WAIT)
    assert answer.json is not None and answer.json["reply"] == "hi"
    body = {"message": 'use stock {"item": "tea"}'}
    answer = client.post("/agent/chat/a", json=body, headers=WAIT)
    assert (
        answer.json is not None and '{"item":"tea","left":7,"told":"ann"}' in answer.json["reply"]
    )


def test_the_factory(ended: cabc.Callable[[Flask], Flask], tmp_path: Path) -> None:
    create_app = run("factory")["create_app"]
    roots = [tmp_path / "one", tmp_path / "two"]
    apps = [ended(create_app(AGENTAO_DEMO=True, AGENTAO_ROOT=root)) for root in roots]
    headers = {**WAIT, "X-User": "ann"}
    answer = apps[0].test_client().post("/agent/chat/a", json={"message": "help"}, headers=headers)
    assert answer.status_code == 200
    assert apps[1].test_client().get("/agent/session/a", headers=headers).status_code == 404


def test_the_rules() -> None:
    rules_for = run("rules")["rules_for"]
    told = {
        user: rules_for(Principal("shop", user), agentao_web.Rules()).policy
        for user in ("admin", "ann")
    }
    assert told == {"admin": "trusted", "ann": "ask"}


def test_the_rules_per_tenant(tmp_path: Path) -> None:
    (block,) = blocks("toml")
    file = tmp_path / "tenants.toml"
    file.write_text(block.text)
    rules = config.rules_per_tenant(config.Settings(tenants=file))
    assert (rules("acme").policy, rules("acme").tokens_per_day) == ("ask", 1000000)
    assert rules("globex").policy == "read-only"


def test_the_adapter_of_verify_token(ended: cabc.Callable[[Flask], Flask]) -> None:
    app = ended(Flask("template"))
    app.config.update(AGENTAO_DEMO=True)
    agentao_web.AgentaoWeb(authenticate=run("verify")["authenticate"]).init_app(app)
    codes = [
        app.test_client().get("/session/a", headers=headers).status_code
        for headers in ({"Authorization": "Bearer dev"}, {"Authorization": "Bearer x"}, {})
    ]
    assert codes == [404, 401, 401]


def test_two_apps(ended: cabc.Callable[[Flask], Flask]) -> None:
    names = run("two")
    both = names["app"]
    for app in (both.app, *both.mounts.values()):
        ended(app)
    client = Client(both)
    answer = client.post("/office/chat/a", json={"message": "say hi"}, headers=WAIT)
    assert answer.json is not None and answer.json["reply"] == "hi"
    assert client.get("/session/a").status_code == 404


def test_agents_of_your_own(ended: cabc.Callable[[Flask], Flask]) -> None:
    client = ended(run("agents")["app"]).test_client()
    for message, reply in (("say hi", "hi"), ("what did I say", 'Just before this you said "say')):
        answer = client.post("/chat/a", json={"message": message}, headers=WAIT)
        assert answer.json is not None and answer.json["reply"].startswith(reply)


def test_a_runtime_of_your_own(ended: cabc.Callable[[Flask], Flask]) -> None:
    client = ended(run("runtime")["app"]).test_client()
    answer = client.post("/chat/a", json={"message": "hello you"}, headers=WAIT)
    assert answer.json is not None and answer.json["reply"] == "hello you"
    waiting = client.post("/chat/a", json={"message": "hello!"}, headers=WAIT).json
    assert waiting is not None and waiting["questions"][0]["tool"] == "shout"
    body = {"question_id": waiting["questions"][0]["question_id"], "approve": True}
    assert client.post("/chat/a/answer", json=body, headers=WAIT).status_code == 200
    page: t.Any = {"cursor": waiting["cursor"], "events": []}
    while not any(event["type"] == "done" for event in page["events"]):
        page = client.get(f"/chat/a/events?after={page['cursor']}&wait=20").json
        assert page["events"], "the turn does not end"
    assert page["events"][-1]["reply"] == "HELLO!"
    assert len(client.get("/session/a/messages").json["messages"]) >= 4  # type: ignore[index]


def test_a_store_of_your_own(
    ended: cabc.Callable[[Flask], Flask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run("store")
    finish, told = names["Billed"].finish, []

    def heard(*args: t.Any) -> bool:
        told.append(finish(*args))
        return bool(told[-1])

    monkeypatch.setattr(names["Billed"], "finish", heard)
    steps = (testing.emit("llm_call_completed", prompt_tokens=7), testing.say("hi"))
    for _ in range(2):
        app = ended(names["create_app"](testing.scripted(*steps), AGENTAO_ROOT=tmp_path / "root"))
        answer = app.test_client().post("/chat/a", json={"message": "x"}, headers=WAIT)
        assert answer.status_code == 200
    assert names["BILL"] == [("shop", {"prompt_tokens": 7})] * 2
    assert told == [False] * 2, "nobody else waits"
    snapshot = app.test_client().get("/session/a").json
    assert snapshot is not None and snapshot["turns"] == 2, "it was kept"


def test_a_wire_of_your_own(ended: cabc.Callable[[Flask], Flask]) -> None:
    client = ended(run("wire")["app"]).test_client()
    ((_, _, _, _, accept, *_),) = curls("docs/extend.md")
    headers = {**WAIT, "Accept": accept.partition(": ")[2]}
    answer = client.post("/chat/a", json={"message": "count to 3"}, headers=headers)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert answer.headers["X-Accel-Buffering"] == "no"
    events = [json.loads(line) for line in answer.text.splitlines() if line]
    assert events[0]["type"] == "turn_begin" and events[-1]["reply"] == "1, 2, 3."
    read = client.get(f"/chat/a/events?after={events[0]['seq']}", headers=headers)
    told = [json.loads(line) for line in read.text.splitlines() if line]
    assert told[-1] == events[-1]
    for accept, kind in (
        ("application/x-ndjson;q=0.1, application/json", "application/json"),
        ("text/event-stream, application/x-ndjson;q=0.9", "text/event-stream"),
        ("application/x-ndjson, */*", "application/x-ndjson"),
        ("application/*", "application/json"),
    ):
        headers = {**WAIT, "Accept": accept}
        again = client.post("/chat/a", json={"message": "say hi"}, headers=headers)
        assert again.mimetype == kind, accept
        assert again.status_code == 200 and again.text
    refused = {**WAIT, "Accept": "application/x-ndjson;q=0"}
    assert client.get("/chat/a/events?wait=0", headers=refused).status_code == 406


def test_the_tests_of_a_host(tmp_path: Path) -> None:
    tests = {name: test for name, test in run("tests").items() if name.startswith("test_")}
    assert len(tests) == 2
    for name, test in tests.items():
        test(tmp_path / name)


def test_tools_and_their_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: cabc.Callable[[Flask], Flask]
) -> None:
    shop = types.ModuleType("shop")
    vars(shop).update(run("tools"))
    monkeypatch.setitem(sys.modules, "shop", shop)
    tests = run("tool-tests")
    tests["test_an_order_is_cancelled"](tmp_path / "test")
    client = ended(shop.create_app(AGENTAO_DEMO=True)).test_client()
    for number, told in ((7, '"state":"cancelled"'), (8, "no such order"), (0, "number: ")):
        body = {"message": f'use order_state {{"number": {number}}}'}
        answer = client.post("/agent/chat/a", json=body, headers=WAIT)
        assert answer.json is not None and told in answer.json["reply"]


def test_the_gunicorn_config_is_ours() -> None:
    for name, value in run("gunicorn").items():
        if not name.startswith("__"):
            assert value == getattr(workers, name), name


# -- the commands ------------------------------------------------------------------------------


def curls(page: str) -> list[list[str]]:
    texts = [block.text for block in blocks("sh") if block.page == page]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("curl ")]


def test_every_command_of_the_storage_page_works(
    ended: cabc.Callable[[Flask], Flask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    settings = {"AGENTAO_ROOT": str(root), "AGENTAO_SECRET_KEYS": "a-long-and-random-text"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def serve() -> Flask:
        app = ended(Flask("server"))
        app.config.update(settings)
        agents = testing.scripted(testing.say("hello"))
        ann = agentao_web.Principal("acme", "ann")
        agentao_web.AgentaoWeb(authenticate=lambda request: ann, agents=agents).init_app(app)
        return app

    app = serve()
    for sid in ("chat-1", "chat-2"):
        answer = app.test_client().post(f"/chat/{sid}", json={"message": "hi"}, headers=WAIT)
        assert answer.status_code == 200
    text = "".join(block.text for block in blocks("sh") if block.page == "docs/storage.md")
    commands = [line for line in text.splitlines() if not line.startswith(("export", "gunicorn"))]
    for command in commands:
        if command.startswith("agentao-web "):
            words = shlex.split(command.partition(" > ")[0])[1:]
            done = CliRunner().invoke(main, words, catch_exceptions=False)
            assert done.exit_code == 0, (command, done.output)
        else:
            shutdown(app, grace=2)  # "stop every worker, then"
            subprocess.run(command, shell=True, check=True)
    assert len(commands) == 12
    again = serve().test_client()
    assert again.get("/session/chat-1", headers=WAIT).status_code == 200
    assert again.get("/session/chat-2", headers=WAIT).status_code == 404


def test_the_refusal_of_the_limits_page(ended: cabc.Callable[[Flask], Flask]) -> None:
    page = {block.language: block.text for block in BLOCKS if block.page == "docs/limits.md"}
    gate = testing.Gate()
    app = ended(Flask("limits"))
    app.config.update(AGENTAO_MAX_TURNS_PER_TENANT=8)
    agentao_web.AgentaoWeb(
        authenticate=lambda request: agentao_web.Principal("acme"),
        agents=testing.scripted(testing.pause(gate)),
    ).init_app(app)
    headers = {k: v for k, v in WAIT.items() if k != "Prefer"}
    for n in range(9):
        answer = app.test_client().post(f"/chat/{n}", json={"message": "hi"}, headers=headers)
    gate.open()
    head, _, body = page["http"].partition("\n\n")
    status, *shown = head.splitlines()
    assert status == f"HTTP/1.1 {answer.status}" and json.loads(body) == answer.json
    assert {line.partition(": ")[2] for line in shown} <= set(answer.headers.values())
    assert page["sh"].startswith("agentao-web budget --tenant acme")


def test_every_metric_the_docs_name_is_one() -> None:
    page = (build.HERE / "observe.md").read_text("utf-8")
    named = set(re.findall(r"`(agentao_[a-z_]+)", page))
    loggers = {"agentao_web"}
    assert named - loggers == set(metrics.METRICS)


def test_the_scrape_config_and_the_curl_beside_it(
    ended: cabc.Callable[[Flask], Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("yaml")
    (job,) = yaml.safe_load(block.text)["scrape_configs"]
    assert set(job["authorization"]) == {"credentials_file"}
    app = ended(Flask("observe"))
    app.config.update(AGENTAO_DEMO=True, AGENTAO_METRICS_TOKEN="a-token-of-the-test")
    agentao_web.AgentaoWeb().init_app(app)
    ((_, option, header, url),) = curls("docs/observe.md")
    assert (option, url) == ("-H", f"http://{job['static_configs'][0]['targets'][0]}/metrics")
    name, _, word = header.partition(": ")
    headers = {name: word.replace("$AGENTAO_METRICS_TOKEN", "a-token-of-the-test")}
    answer = app.test_client().get(job["metrics_path"], headers=headers)
    assert answer.status_code == 200 and "agentao_workers 1.0" in answer.text


@pytest.mark.live
def test_every_curl_of_the_readme_answers(tmp_path: Path) -> None:
    curl = shutil.which("curl")
    assert curl, "this test needs curl"
    commands = curls("README.md")
    assert len(commands) >= 4
    answers: list[str] = []
    with Server(tmp_path, AGENTAO_DEMO="1") as server:
        for _, *words in commands:
            words = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
            options = ["-sS", "--noproxy", "*", "--max-time", "30", "-w", "\n%{http_code}"]
            done = subprocess.run([curl, *options, *words], capture_output=True, text=True)
            body, _, status = done.stdout.rpartition("\n")
            assert done.returncode == 0 and int(status) < 400, (words, done.stdout, done.stderr)
            answers.append(body)
    shown = (PROJECT / "README.md").read_text("utf-8")
    for event in streamed(answers[0]):
        assert f'"type":"{event["type"]}"' in shown or event["type"] == "usage"
    assert streamed(answers[0])[-1]["reply"] == "1, 2, 3."
    assert json.loads(answers[1])["reply"] == "the report is done"


def streamed(body: str) -> list[dict[str, t.Any]]:
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
