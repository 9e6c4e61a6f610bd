"""How agents reach the model: one pool of connections for all, and Agentao's client on top of it.

Knows Agentao's client; must never know sessions, turns or Flask.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import http.cookiejar
import importlib
import json
import logging
import re
import threading
import typing as t

import agentao
import httpx2
from agentao.cancellation import current_turn
from agentao.llm import LLMClient

from agentao_web.agents.budget import IMAGE_TOKENS
from agentao_web.agents.budget import Meter
from agentao_web.agents.budget import Metered
from agentao_web.agents.model import refusals
from agentao_web.agents.model.plain import Completions
from agentao_web.agents.model.plain import Plainly
from agentao_web.agents.model.plain import address
from agentao_web.agents.model.plain import in_words
from agentao_web.agents.model.sockets import Patience
from agentao_web.agents.model.sockets import Transport

_WRITE_SECONDS = 30.0
#: Agentao waits no longer than this before it asks again. If it was not told when, it begins with
#: the second number, and doubles it.
_LONGEST_WAIT = 60.0
_FIRST_WAIT = 7.5
#: The size of a window that nobody has set, and that is not told: Agentao's own.
_WINDOW = 200_000
#: An answer shorter than this is not worth a call.
_LEAST_ANSWER = 256
#: A picture within a message; its length says nothing of what it costs.
_PICTURE = re.compile(r'"data:[^"]{256,}"')
#: Tokens kept free beside prompt and answer.
_FRAME = 16
_MAX_SDKS = 256
#: What an event may have around its text.
_FLOOD_BYTES = 2**16

#: Agentao writes whole prompts, answers and provider errors to its client's logger, at every
#: level. This one is in no tree and lets nothing through; see `_Wire.classify_retry` for ours.
_SILENCE = logging.Logger("agentao_web.silence", logging.CRITICAL + 1)

_ADAPTER = (
    *("build_request", "classify_retry", "consume_stream", "create_client"),
    *("log_view", "repair_request", "send"),
)
_PRIVATE = (
    ("agentao.llm.client:LLMClient", ("_make_adapter", "_log_request", "_log_response")),
    ("agentao.llm._stream_response:_StreamAccumulator", ("add_reasoning",)),
    (
        "agentao.llm._openai_completions:OpenAICompletionsAdapter",
        ("build_request", "consume_stream"),
    ),
    *(
        (adapter, _ADAPTER)
        for adapter in (
            "agentao.llm._openai_completions:OpenAICompletionsAdapter",
            "agentao.llm._openai_responses:OpenAIResponsesAdapter",
            "agentao.llm._anthropic_messages:AnthropicMessagesAdapter",
        )
    ),
)


def check_agentao() -> None:
    """Raise RuntimeError if the installed Agentao lacks a private name this file leans on."""
    for place, names in _PRIVATE:
        module, _, name = place.partition(":")
        try:
            owner = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            owner = None
        for missing in (n for n in names if not callable(getattr(owner, n, None))):
            raise RuntimeError(
                f"agentao {agentao.__version__} has no {place}.{missing}; agentao-web was written "
                f"for agentao 0.5.17. Did you upgrade it? Run: pip install 'agentao==0.5.17'"
            )


def _settle_imports() -> None:
    """Import now what Agentao and the SDK would import in the middle of a failed call.

    Agentao imports httpx when it first looks at an error, and the OpenAI SDK looks into a
    half-imported httpx on any other thread that has an error or drops a stream just then.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("httpx")


class ModelPool:
    """One HTTP connection pool to the model, shared by every agent of an app; each call can be
    cut off alone.

    `attempts` counts the first try and is at most Agentao's own five. It is kept per client:
    nothing of Agentao's, which the host may use for itself, is changed.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        first_token_timeout: float = 300.0,
        read_timeout: float = 60.0,
        call_timeout: float = 300.0,
        attempts: int = 2,
        window: int = _WINDOW,
    ) -> None:
        check_agentao()
        _settle_imports()
        self.attempts = attempts
        #: The window of the models as it was set, in tokens.
        self.window = window
        #: What the SDKs are told; `Patience` has the last word on reads.
        self.stream_timeout = _timeout(connect_timeout, max(read_timeout, first_token_timeout))
        #: For calls that answer in one piece (Gemini, the summary of a long history).
        self.call_timeout = _timeout(connect_timeout, call_timeout)
        self._stream_patience = (first_token_timeout, read_timeout)
        self._call_patience = (call_timeout, None)
        self._windows: dict[tuple[str, ...], int] = {}
        self._transport = Transport()
        self._http = httpx2.Client(
            transport=self._transport,
            timeout=self.stream_timeout,
            follow_redirects=True,
            # Plain text: a compressed stream comes in lumps, and cutting it off is an error.
            headers={"accept-encoding": "identity"},
            # A provider's cookies would tie one tenant's calls to another's.
            cookies=http.cookiejar.CookieJar(
                http.cookiejar.DefaultCookiePolicy(allowed_domains=())
            ),
        )
        self._sdks: dict[tuple[str, ...], t.Any] = {}
        self._lock = threading.Lock()

    def client(
        self, *, logger: logging.Logger, meter: Meter | None = None, **llm_kwargs: t.Any
    ) -> LLMClient:
        """A client for one agent, from what `discover_llm_kwargs` returns.

        *meter* counts its calls, and may refuse them.

        A failed call is one warning on *logger*, with type and status but no text of the
        provider's; prompts and answers are never logged.
        """
        client = _PooledClient(self, logger, llm_kwargs)
        client.meter = meter
        if meter is not None:
            meter.hears_all = True
        return client

    def close(self) -> None:
        """Close every connection; a call still running fails."""
        self._transport.hang_up()
        self._http.close()

    @property
    def closed(self) -> bool:
        return self._http.is_closed

    def sdk(self, key: tuple[str, ...], build: cabc.Callable[[], t.Any]) -> t.Any:
        """The SDK client for *key*: wire format, base URL and key of the provider.

        A new one costs an SSL context, so it is built once.
        """
        with self._lock:
            if key not in self._sdks:
                if len(self._sdks) >= _MAX_SDKS:
                    self._sdks.pop(next(iter(self._sdks)))
                plain = build()
                pooled = plain.with_options(
                    http_client=self._http, timeout=self.stream_timeout, **address(*key[1:])
                )
                self._sdks[key] = Plainly(pooled) if key[0] == "openai-completions" else pooled
                plain.close()
            return self._sdks[key]

    def patience(self, *, streams: bool, meter: Meter | None) -> Patience:
        """What bounds the silence of one call."""
        first, between = self._stream_patience if streams else self._call_patience
        if meter is None or meter.max_text is None:
            return Patience(first, between)
        # Within JSON a text is hardly ever more than twice as long.
        flood = 2 * meter.max_text + _FLOOD_BYTES
        return Patience(first, between, flood=flood, flooded=meter.flooded)

    @contextlib.contextmanager
    def waiting(self, patience: Patience) -> cabc.Iterator[None]:
        """A call of this thread, bounded by *patience*."""
        try:
            with self._transport.waiting(patience):
                yield
        finally:
            self.let_go()

    def learn(self, key: tuple[str, ...], window: int | None) -> None:
        """The model of *key* has said how large its window is; None if it has not."""
        if window is None or self._windows.get(key) == window:
            return
        with self._lock:
            if len(self._windows) >= _MAX_SDKS:
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = window

    def learned(self, key: tuple[str, ...]) -> int | None:
        """The window of the model of *key*, if it has ever said so."""
        return self._windows.get(key)

    def let_go(self) -> None:
        """Give back what this thread's last call still holds.

        The SDK's stream keeps itself alive in a cycle, so one left in the middle would hold its
        socket until the garbage collector comes by.
        """
        self._transport.let_go()


def _timeout(connect: float, read: float) -> httpx2.Timeout:
    # No pool timeout: the pool has no upper limit, so nobody waits for a place in it.
    return httpx2.Timeout(connect=connect, read=read, write=_WRITE_SECONDS, pool=None)


class _PooledClient(Metered, LLMClient):
    """Agentao's client with its own model, usage and retries, on the app's connections."""

    def __init__(
        self, pool: ModelPool, logger: logging.Logger, llm_kwargs: dict[str, t.Any]
    ) -> None:
        self.failure = refusals.Failure()
        """Why the last call failed, if it did."""
        self._pool = pool
        self._host_logger = logger
        self._reported: int | None = None
        super().__init__(log_file=None, logger=_SILENCE, **llm_kwargs)

    @property
    def model_input_limit(self) -> int | None:
        """The model's window as the provider has told it, here or to another agent; Agentao looks
        at this before each call."""
        known = [n for n in (self._reported, self._pool.learned(self.place)) if n is not None]
        return min(known, default=None)

    @model_input_limit.setter
    def model_input_limit(self, value: int | None) -> None:
        self._reported = value

    @property
    def place(self) -> tuple[str, ...]:
        """Which model this is, and where."""
        return (self.api_format, self.base_url or "", self.model)

    @property
    def window(self) -> int | None:
        """The model's window, if it was set or told; None if it is only supposed."""
        told = self.model_input_limit
        if self._pool.window == _WINDOW:
            return told
        return self._pool.window if told is None else min(told, self._pool.window)

    def chat(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return self._call(super().chat, args, kwargs, streams=False)

    def chat_stream(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return self._call(super().chat_stream, args, kwargs, streams=True)

    def _call(
        self,
        method: cabc.Callable[..., t.Any],
        args: t.Any,
        kwargs: dict[str, t.Any],
        *,
        streams: bool,
    ) -> t.Any:
        self.failure = refusals.Failure()
        patience = self._pool.patience(streams=streams, meter=self.meter)
        self._adapter.begin(patience)
        if kwargs.get("on_retry") is not None:
            kwargs["on_retry"] = self._counted(kwargs["on_retry"])
        try:
            with self._pool.waiting(patience):
                return method(*args, **kwargs)
        except Exception as exc:
            self.failure = refusals.failure(exc)
            if isinstance(exc, refusals.TooLong) or not refusals.too_long(exc):
                raise
            told = refusals.window(refusals.said(exc))
            self._pool.learn(self.place, told)
            raise refusals.TooLong(told, getattr(exc, "status_code", None)) from exc

    def _counted(self, on_retry: cabc.Callable[..., None]) -> cabc.Callable[..., None]:
        # Agentao reports its own, process-wide number of retries.
        return lambda info: on_retry({**info, "max_retries": self._pool.attempts - 1})

    def _make_adapter(self) -> t.Any:
        adapter = super()._make_adapter()
        if self.api_format == "openai-completions":
            adapter = Completions(adapter, self, self._pool.call_timeout, self._host_logger)
        return _Wire(adapter, self, self._pool, self._host_logger)

    def _log_request(self, *args: t.Any, **kwargs: t.Any) -> None:
        """Nothing: Agentao would render the whole prompt even for a silent logger."""

    def _log_response(self, *args: t.Any, **kwargs: t.Any) -> None:
        """Nothing, as for requests."""


class _EndedEarly(Exception):
    """The answer broke off before a word of it was shown: it may be asked for again."""


class _Wire:
    """Agentao's adapter for one wire format, with our SDK client, timeouts and retries."""

    def __init__(
        self, adapter: t.Any, owner: _PooledClient, pool: ModelPool, logger: logging.Logger
    ) -> None:
        self._adapter = adapter
        self._owner = owner
        self._pool = pool
        self._logger = logger
        self._patience = Patience(0.0)
        self.failed = 0
        self._repaired = False

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._adapter, name)

    def begin(self, patience: Patience) -> None:
        """A call begins, with all its attempts."""
        self._patience = patience
        self.failed = 0
        self._repaired = False

    def create_client(self) -> t.Any:
        owner = self._owner
        key = (owner.api_format, owner.base_url or "", owner.api_key)
        return self._pool.sdk(key, self._adapter.create_client)

    def log_view(self, *args: t.Any) -> dict[str, t.Any]:
        return {}

    # -- the request ---------------------------------------------------------------------------

    def build_request(
        self, messages: t.Any, tools: t.Any, max_tokens: int | None, **options: t.Any
    ) -> dict[str, t.Any]:
        """Agentao's, with room for the answer in a window that is known."""
        window = self._owner.window
        if window is not None and max_tokens and max_tokens > window // 4:
            left = window - _weight(messages, tools)
            max_tokens = min(max_tokens, max(left, _LEAST_ANSWER))
        return t.cast(
            dict[str, t.Any],
            self._adapter.build_request(messages, tools, max_tokens, **options),
        )

    def repair_request(self, err_text: str, kwargs: dict[str, t.Any], *, stream: bool) -> bool:
        """Also: a prompt that fits, with more room for the answer than the window has left."""
        if self._shorten_answer(err_text, kwargs):
            return True
        return bool(self._adapter.repair_request(err_text, kwargs, stream=stream))

    def _shorten_answer(self, err_text: str, kwargs: dict[str, t.Any]) -> bool:
        window = refusals.window(err_text)
        if self._repaired or window is None:
            return False
        self._pool.learn(self._owner.place, window)
        prompt = refusals.prompt(err_text)
        if prompt is None:
            prompt = _weight(kwargs.get("messages"), kwargs.get("tools"))
        left = window - prompt - _FRAME
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            asked = kwargs.get(name)
            if isinstance(asked, int) and _LEAST_ANSWER <= left < asked:
                kwargs[name] = left
                self._repaired = True
        return self._repaired

    # -- the answer ----------------------------------------------------------------------------

    def consume_stream(
        self, kwargs: dict[str, t.Any], acc: t.Any, on_text_chunk: t.Any, token: t.Any
    ) -> t.Any:
        """Agentao's, with three differences: every token is noticed, the turn's bound on text
        holds, and an answer that breaks off after a part of it was shown is that part."""
        listening = _Listening(acc, on_text_chunk, self._patience, self._owner.meter)
        whole = False
        try:
            response = self._adapter.consume_stream(kwargs, acc, listening.say, token)
            whole = True
        except Exception as exc:
            if exc is listening.failed or not (acc.progress_made or acc.finish_reason_reported):
                raise
            if not acc.finish_reason_reported:
                self._logger.warning("a model's answer was cut off: %s", type(exc).__name__)
            response = acc.build()
        if not response.finish_reason_reported:
            stopped = token is not None and token.is_cancelled
            self._cut(response, whole=whole, again=not (stopped or acc.progress_made))
        return response

    def _cut(self, response: t.Any, *, whole: bool, again: bool) -> None:
        """No call of an answer that broke off is made, unless it is there to the last bracket."""
        message = response.choices[0].message
        calls = message.tool_calls
        if not calls or (whole and all(_complete(call.function.arguments) for call in calls)):
            return
        if again:
            raise _EndedEarly("the answer ended in the middle of a tool call")
        message.tool_calls = None

    # -- failures ------------------------------------------------------------------------------

    def classify_retry(self, exc: BaseException) -> tuple[bool, int | None, str | None]:
        retryable, status, _ = self._adapter.classify_retry(exc)
        self.failed += 1
        turn = current_turn()
        if turn is not None and turn[1].is_cancelled:
            return False, status, None
        self._logger.warning(
            "model call failed: %s, status %s, attempt %d of %d",
            in_words(exc),
            status or getattr(exc, "status_code", None),
            self.failed,
            self._pool.attempts,
        )
        wait = refusals.retry_after(exc)
        again = (
            (retryable or isinstance(exc, _EndedEarly))
            and self.failed < self._pool.attempts
            and not self._pool.closed
            # It may be at work on the first request still.
            and not self._patience.exhausted
            and not refusals.too_long(exc)
            and self._worth_waiting(wait)
        )
        return again, status, None if wait is None else str(wait)

    def _worth_waiting(self, wait: float | None) -> bool:
        meter = self._owner.meter
        left = meter.time_left() if meter is not None else None
        most = _LONGEST_WAIT if left is None else min(_LONGEST_WAIT, left)
        if wait is None:
            wait = min(_FIRST_WAIT * 2 ** (self.failed - 1), _LONGEST_WAIT)
        return wait <= most


class _Listening:
    """What an answer says, piece by piece, on its way into Agentao's accumulator."""

    def __init__(self, acc: t.Any, on_text: t.Any, patience: Patience, meter: Meter | None) -> None:
        self.failed: Exception | None = None
        """What the listener raised itself."""
        self._acc = acc
        self._on_text = on_text
        self._on_thought = acc.on_reasoning_chunk
        self._heard = patience.heard
        self._meter = meter
        self.say = None if on_text is None else self._say
        acc.on_reasoning_chunk = self._think
        # Who puts the calls together asks for room, or grows them in here.
        acc.room = self._room
        acc.tool_calls_data = _Calls(self._room)

    def _room(self, text: str) -> str:
        """As much of *text* as the turn has room for."""
        self._heard()
        return text if self._meter is None else self._meter.room(text)

    def _say(self, text: str) -> None:
        kept = self._room(text)
        if kept is not text:
            self._acc.content_parts[-1] = kept
        self._tell(self._on_text, kept)

    def _think(self, text: str) -> None:
        kept = self._room(text)
        if kept is not text:
            self._acc.reasoning_parts[-1] = kept
        if self._on_thought is not None:
            self._tell(self._on_thought, kept)

    def _tell(self, listener: cabc.Callable[[str], None], text: str) -> None:
        if not text:
            return
        try:
            listener(text)
        except Exception as exc:
            self.failed = exc
            raise


class _Calls(dict[t.Any, t.Any]):
    """The tool calls of an answer while they grow."""

    def __init__(self, room: cabc.Callable[[str], str]) -> None:
        self._room = room

    def __setitem__(self, key: t.Any, value: dict[str, t.Any]) -> None:
        # Each counts, an empty one too: there may be any number of them.
        self._room(json.dumps(value, default=str))
        grown = _Growing(self._room)
        grown.update(value)
        super().__setitem__(key, grown)


class _Growing(dict[str, t.Any]):
    """One tool call: what is added to its name and arguments has to find room."""

    def __init__(self, room: cabc.Callable[[str], str]) -> None:
        self._room = room

    def __setitem__(self, name: str, value: t.Any) -> None:
        before = self.get(name)
        if isinstance(before, str) and isinstance(value, str):
            added = value[len(before) :]
            kept = self._room(added)
            if kept is not added:
                value = before + kept
        super().__setitem__(name, value)


def _complete(arguments: str) -> bool:
    """Whether *arguments* are an object of JSON to its last bracket, so that no part is missing."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _weight(messages: t.Any, tools: t.Any) -> int:
    """About how many tokens a request has."""
    text = json.dumps([messages, tools], default=str)
    pictures = [len(found) for found in _PICTURE.findall(text)]
    return (len(text) - sum(pictures)) // 4 + IMAGE_TOKENS * len(pictures)
