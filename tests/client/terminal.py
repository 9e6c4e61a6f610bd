"""A person at a terminal: a pseudo-terminal with ``agentao-web chat`` in it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
import typing as t

from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT

CTRL_C, CTRL_D = "\x03", "\x04"
_MAIN = "from agentao_web.terminal import chat; chat(prog_name='agentao-web chat')"
PROGRAM = [sys.executable, "-c", _MAIN]
#: The child takes the terminal for its own, so that Ctrl-C reaches it.
_TAKE = f"import fcntl, os, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); {_MAIN}"


def environ(**more: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("AGENTAO_") and "proxy" not in k.lower()
    }
    return {**kept, "PYTHONPATH": str(PROJECT), "TERM": "dumb", "PYTHONUTF8": "1", **more}


#: After so many seconds without a word a person presses the key again. Longer than a stop takes:
#: a second Ctrl-C while the first is at work leaves the conversation.
_SILENCE = 20.0


class Terminal:
    """``agentao-web chat`` with *arguments*, seen and typed to."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ(**env),
        )
        os.close(slave)
        self.shown = ""
        """All that was ever on it."""
        self._seen = 0

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str, *, press: str = "") -> str:
        """What was shown since the last time, up to *pattern* and with it; see ``_read``."""
        self.type(press)
        until = time.monotonic() + PATIENCE
        while True:
            found = re.compile(pattern).search(self.shown, self._seen)
            if found:
                before, self._seen = self._seen, found.end()
                return self.shown[before : found.end()]
            assert time.monotonic() < until and self._read(press), (
                f"no {pattern!r} in {self.shown[self._seen :]!r}"
            )

    def end(self, *, press: str = "") -> int:
        """Its exit code, after all is shown; see ``_read``."""
        self.type(press)
        while self._read(press):
            pass
        return self._process.wait(PATIENCE)

    def _read(self, press: str = "") -> bool:
        """Whether there was more; False at its end.

        In silence *press* is pressed once more, as people do: CPython's readline looks for signals
        only when its wait for a key is interrupted, so one that comes just before is seen with the
        next key.
        """
        if press and not select.select([self._master], [], [], _SILENCE)[0]:
            self.type(press)
        if not select.select([self._master], [], [], PATIENCE)[0]:
            return False
        with contextlib.suppress(OSError):
            data = os.read(self._master, 65_536)
            self.shown += data.decode("utf-8", "replace")
            return bool(data)
        return False


def run(*arguments: str, input: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """The same in a script."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=input,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env=environ(**env),
    )
