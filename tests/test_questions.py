"""Questions on one worker and on several: the row decides, and every wait ends."""

from __future__ import annotations

import collections.abc as cabc
import logging
import random
import threading
import typing as t

import pytest

from agentao_web.core.errors import InvalidRequest
from agentao_web.core.errors import NotFound
from agentao_web.core.errors import QuestionClosed
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.errors import WebError
from agentao_web.core.log import Event
from agentao_web.core.question import Question
from agentao_web.core.question import Reply
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.readers import Reader
from agentao_web.runner import Stage
from agentao_web.sessions import Started
from tests import test_together as together
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Gate
from tests.pool_fakes import Probe
from tests.pool_fakes import read_until
from tests.pool_fakes import say_ok
from tests.test_together import Crew
from tests.test_together import elsewhere

stores, crew = together.stores, together.crew

APPROVAL: dict[str, t.Any] = {
    "call_id": "1",
    "tool": "pay",
    "description": "Pays.",
    "args": {"sum": 5},
    "remember": ["turn", "session"],
}
WORDS: dict[str, t.Any] = {
    "question": "Which?",
    "header": None,
    "options": [],
    "multiple": False,
    "allow_custom": True,
}
YES, NO = Reply(approve=True), Reply(approve=False)


class Asker:
    """A script that asks *times*, and knows how each question was closed."""

    def __init__(self, times: int = 1) -> None:
        self.closed: list[Question] = []
        self.raised: list[BaseException] = []
        self._times = times

    def __call__(self, agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        for _ in range(self._times):
            try:
                self.closed.append(stage.ask("tool_confirmation", APPROVAL))
            except BaseException as error:
                self.raised.append(error)
                raise

    @property
    def outcomes(self) -> list[tuple[str | None, str | None]]:
        return [(question.outcome, question.by) for question in self.closed]


@pytest.fixture
def probe() -> cabc.Iterator[cabc.Callable[..., Probe]]:
    made: list[Probe] = []

    def make(script: t.Any = say_ok, **caps: t.Any) -> Probe:
        made.append(Probe(script, **caps))
        return made[-1]

    yield make
    for one in made:
        one.pool.drain(grace=2)


def asked(probe: Probe, started: Started, nth: int = 0) -> str:
    """The id of the turn's question, once it is open."""
    until = started.live.clock() + PATIENCE
    cursor = started.cursor
    with Reader(started.live, probe.store, cursor, turn=started.turn) as reader:
        ids: list[str] = []
        while True:
            ids += [
                e.data["question_id"]
                for e in reader.read(limit=100, max_bytes=10**6)
                if e.type in ("tool_confirmation", "ask_user_requested")
            ]
            if len(ids) > nth:
                return ids[nth]
            assert not reader.told and started.live.clock() < until, "nothing was asked"
            reader.wait(until)


def final(probe: Probe, started: Started) -> Event:
    """How a turn ended, read on any worker, whatever it waits for meanwhile."""
    until = probe.pool.clock() + PATIENCE
    probe.pool.read_here(started.live)
    reader = Reader(
        started.live, probe.store, started.cursor, turn=started.turn, turn_id=started.turn_id
    )
    with reader:
        while not reader.told:
            assert probe.pool.clock() < until, "the turn did not end"
            if not reader.read(limit=100, max_bytes=10**6) and not reader.told:
                reader.wait(until)
    assert reader.final is not None
    return reader.final


def answer(probe: Probe, question_id: str, reply: Reply = YES, sid: str = "s") -> Question:
    return probe.pool.answer(probe.key(sid), question_id, reply, by="ann")


def closings(probe: Probe, sid: str = "s") -> list[tuple[str, str]]:
    """How each question was closed, as the log tells it."""
    log = probe.log(sid)
    return [(e.data["outcome"], e.data["by"]) for e in log if e.type == "question_closed"]


def rows(probe: Probe, *ids: str) -> list[str | None]:
    found = [probe.store.question(probe.key(), question_id) for question_id in ids]
    return [question.outcome for question in found]


def well_told(events: cabc.Sequence[Event]) -> None:
    """Numbers rise; each question is closed once, after it was asked and before its turn's end."""
    seqs = [e.seq for e in events]
    assert seqs == sorted(set(seqs), key=lambda n: n or 0)
    place: dict[str, int] = {}
    shut: dict[str, int] = {}
    ends = {e.turn_id: n for n, e in enumerate(events) if e.type in ("done", "error")}
    for n, event in enumerate(events):
        if event.type in ("tool_confirmation", "ask_user_requested"):
            assert place.setdefault(event.data["question_id"], n) == n
        elif event.type == "question_closed":
            assert shut.setdefault(event.data["question_id"], n) == n, "closed twice"
            assert place[event.data["question_id"]] < n < ends[event.turn_id]
    assert set(place) == set(shut), "a question was left open"


# -- answering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False], ids=["same worker", "another worker"])
@pytest.mark.parametrize(("reply", "outcome"), [(YES, "approved"), (NO, "denied")])
def test_a_question_is_state_and_answered_from_any_worker(
    crew: Crew, here: bool, reply: Reply, outcome: str
) -> None:
    script = Asker()
    one, two = crew(script, say_ok)
    started = one.start()
    question_id = asked(one, started)
    (row,) = two.store.questions(two.key())
    event = read_until(one.pool, started, "tool_confirmation")
    assert (row.id, dict(row.data), row.turn_id) == (question_id, event.data, started.turn_id)
    assert event.data["expires_at"] == row.expires > one.pool.clock()
    assert one.pool.find(one.key()).state() == "waiting"
    answered = answer(one if here else two, question_id, reply)
    assert (answered.outcome, answered.by) == (outcome, "ann")
    assert final(one, started).data["status"] == "completed"
    assert script.outcomes == [(outcome, "ann")]
    assert two.store.questions(two.key()) == []
    assert closings(two) == [(outcome, "ann")]
    well_told(two.log())


def test_an_answer_elsewhere_is_seen_without_the_slow_look(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.questions._LOOK", 10 * PATIENCE)
    one, two = crew(Asker(), say_ok)
    started = one.start()
    answer(two, asked(one, started))
    assert final(one, started).data["status"] == "completed"


def test_an_answer_whose_signal_got_lost_is_seen_all_the_same(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.questions._LOOK", 0.05)
    one, two = crew(Asker(), say_ok)
    started = one.start()
    question_id = asked(one, started)

    def away(*args: t.Any, **more: t.Any) -> t.NoReturn:
        raise StoreUnavailable

    two.store.signal = away  # type: ignore[method-assign]
    assert answer(two, question_id).outcome == "approved"
    assert final(one, started).data["status"] == "completed"


def test_the_second_answer_is_refused_and_a_repeated_one_is_not(crew: Crew) -> None:
    script = Asker()
    one, two = crew(script, say_ok)
    started = one.start()
    question_id = asked(one, started)
    answer(one, question_id)
    for worker in (one, two):
        assert answer(worker, question_id).outcome == "approved"
        for other in (NO, Reply(True, remember="session")):
            with pytest.raises(QuestionClosed) as refused:
                answer(worker, question_id, other)
            assert refused.value.details == {
                "question_id": question_id,
                "outcome": "approved",
                "by": "ann",
            }
    final(one, started)
    assert answer(two, question_id).outcome == "approved", "also when the turn is over"
    assert script.outcomes == [("approved", "ann")]


def test_of_two_answers_at_the_same_moment_one_wins(crew: Crew) -> None:
    script = Asker()
    one, two = crew(script, say_ok)
    started = one.start()
    question_id = asked(one, started)
    barrier = threading.Barrier(8)
    won: list[str | None] = []
    lost: list[t.Any] = []

    def reply(worker: Probe, said: Reply) -> None:
        barrier.wait(PATIENCE)
        try:
            won.append(answer(worker, question_id, said).outcome)
        except QuestionClosed as error:
            lost.append(error.details["outcome"])

    pairs = [(worker, said) for worker in (one, two) for said in (YES, NO)] * 2
    threads = [threading.Thread(target=reply, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    final(one, started)
    (outcome,) = set(won) | set(lost)
    assert (len(won), len(lost)) == (4, 4), "who said the same is told yes"
    assert script.outcomes == [(outcome, "ann")]
    assert closings(one) == [(outcome, "ann")]


def test_an_unknown_question_and_someone_elses_are_the_same(crew: Crew) -> None:
    (one,) = crew(Asker())
    started = one.start()
    question_id = asked(one, started)
    strangers = [one.key(tenant="other"), one.key(user="bob"), one.key("another")]
    for key in strangers:
        with pytest.raises(NotFound):
            one.pool.answer(key, question_id, YES, by="bob")
    with pytest.raises(NotFound):
        answer(one, "no-such-question")
    with pytest.raises(InvalidRequest):
        answer(one, question_id, Reply(answer="yes"))
    assert rows(one, question_id) == [None], "nothing was closed"
    one.pool.cancel(one.key())
    final(one, started)


# -- nobody answers ----------------------------------------------------------------------------


def test_no_answer_in_time_means_no_and_the_turn_goes_on(crew: Crew) -> None:
    script = Asker(times=2)
    one, _ = crew(script, say_ok, question_timeout=0.2)
    started = one.start()
    assert final(one, started).data["status"] == "completed"
    assert script.outcomes == [("expired", "timeout")] * 2
    assert closings(one) == [("expired", "timeout")] * 2
    well_told(one.log())
    with pytest.raises(QuestionClosed) as refused:
        answer(one, script.closed[0].id)
    assert refused.value.details["outcome"] == "expired"


def test_at_the_moment_of_expiry_the_row_decides(probe: cabc.Callable[..., Probe]) -> None:
    """The owner finds its question expired, but somebody answered just before it says so."""
    script = Asker()
    one = probe(script, question_timeout=0.2)
    good, expiring = one.store.settle, Gate()

    def settle(key: t.Any, question_id: str, outcome: str, **more: t.Any) -> Question:
        if outcome == "expired":
            expiring.stand()
        return t.cast(Question, good(key, question_id, outcome, **more))

    one.store.settle = settle
    started = one.start()
    expiring.meet()
    assert answer(one, asked(one, started)).outcome == "approved"
    expiring.opened.set()
    final(one, started)
    assert script.outcomes == [("approved", "ann")]
    assert closings(one) == [("approved", "ann")]


def test_an_answer_too_late_by_a_moment_is_told_so(probe: cabc.Callable[..., Probe]) -> None:
    script = Asker()
    one = probe(script, question_timeout=5.0)
    good, answering = one.store.settle, Gate()

    def settle(key: t.Any, question_id: str, outcome: str, **more: t.Any) -> Question:
        if outcome == "approved":
            answering.stand()
        return t.cast(Question, good(key, question_id, outcome, **more))

    one.store.settle = settle
    started = one.start()
    question_id = asked(one, started)
    refused: list[WebError] = []

    def late() -> None:
        try:
            answer(one, question_id)
        except QuestionClosed as error:
            refused.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    answering.meet()
    final(one, started)
    answering.opened.set()
    thread.join(PATIENCE)
    assert refused[0].details["outcome"] == "expired"
    assert script.outcomes == [("expired", "timeout")]


# -- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False], ids=["same worker", "another worker"])
def test_cancel_closes_it_at_once(crew: Crew, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentao_web.questions._LOOK", 10 * PATIENCE)
    script = Asker(times=2)
    one, two = crew(script, say_ok)
    started = one.start()
    question_id = asked(one, started)
    (one if here else two).pool.cancel(one.key())
    assert final(one, started).data["reason"] == "cancelled_by_user"
    assert script.outcomes[0] == ("cancelled", "cancelled_by_user")
    assert script.outcomes[1][0] == "cancelled", "and nothing is asked any more"
    assert closings(one) == [("cancelled", "cancelled_by_user")]
    assert rows(two, question_id) == ["cancelled"]
    well_told(one.log())
    with pytest.raises(QuestionClosed):
        answer(two, question_id)


def test_what_was_approved_in_the_moment_of_the_stop_is_not_done(
    probe: cabc.Callable[..., Probe],
) -> None:
    script = Asker()
    one = probe(script)
    good, looked = one.store.question, Gate()
    looked.opened.set()

    def question(key: t.Any, question_id: str) -> t.Any:
        found = good(key, question_id)
        if found is not None and found.outcome is not None:
            # Its thread has seen the approval; the stop comes before it acts on it.
            one.pool._runner.stop_all(started.live, "cancelled_by_user")
        return found

    started = one.start()
    question_id = asked(one, started)
    one.store.question = question
    answer(one, question_id)
    assert final(one, started).data["reason"] == "cancelled_by_user"
    assert script.outcomes == [("cancelled", "cancelled_by_user")]
    assert closings(one) == [("approved", "ann")], "the row, which the person was told"


@pytest.mark.parametrize("here", [True, False], ids=["same worker", "another worker"])
def test_delete_while_it_waits(crew: Crew, here: bool) -> None:
    script = Asker()
    one, two = crew(script, say_ok)
    started = one.start()
    question_id = asked(one, started)
    assert (one if here else two).pool.delete(one.key(), timeout=PATIENCE)
    assert final(one, started).data["reason"] == "session_deleted"
    assert script.outcomes[0][0] == "cancelled"
    assert one.store.question(one.key(), question_id) is None
    for worker in (one, two):
        with pytest.raises(NotFound):
            answer(worker, question_id)


def test_a_worker_that_leaves_closes_it_at_once(
    probe: cabc.Callable[..., Probe],
) -> None:
    script = Asker()
    one = probe(script, drain_grace=1000.0, stop_grace=900.0)
    started = one.start()
    asked(one, started)
    one.store.close = lambda: None  # The log is read below.
    thread = threading.Thread(target=one.pool.drain)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it does not wait for its grace"
    assert script.outcomes == [("cancelled", "server_shutdown")]
    last = one.log()[-1]
    assert (last.data["status"], last.data["reason"]) == ("cancelled", "server_shutdown")
    assert closings(one) == [("cancelled", "server_shutdown")]


def test_a_question_asked_while_the_worker_leaves_is_closed_too(
    probe: cabc.Callable[..., Probe],
) -> None:
    gate, script = Gate(), Asker()

    def late(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()
        script(agent, request, stage)

    one = probe(late, drain_grace=1000.0, stop_grace=900.0)
    one.start()
    gate.meet()
    one.store.close = lambda: None
    thread = threading.Thread(target=one.pool.drain)
    thread.start()
    while not one.pool.draining:
        threading.Event().wait(0.001)
    gate.opened.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [outcome for outcome, _ in script.outcomes] == ["cancelled"]
    assert one.log()[-1].data["reason"] == "server_shutdown"
    well_told(one.log())


def test_a_question_of_a_turn_that_is_stopping_is_not_asked(
    probe: cabc.Callable[..., Probe],
) -> None:
    gate, script = Gate(), Asker()

    def stubborn(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        gate.stand()
        script(agent, request, stage)

    one = probe(stubborn)
    started = one.start()
    gate.meet()
    one.pool.cancel(one.key())
    gate.opened.set()
    assert one.finish(started).data["reason"] == "cancelled_by_user"
    assert script.outcomes == [("cancelled", "cancelled_by_user")]
    assert not [e for e in one.log() if e.type in ("tool_confirmation", "question_closed")]


def test_a_turn_stopped_while_the_row_is_written_leaves_nothing_open(
    probe: cabc.Callable[..., Probe],
) -> None:
    script = Asker()
    one = probe(script)
    good, asking = one.store.ask, Gate()

    def ask(claim: t.Any, question: Question) -> None:
        good(claim, question)
        asking.stand()

    one.store.ask = ask
    started = one.start()
    asking.meet()
    one.pool.cancel(one.key())
    asking.opened.set()
    assert one.finish(started).data["reason"] == "cancelled_by_user"
    assert script.outcomes == [("cancelled", "cancelled_by_user")]
    assert rows(one, script.closed[0].id) == ["cancelled"]
    well_told(one.log())


def test_a_thread_that_does_not_come_back_from_its_question_is_given_up(
    probe: cabc.Callable[..., Probe], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentao_web.audit")
    script = Asker()
    one = probe(script, stop_grace=0.05)
    good, settling = one.store.settle, Gate()

    def settle(*args: t.Any, **more: t.Any) -> Question:
        settling.stand()
        return t.cast(Question, good(*args, **more))

    one.store.settle = settle
    started = one.start()
    question_id = asked(one, started)
    one.pool.cancel(one.key())
    settling.meet()
    last = one.finish(started)
    assert last.data["details"] == {"abandoned": True}
    assert closings(one) == [("cancelled", "turn_ended")]
    assert rows(one, question_id) == ["cancelled"]
    well_told(one.log())
    settling.opened.set()
    until = one.pool.clock() + PATIENCE
    while one.pool.counts()["given_up"]:
        assert one.pool.clock() < until
        threading.Event().wait(0.01)
    assert script.outcomes[0][0] == "cancelled"
    assert closings(one) == [("cancelled", "turn_ended")], "said once"
    assert len(audit(caplog)) == 1


# -- workers that die --------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, YES], ids=["open", "answered"])
def test_a_dead_workers_questions_are_closed(
    crew: Crew, said: Reply | None, caplog: pytest.LogCaptureFixture
) -> None:
    """In the rows and in the log; answered, but never heard: as the person was told."""
    caplog.set_level(logging.INFO, "agentao_web.audit")
    gate, good = Gate(), Asker()

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        (say_ok if request.message == "after" else good)(agent, request, stage)

    one, two = crew(script, script, worker_lease=4.5)
    lost = one.start()
    question_id = asked(one, lost)
    two.pool.find(two.key())
    until_logged(two, "tool_confirmation")
    # It hears nothing any more, and nobody hears it.
    mute(one, gate)
    together.die(one)
    if said is not None:
        answer(two, question_id, said)
    assert final(two, elsewhere(two, lost)).extra["error"]["code"] == "worker_lost"
    outcome = ("approved", "ann") if said else ("cancelled", "worker_lost")
    assert closings(two) == [outcome]
    assert rows(two, question_id) == [outcome[0]]
    assert two.store.questions(two.key()) == []
    well_told(two.log())
    assert two.run("after").data["status"] == "completed"
    gate.opened.set()
    assert final(one, lost).extra["error"]["code"] == "worker_lost", "fenced"
    assert closings(two) == [outcome], "said once"
    if said is None:
        assert [line.split(":")[0] for line in audit(caplog)] == ["cancelled"]


def mute(probe: Probe, gate: Gate) -> None:
    """The thread that waits for the answer does not get to the store before *gate* opens."""
    good = probe.store.question

    def question(*args: t.Any) -> t.Any:
        if threading.current_thread().name == "agentao-turn":
            gate.opened.wait(PATIENCE)
        return good(*args)

    probe.store.question = question
    probe.pool._peers.tail = lambda: None  # type: ignore[method-assign]


def until_logged(probe: Probe, kind: str) -> None:
    until = probe.pool.clock() + PATIENCE
    while not any(e.type == kind for e in probe.log()):
        assert probe.pool.clock() < until, f"no {kind} in the store"
        threading.Event().wait(0.01)


def audit(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "agentao_web.audit"]


def test_what_a_dead_worker_left_is_closed_though_the_store_stumbles(crew: Crew) -> None:
    """Taken over it is ours, and our heart beats: nobody else would find it any more."""
    one, two = crew(Asker(), say_ok, worker_lease=4.5)
    lost = one.start()
    asked(one, lost)
    two.pool.find(two.key())
    until_logged(two, "tool_confirmation")
    mute(one, gate := Gate())
    together.die(one)
    good, failed = two.store.finish, threading.Event()

    def finish(*args: t.Any) -> None:
        if failed.is_set():
            return good(*args)
        failed.set()
        raise StoreUnavailable

    two.store.finish = finish  # type: ignore[method-assign]
    assert final(two, elsewhere(two, lost)).extra["error"]["code"] == "worker_lost"
    well_told(two.log())
    gate.opened.set()
    final(one, lost)


# -- several at once ---------------------------------------------------------------------------


def asks_at_once(count: int, closed: list[Question]) -> t.Any:
    """Like Agentao with a batch of read-only calls: each on a thread of its own."""

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        def one(n: int) -> None:
            closed.append(stage.ask("ask_user_requested", {**WORDS, "question": f"{n}?"}))

        threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

    return script


def test_several_are_open_at_once_and_the_turn_goes_on_after_the_last(crew: Crew) -> None:
    closed: list[Question] = []
    gate = Gate()
    batch = asks_at_once(3, closed)

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        batch(agent, request, stage)
        gate.stand()

    one, two = crew(script, say_ok)
    started = one.start()
    assert started.turn is not None
    asked(one, started, nth=2)
    found = {q.data["question"]: q for q in two.store.questions(two.key())}
    assert set(found) == {"0?", "1?", "2?"}
    for n, left in ((1, 2), (0, 1), (2, 0)):
        assert started.turn.turn.state is State.WAITING
        worker = one if n else two
        answer(worker, found[f"{n}?"].id, Reply(answer=f"said {n}"))
        until = one.pool.clock() + PATIENCE
        while len(started.turn.questions) > left:
            assert one.pool.clock() < until
            threading.Event().wait(0.01)
    gate.meet()
    assert started.turn.turn.state is State.RUNNING
    gate.opened.set()
    final(one, started)
    assert {q.data["question"]: q.answer["answer"] for q in closed} == {
        f"{n}?": f"said {n}" for n in range(3)
    }
    well_told(one.log())


def test_cancel_closes_all_of_them(probe: cabc.Callable[..., Probe]) -> None:
    closed: list[Question] = []
    one = probe(asks_at_once(5, closed))
    started = one.start()
    asked(one, started, nth=4)
    one.pool.cancel(one.key())
    one.finish(started)
    assert [q.outcome for q in closed] == ["cancelled"] * 5
    assert closings(one) == [("cancelled", "cancelled_by_user")] * 5
    well_told(one.log())


def test_an_interrupt_closes_it_and_the_next_turn_asks_anew(
    probe: cabc.Callable[..., Probe],
) -> None:
    script = Asker()
    one = probe(script)
    first = one.start("one")
    old = asked(one, first)
    second = one.start("two", on_busy="interrupt")
    assert one.finish(first).data["reason"] == "interrupted"
    new = asked(one, second)
    with pytest.raises(QuestionClosed):
        answer(one, old)
    answer(one, new)
    assert one.finish(second).data["status"] == "completed"
    assert script.outcomes == [("cancelled", "interrupted"), ("approved", "ann")]


# -- time --------------------------------------------------------------------------------------


def test_waiting_is_no_running_time(probe: cabc.Callable[..., Probe]) -> None:
    one = probe(Asker(), turn_timeout=60.0, max_waiting_time=10_000.0)
    started = one.start()
    question_id = asked(one, started)
    one.pool.tick(one.pool.clock() + 9_000)
    assert started.turn is not None and started.turn.turn.stop_reason is None
    answer(one, question_id)
    assert one.finish(started).data["status"] == "completed"


def test_a_turn_waits_for_people_only_so_long(probe: cabc.Callable[..., Probe]) -> None:
    script = Asker()
    one = probe(script, max_waiting_time=60.0, stop_grace=1000.0)
    started = one.start()
    asked(one, started)
    one.pool.tick(one.pool.clock() + 61)
    last = one.finish(started)
    assert (last.data["status"], last.data["reason"]) == ("timed_out", "waiting_timeout")
    assert closings(one) == [("cancelled", "waiting_timeout")]


def test_the_disconnect_clock_stands_still_while_it_waits(
    probe: cabc.Callable[..., Probe],
) -> None:
    gate, script = Gate(), Asker()

    def asks(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        script(agent, request, stage)
        stopped = threading.Event()
        stage.on_stop(lambda reason: stopped.set())
        gate.arrived.release()
        assert stopped.wait(PATIENCE)

    one = probe(asks, disconnect_grace=10.0, stop_grace=1000.0)
    started = one.start(on_disconnect="cancel")
    question_id = asked(one, started)
    with Reader(started.live, one.store, started.cursor, turn=started.turn) as reader:
        reader.left = True
    one.pool.tick(one.pool.clock() + 500)
    assert started.turn is not None and started.turn.turn.stop_reason is None
    answer(one, question_id)
    gate.meet()
    one.pool.tick(one.pool.clock() + 11)
    assert one.finish(started).data["reason"] == "client_gone"


# -- the store is away -------------------------------------------------------------------------


def away(*args: t.Any, **more: t.Any) -> t.NoReturn:
    raise StoreUnavailable


@pytest.mark.parametrize("committed", [False, True])
def test_what_cannot_be_asked_fails_the_turn(
    probe: cabc.Callable[..., Probe], committed: bool
) -> None:
    """Also if the row got through and only the word of it was lost: it is not left open."""
    script = Asker()
    one = probe(script)
    good = one.store.ask

    def ask(*args: t.Any) -> None:
        if committed:
            good(*args)
        raise StoreUnavailable

    one.store.ask = ask
    last = one.run()
    assert last.extra["error"]["code"] == "store_unavailable"
    assert isinstance(script.raised[0], StoreUnavailable)
    assert one.store.questions(one.key()) == []
    assert not closings(one)
    well_told(one.log())


def test_a_store_that_is_away_while_it_waits_is_asked_again(
    probe: cabc.Callable[..., Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.questions._LOOK", 0.01)
    monkeypatch.setattr("agentao_web.questions._RETRY", 0.01)
    script, tried = Asker(), threading.Semaphore(0)
    one = probe(script)
    good = one.store.question

    def down(*args: t.Any) -> t.NoReturn:
        tried.release()
        raise StoreUnavailable

    started = one.start()
    question_id = asked(one, started)
    one.store.question = down
    for _ in range(3):
        assert tried.acquire(timeout=PATIENCE)
    with pytest.raises(StoreUnavailable):
        answer(one, question_id)
    one.store.question = good
    assert rows(one, question_id) == [None]
    answer(one, question_id)
    assert one.finish(started).data["status"] == "completed"
    assert script.outcomes == [("approved", "ann")]


def test_a_store_that_is_away_is_not_asked_without_a_pause(
    probe: cabc.Callable[..., Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to look while the store is away it looked again, and again, as fast as it could."""
    monkeypatch.setattr("agentao_web.questions._RETRY", 10 * PATIENCE)
    one = probe(Asker())
    good, tries = one.store.question, threading.Semaphore(0)

    def down(*args: t.Any) -> t.NoReturn:
        tries.release()
        raise StoreUnavailable

    started = one.start()
    question_id = asked(one, started)
    one.store.question = down
    for _ in range(2):
        started.live.look_again()
        assert tries.acquire(timeout=PATIENCE)
    # Each look is one try, and there may have been one before; without a pause there are thousands.
    assert sum(tries.acquire(timeout=0.05) for _ in range(20)) < 5
    one.store.question = good
    answer(one, question_id)
    assert one.finish(started).data["status"] == "completed"


def test_an_expiry_that_cannot_be_written_is_no_yes(
    probe: cabc.Callable[..., Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentao_web.questions._RETRY", 0.01)
    script, tried = Asker(), threading.Semaphore(0)
    one = probe(script, question_timeout=0.05)
    good = one.store.settle

    def down(*args: t.Any, **more: t.Any) -> t.NoReturn:
        tried.release()
        raise StoreUnavailable

    one.store.settle = down
    started = one.start()
    for _ in range(3):
        assert tried.acquire(timeout=PATIENCE)
    assert not script.closed
    one.store.settle = good
    one.finish(started)
    assert script.outcomes == [("expired", "timeout")]


def test_a_stop_ends_it_without_the_store(probe: cabc.Callable[..., Probe]) -> None:
    script = Asker()
    one = probe(script)
    started = one.start()
    question_id = asked(one, started)
    good, one.store.settle = one.store.settle, away
    one.pool.cancel(one.key())
    assert one.finish(started).data["reason"] == "cancelled_by_user"
    one.store.settle = good
    assert script.outcomes == [("cancelled", "cancelled_by_user")]
    assert rows(one, question_id) == ["cancelled"], "by the terminal transaction"
    well_told(one.log())


def test_a_claim_that_was_lost_ends_the_wait(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentao_web.questions._LOOK", 10 * PATIENCE)
    script = Asker()
    one, two = crew(script, say_ok)
    started = one.start()
    asked(one, started)
    assert started.turn is not None and started.turn.claim is not None
    started.live.lost(started.turn.claim)  # What the writer says when it finds out.
    last = final(one, started)
    assert last.extra["error"]["code"] == "worker_lost"
    assert script.outcomes[0][0] == "cancelled"


# -- who reads ---------------------------------------------------------------------------------


def test_no_thread_waits_for_a_person_also_not_on_another_worker(crew: Crew) -> None:
    one, two = crew(Asker(), say_ok)
    started = one.start()
    question_id = asked(one, started)
    far = elsewhere(two, started)
    two.pool.read_here(far.live)
    for worker, told in ((one, started), (two, far)):
        reader = Reader(told.live, worker.store, told.cursor, turn=told.turn, turn_id=told.turn_id)
        assert together.ending(reader, wait=10 * PATIENCE) is None
        assert reader.waits_for_people and reader.leased
    answer(two, question_id)
    assert final(one, started).data["status"] == "completed"
    assert final(two, far).data["status"] == "completed"


# -- the audit ---------------------------------------------------------------------------------


def test_each_decision_is_one_line(
    probe: cabc.Callable[..., Probe], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentao_web.audit")

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        for _ in range(3):
            stage.ask("tool_confirmation", APPROVAL)
        stage.approved(APPROVAL, "an approval for this session")
        stage.ask("ask_user_requested", WORDS)

    one = probe(script)
    started = one.start()
    replies = (YES, NO, Reply(True, remember="turn"), Reply(answer="a secret"))
    for n, reply in enumerate(replies):
        question_id = asked(one, started, nth=n)
        answer(one, question_id, reply)
        with pytest.raises((QuestionClosed, InvalidRequest)):
            answer(one, question_id, Reply(answer="another"))
    one.finish(started)
    lines = audit(caplog)
    assert [line.partition(";")[0] for line in lines] == [
        "approved: 'pay' by 'ann'",
        "denied: 'pay' by 'ann'",
        "approved: 'pay' by 'ann'",
        "approved: 'pay' by 'an approval for this session'",
        "answered: 'ask_user' by 'ann'",
    ]
    assert lines[2].endswith("remembered for this turn")
    for line in lines:
        assert f"tenant 'acme', user 'ann', session 's', turn {started.turn_id}" in line
        assert "a secret" not in line


# -- anything in any order ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_in_any_order_each_question_is_closed_once_as_its_row_says(crew: Crew, seed: int) -> None:
    chance = random.Random(seed)
    closed: list[Question] = []
    batch = asks_at_once(3, closed)

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        batch(agent, request, stage)
        closed.append(stage.ask("tool_confirmation", APPROVAL))

    one, two = crew(script, say_ok, question_timeout=chance.choice([0.02, 0.1, 300.0]))
    started = one.start()
    told: dict[str, set[str]] = {}
    end = chance.choice(["answer", "answer", "cancel", "cancel elsewhere"])

    def people(seed: int) -> None:
        mine = random.Random(seed)
        while started.turn is not None and started.turn.final is None:
            worker = mine.choice([one, two])
            for question in worker.store.questions(worker.key()):
                said = YES if question.kind == "tool_confirmation" else Reply(answer=f"{seed}")
                try:
                    row = answer(worker, question.id, said)
                except QuestionClosed as error:
                    row = Question(question.id, "", "", {}, 0.0, error.details["outcome"])
                told.setdefault(question.id, set()).add(str(row.outcome))
            if end.startswith("cancel") and mine.random() < 0.1:
                (one if end == "cancel" else two).pool.cancel(one.key())
            threading.Event().wait(mine.random() * 0.01)

    crowd = [threading.Thread(target=people, args=(seed * 10 + n,)) for n in range(3)]
    for person in crowd:
        person.start()
    last = final(one, started)
    for person in crowd:
        person.join(PATIENCE)
    assert last.data["status"] in ("completed", "cancelled")
    log = one.log()
    well_told(log)
    shut = {e.data["question_id"]: e.data["outcome"] for e in log if e.type == "question_closed"}
    for question_id, outcomes in told.items():
        row = one.store.question(one.key(), question_id)
        assert row is not None
        assert outcomes == {row.outcome}, "everybody was told the same"
        # One answered before its event was written may never be shown: the turn was stopped.
        assert shut.get(question_id, row.outcome) == row.outcome
    assert one.store.questions(one.key()) == []
