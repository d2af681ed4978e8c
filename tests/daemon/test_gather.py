"""Gathering: the same bytes as a plain loop over all runs, with few and large requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from snapshotd.daemon.gather import BATCH_BYTES, gather
from snapshotd.daemon.source import NOWHERE, Piece
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, apply_copy
from snapshotd.transfer import BLOCK_BYTES_MAX, BLOCKS_MAX


class CountingSource:
    """A source in memory that notes what is asked of it."""

    node_id = name = "test"
    is_local = False

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.file_bytes = data.nbytes
        self.requests: list[list[tuple[int, int]]] = []
        self.num_parts_bytes = 0

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy] = (), target: memoryview = NOWHERE) -> int:
        assert len(parts) <= BLOCKS_MAX
        assert all(part.nbytes <= BLOCK_BYTES_MAX for part in parts)
        assert sum(part.nbytes for part in parts) <= BATCH_BYTES
        self.requests.append([(piece.begin, piece.end) for piece in pieces])
        for before, piece in zip([None, *pieces], pieces, strict=False):
            joins = before is not None and before.end == piece.begin
            assert joins or piece.begin % CHUNK_BYTES == 0
            if before is not None and not joins:
                assert before.end % CHUNK_BYTES == 0
            piece.into[:] = self.data[piece.begin : piece.end].tobytes()
        for part in parts:
            apply_copy(part, self.data, target)
        self.num_parts_bytes += sum(part.nbytes for part in parts)
        return sum(piece.into.nbytes for piece in pieces) + sum(part.nbytes for part in parts)

    @property
    def num_whole_bytes(self) -> int:
        return sum(end - begin for request in self.requests for begin, end in request)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 40_000_017, np.uint8)


def check(data: np.ndarray, copies: Sequence[Copy], size: int) -> CountingSource:
    source = CountingSource(data)
    out = np.zeros(size, np.uint8)
    expected = np.zeros(size, np.uint8)
    for copy in copies:
        for src, dst, nbytes in copy.runs():
            expected[dst : dst + nbytes] = data[src : src + nbytes]
    nbytes = gather(source, copies, memoryview(out))
    assert np.array_equal(out, expected)
    assert nbytes == source.num_whole_bytes + source.num_parts_bytes
    assert nbytes == sum(copy.nbytes for copy in copies)  # nothing is fetched that is not wanted
    return source


def copy(src: int, dst: int, run: int, *dims: tuple[int, int, int]) -> Copy:
    return Copy(source=0, target=0, src_begin=src, dst_begin=dst, run_bytes=run, dims=dims)


def test_a_long_run_goes_straight_to_its_place(data: np.ndarray) -> None:
    source = check(data, [copy(1000, 5, 39_000_000)], 39_000_010)
    assert len(source.requests) == 1
    assert source.num_parts_bytes < 2 * CHUNK_BYTES


def test_small_neighbours_share_a_request(data: np.ndarray) -> None:
    """A thousand biases of some kilobytes are one request, not a thousand."""
    copies = [copy(i * 1500 + 7, i * 400, 400) for i in range(1000)]
    assert [[]] == check(data, copies, 400_000).requests


def test_many_small_ones_are_as_few_requests_as_may_be(data: np.ndarray) -> None:
    copies = [copy(i * 100, i * 8, 8) for i in range(2 * BLOCKS_MAX + 1)]
    assert 3 == len(check(data, copies, 80_000).requests)


def test_what_is_together_in_the_source_is_read_by_whole_chunks_wherever_it_goes(data: np.ndarray) -> None:
    """Two ranks' halves of each tensor go to one: all of both is wanted, and none of it twice."""
    copies = [copy(100 + i * 700_000, (20 - i) * 700_000, 700_000) for i in range(20)]
    source = check(data, copies, 15_000_000)
    assert len(source.requests) == 1
    assert source.num_parts_bytes < 2 * CHUNK_BYTES


def test_a_column_split_is_cut_into_requests(data: np.ndarray) -> None:
    source = check(data, [copy(1000, 0, 1000, (19_000, 2000, 1000))], 19_000_000)
    assert len(source.requests) == 2


def test_random_copies_match_a_plain_loop(data: np.ndarray) -> None:
    dice = random.Random(5)
    for _ in range(40):
        copies, place = [], 0
        for _ in range(dice.randrange(1, 6)):
            run = dice.choice([1, 8, 100, 5000, 300_000, 2_000_000])
            dims = []
            extent, size = run, run
            for _ in range(dice.randrange(0, 4)):
                count = dice.randrange(2, 6)
                stride = extent + dice.choice([0, 8, 3000, 600_000])
                if stride * count > 15_000_000:
                    break
                dims.append((count, stride, size))
                extent, size = stride * (count - 1) + extent, size * count
            if place + size > 60_000_000:
                break
            begin = dice.randrange(0, data.nbytes - extent)
            copies.append(copy(begin, place, run, *reversed(dims)))
            place += size
        check(data, copies, place)
