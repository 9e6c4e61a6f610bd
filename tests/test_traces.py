"""Spans: one for each turn, linked to its request's, with its calls and tools below it."""

from __future__ import annotations

import collections.abc as cabc
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from flask import Flask
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web import traces
from agentao_web.testing import crash
from agentao_web.testing import emit
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.testing import use

HEADERS = {"Accept": "application/json", "Prefer": "wait=50", "Sec-Fetch-Site": "same-origin"}
SECRET = "the plans for the island"

Run = cabc.Callable[[str], tuple[dict[str, t.Any], dict[str, t.Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cabc.Iterator[Run]:
    """Runs a turn below a span of the request's; how it ended, and the finished spans by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    ours = traces.Spans
    monkeypatch.setattr(traces, "Spans", lambda: ours(provider))
    app = Flask("shop")
    app.config.update(AGENTAO_ROOT=tmp_path)
    called = {"duration_ms": 250, "prompt_tokens": 7, "completion_tokens": 3, "status": "ok"}
    agents = scripted(
        emit("llm_call_started", model="small"),
        emit("llm_call_completed", **called),
        use("read_file", result=SECRET, path=SECRET),
        say(SECRET),
        by={"crash": [crash(ValueError(SECRET))]},
    )
    AgentaoWeb(authenticate=lambda r: Principal("acme"), agents=agents).init_app(app)

    def one(message: str) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        with provider.get_tracer("host").start_as_current_span("POST"):
            headers = {**HEADERS, "X-Request-Id": "r-1"}
            response = app.test_client().post("/chat/s", json={"message": message}, headers=headers)
        assert response.json is not None
        return response.json, {span.name: span for span in exporter.get_finished_spans()}

    yield one
    shutdown(app, grace=2)
    provider.shutdown()


def test_a_turn_is_a_trace_of_its_own_with_a_link_to_its_request(run: Run) -> None:
    body, spans = run(SECRET)
    turn, request = spans["invoke_agent"], spans["POST"]
    assert turn.parent is None
    assert [link.context.span_id for link in turn.links] == [request.context.span_id]
    told = dict(turn.attributes)
    assert told.pop("agentao.turn.queued_ms") >= 0
    assert told == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.conversation.id": "s",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "agentao.turn.id": body["turn_id"],
        "agentao.turn.status": "completed",
        "agentao.request.id": "r-1",
    }


def test_calls_to_the_model_and_tools_are_below_it(run: Run) -> None:
    _, spans = run("hi")
    turn, chat, tool = spans["invoke_agent"], spans["chat small"], spans["execute_tool read_file"]
    for child in (chat, tool):
        assert child.parent.span_id == turn.context.span_id
    assert chat.end_time - chat.start_time == pytest.approx(250_000_000, rel=0.01)
    assert chat.attributes["gen_ai.usage.input_tokens"] == 7
    assert tool.attributes["gen_ai.tool.name"] == "read_file"
    assert tool.attributes["agentao.tool.status"] == "ok"


def test_a_turn_that_fails_is_an_error(run: Run) -> None:
    _, spans = run("crash")
    turn = spans["invoke_agent"]
    assert turn.status.status_code is trace.StatusCode.ERROR
    assert turn.attributes["agentao.turn.reason"] == "internal_error"


@pytest.mark.parametrize("message", [SECRET, "crash"])
def test_no_text_goes_into_a_span(run: Run, message: str) -> None:
    _, spans = run(message)
    for span in spans.values():
        assert SECRET not in span.to_json()


def test_without_the_library_nothing_is_imported_and_all_works(tmp_path: Path) -> None:
    code = """
import sys
class Without:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
from agentao_web import create_app, shutdown, traces
assert not traces.is_installed()
shutdown(create_app())
"""
    env = {
        "AGENTAO_ROOT": str(tmp_path),
        "AGENTAO_DEMO": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
