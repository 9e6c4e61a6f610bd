"""The event reader against a literal reading of the WHATWG standard, whatever way bytes are cut."""

from __future__ import annotations

import collections.abc as cabc
import itertools
import typing as t

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from agentao_web.agents.model.sse import Event
from agentao_web.agents.model.sse import EventReader
from agentao_web.agents.model.sse import EventTooLong


class Standard:
    """The steps of "event stream interpretation", one after the other, over all bytes at once.

    Slow, and of no use for a stream; written to be compared with the text of the standard.
    """

    def __init__(self, stream: bytes) -> None:
        self.events: list[Event] = []
        self.last_event_id = ""
        self.retry: int | None = None
        self._data = self._type = self._id = ""
        self._rest = self._interpret(stream.decode("utf-8", "replace").removeprefix("\ufeff"))

    def _interpret(self, text: str) -> str:
        line, at = "", 0
        while at < len(text):
            if text[at] in "\r\n":
                at += 2 if text[at : at + 2] == "\r\n" else 1
                self._process(line)
                line = ""
            else:
                line += text[at]
                at += 1
        # "Once the end of the file is reached, any pending data must be discarded."
        return line

    def _process(self, line: str) -> None:
        if line == "":
            self._dispatch()
        elif line[0] == ":":
            pass
        elif ":" in line:
            field, value = line.split(":", 1)
            self._field(field, value[1:] if value[:1] == " " else value)
        else:
            self._field(line, "")

    def _field(self, field: str, value: str) -> None:
        if field == "event":
            self._type = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id":
            if "\0" not in value:
                self._id = value
        elif field == "retry":
            if value and all(digit in "0123456789" for digit in value):
                self.retry = int(value) if len(value) < 16 else self.retry
        elif field == "error":
            # Ours: no field of the standard.
            self.events.append(("error", value))

    def _dispatch(self) -> None:
        self.last_event_id = self._id
        if self._data == "":
            self._type = ""
            return
        self.events.append((self._type or "message", self._data.removesuffix("\n")))
        self._data = self._type = ""


def read(packets: cabc.Iterable[bytes], **options: t.Any) -> tuple[list[Event], str, int | None]:
    """The events of *packets*, the last id and the time to wait."""
    reader = EventReader(**options)
    events = [event for packet in packets for event in reader.feed(packet)]
    return events, reader.last_event_id, reader.retry


def events(stream: bytes) -> list[Event]:
    return read([stream])[0]


_WORDS = [
    *(b"data", b"event", b"id", b"retry", b"error", b"datax", b"", b"\xef\xbb\xbfdata"),
    *(b":", b": ", b":  ", b" ", b"\0", b"12", "٣".encode(), b"9" * 20),
    *(b"\n", b"\n\n", b"\r", b"\r\n", b"\r\r", b"\n\r"),
    *(b"data: x\n\n", b"data: {}\n\n", b"\xef\xbb\xbf", "grün 🎉".encode()),
    *(b"\xff", b"\xf0\x9f", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80"),
]
_STREAMS = st.lists(st.sampled_from(_WORDS), max_size=30).map(b"".join) | st.binary(max_size=60)


@settings(max_examples=600, deadline=None)
@given(stream=_STREAMS, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_any_cutting_is_read_as_the_standard_reads_the_whole(
    stream: bytes, cuts: list[int]
) -> None:
    edges = [0, *sorted({cut for cut in cuts if cut < len(stream)}), len(stream)]
    packets = [stream[a:b] for a, b in itertools.pairwise(edges)]
    told = Standard(stream)

    for cut in (packets, [stream[n : n + 1] for n in range(len(stream))]):
        assert read(cut) == (told.events, told.last_event_id, told.retry)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # The standard's own examples.
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10")]),
        (
            b": test stream\n\ndata: first\nid: 1\n\ndata:second event\nid\n\ndata:  last\n\n",
            [("message", "first"), ("message", "second event"), ("message", " last")],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [("message", ""), ("message", "\n")]),
        (b"data:test\n\ndata: test\n\n", [("message", "test")] * 2),
        (b"event: add\ndata: 73857293\n\n", [("add", "73857293")]),
        # Blocks without data dispatch nothing, and leave nothing behind.
        (b"event: ping\n\ndata: x\n\n", [("message", "x")]),
        (b"retry: 3000\n\nid: 7\n\n:\n\n", []),
        # A field's name is all before the first colon; an unknown one is ignored.
        (b"Data: x\ndata : x\n{}\n\n", []),
        (b"data: a:b\n\n", [("message", "a:b")]),
    ],
)
def test_examples(stream: bytes, expected: list[Event]) -> None:
    assert events(stream) == expected == Standard(stream).events


def test_an_event_ended_by_cr_does_not_wait_for_what_follows() -> None:
    reader = EventReader()

    assert reader.feed(b"data: x\r\r") == [("message", "x")]
    assert reader.feed(b"\ndata: y\r") == []
    assert reader.feed(b"\n\r\n") == [("message", "y")]


def test_what_the_stream_ends_in_the_middle_of_is_handed_over_apart() -> None:
    reader = EventReader()

    assert reader.feed(b"data: a\n\nevent: last\ndata: b") == [("message", "a")]
    assert reader.end() == [("last", "b")]
    assert reader.end() == []


def test_a_field_of_errors_is_an_event() -> None:
    assert events(b'error: {"code":400}\n\ndata: [DONE]\n\n') == [
        ("error", '{"code":400}'),
        ("message", "[DONE]"),
    ]


@pytest.mark.parametrize(
    "packets",
    [
        [b"data: " + b"x" * 90, b"x" * 20],
        [b"data: " + b"x" * 60 + b"\n"] * 2,
        [b"data: " + b"x" * 110 + b"\n\n"],
        [b"data:" + b"x" * 110 + b"\n\n"],
        [b": " + b"x" * 110],
        [b"data:\n"] * 200,
    ],
)
def test_an_event_without_an_end_is_an_error_and_not_memory(packets: list[bytes]) -> None:
    with pytest.raises(EventTooLong):
        read(packets, max_event=100)


def test_many_small_events_are_not_one_large_one() -> None:
    assert len(read([b"data: x\n\n" * 1_000], max_event=100)[0]) == 1_000
