"""A minute of the soak: conversations through nginx, two workers that are reloaded and killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak import soak

pytestmark = [pytest.mark.live, pytest.mark.long]


def test_a_minute_of_everything_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    report = soak(tmp_path, seconds=60, clients=10)
    print(report)
    assert report.wrong == []
