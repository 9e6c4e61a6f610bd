"""Agents of the tests' own, for the rooms that know an agent only as a Protocol."""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import threading
import typing as t

from agentao_web.core.history import History
from agentao_web.core.log import Draft
from agentao_web.core.log import Event
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import State
from agentao_web.core.turn import TurnRequest
from agentao_web.live import Live
from agentao_web.live import LiveTurn
from agentao_web.readers import Reader
from agentao_web.runner import Stage
from agentao_web.sessions import SessionPool
from agentao_web.sessions import Started
from agentao_web.store.memory import MemoryStore
from tests.patience import PATIENCE


class Gate:
    """A place where a test meets an agent."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()

    def stand(self) -> None:
        self.arrived.release()
        assert self.opened.wait(PATIENCE), "nobody opened the gate"

    def meet(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE), "nobody came to the gate"


Script = cabc.Callable[["FakeAgent", TurnRequest, Stage], "Outcome | None"]


class FakeAgent:
    """Does what its script says; records what became of it."""

    def __init__(self, script: Script, history: list[dict[str, t.Any]]) -> None:
        self.messages = list(history)
        self.closed = 0
        self.running = False
        self._script = script
        self._kept = len(history)

    def run(self, request: TurnRequest, stage: Stage) -> Outcome:
        assert not self.running, "an agent is used by one thread at a time"
        self.running = True
        try:
            self.messages.append({"role": "user", "content": request.message})
            outcome = self._script(self, request, stage)
            self.messages.append({"role": "assistant", "content": "ok"})
            return outcome or Outcome(State.COMPLETED, reply="ok", usage={"prompt_tokens": 1})
        finally:
            self.running = False

    def unsaved(self) -> tuple[list[dict[str, t.Any]], bool]:
        return self.messages[self._kept :], False

    def state(self) -> dict[str, t.Any] | None:
        return None

    def saved(self) -> None:
        self._kept = len(self.messages)

    def close(self) -> None:
        assert not self.running, "never closed while it runs"
        self.closed += 1


class FakeAgents:
    """Builds FakeAgents."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.built: list[FakeAgent] = []
        self.forgotten: list[SessionKey] = []
        self.closed = False
        self.building: Gate | None = None

    def build(self, key: SessionKey, history: History) -> FakeAgent:
        if self.building is not None:
            self.building.stand()
        self.built.append(agent := FakeAgent(self.script, history.messages))
        return agent

    def suits(self, key: SessionKey, agent: FakeAgent) -> bool:
        return True

    def forget(self, key: SessionKey) -> None:
        self.forgotten.append(key)

    def close(self) -> None:
        self.closed = True


@dataclasses.dataclass
class TestCaps:
    __test__ = False
    turn_timeout: float = 600.0
    max_waiting_time: float = 600.0
    question_timeout: float = 300.0
    stop_grace: float = 5.0
    disconnect_grace: float = 10.0
    drain_grace: float = 5.0
    session_ttl: float = 1800.0
    conversation_ttl: float | None = None
    max_sessions: int = 100
    max_sessions_per_tenant: int | None = None
    max_turns: int = 16
    max_turns_per_tenant: int | None = None
    max_turns_per_user: int | None = None
    max_queue: int = 4
    max_line: int = 4
    log_bytes: int = 2**20
    worker_lease: float = 10.0
    shell: str = "off"


class Clock:
    """Time by hand."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def say_ok(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
    stage.publish(Draft("llm_text", {"chunk": f"re: {request.message}"}))


def until_stopped(agent: FakeAgent, request: TurnRequest, stage: Stage) -> None:
    """Runs until it is stopped."""
    stopped = threading.Event()
    stage.on_stop(lambda reason: stopped.set())
    stage.publish(Draft("llm_text", {"chunk": "working"}))
    assert stopped.wait(PATIENCE), "nobody stopped it"


class Probe:
    """A pool with fakes around it, and the questions tests ask."""

    def __init__(
        self,
        script: Script = say_ok,
        *,
        store: t.Any = None,
        observer: Observer | None = None,
        **caps: t.Any,
    ) -> None:
        self.agents = FakeAgents(script)
        self.caps = TestCaps(**caps)
        self.store: t.Any = store or MemoryStore(
            max_per_tenant=self.caps.max_sessions_per_tenant, seed=1, log_bytes=2**22
        )
        self.pool = SessionPool(self.store, self.agents, self.caps, observer=observer)

    def key(self, sid: str = "s", tenant: str = "acme", user: str = "ann") -> SessionKey:
        return SessionKey(tenant, user, sid)

    def start(self, message: str = "hi", sid: str = "s", **options: t.Any) -> Started:
        return self.pool.start(self.key(sid), TurnRequest(message, **options))

    def finish(self, started: Started) -> Event:
        """The last event of the turn."""
        return self.events(started)[-1]

    def events(self, started: Started) -> list[Event]:
        """Every event of the turn, once it has ended."""
        assert started.turn is not None
        return read_turn(self.pool, started.live, started.turn, started.cursor)

    def run(self, message: str = "hi", sid: str = "s", **options: t.Any) -> Event:
        return self.finish(self.start(message, sid, **options))

    def log(self, sid: str = "s") -> list[Event]:
        """The session's whole log as the store has it."""
        return self.store.events(self.key(sid), None, limit=10_000, max_bytes=10**9).events


def read_turn(pool: SessionPool, live: Live, turn: LiveTurn, cursor: int) -> list[Event]:
    events: list[Event] = []
    until = live.clock() + PATIENCE
    with Reader(live, pool.store, cursor, turn=turn) as reader:
        while not reader.told:
            assert live.clock() < until, f"the turn did not end: {events[-3:]}"
            found = reader.read(limit=100, max_bytes=10**6)
            events += found
            if not found and not reader.told:
                reader.wait(until)
    return events


def read_until(pool: SessionPool, started: Started, kind: str) -> Event:
    """The first event of *kind* in the turn."""
    until = started.live.clock() + PATIENCE
    with Reader(started.live, pool.store, started.cursor, turn=started.turn) as reader:
        while True:
            for event in reader.read(limit=100, max_bytes=10**6):
                if event.type == kind:
                    return event
            assert not reader.told and started.live.clock() < until, f"no {kind} came"
            reader.wait(until)
