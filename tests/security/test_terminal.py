"""Nothing a model, a tool, a file name or a title says can steer the terminal of who reads it."""

from __future__ import annotations

import unicodedata
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentao_web.terminal.screen import arguments
from agentao_web.terminal.screen import clean
from agentao_web.terminal.screen import line
from agentao_web.terminal.screen import visible
from tests.client.conftest import server as the_server
from tests.client.terminal import CTRL_D
from tests.client.terminal import Terminal
from tests.client.terminal import run
from tests.live.harness import Server
from tests.live.harness import token

server = the_server

#: Set the title, clear the screen, write the clipboard, ask for answers, go back over the line,
#: turn the text round: in seven bits, in eight, and cut off.
HOSTILE = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[H",
    "\x1b]52;c;ZXZpbA==\x1b\\",
    "\x1b[6n\x1b[c\x05",
    "\x9b31m\x9d0;owned\x9c\x90q\x9c",
    "good\rbad \x08\x08\x7f\x0b\x0c",
    "\u202egpj.exe\u202c \u2066x\u2069 \u200f\u061c",
    "\x1bP1$r\x1b\\ \x1b_G\x1b\\ \x1b^x\x1b\\ \x1bX\x1b\\",
    "\x1b(0 \x1bc \x1b#8 \x1b[?1049h",
    "\u2028\u2029\ufeff\u00ad\U000e0041",
    "cut \x1b",
    "cut \x1b]0;never ended",
)
ALL = "".join(HOSTILE)


def is_harmless(text: str) -> bool:
    """Whether a terminal only prints *text*; line ends of a terminal are \\r\\n."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    text = text.replace("\r\n", "\n")
    return not [c for c in text if unicodedata.category(c) in bad and c not in "\n\t\u200c\u200d"]


@given(
    st.lists(st.text() | st.sampled_from(HOSTILE) | st.sampled_from("\x1b\x9b]\\[0m;"), max_size=9)
)
def test_no_text_gets_through_unclean(parts: list[str]) -> None:
    text = "".join(parts)
    for shown in (clean(text), line(text), visible(text), arguments({text: text})):
        assert is_harmless(shown)
    assert "\n" not in line(text) + visible(text) + arguments({text: [text]})


@given(st.lists(st.integers(0, len(ALL)), max_size=20))
def test_also_in_pieces(cuts: list[int]) -> None:
    marks = [0, *sorted(cuts), len(ALL)]
    assert is_harmless("".join(clean(ALL[a:b]) for a, b in zip(marks, marks[1:], strict=False)))


def test_what_is_no_danger_stays() -> None:
    text = "naïve 日本語 \U0001f468\u200d\U0001f469\u200d\U0001f467 עברית نص\n\tcode\u00a0\u3000"
    assert clean(text) == text
    assert clean("a\x1b[31mred\x1b[0m\x1b]0;title\x07b") == "aredb"


def test_what_is_approved_is_seen_as_it_is() -> None:
    """A person decides about it: what is hidden must show."""
    assert visible("rm \u202etxt.sh\x1b[2K\r\n") == "rm \\u202etxt.sh\\u001b[2K\\r\\n"
    assert "\\u202e" in arguments({"command": "rm \u202etxt"})


@pytest.mark.parametrize(
    "blank", "\u00a0\u2003\u3000\u3164\u2800\ufe0f\u034f\U000e0101\U000e0fff\ue000"
)
def test_no_blank_is_taken_for_a_space_or_for_nothing(blank: str) -> None:
    code = f"\\U{ord(blank):08x}" if blank > "\uffff" else f"\\u{ord(blank):04x}"
    code = f"\\x{ord(blank):02x}" if blank < "\u0100" else code
    assert visible(f"rm{blank}-rf") == f"rm{code}-rf"
    assert visible("naïve 日本語 e\u0301 \U0001f468") == "naïve 日本語 e\u0301 \U0001f468"


@pytest.mark.parametrize("opens", ["\x90", "\x98", "\x9b", "\x9d", "\x1b[", "\x1b]", "\x1bP"])
def test_many_sequences_that_never_end_are_read_once(opens: str) -> None:
    """They were read again from each of them on: hours for what a model says in a second."""
    assert is_harmless(clean(opens * 200_000))


@pytest.mark.live
def test_no_way_to_the_terminal(server: Server) -> None:
    """Model text, tool arguments, questions, options, titles and the transcript of before."""
    sid = f"s-{uuid.uuid4().hex}"
    where = ["--url", server.url, "--session", sid, "--token", token()]
    done = run(*where, f"say {ALL} ok")
    assert "gpj.exe" in done.stdout and is_harmless(done.stdout)
    done = run(*where, f"write {ALL}.txt: {ALL}")
    assert "denied" in done.stderr and is_harmless(done.stderr + done.stdout)
    named = server.client.patch(f"/session/{sid}", json={"title": f"title {ALL}"[:200]})
    assert "\x1b" in named.json()["title"]
    with Terminal(*where) as terminal:
        assert "gpj.exe" in terminal.until(r"\n> $")
        terminal.type(f"write {sid}.txt: harmless\n")
        terminal.until(r"Run it\?.*: ")
        terminal.type("n\n")
        terminal.until("\n> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        # What is typed is echoed as it is.
        assert is_harmless(terminal.shown.replace("^D\x08\x08", ""))
