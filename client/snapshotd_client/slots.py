"""
Slot files mapped into this process, checked before they are believed, and kept mapped from step to step.

Rule 1: a path from the daemon is opened only if it is a regular file of ours, of exactly the expected size, in a
directory that nobody else can write to.
Rule 2: a mapping lives as long as the layout, and its pages are there before they are written to: first touch of
shared memory costs four copies.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Final

import numpy as np

from snapshotd.errors import AccessDenied, FormatError
from snapshotd.mapping import map_file
from snapshotd_client.arrays import Array

__all__ = ["Mapping", "MappingCache", "open_checked"]

_MAX_MAPPINGS: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """One mapped file: ``bytes`` is all of it."""

    bytes: Array
    identity: tuple[int, int]


class MappingCache:
    """Writable mappings of slots by path; ``clear`` when the layout changes."""

    def __init__(self) -> None:
        self._mappings: dict[str, Mapping] = {}

    def get(self, path: str, file_bytes: int) -> Mapping:
        """Return the mapping of ``path``, the same while it is the same file. AccessDenied, FormatError or OSError."""
        fd = open_checked(path, os.O_RDWR, file_bytes)
        try:
            info = os.fstat(fd)
            identity = (info.st_dev, info.st_ino)
            found = self._mappings.get(path)
            if found is not None and found.identity == identity and found.bytes.nbytes == file_bytes:
                return found
            if len(self._mappings) >= _MAX_MAPPINGS:
                self._mappings.clear()
            mapped = map_file(fd, file_bytes)
        finally:
            os.close(fd)
        mapping = Mapping(bytes=np.frombuffer(mapped, dtype=np.uint8), identity=identity)
        self._mappings[path] = mapping
        return mapping

    def clear(self) -> None:
        self._mappings.clear()

    def __len__(self) -> int:
        return len(self._mappings)


def open_checked(path: str, flags: int, file_bytes: int | None) -> int:
    """Return a descriptor of the file (Rule 1), of any size if ``file_bytes`` is None."""
    folder = os.stat(os.path.dirname(path) or ".")
    if folder.st_mode & 0o022:
        raise AccessDenied(f"the folder of {path} can be written by others: mode {stat.S_IMODE(folder.st_mode):o}")
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            raise AccessDenied(f"{path} is not a regular file of uid {os.geteuid()}")
        if file_bytes is not None and info.st_size != file_bytes:
            raise FormatError(f"{path} has {info.st_size} bytes; {file_bytes} were announced")
    except BaseException:
        os.close(fd)
        raise
    return fd
