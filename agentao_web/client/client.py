"""The client: sessions and turns of one server, for one who asks."""

from __future__ import annotations

import base64
import collections.abc as cabc
import os
import re
import types
import typing as t
from pathlib import Path

import httpx

from agentao_web.client.api import Api
from agentao_web.client.api import Token
from agentao_web.client.errors import TurnFailed
from agentao_web.client.events import Event
from agentao_web.client.reading import Reading
from agentao_web.client.reading import Ways
from agentao_web.client.replies import Answer
from agentao_web.client.replies import Reply
from agentao_web.client.turn import OnQuestion
from agentao_web.client.turn import Turn

Image = bytes | str | os.PathLike[str]
Json = dict[str, t.Any]

_SESSION: t.Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IMAGES: t.Final = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}


class Options(t.TypedDict, total=False):
    """What ``chat`` and ``ask`` take beside the message."""

    images: cabc.Iterable[Image]
    on_question: OnQuestion | None
    on_busy: t.Literal["reject", "queue", "interrupt"] | None
    on_disconnect: t.Literal["cancel", "continue"] | None
    timeout: float | None
    idempotency_key: str | None


class Client:
    """Speaks to the agentao-web at *base_url*, its ``url_prefix`` included.

    *token* is a bearer token, or a function that makes a fresh one when the server wants it. A
    host's own login takes *headers* or *cookies*. Several threads may share a client; a turn
    belongs to one of them. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: Token | None = None,
        headers: cabc.Mapping[str, str] | None = None,
        cookies: cabc.Mapping[str, str] | None = None,
        stream: bool = True,
        timeout: float = 10.0,
        silence: float = 45.0,
        patience: float = 60.0,
        http: httpx.Client | None = None,
    ) -> None:
        """*stream*: False for long-polls only. *timeout*: seconds to connect, and for an answer
        to begin. *silence*: seconds without a sign of life after which a stream counts as broken;
        the server gives one every 15. *patience*: seconds without anything getting through after
        which ConnectionLost is raised. *http*: a client of your own, which you close.
        """
        self._own = http is None
        self._http = http or httpx.Client(limits=httpx.Limits(max_connections=None))
        self._ways = Ways(stream)
        self._api = Api(
            base_url,
            self._http,
            token=token,
            headers=headers or {},
            cookies=cookies or {},
            timeout=timeout,
            silence=silence,
            patience=patience,
        )

    def __enter__(self) -> t.Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; harmless twice."""
        if self._own:
            self._http.close()

    # -- turns -------------------------------------------------------------------------------------

    def chat(
        self,
        session: str,
        message: str,
        **options: t.Unpack[Options],
    ) -> Turn:
        """A turn of *session* with this message: iterate it for its events.

        *on_question* is given each ``ToolConfirmation`` and ``AskUser``, once, and gives back True,
        False, ``Approve(remember=…)``, a text, several, or None to leave it to somebody else.
        *images* are bytes, or paths of files. *on_busy*, *on_disconnect* and *timeout* are the
        server's; *idempotency_key* is made anew for each call unless it is given.
        """
        unknown = options.keys() - Options.__annotations__.keys()
        if unknown:
            raise TypeError(f"chat() takes no {', '.join(sorted(unknown))}")
        fields: Json = {"message": message}
        pictures = [_image(image) for image in options.get("images", ())]
        if pictures:
            fields["images"] = pictures
        asked = {name: options.get(name) for name in ("on_busy", "on_disconnect", "timeout")}
        fields |= {name: value for name, value in asked.items() if value is not None}
        return Turn(
            self._api,
            self._ways,
            _named(session),
            fields,
            on_question=options.get("on_question"),
            key=options.get("idempotency_key"),
        )

    def ask(self, session: str, message: str, **options: t.Unpack[Options]) -> Reply:
        """The whole turn at once, with the options of ``chat``; TurnFailed if it failed.

        A turn that was stopped or is incomplete is a reply too: see ``status``, or ``ok``.
        """
        reply = self.chat(session, message, **options).result()
        if reply.error is not None:
            raise TurnFailed(reply)
        return reply

    def answer(self, session: str, question_id: str, answer: Answer) -> str:
        """Answer a question that is open; how that closed it. QuestionClosed if it was before."""
        return self._api.answer(_named(session), question_id, answer)

    def cancel(self, session: str) -> int:
        """Stop the running turn and end the queued ones; how many that were."""
        return self._api.cancel(_named(session))

    def events(
        self, session: str, *, after: int | None = None, follow: bool = False
    ) -> cabc.Iterator[Event]:
        """The session's log behind *after*: until it is idle, or for ever with *follow*."""
        return Reading(self._api, self._ways, _named(session), after, follow=follow).events()

    # -- sessions ----------------------------------------------------------------------------------

    def sessions(self) -> cabc.Iterator[Json]:
        """Your sessions, last updated first."""
        page: str | None = None
        while True:
            found = self._api.call(
                "GET", "/sessions", needs="sessions", params={"page": page, "limit": 200}
            )
            yield from found["sessions"]
            page = found.get("next")
            if page is None:
                return

    def session(self, session: str) -> Json:
        """A snapshot: state, turns, open questions, cursor, title, usage."""
        return self._api.call("GET", f"/session/{_named(session)}", needs="state cursor")

    def messages(
        self, session: str, *, after: int = 0, last: int | None = None
    ) -> cabc.Iterator[Json]:
        """The transcript, oldest first: behind the entry *after*, or the *last* ones (≤ 200)."""
        path = f"/session/{_named(session)}/messages"
        if last is not None:
            yield from self._last(path, last)
            return
        while True:
            params = {"after": after, "limit": 200}
            found = self._api.call("GET", path, needs="messages more", params=params)
            yield from found["messages"]
            if not (found["more"] and found["messages"]):
                return
            after = found["messages"][-1]["id"]

    def _last(self, path: str, count: int) -> list[Json]:
        """The *count* last entries: a page is short if they are long."""
        entries: list[Json] = []
        params: dict[str, int] = {}
        while len(entries) < count:
            params["limit"] = count - len(entries)
            page = self._api.call("GET", path, needs="messages", params=params)
            entries = [*page["messages"], *entries]
            if not (page.get("more") and page["messages"]):
                break
            params["before"] = entries[0]["id"]
        return entries

    def rename(self, session: str, title: str) -> str:
        """Give the session a title; how it reads now."""
        path = f"/session/{_named(session)}"
        return str(self._api.call("PATCH", path, needs="title", body={"title": title})["title"])

    def delete(self, session: str) -> bool:
        """Stop the session's turn and remove it; False if the turn has not stopped yet."""
        path = f"/session/{_named(session)}"
        return not self._api.call("DELETE", path, needs="ok").get("pending", False)


def _named(session: str) -> str:
    if not _SESSION.fullmatch(session):
        raise ValueError(
            f"{session!r} is no session id: 1 to 128 of A-Z a-z 0-9 . _ -, and begins with a "
            "letter or digit"
        )
    return session


def _image(image: Image) -> dict[str, str]:
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    for begins, kind in _IMAGES.items():
        if data.startswith(begins):
            return {"data": base64.b64encode(data).decode(), "mimeType": kind}
    name = "these bytes are" if isinstance(image, bytes) else f"{image} is"
    raise ValueError(f"{name} no png, jpeg, gif or webp")
