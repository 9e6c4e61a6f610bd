"""The lowest versions that pyproject.toml allows, as constraints for pip.

``python -m tests.floors`` prints them: of what the package itself needs, with its extras. What only
tests need is as new as it gets.
"""

from __future__ import annotations

import tomllib
import typing as t
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def floors() -> dict[str, str]:
    """Name -> version; RuntimeError for a dependency without one."""
    project: dict[str, t.Any] = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    words = list(project["dependencies"])
    for name in extras.keys() - {"test"}:
        words += extras[name]
    found = {}
    for requirement in map(Requirement, words):
        lowest = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(lowest) != 1:
            raise RuntimeError(f"pyproject.toml: {requirement} has no lowest version")
        found[requirement.name] = lowest[0]
    return found


if __name__ == "__main__":
    for name, version in floors().items():
        print(f"{name}=={version}")
