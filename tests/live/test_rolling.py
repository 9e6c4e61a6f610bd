"""A deploy in daytime: workers are replaced under clients that converse, and none loses a word."""

from __future__ import annotations

import collections
import itertools
import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.live.clients import WAYS
from tests.live.clients import Crowd
from tests.live.clients import Talker
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import eventually
from tests.live.nginx import Nginx

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    ("clients", "reloads"), [(12, 1), pytest.param(50, 5, marks=pytest.mark.long)]
)
def test_a_reload_costs_a_conversing_client_a_short_pause(
    tmp_path: Path, clients: int, reloads: int
) -> None:
    with (
        Server(tmp_path, addresses=2, app="tests.live.behind_app:app") as server,
        Nginx(tmp_path, server.upstreams) as nginx,
        nginx.client(limits=httpx.Limits(max_connections=None)) as http,
    ):
        ways = itertools.cycle(WAYS)
        talkers = [Talker(http, f"talker-{n}", next(ways)) for n in range(clients)]
        with Crowd(talkers, "paced 20 0.05") as crowd:
            crowd.after(1, PATIENCE)
            for _ in range(reloads):
                old = set(server.workers())
                server.signal(signal.SIGHUP)
                eventually(lambda old=old: not old & set(server.workers()), "the old workers stay")
                crowd.after(2, PATIENCE)
        assert not crowd.failures
        words = "".join(f"{n} " for n in range(20))
        for one in talkers:
            for turn, end in one.ends.items():
                assert (end["type"], end["reply"]) == ("done", words), json.dumps(end)
                assert one.text_of(turn) == words
            assert not one.broken
            one.check()
        refused = sum((one.refused for one in talkers), collections.Counter[int]())
        # Told to come back in a second: the session's turn is still at the old worker.
        assert set(refused) <= {409, 503}
        print(
            f"{sum(len(one.ends) for one in talkers)} turns, refused {dict(refused)}, "
            f"longest pause {max(one.pause for one in talkers):.2f} s, "
            f"slowest turn {max(one.slowest for one in talkers):.2f} s"
        )
        assert "Traceback" not in server.log.read_text()
