"""What is imported when: a command, a test or a host's start does not pay for what runs turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import agentao_web

#: What only turns need, or the other side of the wire.
HEAVY = ("agentao", "httpx", "httpx2", "mcp", "openai", "pydantic", "regex", "sqlalchemy")
#: A host's environment in which everything would be loaded, if it were.
ENVIRONMENT = {
    "OPENAI_API_KEY": "sk-of-nobody",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    "OPENAI_MODEL": "some-model",
    "AGENTAO_SECRET_KEYS": "the-import-tests-own-key",
    "AGENTAO_DATABASE_URL": "",
    "AGENTAO_METRICS_TOKEN": "the-import-tests-own-token",
}
SHOP = """
from flask import Flask
from agentao_web import AgentaoWeb, Principal

app = Flask("shop")
app.config.update(AGENTAO_ROOT="root")
AgentaoWeb(authenticate=lambda request: Principal("shop")).init_app(app, url_prefix="/agent")
"""
TELL = f"""
import atexit, json, sys

def tell():
    with open("imported.json", "w") as file:
        json.dump([name for name in {HEAVY!r} if name in sys.modules], file)

atexit.register(tell)
"""
MAIN = "import sys; from agentao_web.cli import main; sys.argv[0] = 'agentao-web'; main()"
FLASK = "import sys; from flask.cli import main; sys.argv[0] = 'flask'; main()"


def run(folder: Path, code: str, *args: str) -> tuple[set[str], str]:
    """What of HEAVY a process had imported at its end, and what it said."""
    (folder / "shop.py").write_text(SHOP)
    done = subprocess.run(
        [sys.executable, "-c", TELL + code, *args],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads((folder / "imported.json").read_text())), done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import agentao_web",
        "from agentao_web import AgentaoWeb, Principal, Rules, SessionInfo, create_app, shutdown",
        "from agentao_web.testing import ask, say, scripted",
        "import agentao_web; agentao_web.create_app()",
        "import sys; sys.path.insert(0, ''); import shop",
        # A worker that never served, on its way out.
        "import agentao_web; agentao_web.shutdown(agentao_web.create_app())",
    ],
)
def test_a_host_that_starts_imports_little(tmp_path: Path, code: str) -> None:
    assert run(tmp_path, code)[0] == set()


def test_requests_that_start_no_turn_import_little(tmp_path: Path) -> None:
    asking = """
import sys; sys.path.insert(0, '')
import shop
client = shop.app.test_client()
for path in ("/agent/healthz", "/agent/openapi.json", "/agent/", "/agent/page/config.json"):
    assert client.get(path).status_code == 200, path
"""
    assert run(tmp_path, asking)[0] == set()


def test_the_client_imports_nothing_of_the_server(tmp_path: Path) -> None:
    code = """
import sys
import agentao_web.client
print({"flask", "gunicorn", "werkzeug"} & {name.split(".")[0] for name in sys.modules})
"""
    imported, output = run(tmp_path, code)
    assert imported == {"httpx"}
    assert output == "set()\n"


@pytest.mark.parametrize(
    ("code", "args", "says"),
    [
        (MAIN, ("--help",), "doctor"),
        (MAIN, ("--version",), "agentao-web"),
        (MAIN, ("chat", "--help"), "MESSAGE"),
        (MAIN, ("doctor", "--help"), "--url"),
        (MAIN, ("serve", "--help"), "--bind"),
        (MAIN, ("db", "--help"), "backup"),
        (MAIN, ("token", "--tenant", "acme"), "."),
        (MAIN, ("workspace", "--tenant", "acme"), "workspaces"),
        (FLASK, ("--app", "shop", "routes"), "agentao.start_turn"),
        (FLASK, ("--app", "shop", "agentao", "--help"), "doctor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_imports_little(
    tmp_path: Path, code: str, args: tuple[str, ...], says: str
) -> None:
    imported, output = run(tmp_path, code, *args)
    assert imported == set()
    assert says in output


def test_a_command_that_reads_the_database_imports_no_agents(tmp_path: Path) -> None:
    made, output = run(tmp_path, MAIN, "db", "check")
    assert "ok" in output
    assert made == {"sqlalchemy"}


def test_a_worker_has_imported_everything_before_it_serves(tmp_path: Path) -> None:
    """The first turn of a worker is not the one that waits for the SDK."""
    serving = """
import sys; sys.path.insert(0, '')
import shop
from agentao_web import extension
extension.warm(shop.app)
before = set(sys.modules)
answer = shop.app.test_client().post(
    "/agent/chat/s",
    json={"message": "hi", "on_disconnect": "continue"},
    headers={"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"},
)
assert answer.json["error"]["code"] == "llm_unavailable", answer.json
extension.shutdown(shop.app, 5)
late = {name.partition(".")[0] for name in set(sys.modules) - before}
print("late:", late & {"agentao", "agentao_web", "httpx2", "openai", "sqlalchemy"})
"""
    imported, output = run(tmp_path, serving)
    assert {"agentao", "httpx2", "openai", "sqlalchemy"} <= imported
    assert "mcp" not in imported, "nobody asked for a server"
    assert "late: set()" in output


def test_every_public_name_is_there(tmp_path: Path) -> None:
    code = "import agentao_web as a; print(*(getattr(a, name).__name__ for name in a.__all__))"
    assert run(tmp_path, code)[1].split() == agentao_web.__all__
