"""``agentao-web chat``: the client at a terminal, or in a script."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import typing as t

import click

if t.TYPE_CHECKING:
    from agentao_web.client import Client

#: The demo's token, as every demo server takes it.
_DEMO_TOKEN: t.Final = "dev"
#: How long the first request may take to get through, and all others, in seconds.
_FIRST, _PATIENCE = 3.0, 60.0


@click.command()
@click.argument("message", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--session", help="Which conversation; a new one unless told.")
@click.option("--token", envvar="AGENTAO_TOKEN", help="A bearer token; or AGENTAO_TOKEN.")
@click.option("--demo", is_flag=True, help="The token `dev`, of a server with the demo model.")
@click.option("--header", multiple=True, help="NAME: VALUE, for a login of the host's.")
@click.option(
    "--image", multiple=True, type=click.Path(exists=True, dir_okay=False), help="A file to see."
)
@click.option(
    "--on-busy",
    type=click.Choice(["reject", "queue", "interrupt"]),
    help="What if a turn is running; reject unless told.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds for a turn.")
@click.option("--yes", is_flag=True, help="Approve every tool without asking.")
@click.option("--poll", is_flag=True, help="Long-polls instead of streams.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
def chat(
    message: str | None,
    url: str,
    session: str | None,
    token: str | None,
    demo: bool,
    header: tuple[str, ...],
    image: tuple[str, ...],
    on_busy: str | None,
    timeout: float | None,
    yes: bool,
    poll: bool,
    as_json: bool,
) -> None:
    """Talk to an agent, or have one MESSAGE answered.

    Without MESSAGE it is a conversation: Ctrl-C stops the running turn and, pressed again, leaves;
    so does Ctrl-D. If the input is not a terminal, all of it is the message.

    \b
    Examples:
      agentao-web chat --demo
      agentao-web chat --url https://example.com/agent --session plans
      agentao-web chat --demo "count to 3"
      echo "count to 3" | agentao-web chat --demo --json | tail -n 1

    The model's words go to standard output, tools and notes to standard error. Where nobody can
    be asked, tools that need an approval are denied, unless --yes is given.

    \b
    It ends with 0 if the turn completed, 1 if not, 2 for wrong options,
    and 130 if it was stopped by Ctrl-C or a cancel.
    """
    # Not above: every other command would pay for the HTTP client.
    from agentao_web.client import Client
    from agentao_web.client import ClientError
    from agentao_web.client import Unauthorized
    from agentao_web.terminal.screen import line
    from agentao_web.terminal.talk import STOPPED
    from agentao_web.terminal.talk import Talk

    terminal = sys.stdin.isatty()
    talks = message is None and terminal and not as_json
    if not talks:
        message = _message(message)
    if talks and image:
        raise click.UsageError("--image needs a MESSAGE to go with")
    session = session or f"chat-{secrets.token_hex(4)}"
    options: dict[str, t.Any] = {
        "token": token or (_DEMO_TOKEN if demo else None),
        "headers": _headers(header),
        "stream": not poll,
    }
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        click.get_current_context().color = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that is not UTF-8 shows question marks, and the turn goes on.
            stream.reconfigure(errors="replace")
    try:
        with Client(url, patience=_FIRST, **options) as first:
            _greet(first, session)
        with Client(url, patience=_PATIENCE, **options) as client:
            talk = Talk(
                client,
                session,
                person=terminal and not as_json and sys.stderr.isatty(),
                yes=yes,
                as_json=as_json,
                options={"on_busy": on_busy, "timeout": timeout},
            )
            sys.exit(talk.converse() if talks else talk.once(message or "", image))
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(STOPPED)
    except Unauthorized as exc:
        raise click.ClickException(
            f"{line(exc.message)} Give a valid one with --token or AGENTAO_TOKEN (`agentao-web "
            "token` prints one), or --demo for a server with the demo model."
        ) from None
    except ClientError as exc:
        raise click.ClickException(line(str(exc))) from None
    except BrokenPipeError:
        raise  # Whoever read it has enough; click ends quietly.
    except (OSError, ValueError) as exc:
        give_up_output()
        kind = click.UsageError if isinstance(exc, ValueError) else click.ClickException
        raise kind(line(str(exc))) from None


def give_up_output() -> None:
    """What could not be written is not tried again at the end: that would change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _message(given: str | None) -> str:
    try:
        message = sys.stdin.read() if given in (None, "-") else given
        (message or "").encode()
    except UnicodeError:
        raise click.UsageError("the message is not valid UTF-8") from None
    if not message or not message.strip():
        raise click.UsageError("no message: give it as an argument or on standard input")
    return message


def _greet(client: Client, session: str) -> None:
    """Find out soon whether the server is there and takes us."""
    from agentao_web.client import NotFound

    try:
        client.session(session)
    except NotFound as exc:
        if "session" not in exc.message:
            raise


def _headers(lines: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for one in lines:
        name, colon, value = one.partition(":")
        if not colon:
            raise click.UsageError("--header is NAME: VALUE")
        headers[name.strip()] = value.strip()
    return headers
