"""Asks the server small things, one after the other, from a process of its own."""

from __future__ import annotations

import threading
import time

from bench.child import serve
from bench.client import Target
from bench.proc import percentile


class Probe:
    """Alternates between /healthz and a cancel of an idle session."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._health: list[float] = []
        self._cancel: list[float] = []

    def start(self, port: int, token: str, sid: str) -> None:
        self._stop.clear()
        self._health, self._cancel = [], []
        arguments = (Target(port, token), sid)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """p50 and p99 of both, in milliseconds, and how many there were."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        answer: dict[str, float] = {"count": len(self._health)}
        for name, values in (("health", self._health), ("cancel", self._cancel)):
            answer[f"{name}_p50"] = percentile(values, 50) * 1000
            answer[f"{name}_p99"] = percentile(values, 99) * 1000
        return answer

    def _run(self, target: Target, sid: str) -> None:
        # Paced, so that the asking is not itself the load.
        while not self._stop.wait(0.005):
            self._health.append(_timed(target, "GET", "/healthz"))
            self._cancel.append(_timed(target, "POST", f"/chat/{sid}/cancel"))


def _timed(target: Target, method: str, path: str) -> float:
    start = time.monotonic()
    status, body = target.call(method, path)
    if status != 200:
        raise RuntimeError(f"{method} {path}: {status} {body}")
    return time.monotonic() - start


if __name__ == "__main__":
    probe = Probe()
    serve({"start": probe.start, "stop": probe.stop})
