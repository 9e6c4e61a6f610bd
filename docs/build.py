"""Writes the tables of the docs from the code, and the examples from docs/recorded.json.

``python -m docs.build``: what stands between ``<!-- table: NAME -->`` and ``<!-- /table -->`` is
made; the rest of a page is written by hand. With ``--check`` nothing is written and a stale page is
an error. With ``--pictures`` the tests that make the pictures are run, and what they made is kept.
"""

from __future__ import annotations

import collections.abc as cabc
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import typing as t
from pathlib import Path

from flask import Flask
from flask.testing import FlaskClient

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import config
from agentao_web import demo
from agentao_web import metrics
from agentao_web import shutdown
from agentao_web import views
from agentao_web.agents import bridge
from agentao_web.core import errors
from agentao_web.core import trail
from agentao_web.core import turn
from agentao_web.testing import Gate
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import emit
from agentao_web.testing import end
from agentao_web.testing import pause
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.wire import openapi

HERE: t.Final = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

#: What each event says, in a few words. A type that is missing here stops the build.
EVENTS: t.Final = {
    "turn_queued": "The turn waits for others of its session; `position` 1 is next.",
    "turn_begin": "The turn starts; `images` is how many came with the message.",
    "llm_text": "A piece of what the model says, before tools too.",
    "thinking": "A piece of the model's reasoning; only with `AGENTAO_THINKING=1`.",
    "tool_start": "A tool is about to run; its arguments, shortened.",
    "tool_output": "A piece of what a running tool prints.",
    "tool_complete": "The tool has ended: `ok`, `error`, `cancelled`, or `denied`: it did not run.",
    "tool_result": "What the model gets to see of it, at most 4096 characters.",
    "tool_confirmation": "May this call run? `approve` it or not, until `expires_at`.",
    "ask_user_requested": "The agent asks something; `answer` it until `expires_at`.",
    "question_closed": "How a question was closed, and by whom; nobody need answer any more.",
    "usage": "Tokens of one call to the model.",
    "llm_retry": "A call to the model failed and is tried again after `delay_s` seconds.",
    "context_compressed": "Old messages were summed up to make room.",
    "agent_start": "A sub-agent starts (only with `agents=` of your own).",
    "agent_end": "A sub-agent has ended.",
    "gap": "What was after `from` and up to `to` is not there any more.",
    "done": "The end of a turn, with the last answer; see the endings.",
    "error": "The other end of a turn: it failed, and why.",
}

#: Why a turn ended without a whole answer, where the reason is no stop.
INCOMPLETE: t.Final = {
    "no_output": "The model said nothing.",
    "reasoning_only": "The model thought, and said nothing.",
    "length_truncated": "The model's own limit of tokens cut the answer.",
    "doom_loop": "The model made the same tool call over and over.",
    "max_iterations": "`AGENTAO_MAX_STEPS` calls to the model were not enough.",
    "stream_cut": "The model's answer broke off; what was read of it is the reply.",
    "context_too_long": "The turn did not fit into the model's context window, not even after old "
    "messages were summed up; it left the history as it was.",
    "content_filtered": "The provider's content filter stopped the answer, or refused the message.",
    "cancelled": "The agent ended itself.",
    "incomplete": "Any other reason of Agentao's.",
}

#: Why a turn was stopped.
STOPS: t.Final = {
    "cancelled_by_user": "`POST /chat/<sid>/cancel`.",
    "client_gone": "The reader left and did not come back within `AGENTAO_DISCONNECT_GRACE`.",
    "interrupted": 'Another message came with `"on_busy": "interrupt"`.',
    "store_unavailable": "The store took no sign of life of this worker for too long.",
    "worker_lost": "The worker that accepted it is gone; another one closed it.",
    "session_deleted": "`DELETE /session/<sid>`.",
    "server_shutdown": "The worker is leaving.",
    "turn_timeout": "`AGENTAO_TURN_TIMEOUT`, or the request's own `timeout`.",
    "waiting_timeout": "It waited for people longer than `AGENTAO_MAX_WAITING_TIME`.",
    "event_limit": "More events than one turn may have (about a million).",
    "tool_limit": "More tool calls than `AGENTAO_MAX_TOOL_CALLS`.",
    "token_limit": "More tokens than `AGENTAO_MAX_TURN_TOKENS`.",
    "text_limit": "The model sent more than `AGENTAO_TURN_TEXT` bytes.",
    "budget_exhausted": "The tenant's tokens of the day are spent (`AGENTAO_TOKENS_PER_DAY`).",
}


#: What a log line says of whose work it tells.
LOG_FIELDS: t.Final = {
    "request_id": "The `X-Request-Id` of the request, or of the one that started the turn.",
    "session_id": "The session, as its client named it.",
    "turn_id": "The turn.",
    "tenant": "Whose session it is.",
    "user": "The user of that tenant; empty if the token names none.",
}


def main(arguments: cabc.Sequence[str] = ()) -> int:
    """Write every page's tables, or with ``--check`` say which pages are stale."""
    check = "--check" in arguments
    if "--pictures" in arguments:
        command = [sys.executable, "-m", "pytest", "tests/page/test_pictures.py"]
        environ = {**os.environ, "AGENTAO_WEB_PICTURES": "docs"}
        return subprocess.run(command, cwd=HERE.parent, env=environ).returncode
    stale = {page: text for page, text in built().items() if page.read_text("utf-8") != text}
    for page, text in stale.items():
        if check:
            print(f"docs/{page.name} is stale: run python -m docs.build")
        else:
            page.write_text(text, "utf-8")
            print(f"docs/{page.name} written")
    return 1 if check and stale else 0


def built() -> dict[Path, str]:
    """Page -> the text it should have."""
    tables = {name: make() for name, make in TABLES.items()}
    pages = {page: page.read_text("utf-8") for page in sorted(HERE.glob("*.md"))}
    return {
        page: _TABLE.sub(lambda m: f"{m[1]}{tables[m[2]]}{m[3]}", text)
        for page, text in pages.items()
    }


def _table(head: cabc.Sequence[str], rows: cabc.Iterable[cabc.Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(names: cabc.Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _told(names: cabc.Collection[str], told: dict[str, str], what: str) -> dict[str, str]:
    """*told* in the order of *names*; RuntimeError unless they are the same."""
    if set(names) != set(told):
        raise RuntimeError(f"docs/build.py: {what}: {sorted(set(names) ^ set(told))}")
    return {name: told[name] for name in names}


# -- the tables --------------------------------------------------------------------------------


def settings() -> str:
    rows = [(f"`{n}`", default and f"`{default}`", help_) for n, default, help_ in config.table()]
    return _table(("Name", "Default", "What it is"), rows)


_OPEN_TO: t.Final = {"bearer": "whose session it is", "metrics": "who has `AGENTAO_METRICS_TOKEN`"}


def routes() -> str:
    rows = []
    for route in views.ROUTES:
        answers = _code(str(code) for code in sorted(route.responses))
        who = "everyone" if route.public else _OPEN_TO[route.scheme]
        rows.append((f"`{route.method} {route.path}`", route.summary, who, answers))
    return _table(("Route", "Does", "Open to", "Answers"), rows)


def events() -> str:
    told = _told(openapi.EVENT_TYPES, EVENTS, "events without a sentence")
    fields = sample()
    rows = []
    for name, sentence in told.items():
        data, top = fields[name]
        rows.append((f"`{name}`", _code(data), _code(top), sentence))
    return _table(("Type", "In `data`", "Beside it", "Says"), rows)


@functools.cache
def recorded() -> dict[str, t.Any]:
    """What docs/record.py saw."""
    return t.cast(dict[str, t.Any], json.loads((HERE / "recorded.json").read_text("utf-8")))


def _shown(values: cabc.Iterable[t.Any]) -> str:
    lines = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values]
    return "".join(["```json\n", *(f"{line}\n" for line in lines), "```\n"])


def examples() -> str:
    told = _told(openapi.EVENT_TYPES, EVENTS, "events without a sentence")
    seen = recorded()["events"]
    parts = []
    for name, sentence in told.items():
        found = [event for event in seen.values() if event["type"] == name]
        if not found:
            raise RuntimeError(f"docs/recorded.json has no {name}: run python -m docs.record")
        parts.append(f"\n`{name}`: {sentence}\n\n{_shown(found)}")
    return "".join(parts) + "\n"


def answer(name: str) -> cabc.Callable[[], str]:
    return lambda: _shown([recorded()["answers"][name]])


def http_errors() -> str:
    rows = []
    for cls in sorted(errors.WebError.__subclasses__(), key=lambda cls: (cls.status, cls.code)):
        wait = "" if cls.retry_after is None else str(cls.retry_after)
        rows.append((str(cls.status), f"`{cls.code}`", cls.message, wait))
    return _table(("Status", "Code", "Says", "`Retry-After`"), rows)


def failures() -> str:
    rows = [(f"`{code}`", sentence) for code, sentence in errors.FAILURES.items()]
    return _table(("Code", "Says"), rows)


def stops() -> str:
    told = _told(turn.STOP_REASONS, STOPS, "stop reasons without a sentence")
    rows = [(f"`{r}`", f"`{turn.STOP_REASONS[r]}`", why) for r, why in told.items()]
    return _table(("Reason", "Status", "Because"), rows)


def incomplete() -> str:
    ours = {"stream_cut", "content_filtered", "context_too_long", "cancelled", "incomplete"}
    told = _told(sorted(bridge._INCOMPLETE | ours), INCOMPLETE, "reasons without a sentence")
    return _table(("Reason", "Because"), [(f"`{r}`", why) for r, why in told.items()])


def demo_commands() -> str:
    return "".join(f"- `{command.usage}`\n" for command in demo.COMMANDS)


def metric_table() -> str:
    rows = []
    for metric in metrics.METRICS.values():
        labels = (*metric.labels, "(tenant)") if metric.per_tenant else metric.labels
        rows.append((f"`{metric.name}`", metric.kind, _code(labels), metric.help))
    return _table(("Name", "Kind", "Labels", "Is"), rows)


def log_fields() -> str:
    told = _told(trail.FIELDS, LOG_FIELDS, "log fields without a sentence")
    return _table(("Field", "Is"), [(f"`{name}`", what) for name, what in told.items()])


def states() -> str:
    rows = [
        (f"`{state}`", ", ".join(f"{step} → `{to}`" for step, to in row.items()) or "the end")
        for state, row in turn.TRANSITIONS.items()
    ]
    return _table(("State", "Steps"), rows)


TABLES: t.Final[dict[str, cabc.Callable[[], str]]] = {
    "demo": demo_commands,
    "settings": settings,
    "routes": routes,
    "events": events,
    "http-errors": http_errors,
    "failures": failures,
    "stops": stops,
    "incomplete": incomplete,
    "states": states,
    "metrics": metric_table,
    "log-fields": log_fields,
    "examples": examples,
    **{f"answer-{name}": answer(name) for name in recorded()["answers"]},
}


# -- what events look like, from a run ---------------------------------------------------------

#: More than any event may carry; what of it comes out is the allow-list.
_ALL: t.Final[dict[str, t.Any]] = {
    **dict.fromkeys(("chunk", "text", "content", "reason", "secret", "disk_path", "error"), "x"),
    **dict.fromkeys(("tool", "call_id", "agent", "task", "child_task_id", "state", "type"), "x"),
    **dict.fromkeys(("status", "final_text", "error_message"), "x"),
    **dict.fromkeys(("retry", "max_retries", "delay_s", "max_turns", "turns", "tool_calls"), 1),
    **dict.fromkeys(("pre_msgs", "post_msgs", "pre_est_tokens", "post_est_tokens"), 1),
    **dict.fromkeys(("tokens", "duration_ms", *bridge._USAGE), 1),
    "args": {},
}
_COMMON: t.Final = {"seq", "turn_id", "type", "data", "ts"}
_JSON: t.Final = {"Accept": "application/json", "Sec-Fetch-Site": "same-origin"}

Fields = dict[str, tuple[list[str], list[str]]]


def sample() -> Fields:
    """Type -> (the keys in its data, the keys beside it), from one session that has them all."""
    gate = Gate()
    agents = scripted(
        say("hi"),
        by={
            "wait": [pause(gate)],
            "every": [
                *(emit(kind, **_ALL) for kind in bridge._SHAPES),
                ask("write_file"),
                ask_user("Which?", "this", "that"),
            ],
            "fail": [end("llm_error")],
        },
    )
    app = Flask("docs")
    with tempfile.TemporaryDirectory() as root:
        app.config.update(AGENTAO_ROOT=root, AGENTAO_THINKING=True)
        app.config.update(AGENTAO_QUESTION_TIMEOUT=0.2)
        AgentaoWeb(authenticate=lambda request: Principal("docs"), agents=agents).init_app(app)
        try:
            return _seen(_session(app.test_client(), gate))
        finally:
            shutdown(app)


def _session(client: FlaskClient, gate: Gate) -> list[dict[str, t.Any]]:
    def post(message: str, **fields: str) -> None:
        answer = client.post("/chat/s", json={"message": message, **fields}, headers=_JSON)
        assert answer.status_code == 202, answer.text

    post("wait")
    gate.reached()
    for message in ("every", "fail"):
        post(message, on_busy="queue")
    gate.open()
    events: list[dict[str, t.Any]] = []
    after = 2**53 - 1  # Ahead of any log: the answer begins with a gap.
    while not events or sum(e["type"] in ("done", "error") for e in events) < 3:
        page = client.get(f"/chat/s/events?after={after}&wait=20", headers=_JSON).json
        assert page is not None and page["events"], "the turns do not end"
        events += page["events"]
        after = page["cursor"]
    return events


def _seen(events: cabc.Iterable[dict[str, t.Any]]) -> Fields:
    found: Fields = {}
    for event in events:
        data, top = found.setdefault(event["type"], ([], []))
        data += [key for key in event["data"] if key not in data]
        top += [key for key in event if key not in _COMMON and key not in top]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
