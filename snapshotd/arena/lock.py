"""One daemon per arena: the lock file, and the check that a directory is an arena at all."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from snapshotd.errors import UsageError

__all__ = ["FOLDERS", "LOCK_NAME", "take_lock"]

LOCK_NAME: Final = "arena.lock"
FOLDERS: Final = {"slot": "slots", "parity": "parity", "buffer": "buffers"}


def take_lock(root: Path) -> int:
    """Return the descriptor of the held lock file; UsageError when it is held, or when ``root`` is not an arena."""
    path = root / LOCK_NAME
    strangers = sorted(set(os.listdir(root)) - {LOCK_NAME, *FOLDERS.values()})
    if strangers and not path.exists():
        raise UsageError(f"{root} is not empty and not an arena ({strangers[0]!r} is in it); choose another directory")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UsageError(
                f"{root} is in use by another daemon (process {holder or 'unknown'}); stop it or choose another --arena"
            ) from error
        raise UsageError(f"cannot lock {path}: {error.strerror}") from error
    return descriptor
