"""A comment that sends its reader somewhere names something that is there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.live.harness import PROJECT

#: What is ours to read: not what was taken over from others, and not what is made by working here.
FOLDERS = ("agentao_web", "bench", "deploy", "docs", "examples", "tests")
KINDS = {".py", ".md", ".toml", ".js", ".css", ".html", ".conf", ".yaml", ".service", ".env", ""}
TAKEN_OVER = {"vendor", "node_modules", "__pycache__", "axe.min.js", "recorded.json"}

FILES = sorted(
    path
    for folder in FOLDERS
    for path in (PROJECT / folder).rglob("*")
    if path.is_file() and path.suffix in KINDS and not TAKEN_OVER & set(path.parts)
) + [
    PROJECT / name
    for name in ("Makefile", "pyproject.toml", "README.md", "CHANGES.md", "gunicorn.conf.py")
]

#: Papers of the people who wrote this, which no reader has.
PAPERS = re.compile(
    r"\bDESIGN\b|\bSTYLE\.md\b|\bfield\.md\b|\(notes?[,:) ]|\bnotes/\w|\bnotes: ?\""
)
#: A file of the project, by its path from the top.
OURS = re.compile(rf"\b((?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|md|toml|js|conf|yaml|service))\b")


def prose(path: Path) -> str:
    """What a person reads: of Python its comments and docstrings, of the rest all."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, kinds)
    ]
    return "\n".join([*comments, *docstrings])


def named(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_it_cites_nothing_that_a_reader_has_not(path: Path) -> None:
    if path == Path(__file__):
        return
    text = prose(path)
    assert not (found := PAPERS.findall(text)), f"{named(path)} cites {found}"
    missing = [name for name in OURS.findall(text) if not (PROJECT / name).exists()]
    # A page's links are from where it is.
    missing = [name for name in missing if not (path.parent / name).exists()]
    assert not missing, f"{named(path)} names {missing}"


def test_the_words_are_found() -> None:
    """The patterns above see what they were written for."""
    for bad in (
        "DESIGN section 8",
        '(notes: "never")',
        "(notes, section 2)",
        "see notes/engine.md",
    ):
        assert PAPERS.search(bad), bad
    assert not PAPERS.search("release notes for 2.4, and a note")
    (found,) = OURS.findall("# agentao_web/agents/compat.py checks each")
    assert not (PROJECT / found).exists()
