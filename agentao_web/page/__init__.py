"""The chat page: static files, and the headers they go out with. Nothing of a user's is in them."""

from __future__ import annotations

import typing as t
from pathlib import Path

from flask import Response
from flask import request

FOLDER: t.Final = Path(__file__).parent

#: Only these leave the folder; named here, as a machine's own table may lack them.
_TYPES: t.Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
}
#: Those types, by spaces.
KINDS: t.Final = " ".join(dict.fromkeys(_TYPES.values()))
_FILES: t.Final = {
    path.relative_to(FOLDER).as_posix(): path
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in _TYPES
}

#: No script but our files, nothing from elsewhere, no image that is fetched from elsewhere; text
#: becomes HTML only through the sanitizer's own policy.
POLICY: t.Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS: t.Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Asked for each time, and 304 if unchanged: after an update no file is older than the others.
    "Cache-Control": "no-cache",
}


def file(name: str) -> Response | None:
    """The page's file of that name, or 304 if the client has it; None if there is none."""
    path = _FILES.get(name)
    return None if path is None else told(Response(path.read_bytes(), mimetype=_TYPES[path.suffix]))


def told(response: Response) -> Response:
    """*response* as the page is to get it: whole, or 304 if the client has it."""
    response.headers.update(HEADERS)
    # Of the content: the same on every machine, whenever it was installed.
    response.add_etag()
    response.make_conditional(request)
    return response
