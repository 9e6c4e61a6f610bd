"""What a turn looks like in a terminal. Nothing of it can steer the terminal."""

from __future__ import annotations

import json
import re
import typing as t
import unicodedata

import click

from agentao_web.client import Done
from agentao_web.client import Event
from agentao_web.client import Failed
from agentao_web.client import Gap
from agentao_web.client import QuestionOver
from agentao_web.client import Text
from agentao_web.client import Thinking
from agentao_web.client import ToolComplete
from agentao_web.client import ToolStart
from agentao_web.client import TurnQueued

#: Control sequences (ECMA-48), as a whole where they are whole: CSI, then OSC, DCS and their like.
_SEQUENCE: t.Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
#: Kept of what has no shape of its own: emoji and some scripts need the joiners.
_KEPT: t.Final = frozenset("\n\t\u200c\u200d")
_UNSAFE: t.Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: Letters and marks that show as nothing, or as a blank.
_BLANK: t.Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
#: How much of a tool's arguments a line shows, in characters.
_ARGUMENTS: t.Final = 100


def _is_safe(character: str) -> bool:
    return character in _KEPT or unicodedata.category(character) not in _UNSAFE


def clean(text: str) -> str:
    """*text* without what a terminal would obey, or show in another order than it is."""
    if text.isprintable():
        return text
    return "".join(filter(_is_safe, _SEQUENCE.sub("", text)))


def visible(text: str) -> str:
    """*text* in one line, with what ``clean`` would leave out made visible.

    For what a person decides about: it has to be seen that there is something.
    """
    return "".join(c if c.isprintable() and not _BLANK.match(c) else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode()
        if character > "\x7f"
        else (json.dumps(character)[1:-1] if character < " " else "\\x7f")
    )


def line(text: str, most: int = 0) -> str:
    """*text* cleaned, in one line, of *most* characters if that is given."""
    flat = " ".join(clean(text).split())
    return flat if not most or len(flat) <= most else flat[: most - 1] + "…"


def arguments(args: dict[str, t.Any], most: int = 0) -> str:
    """*args* as ``name=value``, in one line."""
    parts = (f"{visible(k)}={visible(json.dumps(v, ensure_ascii=False))}" for k, v in args.items())
    text = " ".join(parts)
    return text if not most or len(text) <= most else text[: most - 1] + "…"


class Screen:
    """The model's words go to standard output, all else to standard error."""

    def __init__(self) -> None:
        self._mid = False
        """The cursor is in the middle of a line."""
        self._aside = False
        """That line is on standard error."""
        self._call = ""
        """The call whose line can still be completed."""
        self._spoke = False

    def show(self, event: Event) -> None:
        """Show what is to be seen of *event*."""
        if isinstance(event, Text):
            self._say(event.chunk)
        elif isinstance(event, Thinking):
            self._dim(clean(event.text))
        elif isinstance(event, ToolStart):
            self._start(event)
        elif isinstance(event, ToolComplete):
            self._complete(event)
        elif isinstance(event, QuestionOver):
            if event.outcome in ("expired", "cancelled"):
                self.note(f"the question is {event.outcome}")
        elif isinstance(event, TurnQueued):
            self.note("waiting for the turn before this one")
        elif isinstance(event, Gap):
            self.note("something is missing here: it is not kept any more")
        elif isinstance(event, Done):
            self._done(event)
        elif isinstance(event, Failed):
            self.error(str(event.error.get("message", "The turn failed.")))
        elif event.type == "llm_retry":
            self.note("the model failed, and is asked again")
        elif event.type == "context_compressed":
            self.note("the conversation was summed up to make room")

    def note(self, text: str) -> None:
        """A line that is nobody's words."""
        self.fresh_line()
        click.secho(f"({line(text)})", dim=True, err=True)

    def error(self, text: str) -> None:
        """A line that says what went wrong."""
        self.fresh_line()
        click.secho(f"Error: {line(text)}", fg="red", err=True)

    def fresh_line(self) -> None:
        """Whatever comes next begins a line."""
        if self._mid:
            click.echo(err=self._aside)
        self._mid, self._aside, self._call = False, False, ""

    def _say(self, chunk: str) -> None:
        text = clean(chunk)
        if not text:
            return
        if self._aside:
            self.fresh_line()
        click.echo(text, nl=False)
        self._mid, self._aside = not text.endswith("\n"), False
        self._spoke = True

    def _dim(self, text: str) -> None:
        if self._call or not self._aside:
            self.fresh_line()
        click.secho(text, dim=True, nl=False, err=True)
        self._mid, self._aside = not text.endswith("\n"), True

    def _start(self, event: ToolStart) -> None:
        self.fresh_line()
        told = arguments(event.args, _ARGUMENTS)
        click.secho(f"[{visible(event.tool)}] {told} ", dim=True, nl=False, err=True)
        self._mid, self._aside, self._call = True, True, event.call_id

    def _complete(self, event: ToolComplete) -> None:
        if self._call != event.call_id:
            self.fresh_line()
            click.secho(f"[{visible(event.tool)}] ", dim=True, nl=False, err=True)
        status = visible(event.status)
        colour = None if status == "ok" else "red"
        click.secho(f"{status}, {event.duration_ms} ms", dim=True, fg=colour, err=True)
        self._mid, self._call = False, ""

    def _done(self, event: Done) -> None:
        if not self._spoke and event.reply:
            self._say(event.reply)
        self.fresh_line()
        self._spoke = False
        if event.status != "completed":
            reason = f": {event.reason}" if event.reason else ""
            self.note(f"{event.status}{reason}")
