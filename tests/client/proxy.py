"""A proxy that cuts, delays, truncates and holds back what goes over it."""

from __future__ import annotations

import collections.abc as cabc
import contextlib
import dataclasses
import re
import select
import socket
import struct
import threading
import time
import typing as t

from tests.patience import PATIENCE

_PIECE = 65_536
#: Between two looks whether the proxy is to end, in seconds.
_LOOK = 0.05


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to one connection."""

    kind: t.Literal[
        "pass", "cut", "reset", "stall", "cut_request", "lose_answer", "mute", "buffer", "slow"
    ]
    after: int = 0
    """So many bytes of the answers (of the requests, for ``cut_request``) go through before it."""
    behind: bytes = b""
    """A regular expression: bytes of the answers are counted from the end of its first match."""


class Proxy:
    """In front of the server at *port*; the n-th connection suffers the n-th fault, then none."""

    def __init__(self, port: int, faults: cabc.Iterable[Fault] = ()) -> None:
        self._port = port
        self.faults = list(faults)
        self.connections = 0
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> t.Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(_LOOK)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    def _start(self, run: cabc.Callable[..., None], *arguments: t.Any) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ends.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                fault = self.faults.pop(0) if self.faults else Fault("pass")
                self.connections += 1
                self._start(self._serve, client, fault)

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with client, contextlib.suppress(OSError):
            if fault.kind == "mute":
                self._until_closed(client)
                return
            with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as server:
                self._carry(client, server, fault)

    def _until_closed(self, client: socket.socket) -> None:
        while not self._ends.is_set():
            if select.select([client], [], [], _LOOK)[0] and not client.recv(_PIECE):
                return

    def _carry(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        asked = told = 0
        held = b""
        after = None if fault.behind else fault.after
        while not self._ends.is_set():
            for sock in select.select([client, server], [], [], _LOOK)[0]:
                data = sock.recv(_PIECE)
                if sock is client:
                    if not data:
                        return
                    if fault.kind == "cut_request" and asked + len(data) > fault.after:
                        server.sendall(data[: fault.after - asked])
                        return
                    asked += len(data)
                    if fault.kind == "buffer":
                        # So that the end of the answer can be seen.
                        data = data.replace(b"Connection: keep-alive", b"Connection: close")
                    server.sendall(data)
                    continue
                if fault.kind == "lose_answer":
                    return
                if fault.kind == "buffer":
                    held += data
                    if not data:
                        client.sendall(held)
                        return
                    continue
                if not data:
                    return
                if after is None:
                    held += data
                    if (match := re.search(fault.behind, held)) is not None:
                        after = match.end() + fault.after
                cuts = fault.kind in ("cut", "reset", "stall") and after is not None
                if cuts and told + len(data) > after:
                    client.sendall(data[: after - told])
                    if fault.kind == "stall":
                        self._until_closed(client)
                    if fault.kind == "reset":
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    return
                if fault.kind == "slow":
                    time.sleep(0.05)
                told += len(data)
                client.sendall(data)
