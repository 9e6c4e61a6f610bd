"""The command line: ``agentao-web …``, and the same below ``flask agentao …`` for a host."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import secrets
import socket
import sqlite3
import ssl
import sys
import time
import typing as t
from pathlib import Path

import click
from flask import current_app
from flask import has_app_context
from flask.cli import with_appcontext

from agentao_web import doctor
from agentao_web.agents.workspaces import Workspaces
from agentao_web.auth import DEMO_PRINCIPAL
from agentao_web.auth import DEMO_TOKEN
from agentao_web.auth import Tokens
from agentao_web.config import Settings
from agentao_web.config import from_environment
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.names import Principal
from agentao_web.core.names import SessionKey
from agentao_web.core.names import is_session_id
from agentao_web.terminal import chat
from agentao_web.terminal import give_up_output

# A command imports what it needs itself: the server, its database and the doctor's HTTP client
# together take more than a second, and `agentao-web token` is often called by a script.
if t.TYPE_CHECKING:
    from agentao_web.doctor import proxy
    from agentao_web.store import SessionRow
    from agentao_web.store import Store
    from agentao_web.store.sql import SqlStore

_DAY: t.Final = 86_400
_HEADER_NAME: t.Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: t.Final = re.compile(r"[ -~]*")
#: The doctor's own token is good for one visit.
_DOCTOR_SECONDS: t.Final = 900


class _Finite(click.FloatRange):
    """A range without ``nan``, which is inside of every range, and without ``inf``."""

    def convert(self, value: t.Any, param: t.Any, ctx: t.Any) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a number of seconds or days.", param, ctx)
        return found


class _Commands(click.Group):
    """Commands whose failures are a line and not a traceback: a folder, a disk, an output."""

    def main(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as exc:
            # What `--help` says may be written to a full disk, too.
            give_up_output()
            click.echo(f"Error: {_failure(exc)}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> t.Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Whoever read it has enough; click ends quietly.
        except OSError as exc:
            if exc.filename is None:
                give_up_output()
            raise click.ClickException(_failure(exc)) from None


def _failure(exc: OSError) -> str:
    """What the system says, and of which file."""
    said = exc.strerror or str(exc)
    return said if exc.filename is None else f"{exc.filename}: {said}"


#: Never below zero: what is meant as "days ago" must not become "all of them".
_DAYS: t.Final = _Finite(0)
#: Not milliseconds: those would make void whatever is issued in the next 50,000 years.
_MOMENT: t.Final = _Finite(0, 4_000_000_000)
#: The longest life of a token, in seconds: a hundred years.
_LONGEST_TTL: t.Final = 36_525 * _DAY
_FILE: t.Final = click.Path(exists=True, dir_okay=False, readable=True)
_DATE: t.Final = click.DateTime(["%Y-%m-%d"])
Read = t.Callable[[], Settings]


def _environment() -> Settings:
    try:
        return Settings.from_mapping(from_environment())
    except RuntimeError as exc:
        raise click.ClickException(str(exc)) from None


def _application() -> Settings:
    """The host's settings; its own login, if it has one, issues no tokens of ours."""
    parts = current_app.extensions.get("agentao_web")
    if parts is None:
        raise click.ClickException("this application has no agentao-web; call init_app first")
    settings: Settings = parts.settings
    return settings


def _principal(tenant: str, user: str) -> Principal:
    try:
        return Principal(tenant, user)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from None


def _token(read: Read, tenant: str, user: str, ttl: int) -> None:
    settings = read()
    if has_app_context() and current_app.extensions["agentao_web"].own_login:
        raise click.ClickException("this application has a login of its own, and takes no tokens")
    keys = settings.secret_keys
    if not keys:
        raise click.ClickException("set AGENTAO_SECRET_KEYS to what the server has")
    click.echo(Tokens(keys).issue(_principal(tenant, user), ttl=ttl))


def _workspace(read: Read, tenant: str, user: str, session: str) -> None:
    settings = read()
    if settings.workspace == "session" and not session:
        raise click.UsageError("AGENTAO_WORKSPACE=session: say which --session")
    if settings.root == Settings.from_mapping({}).root:
        click.echo("AGENTAO_ROOT is not set: this is below the current folder.", err=True)
    key = SessionKey(*_names(tenant, user), session)
    click.echo(Workspaces(settings.root, settings.workspace).make(key))


def _names(tenant: str, user: str) -> tuple[str, str]:
    principal = _principal(tenant, user)
    return principal.tenant, principal.user


def _key(tenant: str, user: str, session: str) -> SessionKey:
    if not is_session_id(session):
        raise click.UsageError("a session id is 1 to 128 of A-Z a-z 0-9 . _ -")
    return SessionKey(*_names(tenant, user), session)


_TENANT = click.option("--tenant", required=True, help="Whose it is.")
_USER = click.option("--user", default="", help="A user of the tenant; none unless told.")


def _commands(group: click.Group, read: Read, wrap: t.Callable[[t.Any], t.Any]) -> None:
    """The commands a host has too."""

    @group.command()
    @_TENANT
    @_USER
    @click.option(
        "--ttl", default=3600, type=click.IntRange(1, _LONGEST_TTL), help="Seconds it is good for."
    )
    @wrap
    def token(tenant: str, user: str, ttl: int) -> None:
        """Print a bearer token.

        Example: agentao-web token --tenant acme --user ann --ttl 3600
        """
        _token(read, tenant, user, ttl)

    @group.command()
    @_TENANT
    @_USER
    @click.option("--session", default="", help="With AGENTAO_WORKSPACE=session.")
    @wrap
    def workspace(tenant: str, user: str, session: str) -> None:
        """Print the folder an agent works in, made if need be.

        Example: cp report.txt "$(agentao-web workspace --tenant acme --user ann)"
        """
        _workspace(read, tenant, user, session)


@click.group(cls=_Commands)
@click.version_option(
    package_name="agentao-web", prog_name="agentao-web", message="%(prog)s %(version)s"
)
def main() -> None:
    """Agentao behind HTTP. Settings are AGENTAO_… environment variables."""


@click.group("agentao", cls=_Commands)
def flask_group() -> None:
    """Agentao: the same commands with this application's config."""


def _operator(group: click.Group, read: Read, wrap: t.Callable[[t.Any], t.Any]) -> None:
    """What an operator does to the store, beside running servers."""

    @group.command()
    @_TENANT
    @click.option("--user", default=None, help="Only this user's; all of the tenant's unless told.")
    @click.option("--before", default=None, type=_MOMENT, help="Unix seconds; now unless told.")
    @wrap
    def revoke(tenant: str, user: str | None, before: float | None) -> None:
        """Make tokens issued before a moment void, on every server within seconds.

        Example: agentao-web revoke --tenant acme --user ann
        """
        _principal(tenant, user or "")
        with _store(read) as store:
            store.revoke(tenant, user, time.time() if before is None else before)
        if before is None:
            # Tokens know the second they were issued in: the next one we print is to be good.
            time.sleep(1 - time.time() % 1)

    @group.command()
    @_TENANT
    @click.option("--day", default=None, type=_DATE, help="A date (UTC); today unless told.")
    @wrap
    def budget(tenant: str, day: datetime.datetime | None) -> None:
        """Tokens a tenant has spent on a day, or set aside; kept for a month.

        Example: agentao-web budget --tenant acme
        """
        _principal(tenant, "")
        date = (day or datetime.datetime.now(datetime.UTC)).date().isoformat()
        with _store(read) as store:
            _print({"tenant": tenant, "day": date, "spent": store.spent(tenant, date)})

    @group.group("sessions")
    def sessions_group() -> None:
        """Stored sessions: list, show, export, delete."""

    @sessions_group.command("list")
    @click.option("--tenant", default=None, help="Only this tenant's.")
    @click.option("--user", default=None, help="Only this user's.")
    @click.option("--limit", default=50, type=click.IntRange(1, 10_000))
    @wrap
    def list_sessions(tenant: str | None, user: str | None, limit: int) -> None:
        """One JSON object a line, last updated first.

        Example: agentao-web sessions list --tenant acme
        """
        with _store(read) as store:
            for row in store.sessions(tenant, user, before=None, limit=limit):
                click.echo(_json(_row(row)))

    @sessions_group.command()
    @_TENANT
    @_USER
    @click.argument("session")
    @wrap
    def show(tenant: str, user: str, session: str) -> None:
        """What is known of a session, and its turns that are not over.

        Example: agentao-web sessions show --tenant acme --user ann chat-1
        """
        key = _key(tenant, user, session)
        with _store(read) as store:
            row = _row(_found(store, key))
            active = [dataclasses.asdict(turn) for turn in store.active(key)]
            _print({**row, "active": active})

    @sessions_group.command()
    @_TENANT
    @_USER
    @click.argument("session")
    @wrap
    def export(tenant: str, user: str, session: str) -> None:
        """The transcript as JSON, whole.

        Example: agentao-web sessions export --tenant acme chat-1 > chat-1.json
        """
        key = _key(tenant, user, session)
        with _store(read) as store:
            row = _row(_found(store, key))
            _print({**row, "messages": _transcript(store, key)})

    @sessions_group.command()
    @_TENANT
    @_USER
    @click.argument("session")
    @click.option(
        "--timeout",
        default=15.0,
        type=_Finite(0),
        help="Seconds to wait for its turn to stop.",
    )
    @wrap
    def delete(tenant: str, user: str, session: str, timeout: float) -> None:
        """Stop the session's turn, wherever it runs, and remove the session.

        Example: agentao-web sessions delete --tenant acme --user ann chat-1
        """
        _delete(read, _key(tenant, user, session), timeout)

    @group.group()
    def db() -> None:
        """The database: check, prune, backup."""

    @db.command()
    @wrap
    def check() -> None:
        """Open the database, make its tables if need be, and look whether it is whole."""
        with _store(read, make=True) as store:
            click.echo(store.check())

    @db.command()
    @click.option("--days", required=True, type=_DAYS, help="Sessions idle for so long go.")
    @wrap
    def prune(days: float) -> None:
        """Remove sessions that were not used for some days, but none with a turn.

        Example: agentao-web db prune --days 90
        """
        click.echo(f"sessions removed: {_prune(read, time.time() - days * _DAY)}")

    @db.command()
    @click.argument("file", type=click.Path(dir_okay=False))
    @wrap
    def backup(file: str) -> None:
        """Copy an SQLite database while it is in use; for PostgreSQL use pg_dump.

        Example: agentao-web db backup backup.db
        """
        _backup(read, Path(file))


@contextlib.contextmanager
def _store(read: Read, *, make: bool = False) -> t.Iterator[SqlStore]:
    """The servers' database, which is there already unless it may be made."""
    from agentao_web.extension import open_store
    from agentao_web.store.sql import SqlStore

    settings = read()
    try:
        store = open_store(settings)
        if not isinstance(store, SqlStore):
            raise click.ClickException("the sessions are in the server's memory, out of reach")
        with contextlib.closing(store):
            if not make:
                _refuse_nothing(settings)
            yield store
    except StoreUnavailable:
        where = "AGENTAO_DATABASE_URL" if settings.database_url else "AGENTAO_ROOT"
        raise click.ClickException(
            f"The database cannot be opened, read or written. Is {where} right, does the "
            "database run, and may this user write there?"
        ) from None
    except RuntimeError as exc:
        raise click.ClickException(str(exc)) from None


def _refuse_nothing(settings: Settings) -> None:
    """A new database in the wrong folder would take a revocation, and nobody would look there."""
    file = settings.root / "agentao-web.db"
    if settings.database_url is None and not file.exists():
        raise click.ClickException(
            f"there is no {file}: set AGENTAO_ROOT to what the server has, or make a new "
            "database with `db check`"
        )


def _row(row: SessionRow) -> dict[str, t.Any]:
    fields = dataclasses.asdict(row)
    tenant, user, sid = fields.pop("key")
    return {"tenant": tenant, "user": user, "session_id": sid, **fields}


def _print(value: dict[str, t.Any]) -> None:
    click.echo(_json(value, indent=2))


def _json(value: dict[str, t.Any], indent: int | None = None) -> str:
    """*value* in as many characters as the output can show."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _found(store: Store, key: SessionKey) -> SessionRow:
    row = store.session(key)
    if row is None:
        raise click.ClickException("no such session")
    return row


def _transcript(store: Store, key: SessionKey) -> list[dict[str, t.Any]]:
    entries: list[dict[str, t.Any]] = []
    more = True
    while more:
        page = store.transcript(key, before=None, after=len(entries), limit=500)
        entries += page.messages
        more = page.more
    return entries


def _delete(read: Read, key: SessionKey, timeout: float) -> None:
    with _store(read) as store:
        if not store.tombstone(key):
            raise click.ClickException("no such session")
        store.signal(key, "session_deleted", but="")
        until = time.monotonic() + timeout
        while store.active(key):
            if time.monotonic() > until:
                raise click.ClickException("its turn still runs; it is removed when that ends")
            time.sleep(0.1)  # Between two looks at the database.
        _remove(store, read(), key)


def _prune(read: Read, before: float) -> int:
    count = 0
    with _store(read) as store:
        while keys := store.prune(before):
            for key in keys:
                _remove(store, read(), key)
            count += len(keys)
    return count


def _remove(store: Store, settings: Settings, key: SessionKey) -> None:
    """Finish a deletion, unless a server was faster: then it may be a new session by now."""
    row = store.session(key)
    if row is not None and row.deleting:
        Workspaces(settings.root, settings.workspace).forget(key)
        store.delete(key)


def _backup(read: Read, file: Path) -> None:
    try:
        taken = file.exists()
    except OSError as exc:
        raise click.ClickException(f"{file} cannot be written: {exc.strerror}") from None
    if taken:
        raise click.ClickException(f"{file} is there already; a backup is a new file")
    with _store(read) as store:
        try:
            store.backup(file)
        except BaseException as exc:
            # It was not there before, and half of a backup is none.
            with contextlib.suppress(OSError):
                file.unlink()
            if not isinstance(exc, OSError | sqlite3.Error):
                raise
            said = exc.strerror if isinstance(exc, OSError) else exc
            raise click.ClickException(f"{file} cannot be written: {said}") from None


_commands(main, _environment, lambda function: function)
_commands(flask_group, _application, with_appcontext)
_operator(main, _environment, lambda function: function)
_operator(flask_group, _application, with_appcontext)


def _doctor(group: click.Group, read: Read, wrap: t.Callable[[t.Any], t.Any]) -> None:
    """What is wrong, and the line that cures it."""

    @group.command("doctor")
    @click.option("--url", help="Look at the server there too, through what is before it.")
    @click.option("--token", help="A bearer token for it; one is made if there are keys.")
    @click.option("--header", multiple=True, help="NAME: VALUE, for a login of the host's.")
    @click.option("--ca", type=_FILE, help="Certificates to trust, for --url.")
    @click.option("--message", default=doctor.MESSAGE, show_default=True, help="What to say there.")
    @click.option(
        "--patience",
        type=_Finite(1),
        help="Seconds of silence to sit through there; AGENTAO_HEARTBEAT and 10 unless told.",
    )
    @click.option("--no-model", is_flag=True, help="Do not ask the model.")
    @click.option("--pid", type=int, help="Gunicorn's master: look at its limits, not at ours.")
    @click.option("--json", "as_json", is_flag=True, help="One JSON object.")
    @wrap
    def doctor_command(as_json: bool, **options: t.Any) -> None:
        """Look for what is wrong with the settings, this machine and, with --url, the proxy.

        Ends with 1 if anything is wrong. Run it as the server's user, with its environment.

        Example: agentao-web doctor --url https://agents.example.com
        """
        findings = []
        for found in _examine(read, **options):
            findings.append(found)
            if not as_json:
                for line in doctor.lines([found]):
                    click.echo(line)
        if as_json:
            _print(doctor.as_dict(findings))
        sys.exit(0 if doctor.all_well(findings) else 1)


def _examine(
    read: Read, *, url: str | None, no_model: bool, pid: int | None, **visit: t.Any
) -> t.Iterator[doctor.Finding]:
    from agentao_web.doctor import machine
    from agentao_web.doctor import proxy

    try:
        settings = read()
        # Reads the same settings again, and is a RuntimeError where they are wrong.
        from agentao_web import workers
    except (click.ClickException, RuntimeError) as exc:
        yield doctor.wrong("settings", str(exc))
        return
    parts = current_app.extensions["agentao_web"] if has_app_context() else None
    own_login = parts is not None and parts.own_login
    yield from machine.examine(
        machine.Case(
            settings,
            machine.Server(**workers.told()),
            os.environ,
            own_login=own_login,
            own_agents=parts is not None and parts.own_agents,
            ask_model=not no_model,
            pid=pid,
        )
    )
    if url:
        yield from proxy.examine(_site(settings, url, own_login=own_login, **visit))


def _site(
    settings: Settings,
    url: str,
    *,
    own_login: bool,
    token: str | None,
    header: t.Sequence[str],
    ca: str | None,
    message: str,
    patience: float | None,
) -> proxy.Site:
    from agentao_web.doctor import proxy

    headers = {}
    for line in header:
        name, colon, value = line.partition(":")
        if not colon:
            raise click.UsageError("--header is NAME: VALUE")
        headers[_sendable(name, _HEADER_NAME)] = _sendable(value, _HEADER_VALUE)
    if token is None and not own_login:
        token = DEMO_TOKEN if settings.demo else None
        if token is None and settings.secret_keys:
            token = Tokens(settings.secret_keys).issue(Principal("doctor"), ttl=_DOCTOR_SECONDS)
    if token is not None:
        headers["Authorization"] = f"Bearer {_sendable(token, _HEADER_VALUE)}"
    seconds = patience or settings.heartbeat + 10
    site = proxy.Site(
        url,
        headers,
        max_body=settings.max_body,
        patience=seconds,
        grace=settings.disconnect_grace,
        wait=max(1, min(proxy.WAIT, int(seconds))),
        message=message,
        metrics_token=getattr(settings, "metrics_token", None),
        ca=ca,
    )
    try:
        assert site.tls
    except ssl.SSLError:
        raise click.UsageError(f"--ca: {ca} is not a file of PEM certificates") from None
    return site


def _sendable(text: str, form: re.Pattern[str]) -> str:
    """*text* as it can stand in a header."""
    if not form.fullmatch(text.strip()):
        raise click.UsageError("a header or token has printable ASCII characters only")
    return text.strip()


main.add_command(chat)
_doctor(main, _environment, lambda function: function)
_doctor(flask_group, _application, with_appcontext)


@main.command()
@click.option("--demo", is_flag=True, help="The offline demo model, and the token `dev`.")
@click.option("--bind", default="127.0.0.1:8000", help="HOST:PORT.")
def serve(demo: bool, bind: str) -> None:
    """Run the server: Gunicorn with our settings.

    Example: agentao-web serve --demo
    """
    if demo:
        os.environ["AGENTAO_DEMO"] = "1"
    settings = _environment()
    if not settings.demo and not settings.secret_keys:
        # Good for this run only; a deployment sets its own.
        os.environ["AGENTAO_SECRET_KEYS"] = secrets.token_urlsafe(32)
        settings = _environment()
        click.echo("No AGENTAO_SECRET_KEYS: a random one for this run.")
    from agentao_web.agents import early
    from agentao_web.extension import create_app

    try:
        # What is wrong is said here in one sentence, not by a worker that cannot boot.
        create_app()
        if not settings.demo:
            early.model(os.environ)
    except RuntimeError as exc:
        raise click.ClickException(str(exc)) from None
    _see_if_free(bind)
    _greet(settings, bind)
    command = [sys.executable, "-m", "gunicorn", "-c", "python:agentao_web.workers"]
    os.execv(sys.executable, [*command, "--bind", bind, "agentao_web.extension:create_app()"])


def _see_if_free(bind: str) -> None:
    """Say at once that an address is taken; Gunicorn tries for seconds, below our greeting."""
    host, _, port = bind.rpartition(":")
    if not (host and port.isdecimal()):
        return
    if int(port) > 65_535:
        raise click.UsageError(f"--bind {bind}: a port is a number up to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise click.ClickException(
                f"{bind} is taken: a server runs there. Take another: --bind HOST:PORT, "
                "or BIND=HOST:PORT make run"
            ) from None
        raise click.ClickException(
            f"{bind} cannot be used: {exc.strerror}. Take another: --bind HOST:PORT"
        ) from None


def _greet(settings: Settings, bind: str) -> None:
    principal = DEMO_PRINCIPAL if settings.demo else Principal("local")
    bearer = DEMO_TOKEN
    if not settings.demo:
        bearer = Tokens(settings.secret_keys).issue(principal, ttl=_DAY)
    model = "the demo model, offline" if settings.demo else "your model"
    message = "help" if settings.demo else "hello"
    spaces = Workspaces(settings.root, settings.workspace)
    url = f"http://{bind}"
    click.echo(f"agentao-web on {url}, answering through {model}.\n")
    if settings.page:
        sign_in = f"the token is {DEMO_TOKEN}" if settings.demo else "paste the token below"
        click.echo(f"  open {url}/    ({sign_in})\n")
    click.echo(f"  curl -N {url}/chat/hello -H 'Authorization: Bearer {bearer}' \\")
    body = json.dumps({"message": message})
    click.echo(f"       -H 'Content-Type: application/json' -d '{body}'\n")
    if settings.workspace != "session":
        folder = spaces.make(SessionKey(principal.tenant, principal.user, ""))
        click.echo(f"The agent reads files in {folder}")
    click.echo(f"The contract is at {url}/openapi.json\n", nl=True)
    sys.stdout.flush()
