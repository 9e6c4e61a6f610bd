"""What goes to the model in every configuration: known, and the same whatever a workspace holds.

The structure is in ``prompt.json``; after a change that is meant, ``python -m
tests.security.test_prompt`` writes it anew.
"""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import platform
import re
import socket
import sys
import tempfile
import typing as t
from pathlib import Path

import pytest

from tests import mcp_server
from tests.security.house import House
from tests.security.house import model_here
from tests.security.test_mcp import entry
from tests.security.test_mcp import write
from tests.security.test_skills import activate
from tests.security.test_skills import skill

EXPECTED = Path(__file__).with_name("prompt.json")
_HEADING = re.compile(r"^(?:=== .+ ===|#{2,3} .+|</?[a-z-]+>)$", re.MULTILINE)

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "read-only": ("read-only",),
    "trusted": ("trusted",),
    "skills": ("trusted", "skills"),
    "memory": ("trusted", "memory"),
    "mcp": ("trusted", "mcp"),
    "everything": ("trusted", "skills", "memory", "mcp"),
}


def build(folder: Path, model: t.Any, *parts: str) -> House:
    config: dict[str, t.Any] = {"policy": next((p for p in parts if p in POLICIES), "ask")}
    if "skills" in parts:
        skill(folder / "operator", "letters", references__tone_md="Be kind.")
        config["skills"] = folder / "operator"
    if "memory" in parts:
        config["memory"] = True
    if "mcp" in parts:
        config["mcp"] = write(folder, shop=entry("one", "price"), gone={"command": "no-such"})
    return House(folder, model, **config)


POLICIES = ("read-only", "ask", "trusted")


def use_everything(here: House, who: str, sid: str) -> None:
    """Fill what may be filled, so that the last request has all of it."""
    here.call("todo_write", who, sid, todos=[{"content": "tea", "status": "pending"}])
    if "activate_skill" in here.tools:
        activate(here, "letters", who, sid)
    if "save_memory" in here.tools:
        fact = {"key": "user_taste", "value": "likes tea", "tags": ["preference"]}
        here.call("save_memory", who, sid, **fact)
    here.ask("say hi", who, sid)


def structure(here: House) -> dict[str, t.Any]:
    """The parts of the last request, without what people and the model said."""
    body = here.model.requests[-1].body
    system, *_, reminder = (str(message["content"]) for message in body["messages"])
    return {
        "fields": sorted(body),
        "system": _HEADING.findall(system),
        "reminder": _HEADING.findall(reminder),
        "tools": sorted(here.tools),
    }


@pytest.fixture
def house(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> cabc.Iterator[cabc.Callable[..., House]]:
    made: list[House] = []
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-the-server"))
    monkeypatch.setenv("A_VARIABLE", "a-value-of-the-environment")
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-host")
    monkeypatch.setattr(platform, "node", lambda: "name-of-the-host")
    (tmp_path / "folder-of-the-process").mkdir()
    monkeypatch.chdir(tmp_path / "folder-of-the-process")
    with model_here(monkeypatch) as model:

        def make(*parts: str) -> House:
            made.append(build(tmp_path, model, *parts))
            return made[-1]

        yield make
        for one in made:
            one.close()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_what_we_know_it_is(house: cabc.Callable[..., House], name: str) -> None:
    here = house(*CONFIGURATIONS[name])
    use_everything(here, "acme-corp/ann-lee", "sid-of-ann")
    assert structure(here) == json.loads(EXPECTED.read_text())[name]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_names_no_place_and_nobody(
    house: cabc.Callable[..., House], name: str, tmp_path: Path
) -> None:
    here = house(*CONFIGURATIONS[name])
    use_everything(here, "beta-corp/bob-kay", "sid-of-bob")
    use_everything(here, "acme-corp/ann-lee", "sid-of-ann")
    everything = json.dumps([request.body for request in here.model.requests])
    for word in (
        *(str(tmp_path), str(mcp_server.PATH.parent), sys.executable, "/dev/null"),
        *("acme-corp", "ann-lee", "sid-of-ann", "beta-corp", "bob-kay", "sid-of-bob"),
        *("a-value-of-the-environment", "sk-the-operators-own-key", "A_VARIABLE"),
        "name-of-the-host",
    ):
        assert word not in everything, word


def system(here: House, who: str = "acme/ann", sid: str = "s") -> tuple[str, str]:
    """The system prompt and the tools of a fresh turn."""
    here.ask("say hi", who, sid)
    body = here.model.requests[-1].body
    return body["messages"][0]["content"], json.dumps(body["tools"])


def test_it_is_the_same_for_everyone(house: cabc.Callable[..., House]) -> None:
    here = house("trusted", "skills", "mcp")
    told = {
        system(here, who, sid)
        for who, sid in (("acme/ann", "s"), ("acme/ann", "x"), ("acme", "s"), ("beta/bob", "s"))
    }
    assert len(told) == 1


PLANTED = {
    "instructions": ["AGENTAO.md", "AGENTS.md", "agentao.MD", "sub/AGENTAO.md", "CLAUDE.md"],
    "skills": ["skills/x/SKILL.md", ".agentao/skills/x/SKILL.md", "SKILLS/x/skill.md"],
    "skills of ours": ["skills/letters/SKILL.md"],
    "agents": [".agentao/agents/x.md", "agents/x.md"],
    "settings": [".agentao/mcp.json", ".agentao/permissions.json", ".agentao/settings.json"],
    "memory": [".agentao/memory.db", ".agentao/hooks.json", ".Agentao/mcp.json", ".mcp.json"],
    "environment": [".env", ".agentao/.env"],
}
TEXTS = {
    ".md": "---\nname: x\ndescription: PLANTED\n---\n# PLANTED\n\nPLANTED",
    ".json": json.dumps(
        {"mcpServers": {"x": {"command": "touch", "args": ["PLANTED"]}}, "rules": ["PLANTED"]}
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_nothing_in_a_workspace_changes_it(house: cabc.Callable[..., House], what: str) -> None:
    """Whoever put it there: tools refuse most of these names, a host's upload may not."""
    here = house("trusted", "skills", "memory", "mcp")
    before = system(here)
    for name in PLANTED[what]:
        path = here.workspace() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXTS.get(path.suffix, "OPENAI_API_KEY=PLANTED\n"))
    assert system(here) == before
    here.evict()
    assert system(here) == before
    assert system(here, sid="another") == before
    here.again()
    assert system(here) == before
    assert "PLANTED" not in here.sent
    assert os.environ["OPENAI_API_KEY"] != "PLANTED"


if __name__ == "__main__":
    known = {}
    for name, parts in CONFIGURATIONS.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            pytest.MonkeyPatch.context() as patch,
            model_here(patch) as model,
            build(Path(folder), model, *parts) as here,
        ):
            use_everything(here, "acme-corp/ann-lee", "sid-of-ann")
            known[name] = structure(here)
    EXPECTED.write_text(json.dumps(known, indent=1) + "\n")
