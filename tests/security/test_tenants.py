"""Nobody meets anybody: what one principal may see and change, attacked with real agents and HTTP.

Elsewhere: ways out of a single workspace and names nobody may write (tests/agents/test_files.py,
test_build.py), what is planted in a workspace (test_prompt.py, test_skills.py), memory by
workspace (test_memory.py), who gets which MCP server or skill (test_mcp.py, test_skills.py), what a
shell reaches (test_shell.py), each method of the stores asked by another, and names a database may
confuse (tests/store/test_contract.py), keys, titles and bad tokens with scripted agents
(tests/test_views.py), revoked tokens (tests/test_auth.py), budgets (test_limits.py).
"""

from __future__ import annotations

import base64
import collections
import collections.abc as cabc
import concurrent.futures
import functools
import itertools
import json
import logging
import os
import re
import threading
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentao_web import Principal
from agentao_web.agents.workspaces import Workspaces
from agentao_web.auth import Tokens
from agentao_web.core.names import SessionKey
from agentao_web.views import ROUTES
from tests.model_server import call as model_call
from tests.model_server import think
from tests.security.house import KEY
from tests.security.house import PATIENCE
from tests.security.house import House
from tests.security.house import model_here
from tests.security.house import until
from tests.security.test_mcp import entry
from tests.security.test_mcp import write as mcp_file
from tests.security.test_skills import skill

ANN, BOB = Principal("acme", "ann"), Principal("acme", "bob")
EVE, DAN = Principal("beta", "ann"), Principal("beta", "dan")
FOUR = (ANN, BOB, EVE, DAN)

_MARK = re.compile(r"([TF])(\d\d)-heron")


def greet(who: Principal) -> str:
    """Say who is asking."""
    return f"the host greets {who!r}"


class Village(House):
    """A house of which many principals make use at once."""

    brings: t.ClassVar[dict[str, t.Any]] = {"tools": lambda principal: [greet]}

    def send(
        self, who: Principal, method: str, path: str, worker: int = -1, **given: t.Any
    ) -> t.Any:
        token = Tokens([KEY]).issue(who, ttl=600)
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        headers |= given.pop("headers", {})
        client = self.apps[worker].test_client()
        return client.open(path, method=method, headers=headers, **given)

    def turn(
        self, who: Principal, sid: str, *lines: str, worker: int = -1, **headers: str
    ) -> dict[str, t.Any]:
        """One turn in which the model does what *lines* say."""
        headers = {"Prefer": f"wait={int(PATIENCE)}"} | headers
        given = {"json": {"message": "\n".join(lines)}, "headers": headers}
        answer = self.send(who, "POST", f"/chat/{sid}", worker, **given)
        assert answer.status_code == 200, answer.json
        return t.cast(dict[str, t.Any], answer.json)

    def told(self, who: Principal, sid: str) -> list[str]:
        """What the tools of the session's last turn said, as its client sees it."""
        events = self.send(who, "GET", f"/chat/{sid}/events?wait=0&limit=1000").json["events"]
        last = events[-1]["turn_id"]
        return [
            e["data"]["content"]
            for e in events
            if e["type"] == "tool_result" and e["turn_id"] == last
        ]

    def said_by(self, tool: str, who: Principal, sid: str) -> str:
        """What *tool* said the only time it was used in the session."""
        events = self.send(who, "GET", f"/chat/{sid}/events?wait=0&limit=1000").json["events"]
        (said,) = (
            e["data"]["content"]
            for e in events
            if e["type"] == "tool_result" and e["data"]["tool"] == tool
        )
        return str(said)

    def seen(self, who: Principal, sid: str) -> dict[str, str]:
        """Every page there is to read, with this session's id in it."""
        pages = {}
        for route in ROUTES:
            if route.method != "GET":
                continue
            path = route.path.replace("<sid>", sid)
            for accept in ("application/json", "text/event-stream"):
                query = "?wait=0&limit=200" if path.endswith("/events") else ""
                answer = self.send(who, "GET", path + query, headers={"Accept": accept})
                pages[f"{path} {accept}"] = answer.get_data(as_text=True)
        return pages

    @property
    def spaces(self) -> Workspaces:
        settings = self.apps[-1].extensions["agentao_web"].settings
        return Workspaces(settings.root, settings.workspace)

    def place(self, who: Principal, sid: str = "s") -> Path:
        return self.spaces.path(SessionKey(who.tenant, who.user, sid))


Make = cabc.Callable[..., Village]


@pytest.fixture
def village(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Make]:
    made: list[Village] = []
    with model_here(monkeypatch) as model:

        def build(**config: t.Any) -> Village:
            given = {"policy": "trusted", "llm_attempts": 1, "max_turns": 200, **config}
            made.append(Village(tmp_path, model, **given))
            return made[-1]

        yield build
        for one in made:
            one.close()


def call(tool: str, **arguments: t.Any) -> str:
    """A line that makes the model use *tool*."""
    return f"call {tool} {json.dumps(arguments)}"


def at_once(*work: cabc.Callable[[], t.Any]) -> list[t.Any]:
    """Do all of it side by side."""
    start = threading.Barrier(len(work))

    def one(do: cabc.Callable[[], t.Any]) -> t.Any:
        start.wait(PATIENCE)
        return do()

    with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
        return [future.result(4 * PATIENCE) for future in [pool.submit(one, do) for do in work]]


# -- everything at once ----------------------------------------------------------------------------


class Life(t.NamedTuple):
    """One session, and the words nobody else may see: of its talk, and of its files."""

    number: int
    who: Principal
    sid: str

    @property
    def talk(self) -> str:
        return f"T{self.number:02}-heron"

    @property
    def file(self) -> str:
        return f"F{self.number:02}-heron"

    def shares(self, other: Life, workspace: str) -> bool:
        """Whether the two work in one folder."""
        if workspace == "session":
            return self == other
        same = self.who.tenant == other.who.tenant
        return same if workspace == "tenant" else self.who == other.who


def lives(people: cabc.Iterable[Principal], *sids: str) -> list[Life]:
    both = itertools.product(people, sids)
    return [Life(number, who, sid) for number, (who, sid) in enumerate(both)]


def live(here: Village, life: Life, *, curious: bool) -> None:
    """A short life of everything a session can do, in two workers by turns."""
    who, sid, talk, file = life.who, life.sid, life.talk, life.file
    here.turn(
        who,
        sid,
        call("write_file", file_path=f"{file}.txt", content=f"{file}\nall my own"),
        call("save_memory", key=f"note_{life.number}", value=f"heron {file}"),
        call("todo_write", todos=[{"content": talk, "status": "pending"}]),
        call("greet"),
        *(_extra(talk) if "mcp" in here.config else ()),
        f"say {talk} was here",
        worker=0,
        **{"Idempotency-Key": "the-same-for-all"},
    )
    if curious:
        look_around(here, life)
    here.turn(who, sid, f"fail 400 {talk} the provider's own words", worker=0)
    ask_and_answer(here, life)
    title = here.send(who, "PATCH", f"/session/{sid}", json={"title": f"title {talk}"})
    assert title.status_code == 200


def _extra(talk: str) -> tuple[str, ...]:
    activate = call("activate_skill", skill_name="letters", task_description=talk)
    return activate, call("mcp_t_echo", text=talk), call("mcp_t_where")


def look_around(here: Village, life: Life) -> None:
    patterns = ("*", "**/*", "../*", "../**/*", "/**", "../../*/*/*.txt")
    here.turn(
        life.who,
        life.sid,
        *(call("glob", pattern=pattern) for pattern in patterns),
        call("search_file_content", pattern="[TF][0-9]+-heron", regex=True),
        call("search_file_content", pattern="heron", directory="..", regex=True),
        call("search_file_content", pattern="heron", file_pattern="../**/*"),
        call("list_directory", directory_path=".", recursive=True),
        f"say {life.talk} looked around",
        worker=1,
    )


def remember(here: Village, life: Life) -> None:
    """What is remembered is in the prompt of the turn after."""
    here.turn(life.who, life.sid, f"say heron? {life.talk}")


def ask_and_answer(here: Village, life: Life) -> None:
    question = call("ask_user", question=f"{life.talk}?")
    message = {"message": f"{question}\nsay {life.talk} asked"}
    here.send(life.who, "POST", f"/chat/{life.sid}", 1, json=message)
    snapshot = f"/session/{life.sid}"
    (asked,) = until(
        lambda: here.send(life.who, "GET", snapshot, 0).json["questions"], "nobody asked"
    )
    assert asked["question"] == f"{life.talk}?"
    answer = {"question_id": asked["question_id"], "answer": f"{life.talk}!"}
    assert here.send(life.who, "POST", f"/chat/{life.sid}/answer", 0, json=answer).json["ok"]
    until(lambda: here.send(life.who, "GET", snapshot, 1).json["state"] == "idle", "no end")


def strangers(text: str, life: Life, all_: list[Life], workspace: str) -> set[str]:
    """The words in *text* that are not for this session's eyes."""
    found = set()
    for kind, number in set(_MARK.findall(text)):
        other = all_[int(number)]
        if kind == "T" and other != life or not life.shares(other, workspace):
            found.add(f"{kind}{number}")
    return found


ODD = (
    *(Principal("acme"), Principal("acme", "shared"), Principal("shared"), Principal("ACME")),
    *(Principal("../acme", "ann"), Principal("..", ".."), Principal(".", "."), Principal("/", "~")),
    *(Principal("a", "b/c"), Principal("a/b", "c"), Principal("a b", " "), Principal("acme ")),
    *(Principal("аcme", "ann"), Principal("caf\u00e9", "x"), Principal("cafe\u0301", "x")),
    *(Principal("x" * 256, "y"), Principal("x" * 255, "xy"), Principal("%", "_"), Principal("*")),
    *(
        Principal("default"),
        Principal("'; --", '"'),
        Principal("acme", "ANN"),
        Principal("0", "00"),
    ),
    # As the folders of acme and of its ann are called.
    Principal(*Workspaces(Path("/"), "user").path(SessionKey("acme", "ann", "s")).parts[-2:]),
)


@pytest.mark.parametrize(
    ("workspace", "people", "sids"),
    [
        ("user", FOUR, ("s",)),
        ("tenant", FOUR, ("s",)),
        ("session", FOUR, ("s", "s-1")),
        ("user", ODD, ("s",)),
    ],
    ids=["user", "tenant", "session", "odd names"],
)
def test_everyone_sees_their_own_and_nothing_else(
    village: Make,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    workspace: str,
    people: tuple[Principal, ...],
    sids: tuple[str, ...],
) -> None:
    caplog.set_level(logging.DEBUG)
    more: dict[str, t.Any] = {}
    if workspace == "session":
        skill(tmp_path / "operator", "letters")
        more = {"skills": tmp_path / "operator", "mcp": mcp_file(tmp_path, t=entry())}
    here = village(workspace=workspace, memory=True, **more)
    here.again()
    all_ = lives(people, *sids)
    at_once(*(functools.partial(live, here, life, curious=len(people) == 4) for life in all_))
    at_once(*(functools.partial(remember, here, life) for life in all_))

    worlds = {life: here.seen(life.who, life.sid) for life in all_}
    for life, pages in worlds.items():
        own = [other for other in all_ if other.who == life.who]
        for name, page in pages.items():
            if name.startswith("/sessions "):
                assert strangers(page, life, all_, workspace) <= {x.talk[:3] for x in own}
                continue
            assert not strangers(page, life, all_, workspace), (name, life)
            assert str(tmp_path) not in page and "/dev/null" not in page, name
        assert life.talk in pages[f"/session/{life.sid} application/json"]
        assert life.talk in pages[f"/session/{life.sid}/messages application/json"]
        events = here.send(life.who, "GET", f"/chat/{life.sid}/events?wait=0&limit=1000").json
        assert (
            usage(events["events"])
            == here.send(life.who, "GET", f"/session/{life.sid}").json["usage"]
        )
        assert f"the host greets {life.who!r}" in json.dumps(events, ensure_ascii=False).replace(
            '\\"', '"'
        )
    if "mcp" in more:
        processes = {here.said_by("mcp_t_where", life.who, life.sid) for life in all_}
        assert len(processes) == len(all_)
    told_to_the_model(here, all_, workspace, tmp_path)
    on_the_disk(here, all_, workspace)
    for life in all_:
        assert life.talk not in caplog.text and life.file not in caplog.text
    assert not _MARK.search("".join(capfd.readouterr()))

    gone, *left = all_
    assert here.send(gone.who, "DELETE", f"/session/{gone.sid}").json == {"ok": True}
    for life in left:
        if life.who != gone.who:
            assert here.seen(life.who, life.sid) == worlds[life], (
                "another's deletion changes nothing"
            )
    on_the_disk(here, left, workspace)


def usage(events: list[dict[str, t.Any]]) -> dict[str, int]:
    used: collections.Counter[str] = collections.Counter()
    for event in events:
        if event["type"] == "usage":
            used.update(event["data"])
    return dict(used)


def told_to_the_model(here: Village, all_: list[Life], workspace: str, root: Path) -> None:
    seen = set()
    for request in here.model.requests:
        text = json.dumps(request.body, ensure_ascii=False)
        said = [str(m["content"]) for m in request.body["messages"] if m["role"] == "user"]
        (talk,) = {number for kind, number in _MARK.findall("".join(said)) if kind == "T"}
        life = all_[int(talk)]
        assert not strangers(text + str(request.headers), life, all_, workspace)
        assert str(root) not in text and "/dev/null" not in text
        seen.add(life)
    assert seen == set(all_)


def on_the_disk(here: Village, all_: list[Life], workspace: str) -> None:
    """Every file lies in the folder of who wrote it, and is still there."""
    found: dict[str, set[Path]] = collections.defaultdict(set)
    for name in ("workspaces", "memory"):
        for path in (here.folder / "root" / name).rglob("*"):
            if path.is_file():
                text = path.name + path.read_text(errors="replace")
                for kind, number in _MARK.findall(text):
                    found[kind + number].add(path)
    for life in all_:
        place = here.place(life.who, life.sid)
        memory = here.spaces.memory(SessionKey(life.who.tenant, life.who.user, life.sid))
        files = found.pop(life.file[:3])
        assert place / f"{life.file}.txt" in files
        for path in files - {place / f"{life.file}.txt"}:
            assert memory is not None and str(path).startswith(str(memory))
    assert workspace != "session" or not found, "what was deleted is gone"
    assert not [word for word in found if word.startswith("T")]


# -- through the agents' tools ---------------------------------------------------------------------


def test_no_tool_leads_to_a_neighbour(village: Make, tmp_path: Path) -> None:
    """Whatever lies in the workspace already: links put there by the operator, or by a restore."""
    here = village(max_steps=50)
    for who in (BOB, EVE):
        here.turn(who, "s", call("write_file", file_path="secret.txt", content="SECRET as it is"))
    mine = len(here.model.requests)
    here.turn(ANN, "s", call("write_file", file_path="own.txt", content="mine"))
    own = here.place(ANN)
    for name, who in (("bob", BOB), ("eve", EVE)):
        theirs = here.place(who)
        (own / f"{name}.txt").symlink_to(theirs / "secret.txt")
        (own / f"{name}.d").symlink_to(theirs)
        (own / f"{name}.rel").symlink_to(os.path.relpath(theirs, own))
    (own / "up").symlink_to("..")
    (own / "database").symlink_to(tmp_path / "root" / "agentao-web.db")
    (own / "sub").mkdir()
    # A neighbour whose name only begins as ours does.
    (twin := own.with_name(own.name + "x")).mkdir()
    (twin / "secret.txt").write_text("SECRET as it is")
    before = _files(here, without=own)

    folders = ["bob.d", "eve.d", "eve.rel", "up", f"up/{twin.name}", f"../{twin.name}", ".."]
    folders += [str(here.place(BOB)), str(here.place(EVE)), str(twin), "~", "sub/../.."]
    folders += [f"../{here.place(BOB).name}", "/proc/self/cwd"]
    paths = [f"{folder}/secret.txt" for folder in folders] + ["bob.txt", "eve.txt", "database"]
    lines = [
        line
        for path in paths
        for line in (
            call("read_file", file_path=path),
            call("write_file", file_path=path, content="OVERWRITTEN"),
            call("write_file", file_path=path, content="OVERWRITTEN", append=True),
            call("replace", file_path=path, old_text="as it is", new_text="OVERWRITTEN"),
        )
    ]
    lines += [
        line
        for folder in folders
        for line in (
            call("list_directory", directory_path=folder, recursive=True),
            call("glob", pattern="**/*.txt", directory=folder),
            call("glob", pattern=f"{folder}/*"),
            call("search_file_content", pattern="S.CRET", regex=True, directory=folder),
            call("search_file_content", pattern="S.CRET", regex=True, file_pattern=f"{folder}/*"),
            call("write_file", file_path=f"{folder}/new.txt", content="NEW"),
        )
    ]
    turns = [lines[at : at + 20] for at in range(0, len(lines), 20)]
    ended = at_once(
        *(
            functools.partial(here.turn, ANN, f"s{number}", *turn)
            for number, turn in enumerate(turns)
        )
    )
    assert [(e["status"], e["tool_count"]) for e in ended] == [
        ("completed", len(turn)) for turn in turns
    ]
    assert _files(here, without=own) == before
    shown = [here.seen(ANN, f"s{number}") for number in range(len(turns))]
    told = [request.body for request in here.model.requests[mine:]]
    assert "SECRET" not in json.dumps([shown, told])
    assert "SQLite format" not in json.dumps([shown, told])


def _files(here: Village, *, without: Path) -> dict[str, str]:
    """All files of all workspaces but one."""
    top = here.folder / "root" / "workspaces"
    paths = [p for p in top.rglob("*") if p.is_file() and not p.is_relative_to(without)]
    return {str(path): path.read_text() for path in paths}


def test_a_hard_link_is_a_file_of_ones_own_once_it_is_written(village: Make) -> None:
    """Nobody but the operator can make one. It can be read; the other's file never changes."""
    here = village()
    here.turn(BOB, "s", call("write_file", file_path="a.txt", content="as it was"))
    here.turn(ANN, "s", "say hi")
    theirs = here.place(BOB) / "a.txt"
    for n, line in enumerate(
        (
            call("write_file", file_path="0", content="x"),
            call("write_file", file_path="1", content="x", append=True),
            call("replace", file_path="2", old_text="was", new_text="is not"),
        )
    ):
        os.link(theirs, here.place(ANN) / str(n))
        here.turn(ANN, "s", line)
        assert (here.place(ANN) / str(n)).read_text() != "as it was"
        assert theirs.read_text() == "as it was"


NAMES = (
    *("AGENTAO.md", "./AGENTAO.md", "sub/../AGENTAO.md", "agentao.MD", "sub/AGENTS.md"),
    *(".agentao/mcp.json", ".AGENTAO/mcp.json", ".agentao./skills/x/SKILL.md", ".git/config"),
    *("skills/x/SKILL.md", "SKILLS/x/SKILL.md", "link/x/SKILL.md", ".env", ".agentao/agents/x.md"),
    # What is drawn or compared as if it were the same.
    *("ＡＧＥＮＴＡＯ.md", "AGENTAO\u200b.md", "AGENTAO\ufe0f.md", "AGENT\u034fS.md"),
    *("\u3164skills/x/SKILL.md", "ski\u180bl\u17b4ls/x/SKILL.md"),
)


def test_an_agent_cannot_prepare_its_next_turn(village: Make) -> None:
    here = village(memory=True)
    here.turn(ANN, "s", "say hi")
    (here.place(ANN) / "link").symlink_to("skills")
    first = here.model.requests[-1].body
    planted = json.dumps({"mcpServers": {"x": {"command": "touch", "args": ["PLANTED"]}}})
    lines = [call("write_file", file_path=name, content=f"PLANTED {planted}") for name in NAMES]
    here.again(max_steps=50, max_tool_calls=100)
    here.turn(ANN, "s", *lines)
    told = here.told(ANN, "s")
    assert len(told) == len(NAMES)
    for name, answer in zip(NAMES, told, strict=True):
        assert "not allowed" in answer, name
    assert [path.name for path in here.place(ANN).rglob("*")] == ["link"]
    for sid in ("s", "fresh"):
        here.evict()
        here.turn(ANN, sid, "say hi")
        then = here.model.requests[-1].body
        assert then["messages"][0] == first["messages"][0] and then["tools"] == first["tools"]


def test_a_client_sees_no_path_of_the_server(
    village: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even where a tool of the host's names one and the model says it again, bit by bit."""
    here = village(thinking=True)
    path = str(here.place(ANN) / "a.txt")
    folder = here.place(ANN)

    def find() -> list[str]:
        """Find it."""
        return [path, str(folder)]

    monkeypatch.setattr(here, "brings", {"tools": lambda principal: [find]})
    here.again()
    text = f"either/or: {path}, in {folder}/ or {folder}x or {str(folder)[:-3]}"
    bits = [text[at : at + 3] for at in range(0, len(text), 3)]
    here.model.script(model_call("find", {}), think(*bits, answer=tuple(bits)))
    ended = here.turn(ANN, "s", "find it")
    said = f"either/or: a.txt, in  or .x or {str(folder)[:-3]}"
    assert ended["reply"] == said
    events = here.send(ANN, "GET", "/chat/s/events?wait=0").json["events"]
    assert "".join(e["data"]["chunk"] for e in events if e["type"] == "llm_text") == said
    for page in here.seen(ANN, "s").values():
        assert str(folder) not in page
    assert json.loads(here.told(ANN, "s")[0]) == ["a.txt", "."]


# -- through HTTP ----------------------------------------------------------------------------------

SIDS = ("theirs", "Theirs", "THEIRS", "theirs.", "their5", "th-irs")
DOORS = (
    ("GET", "/chat/{}/events?wait=0", None),
    ("GET", "/chat/{}/events?wait=0&after=5", None),
    ("GET", "/session/{}", None),
    ("GET", "/session/{}/messages", None),
    ("PATCH", "/session/{}", {"title": "mine now"}),
    ("POST", "/chat/{}/answer", {"question_id": "q", "approve": True}),
    ("POST", "/session/{}/ticket", None),
    ("POST", "/chat/{}/cancel", None),
    ("DELETE", "/session/{}", None),
)


#: Headers that are another for every answer.
_OWN = ("Date", "X-Request-Id")


def test_anothers_session_is_one_that_does_not_exist(
    village: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, by the same questions to the store; idle, running, here or in another worker."""
    here = village()
    here.again()
    here.turn(ANN, "theirs", "say hi")
    here.send(EVE, "POST", "/chat/theirs", 0, json={"message": "hang"})
    here.model.wait_for_request(2)
    asked: list[str] = []

    def hear(_connection: t.Any, _cursor: t.Any, statement: str, *_: t.Any) -> None:
        # Whose tokens are void is asked every two seconds, whoever comes.
        known = "revo" in statement or statement.startswith(("BEGIN", "PRAGMA"))
        if threading.current_thread() is threading.main_thread() and not known:
            asked.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", hear)
    try:
        strangers = (BOB, DAN, Principal("acme"), Principal("beta"))
        for worker, stranger in itertools.product((0, 1), strangers):
            for method, path, body in DOORS:
                answers = []
                for sid in ("theirs", "nobody"):
                    asked.clear()
                    answer = here.send(stranger, method, path.format(sid), worker, json=body)
                    headers = {k: v for k, v in answer.headers.items() if k not in _OWN}
                    answers.append((answer.status_code, headers, answer.data, list(asked)))
                assert answers[0] == answers[1], (method, path)
                assert answers[0][3], "the store was asked"
                harmless = path.endswith("cancel") or method == "DELETE"
                assert answers[0][0] == (200 if harmless else 404)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", hear)
    assert here.send(EVE, "GET", "/session/theirs").json["state"] == "running"
    assert here.send(ANN, "GET", "/session/theirs").json["title"] == "say hi"
    for worker in (0, 1):
        assert here.turn(BOB, "theirs", "say mine", worker=worker)["reply"] == "mine"
    assert here.send(ANN, "GET", "/session/theirs").json["turns"] == 1


def test_ids_that_look_alike_are_not_the_same(village: Make) -> None:
    here = village(workspace="session")
    for sid in SIDS:
        here.turn(
            ANN, sid, call("write_file", file_path="a.txt", content=f"{sid} wrote"), f"say {sid}!"
        )
    for sid in SIDS:
        assert (here.place(ANN, sid) / "a.txt").read_text() == f"{sid} wrote"
        said = here.send(ANN, "GET", f"/session/{sid}/messages").json["messages"]
        assert (
            said[-1]["content"] == f"{sid}!"
            and here.send(ANN, "GET", f"/session/{sid}").json["turns"] == 1
        )
    here.send(ANN, "DELETE", f"/session/{SIDS[0]}")
    left = here.send(ANN, "GET", "/sessions").json["sessions"]
    assert {session["session_id"] for session in left} == set(SIDS[1:])
    assert [here.place(ANN, sid).exists() for sid in SIDS] == [False] + [True] * (len(SIDS) - 1)


def test_anothers_ids_are_nothing_in_ones_own_session(village: Make) -> None:
    """Questions, cursors and marks of pages, taken from one and used by all the others."""
    here = village()
    ask = call("ask_user", question="which?") + "\nsay well"
    here.send(ANN, "POST", "/chat/s", json={"message": ask})
    (question,) = until(
        lambda: here.send(ANN, "GET", "/session/s").json["questions"], "nobody asked"
    )
    cursor = here.send(ANN, "GET", "/session/s").json["cursor"]
    for n in range(3):
        here.turn(ANN, f"s{n}", "say ann's")
    mark = here.send(ANN, "GET", "/sessions?limit=1").json["next"]
    for who in (BOB, EVE, Principal("acme")):
        here.turn(who, "s", "say own")
        answers = [
            here.send(who, "POST", "/chat/s/answer", json={"question_id": id_, "answer": "no"})
            for id_ in (question["question_id"], "0" * 32)
        ]
        assert answers[0].status_code == answers[1].status_code == 404
        assert answers[0].data == answers[1].data
        page = here.send(who, "GET", f"/sessions?page={mark}").json
        assert {session["session_id"] for session in page["sessions"]} <= {"s"}
        for accept, after in (("application/json", cursor), ("text/event-stream", 0)):
            headers = {"Accept": accept, "Last-Event-ID": str(cursor)}
            url = f"/chat/s/events?wait=0&after={after}"
            read = here.send(who, "GET", url, headers=headers).get_data(as_text=True)
            assert "which?" not in read and question["turn_id"] not in read
        for side in ("before", "after"):
            read = here.send(who, "GET", f"/session/s/messages?{side}={cursor}")
            assert "which?" not in read.get_data(as_text=True)
    assert here.send(ANN, "GET", "/session/s").json["questions"] == [question]
    answer = {"question_id": question["question_id"], "answer": "this"}
    assert here.send(ANN, "POST", "/chat/s/answer", json=answer).json["ok"]
    until(lambda: here.send(ANN, "GET", "/session/s").json["state"] == "idle", "no end")


def forged() -> dict[str, str]:
    """Tokens that name somebody, and are no good."""
    good = {who: Tokens([KEY]).issue(who, ttl=600) for who in FOUR}
    payload, moment, signature = good[ANN].split(".")
    theirs = good[EVE].split(".")
    claims = base64.urlsafe_b64encode(b'["acme","bob",99999999999]').decode().rstrip("=")
    retired = Tokens(["a-key-that-was-retired-long-ago"])
    return {
        "the tenant changed": f"{claims}.{moment}.{signature}",
        "another's signature": f"{payload}.{moment}.{theirs[2]}",
        "another's name": f"{theirs[0]}.{moment}.{signature}",
        "a later moment": f"{payload}.{'_' * len(moment)}.{signature}",
        "no signature": f"{payload}.{moment}.",
        "no moment": f"{payload}.{signature}",
        "a retired key": retired.issue(ANN, ttl=600),
        "expired": Tokens([KEY], clock=lambda: 0).issue(ANN, ttl=60),
        "two at once": f"{good[ANN]}.{good[EVE]}",
        "not of this kind": t.cast(str, _other_salt()),
    }


def _other_salt() -> str | bytes:
    from itsdangerous import URLSafeTimedSerializer

    return URLSafeTimedSerializer(KEY, salt="cookie-session").dumps(["acme", "ann", 99999999999])


def test_a_forged_token_opens_nothing(village: Make) -> None:
    here = village()
    here.turn(ANN, "s", "say hi")
    before = here.seen(ANN, "s")
    client = here.apps[-1].test_client()
    answers = set()
    for name, token in forged().items():
        headers = {"Authorization": f"Bearer {token}"}
        for route, sid in itertools.product(ROUTES, ("s", "nobody")):
            if not route.public and route.scheme != "metrics":
                path = route.path.replace("<sid>", sid)
                given: dict[str, t.Any] = {"headers": headers, "json": {"message": "x"}}
                answer = client.open(path, method=route.method, **given)
                assert answer.status_code == 401, name
                answers.add(answer.data)
    assert len(answers) == 1
    assert here.seen(ANN, "s") == before and len(here.model.requests) == 1
