"""What people saw, derived from events: the source of ``/messages``, and of a lost turn's note."""

from __future__ import annotations

import typing as t

from agentao_web.core.log import Event

Entry = dict[str, t.Any]


class Transcript:
    """Collects the display entries of one turn while its events go by."""

    __slots__ = ("entries", "_tools", "_text")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._tools: dict[str, Entry] = {}
        self._text: list[str] | None = None

    def add(self, event: Event) -> None:
        """Take note of *event*; types that are not for display are passed over."""
        if event.type == "llm_text":
            self._say(event)
        elif event.type == "turn_begin":
            self._open("user", event, content=event.data["message"], images=event.data["images"])
        elif event.type == "tool_start":
            self._start_tool(event)
        elif event.type == "tool_complete":
            self._complete_tool(event)

    def reply(self) -> str:
        """What the agent said since its last tool, or the empty string."""
        return "".join(self._text) if self._text is not None else ""

    def closed(self, status: str) -> list[Entry]:
        """The entries, whole; the last one of the agent carries how the turn ended."""
        out = [self._plain(e) for e in self.entries]
        for entry in out:
            if entry["role"] == "tool" and entry["status"] == "running":
                entry["status"] = "in_doubt"
        out[-1]["turn_status"] = status
        return out

    def in_doubt(self) -> tuple[list[str], list[str]]:
        """Names of the tools that finished, and of those that started and did not."""
        finished = [e["tool"] for e in self._tools.values() if e["status"] != "running"]
        doubtful = [e["tool"] for e in self._tools.values() if e["status"] == "running"]
        return finished, doubtful

    def _say(self, event: Event) -> None:
        if self._text is None:
            self._text = []
            self._open("assistant", event, content=self._text)
        self._text.append(str(event.data["chunk"]))

    def _start_tool(self, event: Event) -> None:
        self._text = None
        call_id = event.data["call_id"]
        entry = self._open(
            "tool",
            event,
            tool=event.data["tool"],
            call_id=call_id,
            args=event.data["args"],
            status="running",
        )
        self._tools[call_id] = entry

    def _complete_tool(self, event: Event) -> None:
        entry = self._tools.get(event.data["call_id"])
        if entry is not None:
            entry["status"] = event.data["status"]
            entry["duration_ms"] = event.data["duration_ms"]

    def _open(self, role: str, event: Event, **fields: t.Any) -> Entry:
        entry: Entry = {"role": role, "turn_id": event.turn_id, "ts": event.ts, **fields}
        self.entries.append(entry)
        return entry

    @staticmethod
    def _plain(entry: Entry) -> Entry:
        content = entry.get("content")
        return {**entry, "content": "".join(content)} if isinstance(content, list) else {**entry}


def lost_note(transcript: Transcript) -> str:
    """The assistant's note that stands in the history for a turn that was lost or given up."""
    finished, doubtful = transcript.in_doubt()
    parts = ["[This turn was cut off before an answer was given."]
    if finished:
        parts.append(f"Tools that finished: {', '.join(finished)}.")
    if doubtful:
        parts.append(f"Tools that may or may not have taken effect: {', '.join(doubtful)}.")
    return " ".join(parts) + "]"
