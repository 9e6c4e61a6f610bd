"""Streams and the watcher: who left, what they are sent, and when they end."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import selectors
import socket
import ssl
import subprocess
import threading
import time
import typing as t
from pathlib import Path

import pytest

from agentao_web.core.errors import ClaimLost
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.log import Draft
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.live import Live
from agentao_web.readers import Reader
from agentao_web.readers import Watcher
from agentao_web.readers import poll
from agentao_web.readers import stream
from agentao_web.wire import native
from tests.live.harness import eventually
from tests.pool_fakes import PATIENCE
from tests.pool_fakes import Gate
from tests.pool_fakes import Probe
from tests.pool_fakes import read_until
from tests.pool_fakes import until_stopped

#: What a watcher may wait with: None is the best there is, the others are what other systems have.
SELECTORS = [None, selectors.PollSelector, selectors.SelectSelector, selectors.DefaultSelector]


@pytest.fixture(params=SELECTORS, ids=lambda s: s.__name__ if s else "best")
def watcher(request: pytest.FixtureRequest) -> cabc.Iterator[Watcher]:
    made = Watcher(request.param)
    yield made
    made.close()


@pytest.fixture
def probe() -> cabc.Iterator[cabc.Callable[..., Probe]]:
    made: list[Probe] = []

    def make(*args: t.Any, **caps: t.Any) -> Probe:
        made.append(Probe(*args, **caps))
        return made[-1]

    yield make
    for one in made:
        one.pool.drain(grace=2)


def tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


@pytest.mark.parametrize("pair", [tcp, socket.socketpair])
@pytest.mark.parametrize("how", ["close", "reset", "pending"])
def test_a_close_is_seen_while_nothing_is_sent(
    watcher: Watcher, pair: cabc.Callable[[], t.Any], how: str
) -> None:
    ours, theirs = pair()
    seen = threading.Event()
    watcher.watch(theirs, seen.set)
    if how == "reset":
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "pending":
        ours.send(b"pipelined bytes nobody reads")
    assert not seen.is_set()
    ours.close()
    assert seen.wait(PATIENCE)
    watcher.forget(theirs)
    theirs.close()


def test_a_socket_that_is_closed_already_is_seen_at_once(watcher: Watcher) -> None:
    ours, theirs = tcp()
    ours.close()
    seen = threading.Event()
    watcher.watch(theirs, seen.set)
    assert seen.wait(PATIENCE)
    watcher.forget(theirs)
    theirs.close()


def test_bytes_that_nobody_reads_do_not_keep_the_watcher_busy(watcher: Watcher) -> None:
    """A client may send its next request early; it is no close, however often it is looked at."""
    seen = threading.Event()
    ours, theirs = tcp()
    ours.send(b"GET /next HTTP/1.1")
    watcher.watch(theirs, seen.set)
    before = time.process_time()
    assert not seen.wait(1)
    assert time.process_time() - before < 0.5, "it spins"
    ours.close()
    assert seen.wait(PATIENCE)
    watcher.forget(theirs)
    theirs.close()


def test_one_socket_that_was_closed_too_early_does_not_blind_it_for_the_others(
    watcher: Watcher,
) -> None:
    careless, gone = tcp()
    watcher.watch(gone, lambda: None)
    gone.close()
    ours, theirs = tcp()
    seen = threading.Event()
    watcher.watch(theirs, seen.set)
    ours.close()
    assert seen.wait(PATIENCE)
    watcher.forget(theirs)
    theirs.close()
    careless.close()


def test_a_forgotten_descriptors_next_owner_is_not_mistaken(watcher: Watcher) -> None:
    wrong = threading.Event()
    for _ in range(200):
        ours, theirs = tcp()
        watcher.watch(theirs, lambda: None)
        ours.close()
        watcher.forget(theirs)
        theirs.close()
        ours, theirs = tcp()
        watcher.watch(theirs, wrong.set)
        watcher.forget(theirs)
        ours.close()
        theirs.close()
    assert not wrong.is_set()


def test_tls_is_watched_below_the_encryption(watcher: Watcher, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1".split()
    subprocess.run([*command, "-out", cert, "-keyout", key], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    ours, theirs = tcp()
    wrapped: list[ssl.SSLSocket] = []
    shake = threading.Thread(target=lambda: wrapped.append(client.wrap_socket(ours)))
    shake.start()
    server = context.wrap_socket(theirs, server_side=True)
    shake.join(PATIENCE)
    seen = threading.Event()
    watcher.watch(server, seen.set)
    wrapped[0].close()
    assert seen.wait(PATIENCE)
    watcher.forget(server)
    server.close()


def run_stream(reader: Reader, **options: t.Any) -> cabc.Iterator[bytes]:
    settings = {"heartbeat": 3600.0, "lease": 300.0, "follow": False, **options}
    return stream(reader, t.cast(t.Any, native), **settings)


def test_silence_is_broken_by_a_comment_at_once_and_every_heartbeat(
    probe: cabc.Callable[..., Probe],
) -> None:
    p = probe()
    p.run()
    live = p.pool.find(p.key())
    chunks = run_stream(Reader(live, p.store, live.head), follow=True, heartbeat=0.01)
    assert [next(chunks) for _ in range(3)] == [native.KEEP_ALIVE] * 3
    chunks.close()  # type: ignore[attr-defined]


def test_a_get_stream_ends_with_its_lease_and_a_hint(probe: cabc.Callable[..., Probe]) -> None:
    p = probe()
    p.run()
    live = p.pool.find(p.key())
    *_, last = run_stream(Reader(live, p.store, live.head), follow=True, lease=0.05)
    assert last.startswith(b"retry: ")
    assert live.idle


def test_a_stream_ends_when_the_session_is_idle_and_all_is_read(
    probe: cabc.Callable[..., Probe],
) -> None:
    p = probe()
    p.run()
    live = p.pool.find(p.key())
    body = b"".join(run_stream(Reader(live, p.store, None), lease=60.0))
    assert body.count(b"data: ") == 3
    assert b"retry" not in body


def test_a_stream_that_is_never_iterated_leaves_nothing(probe: cabc.Callable[..., Probe]) -> None:
    p = probe()
    p.run()
    live = p.pool.find(p.key())
    run_stream(Reader(live, p.store, None)).close()  # type: ignore[attr-defined]
    assert live.idle


def test_a_client_that_leaves_wakes_its_stream(
    probe: cabc.Callable[..., Probe], watcher: Watcher
) -> None:
    p = probe(until_stopped, disconnect_grace=3600.0)
    started = p.start(on_disconnect="cancel")
    ours, theirs = tcp()
    reader = Reader(
        started.live, p.store, started.cursor, turn=started.turn, watcher=watcher, sock=theirs
    )
    ended = threading.Event()

    def read() -> None:
        for _ in run_stream(reader):
            pass
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    ours.close()
    assert ended.wait(PATIENCE)
    thread.join(PATIENCE)
    assert started.turn.left_at is not None
    theirs.close()
    p.pool.cancel(p.key())


def test_many_readers_at_any_speed_get_the_same_text(probe: cabc.Callable[..., Probe]) -> None:
    from agentao_web.core.log import Draft

    gate = Gate()

    def script(agent: t.Any, request: t.Any, stage: t.Any) -> None:
        gate.stand()
        for n in range(2000):
            stage.publish(Draft("llm_text", {"chunk": f"{n},"}))

    p = probe(script)
    started = p.start()
    gate.meet()
    texts: dict[int, str] = {}

    def read(n: int) -> None:
        got: list[str] = []
        reader = Reader(started.live, p.store, started.cursor, turn=started.turn)
        with reader:
            while not reader.told:
                for event in reader.read(limit=1 + n * 7, max_bytes=10**6):
                    if event.type == "llm_text":
                        got.append(event.data["chunk"])
                reader.wait(reader.live.clock() + 0.01 * n)
        texts[n] = "".join(got)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    gate.opened.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert set(texts.values()) == {"".join(f"{n}," for n in range(2000))}
    assert len(texts) == 8


def test_a_reader_that_comes_after_the_eviction_is_sent_away_at_once(
    probe: cabc.Callable[..., Probe],
) -> None:
    """Its session's next turns are written somewhere else: it must neither wait nor spin."""
    p = probe()
    p.run()
    live = p.pool.find(p.key())
    p.pool.tick(p.pool.clock() + 10_000)
    assert live.closed
    chunks = list(run_stream(Reader(live, p.store, live.head), follow=True))
    assert [c.startswith(b"retry") for c in chunks] == [True]
    assert poll(Reader(live, p.store, live.head), wait=60, limit=9, max_bytes=99) == []


def test_the_end_of_a_turn_is_told_once_also_when_the_session_is_deleted(
    probe: cabc.Callable[..., Probe],
) -> None:
    p = probe()
    started = p.start()
    assert p.finish(started).data["status"] == "completed"
    p.pool.delete(p.key(), timeout=PATIENCE)
    reader = Reader(started.live, p.store, started.cursor, turn=started.turn)
    late = [e for e in read_all(reader) if e.type == "done"]
    assert [e.data["status"] for e in late] == ["completed"]


def read_all(reader: Reader) -> list[t.Any]:
    found: list[t.Any] = []
    with reader:
        while not reader.over:
            found += reader.read(limit=100, max_bytes=10**6)
    return found


def test_a_reader_we_dropped_did_not_leave(probe: cabc.Callable[..., Probe]) -> None:
    """A write that timed out closes the stream as a broken one does; but nobody went away."""
    p = probe(until_stopped)
    for gone in (False, True):
        started = p.start(on_disconnect="cancel")
        ours, theirs = tcp()
        reader = Reader(started.live, p.store, started.cursor, turn=started.turn, sock=theirs)
        chunks = run_stream(reader)
        next(chunks)
        if gone:
            ours.close()
        chunks.close()  # type: ignore[attr-defined]
        assert (started.turn.left_at is not None) is gone
        p.pool.cancel(p.key())
        p.finish(started)
        ours.close()
        theirs.close()


def test_a_reader_of_a_turn_that_could_not_be_stored_gets_all_then_the_end(
    probe: cabc.Callable[..., Probe],
) -> None:
    p = probe()

    def finish(*args: t.Any) -> t.NoReturn:
        raise StoreUnavailable

    p.store.finish = finish
    events = p.events(p.start())
    assert [(e.type, e.seq is None) for e in events] == [
        ("turn_begin", False),
        ("llm_text", False),
        ("error", True),
    ]


def test_a_lost_turn_that_ends_while_the_store_is_asked_is_told(
    probe: cabc.Callable[..., Probe],
) -> None:
    """Its log has been given up, so a reader asks the store, and the end comes meanwhile."""
    gate = Gate()

    def speak(agent: t.Any, request: t.Any, stage: t.Any) -> Outcome:
        stage.publish(Draft("llm_text", {"chunk": "half"}))
        gate.stand()
        return Outcome(State.COMPLETED)

    p = probe(speak)
    started = p.start()
    gate.meet()

    def finish(*args: t.Any) -> t.NoReturn:
        raise ClaimLost

    p.store.finish = finish

    class Meanwhile:
        def events(self, *args: t.Any, **options: t.Any) -> t.Any:
            gate.opened.set()
            eventually(lambda: started.turn and started.turn.final, "it never ends")
            return p.store.events(*args, **options)

    reader = Reader(started.live, t.cast(t.Any, Meanwhile()), started.cursor, turn=started.turn)
    with reader:
        read_until(p.pool, started, "llm_text")
        reader.cursor = started.live.head
        started.live.disown()
        told = [e for _ in range(3) for e in reader.read(limit=10, max_bytes=2**20)]
    assert reader.told
    assert [(e.type, e.seq) for e in told][-1:] == [("error", None)]


def test_a_reader_that_knew_the_end_first_is_not_kept(
    probe: cabc.Callable[..., Probe],
) -> None:
    """It reads the store itself, and may see another worker's last event before its own does."""
    p = probe()
    started = p.start()
    p.finish(started)
    row = p.store.session(p.key())
    live = Live(p.key(), head=row.head, log_bytes=2**20, clock=p.pool.clock)
    live.tail(dataclasses.replace(row, turn_id="elsewhere"))
    reader = Reader(live, p.store, row.head)
    sent = stream(reader, t.cast(t.Any, native), heartbeat=300, lease=300, follow=False)
    assert next(sent) == native.KEEP_ALIVE, "it runs elsewhere, as far as is known"
    rest: list[bytes] = []
    thread = threading.Thread(target=lambda: rest.extend(sent))
    thread.start()
    live.tail(dataclasses.replace(row, turn_id=None))
    thread.join(PATIENCE)
    late = thread.is_alive()
    live.close(force=True)
    thread.join(PATIENCE)
    assert not late and rest == []


# -- many at once ------------------------------------------------------------------------------


def test_a_reader_that_leaves_wakes_no_other(
    probe: cabc.Callable[..., Probe], watcher: Watcher
) -> None:
    """Of a thousand that leave at once each would wake all the others."""
    looked = [0] * 40
    p = probe(until_stopped)
    started = p.start()
    pairs = [socket.socketpair() for _ in looked]
    ready, gone = threading.Semaphore(0), threading.Semaphore(0)
    readers: list[Reader] = []

    def heard() -> bool:
        """The turn has said its one word, and everybody has it."""
        return all(reader.cursor == started.live.head for reader in readers)

    def read(n: int) -> None:
        def dismissed() -> bool:
            # Asked whenever it is woken, before it waits again.
            looked[n] += 1
            ready.release()
            return False

        reader = Reader(
            started.live,
            p.store,
            started.cursor,
            turn=started.turn,
            watcher=watcher,
            sock=pairs[n][0],
            dismissed=dismissed,
        )
        readers.append(reader)
        with reader:
            while not reader.left:
                reader.read(limit=100, max_bytes=10**6)
                reader.wait(started.live.clock() + PATIENCE)
        gone.release()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(looked))]
    for thread in threads:
        thread.start()
    for _ in looked:
        assert ready.acquire(timeout=PATIENCE)
    until(heard, "not heard")
    before = list(looked)
    for n in range(20):
        pairs[n][1].close()
        assert gone.acquire(timeout=PATIENCE)
    woken = sum(looked[20:]) - sum(before[20:])
    # Each may just have been on its way to sleep; and then there are 20 times 20.
    assert woken <= 20, "those that stay sleep on"
    for n in range(20, 40):
        pairs[n][1].close()
    for thread in threads:
        thread.join(PATIENCE)
    for pair in pairs:
        pair[0].close()
    p.pool.cancel(p.key())


def until(condition: cabc.Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.01)
