"""Parts of chunks from a source that gives verified bytes by whole chunks only: neighbours share theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from snapshotd.daemon.source import Piece, Source
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, gather_copy

__all__ = ["read_through_chunks"]

_SPAN_BYTES: Final = 64 * CHUNK_BYTES
"""16 MiB: bounds the scratch memory."""


def read_through_chunks(source: Source, copies: Sequence[Copy], out: memoryview) -> int:
    """Do what Source.read_parts() does, by ``source.read`` of the whole chunks around; in any order of ``copies``."""
    places: list[tuple[int, int]] = []  # of each copy in ``out``
    at = 0
    for copy in copies:
        places.append((at, at + copy.nbytes))
        at += copy.nbytes
    order = sorted(range(len(copies)), key=lambda i: copies[i].src_range)
    fetched = 0
    begin = end = 0
    whole = memoryview(b"")
    for position, i in enumerate(order):
        first, last = _chunks_around(copies[i], source.file_bytes)
        if not begin <= first <= last <= end:
            begin, end = first, last
            for j in order[position + 1 :]:  # those that touch what is fetched anyway
                next_first, next_last = _chunks_around(copies[j], source.file_bytes)
                if next_first > end or max(end, next_last) - begin > _SPAN_BYTES:
                    break
                end = max(end, next_last)
            whole = memoryview(bytearray(end - begin))
            source.read([Piece(begin, whole)])
            fetched += end - begin
        with out[places[i][0] : places[i][1]] as place:
            gather_copy(replace(copies[i], src_begin=copies[i].src_begin - begin), whole, place)
    return fetched


def _chunks_around(copy: Copy, file_bytes: int) -> tuple[int, int]:
    begin, end = copy.src_range
    return begin // CHUNK_BYTES * CHUNK_BYTES, min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, file_bytes)
