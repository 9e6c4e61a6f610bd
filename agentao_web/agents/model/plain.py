"""Chat Completions without the OpenAI SDK's decoder and models: requests go out through the SDK,
with its headers, its errors and our connections; what comes back we read ourselves.

Knows HTTP answers; must never know sockets, sessions or turns.
"""

from __future__ import annotations

import collections.abc as cabc
import itertools
import json
import logging
import re
import typing as t
import urllib.parse

import httpx2
import openai
from agentao.cancellation import current_turn

from agentao_web.agents.model.answer import CONTENT_FILTER
from agentao_web.agents.model.answer import FILTERED
from agentao_web.agents.model.answer import Answer
from agentao_web.agents.model.answer import Garbled
from agentao_web.agents.model.answer import Refused
from agentao_web.agents.model.answer import restored
from agentao_web.agents.model.repairs import REPAIRS
from agentao_web.agents.model.repairs import Repair
from agentao_web.agents.model.sse import MAX_EVENT
from agentao_web.agents.model.sse import EventReader
from agentao_web.agents.model.sse import EventTooLong

#: White space that servers send to keep a connection open, and the mark some files begin with.
_BLANK: t.Final = b" \t\r\n\xef\xbb\xbf"
#: What may go into a log of what a provider says: a content type, the name or number of an error.
_CONTENT_TYPE: t.Final = re.compile(r"[\w.+-]{1,40}/[\w.+-]{1,40}", re.ASCII)
_ERROR_NAME: t.Final = re.compile(r"[A-Za-z][a-z_]{1,47}|\d{1,5}")


class NotAnAnswer(openai.APIError):
    """What came is no chat completion; `kind` says what it is, without its text."""

    def __init__(self, kind: str, request: httpx2.Request) -> None:
        super().__init__(f"the model's server sent {kind}", request, body=None)
        self.kind = kind


class BrokenOff(openai.APIConnectionError):
    """The answer ended before there was anything of it to keep; it may be asked for again."""

    def __init__(self, why: str, request: httpx2.Request) -> None:
        super().__init__(message=why, request=request)


def in_words(exc: BaseException) -> str:
    """What went wrong with a call, for a log: no text of the provider's."""
    name = type(exc).__name__
    if isinstance(exc, NotAnAnswer):
        return f"{name}, {exc}; is the base URL right (did you forget /v1?)"
    if isinstance(exc, BrokenOff | Garbled | EventTooLong):
        return f"{name}, {exc}"
    error = exc.error if isinstance(exc, Refused) else vars(exc)
    words = [str(error.get(field) or "") for field in ("code", "type")]
    return ", ".join([name, *(word for word in words if _ERROR_NAME.fullmatch(word))])


def address(base_url: str, api_key: str) -> dict[str, t.Any]:
    """Options of an SDK's client for a base URL with a query, as Azure has it: the query belongs
    after the path of each request. Azure also wants its key in a header of its own."""
    parts = urllib.parse.urlsplit(base_url)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    options: dict[str, t.Any] = {}
    # Azure's portal shows the address with the method at its end.
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if query or path != parts.path.rstrip("/"):
        options["base_url"] = urllib.parse.urlunsplit(parts._replace(path=path, query=""))
    if query:
        options["default_query"] = query
    azure = "api-version" in query or (parts.hostname or "").endswith(".azure.com")
    # A token of Entra (a JWT) goes where the SDK puts it.
    if azure and not api_key.startswith("eyJ"):
        options["default_headers"] = {"api-key": api_key}
    return options


class Plainly:
    """The OpenAI SDK's client, and what is known of its provider."""

    def __init__(self, sdk: openai.OpenAI) -> None:
        self._sdk = sdk
        self.repairs: list[Repair] = []
        """Applied to every request: the provider refused one, and accepted it with these."""

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._sdk, name)

    def ask(self, body: dict[str, t.Any], options: dict[str, t.Any]) -> httpx2.Response:
        """The response to a chat completion, unread."""
        response = self._sdk.post(
            "/chat/completions",
            body=body,
            cast_to=httpx2.Response,
            options=t.cast(t.Any, options),
            stream=True,
            stream_cls=openai.Stream[object],
        )
        return t.cast(httpx2.Response, response)


class Completions:
    """Agentao's adapter for Chat Completions, with a reader of our own."""

    def __init__(
        self, adapter: t.Any, owner: t.Any, call_timeout: httpx2.Timeout, logger: logging.Logger
    ) -> None:
        self._adapter = adapter
        self._owner = owner
        self._call_timeout = call_timeout
        self._logger = logger

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._adapter, name)

    def build_request(self, messages: t.Any, *args: t.Any, **kwargs: t.Any) -> dict[str, t.Any]:
        request = self._adapter.build_request([*map(restored, messages)], *args, **kwargs)
        return t.cast(dict[str, t.Any], request)

    def consume_stream(
        self,
        request: dict[str, t.Any],
        acc: t.Any,
        on_text_chunk: cabc.Callable[[str], None] | None,
        cancellation_token: t.Any,
    ) -> t.Any:
        def stopped() -> bool:
            return cancellation_token is not None and cancellation_token.is_cancelled

        return self._call(request, {}, acc, on_text_chunk, stopped)

    def send(self, request: dict[str, t.Any], acc: t.Any) -> t.Any:
        """The same for an answer in one piece."""

        def stopped() -> bool:
            turn = current_turn()
            return turn is not None and turn[1].is_cancelled

        return self._call(request, {"timeout": self._call_timeout}, acc, None, stopped)

    def _call(
        self,
        request: dict[str, t.Any],
        options: dict[str, t.Any],
        acc: t.Any,
        on_text: cabc.Callable[[str], None] | None,
        stopped: cabc.Callable[[], bool],
    ) -> t.Any:
        answer = Answer(acc, on_text)
        try:
            self._read(self._open(request, options, stopped), answer, stopped)
        except openai.BadRequestError as exc:
            if str(exc.code).lower() not in FILTERED:
                raise
            answer.finish = CONTENT_FILTER
        finally:
            acc.usage_data = answer.usage.shape()
        return answer.response()

    def _open(
        self,
        request: dict[str, t.Any],
        options: dict[str, t.Any],
        stopped: cabc.Callable[[], bool],
    ) -> httpx2.Response:
        """The response to *request*, repaired if its provider refuses it as it is."""
        client: Plainly = self._owner.client
        body = request | (request.get("extra_body") or {})
        body.pop("extra_body", None)
        for repair in client.repairs:
            body = repair.cure(body)
        tried: list[Repair] = []
        while True:
            try:
                response = client.ask(body, options)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as exc:
                refusal = exc.response.text.lower()
                known = [one for one in REPAIRS if one not in tried and one.cures(refusal, body)]
                if not known:
                    raise
                tried.append(known[0])
                body = known[0].cure(body)
            else:
                if not stopped():
                    # It was accepted with these repairs, so later ones get them at once.
                    client.repairs.extend(tried)
                return response

    def _read(
        self, response: httpx2.Response, answer: Answer, stopped: cabc.Callable[[], bool]
    ) -> None:
        try:
            _read_all(response, answer, stopped)
        except NotAnAnswer:
            # A stop cuts JSON off in the middle.
            if not stopped():
                raise
        except _BROKEN as exc:
            if answer.complete or stopped():
                # The answer had ended, or nobody wants it any longer.
                return
            if isinstance(exc, Refused) and str(exc.error.get("code")).lower() in FILTERED:
                answer.finish = CONTENT_FILTER
                return
            if not answer.shown:
                raise _as_the_sdk_does(exc, response.request) from exc
            # Somebody has read a part of it, so it cannot be asked for again.
            self._logger.warning("a model's answer was cut off: %s", in_words(exc))
        else:
            if not stopped():
                _check(response, answer)
        finally:
            response.close()


def _read_all(response: httpx2.Response, answer: Answer, stopped: cabc.Callable[[], bool]) -> None:
    plain = "content-encoding" not in response.headers
    packets = response.iter_raw() if plain else response.iter_bytes()
    head = b""
    for packet in packets:
        head += packet
        if len(head) > MAX_EVENT:
            raise EventTooLong(f"more than {MAX_EVENT} bytes of white space")
        if begins := head.lstrip(_BLANK)[:1]:
            break
    else:
        raise Garbled("the answer is empty")
    packets = itertools.chain((head,), packets)
    if begins in b"{[":
        _read_json(packets, response, answer)
    elif begins == b"<":
        raise NotAnAnswer(_kind(response, "a page of HTML"), response.request)
    else:
        _read_events(packets, answer, stopped)


def _read_events(
    packets: cabc.Iterable[bytes], answer: Answer, stopped: cabc.Callable[[], bool]
) -> None:
    reader = EventReader()
    feed, take = reader.feed, answer.take_event
    for packet in packets:
        for kind, data in feed(packet):
            if stopped() or take(kind, data):
                return
    if not stopped():
        for kind, data in reader.end():
            take(kind, data)


def _read_json(packets: cabc.Iterable[bytes], response: httpx2.Response, answer: Answer) -> None:
    text = bytearray()
    for packet in packets:
        text += packet
        if len(text) > MAX_EVENT:
            raise EventTooLong(f"an answer of more than {MAX_EVENT} bytes")
    try:
        told = json.loads(text.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as exc:
        raise NotAnAnswer(_kind(response, "unreadable JSON"), response.request) from exc
    if isinstance(told, list) and told:
        # Gemini wraps its errors in a list.
        told = told[0]
    if isinstance(told, dict):
        answer.take_complete(told)


def _check(response: httpx2.Response, answer: Answer) -> None:
    """Raise if the stream ended before there was an answer."""
    if not answer.heard:
        raise NotAnAnswer(_kind(response, "something that is no chat completion"), response.request)
    if answer.empty and not answer.complete and (answer.finish or not answer.done):
        raise BrokenOff("the stream ended before the answer began", response.request)


def _kind(response: httpx2.Response, what: str) -> str:
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    return f"{what} ({kind if _CONTENT_TYPE.fullmatch(kind) else 'no content type'})"


#: What can end an answer in the middle.
_BROKEN: t.Final = (httpx2.TransportError, Refused, Garbled, EventTooLong)


def _as_the_sdk_does(exc: Exception, request: httpx2.Request) -> Exception:
    """The error that Agentao expects, and decides by whether to try again."""
    if isinstance(exc, httpx2.TimeoutException):
        return openai.APITimeoutError(request=request)
    if isinstance(exc, Refused):
        return openai.APIError(str(exc), request, body=exc.error)
    if isinstance(exc, EventTooLong):
        return NotAnAnswer(str(exc), request)
    if isinstance(exc, Garbled):
        return BrokenOff(str(exc), request)
    return openai.APIConnectionError(request=request)
