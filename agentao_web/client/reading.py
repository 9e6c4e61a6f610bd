"""Reading a session's log over drops: nothing twice, nothing missing, by stream or by long-poll."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import re
import typing as t

import httpx
from httpx_sse import EventSource

from agentao_web.client.api import MOST
from agentao_web.client.api import SSE
from agentao_web.client.api import Api
from agentao_web.client.api import Patience
from agentao_web.client.api import too_long
from agentao_web.client.errors import ApiError
from agentao_web.client.errors import passes
from agentao_web.client.events import Event
from agentao_web.client.events import event

#: How long a long-poll waits, in seconds.
_WAIT: t.Final = 20
#: The pause after a long-poll that brought nothing.
_EARLY: t.Final = 0.25
#: So many streams in a row that bring nothing new, and it is polled instead.
_EMPTY_STREAMS: t.Final = 3
#: The longest the server's hint when to come back is believed, in seconds.
_LONGEST_HINT: t.Final = 10.0
#: A hint that ends a stream, and how much of the end is looked at for it.
_RETRY: t.Final = re.compile(r"(?:\A|[\r\n])retry: ?\d+(?:\r\n|\r|\n)\Z")
_END: t.Final = 64


class NoStream(Exception):
    """Streams do not get through; poll."""


class Ways:
    """How one client reads. What does not let streams through once may have been a bad moment;
    twice, and the client does not try again."""

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self._silent = 0

    def held_back(self) -> None:
        """A stream was silent from its start, and a poll was answered."""
        self._silent += 1
        if self._silent > 1:
            self.stream = False

    def came_through(self) -> None:
        self._silent = 0


class Reading:
    """One reader of a session's log. It goes on where it was, however often it is iterated."""

    def __init__(
        self, api: Api, ways: Ways, sid: str, after: int | None = None, *, follow: bool = False
    ) -> None:
        self.session_id = sid
        self.cursor = after
        """The ``seq`` of the last event seen."""
        self.over = False
        self._api = api
        self._ways = ways
        self._path = f"/chat/{sid}"
        self._follow = follow
        self._polls = not ways.stream
        self._silent = False
        """A stream of ours was silent from its start."""
        self._longest = _WAIT
        self._wait = 0
        self._hint: float | None = None
        self._idle = False
        self._alive = False
        """The last stream brought something, if only that it is still there."""
        self._empty = 0
        self._late: Event | None = None
        """An ending that had to be found out."""

    def events(self) -> cabc.Iterator[Event]:
        """The events from here on, over any drop that is shorter than the client's patience."""
        patience = self._api.waiting()
        while not self.over:
            self._hint, self._idle, self._alive = None, False, False
            news, before = False, self.cursor
            try:
                with contextlib.closing(self._open(patience)) as source:
                    for found in source:
                        if self._take(found):
                            news = True
                            patience.reset()
                            yield found
            except NoStream:
                self._poll_from_now_on()
            except httpx.RequestError as exc:
                if self._alive:
                    patience.reset()
                self._broken(exc, news)
                patience.pause(exc)
            except ApiError as exc:
                self._refused(exc, patience)
            else:
                self._go_on(patience, news or self.cursor != before)
            if self._late is not None and self._take(self._late):
                yield self._late

    # -- what a turn does in its own way ---------------------------------------------------------

    def _open(self, patience: Patience) -> cabc.Generator[Event, None, None]:
        return self._poll(patience) if self._polls else self._stream()

    def _take(self, found: Event) -> bool:
        """Move the cursor past *found*; False if it was there before, or is not for us."""
        if found.seq is None:
            # Never stored: the session was deleted, or the store is away.
            self.over = found.ends
            return True
        if found.type != "gap" and self.cursor is not None and found.seq <= self.cursor:
            return False
        # A gap may lead back, to where the log of a restored database ends.
        self.cursor = found.seq
        return True

    def _caught_up(self, patience: Patience) -> None:
        """The session is idle and everything was read."""
        self.over = not self._follow

    # -- reading -----------------------------------------------------------------------------------

    def _stream(self) -> cabc.Generator[Event, None, None]:
        params = {"after": self.cursor, "follow": 1 if self._follow else None}
        yield from self._streamed("GET", f"{self._path}/events", params=params)

    def _streamed(
        self, method: str, path: str, **request: t.Any
    ) -> cabc.Generator[Event, None, None]:
        """The events of a stream, until it ends; NoStream if it does not even begin."""
        response = None
        try:
            with self._api.open(method, path, accept=SSE, **request) as response:
                if response.status_code == 204:
                    self._idle = True
                    return
                kind = response.headers.get("Content-Type", "").partition(";")[0]
                if kind.strip().lower() != SSE:
                    raise NoStream
                bounded = _Bounded(response)
                for message in EventSource(t.cast(httpx.Response, bounded)).iter_sse():
                    bounded.reset()
                    if message.retry is not None:
                        self._hint = min(message.retry, _LONGEST_HINT * 1000) / 1000
                    if message.data:
                        yield _decoded(message.data, response)
                        self._ways.came_through()
        except httpx.ReadTimeout:
            if response is not None and response.num_bytes_downloaded:
                raise
            self._silent = True
            raise NoStream from None
        finally:
            self._alive = response is not None and response.num_bytes_downloaded > 0

    def _poll(self, patience: Patience) -> cabc.Generator[Event, None, None]:
        params = {"after": self.cursor, "wait": self._wait}
        _, page = self._api.once(
            "GET",
            f"{self._path}/events",
            needs="events cursor state",
            params=params,
            wait=float(self._wait),
        )
        found = [_event(fields) for fields in page["events"]]
        patience.reset()
        if self._silent:
            self._silent = False
            self._ways.held_back()
        yield from found
        idle = page["state"] == "idle"
        self._idle = idle and not found
        if not (found or idle):
            # A worker that leaves does not wait.
            self._hint = _EARLY
        self._wait = 0 if idle and not self._follow else self._longest

    # -- when it does not go on --------------------------------------------------------------------

    def _poll_from_now_on(self) -> None:
        self._polls = True

    def _broken(self, exc: httpx.RequestError, news: bool) -> None:
        if self._polls and isinstance(exc, httpx.ReadTimeout):
            # Perhaps something on the way does not wait for so long.
            self._wait = self._longest = max(1, self._wait // 4)
        elif not isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
            self._note_empty(news)

    def _note_empty(self, news: bool) -> None:
        """Streams that are always cut before they bring anything are no streams."""
        if self._polls or news:
            self._empty = 0
            return
        self._empty += 1
        if self._empty >= _EMPTY_STREAMS:
            self._poll_from_now_on()

    def _refused(self, exc: ApiError, patience: Patience) -> None:
        if exc.status == 406 and not self._polls:
            self._poll_from_now_on()
        elif exc.code in ("no_stream_slot", "too_many_streams"):
            if not self._polls:
                # A place may be free again for the next one.
                self._poll_from_now_on()
                return
            self._wait = 0
            patience.pause(exc, min(exc.retry_after or 1.0, 1.0))
        elif passes(exc):
            patience.pause(exc, exc.retry_after)
        else:
            raise exc

    def _go_on(self, patience: Patience, news: bool) -> None:
        """It ended cleanly: because all is said, because it was to come back, or because of a cut
        that looks like an end."""
        if self.over:
            return
        if self._idle:
            self._caught_up(patience)
        elif self._hint is not None:
            patience.reset()
            patience.pause(_Ended("the server ended the stream"), self._hint)
        elif not news:
            self._note_empty(news)
            patience.pause(_Ended("nothing new was brought"))


class _Bounded:
    """A stream that is given up when one event of it does not end."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = response.headers
        self._response = response
        self._room = MOST

    def reset(self) -> None:
        """An event has come to its end."""
        self._room = MOST

    def iter_text(self) -> cabc.Iterator[str]:
        end = ""
        for text in self._response.iter_text():
            self._room -= len(text)
            if self._room < 0:
                raise too_long(self._response)
            end = (end + text)[-_END:]
            yield text
        if _RETRY.search(end):
            # The hint holds as it is (HTML, section 9.2.6); httpx-sse waits for a blank line.
            yield "\n\n"


class _Ended(Exception):
    """Why it is tried again."""


def _decoded(data: str, response: httpx.Response) -> Event:
    try:
        return _event(json.loads(data))
    except (ValueError, RecursionError):
        raise httpx.DecodingError("garbled event", request=response.request) from None


def _event(fields: t.Any) -> Event:
    try:
        return event(fields)
    except ValueError as exc:
        raise httpx.DecodingError(str(exc)) from None
