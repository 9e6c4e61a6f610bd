"""The tool calls of one answer, put together from pieces that providers cut and number differently.

Knows the pieces of Chat Completions; must never know tools.

Which call a piece belongs to:

1. With an id: the call that has this id, at the same index if both have one. Another id at an
   index in use is another call (Ollama sends all parallel calls at index 0), and so is the same id
   at another index (some servers use the tool's name as the id).
2. Without an id: the last call at its index, or the last of all if it has no index either. But a
   piece that names a tool begins a new call if the arguments of that last one are complete.

A name that is repeated in every piece (llama.cpp, MiniMax) is taken once; one that comes in pieces
is put together. Arguments may be an object instead of its JSON (Ollama behind LiteLLM). All other
fields of a call are kept, as some have to be sent back: Gemini refuses to go on without its
``extra_content``.
"""

from __future__ import annotations

import collections.abc as cabc
import itertools
import json
import types
import typing as t

_OWN: t.Final = frozenset({"index", "id", "type", "function"})
_OWN_OF_FUNCTION: t.Final = frozenset({"name", "arguments"})


class ToolCall:
    """One call, in the shape of the SDK's: Agentao reads and may correct id, name and arguments."""

    type: t.Final = "function"

    def __init__(self, room: cabc.Callable[[str], str]) -> None:
        self.id = ""
        self.index = ""
        self.function = types.SimpleNamespace(name="", arguments="")
        self._extra: dict[str, t.Any] = {}
        self._extra_of_function: dict[str, t.Any] = {}
        self._pieces: list[str] = []
        self._room = room

    def model_dump(self) -> dict[str, t.Any]:
        """The call as it is kept in the history and sent back."""
        name, arguments = self.function.name, self.function.arguments
        function = {**self._extra_of_function, "name": name, "arguments": arguments}
        return {**self._extra, "id": self.id, "type": self.type, "function": function}

    @property
    def empty(self) -> bool:
        return not (self.function.name or self._pieces)

    @property
    def complete(self) -> bool:
        """The arguments are a JSON object: nothing can follow."""
        if not self._pieces or not self._pieces[-1].rstrip().endswith("}"):
            return False
        try:
            return isinstance(json.loads("".join(self._pieces)), dict)
        except (ValueError, RecursionError):
            return False

    def carry(self, name: str, value: t.Any) -> None:
        """Keep something beside the fields of the call."""
        self._extra[name] = value

    def take(self, piece: dict[str, t.Any]) -> None:
        _keep(piece, _OWN, self._extra)
        function = piece.get("function")
        if isinstance(function, dict):
            _keep(function, _OWN_OF_FUNCTION, self._extra_of_function)
            self._take_name(function.get("name"))
            self._take_arguments(function.get("arguments"))

    def _take_name(self, name: t.Any) -> None:
        known = self.function.name
        if not isinstance(name, str) or name == known or (known and self._pieces):
            return
        self.function.name = name if name.startswith(known) else known + self._room(name)

    def _take_arguments(self, arguments: t.Any) -> None:
        if isinstance(arguments, dict | list):
            # PHP writes an empty object as an empty list.
            self._pieces = [self._room(json.dumps(arguments or {}, ensure_ascii=False))]
        elif isinstance(arguments, str) and arguments and not self._repeats(arguments):
            self._pieces.append(self._room(arguments))

    def _repeats(self, arguments: str) -> bool:
        """All of the arguments, once more: some servers end with what they have sent in pieces."""
        return arguments[0] == "{" and self.complete and arguments == "".join(self._pieces)

    def close(self, taken: set[str]) -> None:
        """Nothing more comes. Ids that are *taken* by other calls are not used again."""
        self.function.name = whole([self.function.name]) or "unknown"
        self.function.arguments = whole(self._pieces)
        if self.id in taken:
            numbered = (f"{self.id}_{number}" for number in itertools.count(len(taken) + 1))
            self.id = next(id for id in numbered if id not in taken)


class ToolCalls:
    """All calls of one answer, in the order in which they began. *room* returns as much of a piece
    of their arguments as the turn has room for."""

    def __init__(self, room: cabc.Callable[[str], str]) -> None:
        self._room = room
        self._calls: list[ToolCall] = []
        self._by_id: dict[str, list[ToolCall]] = {}
        self._by_index: dict[str, ToolCall] = {}

    def take(self, pieces: t.Any) -> None:
        """The ``tool_calls`` of one delta."""
        if not isinstance(pieces, dict | list):
            return
        for piece in [pieces] if isinstance(pieces, dict) else pieces:
            if isinstance(piece, dict):
                self._call_of(piece).take(piece)

    def take_old(self, function: t.Any) -> None:
        """The ``function_call`` of the API before tools: there is a single one."""
        self.take({"index": "function_call", "function": function})

    def _call_of(self, piece: dict[str, t.Any]) -> ToolCall:
        id, index = _text(piece.get("id")), _text(piece.get("index"))
        call = self._find(id, index, piece)
        if call is None:
            call = ToolCall(self._room)
            self._calls.append(call)
        if id and not call.id:
            call.id = id
            self._by_id.setdefault(id, []).append(call)
        call.index = call.index or index
        self._by_index[call.index] = call
        return call

    def _find(self, id: str, index: str, piece: dict[str, t.Any]) -> ToolCall | None:
        for call in self._by_id.get(id, ()):
            if call.index == index or not index or not call.index:
                return call
        if index:
            last = self._by_index.get(index)
        else:
            last = self._calls[-1] if self._calls else None
        if last is None or (id and last.id):
            return None
        # In this order: whether it is complete costs as much as it is long.
        return None if _begins_another(piece, last) and last.complete else last

    def finish(self, *, cut_off: bool) -> list[ToolCall]:
        """The calls to run. Of an answer that was *cut off* all or none: a part of some arguments
        may be valid, too, and mean something else."""
        kept = [call for call in self._calls if not call.empty]
        if cut_off and not all(call.complete for call in kept):
            return []
        taken: set[str] = set()
        for call in kept:
            call.close(taken)
            if call.id:
                taken.add(call.id)
        return kept


def whole(pieces: list[str]) -> str:
    """*pieces* as one text that can be encoded: halves of an emoji joined, lone ones replaced."""
    text = "".join(pieces)
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _keep(fields: dict[str, t.Any], own: frozenset[str], kept: dict[str, t.Any]) -> None:
    kept.update({n: v for n, v in fields.items() if n not in own and v is not None})


def _begins_another(piece: dict[str, t.Any], last: ToolCall) -> bool:
    """Whether *piece*, which follows a complete call, is the first of another one."""
    function = piece.get("function")
    if not isinstance(function, dict) or not function.get("name") or not last.function.name:
        return False
    return bool(function["name"] != last.function.name or function.get("arguments"))


def _text(value: t.Any) -> str:
    """An id or an index: providers send them as text and as numbers. Anything else is none."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
