"""Who reads, and who left: a reader pulls from a session's log with a cursor of its own.

There are no queues per reader, so a slow one costs nothing and a dead one leaves nothing behind.
One watcher thread sees clients that close, even while nothing is being sent to them.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import os
import random
import select
import selectors
import socket
import threading
import time
import types
import typing as t

from agentao_web.core.errors import NotFound
from agentao_web.core.log import Event
from agentao_web.core.log import Slice
from agentao_web.core.log import is_ahead
from agentao_web.core.log import joined
from agentao_web.core.turn import ENDS
from agentao_web.core.turn import State
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.store import Store

#: How much a stream takes from the log at once: events, bytes.
#: A write of that size has to get through within SEND_TIMEOUT, so it is not a large one.
_BATCH, _BATCH_BYTES = 500, 2**16
#: How poll(2) says that a peer is gone. The first is Linux's own, and sees it behind unread bytes.
_GONE: t.Final = sum(
    getattr(select, name, 0) for name in ("POLLRDHUP", "POLLHUP", "POLLERR", "POLLNVAL")
)
#: How often a socket with bytes that nobody reads is looked at, in seconds.
_LOOK_AGAIN: t.Final = 0.5


class Reader:
    """Someone reading one session, or one turn of it. Use it as a context manager."""

    def __init__(
        self,
        live: Live,
        store: Store,
        cursor: int | None,
        *,
        turn: LiveTurn | None = None,
        turn_id: str | None = None,
        ended: Event | None = None,
        watcher: Watcher | None = None,
        sock: socket.socket | None = None,
        dismissed: cabc.Callable[[], bool] = lambda: False,
        entered: cabc.Callable[[], None] = lambda: None,
    ) -> None:
        self.live = live
        self.turn = turn
        """The turn that is read, if it is one of ours."""
        self.turn_id = turn.turn.id if turn is not None else turn_id
        """The one turn that is read; None for all of the session."""
        self.cursor = cursor
        self.left = False
        """The client closed the connection."""
        self.told = False
        """It was shown the end: its turn's last event, or the session's farewell."""
        self.final: Event | None = None
        """That last event."""
        self._ended = ended
        """The turn's last event, if it had ended before and is not one of ours."""
        self.saw_idle = True
        """The session was idle when it was last asked for that."""
        self.found_nothing: int | None = None
        """The session's ``rings`` just before the last look, if there was nothing to read then."""
        self._asked: set[str] = set()
        """Questions of another worker's turn that were shown and not yet closed."""
        self._store = store
        self._watcher = watcher
        self._sock = sock
        self._dismissed = dismissed
        self._entered = entered

    def __enter__(self) -> Reader:
        self.live.attach(self)
        try:
            self._entered()
            if self._watcher is not None and self._sock is not None:
                self._watcher.watch(self._sock, self._on_close)
        except BaseException:
            # No descriptor or thread is to be had: nobody would ever detach it.
            self.live.detach(self, left=False)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if self._watcher is not None and self._sock is not None:
            self._watcher.forget(self._sock)
        # A failed write closes the generator: either the client is gone, or it took nothing for
        # so long that we dropped it, which is no wish of its own to stop the turn.
        gone = self.left or (exc_type is GeneratorExit and self._hung_up())
        self.live.detach(self, left=gone and not self.told)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent: the client left, was told the end, or we close."""
        if self.left or self.told or self._dismissed():
            return True
        # Evicted before this reader came in: nothing is written here any more.
        live = self.live
        final = self.turn.final if self.turn is not None else None
        return live.closed and live.farewell is None and final is None

    @property
    def waits_for_people(self) -> bool:
        """Whether the turn that is read waits for an answer."""
        if self.turn is None:
            return bool(self._asked)
        return self.turn.turn.state is State.WAITING

    @property
    def leased(self) -> bool:
        """Whether it is to come back after a while, so that no thread waits for a person."""
        return self.turn_id is None or self.waits_for_people

    @property
    def caught_up(self) -> bool:
        """Whether the session is idle and this reader has everything."""
        idle, cursor, head = self.live.state() == "idle", self.cursor, self.live.shown
        self.saw_idle = idle
        return idle and cursor is not None and cursor >= head and not is_ahead(cursor, head)

    def read(self, *, limit: int, max_bytes: int) -> list[Event]:
        """What there is after the cursor, text joined, and move the cursor past it.

        An empty list means nothing for this reader yet; see ``told`` and ``over``.
        """
        if self.turn is None and self.live.farewell is not None:
            return self._tell(self.live.farewell)
        events = self._advance(limit, max_bytes)
        # Asked afterwards: an end that comes later rings again.
        unstored = self._unstored()
        if self.turn_id is not None:
            events = [e for e in events if e.turn_id == self.turn_id or _is_gap(e)]
            if self.turn is None:
                self._look_for_questions(events)
            if events and events[-1].type in ENDS:
                self._tell(events[-1])
        if not self.told and unstored is not None and unstored.seq is None:
            # Never stored: shown once the reader has all that was.
            if self.cursor is None or self.cursor >= self.live.shown:
                events += self._tell(unstored)
        elif self.turn_id is not None and not self.told and (not events or _is_gap(events[-1])):
            self._look_for_the_end()
        if events and _is_gap(events[0]):
            events[0] = dataclasses.replace(events[0], ts=self.live.clock())
        return joined(events)

    def _unstored(self) -> Event | None:
        """How our turn ended, as far as it is to be shown without being in the log."""
        if self.turn is None:
            return None
        late = self.turn.late
        if self.turn.final is None and late is not None and late[0] <= self.live.clock():
            return late[1]
        return self.turn.final

    def _look_for_questions(self, events: list[Event]) -> None:
        """Another worker's turn tells of its state by its events only."""
        for event in events:
            if event.type == "question_closed":
                self._asked.discard(event.data["question_id"])
            elif "question_id" in event.data:
                self._asked.add(event.data["question_id"])

    def _look_for_the_end(self) -> None:
        """The turn's last event may be gone from the log: pruned, or read before this reader."""
        final = self.turn.final if self.turn is not None else self._ended
        if final is not None and self.cursor is not None:
            # One that is in no log is shown as `_unstored` says, and not looked for here.
            if final.seq is not None:
                self.told, self.final = self.cursor >= final.seq, final
        elif self.turn is None and self.caught_up:
            self.told = True

    def _tell(self, final: Event) -> list[Event]:
        self.told, self.final = True, final
        return [final]

    def wait(self, until: float) -> None:
        """Wait until there may be something to read, or *until* (of the session's clock)."""
        self.live.wait(self, until)

    def _advance(self, limit: int, max_bytes: int) -> list[Event]:
        cursor, rings = self.cursor, self.live.rings
        part = None
        if cursor is not None:
            part = self.live.take(cursor, limit=limit, max_bytes=max_bytes)
        if part is None:
            try:
                part = self._store.events(self.live.key, cursor, limit=limit, max_bytes=max_bytes)
            except NotFound:
                # Deleted under this reader; what it is told of that is no part of the log.
                self.told = self.turn is None
                part = Slice([], self.live.head)
        self.cursor = part.cursor
        self.found_nothing = None if part.events else rings
        return part.events

    def _hung_up(self) -> bool:
        return self._sock is None or self._sock.fileno() < 0 or _is_closed(self._sock.fileno())

    def _on_close(self) -> None:
        self.left = True
        self.live.wake(self)


def _is_gap(event: Event) -> bool:
    return event.type == "gap"


class Dialect(t.Protocol):
    """What a stream needs of a wire (agentao_web.wire.Wire)."""

    @property
    def KEEP_ALIVE(self) -> bytes: ...
    def frames(self, events: cabc.Iterable[Event]) -> bytes: ...
    def retry(self, milliseconds: int) -> bytes: ...


def stream(
    reader: Reader,
    wire: Dialect,
    *,
    heartbeat: float,
    lease: float,
    follow: bool,
    alone: bool = False,
) -> cabc.Iterator[bytes]:
    """Everything *reader* gets, encoded, until its end.

    A reader of one turn ends with the turn. Others end when the session is idle and they have
    everything (unless they *follow*), or after about *lease* seconds with a hint to come back, and
    so does one whose turn waits for a person. A comment goes out after *heartbeat* seconds of
    silence.

    Where nothing is answered beside a stream it is *alone*: then each ends with its lease, and at
    once when there is nothing to send until somebody else has been heard.
    """
    clock = reader.live.clock
    ends = clock() + lease * random.uniform(0.9, 1.0)
    silent_since = float("-inf")
    with reader:
        while not reader.over and not (alone and clock() >= ends):
            events = reader.read(limit=_BATCH, max_bytes=_BATCH_BYTES)
            now = clock()
            if events:
                silent_since = now
                yield wire.frames(events)
            elif reader.turn_id is None and reader.caught_up and not follow:
                return
            elif reader.leased and now >= ends:
                break
            elif alone and (reader.waits_for_people or (reader.turn is None and reader.caught_up)):
                break
            elif now - silent_since >= heartbeat:
                silent_since = now
                yield wire.KEEP_ALIVE
            else:
                reader.wait(min(silent_since + heartbeat, ends if now < ends else float("inf")))
        if not (reader.told or reader.left):
            # Ended on purpose: everybody comes back, but not at the same moment.
            yield wire.retry(random.randint(500, 2000))


def poll(reader: Reader, *, wait: float, limit: int, max_bytes: int) -> list[Event]:
    """What there is after the cursor, or what comes within *wait* seconds; perhaps nothing."""
    until = reader.live.clock() + wait
    with reader:
        while True:
            events = reader.read(limit=limit, max_bytes=max_bytes)
            if events or reader.over or reader.live.clock() >= until:
                return events
            reader.wait(until)


def ending(reader: Reader, *, wait: float) -> Event | None:
    """How the reader's turn ended, after waiting for that at most *wait* seconds.

    None also as soon as it waits for a person: a thread must not.
    """
    until = reader.live.clock() + wait
    with reader:
        while True:
            events = reader.read(limit=_BATCH, max_bytes=_BATCH_BYTES)
            if reader.over or reader.waits_for_people or reader.live.clock() >= until:
                return reader.final
            if not events:
                reader.wait(until)


class Watcher:
    """One thread for all stream sockets of a worker: calls back within moments of a close.

    *selector* makes what it waits with; the default is the best that this system has.
    """

    def __init__(self, selector: cabc.Callable[[], selectors.BaseSelector] | None = None) -> None:
        self._lock = threading.Lock()
        self._callbacks: dict[int, cabc.Callable[[], None]] = {}
        self._selector = selector
        self._eyes: _Epoll | _Readable | None = None
        self._thread: threading.Thread | None = None

    def watch(self, sock: socket.socket, callback: cabc.Callable[[], None]) -> None:
        """Call *callback* once when the peer of *sock* closes, from the watcher's thread."""
        fd = sock.fileno()
        if fd < 0:
            callback()
            return
        with self._lock:
            eyes = self._started()
            self._callbacks[fd] = callback
            eyes.add(fd)

    def forget(self, sock: socket.socket) -> None:
        """Look after *sock* no more; before it is closed, since its number is used again."""
        fd = sock.fileno()
        with self._lock:
            if self._callbacks.pop(fd, None) is not None and self._eyes is not None:
                self._eyes.remove(fd)

    def close(self) -> None:
        """End the thread and give the descriptors back."""
        with self._lock:
            thread, eyes = self._thread, self._eyes
            self._thread = self._eyes = None
            self._callbacks.clear()
        if thread is None or eyes is None:
            return
        eyes.shut = True
        eyes.wake()
        thread.join(5)
        eyes.close()

    def _started(self) -> _Epoll | _Readable:
        if self._eyes is None:
            eyes: _Epoll | _Readable
            # Asked now, not at import: gevent takes epoll away.
            if self._selector is None and hasattr(select, "epoll"):
                eyes = _Epoll()
            else:
                eyes = _Readable((self._selector or selectors.DefaultSelector)())
            thread = threading.Thread(
                target=self._run, args=(eyes,), name="agentao-watcher", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                eyes.close()
                raise
            self._eyes, self._thread = eyes, thread
        return self._eyes

    def _run(self, eyes: _Epoll | _Readable) -> None:
        while not eyes.shut:
            for fd in eyes.wait():
                self._look(eyes, fd)

    def _look(self, eyes: _Epoll | _Readable, fd: int) -> None:
        with self._lock:
            callback = self._callbacks.get(fd)
            if callback is None:
                return
            # The descriptor may be a new connection's by now: ask it again before believing.
            if not _is_closed(fd):
                eyes.wait_longer(fd)
                return
            eyes.remove(fd)
        callback()


class _Epoll:
    """Linux: tells of closes only, each once. Sockets are added while it waits.

    ``EPOLLRDHUP`` also sees a half-close, which behind nginx never comes.
    """

    def __init__(self) -> None:
        self.shut = False
        self._epoll = select.epoll()
        self._bell = _Bell()
        self._epoll.register(self._bell.fd, select.EPOLLIN)

    def add(self, fd: int) -> None:
        closed = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
        self._epoll.register(fd, closed | select.EPOLLONESHOT)

    def remove(self, fd: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._epoll.unregister(fd)

    def wait_longer(self, fd: int) -> None:
        """Nothing: a new connection was added under that number."""

    def wait(self) -> list[int]:
        return [fd for fd, _ in self._epoll.poll() if fd != self._bell.fd]

    def wake(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        self._epoll.close()
        self._bell.close()


class _Readable:
    """Any selector (macOS, gevent): a socket that can be read may have been closed.

    One that can be read because its client sent more than its request would wake us for ever: it
    is looked at now and then instead.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.shut = False
        self._selector = selector
        self._unread: set[int] = set()
        self._looked = 0.0
        self._bell = _Bell()
        selector.register(self._bell.fd, selectors.EVENT_READ)

    def add(self, fd: int) -> None:
        self._selector.register(fd, selectors.EVENT_READ)
        self._bell.ring()  # One that waits already does not see it.

    def remove(self, fd: int) -> None:
        self._unread.discard(fd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def wait_longer(self, fd: int) -> None:
        self.remove(fd)
        self._unread.add(fd)

    def wait(self) -> list[int]:
        try:
            found = self._selector.select(_LOOK_AGAIN if self._unread else None)
        except OSError:
            self._drop_closed()
            return []
        self._bell.hush()
        ready = {key.fd for key, _ in found} - {self._bell.fd}
        if self._unread and time.monotonic() >= self._looked + _LOOK_AGAIN:
            self._looked = time.monotonic()
            ready.update(list(self._unread))
        return list(ready)

    def _drop_closed(self) -> None:
        """A socket was closed before it was removed: select(2) would fail for all, for ever."""
        for key in list(self._selector.get_map().values()):
            try:
                os.fstat(key.fd)
            except OSError:
                self.remove(key.fd)

    def wake(self) -> None:
        self._bell.ring()

    def close(self) -> None:
        self._selector.close()
        self._bell.close()


class _Bell:
    """A descriptor that can be read when somebody has rung."""

    def __init__(self) -> None:
        self.fd, self._other = os.pipe()
        for fd in (self.fd, self._other):
            os.set_blocking(fd, False)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # Full: it can be read.
            os.write(self._other, b"x")

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._other)


def _is_closed(fd: int) -> bool:
    """Whether the peer is gone: in poll's own words, else because nothing is left to read."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, _GONE | select.POLLIN)
        found = sum(events for _, events in poll.poll(0))
        if not found or found & _GONE:
            return bool(found)
    elif not select.select([fd], [], [], 0)[0]:
        return False
    with socket.socket(fileno=os.dup(fd)) as twin:
        try:
            return not twin.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
