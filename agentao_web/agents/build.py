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
from agentao.skills import SkillManager
from agentao.tools import EditTool
from agentao.tools import SearchTextTool
from agentao.tools import WriteFileTool
from agentao.tools.base import RegistrableTool

from .files import ConfinedFS

READ_TOOLS = (
    "read_file",
    "list_directory",
    "glob",
    "search_file_content",
    "todo_write",
    "ask_user",
)
WRITE_TOOLS = ("write_file", "replace")

#: A place that can neither exist nor be made.
NOWHERE = Path("/dev/null/workspace")
