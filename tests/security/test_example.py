"""The example of docs/mcp.md: its commands are run, and it does what is said of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.house import House
from tests.security.house import model_here

PAGE = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text("utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def test_the_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_server.py").write_text(block("shop server"))
    script = block("operator") + "env -0\n"
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, check=True)
    told = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
    settings = {
        name: told[f"AGENTAO_{name.upper()}"] for name in ("mcp", "skills", "tenants", "memory")
    }
    monkeypatch.setenv("SHOP_DIR", str(tmp_path))
    monkeypatch.setenv("SHOP_NAME", "the corner shop")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{told['PATH']}")
    with model_here(monkeypatch) as model, House(tmp_path, model, **settings) as here:
        assert here.call("mcp_shop_price", "acme/ann", name="tea") == "tea: 3 (the corner shop)"
        assert "not found" in here.call("mcp_shop_price", "beta/bob", name="tea").lower()
        for who in ("acme/ann", "beta/bob"):
            told_of = here.call("activate_skill", who, skill_name="letters", task_description="x")
            assert "skills/letters/references/tone.md" in told_of
            tone = here.call("read_file", who, file_path="skills/letters/references/tone.md")
            assert "Be brief and kind." in tone
            assert "Saved" in here.call("save_memory", who, key="likes", value="tea")
