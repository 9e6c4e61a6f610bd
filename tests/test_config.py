"""Settings: read once, refused with the cure."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from agentao_web.config import CLIENT_TOKEN
from agentao_web.config import Settings
from agentao_web.config import from_environment
from agentao_web.config import rules_per_tenant
from agentao_web.config import shells
from agentao_web.config import table
from agentao_web.core.rules import Rules


def test_defaults_are_what_the_table_says() -> None:
    rows = {name: default for name, default, _ in table()}
    assert rows["AGENTAO_TURN_TIMEOUT"] == "600.0"
    assert rows["AGENTAO_MAX_TURNS"] == "64"
    assert all(help_.endswith(".") for _, _, help_ in table())


def test_text_of_the_environment_and_values_of_an_app_read_the_same() -> None:
    text = {"AGENTAO_TURN_TIMEOUT": "5", "AGENTAO_DEMO": "1", "AGENTAO_MAX_TURNS": "3"}
    values = {"AGENTAO_TURN_TIMEOUT": 5, "AGENTAO_DEMO": True, "AGENTAO_MAX_TURNS": 3}
    assert Settings.from_mapping(text) == Settings.from_mapping(values)


@pytest.mark.parametrize(("value", "ttl"), [("", None), (None, None), ("86400", 86400.0), (5, 5.0)])
def test_conversations_are_kept_for_ever_unless_told(value: object, ttl: float | None) -> None:
    assert Settings.from_mapping({}).conversation_ttl is None
    assert Settings.from_mapping({"AGENTAO_CONVERSATION_TTL": value}).conversation_ttl == ttl


def test_keys_are_newest_first() -> None:
    keys = "the-newest-one-of-all, and-an-older-one-too"
    assert Settings.from_mapping({"AGENTAO_SECRET_KEYS": keys}).secret_keys == (
        "the-newest-one-of-all",
        "and-an-older-one-too",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AGENTAO_TURN_TIMEOUT", "0"),
        ("AGENTAO_TURN_TIMEOUT", "nan"),
        ("AGENTAO_TURN_TIMEOUT", True),
        ("AGENTAO_CONVERSATION_TTL", "0"),
        ("AGENTAO_CONVERSATION_TTL", "90 days"),
        ("AGENTAO_CONVERSATION_TTL", "inf"),
        ("AGENTAO_CONVERSATION_TTL", True),
        ("AGENTAO_MAX_TURNS", "1.5"),
        ("AGENTAO_MAX_TURNS", 1.5),
        ("AGENTAO_DRAIN_GRACE", "-1"),
        ("AGENTAO_WORKSPACE", "everyone"),
        ("AGENTAO_ROOT", ""),
        ("AGENTAO_NO_SUCH_THING", "1"),
    ],
)
def test_a_bad_value_names_its_setting(name: str, value: object) -> None:
    with pytest.raises(RuntimeError, match=name):
        Settings.from_mapping({name: value})


def test_the_environment_has_other_peoples_names_too(caplog: pytest.LogCaptureFixture) -> None:
    found = from_environment({"AGENTAO_HOME": "/x", "AGENTAO_MAX_TURNS": "3", "PATH": "/bin"})
    assert found == {"AGENTAO_MAX_TURNS": "3"}
    assert "AGENTAO_HOME" in caplog.text
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="Did you mean"):
        from_environment({"AGENTAO_MAX_TURN": "3"})


# -- rules per tenant ----------------------------------------------------------------------------

_TOLD = """
[default]
policy = "read-only"

[tenants.acme]
policy = "trusted"
mcp = ["docs"]
tokens_per_day = 1000
"""


def test_rules_are_the_tenants_then_the_default_then_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(_TOLD)
    rules = rules_per_tenant(Settings(tenants=file, mcp=tmp_path, tokens_per_day=5))
    assert rules("acme") == Rules("trusted", "off", ("docs",), (), 1000)
    assert rules("globex") == Rules("read-only", "off", ("*",), (), 5)
    assert rules_per_tenant(Settings(policy="trusted"))("acme") == Rules("trusted")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[default", "tenants.toml"),
        ("[acme]", "'acme' is neither"),
        ("[tenants.acme]\npolicy = 'free'", r"\[tenants.acme\]: policy is one of read-only"),
        ("[tenants.acme]\nmcp = 'docs'", "mcp is a list of names"),
        ("[default]\ntokens_per_day = 'all'", "whole number"),
        ("[default]\nshells = 'off'", "shells"),
        ("tenants = 3", "tenants"),
    ],
)
def test_a_bad_file_of_tenants_is_refused_with_the_cure(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(RuntimeError, match=told) as refused:
        rules_per_tenant(Settings(tenants=file))
    assert "AGENTAO_TENANTS" in str(refused.value)


def test_the_shells_are_those_anybody_may_get(tmp_path: Path) -> None:
    assert shells(Settings()) == {"off"}
    assert shells(Settings(shell="sandbox")) == {"sandbox"}
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.acme]\nshell = "sandbox"\n')
    assert shells(Settings(tenants=file)) == {"off", "sandbox"}
    file.write_text('[tenants.acme]\nshell = "sandbox"\n')
    assert shells(Settings(shell="unconfined", tenants=file)) == {"unconfined", "sandbox"}
    file.write_text('[default]\nshell = "unconfined"\n')
    with pytest.raises(RuntimeError, match="AGENTAO_TENANTS.*AGENTAO_SHELL=unconfined"):
        shells(Settings(shell="sandbox", tenants=file))


def test_the_token_of_the_command_line_is_no_slip(caplog: pytest.LogCaptureFixture) -> None:
    assert from_environment({CLIENT_TOKEN: "x", "AGENTAO_ROOT": "r"}) == {"AGENTAO_ROOT": "r"}
    assert not caplog.records
