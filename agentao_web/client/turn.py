"""One turn: its message is taken once, and its events come from the first to the last."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import typing as t
import uuid

from agentao_web.client.api import Api
from agentao_web.client.api import Patience
from agentao_web.client.api import sendable
from agentao_web.client.errors import ApiError
from agentao_web.client.errors import ConnectionLost
from agentao_web.client.errors import NotFound
from agentao_web.client.errors import QuestionClosed
from agentao_web.client.events import End
from agentao_web.client.events import Event
from agentao_web.client.events import Question
from agentao_web.client.events import event
from agentao_web.client.reading import Reading
from agentao_web.client.reading import Ways
from agentao_web.client.replies import Answer
from agentao_web.client.replies import Reply
from agentao_web.client.replies import reply

OnQuestion = cabc.Callable[[Question], Answer]

#: How long an idle session may go without the end of its turn: a lost worker is closed in less.
_SETTLING: t.Final = 20.0
#: So often a session is found busy with nobody's turn: one worker hands it over to another.
_HANDOVERS: t.Final = 3


class Turn(Reading):
    """What ``Client.chat`` gives back: iterate it for the events, then see ``reply``.

    The message is sent when the iteration begins. Leaving the loop closes the connection; another
    loop goes on behind the last event seen.
    """

    def __init__(
        self,
        api: Api,
        ways: Ways,
        sid: str,
        fields: cabc.Mapping[str, t.Any],
        *,
        on_question: OnQuestion | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(api, ways, sid)
        self.id: str | None = None
        """Known from the first event on."""
        self.reply: Reply | None = None
        """How it ended; None before that."""
        self._body = json.dumps(fields).encode()
        self._headers = {"Idempotency-Key": sendable(key or uuid.uuid4().hex)}
        self._on_question = on_question
        self._asked: set[str] = set()
        self._pending: Question | None = None
        self._handovers = 0
        self._settling: Patience | None = None
        self._status = ""
        """As it was told when the message was taken."""
        self._wait = self._longest

    def __iter__(self) -> cabc.Iterator[Event]:
        """Its events, each once; a question goes to ``on_question`` after it was shown here."""
        self._ask()
        with contextlib.closing(t.cast(t.Any, self.events())) as found:
            for one in found:
                if isinstance(one, Question):
                    self._pending = one
                yield one
                self._ask()

    def result(self) -> Reply:
        """Read it to its end, and say how that was."""
        for _ in self:
            pass
        assert self.reply is not None
        return self.reply

    def cancel(self) -> int:
        """Stop what the session runs and waits to run; how many turns that were."""
        return self._api.cancel(self.session_id)

    # -- questions ---------------------------------------------------------------------------------

    def _ask(self) -> None:
        question, self._pending = self._pending, None
        if question is None or self._on_question is None or question.question_id in self._asked:
            return
        self._asked.add(question.question_id)
        answer = self._on_question(question)
        if answer is None:
            return
        # Somebody else was faster, or the session is gone: the next event tells.
        with contextlib.suppress(QuestionClosed, NotFound):
            self._api.answer(self.session_id, question.question_id, answer)

    # -- beginning and end -------------------------------------------------------------------------

    def _open(self, patience: Patience) -> cabc.Generator[Event, None, None]:
        if self.id is not None:
            return super()._open(patience)
        if self._polls:
            return self._start(patience)
        return self._streamed("POST", self._path, body=self._body, headers=self._headers)

    def _start(self, patience: Patience) -> cabc.Generator[Event, None, None]:
        """Have the message taken; its events are polled."""
        status, answer = self._api.once(
            "POST", self._path, needs="turn_id cursor", body=self._body, headers=self._headers
        )
        patience.reset()
        self.id = str(answer["turn_id"])
        self._status = str(answer.get("status", ""))
        # 200: it was taken before and has ended, and where it began is not told.
        self.cursor = int(answer["cursor"]) if status == 202 else None
        yield from ()

    def _take(self, found: Event) -> bool:
        if self.id is None:
            self.id = found.turn_id
        nobodys = found.turn_id is None and (found.type == "gap" or found.seq is None)
        mine = nobodys or found.turn_id == self.id
        if found.seq is not None and not super()._take(found):
            return False
        if mine and isinstance(found, End):
            self.reply = reply(found, self.id or "", self.cursor)
            self.over = True
        if mine:
            self._settling = None
        return mine

    def _refused(self, exc: ApiError, patience: Patience) -> None:
        if self.id is not None and exc.code == "not_found":
            # What a reader that was there has been told.
            self._late = self._ending("cancelled", "session_deleted")
        elif exc.code == "session_busy" and not exc.details and self._handovers < _HANDOVERS:
            self._handovers += 1
            patience.pause(exc, exc.retry_after)
        else:
            super()._refused(exc, patience)

    def _caught_up(self, patience: Patience) -> None:
        """The session is idle, and the end was not in its log: not yet, or not any more."""
        self._late = self._remembered()
        if self._late is None:
            self._settling = self._settling or Patience(min(_SETTLING, self._api.patience))
            self._settling.pause(
                ConnectionLost(
                    f"the session {self.session_id} is idle, and how the turn {self.id} ended is "
                    "not kept; see messages()"
                )
            )

    def _remembered(self) -> Event | None:
        """The end, from what is remembered of the turn."""
        page = self._api.call("GET", f"/session/{self.session_id}/messages", params={"limit": 200})
        mine = [m for m in page.get("messages", ()) if m.get("turn_id") == self.id]
        for entry in reversed(mine):
            if "turn_status" in entry:
                said = [m.get("content", "") for m in mine if m.get("role") == "assistant"]
                return self._ending(entry["turn_status"], None, said[-1] if said else "")
        if not mine and self._status == "cancelled":
            # While it waited in a queue: the transcript has nothing of that.
            return self._ending("cancelled", None)
        return None

    def _ending(self, status: str, reason: str | None, text: str = "") -> Event:
        data = {"status": status, "reason": reason}
        fields = {"seq": None, "turn_id": self.id, "data": data}
        if status != "failed":
            return event({**fields, "type": "done", "reply": text})
        error = {"code": "internal_error", "message": "The turn failed.", "details": {}}
        return event({**fields, "type": "error", "error": error})
