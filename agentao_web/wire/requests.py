"""Reads what clients send; everything that is not as it should be is InvalidRequest or a kin."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
import typing as t

from agentao_web.core.errors import InvalidRequest
from agentao_web.core.errors import PayloadTooLarge
from agentao_web.core.log import MAX_SEQ
from agentao_web.core.names import is_session_id
from agentao_web.core.question import MAX_ANSWER
from agentao_web.core.question import MAX_CHOICES
from agentao_web.core.question import Reply
from agentao_web.core.turn import TurnRequest

#: What the model's providers take inline (agentao/media_limits.py), and how each begins.
_IMAGES: t.Final = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/gif": (b"GIF87a", b"GIF89a"),
    "image/webp": (b"RIFF",),
}
#: RFC 7240, section 4.3.
_WAIT = re.compile(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9})"?\s*(?:[,;]|$)')
_INTEGER = re.compile(r"\d{1,16}")
#: Below the 60 seconds after which nginx and others give up on an answer, unless told otherwise.
MAX_WAIT: t.Final = 55
MAX_TITLE: t.Final = 200
#: Where a page of sessions ends (see ``mark``), or nothing: the first page.
PAGE_MARK: t.Final = (
    r"^([0-9]{1,17}(\.[0-9]{1,17})?(e[+-]?[0-9]{1,2})?~[A-Za-z0-9][A-Za-z0-9._-]{0,127})?$"
)
#: Bytes of a body besides what it is about, and of an answer: its longest, all escaped.
ROOM: t.Final = 64 * 2**10
ANSWER_BODY: t.Final = 12 * MAX_ANSWER + ROOM
#: Values of a body: a dozen are meant, and a client of a richer protocol may send what we ignore.
MAX_VALUES: t.Final = 10_000
#: What stands before every value of a list or object but the first, or opens one.
_BETWEEN: t.Final = (b",", b"[", b"{")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
#: Bytes of a text from which on it may be the data of an image, and what that is made of; some
#: encoders put a backslash before each slash.
_LONG: t.Final = 2048
_BASE64: t.Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_KEY = re.compile(r"[!-~]{1,255}")
_MISSING: t.Final = object()


def json_object(body: bytes) -> dict[str, t.Any]:
    """*body* as a JSON object; InvalidRequest says what is wrong with it."""
    if not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object", field="body")
    _count_values(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8", field="body") from None
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply", field="body") from None
    except ValueError as exc:
        where: dict[str, t.Any] = {"line": exc.lineno, "column": exc.colno} if _is_json(exc) else {}
        raise InvalidRequest("the body is not valid JSON", field="body", **where) from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", field="body")
    return value


def _count_values(body: bytes) -> None:
    """InvalidRequest for more values than anybody means: each takes many times its text."""
    if sum(map(body.count, _BETWEEN)) <= MAX_VALUES:
        return
    # Or they are commas of a text.
    values, end = 0, 0
    for number, found in enumerate(_STRING.finditer(body)):
        values += sum(body.count(mark, end, found.start()) for mark in _BETWEEN)
        end = found.end()
        if values > MAX_VALUES or number > 2 * MAX_VALUES:
            break
    else:
        values += sum(body.count(mark, end) for mark in _BETWEEN)
        if values <= MAX_VALUES:
            return
    raise InvalidRequest(
        f"the body has more than {MAX_VALUES:,} values; send only the fields of this route",
        field="body",
    )


def _with_images(body: bytes, most: int) -> dict[str, t.Any]:
    """The same, of a body of which *most* bytes may be anything but the data of images.

    That data is taken out before the rest is parsed: text of a whole body would be up to four times
    as large, for a single emoji in it.
    """
    if len(body) <= most:
        return json_object(body)
    # Everything that JSON is made of is left over here, so from now on nothing takes long.
    if len(body.translate(None, _BASE64)) > most:
        raise _too_much(most)
    nonce = secrets.token_hex(16)
    rest, texts = _without_long_texts(body, nonce)
    if len(rest) > most:
        raise _too_much(most)
    try:
        return {k: _put_back(v, nonce, texts) for k, v in json_object(rest).items()}
    except RecursionError:
        raise InvalidRequest("the JSON is nested too deeply", field="body") from None


def _without_long_texts(body: bytes, nonce: str) -> tuple[bytes, list[str]]:
    """*body* with a mark in place of each text that may be an image's data, and those texts.

    A search for quotes and no pattern: that would hold all other threads up over 20 MiB.
    """
    kept, texts, done = list[bytes](), list[str](), 0
    start = body.find(b'"')
    while start >= 0:
        end = body.find(b'"', start + 1)
        # One with a backslash before it is in the middle of a text.
        if end - start > _LONG and body[start - 1 : start] != b"\\":
            text = body[start + 1 : end]
            if text.translate(None, _BASE64) == b"\\" * text.count(b"\\/"):
                kept += (body[done:start], f'"{nonce}.{len(texts)}"'.encode())
                texts.append(text.replace(b"\\/", b"/").decode())
                done, end = end + 1, body.find(b'"', end + 1)
        start = end
    return b"".join((*kept, body[done:])), texts


def _put_back(value: t.Any, nonce: str, texts: list[str]) -> t.Any:
    if isinstance(value, str) and value.startswith(nonce):
        return texts[int(value.rpartition(".")[2])]
    if isinstance(value, list):
        return [_put_back(one, nonce, texts) for one in value]
    if isinstance(value, dict):
        return {k: _put_back(v, nonce, texts) for k, v in value.items()}
    return value


def _too_much(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        "The body is too large even without the data of its images. Send a shorter message, and "
        "only the fields of this route.",
        field="body",
        limit=most,
    )


class Limits(t.Protocol):
    """The settings that bound a message (agentao_web.config.Settings)."""

    @property
    def max_message(self) -> int: ...
    @property
    def max_images(self) -> int: ...
    @property
    def max_image(self) -> int: ...
    @property
    def turn_timeout(self) -> float: ...


def turn_request(
    body: bytes, limits: Limits, *, streams: bool, key: str | None = None
) -> TurnRequest:
    """The body of ``POST /chat/<sid>``; fields nobody knows are ignored."""
    # A character is six bytes at most where it is one in UTF-8, and there are other fields.
    fields = _with_images(body, 6 * limits.max_message + 4 * ROOM)
    default = "cancel" if streams else "continue"
    return TurnRequest(
        message=_message(fields, limits.max_message),
        images=_images(fields, limits.max_images, limits.max_image),
        on_busy=_choice(fields, "on_busy", "reject", ("reject", "queue", "interrupt")),
        on_disconnect=_choice(fields, "on_disconnect", default, ("cancel", "continue")),
        timeout=_timeout(fields, limits.turn_timeout),
        use=_use(key, body),
    )


def _use(key: str | None, body: bytes) -> tuple[str, str] | None:
    """An ``Idempotency-Key`` (draft-ietf-httpapi-idempotency-key-header) and what it stands for."""
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", field="Idempotency-Key"
        )
    return key, hashlib.sha256(body).hexdigest()


def title(body: bytes) -> str:
    """The body of ``PATCH /session/<sid>``; unknown fields are refused."""
    fields = json_object(body)
    for name in fields.keys() - {"title"}:
        raise InvalidRequest(f"{name} cannot be changed", field=name)
    text = " ".join(_text(fields.get("title"), "title").split())
    if not 1 <= len(text) <= MAX_TITLE:
        raise InvalidRequest(f"title must be 1 to {MAX_TITLE} characters", field="title")
    return text


def answer(body: bytes) -> tuple[str, Reply]:
    """The body of ``POST /chat/<sid>/answer``: which question, and what; the rest is refused."""
    fields = json_object(body)
    for name in fields.keys() - {"question_id", "approve", "answer", "remember"}:
        raise InvalidRequest(f"{name} is not a field of an answer", field=name)
    question_id = _text(fields.get("question_id"), "question_id")
    if not 1 <= len(question_id) <= MAX_TITLE:
        raise InvalidRequest("question_id must be the id of a question", field="question_id")
    approve, said = fields.get("approve"), fields.get("answer")
    if (approve is None) == (said is None):
        raise InvalidRequest("send approve or answer, one of the two", field="approve")
    if approve is not None and not isinstance(approve, bool):
        raise InvalidRequest("approve must be true or false", field="approve")
    remember = fields.get("remember")
    if remember is not None and remember not in ("turn", "session"):
        raise InvalidRequest("remember must be turn or session", field="remember")
    return question_id, Reply(approve, None if said is None else _said(said), remember)


def _said(value: t.Any) -> str | tuple[str, ...]:
    several = value if isinstance(value, list) else [value]
    if not 1 <= len(several) <= MAX_CHOICES:
        raise InvalidRequest(f"answer must name 1 to {MAX_CHOICES} choices", field="answer")
    words = tuple(_text(word, "answer") for word in several)
    if sum(map(len, words)) > MAX_ANSWER:
        raise PayloadTooLarge("answer is too long", field="answer", limit=MAX_ANSWER)
    if not all(word.strip() for word in words):
        raise InvalidRequest("answer is blank", field="answer")
    return words if isinstance(value, list) else words[0]


def mark(updated: float, sid: str) -> str:
    """Where a page of sessions ends, for ``?page=`` of the next one."""
    return f"{updated!r}~{sid}"


def page_mark(value: str | None) -> tuple[float, str] | None:
    """What ``mark`` made."""
    if not value:
        return None
    updated, _, sid = value.partition("~")
    if not re.fullmatch(PAGE_MARK, value) or not is_session_id(sid):
        raise InvalidRequest("page must be the next of another page", field="page")
    return float(updated), sid


def _message(fields: dict[str, t.Any], limit: int) -> str:
    message = fields.get("message", _MISSING)
    if message is _MISSING:
        raise InvalidRequest("message is missing", field="message")
    text = _text(message, "message")
    if not text.strip():
        raise InvalidRequest("message is blank", field="message")
    size = len(text.encode())
    if size > limit:
        raise PayloadTooLarge("message is too long", field="message", bytes=size, limit=limit)
    return text


def _text(value: t.Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} must be a string", field=field)
    if "\0" in value:
        raise InvalidRequest(f"{field} contains the character U+0000", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate passes JSON, and would break the conversation for ever.
        raise InvalidRequest(f"{field} contains a lone surrogate", field=field) from None
    return value


def _choice(fields: dict[str, t.Any], name: str, default: str, choices: tuple[str, ...]) -> t.Any:
    value = fields.get(name)
    if value is None:
        return default
    if value not in choices or not isinstance(value, str):
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}", field=name)
    return value


def _timeout(fields: dict[str, t.Any], limit: float) -> float | None:
    value = fields.get("timeout")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limit:
        raise InvalidRequest(
            f"timeout must be a number of seconds, above 0 and at most {limit:g}", field="timeout"
        )
    return float(value)


def _images(fields: dict[str, t.Any], limit: int, most: int) -> tuple[dict[str, str], ...]:
    images = fields.get("images")
    if images is None:
        return ()
    if not isinstance(images, list):
        raise InvalidRequest("images must be a list", field="images")
    if len(images) > limit:
        raise PayloadTooLarge("too many images", field="images", count=len(images), limit=limit)
    return tuple(_image(image, f"images[{i}]", most) for i, image in enumerate(images))


def _image(image: t.Any, field: str, most: int) -> dict[str, str]:
    if not isinstance(image, dict):
        raise InvalidRequest(f"{field} must be an object with data and mimeType", field=field)
    kind, data = image.get("mimeType"), image.get("data")
    if not isinstance(kind, str) or kind not in _IMAGES:
        raise InvalidRequest(f"{field}.mimeType must be one of {', '.join(_IMAGES)}", field=field)
    if not isinstance(data, str):
        raise InvalidRequest(f"{field}.data must be base64 text", field=field)
    size = len(data) * 3 // 4 - data[-2:].count("=")
    if size > most:
        raise PayloadTooLarge("an image is too large", field=field, bytes=size, limit=most)
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{field}.data is not base64", field=field) from None
    if not raw.startswith(_IMAGES[kind]) or kind == "image/webp" and raw[8:12] != b"WEBP":
        raise InvalidRequest(f"{field}.data is not {kind}", field=field)
    return {"mimeType": kind, "data": data}


def number(value: str | None, name: str, *, least: int, most: int) -> int | None:
    """A whole number of the query string or of a header, or None if it is not there."""
    if value is None:
        return None
    if not _INTEGER.fullmatch(value) or not value.isascii() or not least <= int(value) <= most:
        raise InvalidRequest(f"{name} must be a whole number from {least} to {most}", field=name)
    return int(value)


def cursor(value: str | None, name: str) -> int | None:
    """A cursor: the last ``seq`` a reader has seen."""
    return number(value, name, least=0, most=MAX_SEQ)


def flag(value: str | None, name: str) -> bool:
    """``1`` or ``0`` of the query string; missing is no."""
    return bool(number(value, name, least=0, most=1))


def wait(value: str | None) -> int | None:
    """Seconds of ``?wait=N``; a longer wish is cut down to MAX_WAIT."""
    found = number(value, "wait", least=0, most=MAX_SEQ)
    return None if found is None else min(found, MAX_WAIT)


def preferred_wait(header: str | None) -> int | None:
    """Seconds of ``Prefer: wait=N`` (RFC 7240), at most MAX_WAIT; one not understood is none."""
    found = _WAIT.search(header or "")
    return min(int(found[1]), MAX_WAIT) if found else None


def _no_constant(name: str) -> t.NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_json(exc: ValueError) -> t.TypeGuard[json.JSONDecodeError]:
    return isinstance(exc, json.JSONDecodeError)
