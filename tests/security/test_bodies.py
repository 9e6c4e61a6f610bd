"""A body costs a few times its size at most, holds nobody up, and is refused before it is read."""

from __future__ import annotations

import base64
import json
import tracemalloc
import typing as t

import pytest

from agentao_web.config import Settings
from agentao_web.core.errors import InvalidRequest
from agentao_web.core.errors import PayloadTooLarge
from agentao_web.testing import ask
from agentao_web.testing import say
from agentao_web.views import ROUTES
from agentao_web.wire import requests
from tests import test_views as views
from tests.test_views import Make
from tests.test_views import assert_error

web = views.web

MOST = Settings().max_body
MIB = 2**20


def filled(piece: str, size: int = MOST - 100) -> bytes:
    """A message whose unknown field ``z`` is a list of *piece* after *piece*."""
    return b'{"message":"x","z":[' + (piece.encode() + b",") * (size // (len(piece) + 1)) + b"0]}"


COSTLY = {
    "lists": filled("[]"),
    "objects": filled("{}"),
    "objects with a key": filled('{"a":{}}'),
    "numbers": filled("1"),
    "large numbers": filled("1e5"),
    "texts": filled('""'),
    "texts with escapes": filled('"\\u00e9"'),
    "quotes": b'{"message":"x","z":"' + b'\\"' * (MOST // 2 - 50) + b'"}',
    "an open text": b'{"message":"x","z":"' + b'\\"' * (MOST // 2 - 50),
    "spaces": b'{"message":"x","z":' + b" " * (MOST - 100) + b"1}",
    "long texts": filled('"' + "A" * 3000 + '"'),
    "long texts with escapes": filled('"' + "A" * 3000 + '\\u0041"'),
    "quotes, far apart": filled('"' + "A" * 2040 + '"', 900_000),
    "bad escapes": filled('"' + "A" * 3000 + '\\x"'),
    "a message": b'{"message":"' + b"a" * (MOST - 100) + b'"}',
    "an unknown text": b'{"message":"x","z":"' + b"a" * (MOST - 100) + b'"}',
    "one number": b'{"message":"x","z":' + b"1" * (MOST - 100) + b"}",
    "lists in lists": b'{"message":"x","z":' + b"[" * (MOST - 100) + b"}",
    "many small": filled("[]", 900_000),
    "many texts, small": filled('""', 900_000),
    "deep and small": b'{"message":"x","z":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_reading_a_body_costs_a_few_times_its_size(name: str) -> None:
    body = COSTLY[name]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        try:
            requests.turn_request(body, Settings(), streams=True)
        except (InvalidRequest, PayloadTooLarge) as exc:
            json.dumps(exc.as_dict())
            assert len(json.dumps(exc.as_dict())) < 1000
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(body) + MIB


def image(size: int, mark: str = "") -> dict[str, str]:
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + mark.encode() + bytes(size)).decode()
    return {"mimeType": "image/png", "data": data}


def test_a_message_with_images_costs_a_few_times_its_size() -> None:
    """An emoji would make every character of it four bytes."""
    given = {"message": "\U0001f600", "images": [image(4 * MIB, str(n)) for n in range(3)]}
    body = json.dumps(given, ensure_ascii=False).encode()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        asked = requests.turn_request(body, Settings(), streams=True)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert asked.message == "\U0001f600"
    assert [dict(one) for one in asked.images] == given["images"]
    assert peak < 4 * len(body)


FORMS: dict[str, t.Callable[[dict[str, t.Any]], str]] = {
    "plain": json.dumps,
    "indented": lambda given: json.dumps(given, indent=4),
    "escaped slashes": lambda given: json.dumps(given).replace("/", "\\/"),
    "images first": lambda given: json.dumps(dict(reversed(given.items()))),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_sent_is_what_is_read(form: str) -> None:
    text = "QUJD" * 5_000  # Base64 itself, as long as an image.
    given = {
        "message": f'a, b [c] {{d}} \\ " \n {text}',
        "images": [image(MIB, f"{n}???>>>") for n in range(3)],
        "unknown": {"data": text, "more": [text, {"a": text}]},
    }
    quoted = (f'x "{text}', f'{text}" x', f"{text}\\", f'\\"{text}\\"', f"{text}/", f'"{text}\\/')
    for message in (given["message"], text, *quoted):
        body = FORMS[form]({**given, "message": message}).encode()
        asked = requests.turn_request(body, Settings(), streams=True)
        assert asked.message == message
        assert [dict(one) for one in asked.images] == given["images"]


@pytest.mark.parametrize("text", [",[{" * 43_000, '","' * 40_000, "\\" * 131_000, '"' * 131_000])
def test_a_message_of_nothing_but_commas_is_a_message(text: str) -> None:
    for ensure_ascii in (True, False):
        body = json.dumps({"message": text}, ensure_ascii=ensure_ascii).encode()
        assert requests.turn_request(body, Settings(), streams=True).message == text


def test_the_longest_message_fits_however_it_is_escaped() -> None:
    text = "a" * Settings().max_message
    escaped = "".join(f"\\u{ord(c):04x}" for c in text)
    body = f'{{"message": "{escaped}"}}'.encode()
    assert requests.turn_request(body, Settings(), streams=True).message == text
    emoji = "\U0001f600" * (Settings().max_message // 4)
    body = json.dumps({"message": emoji}).encode()
    assert requests.turn_request(body, Settings(), streams=True).message == emoji


def test_without_images_a_body_is_a_mebibyte_at_most(web: Make) -> None:
    w = web(say("hi"))
    body = b'{"message":"x","z":"' + b"a b " * (MIB // 4) + b'"}'
    error = assert_error(w.post("/chat/s", body), 413, "payload_too_large")
    assert error["details"] == {"field": "body", "limit": MIB}
    assert w.agents.agents == []


def test_the_longest_answer_fits_however_it_is_escaped() -> None:
    said = "\U0001f600" * 32_768
    body = json.dumps({"question_id": "q", "answer": said}).encode()
    assert len(body) <= requests.ANSWER_BODY
    assert requests.answer(body)[1].answer == said


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if r.request is not None], ids=lambda r: r.name
)
def test_only_a_message_may_be_large(web: Make, route: t.Any) -> None:
    """By its length alone: the body itself is never read."""
    w = web(ask("pay"), say("done"))
    w.post("/chat/s", {"message": "go"}, Accept="application/json")
    path = route.path.replace("<sid>", "s")
    most = {"TurnRequest": MOST, "Answer": requests.ANSWER_BODY}.get(route.request, requests.ROOM)
    headers = w.headers(**{"Content-Type": "application/json"})
    refused = w.client.open(path, method=route.method, headers=headers, data=b" " * (most + 1))
    error = assert_error(refused, 413, "payload_too_large")
    assert error["details"]["limit"] == most
    taken = w.client.open(path, method=route.method, headers=headers, data=b" " * 1000)
    assert_error(taken, 400, "invalid_request")


@pytest.mark.parametrize("depth", [500, 5_000, 9_999, 100_000])
@pytest.mark.parametrize("path", ["/chat/s", "/chat/s/answer"])
def test_deep_nesting_is_a_clean_refusal(web: Make, depth: int, path: str) -> None:
    w = web(say("hi"))
    body = b'{"message":"x","question_id":"q","approve":true,"z":%b%b}' % (
        b"[" * depth,
        b"]" * depth,
    )
    answer = w.post(path, body, Accept="application/json")
    if depth > 500:
        assert answer.status_code in (400, 413)
        assert answer.json["code"] in ("invalid_request", "payload_too_large")
    else:
        assert answer.status_code in (202, 400)
