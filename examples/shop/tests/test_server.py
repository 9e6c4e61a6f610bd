"""The shop as `make example` runs it: real Gunicorn, the demo model, a login by form."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.live.harness import PATIENCE
from tests.live.harness import PROJECT
from tests.live.harness import Server

SHOP = PROJECT / "examples" / "shop"


@pytest.mark.live
def test_a_customer_talks_to_the_agent(tmp_path: Path) -> None:
    data = {"SHOP_DATA": str(tmp_path / "data")}
    flask = [sys.executable, "-m", "flask", "--app", "shop", "fill"]
    for _ in range(2):  # Harmless twice.
        subprocess.run(flask, cwd=SHOP, env={**os.environ, **data}, check=True, timeout=PATIENCE)
    with Server(tmp_path, "--chdir", str(SHOP), app="shop:create_app()", **data) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as browser:
            form = browser.get("/login").text
            token = re.findall(r'name="csrf_token" value="([^"]+)"', form)[0]
            login = {"name": "bob", "password": "demo", "csrf_token": token}
            assert browser.post("/login", data=login).headers["Location"] == "/"
            headers = {"Sec-Fetch-Site": "same-origin"}
            body = {"message": "use my_orders {}"}
            with browser.stream("POST", "/agent/chat/s", json=body, headers=headers) as stream:
                lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
            assert "a kettle" in json.loads(lines[-1][6:])["reply"]
            ticket = browser.post("/agent/session/s/ticket", headers=headers).json()["ticket"]
        seen = httpx.get(
            f"{server.url}/agent/chat/s/events?wait=0&ticket={ticket}",
            timeout=PATIENCE,
            trust_env=False,
        )
        assert seen.json()["state"] == "idle"


def test_the_command_of_the_readme_is_there() -> None:
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    assert "\nexample: " in makefile and "flask --app shop fill" in makefile
    assert "'shop:create_app()'" in makefile
