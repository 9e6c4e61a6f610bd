"""What agents remember beyond a session: one small database per workspace, next to the workspaces.

Knows where it is and how much of it there is; no tool of an agent reads or writes its file.

Only what a model saves with save_memory is kept. What agentao would keep by itself (summaries of
what it compacts, proposals drawn from messages) is the conversation's, and goes with it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import typing as t
from pathlib import Path

from agentao.memory import MemoryManager
from agentao.memory import MemoryRetriever
from agentao.memory import SQLiteMemoryStore
from agentao.memory.models import MemoryRecord
from agentao.memory.models import MemoryReviewItem
from agentao.memory.models import RecallCandidate
from agentao.memory.models import SessionSummaryRecord
from agentao.tools.memory import SaveMemoryTool

#: Facts of one workspace; each is at most 4,000 characters.
MAX_MEMORIES: t.Final = 200
#: Characters of a message in which words to remember by are looked for.
MAX_QUERY: t.Final = 10_000


class Memories(SQLiteMemoryStore):
    """agentao's store of facts, with an end, and of nothing else."""

    def upsert_memory(self, record: MemoryRecord) -> MemoryRecord:
        known = self.get_memory_by_scope_key(record.scope, record.key_normalized)
        if known is None and len(self.list_memories()) >= MAX_MEMORIES:
            raise ValueError(f"{MAX_MEMORIES} facts are saved already; save it under a known key")
        return super().upsert_memory(record)

    def save_session_summary(self, record: SessionSummaryRecord) -> None:
        return None

    def upsert_review_item(self, item: MemoryReviewItem) -> MemoryReviewItem:
        return item


class Recall(MemoryRetriever):
    """Looks for what fits the beginning of a message, and holds nothing while a session is idle."""

    def recall_candidates(
        self,
        query: str,
        context_hints: list[str] | None = None,
        top_k: int = 5,
        exclude_ids: set[str] | None = None,
    ) -> list[RecallCandidate]:
        once = MemoryRetriever(self._manager)
        return once.recall_candidates(query[:MAX_QUERY], context_hints, top_k, exclude_ids)


class SaveTool(SaveMemoryTool):
    """save_memory. It changes nothing but the memory, so it asks only where others read that."""

    def __init__(self, memory: MemoryManager, *, asks: bool) -> None:
        super().__init__(memory)
        self._asks = asks

    @property
    def requires_confirmation(self) -> bool:
        return self._asks


def open_memory(path: Path, log: logging.Logger) -> MemoryManager | None:
    """The memory in the file *path*, made if need be; None, and a line in the log, if it is bad."""
    try:
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        # SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        return MemoryManager(project_store=Memories(str(path)))
    except (OSError, sqlite3.Error) as exc:
        log.error("memory %s cannot be opened: %s", path.name, exc)
        return None


# Where memory is off. What agentao saves by itself (summaries of what it compacts) is in the
# history already, and a database in memory costs 100 KB per session.


class NoMemory:
    """agentao's MemoryStore that keeps nothing."""

    def change_version(self) -> int:
        return 0

    def upsert_memory(self, record: MemoryRecord) -> MemoryRecord:
        return record

    def get_memory_by_id(self, memory_id: str) -> None:
        return None

    def get_memory_by_scope_key(self, scope: str, key_normalized: str) -> None:
        return None

    def list_memories(self, scope: str | None = None) -> list[MemoryRecord]:
        return []

    def search_memories(self, query: str, scope: str | None = None) -> list[MemoryRecord]:
        return []

    def filter_by_tag(self, tag: str, scope: str | None = None) -> list[MemoryRecord]:
        return []

    def soft_delete_memory(self, memory_id: str) -> bool:
        return False

    def clear_memories(self, scope: str | None = None) -> int:
        return 0

    def save_session_summary(self, record: SessionSummaryRecord) -> None:
        return None

    def list_session_summaries(
        self, session_id: str | None = None, limit: int = 20
    ) -> list[SessionSummaryRecord]:
        return []

    def clear_session_summaries(self, session_id: str | None = None) -> int:
        return 0

    def upsert_review_item(self, item: MemoryReviewItem) -> MemoryReviewItem:
        return item

    def get_review_item(self, item_id: str) -> None:
        return None

    def list_review_items(
        self, status: str | None = "pending", limit: int = 50
    ) -> list[MemoryReviewItem]:
        return []

    def update_review_status(self, item_id: str, status: str) -> bool:
        return False


class NoRecall(MemoryRetriever):
    """Finds nothing, without taking the message to pieces first."""

    def recall_candidates(
        self,
        query: str,
        context_hints: list[str] | None = None,
        top_k: int = 5,
        exclude_ids: set[str] | None = None,
    ) -> list[RecallCandidate]:
        return []
