"""Programs for node, with the packages that ``make node`` installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import typing as t
from pathlib import Path

from tests.patience import PATIENCE

FOLDER = Path(__file__).parent.parent / "node"
PACKAGES = FOLDER / "node_modules"


def node(*command: str | Path, cwd: Path = FOLDER) -> str:
    """What a program prints; it must end well."""
    binary = shutil.which("node")
    assert binary and PACKAGES.is_dir(), "this test needs node and its packages: make node"
    # No proxy of the machine stands between a client and 127.0.0.1.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [binary, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def run(script: str | Path, *arguments: t.Any) -> t.Any:
    """The JSON that *script* prints, of *arguments* as JSON."""
    return json.loads(node(script, *(json.dumps(argument) for argument in arguments)))
