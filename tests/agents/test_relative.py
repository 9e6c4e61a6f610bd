"""Paths of the workspace are relative in what is shown, however the text is cut."""

from __future__ import annotations

import pytest

from agentao_web.agents.relative import Pieces
from agentao_web.agents.relative import relative

HERE = "/srv/w/w/ab"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {HERE}/a.txt", "see a.txt"),
        (f"in {HERE}", "in ."),
        (f"{HERE}/{HERE}/x or {HERE} {HERE}", "x or . ."),
        (f"{HERE}c/d", ".c/d"),
        ("/srv/w/w/w/ab/x", "/srv/w/w/w/ab/x"),
        (f"/srv/w{HERE}/x", "/srv/wx"),
        (f"//{HERE}//y", "///y"),
        ("either/or /", "either/or /"),
        (HERE[:-1], HERE[:-1]),
        ("é/🙂/srv", "é/🙂/srv"),
        ("", ""),
    ],
)
def test_it_is_the_same_wherever_it_is_cut(text: str, shown: str) -> None:
    assert relative(text, HERE) == shown
    for size in range(1, len(text) + 1):
        pieces = Pieces(HERE)
        bits = [text[at : at + size] for at in range(0, len(text), size)]
        assert "".join([*map(pieces.add, bits), pieces.rest()]) == shown
        assert pieces.rest() == ""


def test_only_what_may_be_a_path_waits() -> None:
    pieces = Pieces(HERE)
    assert [pieces.add(bit) for bit in ("a/b ", "/", "x", " /srv", "/w", "/no")] == [
        *("a/b ", "", "/x", " ", "", "/srv/w/no")
    ]
