"""
Copies by streaming stores: past the caches, and so at half as much again of the speed.

An ordinary store reads the line that it is going to write, and drives out of the caches what training had there. Of a
state that is copied at each step, and much larger than any cache, nothing is found there the next time anyway. With
streaming stores two bytes pass over the memory bus for each byte copied, instead of three. What Python programs copy
with (memcpy, torch) uses them above hundreds of megabytes a piece, or never. ISA-L does, for a row of bytes times one
element of GF(2^8); times 1 that is a copy.

Rule 1: nothing is copied so before this process has seen it copy every byte right.
Rule 2: both sides begin at multiples of ALIGN_BYTES, and so many bytes are copied: other addresses end the process.
Rule 3: they are tried against ordinary copies again and again (Trials). Only one processor was
measured: on others one core alone may be faster without them.
Rule 4: what was copied is there for others once they hear of it. Streaming stores are seen late, but whoever tells
takes a lock for it, which waits for them (Intel SDM 3A, "Methods of Caching Available"; AMD APM 2, "Write Combining").
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from snapshotd.isal import isal_paths, load_isal

__all__ = ["ALIGN_BYTES", "MAX_BYTES", "Stream", "Trials", "find_stream"]

ALIGN_BYTES: Final = 32
MAX_BYTES: Final = 1 << 30
"""ISA-L counts in C int."""

_MACHINES: Final = ("x86_64", "AMD64")
"""Elsewhere ISA-L has ordinary stores for it."""

_TEST_BYTES: Final = 8192

_TRIES: Final = 3
_AGAIN: Final = 64
"""Copies until the slower way is tried once more."""

_SOON: Final = 8
"""The same where streaming stores were given up; twice as many each time that they are again."""

_FORGIVEN: Final = 1
"""So often in a row they may be given up: a machine that others share stands still for 20 ms now and then."""

_FADES: Final = 1.02
"""Fast copies of either way count for less with each later one: training may take more of the machine by then."""

_PATIENCE: Final = 2.5
"""How many times as long as the best a try may take."""

Stream = Callable[[int, int, int], None]
"""``stream(target, source, nbytes)``, both addresses; without the GIL. ValueError for what is not aligned."""


@cache
def find_stream() -> Stream | None:
    """Return what copies by streaming stores here; None where nothing does."""
    if platform.machine() not in _MACHINES:
        return None
    try:
        stream = _by_isal(load_isal(isal_paths())[1])
    except (OSError, AttributeError):
        return None
    return stream if _copies_right(stream) else None


class Trials:
    """
    Which way the next copy takes, with streaming stores or without: the one that is faster here, by what was measured
    while training went on. Paces are seconds per byte.
    """

    def __init__(self) -> None:
        self._paces = {False: math.inf, True: math.inf}
        self._count = 0
        self._due, self._pause = _AGAIN, _SOON
        self._waits = 0  # in a row

    def patience(self) -> float | None:
        """Return the pace above which streaming stores are given up in this copy; None: they are not used in it."""
        streams = self._next()
        return min(self._paces.values()) * _PATIENCE if streams else None

    def ended(self, *, streamed: bool, pace: float, waited: bool) -> None:
        """A copy has ended; ``waited``: streaming stores were given up in it."""
        self._paces = {way: best * _FADES for way, best in self._paces.items()}
        self._paces[streamed] = min(pace, self._paces[streamed])
        if waited:
            self._waits += 1
        elif streamed:
            self._waits, self._pause = 0, _SOON
        if waited and self._waits > _FORGIVEN:
            self._paces[True] = pace
            self._due = self._count + self._pause
            self._pause = min(2 * self._pause, _AGAIN)

    def _next(self) -> bool:
        count, self._count = self._count, self._count + 1
        if count < 2 * _TRIES:
            return count % 2 == 1  # so that there is a pace to be compared with from the first try on
        faster = self._paces[True] <= self._paces[False]
        if count < self._due:
            return faster
        self._due = count + _AGAIN
        self._paces[not faster] = math.inf
        return not faster


def _by_isal(library: ctypes.CDLL) -> Stream:
    """AttributeError where the library lacks the functions."""
    table = ctypes.create_string_buffer(32)
    library.gf_vect_mul_init.argtypes = (ctypes.c_ubyte, ctypes.c_void_p)
    library.gf_vect_mul_init.restype = None
    library.gf_vect_mul_init(1, table)
    multiply: Any = library.gf_vect_mul
    multiply.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    multiply.restype = ctypes.c_int

    def stream(target: int, source: int, nbytes: int) -> None:
        if (target | source | nbytes) % ALIGN_BYTES or not 0 < nbytes <= MAX_BYTES:
            raise ValueError(f"{nbytes} bytes from {source:#x} to {target:#x} cannot be copied by streaming stores")
        if multiply(nbytes, table, source, target):
            raise ValueError(f"ISA-L does not copy {nbytes} bytes")

    return stream


def _copies_right(stream: Stream) -> bool:
    """Whether all values of a byte arrive in all places of a word, and nothing beside them is touched."""
    room = np.zeros(3 * _TEST_BYTES, np.uint8)
    begin = -room.ctypes.data % ALIGN_BYTES
    source, target = room[begin:][:_TEST_BYTES], room[begin + _TEST_BYTES :][: _TEST_BYTES + ALIGN_BYTES]
    source[:] = np.arange(_TEST_BYTES) % 251 + np.arange(_TEST_BYTES) // 251 % 6
    try:
        stream(target.ctypes.data, source.ctypes.data, _TEST_BYTES)
    except ValueError:
        return False
    return bool(np.array_equal(target[:_TEST_BYTES], source) and not target[_TEST_BYTES:].any())
