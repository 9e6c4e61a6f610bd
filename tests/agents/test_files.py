"""No file outside of the workspace is read or written, and no file in it stops a turn."""

from __future__ import annotations

import os
import stat
import typing as t
from pathlib import Path

import pytest
from agentao.capabilities.filesystem import FileSystem
from agentao.capabilities.filesystem import LocalFileSystem

from agentao_web.agents import files
from agentao_web.agents.files import BudgetSpent
from agentao_web.agents.files import ConfinedFS
from agentao_web.agents.files import protected


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "ws"
    root.mkdir()
    (tmp_path / "ws2").mkdir()
    (tmp_path / "ws2" / "secret.txt").write_text("another tenant's")
    (tmp_path / "secret.txt").write_text("the server's")
    return root


@pytest.fixture
def fs(workspace: Path) -> ConfinedFS:
    return ConfinedFS(workspace)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def names(paths: list[Path], root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in paths}


def test_it_is_a_filesystem_but_not_the_local_one(fs: ConfinedFS) -> None:
    assert isinstance(fs, FileSystem)
    assert not isinstance(fs, LocalFileSystem)


def test_what_is_written_is_read_again(fs: ConfinedFS, workspace: Path) -> None:
    path = workspace / "a" / "b.txt"
    fs.write_text(path, "one\r\n")
    fs.write_text(path, "two\n", append=True)
    assert fs.read_bytes(path) == b"one\r\ntwo\n"
    assert list(fs.open_text(path)) == ["one\n", "two\n"]
    assert fs.read_partial(path, 3) == b"one"
    assert (fs.stat(path).size, fs.stat(path).is_file) == (9, True)
    assert (fs.exists(path), fs.is_file(path), fs.is_dir(path.parent)) == (True, True, True)
    assert not fs.exists(workspace / "c")
    assert [(e.name, e.is_dir, e.size) for e in fs.list_dir(path.parent)] == [("b.txt", False, 9)]
    assert os.listdir(path.parent) == ["b.txt"]


ESCAPES = [
    "/etc/passwd",
    "/proc/self/environ",
    "{ws}/../secret.txt",
    "{ws}/../ws2/secret.txt",
    "{ws}2/secret.txt",
    "{ws}/out.txt",
    "{ws}/outdir/secret.txt",
    "{ws}/sub/../../secret.txt",
    "{ws}/does/not/exist/../../../../secret.txt",
    "{ws}/loop",
    "secret.txt",
    "{ws}/a\0b",
    "{ws}/" + "x/" * 5000 + "../" * 5001,
]


@pytest.fixture
def links(workspace: Path) -> None:
    (workspace / "out.txt").symlink_to(workspace.parent / "secret.txt")
    (workspace / "outdir").symlink_to(workspace.parent)
    (workspace / "loop").symlink_to("loop")
    (workspace / "sub").mkdir()


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("given", ESCAPES)
@pytest.mark.parametrize(
    "use",
    [
        lambda fs, p: fs.read_bytes(p),
        lambda fs, p: fs.read_partial(p, 10),
        lambda fs, p: list(fs.open_text(p)),
        lambda fs, p: fs.write_text(p, "x"),
        lambda fs, p: fs.write_text(p, "x", append=True),
        lambda fs, p: fs.list_dir(p),
        lambda fs, p: fs.glob(p, "*", recursive=True),
        lambda fs, p: fs.stat(p),
    ],
)
def test_no_way_leads_out(
    fs: ConfinedFS, workspace: Path, given: str, use: t.Callable[[ConfinedFS, Path], t.Any]
) -> None:
    before = (workspace.parent / "secret.txt").read_text()
    with pytest.raises((OSError, ValueError)) as refused:
        use(fs, Path(given.replace("{ws}", str(workspace))))
    assert str(workspace.parent) not in str(refused.value)
    assert "/etc" not in str(refused.value)
    assert (workspace.parent / "secret.txt").read_text() == before


@pytest.mark.usefixtures("links")
def test_whether_something_outside_exists_is_not_told(fs: ConfinedFS, workspace: Path) -> None:
    answers = set()
    for path in (workspace.parent / "secret.txt", workspace.parent / "nothing", Path("/etc")):
        for ask in (fs.exists, fs.is_file, fs.is_dir, fs.stat):
            with pytest.raises(PermissionError) as refused:
                ask(path)
            answers.add(str(refused.value))
    assert len(answers) == 1


@pytest.mark.usefixtures("links")
def test_a_walk_neither_shows_nor_follows_what_leads_out(fs: ConfinedFS, workspace: Path) -> None:
    (workspace / "sub" / "in.txt").write_text("x")
    (workspace / "inside").symlink_to("sub/in.txt")
    (workspace / "same").symlink_to("sub")
    found = names(fs.glob(workspace, "*", recursive=True), workspace)
    assert found == {"sub", "sub/in.txt", "inside"}
    shown = {entry.name: entry for entry in fs.list_dir(workspace)}
    assert (shown["outdir"].is_dir, shown["out.txt"].is_file, shown["out.txt"].size) == (0, 0, 0)
    assert shown["same"].is_dir


def test_a_link_put_there_after_the_look_leads_nowhere(
    fs: ConfinedFS, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race: the path was fine when it was resolved, and is a link when it is opened."""
    (workspace / "d").mkdir()
    (workspace / "d" / "secret.txt").write_text("ours")
    resolved = fs._inside(workspace / "d" / "secret.txt")
    monkeypatch.setattr(fs, "_inside", lambda path: resolved)
    (workspace / "d" / "secret.txt").unlink()
    (workspace / "d").rmdir()
    (workspace / "d").symlink_to(workspace.parent)
    for use in (fs.read_bytes, fs.stat, lambda path: fs.write_text(path, "x")):
        with pytest.raises(OSError):
            use(workspace / "d" / "secret.txt")
    assert (workspace.parent / "secret.txt").read_text() == "the server's"


@pytest.mark.parametrize(
    "name",
    [
        "AGENTAO.md",
        "agentao.MD",
        "AGENTS.md",
        "Agents.md",
        "docs/AGENTS.md",
        "ＡGENTAO.md",
        "AGENTAO\u200b.md",
        "AGENTAO\ufe0f.md",
        "AGENT\u034fS.md",
        "\u3164skills/x",
        "AGENTAO.md.",
        ".agentao/mcp.json",
        ".Agentao/agents/x.md",
        "skills/x/SKILL.md",
        "Skills/x/SKILL.md",
        "ſkills/x",
        ".git/config",
        ".GIT/hooks/pre-commit",
        "vendor/.git/config",
        ".env",
        ".ENV.local",
        "．env",
        "to_instructions",
        "to_git/config",
    ],
)
def test_nothing_that_configures_an_agent_can_be_written(
    fs: ConfinedFS, workspace: Path, name: str
) -> None:
    (workspace / ".git").mkdir()
    (workspace / "to_git").symlink_to(".git")
    (workspace / "to_instructions").symlink_to("AGENTAO.md")
    with pytest.raises(PermissionError, match="not allowed"):
        fs.write_text(workspace / name, "x")
    left = [path for path in workspace.rglob("*") if path.is_file()]
    assert left == []


def test_a_protected_name_stays_protected_when_it_is_a_link(
    fs: ConfinedFS, workspace: Path
) -> None:
    (workspace / "AGENTAO.md").symlink_to("plain.txt")
    with pytest.raises(PermissionError):
        fs.write_text(workspace / "AGENTAO.md", "x")
    with pytest.raises(PermissionError):
        fs.write_text(workspace / "sub" / ".." / "AGENTAO.md", "x")


@pytest.mark.parametrize("name", ["my-skills/x", "agentao.txt", "env", "a/skills/b", "git", "x.md"])
def test_ordinary_names_are_not_protected(name: str) -> None:
    assert not protected(name.split("/"))


def test_the_agentao_folder_is_not_there(fs: ConfinedFS, workspace: Path) -> None:
    hidden = workspace / ".agentao" / "mcp.json"
    hidden.parent.mkdir()
    hidden.write_text("{}")
    (workspace / "door").symlink_to(".agentao")
    for path in (hidden, hidden.parent, workspace / "door" / "mcp.json"):
        assert not fs.exists(path) and not fs.is_file(path) and not fs.is_dir(path)
        with pytest.raises(FileNotFoundError):
            fs.stat(path)
        with pytest.raises(FileNotFoundError):
            fs.read_bytes(path)
    assert names(fs.glob(workspace, "**/*", recursive=False), workspace) == set()
    assert [entry.name for entry in fs.list_dir(workspace)] == ["door"]
    with pytest.raises(FileNotFoundError) as hid:
        fs.read_bytes(workspace / ".agentao" / "x")
    with pytest.raises(FileNotFoundError) as missing:
        fs.read_bytes(workspace / "agentao" / "x")
    assert str(hid.value) == str(missing.value).replace("agentao", ".agentao")


def test_a_fifo_or_socket_cannot_hang_a_turn(fs: ConfinedFS, workspace: Path) -> None:
    os.mkfifo(workspace / "pipe")
    for use in (fs.read_bytes, fs.open_text, lambda p: fs.read_partial(p, 1)):
        with pytest.raises(OSError, match="not a regular file: pipe"):
            list(use(workspace / "pipe"))
    with pytest.raises(OSError, match="not a regular file"):
        fs.write_text(workspace / "pipe", "x")
    with pytest.raises(OSError, match="not a regular file"):
        fs.write_text(workspace / "pipe", "x", append=True)
    assert stat.S_ISFIFO((workspace / "pipe").stat().st_mode)
    assert not fs.is_file(workspace / "pipe")


def test_a_file_swapped_for_a_fifo_after_the_look_does_not_hang(
    fs: ConfinedFS, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "plain").write_text("x")
    os.mkfifo(workspace / "pipe")
    looked = os.stat(workspace / "plain")
    monkeypatch.setattr(files, "_lstat", lambda name, parent: looked)
    with pytest.raises(OSError, match="not a regular file"):
        fs.read_bytes(workspace / "pipe")


def test_large_files_are_refused_both_ways(workspace: Path) -> None:
    fs = ConfinedFS(workspace, max_file=10)
    (workspace / "big").write_text("x" * 11)
    for use in (fs.read_bytes, lambda p: list(fs.open_text(p))):
        with pytest.raises(OSError, match="larger than the limit of 10 bytes"):
            use(workspace / "big")
    assert fs.read_partial(workspace / "big", 100) == b"x" * 10
    with pytest.raises(OSError, match="larger than the limit"):
        fs.write_text(workspace / "new", "x" * 11)
    fs.write_text(workspace / "grows", "x" * 6)
    with pytest.raises(OSError, match="larger than the limit"):
        fs.write_text(workspace / "grows", "x" * 6, append=True)
    assert fs.read_bytes(workspace / "grows") == b"x" * 6


def test_a_file_of_too_many_lines_is_refused(fs: ConfinedFS, workspace: Path) -> None:
    (workspace / "lines").write_text("\n" * (files.MAX_LINES + 1))
    with pytest.raises(OSError, match="lines"):
        list(fs.open_text(workspace / "lines"))


def test_a_walk_ends_at_its_limits(workspace: Path) -> None:
    for number in range(20):
        (workspace / str(number)).write_text("")
    clock = Clock()
    short = ConfinedFS(workspace, max_entries=10, clock=clock)
    with pytest.raises(OSError, match="more than 10 files"):
        short.glob(workspace, "nothing", recursive=True)
    with pytest.raises(OSError, match="more than 10 files"):
        short.list_dir(workspace)

    class Slow(Clock):
        def __call__(self) -> float:
            self.now += 1.5
            return self.now

    with pytest.raises(OSError, match="in time"):
        (workspace / "d").mkdir()
        for number in range(200):
            (workspace / "d" / str(number)).write_text("")
        ConfinedFS(workspace, clock=Slow()).glob(workspace, "x", recursive=True)


def test_a_call_has_a_budget_of_its_own(workspace: Path) -> None:
    clock = Clock()
    fs = ConfinedFS(workspace, clock=clock)
    (workspace / "a").write_text("x" * 60)
    once = fs.within(5, 100)
    assert once.read_bytes(workspace / "a")
    with pytest.raises(BudgetSpent, match="too much"):
        once.read_bytes(workspace / "a")
    late = fs.within(5, 1000)
    clock.now = 6
    with pytest.raises(BudgetSpent, match="too long"):
        list(late.open_text(workspace / "a"))
    assert fs.read_bytes(workspace / "a")


@pytest.mark.parametrize("pattern", ["/etc/*", "../*", "a/../../*", "", "\0", "x" * 2000, "/"])
def test_a_pattern_stays_below_its_folder(fs: ConfinedFS, workspace: Path, pattern: str) -> None:
    for recursive in (False, True):
        with pytest.raises(ValueError, match="pattern"):
            fs.glob(workspace, pattern, recursive=recursive)


@pytest.mark.parametrize(
    ("pattern", "recursive"),
    [
        ("*", False),
        ("*", True),
        ("*.py", True),
        ("**/*.py", False),
        ("a/*", False),
        ("a/**/*.py", False),
        ("a/**/b/*", False),
        ("*/b/c.py", False),
        ("a/b/c.py", False),
        ("[ab]/?", False),
        (".*", True),
        ("nothing/*", False),
    ],
)
def test_patterns_mean_what_they_mean_to_pathlib(
    fs: ConfinedFS, workspace: Path, pattern: str, recursive: bool
) -> None:
    for name in ("x.py", "a/x.py", "a/b/c.py", "a/b/b/d", "b/y", ".hid", "a/.hid/z.py"):
        fs.write_text(workspace / name, "")
    theirs = workspace.rglob(pattern) if recursive else workspace.glob(pattern)
    assert names(fs.glob(workspace, pattern, recursive=recursive), workspace) == names(
        list(theirs), workspace
    )


def test_many_stars_are_no_work(fs: ConfinedFS, workspace: Path) -> None:
    fs.write_text(workspace / "/".join(["a"] * 20) / ("a" * 200), "")
    assert fs.glob(workspace, "**/" * 30 + "b", recursive=True) == []
    assert fs.glob(workspace, "*a" * 300 + "b", recursive=True) == []


def test_a_write_is_whole_or_not_at_all(
    fs: ConfinedFS, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs.write_text(workspace / "f", "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(workspace))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="^No space left on device: f$"):
        fs.write_text(workspace / "f", "new")
    assert os.listdir(workspace) == ["f"]
    assert fs.read_bytes(workspace / "f") == b"old"


def test_modes_are_private_and_kept(fs: ConfinedFS, workspace: Path) -> None:
    fs.write_text(workspace / "d" / "f", "x")
    assert stat.S_IMODE((workspace / "d" / "f").stat().st_mode) == 0o600
    (workspace / "d" / "f").chmod(0o4755)
    fs.write_text(workspace / "d" / "f", "y")
    assert stat.S_IMODE((workspace / "d" / "f").stat().st_mode) == 0o755
    (workspace / "d" / "f").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        fs.write_text(workspace / "d" / "f", "z")


def test_names_that_are_no_text_are_shown_but_not_handed_on(
    fs: ConfinedFS, workspace: Path
) -> None:
    """A lone surrogate in a tool's answer is no UTF-8, and the session's history would hold it."""
    with open(os.fsencode(workspace) + b"/bad\xff", "w"):
        pass
    assert [entry.name for entry in fs.list_dir(workspace)] == ["bad\ufffd"]
    assert fs.glob(workspace, "*", recursive=True) == []


def test_no_descriptor_stays_open(fs: ConfinedFS, workspace: Path) -> None:
    os.mkfifo(workspace / "pipe")
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        fs.write_text(workspace / "a" / "b", "x\ny\n")
        next(iter(fs.open_text(workspace / "a" / "b")))
        fs.glob(workspace, "*", recursive=True)
        for path in (workspace / "pipe", workspace / "a", workspace / "a" / "b" / "c"):
            with pytest.raises(OSError):
                fs.read_bytes(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_workspace_may_be_reached_through_a_link(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(workspace)
    fs = ConfinedFS(tmp_path / "link")
    fs.write_text(tmp_path / "link" / "f", "x")
    assert fs.read_bytes(workspace / "f") == b"x"
    with pytest.raises(PermissionError, match="not allowed"):
        fs.write_text(tmp_path / "link" / "AGENTAO.md", "x")
    with pytest.raises(ValueError, match="absolute"):
        ConfinedFS(Path("ws"))
