"""Between the client and a real server something cuts, delays, truncates and holds back."""

from __future__ import annotations

import itertools
import signal
import typing as t
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from agentao_web import client as api
from tests.client.conftest import client_of
from tests.client.conftest import counted
from tests.client.conftest import log_of
from tests.client.conftest import merged
from tests.client.proxy import Fault
from tests.client.proxy import Proxy
from tests.live.harness import Server
from tests.live.harness import model_env
from tests.live.harness import token
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

_names = itertools.count()
_faults = st.one_of(
    st.builds(Fault, st.sampled_from(["cut", "reset"]), st.integers(0, 4000)),
    st.builds(Fault, st.just("cut_request"), st.integers(0, 500)),
    st.builds(Fault, st.sampled_from(["lose_answer", "slow"])),
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(_faults, max_size=6), st.booleans())
def test_whatever_is_cut_the_client_sees_the_log(
    server: Server, faults: list[Fault], stream: bool
) -> None:
    sid = f"cut-{next(_names)}"
    with Proxy(server.port, faults) as proxy, client_of(proxy.url, stream=stream) as client:
        turn = client.chat(sid, "count to 12")
        events = list(turn)
        assert merged(events) == log_of(server, sid)
        assert turn.reply is not None and turn.reply.text.endswith("11, 12.")
        assert counted(server, sid) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["cut", "reset", "lose_answer", "cut_request"])
def test_every_connection_suffers(server: Server, sid: str, kind: t.Any, stream: bool) -> None:
    """Also the answers to questions; each is asked once, and the message is taken once."""
    faults = [Fault(kind, 200 + 400 * n) for n in range(5)]
    asked: list[str] = []

    def yes(question: api.Question) -> bool:
        asked.append(question.question_id)
        proxy.faults += [Fault("lose_answer"), Fault("cut", 30)]
        return True

    with Proxy(server.port, faults) as proxy, client_of(proxy.url, stream=stream) as client:
        events = list(client.chat(sid, f"write {sid}.txt: Ship it.", on_question=yes))
        assert merged(events) == log_of(server, sid)
        assert [e.outcome for e in events if isinstance(e, api.QuestionOver)] == ["approved"]
        assert len(asked) == 1 and counted(server, sid) == 1
        proxy.faults += [Fault("lose_answer"), Fault("cut", 30)]
        assert client.rename(sid, "x") == "x" and client.delete(sid)


def test_a_lost_answer_to_the_message_does_not_send_it_twice(server: Server, sid: str) -> None:
    faults = [Fault("lose_answer"), Fault("cut", 100), Fault("reset", 0)]
    with Proxy(server.port, faults) as proxy, client_of(proxy.url) as client:
        events = list(client.chat(sid, "count to 3"))
        assert proxy.connections >= 4
        assert merged(events) == log_of(server, sid) and counted(server, sid) == 1


def test_a_connection_that_never_answers_is_not_waited_for(server: Server, sid: str) -> None:
    with Proxy(server.port, [Fault("mute")]) as proxy, client_of(proxy.url, timeout=8) as client:
        assert client.ask(sid, "say hi").text == "hi"
        assert client._ways.stream, "once may be a bad moment"


@pytest.mark.long
def test_behind_a_proxy_that_holds_streams_back_it_polls(server: Server, sid: str) -> None:
    faults = [Fault("buffer")] * 500
    with Proxy(server.port, faults) as proxy, client_of(proxy.url, timeout=5) as client:
        for n, message in enumerate(["take 9 seconds"] * 2):
            events = list(client.chat(f"{sid}-{n}", message))
            assert merged(events) == log_of(server, f"{sid}-{n}")
            assert any(isinstance(e, api.Text) for e in events)
        assert not client._ways.stream, "twice is a proxy"
        assert client.ask(sid, "say hi").text == "hi"


def test_a_server_that_is_away_is_given_up(server: Server, sid: str) -> None:
    with Proxy(server.port, [Fault("reset")] * 500) as proxy:
        with client_of(proxy.url, patience=1.0) as client:
            with pytest.raises(api.ConnectionLost, match="Is the server running"):
                client.ask(sid, "say hi")
            with pytest.raises(api.ConnectionLost):
                client.session(sid)
    with client_of(proxy.url, patience=0.5) as client, pytest.raises(api.ConnectionLost):
        client.ask(sid, "say hi")


def test_what_was_pruned_is_told_and_the_ending_is_found(tmp_path: Path) -> None:
    env = {"AGENTAO_DEMO": "1", "AGENTAO_LOG_BYTES": "4096"}
    with Server(tmp_path, **env) as small, client_of(small.url) as client:
        turn = client.chat("a", "count to 5", on_disconnect="continue")
        first = next(iter(turn))
        with client_of(small.url) as other:
            for n in range(3):
                other.ask("a", f"what did I say {n} {'x' * 2000}", on_busy="queue")
        rest = list(turn)
        assert isinstance(rest[0], api.Gap)
        assert turn.reply is not None and turn.reply.text == "1, 2, 3, 4, 5." and turn.reply.ok
        assert first.turn_id == turn.id == turn.reply.turn_id


def test_a_turn_deleted_while_nobody_listened_is_over(server: Server, sid: str) -> None:
    with client_of(server.url) as client:
        turn = client.chat(sid, "take 60 seconds")
        for event in turn:
            if isinstance(event, api.Text):
                break
        client.delete(sid)
        (end,) = turn
        assert isinstance(end, api.Done) and end.reason == "session_deleted"


def test_without_a_place_for_streams_it_polls(tmp_path: Path) -> None:
    """Four threads: three may stream."""
    with (
        Server(tmp_path, "--threads", "4", AGENTAO_DEMO="1") as narrow,
        client_of(narrow.url) as client,
    ):
        hold = [iter(client.chat(f"long-{n}", "take 60 seconds")) for n in range(3)]
        for reading in hold:
            next(reading)
        with client_of(narrow.url) as other:
            turn = other.chat("short", "count to 9")
            assert merged(turn) == log_of(narrow, "short")
            assert turn._polls and other._ways.stream, "there may be a place the next time"
        for n, reading in enumerate(hold):
            client.cancel(f"long-{n}")
            assert list(reading)[-1].data["status"] == "cancelled"


def test_a_stream_that_falls_silent_is_left(server: Server, sid: str) -> None:
    with Proxy(server.port, [Fault("stall", 900)]) as proxy:
        with client_of(proxy.url, silence=6) as client:
            turn = client.chat(sid, "count to 20")
            assert merged(turn) == log_of(server, sid)
            assert proxy.connections >= 2 and not turn._polls


def test_a_killed_worker_is_told_and_the_client_goes_on(tmp_path: Path) -> None:

    with ModelServer() as model:
        env = model_env(model, AGENTAO_WORKER_LEASE="5")
        with Server(tmp_path, "--workers", "2", **env) as two, client_of(two.url) as client:
            told = []
            for event in client.chat("a", "hang_after half"):
                told.append(event)
                if isinstance(event, api.Text):
                    # The one that runs it keeps the model's connection; both is simpler.
                    for pid in two.workers():
                        two.signal(signal.SIGKILL, pid)
            end = told[-1]
            assert isinstance(end, api.Failed) and end.error["code"] == "worker_lost"
            assert client.ask("a", "say after").text == "after"
            # Its last moment was told, and perhaps not kept.
            kept = log_of(two, "a", end.turn_id)
            assert [e for e in merged(told) if e[0] != "llm_text" or e in kept] == kept


def test_a_reload_in_the_middle_of_questions_and_answers(tmp_path: Path) -> None:

    with Server(tmp_path, AGENTAO_DEMO="1") as one, client_of(one.url) as client:
        for n in range(3):
            one.signal(signal.SIGHUP)
            assert client.ask(f"s{n}", f"say {n}").text == str(n)


def test_a_token_that_expires_in_the_middle(server: Server, sid: str) -> None:
    made: list[str] = []

    def fresh() -> str:
        made.append(token())
        return made[-1]

    with Proxy(server.port, [Fault("cut", 3000)]) as proxy:
        with client_of(proxy.url, token=fresh) as client:
            seen = []
            for event in client.chat(sid, "count to 40"):
                seen.append(event)
                if len(seen) == 2:
                    client._api._bearer = "expired"
            assert merged(seen) == log_of(server, sid)
    assert len(made) == 2


def test_a_url_that_is_none(server: Server) -> None:
    for url in ("127.0.0.1:8000", "http://[::1", "http://", "ftp://a"):
        with pytest.raises(ValueError, match="no http:// or https:// address"):
            api.Client(url)
    with pytest.raises(ValueError, match="printable ASCII"):
        api.Client(server.url, token="a\nb")
    with client_of(server.url + "/elsewhere") as client:
        with pytest.raises(api.NotFound, match="with its prefix"):
            client.ask("a", "hi")
