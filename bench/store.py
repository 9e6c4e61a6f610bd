"""What the SQL store costs: python -m bench.store [--quick]. Prints Markdown.

A turn commit is what a turn writes: claim, five batches of fifty events, the terminal transaction.
PostgreSQL is a server of our own on the same disk, with fsync on, through a Unix socket.
"""

from __future__ import annotations

import argparse
import collections.abc as cabc
import contextlib
import dataclasses
import shutil
import statistics
import tempfile
import threading
import time
import typing as t
from pathlib import Path

from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.log import first_seq
from agentao_web.core.names import SessionKey
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.readers import Reader
from agentao_web.runner import Stage
from agentao_web.store import Claim
from agentao_web.store import Finish
from agentao_web.store import TurnRow
from agentao_web.store.sql import SqlStore
from tests.pool_fakes import FakeAgent
from tests.pool_fakes import Probe
from tests.store.postgres import PostgresServer

_OPENING = Draft("turn_begin", {"message": "hello", "images": 0, "queued_ms": 0})
_SAID: t.Final[list[dict[str, t.Any]]] = [
    {"role": "user", "content": "What does the file say? " * 10},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "read_file"}]},
    {"role": "tool", "tool_call_id": "c", "content": "line of a file\n" * 60},
    {"role": "assistant", "content": "It says this and that. " * 20},
]
#: Turns measured around the fifth and the five hundredth.
_EARLY, _LATE = range(3, 13), range(496, 506)
#: Between two events another worker reads, in seconds: no multiple of how often it asks.
_PACE: t.Final = 0.023


@dataclasses.dataclass
class Figures:
    """What was measured on one database, in seconds, and in events a second."""

    early: list[float] = dataclasses.field(default_factory=list)
    late: list[float] = dataclasses.field(default_factory=list)
    batches: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    histories: list[float] = dataclasses.field(default_factory=list)
    heads: list[float] = dataclasses.field(default_factory=list)
    elsewhere: list[float] = dataclasses.field(default_factory=list)


def turn(store: SqlStore, key: SessionKey, n: int) -> None:
    """Everything a turn writes."""
    row = TurnRow(f"{key.id}-{n}", "hello", 0, float(n), "bench")
    claim = store.claim(key, row, _OPENING, float(n))
    seq = first_seq(claim.generation) + 2
    for _ in range(5):
        store.append([(claim, _events(claim, seq, 50))])
        seq += 50
    done = Event(seq, row.id, "done", {"status": "completed"}, 1.0, {"reply": "It says this."})
    outcome = Outcome(State.COMPLETED, reply="It says this.", usage={"total_tokens": 100})
    store.finish(claim, Finish([done], outcome, _SAID[::3], _SAID, False, float(n)))


def _events(claim: Claim, seq: int, count: int) -> list[Event]:
    data = {"chunk": "a token or two "}
    return [Event(seq + i, claim.turn_id, "llm_text", data, 1.0) for i in range(count)]


def measure(url: str, rounds: int) -> Figures:
    """All the figures of one database."""
    figures = Figures()
    store = SqlStore(url)
    try:
        for n in range(rounds):
            key = SessionKey("acme", "ann", f"s{n}")
            for number in range(1, _LATE.stop):
                seconds = _timed(lambda n=number, k=key: turn(store, k, n))  # type: ignore[misc]
                if number in _EARLY:
                    figures.early.append(seconds)
                if number in _LATE:
                    figures.late.append(seconds)
            figures.histories += [_timed(lambda k=key: store.history(k)) for _ in range(5)]  # type: ignore[misc]
        _append(store, figures, 100 * rounds)
        keys = [SessionKey("acme", "ann", f"few{n}") for n in range(200)]
        for key in keys:
            turn(store, key, 1)
        figures.heads += [_timed(lambda: store.heads(keys)) for _ in range(20)]
    finally:
        store.close()
    figures.elsewhere = elsewhere(url, 300 * rounds)
    return figures


def _append(store: SqlStore, figures: Figures, batches: int) -> None:
    row = TurnRow("append", "hello", 0, 1.0, "bench")
    claim = store.claim(SessionKey("acme", "ann", "append"), row, _OPENING, 1.0)
    for n in range(batches):
        events = _events(claim, first_seq(claim.generation) + 2 + n * 100, 100)
        cpu = time.process_time()
        figures.batches.append(_timed(lambda e=events: store.append([(claim, e)])))  # type: ignore[misc]
        figures.cpu.append(time.process_time() - cpu)


def elsewhere(url: str, count: int) -> list[float]:
    """From publishing an event at one worker to reading it at another."""
    watched = threading.Event()

    def talk(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
        assert watched.wait(30), "nobody reads"
        for _ in range(count):
            stage.publish(Draft("llm_text", {"chunk": f"{time.monotonic()} "}))
            time.sleep(_PACE)

    # Each with connections of its own, as in a process of its own; the interpreter is shared.
    writing, reading = (Probe(talk, store=SqlStore(url)) for _ in range(2))
    delays: list[float] = []
    try:
        started = writing.start(sid="elsewhere")
        live = reading.pool.find(reading.key("elsewhere"))
        with Reader(live, reading.store, started.cursor, turn_id=live.elsewhere) as reader:
            reading.pool.read_here(live)
            watched.set()
            until = live.clock() + 60 + count * _PACE
            while not reader.told and live.clock() < until:
                for event in reader.read(limit=500, max_bytes=2**16):
                    if event.type == "llm_text":
                        # Several of them, joined.
                        now, sent = time.monotonic(), event.data["chunk"].split()
                        delays += [now - float(moment) for moment in sent]
                reader.wait(until)
    finally:
        for probe in (writing, reading):
            probe.pool.close()
    assert len(delays) == count, f"{len(delays)} of {count} events were read"
    return delays


def _timed(work: cabc.Callable[[], t.Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextlib.contextmanager
def databases() -> cabc.Iterator[dict[str, str]]:
    """An empty one of each kind."""
    folder = Path(tempfile.mkdtemp(prefix="agentao-bench-", dir="/tmp"))
    served = folder / "pg"
    served.mkdir()
    folder.chmod(0o755)
    try:
        server = PostgresServer(served, settings={"listen_addresses": ""})
        try:
            server.start()
            yield {"SQLite": f"sqlite:///{folder}/data/store.db", "PostgreSQL": server.url()}
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure both and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one session instead of three")
    rounds = 1 if parser.parse_args().quick else 3
    columns = ["turn 5", "turn 500", "ratio (hold ≤ 2)", "append", "CPU of a batch"]
    columns += ["history", "heads", "elsewhere"]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    with databases() as urls:
        for name, url in urls.items():
            print(_row(name, measure(url, rounds)), flush=True)
    print(
        "\nMedians: ms of a turn's commits (claim, 5 × 50 events, end); events/s in batches of "
        "100; ms of CPU here of such a batch; ms to load the history of 505 turns "
        f"({505 * len(_SAID)} messages); ms to ask for the heads of 200 sessions; "
        "ms from publishing an event to reading it at another worker, p50 and p99."
    )


def _row(name: str, figures: Figures) -> str:
    early, late = statistics.median(figures.early), statistics.median(figures.late)
    rate = 100 / statistics.median(figures.batches)
    rest = [statistics.median(v) * 1000 for v in (figures.cpu, figures.histories, figures.heads)]
    cells = [f"{early * 1000:.1f} ms", f"{late * 1000:.1f} ms", f"{late / early:.2f}"]
    cells += [f"{rate:,.0f}/s", *(f"{value:.1f} ms" for value in rest)]
    cuts = [cut * 1000 for cut in statistics.quantiles(figures.elsewhere, n=100)]
    cells.append(f"{cuts[49]:.0f} / {cuts[98]:.0f} ms")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
