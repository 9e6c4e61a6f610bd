"""A real Chromium before a real server: one browser and one server for each test process."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import itertools
import os
import re
import typing as t
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import BrowserContext
from playwright.sync_api import Locator
from playwright.sync_api import Page
from playwright.sync_api import expect

from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import token

APP = "tests.page.page_app:app"
AXE = Path(__file__).parent / "axe.min.js"
_numbers = itertools.count()

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    with Server(tmp_path_factory.mktemp("page"), app=APP, AGENTAO_THINKING="1") as found:
        yield found


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    """A server with little room, little time and a short life of its workers."""
    limits = {
        "AGENTAO_LOG_BYTES": "4096",
        "AGENTAO_MAX_MESSAGE": "40",
        "AGENTAO_MAX_IMAGE": "10",
        "AGENTAO_QUESTION_TIMEOUT": "2",
        "AGENTAO_WORKER_LEASE": "5",
    }
    with Server(tmp_path_factory.mktemp("narrow"), app=APP, **limits) as found:
        yield found


@pytest.fixture(scope="session")
def monolith(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    """A host with a login of its own, and the page below a prefix."""
    env = {"TEST_PREFIX": "/agent", "TEST_LOGIN": "cookie"}
    with Server(tmp_path_factory.mktemp("monolith"), app=APP, **env) as found:
        yield found


@dataclasses.dataclass
class Tab:
    """One tab of a browser, and what happened in it that must not."""

    page: Page
    url: str
    server: Server
    allowed: list[str] = dataclasses.field(default_factory=list)
    """Patterns of what this test provokes."""
    said: list[str] = dataclasses.field(default_factory=list)
    foreign: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on(
            "console",
            lambda message: self._hear(message.type, message.text),
        )
        self.page.on("pageerror", lambda error: self.said.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._ask(request.url))

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(text)

    def _ask(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def check(self) -> None:
        """Nothing was complained of, and nobody else was asked for anything."""
        bad = [line for line in self.said if not any(re.search(p, line) for p in self.allowed)]
        assert not bad, bad
        assert not self.foreign, self.foreign

    # -- what a person does --------------------------------------------------------------------

    def open(self, path: str = "/", *, hash: str = "") -> t.Self:
        self.page.goto(self.url + path + (f"#{hash}" if hash else ""))
        self.ready()
        return self

    def ready(self) -> None:
        self.page.locator("html[data-ready]").wait_for(state="attached")

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def turn(self, number: int = 0) -> Locator:
        return self.page.locator(".turn").nth(number)

    @property
    def chats(self) -> Locator:
        return self.page.locator("#chats .chat")

    @property
    def sid(self) -> str:
        return t.cast(str, self.page.evaluate("location.hash.slice(1)"))

    def gate(self, name: str) -> None:
        assert self.server.client.post(f"/test/gate/{name}").status_code == 200


Opened = cabc.Callable[..., Tab]


@pytest.fixture
def context_of(chromium: Browser) -> cabc.Iterator[cabc.Callable[..., BrowserContext]]:
    """Fresh profiles, closed with the test."""
    with contextlib.ExitStack() as stack:

        def make(**options: t.Any) -> BrowserContext:
            context = chromium.new_context(**{"reduced_motion": "reduce", **options})
            stack.callback(context.close)
            return context

        yield make


@pytest.fixture
def browse(context_of: cabc.Callable[..., BrowserContext], server: Server) -> cabc.Iterator[Opened]:
    """Opens tabs; each is checked when the test is over.

    *who* is the user that is signed in, None for nobody.
    """
    tabs: list[Tab] = []

    def make(
        *,
        who: str | None = "",
        at: Server | None = None,
        url: str | None = None,
        context: BrowserContext | None = None,
        **options: t.Any,
    ) -> Tab:
        context = context or context_of(**options)
        tab = Tab(context.new_page(), url or (at or server).url, at or server)
        if who is not None:
            signed = token(user=who or f"user-{os.getpid()}-{next(_numbers)}")
            tab.page.add_init_script(f"sessionStorage['agentao-token'] ??= {signed!r}")
        tabs.append(tab)
        return tab

    yield make
    for tab in tabs:
        tab.check()


@pytest.fixture
def tab(browse: Opened) -> Tab:
    """A tab of somebody who is signed in and has no chats."""
    return browse().open()


@pytest.fixture
def fresh() -> str:
    """A name nobody has used."""
    return f"gate{os.getpid()}n{next(_numbers)}"
