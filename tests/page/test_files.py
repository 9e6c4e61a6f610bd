"""The page's files as the server gives them, without a browser."""

from __future__ import annotations

import collections.abc as cabc
import hashlib
import re
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from agentao_web import AgentaoWeb
from agentao_web import page
from agentao_web import shutdown
from agentao_web.testing import scripted

Make = cabc.Callable[..., FlaskClient]


@pytest.fixture
def web(tmp_path: Path) -> cabc.Iterator[Make]:
    apps: list[Flask] = []

    def make(prefix: str = "", before: t.Any = None, **config: t.Any) -> FlaskClient:
        app = Flask("page")
        app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_SECRET_KEYS="a-key-of-the-page-tests")
        app.config.update({f"AGENTAO_{k.upper()}": v for k, v in config.items()})
        AgentaoWeb(agents=scripted()).init_app(app, url_prefix=prefix)
        if before is not None:
            app.add_url_rule("/", view_func=before)
        apps.append(app)
        return app.test_client()

    yield make
    for app in apps:
        shutdown(app)


def test_the_page_is_open_to_all_and_strict(web: Make) -> None:
    answer = web().get("/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    for rule in (
        "default-src 'none'",
        "script-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "form-action 'none'",
        "base-uri 'none'",
        "require-trusted-types-for 'script'",
    ):
        assert rule in policy.split("; ")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"


def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    text = (page.FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", text)
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all((page.FOLDER.parent / link).is_file() for link in links)
    for path in page.FOLDER.glob("*.*s*"):
        for url in re.findall(r"https?://[^\s\"'`)]+", path.read_text()):
            assert url == "http://www.w3.org/2000/svg" or "icon" in path.name, (path, url)


@pytest.mark.parametrize("name", ["main.js", "style.css", "icon.svg", "vendor/purify.es.mjs"])
def test_a_file_is_sent_once_and_then_only_asked_after(web: Make, name: str) -> None:
    client = web(prefix="/agent")
    first = client.get(f"/agent/page/{name}")
    assert first.status_code == 200 and first.data == (page.FOLDER / name).read_bytes()
    kinds = {"js": "javascript", "mjs": "javascript", "css": "css", "svg": "svg"}
    assert kinds[name.rpartition(".")[2]] in first.headers["Content-Type"]
    assert first.headers["Content-Security-Policy"] == page.POLICY
    etag = first.headers["ETag"]
    again = client.get(f"/agent/page/{name}", headers={"If-None-Match": etag})
    assert again.status_code == 304 and again.data == b""
    contract = client.get("/agent/openapi.json").get_json()["paths"]
    assert {"200", "304"} <= contract["/page/{file}"]["get"]["responses"].keys()


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "../views.py",
        "..%2fviews.py",
        "%2e%2e/views.py",
        "vendor/README.md",
        "no.js",
        "",
        "vendor",
    ],
)
def test_nothing_else_leaves_the_folder(web: Make, name: str) -> None:
    answer = web().get(f"/page/{name}")
    assert answer.status_code == 404
    if answer.is_json:
        assert answer.json["code"] == "not_found"


def test_the_prefix_without_its_slash_leads_to_the_page(web: Make) -> None:
    answer = web(prefix="/agent").get("/agent")
    assert answer.status_code == 308 and answer.headers["Location"].endswith("/agent/")


def test_the_page_is_told_who_signs_in_and_no_more(web: Make) -> None:
    answer = web().get("/page/config.json")
    assert answer.json == {"login": "token", "demo": False}
    assert web(demo=True).get("/page/config.json").json == {"login": "token", "demo": True}


def test_off_it_is_not_there_and_the_path_is_the_hosts(web: Make) -> None:
    client = web(page=False)
    for path in ("/", "/page/main.js", "/page/config.json"):
        assert client.get(path).status_code == 404
    assert not {"/", "/page/{file}"} & client.get("/openapi.json").json["paths"].keys()
    assert web(page=False, before=lambda: "the host's").get("/").text == "the host's"
    assert web(page=False, prefix="/agent").get("/agent/").status_code == 404
    assert {"/", "/page/{file}"} <= web().get("/openapi.json").json["paths"].keys()


def test_other_methods_are_refused_in_our_form(web: Make) -> None:
    for path in ("/", "/page/main.js"):
        answer = web().post(path)
        assert answer.status_code == 405 and answer.json["code"] == "method_not_allowed"


def test_the_libraries_are_what_their_list_says() -> None:
    vendor = page.FOLDER / "vendor"
    listed = re.findall(r"^\| `([\w.-]+)` .*`([\w.-]+\.LICENSE)` \| `(\w{64})` \|$",
                        (vendor / "README.md").read_text(), re.MULTILINE)  # fmt: skip
    assert len(listed) == 3
    for name, licence, checksum in listed:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == checksum, name
        assert (vendor / licence).stat().st_size > 500
    there = {path.name for path in vendor.iterdir()}
    assert there == {"README.md", *(n for n, _, _ in listed), *(n for _, n, _ in listed)}
