"""The application: ``gunicorn -c python:agentao_web.workers 'shop:create_app()'``."""

from __future__ import annotations

import os
import secrets
import typing as t
from pathlib import Path

from flask import Flask
from flask_wtf.csrf import CSRFProtect

from agentao_web import AgentaoWeb
from shop import agent
from shop import models
from shop import views


def create_app(agents: t.Any = None, **config: t.Any) -> Flask:
    """The shop. Its data is in the folder ``SHOP_DATA``, made if need be; *agents* is for tests."""
    app = Flask("shop", root_path=str(Path(__file__).parent))
    data = Path(config.pop("SHOP_DATA", None) or os.environ.get("SHOP_DATA", "shop-data"))
    data.mkdir(parents=True, exist_ok=True)
    app.config.update(
        SECRET_KEY=os.environ.get("SHOP_SECRET_KEY") or _key(data / "secret-key"),
        SESSION_COOKIE_SAMESITE="Lax",
        DATABASE_URL=f"sqlite:///{data.absolute() / 'shop.db'}",
        AGENTAO_ROOT=data / "agentao",
        AGENTAO_DEMO="OPENAI_API_KEY" not in os.environ,
    )
    app.config.update(config)
    models.init_app(app)
    views.init_app(app)
    # For the forms. The agent's POSTs carry none: agentao-web protects these itself.
    CSRFProtect(app)
    web = AgentaoWeb(authenticate=agent.who_is_it, tools=agent.tools_for, agents=agents)
    web.init_app(app, url_prefix=agent.PREFIX)
    return app


def _key(file: Path) -> str:
    """The key in *file*, the same for all workers; made by whoever comes first."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
            made.write(secrets.token_urlsafe(32))
    except FileExistsError:
        pass
    return file.read_text()
