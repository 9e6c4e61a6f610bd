"""Removes a folder, whatever was made in it: any depth, any permissions, links of any kind.

Never follows a link and never leaves the folder, also if names are swapped meanwhile: everything
goes by descriptors. Folders within are moved to the top before they are emptied, so neither the
depth of the stack nor the number of descriptors grows with theirs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from agentao_web.agents.quota import opened

#: How often what came in the meantime is removed too.
_ROUNDS = 8


def remove_folder(path: Path) -> None:
    """Remove *path* and all below it; harmless if it is not there.

    What cannot be removed does not keep the rest: OSError, the first there was, comes at the end.
    """
    with contextlib.ExitStack() as stack:
        try:
            parent = opened(os.fspath(path.parent))
            stack.callback(os.close, parent)
            top = opened(path.name, parent)
            stack.callback(os.close, top)
        except FileNotFoundError:
            return
        os.fchmod(top, 0o700)
        for _ in range(_ROUNDS):
            failed = _empty(top)
            if failed is not None:
                raise failed
            try:
                os.rmdir(path.name, dir_fd=parent)
                return
            except FileNotFoundError:
                return
            except OSError as exc:
                failed = exc  # Somebody has put something in.
        raise failed or OSError("the folder is in use")


def _empty(top: int) -> OSError | None:
    """Remove all in the folder *top*; the first failure."""
    failed: OSError | None = None
    names = os.listdir(top)
    while names:
        name = names.pop()
        try:
            if not _unlinked(name, top):
                _emptied(name, top, names)
        except OSError as exc:
            failed = failed or exc
    return failed


def _emptied(name: str, top: int, names: list[str]) -> None:
    """Remove the folder *name* of *top*; those in it are moved to *top*, and named in *names*."""
    try:
        folder = opened(name, top)
    except FileNotFoundError:
        return
    failed: OSError | None = None
    try:
        os.fchmod(folder, 0o700)
        for inner in os.listdir(folder):
            try:
                if not _unlinked(inner, folder):
                    names.append(_moved(inner, folder, top))
            except OSError as exc:
                failed = failed or exc
    finally:
        os.close(folder)
    if failed is not None:
        raise failed
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=top)


def _moved(name: str, folder: int, top: int) -> str:
    """The new name in *top* of the folder *name* in *folder*."""
    new = f".{secrets.token_hex(16)}"
    # Its entry for the folder above is written anew, which takes the right to write to it.
    inner = opened(name, folder)
    try:
        os.fchmod(inner, 0o700)
    finally:
        os.close(inner)
    os.rename(name, new, src_dir_fd=folder, dst_dir_fd=top)
    return new


def _unlinked(name: str, folder: int) -> bool:
    """Remove *name* from *folder* unless it is a folder itself; whether it is gone."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        return False
    except PermissionError:
        # macOS says that of a folder.
        if not _is_folder(name, folder):
            raise
        return False
    return True


def _is_folder(name: str, folder: int) -> bool:
    try:
        os.close(opened(name, folder))
    except OSError:
        return False
    return True
