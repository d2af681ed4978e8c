"""
Where a local tensor lies in its global one, and which replica captures which part of it.

Rule 1: what a rank holds is a list of pieces, each one rectangle of the global tensor and one of the local one. Nearly
always it is one piece; an uneven ``_StridedShard`` can leave several.
Rule 2: the split over replicas is a pure function of what all of them know, so they agree without a word.
Rule 3: nothing is believed: the local shape that follows from the placements must be the one that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from snapshotd.layout import Box, Scope

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Piece", "Placement", "place_on_mesh", "place_dtensor", "place_plain", "share", "strides_of"]

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """``box`` of the global tensor lies at ``local`` offsets of the local one."""

    box: Box
    local: tuple[int, ...]

    def rows(self, dim: int, begin: int, end: int) -> Piece:
        """Return the part of rows [begin, end) along ``dim``."""
        offsets, lengths, local = list(self.box.offsets), list(self.box.lengths), list(self.local)
        offsets[dim] += begin
        local[dim] += begin
        lengths[dim] = end - begin
        return Piece(Box(tuple(offsets), tuple(lengths)), tuple(local))

    def slices(self) -> tuple[slice, ...]:
        """Index of this piece in the local tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.local, self.box.lengths, strict=True))


@dataclass(frozen=True, slots=True)
class Placement:
    """
    What this rank holds of a tensor.

    Attributes:
        scope: "global": the parts of all ranks make one tensor of ``shape``. "rank": the tensor is this rank's own.
        replicas: the ranks, this one among them, that hold exactly the same pieces; empty when it is only this one.
    """

    scope: Scope
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replicas: tuple[int, ...] = ()


def place_plain(shape: Sequence[int], scope: Scope, replicas: tuple[int, ...] = ()) -> Placement:
    """Return the placement of a whole tensor."""
    whole = tuple(shape)
    return Placement(scope, whole, (Piece(Box.whole(whole), (0,) * len(whole)),), replicas if len(replicas) > 1 else ())


def place_dtensor(tensor: DTensor) -> Placement:
    """
    Return what this rank holds of ``tensor``; a tensor with Partial placements is this rank's own.

    ValueError when the placements do not explain the local shape.
    """
    local = tuple(tensor._local_tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        return place_plain(local, "rank")
    placed, expected = place_on_mesh(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    if tensor.device_mesh.get_coordinate() is not None and expected != local and not prod(expected) == prod(local) == 0:
        raise ValueError(
            f"placements {tensor.placements} of shape {placed.shape} make {expected} on this rank, but it holds {local}"
        )
    return placed


def place_on_mesh(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Any]
) -> tuple[Placement, tuple[int, ...]]:
    """Return what this rank holds of a DTensor of ``shape``, and the shape of its local tensor."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Placement("global", shape, ()), (0,) * len(shape)
    runs: list[Runs] = [((0, size),) for size in shape]
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise ValueError(f"the placement {placement!r} is not known")
        factor = int(getattr(placement, "split_factor", 1))  # of a _StridedShard
        runs[dim] = _shard(runs[dim], mesh.size(mesh_dim), coordinate[mesh_dim], factor)
    expected = tuple(sum(length for _, length in dim_runs) for dim_runs in runs)
    index = tuple(slice(None) if p.is_replicate() else c for p, c in zip(placements, coordinate, strict=True))
    ranks = tuple(sorted(int(rank) for rank in mesh.mesh[index].reshape(-1).tolist()))
    pieces = () if 0 in expected and 0 not in shape else tuple(_pieces(runs))
    return Placement("global", shape, pieces, ranks if len(ranks) > 1 else ()), expected


def share(pieces: Sequence[tuple[tuple[int, ...], int]], index: int, count: int) -> list[tuple[int, int, int] | None]:
    """
    Return replica ``index`` of ``count``'s part of each piece: (dim, begin row, end row), or None for nothing of it.

    ``pieces`` are (lengths, itemsize), laid end to end; each replica takes about the same number of bytes, and pieces
    are cut along their first dimension > 1 only, so that each part stays one rectangle. Empty ones go to replica 0.
    """
    sizes = [prod(lengths) * itemsize for lengths, itemsize in pieces]
    total = sum(sizes)
    cuts = (index * total // count, (index + 1) * total // count)
    out: list[tuple[int, int, int] | None] = []
    begin = 0
    for (lengths, _), size in zip(pieces, sizes, strict=True):
        dim = next((d for d, n in enumerate(lengths) if n > 1), 0)
        rows = lengths[dim] if lengths else 1
        if size == 0:
            out.append((dim, 0, rows) if index == 0 else None)
            continue
        row_bytes = size // rows
        first, last = (min(max((cut - begin + row_bytes // 2) // row_bytes, 0), rows) for cut in cuts)
        first, last = (0 if index == 0 else first), (rows if index == count - 1 else last)
        out.append((dim, first, last) if last > first else None)
        begin += size
    return out


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of ``shape``, as torch counts them."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _shard(runs: Runs, count: int, index: int, factor: int) -> Runs:
    """Cut as torch.chunk does: into ``factor`` blocks, each into ``count`` chunks; take chunk ``index`` of each."""
    total = sum(length for _, length in runs)
    block = -(-total // factor)
    out: list[tuple[int, int]] = []
    for first in range(factor):
        begin = min(first * block, total)
        size = min(block, total - begin)
        chunk = -(-size // count)
        left = min(index * chunk, size)
        out.extend(_cut(runs, begin + left, begin + min(left + chunk, size)))
    return _merge(out)


def _cut(runs: Runs, begin: int, end: int) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    position = 0
    for offset, length in runs:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            out.append((offset + low - position, high - low))
        position += length
    return out


def _merge(runs: Sequence[tuple[int, int]]) -> Runs:
    out: list[tuple[int, int]] = []
    for offset, length in runs:
        if out and out[-1][0] + out[-1][1] == offset:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((offset, length))
    return tuple(out)


def _pieces(runs: Sequence[Runs]) -> list[Piece]:
    per_dim: list[list[tuple[int, int, int]]] = []
    for dim_runs in runs:
        local = 0
        entries: list[tuple[int, int, int]] = []
        for offset, length in dim_runs or ((0, 0),):
            entries.append((offset, length, local))
            local += length
        per_dim.append(entries)
    return [
        Piece(Box(tuple(e[0] for e in combo), tuple(e[1] for e in combo)), tuple(e[2] for e in combo))
        for combo in product(*per_dim)
    ]
