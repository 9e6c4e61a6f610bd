"""Every snippet of docs/client.md, run as it stands, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from agentao_web import client as api
from agentao_web import shutdown
from docs import build
from tests.client.terminal import CTRL_D
from tests.client.terminal import Terminal
from tests.client.terminal import environ
from tests.live.harness import Server

pytestmark = pytest.mark.live

PAGE = (build.HERE / "client.md").read_text("utf-8")
URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_python_snippet(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: t.Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names: dict[str, t.Any] = {}
    for block in blocks("python"):
        exec(compile(block.replace(URL, server.url), "client.md", "exec"), names)
        said = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        shown = capsys.readouterr().out
        assert not said or shown.endswith(said[-1] + "\n"), (block, shown)
    names["client"].close()
    names["inside"]._http.close()
    shutdown(names["app"], grace=2)


def test_every_command(server: Server, tmp_path: Path) -> None:
    (text,) = blocks("sh")
    commands = text.splitlines()
    (tmp_path / "agentao-web").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from agentao_web.cli import main; main()" "$@"\n'
    )
    (tmp_path / "agentao-web").chmod(0o755)
    env = environ(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = []
    for command in commands:
        command = command.replace("chat --demo", f"chat --demo --url {server.url}")
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=60, env=env
        )
        assert done.returncode == 0, (command, done.stderr)
        said.append(done.stdout)
    assert said[:2] == ["1, 2, 3.\n", "hello\n"]
    assert "wrote to plan.txt" in said[2] and '"type": "done"' in said[3]


def test_the_conversation_shown(server: Server) -> None:
    shown = next(block for block in blocks("text") if block.startswith("$ agentao-web chat"))
    _, *lines = shown.splitlines()
    with Terminal("--demo", "--url", server.url, "--session", "plans-shown") as terminal:
        for line in lines:
            line = line.replace("session: plans", "session: plans-shown")
            prompt, typed = re.fullmatch(r"(> |  Run it\?.*: )?(.*)", line).groups()  # type: ignore[union-attr]
            expected = re.sub(r"\d+\\ ms", r"\\d+ ms", re.escape(prompt or line))
            terminal.until(expected)
            if prompt:
                terminal.type(f"{typed}\n")
        terminal.until("\n> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_every_public_name_is_on_the_page() -> None:
    plain = {"Question", "Turn", "End"}
    for name in set(api.__all__) - plain:
        assert re.search(rf"\b{name}\b", PAGE), name
