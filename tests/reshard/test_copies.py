"""Copies: their runs, their bounds, and numpy's way of carrying them out."""

from __future__ import annotations

import itertools
import mmap
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import LayoutError
from snapshotd.reshard import Copy, apply_copy, merge_neighbours
from snapshotd.reshard.copies import block_copy


def plain(source: int, src: int, dst: int, size: int, target: int = 0) -> Copy:
    return Copy(source=source, target=target, src_begin=src, dst_begin=dst, run_bytes=size)


@st.composite
def block_copies(draw: st.DrawFn) -> tuple[Copy, set[tuple[int, int]]]:
    """A block between two random boxes, with the (source byte, target byte) pairs found element by element."""
    ndim = draw(st.integers(0, 4))
    itemsize = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    lengths = tuple(draw(st.integers(1, 3)) for _ in range(ndim))
    place = []
    for _ in range(2):
        at = tuple(draw(st.integers(0, 1)) for _ in range(ndim))
        size = tuple(a + n + draw(st.integers(0, 1)) for a, n in zip(at, lengths, strict=True))
        place.append((draw(st.integers(0, 9)), size, at))
    (src_begin, src_lengths, src_at), (dst_begin, dst_lengths, dst_at) = place
    copy = block_copy(
        source=1, target=2, src_begin=src_begin, dst_begin=dst_begin, itemsize=itemsize, lengths=lengths,
        src_lengths=src_lengths, dst_lengths=dst_lengths, src_at=src_at, dst_at=dst_at,
    )  # fmt: skip
    pairs = set()
    for index in itertools.product(*map(range, lengths)):
        offsets = []
        for begin, size, at in place:
            flat = 0
            for i, a, n in zip(index, at, size, strict=True):
                flat = flat * n + i + a
            offsets.append(begin + flat * itemsize)
        pairs |= {(offsets[0] + byte, offsets[1] + byte) for byte in range(itemsize)}
    return copy, pairs


@settings(max_examples=300, deadline=None)
@given(block_copies(), st.integers(0, 3))
def test_runs_are_the_elements_of_the_block(case: tuple[Copy, set[tuple[int, int]]], slack: int) -> None:
    copy, pairs = case
    runs = list(copy.runs())
    assert {(src + i, dst + i) for src, dst, size in runs for i in range(size)} == pairs
    assert sum(size for _, _, size in runs) == len(pairs) == copy.nbytes
    assert runs == sorted(runs)
    assert copy.src_range == (min(p[0] for p in pairs), max(p[0] for p in pairs) + 1)
    assert copy.dst_range == (min(p[1] for p in pairs), max(p[1] for p in pairs) + 1)
    # As far as possible: no run continues the one before it on both sides.
    assert all(a[0] + a[2] != b[0] or a[1] + a[2] != b[1] for a, b in itertools.pairwise(runs))
    source = random.Random(0).randbytes(copy.src_range[1] + slack)
    target = bytearray(b"\xee" * (copy.dst_range[1] + slack))
    expected = bytearray(target)
    for src, dst in pairs:
        expected[dst] = source[src]
    apply_copy(copy, source, target)
    assert target == expected


def test_rows_are_one_run_and_columns_one_dim() -> None:
    """A row range is one socket read; a column range must stay one description, not a million."""
    whole = {"source": 0, "target": 0, "src_begin": 100, "dst_begin": 0, "itemsize": 4}
    rows = block_copy(
        **whole, lengths=(3, 8, 2), src_lengths=(9, 8, 2), dst_lengths=(3, 8, 2), src_at=(2, 0, 0), dst_at=(0, 0, 0)
    )
    assert (rows.src_begin, rows.run_bytes, rows.dims) == (100 + 2 * 64, 3 * 64, ())
    columns = block_copy(
        **whole, lengths=(5, 6, 2), src_lengths=(5, 6, 8), dst_lengths=(5, 6, 2), src_at=(0, 0, 4), dst_at=(0, 0, 0)
    )
    assert (columns.src_begin, columns.run_bytes, columns.dims) == (116, 8, ((30, 32, 8),))


def test_neighbours_are_joined() -> None:
    """A rank that comes back to the same layout reads its file in one piece."""
    strided = Copy(source=0, target=0, src_begin=30, dst_begin=30, run_bytes=1, dims=((2, 5, 5),))
    copies = [plain(0, 10, 10, 5), plain(0, 0, 0, 10), plain(0, 20, 15, 5), strided, plain(1, 40, 40, 1)]
    assert merge_neighbours(copies) == [plain(0, 0, 0, 15), plain(0, 20, 15, 5), strided, plain(1, 40, 40, 1)]
    assert merge_neighbours([plain(0, 0, 0, 5), plain(1, 5, 5, 5)]) == [plain(0, 0, 0, 5), plain(1, 5, 5, 5)]
    assert len(merge_neighbours([plain(0, 0, 0, 5), plain(0, 5, 5, 5, target=1)])) == 2


@pytest.mark.parametrize(
    ("copy", "source", "target"),
    [
        (plain(0, 0, 0, 5), b"1234", bytearray(5)),
        (plain(0, 0, 0, 5), b"12345", bytearray(4)),
        (plain(0, -1, 0, 2), b"12345", bytearray(4)),
        (plain(0, 0, -1, 2), b"12345", bytearray(4)),
        (plain(0, 0, 0, 2), b"12345", b"12345"),
        (plain(0, 0, 0, 2), np.zeros(8, np.uint8)[::2], bytearray(4)),
        (Copy(source=0, target=0, src_begin=0, dst_begin=0, run_bytes=2, dims=((3, 2, 2),)), b"12345", bytearray(6)),
    ],
)
def test_nothing_outside_the_buffers_is_touched(copy: Copy, source: bytes, target: bytearray) -> None:
    before = bytes(target)
    with pytest.raises(LayoutError):
        apply_copy(copy, source, target)
    assert bytes(target) == before


def test_mappings_can_be_closed_afterwards() -> None:
    with mmap.mmap(-1, 4096) as source, mmap.mmap(-1, 4096) as target:
        source[:4] = b"abcd"
        apply_copy(plain(0, 1, 2, 3), source, target)
        assert target[:6] == b"\0\0bcd\0"
        apply_copy(plain(0, 0, 0, 0), source, target)
    assert source.closed
    assert target.closed
