"""The operator's file of tenants is read again by the workers of a reload."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.live.harness import Server
from tests.live.harness import eventually

pytestmark = pytest.mark.live


def test_a_changed_file_of_tenants_counts_after_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.other]\ntokens_per_day = 1\n")
    with Server(tmp_path, AGENTAO_DEMO="1", AGENTAO_TENANTS=str(file)) as server:
        assert server.ask("s", "say before")["reply"] == "before"
        before = server.workers()
        file.write_text("[default]\ntokens_per_day = 1\n")
        server.signal(signal.SIGHUP)
        eventually(
            lambda: server.workers() and not set(server.workers()) & set(before),
            "the old workers stay",
        )
        # The first one finds out that there is not enough for it.
        ended = server.ask("s", "say no")
        assert (ended["status"], ended["reason"]) == ("incomplete", "budget_exhausted")
