"""Gathering: the same bytes as a plain loop over all runs, with few and large requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, apply_copy
from snapshotd.transfer import BLOCK_BYTES_MAX, BLOCKS_MAX, RANGES_MAX, Piece, gather
from snapshotd.transfer.gather import BATCH_BYTES


class CountingSource:
    """A source in memory that notes what is asked of it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.requests: list[list[tuple[int, int]]] = []
        self.num_parts_bytes = 0

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy], targets: Sequence[memoryview]) -> int:
        assert pieces or parts
        assert len(parts) <= BLOCKS_MAX
        assert all(part.nbytes <= BLOCK_BYTES_MAX for part in parts)
        assert sum(part.nbytes for part in parts) <= BATCH_BYTES
        runs: list[tuple[int, int]] = []
        for piece in pieces:
            if runs and runs[-1][1] == piece.begin:
                runs[-1] = runs[-1][0], piece.end
            else:
                runs.append((piece.begin, piece.end))
            piece.into[:] = self.data[piece.begin : piece.end].tobytes()
        assert len(runs) <= RANGES_MAX
        self.requests.append(runs)
        for part in parts:
            apply_copy(part, self.data, targets[part.target])
        self.num_parts_bytes += sum(part.nbytes for part in parts)
        return sum(piece.into.nbytes for piece in pieces) + sum(part.nbytes for part in parts)

    @property
    def num_run_bytes(self) -> int:
        return sum(end - begin for request in self.requests for begin, end in request)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 40_000_017, np.uint8)


def check(data: np.ndarray, copies: Sequence[Copy], *sizes: int) -> CountingSource:
    source = CountingSource(data)
    outs = [np.zeros(size, np.uint8) for size in sizes]
    expected = [np.zeros(size, np.uint8) for size in sizes]
    for copy in copies:
        for src, dst, nbytes in copy.runs():
            expected[copy.target][dst : dst + nbytes] = data[src : src + nbytes]
    nbytes = gather(source.read, copies, list(map(memoryview, outs)))
    assert all(map(np.array_equal, outs, expected))
    assert nbytes == source.num_run_bytes + source.num_parts_bytes
    assert nbytes == sum(copy.nbytes for copy in copies)  # nothing is fetched that is not wanted
    return source


def copy(src: int, dst: int, run: int, *dims: tuple[int, int, int], to: int = 0) -> Copy:
    return Copy(source=0, target=to, src_begin=src, dst_begin=dst, run_bytes=run, dims=dims)


def test_a_long_run_goes_straight_to_its_place(data: np.ndarray) -> None:
    source = check(data, [copy(1000, 5, 39_000_000)], 39_000_010)
    assert [[(1000, 39_001_000)]] == source.requests


def test_small_ones_far_from_others_share_a_request(data: np.ndarray) -> None:
    """A thousand biases of some kilobytes are one request, not a thousand."""
    copies = [copy(i * 1500 + 7, i * 400, 400) for i in range(1000)]
    assert [[]] == check(data, copies, 400_000).requests


def test_small_ones_that_follow_each_other_are_one_run_into_many_targets(data: np.ndarray) -> None:
    copies = [copy(7 + i * 400, 10, 400, to=i) for i in range(1000)]
    assert [[(7, 400_007)]] == check(data, copies[::-1], *[410] * 1000).requests


def test_many_small_ones_are_as_few_requests_as_may_be(data: np.ndarray) -> None:
    copies = [copy(i * 100, i * 8, 8) for i in range(2 * BLOCKS_MAX + 1)]
    assert 3 == len(check(data, copies, 80_000).requests)


def test_what_is_together_in_the_source_is_one_run_wherever_it_goes(data: np.ndarray) -> None:
    """Two ranks' halves of each tensor go to one: all of both is wanted, and none of it twice."""
    copies = [copy(100 + i * 700_000, (20 - i) * 700_000, 700_000) for i in range(20)]
    assert [[(100, 14_000_100)]] == check(data, copies, 15_000_000).requests


def test_long_runs_of_a_strided_block_are_runs(data: np.ndarray) -> None:
    source = check(data, [copy(1000, 0, 100_000, (30, 1_000_000, 100_000))], 3_000_000)
    assert [[(at, at + 100_000) for at in range(1000, 30_000_000, 1_000_000)]] == source.requests


def test_a_column_split_is_cut_into_requests(data: np.ndarray) -> None:
    source = check(data, [copy(1000, 0, 1000, (19_000, 2000, 1000))], 19_000_000)
    assert len(source.requests) == 2


def test_runs_and_parts_are_one_request(data: np.ndarray) -> None:
    source = check(data, [copy(5, 0, CHUNK_BYTES), copy(9_000_000, 0, 7, to=1)], CHUNK_BYTES, 7)
    assert [[(5, 5 + CHUNK_BYTES)]] == source.requests
    assert 7 == source.num_parts_bytes


def test_nothing_is_no_request(data: np.ndarray) -> None:
    assert [] == check(data, [], 0).requests


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
