"""
What C does for us, where it was compiled and the processor has AVX2: copies and digests of chunks (copy_digest.c).

Rule 1: whoever asks for it has another way, slower, with the same results: ``kernels()`` may be None.
Rule 2: nothing is believed before this process has seen it copy and digest right.
Rule 3: addresses go in, and no call keeps one; who calls keeps the memory alive. The interpreter's lock is let go of.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import random
import struct
from functools import cache
from pathlib import Path
from typing import Any, Final

import xxhash

__all__ = ["ALIGN_BYTES", "CHUNK_BYTES", "RUN_WORDS", "Kernels", "kernels"]

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 128 * 1024
"""That copy_digest.c is compiled for."""

RUN_WORDS: Final = 4
"""64-bit words of a run: the address where its chunks go, that where their digests go, that of its segments, chunks."""

ALIGN_BYTES: Final = 64
"""Targets begin at multiples of it: with other addresses the process ends."""

_LIBRARY: Final = Path(__file__).with_name("copy_digest.so")
_TESTED_CHUNKS: Final = 7
"""Some that go side by side, some alone, and one that is gathered."""


class Kernels:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        word, address = ctypes.c_size_t, ctypes.c_void_p
        self._copy_digest, self._digest = library.snapshotd_copy_digest, library.snapshotd_digest
        self._copy_digest.argtypes, self._copy_digest.restype = (address, word), None
        self._digest.argtypes, self._digest.restype = (address, word, address), None

    def copy_digest(self, runs: int, count: int) -> None:
        """
        Copy ``count`` runs, and digest their chunks; ``runs`` is where they lie, RUN_WORDS each.

        A run is chunks that lie one behind the other in the target, from a multiple of ALIGN_BYTES on. Its segments
        (two words each: address, bytes) have exactly their bytes; none is empty. Sources and targets do not overlap.
        """
        self._copy_digest(runs, count)

    def digest(self, view: memoryview) -> bytes:
        """Return the digests of the whole chunks that ``view`` has: 8 bytes each, little-endian."""
        import numpy as np  # here: who digests nothing need not wait for it

        chunks = view.nbytes // CHUNK_BYTES
        digests = np.empty(chunks, np.uint64)
        self._digest(_address(np.frombuffer(view, np.uint8)), chunks, _address(digests))
        return digests.tobytes()


@cache
def kernels() -> Kernels | None:
    """Return what was compiled for this machine, tested; None where there is nothing, or it does not work here."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        if not library.snapshotd_is_supported():
            log.info("copies and digests are separate: this processor lacks AVX2")
            return None
        found = Kernels(library)
    except (OSError, AttributeError) as error:
        log.warning(
            "snapshotd was installed where no C compiler worked: copies and digests take longer than they need (%s)",
            error,
        )
        return None
    if not _is_right(found):
        log.warning("%s does not copy and digest right on this machine; it is not used", _LIBRARY)
        return None
    return found


def _is_right(found: Kernels) -> bool:
    """Not in memory of malloc's: what is given back to it would change which memory it keeps from then on."""
    nbytes = _TESTED_CHUNKS * CHUNK_BYTES
    with mmap.mmap(-1, 2 * nbytes) as room:
        values = random.Random(1)
        for at in range(0, nbytes, 4096):
            room[at : at + 4096] = values.randbytes(4096)
        begin = ctypes.addressof(anchor := ctypes.c_char.from_buffer(room))
        del anchor
        split = CHUNK_BYTES + 64  # into the second chunk
        segments = (ctypes.c_uint64 * 4)(begin, split, begin + split, nbytes - split)
        digests = (ctypes.c_uint64 * _TESTED_CHUNKS)()
        run = (ctypes.c_uint64 * RUN_WORDS)(
            begin + nbytes, ctypes.addressof(digests), ctypes.addressof(segments), _TESTED_CHUNKS
        )
        found.copy_digest(ctypes.addressof(run), 1)
        with memoryview(room) as view:
            expected = b"".join(
                struct.pack("<Q", xxhash.xxh3_64_intdigest(view[at : at + CHUNK_BYTES]))
                for at in range(0, nbytes, CHUNK_BYTES)
            )
            with view[:nbytes] as source, view[nbytes:] as target:
                return source == target and bytes(digests) == expected == found.digest(source)


def _address(array: Any) -> int:
    """In a third of the time of ``array.ctypes.data``."""
    address: int = array.__array_interface__["data"][0]
    return address
