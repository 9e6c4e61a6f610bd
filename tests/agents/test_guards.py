"""What agentao computes under the GIL gives the same results, in a time that has an end."""

from __future__ import annotations

import collections.abc as cabc
import random
import re
import time
import typing as t

import pytest
import regex
from agentao import context_manager
from agentao.prompts import helpers
from agentao.runtime import arg_repair
from agentao.tools import search
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from agentao_web.agents import guards
from agentao_web.agents.guards import PatternTooSlow
from tests.agents.scripted_llm import Ticking

PATHS = re.compile(r"[\w./\\-]+\.\w{2,6}")
FENCE = re.compile(r"\A\s*```(?:json)?\s*\n?(.*?)\n?\s*```\s*\Z", re.DOTALL | re.IGNORECASE)
LIMIT = re.compile(r"\d[\d,]*\s*tokens?\s*>\s*([\d,]+)\s*maximum", re.IGNORECASE)


@pytest.fixture(autouse=True)
def installed() -> None:
    guards.install()


def longest_gap(run: cabc.Callable[[], object]) -> float:
    """How long another thread waited while *run* ran."""
    with Ticking() as ticking:
        run()
    return ticking.longest


# The same results


@pytest.mark.parametrize(
    "text",
    [
        "a.b.cdefghij",
        "foo.toolongext",
        "see src/a.py, b\\c.txt and ./d-e.rs.",
        ".py",
        "..py",
        "a..py",
        "a.p",
        "a.p.py.q",
        "a.py.",
        "a.b.c.d",
        "-.ab",
        "пример.текст 版本.文件 x.éé",
        "a.²³ a.٣٤ a.ᴬᴮ a._1 x.\u0301\u0301",
        "a.py/b.rs\\c.go-d.js",
        "1.25 1.2 v3.11.7",
        "",
        "...",
    ],
)
def test_paths_are_found_as_before(text: str) -> None:
    assert helpers._PATH_RE.findall(text) == PATHS.findall(text)


@settings(max_examples=2000, deadline=None)
@given(st.text("ab.1_/\\- \né²\u0301", max_size=40))
def test_paths_are_found_as_before_in_any_text(text: str) -> None:
    assert helpers._PATH_RE.findall(text) == PATHS.findall(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_paths_are_found_as_before_in_any_unicode(text: str) -> None:
    assert helpers._PATH_RE.findall(text) == PATHS.findall(text)


def body(match: t.Any) -> str | None:
    return None if match is None else match.group(1)


@settings(max_examples=3000, deadline=None)
@given(st.text("`` \n\tjJsSoOnNſ\x1c{}", max_size=24))
def test_fences_are_stripped_as_before(text: str) -> None:
    for fenced in (text, "```" + text, "```json" + text + "```", "```" + text + "\n```\n"):
        assert body(arg_repair._FENCE_RE.match(fenced)) == body(FENCE.match(fenced))


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from(["1", "23", ",", " ", "token", "s", ">", "maximum", "x", "٣"])).map(
        "".join
    )
)
def test_stated_limits_are_read_as_before(text: str) -> None:
    guarded = context_manager._OBSERVED_LIMIT_PATTERNS[0][0].search(text)
    assert body(guarded) == body(LIMIT.search(text))


def test_a_stated_limit_is_still_understood() -> None:
    error = RuntimeError("prompt is too long: 213,462 tokens > 200,000 maximum")
    assert context_manager.parse_observed_context_limit(error)[0] == 200_000


def test_notices_of_omission_are_counted_as_before() -> None:
    clip = context_manager.ContextManager._head_tail_clip
    clipped = clip(clip("x" * 50_000, 30_000), 3000)
    said = context_manager.ContextManager._prior_omissions(clipped)
    assert len(clipped) <= 3000
    assert 47_000 < said < 47_200


def test_a_notice_without_a_number_does_not_end_the_session() -> None:
    """agentao's own pattern takes "," for a number, and so crashed at each compaction."""
    count = context_manager.ContextManager._prior_omissions
    assert count("[… , chars gone …]") == 0
    assert count("[… " + "9" * 5000 + " chars gone …]") == 0


# In time


@pytest.mark.parametrize("text", ["a", ".", "a.", "a/", "\\", "版", "1_"])
def test_a_long_message_stops_nobody(text: str) -> None:
    """25 s before, for 100 KB."""
    messages = [{"role": "user", "content": text * (100_000 // len(text))}] * 10
    assert longest_gap(lambda: helpers.extract_context_hints(messages)) < 1


@pytest.mark.parametrize("text", ["\n", " \n", "`", "\n```", "json", "{}"])
def test_broken_arguments_stop_nobody(text: str) -> None:
    """29 s before, for three thousand newlines."""

    def repair() -> None:
        with pytest.raises(ValueError):
            arg_repair.parse_tool_arguments("```" + text * (100_000 // len(text)) + "x")

    assert longest_gap(repair) < 1


@pytest.mark.parametrize("text", ["9", "9,", "9 ", "tokens", "1 token > 1"])
def test_an_error_of_the_provider_stops_nobody(text: str) -> None:
    """88 s before, for 100 KB of digits."""
    error = RuntimeError(text * (100_000 // len(text)))
    assert longest_gap(lambda: context_manager.parse_observed_context_limit(error)) < 1


def test_old_results_of_tools_stop_nobody() -> None:
    text = "[… 1 chars " * 10_000
    count = context_manager.ContextManager._prior_omissions
    assert longest_gap(lambda: count(text)) < 1


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (r"(a+)+$", "a" * 5000 + "b"),
        (r"(a|a)*$", "a" * 100_000 + "b"),
        (r"(x+x+)+y", "x" * 5000),
        (r"(.*)(.*)(.*)\1\2\3z$", "ab" * 50_000 + "z "),
        (r"(?:(a)|(z)|(.))*z$", "za" * 5_000_000),
    ],
)
def test_a_pattern_of_the_model_ends_and_stops_nobody(
    pattern: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SEARCH_SECONDS", 0.5)
    compiled = search.re.compile(pattern, 0)
    began = time.process_time()

    def run() -> None:
        try:
            for _ in range(50):
                compiled.search(line)
        except PatternTooSlow as ended:
            assert "simpler" in str(ended)

    assert longest_gap(run) < 1
    assert time.process_time() - began < 5


def test_the_time_is_for_all_lines_together() -> None:
    now = [0.0]
    timed = guards._TimedPattern(regex.compile("a"), clock=lambda: now[0])
    assert timed.search("xa")
    now[0] = guards.SEARCH_SECONDS + 0.1
    with pytest.raises(PatternTooSlow):
        timed.search("xa")
    assert not issubclass(PatternTooSlow, OSError)


# Patterns


@pytest.mark.parametrize("pattern", ["(", "[", "*a", "(?R)?a", "(?1)(a)", "a" * 1001, "(" * 900])
def test_a_bad_pattern_is_an_error_agentao_catches(pattern: str) -> None:
    with pytest.raises(search.re.error):
        search.re.compile(pattern, search.re.IGNORECASE)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("x{e}", "x{e}"),
        (r"\(?1\)?", "(1)"),
        (r"\$\{\w+\}", "a ${b} c"),
        ("{", "{"),
        (r"a{2,3}b{,2}c{1}", "aabbc"),
        (r"\N{DIGIT ONE}", "1"),
        (r"(?i)ABC|[{x]", "abc"),
        (r"^\s*def (\w+)\(", "  def f("),
    ],
)
def test_patterns_mean_what_they_mean_to_re(pattern: str, text: str) -> None:
    ours = search.re.compile(pattern, 0).search(text)
    theirs = re.compile(pattern).search(text)
    assert theirs is not None and ours is not None
    assert ours.span() == theirs.span()
    assert search.re.compile("ABC", search.re.IGNORECASE).search("xabc")


def test_random_patterns_find_what_re_finds() -> None:
    choose = random.Random(7)
    pieces = [
        "a",
        "b",
        ".",
        "a*",
        "b+",
        "(ab)",
        "(a|b)?",
        "[^a]",
        r"\w",
        r"\s",
        "$",
        "x{e}",
        "b{2}",
    ]
    for _ in range(500):
        pattern = "".join(choose.choices(pieces, k=4))
        line = "".join(choose.choices("ab {e}x\n", k=12))
        ours = search.re.compile(pattern, 0).search(line)
        theirs = re.search(pattern, line)
        assert (ours and ours.span()) == (theirs and theirs.span()), (pattern, line)


# Installing


def test_installing_again_changes_nothing() -> None:
    before = (helpers._PATH_RE, arg_repair._FENCE_RE, search.re)
    guards.install()
    assert (helpers._PATH_RE, arg_repair._FENCE_RE, search.re) == before


@pytest.mark.parametrize(
    ("owner", "name", "new"),
    [
        (helpers, "_PATH_RE", re.compile("another")),
        (arg_repair, "_FENCE_RE", None),
        (search, "re", object()),
        (context_manager.ContextManager, "_OMISSION_NOTICE", re.compile("another")),
        (context_manager, "_OBSERVED_LIMIT_PATTERNS", [(re.compile("another"), "name")]),
        (guards.Agentao, "_build_system_prompt", None),
        (guards.agentao, "__version__", "0.5.18"),
    ],
)
def test_an_unknown_agentao_is_refused_with_the_cure(
    owner: object, name: str, new: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, new)
    with pytest.raises(RuntimeError, match="install agentao==0.5.17"):
        guards.install()
    assert getattr(owner, name) is new
