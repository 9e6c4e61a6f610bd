"""Who reads, and who left: a reader pulls from a session's log with a cursor of its own.

There are no queues per reader, so a slow one costs nothing and a dead one leaves nothing behind.
One watcher thread sees clients that close, even while nothing is being sent to them.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import os
import random
import select
import socket
import threading
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
_CLOSED: t.Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


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
        self._asked: set[str] = set()
        """Questions of another worker's turn that were shown and not yet closed."""
        self._store = store
        self._watcher = watcher
        self._sock = sock
        self._dismissed = dismissed
        self._entered = entered

    def __enter__(self) -> Reader:
        self.live.attach(self)
        self._entered()
        if self._watcher is not None and self._sock is not None:
            self._watcher.watch(self._sock, self._on_close)
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
        unstored = self._unstored()
        events = self._advance(limit, max_bytes)
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
            self.told, self.final = self.cursor >= (final.seq or 0), final
        elif self.turn is None and self.caught_up:
            self.told = True

    def _tell(self, final: Event) -> list[Event]:
        self.told, self.final = True, final
        return [final]

    def wait(self, until: float) -> None:
        """Wait until there may be something to read, or *until* (of the session's clock)."""
        self.live.wait(self, until)

    def _advance(self, limit: int, max_bytes: int) -> list[Event]:
        cursor = self.cursor
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
    reader: Reader, wire: Dialect, *, heartbeat: float, lease: float, follow: bool
) -> cabc.Iterator[bytes]:
    """Everything *reader* gets, encoded, until its end.

    A reader of one turn ends with the turn. Others end when the session is idle and they have
    everything (unless they *follow*), or after about *lease* seconds with a hint to come back, and
    so does one whose turn waits for a person. A comment goes out after *heartbeat* seconds of
    silence.
    """
    clock = reader.live.clock
    ends = clock() + lease * random.uniform(0.9, 1.0)
    silent_since = float("-inf")
    with reader:
        while not reader.over:
            events = reader.read(limit=_BATCH, max_bytes=_BATCH_BYTES)
            now = clock()
            if events:
                silent_since = now
                yield wire.frames(events)
            elif reader.turn_id is None and reader.caught_up and not follow:
                return
            elif reader.leased and now >= ends:
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
    """One epoll over all stream sockets of a worker: calls back within moments of a close.

    Facts: Linux ``epoll(7)``; EPOLLRDHUP also sees a half-close, which behind nginx never comes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: dict[int, cabc.Callable[[], None]] = {}
        self._epoll: select.epoll | None = None
        self._wake: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def watch(self, sock: socket.socket, callback: cabc.Callable[[], None]) -> None:
        """Call *callback* once when the peer of *sock* closes, from the watcher's thread."""
        fd = sock.fileno()
        if fd < 0:
            callback()
            return
        with self._lock:
            epoll = self._started()
            self._callbacks[fd] = callback
            epoll.register(fd, _CLOSED | select.EPOLLONESHOT)

    def forget(self, sock: socket.socket) -> None:
        """Look after *sock* no more; before it is closed, since its number is used again."""
        fd = sock.fileno()
        with self._lock:
            if self._callbacks.pop(fd, None) is not None and self._epoll is not None:
                self._epoll.unregister(fd)

    def close(self) -> None:
        """End the thread and give the descriptors back."""
        with self._lock:
            thread, wake, epoll = self._thread, self._wake, self._epoll
            self._thread = self._wake = self._epoll = None
            self._callbacks.clear()
        if thread is None or wake is None or epoll is None:
            return
        os.write(wake[1], b"x")
        thread.join(5)
        epoll.close()
        os.close(wake[0])
        os.close(wake[1])

    def _started(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._epoll.register(self._wake[0], select.EPOLLIN)
            self._thread = threading.Thread(
                target=self._run,
                args=(self._epoll, self._wake[0]),
                name="agentao-watcher",
                daemon=True,
            )
            self._thread.start()
        return self._epoll

    def _run(self, epoll: select.epoll, wake: int) -> None:
        while True:
            for fd, _ in epoll.poll():
                if fd == wake:
                    return
                self._closed(fd)

    def _closed(self, fd: int) -> None:
        with self._lock:
            callback = self._callbacks.get(fd)
            # The descriptor may be a new connection's by now: ask it again before believing.
            if callback is None or not _is_closed(fd):
                return
        callback()


def _is_closed(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
