"""Server-sent events as the WHATWG standard reads them, from bytes cut anywhere. Knows bytes and
text only; must never know sockets, JSON or models.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

Where this reader differs from a browser's, on purpose:

1. The standard discards an event that the stream ends in the middle of. `end` returns it, apart
   from the others: some servers leave out the last blank line, and a caller that knows what an
   event looks like can tell whether this one is complete.
2. A line `error: …` is an event of the type `error` of its own. The standard has no such field;
   llama.cpp reported its failures in one until September 2025, and no client saw them.
3. The size of an event is limited, and a larger one is an error: a server that never ends its
   event would take all the memory.
4. A `retry` of more than 15 digits is ignored.
"""

from __future__ import annotations

import typing as t

#: The type of an event, "message" if it named none, and its data.
Event = tuple[str, str]

#: Bytes of one event. The longest answer in one piece is far from this.
MAX_EVENT: t.Final = 16 * 1024 * 1024

_DEFAULT: t.Final = "message"
_BOM: t.Final = "\ufeff"


class EventTooLong(ValueError):
    """An event is larger than the reader's limit."""


class EventReader:
    """Bytes in, events out, as soon as each is complete."""

    def __init__(self, *, max_event: int = MAX_EVENT) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        """Milliseconds the server wants a client to wait before it connects again."""
        self._max = max_event
        self._line = bytearray()
        self._skip_lf = False
        self._begun = False
        # The block that is being read.
        self._data: list[str] = []
        self._size = 0
        self._type = ""
        self._id = ""

    def feed(self, packet: bytes) -> list[Event]:
        """The events that *packet* completes."""
        if b"\r" in packet or self._skip_lf:
            packet = self._only_line_feeds(packet)
        last = packet.rfind(b"\n") + 1
        if not last:
            self._line += packet
            self._check_size(len(self._line))
            return []
        # Complete lines only, so no character is cut; and a bad byte never takes the end of its
        # line with it, as that is ASCII.
        lines = packet if last == len(packet) else packet[:last]
        text = (self._line + lines if self._line else lines).decode("utf-8", "replace")
        self._line[:] = packet[last:]
        if not self._begun:
            self._begun = True
            text = text.removeprefix(_BOM)
        events = self._blocks(text)
        self._check_size(len(self._line))
        return events

    def end(self) -> list[Event]:
        """The event the stream ended in the middle of, if there is one: it may be cut off."""
        text = self._line.decode("utf-8", "replace")
        self._line.clear()
        if not self._begun:
            text = text.removeprefix(_BOM)
        events: list[Event] = []
        if text:
            self._take_line(text, events)
        self._dispatch(events)
        return events

    def _only_line_feeds(self, packet: bytes) -> bytes:
        # CR, LF and CRLF all end a line. A CR ends it at once, as nothing may follow for long;
        # the LF that may come with the next packet is then a part of it.
        if self._skip_lf and packet:
            packet = packet.removeprefix(b"\n") if packet[0] == 10 else packet
            self._skip_lf = False
        if packet.endswith(b"\r"):
            self._skip_lf = True
        return packet.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _blocks(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._data or self._type:
            # In the middle of a block: the next blank line may be the first of these.
            for line in text[:-1].split("\n"):
                self._take_line(line, events)
            return events
        *blocks, rest = text.split("\n\n")
        for block in blocks:
            # What nearly all blocks of a model are, read in one step: one line of data.
            if block.startswith("data: ") and "\n" not in block:
                self._check_size(len(block))
                self.last_event_id = self._id
                events.append((_DEFAULT, block[6:]))
                continue
            for line in block.split("\n"):
                self._take_line(line, events)
            self._dispatch(events)
        if rest:
            for line in rest[:-1].split("\n"):
                self._take_line(line, events)
        return events

    def _take_line(self, line: str, events: list[Event]) -> None:
        if not line:
            self._dispatch(events)
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._size += len(value) + 1
            self._check_size(self._size)
        elif name == "event":
            self._type = value
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry":
            if value.isascii() and value.isdigit() and len(value) < 16:
                self.retry = int(value)
        elif name == "error":
            events.append(("error", value))
        # A comment has an empty name. All other fields are ignored.

    def _dispatch(self, events: list[Event]) -> None:
        self.last_event_id = self._id
        if self._data:
            events.append((self._type or _DEFAULT, "\n".join(self._data)))
            self._data.clear()
            self._size = 0
        self._type = ""

    def _check_size(self, size: int) -> None:
        if size > self._max:
            raise EventTooLong(f"an event of more than {self._max} bytes")
