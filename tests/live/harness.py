"""Real gunicorn on loopback, in a folder of its own, gone when the test is."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import httpx

from agentao_web import Principal
from agentao_web.auth import Tokens
from tests.model_server import ModelServer
from tests.patience import PATIENCE

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
KEY = "the-live-tests-own-key"


def token(tenant: str = "acme", user: str = "ann") -> str:
    return Tokens([KEY]).issue(Principal(tenant, user), ttl=3600)


class Server:
    """A gunicorn master and its workers, in a process group of their own.

    With *addresses* that many workers, and each at a socket of its own (``upstreams``).
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        app: str = "wsgi_app:app",
        conf: str | None = str(PROJECT / "gunicorn.conf.py"),
        addresses: int = 0,
        command: cabc.Sequence[str] = (),
        answers: int = 200,
        **env: str,
    ) -> None:
        """*command* starts another server than gunicorn, with PORT for the number of its port.

        It has started as soon as its health check *answers* with that status.
        """
        self.folder = folder
        self.sockets = [folder / "run" / f"{number}.sock" for number in range(addresses)]
        self.upstreams = [f"unix:{path}" for path in self.sockets]
        if addresses:
            env = {"AGENTAO_WORKERS": str(addresses), "AGENTAO_SOCKETS": str(folder / "run"), **env}
        self.log = folder / "gunicorn.log"
        (folder / "home").mkdir(exist_ok=True)
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            self.log.open("wb") as log,
        ):
            # Handed down, so that nobody takes the port in between.
            self.port = listener.getsockname()[1]
            listener.set_inheritable(True)
            other = [word.replace("PORT", str(self.port)) for word in command]
            command = [sys.executable, "-m", "gunicorn", *(("-c", conf) if conf else ())]
            if other:
                listener.close()
            elif addresses == 1:
                # One worker of its own accord has no socket.
                self.sockets[0].parent.mkdir()
                command += ["--bind", self.upstreams[0]]
            elif not addresses:
                command += ["--bind", f"fd://{listener.fileno()}"]
            command += [*args, app]
            self.process = subprocess.Popen(
                other or command,
                cwd=PROJECT,
                env=self._environ(env),
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[] if other else [listener.fileno()],
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = self.at(0) if addresses else self._client()
        try:
            self._until_alive(answers)
        except BaseException:
            self.__exit__()
            raise

    def at(self, number: int) -> httpx.Client:
        """A client of one worker; close it."""
        return self._client(transport=httpx.HTTPTransport(uds=str(self.sockets[number])))

    def _client(self, **options: t.Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token()}"},
            timeout=httpx.Timeout(PATIENCE),
            trust_env=False,
            **options,
        )

    def _environ(self, env: dict[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTAO_", "OPENAI_"))}
        return {
            **kept,
            "PYTHONPATH": str(PROJECT),
            "HOME": str(self.folder / "home"),
            "AGENTAO_ROOT": str(self.folder / "root"),
            "AGENTAO_SECRET_KEYS": KEY,
            **env,
        }

    def _until_alive(self, answers: int) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, self.log.read_text()
            if self.sockets and not listens(self.sockets[0]):
                # The client below would leave a socket open.
                assert time.monotonic() < until, self.log.read_text()
                time.sleep(0.02)  # Between two looks at another process.
                continue
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/healthz", timeout=10).status_code == answers:
                    return
            assert time.monotonic() < until, self.log.read_text()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        # Whoever is left of the group, workers of a killed master included.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def workers(self) -> list[int]:
        """The pids of the master's children."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def signal(self, number: int, pid: int | None = None) -> None:
        os.kill(pid or self.process.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the master to be gone; its exit code."""
        return self.process.wait(timeout)

    # -- talking to it -------------------------------------------------------------------------

    def post(self, sid: str, message: str, **fields: t.Any) -> httpx.Response:
        """Start a turn and do not wait."""
        return self.client.post(
            f"/chat/{sid}",
            json={"message": message, **fields},
            headers={"Accept": "application/json"},
        )

    def ask(self, sid: str, message: str, **fields: t.Any) -> dict[str, t.Any]:
        """Start a turn and wait for its end."""
        response = self.client.post(
            f"/chat/{sid}",
            json={"message": message, **fields},
            headers={"Accept": "application/json", "Prefer": "wait=50"},
        )
        assert response.status_code == 200, response.text
        return t.cast(dict[str, t.Any], response.json())

    @contextlib.contextmanager
    def stream(self, sid: str, message: str, **fields: t.Any) -> cabc.Iterator[Stream]:
        """Start a turn and read its stream; leaving the block closes the connection."""
        with self.client.stream("POST", f"/chat/{sid}", json={"message": message, **fields}) as r:
            assert r.status_code == 200, r.read()
            yield Stream(r)

    @contextlib.contextmanager
    def follow(self, sid: str, query: str = "", **headers: str) -> cabc.Iterator[Stream]:
        """Read a session's events."""
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        named.setdefault("Accept", "text/event-stream")
        with self.client.stream("GET", f"/chat/{sid}/events{query}", headers=named) as r:
            yield Stream(r)


class Stream:
    """Server-Sent Events as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.retry: int | None = None
        self.comments = 0
        self._lines = response.iter_lines()

    def __iter__(self) -> cabc.Iterator[dict[str, t.Any]]:
        """Every event until the stream ends cleanly; a broken one raises."""
        for line in self._lines:
            if line.startswith("data: "):
                yield json.loads(line[6:])
            elif line.startswith("retry: "):
                self.retry = int(line[7:])
            elif line.startswith(":"):
                self.comments += 1

    def until(self, kind: str) -> dict[str, t.Any]:
        """The first event of *kind*."""
        for event in self:
            if event["type"] == kind:
                return event
        raise AssertionError(f"the stream ended without {kind}")


def model_env(model: ModelServer, **more: str) -> dict[str, str]:
    """The environment that makes the server's agents talk to *model*."""
    return {
        "OPENAI_API_KEY": "sk-test-key-of-the-operator",
        "OPENAI_BASE_URL": model.base_url,
        "OPENAI_MODEL": "scripted",
        **more,
    }


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def eventually(condition: cabc.Callable[[], t.Any], complaint: str) -> t.Any:
    """Ask again until it holds, or fail with *complaint*."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until, complaint
        time.sleep(0.02)  # Between two looks at another process.
    return found
