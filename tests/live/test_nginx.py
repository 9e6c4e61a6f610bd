"""Real nginx before real workers: where a session goes, what streams, who left, what is hidden."""

from __future__ import annotations

import collections
import collections.abc as cabc
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived
from h2.events import PingAckReceived

from agentao_web import views
from agentao_web.config import Settings
from tests.live.harness import PATIENCE
from tests.live.harness import Server
from tests.live.harness import Stream
from tests.live.harness import eventually
from tests.live.harness import model_env
from tests.live.harness import token
from tests.live.nginx import CONF
from tests.live.nginx import Nginx
from tests.model_server import ModelServer

pytestmark = pytest.mark.live

APP = "tests.live.behind_app:app"


class Site:
    """Workers at addresses of their own, and nginx before them."""

    def __init__(self, folder: Path, *, addresses: int = 2, app: str = APP, **env: str) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(Server(folder, addresses=addresses, app=app, **env))
            self.nginx = stack.enter_context(Nginx(folder, self.server.upstreams))
            self.http = stack.enter_context(self.nginx.client())
            self._stack = stack.pop_all()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def worker(self, path: str, **headers: str) -> int:
        """Who answers a GET of *path*."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return int(self.http.get(path, headers=named).headers["X-Worker"])

    def owners(self) -> list[int]:
        """The worker of each address, asked itself."""
        pids = []
        for number in range(len(self.server.sockets)):
            with self.server.at(number) as client:
                pids.append(int(client.get("/healthz").headers["X-Worker"]))
        return pids


class Tap:
    """Lets the words of a "gated" turn through, one by one."""

    def __init__(self, folder: Path, count: int) -> None:
        pipe = folder / "tap"
        os.mkfifo(pipe)
        self._fd = os.open(pipe, os.O_RDWR)
        self.message = f"gated {pipe} {count}"

    def drop(self) -> None:
        os.write(self._fd, b"x")

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


# -- one worker, one address -------------------------------------------------------------------


def test_the_config_is_good_nginx(tmp_path: Path) -> None:
    with Nginx(tmp_path, ["127.0.0.1:9"]) as nginx:
        told = subprocess.run([*nginx.command, "-t"], capture_output=True, text=True)
    assert told.returncode == 0
    assert "warn" not in told.stderr


def test_the_config_knows_every_path_of_a_session() -> None:
    pattern = re.search(r'"~(\^.*chat\|session.*)" \$agentao_sid;', CONF.read_text())
    assert pattern is not None
    finds = re.compile(pattern[1].replace("(?<", "(?P<"))
    for sid in ("a", "session", "chat", "events", "A.b_c-9"):
        for prefix in ("", "/agents", "/session", "/chat"):
            for entry in views.ROUTES:
                path = prefix + entry.path.replace("<sid>", sid)
                found = finds.match(path + "?after=/chat/other")
                got = found["agentao_sid"] if found else None
                if prefix in ("/chat", "/session") and sid in ("events",):
                    continue  # "/chat/chat/events" may be either.
                if "<sid>" in entry.path or not prefix.endswith(("chat", "session")):
                    assert got == (sid if "<sid>" in entry.path else None), path


def test_the_sizes_agree() -> None:
    assert f"client_max_body_size {Settings().max_body // 2**20}m;" in CONF.read_text()


def test_every_session_is_always_at_its_worker(tmp_path: Path) -> None:
    with Site(tmp_path, addresses=3) as site:
        pids = set(site.owners())
        assert pids == set(site.server.workers()) and len(pids) == 3
        homes = {f"sid-{n}": site.worker(f"/chat/sid-{n}/events?wait=0") for n in range(300)}
        assert set(homes.values()) == pids
        wrong = []
        for sid, home in homes.items():
            found = {
                "path": site.worker(f"/session/{sid}"),
                "messages": site.worker(f"/session/{sid}/messages?x=/chat/other"),
                "header": site.worker("/host", X_Agentao_Session=sid),
                "cookie": site.worker("/host", Cookie=f"a=b; agentao_session={sid}"),
                "path first": site.worker(f"/session/{sid}", X_Agentao_Session="other"),
            }
            wrong += [(sid, how, pid) for how, pid in found.items() if pid != home]
        assert not wrong
        assert len({site.worker("/host") for _ in range(5)}) == 1, "by address, without one"


def test_a_killed_worker_is_back_at_its_address(tmp_path: Path) -> None:
    with Site(tmp_path, addresses=3) as site:
        before = site.owners()
        homes = {f"s{n}": site.worker(f"/session/s{n}") for n in range(30)}
        site.server.signal(signal.SIGKILL, before[1])
        eventually(lambda: len(site.server.workers()) == 3, "no new worker")
        # Connections that come before it serves wait in its socket.
        after = site.owners()
        assert (after[0], after[2]) == (before[0], before[2]), "the others are untouched"
        assert after[1] not in before
        for sid, home in homes.items():
            # The first one may meet a connection that died with the worker: one 502.
            eventually(lambda sid=sid: "X-Worker" in site.http.get(f"/session/{sid}").headers, sid)
            assert site.worker(f"/session/{sid}") == (after[1] if home == before[1] else home)


@pytest.mark.parametrize("number", [signal.SIGTTIN, signal.SIGTTOU])
def test_the_number_of_workers_stays(tmp_path: Path, number: int) -> None:
    with Site(tmp_path) as site:
        before = site.owners()
        for _ in range(3):
            site.server.signal(number)
        eventually(lambda: "the number stays" in site.server.log.read_text(), "not handled")
        assert site.owners() == before
        site.server.signal(signal.SIGHUP)
        eventually(
            lambda: (
                len(site.server.workers()) == 2 and not set(before) & set(site.server.workers())
            ),
            "no reload after it",
        )
        assert len(set(site.owners())) == 2


def test_a_reload_loses_no_request_and_tells_streams(tmp_path: Path) -> None:
    with Site(tmp_path, AGENTAO_DRAIN_GRACE="3", AGENTAO_STOP_GRACE="1") as site:
        before = site.owners()
        stop = threading.Event()
        asked: list[str] = []

        def ask(name: str) -> None:
            with site.nginx.client() as client:
                while not stop.is_set():
                    answer = client.get(f"/session/{name}")
                    asked.append(answer.json()["code"])

        ends: list[dict[str, object]] = []
        begun = threading.Semaphore(0)

        def read(name: str) -> None:
            with site.http.stream("POST", f"/chat/{name}", json={"message": "hang"}) as response:
                stream = Stream(response)
                stream.until("turn_begin")
                begun.release()
                ends.append(stream.until("done"))

        threads = [threading.Thread(target=ask, args=(f"s{n}",)) for n in range(4)]
        threads += [threading.Thread(target=read, args=(f"r{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                assert begun.acquire(timeout=PATIENCE)
            site.server.signal(signal.SIGHUP)
            eventually(lambda: not set(before) & set(site.server.workers()), "the old ones stay")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        # A connection that is open already may end at the old worker: come back in a second.
        told = collections.Counter(asked)
        assert set(told) <= {"not_found", "draining"} and told["draining"] <= 32, told
        reasons = [t_end["data"]["reason"] for t_end in ends]  # type: ignore[index]
        assert reasons == ["server_shutdown"] * 4
        assert len(set(site.owners())) == 2


def test_a_second_server_does_not_take_the_sockets(tmp_path: Path) -> None:
    with Server(tmp_path, addresses=2, app=APP) as server:
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(AssertionError, match="another server has its sockets in"):
            Server(other, addresses=2, app=APP, AGENTAO_SOCKETS=str(tmp_path / "run"))
        assert server.client.get("/healthz").status_code == 200


@pytest.mark.long
def test_what_a_killed_server_left_is_no_obstacle(tmp_path: Path) -> None:
    with Server(tmp_path, addresses=2, app=APP) as server:
        workers = server.workers()
        server.signal(signal.SIGKILL)
        server.wait()
        assert all(path.exists() for path in server.sockets)
        # The next one may start while the workers of the last still leave.
        with Server(tmp_path, addresses=2, app=APP) as following:
            assert following.client.get("/healthz").status_code == 200
            eventually(lambda: not any(Path(f"/proc/{p}").exists() for p in workers), "they stay")
            assert following.client.get("/healthz").status_code == 200
        assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("line", [["--workers", "3"], ["--workers", "1"]])
def test_another_number_of_workers_shares_all_sockets(tmp_path: Path, line: list[str]) -> None:
    with Server(tmp_path, *line, addresses=2, app=APP) as server:
        assert server.client.get("/healthz").status_code == 200
        assert (
            f"AGENTAO_WORKERS is 2 and Gunicorn has workers = {line[1]}" in server.log.read_text()
        )


# -- streams -----------------------------------------------------------------------------------

VERSIONS = [pytest.param(False, id="HTTP/1.1"), pytest.param(True, id="HTTP/2")]


@pytest.mark.parametrize("http2", VERSIONS)
def test_words_arrive_one_by_one(tmp_path: Path, http2: bool) -> None:
    with (
        Site(tmp_path, addresses=1) as site,
        Tap(tmp_path, 5) as tap,
        site.nginx.client(http2=http2, headers={"Accept-Encoding": "gzip"}) as client,
        client.stream("POST", "/chat/s", json={"message": tap.message}) as response,
    ):
        assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert "Content-Encoding" not in response.headers
        stream = Stream(response)
        for number in range(5):
            # The agent has not said more: only what is passed on at once can be read here.
            tap.drop()
            assert stream.until("llm_text")["data"]["chunk"] == f"{number} "
        assert stream.until("done")["data"]["status"] == "completed"


@pytest.fixture
def model() -> cabc.Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@contextlib.contextmanager
def http1_reader(client: httpx.Client) -> cabc.Iterator[None]:
    """Somebody who reads a silent turn, until the end of the block."""
    with client.stream("POST", "/chat/s", json={"message": "hang"}) as response:
        Stream(response).until("turn_begin")
        yield


@contextlib.contextmanager
def http2_reader(nginx: Nginx) -> cabc.Iterator[None]:
    """The same over HTTP/2, as a browser does it: it resets the stream and keeps the connection.

    httpx closes the whole connection, or nothing.
    """
    trust = ssl.create_default_context(cafile=str(nginx.certificate))
    trust.set_alpn_protocols(["h2"])
    body = b'{"message": "hang"}'
    headers = [
        (":method", "POST"),
        (":path", "/chat/s"),
        (":scheme", "https"),
        (":authority", f"127.0.0.1:{nginx.port}"),
        ("authorization", f"Bearer {token()}"),
        ("content-type", "application/json"),
    ]
    with (
        socket.create_connection(("127.0.0.1", nginx.port), PATIENCE) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        h2 = H2Connection()
        h2.initiate_connection()
        h2.send_headers(1, headers)
        h2.send_data(1, body, end_stream=True)
        sock.sendall(h2.data_to_send())
        seen = b""
        while b"turn_begin" not in seen:
            found = h2.receive_data(sock.recv(65_536))
            seen += b"".join(e.data for e in found if isinstance(e, DataReceived))
            sock.sendall(h2.data_to_send())
        yield
        h2.reset_stream(1, ErrorCodes.CANCEL)
        h2.ping(b"are you?")
        sock.sendall(h2.data_to_send())
        while not any(isinstance(e, PingAckReceived) for e in h2.receive_data(sock.recv(65_536))):
            pass


@pytest.mark.parametrize("way", ["socket", "HTTP/1.1", "HTTP/2"])
def test_a_client_that_leaves_is_seen(tmp_path: Path, model: ModelServer, way: str) -> None:
    """While nothing is sent: by the socket, or by nginx's closing it."""
    env = model_env(model, AGENTAO_DISCONNECT_GRACE="0.2", AGENTAO_HEARTBEAT="300")
    with (
        Site(tmp_path, app="wsgi_app:app", **env) as site,
        site.server.at(0) if way == "socket" else site.nginx.client() as client,
    ):
        with http2_reader(site.nginx) if way == "HTTP/2" else http1_reader(client):
            request = model.wait_for_request(1, PATIENCE)
        model.wait_closed(request, PATIENCE)
        page = eventually(
            lambda: (p := client.get("/chat/s/events").json())["state"] == "idle" and p,
            "the turn goes on",
        )
        assert page["events"][-1]["data"]["reason"] == "client_gone"


@pytest.mark.parametrize("http2", VERSIONS)
def test_comments_keep_a_silent_stream_alive(tmp_path: Path, http2: bool) -> None:
    """nginx would cut one that is silent for proxy_read_timeout."""

    def impatient(text: str) -> str:
        assert "proxy_read_timeout 90s;" in text
        return text.replace("proxy_read_timeout 90s;", "proxy_read_timeout 2s;")

    with (
        Server(tmp_path, addresses=1, app=APP, AGENTAO_HEARTBEAT="0.4") as server,
        Nginx(tmp_path, server.upstreams, edit=impatient) as nginx,
        Tap(tmp_path, 1) as tap,
        nginx.client(http2=http2) as client,
        client.stream("POST", "/chat/s", json={"message": tap.message}) as response,
    ):
        comments = 0
        for line in response.iter_lines():
            comments += line.startswith(":")
            if comments == 12:  # 4.4 s of silence, at least.
                tap.drop()
                comments += 1
            if '"type":"done"' in line.replace(" ", ""):
                assert '"completed"' in line
                break
        else:
            raise AssertionError("the stream ended early")


@pytest.mark.long
def test_a_silent_stream_without_comments_is_cut(tmp_path: Path) -> None:
    """So the test above can fail."""
    with (
        Server(tmp_path, addresses=1, app=APP, AGENTAO_HEARTBEAT="300") as server,
        Nginx(
            tmp_path,
            server.upstreams,
            edit=lambda text: text.replace("proxy_read_timeout 90s;", "proxy_read_timeout 1s;"),
        ) as nginx,
        nginx.client() as client,
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", "/chat/s", json={"message": "hang"}) as response,
    ):
        list(response.iter_lines())


# -- what is not told, and what comes through ----------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/agents"])
def test_metrics_are_for_this_machine(tmp_path: Path, prefix: str) -> None:
    with Site(tmp_path, addresses=1, TEST_PREFIX=prefix) as site:
        for path in (f"{prefix}/metrics", f"{prefix}/metrics/", f"{prefix}/metrics?x=/chat/a"):
            denied = site.http.get(path)
            assert denied.status_code == 404 and "X-Worker" not in denied.headers, path
        inside = httpx.get(f"{site.nginx.metrics_url}{prefix}/metrics", trust_env=False)
        assert "X-Worker" in inside.headers
        for path in ("/healthz", "/chat/s/events", "/"):
            other = httpx.get(f"{site.nginx.metrics_url}{prefix}{path}", trust_env=False)
            assert "X-Worker" not in other.headers


def test_a_ticket_is_in_no_log(tmp_path: Path) -> None:
    """Nor in the error log, where nginx writes whole requests when a worker dies under them."""
    with Site(tmp_path, addresses=1) as site:
        started = site.http.post(
            "/chat/s", json={"message": "hang"}, headers={"Accept": "application/json"}
        )
        assert started.status_code == 202
        secret = site.http.post("/session/s/ticket").json()["ticket"]
        for query in (f"ticket={secret}&wait=0", f"after=0&%74icket={secret}&ticket={secret}"):
            site.http.get(f"/chat/s/events?{query}", headers={"Referer": f"https://x/?{secret}"})
        with (
            contextlib.suppress(httpx.TransportError),
            site.http.stream(
                "GET",
                f"/chat/s/events?ticket={secret}",
                headers={"Accept": "text/event-stream"},
            ) as response,
        ):
            stream = Stream(response)
            stream.until("turn_begin")
            site.server.signal(signal.SIGKILL, site.server.workers()[0])
            list(stream)
        site.nginx.stop()
        assert site.nginx.access_log.read_text().count("GET /chat/s/events HTTP") == 3
        for file in site.nginx.folder.glob("*.log"):
            assert secret not in file.read_text(), file


def test_a_large_body_arrives_and_a_larger_one_is_refused_in_our_form(tmp_path: Path) -> None:
    most = Settings().max_body
    with Site(tmp_path, addresses=1) as site:
        answer = site.http.post("/host", content=b"x" * most)
        assert answer.json()["length"] == most
        answer = site.http.post("/chat/s", content=b"x" * (most + 1))
        assert answer.status_code == 413
        assert answer.json()["code"] == "payload_too_large"
        assert set(answer.json()) == {"code", "message", "details"}
        # A size that is not told before is counted.
        answer = site.http.post("/chat/s", content=(b"x" * 2**20 for _ in range(21)))
        assert answer.status_code == 413


def _connected(site: Site) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", site.nginx.port), PATIENCE)
    return site.nginx.trust.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize(
    ("head", "status", "field"),
    [
        ("GET /chat/s/events?x={long} HTTP/1.1\r\nHost: a\r\n\r\n", 414, "url"),
        ("GET /healthz HTTP/1.1\r\nHost: a\r\nCookie: {long}\r\n\r\n", 431, "headers"),
        ("GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, None),
        ("GET /healthz HTTP/1.1\r\n\r\n", 400, None),
        ("nonsense\r\n\r\n", 400, None),
    ],
    ids=["url", "cookie", "length", "host", "nonsense"],
)
def test_what_nginx_itself_refuses_is_refused_in_our_form(
    tmp_path: Path, head: str, status: int, field: str | None
) -> None:
    with Site(tmp_path, addresses=1) as site, _connected(site) as sock:
        sock.sendall(head.format(long="a" * 20_000).encode())
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == status
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        body = json.loads(answer.read())
        assert set(body) == {"code", "message", "details"}
        assert body["code"] == "invalid_request" and body["details"].get("field") == field


def test_a_url_that_nginx_lets_through_is_read(tmp_path: Path) -> None:
    with Site(tmp_path, addresses=1) as site:
        answer = site.http.get("/healthz?x=" + "a" * 7_000)
        assert (answer.status_code, answer.json()) == (200, {"ok": True})


@pytest.mark.parametrize("http2", VERSIONS)
def test_the_hosts_own_pages_are_behind_it_too(tmp_path: Path, http2: bool) -> None:
    with Site(tmp_path, TEST_PREFIX="/agents") as site, site.nginx.client(http2=http2) as client:
        seen = client.get("/host/a?b=c", headers={"X-Request-Id": "abc-1"}).json()
        assert seen["url"] == f"{site.nginx.url}/host/a?b=c"
        assert seen["headers"]["X-Request-Id"] == "abc-1"
        assert seen["headers"]["X-Forwarded-For"] == "127.0.0.1"
        assert not seen["remote"], "a socket has no address: see ProxyFix in the docs"
        assert "Connection" not in seen["headers"]
        odd = client.get("/host", headers={"X-Request-Id": 'a"b'}).json()
        assert re.fullmatch("[0-9a-f]{32}", odd["headers"]["X-Request-Id"])
        answer = client.post(
            "/agents/chat/s",
            json={"message": "hi"},
            headers={"Accept": "application/json", "Prefer": "wait=50"},
        )
        assert answer.json()["reply"] == "hello"
        home = answer.headers["X-Worker"]
        for path in ("/agents/session/s", "/agents/chat/s/events?wait=0"):
            assert client.get(path).headers["X-Worker"] == home


def test_plain_http_is_sent_to_https(tmp_path: Path) -> None:
    with Nginx(tmp_path, ["127.0.0.1:9"]) as nginx:
        answer = httpx.post(
            f"{nginx.plain_url}/chat/s",
            headers={"Authorization": f"Bearer {token()}"},
            trust_env=False,
        )
        assert answer.status_code == 308
        assert answer.headers["Location"] == "https://127.0.0.1/chat/s"
