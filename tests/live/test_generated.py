"""Clients that are generated from /openapi.json, without a warning, hold a conversation."""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from tests.live.harness import Server
from tests.live.harness import token
from tests.live.node import FOLDER
from tests.live.node import PACKAGES
from tests.live.node import PATIENCE
from tests.live.node import node

pytestmark = pytest.mark.live

#: What both print of the same conversation.
TALK: dict[str, t.Any] = {
    "counted": "1, 2, 3.",
    "text": "1, 2, 3.",
    "written": "completed",
    "waited": "so",
    "refused": "invalid_request",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), AGENTAO_DEMO="1") as running:
        yield running


def contract(server: Server, folder: Path) -> Path:
    path = folder / "openapi.json"
    path.write_bytes(server.client.get("/openapi.json").content)
    return path


def python(*command: str | Path, path: Path) -> str:
    # The generator has the code formatted by the ruff that is beside it.
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": beside, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def test_a_client_by_openapi_python_client(server: Server, tmp_path: Path) -> None:
    made = tmp_path / "made"
    generate = ["-m", "openapi_python_client", "generate", "--fail-on-warning"]
    said = python(
        *generate, "--path", contract(server, tmp_path), "--output-path", made, path=tmp_path
    )
    assert "warning" not in said.lower()
    script = Path(__file__).parent / "generated.py"
    told = json.loads(python(script, server.url, token(), path=made))
    assert told["listed"] == ["python"]
    assert told["contents"][:2] == ["count to 3", "1, 2, 3."]
    assert "write_file" in told["contents"]
    assert {name: told[name] for name in TALK} == TALK


def test_a_client_by_openapi_typescript(server: Server, tmp_path: Path) -> None:
    contract(server, tmp_path)
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(FOLDER / "turn.ts", tmp_path)
    tools = {name: PACKAGES / ".bin" / name for name in ("openapi-typescript", "tsc")}
    said = node(tools["openapi-typescript"], "openapi.json", "-o", "schema.ts", cwd=tmp_path)
    assert "warn" not in said.lower()
    strict = ["--strict", "--noUncheckedIndexedAccess", "--exactOptionalPropertyTypes"]
    target = ["--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom,dom.iterable"]
    node(tools["tsc"], *strict, *target, "--skipLibCheck", "turn.ts", cwd=tmp_path)
    asked = json.dumps({"url": server.url, "token": token()})
    told = json.loads(node("turn.js", asked, cwd=tmp_path))
    assert {name: told[name] for name in TALK} == TALK
    assert "write_file" in told["contents"]
    assert '"reply":"on"' in told["streamed"] and told["streamed"].startswith("data: ")
