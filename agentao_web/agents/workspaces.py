"""Which folder an agent works in. Folder names are digests: no name of a person is in a path."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from agentao_web.agents.quota import book_of
from agentao_web.agents.removal import remove_folder
from agentao_web.core.folders import make_private
from agentao_web.core.names import SessionKey


class Workspaces:
    """The folders below ``<root>/workspaces``, per user, per tenant or per session."""

    def __init__(self, root: Path, sharing: str) -> None:
        self._root = root / "workspaces"
        self._sharing = sharing

    def path(self, key: SessionKey) -> Path:
        """Where the agent of *key* works; the folder need not exist yet."""
        tenant = self._root / _digest(key.tenant)
        if self._sharing == "session":
            return tenant / f"session-{_digest(key.user, key.id)}"
        if self._sharing == "tenant" or not key.user:
            return tenant / "shared"
        return tenant / f"user-{_digest(key.user)}"

    def make(self, key: SessionKey) -> Path:
        """The same folder, made if need be, for the server's own user only."""
        path = self.path(key)
        make_private(path)
        return path.resolve()

    def memory(self, key: SessionKey) -> Path | None:
        """The file of what agents of this workspace remember; None where people would mix.

        That is a token without a user: nobody says that all who carry one are one person.
        ``tenant`` says so, and a session's own memory is nobody else's.
        """
        if self._sharing == "user" and not key.user:
            return None
        workspace = self.path(key)
        folder = self._root.parent / "memory" / workspace.parent.name
        return folder / f"{workspace.name}.db"

    def forget(self, key: SessionKey) -> None:
        """Remove the session's own folder and memory, if it has its own."""
        if self._sharing == "session":
            path = self.path(key)
            memory = self.memory(key)
            if memory is not None:
                # And what SQLite keeps beside it.
                for ending in ("", "-wal", "-shm", "-journal"):
                    memory.with_name(memory.name + ending).unlink(missing_ok=True)
            book_of(path).unlink(missing_ok=True)
            remove_folder(path)


def _digest(*names: str) -> str:
    # Length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
    text = "".join(f"{len(name)}:{name}" for name in names)
    digest = hashlib.blake2b(text.encode(), digest_size=15).digest()
    return base64.b32encode(digest).decode().lower()
