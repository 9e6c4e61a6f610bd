"""The doctor on this machine: what is odd, broken or too small, and the cure of each."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from click.testing import CliRunner
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.cli import flask_group
from agentao_web.cli import main
from agentao_web.config import Settings
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.doctor import Finding
from agentao_web.doctor import all_well
from agentao_web.doctor import lines
from agentao_web.doctor import machine
from agentao_web.store import Finish
from agentao_web.store import TurnRow
from agentao_web.store.sql import SqlStore
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests.live.harness import model_env
from tests.model_server import ModelServer
from tests.model_server import Reply
from tests.model_server import raw

KEYS = {"AGENTAO_SECRET_KEYS": "the-doctors-own-test-key"}


def case(root: Path, *, environ: dict[str, str] | None = None, **settings: t.Any) -> machine.Case:
    values = {"AGENTAO_ROOT": str(root), "AGENTAO_DEMO": True, **settings}
    return machine.Case(
        Settings.from_mapping(values),
        machine.Server(threads=128, worker_connections=1000, graceful_timeout=30),
        environ or {},
    )


def changed(found: machine.Case, **fields: t.Any) -> machine.Case:
    return dataclasses.replace(found, **fields)


def of(findings: cabc.Iterable[Finding], check: str, level: str) -> list[Finding]:
    return [one for one in findings if (one.check, one.level) == (check, level)]


def test_a_good_machine_gets_no_complaint(tmp_path: Path) -> None:
    tmp_path.joinpath("root").mkdir(mode=0o700)
    findings = list(machine.examine(case(tmp_path / "root")))
    bad = [one for one in findings if one.level == "wrong" and one.check not in ("files", "disk")]
    assert not bad, "\n".join(lines(findings))
    assert {one.check for one in findings} == {
        "settings", "store", "model", "threads", "files", "tasks", "clock", "disk"
    }  # fmt: skip
    assert not list((tmp_path / "root").iterdir()), "it makes no database"


ODD = [
    ({"AGENTAO_STOP_GRACE": 20}, "hint", "AGENTAO_DRAIN_GRACE"),
    ({"AGENTAO_HEARTBEAT": 60}, "hint", "AGENTAO_HEARTBEAT"),
    ({"AGENTAO_QUESTION_TIMEOUT": 5000}, "hint", "AGENTAO_MAX_WAITING_TIME"),
    ({"AGENTAO_LLM_READ_TIMEOUT": 700}, "hint", "AGENTAO_LLM_READ_TIMEOUT"),
    ({"AGENTAO_LLM_FIRST_TOKEN_TIMEOUT": 700}, "hint", "AGENTAO_LLM_FIRST_TOKEN_TIMEOUT"),
    ({"AGENTAO_MAX_BODY": 2**20}, "wrong", "AGENTAO_MAX_BODY"),
    ({"AGENTAO_MAX_TURNS_PER_TENANT": 65}, "hint", "above AGENTAO_MAX_TURNS,"),
    ({"AGENTAO_SHELL": "unconfined"}, "hint", "AGENTAO_SHELL=sandbox"),
    ({"AGENTAO_DEMO": False}, "wrong", "AGENTAO_SECRET_KEYS"),
    ({"AGENTAO_DEMO": True}, "hint", "unset AGENTAO_DEMO"),
]


@pytest.mark.parametrize(("settings", "level", "words"), ODD)
def test_odd_settings(tmp_path: Path, settings: t.Any, level: str, words: str) -> None:
    found = of(machine.CHECKS["settings"](case(tmp_path, **settings)), "settings", level)
    assert any(words in f"{one.message} {one.cure} " for one in found)


def test_a_model_that_is_asked_in_the_clear(tmp_path: Path) -> None:
    def hints(url: str) -> int:
        asked = case(tmp_path, environ={"OPENAI_BASE_URL": url}, AGENTAO_DEMO=False, **KEYS)
        return len(of(machine.CHECKS["settings"](asked), "settings", "hint"))

    assert hints("http://models.example.com/v1") == 1
    assert hints("http://127.0.0.1:8080/v1") == hints("https://models.example.com/v1") == 0


# -- store -------------------------------------------------------------------------------------


def store(found: machine.Case) -> list[Finding]:
    return [one for one in machine.examine(found) if one.check in ("store", "clock")]


def test_a_store_is_opened_and_written(tmp_path: Path) -> None:
    with contextlib.closing(SqlStore(tmp_path / "agentao-web.db")) as made:
        made.check()
    findings = store(case(tmp_path))
    assert "schema" in findings[0].message and "commit takes" in findings[1].message
    with contextlib.closing(sqlite3.connect(tmp_path / "agentao-web.db")) as db:
        assert db.execute("SELECT count(*) FROM agentao_workers").fetchone() == (0,)


def test_a_store_on_postgres(tmp_path: Path, postgres_url: str) -> None:
    findings = store(case(tmp_path, AGENTAO_DATABASE_URL=postgres_url))
    assert all_well(findings) and "postgresql" in findings[0].message


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory:", "unset AGENTAO_DATABASE_URL"),
        ("postgresql://nobody@127.0.0.1:1/none", "is AGENTAO_DATABASE_URL right"),
    ],
)
def test_a_store_that_will_not_do(tmp_path: Path, url: str, words: str) -> None:
    (found,) = of(store(case(tmp_path, AGENTAO_DATABASE_URL=url)), "store", "wrong")
    assert words in found.cure


def test_a_database_of_another_version(tmp_path: Path) -> None:
    with contextlib.closing(SqlStore(tmp_path / "agentao-web.db")) as made:
        made.check()
    with contextlib.closing(sqlite3.connect(tmp_path / "agentao-web.db")) as db, db:
        db.execute("UPDATE agentao_meta SET value = 99 WHERE name = 'schema'")
    (found,) = of(store(case(tmp_path)), "store", "wrong")
    assert "schema 99" in found.message


def test_a_slow_commit_is_measured_against_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(SqlStore(tmp_path / "agentao-web.db")) as made:
        made.check()
    for seconds, level, words in ((0.5, "hint", "faster disk"), (2.0, "wrong", "WORKER_LEASE")):
        monkeypatch.setattr(machine, "_commit_time", lambda store, seconds=seconds: seconds)
        (found,) = of(store(case(tmp_path)), "store", level)
        assert words in f"{found.message} {found.cure}"


def test_a_deleted_session_that_does_not_go_is_told_of(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    for seconds in (0.0, 3600.0):
        then = time.time() - seconds
        with contextlib.closing(SqlStore(url, clock=lambda then=then: then)) as store:  # type: ignore[misc]
            key = SessionKey("acme", "ann", f"{seconds:g}")
            row = TurnRow(f"t{seconds:g}", "hi", 0, 1.0, "w")
            held = store.claim(key, row, Draft("turn_begin", {}), 1.0)
            final = Event(t.cast(int, held.opening.seq) + 1, row.id, "done", {}, 2.0)
            store.finish(held, Finish([final], Outcome(State.COMPLETED), [], [], False, 2.0))
            store.tombstone(key)
    findings = list(machine.examine(case(tmp_path, AGENTAO_DATABASE_URL=url)))
    (found,) = [one for one in of(findings, "store", "wrong") if "deleted" in one.message]
    assert found.message.startswith("1 deleted session has been waiting")


def test_the_kind_of_disk_is_known() -> None:
    mounts = (
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:40 / /srv/shared\\040files rw shared:1 - nfs4 host:/x rw\n"
        "3 1 0:41 / /srv/share rw - tmpfs tmpfs rw\n"
    )
    kinds = {
        "/srv/shared files/agentao-web.db": "nfs4",
        "/srv/share/x": "tmpfs",
        "/srv/sharedx": "ext4",
    }
    assert {path: machine.filesystem(Path(path), mounts) for path in kinds} == kinds
    assert machine._NETWORK.match("nfs4") and not machine._NETWORK.match("ext4")


# -- model, shell, servers ---------------------------------------------------------------------


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def asked(found: machine.Case) -> Finding:
    (answer,) = (one for one in machine.examine(found) if one.check == "model")
    return answer


def test_the_model_is_asked_for_a_few_tokens(tmp_path: Path, model: ModelServer) -> None:
    found = case(tmp_path, environ=model_env(model), AGENTAO_DEMO=False, **KEYS)
    assert asked(found).level == "ok" and "answered in" in asked(found).message
    (first, *_) = model.requests
    assert first.body["max_tokens"] == 16 and len(first.body["messages"]) == 1
    before = len(model.requests)
    assert asked(changed(found, ask_model=False)).message == "is named; not asked"
    assert asked(changed(found, own_agents=True)).level == "ok"
    assert len(model.requests) == before


@pytest.mark.parametrize(
    ("status", "words"), [(401, "API_KEY"), (404, "BASE_URL"), (429, "quota"), (500, "provider")]
)
def test_a_model_that_refuses(tmp_path: Path, model: ModelServer, status: int, words: str) -> None:
    model.script(Reply(status=status, body='{"error": {"message": "key sk-test-key is secret"}}'))
    answer = asked(case(tmp_path, environ=model_env(model), AGENTAO_DEMO=False, **KEYS))
    assert answer.level == "wrong" and str(status) in answer.message and words in answer.message
    assert "secret" not in answer.message


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_a_base_url_where_something_else_answers(
    tmp_path: Path, model: ModelServer, kind: str
) -> None:
    """Often a page that says welcome, with status 200."""
    page = b"<html>sk-test-key</html>" if kind == "text/html" else b'{"version": "sk-test-key"}'
    model.script(raw(page, content_type=kind))
    answer = asked(case(tmp_path, environ=model_env(model), AGENTAO_DEMO=False, **KEYS))
    assert answer.level == "wrong" and kind in answer.message
    assert "did you forget /v1?" in answer.message
    assert "sk-test" not in answer.message


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    environ = {
        "OPENAI_API_KEY": "sk-x",
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "OPENAI_MODEL": "m",
    }
    found = case(tmp_path, environ=environ, AGENTAO_DEMO=False, **KEYS)
    assert "nobody listens" in asked(found).message
    del environ["OPENAI_MODEL"]
    assert "OPENAI_MODEL not set" in asked(found).message


def test_servers_whose_program_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    servers = {"good": {"command": sys.executable}, "bad": {"command": "no-such-program"}}
    file.write_text(json.dumps({"mcpServers": servers}))
    findings = list(machine.CHECKS["agents"](case(tmp_path, AGENTAO_MCP=str(file))))
    (found,) = of(findings, "mcp", "wrong")
    assert "no-such-program" in found.message and "'bad'" in found.message
    file.write_text("{")
    (found,) = of(machine.examine(case(tmp_path, AGENTAO_MCP=str(file))), "agents", "wrong")
    assert "AGENTAO_MCP" in found.message


def test_the_sandbox_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxed = case(tmp_path, AGENTAO_SHELL="sandbox")
    assert of(machine.examine(sandboxed), "shell", "ok")
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = of(machine.examine(sandboxed), "agents", "wrong")
    assert "install it" in found.message


# -- limits ------------------------------------------------------------------------------------


def test_limits_are_read_as_the_kernel_writes_them() -> None:
    told = Path("/proc/self/limits").read_text()
    assert machine.soft_limit(told, "Max open files")
    assert (
        machine.soft_limit("Max open files   unlimited  unlimited files", "Max open files") is None
    )


def test_the_lowest_limit_of_all_control_groups_counts(tmp_path: Path) -> None:
    unit = tmp_path / "system.slice" / "agentao-web.service"
    unit.mkdir(parents=True)
    (unit / "pids.max").write_text("max\n")
    (unit.parent / "pids.max").write_text("300\n")
    assert machine.pids_max("0::/system.slice/agentao-web.service\n", tmp_path) == 300
    assert machine.pids_max("0::/\n", tmp_path) is None


def test_too_few_threads_and_connections(tmp_path: Path) -> None:
    small = machine.Server(threads=16, worker_connections=16, graceful_timeout=20)
    findings = list(machine.CHECKS["threads"](changed(case(tmp_path), server=small)))
    assert [one.level for one in findings] == ["hint", "wrong", "wrong", "ok"]
    assert "threads = 132" in findings[0].cure


def test_too_few_threads_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "pids_max", lambda cgroup, root: 200)
    (found,) = of(machine.examine(case(tmp_path)), "tasks", "wrong")
    assert "TasksMax=4096" in found.cure


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = of(machine.examine(case(tmp_path / "file")), "disk", "wrong")
    assert "AGENTAO_ROOT" in found.cure


# -- the command line --------------------------------------------------------------------------


def doctor(*args: str, before: cabc.Sequence[str] = (), **env: str) -> tuple[int, t.Any]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTAO_", "OPENAI_"))}
    code = "from agentao_web.cli import main; main()"
    command = [*before, sys.executable, "-c", code, "doctor", "--json", *args]
    done = subprocess.run(command, env={**kept, **env}, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_few_files_are_found_and_end_with_one(tmp_path: Path) -> None:
    few = ["prlimit", "--nofile=256"]
    env = {"AGENTAO_DEMO": "1", "AGENTAO_ROOT": str(tmp_path)}
    code, told = doctor(before=few, **env)
    (wrong,) = (one for one in told["findings"] if one["check"] == "files")
    assert code == 1 and told["ok"] is False
    assert wrong["level"] == "wrong" and "LimitNOFILE=8192" in wrong["cure"]
    with contextlib.ExitStack() as stack:
        # Another process's limits, as an operator looks at those of a running server.
        command = ["prlimit", "--nofile=4096", "sleep", "120"]
        other = stack.enter_context(subprocess.Popen(command))
        stack.callback(other.kill)
        _, told = doctor("--pid", str(other.pid), before=few, **env)
    (files,) = (one for one in told["findings"] if one["check"] == "files")
    assert f"of process {other.pid}" in files["message"]


def test_the_command_line_of_gunicorn_counts(tmp_path: Path) -> None:
    arguments = "--threads 1024 --worker-connections 4096"
    env = {"AGENTAO_DEMO": "1", "AGENTAO_ROOT": str(tmp_path), "GUNICORN_CMD_ARGS": arguments}
    _, told = doctor(**env)
    said = {one["check"]: one["message"] for one in told["findings"]}
    assert "1 × 1024 threads" in said["threads"] and "may need 4296" in said["files"]


def test_a_bad_setting_is_a_finding(tmp_path: Path) -> None:
    code, told = doctor(AGENTAO_ROOT=str(tmp_path), AGENTAO_WORKERS="many")
    assert code == 1
    assert [one["check"] for one in told["findings"]] == ["settings"]
    assert "AGENTAO_WORKERS" in told["findings"][0]["message"]


def test_for_people_each_finding_is_a_line_and_a_cure(tmp_path: Path) -> None:
    env = {"AGENTAO_ROOT": str(tmp_path), "AGENTAO_DEMO": "1", "AGENTAO_DATABASE_URL": "memory:"}
    result = CliRunner().invoke(main, ["doctor"], env=env)
    assert result.exit_code == 1
    assert "wrong  store" in result.output and " unset AGENTAO_DATABASE_URL" in result.output
    result = CliRunner().invoke(main, ["doctor", "--url", "x", "--header", "y"], env=env)
    assert result.exit_code == 2 and "NAME: VALUE" in result.output


def test_a_host_has_the_doctor_too(tmp_path: Path) -> None:
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=str(tmp_path))
    who = lambda request: Principal("shop")  # noqa: E731
    AgentaoWeb(authenticate=who, agents=scripted(say("x"))).init_app(app)
    app.cli.add_command(flask_group)
    result = app.test_cli_runner().invoke(args=["agentao", "doctor", "--json"])
    told = {one["check"]: one for one in json.loads(result.output)["findings"]}
    assert told["model"]["message"].startswith("the application builds")
    assert told["settings"]["level"] == "ok", "it has a login of its own, and needs no keys"
    shutdown(app)


def test_only_a_signed_in_doctor_is_told_the_worker(tmp_path: Path) -> None:
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=str(tmp_path), AGENTAO_DEMO=True)
    AgentaoWeb(agents=scripted(say("x"))).init_app(app)
    client, asking = app.test_client(), {"X-Agentao-Doctor": "1"}
    bearer = {"Authorization": "Bearer dev"}
    names = [
        client.get("/session/a", headers=headers).headers.get("X-Agentao-Worker")
        for headers in ({**bearer, **asking}, {**bearer, **asking}, bearer, asking)
    ]
    assert names[0] == names[1] and names[2:] == [None, None]
    assert len(names[0] or "") == 8
    shutdown(app)
