"""Repairs of agentao for a server: text of a tenant must not stop the whole process.

Knows the private names of agentao 0.5.17 we rely on, and checks each before it changes one.

A stdlib regular expression holds the GIL until it is done. These five can be made to take
seconds to hours by a message, a file, a model or a provider, and each is replaced by something
linear, or something with a deadline, that gives the same results:

1. `_PATH_RE`, over the last messages at each turn: 25 s for 100 KB without spaces.
2. `_FENCE_RE`, over tool-call arguments: 29 s for three thousand newlines.
3. `_OMISSION_NOTICE`, over old tool results when they are shortened; and its number crashed on
   `[… , chars …]` in any file that was read.
4. `_OBSERVED_LIMIT_PATTERNS`, over a provider's error text: 88 s for 100 KB of digits.
5. Patterns written by the model, in search_file_content: for ever.
"""

from __future__ import annotations

import collections.abc as cabc
import importlib
import re
import time
import typing as t

import agentao
import regex
from agentao import context_manager
from agentao.agent import Agentao
from agentao.prompts import helpers
from agentao.runtime import arg_repair
from agentao.skills import SkillManager
from agentao.tools import file_ops
from agentao.tools import search

PINNED = "0.5.17"
CURE = f"install agentao=={PINNED}, or fix agentao_web/agents/guards.py for this version"

#: Seconds all lines of one search may take together.
SEARCH_SECONDS = 5.0
MAX_PATTERN = 1000
#: The regex package keeps a way back for every character: 10 MB in one line took 600 MB.
MAX_LINE = 100_000


class PatternTooSlow(Exception):
    """A model's pattern has had its time.

    Not a TimeoutError: that is an OSError, which the search takes for one unreadable file.
    """


class _Paths:
    r"""`[\w./\\-]+\.\w{2,6}` with findall in linear time.

    Every match lies in one run of such characters, starts where the run starts and ends with
    the last dot that can end it; so there is at most one in a run.
    """

    pattern = r"[\w./\\-]+\.\w{2,6}"
    _run = re.compile(r"[\w./\\-]+")
    _ending = re.compile(r"\.\w{2,6}")

    def findall(self, text: str) -> list[str]:
        found = (self._path(run.group()) for run in self._run.finditer(text))
        return [path for path in found if path]

    def _path(self, run: str) -> str | None:
        dot = run.rfind(".")
        while dot > 0:
            if ending := self._ending.match(run, dot):
                return run[: ending.end()]
            dot = run.rfind(".", 0, dot)
        return None


class _Fenced(t.NamedTuple):
    body: str

    def group(self, number: int) -> str:
        return (self.body,)[number - 1]


class _Fence:
    """A text that is one fenced block, found from both ends; only `match(...).group(1)`."""

    pattern = r"\A\s*```(?:json)?\s*\n?(.*?)\n?\s*```\s*\Z"
    _opening = re.compile(r"\s*```(?:json)?\s*", re.IGNORECASE)

    def match(self, text: str) -> _Fenced | None:
        opening = self._opening.match(text)
        body = text[opening.end() :].rstrip() if opening else ""
        return _Fenced(body[:-3].rstrip()) if body.endswith("```") else None


class _Search:
    """What the search tool uses of `re`, for patterns nobody has checked."""

    IGNORECASE = re.IGNORECASE
    error = re.error

    def compile(self, pattern: str, flags: int = 0) -> _TimedPattern:
        if len(pattern) > MAX_PATTERN:
            raise re.error(f"longer than {MAX_PATTERN} characters")
        try:
            return _TimedPattern(regex.compile(_as_re(pattern), flags, cache_pattern=False))
        except (regex.error, RecursionError) as problem:
            raise re.error(str(problem)) from None


_ESCAPE_OR_BRACE = re.compile(r"\\[NpP]\{[^}]*\}|\\.|\{(?!\d*,?\d*\})", re.DOTALL)
_RECURSION = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")


def _as_re(pattern: str) -> str:
    """*pattern* as `re` reads it: `x{e}` is no fuzzy match, and recursion is refused.

    (Not asked of `re` itself: to compile, it may look at a million characters per set.)
    """
    if _RECURSION.search(re.sub(r"\\.", "", pattern, flags=re.DOTALL)):
        raise re.error("recursion is not supported")  # it took 800 MB in two seconds
    return _ESCAPE_OR_BRACE.sub(lambda m: r"\{" if m[0] == "{" else m[0], pattern)


class _TimedPattern:
    """One search: the clock starts when it is compiled."""

    def __init__(
        self, pattern: regex.Pattern[str], clock: cabc.Callable[[], float] = time.monotonic
    ) -> None:
        self._pattern = pattern
        self._clock = clock
        self._ends = clock() + SEARCH_SECONDS

    def search(self, line: str) -> regex.Match[str] | None:
        """Where the pattern is in the first 100,000 characters of *line*."""
        left = self._ends - self._clock()
        try:
            if left > 0:
                # concurrent: without the GIL, which is safe as a str never changes.
                return self._pattern.search(line[:MAX_LINE], timeout=left, concurrent=True)
        except TimeoutError:
            pass
        raise PatternTooSlow(
            f"the pattern took longer than {SEARCH_SECONDS:g} seconds: "
            "use a simpler one, plain text, or a narrower directory"
        )


_KNOWN_OMISSION = r"\[… ([\d,]+) chars [^\]]*?…\]"
# What agentao writes there is a number and a word or two.
_OMISSION = re.compile(r"\[… (\d[\d,]{0,20}) chars [^\]]{0,80}?…\]")

_KNOWN_LIMIT = r"\d[\d,]*\s*tokens?\s*>\s*([\d,]+)\s*maximum"
# The same last digit before "tokens", without trying each digit before it.
_LIMIT = re.compile(r"\d,*\s*tokens?\s*>\s*([\d,]+)\s*maximum", re.IGNORECASE)

# Not one of its exports, so nothing a type checker would let us touch.
_search = t.cast(t.Any, search)

_PATHS = _Paths()
_FENCE = _Fence()
_SEARCH = _Search()


def install() -> None:
    """Repair agentao in this process; again is harmless, an unknown agentao a RuntimeError."""
    check_agentao()
    helpers._PATH_RE = t.cast(t.Any, _PATHS)
    arg_repair._FENCE_RE = t.cast(t.Any, _FENCE)
    _search.re = _SEARCH
    context_manager.ContextManager._OMISSION_NOTICE = _OMISSION
    limits = context_manager._OBSERVED_LIMIT_PATTERNS
    limits[0] = (_LIMIT, limits[0][1])


class _Never:
    """Nothing is an instance of this."""


def quicken() -> None:
    """Spare the OpenAI SDK a slow question that it asks for every chunk of a stream.

    ``openai/_models.py``, BaseModel.construct: whether a configuration is one of pydantic 1, by a
    runtime-checkable Protocol, a fifth of a streaming turn's CPU. With pydantic 2 the answer is
    always no. Applied where just that is found; nothing depends on it.
    """
    models: t.Any = importlib.import_module("openai._models")
    protocol = getattr(models, "_ConfigProtocol", None)
    if getattr(protocol, "_is_protocol", False) and not getattr(models, "PYDANTIC_V1", True):
        models._ConfigProtocol = _Never


def check_agentao() -> None:
    """Whether every private name we use is what it was: RuntimeError with the cure if not."""
    for name, known in _checks().items():
        if not known:
            raise RuntimeError(f"{name} of agentao {agentao.__version__} is new to us: {CURE}")


def _checks() -> dict[str, bool]:
    omission = context_manager.ContextManager._OMISSION_NOTICE
    limit = context_manager._OBSERVED_LIMIT_PATTERNS[0][0]
    private = {
        Agentao: ("_build_system_prompt", "_init_session_state"),
        SkillManager: ("_list_skill_resources", "get_skill_content"),
        file_ops.EditTool: ("_not_found_hint", "_line_window_matches", "_apply_match"),
    }
    names = {
        f"{owner.__name__}.{name}": callable(getattr(owner, name, None))
        for owner, wanted in private.items()
        for name in wanted
    }
    return names | {
        "the version": agentao.__version__ == PINNED,
        "Agentao._session_id": "_session_id" in Agentao._init_session_state.__code__.co_names,
        "helpers._PATH_RE": _is(helpers._PATH_RE, _Paths.pattern, _PATHS),
        "arg_repair._FENCE_RE": _is(arg_repair._FENCE_RE, _Fence.pattern, _FENCE),
        "search.re": _search.re in (re, _SEARCH),
        "ContextManager._OMISSION_NOTICE": _is(omission, _KNOWN_OMISSION, _OMISSION),
        "_OBSERVED_LIMIT_PATTERNS": _is(limit, _KNOWN_LIMIT, _LIMIT),
    }


def _is(found: t.Any, known: str, ours: object) -> bool:
    return found is ours or (isinstance(found, re.Pattern) and found.pattern == known)
