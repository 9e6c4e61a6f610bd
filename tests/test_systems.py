"""The default path under other conditions: no docstrings, and a system without Linux's names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from tests.live.harness import PROJECT


def first_use(folder: Path, *flags: str, system: str = "") -> dict[str, t.Any]:
    command = [sys.executable, *flags, "-m", "tests.default_path", str(folder), system]
    done = subprocess.run(
        [word for word in command if word],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return t.cast(dict[str, t.Any], json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("flags", "system"),
    [(("-OO",), ""), ((), "darwin"), pytest.param((), "", marks=pytest.mark.long)],
    ids=["OO", "macOS", "as it is"],
)
def test_the_demo_answers_asks_and_writes(
    tmp_path: Path, flags: tuple[str, ...], system: str
) -> None:
    said = first_use(tmp_path, *flags, system=system)
    first, second, third = said["replies"]
    assert first == "hello"
    assert (second, "milk" in third) == (second, True), said
    assert said["missing"]["message"] == "There is nothing here by that name."
    for complaint in said["shells"]:
        assert "works on Linux only" in complaint and "AGENTAO_SHELL=off" in complaint
    assert bool(said["shells"]) is bool(system)


def test_the_doctor_runs_where_there_is_no_proc(tmp_path: Path) -> None:
    code = (
        "from tests.default_path import become; become('darwin')\n"
        "from agentao_web.cli import main; main(['doctor', '--no-model', '--json'])"
    )
    environ = {**os.environ, "AGENTAO_DEMO": "1", "AGENTAO_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert {"limits", "disk"} <= {found["check"] for found in json.loads(done.stdout)["findings"]}
