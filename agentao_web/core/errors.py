"""One family of errors: what never changes is on the class, what happened on the instance."""

from __future__ import annotations

import typing as t


class Quota(t.NamedTuple):
    """The limit a refusal is about: its name, how much it allows, and per how many seconds."""

    name: str
    allows: int
    window: int | None = None


class WebError(Exception):
    """Something a client is told as ``{"code", "message", "details"}``."""

    status: t.ClassVar[int] = 500
    """A hint for HTTP; ``core`` never sends it."""
    code: t.ClassVar[str] = "internal_error"
    retry_after: int | None = None
    """Seconds after which trying again makes sense, or None."""
    quota: Quota | None = None
    """What there is no more of, for every 429."""

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after: int | None = None,
        quota: Quota | None = None,
        **details: t.Any,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.details = details
        if retry_after is not None:
            self.retry_after = retry_after
        if quota is not None:
            self.quota = quota
            self.details |= {"limit": quota.name, "quota": quota.allows}
        super().__init__(self.message)

    def as_dict(self) -> dict[str, t.Any]:
        """The body of the answer, and of an ``error`` event."""
        return {"code": self.code, "message": self.message, "details": self.details}


class InvalidRequest(WebError):
    """The request is not what this route takes."""

    status = 400
    code = "invalid_request"


class Unauthorized(WebError):
    """A valid bearer token, or the application's own login, is needed."""

    status = 401
    code = "unauthorized"


class Forbidden(WebError):
    """This request is not allowed."""

    status = 403
    code = "forbidden"


class NotFound(WebError):
    """There is nothing here by that name."""

    status = 404
    code = "not_found"


class MethodNotAllowed(WebError):
    """This route does not take that method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allowed: t.Iterable[str]) -> None:
        self.allowed = sorted(allowed)
        super().__init__(None, allowed=self.allowed)


class NotAcceptable(WebError):
    """This route answers application/json and text/event-stream only."""

    status = 406
    code = "not_acceptable"


class SessionBusy(WebError):
    """The session is already running a turn."""

    status = 409
    code = "session_busy"
    retry_after = 1


class IdempotencyConflict(WebError):
    """This Idempotency-Key was used with another body."""

    status = 409
    code = "idempotency_conflict"


class QuestionClosed(WebError):
    """This question was closed before."""

    status = 409
    code = "question_closed"


class PayloadTooLarge(WebError):
    """The request body is too large."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(WebError):
    """The body must be application/json."""

    status = 415
    code = "unsupported_media_type"


class TooManyTurns(WebError):
    """Too many turns are running; try again later."""

    status = 429
    code = "too_many_turns"
    retry_after = 2


class TooManySessions(WebError):
    """Too many sessions; delete one, or try again later."""

    status = 429
    code = "too_many_sessions"
    retry_after = 30


class TooManyStreams(WebError):
    """You have too many open streams and waiting requests; close one, or poll instead."""

    status = 429
    code = "too_many_streams"
    retry_after = 2


class BudgetExhausted(WebError):
    """The tenant's tokens of this day (UTC) are spent."""

    status = 429
    code = "budget_exhausted"


class InternalError(WebError):
    """Something went wrong on the server; the error_id is in its log."""

    status = 500
    code = "internal_error"


class NoStreamSlot(WebError):
    """Every place for streams and waiting requests is taken; poll instead, or try again."""

    status = 503
    code = "no_stream_slot"
    retry_after = 2


class Draining(WebError):
    """This worker is shutting down; try again."""

    status = 503
    code = "draining"
    retry_after = 1


class StoreUnavailable(WebError):
    """The conversation store cannot be reached; try again later."""

    status = 503
    code = "store_unavailable"
    retry_after = 2


class WrongSchema(WebError, RuntimeError):
    """The database was written by another version of agentao-web."""

    status = 503
    code = "wrong_schema"


class NoModel(WebError):
    """No model is set up on this server, so it cannot answer; its log says what is missing."""

    status = 503
    code = "no_model"


class ClaimLost(Exception):
    """The session was taken over by another worker: write nothing, send nothing more."""


#: Codes of the ``error`` event that ends a turn in the state ``failed``, and their sentence.
FAILURES: t.Final[dict[str, str]] = {
    "llm_unavailable": "The model could not be reached, or refused to answer.",
    "worker_lost": "The worker that ran this turn is gone; the turn was not finished.",
    "store_unavailable": "The conversation store could not be reached; see the snapshot later.",
    "internal_error": "Something went wrong on the server; the error_id is in its log.",
}
