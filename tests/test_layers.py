"""The floor plan: which room may look into which, and where threads and conditions live."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import agentao_web

HOUSE = Path(agentao_web.__file__).parent

#: Room -> the rooms it may import. Doors open one way; what is not here may import nothing of ours.
DOORS: dict[str, set[str]] = {
    "core": set(),
    "store": {"core"},
    "wire": {"core"},
    "metrics": {"core"},
    "traces": {"core"},
    "logs": {"core"},
    "config": {"core"},
    "auth": {"core"},
    "demo": set(),
    "live": {"core", "store"},
    "readers": {"core", "live", "store"},
    "questions": {"core", "live", "store"},
    "readiness": {"core"},
    "chores": {"core"},
    "endings": {"chores", "core", "live", "questions", "store"},
    "runner": {"core", "endings", "live", "questions", "store"},
    "peers": {"core", "live", "questions", "readiness", "runner", "store"},
    "sessions": {"core", "live", "peers", "questions", "readiness", "runner", "store"},
    "agents": {"core", "demo"},
    "slots": set(),
    # Gevent has to patch before anything else of ours is imported.
    "green": set(),
    "serving": {"core", "green"},
    "page": set(),
    "views": {
        "auth",
        "config",
        "core",
        "live",
        "page",
        "readers",
        "readiness",
        "serving",
        "sessions",
        "slots",
        "store",
        "wire",
    },
    "extension": {
        "agents",
        "auth",
        "config",
        "core",
        "logs",
        "metrics",
        "readers",
        "readiness",
        "serving",
        "sessions",
        "slots",
        "store",
        "traces",
        "views",
        "wire",
    },
    "addresses": {"config"},
    "workers": {"addresses", "config", "extension", "green", "logs"},
    "doctor": {"agents", "config", "core", "store"},
    # Of the server it knows nothing but the protocol.
    "client": set(),
    "terminal": {"client"},
    "cli": {
        "agents",
        "auth",
        "config",
        "core",
        "doctor",
        "extension",
        "store",
        "terminal",
        "workers",
    },
    "testing": {"agents", "core"},
    "__init__": {"agents", "core", "extension"},
}

#: Libraries that belong to one room.
ONLY_IN = {
    "agentao": {"agents"},
    "mcp": {"agents"},
    "flask": {"auth", "cli", "extension", "page", "views"},
    "werkzeug": {"extension", "views"},
    "itsdangerous": {"auth"},
    "gevent": {"green"},
    "gunicorn": {"workers"},
    "sqlalchemy": {"store"},
    "httpx": {"client"},
    "httpx_sse": {"client"},
    "httpx2": {"agents", "doctor"},
    "httpcore2": {"agents"},
    "openai": {"agents"},
    "regex": {"agents"},
    "prometheus_client": {"metrics"},
    "opentelemetry": {"traces"},
    "pydantic": {"agents"},
    "pydantic_core": {"agents"},
}

#: Calls that start or wait for threads, and the files they belong in.
THREADS = {
    "Thread": {
        "agents/tools.py",
        "readers.py",
        "readiness.py",
        "runner.py",
        "peers.py",
        "sessions.py",
        "workers.py",
        "store/writer.py",
        "terminal/talk.py",
    },
    "Condition": {"live.py", "runner.py"},
}

FILES = sorted(path.relative_to(HOUSE) for path in HOUSE.rglob("*.py"))


def room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, also under TYPE_CHECKING; relative ones made absolute."""
    found: set[str] = set()
    package = ["agentao_web", *path.parts[:-1]]
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_doors_open_one_way(path: Path) -> None:
    mine = room(path)
    assert mine in DOORS, f"{path} is not in the floor plan"
    for name in imports(path):
        if name.startswith("agentao_web."):
            other = name.split(".")[1]
            assert other == mine or other in DOORS[mine], f"{path} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in imports(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        assert rooms is None or room(path) in rooms, f"{path} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_threads_and_conditions_are_where_they_belong(path: Path) -> None:
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in THREADS:
                assert path.as_posix() in THREADS[name], f"{path} must not make a {name}"


def test_core_knows_no_thread_clock_or_socket() -> None:
    forbidden = {"threading", "time", "socket", "select", "asyncio", "random", "os", "datetime"}
    for path in FILES:
        if room(path) == "core":
            assert not {name.split(".")[0] for name in imports(path)} & forbidden, path


def test_the_plan_names_only_rooms_that_exist() -> None:
    assert set(DOORS) == {room(path) for path in FILES}
