"""The list an agent keeps its history in: whatever is put into it can be sent to a model.

A lone surrogate in one message would fail every later request of its session.
"""

from __future__ import annotations

import collections.abc as cabc
import typing as t

from agentao_web.core import clean


class Messages(list[t.Any]):
    """A list whose messages have clean texts.

    A message is mended in place: the request that is being built holds the same one.
    """

    def __init__(self, messages: cabc.Iterable[t.Any] = ()) -> None:
        super().__init__(map(_mended, messages))

    def append(self, message: t.Any) -> None:
        super().append(_mended(message))

    def insert(self, index: t.SupportsIndex, message: t.Any) -> None:
        super().insert(index, _mended(message))

    def extend(self, messages: cabc.Iterable[t.Any]) -> None:
        super().extend(map(_mended, messages))

    def __iadd__(self, messages: cabc.Iterable[t.Any]) -> t.Self:  # type: ignore[misc]
        self.extend(messages)
        return self

    def __setitem__(self, index: t.Any, value: t.Any) -> None:
        mended = map(_mended, value) if isinstance(index, slice) else _mended(value)
        super().__setitem__(index, mended)


def _mended(message: t.Any) -> t.Any:
    found = clean.texts(message)
    if found is not message and isinstance(message, dict):
        message.clear()
        message.update(found)
        return message
    return found
