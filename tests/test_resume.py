"""A POST with Last-Event-ID goes on with a turn that there is, and never starts one."""

from __future__ import annotations

import collections.abc as cabc
import typing as t
from pathlib import Path

import pytest

from agentao_web import Principal
from agentao_web.core.log import MAX_SEQ
from agentao_web.testing import Gate
from agentao_web.testing import pause
from agentao_web.testing import say
from tests.test_views import Make
from tests.test_views import Web
from tests.test_views import assert_error
from tests.test_views import sse
from tests.test_views import text_of
from tests.test_views import web

__all__ = ["web"]

JSON = {"Accept": "application/json"}


def again(w: Web, last: t.Any, message: str = "hi", **headers: str) -> t.Any:
    """The POST of before once more, by a client that has seen *last*."""
    return w.post("/chat/s", {"message": message}, Last_Event_ID=str(last), **headers)


def plain(events: list[dict[str, t.Any]]) -> t.Any:
    """However their text was cut: the text, and all other events."""
    return text_of(events), [event for event in events if event["type"] != "llm_text"]


def turns(w: Web) -> int:
    return t.cast(int, w.get("/session/s").json["turns"])


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def two(web: Make, gate: Gate, tmp_path: Path) -> tuple[Web, Web]:
    """Two workers of one database."""
    url = f"sqlite:///{tmp_path}/both.db"
    wait = [say("a"), pause(gate), say("b")]
    one, other = (web(say("he", "llo"), by={"wait": wait}, database_url=url) for _ in range(2))
    return one, other


@pytest.fixture(params=["here", "elsewhere"])
def workers(request: pytest.FixtureRequest, two: tuple[Web, Web]) -> tuple[Web, Web]:
    """Who takes the first request, and who takes the second."""
    return two if request.param == "elsewhere" else (two[0], two[0])


@pytest.mark.parametrize("key", [{}, {"Idempotency_Key": "k-1"}], ids=["plain", "with a key"])
def test_an_ended_turn_is_read_on_from_there(workers: tuple[Web, Web], key: dict[str, str]) -> None:
    one, other = workers
    first = sse(one.post("/chat/s", {"message": "hi"}, **key))
    for n, event in enumerate(first):
        rest = again(other, event["seq"], **key)
        assert (rest.status_code, plain(sse(rest))) == (200, plain(first[n + 1 :]))
        assert rest.content_type.startswith("text/event-stream"), "also if it is empty"
    assert turns(other) == 1


def test_a_turn_that_runs_is_read_on_by_any_worker(two: tuple[Web, Web], gate: Gate) -> None:
    one, other = two
    first = one.post("/chat/s", {"message": "wait"}, **JSON).json
    gate.reached()
    begin, text = shown(one, first["cursor"], "llm_text")
    joined = again(other, begin["seq"], "wait", **JSON)
    assert (joined.status_code, joined.json["turn_id"]) == (202, first["turn_id"])
    assert joined.json["cursor"] == begin["seq"], "where its reader was"
    stream = again(other, text["seq"], "wait")
    gate.open()
    rest = sse(stream)
    assert {event["turn_id"] for event in rest} == {first["turn_id"]}
    assert (text_of(rest), rest[-1]["type"]) == ("b", "done")
    assert turns(one) == 1


def shown(w: Web, cursor: int, last: str) -> list[dict[str, t.Any]]:
    """What was said up to the first event of that type."""
    found: list[dict[str, t.Any]] = []
    while not any(event["type"] == last for event in found):
        page = w.get(f"/chat/s/events?after={cursor}&wait=30").json
        found, cursor = found + page["events"], page["cursor"]
    return found


def test_a_turn_that_waits_is_read_on_too(two: tuple[Web, Web], gate: Gate) -> None:
    one, other = two
    running = one.post("/chat/s", {"message": "wait"}, **JSON).json
    gate.reached()
    body = {"message": "hi", "on_busy": "queue"}
    queued = one.post("/chat/s", body, **JSON).json
    told = shown(one, running["cursor"], "turn_queued")[-1]
    assert told["turn_id"] == queued["turn_id"]
    joined = other.post("/chat/s", body, Last_Event_ID=str(told["seq"]), **JSON)
    assert (joined.json["turn_id"], joined.json["status"]) == (queued["turn_id"], "queued")
    gate.open()
    rest = sse(again(one, told["seq"]))
    assert {event["turn_id"] for event in rest} == {queued["turn_id"]}
    assert [rest[0]["type"], rest[-1]["type"]] == ["turn_begin", "done"]
    assert turns(one) == 2


def test_an_older_turn_ends_though_another_one_runs(two: tuple[Web, Web], gate: Gate) -> None:
    one, other = two
    first = sse(one.post("/chat/s", {"message": "hi"}))
    one.post("/chat/s", {"message": "wait"}, **JSON)
    gate.reached()
    try:
        for w in two:
            assert plain(sse(again(w, first[0]["seq"]))) == plain(first[1:])
            assert sse(again(w, first[-1]["seq"])) == []
            assert again(w, first[-1]["seq"], **JSON).json["reply"] == "hello"
    finally:
        gate.open()


def test_as_json_it_is_the_outcome(web: Make) -> None:
    w = web()
    first = sse(w.post("/chat/s", {"message": "hi"}))
    for event in first:
        answer = again(w, event["seq"], **JSON)
        assert (answer.status_code, answer.json["reply"]) == (200, "hello")
        assert answer.json["cursor"] == first[-1]["seq"]


def test_what_the_log_has_forgotten_is_a_gap(web: Make) -> None:
    w = web(say("x" * 3000), log_bytes=65536)
    first = sse(w.post("/chat/s", {"message": "hi"}))
    for _ in range(40):
        w.ask("more")
    assert w.get("/chat/s/events?wait=0").json["events"][0]["seq"] > first[-1]["seq"]
    (gap,) = sse(again(w, first[0]["seq"]))
    assert (gap["type"], gap["data"]["from"]) == ("gap", first[0]["seq"])
    assert again(w, first[0]["seq"], **JSON).json["reply"] == "x" * 3000


@pytest.mark.parametrize("key", [{}, {"Idempotency_Key": "k-2"}], ids=["plain", "with a key"])
def test_a_number_of_no_turn_of_this_session_is_404(web: Make, key: dict[str, str]) -> None:
    w = web()
    assert_error(again(w, 5, **key), 404, "not_found")
    assert w.get("/session/s").status_code == 404, "and nothing has started"
    other = sse(w.post("/chat/other", {"message": "hi"}))
    first = sse(w.post("/chat/s", {"message": "hi"}))
    last = first[-1]["seq"]
    for number in (1, other[0]["seq"], last + 1, last + 2**40, MAX_SEQ):
        assert_error(again(w, number, **key), 404, "not_found")
    w.delete("/session/s")
    assert_error(again(w, last, **key), 404, "not_found")
    assert w.get("/session/s").status_code == 404


def test_somebody_elses_number_is_404(web: Make) -> None:
    w = web()
    bob = Principal("acme", "bob")
    theirs = sse(w.post("/chat/s", {"message": "hi"}, bob))
    assert_error(again(w, theirs[0]["seq"]), 404, "not_found")


def test_another_message_is_not_taken_for_the_same_turn(web: Make) -> None:
    """Its answer would be the answer to something else, and the new message would be lost."""
    w = web()
    (first, *_) = sse(w.post("/chat/s", {"message": "hi"}))
    refused = assert_error(again(w, first["seq"], "something else"), 409, "idempotency_conflict")
    assert "Last-Event-ID" in refused["message"]
    unknown = again(w, first["seq"], Idempotency_Key="new")
    assert_error(unknown, 409, "idempotency_conflict")
    assert turns(w) == 1


def test_a_key_says_which_turn_and_the_number_says_where(web: Make) -> None:
    w = web()
    first, second = (
        sse(w.post("/chat/s", {"message": "hi"}, Idempotency_Key=key)) for key in ("k-1", "k-2")
    )
    assert plain(sse(again(w, first[0]["seq"], Idempotency_Key="k-2"))) == plain(second)
    assert sse(again(w, second[0]["seq"], Idempotency_Key="k-1")) == []
    assert_error(
        again(w, first[0]["seq"], "ho", Idempotency_Key="k-1"), 409, "idempotency_conflict"
    )
    assert turns(w) == 2


@pytest.mark.parametrize("last", ["", "abc", "-1", "1.5", "9" * 17])
def test_what_is_not_a_number_is_400(web: Make, last: str) -> None:
    w = web()
    error = assert_error(again(w, last), 400, "invalid_request")
    assert error["details"]["field"] == "Last-Event-ID"
    assert_error(w.get("/session/s"), 404, "not_found")


def test_zero_is_a_client_that_has_seen_nothing(web: Make) -> None:
    w = web()
    assert sse(again(w, 0))[-1]["reply"] == "hello"


# -- the answer's form -------------------------------------------------------------------------


def streams(response: t.Any) -> bool:
    kind = response.content_type.partition(";")[0]
    assert kind in ("text/event-stream", "application/json"), response.get_data(as_text=True)
    response.get_data()
    return bool(kind == "text/event-stream")


@pytest.mark.parametrize(
    "accept", ["*/*", "", "application/json", "text/event-stream", "text/html"]
)
def test_stream_in_the_query_decides_whatever_accept_says(web: Make, accept: str) -> None:
    w = web()
    asked = {"Accept": accept} if accept else {}
    for path, method in (("/chat/s", "POST"), ("/chat/s/events", "GET")):
        ask: cabc.Callable[..., t.Any] = (
            w.get
            if method == "GET"
            else lambda path, **more: w.post(path, {"message": "hi"}, **more)
        )
        assert streams(ask(f"{path}?stream=1", **asked)) is True
        assert streams(ask(f"{path}?stream=0", **asked)) is False
        assert_error(ask(f"{path}?stream=yes", **asked), 400, "invalid_request")


def test_without_it_accept_decides_as_ever(web: Make) -> None:
    w = web()
    for accept, wanted in (("*/*", True), ("text/event-stream", True), ("application/json", False)):
        response = w.post("/chat/s", {"message": "hi", "on_busy": "queue"}, Accept=accept)
        assert streams(response) is wanted
