"""The tests' scripted model in a process of its own, with one command more.

blob 160 65536      160 tokens of 65,536 characters each, as fast as they go
"""

from __future__ import annotations

import typing as t

from bench.child import serve
from tests import model_server


class Model(model_server.ModelServer):
    """Answers what a bench asks from outside; its times are `time.monotonic()`."""

    def forget(self) -> None:
        """Drop what was kept of requests so far; their bodies add up."""
        with self._changed:
            self.requests.clear()

    def wait_seen(self, count: int, timeout: float = 10.0) -> float:
        """When request number *count* arrived."""
        return self.wait_for_request(count, timeout).started_at

    def wait_gone(self, timeout: float) -> float | None:
        """When the client of the last request hung up; None if it has not within *timeout*."""
        request = self.requests[-1]
        try:
            self.wait_closed(request, timeout)
        except TimeoutError:
            return None
        return request.closed_at

    def last_body(self) -> dict[str, t.Any]:
        return self.requests[-1].body


def _blob(rest: str) -> model_server.Reply:
    count, size = rest.split()
    return model_server.tokens(int(count), text="x" * (int(size) - 1) + " ")


def main() -> None:
    model_server._COMMANDS["blob"] = _blob
    with Model() as model:
        serve(
            {
                "base_url": lambda: model.base_url,
                "count": lambda: len(model.requests),
                "forget": model.forget,
                "wait_seen": model.wait_seen,
                "wait_gone": model.wait_gone,
                "last_body": model.last_body,
            }
        )


if __name__ == "__main__":
    main()
