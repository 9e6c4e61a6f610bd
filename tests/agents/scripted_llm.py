"""A model that says what a test wrote down, in the few attributes agentao asks of a client."""

from __future__ import annotations

import json
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any


def say(text: str) -> dict[str, Any]:
    return {"content": text, "calls": []}


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"content": "", "calls": [(tool, json.dumps(arguments))]}


def call_raw(tool: str, arguments: str) -> dict[str, Any]:
    """A call whose arguments are not JSON, or not quite."""
    return {"content": "", "calls": [(tool, arguments)]}


class ScriptedLLM:
    """Plays its lines in order and keeps every request it was sent."""

    temperature = 0.0
    max_tokens = 1000
    api_key = "none"
    base_url = "http://nowhere.invalid"

    def __init__(self, *lines: dict[str, Any], model: str = "scripted") -> None:
        self.model = model
        self.logger = logging.getLogger("tests.scripted_llm")
        self.total_prompt_tokens = 0
        self.total_completion_tokens = 0
        self.lines = list(lines)
        self.requests: list[dict[str, Any]] = []

    def chat_stream(
        self,
        messages: list[dict[str, Any]],
        tools: Any = None,
        max_tokens: Any = None,
        on_text_chunk: Any = None,
        cancellation_token: Any = None,
        **_: Any,
    ) -> SimpleNamespace:
        self.requests.append({"messages": json.loads(json.dumps(messages)), "tools": tools})
        line = self.lines.pop(0) if self.lines else say("done")
        if line["content"] and on_text_chunk:
            on_text_chunk(line["content"])
        calls = [
            SimpleNamespace(
                id=f"call_{len(self.requests)}_{number}",
                type="function",
                function=SimpleNamespace(name=name, arguments=arguments),
            )
            for number, (name, arguments) in enumerate(line["calls"])
        ]
        message = SimpleNamespace(
            content=line["content"] or None,
            tool_calls=calls or None,
            role="assistant",
            reasoning_content=None,
        )
        reason = "tool_calls" if calls else "stop"
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason=reason)],
            usage=SimpleNamespace(prompt_tokens=10, completion_tokens=5, total_tokens=15),
            model=self.model,
        )

    chat = chat_stream

    # What a test asks afterwards

    @property
    def system_prompt(self) -> str:
        return str(self.requests[-1]["messages"][0]["content"])

    @property
    def tool_names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.requests[-1]["tools"] or ()}

    @property
    def results(self) -> list[str]:
        """What the tools answered, as the model saw it."""
        sent = self.requests[-1]["messages"]
        return [str(message["content"]) for message in sent if message["role"] == "tool"]


class Ticking:
    """A thread that only wants a turn now and then; `longest` is how long it waited for one.

    In seconds of this process's own work: what other processes do meanwhile does not count.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> Ticking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _tick(self) -> None:
        before = time.process_time()
        while not self._over.wait(0.002):
            now = time.process_time()
            self.longest = max(self.longest, now - before)
            before = now
        self.longest = max(self.longest, time.process_time() - before)
