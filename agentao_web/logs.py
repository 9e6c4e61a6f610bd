"""Log lines for people and for machines: through stdlib logging, with the ids of what they tell of.

What users and agents say is in no line, unless AGENTAO_LOG_TEXT asks for it.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import typing as t

from agentao_web.core import trail
from agentao_web.core.names import SessionKey
from agentao_web.core.observer import Observer
from agentao_web.core.turn import Outcome
from agentao_web.core.turn import Turn

NAME: t.Final = "agentao_web"
#: Every logger of ours: filters of a logger are not asked for its children's lines.
LOGGERS: t.Final = (
    NAME,
    f"{NAME}.access",
    f"{NAME}.audit",
    f"{NAME}.store.database",
    f"{NAME}.turns",
)
#: What every LogRecord has; all else was given as ``extra``.
_PLAIN: t.Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: Characters of what was said, in a line.
_TEXT: t.Final = 4096


class _Ids(logging.Filter):
    """Puts the ids of the present request and turn on every record, for whatever handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in trail.here().items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True


_IDS: t.Final = _Ids()


#: An address of events with a query, which may hold a ticket.
_QUERY: t.Final = re.compile(r"(/events)\?[^\s\"']*")


class NoQueries(logging.Filter):
    """For a server's own lines about requests: events' addresses lose their queries."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _QUERY.search(line := record.getMessage()):
            record.msg, record.args = _QUERY.sub(r"\1", line), ()
        return True


#: The level of the audit while nobody has set up logging: none that a host would choose itself.
_UNSET: t.Final = logging.INFO - 1


class _LastResort(logging.StreamHandler[t.TextIO]):
    """Shows the audit on standard error for as long as nobody has set up logging.

    Python itself does so for warnings only, and a decision about a tool is no warning. As soon as
    the host has handlers or levels of its own, they alone decide: this is a filter of the logger
    as well, and asks before each line.
    """

    def __init__(self, audit: logging.Logger) -> None:
        super().__init__()
        self.setFormatter(TextLines())
        self._audit = audit

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_alone():
            super().emit(record)

    def wanted(self, record: logging.LogRecord) -> bool:
        """Whether the host's own levels let *record* through."""
        above = self._audit.parent
        if self._audit.level != _UNSET or above is None or self._is_alone():
            return True
        return above.isEnabledFor(record.levelno)

    def _is_alone(self) -> bool:
        above = self._audit.parent
        return self._audit.handlers == [self] and not (above and above.hasHandlers())


def mark() -> None:
    """Have every line of ours carry its ids as attributes, and the audit seen. Harmless twice."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_IDS)
    audit = logging.getLogger(f"{NAME}.audit")
    if audit.level == logging.NOTSET and not audit.hasHandlers():
        resort = _LastResort(audit)
        audit.addHandler(resort)
        audit.addFilter(resort.wanted)
        audit.setLevel(_UNSET)


def show(form: str) -> None:
    """Write our lines to standard error as ``text`` or ``json``, unless logging was set up."""
    log = logging.getLogger(NAME)
    if log.hasHandlers():
        return
    if form == "off":
        log.addHandler(logging.NullHandler())
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)


class TextLines(logging.Formatter):
    """A line for people, with the ids it does not name itself."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        told = {name: getattr(record, name, "") for name in ("turn_id", "request_id")}
        ids = [f"{name}={value}" for name, value in told.items() if value and value not in line]
        return f"{line} ({' '.join(ids)})" if ids else line


class JsonLines(logging.Formatter):
    """A JSON object a line: ts, level, logger, message, the ids, and what else the line tells."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, t.Any] = {
            "ts": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told = vars(record)
        line |= {name: told[name] for name in trail.FIELDS if told.get(name)}
        line |= {k: v for k, v in told.items() if k not in _PLAIN and k not in trail.FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TurnLines(Observer):
    """A line for every turn that ended; with *text*, also what was asked and answered."""

    def __init__(self, *, text: bool = False) -> None:
        self._text = text
        self._log = logging.getLogger(f"{NAME}.turns")

    def ended(self, key: SessionKey, turn: Turn, outcome: Outcome, now: float) -> None:
        if not self._log.isEnabledFor(logging.INFO):
            return
        told: dict[str, t.Any] = {
            **trail.of(key, turn.id, turn.request.request_id),
            "status": outcome.status.value,
            "reason": outcome.reason,
            "duration_ms": int((now - (turn.began or now)) * 1000),
            "tool_count": outcome.tool_count,
        }
        if self._text:
            told |= {"asked": turn.request.message[:_TEXT], "replied": outcome.reply[:_TEXT]}
        reason = f", {outcome.reason}" if outcome.reason else ""
        words = f"; asked {told['asked']!r}, replied {told['replied']!r}" if self._text else ""
        self._log.info("turn %s: %s%s%s", turn.id, told["status"], reason, words, extra=told)
