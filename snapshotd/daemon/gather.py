"""
Carry out byte-range copies from a source that is not mapped here: few requests, little memory, nothing fetched that is
not wanted.

Rule 1: whole chunks of what follows each other in the source are read as such.
Rule 2: all else (edges, small tensors far from others, strided blocks) is read as parts of chunks.
Rule 3: both in one request, unless there are very many parts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.source import Piece, Source
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, cut_copy
from snapshotd.transfer import BLOCK_BYTES_MAX, BLOCKS_MAX, RANGES_MAX

__all__ = ["BATCH_BYTES", "gather"]

BATCH_BYTES: Final = 64 * CHUNK_BYTES
"""16 MiB of parts in one request: as much as a worker asks for at once."""


def gather(source: Source, copies: Iterable[Copy], target: memoryview, cancel: threading.Event | None = None) -> int:
    """
    Carry out ``copies`` from ``source`` into ``target`` (from its offset 0 on), and return the bytes fetched.

    The errors of ``source.read``. What is in ``target`` after an error is not to be used.
    """
    runs: list[Copy] = []
    small: list[Copy] = []
    for copy in copies:
        if copy.dims:
            small.append(copy)
        else:
            runs.append(copy)
    direct: list[Piece] = []
    for span in _spans(sorted(runs, key=lambda copy: copy.src_begin)):
        _split(span, source.file_bytes, target, direct, small)
    parts = [part for copy in small for part in cut_copy(copy, BLOCK_BYTES_MAX)]
    batches = list(_batches(sorted(parts, key=lambda copy: copy.src_begin)))
    nbytes = 0
    for first in range(0, len(direct), RANGES_MAX):
        check_cancel(cancel, "fetching")
        some = direct[first : first + RANGES_MAX]
        nbytes += source.read(some, batches.pop() if batches else (), target)
    for batch in batches:
        check_cancel(cancel, "fetching")
        nbytes += source.read([], batch, target)
    return nbytes


def _spans(runs: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Yield runs that follow each other in the source, wherever they go, as one."""
    span: list[Copy] = []
    for run in runs:
        if span and span[-1].src_range[1] != run.src_begin:
            yield span
            span = []
        span.append(run)
    if span:
        yield span


def _split(span: list[Copy], file_bytes: int, target: memoryview, direct: list[Piece], small: list[Copy]) -> None:
    """The whole chunks of a span go straight to their places; what is before and behind them are parts of chunks."""
    begin, end = span[0].src_begin, span[-1].src_range[1]
    first = -(-begin // CHUNK_BYTES) * CHUNK_BYTES
    last = end if end == file_bytes else end // CHUNK_BYTES * CHUNK_BYTES
    if first >= last:
        small += span
        return
    for run in span:
        for lo, hi, whole in ((begin, first, False), (first, last, True), (last, end, False)):
            lo, hi = max(lo, run.src_begin), min(hi, run.src_range[1])
            if lo >= hi:
                continue
            place = run.dst_begin + lo - run.src_begin
            if whole:
                direct.append(Piece(lo, target[place : place + hi - lo]))
            else:
                small.append(run._replace(src_begin=lo, dst_begin=place, run_bytes=hi - lo))


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
