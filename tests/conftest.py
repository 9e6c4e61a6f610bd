"""What every test gets: no thread outlives it."""

from __future__ import annotations

import collections.abc as cabc
import threading
import time

import pytest

from tests.live.browser import chromium
from tests.patience import PATIENCE
from tests.store.postgres import postgres_server
from tests.store.postgres import postgres_url

__all__ = ["chromium", "postgres_server", "postgres_url"]


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> cabc.Iterator[None]:
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + PATIENCE
    while left := [t for t in threading.enumerate() if t not in before and t.is_alive()]:
        assert time.monotonic() < until, f"threads left behind: {left}"
        left[0].join(0.1)
