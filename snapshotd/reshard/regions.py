"""
Regions: rectangles as two corner tuples, cut and subtracted; and an index of boxes that finds overlaps fast.

Unlike ``Box`` these are unchecked, because planning makes millions of them out of boxes that were checked already.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

from snapshotd.layout.box import Box

__all__ = ["Region", "RegionIndex", "overlap", "region_of", "subtract"]

Corner = tuple[int, ...]
Region = tuple[Corner, Corner]
"""(begins, ends): elements with begins[d] <= index[d] < ends[d]."""

Item = TypeVar("Item")


def region_of(box: Box) -> Region:
    """Return the region of ``box``."""
    return box.offsets, box.ends


def overlap(a: Region, b: Region) -> Region | None:
    """Return the common part of two regions of as many dimensions, or None."""
    begins = tuple(map(max, a[0], b[0]))
    ends = tuple(map(min, a[1], b[1]))
    for begin, end in zip(begins, ends, strict=True):
        if begin >= end:
            return None
    return begins, ends


def subtract(region: Region, hole: Region) -> list[Region]:
    """Return what is left of ``region`` without ``hole``, which lies inside it: at most two pieces per dimension."""
    left: list[Region] = []
    begins, ends = region
    for d, (begin, end) in enumerate(zip(*hole, strict=True)):
        if begins[d] < begin:
            left.append((begins, (*ends[:d], begin, *ends[d + 1 :])))
        if end < ends[d]:
            left.append(((*begins[:d], end, *begins[d + 1 :]), ends))
        begins = (*begins[:d], begin, *begins[d + 1 :])
        ends = (*ends[:d], end, *ends[d + 1 :])
    return left


class RegionIndex(Generic[Item]):
    """
    Regions of one tensor, none of them empty, each with an item, sorted along the dimension that separates them best.

    Sharded worlds mostly cut one dimension, so that a query looks at little more than what it returns.
    """

    __slots__ = ("_begins", "_dim", "_entries", "_longest")

    def __init__(self, entries: Sequence[tuple[Region, Item]]) -> None:
        ndim = len(entries[0][0][0]) if entries else 0
        self._dim = max(range(ndim), key=lambda d: len({region[0][d] for region, _ in entries}), default=-1)
        if self._dim < 0:
            self._entries = list(entries)
            return
        d = self._dim
        self._entries = sorted(entries, key=lambda entry: entry[0][0][d])
        self._begins = [region[0][d] for region, _ in self._entries]
        self._longest = max(region[1][d] - region[0][d] for region, _ in self._entries)

    def overlapping(self, wanted: Region) -> list[tuple[Region, Item]]:
        """Return all entries that share an element with ``wanted``, in order of the sorted dimension."""
        d = self._dim
        if d < 0:
            return self._entries
        first = bisect_right(self._begins, wanted[0][d] - self._longest)
        last = bisect_left(self._begins, wanted[1][d])
        return [entry for entry in self._entries[first:last] if overlap(entry[0], wanted) is not None]
