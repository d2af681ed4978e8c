"""
Parts of chunks: strided blocks that the owner of an object verifies, gathers, and sends as one string of bytes.

A digest covers a whole chunk, so whoever wants some rows of a tensor would have to fetch all chunks that these touch.
The owner has them at hand: it verifies them, and only what is wanted travels, with digests of its own for the way.

Rule 1: a request is checked whole before a byte of it is read: numbers, sizes, and how much there is to be verified.
Rule 2: a chunk is verified just before it is sent, so that it is read from memory once. Rot that shows when the answer
has begun is told behind it.
Rule 3: large runs go from one mapping into the other; small and strided ones through a buffer that fits into the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from snapshotd.errors import UsageError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy
from snapshotd.v1.bulk_pb2 import Block

__all__ = [
    "BLOCKS_MAX",
    "BLOCK_BYTES_MAX",
    "blocks_of",
    "check_spread",
    "chunks_of",
    "copies_of",
    "is_direct",
    "portions",
    "whole_inside",
]

BLOCKS_MAX: Final = 4096
BLOCK_BYTES_MAX: Final = 8 * CHUNK_BYTES
_DIRECT_BYTES: Final = 64 * 1024
"""A run of so many bytes is worth a system call of its own."""

_REPEATS_MAX: Final = 16  # numpy has 32 dimensions
_PLACES_MAX: Final = 65_536
_OFFSET_MAX: Final = 1 << 60


def blocks_of(copies: Iterable[Copy]) -> list[Block]:
    """Return what is to be asked for, so that the owner reads as ``copies`` do."""
    return [
        Block(
            begin=copy.src_begin,
            run_bytes=copy.run_bytes,
            repeats=[Block.Repeat(count=count, stride=stride) for count, stride, _ in copy.dims],
        )
        for copy in copies
    ]


def copies_of(blocks: Sequence[Block], file_bytes: int) -> list[Copy]:
    """Return ``blocks`` as copies that only read. UsageError for what cannot be in ``file_bytes``."""
    if len(blocks) > BLOCKS_MAX:
        raise UsageError(f"{len(blocks)} blocks are more than {BLOCKS_MAX}")
    copies: list[Copy] = []
    for block in blocks:
        if len(block.repeats) > _REPEATS_MAX:
            raise UsageError(f"a block of {len(block.repeats)} dimensions has more than {_REPEATS_MAX}")
        dims = tuple((repeat.count, repeat.stride, 0) for repeat in block.repeats)
        numbers = (block.begin, block.run_bytes, *(n for dim in dims for n in dim))
        if not block.run_bytes or not all(dim[0] for dim in dims) or max(numbers) > _OFFSET_MAX:
            raise UsageError("a block has no bytes, or more than can be")
        copy = Copy(source=0, target=0, src_begin=block.begin, dst_begin=0, run_bytes=block.run_bytes, dims=dims)
        if copy.nbytes > BLOCK_BYTES_MAX:
            raise UsageError(f"a block of {copy.nbytes} bytes is larger than {BLOCK_BYTES_MAX}")
        if copy.src_range[1] > file_bytes:
            raise UsageError(f"the block [{block.begin}, {copy.src_range[1]}) is not inside {file_bytes} bytes")
        copies.append(copy)
    return copies


def check_spread(copies: Iterable[Copy]) -> None:
    """Raise UsageError for copies that are scattered over more than 65,536 places."""
    for count, _ in enumerate(place for copy in copies for place in _dense_ranges(copy)):
        if count >= _PLACES_MAX:
            raise UsageError(f"the blocks touch more than {_PLACES_MAX} places")


def chunks_of(copy: Copy) -> Iterator[tuple[int, int]]:
    """Yield the chunks that a copy reads, as (first, behind the last)."""
    for begin, end in _dense_ranges(copy):
        yield begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)


def whole_inside(begin: int, end: int, file_bytes: int) -> tuple[int, int]:
    """
    Return what of a range is whole chunks of a file of ``file_bytes``, as a range; an empty one at its end if none is.
    """
    first = -(-begin // CHUNK_BYTES) * CHUNK_BYTES
    last = end if end == file_bytes else end // CHUNK_BYTES * CHUNK_BYTES
    return (first, last) if first < last else (end, end)


def portions(copies: Iterable[Copy]) -> Iterator[list[Copy]]:
    """Yield copies in order: a large run alone, others as many as come to BLOCK_BYTES_MAX."""
    some: list[Copy] = []
    size = 0
    for copy in copies:
        alone = not copy.dims and copy.run_bytes >= _DIRECT_BYTES
        if some and (alone or size + copy.nbytes > BLOCK_BYTES_MAX):
            yield some
            some, size = [], 0
        some.append(copy)
        size += copy.nbytes
        if alone:
            yield some
            some, size = [], 0
    if some:
        yield some


def is_direct(portion: Sequence[Copy]) -> bool:
    """Whether a portion is one large run."""
    return len(portion) == 1 and not portion[0].dims and portion[0].run_bytes >= _DIRECT_BYTES


def _dense_ranges(copy: Copy) -> Iterator[tuple[int, int]]:
    """Yield the ranges that a copy reads: those with small gaps between their runs in one piece."""
    extent, depth = copy.run_bytes, len(copy.dims)
    while depth and copy.dims[depth - 1][1] - extent < CHUNK_BYTES:
        count, stride, _ = copy.dims[depth - 1]
        extent += (count - 1) * stride
        depth -= 1
    begins: Iterable[int] = (copy.src_begin,)
    for count, stride, _ in copy.dims[:depth]:
        begins = _walk(begins, count, stride)
    for begin in begins:
        yield begin, begin + extent


def _walk(begins: Iterable[int], count: int, stride: int) -> Iterator[int]:
    for begin in begins:
        for i in range(count):
            yield begin + i * stride
