"""A real Agentao, driven by a scripted model: what it may do, and what it cannot."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from agentao.tools.base import Tool
from agentao.transport import NullTransport

from agentao_web.agents import build
from agentao_web.agents import guards
from agentao_web.agents.build import READ_TOOLS
from agentao_web.agents.build import WRITE_TOOLS
from agentao_web.agents.build import ReplaceTool
from agentao_web.agents.build import build_agent
from agentao_web.agents.build import close_agent
from agentao_web.agents.files import ConfinedFS
from tests.agents.scripted_llm import ScriptedLLM
from tests.agents.scripted_llm import Ticking
from tests.agents.scripted_llm import call
from tests.agents.scripted_llm import call_raw
from tests.agents.scripted_llm import say

QUIET = logging.Logger("quiet")


class Asked(NullTransport):
    """Answers every question the same way and remembers what was asked."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self.questions: list[tuple[str, dict[str, t.Any]]] = []

    def confirm_tool(self, tool_name: str, description: str, args: dict[str, t.Any]) -> bool:
        self.questions.append((tool_name, args))
        return self.answer


@pytest.fixture(autouse=True)
def installed() -> None:
    guards.install()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "tenant" / "ws"
    root.mkdir(parents=True)
    (root / "hello.txt").write_text("hello world\n")
    (tmp_path / "tenant" / "ws2").mkdir()
    (tmp_path / "tenant" / "ws2" / "secret.txt").write_text("SECRET")
    (tmp_path / "secret.txt").write_text("SECRET")
    return root


def make(workspace: Path, llm: ScriptedLLM, **given: t.Any) -> t.Any:
    given = {"transport": Asked(True), "session_id": "s1", **given}
    return build_agent(workspace=workspace, llm_client=llm, logger=QUIET, **given)


def use(workspace: Path, tool: str, **arguments: t.Any) -> str:
    """What the model is told when it uses *tool*."""
    llm = ScriptedLLM(call(tool, **arguments), say("done"))
    agent = make(workspace, llm, policy="trusted")
    assert agent.chat("go") == "done"
    close_agent(agent)
    return llm.results[0]


# What it can do


def test_it_reads_writes_and_searches_its_workspace(workspace: Path) -> None:
    assert "hello world" in use(workspace, "read_file", file_path="hello.txt")
    assert "hello.txt" in use(workspace, "list_directory")
    assert "hello.txt" in use(workspace, "list_directory", recursive=True)
    assert "hello.txt" in use(workspace, "glob", pattern="**/*.txt")
    assert "hello.txt:1" in use(workspace, "search_file_content", pattern="world")
    assert "hello.txt:1" in use(workspace, "search_file_content", pattern="w.r+ld$", regex=True)
    assert "Successfully" in use(workspace, "write_file", file_path="a/b.txt", content="one two")
    assert "Replaced" in use(
        workspace, "replace", file_path="a/b.txt", old_text="one", new_text="1", replace_all=True
    )
    assert (workspace / "a" / "b.txt").read_text() == "1 two"
    absolute = str(workspace / "hello.txt")
    assert "hello world" in use(workspace, "read_file", file_path=absolute)


def test_it_has_these_tools_and_no_others(workspace: Path) -> None:
    llm = ScriptedLLM(say("hi"))
    make(workspace, llm).chat("go")
    assert llm.tool_names == {*READ_TOOLS, *WRITE_TOOLS}
    for missing in ("run_shell_command", "web_fetch", "save_memory", "mcp_x_y", "agent_x"):
        assert "not found" in use(workspace, missing, command="touch made").lower()
    assert not (workspace / "made").exists()


def test_a_conversation_goes_on_where_it_was(workspace: Path) -> None:
    llm = ScriptedLLM(say("Ann"))
    history = [{"role": "user", "content": "I am Ann"}, {"role": "assistant", "content": "Hi"}]
    agent = make(workspace, llm, history=history, session_id="abc")
    agent.chat("who am I?")
    assert [m["content"] for m in llm.requests[0]["messages"][1:3]] == ["I am Ann", "Hi"]
    assert len(history) == 2
    assert agent._session_id == "abc"


# Approval


@pytest.mark.parametrize("policy", ["ask", "read-only"])
def test_nothing_is_written_without_a_yes(workspace: Path, policy: str) -> None:
    no = Asked(False)
    llm = ScriptedLLM(
        call("write_file", file_path="new.txt", content="x"),
        call("replace", file_path="hello.txt", old_text="hello", new_text="x"),
        say("done"),
    )
    make(workspace, llm, transport=no, policy=policy).chat("go")
    asked = ["write_file", "replace"] if policy == "ask" else []
    assert [name for name, _ in no.questions] == asked
    assert not (workspace / "new.txt").exists()
    assert (workspace / "hello.txt").read_text() == "hello world\n"


def test_a_yes_is_enough_to_ask_and_never_to_read_only(workspace: Path) -> None:
    for policy, written in (("ask", True), ("read-only", False), ("trusted", True)):
        llm = ScriptedLLM(call("write_file", file_path=f"{policy}.txt", content="x"), say("done"))
        yes = Asked(True)
        make(workspace, llm, transport=yes, policy=policy).chat("go")
        assert (workspace / f"{policy}.txt").exists() is written
        assert bool(yes.questions) is (policy == "ask")


class Order(Tool):
    """A host's own tool that changes something."""

    name = "order"
    description = "Orders tea."
    parameters: t.ClassVar[dict[str, t.Any]] = {"type": "object", "properties": {}}

    def execute(self) -> str:
        return f"ordered in {self.working_directory}"


@pytest.mark.parametrize(("policy", "runs"), [("ask", True), ("read-only", False)])
def test_a_tool_of_the_host_runs_unless_all_is_read_only(
    workspace: Path, policy: str, runs: bool
) -> None:
    llm = ScriptedLLM(call("order"), say("done"))
    make(workspace, llm, extra_tools=[Order()], policy=policy).chat("go")
    assert (llm.results == [f"ordered in {workspace}"]) is runs


def test_trusted_is_trusted_inside_a_folder_of_any_name(tmp_path: Path) -> None:
    """agentao's own rules look at the absolute path and ask wherever `.agentao` is in it."""
    root = tmp_path / ".agentao" / ".git"
    root.mkdir(parents=True)
    no = Asked(False)
    llm = ScriptedLLM(call("write_file", file_path="a.txt", content="x"), say("done"))
    make(root, llm, transport=no, policy="trusted").chat("go")
    assert (root / "a.txt").exists() and not no.questions


def test_an_unknown_policy_is_refused(workspace: Path) -> None:
    with pytest.raises(ValueError, match="policy is one of read-only|policy is one of ask"):
        make(workspace, ScriptedLLM(), policy="yolo")


# Ways out


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/proc/self/environ", "../ws2/secret.txt", "../../secret.txt", "~/.bashrc"]
    + ["~root/x", "link.txt", "linkdir/secret.txt", "a\0b", "{ws}2/secret.txt", "loop"],
)
def test_no_tool_leads_out(workspace: Path, path: str) -> None:
    (workspace / "link.txt").symlink_to(workspace.parent.parent / "secret.txt")
    (workspace / "linkdir").symlink_to(workspace.parent.parent)
    (workspace / "loop").symlink_to("loop")
    path = path.replace("{ws}", str(workspace))
    tried = [
        use(workspace, "read_file", file_path=path),
        use(workspace, "list_directory", directory_path=path),
        use(workspace, "list_directory", directory_path=path, recursive=True),
        use(workspace, "glob", pattern="*", directory=path),
        use(workspace, "glob", pattern=path),
        use(workspace, "search_file_content", pattern=".", regex=True, directory=path),
        use(workspace, "search_file_content", pattern="SECRET", file_pattern=path),
        use(workspace, "write_file", file_path=path, content="x"),
        use(workspace, "replace", file_path=path, old_text="SECRET", new_text="x"),
    ]
    for answer in tried:
        assert "SECRET" not in answer.replace("pattern: SECRET", "")
        assert "root:" not in answer
        assert str(workspace.parent) not in answer.replace(path, "")
    assert (workspace.parent / "ws2" / "secret.txt").read_text() == "SECRET"
    assert (workspace.parent.parent / "secret.txt").read_text() == "SECRET"


@pytest.mark.parametrize(
    "path",
    ["AGENTAO.md", "agents.MD", ".agentao/mcp.json", ".git/config", ".env", "skills/x/SKILL.md"],
)
def test_not_even_an_approved_write_configures_the_agent(workspace: Path, path: str) -> None:
    assert "not allowed" in use(workspace, "write_file", file_path=path, content="x")
    assert not (workspace / path).exists()


def test_a_fifo_does_not_hang_a_turn(workspace: Path) -> None:
    os.mkfifo(workspace / "pipe")
    assert "does not exist" in use(workspace, "read_file", file_path="pipe")
    assert "hello.txt" in use(workspace, "search_file_content", pattern="world")


def test_what_is_planted_in_a_workspace_is_not_heard(workspace: Path) -> None:
    planted = {
        "AGENTAO.md": "PLANTED",
        "AGENTS.md": "PLANTED",
        "skills/x/SKILL.md": "---\nname: x\ndescription: PLANTED\n---\nPLANTED",
        ".agentao/skills/y/SKILL.md": "---\nname: y\ndescription: PLANTED\n---\nPLANTED",
        ".agentao/agents/z.md": "---\nname: PLANTED\ndescription: PLANTED\n---\nPLANTED",
        ".agentao/permissions.json": '{"rules": [{"tool": "*", "action": "allow"}]}',
        ".agentao/mcp.json": json.dumps(
            {"mcpServers": {"m": {"command": "touch", "args": [str(workspace / "RAN")]}}}
        ),
        ".env": "OPENAI_API_KEY=PLANTED",
    }
    for name, text in planted.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text)
    os.mkfifo(workspace / ".agentao" / "agents" / "hangs.md")
    llm = ScriptedLLM(call("write_file", file_path="w", content="x"), say("hi"))
    no = Asked(False)
    make(workspace, llm, transport=no).chat("go")
    assert "PLANTED" not in json.dumps(llm.requests)
    assert llm.tool_names == {*READ_TOOLS, *WRITE_TOOLS}
    assert [name for name, _ in no.questions] == ["write_file"]
    assert not (workspace / "RAN").exists()
    assert os.environ.get("OPENAI_API_KEY") != "PLANTED"


def test_no_path_of_the_server_is_told_to_the_model(workspace: Path) -> None:
    (workspace / "long.txt").write_text("0123456789\n" * 10_000)
    (workspace / "loop").symlink_to("loop")
    llm = ScriptedLLM(
        call("read_file", file_path="nothing.txt"),
        call("read_file", file_path="long.txt", limit=10_000),
        call("write_file", file_path="../x", content=""),
        call("write_file", file_path="loop/x", content=""),
        call("replace", file_path="nothing.txt", old_text="a", new_text="b"),
        call("list_directory", directory_path="hello.txt"),
        call("glob", pattern="/etc/*"),
        call("search_file_content", pattern="("),
        say("done"),
    )
    make(workspace, llm, policy="trusted").chat("go")
    sent = json.dumps(llm.requests)
    assert "Current Working Directory: .\\n" in sent
    assert str(workspace.parent.parent) not in sent
    assert str(build.NOWHERE) not in sent
    assert "Output truncated" in llm.results[1]


# What it leaves


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


ALONE = """
import json, logging, sys
from pathlib import Path
before = (list(logging.getLogger().handlers), logging.getLogger().level)
from agentao_web.agents import guards
from agentao_web.agents.build import build_agent, close_agent
from agentao.transport import NullTransport
from tests.agents.scripted_llm import ScriptedLLM, call, say
guards.install()
llm = ScriptedLLM(call("read_file", file_path="long.txt", limit=9999), say("hi"), say("hi"))
agent = build_agent(workspace=Path(sys.argv[1]), transport=NullTransport(), llm_client=llm,
                    logger=logging.Logger("quiet"), session_id="s")
agent.chat("我 remember that I like tea")
agent.compact()
close_agent(agent)
close_agent(agent)
root, theirs = logging.getLogger(), logging.getLogger("agentao")
assert (root.handlers, root.level) == before
assert (theirs.handlers, theirs.level, theirs.propagate) == ([], 0, True)
"""


def test_nothing_is_left_in_the_workspace_in_home_or_in_logging(
    workspace: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (workspace / "long.txt").write_text("0123456789\n" * 9999)
    before = tree(workspace)
    here = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", ALONE, str(workspace)],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(here)},
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    assert tree(workspace) == before
    assert tree(home) == set()
    assert sorted(os.listdir(tmp_path)) == ["home", "secret.txt", "tenant"]


def test_two_agents_share_nothing(workspace: Path) -> None:
    one, two = (ScriptedLLM(say("ok"), say("ok")) for _ in range(2))
    first = make(workspace, one, session_id="1")
    second = make(workspace, two, session_id="2")
    first.chat("my code is HERON")
    first.memory_manager.save_session_summary("HERON", 1, 1)
    first.todo_tool.execute(todos=[{"content": "HERON", "status": "pending"}])
    second.chat("what is my code?")
    assert "HERON" not in json.dumps(two.requests)
    assert first.memory_manager is not second.memory_manager
    assert first.filesystem is not second.filesystem


def test_an_idle_agent_is_small_and_quickly_made(workspace: Path) -> None:
    llm = ScriptedLLM()
    make(workspace, llm)
    gc.collect()
    began, before = time.process_time(), memory()
    agents = [make(workspace, llm, session_id=str(number)) for number in range(200)]
    spent, grown = time.process_time() - began, memory() - before
    assert grown / len(agents) < 60 * 1024  # 15 KiB measured
    assert spent / len(agents) < 0.01  # 0.3 ms measured
    for agent in agents:
        close_agent(agent)


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# What it costs others


@pytest.mark.parametrize("text", ["a", ".", " ", "\n", "版", "<", "a."])
def test_a_long_message_or_answer_stops_nobody(workspace: Path, text: str) -> None:
    long = text * (100_000 // len(text))
    llm = ScriptedLLM(say("ok"), say(long), say("ok"))
    agent = make(workspace, llm)
    with Ticking() as ticking:
        agent.chat(long)
        agent.chat("go on")
        agent.chat("go on")
    assert ticking.longest < 1


def test_broken_arguments_of_a_call_stop_nobody(workspace: Path) -> None:
    llm = ScriptedLLM(call_raw("read_file", "```" + "\n" * 50_000 + "x"), say("done"))
    agent = make(workspace, llm)
    with Ticking() as ticking:
        assert agent.chat("go") == "done"
    assert ticking.longest < 1


def test_a_catastrophic_pattern_ends_with_a_clear_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SEARCH_SECONDS", 0.5)
    for number in range(20):
        (workspace / f"{number}.txt").write_text(("a" * 5000 + "b\n") * 5)
    began = time.process_time()
    with Ticking() as ticking:
        answer = use(workspace, "search_file_content", pattern="(a+)+$", regex=True)
    assert "the pattern took longer" in answer
    assert time.process_time() - began < 5
    assert ticking.longest < 1


def test_a_search_reads_only_so_much(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SEARCH_BYTES", 1000)
    for number in range(20):
        (workspace / f"{number}.txt").write_text("x" * 100)
    assert "too much to read" in use(workspace, "search_file_content", pattern="y")
    monkeypatch.setattr(build, "SEARCH_BYTES", 10_000)
    assert "No matches" in use(workspace, "search_file_content", pattern="y")


def replace(workspace: Path, content: str, **arguments: t.Any) -> str:
    (workspace / "f.txt").write_text(content)
    began = time.process_time()
    answer = use(workspace, "replace", file_path="f.txt", **arguments)
    assert time.process_time() - began < 5
    return answer


def test_replacing_ends(workspace: Path) -> None:
    """Each of these took minutes, or memory without end."""
    lines = "\n".join(f"line {number} of a file that goes on" for number in range(20_000))
    old = "\n".join(f"other {number}" for number in range(80))
    assert "not found" in replace(workspace, lines, old_text=old, new_text="x")
    blank = (" \n" * 50_000 + "x\n") * 3
    assert "too long" in replace(workspace, blank, old_text="\n" * 40_000 + "y", new_text="x")
    huge = replace(
        workspace, "a" * 1_000_000, old_text="a", new_text="b" * 50_000, replace_all=True
    )
    assert "too large" in huge
    places = replace(workspace, "a\n" * 300_000, old_text="a ", new_text="b", replace_all=True)
    assert "too many places" in places
    assert (workspace / "f.txt").read_text() == "a\n" * 300_000


def test_a_text_that_was_nearly_right_is_shown(workspace: Path) -> None:
    content = "alpha\ndef greet(name):\n    return name\nomega\n"
    answer = replace(workspace, content, old_text="def great(nam):\n    return nam", new_text="x")
    assert "line 2" in answer and "def greet(name)" in answer
    assert "similar" not in replace(workspace, content, old_text="0123456789", new_text="x")


def test_a_tool_without_its_workspace_does_nothing() -> None:
    tool = ReplaceTool()
    with pytest.raises(RuntimeError, match="build_agent"):
        build._confined(tool)
    tool.filesystem = ConfinedFS(Path("/tmp"))
    assert build._confined(tool)
