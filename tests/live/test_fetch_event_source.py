"""@microsoft/fetch-event-source, a client many pages use: cut anywhere, it gets all, and once."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import typing as t
import uuid

import pytest

from tests.client.conftest import counted
from tests.client.conftest import log_of
from tests.client.conftest import merged
from tests.client.proxy import Fault
from tests.client.proxy import Proxy
from tests.live.harness import Server
from tests.live.harness import token
from tests.live.node import run

pytestmark = pytest.mark.live

#: Where the answer breaks off, as what has come through before. Not here: between the end of the
#: id's line and the blank line behind it, where this package has the id and not yet the event.
WORD, END = rb'"type":"llm_text"', rb'"type":"done"'
CUTS = {
    "in the first word": WORD,
    "behind its JSON": WORD + rb"[^\n]*\}\}?(?=\n)",
    "behind its line": WORD + rb"[^\n]*\n",
    "in its id": WORD + rb"[^\n]*\nid: \d{5}",
    "behind it": WORD + rb"[^\n]*\nid: \d+\n\n",
    "in the third word": rb"(?:" + WORD + rb"[\s\S]*?){3}",
    "in the end": END,
    "behind the line of the end": END + rb"[^\n]*\n",
    "behind the end": END + rb"[^\n]*\nid: \d+\n\n",
}
#: These come back with no number at all, so that only a key tells that it is the same turn.
EARLY = {
    "before the first event": rb"\r\n\r\n",
    "in the first event": rb'"type":"turn_begin"',
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> cabc.Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, "-w", "2", AGENTAO_DEMO="1", AGENTAO_HEARTBEAT="0.2") as running:
        yield running


def asked(url: str, sid: str, *, key: bool = True, **more: t.Any) -> dict[str, t.Any]:
    headers = {"Authorization": f"Bearer {token()}"}
    if key:
        headers["Idempotency-Key"] = str(uuid.uuid4())
    body = {"message": "take 1 seconds"}
    return {"url": f"{url}/chat/{sid}", "headers": headers, "body": body, **more}


def check(server: Server, sid: str, seen: dict[str, t.Any]) -> None:
    """Nothing is missing, nothing came twice, and the turn ran once."""
    assert seen["refused"] is None
    events = [json.loads(message["data"]) for message in seen["messages"]]
    for event, message in zip(events, seen["messages"], strict=True):
        assert message["id"] == str(event["seq"])
    assert merged(events) == log_of(server, sid)
    assert counted(server, sid) == 1


def test_wherever_it_is_cut_no_event_is_lost_or_doubled(server: Server) -> None:
    faults = [
        (f"{key}-{n}", key, behind)
        for key in (True, False)
        for n, behind in enumerate(CUTS.values())
    ]
    faults += [(f"early-{n}", True, behind) for n, behind in enumerate(EARLY.values())]
    with contextlib.ExitStack() as stack:
        jobs = []
        for sid, key, behind in faults:
            cuts = [Fault("cut", behind=behind), Fault("reset", behind=WORD)]
            proxy = stack.enter_context(Proxy(server.port, cuts))
            jobs.append(asked(proxy.url, sid, key=key))
        found = run("resume.mjs", jobs)
    for (sid, _, behind), seen in zip(faults, found, strict=True):
        assert seen["opened"] > 1, f"{behind!r} was never cut"
        check(server, sid, seen)


def test_a_tab_that_was_hidden_goes_on_where_it_was(server: Server) -> None:
    """The package lets go of the connection of a hidden tab, and POSTs again when it is back."""
    (seen,) = run("resume.mjs", [asked(server.url, "tab", key=False, hide=3)])
    assert seen["opened"] == 2
    check(server, "tab", seen)


def test_silence_is_no_message(server: Server) -> None:
    """It takes each blank line for a message, so keep-alives must not have one."""
    with server.stream("heard", "take 1 seconds") as stream:
        stream.until("done")
        assert stream.comments > 1, "or this test is about nothing"
    (seen,) = run("resume.mjs", [asked(server.url, "silent")])
    assert seen["opened"] == 1
    check(server, "silent", seen)
