"""A client and a real server, with nothing in the way."""

from __future__ import annotations

import base64
import typing as t
from pathlib import Path

import pytest

from agentao_web import client as api
from agentao_web.client import Approve
from agentao_web.client import Client
from tests.client.conftest import client_of
from tests.client.conftest import log_of
from tests.client.conftest import merged
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.harness import token

pytestmark = pytest.mark.live

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
POLLS = [True, False]


@pytest.mark.parametrize("stream", POLLS)
def test_a_turn_from_its_first_event_to_its_last(server: Server, sid: str, stream: bool) -> None:
    with client_of(server.url, stream=stream) as client:
        client.ask(sid, "say before")
        turn = client.chat(sid, "count to 9")
        events = list(turn)
        assert merged(events) == log_of(server, sid, turn.id)
        assert isinstance(events[0], api.TurnBegin) and events[0].message == "count to 9"
        text = "".join(event.chunk for event in events if isinstance(event, api.Text))
        end = events[-1]
        assert isinstance(end, api.Done) and end.reply == text == "1, 2, 3, 4, 5, 6, 7, 8, 9."
        assert turn.reply is not None and turn.reply.ok
        assert (turn.reply.text, turn.reply.cursor) == (text, end.seq)
        assert list(turn) == [], "it is over"


@pytest.mark.parametrize("stream", POLLS)
def test_ask_gives_the_reply(server: Server, sid: str, stream: bool) -> None:
    with client_of(server.url, stream=stream) as client:
        reply = client.ask(sid, "say hello there")
        assert (reply.text, reply.status, reply.reason) == ("hello there", "completed", None)
        assert reply.usage["completion_tokens"] > 0 and reply.duration > 0 and reply.turn_id


def test_a_turn_that_fails_is_an_event_of_chat_and_an_error_of_ask(
    client: Client, sid: str
) -> None:
    events = list(client.chat(sid, "fail"))
    assert isinstance(events[-1], api.Failed) and events[-1].error["code"] == "llm_unavailable"
    with pytest.raises(api.TurnFailed, match="could not be reached") as caught:
        client.ask(sid, "fail")
    assert caught.value.code == "llm_unavailable" and caught.value.reply.status == "failed"


def test_tools_and_approvals(client: Client, sid: str) -> None:
    asked: list[api.Question] = []

    def yes(question: api.Question) -> bool:
        asked.append(question)
        return True

    events = list(client.chat(sid, f"write {sid}.txt: Ship it.", on_question=yes))
    (question,) = asked
    assert isinstance(question, api.ToolConfirmation)
    assert question.tool == "write_file" and question.args["content"] == "Ship it."
    (over,) = [event for event in events if isinstance(event, api.QuestionOver)]
    assert over.outcome == "approved"
    (complete,) = [event for event in events if isinstance(event, api.ToolComplete)]
    assert complete.status == "ok"
    assert isinstance(events[-1], api.Done) and "wrote" in events[-1].reply


def test_an_approval_that_is_remembered_is_not_asked_again(client: Client, sid: str) -> None:
    asked: list[str] = []

    def always(question: api.Question) -> Approve:
        asked.append(question.question_id)
        return Approve(remember="session")

    for name in ("a", "b"):
        client.ask(sid, f"write {sid}-{name}.txt: x", on_question=always)
    assert len(asked) == 1


def test_no_is_no(client: Client, sid: str) -> None:
    events = list(client.chat(sid, f"write {sid}.txt: x", on_question=lambda question: False))
    assert [e.status for e in events if isinstance(e, api.ToolComplete)] == ["denied"]


def test_a_question_in_words(client: Client, sid: str) -> None:
    def first(question: api.Question) -> str:
        assert isinstance(question, api.AskUser)
        assert question.options == ["red", "blue"]
        return question.options[0]

    reply = client.ask(sid, "ask me Which colour? red or blue", on_question=first)
    assert "red" in reply.text


def test_a_question_may_be_left_to_somebody_else(server: Server, client: Client, sid: str) -> None:
    with client_of(server.url) as other:
        outcomes = []
        for event in client.chat(sid, f"write {sid}.txt: x", on_question=lambda question: None):
            if isinstance(event, api.Question):
                (open_one,) = other.session(sid)["questions"]
                assert open_one["question_id"] == event.question_id
                outcomes.append(other.answer(sid, event.question_id, True))
        assert outcomes == ["approved"]
        with pytest.raises(api.QuestionClosed):
            other.answer(sid, open_one["question_id"], False)


def test_an_answer_that_comes_too_late_is_no_error(
    server: Server, client: Client, sid: str
) -> None:
    with client_of(server.url) as other:

        def slow(question: api.Question) -> bool:
            other.answer(sid, question.question_id, False)
            return True

        events = list(client.chat(sid, f"write {sid}.txt: x", on_question=slow))
    assert [e.outcome for e in events if isinstance(e, api.QuestionOver)] == ["denied"]


def test_leaving_the_loop_closes_the_connection_and_another_loop_goes_on(
    server: Server, client: Client, sid: str
) -> None:
    turn = client.chat(sid, "count to 20")
    seen = []
    for event in turn:
        seen.append(event)
        if isinstance(event, api.Text):
            break
    # The connection was given up: a half-read one is of no use to anybody.
    assert client._http._transport._pool.connections == []  # type: ignore[attr-defined]
    seen += turn
    assert merged(seen) == log_of(server, sid)
    assert turn.reply is not None and turn.reply.status == "completed"


def test_cancel(client: Client, sid: str) -> None:
    turn = client.chat(sid, "take 60 seconds")
    for event in turn:
        if isinstance(event, api.Text):
            assert turn.cancel() == 1
    assert turn.reply is not None
    assert (turn.reply.status, turn.reply.reason) == ("cancelled", "cancelled_by_user")
    assert client.cancel(sid) == 0


def test_a_session_that_is_deleted_ends_the_turn(server: Server, client: Client, sid: str) -> None:
    turn = client.chat(sid, "take 60 seconds")
    for event in turn:
        if isinstance(event, api.Text):
            assert client.delete(sid)
    assert turn.reply is not None and turn.reply.reason in ("session_deleted", "cancelled_by_user")
    with pytest.raises(api.NotFound, match="the session's name"):
        client.session(sid)
    assert client.delete(sid), "harmless twice"


def test_sessions_and_messages_by_pages(client: Client, sid: str) -> None:
    for n in range(3):
        client.ask(sid, f"say {n}")
    entries = list(client.messages(sid))
    assert [e["content"] for e in entries] == ["say 0", "0", "say 1", "1", "say 2", "2"]
    assert list(client.messages(sid, after=entries[3]["id"])) == entries[4:]
    assert list(client.messages(sid, last=2)) == entries[4:]
    assert client.rename(sid, "  A   name ") == "A name"
    (mine,) = [s for s in client.sessions() if s["session_id"] == sid]
    assert mine["title"] == "A name" and mine["turns"] == 3
    assert client.session(sid)["state"] == "idle"


@pytest.mark.parametrize("stream", POLLS)
def test_the_log_of_a_session(server: Server, sid: str, stream: bool) -> None:
    with client_of(server.url, stream=stream) as client:
        client.ask(sid, "say one")
        cursor = client.ask(sid, "say two").cursor
        client.ask(sid, "say three")
        assert merged(client.events(sid)) == log_of(server, sid)
        ends = [e.reply for e in client.events(sid, after=cursor) if isinstance(e, api.Done)]
        assert ends == ["three"]
        follower = client.events(sid, after=cursor, follow=True)
        assert next(e for e in follower if isinstance(e, api.Done)).reply == "three"
        with client_of(server.url) as other:
            other.ask(sid, "say four")
        assert next(e for e in follower if isinstance(e, api.Done)).reply == "four"


def test_images(client: Client, sid: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    events = list(client.chat(sid, "say nice", images=[PNG, path]))
    assert isinstance(events[0], api.TurnBegin) and events[0].images == 2
    with pytest.raises(ValueError, match="no png, jpeg, gif or webp"):
        client.chat(sid, "hm", images=[b"hello"])


def test_a_busy_session(client: Client, sid: str) -> None:
    turn = client.chat(sid, "take 60 seconds")
    for event in turn:
        if isinstance(event, api.Text):
            with pytest.raises(api.SessionBusy, match="on_busy"):
                client.ask(sid, "say too")
            queued = client.chat(sid, "say too", on_busy="interrupt")
            assert queued.result().text == "too"
    assert turn.reply is not None and turn.reply.reason == "interrupted"


def test_the_servers_refusals_are_told_as_they_are(client: Client, sid: str) -> None:
    with pytest.raises(api.InvalidRequest) as blank:
        client.ask(sid, " ")
    assert blank.value.details == {"field": "message"} and blank.value.status == 400
    with pytest.raises(api.TooLarge) as large:
        client.ask(sid, "x" * 2**20)
    assert large.value.details["limit"] < 2**20
    with pytest.raises(ValueError, match="no session id"):
        client.ask("../sessions", "hi")


def test_the_right_token_is_needed(server: Server, sid: str) -> None:
    for wrong in ("nonsense", lambda: "nonsense", None):
        with client_of(server.url, token=wrong) as client:
            with pytest.raises(api.Unauthorized, match="token="):
                client.ask(sid, "say hi")


def test_a_token_that_expires_is_asked_for_anew(server: Server, sid: str) -> None:
    made: list[str] = []

    def fresh() -> str:
        made.append("expired" if not made else token())
        return made[-1]

    with client_of(server.url, token=fresh) as client:
        assert client.ask(sid, "say hi").text == "hi"
        assert client.ask(sid, "say hi").text == "hi"
    assert len(made) == 2


def test_a_turn_left_alone_is_stopped_or_goes_on_as_its_client_wishes(
    server: Server, client: Client, sid: str
) -> None:
    for event in client.chat(sid, "count to 30", on_disconnect="continue"):
        if isinstance(event, api.Text):
            break

    def ended() -> t.Any:
        return client.session(sid)["state"] == "idle"

    eventually(ended, "it goes on to its end")
    assert list(client.messages(sid))[-1]["turn_status"] == "completed"
