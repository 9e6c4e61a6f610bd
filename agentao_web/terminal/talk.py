"""A conversation at a terminal, or one message of a script: both are turns of a client."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import signal
import sys
import threading
import typing as t

import click

from agentao_web.client import Client
from agentao_web.client import ClientError
from agentao_web.client import End
from agentao_web.client import Event
from agentao_web.client import NotFound
from agentao_web.client import Question
from agentao_web.client import QuestionClosed
from agentao_web.client import ToolConfirmation
from agentao_web.client.replies import Answer
from agentao_web.terminal import questions
from agentao_web.terminal.screen import Screen
from agentao_web.terminal.screen import arguments
from agentao_web.terminal.screen import clean
from agentao_web.terminal.screen import line
from agentao_web.terminal.screen import visible

#: Exit codes: as it should be, not so, and stopped by Ctrl-C (128 + SIGINT).
OK, NOT_OK, STOPPED = 0, 1, 130
#: How much of the conversation is shown at the start.
_LAST: t.Final = 10
#: So often, and so many seconds apart, a turn that has not begun yet is stopped.
_STOPS, _STOP_PAUSE = 20, 0.25


class Talk:
    """One session at one terminal."""

    def __init__(
        self,
        client: Client,
        session: str,
        *,
        person: bool,
        yes: bool = False,
        as_json: bool = False,
        options: cabc.Mapping[str, t.Any] | None = None,
    ) -> None:
        self._client = client
        self._session = session
        self._person = person
        self._yes = yes
        self._as_json = as_json
        self._options = dict(options or {})
        self._screen = Screen()
        self._stopping: threading.Thread | None = None
        self._rests = threading.Event()
        self._reads = False

    # -- one message -------------------------------------------------------------------------------

    def once(self, message: str, images: cabc.Sequence[str] = ()) -> int:
        """Have *message* answered; the exit code."""
        with self._interruptible():
            return self._send(message, images)

    def _send(self, message: str, images: cabc.Sequence[str] = ()) -> int:
        turn = self._client.chat(
            self._session,
            message,
            images=images,
            on_question=self._answer,
            **self._options,
        )
        return self._show(turn)

    def _show(self, events: cabc.Iterable[Event]) -> int:
        code = OK
        for event in events:
            if self._as_json:
                # ASCII only: there is nothing in it that a terminal obeys.
                click.echo(json.dumps(event.raw))
            else:
                self._screen.show(event)
            if isinstance(event, End):
                code = _code(event)
        return code

    # -- Ctrl-C ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interruptible(self) -> cabc.Iterator[None]:
        """Within, Ctrl-C stops the turn, which is then read to its end; a second one leaves."""
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            self._rest()
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_: object) -> None:
        if self._reads or self._stopping is not None:
            raise KeyboardInterrupt
        self._stop()

    def _stop(self) -> None:
        # On a thread of its own: this one is in the middle of reading, or about to begin.
        self._stopping = threading.Thread(
            target=self._cancel, args=(self._rests,), name="agentao-stop", daemon=True
        )
        self._stopping.start()

    def _cancel(self, rests: threading.Event) -> None:
        with contextlib.suppress(ClientError):
            for _ in range(_STOPS):
                # It may be on its way to the server still.
                if self._client.cancel(self._session) or rests.wait(_STOP_PAUSE):
                    return

    def _rest(self) -> None:
        """No turn is running: there is nothing to be stopped any more."""
        self._rests.set()
        if self._stopping is not None:
            self._stopping.join(1)
        self._stopping = None
        self._rests = threading.Event()

    def _read(self, prompt: str) -> str:
        """A line of the person's; KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D."""
        self._reads = True
        try:
            return _line(prompt)
        finally:
            self._reads = False

    # -- questions ---------------------------------------------------------------------------------

    def _answer(self, question: Question) -> Answer:
        if not self._person or (self._yes and isinstance(question, ToolConfirmation)):
            answer = questions.without_a_person(question, self._screen, yes=self._yes)
            if answer is None:
                self._screen.note("only a person can answer this; the turn is stopped")
                self._client.cancel(self._session)
            return answer
        try:
            _forget_typing()
            return questions.ask(question, self._screen, self._read)
        except EOFError:
            click.echo(err=True)
            return False if question.type == "tool_confirmation" else None
        except KeyboardInterrupt:
            click.echo(err=True)
            if self._stopping is not None:
                raise
            self._stop()
            return None

    # -- a conversation ----------------------------------------------------------------------------

    def converse(self) -> int:
        """Read messages and show answers, until the person leaves; the exit code."""
        with self._interruptible():
            return self._converse()

    def _converse(self) -> int:
        self._recall()
        interrupted = False
        while True:
            self._rest()
            try:
                message = self._read("> ")
            except EOFError:
                click.echo(err=True)
                return OK
            except KeyboardInterrupt:
                click.echo(err=True)
                if interrupted:
                    return STOPPED
                interrupted = True
                self._screen.note("Ctrl-C again, or Ctrl-D, to leave")
                continue
            interrupted = False
            if message.strip():
                self._say(message)

    def _say(self, message: str) -> None:
        try:
            self._send(message)
        except ClientError as exc:
            self._screen.error(str(exc))

    def _recall(self) -> None:
        """Show the end of a session that is there already, and of a turn that runs in it."""
        try:
            snapshot = self._client.session(self._session)
        except NotFound:
            self._screen.note(f"a new session: {self._session}")
            return
        title = f", {line(str(snapshot['title']), 60)}" if snapshot.get("title") else ""
        self._screen.note(f"the session {self._session}{title}")
        for entry in self._client.messages(self._session, last=_LAST):
            _print(entry)
        turn = snapshot.get("turn")
        if turn is not None:
            click.echo(f"> {clean(turn['message'])}")
            self._show(self._follow(turn["cursor"]))

    def _follow(self, cursor: int) -> cabc.Iterator[Event]:
        """The rest of a turn that somebody else began; its questions are answered here too."""
        for event in self._client.events(self._session, after=cursor):
            yield event
            if isinstance(event, Question):
                answer = self._answer(event)
                if answer is not None:
                    with contextlib.suppress(QuestionClosed, NotFound):
                        self._client.answer(self._session, event.question_id, answer)


def _print(entry: dict[str, t.Any]) -> None:
    """One entry of the transcript."""
    if entry.get("role") == "user":
        click.echo(f"> {clean(entry.get('content', ''))}")
    elif entry.get("role") == "assistant":
        click.echo(clean(entry.get("content", "")))
    else:
        told = arguments(entry.get("args") or {}, 60)
        name, status = visible(str(entry.get("tool"))), visible(str(entry.get("status")))
        click.secho(f"[{name}] {told} {status}", dim=True, err=True)


def _line(prompt: str) -> str:
    with contextlib.suppress(ImportError):
        # What it does to the line is wanted, here and now only.
        import readline  # noqa: F401
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)
    return input()


def _forget_typing() -> None:
    """What was typed before a question was seen is no answer to it."""
    with contextlib.suppress(ImportError):
        import termios

        with contextlib.suppress(termios.error):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)


def _code(end: End) -> int:
    if end.status == "completed":
        return OK
    return STOPPED if end.reason == "cancelled_by_user" else NOT_OK
