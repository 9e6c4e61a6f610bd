"""Folders of the server's own: whoever else is on the machine cannot enter them."""

from __future__ import annotations

from pathlib import Path


def make_private(folder: Path) -> None:
    """Make *folder*, and all above it that is missing, for this user only; one that is there stays.

    ``Path.mkdir(mode, parents=True)`` would make those above it for everybody.
    """
    missing = [one for one in folder.parents if not one.exists()]
    for one in (*reversed(missing), folder):
        one.mkdir(mode=0o700, exist_ok=True)


def open_to_others(folder: Path) -> str | None:
    """What is wrong with the mode of *folder*, and the cure; None if it is private or not there."""
    try:
        mode = folder.stat().st_mode & 0o777
    except OSError:
        return None
    if not mode & 0o077:
        return None
    return f"other users of this machine can enter {folder} ({mode:04o}): chmod 700 {folder}"
