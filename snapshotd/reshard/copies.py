"""
Copies: blocks of bytes from one file to another, as few and as large as the two box orders allow.

Rule 1: a copy is ``dims`` (outermost first) over contiguous runs of ``run_bytes``; run (i, j, ...) goes from
``src_begin + i * dims[0].src_stride + j * ...`` to the same with the target's strides.
Rule 2: what is contiguous on both sides is merged: a plain range of rows has no ``dims``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

__all__ = ["Copy", "Dim", "block_copy", "cut_copy", "merge_neighbours"]

Dim = tuple[int, int, int]
"""(count, src_stride_bytes, dst_stride_bytes)"""


class Copy(NamedTuple):
    """
    One strided block of bytes to copy from file ``source`` to file ``target``; all offsets and strides in bytes.
    """

    source: int
    target: int
    src_begin: int
    dst_begin: int
    run_bytes: int
    dims: tuple[Dim, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes copied."""
        if not self.dims:  # most have none, and are asked many times
            return self.run_bytes
        return self.run_bytes * prod(dim[0] for dim in self.dims)

    @property
    def src_range(self) -> tuple[int, int]:
        """The smallest [begin, end) of the source file that holds all runs."""
        if not self.dims:
            return self.src_begin, self.src_begin + self.run_bytes
        return self.src_begin, self.src_begin + sum((n - 1) * stride for n, stride, _ in self.dims) + self.run_bytes

    @property
    def dst_range(self) -> tuple[int, int]:
        """The smallest [begin, end) of the target file that holds all runs."""
        if not self.dims:
            return self.dst_begin, self.dst_begin + self.run_bytes
        return self.dst_begin, self.dst_begin + sum((n - 1) * stride for n, _, stride in self.dims) + self.run_bytes

    def shifted(self, nbytes: int) -> Copy:
        """Return the copy into a target 0 in which all lies so many bytes further on."""
        return Copy(self.source, 0, self.src_begin, self.dst_begin + nbytes, self.run_bytes, self.dims)

    def packed_strides(self) -> list[int]:
        """Return the strides of ``dims`` when the runs lie one behind the other."""
        strides: list[int] = []
        stride = self.run_bytes
        for count, _, _ in reversed(self.dims):
            strides.append(stride)
            stride *= count
        return strides[::-1]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Iterate over (src_offset, dst_offset, nbytes) of each run, in increasing order of both offsets."""
        if not self.dims:
            yield self.src_begin, self.dst_begin, self.run_bytes
            return
        *outer, (count, src_stride, dst_stride) = self.dims
        starts: Iterable[tuple[int, int]] = ((self.src_begin, self.dst_begin),)
        for dim in outer:
            starts = _walk(starts, dim)
        for src, dst in starts:
            for i in range(count):
                yield src + i * src_stride, dst + i * dst_stride, self.run_bytes


def block_copy(
    *,
    source: int,
    target: int,
    src_begin: int,
    dst_begin: int,
    itemsize: int,
    lengths: tuple[int, ...],
    src_lengths: tuple[int, ...],
    dst_lengths: tuple[int, ...],
    src_at: tuple[int, ...],
    dst_at: tuple[int, ...],
) -> Copy:
    """
    Return the copy of a block of ``lengths`` elements between two row-major boxes.

    ``src_lengths`` and ``dst_lengths`` are the boxes' own lengths, ``src_at`` and ``dst_at`` where the block begins in
    them, in elements; ``src_begin`` and ``dst_begin`` are the byte offsets of the boxes in their files. The block must
    not be empty and lie inside both.
    """
    run = src_stride = dst_stride = itemsize
    dims: list[Dim] = []  # innermost first
    for d in range(len(lengths) - 1, -1, -1):
        src_begin += src_at[d] * src_stride
        dst_begin += dst_at[d] * dst_stride
        count = lengths[d]
        if count > 1:
            if not dims and src_stride == dst_stride == run:
                run *= count
            elif dims and src_stride == dims[-1][0] * dims[-1][1] and dst_stride == dims[-1][0] * dims[-1][2]:
                dims[-1] = (dims[-1][0] * count, dims[-1][1], dims[-1][2])
            else:
                dims.append((count, src_stride, dst_stride))
        src_stride *= src_lengths[d]
        dst_stride *= dst_lengths[d]
    return Copy(source, target, src_begin, dst_begin, run, tuple(reversed(dims)))


def cut_copy(copy: Copy, max_bytes: int) -> Iterator[Copy]:
    """Yield parts of at most ``max_bytes`` that make up ``copy``: of its outer dimension first, at last of its runs."""
    if copy.nbytes <= max_bytes:
        yield copy
        return
    if not copy.dims:
        for at in range(0, copy.run_bytes, max_bytes):
            run_bytes = min(max_bytes, copy.run_bytes - at)
            yield copy._replace(src_begin=copy.src_begin + at, dst_begin=copy.dst_begin + at, run_bytes=run_bytes)
        return
    (count, src_stride, dst_stride), inner = copy.dims[0], copy.dims[1:]
    one = copy._replace(dims=inner)
    step = max(1, max_bytes // one.nbytes)
    for i in range(0, count, step):
        part = one._replace(src_begin=copy.src_begin + i * src_stride, dst_begin=copy.dst_begin + i * dst_stride)
        if step == 1:
            yield from cut_copy(part, max_bytes)
        else:
            yield part._replace(dims=((min(step, count - i), src_stride, dst_stride), *inner))


def merge_neighbours(copies: Iterable[Copy]) -> list[Copy]:
    """Return the copies in order of target and place, plain ones that continue each other on both sides joined."""
    merged: list[Copy] = []
    for copy in sorted(copies, key=lambda c: (c.target, c.dst_begin)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and not last.dims
            and not copy.dims
            and (last.source, last.target) == (copy.source, copy.target)
            and last.src_begin + last.run_bytes == copy.src_begin
            and last.dst_begin + last.run_bytes == copy.dst_begin
        ):
            merged[-1] = last._replace(run_bytes=last.run_bytes + copy.run_bytes)
        else:
            merged.append(copy)
    return merged


def _walk(starts: Iterable[tuple[int, int]], dim: Dim) -> Iterator[tuple[int, int]]:
    count, src_stride, dst_stride = dim
    for src, dst in starts:
        for i in range(count):
            yield src + i * src_stride, dst + i * dst_stride
