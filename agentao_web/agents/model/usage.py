"""What a model says it used, under whichever name and in whichever place it says it.

Knows the names; must never know what a token costs.
"""

from __future__ import annotations

import types
import typing as t

from agentao_web.core import clean

_Path = tuple[str, ...]

#: What Agentao reads -> where providers put it, the usual place first.
_PLACES: t.Final[dict[str, tuple[_Path, ...]]] = {
    "prompt_tokens": (("prompt_tokens",), ("input_tokens",)),
    "completion_tokens": (("completion_tokens",), ("output_tokens",)),
    "cache_read_tokens": (
        ("cache_read_input_tokens",),  # Anthropic, behind a gateway
        ("prompt_tokens_details", "cached_tokens"),
        ("prompt_cache_hit_tokens",),  # DeepSeek
        ("cached_tokens",),  # Moonshot
    ),
    "cache_creation_tokens": (
        ("cache_creation_input_tokens",),
        ("prompt_tokens_details", "cache_write_tokens"),
    ),
    "reasoning_tokens": (
        ("completion_tokens_details", "reasoning_tokens"),
        ("reasoning_tokens",),
    ),
}


class Usage:
    """The numbers of one answer. They come once at the end, with each chunk (and then count up),
    or in parts; a later 0 never takes a number back."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def take(self, told: t.Any) -> None:
        if not isinstance(told, dict):
            return
        for name, places in _PLACES.items():
            for place in places:
                count = _count(told, place)
                if count is not None and (count or name not in self._counts):
                    self._counts[name] = count
                if count:
                    break

    def shape(self) -> types.SimpleNamespace | None:
        """The numbers as Agentao reads them; None if there were none."""
        known = self._counts
        if not known:
            return None
        read, written = known.get("cache_read_tokens"), known.get("cache_creation_tokens")
        return types.SimpleNamespace(
            prompt_tokens=known.get("prompt_tokens"),
            completion_tokens=known.get("completion_tokens"),
            cache_read_input_tokens=read,
            cache_creation_input_tokens=written,
            prompt_tokens_details=None,
            completion_tokens_details=types.SimpleNamespace(
                reasoning_tokens=known.get("reasoning_tokens")
            ),
        )


def _count(told: dict[str, t.Any], place: _Path) -> int | None:
    value: t.Any = told
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value if clean.is_tokens(value) else None
