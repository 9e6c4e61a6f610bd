"""One request at a time: who asks, how long to wait, and what a refusal means."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import json
import logging
import random
import time
import typing as t

import httpx

from agentao_web.client.errors import ApiError
from agentao_web.client.errors import ClientError
from agentao_web.client.errors import ConnectionLost
from agentao_web.client.errors import NotOurs
from agentao_web.client.errors import passes
from agentao_web.client.errors import refusal
from agentao_web.client.replies import Answer
from agentao_web.client.replies import as_answer

JSON: t.Final = "application/json"
SSE: t.Final = "text/event-stream"
Token = str | cabc.Callable[[], str]

#: The first and the longest pause before trying again, in seconds.
_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
#: Seconds until a server that never answered is given up: it may just be starting.
_FIRST: t.Final = 5.0
#: The most an answer, or one event, may weigh, in bytes or characters.
MOST: t.Final = 2**26
#: What the fields of answers are.
_KINDS: t.Final[dict[str, type]] = {
    **dict.fromkeys(("events", "messages", "sessions"), list),
    **dict.fromkeys(("state", "turn_id", "outcome", "title"), str),
    **dict.fromkeys(("cursor", "cancelled"), int),
    **dict.fromkeys(("more", "ok"), bool),
}
_log = logging.getLogger("agentao_web.client")


class Patience:
    """How long nothing may get through before it is given up."""

    def __init__(self, seconds: float, known: cabc.Callable[[], bool] = lambda: True) -> None:
        """*known*: whether the server has ever answered. One that goes away comes back; where
        nobody listens at the first try the URL is wrong, or the server was not started."""
        self._seconds = seconds
        self._known = known
        self._until = 0.0
        self._failures = 0

    def reset(self) -> None:
        """Something got through."""
        self._failures = 0

    def pause(self, cause: Exception, hint: float | None = None) -> None:
        """Wait before trying again, *hint* seconds if the server said so.

        Raises *cause*, or ConnectionLost because of it, when there is no time left for that.
        """
        if not self._failures:
            # From here on it is counted: a stream may have been quiet, and well, for long before.
            self._until = time.monotonic() + self._seconds
        nowhere = _nobody_there(cause) and not self._known()
        if nowhere and not self._failures:
            self._until = min(self._until, time.monotonic() + _FIRST)
        wait = min(_LONGEST_PAUSE, _PAUSE * 2**self._failures) * random.uniform(0.5, 1)
        # Whatever the server says: without any pause it would be asked without end.
        wait = wait if hint is None else max(hint, _PAUSE)
        self._failures = min(self._failures + 1, 10)
        if time.monotonic() + wait > self._until:
            if isinstance(cause, ClientError):
                raise cause
            happened = f"nothing got through for {self._seconds:g} seconds, at last"
            if nowhere and isinstance(cause, httpx.RequestError):
                happened = f"no server answers at {_origin(cause.request.url)}"
            raise ConnectionLost(
                f"{happened}: {_words(cause)}. Is the server running, and the URL right?"
            ) from cause
        _log.info("trying again in %.1f s: %s", wait, _words(cause))
        time.sleep(wait)


def _nobody_there(cause: Exception) -> bool:
    """Whether no connection came about at all: refused, unknown, not trusted, or unanswered."""
    return isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout)


def _origin(url: httpx.URL) -> str:
    """The server's address without a path, and without a password that may stand in it."""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"


def _words(cause: Exception) -> str:
    return str(cause) or type(cause).__name__


class Api:
    """A server's routes, with the credentials and the deadlines of one client."""

    def __init__(
        self,
        base_url: str,
        http: httpx.Client,
        *,
        token: Token | None,
        headers: cabc.Mapping[str, str],
        cookies: cabc.Mapping[str, str],
        timeout: float,
        silence: float,
        patience: float,
    ) -> None:
        url = _address(base_url)
        self._base = str(url).rstrip("/")
        self._http = http
        self._token = token
        self._bearer = _bearer(token) if isinstance(token, str) else None
        self._headers = {sendable(name): sendable(value) for name, value in headers.items()}
        if token is None:
            # A login by cookies: no page of another site sends this.
            self._headers.setdefault("Sec-Fetch-Site", "same-origin")
        self._cookies = dict(cookies)
        self.timeout = timeout
        self.silence = silence
        self.patience = patience
        self.known = False
        """The server has answered something before."""

    def waiting(self) -> Patience:
        """A fresh patience with this server."""
        return Patience(self.patience, lambda: self.known)

    def call(self, method: str, path: str, **request: t.Any) -> dict[str, t.Any]:
        """The JSON object this harmless-twice request is answered with; tried again over drops."""
        patience = self.waiting()
        while True:
            try:
                return self.once(method, path, **request)[1]
            except httpx.RequestError as exc:
                patience.pause(exc)
            except ApiError as exc:
                if not passes(exc):
                    raise
                patience.pause(exc, exc.retry_after)

    def cancel(self, sid: str) -> int:
        """Stop what the session runs and waits to run; how many turns that were."""
        return int(self.call("POST", f"/chat/{sid}/cancel", needs="cancelled")["cancelled"])

    def answer(self, sid: str, question_id: str, answer: Answer) -> str:
        """Answer a question that is open; how that closed it. QuestionClosed if it was before."""
        body = as_answer(question_id, answer)
        return str(self.call("POST", f"/chat/{sid}/answer", needs="outcome", body=body)["outcome"])

    def once(
        self, method: str, path: str, *, needs: str = "", **request: t.Any
    ) -> tuple[int, dict[str, t.Any]]:
        """The status and the JSON object of one attempt, which has the fields it *needs*."""
        with self.open(method, path, accept=JSON, **request) as response:
            return response.status_code, as_object(response, read(response), needs)

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        accept: str,
        body: t.Any = None,
        params: cabc.Mapping[str, t.Any] | None = None,
        headers: cabc.Mapping[str, str] | None = None,
        wait: float = 0.0,
    ) -> cabc.Iterator[httpx.Response]:
        """One attempt: a response that was not refused, its body unread.

        Raises ApiError for a refusal, and httpx.RequestError if it broke. *wait* is how long the
        server may take on purpose. *body* is JSON, or its bytes.
        """
        sent = {"Accept": accept, **self._headers, **(headers or {})}
        content = None
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent["Content-Type"] = JSON
        if accept == SSE:
            # What is compressed is held back until there is enough of it.
            sent["Accept-Encoding"] = "identity"
        asked = {k: v for k, v in (params or {}).items() if v is not None}
        limits = httpx.Timeout(self.timeout, read=self.timeout + wait, write=max(30, self.timeout))
        while True:
            bearer = self._bearer or self._fresh()
            if bearer is not None:
                sent["Authorization"] = f"Bearer {bearer}"
            request = self._http.build_request(
                method,
                self._base + path,
                params=asked,
                content=content,
                headers=sent,
                cookies=self._cookies,
                timeout=limits,
            )
            response = self._http.send(request, stream=True, follow_redirects=False)
            self.known = True
            try:
                if response.status_code == 401 and self._renew(bearer):
                    continue
                if not response.is_success:
                    raise refusal(response, read(response))
                if accept == SSE:
                    # From here on it may be silent, but for the server's keep-alive comments.
                    request.extensions["timeout"]["read"] = self.silence
                yield response
                return
            finally:
                response.close()

    def _fresh(self) -> str | None:
        if callable(self._token):
            self._bearer = _bearer(self._token())
        return self._bearer

    def _renew(self, refused: str | None) -> bool:
        """Whether there is another token than the one that was *refused*."""
        return callable(self._token) and self._fresh() != refused


def _address(base_url: str) -> httpx.URL:
    with contextlib.suppress(httpx.InvalidURL):
        url = httpx.URL(base_url)
        if url.scheme in ("http", "https") and url.host and not (url.query or url.fragment):
            return url
    raise ValueError(f"{base_url!r} is no http:// or https:// address of a server")


def sendable(text: str) -> str:
    """*text* as it can stand in a header; ValueError otherwise, and never what it was."""
    if not (isinstance(text, str) and text.isascii() and text.isprintable()):
        raise ValueError("a token or header may have printable ASCII characters only")
    if text != text.strip():
        raise ValueError("a token or header may not begin or end with a space")
    return text


def _bearer(token: str) -> str:
    if not sendable(token):
        raise ValueError("the token is empty")
    return token


def read(response: httpx.Response) -> bytes:
    """The body, if it is not too long: what is compressed may come out without end."""
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > MOST:
            raise too_long(response)
    return bytes(body)


def too_long(response: httpx.Response) -> NotOurs:
    """No answer of ours weighs that much."""
    return NotOurs(response.status_code, "http_error", "The answer does not end")


def as_object(response: httpx.Response, content: bytes, needs: str = "") -> dict[str, t.Any]:
    """The JSON object *content* of a success; *needs* are fields of it."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise NotOurs(response.status_code, "http_error", f"The answer is {kind or 'no JSON'}")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise httpx.DecodingError("the answer broke off", request=response.request) from None
    if not isinstance(body, dict) or not all(_has(body, name) for name in needs.split()):
        raise NotOurs(response.status_code, "http_error", "The answer is no agentao-web's")
    return body


def _has(body: dict[str, t.Any], name: str) -> bool:
    value = body.get(name)
    items = value if isinstance(value, list) else ()
    return isinstance(value, _KINDS[name]) and all(isinstance(item, dict) for item in items)
