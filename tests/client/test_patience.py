"""How long a client waits for a server: not for one that was never there."""

from __future__ import annotations

import http.server
import logging
import re
import socket
import threading

import pytest

from agentao_web import client as api

#: Nobody would wait for the end of a test that took this long.
FOREVER = 10_000.0
SNAPSHOT = b'{"state": "idle", "cursor": 0}'


class Answering(http.server.BaseHTTPRequestHandler):
    """Says that a session is idle."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(SNAPSHOT)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(SNAPSHOT)

    def log_message(self, *_: object) -> None:
        pass


class Running:
    """A server on a port."""

    def __init__(self, port: int = 0) -> None:
        self.server = http.server.HTTPServer(("127.0.0.1", port), Answering)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_port_where_nobody_listens_is_told_soon(free_port: int) -> None:
    url = f"http://ann:secret@127.0.0.1:{free_port}/agent"
    with api.Client(url, patience=FOREVER) as client:
        with pytest.raises(api.ConnectionLost, match="Is the server running") as caught:
            client.ask("s", "hi")
    assert f"no server answers at http://127.0.0.1:{free_port}:" in str(caught.value)
    assert "refused" in str(caught.value) and "secret" not in str(caught.value)


def test_a_server_that_went_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """A restart takes a while, and the client had an answer before."""
    first = Running()
    with api.Client(f"http://127.0.0.1:{first.port}", patience=FOREVER) as client:
        assert client.session("s")["state"] == "idle"
        first.stop()
        found: list[object] = []
        with caplog.at_level(logging.INFO, "agentao_web.client"):
            asking = threading.Thread(target=lambda: found.append(client.session("s")))
            asking.start()
            # Longer than for a server that never answered.
            patience = threading.Event()
            while asking.is_alive() and waited(caplog.text) < 6:
                patience.wait(0.05)  # Between two looks at the log.
            again = Running(first.port)
            asking.join(60)
        again.stop()
    assert found == [{"state": "idle", "cursor": 0}]


def waited(text: str) -> float:
    """The pauses in all that the client told of."""
    return sum(float(seconds) for seconds in re.findall(r"trying again in ([0-9.]+) s", text))
