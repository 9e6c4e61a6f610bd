"""The demo beside a page that has the recipes of docs/recipes.md in it, at one origin."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flask import Flask

from agentao_web import AgentaoWeb
from agentao_web import auth
from agentao_web.config import from_environment

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
SCRIPTS = re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL)

# A ticket that ends while a test looks on.
auth.TICKET_SECONDS = int(os.environ.get("TICKET_SECONDS", auth.TICKET_SECONDS))  # type: ignore[misc]

app = Flask("recipes")
app.config.from_mapping(from_environment())
AgentaoWeb().init_app(app, url_prefix="/agent")


@app.get("/host")
def host() -> str:
    scripts = "\n".join(SCRIPTS)
    return f"<!doctype html><title>host</title><script>const seen = [];\n{scripts}</script>"


@app.get("/healthz")
def healthz() -> str:
    return "ok"
