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
    message: str = ""
    """What happened, then what to do. No docstring: ``python -OO`` drops those."""
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
        self.message = message or type(self).message
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
    status = 400
    code = "invalid_request"
    message = "The request is not what this route takes."


class Unauthorized(WebError):
    status = 401
    code = "unauthorized"
    message = (
        "You are not logged in: this application's login is needed or, where it has none, "
        "a valid bearer token."
    )


class Forbidden(WebError):
    status = 403
    code = "forbidden"
    message = "This request is not allowed."


class NotFound(WebError):
    status = 404
    code = "not_found"
    message = "There is nothing here by that name."


class MethodNotAllowed(WebError):
    status = 405
    code = "method_not_allowed"
    message = "This route does not take that method."

    def __init__(self, allowed: t.Iterable[str]) -> None:
        self.allowed = sorted(allowed)
        super().__init__(None, allowed=self.allowed)


class NotAcceptable(WebError):
    status = 406
    code = "not_acceptable"
    message = "This route answers application/json and text/event-stream only."


class SessionBusy(WebError):
    status = 409
    code = "session_busy"
    message = "The session is already running a turn."
    retry_after = 1


class IdempotencyConflict(WebError):
    status = 409
    code = "idempotency_conflict"
    message = "This Idempotency-Key was used with another body."


class QuestionClosed(WebError):
    status = 409
    code = "question_closed"
    message = "This question was closed before."


class PayloadTooLarge(WebError):
    status = 413
    code = "payload_too_large"
    message = "The request body is too large."


class UnsupportedMediaType(WebError):
    status = 415
    code = "unsupported_media_type"
    message = "The body must be application/json."


class TooManyTurns(WebError):
    status = 429
    code = "too_many_turns"
    message = "Too many turns are running; try again later."
    retry_after = 2


class TooManySessions(WebError):
    status = 429
    code = "too_many_sessions"
    message = "Too many sessions; delete one, or try again later."
    retry_after = 30


class TooManyStreams(WebError):
    status = 429
    code = "too_many_streams"
    message = (
        "You have too many open streams and waiting requests. Close one, or ask for JSON "
        "(Accept: application/json) and poll."
    )
    retry_after = 2


class BudgetExhausted(WebError):
    status = 429
    code = "budget_exhausted"
    message = "The tenant's tokens of this day (UTC) are spent."


class InternalError(WebError):
    status = 500
    code = "internal_error"
    message = "Something went wrong on the server; the error_id is in its log."


class NoStreamSlot(WebError):
    status = 503
    code = "no_stream_slot"
    message = (
        "Every place for streams and waiting requests is taken. Ask for JSON "
        "(Accept: application/json) and poll, or try again."
    )
    retry_after = 2


class Draining(WebError):
    status = 503
    code = "draining"
    message = "This worker is shutting down; try again."
    retry_after = 1


class StoreUnavailable(WebError):
    status = 503
    code = "store_unavailable"
    message = "The conversation store cannot be reached; try again later."
    retry_after = 2


class WrongSchema(WebError, RuntimeError):
    status = 503
    code = "wrong_schema"
    message = "The database was written by another version of agentao-web."


class NoModel(WebError):
    status = 503
    code = "no_model"
    message = (
        "No model is set up on this server, so it cannot answer; its log says what is missing."
    )


class ClaimLost(Exception):
    """The session was taken over by another worker: write nothing, send nothing more."""


#: Codes of the ``error`` event that ends a turn in the state ``failed``, and their sentence.
FAILURES: t.Final[dict[str, str]] = {
    "llm_unavailable": "The model could not be reached, or refused to answer.",
    "worker_lost": "The worker that ran this turn is gone; the turn was not finished.",
    "store_unavailable": "The conversation store could not be reached; see the snapshot later.",
    "internal_error": "Something went wrong on the server; the error_id is in its log.",
}
