"""What is let through the door, and what becomes of the rest."""

from __future__ import annotations

import datetime
import json
import typing as t

import pytest

from agentao_web.core import clean


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", ""),
        ("plain", "plain"),
        ("é 😀", "é 😀"),
        ("\ud83d", "\ufffd"),
        ("a\udc80b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("😀\ud83d", "😀\ufffd"),
        ("\x00", "\x00"),
    ],
)
def test_text_can_be_encoded(given: str, wanted: str) -> None:
    assert clean.text(given) == wanted
    wanted.encode()


def test_text_that_is_clean_is_not_copied() -> None:
    for text in ("plain", "é 😀"):
        assert clean.text(text) is text


class Shouting(str):
    def isascii(self) -> bool:
        raise AssertionError("its own methods are not asked")

    encode = isascii  # type: ignore[assignment]


def test_a_text_with_methods_of_its_own_is_only_a_text() -> None:
    assert type(clean.text(Shouting("x"))) is str


class Wordless:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def nested(depth: int) -> t.Any:
    value: t.Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime(2026, 1, 1),
        {1, 2},
        b"bytes",
        Wordless(),
        float("nan"),
        float("-inf"),
        10**5000,
        -(10**400),
        {(1, 2): {None: "\ud83d"}},
        nested(1500),
        [nested(1500), {"k": nested(5000)}],
        ("a", ["b", {"c": object()}]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_it_was_it_is_json_afterwards(value: t.Any) -> None:
    found = clean.plain(value)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    data = clean.fields({"value": value})
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()


def test_json_stays_what_it_is() -> None:
    value = {"a": [1, 2.5, None, True, "x", {"b": []}], "long": 2**63, "deep": nested(60)}
    assert clean.plain(value) == value
    assert clean.fields(value) == value
    data = {"chunk": "one token"}
    assert clean.fields(data) is data


def test_a_circle_has_an_end() -> None:
    value: list[t.Any] = ["\ud83d"]
    value.extend([value, {"again": value}, value])
    json.dumps(clean.plain(value))
    assert clean.texts(value)[0] == "\ufffd"
    assert clean.nests(value) and clean.nests(nested(200)) and not clean.nests(nested(100))


def test_texts_are_mended_and_all_else_is_left_alone() -> None:
    moment = datetime.datetime(2026, 1, 1)
    good = {"content": "é", "when": moment, "calls": [{"id": 1}]}
    assert clean.texts(good) is good
    bad = {"content": ["x", "\ud83d"], "\udc80": moment}
    assert clean.texts(bad) == {"content": ["x", "\ufffd"], "\ufffd": moment}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "\\ud83d\\ude00"}'),
        ('{"a": "\\ud83d"}', '{"a": "\ufffd"}'),
        ('{"a": "\ud83d"}', '{"a": "\ufffd"}'),
        ('{"\\uDC80": ["\\uDFFF"]}', '{"\ufffd": ["\ufffd"]}'),
        ('{"a": "\\\\ud83d"}', '{"a": "\\\\ud83d"}'),
        ('not json \\ud83d"', 'not json \\ud83d"'),
        ("[" * 130 + "]" * 130, '"[nested too deeply]"'),
        ("[" * 100_000, '"[nested too deeply]"'),
        ("[" + "[]," * 200 + "[]]", "[" + "[]," * 200 + "[]]"),
    ],
)
def test_arguments_of_a_tool_are_clean_when_they_are_read(given: str, wanted: str) -> None:
    assert clean.arguments(given) == wanted


@pytest.mark.parametrize("count", [0, 1, 2**53])
def test_a_number_of_tokens(count: int) -> None:
    assert clean.is_tokens(count)


@pytest.mark.parametrize("count", [-1, 2**53 + 1, 10**30, True, False, 1.0, "1", None, []])
def test_no_number_of_tokens(count: t.Any) -> None:
    assert not clean.is_tokens(count)
    assert clean.usage({"a": count, "b": 1}, {"a": count, "b": 2}) == {"b": 3}


def test_a_sum_of_tokens_is_one_too() -> None:
    assert clean.usage({"a": 2**53}, {"a": 2**53}) == {"a": 2**53}
    assert clean.usage({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
