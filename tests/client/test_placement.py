"""
Boxes and shares, against dumb twins: each element belongs to one rank, and to where torch itself would put it.
"""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshotd_client.copying import split_by_bytes
from snapshotd_client.placement import place_on_mesh, share
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class Mesh:
    """As much of a DeviceMesh as placement needs."""

    def __init__(self, shape, coordinate):
        self.mesh = torch.arange(prod(shape)).reshape(shape)
        self._coordinate = coordinate

    def get_coordinate(self):
        return list(self._coordinate)

    def size(self, dim):
        return self.mesh.shape[dim]


def twin(whole, shape, coordinate, placements):
    """Cut as torch's own placements do, left to right."""
    local = whole
    for size, index, placement in zip(shape, coordinate, placements, strict=True):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(local, size, with_padding=False, contiguous=False)
            local = parts[index]
    return local


PLACEMENTS = [
    [Shard(0)],
    [Shard(1)],
    [Replicate()],
    [Replicate(), Shard(0)],
    [Shard(0), Shard(0)],
    [Shard(1), Shard(0)],
    [_StridedShard(0, split_factor=2), Shard(0)],
    [_StridedShard(0, split_factor=3), Shard(0)],
    [_StridedShard(1, split_factor=2), Replicate()],
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (1, 3), (3, 1), (0, 4), (13, 2)])
def test_pieces_are_where_torch_puts_them(placements, shape):
    """Breaks: uneven, empty and strided shards restored at the wrong place."""
    mesh_shape = (2, 3)[: len(placements)]
    whole = torch.arange(prod(shape)).reshape(shape)
    seen = torch.zeros(shape, dtype=torch.int64)
    for coordinate in np.ndindex(*mesh_shape):
        placed, local_shape = place_on_mesh(shape, Mesh(mesh_shape, coordinate), placements)
        expected = twin(whole, mesh_shape, coordinate, placements)
        assert tuple(expected.shape) == local_shape
        local = torch.full(local_shape, -1)
        for piece in placed.pieces:
            source = tuple(slice(o, o + n) for o, n in zip(piece.box.offsets, piece.box.lengths, strict=True))
            local[piece.slices()] = whole[source]
            seen[source] += 1
        assert torch.equal(expected, local)
        replicas = prod(s for s, p in zip(mesh_shape, placements, strict=True) if isinstance(p, Replicate))
        assert (replicas if replicas > 1 else 0) == len(placed.replicas)
    if whole.numel():
        assert set(seen.unique().tolist()) == {replicas}


SIZES = st.lists(
    st.tuples(st.lists(st.integers(0, 6), max_size=3).map(tuple), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=8
)


@settings(max_examples=200)
@given(SIZES, st.integers(1, 5))
def test_replicas_share_each_byte_once_and_evenly(pieces, count):
    """Breaks: bytes that no replica has captured, or that all have."""
    seen = [np.zeros(lengths, dtype=int) for lengths, _ in pieces]
    taken = []
    for index in range(count):
        total = 0
        for array, (lengths, itemsize), part in zip(seen, pieces, share(pieces, index, count), strict=True):
            if part is None:
                continue
            dim, begin, end = part
            rows = array[(*(slice(None),) * dim, slice(begin, end))] if lengths else array
            rows += 1
            total += rows.size * itemsize
        taken.append(total)
    assert all((array == 1).all() for array in seen)
    largest_row = max((prod(n) * i // next((x for x in n if x > 1), 1) for n, i in pieces), default=0)
    assert max(taken) <= sum(taken) / count + 2 * largest_row


def test_empty_tensors_are_held_by_the_first_replica():
    assert share([((0, 3), 4)], 0, 2) == [(1, 0, 3)]
    assert share([((0, 3), 4)], 1, 2) == [None]


@settings(max_examples=100)
@given(SIZES, st.integers(1, 4))
def test_copies_are_split_by_bytes_and_complete(pieces, count):
    """Breaks: one thread copies everything, or an array's middle is copied by nobody."""
    pairs = []
    for lengths, itemsize in pieces:
        dtype = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[itemsize]
        pairs.append((np.zeros(lengths, dtype), np.ones(lengths, dtype)))
    parts = split_by_bytes(pairs, count)
    assert count == len(parts)
    for part in parts:
        for target, source in part:
            np.add(target, source, out=target)
    assert all((target == 1).all() for target, _ in pairs)
