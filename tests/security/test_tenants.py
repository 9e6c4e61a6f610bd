"""Nobody meets anybody: what one principal may see and change, attacked with real agents and HTTP.

Elsewhere: paths out of a single workspace and names nobody may write (tests/agents/test_files.py,
test_build.py), what is planted in a workspace (test_prompt.py, test_skills.py), memory by
workspace (test_memory.py), who gets which MCP server (test_mcp.py), each method of the stores
asked by another (tests/store/test_contract.py), keys, titles and bad tokens in scripted turns
(tests/test_views.py), revoked tokens (tests/test_auth.py), budgets (test_limits.py).
"""

from __future__ import annotations

import base64
import collections
import collections.abc as cabc
import concurrent.futures
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
from flask import Flask

from agentao_web import Principal
from agentao_web.agents.workspaces import Workspaces
from agentao_web.auth import Tokens
from agentao_web.core.names import SessionKey
from agentao_web.extension import pool_of
from agentao_web.views import ROUTES
from tests.model_server import ModelServer
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


def live(here: Village, life: Life) -> None:
    """A short life of everything a session can do, in two workers by turns."""
    who, sid, talk, file = life.who, life.sid, life.talk, life.file
    here.turn(
        who,
        sid,
        call("write_file", file_path=f"{file}.txt", content=f"{file}\nall my own"),
        call("save_memory", key=f"note_{life.number}", value=f"heron {file}"),
        call("todo_write", todos=[{"content": talk, "status": "pending"}]),
        call("greet"),
        f"say {talk} was here",
        worker=0,
        **{"Idempotency-Key": "the-same-for-all"},
    )
    ways = ("*", "**/*", "../*", "../**/*", "/**", "../../*/*/*.txt")
    here.turn(
        who,
        sid,
        *(call("glob", pattern=pattern) for pattern in ways),
        call("search_file_content", pattern="[TF][0-9]+-heron", regex=True),
        call("search_file_content", pattern="heron", directory="..", regex=True),
        call("search_file_content", pattern="heron", file_pattern="../**/*"),
        call("list_directory", directory_path=".", recursive=True),
        f"say {talk} looked around",
        worker=1,
    )
    here.turn(who, sid, f"fail 400 {talk} the provider's own words", worker=0)
    ask_and_answer(here, life)
    title = here.send(who, "PATCH", f"/session/{sid}", json={"title": f"title {talk}"})
    assert title.status_code == 200


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
        ("user", FOUR, ("s", "S")),
        ("tenant", FOUR, ("s", "s.")),
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
    here = village(workspace=workspace, memory=True)
    here.again()
    all_ = lives(people, *sids)
    at_once(*(lambda life=life: live(here, life) for life in all_))  # type: ignore[misc]
    # What is remembered is in the prompt of the turn after.
    at_once(*(lambda x=x: here.turn(x.who, x.sid, f"say heron? {x.talk}") for x in all_))  # type: ignore[misc]

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
