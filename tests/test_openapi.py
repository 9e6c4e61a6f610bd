"""The document says what the server does, in words that generators of clients understand."""

from __future__ import annotations

import collections.abc as cabc
import json
import typing as t

import jsonschema
import pytest

from docs.record import FILE
from tests.test_views import Make
from tests.test_views import web

__all__ = ["web"]

#: Recorded answers, by the name of their schema.
RECORDED = {
    "accepted": "Accepted",
    "queued": "Accepted",
    "answered": "Answered",
    "result": "TurnResult",
    "page": "EventPage",
    "session": "Session",
    "running": "Session",
    "messages": "MessagePage",
    "sessions": "SessionPage",
    "named": "Named",
    "ticket": "Ticket",
    "cancelled": "Cancelled",
    "busy": "Error",
}


@pytest.fixture
def document(web: Make) -> dict[str, t.Any]:
    return t.cast(dict[str, t.Any], web().client.get("/openapi.json").json)


def validate(document: dict[str, t.Any], name: str, body: t.Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


def allows(document: dict[str, t.Any], name: str, body: t.Any) -> bool:
    try:
        validate(document, name, body)
    except jsonschema.ValidationError:
        return False
    return True


def schemas(node: t.Any) -> cabc.Iterator[dict[str, t.Any]]:
    """Every schema in the document, and in them."""
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from schemas(child)


@pytest.mark.parametrize("name", RECORDED)
def test_it_names_every_field_of_an_answer(document: dict[str, t.Any], name: str) -> None:
    """A generated client has no other ones."""
    strict = json.loads(json.dumps(document))
    for schema in schemas(strict["components"]["schemas"]):
        if "properties" in schema and schema.get("type") == "object":
            schema["additionalProperties"] = False
    recorded = json.loads(FILE.read_text("utf-8"))["answers"]
    validate(strict, RECORDED[name], recorded[name])


def test_what_a_request_may_leave_out_has_no_default(document: dict[str, t.Any]) -> None:
    """openapi-typescript would make a field with a default one that has to be there."""
    assert not [schema for schema in schemas(document) if "default" in schema]


def test_of_no_object_it_is_unknown_what_is_in_it(document: dict[str, t.Any]) -> None:
    """An object without a word about its fields is one without fields, to some generators."""
    for schema in schemas(document["components"]["schemas"]):
        if schema.get("type") == "object":
            assert "properties" in schema or schema.get("additionalProperties"), schema


def test_every_operation_has_a_name_of_its_own(document: dict[str, t.Any]) -> None:
    names = [one["operationId"] for path in document["paths"].values() for one in path.values()]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


ANSWERS: dict[str, tuple[bool, dict[str, t.Any]]] = {
    "yes": (True, {"approve": True}),
    "remembered": (True, {"approve": True, "remember": "turn"}),
    "words": (True, {"answer": "so"}),
    "several": (True, {"answer": ["a", "b"]}),
    "both": (False, {"approve": True, "answer": "so"}),
    "neither": (False, {}),
    "blank": (False, {"answer": " "}),
    "blank among others": (False, {"answer": ["a", ""]}),
    "none": (False, {"answer": []}),
    "unknown field": (False, {"approve": True, "why": "so"}),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_it_allows_the_answers_that_the_server_takes(web: Make, case: str) -> None:
    w = web()
    w.ask()
    good, fields = ANSWERS[case]
    body = {"question_id": "q", **fields}
    assert allows(w.client.get("/openapi.json").json, "Answer", body) is good
    # There is no such question; what is wrong with the request is said before.
    assert w.post("/chat/s/answer", body).status_code == (404 if good else 400)


TURNS: dict[str, tuple[bool, dict[str, t.Any]]] = {
    "plain": (True, {}),
    "all": (True, {"on_busy": "queue", "on_disconnect": "continue", "timeout": 5, "images": []}),
    "unknown field": (True, {"colour": "red"}),
    "empty image": (False, {"images": [{"data": "", "mimeType": "image/png"}]}),
    "no base64": (False, {"images": [{"data": "????", "mimeType": "image/png"}]}),
    "other image": (False, {"images": [{"data": "AAAA", "mimeType": "image/bmp"}]}),
    "too many images": (False, {"images": [{"data": "AAAA", "mimeType": "image/png"}] * 99}),
    "blank": (False, {"message": " \n"}),
    "blank to Python only": (False, {"message": "\x1c"}),
    "null character": (False, {"message": "a\0"}),
    "no time": (False, {"timeout": 0}),
    "too long a time": (False, {"timeout": 10**6}),
    "other on_busy": (False, {"on_busy": "wait"}),
}


@pytest.mark.parametrize("case", TURNS)
def test_it_allows_the_turns_that_the_server_takes(web: Make, case: str) -> None:
    w = web()
    good, fields = TURNS[case]
    body = {"message": "hi", **fields}
    assert allows(w.client.get("/openapi.json").json, "TurnRequest", body) is good
    status = w.post("/chat/s?stream=0", body).status_code
    assert status == 202 if good else status in (400, 413)


def test_a_field_that_is_null_is_one_that_is_left_out(web: Make) -> None:
    """Some clients send every field they know of."""
    w = web()
    names = ("images", "on_busy", "on_disconnect", "timeout")
    assert w.ask(**dict.fromkeys(names))["reply"] == "hello"


@pytest.mark.parametrize(
    ("path", "name", "values"),
    [
        ("/sessions", "page", ["", "1795376278.45~s", "1e-05~a.b"]),
        ("/session/s/messages", "before", ["0", str(2**53 - 1)]),
        ("/session/s/messages", "after", ["0", str(2**53 - 1)]),
        ("/chat/s/events?wait=0", "after", ["0", str(2**53 - 1)]),
        ("/chat/s/events?wait=0", "stream", ["0", "1"]),
        ("/chat/s/events?wait=0", "follow", ["0"]),
    ],
)
def test_the_ends_of_what_a_parameter_may_be_are_taken(
    web: Make, path: str, name: str, values: list[str]
) -> None:
    w = web()
    w.ask()
    parameter = w.client.get("/openapi.json").json["components"]["parameters"][name]
    for value in values:
        given: t.Any = int(value) if parameter["schema"]["type"] == "integer" else value
        jsonschema.validate(given, parameter["schema"])
        answer = w.get(f"{path}{'&' if '?' in path else '?'}{name}={value}")
        assert answer.status_code in (200, 204), (value, answer.get_data(as_text=True))
