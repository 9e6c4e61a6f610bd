"""The versions that pyproject.toml allows: `make floors` installs exactly the lowest."""

from __future__ import annotations

import logging
import tomllib

import agentao
import pytest
from packaging.requirements import Requirement

from agentao_web.agents.tested import VERSIONS
from agentao_web.agents.tested import warn_untested
from tests.floors import PYPROJECT
from tests.floors import floors


def test_every_dependency_has_a_floor_and_the_lowest_is_what_was_tested() -> None:
    lowest = floors()
    assert lowest["agentao"] == VERSIONS[0]
    assert {"flask", "gunicorn", "gevent", "psycopg", "sqlalchemy"} <= set(lowest)


def test_only_agentao_has_a_ceiling() -> None:
    """A ceiling shuts a host out that needs a later one, so it needs a reason: private names."""
    words = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    tops = [r.name for r in map(Requirement, words) if any("<" in s.operator for s in r.specifier)]
    assert tops == ["agentao"]


def test_a_version_of_agentao_that_was_never_tested_is_one_line_with_the_cure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("agentao_web")
    warn_untested(log, agentao.__version__)
    assert not caplog.records
    warn_untested(log, "0.5.99")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert "0.5.99" in record.getMessage() and "pip install" in record.getMessage()
