"""Puts the rooms together for one Flask application: the only file that knows everyone."""

from __future__ import annotations

import collections.abc as cabc
import logging
import os
import typing as t
import weakref
from pathlib import Path

from flask import Flask
from werkzeug.routing import PathConverter
from werkzeug.routing import Rule

from agentao_web import logs
from agentao_web import traces
from agentao_web import views
from agentao_web.agents import early
from agentao_web.auth import Authenticate
from agentao_web.auth import Revoked
from agentao_web.auth import Tickets
from agentao_web.auth import Tokens
from agentao_web.auth import by_token
from agentao_web.auth import taking_tickets
from agentao_web.auth import ticket_keys
from agentao_web.config import Settings
from agentao_web.config import from_environment
from agentao_web.config import rules_per_tenant
from agentao_web.config import shells
from agentao_web.core.folders import open_to_others
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.observer import Observers
from agentao_web.core.rules import Rules
from agentao_web.metrics import Metrics
from agentao_web.readers import Watcher
from agentao_web.readiness import Readiness
from agentao_web.serving import Serving
from agentao_web.sessions import SessionPool
from agentao_web.slots import StreamSlots
from agentao_web.store import Store
from agentao_web.store import check_url
from agentao_web.store.allowance import Allowance
from agentao_web.wire import Wire

if t.TYPE_CHECKING:
    from agentao_web.agents.host import Factory
    from agentao_web.agents.tools import ToolsFor

#: Opens a store with the application's settings.
OpenStore = cabc.Callable[[Settings], Store]
#: What a host says of a principal, given what its tenant has by the settings.
RulesFor = cabc.Callable[[Principal, Rules], Rules]

_KEY = "agentao_web"
_ANY_PATH = "agentao_path"
#: The applications of this process, for the one who ends it (agentao_web.workers).
_apps: weakref.WeakSet[Flask] = weakref.WeakSet()


class AgentaoWeb:
    """The extension. Behaviour is given here; what a deployment changes is in ``app.config``.

    *authenticate* says who makes a request: a Principal, or None for nobody. Without it the
    requests carry bearer tokens signed with ``AGENTAO_SECRET_KEYS``.

    *rules* says what the agents of a principal may do: called with the principal and the Rules
    its tenant has by the settings, it returns those or changed ones. Called for every turn, on
    the turn's thread, in an application context.

    *tools* gives agents functions of the host's: called with the principal whenever an agent is
    built, it returns a list of them (see agentao_web.tool).

    *agents* replaces the building of agents altogether: called with the principal, a SessionInfo
    and the transport to construct the agent with, it returns an Agentao.

    *store* opens a store of the host's own, given the settings. *wires* are further forms of
    streams, for requests that name theirs in ``Accept``.
    """

    def __init__(
        self,
        *,
        authenticate: Authenticate | None = None,
        rules: RulesFor | None = None,
        tools: ToolsFor | None = None,
        agents: Factory | None = None,
        store: OpenStore | None = None,
        wires: cabc.Iterable[Wire] = (),
    ) -> None:
        if tools is not None and not callable(tools):
            raise RuntimeError("tools= is a function: lambda principal: [your, functions]")
        self._tools = tools
        self._authenticate = authenticate
        self._rules = rules
        self._agents = agents
        self._store = store
        self._wires = tuple(wires)

    def init_app(self, app: Flask, *, url_prefix: str = "") -> None:
        """Register the blueprint on *app* below *url_prefix*, with settings from its config.

        Raises RuntimeError, with the cure in it, for a setting that is unknown, bad or missing,
        and if *app* has an agentao-web already.
        """
        if _KEY in app.extensions:
            raise RuntimeError(
                "this application has an agentao-web already; call init_app once per application"
            )
        settings = Settings.from_mapping({**_demo(os.environ), **app.config})
        log = logging.getLogger("agentao_web")
        if (wide := open_to_others(settings.root)) is not None:
            log.warning("AGENTAO_ROOT: %s", wide)
        rules = _rules(app, settings, self._rules)
        early.check(settings, shells(settings), own_agents=self._agents is not None)
        if settings.database_url is not None:
            check_url(settings.database_url)
        logs.mark()
        metrics = _metrics(app, settings, log)
        observer = Observers(_observers(settings, metrics), log)

        def build() -> views.Machinery:
            return self._build(app, settings, rules, observer, log)

        revoked = Revoked(lambda: pool_of(app).store.revocations())
        tokens = Tokens(settings.secret_keys) if settings.secret_keys else None
        app.extensions[_KEY] = views.Parts(
            settings=settings,
            serving=Serving(log),
            authenticate=self._authenticate or _by_token(settings, tokens, revoked),
            tickets=Tickets(
                ticket_keys(settings.secret_keys, _keys_of(app), str(settings.root)),
                tokens=tokens if self._authenticate is None else None,
                revoked=revoked,
            ),
            build=build,
            watcher=Watcher(),
            wires=self._wires,
            own_login=self._authenticate is not None,
            own_agents=self._agents is not None,
            observer=observer,
            scrape=metrics.answer if metrics is not None else None,
        )
        prefix = url_prefix.rstrip("/")
        app.register_blueprint(views.blueprint(settings), url_prefix=prefix or None)
        _add_fallbacks(app, settings, prefix)
        app.wsgi_app = taking_tickets(app.wsgi_app, prefix)  # type: ignore[assignment,method-assign]
        _apps.add(app)

    def _build(
        self,
        app: Flask,
        settings: Settings,
        rules: cabc.Callable[[Principal], Rules],
        observer: Observer,
        log: logging.Logger,
    ) -> views.Machinery:
        from agentao_web.agents.factory import AgentaoAgents

        store = self._store(settings) if self._store else open_store(settings, observer)
        allowance = Allowance(store, lambda principal: rules(principal).tokens_per_day)
        agents = AgentaoAgents(
            settings,
            rules=rules,
            factory=self._agents,
            tools=self._tools,
            context=app.app_context,
            purse=allowance,
            shells=shells(settings),
            alone=lambda: len(store.tenants(2)) < 2,
            log=log,
        )

        def may_start(key: SessionKey) -> None:
            agents.check()
            allowance.check(key)

        pool = SessionPool(store, agents, settings, log=log, may_spend=may_start, observer=observer)
        return views.Machinery(
            pool,
            Readiness(pool, lease=settings.worker_lease, check=agents.check),
            warm=agents.warm,
            left=lambda: agents.tools.left,
        )


def _demo(environ: cabc.Mapping[str, str]) -> dict[str, str]:
    """AGENTAO_DEMO, which counts in the environment too: that is where a model is named."""
    value = environ.get("AGENTAO_DEMO")
    return {} if value is None else {"AGENTAO_DEMO": value}


class _AnyPath(PathConverter):
    """A path with line breaks too; Werkzeug's own ends at the first."""

    regex = "[^/](?s:.*)"


def _rules(
    app: Flask, settings: Settings, chosen: RulesFor | None
) -> cabc.Callable[[Principal], Rules]:
    of_tenant = rules_per_tenant(settings)
    if chosen is None:
        return lambda principal: of_tenant(principal.tenant)

    def ask_host(principal: Principal) -> Rules:
        with app.app_context():
            return chosen(principal, of_tenant(principal.tenant))

    return ask_host


def _metrics(app: Flask, settings: Settings, log: logging.Logger) -> Metrics | None:
    if settings.metrics_token is None:
        return None

    def gauges() -> dict[str, float]:
        parts: views.Parts = app.extensions[_KEY]
        return {
            **parts.pool.gauges(),
            "agentao_streams_open": float(parts.slots.taken),
            "agentao_host_tools_left": float(parts.machinery.left()),
        }

    return Metrics(settings.root, gauges=gauges, tenants=settings.metrics_tenants, log=log)


def _observers(settings: Settings, metrics: Metrics | None) -> list[Observer]:
    found: list[Observer] = [logs.TurnLines(text=settings.log_text)]
    if metrics is not None:
        found.append(metrics)
    if traces.is_installed():
        found.append(traces.Spans())
    return found


def open_store(settings: Settings, observer: Observer | None = None) -> Store:
    """The store of these settings; nothing is opened before it is used."""
    url: str | Path = settings.database_url or settings.root / "agentao-web.db"
    most, log_bytes = settings.max_sessions_per_tenant, settings.log_bytes
    if str(url).startswith("memory:"):
        from agentao_web.store.memory import MemoryStore

        return MemoryStore(max_per_tenant=most, log_bytes=log_bytes)
    from agentao_web.store.sql import SqlStore

    failed = (observer or Observer()).store_failed
    return SqlStore(url, max_per_tenant=most, log_bytes=log_bytes, failed=failed)


def _keys_of(app: Flask) -> list[str | bytes]:
    """The application's own keys, newest first, for one without AGENTAO_SECRET_KEYS."""
    fallbacks = app.config.get("SECRET_KEY_FALLBACKS") or ()
    return [app.secret_key, *fallbacks] if app.secret_key else []


def _by_token(settings: Settings, tokens: Tokens | None, revoked: Revoked) -> Authenticate:
    if not settings.secret_keys and not settings.demo:
        raise RuntimeError(
            "no AGENTAO_SECRET_KEYS: set it to a random text of 16 characters or more, pass "
            "authenticate= to use the application's own login, or set AGENTAO_DEMO=1"
        )
    return by_token(tokens, demo=settings.demo, revoked=revoked)


def _add_fallbacks(app: Flask, settings: Settings, prefix: str) -> None:
    """Answer in our form for what is ours and does not exist, and for nothing of the host's.

    Added to the map directly: Flask's own add_url_rule makes GET of "any method".
    """
    paths = {entry.path for entry in views.routes(settings)}
    rules = [(prefix + path, "other_methods", views.other_methods) for path in paths]
    app.url_map.converters.setdefault(_ANY_PATH, _AnyPath)
    nowhere = [path.replace("<path:", f"<{_ANY_PATH}:") for path in paths if "<path:" in path]
    for path in [*nowhere, *([f"/<{_ANY_PATH}:rest>"] if prefix else [])]:
        rules.append((prefix + path, "no_such_path", views.no_such_path))
    for path, name, view in rules:
        endpoint = f"{views.NAME}.{name}"
        app.url_map.add(Rule(path, endpoint=endpoint, methods=None))
        app.view_functions[endpoint] = view


def create_app(environ: cabc.Mapping[str, str] = os.environ) -> Flask:
    """The ready application, with every setting from the environment."""
    logs.show(environ.get("AGENTAO_LOG") or "text")
    app = Flask("agentao_web", static_folder=None)
    app.config.from_mapping(from_environment(environ))
    AgentaoWeb().init_app(app)
    for handler in (404, 405):
        app.register_error_handler(handler, views._http_error)
    # Also where no route of ours answers.
    app.after_request(views.name_request)
    return app


def pool_of(app: Flask) -> SessionPool:
    """The sessions of *app*; RuntimeError if it has no agentao-web."""
    return _parts(app).pool


def _parts(app: Flask) -> views.Parts:
    parts: views.Parts | None = app.extensions.get(_KEY)
    if parts is None:
        raise RuntimeError("this application has no agentao-web. Did you forget init_app?")
    return parts


def apps() -> list[Flask]:
    """Every application of this process that has an agentao-web."""
    return list(_apps)


def reserve_threads(threads: int) -> None:
    """The server of this process has so many *threads*: keep some of them free of streams."""
    if not (found := apps()):
        return
    parts: list[views.Parts] = [app.extensions[_KEY] for app in found]
    # Together: it is the same threads.
    slots = StreamSlots()
    slots.of_threads(threads, max(one.settings.thread_reserve for one in parts))
    for one in parts:
        one.slots = slots


def load() -> None:
    """Import what turns need, for a master that forks workers: it starts no thread."""
    from agentao_web.agents import factory
    from agentao_web.store import sql

    assert factory and sql


def warm(app: Flask) -> None:
    """Load what the first turn would load. Call it in the worker, before it serves."""
    parts: views.Parts = app.extensions[_KEY]
    parts.machinery.warm()
    parts.observer.ticked()


def shutdown(app: Flask, grace: float | None = None) -> None:
    """End every turn of *app* within *grace* seconds and close what it holds. Harmless twice."""
    _parts(app).shut_down(grace)
