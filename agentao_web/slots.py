"""How many requests may hold a thread of this worker by waiting or streaming.

When all threads stream, nothing is answered any longer, not even a cancel. So some are kept free,
nobody gets all of the others, and a request for which there is no place is refused at once.
"""

from __future__ import annotations

import collections
import collections.abc as cabc
import math
import threading
import typing as t

#: Of few threads, this part is kept free at most.
_MOST_RESERVED: t.Final = 4


class Share(t.NamedTuple):
    """What one user, tenant or ticket may have of the places at once."""

    name: str
    """The limit's name, for the client."""
    owner: cabc.Hashable
    """Whose it is, among those with the same name."""
    most: int


class NoPlace(Exception):
    """There is none; *share* is the one that is used up, or None if all places are taken."""

    def __init__(self, share: Share | None = None) -> None:
        super().__init__(share)
        self.share = share


class StreamSlots:
    """Places for streams and long-polls. Without a number there is always one."""

    def __init__(self) -> None:
        self.most: int | None = None
        self.taken = 0
        self._shares: collections.Counter[tuple[str, cabc.Hashable]] = collections.Counter()
        # Of the same thread, too: the collector may give a place back in the middle of taking one.
        self._lock = threading.RLock()

    def of_threads(self, threads: int, reserve: int) -> None:
        """The server has *threads*; keep *reserve* of them free, at most a quarter."""
        kept = min(reserve, max(1, threads // _MOST_RESERVED))
        self.most = max(0, threads - kept)

    def part(self, share: float) -> int | None:
        """This part of the places, and not all of them; None if nobody knows how many there are."""
        return (
            None if self.most is None else max(1, min(math.ceil(self.most * share), self.most - 1))
        )

    def take(self, shares: cabc.Sequence[Share] = ()) -> Slot:
        """A place, to be given back, that counts for each of *shares*; NoPlace if there is none."""
        with self._lock:
            if self.most is not None and self.taken >= self.most:
                raise NoPlace
            for share in shares:
                if self._shares[share[:2]] >= share.most:
                    raise NoPlace(share)
            self.taken += 1
            self._shares.update(share[:2] for share in shares)
        return Slot(self, shares)

    def _give_back(self, shares: cabc.Sequence[Share]) -> None:
        with self._lock:
            self.taken -= 1
            for share in shares:
                self._shares[share[:2]] -= 1
                if not self._shares[share[:2]]:
                    del self._shares[share[:2]]


class Slot:
    """One place, which may be given back more than once."""

    def __init__(self, slots: StreamSlots, shares: cabc.Sequence[Share] = ()) -> None:
        self._slots: StreamSlots | None = slots
        self._shares = shares

    def free(self) -> None:
        """Somebody else may have it."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots._give_back(self._shares)

    def __del__(self) -> None:
        # Of an answer that the host's own code dropped nobody says that it is over.
        self.free()
