"""What a host's tool returned, as text for a model: always encodable, never endless."""

from __future__ import annotations

import json
import re
import typing as t

from pydantic_core import PydanticSerializationError
from pydantic_core import to_json
from pydantic_core import to_jsonable_python

from agentao_web.core import clean

#: Characters of one result.
MAX_RESULT: t.Final = 256 * 1024

_ADDRESS: t.Final = re.compile(r" at 0x[0-9a-fA-F]+")


def as_text(value: t.Any) -> str:
    """*value* as text: what is text as it is, None as "done", all else as JSON.

    Raises whatever the value's own methods raise, and ValueError for what is no JSON at all, such
    as a list that holds itself.
    """
    if value is None:
        return "done"
    if isinstance(value, str):
        return _bounded(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bounded(bytes(value[:MAX_RESULT]).decode("utf-8", "replace"), len(value))
    return _bounded(_json(value))


def _json(value: t.Any) -> str:
    try:
        return to_json(value, fallback=_words, inf_nan_mode="strings").decode("utf-8")
    except PydanticSerializationError:
        # Lone surrogates or bytes that are no UTF-8; if it is worse, this raises too.
        plain = to_jsonable_python(
            value, fallback=_words, inf_nan_mode="strings", bytes_mode="base64"
        )
        return json.dumps(plain, separators=(",", ":"))


def _words(value: t.Any) -> str:
    """The words an object has for itself, without its address in memory."""
    return _ADDRESS.sub("", str(value))


def _bounded(text: str, length: int | None = None) -> str:
    # By str's own methods: a subclass may have others.
    length = str.__len__(text) if length is None else length
    kept = clean.text(str.__getitem__(text, slice(MAX_RESULT)))
    if length <= MAX_RESULT:
        return kept
    return f"{kept}\n[cut: these are the first {MAX_RESULT} of {length} characters]"
