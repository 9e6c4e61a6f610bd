"""Anything the contract allows, and much it does not, by two users at once: no 5xx, no surprise."""

from __future__ import annotations

import base64
import collections.abc as cabc
import itertools
import tempfile
import typing as t

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from agentao_web import AgentaoWeb
from agentao_web import Principal
from agentao_web import shutdown
from agentao_web.auth import Tokens
from agentao_web.testing import ask
from agentao_web.testing import ask_user
from agentao_web.testing import say
from agentao_web.testing import scripted
from agentao_web.views import ROUTES
from agentao_web.wire.openapi import Route

KEY = "the-key-of-the-fuzzing-tests"
#: Two users of one tenant and one of another, all with the same few session ids.
WHO = (Principal("acme", "ann"), Principal("acme", "bob"), Principal("globex", "ann"))
SIDS = ("a", "b", "long-lived")
#: A pixel.
PICTURE: t.Final = {
    "mimeType": "image/gif",
    "data": base64.b64encode(
        b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff!\xf9\4\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    ).decode(),
}
CHECKED: t.Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.fixture
def app() -> cabc.Iterator[Flask]:
    agents = scripted(say("hi"), by={"ask": [ask("write_file"), ask_user("Which?", "a", "b")]})
    made = Flask("fuzzed")
    with tempfile.TemporaryDirectory() as root:
        made.config.update(
            AGENTAO_ROOT=root,
            AGENTAO_DATABASE_URL="memory:",
            AGENTAO_SECRET_KEYS=KEY,
            AGENTAO_STREAM_LEASE=0.3,
            AGENTAO_QUESTION_TIMEOUT=1.0,
            AGENTAO_STOP_GRACE=1.0,
        )
        AgentaoWeb(agents=agents).init_app(made)
        yield made
        shutdown(made, grace=2)


@pytest.fixture
def operations(app: Flask) -> dict[str, t.Any]:
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    return {op.label: op for op in (found.ok() for found in schema.get_all_operations())}


def _label(route: Route) -> str:
    return f"{route.method} {route.path.replace('<path:', '<').replace('<', '{').replace('>', '}')}"


#: The document is not in the document; what takes nothing cannot be asked wrongly.
CASES = [
    (_label(route), mode)
    for route in ROUTES
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if route.path != "/openapi.json"
    and (mode is GenerationMode.POSITIVE or route.request or route.query or "<sid>" in route.path)
]


@pytest.mark.parametrize(("label", "mode"), CASES, ids=str)
def test_every_answer_is_in_the_contract(
    operations: dict[str, t.Any], label: str, mode: GenerationMode
) -> None:
    operation = operations[label]
    turn = itertools.count()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    def ask_for(case: t.Any) -> None:
        n = next(turn)
        token = Tokens([KEY]).issue(WHO[n % len(WHO)], ttl=600)
        if mode is GenerationMode.POSITIVE:
            if "sid" in case.path_parameters and n % 4:
                # Mostly a session there may be, else everything is a 404.
                case.path_parameters["sid"] = SIDS[n % len(SIDS)]
            if case.query and "wait" in case.query:
                # A whole minute of silence would be a good answer too.
                case.query["wait"] = 0
            if isinstance(case.body, dict) and case.body.get("images"):
                # That a text is an image of its type is more than a schema can say.
                case.body["images"] = [PICTURE for _ in case.body["images"]]
        response = case.call(headers={"Authorization": f"Bearer {token}"})
        case.validate_response(response, checks=[CHECKS.get_one(name) for name in CHECKED])
        if mode is GenerationMode.POSITIVE:
            # What the document allows is not refused for what it is; nothing here is too large.
            assert response.status_code not in (400, 406, 413, 415), (case.query, case.body)

    ask_for()
