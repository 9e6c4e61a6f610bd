"""A shell in the hands of an attacker: what it cannot read, write, reach, outlive or exhaust."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.agents import sandbox
from agentao_web.agents.processes import MAX_PROCESSES
from agentao_web.agents.quota import Quota
from agentao_web.agents.shell import MAX_COMMAND
from agentao_web.agents.shell import SHOWN
from agentao_web.agents.shell import Executor
from agentao_web.agents.shell import Unconfined
from agentao_web.agents.workspaces import Workspaces
from agentao_web.auth import Tokens
from agentao_web.core.names import SessionKey
from agentao_web.core.rules import Rules
from agentao_web.extension import pool_of
from tests.agents.scripted_llm import ScriptedLLM
from tests.agents.scripted_llm import call
from tests.agents.scripted_llm import say
from tests.agents.test_build import Asked
from tests.agents.test_build import make
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.model_server import ModelServer
from tests.model_server import calls
from tests.patience import PATIENCE

KEY = "the-shell-tests-own-key"
SECRET = "TOP-SECRET-OF-THE-SERVER"
SIBLING = "SECRET-OF-A-SIBLING"


class Web:
    """An application whose agents have a shell, and what its model was told."""

    def __init__(self, root: Path, model: ModelServer, **config: t.Any) -> None:
        self.model = model
        self.root = root
        rules = config.pop("rules", None)
        self.app = Flask("shell")
        settings = {"policy": "trusted", "shell": "sandbox", "root": root, **config}
        self.app.config.update(
            AGENTAO_SECRET_KEYS=KEY, **{f"AGENTAO_{k.upper()}": v for k, v in settings.items()}
        )
        AgentaoWeb(rules=rules).init_app(self.app)
        self.client = self.app.test_client()

    def headers(self, tenant: str = "acme") -> dict[str, str]:
        token = Tokens([KEY]).issue(Principal(tenant, "ann"), ttl=600)
        return {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def post(self, message: str, sid: str = "s", tenant: str = "acme", wait: float = 0) -> t.Any:
        headers = self.headers(tenant) | ({"Prefer": f"wait={wait:g}"} if wait else {})
        return self.client.post(f"/chat/{sid}", json={"message": message}, headers=headers)

    def start(self, command: str, **more: t.Any) -> None:
        arguments = json.dumps({"command": command, **more})
        assert self.post(f"call run_shell_command {arguments}").status_code == 202

    def run(self, command: str, *, sid: str = "s", **more: t.Any) -> str:
        """What the model is told of *command*."""
        return self.use("run_shell_command", sid=sid, command=command, **more)

    def use(self, tool: str, *, sid: str = "s", **arguments: t.Any) -> str:
        body = self.post(f"call {tool} {json.dumps(arguments)}", sid, wait=PATIENCE).json
        assert body["status"] == "completed", body
        last = self.model.requests[-1].body["messages"][-1]
        assert last["role"] == "tool", last
        return str(last["content"])

    def cancel(self) -> None:
        answer = self.client.post("/chat/s/cancel", headers=self.headers())
        assert answer.json["cancelled"] == 1

    def events(self, sid: str = "s") -> list[dict[str, t.Any]]:
        events: list[dict[str, t.Any]] = []
        while True:
            after = events[-1]["seq"] if events else 0
            url = f"/chat/{sid}/events?after={after}&wait=1"
            page = self.client.get(url, headers=self.headers()).json["events"]
            events += page
            if not page or page[-1]["type"] in ("done", "error"):
                return events

    def workspace(self, user: str = "ann") -> Path:
        return Workspaces(self.root.absolute(), "user").make(SessionKey("acme", user, "s"))


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def web(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[cabc.Callable[..., Web]]:
    for name, value in model_env(model).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    made: list[Web] = []

    def make(**config: t.Any) -> Web:
        made.append(Web(tmp_path / "root", model, **config))
        return made[-1]

    yield make
    for w in made:
        shutdown(w.app, 5.0)


def running(mark: str) -> list[int]:
    """Processes, of anybody, with *mark* in their command line; the dead ones have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def sleeping(mark: str) -> list[int]:
    """The sleeps themselves, and nobody who only speaks of one."""
    return [pid for pid in running(mark) if argv0(pid) == "sleep"]


def argv0(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""


def a_long_sleep() -> tuple[str, str]:
    """A command that sleeps for hours, and how to recognise it."""
    seconds = f"{20_000 + os.getpid() % 10_000}.{time.monotonic_ns()}"
    return f"sleep {seconds}", seconds


# What it cannot read


def test_it_runs_in_its_workspace(web: cabc.Callable[..., Web]) -> None:
    w = web()
    (w.workspace() / "a").mkdir()
    assert "/workspace\n" in w.run("pwd; echo hello > a/made.txt")
    assert (w.workspace() / "a" / "made.txt").read_text() == "hello\n"
    assert "hello" in w.run("cat made.txt", working_directory="a")
    assert "Exit code: 3" in w.run("exit 3")
    assert "to the errors" in w.run("echo to the errors >&2; cat")


ATTACKS = {
    "database": "cat {root}/agentao-web.db*; strings {root}/agentao-web.db",
    "anything": "find / -name 'agentao-web.db*' -o -name theirs.txt | xargs cat; ls {root}",
    "sibling": "cat {theirs} ../*/*.txt ../../*/*/*.txt",
    "outside": "cat {outside} /workspace/../..{outside}",
    "environment": "cat /proc/*/environ | tr '\\0' '\\n'; env; cat /proc/{server}/environ",
    "root of another": "cat /proc/*/root{outside} /proc/*/cwd/* /proc/1/root{outside}",
    "link": "ln -s {outside} l && cat l; ln -s / r && cat r{outside}",
    "link from before": "cat planted planted-folder/*",
    "device": "mknod d b 8 0 && cat d; head -c 100 /dev/sda /dev/vda /dev/mem",
    "mount": "mount --bind / /tmp; unshare -rm cat {outside}; chroot / cat {outside}",
    "descriptors": "for f in /proc/*/fd/*; do timeout 1 head -c 99 $f; done",
    "memory": "head -c 99 /proc/{server}/mem /proc/kcore",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_secret_is_read(web: cabc.Callable[..., Web], tmp_path: Path, name: str) -> None:
    w = web()
    w.run(f"echo {SECRET} > mine.txt", sid="other")
    (w.workspace() / "mine.txt").unlink()
    outside = tmp_path / "outside.txt"
    outside.write_text(SECRET)
    theirs = w.workspace("bob") / "theirs.txt"
    theirs.write_text(SIBLING)
    (w.workspace() / "planted").symlink_to(outside)
    (w.workspace() / "planted-folder").symlink_to(theirs.parent)
    places = {"root": w.root, "theirs": theirs, "outside": outside, "server": os.getpid()}
    told = w.run(ATTACKS[name].format(**places))
    for secret in (SECRET, SIBLING, KEY, "sk-test-key", "root:x"):
        assert secret not in told


def test_accounts_and_homes_are_not_there(web: cabc.Callable[..., Web]) -> None:
    w = web()
    told = w.run(
        "cat /etc/shadow /etc/gshadow; ls /home /root /var /run /srv /opt; cat /etc/passwd"
    )
    assert "root:" not in told
    assert told.count("No such file") == 8
    assert told.count("agent:x:1000") == 1


def test_its_environment_is_a_few_names(web: cabc.Callable[..., Web]) -> None:
    w = web()
    names = {line.partition("=")[0] for line in w.run("env").split("\n")[1:] if "=" in line}
    known = {"PATH", "HOME", "TMPDIR", "LANG", "TERM", "PAGER", "USER"}
    assert names == known | {"PWD", "SHLVL", "_"}


def test_a_link_made_by_a_command_leads_no_tool_out(
    web: cabc.Callable[..., Web], tmp_path: Path
) -> None:
    w = web()
    (tmp_path / "outside.txt").write_text(SECRET)
    w.run(f"ln -s {tmp_path} out; ln -s {tmp_path}/outside.txt file; ln -s {tmp_path}/new new")
    for tool, arguments in (
        ("read_file", {"file_path": "out/outside.txt"}),
        ("read_file", {"file_path": "file"}),
        ("list_directory", {"directory_path": "out"}),
        ("search_file_content", {"pattern": "SECRET"}),
        ("write_file", {"file_path": "new", "content": "x"}),
        ("write_file", {"file_path": "out/new", "content": "x"}),
        ("run_shell_command", {"command": "cat outside.txt", "working_directory": "out"}),
    ):
        told = w.use(tool, **arguments)
        assert SECRET not in told
        assert str(tmp_path) not in told
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", ["..", "/", "/etc", "~", "../..", "\0", "x" * 5000])
def test_it_starts_nowhere_else(web: cabc.Callable[..., Web], folder: str) -> None:
    w = web()
    told = w.run("pwd", working_directory=folder)
    assert told.startswith("Error"), told
    assert str(w.root) not in told


# What it cannot change or reach


def test_nothing_is_written_outside(web: cabc.Callable[..., Web], tmp_path: Path) -> None:
    w = web()
    made = [f"{tmp_path}/made", f"{w.root}/made", "/usr/made", "/etc/made", "/dev/made", "/made"]
    for path in made:
        assert "Exit code: 1" in w.run(f"echo x > {path} && exit 0; exit 1")
    w.run(f"rm -rf {tmp_path} / --no-preserve-root; echo x > inside")
    assert not any(Path(path).exists() for path in made)
    assert (w.root / "agentao-web.db").exists()


def test_there_is_no_network(web: cabc.Callable[..., Web]) -> None:
    w = web()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        told = w.run(f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo connected >&3; cat /proc/net/tcp")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert "refused" in told
    assert f":{port:04X}" not in told


def test_it_signals_nobody(web: cabc.Callable[..., Web]) -> None:
    w = web()
    w.run(f"kill -9 {os.getpid()} {os.getppid()}; kill -9 -1")
    assert "still here" in w.run("echo still here")


def test_the_kernels_side_doors_are_shut(web: cabc.Callable[..., Web]) -> None:
    w = web()
    told = w.run("grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; ulimit -c")
    assert told.count("0000000000000000") == 2
    assert "NoNewPrivs:\t1" in told and "Seccomp:\t2" in told
    # A new namespace would be a new root, with all of its capabilities.
    assert "Exit code" in w.run("unshare --user true")
    assert "not supported" in w.run("fallocate -l 1M set-aside")
    assert "not supported" in w.run("dmesg --syslog")


# Who is asked


@pytest.mark.parametrize("command", ["ls", "cat x", "git status", "touch made"])
@pytest.mark.parametrize("policy", ["ask", "read-only"])
def test_every_command_is_asked_about_or_denied(tmp_path: Path, command: str, policy: str) -> None:
    """Agentao's own rules let what looks harmless pass; here nothing passes unasked."""
    quota = Quota(tmp_path, max_bytes=2**20, max_files=100)
    shell = Executor(tmp_path, seconds=PATIENCE, quota=quota)
    llm = ScriptedLLM(call("run_shell_command", command=command), say("done"))
    transport = Asked(False)
    make(tmp_path, llm, policy=policy, shell=shell, transport=transport).chat("go")
    asked = [("run_shell_command", {"command": command})] if policy == "ask" else []
    assert transport.questions == asked
    assert "not approved" in llm.results[0] or "blocked" in llm.results[0]
    assert not (tmp_path / "made").exists()


def test_without_the_setting_there_is_no_shell(web: cabc.Callable[..., Web]) -> None:
    w = web(shell="off")
    w.post('call run_shell_command {"command": "touch made"}', wait=PATIENCE)
    assert not (w.workspace() / "made").exists()
    tools = json.dumps(w.model.requests[0].body["tools"])
    assert "run_shell_command" not in tools


# What it cannot exhaust


def test_a_command_of_nothing_but_newlines_stalls_nobody(web: cabc.Callable[..., Web]) -> None:
    """Agentao's patterns over commands held the GIL for 20 s over the first thousand."""
    w = web()
    assert "done" in w.run("\n" * 20_000 + "echo done")
    assert "at most" in w.run("#" * (MAX_COMMAND + 1))


def test_a_flood_of_output_is_bounded(web: cabc.Callable[..., Web]) -> None:
    w = web()
    told = w.run("yes")
    assert len(told) <= 40_000
    assert "bytes of output]" in told and "not kept" in told
    shown = [e["data"]["chunk"] for e in w.events() if e["type"] == "tool_output"]
    assert SHOWN <= sum(map(len, shown)) <= SHOWN + 100
    assert shown[-1].endswith("[more output is not shown]\n")


def test_output_is_bytes_of_any_kind(web: cabc.Callable[..., Web]) -> None:
    w = web()
    assert "a\ufffdb\u00e9" in w.run(r"printf 'a\xffb\xc3'; sleep 0.1; printf '\xa9\x1b[31m'")
    assert "binary output" in w.run("head -c 1000 /dev/zero")
    for event in w.events():
        json.dumps(event).encode()


def test_a_fork_bomb_is_ended(web: cabc.Callable[..., Web]) -> None:
    w = web()
    told = w.run("bomb() { bomb | bomb & sleep 30; }; bomb; sleep 30")
    assert f"more than {MAX_PROCESSES} processes" in told or "retry" in told or "fork" in told
    assert "fine" in w.run("echo fine")


def test_memory_behind_files_is_bounded(web: cabc.Callable[..., Web]) -> None:
    w = web()
    assert "No space left" in w.run("head -c 1G /dev/zero > /tmp/much")
    assert "No space left" in w.run("head -c 1G /dev/zero > /dev/shm/much")


def test_time_is_up_for_a_command_that_keeps_talking(web: cabc.Callable[..., Web]) -> None:
    w = web(shell_timeout=8)
    told = w.run("while sleep 0.1; do echo talking; done", timeout=9999)
    assert "stopped after 8 seconds" in told and "talking" in told


# What does not outlive it


@pytest.fixture(params=["sandbox", "unconfined"])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


HIDDEN = {
    "ampersand": "{sleep} & echo started",
    "nohup": "nohup {sleep} >/dev/null 2>&1 & echo started",
    "setsid": "setsid {sleep} & echo started",
    "twice": "(setsid bash -c '{sleep} & disown' &) ; sleep 0.3; echo started",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_nothing_is_left_of_a_command_that_ended(
    web: cabc.Callable[..., Web], shell: str, how: str
) -> None:
    w = web(shell=shell)
    sleep, mark = a_long_sleep()
    assert "started" in w.run(HIDDEN[how].format(sleep=sleep))
    eventually(lambda: not running(mark), "it outlived its command")


def test_there_is_no_background(web: cabc.Callable[..., Web], shell: str) -> None:
    w = web(shell=shell)
    sleep, mark = a_long_sleep()
    assert "ended" in w.run(f"{sleep} & echo ended", is_background=True)
    eventually(lambda: not running(mark), "it runs in the background")


@pytest.mark.parametrize("how", ["cancel", "deadline", "shutdown", "delete"])
def test_the_end_of_a_turn_is_the_end_of_its_command(
    web: cabc.Callable[..., Web], shell: str, how: str
) -> None:
    w = web(shell=shell, turn_timeout=600)
    sleep, mark = a_long_sleep()
    w.start(f"echo started; setsid {sleep} & {sleep}")
    eventually(lambda: len(sleeping(mark)) == 2, "it did not start")
    if how == "cancel":
        w.cancel()
    elif how == "deadline":
        pool = pool_of(w.app)
        pool.tick(pool.clock() + 601)
    elif how == "shutdown":
        shutdown(w.app, 1.0)
    elif how == "delete":
        w.client.delete("/session/s", headers=w.headers())
    eventually(lambda: not running(mark), "it outlived its turn")
    if how in ("cancel", "deadline"):
        events = w.events()
        assert events[-1]["type"] == "done"
        chunks = [e["data"]["chunk"] for e in events if e["type"] == "tool_output"]
        assert "".join(chunks) == "started\n"


def test_output_is_shown_while_the_command_runs(web: cabc.Callable[..., Web], shell: str) -> None:
    w = web(shell=shell)
    # In pieces, so that the path has to be recognised across them.
    w.start("pwd; for c in $(pwd | grep -o .); do printf %s $c; done; echo; sleep 0.1; sleep 1000")
    until = time.monotonic() + PATIENCE
    shown = ""
    after = 0
    while shown.count("\n") < 2:
        assert time.monotonic() < until, shown
        url = f"/chat/s/events?after={after}&wait=1"
        page = w.client.get(url, headers=w.headers()).json
        after = page["cursor"]
        shown += "".join(e["data"]["chunk"] for e in page["events"] if e["type"] == "tool_output")
    w.cancel()
    assert shown == ("/workspace\n" * 2 if shell == "sandbox" else ".\n.\n")


def test_commands_of_one_batch_each_run_to_their_end(
    web: cabc.Callable[..., Web], shell: str
) -> None:
    """The kernel ends a command with the thread that started it: that one must not be gone."""
    w = web(shell=shell)
    sleeps = [
        ("run_shell_command", {"command": f"sleep 1.{n}; echo end-{n}"}, f"c{n}") for n in range(3)
    ]
    w.model.script(calls(sleeps))
    assert w.post("go", wait=PATIENCE).json["status"] == "completed"
    told = [m["content"] for m in w.model.requests[-1].body["messages"] if m["role"] == "tool"]
    assert [f"end-{n}" in text for n, text in enumerate(told)] == [True] * 3


@pytest.mark.live
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_orphan_of_a_server_that_goes(
    tmp_path: Path, model: ModelServer, shell: str, number: int
) -> None:
    settings = {"AGENTAO_SHELL": shell, "AGENTAO_POLICY": "trusted", "AGENTAO_DRAIN_GRACE": "1"}
    with Server(tmp_path, **model_env(model, **settings)) as server:
        told = json.dumps({"command": "cat /proc/*/environ | tr '\\0' '\\n'; env; ps axe"})
        server.ask("s", f"call run_shell_command {told}")
        if shell == "sandbox":
            said = str(model.requests[-1].body["messages"][-1]["content"])
            assert "AGENTAO_" not in said and "sk-test-key" not in said
        sleep, mark = a_long_sleep()
        server.post("s", f"call run_shell_command {json.dumps({'command': sleep})}")
        eventually(lambda: running(mark), "it did not start")
        for pid in server.workers():
            server.signal(number, pid)
        # Outside of the sandbox kill -9 ends the shell itself, which here has become the sleep.
        eventually(lambda: not running(mark), "it outlived its server")


def test_a_command_whose_server_was_killed_as_it_started_does_not_run(tmp_path: Path) -> None:
    """The kernel ends what has a dead parent only if it died after it was asked to."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        sandbox.launch(tmp_path, "", "touch made", file_size=2**20) as launch,
        subprocess.Popen(
            launch.argv, stdin=theirs.fileno(), pass_fds=launch.fds, env={}
        ) as process,
    ):
        theirs.close()
        ours.settimeout(PATIENCE)
        assert ours.recv(100) == b"ready\n"
        ours.close()
        assert process.wait(PATIENCE) == 1
    assert not (tmp_path / "made").exists()


# Where it does not start


def test_it_refuses_to_start_without_bubblewrap(
    web: cabc.Callable[..., Web], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install bubblewrap|apt-get install bubblewrap"):
        web()
    with pytest.raises(RuntimeError, match="bubblewrap"):
        tenants = tmp_path / "tenants.toml"
        tenants.write_text('[tenants.acme]\nshell = "sandbox"\n')
        web(shell="off", tenants=tenants)
    web(shell="off")


@pytest.mark.parametrize(
    "says, cure",
    [
        ("No permissions to create new namespace", "user namespaces must be allowed"),
        ("Unknown option --disable-userns", "bubblewrap 0.8"),
        ("execvp /usr/bin/prlimit: No such file or directory", "util-linux"),
    ],
)
def test_it_refuses_to_start_where_bubblewrap_does_not_work(
    web: cabc.Callable[..., Web],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    says: str,
    cure: str,
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=cure) as raised:
        web()
    assert says in str(raised.value)


def test_it_refuses_a_root_that_commands_could_read() -> None:
    for root in ("/usr/local/agentao", "/usr", "/lib/x", "/workspace"):
        with pytest.raises(RuntimeError, match="AGENTAO_ROOT"):
            sandbox.check(Path(root))


def test_a_hosts_rules_may_give_a_sandbox_and_no_more(web: cabc.Callable[..., Web]) -> None:
    given = Rules(policy="trusted", shell="sandbox")
    w = web(shell="off", rules=lambda principal, rules: given)
    assert "in it" in w.run("echo in it")
    given = Rules(policy="trusted", shell="unconfined")
    body = w.post("say hi", "new", wait=PATIENCE).json
    assert body["error"]["code"] == "internal_error"


# Outside of the sandbox


def test_unconfined_has_none_of_the_servers_secrets_in_its_environment(
    web: cabc.Callable[..., Web],
) -> None:
    w = web(shell="unconfined")
    told = w.run("env; pwd")
    assert SECRET not in told and "OPENAI" not in told and "AGENTAO_SECRET" not in told
    assert str(w.root) not in told


def test_unconfined_is_for_one_tenant(web: cabc.Callable[..., Web]) -> None:
    w = web(shell="unconfined")
    assert "fine" in w.run("echo fine")
    refused = w.post("say hi", tenant="other")
    assert (refused.status_code, refused.json["code"]) == (403, "forbidden")
    assert "one tenant" in refused.json["message"]
    assert "fine" in w.run("echo fine")
    w.client.delete("/session/s", headers=w.headers())
    eventually(lambda: w.post("say hi", tenant="other").status_code == 202, "the first is gone")
    assert w.post("say hi").status_code == 403


def test_of_two_tenants_that_came_at_once_neither_gets_a_command(tmp_path: Path) -> None:
    quota = Quota(tmp_path, max_bytes=2**20, max_files=100)
    shell = Unconfined(tmp_path, seconds=PATIENCE, quota=quota, alone=lambda: False)
    llm = ScriptedLLM(call("run_shell_command", command="touch made"), say("done"))
    make(tmp_path, llm, policy="trusted", shell=shell).chat("go")
    assert "one tenant" in llm.results[0]
    assert not (tmp_path / "made").exists()


def test_unconfined_needs_the_setting(web: cabc.Callable[..., Web], tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[tenants.acme]\nshell = "unconfined"\n')
    for setting in ("off", "sandbox"):
        with pytest.raises(RuntimeError, match="AGENTAO_SHELL=unconfined"):
            web(shell=setting, tenants=tenants)
    tenants.write_text('[tenants.acme]\npolicy = "ask"\n[tenants.other]\npolicy = "ask"\n')
    with pytest.raises(RuntimeError, match="several tenants"):
        web(shell="unconfined", tenants=tenants)


def test_no_descriptor_is_left_open(web: cabc.Callable[..., Web], shell: str) -> None:
    w = web(shell=shell)
    w.run("echo warm")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        w.run("echo again")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
