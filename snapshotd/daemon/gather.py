"""
Carry out byte-range copies from a source that is not mapped here: few requests, little memory, nothing fetched that is
not wanted.

Rule 1: whole chunks of long runs go straight to their place, all of them in one request.
Rule 2: all else (edges of runs, small tensors, strided blocks) goes through scratch memory of at most ``BATCH_BYTES``,
as parts of chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.source import Piece, Source
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, cut_copy, scatter_copies
from snapshotd.transfer import BLOCK_BYTES_MAX, BLOCKS_MAX, RANGES_MAX

__all__ = ["BATCH_BYTES", "gather"]

BATCH_BYTES: Final = 32 * CHUNK_BYTES
"""8 MiB: large enough that the round trip vanishes, small enough for the cache."""

_DIRECT_BYTES: Final = 2 * CHUNK_BYTES
"""A run of this size has at least one whole chunk in it: worth a range of its own."""


def gather(source: Source, copies: Iterable[Copy], target: memoryview, cancel: threading.Event | None = None) -> int:
    """
    Carry out ``copies`` from ``source`` into ``target`` (from its offset 0 on), and return the bytes fetched.

    The errors of ``source.read``. What is in ``target`` after an error is not to be used.
    """
    direct: list[Piece] = []
    small: list[Copy] = []
    for copy in copies:
        if copy.dims or copy.run_bytes < _DIRECT_BYTES:
            small += cut_copy(copy, BLOCK_BYTES_MAX)
        else:
            _split_run(copy, target, direct, small)
    direct.sort(key=lambda piece: piece.begin)
    for first in range(0, len(direct), RANGES_MAX):
        source.read(direct[first : first + RANGES_MAX])
    nbytes = sum(piece.into.nbytes for piece in direct)
    small.sort(key=lambda copy: copy.src_begin)
    for batch in _batches(small):
        check_cancel(cancel, "fetching")
        with memoryview(bytearray(sum(copy.nbytes for copy in batch))) as scratch:
            nbytes += source.read_parts(batch, scratch)
            scatter_copies(batch, scratch, target)
    return nbytes


def _split_run(copy: Copy, target: memoryview, direct: list[Piece], small: list[Copy]) -> None:
    """Whole chunks of a long run go straight to their place, what is before and behind them does not."""
    begin, end = copy.src_range
    first, last = -(-begin // CHUNK_BYTES) * CHUNK_BYTES, end // CHUNK_BYTES * CHUNK_BYTES
    shift = copy.dst_begin - begin
    direct.append(Piece(first, target[first + shift : last + shift]))
    for lo, hi in ((begin, first), (last, end)):
        if lo < hi:
            small.append(replace(copy, src_begin=lo, dst_begin=lo + shift, run_bytes=hi - lo))


def _batches(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    batch: list[Copy] = []
    size = 0
    for copy in copies:
        if batch and (size + copy.nbytes > BATCH_BYTES or len(batch) == BLOCKS_MAX):
            yield batch
            batch, size = [], 0
        batch.append(copy)
        size += copy.nbytes
    if batch:
        yield batch
