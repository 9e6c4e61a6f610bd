"""Real nginx on loopback with the project's own config, in a folder of its own."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
import typing as t
from pathlib import Path

import httpx

from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT
from tests.live.harness import token

CONF = PROJECT / "deploy" / "nginx.conf"
#: Debian has it where only root looks.
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"


class Nginx:
    """nginx in front of *upstreams* (``unix:/path``, ``127.0.0.1:8000``), gone with its block.

    *edit* changes the rendered config, to break it on purpose.
    """

    def __init__(
        self,
        folder: Path,
        upstreams: cabc.Sequence[str],
        *,
        edit: cabc.Callable[[str], str] = lambda text: text,
    ) -> None:
        self.folder = folder / "nginx"
        self.folder.mkdir()
        self.access_log = self.folder / "access.log"
        self.error_log = self.folder / "error.log"
        self.certificate = self.folder / "certificate.pem"
        _certify(self.folder)
        with contextlib.ExitStack() as stack:
            # nginx takes over listeners it is given so, as when it replaces itself: nobody gets
            # the ports in between.
            listeners = [
                stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)
            ]
            ports = [listener.getsockname()[1] for listener in listeners]
            self.plain_port, self.port, self.metrics_port = ports
            text = edit(render(CONF.read_text(), self.folder, upstreams, *ports))
            (self.folder / "nginx.conf").write_text(_around(self.folder, text))
            fds = [listener.fileno() for listener in listeners]
            self.process = subprocess.Popen(
                [*self.command, "-g", "daemon off;"],
                env={**os.environ, "NGINX": "".join(f"{fd};" for fd in fds)},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.url = f"https://127.0.0.1:{self.port}"
        self.plain_url = f"http://127.0.0.1:{self.plain_port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}"
        self.trust = ssl.create_default_context(cafile=str(self.certificate))
        try:
            self._until_alive()
        except BaseException:
            self.stop()
            raise

    @property
    def command(self) -> list[str]:
        """nginx with its folder and config; append what it is to do."""
        conf = self.folder / "nginx.conf"
        return [NGINX, "-p", str(self.folder), "-e", str(self.error_log), "-c", str(conf)]

    def client(self, **options: t.Any) -> httpx.Client:
        """A client that trusts the certificate; close it."""
        headers = {"Authorization": f"Bearer {token()}", **options.pop("headers", {})}
        options.setdefault("timeout", PATIENCE)
        # httpx2's trust, not the system's; its ALPN follows http2=.
        trust = ssl.create_default_context(cafile=str(self.certificate))
        return httpx.Client(
            base_url=self.url, verify=trust, headers=headers, trust_env=False, **options
        )

    def stop(self) -> None:
        """Fast: open connections are cut."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _until_alive(self) -> None:
        """Its listeners are there from the start: any answer means that it reads them."""
        until = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, self._complaint()
            with contextlib.suppress(httpx.TransportError):
                httpx.get(self.plain_url, timeout=10, trust_env=False)
                return
            assert time.monotonic() < until, self._complaint()

    def _complaint(self) -> str:
        return self.error_log.read_text() if self.error_log.exists() else "nginx says nothing"


def render(
    text: str, folder: Path, upstreams: cabc.Sequence[str], plain: int, tls: int, metrics: int
) -> str:
    """The project's config with other addresses and paths, and nothing else changed."""
    servers = "".join(f"    server {address} max_fails=0;\n" for address in upstreams)
    for pattern, replacement in (
        (r"(?m)(^    server unix:.*\n)+", servers),
        (r"(?m)^ *listen \[::\].*\n", ""),
        (r"listen 80;", f"listen 127.0.0.1:{plain};"),
        (r"listen 443 ", f"listen 127.0.0.1:{tls} "),
        (r"listen 127.0.0.1:9180;", f"listen 127.0.0.1:{metrics};"),
        (r"/etc/ssl/private/agents.example.com.key", str(folder / "key.pem")),
        (r"/etc/ssl/agents.example.com.pem", str(folder / "certificate.pem")),
        (r"/var/log/nginx/agentao.log", str(folder / "access.log")),
        (r"/var/log/nginx/agentao-events.log", str(folder / "events.log")),
    ):
        text, times = re.subn(pattern, lambda _, to=replacement: to, text)
        assert times, f"nothing in nginx.conf is like {pattern}"
    return text


def _around(folder: Path, text: str) -> str:
    """What Debian's nginx.conf has around a file of conf.d, with gzip on and paths of our own."""
    user = "user root;" if os.geteuid() == 0 else ""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temps = "\n".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    return f"""
{user}
pid {folder / "nginx.pid"};
error_log {folder / "error.log"};
worker_processes 1;
events {{ worker_connections 2048; }}
http {{
default_type application/octet-stream;
sendfile on;
gzip on;
{temps}
{text}
}}
"""


def _certify(folder: Path) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")),
        ],
        check=True,
        capture_output=True,
    )
