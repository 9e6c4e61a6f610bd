"""/readyz: why a new turn would not be taken, without a write, a wait or a guess."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import sqlite3
import threading
import typing as t
from pathlib import Path

import pytest
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.config import Settings
from agentao_web.core.errors import NoModel
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WrongSchema
from agentao_web.readiness import Pulse
from agentao_web.readiness import Readiness
from agentao_web.store.sql import SqlStore
from agentao_web.testing import Gate
from agentao_web.testing import pause
from agentao_web.testing import say
from agentao_web.testing import scripted

LEASE = 10.0
ASK = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}


class Worker:
    """A worker as it is made to be."""

    def __init__(self) -> None:
        self.draining = False
        self.ready = True
        self.pulse: Pulse | None = Pulse(0.0, False)
        self.woken = 0
        self.sleeps: cabc.Callable[[], None] = lambda: None

    def wake_up(self) -> None:
        self.woken += 1
        self.sleeps()
        self.pulse = Pulse(0.0, False)


def readiness(worker: Worker, check: cabc.Callable[[], None] = lambda: None) -> Readiness:
    return Readiness(worker, lease=LEASE, check=check)


def code(found: t.Any) -> str | None:
    return None if found is None else found.code


def test_a_heartbeat_is_good_for_half_a_lease() -> None:
    worker = Worker()
    ready = readiness(worker)
    for age, wanted in ((0.0, None), (4.9, None), (5.1, "store_unavailable"), (0.1, None)):
        worker.pulse = Pulse(age, False)
        assert code(ready.why_not()) == wanted
    assert worker.woken == 0


def test_a_heartbeat_that_was_refused_counts_at_once() -> None:
    worker = Worker()
    worker.pulse = Pulse(0.5, True)
    assert code(readiness(worker).why_not()) == "store_unavailable"


def test_a_worker_that_leaves_says_that_first() -> None:
    worker = Worker()
    worker.draining, worker.pulse = True, Pulse(100.0, True)
    assert code(readiness(worker).why_not()) == "draining"


def test_a_worker_that_lost_its_places_is_not_ready() -> None:
    worker = Worker()
    worker.ready = False
    assert code(readiness(worker).why_not()) == "draining"


def test_what_every_turn_is_refused_with_is_said() -> None:
    def check() -> None:
        raise NoModel

    assert code(readiness(Worker(), check).why_not()) == "no_model"


def test_the_first_question_wakes_the_worker_up() -> None:
    worker = Worker()
    worker.pulse = None
    ready = readiness(worker)
    assert ready.why_not() is None and ready.why_not() is None
    assert worker.woken == 1


@pytest.mark.parametrize("error", [StoreUnavailable(), WrongSchema("schema 99")])
def test_a_worker_that_cannot_wake_up_says_why(error: Exception) -> None:
    def fails() -> None:
        raise error

    worker = Worker()
    worker.pulse, worker.sleeps = None, fails
    ready = readiness(worker)
    for _ in range(20):
        assert ready.why_not() is error
    assert worker.woken < 20, "it does not try for each who asks"


def test_a_store_that_hangs_does_not_hang_the_answer() -> None:
    free = threading.Event()
    worker = Worker()
    worker.pulse, worker.sleeps = None, lambda: t.cast(None, free.wait(60))
    ready = readiness(worker)
    found: list[str | None] = []
    asking = [threading.Thread(target=lambda: found.append(code(ready.why_not()))) for _ in "abc"]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(50)
    try:
        assert found == ["store_unavailable"] * 3
        assert worker.woken == 1, "one thread waits for it, not one for each question"
    finally:
        free.set()
    until_awake(ready)


def until_awake(ready: Readiness) -> None:
    patience = threading.Event()
    for _ in range(500):
        if ready.why_not() is None:
            return
        patience.wait(0.1)  # Between two questions.
    pytest.fail("it never is ready again")


# -- with a store ------------------------------------------------------------------------------


class Counting(SqlStore):
    """Counts the signs of life."""

    beats = 0

    def beat(self, worker: str) -> None:
        type(self).beats += 1
        super().beat(worker)


@pytest.fixture
def make(tmp_path: Path) -> cabc.Iterator[cabc.Callable[..., Flask]]:
    made: list[Flask] = []

    def build(**options: t.Any) -> Flask:
        app = Flask("shop")
        app.config.update(AGENTAO_ROOT=tmp_path)
        web = AgentaoWeb(
            authenticate=lambda request: Principal("shop"),
            **{"agents": scripted(say("hello")), **options},
        )
        web.init_app(app)
        made.append(app)
        return app

    yield build
    for app in made:
        shutdown(app, grace=2)


def test_asking_costs_no_writes(make: cabc.Callable[..., Flask], tmp_path: Path) -> None:
    Counting.beats = 0

    def opened(settings: Settings) -> SqlStore:
        return Counting(settings.root / "agentao-web.db")

    client = make(store=opened).test_client()
    for _ in range(300):
        assert client.get("/readyz").json == {"ok": True}
    # The heartbeat's own, every three seconds, however long this took.
    assert Counting.beats < 100


def test_a_database_of_another_version_is_named(
    make: cabc.Callable[..., Flask], tmp_path: Path
) -> None:
    SqlStore(tmp_path / "agentao-web.db").check()
    with contextlib.closing(sqlite3.connect(tmp_path / "agentao-web.db")) as db, db:
        db.execute("UPDATE agentao_meta SET value = 9999 WHERE name = 'schema'")
    client = make().test_client()
    for answer in (
        client.get("/readyz"),
        client.post("/chat/s", json={"message": "hi"}, headers=ASK),
    ):
        assert (answer.status_code, answer.json["code"]) == (503, "wrong_schema")
        assert "9999" in answer.json["message"]
    assert client.get("/healthz").status_code == 200


def test_a_worker_that_drains_says_so_while_its_turns_end(make: cabc.Callable[..., Flask]) -> None:
    gate = Gate()
    app = make(agents=scripted(pause(gate), say("done")))
    client = app.test_client()
    client.post("/chat/s", json={"message": "hi"}, headers={**ASK, "Prefer": "wait=0"})
    gate.reached()
    leaving = threading.Thread(target=shutdown, args=(app, 60))
    leaving.start()
    patience = threading.Event()
    while (answer := client.get("/readyz")).status_code == 200:
        patience.wait(0.01)  # Until the other thread has begun.
    assert answer.json["code"] == "draining"
    gate.open()
    leaving.join(60)
    assert client.get("/readyz").json["code"] == "draining"


def test_a_worker_that_was_never_used_leaves_too(make: cabc.Callable[..., Flask]) -> None:
    app = make()
    shutdown(app, grace=1)
    shutdown(app, grace=1)
    client = app.test_client()
    assert client.get("/readyz").json["ok"] is False
    refused = client.post("/chat/s", json={"message": "hi"}, headers=ASK)
    assert (refused.status_code, refused.json["code"]) == (503, "draining")


def test_the_answer_is_as_the_contract_says(make: cabc.Callable[..., Flask]) -> None:
    app = make()
    client = app.test_client()
    document = client.get("/openapi.json").json
    assert client.get("/readyz").json == {"ok": True}
    shutdown(app, grace=1)
    answer = client.get("/readyz")
    told = document["paths"]["/readyz"]["get"]["responses"]["503"]["content"]["application/json"]
    named = told["schema"]["$ref"].rpartition("/")[2]
    assert set(answer.json) == set(document["components"]["schemas"][named]["required"])
    assert answer.json["ok"] is False and answer.json["code"] == "draining"
    assert int(answer.headers["Retry-After"]) > 0
