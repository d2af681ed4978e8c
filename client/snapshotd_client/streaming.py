"""
Copies by streaming stores: past the caches, and so at half as much again of the speed.

An ordinary store reads the line that it is going to write, and drives out of the caches what training had there. Of a
state that is copied at each step, and much larger than any cache, nothing is found there the next time anyway. With
streaming stores two bytes pass over the memory bus for each byte copied, instead of three. What Python programs copy
with (memcpy, torch) uses them above hundreds of megabytes a piece, or never. Two libraries that are there do:

- ISA-L, for a row of bytes times one element of GF(2^8); times 1 that is a copy.
- MKL, which torch has in it for x86-64, for a matrix times a number (mkl_?omatcopy); times 1 that is a copy.

Rule 1: nothing is copied so before this process has seen it copy every byte right, of numbers, too, that arithmetic
would change: quiet what signals, flush what is subnormal.
Rule 2: both sides begin at multiples of ALIGN_BYTES, and so many bytes are copied: with other addresses ISA-L ends the
process.
Rule 3: which way is the fastest depends on the processor: they are tried against ordinary copies, again and again
(Trials).
Rule 4: what was copied is there for others once they hear of it. Streaming stores are seen late, but whoever tells
takes a lock for it, which waits for them (Intel SDM 3A, "Methods of Caching Available"; AMD APM 2, "Write Combining").
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import platform
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np

from snapshotd.isal import isal_paths, load_isal
from snapshotd_client.libraries import loaded

__all__ = ["ALIGN_BYTES", "MAX_BYTES", "Stream", "Trials", "Way", "find_streams"]

ALIGN_BYTES: Final = 32
MAX_BYTES: Final = 1 << 30
"""ISA-L counts in C int."""

_MACHINES: Final = ("x86_64", "AMD64")
"""Elsewhere ISA-L has ordinary stores for it."""

_TEST_BYTES: Final = (8192, 4 << 20)
"""What is small may be copied otherwise."""

_UNEVEN: Final = np.array([0x7FF0000000000001, 0xFFF4000000000000, 1, 0x8000000000000001], np.uint64)
"""Numbers that signal, and subnormal ones."""

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
def find_streams() -> tuple[Stream, ...]:
    """Return what copies by streaming stores here, each its own way; none where nothing does."""
    if platform.machine() not in _MACHINES:
        return ()
    return tuple(stream for make in (_by_isal, _by_mkl) if (stream := make()) and _copies_right(stream))


class Way(NamedTuple):
    """
    How to copy: way 0 is without streaming stores, the others are by those that find_streams() returns, in this order.

    ``patience`` is the pace above which streaming stores are given up in this copy.
    """

    number: int
    patience: float


class Trials:
    """
    Which way the next copy takes: the one that is the fastest here, by what was measured while training went on. Paces
    are seconds per byte.
    """

    def __init__(self, streams: int) -> None:
        self._paces = [math.inf] * (1 + streams)
        self._count = 0
        self._due, self._pause = _AGAIN, _SOON
        self._next_try = 0
        self._waits = 0  # in a row

    def way(self) -> Way:
        """Return the way of the next copy."""
        return Way(self._choose(), min(self._paces) * _PATIENCE)

    def ended(self, way: Way, *, pace: float, waited: bool) -> None:
        """A copy has ended; ``waited``: streaming stores were given up in it."""
        paces = self._paces = [best * _FADES for best in self._paces]
        paces[way.number] = min(pace, paces[way.number])
        if waited:
            self._waits += 1
        elif way.number:
            self._waits, self._pause = 0, _SOON
        if waited and self._waits > _FORGIVEN:
            paces[1:] = [math.inf] * (len(paces) - 1)  # it is the lock that takes time, whoever asks for it
            self._due = self._count + self._pause
            self._pause = min(2 * self._pause, _AGAIN)

    def _choose(self) -> int:
        count, self._count = self._count, self._count + 1
        if count < _TRIES * len(self._paces):
            return count % len(self._paces)  # so that there is a pace to be compared with from the second try on
        fastest = min(range(len(self._paces)), key=self._paces.__getitem__)
        if count < self._due or len(self._paces) == 1:
            return fastest
        self._due = count + _AGAIN
        others = [number for number in range(len(self._paces)) if number != fastest]
        tried = others[self._next_try % len(others)]
        self._next_try += 1
        self._paces[tried] = math.inf
        return tried


def _by_isal() -> Stream | None:
    try:
        library = load_isal(isal_paths())[1]
        multiply: Any = library.gf_vect_mul
        fill = library.gf_vect_mul_init
    except (OSError, AttributeError):
        return None
    table = ctypes.create_string_buffer(32)
    fill.argtypes = (ctypes.c_ubyte, ctypes.c_void_p)
    fill.restype = None
    fill(1, table)
    multiply.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    multiply.restype = ctypes.c_int

    def stream(target: int, source: int, nbytes: int) -> None:
        _check(target, source, nbytes)
        if multiply(nbytes, table, source, target):
            raise ValueError(f"ISA-L does not copy {nbytes} bytes")

    return stream


def _by_mkl() -> Stream | None:
    for library in loaded("libtorch_cpu"):
        with contextlib.suppress(AttributeError):
            return _mkl_stream(library.MKL_Domatcopy)
    return None


def _mkl_stream(copy: Any) -> Stream:
    """A matrix of one row, as doubles: copied by the row (R), not transposed (N)."""
    size, letter, address = ctypes.c_size_t, ctypes.c_char, ctypes.c_void_p
    copy.argtypes = (letter, letter, size, size, ctypes.c_double, address, size, address, size)
    copy.restype = None

    def stream(target: int, source: int, nbytes: int) -> None:
        _check(target, source, nbytes)
        count = nbytes // 8
        copy(b"R", b"N", 1, count, 1.0, source, count, target, count)

    return stream


def _check(target: int, source: int, nbytes: int) -> None:
    if (target | source | nbytes) % ALIGN_BYTES or not 0 < nbytes <= MAX_BYTES:
        raise ValueError(f"{nbytes} bytes from {source:#x} to {target:#x} cannot be copied by streaming stores")


def _copies_right(stream: Stream) -> bool:
    return all(_copies_all(stream, nbytes) for nbytes in _TEST_BYTES)


def _copies_all(stream: Stream, nbytes: int) -> bool:
    """
    Whether all values of a byte arrive in all places of a word, and nothing beside them is touched.

    Not in memory of malloc's: what is given back to it would change which memory it keeps from then on.
    """
    room = np.frombuffer(mmap.mmap(-1, 2 * nbytes + ALIGN_BYTES), np.uint64)
    source, target, beside = np.split(room, (nbytes // 8, nbytes // 4))
    rows = source.reshape(-1, 512)
    rows[:, :256] = np.arange(256, dtype=np.uint64) * np.uint64(0x0101010101010101)
    rows[:, 256 : 256 + len(_UNEVEN)] = _UNEVEN
    rows[:, -1] = np.arange(len(rows))
    try:
        stream(target.ctypes.data, source.ctypes.data, nbytes)
    except ValueError:
        return False
    arrived = all(map(np.array_equal, target.reshape(-1, 512), rows))  # row by row: no array as large as they are
    return arrived and not beside.any()
