"""
Shared memory from files, mapped with all of its pages there, in huge pages where the kernel has some.

Rule 1: a mapping is populated in one system call, outside Python's global lock: touching pages one by one costs twice
the time, and who holds the lock for a second stands still, or looks dead to its peers.
Rule 2: new memory is asked for in huge pages (MADV_COLLAPSE, Linux 6.1; no setting of the machine is needed for it, and
only "deny" forbids it). What the kernel does not give so is there in small ones. See docs/adr/0012.
Rule 3: a mapping begins at a multiple of a huge page, as its file does: else no process could map one as a whole.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from typing import Final

__all__ = ["HUGE_BYTES", "map_file", "map_new_file"]

HUGE_BYTES: Final = 1 << 21
"""A huge page of x86-64, and of other machines with pages of 4 KiB; elsewhere mappings begin at a round address."""

_BATCH_BYTES: Final = 32 * HUGE_BYTES
_SLOW_S: Final = 1.0
"""So long for a batch, some twenty times what small pages take, means that memory is moved to make room for each."""

_POPULATE_WRITE: Final = 23  # Linux 5.14; Python's mmap.madvise would hold the global lock
_COLLAPSE: Final = 25
_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FIXED: Final = 0x10
_BOTH: Final = mmap.PROT_READ | mmap.PROT_WRITE
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong)
_libc.mmap.restype = ctypes.c_void_p


def map_file(descriptor: int, nbytes: int) -> memoryview:
    """
    Return ``nbytes`` (at least 1) of the file, shared, writable and populated.

    The mapping ends with the last view of it. OSError when there is no memory.
    """
    return _populated(_map(descriptor, nbytes), descriptor)


def map_new_file(descriptor: int, nbytes: int) -> memoryview:
    """
    Give an empty file ``nbytes`` (at least 1) of zeros, all of them allocated, and return them as `map_file` does.

    OSError (ENOSPC and the like) when there is no memory for them.
    """
    room = os.fstatvfs(descriptor)
    if room.f_blocks and nbytes > room.f_bavail * room.f_frsize:  # before all that there is has been taken for it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, nbytes)
    view = _map(descriptor, nbytes)
    _ask_for_huge_pages(view, descriptor)
    os.posix_fallocate(descriptor, 0, nbytes)
    return _populated(view, descriptor)


def _ask_for_huge_pages(view: memoryview, descriptor: int) -> None:
    """Fill an empty file with huge pages from its beginning on, until the kernel has none that is quickly to be had."""
    end = view.nbytes // HUGE_BYTES * HUGE_BYTES
    for begin in range(0, end, _BATCH_BYTES):
        began = time.monotonic()
        stop = min(begin + _BATCH_BYTES, end)
        for at in range(begin, stop, HUGE_BYTES):
            # Where there is no page at all the kernel takes the file for one that is being cut.
            os.pwrite(descriptor, b"\0", at)
        with view[begin:stop] as part:
            if _advise(part, _COLLAPSE) or time.monotonic() - began > _SLOW_S:
                return


def _map(descriptor: int, nbytes: int) -> memoryview:
    """Map the file, at a multiple of a huge page if it is as long as one."""
    if nbytes < HUGE_BYTES:
        return memoryview(mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=_BOTH))
    # Addresses alone, which end with the last view of them; the file then lies over a part of them.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    around = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=private, prot=_BOTH)
    before = -_address(around) % HUGE_BYTES
    view = memoryview(around)[before : before + nbytes]
    _map_over(view, descriptor, 0)
    return view


def _map_over(view: memoryview, descriptor: int, flags: int) -> None:
    """Let the file lie where ``view`` is, in place of what lies there."""
    begin = _address(view)
    if _libc.mmap(begin, view.nbytes, _BOTH, mmap.MAP_SHARED | _FIXED | flags, descriptor, 0) != begin:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _populated(view: memoryview, descriptor: int) -> memoryview:
    code = _advise(view, _POPULATE_WRITE)
    if code == errno.EINVAL:  # an older kernel, which would not say when there is no memory
        _map_over(view, descriptor, mmap.MAP_POPULATE)
    elif code:
        raise OSError(code, os.strerror(code))
    return view


def _advise(view: memoryview, advice: int) -> int:
    """Call madvise on a mapping, without the global lock; returns an errno, or 0."""
    failed = _libc.madvise(_address(view), view.nbytes, advice)
    return ctypes.get_errno() if failed else 0


def _address(view: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
