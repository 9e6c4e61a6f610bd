"""A meter in a real client: what is set aside before each call, and what is settled after it."""

from __future__ import annotations

import collections.abc as cabc
import logging
import socket
import types
import typing as t

import httpx2
import pytest
from agentao.cancellation import AgentCancelledError
from agentao.cancellation import CancellationToken

from agentao_web.agents.budget import IMAGE_TOKENS
from agentao_web.agents.budget import Meter
from agentao_web.agents.model.pool import ModelPool
from agentao_web.core.errors import BudgetExhausted
from agentao_web.core.errors import StoreUnavailable
from tests.model_server import ModelServer
from tests.model_server import cut
from tests.model_server import fail
from tests.model_server import say
from tests.model_server import vanish

LOG = logging.getLogger("tests.budget")
ASKED = [{"role": "user", "content": "x" * 400}]
#: What the scales below say of ASKED: a quarter of its characters, and the frame of a message.
PROMPT = 104


class FakePurse:
    """Remembers what was set aside, and what became of it."""

    def __init__(self, left: int = 10**9) -> None:
        self.left = left
        self.reserved: list[int] = []
        self.settled: list[int] = []

    def reserve(self, tenant: str, *, least: int, most: int, limit: int) -> t.Any:
        if self.left < least:
            raise BudgetExhausted
        self.reserved.append(min(most, self.left))
        return types.SimpleNamespace(tokens=self.reserved[-1])

    def settle(self, reserved: t.Any, used: int) -> None:
        self.settled.append(used)

    def spend(self, tenant: str, tokens: int) -> None:
        self.settled.append(tokens)


class FakeStage:
    def __init__(self) -> None:
        self.token = CancellationToken()
        self.reasons: list[str] = []

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)
        self.token.cancel(reason)

    def called(self, call: t.Any) -> None:
        pass


class Scales:
    def estimate_tokens_breakdown(self, messages: t.Any, tools: t.Any) -> dict[str, int]:
        texts = [m["content"] for m in messages if isinstance(m["content"], str)]
        return {"total": sum(map(self.count_tokens_in_text, texts))}

    def count_tokens_in_text(self, text: str) -> int:
        return len(text) // 4


class Bench:
    """A metered client on the scripted server."""

    def __init__(self, model: ModelServer, pool: ModelPool, **options: t.Any) -> None:
        self.purse = options.pop("purse", None) or FakePurse()
        limit = options.pop("limit", 10**6)
        self.name = options.pop("name", "scripted")
        url = options.pop("url", model.base_url)
        self.stage = FakeStage()
        self.meter = Meter(purse=self.purse, tokens_per_day=limit, log=LOG, **options)
        self.meter.scales = Scales()
        self.meter.attach(self.stage)
        self.client = pool.client(
            logger=LOG,
            meter=self.meter,
            api_key="k",
            base_url=url,
            model=self.name,
            max_tokens=1000,
        )

    def stream(self, **options: t.Any) -> t.Any:
        given: dict[str, t.Any] = {"messages": ASKED, "cancellation_token": self.stage.token}
        return self.client.chat_stream(**given | options)


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def bench(model: ModelServer) -> cabc.Iterator[cabc.Callable[..., Bench]]:
    pools: list[ModelPool] = []

    def make(**options: t.Any) -> Bench:
        pools.append(ModelPool(attempts=options.pop("attempts", 1)))
        return Bench(model, pools[-1], **options)

    yield make
    for pool in pools:
        pool.close()


Make = cabc.Callable[..., Bench]


def test_the_estimate_is_set_aside_and_the_usage_settled(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(say("one", "two"))
    assert b.stream().choices[0].message.content == "onetwo"
    assert (b.purse.reserved, b.purse.settled) == ([PROMPT + 1000], [12])
    assert model.requests[0].body["max_tokens"] == 1000


def test_a_call_that_does_not_stream_is_counted_as_well(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(say("summary"))
    b.client.chat(messages=ASKED, tools=None, cancellation_token=b.stage.token)
    assert (b.purse.reserved, b.purse.settled) == ([PROMPT + 1000], [11])


def test_one_that_streams_by_not_streaming_is_counted_once(bench: Make, model: ModelServer) -> None:
    b = bench(name="gemini-scripted")
    model.script(say("hi"))
    assert b.stream().choices[0].message.content == "hi"
    assert not model.requests[0].body.get("stream")
    assert (b.purse.reserved, b.purse.settled) == ([PROMPT + 1000], [11])


def test_a_refused_stream_says_nothing_and_a_refused_summary_is_cancelled(
    bench: Make, model: ModelServer
) -> None:
    b = bench(purse=FakePurse(PROMPT + 255))
    response = b.stream()
    assert b.stage.reasons == ["budget_exhausted"]
    assert response.choices[0].message.content == "" and not response.finish_reason_reported
    with pytest.raises(AgentCancelledError):
        b.client.chat(messages=ASKED, cancellation_token=b.stage.token)
    assert model.requests == [] and b.purse.settled == []


def test_what_is_left_is_what_the_model_may_say(bench: Make, model: ModelServer) -> None:
    b = bench(purse=FakePurse(PROMPT + 256))
    model.script(say("hi"))
    b.stream()
    assert model.requests[0].body["max_tokens"] == 256
    assert b.stage.reasons == []


def test_no_answer_takes_more_than_a_share_of_the_day(bench: Make, model: ModelServer) -> None:
    b = bench(limit=5000)
    model.script(say("hi"), say("hi"))
    b.stream(max_tokens=4000)
    assert model.requests[0].body["max_tokens"] == 1024
    b = bench(limit=20_000)
    b.stream(max_tokens=4000)
    assert model.requests[1].body["max_tokens"] == 2000


def test_cut_off_stays_at_the_estimate(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(cut("half"))
    b.stream()
    assert (b.purse.reserved, b.purse.settled) == ([PROMPT + 1000], [])


def test_stopped_while_it_streams_stays_at_the_estimate(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(say("one ", "two ", "three ", delay=0.01))
    b.stream(on_text_chunk=lambda chunk: b.stage.token.cancel("user"))
    assert b.purse.settled == []


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_what_a_provider_refused_is_given_back(
    bench: Make, model: ModelServer, status: int
) -> None:
    b = bench()
    model.script(fail(status))
    with pytest.raises(Exception, match="."):
        b.stream()
    assert b.purse.settled == [0]


def test_what_went_wrong_after_it_was_sent_is_not(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(vanish())
    with pytest.raises(Exception, match="."):
        b.stream()
    assert b.purse.settled == []


def test_a_provider_that_is_not_there_costs_nothing(bench: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # And nobody listens.
        b = bench(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        _fails_to_connect(b)


def _fails_to_connect(b: Bench) -> None:
    with pytest.raises(Exception, match=".") as failed:
        b.stream()
    assert isinstance(failed.value.__cause__, httpx2.ConnectError)
    assert b.purse.settled == [0]


def test_a_turn_that_was_stopped_sets_nothing_aside(bench: Make, model: ModelServer) -> None:
    b = bench()
    b.stage.token.cancel("user")
    assert b.stream().choices[0].message.content == ""
    assert b.purse.reserved == [] and model.requests == []


def test_images_have_a_weight(bench: Make, model: ModelServer) -> None:
    b = bench()
    model.script(say("hi"))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    b.stream(messages=[{"role": "user", "content": [part, part]}])
    assert b.purse.reserved == [2 * IMAGE_TOKENS + 4 + 1000]


def test_no_limit_no_reservation_and_no_estimate(bench: Make, model: ModelServer) -> None:
    b = bench(limit=None)
    b.meter.scales = t.cast(t.Any, object())
    model.script(say("hi"))
    b.stream()
    assert b.purse.reserved == b.purse.settled == []


def test_out_of_a_turn_nothing_is_counted(bench: Make, model: ModelServer) -> None:
    b = bench()
    b.meter.detach()
    model.script(say("hi"))
    b.stream()
    assert b.purse.reserved == []


def test_what_cannot_be_settled_stays_and_is_said(
    bench: Make, model: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench()

    def down(reserved: t.Any, used: int) -> None:
        raise StoreUnavailable

    b.purse.settle = down
    model.script(say("hi"))
    assert b.stream().choices[0].message.content == "hi"
    assert "the estimate stays" in caplog.text
