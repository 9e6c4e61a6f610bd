"""The command line, ours and the host's."""

from __future__ import annotations

import collections.abc as cabc
import json
import socket
import sqlite3
import typing as t
from pathlib import Path

import pytest
from click.testing import CliRunner
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.cli import flask_group
from agentao_web.cli import main
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.extension import pool_of
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import Store
from agentao_web.store import TurnRow
from agentao_web.store.sql import SqlStore
from agentao_web.testing import Gate
from agentao_web.testing import pause
from agentao_web.testing import say
from agentao_web.testing import scripted

KEY = "the-command-lines-key"


def invoke(group: t.Any, *args: str, **options: t.Any) -> t.Any:
    return CliRunner().invoke(group, args, catch_exceptions=False, **options)


def test_token_prints_a_token_the_server_takes() -> None:
    env = {"AGENTAO_SECRET_KEYS": KEY}
    result = invoke(main, "token", "--tenant", "acme", "--user", "ann", "--ttl", "60", env=env)
    assert Tokens([KEY]).read(result.output.strip()) == Principal("acme", "ann")
    later = Tokens([KEY], clock=lambda: 4e9)
    assert later.read(result.output.strip()) is None


def test_token_without_a_key_says_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTAO_SECRET_KEYS", raising=False)
    result = invoke(main, "token", "--tenant", "acme")
    assert result.exit_code == 1
    assert "AGENTAO_SECRET_KEYS" in result.output


def test_a_bad_name_is_a_usage_error() -> None:
    result = invoke(main, "token", "--tenant", "a\nb", env={"AGENTAO_SECRET_KEYS": KEY})
    assert result.exit_code == 2


def test_workspace_prints_the_folder_an_agent_works_in(tmp_path: Path) -> None:
    env = {"AGENTAO_ROOT": str(tmp_path), "AGENTAO_SECRET_KEYS": KEY}
    result = invoke(main, "workspace", "--tenant", "acme", "--user", "ann", env=env)
    folder = Path(result.output.strip())
    assert folder.is_dir() and tmp_path in folder.parents
    assert folder.stat().st_mode & 0o077 == 0
    env["AGENTAO_WORKSPACE"] = "session"
    assert invoke(main, "workspace", "--tenant", "acme", env=env).exit_code == 2


def test_a_host_has_the_same_commands_with_its_own_config(tmp_path: Path) -> None:
    app = Flask("host")
    app.config.update(AGENTAO_SECRET_KEYS=KEY, AGENTAO_ROOT=tmp_path)
    AgentaoWeb(agents=scripted(say("x"))).init_app(app)
    app.cli.add_command(flask_group)
    runner = app.test_cli_runner()
    result = runner.invoke(args=["agentao", "token", "--tenant", "acme"])
    assert Tokens([KEY]).read(result.output.strip()) == Principal("acme")
    result = runner.invoke(args=["agentao", "workspace", "--tenant", "acme"])
    assert str(tmp_path) in result.output
    shutdown(app)


# -- the store, beside a running server --------------------------------------------------------

Run = cabc.Callable[..., t.Any]


class Server:
    """An application with scripted agents, and the command line on its database."""

    def __init__(self, root: Path, gate: Gate, **config: t.Any) -> None:
        self.root = root
        self.config = {"AGENTAO_SECRET_KEYS": KEY, "AGENTAO_ROOT": str(root), **config}
        self.app = Flask("server")
        self.app.config.update(self.config)
        agents = scripted(say("hello"), by={"wait": [pause(gate)]})
        AgentaoWeb(agents=agents).init_app(self.app)
        self.app.cli.add_command(flask_group)
        self.client = self.app.test_client()

    def headers(self, user: str = "ann", **more: str) -> dict[str, str]:
        bearer = Tokens([KEY]).issue(Principal("acme", user), ttl=60)
        return {"Authorization": f"Bearer {bearer}", "Accept": "application/json", **more}

    def ask(self, sid: str, message: str = "hi", user: str = "ann", wait: int = 20) -> t.Any:
        headers = self.headers(user, Prefer=f"wait={wait}")
        return self.client.post(f"/chat/{sid}", json={"message": message}, headers=headers)

    def get(self, sid: str, user: str = "ann") -> int:
        return self.client.get(f"/session/{sid}", headers=self.headers(user)).status_code

    def main(self, *args: str) -> t.Any:
        """``agentao-web …`` with the server's environment."""
        env = {"AGENTAO_WORKSPACE": None, "AGENTAO_DATABASE_URL": None, **self.config}
        return invoke(main, *args, env=env)

    def flask(self, *args: str) -> t.Any:
        """``flask agentao …`` of the server's application."""
        return self.app.test_cli_runner().invoke(args=["agentao", *args], catch_exceptions=False)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def serve(tmp_path: Path, gate: Gate) -> cabc.Iterator[cabc.Callable[..., Server]]:
    made: list[Server] = []

    def make(**config: t.Any) -> Server:
        made.append(Server(tmp_path / "root", gate, **config))
        return made[-1]

    yield make
    gate.open()
    for server in made:
        shutdown(server.app, grace=2)


@pytest.fixture
def server(serve: cabc.Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture(params=["main", "flask"])
def cli(request: pytest.FixtureRequest, server: Server) -> Run:
    """Both command lines, on the server's database."""
    run: Run = getattr(server, request.param)
    return run


def ok(result: t.Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.output)


def refused(result: t.Any, *words: str) -> None:
    """It failed with a sentence, not a traceback."""
    assert result.exit_code in (1, 2), result.output
    assert result.output.count("Error: ") == 1 and "Traceback" not in result.output
    for word in words:
        assert word in result.output


def folder_of(server: Server, sid: str) -> Path:
    return Path(
        ok(server.main("workspace", "--tenant", "acme", "--user", "ann", "--session", sid)).strip()
    )


def test_revoke_makes_older_tokens_void_and_the_next_one_is_good(server: Server, cli: Run) -> None:
    ok(cli("db", "check"))
    ok(cli("revoke", "--tenant", "acme", "--user", "ann"))
    bearer = ok(cli("token", "--tenant", "acme", "--user", "ann")).strip()
    found = Tokens([KEY]).open(bearer)
    ((tenant, user, before),) = pool_of(server.app).store.revocations()
    assert (tenant, user) == ("acme", "ann")
    assert found is not None and before <= found[1]
    ok(cli("revoke", "--tenant", "acme", "--before", "5"))
    assert ("acme", None, 5.0) in pool_of(server.app).store.revocations()


def test_budget_tells_what_a_tenant_spent(server: Server, cli: Run) -> None:
    pool_of(server.app).store.spend("acme", "2026-02-28", 12)
    line = ok(cli("budget", "--tenant", "acme", "--day", "2026-02-28"))
    assert json.loads(line) == {"tenant": "acme", "day": "2026-02-28", "spent": 12}
    today = json.loads(ok(cli("budget", "--tenant", "acme")))
    assert today["spent"] == 0 and today["day"] > "2026-02-28"
    refused(cli("budget", "--tenant", "acme", "--day", "yesterday"))


def test_revoke_refuses_what_nobody_is_called(cli: Run) -> None:
    ok(cli("db", "check"))
    refused(cli("revoke", "--tenant", "a\nb"), "printable")
    refused(cli("revoke", "--tenant", "acme", "--before", "-1"))


def test_list_has_one_line_a_session_newest_first(server: Server, cli: Run) -> None:
    for sid, user in (("one", "ann"), ("two", "bob"), ("three", "ann")):
        assert server.ask(sid, f"from {user} é", user).status_code == 200
    rows = [json.loads(line) for line in ok(cli("sessions", "list")).splitlines()]
    assert [row["session_id"] for row in rows] == ["three", "two", "one"]
    assert (rows[1]["tenant"], rows[1]["user"], rows[1]["title"]) == ("acme", "bob", "from bob é")
    mine = ok(cli("sessions", "list", "--tenant", "acme", "--user", "ann", "--limit", "1"))
    assert [json.loads(line)["session_id"] for line in mine.splitlines()] == ["three"]
    assert ok(cli("sessions", "list", "--tenant", "other")) == ""


ANN = ("--tenant", "acme", "--user", "ann")


def test_show_tells_the_turns_that_are_not_over(server: Server, gate: Gate, cli: Run) -> None:
    started = server.ask("s", "wait", wait=0).json
    gate.reached()
    shown = json.loads(ok(cli("sessions", "show", *ANN, "s")))
    (turn,) = shown["active"]
    assert (turn["id"], turn["state"], turn["message"]) == (started["turn_id"], "running", "wait")
    assert (shown["session_id"], shown["turns"], shown["turn_id"]) == ("s", 1, turn["id"])


def test_export_has_the_whole_transcript(server: Server, cli: Run) -> None:
    store = pool_of(server.app).store
    server.ask("s", "first")
    server.ask("s", "second")
    whole = json.loads(ok(cli("sessions", "export", *ANN, "s")))
    contents = [m["content"] for m in whole["messages"]]
    assert contents == ["first", "hello", "second", "hello"]
    assert [m["id"] for m in whole["messages"]] == [1, 2, 3, 4]
    assert whole["title"] == "first"
    page = store.transcript(SessionKey("acme", "ann", "s"), before=None, after=None, limit=9)
    assert whole["messages"] == page.messages


def test_delete_removes_the_session_and_its_folder(serve: cabc.Callable[..., Server]) -> None:
    server = serve(AGENTAO_WORKSPACE="session")
    server.ask("s")
    server.ask("other")
    mine, other = folder_of(server, "s"), folder_of(server, "other")
    ok(server.main("sessions", "delete", *ANN, "s"))
    assert (server.get("s"), server.get("other")) == (404, 200)
    assert (mine.exists(), other.exists()) == (False, True)
    refused(server.main("sessions", "delete", *ANN, "s"), "no such session")


def test_delete_stops_the_turn_that_runs_in_a_server(server: Server, gate: Gate, cli: Run) -> None:
    server.ask("s", "wait", wait=0)
    gate.reached()
    ok(cli("sessions", "delete", *ANN, "s"))
    assert pool_of(server.app).store.session(SessionKey("acme", "ann", "s")) is None
    assert server.get("s") == 404


def test_delete_of_a_turn_that_does_not_end_says_so(server: Server, cli: Run) -> None:
    """Nobody obeys here: the turn belongs to a worker that does not look."""
    ok(cli("db", "check"))
    store = pool_of(server.app).store
    key = SessionKey("acme", "ann", "s")
    turn = TurnRow("t1", "hi", 0, 1.0, "another worker")
    store.claim(key, turn, Draft("turn_begin", {}), 1.0)
    refused(cli("sessions", "delete", *ANN, "s", "--timeout", "0"), "still runs")
    row = store.session(key)
    assert row is not None and row.deleting
    assert [s.reason for s in store.signals("another worker")] == ["session_deleted"]


@pytest.mark.parametrize("command", ["show", "export", "delete"])
def test_an_unknown_session_is_a_clear_error(server: Server, cli: Run, command: str) -> None:
    server.ask("s")
    refused(cli("sessions", command, "--tenant", "acme", "--user", "bob", "s"), "no such session")
    refused(cli("sessions", command, *ANN, "a/b"), "session id")


def test_check_makes_the_database_and_says_it_is_whole(server: Server, cli: Run) -> None:
    assert "sqlite" in ok(cli("db", "check"))
    file = server.root / "agentao-web.db"
    assert file.stat().st_mode & 0o077 == 0
    server.ask("s")
    assert "ok" in ok(cli("db", "check"))


def test_check_says_when_another_version_wrote_the_database(server: Server, cli: Run) -> None:
    ok(cli("db", "check"))
    db = sqlite3.connect(server.root / "agentao-web.db")
    db.execute("UPDATE agentao_meta SET value = 99 WHERE name = 'schema'")
    db.commit()
    db.close()
    for words in (["db", "check"], ["sessions", "list"]):
        refused(cli(*words), "schema 99")


def test_prune_spares_sessions_with_a_turn_and_takes_their_folders(
    serve: cabc.Callable[..., Server], gate: Gate
) -> None:
    server = serve(AGENTAO_WORKSPACE="session")
    for n in range(3):
        server.ask(f"idle{n}")
    server.ask("busy", "wait", wait=0)
    gate.reached()
    mine, busy = folder_of(server, "idle0"), folder_of(server, "busy")
    assert ok(server.main("db", "prune", "--days", "1")) == "sessions removed: 0\n"
    assert ok(server.main("db", "prune", "--days", "0")) == "sessions removed: 3\n"
    assert [server.get(sid) for sid in ("idle0", "idle2", "busy")] == [404, 404, 200]
    assert (mine.exists(), busy.exists()) == (False, True)
    refused(server.main("db", "prune", "--days", "-1"))


def test_prune_counts_more_than_one_handful(server: Server, cli: Run) -> None:
    ok(cli("db", "check"))
    store = pool_of(server.app).store
    for n in range(110):
        turn = TurnRow(f"t{n}", "hi", 0, 1.0, "w")
        held = store.claim(SessionKey("a", "b", f"s{n}"), turn, Draft("turn_begin", {}), 1.0)
        _finish(store, held)
    assert ok(cli("db", "prune", "--days", "1")) == "sessions removed: 110\n"
    assert store.sessions(None, None, before=None, limit=9) == []


def _finish(store: Store, held: Claim) -> None:
    assert held.opening.seq is not None
    last = Event(held.opening.seq + 1, held.turn_id, "done", {"status": "completed"}, 1.0)
    store.finish(held, Finish([last], Outcome(State.COMPLETED), [], [], False, 1.0))


def test_a_backup_opens_and_has_the_sessions(
    server: Server, cli: Run, gate: Gate, tmp_path: Path
) -> None:
    server.ask("s", "kept")
    server.ask("busy", "wait", wait=0)
    gate.reached()
    file = tmp_path / "backup.db"
    ok(cli("db", "backup", str(file)))
    assert file.stat().st_mode & 0o077 == 0
    copy = SqlStore(f"sqlite:///{file}")
    assert "ok" in copy.check()
    rows = copy.sessions("acme", "ann", before=None, limit=9)
    assert {row.key.id for row in rows} == {"s", "busy"}
    page = copy.transcript(SessionKey("acme", "ann", "s"), before=None, after=None, limit=9)
    assert [m["content"] for m in page.messages] == ["kept", "hello"]
    copy.close()


def test_a_backup_replaces_nothing(server: Server, cli: Run, tmp_path: Path) -> None:
    server.ask("s")
    file = tmp_path / "precious"
    file.write_text("mine")
    refused(cli("db", "backup", str(file)), "is there already")
    assert file.read_text() == "mine"
    refused(cli("db", "backup", str(server.root / "agentao-web.db")), "is there already")
    assert server.get("s") == 200
    refused(cli("db", "backup", str(file / "below.db")), "cannot be written")


def test_the_same_on_postgresql(
    serve: cabc.Callable[..., Server], gate: Gate, tmp_path: Path, postgres_url: str
) -> None:
    server = serve(AGENTAO_DATABASE_URL=postgres_url, AGENTAO_WORKSPACE="session")
    for sid in ("old", "older"):
        server.ask(sid)
    server.ask("busy", "wait", wait=0)
    gate.reached()
    for run in (server.main, server.flask):
        assert ok(run("db", "check")) == "postgresql, schema 2: ok\n"
        assert ok(run("db", "prune", "--days", "1")) == "sessions removed: 0\n"
        refused(run("db", "backup", str(tmp_path / "copy.db")), "pg_dump")
        assert not (tmp_path / "copy.db").exists()
    mine = folder_of(server, "old")
    assert ok(server.main("db", "prune", "--days", "0")) == "sessions removed: 2\n"
    assert not mine.exists()
    assert [server.get(sid) for sid in ("old", "older", "busy")] == [404, 404, 200]
    gate.open()


def test_without_a_database_nothing_is_made(server: Server) -> None:
    """A revocation in the wrong folder would be one that nobody looks at."""
    for words in (
        ["revoke", "--tenant", "acme"],
        ["sessions", "list"],
        ["budget", "--tenant", "acme"],
        ["db", "prune", "--days", "1"],
        ["db", "backup", "x.db"],
    ):
        refused(server.main(*words), "AGENTAO_ROOT")
    assert not (server.root / "agentao-web.db").exists()


def test_a_store_in_memory_is_out_of_reach(serve: cabc.Callable[..., Server]) -> None:
    server = serve(AGENTAO_DATABASE_URL="memory:")
    refused(server.main("sessions", "list"), "memory")
    refused(server.flask("db", "check"), "memory")


@pytest.mark.parametrize("url", ["sqlite:///", "postgresql://nobody@127.0.0.1:1/none"])
def test_a_database_that_cannot_be_used_is_a_clear_error(tmp_path: Path, url: str) -> None:
    env = {"AGENTAO_DATABASE_URL": url, "AGENTAO_ROOT": str(tmp_path)}
    refused(invoke(main, "sessions", "list", env=env))


def test_serve_says_at_once_that_its_address_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTAO_DEMO", "1")
    monkeypatch.setenv("AGENTAO_ROOT", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        result = invoke(main, "serve", "--bind", bind)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {bind} is taken")
    assert "BIND=HOST:PORT make run" in result.output
