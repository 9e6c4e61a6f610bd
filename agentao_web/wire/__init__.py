"""What goes over the line: one file per dialect, and what a dialect is."""

from __future__ import annotations

import collections.abc as cabc
import typing as t

from agentao_web.core.log import Event


class Wire(t.Protocol):
    """How a stream looks. It keeps nothing: every event stands for itself."""

    @property
    def CONTENT_TYPE(self) -> str:
        """What the answer is; who names its media type in ``Accept`` gets this wire."""

    @property
    def HEADERS(self) -> cabc.Mapping[str, str]:
        """Further headers of the answer."""

    @property
    def KEEP_ALIVE(self) -> bytes:
        """What goes out after some silence, so that proxies do not cut it; readers ignore it."""

    def frames(self, events: cabc.Iterable[Event]) -> bytes:
        """All of *events* in one piece. An event that was never stored has no ``seq``."""

    def retry(self, milliseconds: int) -> bytes:
        """The last of a stream that was ended on purpose: when to come back."""
