"""
Carry out byte-range copies from a source that is not mapped here: few requests, no chunk fetched twice, little memory.

Rule 1: digests are per chunk, so a chunk is the least that can be fetched. Large runs go straight to their place, as
far as they are whole chunks. All else (edges of runs, small tensors, strided blocks) goes through scratch memory, where
neighbours share their chunks.
Rule 2: one request holds at most ``BATCH_BYTES``; a strided block that spans more is cut along its outer dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.sources import Piece, Source
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, apply_copy

__all__ = ["BATCH_BYTES", "gather"]

BATCH_BYTES: Final = 64 * CHUNK_BYTES
"""16 MiB: large enough that the round trip vanishes, small enough for scratch memory per peer."""

_DIRECT_BYTES: Final = 4 * CHUNK_BYTES
"""A run of this size has at least three whole chunks in it: worth a range of its own."""

_SKIP_BYTES: Final = 2 * CHUNK_BYTES
"""Runs that lie further apart are fetched one by one: the chunks between them are not wanted."""


def gather(source: Source, copies: Iterable[Copy], target: memoryview, cancel: threading.Event | None = None) -> int:
    """
    Carry out ``copies`` from ``source`` into ``target`` (from its offset 0 on), and return the bytes fetched.

    The errors of ``source.read``. What is in ``target`` after an error is not to be used.
    """
    direct: list[Piece] = []
    small: list[Copy] = []
    for copy in copies:
        for part in _cut(copy):
            if part.dims or part.run_bytes < _DIRECT_BYTES:
                small.append(part)
            else:
                _split_run(part, target, direct, small)
    nbytes = 0
    for pieces in _batches(direct):
        check_cancel(cancel, "fetching")
        source.read(pieces)
        nbytes += sum(piece.into.nbytes for piece in pieces)
    for spans, group in _covers(small, source.file_bytes):
        check_cancel(cancel, "fetching")
        nbytes += _through_scratch(source, spans, group, target)
    return nbytes


def _split_run(copy: Copy, target: memoryview, direct: list[Piece], small: list[Copy]) -> None:
    """Whole chunks of a long run go straight to their place, what is before and behind them does not."""
    begin, end = copy.src_range
    first, last = -(-begin // CHUNK_BYTES) * CHUNK_BYTES, end // CHUNK_BYTES * CHUNK_BYTES
    shift = copy.dst_begin - begin
    for at in range(first, last, BATCH_BYTES):
        direct.append(Piece(at, target[at + shift : min(at + BATCH_BYTES, last) + shift]))
    for lo, hi in ((begin, first), (last, end)):
        if lo < hi:
            small.append(replace(copy, src_begin=lo, dst_begin=lo + shift, run_bytes=hi - lo))


def _cut(copy: Copy) -> Iterator[Copy]:
    """Yield parts of a strided copy, each of a span that fits into one request and without large gaps inside."""
    begin, end = copy.src_range
    if not copy.dims or (end - begin <= BATCH_BYTES - 2 * CHUNK_BYTES and _largest_gap(copy) <= _SKIP_BYTES):
        yield copy
        return
    (count, src_stride, dst_stride), inner = copy.dims[0], copy.dims[1:]
    one = replace(copy, dims=inner)
    inner_begin, inner_end = one.src_range
    per_cut = max(1, (BATCH_BYTES - 2 * CHUNK_BYTES - (inner_end - inner_begin)) // src_stride + 1)
    if per_cut == 1 or _largest_gap(copy) > _SKIP_BYTES:
        for i in range(count):
            yield from _cut(
                replace(one, src_begin=copy.src_begin + i * src_stride, dst_begin=copy.dst_begin + i * dst_stride)
            )
        return
    for i in range(0, count, per_cut):
        part = min(per_cut, count - i)
        yield replace(
            copy,
            src_begin=copy.src_begin + i * src_stride,
            dst_begin=copy.dst_begin + i * dst_stride,
            dims=((part, src_stride, dst_stride), *inner),
        )


def _largest_gap(copy: Copy) -> int:
    """The largest stretch of the source between two runs."""
    gap, extent = 0, copy.run_bytes
    for count, src_stride, _ in reversed(copy.dims):
        gap = max(gap, src_stride - extent)
        extent += (count - 1) * src_stride
    return gap


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.into.nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.into.nbytes
    if batch:
        yield batch


def _covers(copies: Sequence[Copy], file_bytes: int) -> Iterator[tuple[list[tuple[int, int]], list[Copy]]]:
    """Yield groups of copies with the spans of whole chunks that cover them; each chunk is in one group, mostly."""
    spans: list[tuple[int, int]] = []
    part: list[Copy] = []
    size = 0
    for copy in sorted(copies, key=lambda item: item.src_range):
        begin, end = copy.src_range
        begin = begin // CHUNK_BYTES * CHUNK_BYTES
        end = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, file_bytes)
        more = end - (max(begin, spans[-1][1]) if spans else begin)
        if spans and more > 0 and size + more > BATCH_BYTES:
            yield spans, part
            spans, part, size, more = [], [], 0, end - begin
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
        part.append(copy)
        size += max(more, 0)
    if part:
        yield spans, part


def _through_scratch(
    source: Source, spans: Sequence[tuple[int, int]], copies: Sequence[Copy], target: memoryview
) -> int:
    pieces: list[Piece] = []
    for begin, end in spans:
        pieces.append(Piece(begin, memoryview(bytearray(end - begin))))
    source.read(pieces)
    place = 0
    for copy in copies:  # both are in order of the source
        begin, end = copy.src_range
        while end > pieces[place].end:
            place += 1
        piece = pieces[place]
        apply_copy(replace(copy, src_begin=copy.src_begin - piece.begin), piece.into, target)
    return sum(piece.into.nbytes for piece in pieces)
