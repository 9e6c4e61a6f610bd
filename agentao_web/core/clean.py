"""What a log, a store and a model's history can hold: JSON, with text that can be encoded.

Agents, tools, providers and file names bring the rest: half an emoji, a ``datetime``, a list of
1,500 lists. It is made into something near it here, at the door, so that nothing behind the door
has to be afraid of it.
"""

from __future__ import annotations

import collections.abc as cabc
import json
import math
import re
import typing as t

#: Lists within lists that are kept; json gives up at about a thousand.
MAX_DEPTH: t.Final = 64
#: The largest number of tokens that is believed. JSON readers keep no larger number exactly.
MAX_TOKENS: t.Final = 2**53
#: An integer with more bits is larger than any float, and Python refuses to write out a long one.
_MAX_BITS: t.Final = 1024
_TOO_DEEP: t.Final = "…"
_NESTED: t.Final = '"[nested too deeply]"'
#: How half an emoji looks in the text of a JSON document.
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


def text(value: str) -> str:
    """*value* with every lone surrogate replaced; two that are a pair become their character."""
    if type(value) is not str:
        value = str.__str__(value)  # A subclass may have methods of its own.
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def plain(value: t.Any, inside: tuple[int, ...] = ()) -> t.Any:
    """*value* as JSON that can be stored and sent: what is no JSON becomes text."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_BITS else "a number too large to show"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, cabc.Mapping | list | tuple):
        if len(inside) == MAX_DEPTH or id(value) in inside:
            return _TOO_DEEP
        inside = (*inside, id(value))
        if isinstance(value, cabc.Mapping):
            return {_key(k): plain(v, inside) for k, v in value.items()}
        return [plain(v, inside) for v in value]
    return words(value)


def fields(data: cabc.Mapping[str, t.Any]) -> cabc.Mapping[str, t.Any]:
    """``plain`` of an event's fields: *data* itself if there is nothing to change."""
    for value in data.values():
        # Once per token, and nearly always one short text.
        if type(value) is not str or text(value) is not value:
            return {_key(k): plain(v) for k, v in data.items()}
    return data


def texts(value: t.Any, inside: tuple[int, ...] = ()) -> t.Any:
    """*value* with every text in it clean, and all else as it is; itself if it was clean."""
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, dict | list):
        return value
    if len(inside) == 2 * MAX_DEPTH or id(value) in inside:
        return value
    inside = (*inside, id(value))
    if isinstance(value, dict):
        found = {texts(key): texts(item, inside) for key, item in value.items()}
        before, after = [*value, *value.values()], [*found, *found.values()]
        return value if all(map(_is, after, before)) else found
    items = [texts(item, inside) for item in value]
    return value if all(map(_is, items, value)) else items


def arguments(document: str) -> str:
    """The text of a JSON document whose own texts are clean too, as far as it can be read.

    One that nests so deeply that reading it would fail is replaced by one that says so.
    """
    document = text(document)
    deep = document.count("[") + document.count("{") >= 2 * MAX_DEPTH
    if not deep and _ESCAPED.search(document) is None:
        return document
    try:
        value = json.loads(document)
    except RecursionError:
        return _NESTED
    except ValueError:
        return document
    if deep and nests(value):
        return _NESTED
    cleaned = texts(value)
    return document if cleaned is value else json.dumps(cleaned, ensure_ascii=False)


def words(value: t.Any) -> str:
    """The words an object has for itself; some have none that can be said."""
    try:
        return text(value if isinstance(value, str) else str(value))
    except Exception:
        return f"<{type(value).__name__}>"


def is_tokens(value: t.Any) -> t.TypeGuard[int]:
    """Whether *value* is a number of tokens; nothing else is counted, whoever reports it."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and 0 <= value <= MAX_TOKENS


def usage(
    before: cabc.Mapping[str, t.Any], more: cabc.Mapping[str, t.Any] | None = None
) -> dict[str, int]:
    """Both usages together, as far as they are numbers of tokens; no sum goes above the bound."""
    total: dict[str, int] = {}
    for used in (before, more or {}):
        for name, amount in used.items():
            if is_tokens(amount):
                total[name] = min(total.get(name, 0) + amount, MAX_TOKENS)
    return total


def nests(value: t.Any) -> bool:
    """Whether *value* has so many levels within levels that json may give up at it."""
    level = [value]
    for _ in range(2 * MAX_DEPTH):
        # Each only once: a list that holds itself twice would double the next level.
        outer = {id(one): one for one in level if isinstance(one, dict | list)}.values()
        level = [i for one in outer for i in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def _is(one: object, other: object) -> bool:
    return one is other


def _key(value: t.Any) -> str:
    return text(value) if isinstance(value, str) else words(value)
