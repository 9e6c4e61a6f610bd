"""Questions of a turn: to the person at the terminal, or without one."""

from __future__ import annotations

import collections.abc as cabc

import click

from agentao_web.client import AskUser
from agentao_web.client import Question
from agentao_web.client import ToolConfirmation
from agentao_web.client.replies import Answer
from agentao_web.client.replies import Approve
from agentao_web.terminal.screen import Screen
from agentao_web.terminal.screen import arguments
from agentao_web.terminal.screen import line
from agentao_web.terminal.screen import visible

Read = cabc.Callable[[str], str]

_NOBODY = "Nobody is there to answer. Go on as you think best, without asking."
_SPANS = {"t": "turn", "s": "session"}


def ask(question: Question, screen: Screen, read: Read) -> Answer:
    """What the person says; EOFError or KeyboardInterrupt if that is nothing."""
    screen.fresh_line()
    if isinstance(question, ToolConfirmation):
        return _approval(question, read)
    return _choice(question, read) if isinstance(question, AskUser) else None


def _approval(question: ToolConfirmation, read: Read) -> Answer:
    told = f"{visible(question.tool)} {arguments(question.args)}"
    click.secho(f"? {told}", bold=True, err=True)
    if question.truncated:
        click.echo("  (not all of it can be shown; what is missing would run too)", err=True)
    if question.description:
        # The rest is for the model.
        click.echo(f"  {line(question.description.partition('. ')[0], 100)}", err=True)
    spans = {key: span for key, span in _SPANS.items() if span in question.remember}
    more = {"t": ", [t]his turn", "s": ", this [s]ession"}
    prompt = f"  Run it? [y]es, [n]o{''.join(more[key] for key in spans)}: "
    while True:
        word = read(prompt).strip().lower()
        if word in ("y", "yes"):
            return True
        if word in ("n", "no"):
            return False
        if word == "t" and "t" in spans:
            return Approve(remember="turn")
        if word == "s" and "s" in spans:
            return Approve(remember="session")


def _choice(question: AskUser, read: Read) -> Answer:
    title = f"{line(question.header)}: " if question.header else ""
    click.secho(f"? {title}{line(question.question)}", bold=True, err=True)
    for number, option in enumerate(question.options, 1):
        click.echo(f"  {number}. {visible(option)}", err=True)
    while True:
        chosen = chosen_of(question, read(_prompt(question)))
        if chosen is not None:
            return chosen


def _prompt(question: AskUser) -> str:
    if not question.options:
        return "  Answer: "
    many = "numbers, with commas" if question.multiple else "number"
    return f"  Answer ({many}{', or text' if question.allow_custom else ''}): "


def chosen_of(question: AskUser, said: str) -> str | list[str] | None:
    """The answer that *said* is: options by their number, or words; None if it is none."""
    words = said.split(",") if question.multiple and question.options else [said]
    words = [_option(question, word.strip()) for word in words if word.strip()]
    if not words:
        return None
    if question.options and not question.allow_custom:
        if any(word not in question.options for word in words):
            return None
    return words if question.multiple else words[0]


def _option(question: AskUser, word: str) -> str:
    number = int(word) if word.isascii() and word.isdigit() and len(word) < 4 else 0
    return question.options[number - 1] if 0 < number <= len(question.options) else word


def without_a_person(question: Question, screen: Screen, *, yes: bool) -> Answer:
    """No, unless *yes* was said beforehand; None where only a person can answer."""
    if isinstance(question, ToolConfirmation):
        if not yes:
            screen.note(f"{question.tool} was denied: nobody is there; --yes approves everything")
        return yes
    if isinstance(question, AskUser) and (question.allow_custom or not question.options):
        screen.note(f"asked, and nobody is there: {question.question}")
        return [_NOBODY] if question.multiple else _NOBODY
    return None
