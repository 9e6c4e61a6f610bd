"""The pool: admission, turns and their endings, stopping, deletion, eviction, drain."""

from __future__ import annotations

import collections.abc as cabc
import threading
import time
import typing as t

import pytest

from agentao_web.core import log
from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import Draining
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import SessionBusy
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import TooManySessions
from agentao_web.core.errors import TooManyTurns
from agentao_web.core.log import Draft
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.readers import Reader
from agentao_web.runner import Stage
from agentao_web.sessions import Started
from agentao_web.store.memory import MemoryStore
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Gate
from tests.pool_fakes import Probe
from tests.pool_fakes import read_turn
from tests.pool_fakes import read_until
from tests.pool_fakes import until_stopped

Make = cabc.Callable[..., Probe]


@pytest.fixture
def probe() -> cabc.Iterator[Make]:
    made: list[Probe] = []

    def make(*args: t.Any, **caps: t.Any) -> Probe:
        made.append(Probe(*args, **caps))
        return made[-1]

    yield make
    for p in made:
        p.pool.drain(grace=2)


def types(events: cabc.Iterable[t.Any]) -> list[str]:
    return [e.type for e in events]


# -- a turn ------------------------------------------------------------------------------------


def test_a_turn_goes_from_its_message_to_done(probe: Make) -> None:
    p = probe()
    events = p.events(p.start("hello"))
    assert types(events) == ["turn_begin", "llm_text", "done"]
    assert events[0].data["message"] == "hello"
    assert events[-1].data["status"] == "completed"
    assert events[-1].extra == {"reply": "ok"}
    assert types(p.log()) == types(events), "the store has the same"
    assert p.pool.counts()["turns"] == 0


def test_the_next_turn_has_a_new_generation_and_the_same_agent(probe: Make) -> None:
    p = probe()
    first, second = p.run("a"), p.run("b")
    assert first.seq is not None and second.seq is not None
    assert second.seq >> 20 > first.seq >> 20
    assert len(p.agents.built) == 1
    assert [m["content"] for m in p.store.history(p.key()).messages] == ["a", "ok", "b", "ok"]


def test_fifty_first_requests_at_once_build_one_agent(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    p = probe(script, max_turns=64)
    barrier = threading.Barrier(50)
    outcomes: list[t.Any] = []

    def ask() -> None:
        barrier.wait(PATIENCE)
        try:
            outcomes.append(p.start("hi"))
        except SessionBusy as exc:
            outcomes.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    started = [o for o in outcomes if not isinstance(o, SessionBusy)]
    assert (len(started), len(outcomes)) == (1, 50)
    gate.meet()
    gate.opened.set()
    assert p.finish(started[0]).data["status"] == "completed"
    assert len(p.agents.built) == 1


def test_building_one_agent_does_not_hold_up_another_session(probe: Make) -> None:
    p = probe()
    p.run(sid="ready")
    p.agents.building = Gate()
    slow = p.start(sid="slow")
    p.agents.building.meet()
    assert p.run(sid="ready").data["status"] == "completed"
    p.agents.building.opened.set()
    assert p.finish(slow).data["status"] == "completed"


def test_an_agent_that_raises_ends_the_turn_and_is_not_used_again(probe: Make) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "bad":
            raise SystemExit("a tool left")

    p = probe(script)
    failed = p.run("bad")
    assert failed.type == "error"
    assert failed.extra["error"]["code"] == "internal_error"
    assert "a tool left" not in str(failed)
    assert len(failed.extra["error"]["details"]["error_id"]) == 16
    assert p.agents.built[0].closed == 1
    assert p.run("good").data["status"] == "completed"
    assert [m["role"] for m in p.agents.built[1].messages[:2]] == ["user", "assistant"]
    assert "cut off" in p.agents.built[1].messages[1]["content"]


def test_an_agent_that_cannot_be_built_ends_the_turn(probe: Make) -> None:
    p = probe()
    p.agents.build = t.cast(t.Any, lambda key, history: 1 / 0)
    assert p.run().extra["error"]["code"] == "internal_error"


def test_a_turn_that_says_too_much_ends_at_the_claims_last_number(
    probe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With claims of 4,095 numbers: a million take a while."""
    monkeypatch.setattr(log, "GENERATION_BITS", 12)
    monkeypatch.setattr(log, "EVENTS_PER_CLAIM", 4095)

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stopped = threading.Event()
        stage.on_stop(lambda reason: stopped.set())
        for _ in range(4095 + 10):
            stage.publish(Draft("llm_text", {"chunk": "x"}))
            if stopped.is_set():
                return

    p = probe(script)
    last = p.run()
    assert (last.data["status"], last.data["reason"]) == ("incomplete", "event_limit")


# -- busy --------------------------------------------------------------------------------------


def test_a_second_turn_is_refused_and_changes_nothing(probe: Make) -> None:
    p = probe(until_stopped)
    first = p.start("one")
    with pytest.raises(SessionBusy) as refused:
        p.start("two")
    assert refused.value.details["turn_id"] == first.turn.turn.id
    p.pool.cancel(p.key())
    assert p.finish(first).data["reason"] == "cancelled_by_user"
    assert "two" not in str(p.log())


def test_a_queued_turn_runs_after_the_running_one(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            gate.stand()

    p = probe(script)
    one = p.start("one")
    gate.meet()
    two = p.start("two", on_busy="queue")
    three = p.start("three", on_busy="queue")
    assert [e.turn.state for e in one.live.turns()] == ["running", "queued", "queued"]
    gate.opened.set()
    assert types(p.events(two)) == ["turn_queued", "turn_begin", "done"]
    assert p.events(two)[0].data["position"] == 1
    assert p.events(three)[0].data["position"] == 2
    assert p.finish(three).data["status"] == "completed"
    contents = [m["content"] for m in p.store.history(p.key()).messages if m["role"] == "user"]
    assert contents == ["one", "two", "three"]


def one_at_a_time(probe: Make, **caps: t.Any) -> tuple[Probe, Gate]:
    """A worker with one place, and a turn in it that stands at the gate."""
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": request.message}))
        if request.message == "first":
            gate.stand()

    p = probe(script, max_turns=1, **caps)
    p.start("first", "a")
    gate.meet()
    return p, gate


def test_who_asks_for_it_waits_in_line_for_a_place(probe: Make) -> None:
    p, gate = one_at_a_time(probe)
    with pytest.raises(TooManyTurns, match="worker"):
        p.start("now", "b")
    line = [p.start("later", sid, on_busy="queue") for sid in ("b", "c", "d")]
    assert [started.status for started in line] == ["queued"] * 3
    assert p.store.active(p.key("c"))[0].state == "queued", "the message is in the store"
    assert p.pool.counts()["slots"] == 1
    gate.opened.set()
    ended = [p.finish(started) for started in line]
    assert [event.data["status"] for event in ended] == ["completed"] * 3
    began = [p.log(sid)[0].ts for sid in ("b", "c", "d")]
    assert began == sorted(began), "the oldest first"
    assert p.pool.counts()["slots"] == p.pool.counts()["turns"] == 0


def test_the_line_is_bounded(probe: Make) -> None:
    p, gate = one_at_a_time(probe, max_line=1)
    p.start("later", "b", on_busy="queue")
    with pytest.raises(TooManyTurns, match="worker"):
        p.start("later", "c", on_busy="queue")
    assert p.store.session(p.key("c")) is None
    gate.opened.set()


def test_who_waits_for_its_own_session_needs_no_place(probe: Make) -> None:
    """It takes the place of the turn before it, however many others wait for one."""
    p, gate = one_at_a_time(probe, max_line=1)
    p.start("later", "b", on_busy="queue")
    queued = p.start("queued", "a", on_busy="queue")
    interrupting = p.start("now", "a", on_busy="interrupt")
    with pytest.raises(SessionBusy):
        p.start("rejected", "a")
    gate.opened.set()
    for started in (interrupting, queued):
        assert p.finish(started).data["status"] == "completed"


def test_who_follows_a_turn_without_a_place_waits_for_one_too(probe: Make) -> None:
    p, gate = one_at_a_time(probe)
    waiting = p.start("later", "b", on_busy="queue")
    behind = p.start("behind", "b", on_busy="queue")
    interrupting = p.start("now", "b", on_busy="interrupt")
    assert p.finish(waiting).data["reason"] == "interrupted"
    assert p.pool.counts()["slots"] == 1, "no more than there are"
    assert p.pool.cancel(p.key("b")) == 2
    for started in (interrupting, behind):
        assert p.finish(started).data["reason"] == "cancelled_by_user"
    last = p.start("last", "b", on_busy="queue")
    gate.opened.set()
    assert p.finish(last).data["status"] == "completed"
    until_zero(p, "slots")


def test_a_repeated_request_is_joined_also_when_there_is_no_place(probe: Make) -> None:
    p, gate = one_at_a_time(probe, max_line=1)
    use = ("key", "0" * 64)
    first = p.start("later", "b", on_busy="queue", use=use)
    again = p.start("later", "b", on_busy="queue", use=use)
    assert again.turn_id == first.turn_id
    gate.opened.set()
    assert p.finish(again).data["status"] == "completed"


@pytest.mark.parametrize("how", ["cancel", "delete", "drain"])
def test_a_turn_in_line_can_be_stopped(probe: Make, how: str) -> None:
    p, gate = one_at_a_time(probe)
    waiting = p.start("later", "b", on_busy="queue")
    behind = p.start("behind", "b", on_busy="queue")
    if how == "cancel":
        assert p.pool.cancel(p.key("b")) == 2
    elif how == "delete":
        assert p.pool.delete(p.key("b"), timeout=PATIENCE)
    else:
        leaving = threading.Thread(target=p.pool.drain, args=(PATIENCE,))
        leaving.start()
    reason = {"cancel": "cancelled_by_user", "delete": "session_deleted"}
    for started in (waiting, behind):
        last = p.finish(started)
        assert last.data["status"] == "cancelled"
        assert last.data["reason"] == reason.get(how, "server_shutdown")
    gate.opened.set()
    if how == "drain":
        leaving.join(PATIENCE)
        return
    assert p.store.active(p.key("b")) == []
    assert p.run("next", "b", on_busy="queue").data["status"] == "completed"


def test_a_turn_the_store_refuses_leaves_the_line(probe: Make) -> None:
    p, gate = one_at_a_time(probe)
    good = p.store.enqueue

    def refuse(*args: t.Any, **options: t.Any) -> t.NoReturn:
        raise StoreUnavailable

    p.store.enqueue = refuse
    with pytest.raises(StoreUnavailable):
        p.start("later", "b", on_busy="queue")
    p.store.enqueue = good
    assert p.pool.counts()["slots"] == p.pool.counts()["turns"] == 1
    later = p.start("later", "b", on_busy="queue")
    gate.opened.set()
    assert p.finish(later).data["status"] == "completed"


def test_a_place_that_comes_free_before_the_store_has_answered(probe: Make) -> None:
    p, gate = one_at_a_time(probe)
    good, ended = p.store.enqueue, threading.Event()

    def late(*args: t.Any, **options: t.Any) -> t.Any:
        gate.opened.set()
        assert ended.wait(PATIENCE)
        return good(*args, **options)

    p.store.enqueue = late
    first = p.pool.peek(p.key("a"))
    assert first is not None
    turn = first.turns()[0]

    def watch() -> None:
        read_turn(p.pool, first, turn, 0)
        ended.set()

    thread = threading.Thread(target=watch)
    thread.start()
    later = p.start("later", "b", on_busy="queue")
    thread.join(PATIENCE)
    assert p.finish(later).data["status"] == "completed"


def test_a_turn_the_store_takes_too_late_ends_all_the_same(
    probe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.runner.COMMIT_TIMEOUT", 0.05)
    p, gate = one_at_a_time(probe)
    good = p.store.enqueue

    def late(*args: t.Any, **options: t.Any) -> t.Any:
        gate.opened.set()
        until_zero(p, "turns")
        return good(*args, **options)

    p.store.enqueue = late
    later = p.start("later", "b", on_busy="queue")
    last = p.finish(later)
    assert last.extra["error"]["code"] == "store_unavailable"
    assert p.store.active(p.key("b")) == [], "its row does not outlive it"
    assert p.pool.counts()["slots"] == 0


def test_a_full_queue_refuses(probe: Make) -> None:
    p = probe(until_stopped, max_queue=1)
    first = p.start()
    p.start("two", on_busy="queue")
    with pytest.raises(TooManyTurns):
        p.start("three", on_busy="queue")
    with pytest.raises(TooManyTurns):
        p.start("three", on_busy="interrupt")
    assert first.turn.turn.stop_reason is None, "a refused interrupt interrupts nobody"
    assert p.pool.cancel(p.key()) == 2


def test_interrupt_stops_the_running_turn_and_goes_first(probe: Make) -> None:
    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            until_stopped(agent, request, stage)

    p = probe(script)
    one = p.start("one")
    two = p.start("two", on_busy="queue")
    three = p.start("three", on_busy="interrupt")
    assert p.finish(one).data["reason"] == "interrupted"
    assert p.finish(three).data["status"] == "completed"
    assert p.finish(two).data["status"] == "completed"
    began = [e.data["message"] for e in p.log() if e.type == "turn_begin"]
    assert began == ["one", "three", "two"]


def test_the_worker_and_a_tenant_have_only_so_many_turns(probe: Make) -> None:
    p = probe(until_stopped, max_turns=2, max_turns_per_tenant=1)
    p.start(sid="a")
    with pytest.raises(TooManyTurns, match="tenant"):
        p.start(sid="b")
    p.pool.start(p.key(tenant="other"), TurnRequest("hi"))
    with pytest.raises(TooManyTurns, match="worker"):
        p.pool.start(p.key(tenant="third"), TurnRequest("hi"))
    assert p.pool.cancel(p.key("a")) == 1
    assert p.pool.cancel(p.key(tenant="other")) == 1


def test_whoever_reads_done_finds_room_for_the_next_turn(probe: Make) -> None:
    p = probe(max_turns=1)
    for n in range(50):
        assert p.run(f"{n}").data["status"] == "completed"


# -- stopping ----------------------------------------------------------------------------------


def test_cancel_while_the_agent_is_built(probe: Make) -> None:
    p = probe()
    p.agents.building = Gate()
    started = p.start()
    p.agents.building.meet()
    assert p.pool.cancel(p.key()) == 1
    p.agents.building.opened.set()
    assert p.finish(started).data["reason"] == "cancelled_by_user"


def test_cancel_ends_the_queued_turns_too(probe: Make) -> None:
    p = probe(until_stopped)
    first = p.start()
    read_until(p.pool, first, "llm_text")
    queued = [p.start(f"{n}", on_busy="queue") for n in range(3)]
    assert p.pool.cancel(p.key()) == 4
    for started in [first, *queued]:
        assert p.finish(started).data["reason"] == "cancelled_by_user"
    ends = [e for e in p.log() if e.type == "done"]
    assert len({e.turn_id for e in ends}) == len(ends) == 4
    assert p.pool.cancel(p.key()) == 0


def test_cancel_of_an_unknown_or_idle_session_does_nothing(probe: Make) -> None:
    p = probe()
    assert p.pool.cancel(p.key()) == 0
    p.run()
    assert p.pool.cancel(p.key()) == 0


def test_a_turn_has_a_running_time(probe: Make) -> None:
    p = probe(until_stopped)
    started = p.start(timeout=0.05)
    assert (e := p.finish(started)).data["status"] == "timed_out"
    assert e.data["reason"] == "turn_timeout"


def test_a_turn_that_ignores_its_stop_is_given_up(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "stuck":
            stage.publish(Draft("tool_start", {"call_id": "1", "tool": "slow", "args": {}}))
            gate.stand()
            stage.publish(Draft("llm_text", {"chunk": "too late"}))

    p = probe(script, stop_grace=0.05)
    stuck = p.start("stuck")
    gate.meet()
    waiting = p.start("next", on_busy="queue")
    p.pool._runner.stop(stuck.live, stuck.turn, "turn_timeout")
    last = p.finish(stuck)
    assert (last.data["status"], last.data["details"]) == ("timed_out", {"abandoned": True})
    assert p.finish(waiting).data["status"] == "completed", "the queue goes on, with a new agent"
    assert p.pool.counts()["given_up"] == 1
    history = p.agents.built[1].messages
    assert history[0]["content"] == "stuck"
    assert "may or may not have taken effect: slow" in history[1]["content"]
    gate.opened.set()
    until_zero(p, "given_up")
    assert p.agents.built[0].closed == 1, "closed by its own thread, once that was back"
    assert "too late" not in str(p.log())


def lose_its_claim(p: Probe, started: Started) -> None:
    """What happens when another worker has taken the session over, and the writer finds out."""
    live, lost, found_out = started.live, started.live.lost, threading.Event()

    def append(batches: t.Any) -> list[t.Any]:
        return [claim for claim, _ in batches]

    def find_out(claim: t.Any) -> None:
        lost(claim)
        found_out.set()

    p.store.append = append
    live.lost = find_out  # type: ignore[method-assign]
    assert started.turn is not None
    live.publish(started.turn, Draft("llm_text", {"chunk": "more"}))
    p.pool._writer.note(live, urgent=True)
    assert found_out.wait(PATIENCE)


def test_a_turn_whose_claim_is_lost_is_stopped(probe: Make) -> None:
    p = probe(until_stopped)
    started = p.start()
    read_until(p.pool, started, "llm_text")
    lose_its_claim(p, started)
    last = p.finish(started)
    assert (last.seq, last.extra["error"]["code"]) == (None, "worker_lost")
    until_zero(p, "slots")


def test_a_turn_whose_claim_is_lost_and_that_ignores_its_stop_is_given_up(probe: Make) -> None:
    gate = Gate()
    p = probe(lambda agent, request, stage: gate.stand(), stop_grace=0.05)
    started = p.start()
    gate.meet()
    lose_its_claim(p, started)
    last = p.finish(started)
    assert (last.seq, last.extra["error"]["code"]) == (None, "worker_lost")
    assert p.pool.counts()["given_up"] == 1
    gate.opened.set()
    until_zero(p, "given_up")
    assert p.agents.built[0].closed == 1


def until_zero(p: Probe, name: str) -> None:
    until_count(p, name, 0)


def until_count(p: Probe, name: str, wanted: int) -> None:
    ready = threading.Event()
    for _ in range(1000):
        if p.pool.counts()[name] == wanted:
            return
        ready.wait(0.01)
    raise AssertionError(f"{name} never came to {wanted}")


def test_half_of_the_slots_lost_makes_the_worker_unready(probe: Make) -> None:
    gate = Gate()
    told = threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    p = probe(script, stop_grace=0.05, max_turns=2)
    p.pool.exhausted = told.set
    started = p.start()
    gate.meet()
    p.pool.cancel(p.key())
    p.finish(started)
    assert told.wait(PATIENCE)
    assert not p.pool.ready
    gate.opened.set()
    until_zero(p, "slots")
    assert p.pool.ready


# -- the store ---------------------------------------------------------------------------------


def test_a_message_the_store_refuses_leaves_no_trace(probe: Make) -> None:
    p = probe()

    def claim(*args: t.Any) -> t.NoReturn:
        raise StoreUnavailable

    good, p.store.claim = p.store.claim, claim
    with pytest.raises(StoreUnavailable):
        p.start()
    assert p.pool.counts() == {"sessions": 0, "turns": 0, "slots": 0, "given_up": 0}
    p.store.claim = good
    assert p.run().data["status"] == "completed"


@pytest.mark.parametrize(
    ("error", "code"),
    [(StoreUnavailable(), "store_unavailable"), (ClaimLost(), "worker_lost")],
)
def test_an_ending_that_cannot_be_stored_is_told_without_a_number(
    probe: Make, error: Exception, code: str
) -> None:
    p = probe()

    def finish(*args: t.Any) -> t.NoReturn:
        raise error

    p.store.finish = finish
    last = p.run()
    assert (last.seq, last.type, last.extra["error"]["code"]) == (None, "error", code)
    assert p.agents.built[0].closed == 1, "its agent is dropped"
    assert p.pool.counts()["turns"] == 0


def test_events_reach_the_store_while_the_turn_runs(probe: Make) -> None:
    p = probe(until_stopped)
    started = p.start()
    read_until(p.pool, started, "llm_text")
    written = threading.Event()
    for _ in range(1000):
        if types(p.log()) == ["turn_begin", "llm_text"]:
            break
        written.wait(0.01)
    assert types(p.log()) == ["turn_begin", "llm_text"]
    p.pool.cancel(p.key())


def test_a_queued_turn_the_store_refuses_is_as_if_it_had_never_been(probe: Make) -> None:
    """Also when its time came while the store was still thinking."""
    gate, thinking = Gate(), Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            gate.stand()

    p = probe(script)
    good = p.store.enqueue

    def enqueue(*args: t.Any, **options: t.Any) -> t.NoReturn:
        thinking.stand()
        raise StoreUnavailable

    p.store.enqueue = enqueue
    one = p.start("one")
    gate.meet()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            p.start("two", on_busy="queue")
        except StoreUnavailable as exc:
            errors.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    thinking.meet()
    gate.opened.set()
    p.finish(one)
    thinking.opened.set()
    asking.join(PATIENCE)
    assert len(errors) == 1
    until_zero(p, "turns")
    until_zero(p, "slots")
    p.store.enqueue = good
    assert p.run("three").data["status"] == "completed"
    assert "two" not in str(p.log())


def test_a_turn_may_be_queued_while_the_first_one_is_being_claimed(probe: Make) -> None:
    claiming = Gate()
    p = probe()
    good = p.store.claim

    def claim(*args: t.Any) -> t.Any:
        if not claiming.opened.is_set():
            claiming.stand()
        return good(*args)

    p.store.claim = claim
    first: list[Started] = []
    asking = threading.Thread(target=lambda: first.append(p.start("one")))
    asking.start()
    claiming.meet()
    second: list[Started] = []
    queueing = threading.Thread(target=lambda: second.append(p.start("two", on_busy="queue")))
    queueing.start()
    until_count(p, "turns", 2)
    claiming.opened.set()
    asking.join(PATIENCE)
    queueing.join(PATIENCE)
    assert p.finish(first[0]).data["status"] == "completed"
    assert p.finish(second[0]).data["status"] == "completed"


def test_a_turn_stopped_before_it_has_a_row_leaves_none(probe: Make) -> None:
    p = probe(until_stopped)
    good = p.store.enqueue

    def enqueue(*args: t.Any, **options: t.Any) -> None:
        p.pool.cancel(p.key())
        good(*args, **options)

    p.store.enqueue = enqueue
    one = p.start("one")
    read_until(p.pool, one, "llm_text")
    two = p.start("two", on_busy="queue")
    assert p.finish(two).data["reason"] == "cancelled_by_user"
    p.finish(one)
    assert p.store.active(p.key()) == []


# -- sessions ----------------------------------------------------------------------------------


def test_another_tenant_or_user_has_a_session_of_its_own(probe: Make) -> None:
    p = probe()
    p.run("mine")
    for stranger in (p.key(user="bob"), p.key(tenant="other"), p.key(user="")):
        with pytest.raises(NotFound):
            p.pool.find(stranger)
        assert p.pool.cancel(stranger) == 0
        assert p.pool.delete(stranger, timeout=1)
    assert p.pool.find(p.key()).head > 0


def test_an_idle_session_is_evicted_and_comes_back_whole(probe: Make) -> None:
    p = probe(session_ttl=100.0)
    p.run("one")
    cursor = p.pool.find(p.key()).head
    p.pool.tick(p.pool.clock() + 101)
    assert p.pool.counts()["sessions"] == 0
    live = p.pool.find(p.key())
    with Reader(live, p.store, None) as reader:
        assert types(reader.read(limit=9, max_bytes=10**6)) == ["turn_begin", "llm_text", "done"]
        assert reader.caught_up and reader.cursor == cursor
    p.run("two")
    assert [m["content"] for m in p.agents.built[1].messages] == ["one", "ok", "two", "ok"]


def test_a_session_that_is_read_or_runs_is_not_evicted(probe: Make) -> None:
    p = probe(until_stopped, session_ttl=100.0)
    started = p.start()
    p.pool.tick(p.pool.clock() + 101)
    assert p.pool.peek(p.key()) is started.live
    p.pool.cancel(p.key())
    p.finish(started)
    with Reader(started.live, p.store, None):
        p.pool.tick(p.pool.clock() + 101)
        assert p.pool.peek(p.key()) is started.live
    p.pool.tick(p.pool.clock() + 101)
    assert p.pool.peek(p.key()) is None


def test_the_least_recently_used_session_makes_room(probe: Make) -> None:
    p = probe(max_sessions=2)
    for sid in ("a", "b", "c"):
        p.run(sid=sid)
    assert p.pool.peek(p.key("a")) is None
    assert p.pool.peek(p.key("c")) is not None
    assert p.pool.find(p.key("a")).head > 0, "and can come back"


def test_no_room_when_every_session_is_in_use(probe: Make) -> None:
    p = probe(until_stopped, max_sessions=1)
    p.start(sid="a")
    with pytest.raises(TooManySessions):
        p.start(sid="b")
    p.pool.cancel(p.key("a"))


def test_a_tenant_has_only_so_many_stored_sessions(probe: Make) -> None:
    p = probe(max_sessions_per_tenant=1)
    p.run(sid="a")
    with pytest.raises(TooManySessions):
        p.run(sid="b")
    assert p.run(sid="a").data["status"] == "completed"
    assert p.pool.counts()["sessions"] == 1


def test_delete_stops_the_turn_and_tells_every_reader(probe: Make) -> None:
    p = probe(until_stopped)
    started = p.start()
    read_until(p.pool, started, "llm_text")
    with Reader(started.live, p.store, None) as other:
        assert p.pool.delete(p.key(), timeout=PATIENCE)
        last = other.read(limit=9, max_bytes=10**6)[-1]
    assert (last.seq, last.type, last.data["reason"]) == (None, "done", "session_deleted")
    mine = p.finish(started)
    assert (mine.seq, mine.data["reason"]) == (None, "session_deleted")
    with pytest.raises(NotFound):
        p.pool.find(p.key())
    assert p.agents.built[0].closed == 1
    assert p.agents.forgotten == [p.key()]
    assert p.pool.delete(p.key(), timeout=1), "harmless twice"


def test_a_number_is_not_used_again_after_a_delete(probe: Make) -> None:
    p = probe()
    before = p.run()
    p.pool.delete(p.key(), timeout=PATIENCE)
    after = p.run()
    assert after.seq is not None and before.seq is not None and after.seq > before.seq
    assert [m["content"] for m in p.store.history(p.key()).messages] == ["hi", "ok"]


def test_a_delete_that_cannot_wait_is_finished_later(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    p = probe(script)
    p.start()
    gate.meet()
    assert not p.pool.delete(p.key(), timeout=0.01)
    with pytest.raises(SessionBusy) as refused:
        p.start()
    assert refused.value.details == {"reason": "deleting"}
    gate.opened.set()
    until_zero(p, "sessions")
    assert p.store.session(p.key()) is None


def test_a_session_being_deleted_is_not_evicted_before(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()

    p = probe(script, session_ttl=0.0, max_sessions=1)
    p.start()
    gate.meet()
    assert not p.pool.delete(p.key(), timeout=0.01)
    gate.opened.set()
    until_zero(p, "turns")
    until_zero(p, "sessions")
    for _ in range(1000):
        if p.store.session(p.key()) is None:
            break
        threading.Event().wait(0.01)
    assert p.run().data["status"] == "completed", "the id is free again"


def test_a_session_can_be_deleted_when_there_is_no_room_to_open_it(probe: Make) -> None:
    p = probe(until_stopped, max_sessions=1)
    p.agents.script = lambda agent, request, stage: None
    p.run(sid="old")
    p.agents.script = until_stopped
    busy = p.start(sid="busy")
    assert p.pool.delete(p.key("old"), timeout=PATIENCE)
    assert p.store.session(p.key("old")) is None
    p.pool.cancel(p.key("busy"))
    p.finish(busy)


# -- readers that leave ------------------------------------------------------------------------


def leave(p: Probe, started: t.Any) -> None:
    reader = Reader(started.live, p.store, started.cursor, turn=started.turn)
    with reader:
        reader.left = True


def test_a_turn_nobody_reads_any_more_is_stopped_after_the_grace(probe: Make) -> None:
    p = probe(until_stopped, disconnect_grace=50.0)
    started = p.start(on_disconnect="cancel")
    leave(p, started)
    p.pool.tick(p.pool.clock() + 49)
    assert started.turn.turn.stop_reason is None
    p.pool.tick(p.pool.clock() + 51)
    assert p.finish(started).data["reason"] == "client_gone"


def test_somebody_who_comes_back_saves_the_turn(probe: Make) -> None:
    p = probe(until_stopped, disconnect_grace=50.0)
    started = p.start(on_disconnect="cancel")
    leave(p, started)
    with Reader(started.live, p.store, None):
        p.pool.tick(p.pool.clock() + 51)
        assert started.turn.turn.stop_reason is None
    p.pool.tick(p.pool.clock() + 51)
    assert started.turn.turn.stop_reason is None, "that reader did not leave: we ended it"
    p.pool.cancel(p.key())


def test_a_second_reader_keeps_the_turn(probe: Make) -> None:
    p = probe(until_stopped, disconnect_grace=0.0)
    started = p.start(on_disconnect="cancel")
    with Reader(started.live, p.store, None):
        leave(p, started)
        p.pool.tick(p.pool.clock() + 51)
        assert started.turn.turn.stop_reason is None
    p.pool.cancel(p.key())


def test_continue_runs_on_without_readers(probe: Make) -> None:
    p = probe(until_stopped, disconnect_grace=0.0)
    started = p.start(on_disconnect="continue")
    leave(p, started)
    p.pool.tick(p.pool.clock() + 51)
    assert started.turn.turn.stop_reason is None
    p.pool.cancel(p.key())


# -- the end -----------------------------------------------------------------------------------


def test_drain_ends_every_turn_and_closes_everything(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "stuck":
            gate.stand()
        else:
            until_stopped(agent, request, stage)

    p = probe(script, stop_grace=0.1)
    running, stuck = p.start("one", "a"), p.start("stuck", "b")
    gate.meet()
    queued = p.start("two", "a", on_busy="queue")
    ends: dict[str, t.Any] = {}
    readers = [
        threading.Thread(target=lambda n=n, s=s: ends.update({n: p.finish(s)}))
        for n, s in {"running": running, "stuck": stuck, "queued": queued}.items()
    ]
    for reader in readers:
        reader.start()
    p.pool.drain(grace=0.4)
    for reader in readers:
        reader.join(PATIENCE)
    assert {n: e.data["reason"] for n, e in ends.items()} == dict.fromkeys(
        ("running", "stuck", "queued"), "server_shutdown"
    )
    assert ends["stuck"].data["details"] == {"abandoned": True}
    with pytest.raises(Draining):
        p.start(sid="c")
    assert p.agents.closed
    assert p.agents.built[0].closed == 1
    gate.opened.set()
    until_zero(p, "given_up")
    assert all(agent.closed == 1 for agent in p.agents.built)


def test_a_short_turn_may_finish_during_the_drain(probe: Make) -> None:
    gate = Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> Outcome:
        gate.stand()
        return Outcome(State.COMPLETED, reply="in time")

    p = probe(script)
    started = p.start()
    gate.meet()
    drain = threading.Thread(target=p.pool.drain, args=(30,))
    drain.start()
    gate.opened.set()
    assert p.finish(started).extra == {"reply": "in time"}
    drain.join(PATIENCE)
    assert not drain.is_alive()


def test_a_turn_that_is_just_being_accepted_runs_during_the_drain(probe: Make) -> None:
    """It is no queued one, though it has no claim yet: its client would be refused for nothing."""
    gate, claiming = Gate(), Gate()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "long":
            gate.stand()

    p = probe(script)
    long = p.start("long", "b")
    gate.meet()
    good = p.store.claim

    def claim(key: SessionKey, *args: t.Any) -> t.Any:
        if key.id == "a":
            claiming.stand()
        return good(key, *args)

    p.store.claim = claim
    started: list[Started] = []
    post = threading.Thread(target=lambda: started.append(p.start("short", "a")))
    post.start()
    claiming.meet()
    queued = p.start("queued", "b", on_busy="queue")
    drain = threading.Thread(target=p.pool.drain, args=(30,))
    drain.start()
    assert p.finish(queued).data["reason"] == "server_shutdown", "the drain has looked at all"
    claiming.opened.set()
    post.join(PATIENCE)
    assert p.finish(started[0]).data["status"] == "completed"
    gate.opened.set()
    assert p.finish(long).data["status"] == "completed"
    drain.join(PATIENCE)
    assert not drain.is_alive()


def test_a_drain_in_a_hurry_overtakes_the_one_before(probe: Make) -> None:
    p = probe(until_stopped)
    started = p.start()
    patient = threading.Thread(target=p.pool.drain, args=(3600,))
    patient.start()
    p.pool.drain(grace=0.2)
    assert p.finish(started).data["reason"] == "server_shutdown"
    patient.join(PATIENCE)
    assert not patient.is_alive()


def test_a_turn_that_is_being_claimed_during_the_drain_is_refused(probe: Make) -> None:
    claiming = Gate()
    p = probe()
    good = p.store.claim

    def claim(*args: t.Any) -> t.Any:
        claiming.stand()
        return good(*args)

    p.store.claim = claim
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            p.start()
        except Exception as exc:
            errors.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    claiming.meet()
    p.pool.drain(grace=0.1)
    claiming.opened.set()
    asking.join(PATIENCE)
    until_zero(p, "slots")
    assert p.pool.counts()["given_up"] == 0


def test_using_a_pool_before_the_fork_is_refused(probe: Make, monkeypatch: t.Any) -> None:
    p = probe()
    p.run()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="before the fork"):
        p.start()


def test_what_is_doomed_is_removed_by_one_thread_however_often_it_is_seen() -> None:
    probe = Probe()
    keys = [probe.key(f"s{n}") for n in range(3)]
    gate, at_it = threading.Event(), threading.Event()

    def forget(key: SessionKey) -> None:
        at_it.set()
        assert gate.wait(PATIENCE), "the test never opened the gate"

    try:
        for key in keys:
            probe.run(sid=key.id)
        probe.agents.forget = forget  # type: ignore[method-assign]
        for key in keys:
            probe.store.tombstone(key)
        now = probe.pool.clock()
        for n in range(1, 6):
            probe.pool.tick(now + 100 * n)
        assert at_it.wait(PATIENCE)
        asides = [t for t in threading.enumerate() if t.name == "agentao-aside"]
        assert len(asides) == 1
        gate.set()
        asides[0].join(PATIENCE)
        assert not any(probe.store.session(key) for key in keys), "all by the one"
    finally:
        gate.set()
        probe.pool.close()


def test_a_second_drain_waits_until_all_is_closed(probe: Make) -> None:
    """Whoever comes second ends the process next: nothing may be half closed by then."""
    p = probe()
    p.run()
    gate, good = Gate(), p.store.close

    def slow() -> None:
        gate.stand()
        good()

    p.store.close = slow
    returned: list[str] = []

    def leave(name: str) -> None:
        p.pool.drain(5)
        returned.append(name)

    first = threading.Thread(target=leave, args=("first",))
    first.start()
    gate.meet()
    second = threading.Thread(target=leave, args=("second",))
    second.start()
    second.join(0.2)
    assert returned == []
    gate.opened.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert sorted(returned) == ["first", "second"]


class _Stuck(MemoryStore):
    """Stores no events while its gate is closed, and none at all while it is away."""

    def __init__(self) -> None:
        super().__init__(seed=1, log_bytes=2**22)
        self.gate = Gate()
        self.stuck, self.away = threading.Event(), threading.Event()

    def finish(self, claim: t.Any, finish: t.Any) -> bool:
        if self.away.is_set():
            raise StoreUnavailable
        return super().finish(claim, finish)

    def append(self, batches: t.Any) -> t.Any:
        if self.stuck.is_set():
            self.gate.stand()
        if self.away.is_set():
            raise StoreUnavailable
        return super().append(batches)


def one_behind_another(p: Probe) -> tuple[Started, Started]:
    """A turn that has spoken, and one that waits for it."""
    first = p.start()
    read_until(p.pool, first, "llm_text")
    queued = p.start("two", on_busy="queue")
    read_until(p.pool, queued, "turn_queued")
    return first, queued


def test_the_end_of_a_queued_turn_is_shown_once_it_is_stored(probe: Make) -> None:
    """Told means kept, also under another turn's claim; and what follows comes in its order."""
    store, goes_on = _Stuck(), threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": "before"}))
        assert goes_on.wait(PATIENCE)
        stage.publish(Draft("llm_text", {"chunk": "after"}))

    p = probe(script, store=store)
    first, queued = one_behind_another(p)
    assert queued.turn is not None
    with (
        Reader(first.live, store, first.cursor) as everything,
        Reader(first.live, store, queued.cursor, turn=queued.turn) as its_own,
    ):
        seen = everything.read(limit=100, max_bytes=10**6)
        its_own.read(limit=100, max_bytes=10**6)
        store.stuck.set()
        p.pool._runner.stop(first.live, queued.turn, "cancelled_by_user")
        goes_on.set()
        store.gate.meet()
        for reader in (everything, its_own):
            assert reader.read(limit=100, max_bytes=10**6) == []
            assert not reader.told
            until = first.live.clock() + 0.05
            reader.wait(until)
            assert first.live.clock() >= until, "nobody is woken for what may not be shown"
        assert first.live.shown == everything.cursor == seen[-1].seq
        store.stuck.clear()
        store.gate.opened.set()
        last = p.finish(first)
        told = read_turn(p.pool, first.live, queued.turn, queued.cursor)
        assert (told[-1].type, told[-1].data["reason"]) == ("done", "cancelled_by_user")
        rest = everything.read(limit=100, max_bytes=10**6)
    assert [(e.type, e.turn_id) for e in rest] == [
        ("done", queued.turn_id),
        ("llm_text", first.turn_id),
        ("done", first.turn_id),
    ]
    assert rest[-1].seq == last.seq == first.live.shown


def test_the_end_of_a_queued_turn_that_cannot_be_stored_is_told_once_and_stored_later(
    probe: Make,
) -> None:
    store, goes_on = _Stuck(), threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        stage.publish(Draft("llm_text", {"chunk": "before"}))
        assert goes_on.wait(PATIENCE)

    p = probe(script, store=store, worker_lease=4.0)
    first, queued = one_behind_another(p)
    assert queued.turn is not None
    store.away.set()
    p.pool._runner.stop(first.live, queued.turn, "cancelled_by_user")
    goes_on.set()
    assert p.finish(first).extra["error"]["code"] == "store_unavailable"
    told = read_turn(p.pool, first.live, queued.turn, queued.cursor)
    assert (told[-1].seq, told[-1].data["reason"]) == (None, "cancelled_by_user")
    store.away.clear()
    until = time.monotonic() + PATIENCE
    while p.store.active(p.key()):
        assert time.monotonic() < until, "it is never closed"
        threading.Event().wait(0.01)
    assert p.run("three").data["status"] == "completed"
    ends = [(e.turn_id, e.data["status"]) for e in p.log() if e.type in ("done", "error")]
    assert len(ends) == 3 and dict(ends)[queued.turn_id] == "cancelled"
    assert dict(ends)[first.turn_id] == "failed"


class _Slow(MemoryStore):
    """Its queue takes the message "slow" only once its gate is open."""

    def __init__(self) -> None:
        super().__init__(seed=1, log_bytes=2**22)
        self.gate = Gate()

    def enqueue(self, key: SessionKey, turn: t.Any, **options: t.Any) -> int:
        if turn.message == "slow":
            self.gate.stand()
        return super().enqueue(key, turn, **options)


def test_messages_that_are_stored_in_another_order_than_they_came_all_run(probe: Make) -> None:
    """Otherwise the first waits for the row of the second, which waits for the first."""
    store, goes_on = _Slow(), threading.Event()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        if request.message == "one":
            assert goes_on.wait(PATIENCE)

    p = probe(script, store=store)
    first = p.start("one")
    slow: list[Started] = []
    client = threading.Thread(target=lambda: slow.append(p.start("slow", on_busy="queue")))
    client.start()
    store.gate.meet()
    quick = p.start("quick", on_busy="queue")
    store.gate.opened.set()
    client.join(PATIENCE)
    goes_on.set()
    for started in (first, *slow, quick):
        assert p.finish(started).data["status"] == "completed"
