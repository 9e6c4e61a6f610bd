"""What an agent keeps besides its messages: active skills and the list of things to do.

Read back it is text out of a store: whatever does not fit any more is dropped without a word.
"""

from __future__ import annotations

import collections.abc as cabc
import typing as t

from agentao_web.core import clean

#: Bounds of what is stored with a session.
MAX_TODOS: t.Final = 100
MAX_TEXT: t.Final = 1000


def keep(agent: t.Any) -> dict[str, t.Any]:
    """The state of *agent*, as JSON for ``restore``."""
    active = agent.skill_manager.get_active_skills()
    skills = [{"name": name, "task": str(info["task"])} for name, info in active.items()]
    return {"skills": _short(skills), "todos": _short(agent.todo_tool.get_todos())}


def restore(agent: t.Any, state: cabc.Mapping[str, t.Any]) -> None:
    """Give *agent* the state that ``keep`` found; a skill it may not have now is left out."""
    available = agent.skill_manager.list_available_skills()
    for skill in _texts(state.get("skills"), "name", "task"):
        if skill["name"] in available:
            agent.skill_manager.activate_skill(skill["name"], skill["task"])
    agent.todo_tool.todos = _texts(state.get("todos"), "content", "status")


def _short(items: cabc.Iterable[cabc.Mapping[str, t.Any]]) -> list[dict[str, str]]:
    first = list(items)[:MAX_TODOS]
    return [{key: clean.words(value)[:MAX_TEXT] for key, value in i.items()} for i in first]


def _texts(items: t.Any, *keys: str) -> list[dict[str, str]]:
    if not isinstance(items, list):
        return []
    return [
        {key: clean.text(item[key]) for key in keys}
        for item in items
        if isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys)
    ]
