"""Files that the daemon gives to be read in a restore, mapped into this process as far as they are read."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

import numpy as np

from snapshotd_client.arrays import Array
from snapshotd_client.slots import open_checked

__all__ = ["WHOLE_BYTES", "ReadableFiles", "populate"]

WHOLE_BYTES: Final = 64 * 1024 * 1024
"""Files up to this size are buffers that are read whole, and more than once: populated when they are mapped."""

_MADV_POPULATE_READ: Final = 22
_libc: Final = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class ReadableFiles:
    """
    Files that the daemon gives to be read, each mapped once; writes to the mappings stay private.

    A path names the same file for ever: a daemon never uses one again, nor does the next daemon.
    """

    def __init__(self) -> None:
        self._files: dict[str, Array] = {}

    def get(self, path: str) -> Array:
        """Return all bytes of the file. AccessDenied, FormatError or OSError if it is not what it should be."""
        found = self._files.get(path)
        if found is None:
            found = self._files[path] = _map_readable(path)
        return found


def populate(part: Array) -> None:
    """
    Have the pages of a contiguous part of a mapping there at once, outside Python's global lock.

    Touching them one by one costs as much as copying them. A kernel before 5.14 knows no such thing: then they are.
    """
    begin = part.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(begin, part.ctypes.data + part.nbytes - begin, _MADV_POPULATE_READ)


def _map_readable(path: str) -> Array:
    fd = open_checked(path, os.O_RDONLY, None)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        found = np.frombuffer(mmap.mmap(fd, size, access=mmap.ACCESS_COPY), dtype=np.uint8)
        if size <= WHOLE_BYTES:
            populate(found)
        return found
    finally:
        os.close(fd)
