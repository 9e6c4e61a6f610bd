"""MCP servers are the operator's: who gets which, what they see, what they may cost, their end."""

from __future__ import annotations

import collections.abc as cabc
import http.server
import json
import logging
import os
import signal
import sys
import threading
import time
import typing as t
from pathlib import Path

import pytest
from agentao.cancellation import CancellationToken

from agentao_web.agents import servers as servers_room
from agentao_web.agents.build import close_agent
from agentao_web.agents.mcp import read_servers
from agentao_web.agents.servers import MAX_RESULT
from agentao_web.agents.servers import Servers
from agentao_web.config import Settings
from tests import mcp_server
from tests.agents.scripted_llm import ScriptedLLM
from tests.agents.scripted_llm import call
from tests.agents.scripted_llm import say
from tests.agents.test_build import Asked
from tests.agents.test_build import make
from tests.live.harness import Server as Gunicorn
from tests.live.harness import model_env
from tests.model_server import ModelServer
from tests.security.house import PATIENCE
from tests.security.house import House
from tests.security.house import alive
from tests.security.house import model_here
from tests.security.house import pids
from tests.security.house import tenants
from tests.security.house import until

LOG = logging.getLogger("tests.mcp")


def entry(*words: str, **more: t.Any) -> dict[str, t.Any]:
    """A server of the tests' own, in the words of the operator's file."""
    args = ["-I", "-S", str(mcp_server.PATH), *words]
    return {"command": sys.executable, "args": args, **more}


def write(folder: Path, **entries: t.Any) -> Path:
    path = folder / "mcp.json"
    path.write_text(json.dumps({"mcpServers": entries}))
    return path


@pytest.fixture
def house(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[cabc.Callable[..., House]]:
    """Makes a house whose MCP servers are those given; policy ``trusted`` unless told."""
    made: list[House] = []
    with model_here(monkeypatch) as model:

        def build(entries: dict[str, t.Any], **config: t.Any) -> House:
            given = {"policy": "trusted", "mcp": write(tmp_path, **entries), **config}
            made.append(House(tmp_path, model, **given))
            return made[-1]

        yield build
        for one in made:
            one.close()


# -- who gets which --------------------------------------------------------------------------------


def test_a_tenant_has_the_servers_it_is_given(
    house: cabc.Callable[..., House], tmp_path: Path
) -> None:
    rules = tenants(
        tmp_path,
        '[default]\nmcp = []\n[tenants.acme]\nmcp = ["one"]\n'
        '[tenants.beta]\nmcp = ["two", "no-such"]\n[tenants.gamma]\nmcp = ["*"]\n',
    )
    one, two = entry("one", "first"), entry("one", "second")
    here = house({"one": one, "two": two}, tenants=rules)
    given = {"acme/ann": {"mcp_one_first"}, "beta/bob": {"mcp_two_second"}, "delta/dan": set()}
    given["gamma/gus"] = {"mcp_one_first", "mcp_two_second"}
    for who, names in given.items():
        here.ask("say hi", who)
        assert {name for name in here.tools if name.startswith("mcp_")} == names
    assert "not found" in here.call("mcp_two_second", "acme/ann").lower()


def test_nobody_has_any_without_the_setting(tmp_path: Path, monkeypatch: t.Any) -> None:
    with model_here(monkeypatch) as model, House(tmp_path, model, policy="trusted") as here:
        marker = here.workspace() / "RAN"
        for folder in (here.workspace() / ".agentao", tmp_path / "home" / ".agentao"):
            folder.mkdir(parents=True)
            planted = {"m": {"command": "touch", "args": [str(marker)]}}
            (folder / "mcp.json").write_text(json.dumps({"mcpServers": planted}))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        here.ask("say hi")
        assert not any(name.startswith("mcp") for name in here.tools)
        assert not marker.exists()


def test_each_session_has_processes_of_its_own(house: cabc.Callable[..., House]) -> None:
    here = house({"t": entry()})
    whose = [("acme/ann", "s"), ("acme/ann", "s2"), ("acme/bob", "s"), ("beta/ann", "s")]
    found = {here.call("mcp_t_where", who, sid) for who, sid in whose}
    assert len(found) == len(whose)
    assert here.call("mcp_t_where", *whose[0]) in found, "and keeps it from turn to turn"


def test_only_tools_come_from_a_server(house: cabc.Callable[..., House]) -> None:
    """It offers resources and prompts, and instructions of its own: none of it is heard."""
    here = house({"t": entry()})
    here.ask("say hi")
    theirs = {name for name in here.tools if name.startswith("mcp_")}
    assert theirs == {f"mcp_t_{tool['name']}" for tool in mcp_server.TOOLS}
    assert not {"read_mcp_resource", "read_skill_file", "list_mcp_resources"} & here.tools
    assert "PLANTED" not in here.sent


def test_of_two_tools_with_one_name_the_first_stays(
    house: cabc.Callable[..., House], caplog: pytest.LogCaptureFixture
) -> None:
    here = house({"a_b": entry("one", "c"), "a": entry("one", "b_c"), "x": entry("one", "y-z")})
    assert here.call("mcp_a_b_c", text="hi") == "c: hi"
    assert sorted(name for name in here.tools if name.startswith("mcp")) == [
        "mcp_a_b_c",
        "mcp_x_y_z",
    ]
    assert "mcp_a_b_c is taken" in caplog.text


# The oldest mcp that is allowed leaves two of its own streams to the garbage collector.
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
@pytest.mark.parametrize("transport", ["http", "sse"])
def test_no_log_line_has_a_key_or_a_line_of_a_servers_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    caplog.set_level(logging.DEBUG)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/mcp?key=${{KEY}}"
        file = write(tmp_path, x={"type": transport, "url": url})
        known = read_servers(file, {"KEY": "the-operators-own-key"}, call_timeout=5)
        servers = Servers(known.values())
        try:
            servers.equip(make(tmp_path / "ws", ScriptedLLM()), "ask", CancellationToken(), LOG)
        finally:
            servers.close()
            servers.wait_gone(time.monotonic() + PATIENCE)
            server.shutdown()
    ours = [r.getMessage() for r in caplog.records if r.name == LOG.name]
    assert len(ours) == 1 and ours[0].startswith("MCP server x is not there: ")
    assert "\n" not in ours[0]
    assert "the-operators-own-key" not in caplog.text


# -- what a server sees ----------------------------------------------------------------------------


def test_a_server_sees_none_of_our_secrets(
    house: cabc.Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AGENTAO_SECRET_KEYS", "AGENTAO_DATABASE_URL", "FLASK_SECRET", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, "our-own-secret")
    monkeypatch.setenv("SHOP_KEY", "the-key-of-the-shop")
    # agentao's own switch to hand everything down.
    monkeypatch.setenv("AGENTAO_SCRUB_CHILD_ENV", "0")
    here = house({"t": entry(env={"KEY": "${SHOP_KEY}", "MODE": "test"})})
    seen = json.loads(here.call("mcp_t_environment"))
    assert set(seen) <= {
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TERM",
    } | {*("TMPDIR", "TZ", "USER", "KEY", "MODE")}
    assert seen["MODE"] == "test"
    assert seen["KEY"] == "…", "it has the key, and may not show it"
    shown = json.dumps([here.events(), [request.body for request in here.model.requests]])
    assert "the-key-of-the-shop" not in shown and "our-own-secret" not in shown


def test_a_server_works_in_no_workspace(house: cabc.Callable[..., House], tmp_path: Path) -> None:
    here = house({"t": entry(), "own": entry(cwd=str(tmp_path))})
    assert here.call("mcp_t_where").split()[0] == "/"
    assert here.call("mcp_own_where").split()[0] == str(tmp_path)


def test_no_path_of_the_server_is_told(house: cabc.Callable[..., House], tmp_path: Path) -> None:
    here = house({"gone": {"command": str(tmp_path / "no-such")}, "t": entry()})
    here.call("mcp_t_die")
    here.call("mcp_t_fail", text="oops")
    here.ask("say hi")
    shown = json.dumps([here.events(), here.sent])
    assert str(tmp_path) not in shown and str(mcp_server.PATH.parent) not in shown
    assert sys.executable not in shown


# -- what is asked ---------------------------------------------------------------------------------

RUNS, ASKS, DENIED = "runs", "asks", "denied"
BELIEVED = {
    "": {"look": ASKS, "liar": ASKS, "destroy": ASKS, "echo": ASKS},
    "trust_read_only": {"look": RUNS, "liar": ASKS, "destroy": ASKS, "echo": ASKS},
    "trust": {"look": RUNS, "liar": ASKS, "destroy": ASKS, "echo": RUNS},
}


@pytest.mark.parametrize("believed", BELIEVED)
@pytest.mark.parametrize("policy", ["read-only", "ask", "trusted"])
def test_a_tool_asks_unless_it_is_trusted(tmp_path: Path, policy: str, believed: str) -> None:
    given = {believed: True} if believed else {}
    known = read_servers(write(tmp_path, t=entry(**given)), os.environ, call_timeout=PATIENCE)
    (tmp_path / "ws").mkdir()
    servers = Servers(known.values())
    happened = {}
    try:
        for tool in ("look", "liar", "destroy", "echo"):
            no = Asked(False)
            llm = ScriptedLLM(call(f"mcp_t_{tool}", text="hi"), say("done"))
            agent = make(tmp_path / "ws", llm, transport=no, policy=policy)
            servers._equipped = False
            servers.equip(agent, policy, CancellationToken(), LOG)
            agent.chat("go")
            happened[tool] = (
                ASKS if no.questions else RUNS if llm.results == [f"{tool}: hi"] else DENIED
            )
            close_agent(agent)
    finally:
        servers.close()
        servers.wait_gone(time.monotonic() + PATIENCE)
    expected = dict(BELIEVED[believed])
    if policy == "trusted":
        expected = dict.fromkeys(expected, RUNS)
    if policy == "read-only":
        # What the server says of itself counts only if the operator believes it.
        expected = {
            tool: RUNS if tool == "look" and what == RUNS else DENIED
            for tool, what in expected.items()
        }
    assert happened == expected


# -- what it may cost ------------------------------------------------------------------------------


def test_a_result_is_bounded(house: cabc.Callable[..., House]) -> None:
    here = house({"t": entry()})
    told = here.call("mcp_t_big", text=str(10 * MAX_RESULT))
    assert len(told) < MAX_RESULT
    assert len(json.dumps(here.events())) < MAX_RESULT


def test_a_missing_server_costs_its_session_nothing_but_its_tools(
    house: cabc.Callable[..., House],
) -> None:
    here = house({"gone": {"command": "no-such-program"}, "t": entry()})
    assert here.call("mcp_t_echo", text="hi") == "echo: hi"
    prompt = here.model.requests[-1].body["messages"][0]["content"]
    assert prompt.endswith("Not available in this session, as they could not be started: gone.")


def test_so_does_one_elsewhere_that_cannot_be_reached(
    house: cabc.Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "the-key-of-the-far-one")
    far = {"url": "http://127.0.0.1:1/mcp?key=${FAR_KEY}", "headers": {"X-Key": "${FAR_KEY}"}}
    here = house({"far": far, "t": entry()})
    assert here.call("mcp_t_echo", text="hi") == "echo: hi"
    assert "could not be started: far." in here.sent
    assert "127.0.0.1:1/" not in here.sent and "the-key-of-the-far-one" not in here.sent


def test_a_hanging_server_delays_nobody_else_and_its_own_not_for_ever(
    house: cabc.Callable[..., House], tmp_path: Path
) -> None:
    seen = tmp_path / "pids"
    rules = tenants(tmp_path, "[tenants.beta]\nmcp = []\n")
    here = house({"hang": entry("hang", "pid", str(seen), timeout=20), "t": entry()}, tenants=rules)
    here.start("say late")
    until(lambda: pids(seen), "it never started")
    assert here.ask("say hi", "beta/bob")["reply"] == "hi"
    assert here.request("GET", "/session/s", "acme/ann")["state"] == "running"
    until(
        lambda: here.request("GET", "/session/s", "acme/ann")["state"] == "idle",
        "it waits for ever",
    )
    assert here.call("mcp_t_echo", text="hi") == "echo: hi"
    until(lambda: not alive(*pids(seen)), "the hanging server was left")


def test_a_turn_is_cancelled_while_its_servers_start(
    house: cabc.Callable[..., House], tmp_path: Path
) -> None:
    seen = tmp_path / "pids"
    here = house({"hang": entry("hang", "pid", str(seen))})
    here.start("say late")
    until(lambda: pids(seen), "it never started")
    here.request("POST", "/chat/s/cancel", "acme/ann")
    ends = until(
        lambda: [e for e in here.events() if e["type"] in ("done", "error")], "it does not end"
    )
    assert ends[0]["data"]["reason"] == "cancelled_by_user"
    assert alive(*pids(seen)), "nobody waited for it"
    assert not here.model.requests
    here.delete()
    until(lambda: not alive(*pids(seen)), "it outlived its session")


def test_a_server_that_dies_in_a_call_is_said_to_have_and_started_again(
    house: cabc.Callable[..., House],
) -> None:
    here = house({"t": entry()})
    assert "The result is unknown" in here.call("mcp_t_die")
    assert here.call("mcp_t_echo", text="again") == "echo: again"


def test_a_call_ends_at_its_timeout(house: cabc.Callable[..., House]) -> None:
    here = house({"t": entry(timeout={"request": 0.3})})
    assert "timed out" in here.call("mcp_t_sleep", text="60").lower()


# -- their end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["ignore-eof"]], ids=["polite", "stubborn"])
@pytest.mark.parametrize("end", ["delete", "evict", "close"])
def test_servers_end_with_their_session(
    house: cabc.Callable[..., House], tmp_path: Path, end: str, words: list[str]
) -> None:
    seen = tmp_path / "pids"
    here = house({"t": entry("pid", str(seen), *words)})
    assert here.call("mcp_t_echo", text="hi") == "echo: hi"
    (pid,) = pids(seen)
    assert alive(pid)
    getattr(here, end)()
    until(lambda: not alive(pid), "it was left")


def test_an_evicted_session_finds_its_servers_again(house: cabc.Callable[..., House]) -> None:
    here = house({"t": entry()})
    first = here.call("mcp_t_where")
    here.evict()
    assert here.call("mcp_t_where") != first


@pytest.mark.live
def test_nothing_is_left_of_a_killed_worker(tmp_path: Path) -> None:
    assert servers_room.dies_with_us(), "this test needs setpriv"
    polite, stubborn = tmp_path / "polite", tmp_path / "stubborn"
    file = write(
        tmp_path,
        a=entry("pid", str(polite)),
        b=entry("pid", str(stubborn), "ignore-eof"),
    )
    with ModelServer() as model:
        env = model_env(model, AGENTAO_MCP=str(file), AGENTAO_POLICY="trusted")
        with Gunicorn(tmp_path, **env) as server:
            server.ask("s", 'call mcp_b_echo {"text": "hi"}\nsay done')
            left = pids(polite) + pids(stubborn)
            assert len(left) == 2 and all(alive(pid) for pid in left)
            (worker,) = server.workers()
            server.signal(signal.SIGKILL, worker)
            until(lambda: not any(alive(pid) for pid in left), "orphans")


# -- the operator's file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"x": {"command": "x", "disabled": True}}, "'disabled' is none of type, command"),
        ({"x": {"command": "x", "oauth": {}}}, "'oauth' is none of"),
        ({"x": {"command": "x", "skills": True}}, "'skills' is none of"),
        ({"x": {}}, "needs a 'command' or a 'url'"),
        ({"x": {"type": "carrier-pigeon", "command": "x"}}, "Unknown MCP transport"),
        ({"x": {"type": "http", "command": "x"}}, "requires a 'url'"),
        ({"x": {"command": ["x"]}}, "command has the wrong type"),
        ({"x": {"command": "x", "args": [1]}}, "args is a list of texts"),
        ({"x": {"command": "x", "env": {"A": 1}}}, "env is an object of texts"),
        ({"x": {"command": "x", "trust": "yes"}}, "trust has the wrong type"),
        ({"x": {"command": "x", "timeout": True}}, "timeout has the wrong type"),
        ({"x": {"command": "x", "timeout": 0}}, "above 0"),
        ({"x": {"command": "x", "timeout": {"total": 3}}}, "no 'total'"),
        ({"x": {"command": "x", "env": {"A": "${NO_SUCH}"}}}, "${NO_SUCH}, which is not set"),
        ({"x": {"url": "http://h", "headers": {"A": "Bearer ${}"}}}, "${}, which is not set"),
        ({"x y": {"command": "x"}}, "a name has 1 to 32"),
        ({"x-y": {"command": "x"}, "x_y": {"command": "x"}}, "are one name"),
    ],
)
def test_a_bad_file_is_refused_at_start(
    tmp_path: Path, entries: dict[str, t.Any], complaint: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        read_servers(write(tmp_path, **entries), {}, call_timeout=1)
    assert complaint in str(caught.value) and "AGENTAO_MCP" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"servers": {}}', '{"mcpServers": []}', "{"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(text)
    with pytest.raises(RuntimeError, match="AGENTAO_MCP"):
        read_servers(path, {}, call_timeout=1)
    with pytest.raises(RuntimeError, match="No such file"):
        read_servers(tmp_path / "other.json", {}, call_timeout=1)


def test_the_application_does_not_start_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = write(tmp_path, x={"command": "x", "env": {"A": "${NO_SUCH}"}})
    with model_here(monkeypatch) as model, pytest.raises(RuntimeError, match="NO_SUCH"):
        House(tmp_path, model, mcp=bad)


def test_secrets_come_from_the_environment_and_are_not_in_a_repr(tmp_path: Path) -> None:
    entries = {
        "x": {"command": "${DIR}/x", "args": ["--key=${K}"], "env": {"A": "$K ${K}"}},
        "y": {"url": "https://${K}.example", "headers": {"Authorization": "Bearer ${K}"}},
    }
    env = {"DIR": "/opt", "K": "a-secret", "PATH": "/bin", "OTHER": "no"}
    known = read_servers(write(tmp_path, **entries), env, call_timeout=7)
    x, y = known["x"].config, known["y"].config
    assert (x["command"], x["args"]) == ("/opt/x", ["--key=a-secret"])
    assert x["env"] == {"PATH": "/bin", "A": "$K a-secret"}
    assert x["timeout"] == {"startup": 10.0, "request": 7}
    assert y["url"] == "https://a-secret.example"
    assert y["headers"] == {"Authorization": "Bearer a-secret"}
    assert "a-secret" not in repr(known)


def test_no_start_takes_longer_than_ours(tmp_path: Path) -> None:
    path = write(tmp_path, x={"command": "x", "timeout": {"startup": 3600, "request": 3600}})
    timeouts = read_servers(path, {}, call_timeout=1)["x"].config["timeout"]
    assert timeouts == {"startup": 10.0, "request": 3600}


def test_the_setting_is_a_path() -> None:
    assert Settings.from_mapping({"AGENTAO_MCP": "/srv/mcp.json"}).mcp == Path("/srv/mcp.json")


# -- a server of the mcp package's own -------------------------------------------------------------

THEIRS = """
try:
    from mcp.server import MCPServer
except ImportError:  # Before 2.0.
    from mcp.server.fastmcp import FastMCP as MCPServer
server = MCPServer("shop")

@server.tool()
def price(name: str) -> str:
    "What something costs."
    return f"{name} is 3 euros"

server.run()
"""


def test_a_server_written_with_the_mcp_package_works(
    house: cabc.Callable[..., House], tmp_path: Path
) -> None:
    program = tmp_path / "shop.py"
    program.write_text(THEIRS)
    here = house({"shop": {"command": sys.executable, "args": [str(program)]}})
    assert here.call("mcp_shop_price", name="tea") == "tea is 3 euros"
