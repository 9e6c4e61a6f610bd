"""The state table, the table of endings, and the clocks of a turn."""

from __future__ import annotations

import pytest

from agentao_web.core.errors import FAILURES
from agentao_web.core.turn import ENDED
from agentao_web.core.turn import STOP_REASONS
from agentao_web.core.turn import TRANSITIONS
from agentao_web.core.turn import IllegalStep
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import Turn
from agentao_web.core.turn import TurnRequest
from agentao_web.core.turn import settle
from agentao_web.core.turn import terminal


def make(deadline: float = 60.0) -> Turn:
    return Turn("t1", TurnRequest("hi"), created=0.0, deadline=deadline)


STEPS = {step for row in TRANSITIONS.values() for step in row}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("step", sorted(STEPS))
def test_a_step_is_in_the_table_or_raises_and_changes_nothing(state: State, step: str) -> None:
    turn = make()
    turn.state = state
    if step in TRANSITIONS[state]:
        turn.step(step, 1.0)
        assert turn.state is TRANSITIONS[state][step]
    else:
        with pytest.raises(IllegalStep):
            turn.step(step, 1.0)
        assert turn.state is state
        assert turn.began is None and turn.ended is None


def test_every_state_can_be_reached_and_ended_ones_are_final() -> None:
    reached = {State.QUEUED} | {s for row in TRANSITIONS.values() for s in row.values()}
    assert reached == set(State)
    assert ENDED == {
        State.COMPLETED,
        State.INCOMPLETE,
        State.CANCELLED,
        State.TIMED_OUT,
        State.FAILED,
    }


def test_the_first_stop_reason_wins() -> None:
    turn = make()
    turn.step("begin", 1.0)
    assert turn.stop("cancelled_by_user", 2.0)
    assert not turn.stop("turn_timeout", 3.0)
    assert (turn.stop_reason, turn.stopped, turn.state) == ("cancelled_by_user", 2.0, "stopping")


def test_an_ended_turn_cannot_be_stopped() -> None:
    turn = make()
    turn.step("begin", 1.0)
    turn.end(Outcome(State.COMPLETED), 2.0)
    assert not turn.stop("cancelled_by_user", 3.0)
    assert turn.stop_reason is None


def test_an_unknown_stop_reason_is_refused() -> None:
    with pytest.raises(KeyError):
        make().stop("because", 1.0)


def test_a_queued_turn_that_is_stopped_ends_without_having_begun() -> None:
    turn = make()
    turn.stop("cancelled_by_user", 1.0)
    turn.end(Outcome(State.CANCELLED, "cancelled_by_user"), 2.0)
    assert (turn.state, turn.began) == (State.CANCELLED, None)


def test_running_time_does_not_count_waiting_for_people() -> None:
    turn = make()
    turn.step("begin", 10.0)
    turn.step("ask", 15.0)
    assert turn.ran_for(100.0) == 5.0
    assert turn.waited_for(100.0) == 85.0
    turn.step("answer", 100.0)
    assert turn.ran_for(103.0) == 8.0
    assert turn.awake_for(103.0) == 18.0


@pytest.mark.parametrize("reason", STOP_REASONS)
def test_a_stop_reason_wins_over_what_the_agent_made_of_it(reason: str) -> None:
    for came_out in (State.COMPLETED, State.INCOMPLETE, State.FAILED):
        settled = settle(Outcome(came_out, "length_truncated", "text"), reason)
        assert (settled.status, settled.reason) == (STOP_REASONS[reason], reason)


def test_without_a_stop_reason_the_outcome_stands() -> None:
    outcome = Outcome(State.INCOMPLETE, "length_truncated", "text")
    assert settle(outcome, None) is outcome


def test_done_has_the_reply_on_top_as_the_template_has_it() -> None:
    outcome = Outcome(State.COMPLETED, None, "hello", {"prompt_tokens": 3}, 2)
    draft = terminal(outcome, duration_ms=12)
    assert (draft.type, draft.extra) == ("done", {"reply": "hello"})
    assert draft.data == {
        "status": "completed",
        "reason": None,
        "usage": {"prompt_tokens": 3},
        "tool_count": 2,
        "duration_ms": 12,
    }


@pytest.mark.parametrize("code", FAILURES)
def test_a_failed_turn_ends_with_an_error_object(code: str) -> None:
    draft = terminal(
        Outcome(State.FAILED, code, "partial", details={"error_id": "x"}), duration_ms=0
    )
    assert draft.type == "error"
    assert draft.extra == {
        "error": {"code": code, "message": FAILURES[code], "details": {"error_id": "x"}}
    }
