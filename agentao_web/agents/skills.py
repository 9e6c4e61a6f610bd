"""The operator's skills: which there are, those of one agent, and their files to read.

A skill is a folder with a SKILL.md. To an agent its folder is ``skills/NAME``, read-only: no path
of the server is told, and nothing of a workspace, of $HOME or of agentao itself is a skill.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import os
import re
import typing as t
from pathlib import Path

from agentao.capabilities.filesystem import FileEntry
from agentao.capabilities.filesystem import FileStat
from agentao.frontmatter import parse_frontmatter
from agentao.skills import SkillManager

from .files import ConfinedFS

#: Bytes of a SKILL.md: while a skill is active it is in every request.
MAX_SKILL: t.Final = 65_536
#: Files of a skill that the model is told of, per kind.
MAX_FILES: t.Final = 50
#: The folder below which an agent finds its skills. No tool writes there (files.protected).
FOLDER: t.Final = "skills"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TITLE = re.compile(r"^#\s+(.+)$", re.MULTILINE)
#: What agentao tells the model of: two kinds of text, and programs.
_KINDS: t.Final = {"references": ".md", "assets": ".md", "scripts": ""}


@dataclasses.dataclass(frozen=True)
class Skill:
    """One skill, as it was when the server started."""

    name: str
    folder: Path
    text: str
    info: dict[str, t.Any]
    """What agentao's SkillManager keeps of a skill."""


def read_skills(folder: Path) -> dict[str, Skill]:
    """The skills in *folder*, by name; RuntimeError, with the cure, if one cannot be used."""
    try:
        found = sorted(path for path in folder.iterdir() if (path / "SKILL.md").exists())
        return {path.name: _skill(path) for path in found}
    except (OSError, ValueError) as exc:
        raise RuntimeError(f"AGENTAO_SKILLS={folder}: {exc}") from None


def _skill(folder: Path) -> Skill:
    if not _NAME.fullmatch(folder.name):
        raise ValueError(f"{folder.name!r} is no name of a skill: letters, digits, . _ and -")
    file = folder / "SKILL.md"
    if file.stat().st_size > MAX_SKILL:
        raise ValueError(f"{file} is larger than {MAX_SKILL:,} bytes: move parts to references/")
    text = file.read_text("utf-8")
    front, body = parse_frontmatter(text, coerce_str=True, source=str(file))
    if not front.get("description"):
        # Without one the model is never told of it.
        raise ValueError(f"{file} has no description: begin it with ---, description: …, ---")
    title = _TITLE.search(body)
    info = {
        "name": folder.name,
        "title": title[1] if title else folder.name,
        "description": front["description"],
        "when_to_use": front.get("when-to-use", ""),
        "path": f"{FOLDER}/{folder.name}/SKILL.md",
        "content": body[:500],
        "frontmatter": front,
    }
    return Skill(folder.name, folder.resolve(), text, info)


class AllowedSkills(SkillManager):
    """Exactly these skills, from memory; no folder is looked through."""

    def __init__(self, skills: cabc.Mapping[str, Skill], nowhere: Path) -> None:
        super().__init__(skills_dir=str(nowhere), working_directory=nowhere)
        self._skills = skills
        self.available_skills = {name: skill.info for name, skill in skills.items()}

    def reload_skills(self) -> int:
        return len(self.available_skills)

    def get_skill_content(self, skill_name: str) -> str | None:
        skill = self._skills.get(skill_name)
        return skill.text if skill is not None else None

    def _list_skill_resources(self, skill_name: str) -> dict[str, list[str]]:
        skill = self._skills.get(skill_name)
        if skill is None:
            return {kind: [] for kind in _KINDS}
        return {kind: _files(skill, kind, ending) for kind, ending in _KINDS.items()}


def _files(skill: Skill, kind: str, ending: str) -> list[str]:
    """Where an agent finds the files below one folder of *skill*."""
    files = ConfinedFS(skill.folder)
    try:
        paths = files.glob(skill.folder / kind, "*" + ending, recursive=True)
        found = [path.relative_to(skill.folder) for path in paths if files.is_file(path)]
    except OSError:
        return []  # it has none
    plain = [
        path
        for path in found
        if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    ]
    return [f"{FOLDER}/{skill.name}/{path}" for path in plain[:MAX_FILES]]


class WithSkills:
    """agentao's FileSystem of a workspace in which ``skills/NAME`` is that skill's folder.

    Each skill is confined to its own folder, as *own* is to the workspace's; nothing is written
    there, as *own* refuses all below ``skills``.
    """

    def __init__(
        self, own: ConfinedFS, roots: cabc.Iterable[Path], skills: cabc.Mapping[str, _Place]
    ) -> None:
        self._own = own
        self._roots = tuple(roots)
        self._skills = skills

    @classmethod
    def over(cls, own: ConfinedFS, root: Path, skills: cabc.Iterable[Skill]) -> WithSkills:
        """*own*, the files of the workspace *root*, and those of *skills*."""
        places = {skill.name: (skill.folder, ConfinedFS(skill.folder)) for skill in skills}
        return cls(own, {root, root.resolve()}, places)

    def within(self, seconds: float, size: int) -> WithSkills:
        """See ConfinedFS; a call reads in one of these only."""
        places = {
            name: (folder, files.within(seconds, size))
            for name, (folder, files) in self._skills.items()
        }
        return WithSkills(self._own.within(seconds, size), self._roots, places)

    def read_bytes(self, path: Path) -> bytes:
        files, path = self._lead(path)
        return files.read_bytes(path)

    def read_partial(self, path: Path, n: int) -> bytes:
        files, path = self._lead(path)
        return files.read_partial(path, n)

    def open_text(self, path: Path) -> cabc.Iterator[str]:
        files, path = self._lead(path)
        return files.open_text(path)

    def write_text(self, path: Path, data: str, *, append: bool = False) -> None:
        self._own.write_text(path, data, append=append)

    def list_dir(self, path: Path) -> list[FileEntry]:
        files, path = self._lead(path)
        return files.list_dir(path)

    def glob(self, base: Path, pattern: str, *, recursive: bool) -> list[Path]:
        files, real = self._lead(base)
        found = files.glob(real, pattern, recursive=recursive)
        return [base / path.relative_to(real) for path in found]

    def stat(self, path: Path) -> FileStat:
        files, path = self._lead(path)
        return files.stat(path)

    def exists(self, path: Path) -> bool:
        files, path = self._lead(path)
        return files.exists(path)

    def is_dir(self, path: Path) -> bool:
        files, path = self._lead(path)
        return files.is_dir(path)

    def is_file(self, path: Path) -> bool:
        files, path = self._lead(path)
        return files.is_file(path)

    def _lead(self, path: Path) -> tuple[ConfinedFS, Path]:
        """Whose file *path* is, and what it is called there."""
        plain = Path(os.path.normpath(path))
        for root in self._roots:
            if not plain.is_relative_to(root):
                continue
            first, name, *rest = (*plain.relative_to(root).parts, "", "")
            if first == FOLDER and name in self._skills:
                folder, files = self._skills[name]
                return files, folder.joinpath(*rest)
        return self._own, path


_Place = tuple[Path, ConfinedFS]
