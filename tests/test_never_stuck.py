"""No session is ever busy for good, whatever a store, a tool, a provider or a host's agent does.

Each turn ends exactly once, and its session takes the next message. Written against the pool and
HTTP, not against what is inside: these are the acceptance tests of whatever runs turns.
"""

from __future__ import annotations

import collections
import collections.abc as cabc
import datetime
import logging
import os
import threading
import time
import typing as t
from pathlib import Path

import pytest
import sqlalchemy.exc
from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import shutdown
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.turn import ENDS
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.runner import Stage
from agentao_web.sessions import SessionPool
from agentao_web.sessions import Started
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import Store
from agentao_web.testing import ScriptedAgent
from agentao_web.testing import say
from agentao_web.testing import scripted
from tests import test_together as together
from tests.live.harness import eventually
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import Clock
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import FakeAgents
from tests.pool_fakes import Gate
from tests.pool_fakes import Probe
from tests.pool_fakes import TestCaps
from tests.pool_fakes import read_until
from tests.pool_fakes import say_ok
from tests.pool_fakes import until_stopped
from tests.test_views import KEY as SECRET
from tests.test_views import Web

stores = together.stores
#: Seconds an end is tried to be stored, in tests that wait for the end of that.
LEASE = 4.0

Make = cabc.Callable[..., Probe]


class Faulty:
    """A store that can be told to fail, or to hang, at one of its methods."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.faults: dict[str, cabc.Callable[..., t.Any]] = {}

    def __getattr__(self, name: str) -> t.Any:
        good, fault = getattr(self._store, name), self.faults.get(name)
        if fault is None:
            return good
        return lambda *args, **options: fault(good, *args, **options)

    def fails(self, name: str, error: Exception, *, times: float = float("inf")) -> None:
        """That method raises, so many times."""
        left = [times]

        def fault(good: t.Any, *args: t.Any, **options: t.Any) -> t.Any:
            left[0] -= 1
            if left[0] >= 0:
                raise error
            return good(*args, **options)

        self.faults[name] = fault


@pytest.fixture
def probe(stores: cabc.Callable[[], Store]) -> cabc.Iterator[Make]:
    made: list[Probe] = []

    def make(script: t.Any = say_ok, **caps: t.Any) -> Probe:
        made.append(Probe(script, store=Faulty(stores()), **caps))
        return made[-1]

    yield make
    for one in made:
        one.store.faults.clear()
        one.pool.drain(grace=2)


def until(condition: cabc.Callable[[], t.Any], what: str) -> None:
    end = time.monotonic() + 3 * PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.01)


def welcome(p: Probe, message: str = "next", sid: str = "s") -> Started:
    """The session takes a message, as soon as what was before is cleaned up."""
    end = time.monotonic() + 3 * PATIENCE
    while True:
        try:
            return p.start(message, sid)
        except SessionBusy:
            assert time.monotonic() < end, "busy for good"
            threading.Event().wait(0.01)


def assert_well(p: Probe, sid: str = "s") -> None:
    """It takes a message and answers, and every turn of the log has ended once."""
    last = p.finish(welcome(p, sid=sid))
    while last.data["status"] != "completed":
        # On a busy machine a commit may take longer than a short lease.
        assert p.caps.worker_lease == LEASE and last.seq is None, last
        last = p.finish(welcome(p, sid=sid))
    log = p.log(sid)
    begun = [event.turn_id for event in log if event.type == "turn_begin"]
    ends = collections.Counter(event.turn_id for event in log if event.type in ENDS)
    assert {ends[turn] for turn in begun} == {1} and set(ends) == set(begun)
    numbers = [event.seq for event in log]
    assert numbers == sorted(set(numbers))


# -- claims that are lost ----------------------------------------------------------------------


def test_a_late_answer_of_the_store_about_one_turn_harms_no_later_one(probe: Make) -> None:
    """Its append hangs until the next turn of the session runs, and then its claim is lost."""
    hung, second = Gate(), Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": request.message}))
        if request.message == "two":
            second.stand()
            stage.publish(Draft("llm_text", {"chunk": "!"}))

    def hang(good: t.Any, batches: t.Any) -> t.Any:
        if not hung.opened.is_set():
            hung.stand()
        return good(batches)

    p = probe(script, worker_lease=LEASE)
    p.store.faults["append"] = hang
    first = p.start("one")
    hung.meet()
    following = p.start("two", on_busy="queue")
    assert p.finish(first).extra["error"]["code"] == "store_unavailable"
    second.meet()
    hung.opened.set()
    # The writer is back once it has written what came later.
    p.store.faults.clear()
    until(lambda: p.pool.gauges()["agentao_store_lag_seconds"] == 0.0, "the writer hangs")
    second.opened.set()
    last = p.finish(following)
    assert (last.data["status"], last.seq is not None) == ("completed", True)
    assert [m["content"] for m in p.store.history(p.key()).messages][-2:] == ["two", "ok"]
    assert_well(p)


def test_a_late_end_of_one_turn_is_not_the_end_of_the_next(probe: Make) -> None:
    hung = Gate()

    def hang(good: t.Any, claim: Claim, finish: Finish) -> t.Any:
        if not hung.opened.is_set():
            hung.stand()
        return good(claim, finish)

    p = probe(
        lambda a, r, s: until_stopped(a, r, s) if r.message == "two" else say_ok(a, r, s),
        worker_lease=LEASE,
    )
    p.store.faults["finish"] = hang
    first = p.start("one")
    hung.meet()
    following = p.start("two", on_busy="queue")
    assert p.finish(first).extra["error"]["code"] == "store_unavailable"
    hung.opened.set()
    read_until(p.pool, following, "llm_text")
    assert p.pool.cancel(p.key()) == 1
    assert p.finish(following).data["status"] == "cancelled"
    assert_well(p)


@pytest.mark.parametrize("way", ["cancel", "delete", "nothing"])
def test_a_turn_whose_claim_is_lost_ends_and_can_be_ended(probe: Make, way: str) -> None:
    p = probe(lambda a, r, s: until_stopped(a, r, s) if r.message == "one" else say_ok(a, r, s))
    p.store.faults["append"] = lambda good, batches: [claim for claim, _ in batches]
    started = p.start("one")
    if way == "cancel":
        p.pool.cancel(p.key())
    elif way == "delete":
        deleted: list[bool] = []
        until(lambda: deleted.append(p.pool.delete(p.key(), timeout=1)) or deleted[-1], "there")
    p.finish(started)
    p.store.faults.clear()
    assert_well(p)


def test_a_turn_that_only_the_store_knows_is_ended(probe: Make) -> None:
    """Whatever went wrong with it: its worker lives, and would hold the session for ever."""
    p = probe(
        lambda a, r, s: until_stopped(a, r, s) if r.message == "long" else say_ok(a, r, s),
        worker_lease=LEASE,
    )
    p.run("before")
    p.start("long", "other")
    (mine,) = p.store.active(p.key("other"))
    worker = mine.worker
    row = together.TurnRow("t-forgotten", "lost", 0, 1.0, worker)
    opening = Draft("turn_begin", {"message": "lost", "images": 0})
    p.store.claim(p.key(), row, opening, 1.0)
    assert_well(p)
    assert "lost" in [m["content"] for m in p.store.history(p.key()).messages]
    assert p.pool.cancel(p.key("other")) == 1


# -- what cannot be stored ---------------------------------------------------------------------


def nested(depth: int) -> list[t.Any]:
    value: list[t.Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circle() -> list[t.Any]:
    value: list[t.Any] = []
    value.append(value)
    return value


UNSTORABLE: dict[str, cabc.Callable[[], t.Any]] = {
    "a moment": lambda: datetime.datetime(2026, 1, 1),
    "a set": lambda: {1, 2},
    "bytes": lambda: b"x",
    "a number of 5,000 digits": lambda: 10**5000,
    "1,500 lists": lambda: nested(1500),
    "a list that holds itself": circle,
    "an object": object,
    "a key that is no text": lambda: {(1, 2): 3},
}


class Odd(FakeAgent):
    """An agent whose answers for the store are what a test wants."""

    odd: t.ClassVar[dict[str, t.Any]] = {}

    def _answer(self, name: str, otherwise: cabc.Callable[[], t.Any]) -> t.Any:
        # After its first turn only.
        if name not in self.odd or len(self.messages) > 2:
            return otherwise()
        found = self.odd[name]()
        if isinstance(found, BaseException):
            raise found
        return found

    def unsaved(self) -> tuple[list[dict[str, t.Any]], bool]:
        return t.cast(t.Any, self._answer("unsaved", super().unsaved))

    def state(self) -> dict[str, t.Any] | None:
        return t.cast(t.Any, self._answer("state", super().state))

    def saved(self) -> None:
        self._answer("saved", super().saved)

    def close(self) -> None:
        super().close()
        self._answer("close", lambda: None)


def odd_probe(probe: Make, **odd: t.Any) -> Probe:
    class ThisOdd(Odd):
        pass

    ThisOdd.odd = odd
    p = probe()
    p.agents.build = lambda key, history: ThisOdd(say_ok, history.messages)  # type: ignore[method-assign,assignment,return-value]
    return p


@pytest.mark.parametrize("what", UNSTORABLE)
@pytest.mark.parametrize("where", ["unsaved", "state"])
def test_what_cannot_be_stored_is_replaced_by_what_can(probe: Make, what: str, where: str) -> None:
    message = {"role": "assistant", "content": UNSTORABLE[what]()}
    odd = (
        {"unsaved": lambda: ([message], False)}
        if where == "unsaved"
        else {"state": lambda: message}
    )
    p = odd_probe(probe, **odd)
    last = p.run("one")
    if isinstance(p.store._store, together.Handle) and last.data["status"] == "completed":
        return  # A dictionary takes what a database does not.
    assert (last.extra["error"]["code"], last.seq is not None) == ("internal_error", True)
    assert last.extra["error"]["details"]["error_id"]
    history = p.store.history(p.key()).messages
    assert history[0]["content"] == "one" and "cut off" in history[1]["content"]
    transcript = p.store.transcript(p.key(), before=None, after=None, limit=9).messages
    assert [entry["role"] for entry in transcript] == ["user", "assistant"]
    assert_well(p)


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("where", ["unsaved", "state", "saved", "close"])
def test_an_agent_that_fails_when_it_is_asked_what_to_store_stops_nobody(
    probe: Make, where: str, error: BaseException
) -> None:
    p = odd_probe(probe, **{where: lambda: error})
    last = p.run("one")
    assert last.seq is not None
    expected = "completed" if where in ("saved", "close") else "failed"
    assert last.data["status"] == expected
    assert_well(p)
    assert p.store.history(p.key()).messages[0]["content"] == "one"


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(State.RUNNING),
        Outcome(State.CANCELLED),
        Outcome(State.TIMED_OUT, "turn_timeout"),
        Outcome(State.FAILED, "a code of its own"),
        Outcome(State.FAILED, None),
        Outcome(State.COMPLETED, usage={"prompt_tokens": t.cast(int, "many")}),
        Outcome(State.COMPLETED, usage={"prompt_tokens": 10**4299}),
        Outcome(State.COMPLETED, tool_count=t.cast(int, datetime.datetime(2026, 1, 1))),
        Outcome(State.INCOMPLETE, t.cast(str, {1})),
        t.cast(Outcome, "done"),
        t.cast(Outcome, 7),
    ],
    ids=repr,
)
def test_whatever_an_agent_says_of_its_turn_it_ends(probe: Make, outcome: Outcome) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> Outcome | None:
        say_ok(agent, request, stage)
        return outcome if request.message == "one" else None

    p = probe(script)
    assert p.run("one").data["status"] in ("completed", "incomplete", "failed")
    assert_well(p)


def test_a_turn_ends_whose_agent_left_a_question_open(probe: Make) -> None:
    asked = threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message != "one":
            return
        data = {"question": "Well?", "options": [], "multiple": False, "allow_custom": True}
        thread = threading.Thread(target=stage.ask, args=("ask_user_requested", data))
        thread.start()
        until(lambda: p.store.questions(p.key()), "it was not asked")
        until(lambda: p.pool.find(p.key()).state() == "waiting", "it was not shown")
        asked.set()

    p = probe(script)
    assert p.run("one").data["status"] == "completed"
    assert asked.is_set() and p.store.questions(p.key()) == []
    assert_well(p)


PROGRAMMING = sqlalchemy.exc.ProgrammingError("SELECT 1", {}, Exception("no such statement"))


@pytest.mark.parametrize("error", [PROGRAMMING, StoreUnavailable(), OverflowError()], ids=repr)
def test_an_error_of_the_store_that_passes_costs_the_turn_nothing(
    probe: Make, error: Exception
) -> None:
    p = probe()
    p.store.fails("finish", error, times=1)
    last = p.run("one")
    assert (last.data["status"], last.extra["reply"]) == ("completed", "ok")
    assert_well(p)


@pytest.mark.parametrize("error", [PROGRAMMING, StoreUnavailable(), TypeError("no JSON")], ids=repr)
def test_an_end_that_cannot_be_stored_for_a_whole_lease_is_made_up_for(
    probe: Make, error: Exception
) -> None:
    p = probe(worker_lease=LEASE)
    p.store.fails("finish", error)
    last = p.run("one")
    assert last.seq is None, "it is in no log yet"
    known = ("store_unavailable", "internal_error")
    assert last.extra["error"]["code"] in known
    p.store.faults.clear()
    assert_well(p)
    assert p.store.history(p.key()).messages[0]["content"] == "one"


def test_a_commit_whose_answer_was_lost_keeps_its_outcome(probe: Make) -> None:
    def commit(good: t.Any, claim: Claim, finish: Finish) -> t.NoReturn:
        good(claim, finish)
        del p.store.faults["finish"]
        raise StoreUnavailable

    p = probe()
    p.store.faults["finish"] = commit
    last = p.run("one")
    assert (last.data["status"], last.seq) == ("completed", p.log()[-1].seq)
    assert_well(p)
    assert len(p.agents.built) == 1, "the agent is as good as before"


def test_a_turn_that_cannot_be_claimed_is_not_in_the_way(probe: Make) -> None:
    """The claim went through, and the database said that it did not."""

    def claim(good: t.Any, *args: t.Any) -> t.NoReturn:
        good(*args)
        raise PROGRAMMING

    p = probe()
    p.store.faults["claim"] = claim
    with pytest.raises(sqlalchemy.exc.ProgrammingError):
        p.start("one")
    p.store.faults.clear()
    assert p.finish(welcome(p)).data["status"] == "completed"


# -- what agents publish -----------------------------------------------------------------------

EVENTS = {**UNSTORABLE, "half an emoji": lambda: "\ud83d", "no number": lambda: float("nan")}


@pytest.mark.parametrize("what", EVENTS)
def test_an_event_that_is_no_json_is_shown_as_text_and_stops_nobody(probe: Make, what: str) -> None:
    value = EVENTS[what]()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "odd":
            stage.publish(Draft("agent_end", {"odd": value, "list": [value]}))
        say_ok(agent, request, stage)

    p = probe(script)
    odd, plain = p.start("odd", "a"), p.start("plain", "b")
    for started in (odd, plain):
        assert p.finish(started).data["status"] == "completed"
    (event,) = [e for e in p.log("a") if e.type == "agent_end"]
    assert t.cast(t.Any, event.data)["odd"] not in ("", None)
    frames = b"".join(map(together_frame, p.log("a")))
    assert b"agent_end" in frames
    for sid in ("a", "b"):
        assert_well(p, sid)


def together_frame(event: t.Any) -> bytes:
    from agentao_web.wire.native import frame

    return frame(event)


def test_one_session_whose_events_the_store_refuses_holds_up_no_other(probe: Make) -> None:
    """Their batches go to the store together."""
    goes_on = threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": request.message}))
        assert goes_on.wait(PATIENCE)

    def append(good: t.Any, batches: t.Any) -> t.Any:
        if any(claim.key.id == "bad" for claim, _ in batches):
            raise TypeError("no JSON")
        return good(batches)

    p = probe(script)
    p.store.faults["append"] = append
    started = [p.start("hello", sid) for sid in ("bad", "a", "b", "c")]
    for sid in ("a", "b", "c"):
        until(lambda sid=sid: p.log(sid)[-1].type == "llm_text", "not stored")  # type: ignore[misc]
    goes_on.set()
    for one in started:
        assert p.finish(one).data["status"] == "completed"
    p.store.faults.clear()
    for sid in ("bad", "a"):
        assert_well(p, sid)


# -- numbers of tokens -------------------------------------------------------------------------


def test_a_mistake_at_the_very_end_costs_one_turn(stores: cabc.Callable[[], Store]) -> None:
    class Failing(Observer):
        failed = False

        def ended(self, *told: t.Any) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("a mistake of ours")

    p = Probe(say_ok, store=stores(), observer=Failing())
    try:
        assert p.run("one").extra["error"]["code"] == "internal_error"
        assert_well(p)
        # Closing what the store had left open takes a place for a moment, too.
        eventually(lambda: p.pool.counts()["slots"] == 0, "a place is not given back")
    finally:
        p.pool.drain(grace=2)


@pytest.mark.parametrize("count", [-100, True, 10**30, 10**4298, 1.5, "5", None, 2**53 + 1])
def test_what_is_no_number_of_tokens_is_not_counted(probe: Make, count: t.Any) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 3}
    p = probe(lambda a, r, s: Outcome(State.COMPLETED, reply="ok", usage=usage))
    for _ in range(3):
        assert p.run().data["usage"] == {"completion_tokens": 3}
    row = p.store.session(p.key())
    assert row.usage == {"completion_tokens": 9}


def test_sums_of_tokens_stay_numbers_that_every_reader_keeps(probe: Make) -> None:
    p = probe(lambda a, r, s: Outcome(State.COMPLETED, usage={"prompt_tokens": 2**53}))
    for _ in range(12):
        assert p.run().data["usage"] == {"prompt_tokens": 2**53}
    assert p.store.session(p.key()).usage == {"prompt_tokens": 2**53}
    for _ in range(2000):
        p.store.spend("acme", "2026-01-01", 2**53)
        if p.store.spent("acme", "2026-01-01") == 2**53:
            break
    p.store.spend("acme", "2026-01-01", 2**53)
    assert p.store.spent("acme", "2026-01-01") == 2**53


# -- what cannot be cleaned up -----------------------------------------------------------------


class Counting(Observer):
    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()

    def stumbled(self, kind: str) -> None:
        self.kinds[kind] += 1


@pytest.fixture
def counted(stores: cabc.Callable[[], Store]) -> cabc.Iterator[tuple[Probe, Counting]]:
    seen = Counting()
    p = Probe(say_ok, store=Faulty(stores()), observer=seen)
    yield p, seen
    p.store.faults.clear()
    p.pool.drain(grace=2)


def test_a_session_that_cannot_be_deleted_stands_in_no_others_way(
    counted: tuple[Probe, Counting], caplog: pytest.LogCaptureFixture
) -> None:
    p, seen = counted
    good, tried = p.agents.forget, []

    def forget(key: SessionKey) -> None:
        if key.id == "b" and not mended.is_set():
            tried.append(time.monotonic())
            raise OSError("a folder that does not go away")
        good(key)

    mended = threading.Event()
    p.agents.forget = forget  # type: ignore[method-assign]
    for sid in ("a", "b", "c"):
        p.run(sid=sid)
        p.store.tombstone(p.key(sid))
    until(lambda: p.store.doomed() == [p.key("b")], "the others stay")
    until(lambda: len(tried) >= 2, "it is not tried again")
    assert p.pool.delete(p.key("b"), timeout=1) is False, "and whoever asks is told: not yet"
    assert p.pool.gauges()["agentao_cleanups_stuck"] == 1.0
    told = [r for r in caplog.records if "deleted session could not be removed" in r.message]
    assert seen.kinds["remove_session"] == len(told) == len(tried), "once for each try"
    mended.set()
    until(lambda: p.store.doomed() == [], "it is not tried again")
    until(lambda: p.pool.gauges()["agentao_cleanups_stuck"] == 0.0, "still stuck")


def test_old_sessions_go_though_the_oldest_cannot(stores: cabc.Callable[[], Store]) -> None:
    p = Probe(say_ok, store=stores(), conversation_ttl=3600.0)
    try:
        good = p.agents.forget

        def forget(key: SessionKey) -> None:
            if key.tenant == "first":
                raise RecursionError
            good(key)

        p.agents.forget = forget  # type: ignore[method-assign]
        keys = [p.key("s", tenant) for tenant in ("first", "second", "third")]
        for key in keys:
            started = p.pool.start(key, TurnRequest("hi"))
            assert p.finish(started).data["status"] == "completed"
        p.pool.tick(p.pool.clock() + 3700)
        until(lambda: p.store.doomed() == keys[:1], "the others stay")
        assert [p.store.session(key) is None for key in keys] == [False, True, True]
    finally:
        p.agents.forget = lambda key: None  # type: ignore[method-assign]
        p.pool.drain(grace=2)


def test_a_lost_turn_whose_log_cannot_be_read_ends_all_the_same(probe: Make) -> None:
    p = probe()
    for sid in ("a", "b"):
        p.run("before", sid)
        row = together.TurnRow(f"t-{sid}", "lost", 0, 1.0, "a-dead-worker")
        opening = Draft("turn_begin", {"message": "lost", "images": 0})

        def events(good: t.Any, key: SessionKey, *args: t.Any, **options: t.Any) -> t.Any:
            if key.id == "a":
                raise ValueError("damaged")
            return good(key, *args, **options)

        p.store.faults["events"] = events
        p.store.claim(p.key(sid), row, opening, 1.0)
    for sid in ("a", "b"):
        until(lambda sid=sid: not p.store.active(p.key(sid)), "never closed")  # type: ignore[misc]
    p.store.faults.clear()
    for sid in ("a", "b"):
        assert_well(p, sid)


@pytest.mark.parametrize("error", [RuntimeError("no"), PROGRAMMING], ids=repr)
def test_a_lost_turn_that_cannot_be_closed_stands_in_no_others_way(
    counted: tuple[Probe, Counting], error: Exception
) -> None:
    p, seen = counted

    def take_over(good: t.Any, orphan: t.Any, worker: str) -> t.Any:
        if orphan.turn_id == "t-a":
            raise error
        return good(orphan, worker)

    p.store.faults["take_over"] = take_over
    for sid in ("a", "b", "c"):
        row = together.TurnRow(f"t-{sid}", "lost", 0, 1.0, "a-dead-worker")
        opening = Draft("turn_begin", {"message": "lost", "images": 0})
        p.store.claim(p.key(sid), row, opening, 1.0)
    p.run(sid="awake")
    for sid in ("b", "c"):
        until(lambda sid=sid: not p.store.active(p.key(sid)), "never closed")  # type: ignore[misc]
    until(lambda: seen.kinds["close_turn"] + seen.kinds["reap_turn"] >= 2, "it is tried again")
    assert p.store.active(p.key("a"))
    p.store.faults.clear()
    assert_well(p, "a")


def test_a_callback_that_fails_keeps_no_other_from_being_stopped(probe: Make) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "next":
            return
        stopped = threading.Event()

        def fail(reason: str) -> None:
            raise RuntimeError("no")

        stage.on_stop(fail)
        stage.on_stop(lambda reason: stopped.set())
        stage.publish(Draft("llm_text", {"chunk": "working"}))
        assert stopped.wait(PATIENCE)

    p = probe(script)
    started = p.start("one")
    read_until(p.pool, started, "llm_text")
    assert p.pool.cancel(p.key()) == 1
    assert p.finish(started).data["status"] == "cancelled"
    assert_well(p)


# -- clocks that step --------------------------------------------------------------------------


class Worker:
    """A pool whose own clock is moved by hand."""

    def __init__(self, store: t.Any, script: t.Any) -> None:
        self.clock = Clock()
        self.store = store
        self.pool = SessionPool(
            store, FakeAgents(script), TestCaps(worker_lease=10.0), clock=self.clock
        )

    def pass_by(self, seconds: float) -> None:
        """Time goes by, and it does what it does from time to time."""
        self.clock.time += seconds
        self.pool.tick(self.clock.time)


@pytest.mark.parametrize("step", [15.0, 3600.0, -15.0, -3600.0])
def test_a_clock_that_steps_costs_no_turn_and_keeps_no_dead_one(
    tmp_path: Path, step: float
) -> None:
    """Workers of one machine share a wall clock; leases are measured by none."""
    wall = [1_800_000_000.0]
    url = f"sqlite:///{tmp_path}/clocks.db"
    made = [Worker(together.SqlStore(url, clock=lambda: wall[0]), until_stopped) for _ in range(2)]
    one, two = made
    key = SessionKey("acme", "ann", "s")
    try:
        started = one.pool.start(key, TurnRequest("long"))
        two.pool.find(key)
        for n in range(30):
            if n == 3:
                wall[0] += step
            wall[0] += 3.0
            for worker in made:
                worker.pass_by(3.0)
        assert [turn.state for turn in two.store.active(key)] == ["running"], "it was declared dead"
        # Now the first one stands still, and its clock with it.
        for _ in range(3):
            wall[0] += 3.0
            two.pass_by(3.0)
        assert [turn.state for turn in two.store.active(key)] == ["running"], "too early"

        def closed() -> bool:
            two.pass_by(3.0)
            return not two.store.active(key)

        until(closed, "nobody is told")
        last = two.store.ended(key, started.turn_id)
        assert last is not None and last.final.extra["error"]["code"] == "worker_lost"
    finally:
        for worker in made:
            worker.pool.cancel(key)
            worker.pool.drain(grace=1)


# -- a host's own agent, over HTTP -------------------------------------------------------------


class Careless(ScriptedAgent):
    """Keeps what no database takes in its history, after one of its turns."""

    def chat(self, message: str, *args: t.Any, **options: t.Any) -> t.Any:
        answer = super().chat(message, *args, **options)
        if message == "careless":
            self.messages[-1]["when"] = datetime.datetime(2026, 1, 1)  # type: ignore[assignment]
        elif message == "half":
            self.messages[-1]["content"] = "half \ud83d"
        return answer


@pytest.fixture
def web(tmp_path: Path) -> cabc.Iterator[Web]:
    agents = scripted(say("ok"))
    app = Flask("host")
    app.config.update(AGENTAO_ROOT=tmp_path / "root", AGENTAO_SECRET_KEYS=SECRET)

    def build(principal: t.Any, session: t.Any, transport: t.Any) -> t.Any:
        made = agents(principal, session, transport)
        made.__class__ = Careless
        return made

    AgentaoWeb(agents=build).init_app(app, url_prefix="/agent")
    yield Web(app, agents, "/agent")
    shutdown(app, grace=2)


def test_a_careless_agent_of_a_hosts_own_costs_one_turn(web: Web) -> None:
    body = web.ask("careless")
    assert (body["status"], body["error"]["code"]) == ("failed", "internal_error")
    assert web.ask("again")["status"] == "completed"
    assert web.get("/session/s").json["state"] == "idle"
    assert web.delete("/session/s").status_code in (200, 202, 204)


def test_half_an_emoji_in_a_hosts_history_costs_nothing(web: Web) -> None:
    assert web.ask("half")["status"] == "completed"
    assert web.ask("again")["status"] == "completed"
    history = web.app.extensions["agentao_web"].pool.store.history(SessionKey("acme", "ann", "s"))
    assert "half \ufffd" in [message["content"] for message in history.messages]


def test_a_workspace_of_any_depth_is_deleted_over_http(tmp_path: Path) -> None:
    agents = scripted(say("ok"))
    app = Flask("host")
    app.config.update(
        AGENTAO_ROOT=tmp_path / "root",
        AGENTAO_SECRET_KEYS=SECRET,
        AGENTAO_WORKSPACE="session",
    )
    folders: list[Path] = []

    def build(principal: t.Any, session: t.Any, transport: t.Any) -> t.Any:
        folders.append(session.workspace)
        return agents(principal, session, transport)

    AgentaoWeb(agents=build).init_app(app, url_prefix="/agent")
    web = Web(app, agents, "/agent")
    try:
        web.ask("hi")
        fd = os.open(folders[0], os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.close(fd)
        assert web.delete("/session/s").status_code < 300
        until(lambda: not folders[0].exists(), "the folder stays")
        assert web.ask("a new life")["status"] == "completed"
    finally:
        shutdown(app, grace=2)


def test_the_log_says_nothing_at_a_quiet_time(
    probe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """All of the above is told of when it happens, and not otherwise."""
    p = probe()
    with caplog.at_level(logging.WARNING):
        assert_well(p)
        for _ in range(3):
            p.pool.tick(p.pool.clock())
    assert [r.message for r in caplog.records if r.name.startswith("agentao_web")] == []
