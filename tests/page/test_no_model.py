"""The page of a server without a model: it says so, and keeps what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.live.harness import Server
from tests.page.conftest import Opened

pytestmark = pytest.mark.live


def test_it_says_in_words_that_there_is_no_model(browse: Opened, tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        tab = browse(at=server)
        tab.allowed.append("503")
        tab.open()
        tab.say("How are you?")
        expect(tab.turn()).to_contain_text("No model is set up on this server")
        tab.button("Edit").click()
        expect(tab.box).to_have_value("How are you?")
