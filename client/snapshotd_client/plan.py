"""
From leaves to a layout: which bytes of which tensor this rank writes where in its slot.

Rule 1: a plan is stable: it changes only when names, shapes, types or placements do.
Rule 2: replicated tensors are split over their replicas, so that each byte is captured once; all replicas compute the
same split, and ``replica_hash`` lets the coordinator see when they did not.
Rule 3: "sync" leaves may change at any time and are cloned when capture() is called; all others are read later, by the
copy thread, and stay unchanged until the next optimizer step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import xxhash

from snapshotd.layout import Layout, TensorBox
from snapshotd_client.arrays import Array, carrier, dtype_name
from snapshotd_client.dtensors import local_of
from snapshotd_client.leaves import Leaf
from snapshotd_client.placement import Piece, Placement, place_plain, share

__all__ = ["Part", "Plan", "Planned", "build_plan", "meta_capacity_for", "plan_leaf"]

_META_STEP: Final = 64 * 1024
_MAX_GROUP_TEXT: Final = 200


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A leaf without its tensor, and where it lies."""

    name: str
    kind: str
    sync: bool
    dtype: str
    itemsize: int
    local_shape: tuple[int, ...]
    placement: Placement


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Elements ``slices`` of the local tensor of ``planned[index]`` go to file bytes [begin, end), as ``shape``."""

    index: int
    slices: tuple[slice, ...]
    begin: int
    end: int
    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """
    What one rank captures, and where.

    Attributes:
        parts: in file order.
        replicated: indexes of the tensors that are split over ``replica_group``; what ``replica_digest`` is over.
    """

    layout: Layout
    planned: tuple[Planned, ...]
    parts: tuple[Part, ...]
    replica_group: str
    replica_hash: str
    replicated: tuple[int, ...]

    def slot_views(self, slot: Array) -> list[Array]:
        """Return the view of each part in the bytes of a slot file."""
        return [slot[part.begin : part.end].view(carrier(part.itemsize)).reshape(part.shape) for part in self.parts]


def meta_capacity_for(size: int) -> int:
    """Return the room for a step's JSON whose first text has ``size`` bytes: twice that, in whole 64 KiB."""
    return max(1, -(-2 * size // _META_STEP)) * _META_STEP


def plan_leaf(leaf: Leaf, placement: Placement) -> Planned:
    """Return ``leaf`` with where it lies; ValueError with its name when its dtype cannot be kept."""
    try:
        name = dtype_name(leaf.tensor)
    except ValueError as error:
        raise ValueError(f"{leaf.name}: {error}") from None
    tensor = local_of(leaf.tensor)
    return Planned(leaf.name, leaf.kind, leaf.sync, name, tensor.element_size(), tuple(tensor.shape), placement)


def build_plan(
    planned: Sequence[Planned], *, rank: int, split: bool, ties: Mapping[str, str], meta_capacity: int
) -> Plan:
    """Lay out ``planned``; with ``split`` off, each rank keeps all of its replicated tensors as its own."""
    items = tuple(planned)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if item.placement.replicas:
            groups[item.placement.replicas].append(index)
    if not split:
        items = tuple(
            replace(item, placement=place_plain(item.local_shape, "rank")) if item.placement.replicas else item
            for item in items
        )
    shared = groups if split else {}
    main = max(shared, key=lambda ranks: (sum(_nbytes(items[i]) for i in shared[ranks]), ranks), default=())
    pieces = [list(item.placement.pieces) for item in items]
    if split:
        for ranks, members in groups.items():
            _take_share(items, members, pieces, ranks.index(rank), len(ranks))
    boxes: dict[TensorBox, tuple[int, Piece]] = {}
    for index, (item, kept) in enumerate(zip(items, pieces, strict=True)):
        for piece in kept:
            box = TensorBox(
                name=item.name,
                dtype=item.dtype,
                global_shape=item.placement.shape,
                box=piece.box,
                scope=item.placement.scope,
                kind=item.kind,
            )
            boxes[box] = (index, piece)
    layout = Layout.build(list(boxes), meta_capacity=meta_capacity, ties=ties)
    parts: list[Part] = []
    for shard in layout.shards:
        index, piece = boxes[shard.tensor]
        lengths = piece.box.lengths
        parts.append(Part(index, piece.slices(), shard.begin, shard.end, lengths, shard.tensor.itemsize))
    replicated = tuple(groups[main]) if main else ()
    return Plan(
        layout=layout,
        planned=items,
        parts=tuple(parts),
        replica_group=_spell_group(main),
        replica_hash=_replica_hash(planned, replicated) if main else "",
        replicated=replicated,
    )


def _nbytes(item: Planned) -> int:
    return prod(item.local_shape) * item.itemsize


def _take_share(
    items: Sequence[Planned], members: Sequence[int], pieces: list[list[Piece]], index: int, count: int
) -> None:
    units = [(member, piece) for member in members for piece in pieces[member]]
    sizes = [(piece.box.lengths, items[member].itemsize) for member, piece in units]
    for member in members:
        pieces[member] = []
    for (member, piece), part in zip(units, share(sizes, index, count), strict=True):
        if part is not None:
            pieces[member].append(piece.rows(*part) if piece.box.lengths else piece)


def _spell_group(ranks: tuple[int, ...]) -> str:
    text = ",".join(map(str, ranks))
    return text if len(text) <= _MAX_GROUP_TEXT else f"{len(ranks)} ranks {xxhash.xxh3_64_hexdigest(text.encode())}"


def _replica_hash(planned: Sequence[Planned], replicated: Sequence[int]) -> str:
    facts = [
        [
            planned[i].name,
            planned[i].dtype,
            planned[i].placement.shape,
            [[piece.box.offsets, piece.box.lengths] for piece in planned[i].placement.pieces],
        ]
        for i in replicated
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, separators=(",", ":")).encode())
