"""Numbers for Prometheus, over all workers of this machine. Knows what happened, never who asked.

Why not prometheus_client's own multiprocess mode: it is switched on by an environment variable
before the import, so for the host's metrics too; it keeps a file of every process that ever was;
and two applications of one process share it. Here each application of each worker writes its
numbers, as they change, into a mapped file of its own below ROOT, and holds a lock on it for as
long as it lives. The kernel gives that lock back however a process ends. So whoever answers a
scrape knows who is gone: their counters are added to one file of the past, their gauges are not,
and their files are removed. Sums never go down, not over HUP, kill -9 or a restart.
"""

from __future__ import annotations

import bisect
import collections
import collections.abc as cabc
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import struct
import threading
import time
import typing as t
import uuid
from pathlib import Path

from agentao_web.core import clean
from agentao_web.core.errors import StoreUnavailable
from agentao_web.core.folders import make_private
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.question import Question
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import Turn

#: Seconds one waits for the others to have read or opened their files.
_PATIENCE: t.Final = 5.0
#: Seconds between two looks at sizes.
_SAMPLE: t.Final = 1.0
#: Seconds after which a folder that could not be used is tried again.
_AGAIN: t.Final = 30.0
#: Bytes of a worker's file; about 100 for each combination of labels.
_BYTES: t.Final = 2**16
_BYTES_PER_TENANTS: t.Final = 2**20

_DURATION: t.Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_MOMENTS: t.Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric: the only place where it is named."""

    name: str
    kind: t.Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: t.Literal["sum", "max"] = "sum"
    """How the gauges of several workers become one."""
    per_tenant: bool = False
    """It has a label ``tenant`` too, if asked for."""


METRICS: t.Final = {
    metric.name: metric
    for metric in (
        Metric(
            "agentao_turns_total",
            "counter",
            "Turns that ended, by how they ended.",
            ("status", "reason"),
            per_tenant=True,
        ),
        Metric(
            "agentao_turn_duration_seconds",
            "histogram",
            "From the beginning of a turn to its end, waiting for people included.",
            ("status",),
            _DURATION,
        ),
        Metric(
            "agentao_turn_first_token_seconds",
            "histogram",
            "From the beginning of a turn to the first piece of text.",
            (),
            _MOMENTS,
        ),
        Metric(
            "agentao_turn_queue_seconds",
            "histogram",
            "From the acceptance of a turn to its beginning.",
            (),
            _MOMENTS,
        ),
        Metric("agentao_turns_running", "gauge", "Turns that run or wait for people."),
        Metric(
            "agentao_turns_queued", "gauge", "Turns that wait for their session, or for a place."
        ),
        Metric(
            "agentao_turns_given_up_total", "counter", "Turns that ignored their stop for too long."
        ),
        Metric("agentao_threads_given_up", "gauge", "Threads lost to given-up turns for now."),
        Metric(
            "agentao_host_tools_left", "gauge", "Calls of host tools that run past their deadline."
        ),
        Metric("agentao_streams_open", "gauge", "Streams and waiting requests."),
        Metric("agentao_sessions_in_memory", "gauge", "Sessions in memory."),
        Metric(
            "agentao_sessions_evicted_total",
            "counter",
            "Sessions put out of memory: idle, or one too many.",
            ("reason",),
        ),
        Metric("agentao_questions_open", "gauge", "Questions that wait for a person."),
        Metric(
            "agentao_questions_total",
            "counter",
            "Questions that were closed.",
            ("kind", "outcome"),
        ),
        Metric("agentao_refusals_total", "counter", "Requests answered with an error.", ("code",)),
        Metric(
            "agentao_tokens_total",
            "counter",
            "Tokens the model reported: prompt or completion.",
            ("kind",),
            per_tenant=True,
        ),
        Metric(
            "agentao_store_lag_seconds",
            "gauge",
            "Age of the oldest event that is not in the store yet; of the worst worker.",
            merge="max",
        ),
        Metric("agentao_store_errors_total", "counter", "Times the store could not be asked."),
        Metric("agentao_store_events_total", "counter", "Events written to the store."),
        Metric(
            "agentao_store_bytes_total",
            "counter",
            "About how many bytes of events were written.",
        ),
        Metric(
            "agentao_cleanup_failures_total",
            "counter",
            "Failed attempts to remove a deleted session or to close a turn nobody runs.",
            ("kind",),
        ),
        Metric(
            "agentao_cleanups_stuck",
            "gauge",
            "Deleted sessions and lost turns that could not be cleaned up yet.",
            merge="max",
        ),
        Metric("agentao_workers", "gauge", "Workers that answer here."),
        Metric(
            "agentao_worker_heartbeat_age_seconds",
            "gauge",
            "Since the last sign of life of a worker to the store; of the worst worker.",
            merge="max",
        ),
    )
}

#: A gauge that is written as a moment (monotonic, which all processes of a machine share) and
#: read as an age, so that it grows while its worker stands still.
_AGES: t.Final = frozenset({"agentao_worker_heartbeat_age_seconds"})

Gauges = cabc.Callable[[], cabc.Mapping[str, float]]
#: (name, labels in their order, what of a histogram: a bucket's bound, "+Inf", "sum") -> value
_Key = tuple[str, tuple[str, ...], str]
_Numbers = dict[_Key, float]


def check() -> None:
    """RuntimeError with the cure if Prometheus's library is not installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "AGENTAO_METRICS_TOKEN needs prometheus_client: pip install 'agentao-web[metrics]'"
        ) from None


class Metrics(Observer):
    """Counts what one application of this worker does, and answers for all workers.

    *gauges* gives the sizes of the moment; a heartbeat is told as a moment of ``time.monotonic``.
    """

    def __init__(
        self, root: Path, *, gauges: Gauges = dict, tenants: bool = False, log: logging.Logger
    ) -> None:
        check()
        self._folder = Folder(root / "metrics")
        self._gauges = gauges
        self._tenants = tenants
        self._log = log
        self._lock = threading.Lock()
        self._book: Book | None = None
        self._pid = 0
        self._closed = False
        self._sampled = self._again = float("-inf")

    # -- what happens (agentao_web.core.observer) -----------------------------------------------

    def began(self, key: SessionKey, turn: Turn, now: float) -> None:
        self._observe("agentao_turn_queue_seconds", now - turn.created)

    def said(self, turn: Turn, draft: Draft, now: float) -> None:
        if draft.type == "llm_text" and turn.began is not None:
            self._observe("agentao_turn_first_token_seconds", now - turn.began)

    def called(
        self, key: SessionKey, turn: Turn, call: cabc.Mapping[str, t.Any], now: float
    ) -> None:
        for kind in ("prompt", "completion"):
            tokens = call.get(f"{kind}_tokens")
            if clean.is_tokens(tokens):
                self._count("agentao_tokens_total", kind, by=tokens, tenant=key.tenant)

    def ended(self, key: SessionKey, turn: Turn, outcome: Outcome, now: float) -> None:
        if outcome.reason == "worker_lost":
            return  # Whoever closes it counts it.
        status = outcome.status.value
        self._count("agentao_turns_total", status, outcome.reason or "", tenant=key.tenant)
        if turn.began is not None:
            self._observe("agentao_turn_duration_seconds", now - turn.began, status)

    def reaped(self, key: SessionKey, turn_id: str) -> None:
        self._count("agentao_turns_total", "failed", "worker_lost", tenant=key.tenant)

    def given_up(self, key: SessionKey, turn: Turn) -> None:
        self._count("agentao_turns_given_up_total")

    def asked(self, key: SessionKey, question: Question) -> None:
        self._count("agentao_questions_total", question.kind, question.outcome or "")

    def evicted(self, sessions: int, reason: str) -> None:
        self._count("agentao_sessions_evicted_total", reason, by=sessions)

    def refused(self, code: str) -> None:
        self._count("agentao_refusals_total", code)

    def stored(self, events: cabc.Sequence[Event]) -> None:
        self._count("agentao_store_events_total", by=len(events))
        self._count("agentao_store_bytes_total", by=sum(event.size() for event in events))

    def store_failed(self) -> None:
        self._count("agentao_store_errors_total")

    def stumbled(self, kind: str) -> None:
        self._count("agentao_cleanup_failures_total", kind)

    def ticked(self) -> None:
        now = time.monotonic()
        if now - self._sampled >= _SAMPLE:
            self._sampled = now
            self.sample()

    def sample(self) -> None:
        """Write the sizes of this moment down. In a worker: after the fork."""
        gauges = {**self._gauges(), "agentao_workers": 1.0}
        with self._lock:
            if (book := self._opened()) is not None:
                for name, value in gauges.items():
                    book.set((name, (), ""), value)

    def close(self) -> None:
        """This worker counts no more; what it counted is added to the past."""
        with self._lock:
            self._closed = True
            book, self._book = self._book, None
            if book is None or self._pid != os.getpid():
                return
        book.close()
        with contextlib.suppress(OSError, StoreUnavailable):
            self._folder.read()

    # -- what is read ---------------------------------------------------------------------------

    def answer(self, accept: str) -> tuple[bytes, str]:
        """Everything, in the format that *accept* asks for, and its content type."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        self.sample()
        found = self._folder.read()
        registry = CollectorRegistry()
        registry.register(_Found(found, self._tenants))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    # -- inside ---------------------------------------------------------------------------------

    def _count(self, name: str, *labels: str, by: float = 1, tenant: str = "") -> None:
        if METRICS[name].per_tenant:
            labels = (*labels, tenant if self._tenants else "")
        with self._lock:
            if (book := self._opened()) is not None:
                if not book.add((name, labels, ""), by):
                    # Full of tenants: the others are counted together.
                    book.add((name, (*labels[:-1], ""), ""), by)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        buckets = METRICS[name].buckets
        place = bisect.bisect_left(buckets, value)
        bucket = str(buckets[place]) if place < len(buckets) else "+Inf"
        with self._lock:
            if (book := self._opened()) is not None:
                book.add((name, labels, bucket), 1)
                book.add((name, labels, "sum"), max(0.0, value))

    def _opened(self) -> Book | None:
        """This process's own book, never one from before a fork; None if there cannot be one."""
        if self._book is not None and self._pid == os.getpid():
            return self._book
        now = time.monotonic()
        if self._closed or now < self._again:
            return None
        if self._book is not None:
            self._book.leave()
        self._book, self._pid = None, os.getpid()
        try:
            self._book = self._folder.open(_BYTES_PER_TENANTS if self._tenants else _BYTES)
        except (OSError, StoreUnavailable) as exc:
            self._again = now + _AGAIN
            self._log.warning("no metrics of this worker for now: %s", type(exc).__name__)
        return self._book


class Book:
    """The numbers of one worker in a mapped file, and the lock that says it lives."""

    def __init__(self, path: Path, size: int) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        self.path = path
        self._held = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX)
            # All of it now: to write into a mapped hole of a full disk would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._held, 0, size)
            else:
                there = os.fstat(self._held).st_size
                os.pwrite(self._held, bytes(max(0, size - there)), there)
            mapped: t.Any = MmapedDict
            self._values = mapped(str(path))
        except BaseException:
            # Nobody's then, so whoever comes next removes it.
            os.close(self._held)
            raise
        self._room = size - 8
        self._keys: dict[_Key, tuple[str, float]] = {}

    def add(self, key: _Key, amount: float) -> bool:
        """Add to a number; False if there is no room for one more."""
        found = self._keys.get(key)
        return self._write(key, amount if found is None else found[1] + amount)

    def set(self, key: _Key, value: float) -> None:
        """Give a number another value."""
        found = self._keys.get(key)
        if found is None or found[1] != value:
            self._write(key, value)

    def _write(self, key: _Key, value: float) -> bool:
        found = self._keys.get(key)
        text = found[0] if found is not None else json.dumps(key)
        if found is None:
            # Its length, up to 8 bytes of padding, the value and a time.
            needed = len(text) + 28
            if needed > self._room:
                return False
            self._room -= needed
        self._keys[key] = text, value
        self._values.write_value(text, value, 0.0)
        return True

    def close(self) -> None:
        """Let go: from now on it is of the past."""
        self._values.close()
        os.close(self._held)

    def leave(self) -> None:
        """It is the parent's: have nothing to do with it."""
        os.close(self._held)


class Folder:
    """The files of all workers of one machine, and of their past."""

    def __init__(self, root: Path) -> None:
        # Another machine, or container, with the same ROOT is scraped for itself.
        name = hashlib.blake2b(socket.gethostname().encode(), digest_size=8).hexdigest()
        self._root = root
        self._path = root / name

    def open(self, size: int) -> Book:
        """A new book; whatever workers that are gone left behind is cleared away."""
        with self._locked():
            self._fold()
            book = Book(self._path / f"{uuid.uuid4().hex}.book", size)
        self._forget_others()
        return book

    def read(self) -> _Numbers:
        """The sums over the past and every living worker."""
        with self._locked():
            past, living = self._fold()
            return _merged(past, [_values(path) for path in living])

    def _fold(self) -> tuple[_Numbers, list[Path]]:
        """Add the counters of who is gone to the past, once; the past then, and who lives."""
        past, folded = self._past()
        books = list(self._path.glob("*.book"))
        gone = [path for path in books if _is_free(path)]
        fresh = [path for path in gone if path.name not in folded]
        for path in fresh:
            for key, value in _values(path).items():
                metric = METRICS.get(key[0])
                if metric is not None and metric.kind != "gauge":
                    past[key] = past.get(key, 0.0) + value
        if fresh:
            # The names with the sums: who is killed here has folded all of them, or none.
            self._keep(past, {path.name for path in gone})
        for path in gone:
            path.unlink(missing_ok=True)
        return past, [path for path in books if path not in gone]

    def _past(self) -> tuple[_Numbers, set[str]]:
        try:
            told = json.loads((self._path / "past.json").read_text())
            numbers = {(n, tuple(labels), part): v for (n, labels, part), v in told["numbers"]}
            return numbers, set(told["folded"])
        except FileNotFoundError:
            return {}, set()
        except (ValueError, KeyError, TypeError):
            # A disk that was full once; counters begin anew, which Prometheus understands.
            return {}, set()

    def _keep(self, past: _Numbers, folded: set[str]) -> None:
        file = self._path / "past.new"
        file.write_text(json.dumps({"numbers": list(past.items()), "folded": sorted(folded)}))
        file.chmod(0o600)
        file.replace(self._path / "past.json")

    @contextlib.contextmanager
    def _locked(self) -> cabc.Iterator[None]:
        """Alone in the folder; StoreUnavailable if that does not come about in time."""
        until = time.monotonic() + _PATIENCE
        while (held := self._try_lock()) is None:
            if time.monotonic() >= until:
                raise StoreUnavailable("the metrics are in use; try again")
            time.sleep(0.01)
        try:
            yield
        finally:
            os.close(held)

    def _try_lock(self) -> int | None:
        lock = self._path / "lock"
        make_private(self._path)
        with contextlib.suppress(FileNotFoundError):
            held = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # It may have been removed before it was ours (_forget_others).
            if _lock(held) and _is_same(held, lock):
                return held
            os.close(held)
        return None

    def _forget_others(self) -> None:
        """Remove what machines, or containers, that are gone left below the same ROOT."""
        for path in self._root.iterdir():
            if path == self._path or not path.is_dir():
                continue
            with contextlib.suppress(OSError):
                held = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
                try:
                    if _lock(held) and all(_is_free(book) for book in path.glob("*.book")):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(held)


def _lock(held: int) -> bool:
    """Take the lock of an open file; False if somebody else has it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a book any more."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return _lock(held)
    finally:
        os.close(held)


def _is_same(held: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(held)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _values(path: Path) -> _Numbers:
    """What a book says; what was being written when its worker was killed is left out."""
    from prometheus_client.mmap_dict import MmapedDict

    mapped: t.Any = MmapedDict
    found: _Numbers = {}
    with contextlib.suppress(OSError, ValueError, RuntimeError, struct.error):
        for text, value, _, _ in mapped.read_all_values_from_file(str(path)):
            name, labels, part = json.loads(text)
            found[name, tuple(labels), part] = value
    return found


def _merged(past: _Numbers, living: list[_Numbers]) -> _Numbers:
    sums = collections.defaultdict(float, past)
    now = time.monotonic()
    for numbers in living:
        for key, value in numbers.items():
            metric = METRICS.get(key[0])
            if metric is None:
                continue
            if metric.name in _AGES:
                value = max(0.0, now - value)
            sums[key] = max(sums[key], value) if metric.merge == "max" else sums[key] + value
    return dict(sums)


class _Found:
    """A prometheus_client Collector of numbers that are there already."""

    def __init__(self, numbers: _Numbers, tenants: bool) -> None:
        self._numbers = numbers
        self._tenants = tenants

    def describe(self) -> list[t.Any]:
        return []

    def collect(self) -> cabc.Iterator[t.Any]:
        by_name: dict[str, _Numbers] = {}
        for key, value in self._numbers.items():
            by_name.setdefault(key[0], {})[key] = value
        for metric in METRICS.values():
            yield self._family(metric, by_name.get(metric.name, {}))

    def _family(self, metric: Metric, numbers: _Numbers) -> t.Any:
        from prometheus_client.core import CounterMetricFamily
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.core import HistogramMetricFamily

        if metric.kind == "histogram":
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, parts in (_by_labels(numbers, metric) or {(): {}}).items():
                if metric.labels and not labels:
                    continue
                histogram.add_metric(labels, *_cumulated(metric, parts))
            return histogram
        named = metric.labels
        if metric.per_tenant and self._tenants:
            named = (*named, "tenant")
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=named)
        for labels, parts in _by_labels(numbers, metric, len(named)).items():
            family.add_metric(labels, sum(parts.values()))
        if not (named or numbers):
            family.add_metric((), 0.0)
        return family


def _by_labels(
    numbers: _Numbers, metric: Metric, most: int | None = None
) -> dict[tuple[str, ...], dict[str, float]]:
    """Labels -> parts; with *most* labels, so that tenants of before are one again."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for (_, labels, part), value in numbers.items():
        parts = found.setdefault(labels[:most], {})
        parts[part] = parts.get(part, 0.0) + value
    return found


def _cumulated(
    metric: Metric, parts: cabc.Mapping[str, float]
) -> tuple[list[tuple[str, float]], float]:
    total = 0.0
    buckets = []
    for bound in (*map(str, metric.buckets), "+Inf"):
        total += parts.get(bound, 0.0)
        buckets.append((bound, total))
    return buckets, parts.get("sum", 0.0)
