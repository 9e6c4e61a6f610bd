"""However a log is read, while it grows or after the fact, here or on another worker: it is one."""

from __future__ import annotations

import itertools
import json
import random
import threading
import typing as t
from pathlib import Path

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.turn import TurnRequest
from agentao_web.readers import Reader
from agentao_web.readers import poll
from agentao_web.readers import stream
from agentao_web.runner import Stage
from agentao_web.store.sql import SqlStore
from agentao_web.wire import native
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Probe

TEXT = st.builds(lambda chunk: Draft("llm_text", {"chunk": chunk}), st.text(max_size=8))
TOOL = st.builds(
    lambda n: Draft("tool_start", {"call_id": f"{n}", "tool": "t", "args": {"n": n}}),
    st.integers(0, 3),
)
OUTPUT = st.builds(
    lambda n, chunk: Draft("tool_output", {"call_id": f"{n}", "tool": "t", "chunk": chunk}),
    st.integers(0, 1),
    st.text(max_size=5),
)
SCRIPTS = st.lists(st.lists(st.one_of(TEXT, TOOL, OUTPUT), max_size=30), min_size=1, max_size=4)

Seen = list[tuple[str | None, str, t.Any]]


def normal(events: list[Event]) -> Seen:
    """Events with consecutive text of one kind joined, whatever way it was cut."""
    flat = [(e.turn_id, e.type, e.data.get("call_id"), e) for e in events]
    out: Seen = []
    for (turn, kind, call), group in itertools.groupby(flat, key=lambda row: row[:3]):
        found = [row[3] for row in group]
        if kind in ("llm_text", "tool_output"):
            out.append((turn, kind, (call, "".join(e.data["chunk"] for e in found))))
        else:
            out += [(turn, kind, (e.seq, dict(e.data), dict(e.extra))) for e in found]
    return out


def by_poll(probe: Probe, chance: random.Random, last: threading.Event) -> Seen:
    """Long-polls with random limits, each from the cursor of the one before."""
    seen: list[Event] = []
    cursor = 0
    while True:
        over = last.is_set()
        reader = Reader(probe.pool.find(probe.key()), probe.store, cursor)
        probe.pool.read_here(reader.live)
        limit, wait = chance.randint(1, 9), 0 if over else 0.05
        found = poll(reader, wait=wait, limit=limit, max_bytes=chance.choice([1, 10**6]))
        seen += found
        cursor = reader.cursor or 0
        if over and not found:
            return normal(seen)


def by_stream(probe: Probe, chance: random.Random, last: threading.Event) -> Seen:
    """SSE, cut at random frames and resumed from the last id."""
    seen: list[Event] = []
    cursor = 0
    while True:
        over = last.is_set()
        live = probe.pool.find(probe.key())
        probe.pool.read_here(live)
        reader = Reader(live, probe.store, cursor)
        frames = stream(reader, t.cast(t.Any, native), heartbeat=0.01, lease=300.0, follow=not over)
        for _ in range(chance.randint(1, 6)):
            chunk = next(frames, None)
            if chunk is None:
                break
            for frame in chunk.decode().split("\n\n"):
                if "data: " not in frame:
                    continue
                data, number = frame.split("\n")[-2:]
                body = json.loads(data.removeprefix("data: "))
                cursor = int(number.removeprefix("id: "))
                assert cursor == body["seq"]
                extra = {k: body[k] for k in ("reply", "error") if k in body}
                event = Event(
                    body["seq"], body["turn_id"], body["type"], body["data"], body["ts"], extra
                )
                seen.append(event)
        frames.close()  # type: ignore[attr-defined]
        if over and cursor == live.head:
            return normal(seen)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scripts=SCRIPTS, seed=st.integers(0, 2**16))
def test_every_way_of_reading_gives_the_same_events(
    tmp_path_factory: t.Any, scripts: list[list[Draft]], seed: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("same")
    url = f"sqlite:///{folder}/same.db"

    def script(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        for draft in scripts[int(request.message)]:
            stage.publish(draft)

    one, two = (Probe(script, store=SqlStore(url)) for _ in range(2))
    last = threading.Event()
    try:
        one.run("0")
        ways: dict[str, Seen] = {}

        def read(name: str, probe: Probe, how: t.Any) -> None:
            ways[name] = how(probe, random.Random(seed), last)

        readers = [
            threading.Thread(target=read, args=(f"{how.__name__} {n}", probe, how))
            for n, probe in enumerate((one, two))
            for how in (by_poll, by_stream)
        ]
        for reader in readers:
            reader.start()
        for n in range(1, len(scripts)):
            ended = random.Random(seed + n).choice((one, two)).run(f"{n}")
            assert ended.data["status"] == "completed", ended
        last.set()
        for reader in readers:
            reader.join(PATIENCE)
        after = normal(one.log())
        assert [kind for _, kind, _ in after].count("done") == len(scripts)
        assert len(ways) == 4
        for name, seen in ways.items():
            assert seen == after, name
    finally:
        for probe in (one, two):
            probe.pool.drain(grace=1)
