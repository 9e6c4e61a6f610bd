"""How many requests may hold a thread of this worker by waiting or streaming.

When all threads stream, nothing answers any more, a cancel neither: so some are kept free, and who
comes then is told at once where to ask instead.
"""

from __future__ import annotations

import threading
import typing as t

#: Of few threads, this part is kept free at most.
_MOST_RESERVED: t.Final = 4


class StreamSlots:
    """Places for streams and long-polls. Without a number there is always one."""

    def __init__(self) -> None:
        self.most: int | None = None
        self.taken = 0
        # Of the same thread, too: the collector may give a place back in the middle of taking one.
        self._lock = threading.RLock()

    def of_threads(self, threads: int, reserve: int) -> None:
        """The server has *threads*; keep *reserve* of them free, at most a quarter."""
        kept = min(reserve, max(1, threads // _MOST_RESERVED))
        self.most = max(0, threads - kept)

    def take(self) -> Slot | None:
        """A place, to be given back; None if there is none."""
        with self._lock:
            if self.most is not None and self.taken >= self.most:
                return None
            self.taken += 1
        return Slot(self)

    def _give_back(self) -> None:
        with self._lock:
            self.taken -= 1


class Slot:
    """One place, which may be given back more than once."""

    def __init__(self, slots: StreamSlots) -> None:
        self._slots: StreamSlots | None = slots

    def free(self) -> None:
        """Somebody else may have it."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots._give_back()

    def __del__(self) -> None:
        # Of an answer that the host's own code dropped nobody says that it is over.
        self.free()
