"""Log lines: who they name, in which form; and the id of a request, from its header to its turn."""

from __future__ import annotations

import collections.abc as cabc
import io
import json
import logging
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import create_app
from agentao_web import logs
from agentao_web import shutdown
from agentao_web.core import trail
from agentao_web.core.names import SessionKey
from agentao_web.testing import ask
from agentao_web.testing import crash
from agentao_web.testing import say
from agentao_web.testing import scripted

HEADERS = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
SECRET = "the plans for the island"

Make = cabc.Callable[..., FlaskClient]


@pytest.fixture
def client(tmp_path: Path) -> cabc.Iterator[Make]:
    apps: list[Flask] = []

    def make(**config: t.Any) -> FlaskClient:
        app = Flask("shop")
        app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_QUESTION_TIMEOUT=0.1, **config)
        agents = scripted(
            say(f"re: {SECRET}"),
            by={"crash": [crash(ValueError("broken"))], "ask": [ask("write_file")]},
        )
        who = Principal("acme", "ann")
        AgentaoWeb(authenticate=lambda request: who, agents=agents).init_app(app)
        apps.append(app)
        return app.test_client()

    yield make
    for app in apps:
        shutdown(app, grace=2)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> cabc.Callable[..., list[logging.LogRecord]]:
    """The records of a logger of ours, as a host's own handler gets them."""
    caplog.set_level(logging.INFO, "agentao_web")

    def of(name: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == name]

    return of


def post(client: FlaskClient, message: str, **headers: str) -> t.Any:
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    return client.post("/chat/s", json={"message": message}, headers={**HEADERS, **named})


def until_done(client: FlaskClient) -> None:
    after = 0
    while True:
        page = client.get(f"/chat/s/events?after={after}&wait=20", headers=HEADERS).json
        assert page is not None and page["events"], "the turn does not end"
        if any(event["type"] == "done" for event in page["events"]):
            return
        after = page["cursor"]


# -- X-Request-Id ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["r-1", "x" * 128, "a b", "{uuid}:7/8"])
def test_a_request_keeps_its_id(client: Make, given: str) -> None:
    response = client().get("/healthz", headers={"X-Request-Id": given})
    assert response.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "é", "a\tb", "\x7f"])
def test_a_bad_id_is_replaced(client: Make, given: str) -> None:
    response = client().get("/healthz", headers={"X-Request-Id": given})
    assert len(response.headers["X-Request-Id"]) == 32


def test_every_answer_has_one(client: Make) -> None:
    web = client()
    stream = {"Accept": "text/event-stream", "Sec-Fetch-Site": "same-origin"}
    answers = [
        web.get("/sessions"),
        web.get("/session/none"),
        web.post("/healthz"),
        web.options("/sessions"),
        web.post("/chat/s", data="{", headers=HEADERS),
        web.post("/chat/s", json={"message": "hi"}, headers=stream),
    ]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert [answer.status_code for answer in answers] == [200, 404, 405, 200, 415, 200]
    assert len(set(ids)) == len(ids)
    answers[-1].get_data()


def test_so_has_what_is_no_route_of_the_ready_application(tmp_path: Path) -> None:
    app = create_app({"AGENTAO_ROOT": str(tmp_path), "AGENTAO_DEMO": "1", "AGENTAO_LOG": "off"})
    response = app.test_client().get("/nowhere", headers={"X-Request-Id": "r-9"})
    assert response.status_code == 404
    assert response.headers["X-Request-Id"] == "r-9"
    shutdown(app)


def test_the_host_s_own_routes_are_left_alone(tmp_path: Path) -> None:
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path)
    AgentaoWeb(authenticate=lambda r: None, agents=scripted(say("hi"))).init_app(
        app, url_prefix="/agent"
    )
    app.add_url_rule("/", "home", lambda: "home")
    assert "X-Request-Id" not in app.test_client().get("/").headers
    assert "X-Request-Id" in app.test_client().get("/agent/nowhere").headers
    shutdown(app)


# -- who a line names ---------------------------------------------------------------------------


def test_a_turn_s_lines_name_the_request_that_started_it(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    body = post(client(), "crash", X_Request_Id="r-7").json
    assert body["error"]["code"] == "internal_error"
    (line,) = lines("agentao_web")
    assert body["error"]["details"]["error_id"] in line.getMessage()
    told = {name: getattr(line, name, None) for name in trail.FIELDS}
    assert told == {
        "request_id": "r-7",
        "session_id": "s",
        "turn_id": body["turn_id"],
        "tenant": "acme",
        "user": "ann",
    }


def test_a_request_s_own_lines_name_it(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    web = client()

    def broken(*_: t.Any, **__: t.Any) -> t.Any:
        raise ValueError("broken")

    pool = web.application.extensions["agentao_web"].pool
    pool.cancel = broken
    headers = {**HEADERS, "X-Request-Id": "r-8"}
    response = web.post("/chat/s/cancel", headers=headers)
    assert response.status_code == 500
    (line,) = lines("agentao_web")
    assert (getattr(line, "request_id", ""), getattr(line, "session_id", "")) == ("r-8", "s")
    assert trail.here() == {}, "what follows on this thread is somebody else's"


def test_an_audit_line_has_fields(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    web = client()
    body = post(web, "ask", X_Request_Id="r-6").json
    until_done(web)
    (line,) = lines("agentao_web.audit")
    told = vars(line)
    expected = {
        "outcome": "expired",
        "tool": "write_file",
        "by": "timeout",
        "turn_id": body["turn_id"],
        "request_id": "r-6",
        "tenant": "acme",
    }
    assert {name: told[name] for name in expected} == expected
    assert line.getMessage().startswith("expired: 'write_file' by 'timeout'; tenant 'acme'")


def test_a_turn_s_end_is_a_line_without_its_words(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    body = post(client(), SECRET).json
    (line,) = lines("agentao_web.turns")
    assert line.getMessage() == f"turn {body['turn_id']}: completed"
    assert SECRET not in str(vars(line))


def test_words_are_told_if_asked_for(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    post(client(AGENTAO_LOG_TEXT=True), SECRET)
    (line,) = lines("agentao_web.turns")
    assert vars(line)["asked"] == SECRET
    assert vars(line)["replied"] == f"re: {SECRET}"


def test_a_line_per_request_if_asked_for(
    client: Make, lines: cabc.Callable[..., list[logging.LogRecord]]
) -> None:
    client().get("/session/s?secret=1")
    assert not lines("agentao_web.access")
    client(AGENTAO_LOG_REQUESTS=True).get("/session/s?secret=1", headers={"X-Request-Id": "r-5"})
    (line,) = lines("agentao_web.access")
    assert line.getMessage() == "GET /session/<sid> 404"
    told = vars(line)
    assert (told["request_id"], told["session_id"], told["tenant"]) == ("r-5", "s", "acme")
    assert told["duration_ms"] >= 0
    assert "secret" not in str(told)


# -- how they look ------------------------------------------------------------------------------


@pytest.fixture
def record() -> logging.LogRecord:
    key = SessionKey("acme", "ann", "s")
    extra = {**trail.of(key, "t1", "r1"), "outcome": "approved"}
    made = logging.getLogger("x").makeRecord(
        "agentao_web.audit", logging.INFO, "f", 1, "said %s\n", ("é",), None, extra=extra
    )
    made.created = 0.0
    return made


def test_a_json_line_is_one_line(record: logging.LogRecord) -> None:
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "ts": "1970-01-01T00:00:00.000Z",
        "level": "INFO",
        "logger": "agentao_web.audit",
        "message": "said é\n",
        "request_id": "r1",
        "session_id": "s",
        "turn_id": "t1",
        "tenant": "acme",
        "user": "ann",
        "outcome": "approved",
    }


def test_a_json_line_has_the_traceback(record: logging.LogRecord) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record.exc_info = sys.exc_info()
    line = json.loads(logs.JsonLines().format(record))
    assert line["exception"].endswith("ValueError: broken")


def test_a_text_line_ends_with_the_ids_it_does_not_name(record: logging.LogRecord) -> None:
    record.msg, record.args = "turn t1: completed", ()
    assert (
        logs.TextLines()
        .format(record)
        .endswith("INFO agentao_web.audit: turn t1: completed (request_id=r1)")
    )


@pytest.mark.parametrize("form", ["text", "json", "off"])
def test_the_ready_application_shows_them(tmp_path: Path, form: str) -> None:
    code = (
        "import agentao_web, logging; app = agentao_web.create_app()\n"
        "logging.getLogger('agentao_web').warning('hello')"
    )
    env = {
        "AGENTAO_ROOT": str(tmp_path),
        "AGENTAO_DEMO": "1",
        "AGENTAO_LOG": form,
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    if form == "off":
        assert told == ""
    elif form == "text":
        assert told.endswith("WARNING agentao_web: hello\n")
    else:
        assert json.loads(told)["message"] == "hello"


def test_a_host_s_own_logging_is_left_alone(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("agentao_web")
    log.addHandler(handler)
    before = (list(log.handlers), log.level)
    try:
        app = create_app(
            {"AGENTAO_ROOT": str(tmp_path), "AGENTAO_DEMO": "1", "AGENTAO_LOG": "json"}
        )
        shutdown(app)
        assert (log.handlers, log.level) == before
    finally:
        log.removeHandler(handler)


# -- the audit of a host that has not set up logging -------------------------------------------

SHOP = """
import logging, logging.config, sys
from flask import Flask
from agentao_web import AgentaoWeb, Principal, shutdown
from agentao_web.testing import ask, say, scripted

app = Flask("shop")
app.config.update(AGENTAO_ROOT="root", AGENTAO_QUESTION_TIMEOUT=0.1)
agents = scripted(ask("write_file"), say("done"))
{before}
AgentaoWeb(authenticate=lambda request: Principal("acme", "ann"), agents=agents).init_app(app)
{after}
HEADERS = {headers!r}
for _ in range(2):
    answer = app.test_client().post("/chat/s", json={{"message": "hi"}}, headers=HEADERS)
    url = "/chat/s/events?wait=20"
    cursor = answer.json["cursor"]
    while True:
        page = app.test_client().get(f"/chat/s/events?wait=20&after={{cursor}}").json
        cursor = page["cursor"]
        if any(event["type"] == "done" for event in page["events"]):
            break
shutdown(app)
"""
SHOWN = "'write_file' by"


def audited(folder: Path, before: str = "", after: str = "") -> list[str]:
    """What standard error has of two decisions."""
    code = SHOP.format(before=before, after=after, headers={**HEADERS, "Prefer": "wait=0"})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if SHOWN in line]


def test_decisions_are_seen_although_nobody_has_set_up_logging(tmp_path: Path) -> None:
    lines = audited(tmp_path)
    assert len(lines) == 2
    assert all("agentao_web.audit" in line and "'acme'" in line for line in lines)


def test_the_logging_of_the_docs_shows_them(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "embed.md").read_text()
    (block,) = re.findall(r"<!-- run: logging -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(audited(tmp_path, before=block)) == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("setup", "count"),
    [
        ('logging.basicConfig(level="INFO")', 2),
        ('logging.basicConfig(level="WARNING")', 0),
        ("logging.getLogger().addHandler(logging.NullHandler())", 0),
        ('logging.getLogger("agentao_web").addHandler(logging.NullHandler())', 0),
        (
            'logging.basicConfig(level="WARNING", format="%(name)s %(message)s")\n'
            'logging.getLogger("agentao_web.audit").setLevel("INFO")',
            2,
        ),
        (
            'logging.getLogger("agentao_web.audit").addHandler(logging.StreamHandler())\n'
            'logging.getLogger("agentao_web.audit").setLevel("INFO")',
            2,
        ),
        (
            'logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, '
            '"handlers": {"h": {"class": "logging.StreamHandler"}}, '
            '"root": {"level": "INFO", "handlers": ["h"]}})',
            2,
        ),
    ],
)
def test_a_host_that_sets_up_logging_decides_itself(
    tmp_path: Path, when: str, setup: str, count: int
) -> None:
    """Before us or after us: each decision is as many lines as the host asked for."""
    assert len(audited(tmp_path, **{when: setup})) == count
