"""The server under test: real Gunicorn with the project's own config, one worker."""

from __future__ import annotations

import collections.abc as cabc
import itertools
import secrets
import signal
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

from agentao_web.auth import Tokens
from agentao_web.core.names import Principal
from bench import proc
from bench.child import HERE
from bench.client import Target
from bench.client import whole

_numbers = itertools.count(1)


class Server:
    """Gunicorn from `with` to the end of it; `pid` is its worker."""

    def __init__(
        self,
        env: cabc.Mapping[str, str],
        folder: Path,
        *flags: str,
        **settings: str | int,
    ) -> None:
        # Two that are given the same root and keys are two workers of one deployment.
        key = str(settings.get("secret_keys") or secrets.token_urlsafe(32))
        number = next(_numbers)
        self._log = folder / f"gunicorn-{number}.log"
        ours = {f"AGENTAO_{k.upper()}": str(v) for k, v in settings.items()}
        # The listener is made here: no guess at a free port, and a connect waits until it is up.
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            port = listener.getsockname()[1]
            fd = listener.fileno()
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py"),
                        *("--bind", f"fd://{fd}", *flags, "wsgi_app:app"),
                    ],
                    cwd=HERE,
                    env={
                        **env,
                        "AGENTAO_ROOT": str(folder / f"root-{number}"),
                        "AGENTAO_SECRET_KEYS": key,
                        # One user opens them all here.
                        "AGENTAO_MAX_STREAMS_PER_USER": "100000",
                        "AGENTAO_MAX_STREAMS_PER_TENANT": "100000",
                        **ours,
                    },
                    pass_fds=[fd],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.target = Target(port, Tokens([key]).issue(Principal("bench", "ann"), ttl=86_400))
            self.pid = self._worker()

    def _worker(self) -> int:
        try:
            status, _ = self.target.call("GET", "/healthz")
        except OSError as exc:
            self._end()
            raise RuntimeError(f"gunicorn did not start:\n{self._log.read_text()}") from exc
        found = proc.children(self._process.pid)
        if status != 200 or len(found) != 1:
            self._end()
            raise RuntimeError(f"healthz said {status}; workers {found}")
        return found[0]

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(45)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def known(self, sid: str = "") -> str:
        """A session that has answered once."""
        sid = sid or f"s{next(_numbers)}"
        whole(self.target.turn(sid, "say hi"))
        return sid

    def complaints(self) -> list[str]:
        """Lines of the server's log that are not about starting and stopping."""
        return [line for line in self._log.read_text().splitlines() if "[INFO]" not in line]
