"""One Agentao per session, made so that nothing it was not given can reach it.

Knows which of agentao's doors exist and closes them; must never know turns, HTTP or the store.
"""

from __future__ import annotations

import collections.abc as cabc
import copy
import difflib
import logging
import re
import time
import typing as t
from pathlib import Path

from agentao import Agentao
from agentao.mcp import InMemoryMCPRegistry
from agentao.memory import MemoryManager
from agentao.permissions import PermissionEngine
from agentao.permissions import PermissionMode
from agentao.security import PathPolicy
from agentao.security import PathPolicyError
from agentao.tooling.registry import BUILTIN_TOOL_NAMES
from agentao.tools import EditTool
from agentao.tools import SearchTextTool
from agentao.tools import WriteFileTool
from agentao.tools.base import RegistrableTool
from agentao.tools.base import Tool

from .files import MAX_FILE
from .files import Approved
from .files import ConfinedFS
from .files import bound_to
from .files import unasked
from .memory import NoMemory
from .memory import NoRecall
from .memory import Recall
from .memory import SaveTool
from .messages import Messages
from .quota import Quota
from .shell import CommandTool
from .shell import Executor
from .skills import AllowedSkills
from .skills import Skill
from .skills import WithSkills

READ_TOOLS = (
    "read_file",
    "list_directory",
    "glob",
    "search_file_content",
    "todo_write",
    "ask_user",
)
WRITE_TOOLS = ("write_file", "replace")
SKILL_TOOLS = ("activate_skill",)

#: A place that can neither exist nor be made.
NOWHERE = Path("/dev/null/workspace")

#: Seconds and bytes of files one search may take.
SEARCH_SECONDS = 10.0
SEARCH_BYTES = 64 * 1024 * 1024
#: Lines of a file times lines to find in it; then characters written times places.
MAX_COMPARED = 50_000_000
MAX_SPLICED = 5_000_000_000
#: How long to look for something similar to a text that was not found, and how long a text.
HINT_SECONDS = 0.3
HINT_CHARACTERS = 1000

_WRITE_RULES = {"ask": "ask", "trusted": "allow", "read-only": "deny"}
_OUTSIDE = "Error: that path is outside the workspace"


class WorkspaceAgent(Agentao):
    """An Agentao whose own folder is nowhere; only its tools know the workspace.

    So nothing planted in a workspace (instructions, skills, sub-agents, MCP servers) is read,
    and nothing (memory, logs, long tool results) is written there behind the tools' back.
    """

    #: What the model is told of tools it does not have now, at the end of its prompt.
    notice = ""

    @property
    def messages(self) -> list[dict[str, t.Any]]:
        """The history; a compaction puts a new one in its place."""
        return self._clean_messages

    @messages.setter
    def messages(self, messages: list[dict[str, t.Any]]) -> None:
        self._clean_messages = Messages(messages)

    def _build_system_prompt(self) -> str:
        return super()._build_system_prompt().replace(str(NOWHERE), ".") + self.notice


def build_agent(
    *,
    workspace: Path,
    transport: t.Any,
    llm_client: t.Any,
    logger: logging.Logger,
    history: cabc.Iterable[dict[str, t.Any]] = (),
    session_id: str,
    policy: str = "ask",
    extra_tools: cabc.Iterable[RegistrableTool] = (),
    skills: cabc.Mapping[str, Skill] | None = None,
    memory: MemoryManager | None = None,
    memory_asks: bool = False,
    quota: Quota | None = None,
    shell: Executor | None = None,
    max_context_tokens: int = 200_000,
) -> WorkspaceAgent:
    """An agent that reads and writes in *workspace* only, and asks *transport* as *policy* says.

    *llm_client* may be shared. Its logger is the one agentao writes to: give it one that does
    not propagate. With *memory* it can save facts there; with *memory_asks* the policy ``ask``
    asks before it does, as others read them. What it writes stays within *quota*; without a
    *shell* it has none.
    """
    extra = [*extra_tools, *([CommandTool(shell)] if shell else [])]
    asking = {tool.name for tool in extra if tool.requires_confirmation}
    tools = [*(make() for make in _BOUNDED), *extra]
    skills = skills or {}
    if memory is not None:
        tools.append(SaveTool(memory, asks=memory_asks and policy == "ask"))
    enabled = (*READ_TOOLS, *WRITE_TOOLS, *(SKILL_TOOLS if skills else ()))
    given = {*enabled, *(tool.name for tool in tools)}
    own = ConfinedFS(workspace, quota=quota)
    agent = WorkspaceAgent(
        working_directory=NOWHERE,
        transport=transport,
        llm_client=llm_client,
        logger=logger,
        max_context_tokens=max_context_tokens,
        filesystem=WithSkills.over(own, workspace, skills.values()) if skills else own,
        shell=shell,
        permission_engine=_permissions(workspace, policy, given, asking),
        enabled_tools=enabled,
        extra_tools=tools,
        project_instructions="",
        skill_manager=AllowedSkills(skills, NOWHERE),
        mcp_registry=InMemoryMCPRegistry(),
        memory_manager=memory or MemoryManager(project_store=NoMemory()),
        bg_store=None,
        sandbox_policy=None,
        replay_config=None,
    )
    for tool in agent.tools.list_tools():
        tool.working_directory = workspace
        if isinstance(tool, WriteTool | ReplaceTool):
            tool.approved = getattr(transport, "approved_target", tool.approved)
    agent.memory_retriever = (Recall if memory else NoRecall)(agent.memory_manager)
    agent.messages = list(history)
    agent._session_id = session_id
    return agent


def close_agent(agent: Agentao) -> None:
    """Release what the agent holds; the LLM client stays open, it is everyone's."""
    agent.close()
    agent.memory_manager.close()


def _permissions(
    workspace: Path, policy: str, given: set[str], asking: set[str]
) -> PermissionEngine:
    """*given* are the tools it has, *asking* those of the host's that the policy is about."""
    if policy not in _WRITE_RULES:
        raise ValueError(f"policy is one of {', '.join(_WRITE_RULES)}, not {policy!r}")
    action = _WRITE_RULES[policy]
    engine = PermissionEngine(
        project_root=workspace,
        # A rule's tool is a regular expression. All of agentao's own rules come after these: none
        # lets a command pass unasked.
        rules=[{"tool": re.escape(n), "action": action} for n in (*WRITE_TOOLS, *sorted(asking))],
        # Its list of forbidden commands is no boundary, which the sandbox is; and it holds the
        # GIL for 20 seconds over a kilobyte of newlines.
        enable_hardline=False,
    )
    if policy == "read-only":
        engine.set_mode(PermissionMode.READ_ONLY)
    # Not registered either; this holds should a later agentao put one back.
    closed = BUILTIN_TOOL_NAMES - given
    engine.add_run_rules(deny=[{"tool": name, "action": "deny"} for name in sorted(closed)])
    return engine


# Three of agentao's tools, bounded. The other readers are bounded by ConfinedFS alone.


class SearchTool(SearchTextTool):
    """search_file_content with an end: so many seconds, so many bytes."""

    def execute(self, **given: t.Any) -> str:  # type: ignore[override]
        # A copy per call: calls of one batch run side by side, each with its own budget.
        once = copy.copy(self)
        once.filesystem = _confined(self).within(SEARCH_SECONDS, SEARCH_BYTES)
        return super(SearchTool, once).execute(**given)


class WriteTool(WriteFileTool):
    """write_file whose refusal names no path of the server, and which writes what was approved."""

    approved: Approved = staticmethod(unasked)

    def execute(self, **given: t.Any) -> str:  # type: ignore[override]
        if _leads_out(self, given):
            return _OUTSIDE
        with bound_to(self.approved(self.name, given)):
            return super().execute(**given)


class ReplaceTool(EditTool):
    """replace, which says no where agentao's own would compare or write for hours."""

    approved: Approved = staticmethod(unasked)

    def execute(self, **given: t.Any) -> str:  # type: ignore[override]
        if _leads_out(self, given):
            return _OUTSIDE
        if given.get("replace_all") and self._overflows(**given):
            return "Error editing file: the result would be too large"
        with bound_to(self.approved(self.name, given)):
            return super().execute(**given)

    def _overflows(
        self, file_path: str, old_text: str, new_text: str, replace_all: bool = False
    ) -> bool:
        if not old_text:
            return False  # refused by agentao, with a better reason
        files = _confined(self)
        try:
            data = files.read_bytes(self._resolve_path(file_path))
        except OSError:
            return False
        places = data.count(old_text.encode("utf-8", "replace"))
        return len(data) + places * len(new_text) > MAX_FILE

    def _line_window_matches(
        self,
        content: str,
        old_text: str,
        line_transform: cabc.Callable[[str], str] = lambda line: line,
    ) -> list[tuple[int, int]]:
        if content.count("\n") * old_text.count("\n") > MAX_COMPARED:
            raise ValueError("old_text was not found as it is, and is too long to look for likes")
        return super()._line_window_matches(content, old_text, line_transform)

    def _apply_match(
        self,
        path: Path,
        content: str,
        matches: list[tuple[int, int]],
        old_text: str,
        new_text: str,
        replace_all: bool,
        suffix: str,
        file_path: str,
    ) -> str:
        size = len(content) + len(matches) * len(new_text)
        if replace_all and (size > MAX_FILE or size * len(matches) > MAX_SPLICED):
            raise ValueError("too many places: replace fewer at a time")
        return super()._apply_match(
            path, content, matches, old_text, new_text, replace_all, suffix, file_path
        )

    def _not_found_hint(self, content: str, old_text: str, file_path: str) -> str:
        answer = f"Error: Old text not found in {file_path}"
        ratio, line, snippet = _most_similar(content.splitlines(), old_text, time.monotonic)
        if ratio <= 0.4:
            return answer
        return f"{answer}\n\nMost similar text (line {line}, {ratio:.0%} similar):\n{snippet}"


def _most_similar(
    lines: list[str], wanted: str, clock: cabc.Callable[[], float]
) -> tuple[float, int, str]:
    """The likeliest place of *wanted*, of those there was time to look at."""
    best = (0.0, 0, "")
    window = len(wanted.splitlines())
    if len(wanted) > HINT_CHARACTERS or not window:
        return best
    ends = clock() + HINT_SECONDS
    likeness = difflib.SequenceMatcher(None)
    likeness.set_seq2(wanted)
    for first in range(max(1, len(lines) - window + 1)):
        if clock() > ends:
            break
        chunk = "\n".join(lines[first : first + window])[: 2 * HINT_CHARACTERS]
        likeness.set_seq1(chunk)
        if likeness.real_quick_ratio() > best[0] and likeness.quick_ratio() > best[0]:
            best = max(best, (likeness.ratio(), first + 1, chunk))
    return best


def _confined(tool: Tool) -> ConfinedFS | WithSkills:
    if not isinstance(tool.filesystem, ConfinedFS | WithSkills):
        raise RuntimeError("this tool works in a ConfinedFS only: use build_agent")
    return tool.filesystem


_BOUNDED: tuple[cabc.Callable[[], Tool], ...] = (SearchTool, WriteTool, ReplaceTool)


def _leads_out(tool: Tool, given: dict[str, t.Any]) -> bool:
    """agentao asks the same and then puts both absolute paths into its answer."""
    try:
        PathPolicy.for_tool(tool).contain_file(str(given.get("file_path", "")))
    except (PathPolicyError, OSError, RuntimeError, ValueError):
        return True
    return False
