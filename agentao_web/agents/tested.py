"""Which versions of Agentao this was tested with: private names of it are used, and a later one may
have changed what they do without changing what they are called.
"""

from __future__ import annotations

import logging
import typing as t

import agentao

#: The releases that all tests were run with.
VERSIONS: t.Final = ("0.5.17",)


def warn_untested(log: logging.Logger, version: str = agentao.__version__) -> None:
    """Say so, in one line, if that *version* is none of them."""
    if version not in VERSIONS:
        log.warning(
            "agentao %s was never tested with this version of agentao-web. If agents misbehave, "
            "run: pip install 'agentao==%s'",
            version,
            VERSIONS[-1],
        )
