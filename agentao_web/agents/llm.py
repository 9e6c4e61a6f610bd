"""How agents reach the model: one pool of HTTP connections, and one socket per call that can be cut
off while it waits. Knows sockets and Agentao's client; must never know sessions, turns or Flask.

What a stop can and cannot do:

1. A stop shuts down the socket of that very call, whichever wire format it speaks (both SDKs
   take our HTTP client): while connecting, in the TLS handshake, before the headers, in silence
   or between tokens. The rest of the call then reads like an early end, which is what Agentao
   expects of a cancelled call, so the text so far is kept.
2. A name look-up cannot be cut off; it is the resolver's to end.
3. A call made outside a turn (no token on the thread) is bounded by the timeouts only.
4. Sub-agents that Agentao builds by itself use a plain client of their own, not this pool.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import errno
import http.cookiejar
import importlib
import logging
import os
import select
import socket
import ssl
import threading
import time
import types
import typing as t
import urllib.request

import agentao
import httpcore2
import httpx2
import openai
from agentao.cancellation import current_turn
from agentao.llm import LLMClient

from agentao_web.agents.budget import Meter
from agentao_web.agents.budget import Metered

#: An idle connection is kept this long. Most servers and address translators allow a minute.
_IDLE_SECONDS = 55.0
_MAX_IDLE = 64
_WRITE_SECONDS = 30.0
#: The SDK lets go at `[DONE]`, a moment before the body ends. Reading on for this long gives the
#: connection back to the pool; without it every call pays for a new one.
_READ_ON_SECONDS = 0.05
#: A connect looks up this often, should the shutdown not have woken it.
_CONNECT_SLICE_SECONDS = 0.02
_MAX_SDKS = 256

#: Agentao writes whole prompts, answers and provider errors to its client's logger, at every
#: level. This one is in no tree and lets nothing through; see `_Wire.classify_retry` for ours.
_SILENCE = logging.Logger("agentao_web.silence", logging.CRITICAL + 1)

_PRIVATE = (
    ("agentao.llm.client:LLMClient", ("_make_adapter", "_log_request", "_log_response")),
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
        self._transport = _Transport()
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
        """The SDK client for *key*, which begins with the wire format.

        A new one costs an SSL context, so it is built once.
        """
        with self._lock:
            if key not in self._sdks:
                if len(self._sdks) >= _MAX_SDKS:
                    self._sdks.pop(next(iter(self._sdks)))
                plain = build()
                pooled = plain.with_options(http_client=self._http, timeout=self.stream_timeout)
                self._sdks[key] = _Plainly(pooled) if key[0] == "openai-completions" else pooled
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


# ------------------------------------------------------------------------- Agentao's side


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
        return _Wire(super()._make_adapter(), self, self._pool, self._host_logger)

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

    def send(self, kwargs: dict[str, t.Any], acc: t.Any) -> t.Any:
        # Chat Completions is the only wire whose `send` does not stream.
        if self._owner.api_format == "openai-completions":
            kwargs = {**_as_it_is(kwargs), "timeout": self._pool.call_timeout}
        return self._adapter.send(kwargs, acc)

    def classify_retry(self, exc: BaseException) -> tuple[bool, int | None, str | None]:
        retryable, status, retry_after = self._adapter.classify_retry(exc)
        self.failed += 1
        turn = current_turn()
        if turn is not None and turn[1].is_cancelled:
            return False, status, None
        self._logger.warning(
            "model call failed: %s, status %s, attempt %d of %d",
            type(exc).__name__,
            status or getattr(exc, "status_code", None),
            self.failed,
            self._pool.attempts,
        )
        again = retryable and self.failed < self._pool.attempts and not self._pool.closed
        return again, status, retry_after


class _Plainly:
    """The OpenAI SDK's client, with JSON instead of its models where a stream is read.

    Building them is half of the CPU of a token, and walking through a request for names to
    change, of which there are none in plain JSON, half of the CPU before the first one.
    """

    def __init__(self, sdk: openai.OpenAI) -> None:
        self._sdk = sdk
        self.chat = types.SimpleNamespace(completions=_Completions(sdk))

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._sdk, name)


class _Completions:
    """``client.chat.completions`` as Agentao's adapter uses it."""

    def __init__(self, sdk: openai.OpenAI) -> None:
        self._sdk = sdk

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._sdk.chat.completions, name)

    def create(self, **kwargs: t.Any) -> cabc.Iterator[t.Any]:
        """The chunks of a stream: what is not in one is None."""
        more = kwargs.pop("extra_body", None) or {}
        chunks = self._sdk.post(
            "/chat/completions",
            body={**kwargs, **more},
            cast_to=object,
            stream=True,
            stream_cls=openai.Stream[object],
        )
        return map(_plain, chunks)


class _Plain(dict[str, t.Any]):
    """An object of JSON whose fields are attributes, too."""

    __getattr__ = dict.get


def _plain(value: t.Any) -> t.Any:
    if isinstance(value, dict):
        return _Plain({name: _plain(part) for name, part in value.items()})
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value


def _as_it_is(kwargs: dict[str, t.Any]) -> dict[str, t.Any]:
    """The same request in one piece, past that search: the SDK's own way around it."""
    plain = {name: kwargs[name] for name in ("messages", "tools") if name in kwargs}
    told = {name: value for name, value in kwargs.items() if name != "tools"}
    # The SDK wants to see some messages; these of the body win.
    return {**told, "messages": [], "extra_body": {**plain, **(kwargs.get("extra_body") or {})}}


# ------------------------------------------------------------------------ the wire's side


class _Call:
    """One request and the socket it is on, so that another thread can cut it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: _Socket | None = None
        self._over = False
        self._closing = False
        #: The turn was stopped: from here on every end of this call is a clean one.
        self.stopped = False
        self._forget: cabc.Callable[[], None] = lambda: None

    def watch(self) -> None:
        """Be stopped with the turn that runs on this thread."""
        turn = current_turn()
        if turn is not None:
            self._forget = turn[1].add_done_callback(self.stop)

    def stop(self) -> None:
        self.stopped = True
        self.hang_up()

    def hang_up(self) -> None:
        with self._lock:
            if self._socket is not None and not self._over:
                self._socket.shutdown()

    def attach(self, stream: _Socket) -> None:
        with self._lock:
            self._socket = stream
            stream.begin(self)
            if self.stopped:
                stream.shutdown()

    def read_on_until(self, deadline: float) -> None:
        if self._socket is not None:
            self._socket.deadline = deadline

    def start_closing(self) -> bool:
        """True for the first who asks: the SDK, `let_go` and the collector may all close."""
        with self._lock:
            first, self._closing = not self._closing, True
        return first

    def finish(self) -> None:
        """From now on the socket belongs to the pool, and soon to somebody else's call."""
        with self._lock:
            self._over = True
        self._forget()

    @property
    def unheard(self) -> bool:
        """The connection was a kept one and has not answered a byte: it died while idle."""
        stream = self._socket
        return stream is not None and stream.calls > 1 and not stream.answered


class _Here(threading.local):
    """What this thread is doing: sockets learn from it which call they serve."""

    call: _Call | None = None
    body: _Body | None = None


class _Socket(httpcore2.NetworkStream):
    """A connection to the model that may be shut down while its thread waits on it."""

    def __init__(self, here: _Here, sock: socket.socket) -> None:
        self._here = here
        self._sock = sock
        # The number of a closed socket is soon another one's: never shut down after a close.
        self._lock = threading.Lock()
        self._closed = False
        self._cut = False
        self._call: _Call | None = None
        self.calls = 0
        self.answered = False
        self.deadline: float | None = None

    def begin(self, call: _Call) -> None:
        self._call = call
        self.calls += 1
        self.answered = False
        self.deadline = None

    def shutdown(self) -> None:
        with self._lock:
            self._cut = True
            if not self._closed:
                # The plain socket's shutdown: an SSLSocket's would first drop the TLS layer
                # under the thread that reads from it.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def connect(self, address: t.Any, timeout: float | None) -> None:
        self._sock.setblocking(False)
        code = self._sock.connect_ex(address)
        self._join()
        if code not in (0, errno.EINPROGRESS):
            raise httpcore2.ConnectError(os.strerror(code))
        self._wait_connected(timeout)
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code or self._cut:
            raise httpcore2.ConnectError(os.strerror(code) if code else "cut off")
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _wait_connected(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while not poll.poll(_CONNECT_SLICE_SECONDS * 1000):
            if self._cut:
                raise httpcore2.ConnectError("cut off")
            if deadline is not None and time.monotonic() >= deadline:
                raise httpcore2.ConnectTimeout("timed out")

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            with self._lock:
                if self._cut:
                    raise httpcore2.ConnectError("cut off")
                # Wrapping takes the descriptor over, so it happens under the lock and the
                # handshake, which waits, after it.
                tls = ssl_context.wrap_socket(
                    self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
                )
                self._sock = tls
            tls.settimeout(timeout)
            tls.do_handshake()
        except TimeoutError as exc:
            self.close()
            raise httpcore2.ConnectTimeout(str(exc)) from exc
        except (OSError, ValueError, httpcore2.ConnectError) as exc:
            self.close()
            raise httpcore2.ConnectError(str(exc)) from exc
        return self

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.deadline is not None:
            # Never 0, which would mean "do not block" and raise another error.
            timeout = max(self.deadline - time.monotonic(), 0.001)
        try:
            self._sock.settimeout(timeout)
            data = self._sock.recv(max_bytes)
        except TimeoutError as exc:
            raise httpcore2.ReadTimeout(str(exc)) from exc
        except OSError as exc:
            raise httpcore2.ReadError(str(exc)) from exc
        if data:
            self.answered = True
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._join()
        rest = memoryview(buffer)
        try:
            while rest:
                self._sock.settimeout(timeout)
                rest = rest[self._sock.send(rest) :]
        except TimeoutError as exc:
            raise httpcore2.WriteTimeout(str(exc)) from exc
        except OSError as exc:
            raise httpcore2.WriteError(str(exc)) from exc

    def _join(self) -> None:
        """Belong to the call this thread is making: the first sight of a kept connection."""
        call = self._here.call
        if call is not None and call is not self._call:
            call.attach(self)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._sock.close()

    def get_extra_info(self, info: str) -> t.Any:
        if info == "ssl_object":
            return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
        if info == "is_readable":
            return self._readable()
        return None

    def _readable(self) -> bool:
        # An idle connection with something to read has been closed by the server.
        with self._lock:
            if self._closed:
                return True
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))


class _Sockets(httpcore2.NetworkBackend):
    """Makes the connections, each tied to its call from the first packet on."""

    def __init__(self, here: _Here) -> None:
        self._here = here

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: cabc.Iterable[t.Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception = httpcore2.ConnectError(f"no address for {host}")
        for family, kind, proto, _, address in _look_up(host, port):
            try:
                stream = _Socket(self._here, socket.socket(family, kind, proto))
            except OSError as exc:
                failure = httpcore2.ConnectError(str(exc))
                continue
            try:
                stream.connect(address, timeout)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                stream.close()
                failure = exc
            else:
                return stream
        raise failure


def _look_up(host: str, port: int) -> list[t.Any]:
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError as exc:
        raise httpcore2.ConnectError(str(exc)) from exc


class _Transport(httpx2.BaseTransport):
    """The SDKs' door to the pool: one `_Call` per request, stopped with its turn."""

    def __init__(self) -> None:
        self._here = _Here()
        self._calls: set[_Call] = set()
        env = urllib.request.getproxies()
        # HTTP/1.1 only: with HTTP/2 calls share a socket, and a stop would cut off them all.
        # No limit on connections: nobody could stop a call that waits for a place.
        options: dict[str, t.Any] = {
            "ssl_context": httpcore2.default_ssl_context(),
            "max_connections": None,
            "max_keepalive_connections": _MAX_IDLE,
            "keepalive_expiry": _IDLE_SECONDS,
            "network_backend": _Sockets(self._here),
        }
        self._direct = httpcore2.ConnectionPool(**options)
        self._proxies = {
            scheme: _proxy(url, options)
            for scheme in ("http", "https")
            if (url := env.get(scheme) or env.get("all"))
        }

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        call = _Call()
        self._calls.add(call)
        call.watch()
        try:
            response = self._send(_core_request(request), self._pool_for(request.url), call)
        except BaseException as exc:
            self._finish(call)
            if call.stopped and isinstance(exc, Exception) and request.method == "POST":
                return httpx2.Response(200, headers={"content-type": "text/event-stream"})
            if isinstance(exc, _CORE_ERRORS):
                raise _twin(exc) from exc
            raise
        body = _Body(call, response, self._finish)
        self._here.body = body
        return httpx2.Response(
            response.status,
            headers=response.headers,
            stream=body,
            extensions=response.extensions,
        )

    def _send(
        self, request: httpcore2.Request, pool: httpcore2.ConnectionPool, call: _Call
    ) -> httpcore2.Response:
        self._here.call = call
        try:
            while not call.stopped:
                try:
                    return pool.handle_request(request)
                except (
                    httpcore2.ReadError,
                    httpcore2.WriteError,
                    httpcore2.RemoteProtocolError,
                ):
                    # A kept connection may die the moment we use it. Agentao would wait for
                    # seconds; each pass drops one such connection and the last is a new one.
                    if call.stopped or not call.unheard:
                        raise
            raise httpcore2.ReadError("stopped before the request went out")
        finally:
            self._here.call = None

    def _pool_for(self, url: httpx2.URL) -> httpcore2.ConnectionPool:
        proxy = self._proxies.get(url.scheme)
        if proxy is None or urllib.request.proxy_bypass(url.host):
            return self._direct
        return proxy

    def _finish(self, call: _Call) -> None:
        call.finish()
        self._calls.discard(call)

    def let_go(self) -> None:
        body, self._here.body = self._here.body, None
        if body is not None:
            body.close()

    def hang_up(self) -> None:
        for call in self._calls.copy():
            call.hang_up()

    def close(self) -> None:
        for pool in (self._direct, *self._proxies.values()):
            pool.close()


class _Body(httpx2.SyncByteStream):
    """What the model answers; ends cleanly when the turn is stopped."""

    def __init__(
        self, call: _Call, response: httpcore2.Response, finish: cabc.Callable[[_Call], None]
    ) -> None:
        self._call = call
        self._response = response
        self._finish = finish
        self._chunks = response.iter_stream()

    def __iter__(self) -> cabc.Iterator[bytes]:
        while (chunk := self._next()) is not None:
            yield chunk

    def _next(self) -> bytes | None:
        if self._call.stopped:
            return None
        try:
            return next(self._chunks, None)
        except _CORE_ERRORS as exc:
            if self._call.stopped:
                return None
            raise _twin(exc) from exc

    def close(self) -> None:
        if not self._call.start_closing():
            return
        self._read_on()
        self._finish(self._call)
        self._response.close()

    def _read_on(self) -> None:
        deadline = time.monotonic() + _READ_ON_SECONDS
        self._call.read_on_until(deadline)
        # An error here only means that the connection cannot be kept.
        with contextlib.suppress(httpx2.TransportError):
            while time.monotonic() < deadline and self._next() is not None:
                pass


def _core_request(request: httpx2.Request) -> httpcore2.Request:
    url = request.url
    return httpcore2.Request(
        method=request.method,
        url=httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        ),
        headers=request.headers.raw,
        # Bytes, so that it can be sent again.
        content=request.read(),
        extensions=request.extensions,
    )


_CORE_ERRORS = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
)


def _twin(exc: Exception) -> Exception:
    """The same error as the SDKs know it: httpx2 and httpcore2 share the names."""
    twin: type[Exception] = getattr(httpx2, type(exc).__name__, httpx2.TransportError)
    return twin(str(exc))


def _proxy(url: str, options: dict[str, t.Any]) -> httpcore2.HTTPProxy:
    # With a transport of its own, httpx2 ignores the environment's proxies.
    proxy = httpx2.Proxy(url if "://" in url else f"http://{url}")
    if proxy.url.scheme != "http":
        raise RuntimeError(
            f"the model cannot be reached through a {proxy.url.scheme} proxy; "
            "set HTTPS_PROXY to an http:// proxy, or NO_PROXY to the model's host"
        )
    return httpcore2.HTTPProxy(proxy_url=str(proxy.url), proxy_auth=proxy.raw_auth, **options)
