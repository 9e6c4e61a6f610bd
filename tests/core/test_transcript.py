"""What people saw, and what stands for a turn that was lost."""

from __future__ import annotations

import typing as t

from agentao_web.core.log import Event
from agentao_web.core.transcript import Transcript
from agentao_web.core.transcript import lost_note


def transcript(*events: tuple[str, dict[str, t.Any]]) -> Transcript:
    made = Transcript()
    for n, (kind, data) in enumerate(events):
        made.add(Event(n + 1, "t1", kind, data, float(n)))
    return made


BEGIN = ("turn_begin", {"message": "hi", "images": 0})


def tool(kind: str, call_id: str, **more: t.Any) -> tuple[str, dict[str, t.Any]]:
    return kind, {"call_id": call_id, "tool": f"tool-{call_id}", **more}


def test_text_before_and_after_a_tool_are_entries_of_their_own() -> None:
    made = transcript(
        BEGIN,
        ("llm_text", {"chunk": "let "}),
        ("llm_text", {"chunk": "me"}),
        tool("tool_start", "a", args={"x": 1}),
        tool("tool_complete", "a", status="ok", duration_ms=7),
        ("llm_text", {"chunk": "done"}),
    )
    entries = made.closed("completed")
    assert [(e["role"], e.get("content")) for e in entries] == [
        ("user", "hi"),
        ("assistant", "let me"),
        ("tool", None),
        ("assistant", "done"),
    ]
    assert (entries[2]["status"], entries[2]["duration_ms"]) == ("ok", 7)
    assert entries[-1]["turn_status"] == "completed"
    assert made.reply() == "done"


def test_a_reply_is_what_was_said_since_the_last_tool() -> None:
    made = transcript(BEGIN, ("llm_text", {"chunk": "let me"}), tool("tool_start", "a", args={}))
    assert made.reply() == ""


def test_a_tool_that_never_completed_is_in_doubt() -> None:
    made = transcript(
        BEGIN,
        tool("tool_start", "a", args={}),
        tool("tool_complete", "a", status="ok", duration_ms=1),
        tool("tool_start", "b", args={}),
    )
    assert [e.get("status") for e in made.closed("cancelled")] == [None, "ok", "in_doubt"]
    note = lost_note(made)
    assert "finished: tool-a." in note
    assert "may or may not have taken effect: tool-b." in note
