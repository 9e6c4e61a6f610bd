"""Skills are the operator's: who gets which, what of them can be read, and that they last."""

from __future__ import annotations

import collections.abc as cabc
import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest

from agentao_web.agents.files import ConfinedFS
from agentao_web.agents.skills import WithSkills
from agentao_web.agents.skills import read_skills
from tests.security.house import House
from tests.security.house import model_here
from tests.security.house import tenants

Make = cabc.Callable[..., House]


def skill(folder: Path, name: str, text: str = "", **files: str) -> Path:
    """An operator's skill."""
    own = folder / name
    own.mkdir(parents=True)
    front = f"---\nname: another-name\ndescription: Knows {name}.\n---\n"
    (own / "SKILL.md").write_text(f"{front}# How to {name}\n\n{text or f'Do {name} well.'}\n")
    for path, content in files.items():
        file = own / path.replace("__", "/").replace("_md", ".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return own


@pytest.fixture
def skills(tmp_path: Path) -> Path:
    """A folder of three skills."""
    folder = tmp_path / "operator" / "skills"
    skill(folder, "letters", references__tone_md="Be kind.", scripts__send="#!/bin/sh\n")
    skill(folder, "invoices", references__tax_md="19 percent")
    skill(folder, "secrets", references__codes_md="SECRET-OF-A-SKILL")
    (folder / "no-skill").mkdir()
    (folder.parent / "outside.txt").write_text("SECRET-OUTSIDE")
    return folder


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Make]:
    made: list[House] = []
    with model_here(monkeypatch) as model:

        def build(**config: t.Any) -> House:
            made.append(House(tmp_path, model, **{"policy": "trusted", **config}))
            return made[-1]

        yield build
        for one in made:
            one.close()


def activate(here: House, name: str, who: str = "acme/ann", sid: str = "s") -> str:
    return here.call("activate_skill", who, sid, skill_name=name, task_description="the letter")


def listed(here: House) -> set[str]:
    """The skills in the system prompt."""
    prompt = here.model.requests[-1].body["messages"][0]["content"]
    block = prompt.partition("=== Available Skills ===")[2]
    return {line[2:].partition(":")[0] for line in block.splitlines() if line.startswith("• ")}


# -- who gets which --------------------------------------------------------------------------------


def test_a_tenant_has_the_skills_it_is_given(house: Make, skills: Path, tmp_path: Path) -> None:
    rules = tenants(
        tmp_path,
        '[default]\nskills = []\n[tenants.acme]\nskills = ["letters", "no-such"]\n'
        '[tenants.beta]\nskills = ["invoices"]\n[tenants.gamma]\nskills = ["*"]\n',
    )
    here = house(skills=skills, tenants=rules)
    given = {
        "acme/ann": {"letters"},
        "beta/bob": {"invoices"},
        "gamma/gus": {"letters", "invoices", "secrets"},
        "delta/dan": set(),
    }
    for who, names in given.items():
        here.ask("say hi", who)
        assert listed(here) == names
        assert ("activate_skill" in here.tools) is bool(names)
        enum = [tool for tool in here.model.requests[-1].body["tools"] if "activate" in str(tool)]
        assert all(name in str(enum) for name in names)
    for name in ("secrets", "another-name", "skill-creator", "no-such", "../letters", ""):
        assert "Unknown skill" in activate(here, name)
    assert "SECRET" not in here.sent


def test_there_are_none_without_the_setting(
    house: Make, monkeypatch: t.Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = house()
    planted = [here.workspace() / "skills", here.workspace() / ".agentao" / "skills"]
    for folder in (*planted, tmp_path / "home" / ".agentao" / "skills"):
        skill(folder, "planted")
    here.ask("say hi")
    assert not listed(here) and "activate_skill" not in here.tools
    assert "planted" not in here.sent
    assert "not found" in activate(here, "planted").lower()


def test_a_workspace_adds_none_and_hides_none(house: Make, skills: Path) -> None:
    here = house(skills=skills)
    skill(here.workspace() / "skills", "planted")
    shadow = skill(here.workspace() / "skills", "letters", "PLANTED", references__tone_md="PLANTED")
    assert "Skill Activated" in activate(here, "letters")
    here.ask("say hi")
    assert listed(here) == {"letters", "invoices", "secrets"}
    assert "Do letters well." in here.sent and "PLANTED" not in here.sent
    assert "Be kind." in here.call("read_file", file_path="skills/letters/references/tone.md")
    absolute = str(shadow / "references" / "tone.md")
    assert "Be kind." in here.call("read_file", file_path=absolute)


# -- what can be read ------------------------------------------------------------------------------


def test_an_active_skill_is_in_the_prompt_and_its_files_can_be_read(
    house: Make, skills: Path
) -> None:
    here = house(skills=skills)
    told = activate(here, "letters")
    for file in ("skills/letters/references/tone.md", "skills/letters/scripts/send"):
        assert file in told
    here.ask("say hi")
    assert "Do letters well." in here.sent and "the letter" in here.sent
    tone = "skills/letters/references/tone.md"
    assert "Be kind." in here.call("read_file", file_path=tone)
    assert "references" in here.call("list_directory", directory_path="skills/letters")
    found = here.call("glob", pattern="**/*.md", directory="skills/letters")
    assert "tone.md" in found
    found = here.call("search_file_content", pattern="kind", directory="skills/letters")
    assert "tone.md:1" in found
    here.call("read_file", file_path="skills/letters/none.md")
    here.call("list_directory", directory_path="skills/letters/SKILL.md")
    here.call("search_file_content", pattern="(", regex=True, directory="skills/letters")
    shown = json.dumps([request.body for request in here.model.requests]) + json.dumps(
        here.events()
    )
    assert str(skills.parent.parent) not in shown


@pytest.mark.parametrize(
    "path",
    [
        "skills/secrets/references/codes.md",
        "skills/letters/../secrets/references/codes.md",
        "skills/letters/../../../outside.txt",
        "skills/letters/references/../../../../outside.txt",
        "skills/letters/out.txt",
        "skills/letters/out/secrets/references/codes.md",
        "skills/letters/references/../../secrets/references/codes.md",
        "Skills/secrets/references/codes.md",
        "{skills}/secrets/references/codes.md",
        "{skills}/letters/SKILL.md",
    ],
)
def test_nothing_else_is_read_through_a_skill(
    house: Make, skills: Path, tmp_path: Path, path: str
) -> None:
    """Also where the operator's own folder has links that lead out of a skill."""
    (skills / "letters" / "out.txt").symlink_to(skills.parent / "outside.txt")
    (skills / "letters" / "out").symlink_to(skills)
    rules = tenants(tmp_path, '[default]\nskills = ["letters"]\n')
    here = house(skills=skills, tenants=rules)
    path = path.replace("{skills}", str(skills))
    folder = path.rpartition("/")[0]
    tried = [
        here.call("read_file", file_path=path),
        here.call("list_directory", directory_path=folder, recursive=True),
        here.call("glob", pattern="**/*", directory=folder),
        here.call("search_file_content", pattern="SECRET", directory=folder),
        here.call("search_file_content", pattern="SECRET", directory="skills/letters"),
    ]
    for told in tried:
        assert "SECRET-" not in told and "codes.md" not in told.replace(path, "")
        assert "Do letters" not in told or "skills/letters" not in str(skills)


@pytest.mark.parametrize("file", ["SKILL.md", "references/tone.md", "new.md", "scripts/send"])
def test_nothing_is_written_to_a_skill(house: Make, skills: Path, file: str) -> None:
    before = {path: path.read_bytes() for path in skills.rglob("*") if path.is_file()}
    here = house(skills=skills)
    for root in ("skills", f"{here.workspace()}/skills", "./x/../skills"):
        path = f"{root}/letters/{file}"
        assert "not allowed" in here.call("write_file", file_path=path, content="x")
        here.call("replace", file_path=path, old_text="Be", new_text="Do not be")
    assert {path: path.read_bytes() for path in skills.rglob("*") if path.is_file()} == before
    assert not (here.workspace() / "skills").exists()


def test_the_workspace_itself_is_as_without_skills(house: Make, skills: Path) -> None:
    here = house(skills=skills)
    here.call("write_file", file_path="a/notes.txt", content="mine")
    assert "mine" in here.call("read_file", file_path="a/notes.txt")
    assert "notes.txt" in here.call("glob", pattern="**/*.txt")
    assert "a/notes.txt:1" in here.call("search_file_content", pattern="mine")
    assert "outside" in here.call("read_file", file_path="/etc/passwd").lower()


def test_every_door_of_the_files_is_led_through_the_skills() -> None:
    doors = {name for name in vars(ConfinedFS) if not name.startswith("_")}
    assert doors <= set(vars(WithSkills))


# -- that they last --------------------------------------------------------------------------------

TODOS = {"todos": [{"content": "write to Bob", "status": "in_progress"}]}


@pytest.mark.parametrize("how", ["evicted", "elsewhere"])
def test_active_skills_and_the_list_of_things_to_do_last(
    house: Make, skills: Path, how: str
) -> None:
    here = house(skills=skills)
    activate(here, "letters")
    here.call("todo_write", **TODOS)
    here.ask("say hi")
    before = tail(here)
    assert "Do letters well." in before and "[in_progress] write to Bob" in before
    here.evict() if how == "evicted" else here.again()
    here.ask("say hi")
    assert tail(here) == before
    here.call("todo_write", todos=[])
    here.evict()
    here.ask("say hi")
    assert "write to Bob" not in tail(here) and "Do letters well." in tail(here)


def tail(here: House) -> str:
    """What the model is told beside the conversation: the reminder at the end of a request."""
    last = here.model.requests[-1].body["messages"][-1]["content"]
    return str(last) if "<system-reminder>" in last else ""


@pytest.mark.parametrize("how", ["removed", "forbidden", "broken"])
def test_a_skill_that_is_no_more_is_dropped_quietly(
    house: Make, skills: Path, tmp_path: Path, how: str
) -> None:
    rules = tenants(tmp_path, '[default]\nskills = ["*"]\n')
    here = house(skills=skills, tenants=rules)
    activate(here, "letters")
    activate(here, "invoices")
    if how == "removed":
        shutil.rmtree(skills / "letters")
    elif how == "forbidden":
        tenants(tmp_path, '[default]\nskills = ["invoices"]\n')
    else:
        (skills / "letters" / "SKILL.md").unlink()
    here.again()
    assert here.ask("say hi")["status"] == "completed"
    assert "Do invoices well." in tail(here)
    assert "Do letters well." not in tail(here)
    gone = here.call("read_file", file_path="skills/letters/references/tone.md")
    assert "Be kind." not in gone


def test_what_is_active_is_the_sessions_alone(house: Make, skills: Path) -> None:
    here = house(skills=skills)
    activate(here, "letters")
    here.call("todo_write", **TODOS)
    for who, sid in (("acme/ann", "s2"), ("acme/bob", "s"), ("beta/ann", "s")):
        here.ask("say hi", who, sid)
        assert "Do letters well." not in here.sent and "write to Bob" not in here.sent


# -- the operator's folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda at: None, "No such file"),
        (lambda at: at.write_text("x"), "Not a directory"),
        (lambda at: skill(at, "two words"), "no name of a skill"),
        (lambda at: skill(at, "big", "x" * 70_000), "larger than 65,536"),
        (lambda at: (skill(at, "x") / "SKILL.md").write_bytes(b"\xff\xff"), "decode"),
        (lambda at: (skill(at, "x") / "SKILL.md").write_text("# X"), "has no description"),
    ],
)
def test_a_bad_folder_is_refused_at_start(
    tmp_path: Path, make: cabc.Callable[[Path], t.Any], complaint: str
) -> None:
    make(tmp_path / "skills")
    with pytest.raises(RuntimeError, match="AGENTAO_SKILLS") as caught:
        read_skills(tmp_path / "skills")
    assert complaint in str(caught.value)


def test_the_process_may_be_anywhere(house: Make, skills: Path, monkeypatch: t.Any) -> None:
    """agentao's own reader of skills looks at paths from where the process is."""
    monkeypatch.chdir(skills.parent)
    assert os.path.exists("skills/letters/SKILL.md")
    here = house(skills=skills)
    assert "skills/letters/references/tone.md" in activate(here, "letters")
