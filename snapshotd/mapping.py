"""
Shared memory from files, mapped with all of its pages there.

A mapping is populated in one system call, outside Python's global lock: touching pages one by one costs twice the time,
and who holds the lock for a second stands still, or looks dead to its peers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

__all__ = ["map_file"]

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python's mmap.madvise would hold the global lock
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


def map_file(descriptor: int, nbytes: int) -> mmap.mmap:
    """Return ``nbytes`` (at least 1) of the file, shared, writable and populated."""
    mapping = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    first = ctypes.c_char.from_buffer(mapping)
    failed = _libc.madvise(ctypes.addressof(first), nbytes, _MADV_POPULATE_WRITE)
    code = ctypes.get_errno()
    del first
    if not failed:
        return mapping
    mapping.close()
    if code != errno.EINVAL:
        raise OSError(code, os.strerror(code))
    # An older kernel. The same, with the global lock held.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return mmap.mmap(descriptor, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
