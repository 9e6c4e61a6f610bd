"""The numbers of all workers: what is counted, and what becomes of those who are gone."""

from __future__ import annotations

import builtins
import collections.abc as cabc
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import metrics
from agentao_web import shutdown
from agentao_web.core.log import Draft
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.observer import Observers
from agentao_web.core.question import Question
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn
from agentao_web.core.turn import TurnRequest
from agentao_web.metrics import METRICS
from agentao_web.metrics import Metrics
from agentao_web.testing import ask
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests.patience import PATIENCE

TOKEN = "the-scrapers-own-token"
LOG = logging.getLogger("tests.metrics")
KEY = SessionKey("acme", "ann", "s")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def read(of: Metrics) -> Samples:
    return samples(of.answer("")[0].decode())


def a_turn(message: str = "hi", created: float = 100.0) -> Turn:
    turn = Turn("t1", TurnRequest(message), created, 600.0)
    turn.step("begin", created + 2)
    return turn


@pytest.fixture
def worker(tmp_path: Path) -> cabc.Iterator[cabc.Callable[..., Metrics]]:
    made: list[Metrics] = []

    def make(**options: t.Any) -> Metrics:
        made.append(Metrics(tmp_path, log=LOG, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_what_happens_is_counted(worker: cabc.Callable[..., Metrics]) -> None:
    one = worker()
    turn = a_turn()
    one.began(KEY, turn, 102.0)
    one.said(turn, Draft("llm_text", {"chunk": "hello"}), 102.3)
    one.called(KEY, turn, {"prompt_tokens": 7, "completion_tokens": None}, 103.0)
    one.ended(KEY, turn, Outcome(State.CANCELLED, "client_gone"), 110.0)
    one.reaped(KEY, "t2")
    one.given_up(KEY, turn)
    one.asked(KEY, Question("q", "t1", "tool_confirmation", {}, 0.0, "expired", "timeout"))
    one.evicted(3, "idle")
    one.refused("session_busy")
    one.store_failed()
    found = read(one)
    for name, labels, expected in [
        ("agentao_turns_total", {"status": "cancelled", "reason": "client_gone"}, 1),
        ("agentao_turns_total", {"status": "failed", "reason": "worker_lost"}, 1),
        ("agentao_turns_given_up_total", {}, 1),
        ("agentao_turn_queue_seconds_sum", {}, 2),
        ("agentao_turn_first_token_seconds_bucket", {"le": "0.25"}, 0),
        ("agentao_turn_first_token_seconds_bucket", {"le": "0.5"}, 1),
        ("agentao_turn_duration_seconds_sum", {"status": "cancelled"}, 8),
        ("agentao_turn_duration_seconds_bucket", {"status": "cancelled", "le": "+Inf"}, 1),
        ("agentao_tokens_total", {"kind": "prompt"}, 7),
        ("agentao_questions_total", {"kind": "tool_confirmation", "outcome": "expired"}, 1),
        ("agentao_sessions_evicted_total", {"reason": "idle"}, 3),
        ("agentao_refusals_total", {"code": "session_busy"}, 1),
        ("agentao_store_errors_total", {}, 1),
        ("agentao_workers", {}, 1),
    ]:
        assert value(found, name, **labels) == pytest.approx(expected), (name, labels)


def test_a_turn_that_was_lost_is_counted_by_who_closes_it(
    worker: cabc.Callable[..., Metrics],
) -> None:
    one = worker()
    one.ended(KEY, a_turn(), Outcome(State.FAILED, "worker_lost"), 110.0)
    assert value(read(one), "agentao_turns_total", status="failed", reason="worker_lost") is None


def test_every_metric_is_there_from_the_first_scrape(worker: cabc.Callable[..., Metrics]) -> None:
    families = {
        family.name for family in text_string_to_metric_families(worker().answer("")[0].decode())
    }
    assert families == {name.removesuffix("_total") for name in METRICS}


def test_numbers_are_sums_over_workers(worker: cabc.Callable[..., Metrics]) -> None:
    one = worker(gauges=lambda: {"agentao_streams_open": 2, "agentao_store_lag_seconds": 0.5})
    two = worker(gauges=lambda: {"agentao_streams_open": 3, "agentao_store_lag_seconds": 4.0})
    one.refused("draining")
    two.refused("draining")
    for each in (one, two):
        each.sample()
    for each in (one, two):
        found = read(each)
        assert value(found, "agentao_refusals_total", code="draining") == 2
        assert value(found, "agentao_streams_open") == 5
        assert value(found, "agentao_store_lag_seconds") == 4, "of the worst"
        assert value(found, "agentao_workers") == 2


def test_who_leaves_takes_the_gauges_and_leaves_the_counters(
    worker: cabc.Callable[..., Metrics], tmp_path: Path
) -> None:
    one, two = worker(), worker(gauges=lambda: {"agentao_sessions_in_memory": 9})
    two.sample()
    two.evicted(4, "idle")
    two.close()
    two.evicted(1, "idle")  # A thread that comes late.
    found = read(one)
    assert value(found, "agentao_sessions_in_memory") == 0
    assert value(found, "agentao_workers") == 1
    assert value(found, "agentao_sessions_evicted_total", reason="idle") == 4
    assert len(list(tmp_path.glob("metrics/*/*.book"))) == 1


def test_who_is_killed_leaves_the_counters(
    worker: cabc.Callable[..., Metrics], tmp_path: Path
) -> None:
    one = worker()
    one.refused("draining")
    for _ in range(3):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            mine = Metrics(tmp_path, gauges=lambda: {"agentao_streams_open": 7}, log=LOG)
            mine.sample()
            mine.refused("draining")
            os.write(write_end, b"x")
            signal.pause()
        os.close(write_end)
        assert os.read(read_end, 1) == b"x"
        os.close(read_end)
        before = read(one)
        assert value(before, "agentao_streams_open") == 7
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        after = read(one)
        assert value(after, "agentao_streams_open") == 0
        for found in (before, after):
            assert value(found, "agentao_workers") == (2 if found is before else 1)
        refusals = "agentao_refusals_total"
        assert value(after, refusals, code="draining") == value(before, refusals, code="draining")
    assert value(read(one), "agentao_refusals_total", code="draining") == 4
    (folder,) = (tmp_path / "metrics").iterdir()
    assert len(list(folder.iterdir())) == 3, "a book, the past, a lock: no file of the dead"


def test_what_was_counted_in_the_parent_stays_there(
    worker: cabc.Callable[..., Metrics], tmp_path: Path
) -> None:
    one = worker()
    one.refused("draining")
    pid = os.fork()
    if pid == 0:
        one.refused("draining")
        os._exit(0)
    os.waitpid(pid, 0)
    assert value(read(one), "agentao_refusals_total", code="draining") == 2
    assert value(read(one), "agentao_workers") == 1


def test_killed_while_folding_nothing_is_counted_twice(
    worker: cabc.Callable[..., Metrics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = worker(), worker()
    two.refused("draining")
    assert two._book is not None
    two._book.close()
    two._book = None
    two._closed = True
    with monkeypatch.context() as patch:
        # As if the process ended between the sum and the removal.
        patch.setattr(Path, "unlink", lambda self, **_: None)
        assert value(read(one), "agentao_refusals_total", code="draining") == 1
    for _ in range(2):
        assert value(read(one), "agentao_refusals_total", code="draining") == 1
    assert len(list(tmp_path.glob("metrics/*/*.book"))) == 1


def test_a_damaged_file_stops_no_scrape(
    worker: cabc.Callable[..., Metrics], tmp_path: Path
) -> None:
    one = worker()
    one.refused("draining")
    read(one)
    (folder,) = (tmp_path / "metrics").iterdir()
    (folder / "x.book").write_bytes(b"\xff" * 100)
    (folder / "y.book").write_bytes(b"")
    (folder / "past.json").write_text("{")
    assert value(read(one), "agentao_refusals_total", code="draining") == 1


def test_folders_of_machines_that_are_gone_are_removed(
    worker: cabc.Callable[..., Metrics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"name": "one"}
    monkeypatch.setattr(metrics.socket, "gethostname", lambda: there["name"])
    worker().sample()
    there["name"] = "two"
    gone = worker()
    gone.sample()
    gone.close()
    there["name"] = "three"
    worker().sample()
    folders = list((tmp_path / "metrics").iterdir())
    assert len(folders) == 2, "of the one that lives, and our own"
    assert all(list(folder.glob("*.book")) for folder in folders)


def test_an_age_grows_while_its_worker_stands_still(
    worker: cabc.Callable[..., Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    one = worker()
    two = worker(gauges=lambda: {"agentao_worker_heartbeat_age_seconds": 990.0})
    two.sample()
    assert value(read(one), "agentao_worker_heartbeat_age_seconds") == 10
    now = 1005.0
    assert value(read(one), "agentao_worker_heartbeat_age_seconds") == 15


def test_tenants_are_named_only_if_asked_for(worker: cabc.Callable[..., Metrics]) -> None:
    end = Outcome(State.COMPLETED)
    plain, told = worker(), worker(tenants=True)
    plain.ended(KEY, a_turn(), end, 110.0)
    told.ended(KEY, a_turn(), end, 110.0)
    assert "acme" not in plain.answer("")[0].decode()
    assert value(read(plain), "agentao_turns_total", status="completed", reason="") == 2
    found = read(told)
    labels = {"status": "completed", "reason": ""}
    assert value(found, "agentao_turns_total", **labels, tenant="acme") == 1
    assert value(found, "agentao_turns_total", **labels, tenant="") == 1


def test_too_many_tenants_are_counted_together(
    worker: cabc.Callable[..., Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BYTES_PER_TENANTS", 4096)
    one = worker(tenants=True)
    one.reaped(SessionKey("", "", "s"), "t")
    for n in range(200):
        one.reaped(SessionKey(f"tenant-{n}", "", "s"), "t")
    found = {k: v for k, v in read(one).items() if k[0] == "agentao_turns_total"}
    assert sum(found.values()) == 201
    assert 2 < len(found) < 100


def test_a_full_disk_costs_metrics_only(
    worker: cabc.Callable[..., Metrics],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "posix_fallocate", full)
    one = worker()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one.refused("draining")
    assert len(os.listdir("/proc/self/fd")) == before, "no descriptor is left at each attempt"
    assert value(read(one), "agentao_refusals_total", code="draining") is None
    assert caplog.text.count("no metrics of this worker") == 1


def test_a_folder_that_stays_locked_is_no_hang(
    worker: cabc.Callable[..., Metrics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    one = worker()
    read(one)
    (lock,) = tmp_path.glob("metrics/*/lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(metrics.StoreUnavailable):
            read(one)
        one.refused("draining")  # Counted all the same.
    assert value(read(one), "agentao_refusals_total", code="draining") == 1


def test_many_threads_lose_nothing(worker: cabc.Callable[..., Metrics]) -> None:
    one = worker()
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(PATIENCE)
        for _ in range(500):
            one.refused("draining")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert value(read(one), "agentao_refusals_total", code="draining") == 4000


# -- observers ---------------------------------------------------------------------------------


def test_an_observer_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def refused(self, code: str) -> None:
            raise RuntimeError("no")

    class Ear(Observer):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def refused(self, code: str) -> None:
            self.heard.append(code)

    ear = Ear()
    both = Observers([Broken(), ear], LOG)
    both.refused("x")
    both.store_failed()
    assert ear.heard == ["x"]
    assert caplog.text.count("an observer failed") == 1


# -- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> cabc.Iterator[Flask]:
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_METRICS_TOKEN=TOKEN)
    agents = scripted(say("hi"), by={"ask": [ask("write_file")]})
    AgentaoWeb(authenticate=lambda request: Principal("acme"), agents=agents).init_app(
        app, url_prefix="/agent"
    )
    yield app
    shutdown(app, grace=2)


def scrape(app: Flask, token: str = TOKEN) -> Samples:
    headers = {"Authorization": f"Bearer {token}"}
    response = app.test_client().get("/agent/metrics", headers=headers)
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/plain"
    return samples(response.text)


def test_a_scrape_tells_of_turns(app: Flask) -> None:
    headers = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
    client = app.test_client()
    for _ in range(2):
        body = client.post("/agent/chat/s", json={"message": "hello"}, headers=headers).json
        assert body is not None and body["status"] == "completed", body
    client.post("/agent/chat/s", json={}, headers=headers)
    found = scrape(app)
    assert value(found, "agentao_turns_total", status="completed", reason="") == 2
    assert value(found, "agentao_turn_duration_seconds_count", status="completed") == 2
    assert value(found, "agentao_turn_first_token_seconds_count") == 2
    assert value(found, "agentao_turn_queue_seconds_count") == 2
    assert value(found, "agentao_turns_running") == 0
    assert value(found, "agentao_sessions_in_memory") == 1
    assert value(found, "agentao_refusals_total", code="invalid_request") == 1
    events = value(found, "agentao_store_events_total")
    assert events is not None and events >= 4
    assert (value(found, "agentao_store_bytes_total") or 0) > events
    assert (value(found, "agentao_worker_heartbeat_age_seconds") or 0) < PATIENCE


def test_a_scrape_sees_open_questions(app: Flask) -> None:
    headers = {"Accept": "application/json", "Sec-Fetch-Site": "same-origin"}
    client = app.test_client()
    client.post("/agent/chat/s", json={"message": "ask"}, headers=headers)
    events: list[dict[str, t.Any]] = []
    after = 0
    while not any(event["type"] == "tool_confirmation" for event in events):
        page = client.get(f"/agent/chat/s/events?after={after}&wait=20", headers=headers).json
        assert page is not None and page["events"], events
        events, after = page["events"], page["cursor"]
    found = scrape(app)
    assert value(found, "agentao_questions_open") == 1
    assert value(found, "agentao_turns_running") == 1
    assert client.post("/agent/chat/s/cancel", headers=headers).status_code == 200
    while not any(event["type"] == "done" for event in events):
        page = client.get(f"/agent/chat/s/events?after={after}&wait=20", headers=headers).json
        assert page is not None and page["events"], events
        events, after = page["events"], page["cursor"]
    found = scrape(app)
    assert value(found, "agentao_questions_open") == 0
    labels = {"kind": "tool_confirmation", "outcome": "cancelled"}
    assert value(found, "agentao_questions_total", **labels) == 1


def test_a_store_that_is_away_is_counted(app: Flask, tmp_path: Path) -> None:
    headers = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
    client = app.test_client()
    client.post("/agent/chat/s", json={"message": "hello"}, headers=headers)
    file = tmp_path / "agentao-web.db"
    file.rename(tmp_path / "away")
    assert client.get("/agent/sessions", headers=headers).status_code == 503
    found = scrape(app)
    (tmp_path / "away").rename(file)
    assert (value(found, "agentao_store_errors_total") or 0) >= 1
    assert (value(found, "agentao_refusals_total", code="store_unavailable") or 0) >= 1


def test_open_metrics_if_asked_for(app: Flask) -> None:
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/openmetrics-text; version=1.0.0",
    }
    response = app.test_client().get("/agent/metrics", headers=headers)
    assert response.mimetype == "application/openmetrics-text"
    assert response.text.endswith("# EOF\n")


def test_without_a_token_nothing_is_written(tmp_path: Path) -> None:
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path)
    AgentaoWeb(authenticate=lambda r: Principal("acme"), agents=scripted(say("hi"))).init_app(app)
    assert app.test_client().get("/metrics").status_code == 404
    shutdown(app)
    assert not (tmp_path / "metrics").exists()


def test_a_missing_library_is_said_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: t.Any) -> t.Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path, AGENTAO_METRICS_TOKEN=TOKEN)
    with pytest.raises(RuntimeError, match=r"pip install 'agentao-web\[metrics\]'"):
        AgentaoWeb(authenticate=lambda r: None, agents=scripted(say("hi"))).init_app(app)


def test_a_short_token_is_refused() -> None:
    app = Flask("shop")
    app.config.update(AGENTAO_METRICS_TOKEN="short")
    with pytest.raises(RuntimeError, match="16 characters"):
        AgentaoWeb(authenticate=lambda r: None, agents=scripted(say("hi"))).init_app(app)


def test_the_ready_application_imports_neither_library(tmp_path: Path) -> None:
    """They cost memory and time where nobody asked for them."""
    code = "import sys, agentao_web; print([m for m in sys.modules if 'prometheus' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.replace("'", '"')) == []
