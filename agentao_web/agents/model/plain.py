"""Chat Completions without the OpenAI SDK's models: what a stream says, as plain JSON.

Knows the wire format; must never know sockets, sessions or turns.
"""

from __future__ import annotations

import collections.abc as cabc
import types
import typing as t

import openai


class Plainly:
    """The OpenAI SDK's client, with JSON instead of its models where a stream is read.

    Building them is half of the CPU of a token, and walking through a request for names to
    change, of which there are none in plain JSON, half of the CPU before the first one.
    """

    def __init__(self, sdk: openai.OpenAI) -> None:
        self._sdk = sdk
        self.chat = types.SimpleNamespace(completions=_Completions(sdk))

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._sdk, name)


class _Completions:
    """``client.chat.completions`` as Agentao's adapter uses it."""

    def __init__(self, sdk: openai.OpenAI) -> None:
        self._sdk = sdk

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._sdk.chat.completions, name)

    def create(self, **kwargs: t.Any) -> cabc.Iterator[t.Any]:
        """The chunks of a stream: what is not in one is None."""
        more = kwargs.pop("extra_body", None) or {}
        chunks = self._sdk.post(
            "/chat/completions",
            body={**kwargs, **more},
            cast_to=object,
            stream=True,
            stream_cls=openai.Stream[object],
        )
        return map(_plain, chunks)


class _Plain(dict[str, t.Any]):
    """An object of JSON whose fields are attributes, too."""

    __getattr__ = dict.get


def _plain(value: t.Any) -> t.Any:
    if isinstance(value, dict):
        return _Plain({name: _plain(part) for name, part in value.items()})
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value


def as_it_is(kwargs: dict[str, t.Any]) -> dict[str, t.Any]:
    """The same request in one piece, past that search: the SDK's own way around it."""
    plain = {name: kwargs[name] for name in ("messages", "tools") if name in kwargs}
    told = {name: value for name, value in kwargs.items() if name != "tools"}
    # The SDK wants to see some messages; these of the body win.
    return {**told, "messages": [], "extra_body": {**plain, **(kwargs.get("extra_body") or {})}}
