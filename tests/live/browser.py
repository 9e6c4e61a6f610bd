"""A Chromium without a window, one for each test process."""

from __future__ import annotations

import collections.abc as cabc
import os
import shutil

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import sync_playwright

#: Debian's own, as the Makefile installs it.
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="session")
def chromium() -> cabc.Iterator[Browser]:
    """The browser: Playwright is started once in a process, and never again beside itself."""
    # What runs as root, as in a container, has no sandbox.
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
