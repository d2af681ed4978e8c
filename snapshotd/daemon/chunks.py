"""Parts of chunks from a source that gives verified bytes by whole chunks only: neighbours share theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from snapshotd.daemon.source import Source
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, apply_copy
from snapshotd.transfer import Piece

__all__ = ["read_through_chunks"]

_SPAN_BYTES: Final = 128 * CHUNK_BYTES
"""16 MiB: bounds the scratch memory."""


def read_through_chunks(source: Source, copies: Sequence[Copy], targets: Sequence[memoryview]) -> int:
    """Carry out ``copies`` by ``source.read`` of the whole chunks around them; return the bytes fetched."""
    ordered = sorted(copies, key=lambda copy: copy.src_range)
    fetched = 0
    begin = end = 0
    whole = memoryview(b"")
    for position, copy in enumerate(ordered):
        first, last = _chunks_around(copy, source.file_bytes)
        if not begin <= first <= last <= end:
            begin, end = first, last
            for other in ordered[position + 1 :]:  # those that touch what is fetched anyway
                next_first, next_last = _chunks_around(other, source.file_bytes)
                if next_first > end or max(end, next_last) - begin > _SPAN_BYTES:
                    break
                end = max(end, next_last)
            whole = memoryview(bytearray(end - begin))
            fetched += source.read([Piece(begin, whole)])
        apply_copy(copy._replace(src_begin=copy.src_begin - begin), whole, targets[copy.target])
    return fetched


def _chunks_around(copy: Copy, file_bytes: int) -> tuple[int, int]:
    begin, end = copy.src_range
    return begin // CHUNK_BYTES * CHUNK_BYTES, min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, file_bytes)
