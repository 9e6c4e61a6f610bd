"""The command line, ours and the host's."""

from __future__ import annotations

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
