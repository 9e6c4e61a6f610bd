"""What is measured: each function is one row, or a few, of the table."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import http.client
import json
import os
import signal
import threading
import time
import typing as t
from pathlib import Path

from bench import proc
from bench.child import Child
from bench.client import Late
from bench.client import Loop
from bench.client import Stream
from bench.client import Target
from bench.client import read
from bench.client import whole
from bench.proc import median
from bench.proc import percentile
from bench.server import Server


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; *held* is None where there is only something to report."""

    what: str
    floor: str
    ours: str
    ratio: float | None
    hold: str
    held: bool | None
    values: dict[str, t.Any]


@dataclasses.dataclass
class Bench:
    """What every row needs."""

    env: dict[str, str]
    folder: Path
    model: Child
    floor: Child
    quick: bool

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def server(self, *flags: str, **settings: str | int) -> Server:
        return Server(self.env, self.folder, *flags, **settings)

    def child(self, module: str) -> Child:
        return Child(module, self.env, self.folder / f"{module}.log")


def _rounds(count: int, floor: cabc.Callable[[], None], ours: cabc.Callable[[], None]) -> None:
    """Both, *count* times, the first to go in turn: drift of the machine hits both alike."""
    for number in range(count):
        for step in (floor, ours) if number % 2 == 0 else (ours, floor):
            step()


# -- CPU -----------------------------------------------------------------------------------------


def cpu(bench: Bench) -> list[Row]:
    """CPU per 1,000 tokens: the process of the floor, and the worker."""
    rounds = bench.of(5, 2)
    total = bench.of(20_000, 4_000)
    seconds = bench.of(10, 2)
    with bench.server() as server:
        return [
            _cpu(bench, server, 1, total, None, rounds, 1.0),
            _cpu(bench, server, 8, total // 8, None, rounds, 1.0),
            _cpu(bench, server, 8, 50 * seconds, 50, bench.of(3, 1), None),
        ]


def _cpu(
    bench: Bench,
    server: Server,
    streams: int,
    count: int,
    rate: int | None,
    rounds: int,
    hold: float | None,
) -> Row:
    command = f"tokens {count}" + (f" {rate}" if rate else "")
    thousands = streams * count / 1000
    floor: list[float] = []
    ours: list[float] = []
    walls: dict[str, list[float]] = {"floor": [], "ours": []}

    def on_floor() -> None:
        found = bench.floor.ask("cpu", streams=streams, command=command)
        floor.append(found["cpu"] / thousands)
        walls["floor"].append(found["wall"])

    def on_ours() -> None:
        used, wall = _worker_cpu(server, streams, command)
        ours.append(used / thousands)
        walls["ours"].append(wall)

    _rounds(rounds, on_floor, on_ours)
    ratio = median(ours) / median(floor)
    pace = f"at {rate} tokens/s each" if rate else "unpaced"
    return Row(
        f"CPU per 1,000 tokens, {streams} stream{'s' * (streams > 1)}, {pace}",
        f"{median(floor) * 1000:.1f} ms",
        f"{median(ours) * 1000:.1f} ms",
        ratio,
        f"≤ {hold}" if hold else "report, aim ≤ 2",
        ratio <= hold if hold else None,
        {"floor": floor, "ours": ours, "walls": walls},
    )


def _worker_cpu(server: Server, streams: int, command: str) -> tuple[float, float]:
    sids = [server.known() for _ in range(streams)]
    before = proc.settled_cpu(server.pid)
    start = time.monotonic()
    with Loop() as loop:
        turns = [loop.add(server.target.turn(sid, command)) for sid in sids]
        loop.run(lambda: all(turn.last for turn in turns), 120)
        wall = time.monotonic() - start
    _check(turns)
    return proc.settled_cpu(server.pid) - before, wall


def _check(turns: cabc.Iterable[Stream]) -> None:
    for turn in turns:
        if turn.last is None or turn.last["type"] != "done":
            raise RuntimeError(f"a turn did not end well: {turn.status} {turn.code} {turn.last}")
        if turn.last["data"]["status"] != "completed":
            raise RuntimeError(f"a turn was not completed: {turn.last['data']}")


# -- time to first token -------------------------------------------------------------------------


def first_token(bench: Bench) -> list[Row]:
    """From chat(), or from the POST, to the first text; the model's own time taken off."""
    blocks, each = bench.of(10, 3), 20
    samples: dict[str, list[float]] = {"floor": [], "ours": []}
    models: dict[str, list[float]] = {"floor": [], "ours": []}
    with bench.server() as server:

        def on_floor() -> None:
            samples["floor"] += bench.floor.ask("first_tokens", samples=each)
            models["floor"] += _model_alone(bench, each)

        def on_ours() -> None:
            samples["ours"] += _first_tokens(server, each)
            models["ours"] += _model_alone(bench, each)

        _rounds(blocks, on_floor, on_ours)
    over = {k: median(samples[k]) - median(models[k]) for k in samples}
    ratio = over["ours"] / over["floor"]
    return [
        Row(
            "time to first token over the model's own, p50",
            f"{over['floor'] * 1000:.2f} ms",
            f"{over['ours'] * 1000:.2f} ms",
            ratio,
            "≤ 1.1",
            ratio <= 1.1,
            {"seconds": samples, "model_alone": models},
        )
    ]


def _first_tokens(server: Server, count: int) -> list[float]:
    sid = server.known()
    seconds = []
    for _ in range(count):
        turn = whole(server.target.turn(sid, "say hi"))
        assert turn.first is not None
        seconds.append(turn.first - turn.started)
    return seconds


def _model_alone(bench: Bench, count: int) -> list[float]:
    """The last request again, straight to the model: from sending it to the first bytes back."""
    body = json.dumps(bench.model.ask("last_body"))
    connection = http.client.HTTPConnection(_model_host(bench))
    seconds = []
    for _ in range(count):
        start = time.monotonic()
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        answer.read(1)
        seconds.append(time.monotonic() - start)
        answer.read()
    connection.close()
    return seconds


# -- latency -------------------------------------------------------------------------------------


def latency(bench: Bench) -> list[Row]:
    """How much later than the model sent it a token is with the reader."""
    with bench.server() as server:
        return [_latency_of_one(bench, server), *_latency_of_many(bench, server)]


def _latency_of_one(bench: Bench, server: Server) -> Row:
    command = f"stamped {bench.of(400, 75)} 50"
    floor: list[list[float]] = []
    ours: list[list[float]] = []

    def on_ours() -> None:
        late = Late()
        whole(server.target.turn(server.known(), command, late))
        ours.append(late.seconds)

    def on_floor() -> None:
        floor.append(bench.floor.ask("late_tokens", command=command))

    _rounds(bench.of(5, 2), on_floor, on_ours)
    p99 = {k: [percentile(r, 99) for r in v] for k, v in (("floor", floor), ("ours", ours))}
    found = median(p99["ours"]) * 1000
    return Row(
        "added latency per token, 1 stream at 50/s, p50 / p99",
        _two(floor),
        _two(ours),
        median(p99["ours"]) / median(p99["floor"]),
        "p99 ≤ 1.3 ms",
        found <= 1.3,
        {"floor": floor, "ours": ours},
    )


def _two(rounds: list[list[float]]) -> str:
    """The medians over the rounds of p50 and p99."""
    p50 = median(percentile(r, 50) for r in rounds) * 1000
    p99 = median(percentile(r, 99) for r in rounds) * 1000
    return f"{p50:.2f} / {p99:.2f} ms"


def _latency_of_many(bench: Bench, server: Server) -> list[Row]:
    model = Target(int(_model_host(bench).partition(":")[2]))
    command = f"stamped {bench.of(10, 3) * 20} 20"
    sids = [server.known() for _ in range(64)]
    ours: list[list[float]] = []
    alone: list[list[float]] = []
    for _ in range(bench.of(3, 1)):
        ours.append(_many(64, lambda i, hear: server.target.turn(sids[i], command, hear)))
        alone.append(_many(64, lambda _, hear: _straight(model, command, hear)))
    found = median(percentile(r, 99) for r in ours) * 1000
    return [
        Row(
            "added latency per token, 64 streams at 20/s, p50 / p99",
            "–",
            _two(ours),
            None,
            "p99 ≤ 15 ms",
            found <= 15,
            {"ours": ours},
        ),
        Row(
            "(the same, read straight from the model: the load generator's own part)",
            _two(alone),
            "",
            None,
            "",
            None,
            {"generator": alone},
        ),
    ]


def _straight(model: Target, command: str, hear: Late) -> Stream:
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": command}]}
    return Stream(model, model.request("POST", "/v1/chat/completions", body), hear)


def _many(streams: int, start: cabc.Callable[[int, Late], Stream]) -> list[float]:
    """Latencies while all *streams* run; they begin one by one within a second, as people do."""
    begin = time.monotonic()
    late = Late(since=begin + 1.5)
    with Loop() as loop:
        turns: list[Stream] = []
        for number in range(streams):
            loop.run(lambda: False, begin + number / streams - time.monotonic())
            turns.append(loop.add(start(number, late)))
        if not loop.run(lambda: all(turn.closed for turn in turns), 60):
            raise RuntimeError("64 streams at 20/s did not end within 60 s")
    return late.seconds


# -- cancel --------------------------------------------------------------------------------------

#: What the model does, and what the reader sees first (nothing, before the headers).
_CANCELS: t.Final = {
    "tokens flowing": ("tokens 100000 200", True),
    "hung mid-stream": ("hang_after hello", True),
    "hung before headers": ("hang", False),
}


def cancel(bench: Bench) -> list[Row]:
    """From sending the cancel to the reader's terminal event, and to the model's closed request."""
    count = bench.of(20, 5)
    with bench.server() as server:
        return [
            _cancel(bench, server, name, command, speaks, count)
            for name, (command, speaks) in _CANCELS.items()
        ]


def _cancel(bench: Bench, server: Server, name: str, command: str, speaks: bool, count: int) -> Row:
    sid = server.known()
    told: list[float] = []
    closed: list[float] = []
    for _ in range(count):
        seen = bench.model.ask("count")
        turn = server.target.turn(sid, command)
        bench.model.ask("wait_seen", count=seen + 1)
        if speaks:
            read(turn, turn.speaks)
        at = time.monotonic()
        cancelling = threading.Thread(
            target=server.target.call, args=("POST", f"/chat/{sid}/cancel")
        )
        cancelling.start()
        read(turn, turn.over)
        cancelling.join()
        turn.close()
        assert turn.ended is not None
        told.append(turn.ended - at)
        gone = bench.model.ask("wait_gone", timeout=10)
        closed.append(float("inf") if gone is None else gone - at)
    return Row(
        f"cancel → terminal event; → model's request closed ({name}), p50 / max",
        "–",
        "; ".join(f"{median(v) * 1000:.1f} / {max(v) * 1000:.1f} ms" for v in (told, closed)),
        None,
        "≤ 100 ms both",
        max(told + closed) <= 0.1,
        {"told": told, "closed": closed},
    )


# -- memory --------------------------------------------------------------------------------------


def session_memory(bench: Bench) -> list[Row]:
    """What an idle session that has answered once costs."""
    count = bench.of(300, 100)
    with bench.server(max_sessions=1000) as server, bench.child("bench.floor") as fresh:
        floor = fresh.ask("agents_memory", warm=10, count=bench.of(100, 30))
        for _ in range(20):
            server.known()
        before = proc.rss(server.pid)
        for _ in range(count):
            server.known()
        ours = (proc.rss(server.pid) - before) / count
    return [
        Row(
            f"memory of an idle session ({count} of them)",
            f"{floor / 1024:.0f} KiB",
            f"{ours / 1024:.0f} KiB",
            ours / floor,
            "≤ 150 KiB",
            ours <= 150 * 1024,
            {"floor": floor, "ours": ours},
        )
    ]


def stalled_reader(bench: Bench) -> list[Row]:
    """10 MB of text to a client that never reads; beside it one that does, and the floor."""
    command = "blob 160 65536"
    with bench.server() as server, bench.child("bench.floor") as fresh:
        floor = fresh.ask("turn_memory", command=command)
        stalled = _growth(server, command, reads=False)
    with bench.server() as server:
        reading = _growth(server, command, reads=True)
    peak, after, status = stalled
    more = peak - reading[0]
    return [
        Row(
            "stalled reader, 10 MB of text: worker grows by (at most / afterwards)",
            f"{_mib(floor)} (no reader at all)",
            f"{_mib(peak)} / {_mib(after)}, turn {status}: {_mib(more)} more than with a reader",
            None,
            "< 8 MiB more",
            more < 8 * 2**20 and status == "completed",
            {"floor": floor, "ours": stalled},
        ),
        Row(
            "(the same with a reader that reads)",
            "",
            f"{_mib(reading[0])} / {_mib(reading[1])}, turn {reading[2]}",
            None,
            "",
            None,
            {"ours": reading},
        ),
    ]


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _growth(server: Server, command: str, *, reads: bool) -> tuple[int, int, str]:
    """How much the worker grew at most during one turn and after it, and how that turn ended."""
    sid = server.known()
    before = proc.rss(server.pid)
    with _Highest(server.pid) as highest:
        turn = server.target.turn(sid, command)
        if reads:
            read(turn, turn.over)
        _wait_idle(server, sid)
    after = proc.rss(server.pid)
    _, page = server.target.call("GET", f"/session/{sid}/messages?limit=1")
    turn.close()
    return highest.value - before, after - before, page["messages"][-1]["turn_status"]


def _wait_idle(server: Server, sid: str) -> None:
    """Ask until the session's turn has ended; reading its log would cost what is measured."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        _, snapshot = server.target.call("GET", f"/session/{sid}")
        if snapshot["turns"] == 2 and snapshot["state"] == "idle":
            return
        time.sleep(0.02)
    raise RuntimeError("the turn did not end within 60 s")


class _Highest:
    """The highest resident memory of a process while the `with` block runs."""

    def __init__(self, pid: int) -> None:
        self.value = proc.rss(pid)
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> t.Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.value = max(self.value, proc.rss(self._pid))


# -- many at once --------------------------------------------------------------------------------


def many_turns(bench: Bench) -> list[Row]:
    """64 turns of 5 s at once on one worker, and small requests meanwhile."""
    with bench.server() as server:
        return _many_turns(bench, [server], 64, "one worker")


def more_turns(bench: Bench) -> list[Row]:
    """256 turns of 5 s at once on two workers of one deployment."""
    flags = ("--threads", "160")
    own: dict[str, str | int] = {"max_turns": 128, "secret_keys": "the-key-of-both-workers"}
    own["root"] = str(bench.folder / "root-of-both")
    with bench.server(*flags, **own) as one, bench.server(*flags, **own) as two:
        return _many_turns(bench, [one, two], 256, "two workers")


def _many_turns(bench: Bench, servers: list[Server], streams: int, who: str) -> list[Row]:
    with bench.child("bench.probe") as probe, Loop() as loop:
        target = servers[0].target
        sid = servers[0].known()
        probe.ask("start", port=target.port, token=target.token, sid=sid)
        turns = [
            loop.add(servers[n % len(servers)].target.turn(f"many{n}", "tokens 100 20"))
            for n in range(streams)
        ]
        # As many as the load generator itself can read on the cores it shares.
        loop.run(lambda: all(turn.closed for turn in turns), 11 if streams <= 64 else 60)
        asked = probe.ask("stop")
    finished = [turn for turn in turns if turn.last and turn.last["type"] == "done"]
    refused = [turn for turn in turns if turn.status == 429]
    waits = [turn.first - turn.started for turn in turns if turn.first is not None]
    silent = streams - len(finished) - len(refused)
    longest = max((turn.ended - turn.started for turn in finished if turn.ended), default=0.0)
    return [
        Row(
            f"{streams} new sessions, turns of 5 s at once, {who}: finished / told 429 / silent",
            "–",
            f"{len(finished)} / {len(refused)} / {silent}; first token after {max(waits):.2f} s "
            f"at most, whole turn {longest:.2f} s",
            None,
            "all finish or 429",
            silent == 0,
            {"waits": waits},
        ),
        _asked("health; cancel, p99, meanwhile", asked),
    ]


def all_taken(bench: Bench) -> list[Row]:
    """Every place for streams is taken: what else is asked is answered all the same."""
    flags = ("--threads", "32")
    with bench.server(*flags) as server, bench.child("bench.probe") as probe, Loop() as loop:
        sid = server.known()
        target = server.target
        streams = [loop.add(target.follow(sid)) for _ in range(40)]
        loop.run(lambda: all(s.last or s.status >= 400 for s in streams), 20)
        taken = sum(1 for s in streams if s.status == 200)
        told = sum(1 for s in streams if s.status == 503)
        probe.ask("start", port=target.port, token=target.token, sid=sid)
        loop.run(lambda: False, bench.of(8, 2))
        asked = probe.ask("stop")
    row = _asked(
        f"all {taken} stream places of 32 threads taken, {told} told 503: health; cancel, p99",
        asked,
    )
    return [row]


def sigterm(bench: Bench) -> list[Row]:
    """SIGTERM with 64 live streams, one of them on a model that hangs."""
    with bench.server() as server, Loop() as loop:
        turns = [loop.add(_live_turn(server, n)) for n in range(64)]
        loop.run(lambda: all(turn.speaks() for turn in turns), 20)
        begun = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        loop.run(lambda: all(turn.closed for turn in turns), 40)
        told = sum(1 for turn in turns if turn.last and turn.last["type"] in ("done", "error"))
        while Path(f"/proc/{server.pid}").exists() and time.monotonic() < begun + 40:
            time.sleep(0.02)
        gone = time.monotonic() - begun
    return [
        Row(
            "SIGTERM with 64 live streams, one on a hung model: told the end; worker gone after",
            "–",
            f"{told} of 64; {gone:.1f} s",
            None,
            "all; < 30 s (graceful_timeout)",
            told == 64 and gone < 30,
            {"gone": gone},
        )
    ]


def _live_turn(server: Server, number: int) -> Stream:
    """The first turn hangs, the others speak for a minute."""
    message = "hang_after some words" if number == 0 else "tokens 1200 20"
    return server.target.turn(f"live{number}", message)


def _asked(what: str, asked: dict[str, float]) -> Row:
    worst = max(asked["health_p99"], asked["cancel_p99"])
    return Row(
        what,
        "–",
        f"{asked['health_p99']:.1f}; {asked['cancel_p99']:.1f} ms "
        f"(p50 {asked['health_p50']:.1f}; {asked['cancel_p50']:.1f}, n={asked['count']})",
        None,
        "< 50 ms",
        worst < 50,
        dict(asked),
    )


def idle_streams(bench: Bench) -> list[Row]:
    """Many streams on one worker that follow sessions in which nothing happens."""
    count = bench.of(1000, 100)
    flags = ("--threads", "1100", "--worker-connections", "2000")
    with (
        bench.server(*flags, max_sessions=2000) as server,
        bench.child("bench.probe") as probe,
        Loop() as loop,
    ):
        sids = [server.known() for _ in range(count)]
        target = server.target
        # One of each kind has been seen before the first look.
        loop.add(target.follow(sids[0]))
        before = proc.rss(server.pid)
        streams = [loop.add(target.follow(sid)) for sid in sids]
        here = loop.run(lambda: all(s.last or s.status >= 400 for s in streams), 60)
        good = sum(1 for s in streams if s.last)
        grown = (proc.rss(server.pid) - before) / count
        used, start = proc.cpu(server.pid), time.monotonic()
        loop.run(lambda: False, bench.of(5, 1))
        idle = (proc.cpu(server.pid) - used) / (time.monotonic() - start)
        probe.ask("start", port=target.port, token=target.token, sid=sids[0])
        loop.run(lambda: False, bench.of(8, 2))
        asked = probe.ask("stop")
        alive = sum(1 for s in streams if not s.closed)
    return [
        Row(
            f"{count:,} idle streams on one worker: memory of each",
            "–",
            f"{grown / 1024:.1f} KiB ({good} got everything, {alive} stayed; "
            f"{idle * 100:.1f} % of a core while idle)",
            None,
            "≤ 64 KiB",
            here and alive == count and grown <= 64 * 1024,
            {"bytes": grown, "idle_cpu": idle},
        ),
        _asked("health; cancel, p99, meanwhile", asked),
    ]


def _model_host(bench: Bench) -> str:
    return bench.env["OPENAI_BASE_URL"].split("/")[2]


Measure = cabc.Callable[[Bench], list[Row]]

#: In the order of the table.
MEASURES: t.Final[dict[str, Measure]] = {
    "cpu": cpu,
    "first_token": first_token,
    "latency": latency,
    "cancel": cancel,
    "session_memory": session_memory,
    "many_turns": many_turns,
    "more_turns": more_turns,
    "all_taken": all_taken,
    "sigterm": sigterm,
    "stalled_reader": stalled_reader,
    "idle_streams": idle_streams,
}
