"""What a provider's refusal says: that the request is too long, how large the model's window is,
and when to come back. Knows error texts and headers; must never know sockets, sessions or turns.

Every provider has its own words. Those of the tables come from their documentation and from what
people reported; a text that none of them matches says nothing, which is always safe.
"""

from __future__ import annotations

import collections.abc as cabc
import dataclasses
import datetime
import email.utils
import math
import re
import typing as t

from agentao.context_manager import is_context_too_long_error

#: A longer wait than this is no answer to "when", and is not believed.
_LONGEST: t.Final = 30 * 86_400
#: How much of an answer is looked at, in characters.
_LONGEST_TEXT: t.Final = 8_192
#: What no window is smaller or larger than.
_WINDOWS: t.Final = range(1_024, 100_000_001)
#: Statuses of a request that is at fault itself; 200 (None) is an error inside of a stream.
_AT_FAULT: t.Final = frozenset({None, 200, 400, 413, 422, 500})

_NUMBER: t.Final = r"(\d[\d,]{0,15})"


def _table(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(p.replace("N#", _NUMBER), re.IGNORECASE) for p in patterns)


#: Ways to say "too long" that Agentao does not know.
_TOO_LONG: t.Final = _table(
    # llama.cpp, its Python server, and what stands on it: LM Studio, Ollama
    r"exceed_context_size",
    r"exceeds? context window of \d",
    r"context size has been exceeded",
    r"keep the first \d+ tokens when (?:the )?context",
    r"n_keep\W+\d+\)? ?>= ?n_ctx",
    r"exceeds the context length",
    # vLLM
    r"longer than the maximum model length",
    r"max_tokens must be at least 1, got -\d",
    r"input prompt \(\d+ tokens\) is too long",
    # Text Generation Inference
    r"`inputs` (?:tokens \+ `max_new_tokens` )?must (?:be <=|have less than)",
    # Cohere, GitHub Models, MiniMax, OpenAI
    r"tokens in the prompt cannot exceed \d",
    r"tokens_limit_reached|request body too large for .{0,80}max size: \d+ tokens",
    r"context window exceeds limit",
    r"string_above_max_length",
    # Groq and OpenAI: one request alone is more than a minute's tokens; waiting does not help.
    r"request too large for .{0,200}tokens per min",
)

#: How large the window is. Most of these texts have several numbers; only one is the window.
_WINDOW: t.Final = _table(
    r"maximum context length (?:is|of) N#",
    r"maximum context length \(N#",
    r"model with N# maximum context length",
    r"context length of only N#",
    r"""\bn_ctx['"]?\s?[:=(]\s?N#""",
    r"available context size \(N#",
    r"exceeds? context window of N#",
    r"tokens? > N# maximum",
    r"exceed context limit: [\d,]+ \+ [\d,]+ > N#",
    r"maximum prompt length is N#",
    r"maximum allowed input length of N#",
    r"maximum number of tokens allowed \(N#",
    r"longer than the model'?s context length \(N#",
    r"exceeded model token limit: N#",
    r"configured context size is N#",
    r"maximum model length of N#",
    r"exceeds? model maximum \(N#",
    r"range of input length should be \[\d+, ?N#",
    r"`max_new_tokens` must be <= N#",
    r"tokens in the prompt cannot exceed N#",
    r"max size: N# tokens",
)

#: How long the prompt was, where the same text also says how long the answer may be.
_PROMPT: t.Final = _table(
    r"\(N# in (?:the messages|your prompt|the prompt)",
    r"request has N# input tokens",
    r"exceed context limit: N# \+",
    r"Given: N# `inputs` tokens",
)


class TooLong(Exception):
    """A request that does not fit, in words that Agentao's own ladder of compactions knows."""

    def __init__(self, window: int | None, status: int | None) -> None:
        self.status_code = status
        known = "" if window is None else f": the maximum context length is {window} tokens"
        super().__init__(f"context_length_exceeded{known}")


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a call to the model failed, as far as a turn's ending tells of it."""

    too_long: bool = False
    retry_after: int | None = None
    """Seconds after which the provider wants to be asked again."""


def failure(exc: BaseException) -> Failure:
    """What *exc*, the end of a call, says."""
    wait = retry_after(exc)
    seconds = None if wait is None else math.ceil(wait)
    return Failure(too_long(exc) or _status(exc) == 413, seconds)


def too_long(exc: BaseException) -> bool:
    """Whether the provider refused a request because it does not fit into the model's window."""
    text = said(exc)
    if is_context_too_long_error(Exception(text)):
        return True
    per_minute = _TOO_LONG[-1]
    if per_minute.search(text):
        return True
    return _status(exc) in _AT_FAULT and any(p.search(text) for p in _TOO_LONG)


def said(exc: BaseException) -> str:
    """The words of *exc*, and of the answer it is about: the SDKs know only some forms of it."""
    try:
        body = getattr(getattr(exc, "response", None), "text", "")
    except Exception:  # It was never read; each SDK says so in its own way.
        body = ""
    return f"{exc} {body[:_LONGEST_TEXT]}" if isinstance(body, str) else str(exc)


def window(text: str) -> int | None:
    """The size of the model's window in tokens, if *text* says exactly one."""
    found = {n for n in _numbers(_WINDOW, text) if n in _WINDOWS}
    return found.pop() if len(found) == 1 else None


def prompt(text: str) -> int | None:
    """How many tokens of the refused request were its prompt, if *text* says so."""
    return next(_numbers(_PROMPT, text), None)


def _numbers(table: cabc.Iterable[re.Pattern[str]], text: str) -> cabc.Iterator[int]:
    for pattern in table:
        if found := pattern.search(text):
            yield int(found[1].replace(",", ""))


def retry_after(exc: BaseException) -> float | None:
    """Seconds the provider asks to wait, from the headers of a refusal; None if it says nothing
    that makes sense."""
    headers = getattr(getattr(exc, "response", None), "headers", None)
    if headers is None:
        return None
    milliseconds = _seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    said = headers.get("retry-after")
    wait = _seconds(said)
    if wait is None and isinstance(said, str):
        wait = _until(said, datetime.datetime.now(datetime.UTC))
    return wait if wait is not None and wait <= _LONGEST else None


def _seconds(said: t.Any) -> float | None:
    if not isinstance(said, str) or not re.fullmatch(r"\s*\d{1,12}(\.\d{0,9})?\s*", said, re.ASCII):
        return None
    return float(said)


def _until(said: str, now: datetime.datetime) -> float | None:
    try:
        when = email.utils.parsedate_to_datetime(said[:64])
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        return max(0.0, (when - now).total_seconds())
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def _status(exc: BaseException) -> int | None:
    status = getattr(exc, "status_code", None)
    return status if isinstance(status, int) and not isinstance(status, bool) else None
