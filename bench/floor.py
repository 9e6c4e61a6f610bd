"""The floor: plain Agentao objects in a process of their own, asked over standard input.

Nothing of agentao_web is imported here. Agentao's log file stays on, as it is by default.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import typing as t
from pathlib import Path

from agentao import Agentao
from agentao.transport import SdkTransport

from bench import proc
from bench.child import serve


class Ear:
    """Hears an agent's text, and when it came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.late: list[float] = []
        self.stamped = False

    def hear(self, event: t.Any) -> None:
        if event.type.value != "llm_text":
            return
        now = time.monotonic()
        if self.first is None:
            self.first = now
        if self.stamped:
            self.late += [now - float(stamp) for stamp in event.data["chunk"].split()]


def agent(ear: Ear) -> Agentao:
    return Agentao(
        api_key=os.environ["OPENAI_API_KEY"],
        base_url=os.environ["OPENAI_BASE_URL"],
        model=os.environ["OPENAI_MODEL"],
        working_directory=Path(tempfile.mkdtemp(dir=os.environ["BENCH_ROOT"])),
        transport=SdkTransport(on_event=ear.hear),
    )


def known() -> tuple[Agentao, Ear]:
    """An agent that has answered once."""
    ear = Ear()
    made = agent(ear)
    made.chat("say hi")
    ear.first = None
    return made, ear


def cpu_seconds(streams: int, command: str) -> dict[str, float]:
    """CPU of *streams* agents that each obey *command* at the same time."""
    agents = [known()[0] for _ in range(streams)]
    threads = [threading.Thread(target=one.chat, args=(command,)) for one in agents]
    wall, before = time.monotonic(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"cpu": time.process_time() - before, "wall": time.monotonic() - wall}


def first_tokens(samples: int) -> list[float]:
    """Seconds from chat() to the first text, in turns of one session."""
    made, ear = known()
    seconds: list[float] = []
    for _ in range(samples):
        ear.first = None
        start = time.monotonic()
        made.chat("say hi")
        assert ear.first is not None
        seconds.append(ear.first - start)
    return seconds


def late_tokens(command: str) -> list[float]:
    """Seconds each token took from the model to us."""
    made, ear = known()
    ear.stamped = True
    made.chat(command)
    return ear.late


def agents_memory(warm: int, count: int) -> float:
    """Resident bytes per agent that has answered once."""
    kept = [known() for _ in range(warm)]
    before = proc.rss(os.getpid())
    kept += [known() for _ in range(count)]
    return (proc.rss(os.getpid()) - before) / (len(kept) - warm)


def turn_memory(command: str) -> float:
    """How many resident bytes one turn adds at its highest."""
    made, _ = known()
    before = proc.rss(os.getpid())
    done = threading.Event()
    highest = [before]

    def look() -> None:
        while not done.wait(0.005):
            highest.append(proc.rss(os.getpid()))

    thread = threading.Thread(target=look)
    thread.start()
    made.chat(command)
    done.set()
    thread.join()
    return max(highest) - before


if __name__ == "__main__":
    serve(
        {
            "cpu": cpu_seconds,
            "first_tokens": first_tokens,
            "late_tokens": late_tokens,
            "agents_memory": agents_memory,
            "turn_memory": turn_memory,
        }
    )
