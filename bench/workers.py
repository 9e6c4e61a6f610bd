"""How soon one worker sees what another does: python -m bench.workers [--quick]. Prints Markdown.

Two real Gunicorn workers, each with a port of its own, on one database and one root. The turn runs
on the first; what is asked of it is asked of the second. Hold: 500 ms each.
"""

from __future__ import annotations

import argparse
import collections.abc as cabc
import os
import random
import secrets
import statistics
import tempfile
import time
import typing as t
from pathlib import Path

from bench.child import Child
from bench.client import Hear
from bench.client import Late
from bench.client import Loop
from bench.client import Stream
from bench.run import PASSED
from bench.server import Server
from bench.store import databases

#: Tokens a second where reading is measured: no multiple of how often a worker looks.
_PACE: t.Final = 43
_PATIENCE: t.Final = 30.0


class Seen:
    """When the first event of each type came."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def __call__(self, stream: Stream, event: dict[str, t.Any], now: float) -> None:
        self.at.setdefault(event["type"], now)


class Pair:
    """Two workers, and a session that runs on the first."""

    def __init__(self, here: Server, there: Server) -> None:
        self.here = here
        self.there = there

    def read(self) -> list[float]:
        """From the model's sending a token to its reader at the other worker."""
        late = Late()
        sid = self.here.known()
        with Loop() as loop:
            turn = loop.add(self.here.target.turn(sid, f"stamped 100 {_PACE}"))
            _until(loop, turn.speaks)
            reader = loop.add(self._elsewhere(sid, late))
            _until(loop, reader.over)
        # What was there before the reader came is no measure of anything.
        return late.seconds[20:]

    def cancel(self) -> list[float]:
        """From sending the cancel to the terminal event at a reader of the other worker."""
        sid = self.here.known()
        with Loop() as loop:
            turn = loop.add(self.here.target.turn(sid, "hang_after hello"))
            _until(loop, turn.speaks)
            seen = Seen()
            loop.add(self._elsewhere(sid, seen))
            _until(loop, lambda: "llm_text" in seen.at)
            _any_moment(loop)
            start = time.monotonic()
            self.there.target.call("POST", f"/chat/{sid}/cancel")
            _until(loop, lambda: "done" in seen.at)
        return [seen.at["done"] - start]

    def delete(self) -> list[float]:
        """From sending the DELETE to its answer, when everything is gone."""
        sid = self.here.known()
        with Loop() as loop:
            turn = loop.add(self.here.target.turn(sid, "hang_after hello"))
            _until(loop, turn.speaks)
            _any_moment(loop)
            start = time.monotonic()
            status, _ = self.there.target.call("DELETE", f"/session/{sid}")
            seconds = time.monotonic() - start
            assert status == 200, status
            _until(loop, turn.over)
        return [seconds]

    def queue(self) -> list[float]:
        """From the end of the running turn to the beginning of one queued at the other worker."""
        sid = self.here.known()
        with Loop() as loop:
            first = loop.add(self.here.target.turn(sid, f"tokens {random.randint(5, 20)} 20"))
            _until(loop, first.speaks)
            seen = Seen()
            second = loop.add(self._after(sid, "queue", seen))
            _until(loop, lambda: first.over() and second.over())
        assert first.ended is not None
        return [seen.at["turn_begin"] - first.ended]

    def interrupt(self) -> list[float]:
        """From sending a message that interrupts to the beginning of its turn."""
        sid = self.here.known()
        with Loop() as loop:
            first = loop.add(self.here.target.turn(sid, "hang_after hello"))
            _until(loop, first.speaks)
            _any_moment(loop)
            seen = Seen()
            second = loop.add(self._after(sid, "interrupt", seen))
            _until(loop, lambda: first.over() and second.over())
        return [seen.at["turn_begin"] - second.started]

    def _elsewhere(self, sid: str, hear: Hear) -> Stream:
        """A reader of the running turn at the other worker."""
        target = self.there.target
        _, page = target.call("GET", f"/session/{sid}")
        path = f"/chat/{sid}/events?after={page['turn']['cursor']}"
        return Stream(target, target.request("GET", path, accept="text/event-stream"), hear)

    def _after(self, sid: str, on_busy: str, hear: Seen) -> Stream:
        body = {"message": "say hi", "on_busy": on_busy}
        target = self.there.target
        ask = target.request("POST", f"/chat/{sid}", body, "text/event-stream")
        return Stream(target, ask, hear)


def _until(loop: Loop, done: cabc.Callable[[], bool]) -> None:
    if not loop.run(done, _PATIENCE):
        raise RuntimeError("what was waited for did not come")


def _any_moment(loop: Loop) -> None:
    """Some part of the time between two looks of a worker at the others."""
    loop.run(lambda: False, random.uniform(0.0, 0.4))


def measure(env: dict[str, str], folder: Path, url: str, count: int) -> dict[str, list[float]]:
    """Seconds of each operation."""
    shared = {"root": str(folder / "root"), "secret_keys": secrets.token_urlsafe(32)}
    found: dict[str, list[float]] = {}
    with (
        Server(env, folder, database_url=url, **shared) as here,
        Server(env, folder, database_url=url, **shared) as there,
    ):
        pair = Pair(here, there)
        for name in ("read", "cancel", "delete", "queue", "interrupt"):
            work: cabc.Callable[[], list[float]] = getattr(pair, name)
            rounds = max(1, count // 20) if name == "read" else count
            found[name] = [seconds for _ in range(rounds) for seconds in work()]
    return found


def main() -> None:
    """Measure both databases and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten of each instead of sixty")
    count = 10 if parser.parse_args().quick else 60
    env = {name: os.environ[name] for name in PASSED if name in os.environ}
    print("| at another worker | database | p50 / p99 / max | n | hold |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="agentao-bench-") as name, databases() as urls:
        folder = Path(name)
        env |= {"HOME": name, "BENCH_ROOT": name}
        with Child("bench.model", env, folder / "model.log") as model:
            env |= {
                "OPENAI_API_KEY": "sk-bench",
                "OPENAI_BASE_URL": model.ask("base_url"),
                "OPENAI_MODEL": "scripted",
            }
            for kind, url in urls.items():
                part = folder / kind
                part.mkdir()
                for what, seconds in measure(env, part, url, count).items():
                    print(_row(kind, what, seconds), flush=True)


def _row(kind: str, what: str, seconds: cabc.Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    told = " / ".join(f"{value * 1000:.0f}" for value in (cuts[49], cuts[98], max(seconds)))
    held = "≤ 500 ms" if cuts[98] <= 0.5 else "**MISSED** ≤ 500 ms"
    return f"| {what} | {kind} | {told} ms | {len(seconds)} | {held} |"


if __name__ == "__main__":
    main()
