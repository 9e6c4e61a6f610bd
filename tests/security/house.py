"""Two tenants in one server with real agents; the model's server is scripted."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import time
import typing as t
from pathlib import Path

from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.core.names import SessionKey
from agentao_web.extension import pool_of
from tests.model_server import ModelServer
from tests.patience import PATIENCE

KEY = "the-security-tests-own-key"


class House:
    """A server's application; ``again`` is another worker, or the same one started anew."""

    #: What the host brings along: ``tools=``, ``rules=``.
    brings: t.ClassVar[dict[str, t.Any]] = {}

    def __init__(self, folder: Path, model: ModelServer, **config: t.Any) -> None:
        self.folder = folder
        self.model = model
        self.config = config
        self.apps: list[Flask] = []
        self.again()

    def again(self, **config: t.Any) -> None:
        """Go on in another application with the same store; the ones before stay."""
        self.config |= config
        app = Flask("house")
        app.config.update(AGENTAO_ROOT=self.folder / "root", AGENTAO_SECRET_KEYS=KEY)
        app.config.update({f"AGENTAO_{k.upper()}": v for k, v in self.config.items()})
        AgentaoWeb(**self.brings).init_app(app)
        self.apps.append(app)

    def close(self) -> None:
        self.model.release()
        for app in self.apps:
            shutdown(app, grace=2)

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def key(who: str, sid: str = "s") -> SessionKey:
        tenant, _, user = who.partition("/")
        return SessionKey(tenant, user, sid)

    def request(self, method: str, path: str, who: str, **given: t.Any) -> t.Any:
        tenant, _, user = who.partition("/")
        token = Tokens([KEY]).issue(Principal(tenant, user), ttl=600)
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        headers |= given.pop("headers", {})
        client = self.apps[-1].test_client()
        return client.open(path, method=method, headers=headers, **given).json

    def start(self, message: str, who: str = "acme/ann", sid: str = "s") -> None:
        self.request("POST", f"/chat/{sid}", who, json={"message": message})

    def ask(self, message: str, who: str = "acme/ann", sid: str = "s") -> dict[str, t.Any]:
        """How the turn ended."""
        headers = {"Prefer": f"wait={int(PATIENCE)}"}
        given = {"json": {"message": message}, "headers": headers}
        body = self.request("POST", f"/chat/{sid}", who, **given)
        assert body.get("status") not in (None, "running", "queued"), body
        return t.cast(dict[str, t.Any], body)

    def call(self, tool: str, who: str = "acme/ann", sid: str = "s", **arguments: t.Any) -> str:
        """What the model is told when it uses *tool*."""
        self.ask(f"call {tool} {json.dumps(arguments)}\nsay done", who, sid)
        last = self.model.requests[-1].body["messages"][-1]
        if last["role"] == "user":  # agentao's own reminder at the end
            last = self.model.requests[-1].body["messages"][-2]
        assert last["role"] == "tool", last
        return str(last["content"])

    def delete(self, who: str = "acme/ann", sid: str = "s") -> None:
        assert self.request("DELETE", f"/session/{sid}", who) == {"ok": True}

    def events(self, who: str = "acme/ann", sid: str = "s") -> list[dict[str, t.Any]]:
        page = self.request("GET", f"/chat/{sid}/events?wait=0&limit=1000", who)
        return t.cast(list[dict[str, t.Any]], page["events"])

    def evict(self) -> None:
        """Put every idle session out of memory."""
        pool = pool_of(self.apps[-1])
        pool.tick(pool.clock() + 10_000)
        assert pool.counts()["sessions"] == 0

    def workspace(self, who: str = "acme/ann", sid: str = "s") -> Path:
        from agentao_web.agents.workspaces import Workspaces

        settings = self.apps[-1].extensions["agentao_web"].settings
        return Workspaces(settings.root, settings.workspace).make(self.key(who, sid))

    @property
    def tools(self) -> set[str]:
        """Names of the tools the model was last told of."""
        return {tool["function"]["name"] for tool in self.model.requests[-1].body["tools"]}

    @property
    def sent(self) -> str:
        """All that went to the model in the last request."""
        return json.dumps(self.model.requests[-1].body, ensure_ascii=False)


@contextlib.contextmanager
def model_here(monkeypatch: t.Any) -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-the-operators-own-key")
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_MODEL", "scripted")
        yield server


def until(condition: cabc.Callable[[], t.Any], complaint: str) -> t.Any:
    """Ask again until it holds, or fail with *complaint*."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)  # Between two looks at another process.
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a dead one nobody has waited for does not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def tenants(folder: Path, text: str) -> Path:
    """An operator's file of rules per tenant."""
    path = folder / "tenants.toml"
    path.write_text(text)
    return path
