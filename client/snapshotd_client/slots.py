"""
Slot files mapped into this process, checked before they are believed, and kept mapped from step to step.

Rule 1: a path from the daemon is opened only if it is a regular file of ours, of exactly the expected size, in a
directory that nobody else can write to.
Rule 2: a mapping and its views live as long as the layout. First touch of shared memory costs four copies (it is
populated by the daemon; MAP_POPULATE maps its pages in one go).
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from snapshotd.errors import AccessDenied, FormatError
from snapshotd_client.arrays import Array

__all__ = ["Mapping", "MappingCache", "open_checked"]

_MAX_MAPPINGS: Final = 16


@dataclass(slots=True, eq=False)
class Mapping:
    """One mapped file: ``bytes`` is all of it, ``views`` what its user has cut it into; ``pinned``: see device."""

    path: str
    bytes: Array
    identity: tuple[int, int]
    views: list[Array] = field(default_factory=list)
    pinned: bool = False


class MappingCache:
    """Writable mappings of slots by path; ``clear`` when the layout changes."""

    def __init__(self) -> None:
        self._mappings: dict[str, Mapping] = {}

    def get(self, path: str, file_bytes: int) -> tuple[Mapping, bool]:
        """Return the mapping of ``path`` and whether it is new. AccessDenied, FormatError or OSError if not."""
        fd = open_checked(path, os.O_RDWR, file_bytes)
        try:
            info = os.fstat(fd)
            identity = (info.st_dev, info.st_ino)
            found = self._mappings.get(path)
            if found is not None and found.identity == identity and found.bytes.nbytes == file_bytes:
                return found, False
            if len(self._mappings) >= _MAX_MAPPINGS:
                self._mappings.clear()
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            mapped = mmap.mmap(fd, file_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        mapping = Mapping(path=path, bytes=np.frombuffer(mapped, dtype=np.uint8), identity=identity)
        self._mappings[path] = mapping
        return mapping, True

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
