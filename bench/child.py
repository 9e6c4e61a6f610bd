"""A child process that obeys one JSON line at a time: commands in, results out."""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import subprocess
import sys
import traceback
import typing as t
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
Commands = cabc.Mapping[str, cabc.Callable[..., t.Any]]


class Child:
    """`python -m module` of ours, asked by name; ends with the `with` block."""

    def __init__(self, module: str, env: cabc.Mapping[str, str], log: Path) -> None:
        self._module = module
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=HERE,
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, name: str, /, **arguments: t.Any) -> t.Any:
        """What the child returns for *name*; RuntimeError if it fails there."""
        self.tell(name, **arguments)
        return self.answer()

    def tell(self, name: str, /, **arguments: t.Any) -> None:
        """Send *name* and do not wait; fetch the ``answer`` later."""
        assert self._process.stdin is not None
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)

    def answer(self) -> t.Any:
        """The result of the oldest command not answered yet."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended: {self._process.wait()}")
        ok, value = json.loads(line)
        if not ok:
            raise RuntimeError(f"{self._module}: {value}")
        return value


def serve(commands: Commands) -> None:
    """The child's side: obey standard input until it is closed."""
    out = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not get between the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = [True, commands[name](**arguments)]
        except Exception as exc:
            traceback.print_exc()
            answer = [False, f"{name}: {type(exc).__name__}: {exc}"]
        print(json.dumps(answer), file=out, flush=True)
