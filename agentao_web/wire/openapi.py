"""The contract as an OpenAPI 3.1 document, made from the routes themselves."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import re
import typing as t

from agentao_web.core.errors import FAILURES
from agentao_web.core.log import MAX_SEQ
from agentao_web.core.question import MAX_ANSWER
from agentao_web.core.question import MAX_CHOICES
from agentao_web.core.question import OUTCOMES
from agentao_web.core.turn import STOP_REASONS
from agentao_web.core.turn import State
from agentao_web.wire.requests import MAX_WAIT
from agentao_web.wire.requests import PAGE_MARK

Schema = dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class Route:
    """One endpoint: where it is, what it takes, what it answers."""

    method: str
    path: str
    name: str
    summary: str
    view: cabc.Callable[..., t.Any]
    public: bool = False
    page: bool = False
    """Part of the chat page, so not there when that is off."""
    scheme: t.Literal["bearer", "metrics"] = "bearer"
    """Whose token it takes, if it is not public."""
    ticket: bool = False
    """A GET of it takes a ticket for its session too."""
    request: str | None = None
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    responses: cabc.Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Status -> name of a schema; ``stream:NAME`` for SSE or, as JSON, NAME; ``text`` for
    plain text; ``text/html`` and the like, by spaces, for a file; "" for no body."""
    errors: tuple[int, ...] = ()


class Limits(t.Protocol):
    """The settings that bound what a request may hold (agentao_web.config.Settings)."""

    @property
    def max_message(self) -> int: ...
    @property
    def max_images(self) -> int: ...
    @property
    def turn_timeout(self) -> float: ...


def document(routes: cabc.Iterable[Route], server: str, limits: Limits) -> Schema:
    """The document for *routes* mounted at *server*."""
    paths: dict[str, Schema] = {}
    for route in routes:
        path = re.sub(r"<(?:path:)?(\w+)>", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentao-web",
            "version": "1",
            "description": "Agents over HTTP: a POST starts a turn; its events are a numbered log.",
        },
        "servers": [{"url": server}],
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, "TurnRequest": _turn_request(limits)},
            "parameters": _PARAMETERS,
            "responses": {"Error": _error_response()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "ticket": {
                    "type": "apiKey",
                    "in": "query",
                    "name": "ticket",
                    "description": "Of POST /session/<sid>/ticket, for this session",
                },
                "metrics": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The operator's AGENTAO_METRICS_TOKEN",
                },
            },
        },
        "security": [{"bearer": []}],
    }


def _operation(route: Route) -> Schema:
    in_path = re.findall(r"<(?:path:)?(\w+)>", route.path)
    names = [*in_path, *route.query, *route.headers]
    operation: Schema = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": _responses(route),
    }
    if names:
        operation["parameters"] = [{"$ref": f"#/components/parameters/{n}"} for n in names]
    if route.public:
        operation["security"] = []
    elif route.scheme != "bearer":
        operation["security"] = [{route.scheme: []}]
    elif route.ticket:
        operation["security"] = [{"bearer": []}, {"ticket": []}]
    if route.request is not None:
        content = {"application/json": {"schema": _ref(route.request)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: Route) -> Schema:
    found = {str(code): _response(code, name) for code, name in route.responses.items()}
    error = {"$ref": "#/components/responses/Error"}
    found |= {str(code): error for code in route.errors}
    return {**found, "500": error} if not route.public else found


def _response(code: int, name: str) -> Schema:
    if not name:
        return {"description": _BODILESS[code]}
    if name == "text":
        return {"description": "Plain text", "content": {"text/plain": {"schema": _STRING}}}
    if "/" in name:
        return {"description": "A file", "content": {kind: {} for kind in name.split()}}
    streams, _, schema = name.rpartition(":")
    content: Schema = {"application/json": {"schema": _ref(schema)}}
    if streams:
        content["text/event-stream"] = {"schema": _MESSAGE}
    response: Schema = {"description": schema, "content": content}
    if code == 202 and schema == "Accepted":
        response["headers"] = {"Location": {"schema": {"type": "string"}}}
    return response


def _error_response() -> Schema:
    return {
        "description": "What is wrong",
        "headers": {
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"},
            "RateLimit-Policy": {
                "schema": {"type": "string"},
                "description": "Of a 429: the limit's name, and what it allows (q, per w seconds)",
            },
            "RateLimit": {
                "schema": {"type": "string"},
                "description": "Of a 429: what remains (r), and seconds until there is more (t)",
            },
            "WWW-Authenticate": {"schema": {"type": "string"}},
        },
        "content": {"application/json": {"schema": _ref("Error")}},
    }


#: What an answer without a body says.
_BODILESS: t.Final = {204: "Nothing more; do not connect again", 304: "You have it already"}
#: One message of a stream (HTML, section 9.2): OpenAPI 3.1 has no words of its own for it.
_MESSAGE: t.Final[Schema] = {
    "type": "object",
    "description": "One message of the stream",
    "properties": {
        "id": {"type": "string", "description": "The event's seq"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Event"},
        },
    },
}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: str = "", /, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required.split()
    return schema


_STRING: t.Final[Schema] = {"type": "string"}
_INTEGER: t.Final[Schema] = {"type": "integer", "minimum": 0}
_CURSOR: t.Final[Schema] = {**_INTEGER, "maximum": MAX_SEQ}
_FLAG: t.Final[Schema] = {**_INTEGER, "maximum": 1}
_NUMBER: t.Final[Schema] = {"type": "number"}
_BOOLEAN: t.Final[Schema] = {"type": "boolean"}
#: Said, since for some generators an object of which nothing is said is an empty one.
_ANY_OBJECT: t.Final[Schema] = {"type": "object", "additionalProperties": True}
_USAGE: t.Final[Schema] = {"type": "object", "additionalProperties": {"type": "integer"}}


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


#: Event types that leave the server.
EVENT_TYPES: t.Final = (
    "turn_queued",
    "turn_begin",
    "llm_text",
    "thinking",
    "tool_start",
    "tool_output",
    "tool_complete",
    "tool_result",
    "tool_confirmation",
    "ask_user_requested",
    "question_closed",
    "usage",
    "llm_retry",
    "context_compressed",
    "agent_start",
    "agent_end",
    "gap",
    "done",
    "error",
)

#: Texts that are not blank, and have no character U+0000 (what Python's strip takes is blank).
_SAID: t.Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "pattern": r"^[^\u0000]*[^\s\u0000\u001c-\u001f\u0085][^\u0000]*$",
}
_QUESTION_ID: t.Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "maxLength": 200,
    "pattern": r"^[^\u0000]*$",
}
_ENDS = [s.value for s in State if s not in {State.QUEUED, State.RUNNING, State.WAITING}]

SCHEMAS: t.Final[dict[str, Schema]] = {
    "Any": _ANY_OBJECT,
    "PageConfig": _object("login demo", login=_enum("token", "host"), demo=_BOOLEAN),
    "Ok": _object("ok", ok=_BOOLEAN),
    "Error": _object("code message details", code=_STRING, message=_STRING, details=_ANY_OBJECT),
    "Image": _object(
        "data mimeType",
        data={
            "type": "string",
            "minLength": 4,
            "pattern": "^[A-Za-z0-9+/]+={0,2}$",
            "contentEncoding": "base64",
            "description": "The file, which has to be what mimeType says",
        },
        mimeType=_enum("image/png", "image/jpeg", "image/gif", "image/webp"),
    ),
    "Accepted": _object(
        "session_id turn_id status cursor events_url questions",
        session_id=_STRING,
        turn_id=_STRING,
        status=_enum(*(s.value for s in State)),
        cursor=_INTEGER,
        events_url=_STRING,
        questions=_list(_ref("Question")),
    ),
    "Answer": {"oneOf": [_ref("Approval"), _ref("Words")]},
    "Approval": {
        **_object(
            "question_id approve",
            question_id=_QUESTION_ID,
            approve=_BOOLEAN,
            remember=_enum("turn", "session"),
        ),
        "description": "The answer to a tool_confirmation",
        "additionalProperties": False,
    },
    "Words": {
        **_object(
            "question_id answer",
            question_id=_QUESTION_ID,
            answer={
                "anyOf": [
                    {**_SAID, "maxLength": MAX_ANSWER},
                    {"type": "array", "items": _SAID, "minItems": 1, "maxItems": MAX_CHOICES},
                ]
            },
        ),
        "description": "The answer to an ask_user_requested",
        "additionalProperties": False,
    },
    "Answered": _object(
        "ok question_id outcome", ok=_BOOLEAN, question_id=_STRING, outcome=_enum(*OUTCOMES)
    ),
    "Turn": _object(
        "turn_id state message created_at cursor",
        turn_id=_STRING,
        state=_enum(*(s.value for s in State)),
        message=_STRING,
        created_at=_NUMBER,
        cursor=_INTEGER,
    ),
    "Question": _object(
        "turn_id type question_id expires_at",
        turn_id=_STRING,
        type=_enum("tool_confirmation", "ask_user_requested"),
        question_id=_STRING,
        expires_at={"type": "number", "description": "Unix seconds"},
        call_id=_STRING,
        tool=_STRING,
        description=_STRING,
        args=_ANY_OBJECT,
        truncated={"type": "boolean", "description": "args are not all of what would run"},
        remember=_list(_enum("turn", "session")),
        question=_STRING,
        header={"type": ["string", "null"]},
        options={"type": ["array", "null"], "items": _STRING},
        multiple=_BOOLEAN,
        allow_custom=_BOOLEAN,
    ),
    "TurnResult": _object(
        "session_id turn_id status reply cursor",
        session_id=_STRING,
        turn_id=_STRING,
        status=_enum(*_ENDS),
        reason={
            "type": ["string", "null"],
            "examples": [*STOP_REASONS, *FAILURES],
        },
        reply=_STRING,
        usage=_USAGE,
        tool_count=_INTEGER,
        duration_ms=_INTEGER,
        cursor=_INTEGER,
        error=_ref("Error"),
        details=_ANY_OBJECT,
    ),
    "Event": _object(
        "seq turn_id type data ts",
        seq={"type": ["integer", "null"], "description": "The cursor; null: never stored"},
        turn_id={"type": ["string", "null"]},
        type=_enum(*EVENT_TYPES),
        data=_ANY_OBJECT,
        ts={"type": "number", "description": "Unix seconds"},
        reply={"type": "string", "description": "Of done: the last answer"},
        error=_ref("Error"),
    ),
    "EventPage": _object(
        "events cursor state",
        events=_list(_ref("Event")),
        cursor=_INTEGER,
        state=_enum("idle", "running", "waiting"),
    ),
    "NotReady": _object(
        "ok code message details",
        ok={"const": False},
        code=_STRING,
        message=_STRING,
        details=_ANY_OBJECT,
    ),
    "Cancelled": _object("ok cancelled", ok=_BOOLEAN, cancelled=_INTEGER),
    "Deleted": _object("ok", ok=_BOOLEAN, pending=_BOOLEAN),
    "Session": _object(
        "session_id state turn queued questions cursor title created_at updated_at turns usage",
        session_id=_STRING,
        state=_enum("idle", "running", "waiting"),
        turn={"anyOf": [_ref("Turn"), {"type": "null"}]},
        queued=_list(_ref("Turn")),
        questions=_list(_ref("Question")),
        cursor=_INTEGER,
        title=_STRING,
        created_at=_NUMBER,
        updated_at=_NUMBER,
        turns=_INTEGER,
        usage=_USAGE,
    ),
    "Rename": {
        **_object("title", title={**_SAID, "maxLength": 200}),
        "additionalProperties": False,
    },
    "Ticket": _object(
        "ticket expires_at",
        ticket=_STRING,
        expires_at={"type": "integer", "description": "Unix seconds"},
    ),
    "Named": _object("session_id title", session_id=_STRING, title=_STRING),
    "SessionInfo": _object(
        "session_id title created_at updated_at turns usage",
        session_id=_STRING,
        title=_STRING,
        created_at=_NUMBER,
        updated_at=_NUMBER,
        turns=_INTEGER,
        usage=_USAGE,
    ),
    "SessionPage": _object(
        "sessions next",
        sessions=_list(_ref("SessionInfo")),
        next={"type": ["string", "null"], "description": "page= of the next page"},
    ),
    "Message": _object(
        "id role turn_id ts",
        id=_INTEGER,
        role=_enum("user", "assistant", "tool"),
        turn_id=_STRING,
        ts={"type": "number", "description": "Unix seconds"},
        content={"type": "string", "description": "Of user and assistant: the text"},
        truncated={**_BOOLEAN, "description": "Of an old assistant's text that is cut off"},
        images={**_INTEGER, "description": "Of user: how many came with the message"},
        tool={"type": "string", "description": "Of tool, as are call_id, args and status"},
        call_id=_STRING,
        args=_ANY_OBJECT,
        status=_STRING,
        duration_ms=_INTEGER,
        turn_status={"type": "string", "description": "On the last one of a turn: how it ended"},
    ),
    "MessagePage": _object("messages more", messages=_list(_ref("Message")), more=_BOOLEAN),
}


def _turn_request(limits: Limits) -> Schema:
    """What a turn is started with. No field has a ``default`` here: generators of clients take
    that for a field that is always there, and want it from whoever starts a turn."""
    return _object(
        "message",
        message={
            **_SAID,
            "maxLength": limits.max_message,
            "description": "What is said; its limit is in bytes of UTF-8",
        },
        images={**_list(_ref("Image")), "maxItems": limits.max_images},
        on_busy={
            **_enum("reject", "queue", "interrupt"),
            "description": "What to do if a turn is running; reject unless told",
        },
        on_disconnect={
            **_enum("cancel", "continue"),
            "description": "What to do when the last reader leaves; "
            "cancel unless told for streams, continue for JSON",
        },
        timeout={
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": limits.turn_timeout,
            "description": "Seconds of running time",
        },
    )


def _query(name: str, description: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema}


_PARAMETERS: t.Final[dict[str, Schema]] = {
    "sid": {
        "name": "sid",
        "in": "path",
        "required": True,
        "description": "The session, named by the client; unique per tenant and user",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
    },
    "file": {
        "name": "file",
        "in": "path",
        "required": True,
        "description": "A file of the page",
        "schema": _STRING,
    },
    "after": _query("after", "The cursor: the last seq (or id) already seen", _CURSOR),
    "before": _query("before", "Entries older than this id", _CURSOR),
    "wait": _query(
        "wait",
        f"Seconds to wait, {MAX_WAIT} at most; 25 by default",
        {**_INTEGER, "maximum": MAX_WAIT},
    ),
    "limit": _query("limit", "Events at most", {"type": "integer", "minimum": 1, "maximum": 1000}),
    "page_limit": _query(
        "limit", "Entries at most", {"type": "integer", "minimum": 1, "maximum": 200}
    ),
    "page": _query(
        "page",
        "The next of the page before; empty for the first page",
        {"type": "string", "pattern": PAGE_MARK},
    ),
    "follow": _query("follow", "1: the stream stays when idle", _FLAG),
    "stream": _query(
        "stream",
        "1: the answer is a stream, 0: it is JSON, whatever Accept says; for clients that do not "
        "choose their own Accept",
        _FLAG,
    ),
    "Prefer": {
        "name": "Prefer",
        "in": "header",
        "description": f"wait=N: with application/json, wait up to N seconds ({MAX_WAIT} at most) "
        "for the end",
        "schema": _STRING,
    },
    "Idempotency-Key": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Good for 24 hours: the same body joins the first turn, another is 409",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
    "Last-Event-ID": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The last id a returning client has seen. With a POST that starts a turn: "
        "go on with the turn of that event, and start none. With GET: wins over after",
        "schema": _CURSOR,
    },
}
