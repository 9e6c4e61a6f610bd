"""Text in which paths of the workspace are relative: a client has no use for where it lies."""

from __future__ import annotations


def relative(text: str, workspace: str) -> str:
    """*text* with the paths below *workspace* as they are seen from there."""
    if workspace not in text:
        return text
    return text.replace(workspace + "/", "").replace(workspace, ".")


class Pieces:
    """The same for a text that comes piece by piece: models cut a path wherever they like."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace
        self.held = ""
        """What may be the beginning of a path, and is not shown yet."""

    def add(self, piece: str) -> str:
        """What can be shown now: the beginning of a path waits for the rest of it."""
        text = self.held + piece
        cut = self._certain(text)
        self.held = text[cut:]
        return relative(text[:cut], self._workspace)

    def rest(self) -> str:
        """What was held back, as there is no more."""
        text, self.held = self.held, ""
        return relative(text, self._workspace)

    def _certain(self, text: str) -> int:
        """Up to where *text* is not the beginning of a path."""
        here, after = self._workspace, 0
        while (at := text.find(here, after)) >= 0:
            after = at + len(here)
            if after == len(text):
                return at  # A slash may follow.
            after += text[after] == "/"
        # From the left, as the longest beginning counts. Most pieces have no slash in them.
        at = text.find("/", max(after, len(text) - len(here) + 1))
        while at >= 0:
            if here.startswith(text[at:]):
                return at
            at = text.find("/", at + 1)
        return len(text)
