"""How agents reach the model: one pool of connections for all, and Agentao's client on top of it.

Knows Agentao's client; must never know sessions, turns or Flask.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import http.cookiejar
import importlib
import logging
import threading
import typing as t

import agentao
import httpx2
from agentao.cancellation import current_turn
from agentao.llm import LLMClient

from agentao_web.agents.budget import Meter
from agentao_web.agents.budget import Metered
from agentao_web.agents.model.plain import Completions
from agentao_web.agents.model.plain import Plainly
from agentao_web.agents.model.plain import address
from agentao_web.agents.model.plain import in_words
from agentao_web.agents.model.sockets import Transport

_WRITE_SECONDS = 30.0
_MAX_SDKS = 256

#: Agentao writes whole prompts, answers and provider errors to its client's logger, at every
#: level. This one is in no tree and lets nothing through; see `_Wire.classify_retry` for ours.
_SILENCE = logging.Logger("agentao_web.silence", logging.CRITICAL + 1)

_PRIVATE = (
    ("agentao.llm.client:LLMClient", ("_make_adapter", "_log_request", "_log_response")),
    ("agentao.llm._stream_response:_StreamAccumulator", ("add_reasoning",)),
    (
        "agentao.llm._openai_completions:OpenAICompletionsAdapter",
        ("build_request", "consume_stream"),
    ),
    *(
        (adapter, ("create_client", "classify_retry", "log_view", "send"))
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
        read_timeout: float = 60.0,
        call_timeout: float = 300.0,
        attempts: int = 2,
    ) -> None:
        check_agentao()
        _settle_imports()
        self.attempts = attempts
        #: For streams: how long the model may be silent.
        self.stream_timeout = _timeout(connect_timeout, read_timeout)
        #: For calls that answer in one piece (Gemini, the summary of a long history).
        self.call_timeout = _timeout(connect_timeout, call_timeout)
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
        self._pool = pool
        self._host_logger = logger
        super().__init__(log_file=None, logger=_SILENCE, **llm_kwargs)

    def chat(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return self._call(super().chat, args, kwargs)

    def chat_stream(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return self._call(super().chat_stream, args, kwargs)

    def _call(
        self, method: cabc.Callable[..., t.Any], args: t.Any, kwargs: dict[str, t.Any]
    ) -> t.Any:
        self._adapter.failed = 0
        if kwargs.get("on_retry") is not None:
            kwargs["on_retry"] = self._counted(kwargs["on_retry"])
        try:
            return method(*args, **kwargs)
        finally:
            self._pool.let_go()

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


class _Wire:
    """Agentao's adapter for one wire format, with our SDK client, timeouts and retries."""

    def __init__(
        self, adapter: t.Any, owner: LLMClient, pool: ModelPool, logger: logging.Logger
    ) -> None:
        self._adapter = adapter
        self._owner = owner
        self._pool = pool
        self._logger = logger
        self.failed = 0

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._adapter, name)

    def create_client(self) -> t.Any:
        owner = self._owner
        key = (owner.api_format, owner.base_url, owner.api_key)
        return self._pool.sdk(key, self._adapter.create_client)

    def log_view(self, *args: t.Any) -> dict[str, t.Any]:
        return {}

    def classify_retry(self, exc: BaseException) -> tuple[bool, int | None, str | None]:
        retryable, status, retry_after = self._adapter.classify_retry(exc)
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
        again = retryable and self.failed < self._pool.attempts and not self._pool.closed
        return again, status, retry_after
