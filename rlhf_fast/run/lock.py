# SPDX-License-Identifier: Apache-2.0
"""One run in a folder at a time: an advisory lock on a file, released when this process ends."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import IO

from rlhf_fast.errors import UserError

_held: dict[Path, IO[bytes]] = {}


def lock(file: Path) -> None:
    """Lock an existing file; UserError if another process has locked it. Locking it again here does nothing."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    key = file.resolve()
    if key in _held:
        return
    handle = file.open("rb")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"another process uses the run folder {file.parent}; wait for it, or name another with --output-dir"
            ) from None
        return  # a network file system without locks
    _held[key] = handle


def unlock(file: Path) -> None:
    """Release the lock, if this process holds it."""
    with contextlib.suppress(KeyError):
        _held.pop(file.resolve()).close()
