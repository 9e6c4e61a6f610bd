"""The doctor before a real nginx, which is broken on purpose in one way after another."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from agentao_web.doctor import Finding
from agentao_web.doctor import lines
from agentao_web.doctor.proxy import Site
from agentao_web.doctor.proxy import examine
from tests.live.harness import KEY
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import token
from tests.live.nginx import Nginx

pytestmark = pytest.mark.live

QUICK = {"AGENTAO_HEARTBEAT": "1", "AGENTAO_DISCONNECT_GRACE": "1"}
Edit = cabc.Callable[[str], str]


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[list[str]]:
    """Two workers on one database, each with an address of its own."""
    folder = tmp_path_factory.mktemp("workers")
    with contextlib.ExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            shared = {"AGENTAO_ROOT": str(folder / "root"), **QUICK}
            servers.append(stack.enter_context(Server(folder / name, AGENTAO_DEMO="1", **shared)))
        yield [f"127.0.0.1:{server.port}" for server in servers]


def site(nginx: Nginx, **changes: t.Any) -> Site:
    found = Site(
        nginx.url,
        {"Authorization": f"Bearer {token('doctor', '')}"},
        max_body=20 * 2**20,
        patience=20,
        grace=1,
        wait=2,
        message="count to 30",
        ca=str(nginx.certificate),
    )
    return dataclasses.replace(found, **changes)


def said(findings: cabc.Iterable[Finding], level: str) -> dict[str, str]:
    """Check -> message and cure, of one level."""
    return {one.check: f"{one.message}\n{one.cure}" for one in findings if one.level == level}


def replaced(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def in_server(line: str) -> Edit:
    return replaced("proxy_http_version 1.1;", f"proxy_http_version 1.1; {line}")


def test_a_good_proxy_gets_no_complaint(tmp_path: Path, upstreams: list[str]) -> None:
    with Nginx(tmp_path, upstreams) as nginx:
        findings = list(examine(site(nginx)))
        with nginx.client(headers=site(nginx).headers) as client:
            left = client.get("/sessions").json()["sessions"]
    text = "\n".join(lines(findings))
    assert not said(findings, "wrong"), text
    assert set(said(findings, "hint")) <= {"tls", "headers"}, text
    good = said(findings, "ok")
    assert any("gets a comment after" in f.message for f in findings), text
    assert "came as they were said" in good["buffering"] and "2 workers" in good["sticky"], text
    assert "is stopped" in good["leaving"], text
    assert left == [], "it takes its session away again"


BUFFERED = "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"
#: name -> how nginx is broken, the check that finds it, how bad it is, and a line of the cure.
BROKEN: dict[str, tuple[Edit, str, str, str]] = {
    "buffering": (
        in_server(BUFFERED),
        "buffering",
        "wrong",
        "proxy_buffering off;",
    ),
    "gzip": (
        replaced("gzip_types ", "gzip_types text/event-stream "),
        "gzip",
        "wrong",
        "gzip_types",
    ),
    "read timeout": (
        replaced("proxy_read_timeout 90s;", "proxy_read_timeout 700ms;"),
        "timeout",
        "wrong",
        "proxy_read_timeout 90s;",
    ),
    "no hash": (
        replaced("hash $agentao_key consistent;", ""),
        "sticky",
        "hint",
        "hash $agentao_key consistent;",
    ),
    "hidden header": (
        in_server("proxy_hide_header Cache-Control;"),
        "headers",
        "wrong",
        "proxy_hide_header Cache-Control",
    ),
    "small bodies": (
        replaced("client_max_body_size 20m;", "client_max_body_size 1m;"),
        "body",
        "wrong",
        "client_max_body_size 20m;",
    ),
    "error pages": (
        in_server("proxy_intercept_errors on; error_page 404 = @gone;"),
        "errors",
        "wrong",
        "proxy_intercept_errors off;",
    ),
    "open metrics": (
        replaced(
            "        return 404;\n    }\n\n    # Our", '        return 200 "x 1";\n    }\n\n#'
        ),
        "metrics",
        "wrong",
        "location ~ /metrics$ { return 404; }",
    ),
    "no Authorization": (
        in_server('proxy_set_header Authorization "";'),
        "token",
        "wrong",
        "proxy_set_header Authorization",
    ),
    "few methods": (
        replaced(
            "location / {\n        proxy_pass http://agentao;",
            "location / {\n        limit_except GET POST { deny all; }\n"
            "        proxy_pass http://agentao;",
        ),
        "methods",
        "wrong",
        "limit_except",
    ),
    "deaf to those who leave": (
        # What is passed on at once fails at once; it is what is kept back that nobody misses.
        in_server(f"proxy_ignore_client_abort on; {BUFFERED}"),
        "leaving",
        "wrong",
        "proxy_ignore_client_abort on;",
    ),
    "no HTTP/2": (replaced(" ssl http2;", " ssl;"), "tls", "hint", "http2 on;"),
}


#: Found only after waits that others do not need.
SLOW = "deaf to those who leave"
#: What is collected is late too, comments as well, and a stream that is cut has no end.
FOLLOWS = {
    "buffering": {"timeout"},
    "deaf to those who leave": {"buffering", "timeout"},
    "gzip": {"buffering", "timeout"},
    "read timeout": {"stream"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n == SLOW else []) for n in BROKEN],
)
def test_what_is_broken_is_found(tmp_path: Path, upstreams: list[str], name: str) -> None:
    edit, check, level, cure = BROKEN[name]

    def broken(text: str) -> str:
        page = 'location @gone { internal; return 404 "a page"; }\n    location / {'
        return edit(text).replace("location / {", page, 1)

    with Nginx(tmp_path, upstreams, edit=broken) as nginx:
        # Only a buffered comment is worth no waiting for.
        patience = 5 if name in ("buffering", "deaf to those who leave") else 20
        findings = list(examine(site(nginx, patience=patience)))
    text = "\n".join(lines(findings))
    assert any(f.check == check and f.level == level and cure in f.cure for f in findings), text
    if name == "read timeout":
        told = [f.message for f in findings if f.check == "timeout" and f.level == "wrong"]
        assert ["stream" in message for message in told] == [True, False], text
    others = set(said(findings, "wrong")) - {check}
    assert others <= FOLLOWS.get(name, set()), text


def test_a_server_that_is_not_there(tmp_path: Path, upstreams: list[str]) -> None:
    with Nginx(tmp_path, ["127.0.0.1:1"]) as nginx:
        for changes, check, word in (
            ({}, "url", "does not reach the server"),
            ({"url": nginx.plain_url}, "url", "is redirected to https://"),
            ({"ca": None}, "tls", "certificate"),
            ({"url": "http://127.0.0.1:1"}, "url", "does not answer"),
        ):
            (found,) = (f for f in examine(site(nginx, **changes)) if f.level == "wrong")
            assert found.check == check and word in found.message and found.cure
    with Nginx(tmp_path / "..", upstreams[:1]) as nginx:
        (found,) = examine(site(nginx, url=nginx.url + "/agent"))
        assert found.level == "wrong" and "url_prefix" in found.cure


def test_the_command_line_looks_through_the_proxy(tmp_path: Path, upstreams: list[str]) -> None:
    with Nginx(tmp_path, upstreams, edit=in_server("proxy_hide_header Cache-Control;")) as nginx:
        command = [sys.executable, "-c", "from agentao_web.cli import main; main()", "doctor"]
        command += ["--json", "--url", nginx.url, "--ca", str(nginx.certificate)]
        command += ["--patience", "8", "--message", "count to 30"]
        done = subprocess.run(
            command,
            env=os.environ
            | {"AGENTAO_DEMO": "1", "AGENTAO_ROOT": str(tmp_path), "AGENTAO_SECRET_KEYS": KEY}
            | QUICK,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["ok"] is False, done.stdout + done.stderr
    wrong = [found for found in told["findings"] if found["level"] == "wrong"]
    assert [found["check"] for found in wrong] == ["headers"]
    assert {"settings", "store", "model", "threads", "sticky"} <= {
        found["check"] for found in told["findings"]
    }
