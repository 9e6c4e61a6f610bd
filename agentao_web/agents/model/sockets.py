"""The wire to the model: one pool of HTTP connections, and one socket per call that can be cut off
while it waits. Knows sockets only; must never know Agentao's clients, sessions or turns.

What a stop can and cannot do:

1. A stop shuts down the socket of that very call, whichever wire format it speaks (both SDKs
   take our HTTP client): while connecting, in the TLS handshake, before the headers, in silence
   or between tokens. The rest of the call then reads like an early end, which is what Agentao
   expects of a cancelled call, so the text so far is kept.
2. A name look-up cannot be cut off; it is the resolver's to end.
3. A call made outside a turn (no token on the thread) is bounded by the timeouts only.
4. How long a call may be silent belongs to the call (`Patience`), not to its connection, which
   soon serves another one.
5. Sub-agents that Agentao builds by itself use a plain client of their own, not this pool.
"""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
import typing as t
import urllib.request

import httpcore2
import httpx2
from agentao.cancellation import current_turn

#: An idle connection is kept this long. Most servers and address translators allow a minute.
_IDLE_SECONDS = 55.0
_MAX_IDLE = 64
#: The SDK lets go at `[DONE]`, a moment before the body ends. Reading on for this long gives the
#: connection back to the pool; without it every call pays for a new one.
_READ_ON_SECONDS = 0.05
#: A connect looks up this often, should the shutdown not have woken it.
_CONNECT_SLICE_SECONDS = 0.02


class Patience:
    """How long a call to the model may be silent, and how much it may send without saying a thing.

    *first* is the time to the first token, and the longest time between two: whatever else comes
    in between (headers, comments that keep the connection alive, pings) does not extend it. After
    the first token *between* bounds the time without any data at all; None means that *first* is
    the only bound. *flood* is the number of bytes between two tokens after which *flooded* is
    called: one event of that size would only fill the memory.
    """

    def __init__(
        self,
        first: float,
        between: float | None = None,
        *,
        flood: int | None = None,
        flooded: cabc.Callable[[], None] = lambda: None,
    ) -> None:
        self.exhausted = False
        """The model was waited for in vain, before its first token."""
        self._first = first
        self._between = between
        self._flood = flood
        self._flooded = flooded
        self.begin()

    def begin(self) -> None:
        """A request goes out."""
        self.exhausted = False
        self._since = time.monotonic()
        self._heard = self._new = False
        self._bytes = 0

    def heard(self) -> None:
        """A token has come."""
        self._heard = self._new = True
        self._bytes = 0

    def left(self) -> float:
        """How long the next read may take, in seconds; never 0, which would mean not to wait."""
        now = time.monotonic()
        if self._new:
            self._since, self._new = now, False
        left = max(self._since + self._first - now, 0.001)
        return min(left, self._between) if self._heard and self._between is not None else left

    def lost(self) -> None:
        """A read took too long."""
        self.exhausted = not self._heard

    def bears(self, size: int) -> bool:
        """Count *size* more bytes; False if that is too much for one event."""
        self._bytes += size
        if self._flood is None or self._bytes <= self._flood:
            return True
        self._flooded()
        return False


class _Call:
    """One request and the socket it is on, so that another thread can cut it off."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience
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
    patience: Patience | None = None


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
        patience = self._call.patience if self._call is not None else None
        if self.deadline is not None:
            # Never 0, which would mean "do not block" and raise another error.
            timeout = max(self.deadline - time.monotonic(), 0.001)
        elif patience is not None:
            timeout = patience.left()
        try:
            self._sock.settimeout(timeout)
            data = self._sock.recv(max_bytes)
        except TimeoutError as exc:
            if patience is not None and self.deadline is None:
                patience.lost()
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


class Transport(httpx2.BaseTransport):
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
        patience = self._here.patience
        if patience is not None:
            patience.begin()
        call = _Call(patience)
        self._calls.add(call)
        call.watch()
        try:
            response = self._send(_core_request(request), self._pool_for(request.url), call)
        except BaseException as exc:
            self._finish(call)
            if call.stopped and isinstance(exc, Exception) and request.method == "POST":
                # With a stream that nobody has read yet, as that of any answer.
                return httpx2.Response(
                    200,
                    headers={"content-type": "text/event-stream"},
                    stream=httpx2.ByteStream(b""),
                )
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

    @contextlib.contextmanager
    def waiting(self, patience: Patience) -> cabc.Iterator[None]:
        """Requests of this thread are waited for with *patience*."""
        before, self._here.patience = self._here.patience, patience
        try:
            yield
        finally:
            self._here.patience = before

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
            chunk = next(self._chunks, None)
        except _CORE_ERRORS as exc:
            if self._call.stopped:
                return None
            raise _twin(exc) from exc
        patience = self._call.patience
        if chunk is None or patience is None or patience.bears(len(chunk)):
            return chunk
        if self._call.stopped:
            return None
        raise httpx2.ReadError("more data without a token than a turn may have")

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
