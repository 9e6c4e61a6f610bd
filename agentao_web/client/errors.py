"""What can go wrong for a client, and what to do about it."""

from __future__ import annotations

import json
import typing as t

import httpx

if t.TYPE_CHECKING:
    from agentao_web.client.replies import Reply


class ClientError(Exception):
    """Everything this package raises by itself."""


class ConnectionLost(ClientError):
    """Nothing got through for as long as the client has patience.

    A turn that was taken may run on: read ``session(sid)`` or ``messages(sid)`` later.
    """


class TurnFailed(ClientError):
    """The turn ended with an ``error`` event; raised by ``ask`` only."""

    def __init__(self, reply: Reply) -> None:
        error = reply.error or {}
        self.reply = reply
        """What there is of the turn all the same."""
        self.code = str(error.get("code", "internal_error"))
        self.message = str(error.get("message", "The turn failed."))
        details = error.get("details")
        self.details = dict(details) if isinstance(details, dict) else {}
        wait = self.details.get("retry_after")
        self.retry_after = wait if isinstance(wait, int) else None
        """Seconds after which the model's provider wants to be asked again, if it said so."""
        super().__init__(f"{self.message} ({self.code})")


class ApiError(ClientError):
    """The server refused a request, and says why."""

    hint: t.ClassVar[str] = ""
    """What to do about it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: dict[str, t.Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.details = details or {}
        self.retry_after = retry_after
        """Seconds after which trying again makes sense, if the server said so."""
        super().__init__(status, code, message)

    def __str__(self) -> str:
        hint = f" {self.hint}" if self.hint else ""
        return f"{self.message.rstrip('.')}. ({self.status} {self.code}){hint}"


class InvalidRequest(ApiError):
    """400: something of the request is not as it should be; ``details["field"]`` names it."""


class Unauthorized(ApiError):
    """401: the token is missing, expired or of another server."""

    hint = "Give a valid token=, or a function that makes one."


class Forbidden(ApiError):
    """403: this is not allowed."""


class NotFound(ApiError):
    """404: no such session, or question, of yours."""

    hint = "Is the session's name right, and the URL, with its prefix?"


class SessionBusy(ApiError):
    """409: another turn of the session is running."""

    hint = 'Cancel that turn, or send on_busy="queue" or "interrupt".'


class QuestionClosed(ApiError):
    """409: somebody else answered, or it was too late; ``details`` says which."""


class TooLarge(ApiError):
    """413: the message, or an image, is too large; ``details`` has the limit."""


class TooMany(ApiError):
    """429: a limit is reached; ``details["limit"]`` names it."""


class Unavailable(ApiError):
    """502, 503 or 504: the server, or what stands before it, cannot answer now."""


class NotOurs(ApiError):
    """What answers there is no agentao-web, or a page is in the way."""

    hint = "Is the URL right, with its prefix, and does the login need headers or cookies?"


_BY_STATUS: t.Final[dict[int, type[ApiError]]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: TooLarge,
    429: TooMany,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
_BY_CODE: t.Final[dict[str, type[ApiError]]] = {
    "session_busy": SessionBusy,
    "question_closed": QuestionClosed,
}


def refusal(response: httpx.Response, content: bytes) -> ApiError:
    """The error that *response* with the body *content* stands for."""
    status = response.status_code
    told = _told(content)
    wait = _seconds(response.headers.get("Retry-After"))
    if told is None:
        kind = _BY_STATUS.get(status, NotOurs)
        kind = kind if kind in (Unauthorized, TooMany, Unavailable) else NotOurs
        return kind(status, "http_error", f"{response.reason_phrase or 'An answer'}", None, wait)
    kind = _BY_CODE.get(told["code"], _BY_STATUS.get(status, ApiError))
    return kind(status, told["code"], told["message"], told["details"], wait)


def _told(content: bytes) -> dict[str, t.Any] | None:
    """The body, if it is one of agentao-web's errors."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    kinds = {"code": str, "message": str, "details": dict}
    if isinstance(body, dict) and all(isinstance(body.get(k), v) for k, v in kinds.items()):
        return body
    return None


def _seconds(value: str | None) -> float | None:
    """``Retry-After`` in seconds; a date (nobody of ours sends one) counts as not said."""
    return float(value) if value and value.isascii() and value.isdigit() else None


#: Refusals that last until somebody changes the server.
_LASTING: t.Final = frozenset({"no_model", "wrong_schema"})


def passes(error: ApiError) -> bool:
    """Whether the same request may well be taken in a moment."""
    if error.code == "session_busy":
        return error.details.get("reason") == "deleting"
    if isinstance(error, TooMany):
        return error.code in ("too_many_turns", "http_error")
    return isinstance(error, Unavailable) and error.code not in _LASTING
