"""
Plan which bytes go where: boxes in, byte-range copies out. Restores from memory and of durable snapshots use it.

Rule 1: each wanted byte is written by exactly one copy.
Rule 2: tensors of scope "global" match by name, over all sources. Those of scope "rank" match by name in the one source
that ``rank_source`` gives for the target.
Rule 3: where sources overlap (replicas), the preferred one is taken, and the next for what it lacks only.
Rule 4: nothing is converted: dtype and global shape must be the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import sub
from typing import Final, NamedTuple

from snapshotd.errors import LayoutError, Unrecoverable
from snapshotd.layout.box import Box, TensorBox
from snapshotd.reshard.copies import Copy, block_copy, merge_neighbours
from snapshotd.reshard.regions import Region, RegionIndex, overlap, region_of, subtract

__all__ = ["Key", "Planner", "SourceShard", "TargetShard"]

_LISTED: Final = 10


class SourceShard(NamedTuple):
    """A tensor box that is there: at byte offset ``begin`` of the file ``source`` (an opaque id, such as a rank)."""

    source: int
    tensor: TensorBox
    begin: int


class TargetShard(NamedTuple):
    """A tensor box that is wanted: at byte offset ``begin`` of the file ``target`` (an opaque id, such as a rank)."""

    target: int
    tensor: TensorBox
    begin: int


Key = tuple[str, int | None]
"""(name, None) of a global tensor, (name, source) of one that is private to its rank."""


class _Part(NamedTuple):
    """A copy out of one of several shards, ``shard``, as if that and the target began at 0."""

    shard: int
    copy: Copy


class _Filled(NamedTuple):
    """What fills a box, in order, and what of it is in no source. ``may_join``: neighbours may be out of one source."""

    parts: list[_Part]
    left: list[Region]
    may_join: bool


class _Geometry:
    """
    How the boxes of one tensor's sources lie, whatever they are called and wherever in their files they begin. Models
    have many tensors of one geometry, and each wanted box of it is planned once.

    ranks: a preference and a source for each of ``boxes``, none of which is empty, and no two equal.
    """

    def __init__(self, ranks: Sequence[tuple[int, int]], boxes: Sequence[Box], itemsize: int) -> None:
        self._ranks, self._boxes, self._itemsize = ranks, boxes, itemsize
        self._index = RegionIndex([(region_of(box), number) for number, box in enumerate(boxes)])
        self._made: dict[Box, _Filled] = {}

    def fill(self, wanted: Box) -> _Filled:
        """Return what fills a box that is not empty."""
        made = self._made.get(wanted)
        if made is None:
            made = self._made[wanted] = self._fill(wanted)
        return made

    def _fill(self, wanted: Box) -> _Filled:
        region = region_of(wanted)
        candidates = self._index.overlapping(region)
        if len(candidates) > 1:
            # By preference, and then by place, which keeps what is left in few pieces.
            candidates.sort(key=lambda entry: (self._ranks[entry[1]][0], entry[0], self._ranks[entry[1]][1]))
        left = [region]
        parts: list[_Part] = []
        for there, number in candidates:
            still_left: list[Region] = []
            for piece in left:
                common = overlap(piece, there)
                if common is None:
                    still_left.append(piece)
                else:
                    parts.append(_Part(number, self._copy(number, wanted, common)))
                    still_left += subtract(piece, common)
            left = still_left
            if not left:
                break
        parts.sort(key=lambda part: part.copy.dst_begin)
        return _Filled(parts, left, len({part.copy.source for part in parts}) < len(parts))

    def _copy(self, number: int, wanted: Box, region: Region) -> Copy:
        begins, ends = region
        there = self._boxes[number]
        return block_copy(
            source=self._ranks[number][1],
            target=0,
            src_begin=0,
            dst_begin=0,
            itemsize=self._itemsize,
            lengths=tuple(map(sub, ends, begins)),
            src_lengths=there.lengths,
            dst_lengths=wanted.lengths,
            src_at=tuple(map(sub, begins, there.offsets)),
            dst_at=tuple(map(sub, begins, wanted.offsets)),
        )


class _Tensor(NamedTuple):
    """The sources of one key. ``odd`` does not agree with ``first``; ``shards`` are those of its geometry."""

    first: SourceShard
    odd: SourceShard | None
    shards: Sequence[SourceShard]
    geometry: _Geometry


class _Family(NamedTuple):
    """Tensors whose sources lie alike: the ``shards`` of the first of them, ``places`` of those of the geometry."""

    shards: Sequence[SourceShard]
    places: list[int]
    geometry: _Geometry


@dataclass(frozen=True, slots=True)
class _Failures:
    """Tensor name to what is wrong with it."""

    absent: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)

    def raise_any(self) -> None:
        wrong = []
        if self.absent:
            wrong.append(f"{len(self.absent)} wanted tensors are in no source: {_listed([*self.absent.values()])}")
        if self.different:
            wrong.append(f"{len(self.different)} tensors differ: {_listed([*self.different.values()])}")
        if wrong:
            raise LayoutError("; ".join(wrong))
        if self.uncovered:
            listed = _listed([*self.uncovered.values()])
            raise Unrecoverable(f"{len(self.uncovered)} wanted tensors are not whole in the sources: {listed}")


class Planner:
    """
    Plans boxes as they are asked for, and looks at the sources of a tensor once. For one thread at a time.

    ``find`` gives the sources of a key, and the same ones whenever it is asked. ``prefer`` ranks sources, lower first
    (0 for local, 1 for remote); of equal boxes in equally ranked sources the one with the lower id is taken, so that a
    plan depends on nothing but what is given.
    """

    def __init__(self, find: Callable[[Key], Sequence[SourceShard]], prefer: Callable[[int], int]) -> None:
        self._find = find
        self._prefer = prefer
        self._ranking: dict[int, tuple[int, int]] = {}
        self._tensors: dict[Key, _Tensor | None] = {}
        self._families: dict[tuple[object, ...], _Family] = {}

    def plan(self, targets: Sequence[TargetShard], rank_source: Mapping[int, int] | None = None) -> list[Copy]:
        """
        Return the copies that fill ``targets``, in their order.

        ``rank_source`` gives for each target the source of its rank-scope tensors; without it, that is the source with
        the target's own id. LayoutError for wanted tensors that no source has or that differ in dtype or global shape;
        Unrecoverable for regions that no source covers. Both name up to ten of them.
        """
        failures = _Failures()
        copies: list[Copy] = []
        for target in targets:
            key = _key_of(target, rank_source)
            if key not in self._tensors:
                self._tensors[key] = self._group(self._find(key))
            copies += _fill(target, key, self._tensors[key], failures)
        failures.raise_any()
        return copies

    def _group(self, shards: Sequence[SourceShard]) -> _Tensor | None:
        if not shards:
            return None
        first, odd = shards[0], None
        dtype, global_shape = first.tensor.dtype, first.tensor.global_shape
        # A layout has one Box for all tensors that lie alike: comparing those by identity is enough, and fast.
        likeness: list[object] = [first.tensor.itemsize]
        for source, tensor, _ in shards:
            if tensor.dtype != dtype or tensor.global_shape != global_shape:
                odd = next(shard for shard in shards if not _same_tensor(first.tensor, shard.tensor))
                shards = [shard for shard in shards if _same_tensor(first.tensor, shard.tensor)]
                likeness[1:] = (item for shard in shards for item in (shard.source, id(shard.tensor.box)))
                break
            likeness += source, id(tensor.box)
        family = self._families.get(tuple(likeness))
        if family is None:
            family = self._families[tuple(likeness)] = self._family(shards)
        return _Tensor(first, odd, [shards[place] for place in family.places], family.geometry)

    def _family(self, shards: Sequence[SourceShard]) -> _Family:
        """Of several shards with the very same box, keep the preferred one only."""
        best: dict[Box, tuple[tuple[int, int], int]] = {}
        for place, shard in enumerate(shards):
            box, source = shard.tensor.box, shard.source
            if box.is_empty:
                continue
            if source not in self._ranking:
                self._ranking[source] = (self._prefer(source), source)
            there = best.get(box)
            if there is None or self._ranking[source] < there[0]:
                best[box] = (self._ranking[source], place)
        geometry = _Geometry([rank for rank, _ in best.values()], tuple(best), shards[0].tensor.itemsize)
        return _Family(shards, [place for _, place in best.values()], geometry)


def _key_of(target: TargetShard, rank_source: Mapping[int, int] | None) -> Key:
    name = target.tensor.name
    if target.tensor.scope == "global":
        return name, None
    if rank_source is None:
        return name, target.target
    if target.target not in rank_source:
        raise LayoutError(f"rank_source names no source for target {target.target}, which wants {name}")
    return name, rank_source[target.target]


def _fill(target: TargetShard, key: Key, found: _Tensor | None, failures: _Failures) -> list[Copy]:
    """Return the copies that fill one target shard; what cannot be filled goes to ``failures``."""
    tensor = target.tensor
    if found is None:
        # An empty box needs nothing, and a rank may have skipped capturing what has no bytes.
        if not tensor.box.is_empty:
            where = "" if key[1] is None else f" (private to source {key[1]})"
            failures.absent[tensor.name] = f"{tensor.name}{where}"
        return []
    for shard in (found.first,) if found.odd is None else (found.first, found.odd):
        if not _same_tensor(shard.tensor, tensor):
            failures.different[tensor.name] = (
                f"{tensor.name} is {tensor.dtype} {list(tensor.global_shape)} in target {target.target}, but "
                f"{shard.tensor.dtype} {list(shard.tensor.global_shape)} in source {shard.source}"
            )
            return []
    if tensor.box.is_empty:
        return []
    parts, left, may_join = found.geometry.fill(tensor.box)
    if left:
        failures.uncovered[tensor.name] = (
            f"{tensor.name} {list(tensor.global_shape)} in target {target.target} lacks {_regions(left)}"
        )
    copies = [
        Copy(
            copy.source,
            target.target,
            found.shards[number].begin + copy.src_begin,
            target.begin + copy.dst_begin,
            copy.run_bytes,
            copy.dims,
        )
        for number, copy in parts
    ]
    return merge_neighbours(copies) if may_join else copies


def _same_tensor(one: TensorBox, other: TensorBox) -> bool:
    return one.dtype == other.dtype and one.global_shape == other.global_shape


def _numel(region: Region) -> int:
    return prod(map(sub, region[1], region[0]))


def _slices(region: Region) -> str:
    return "[" + ", ".join(f"{begin}:{end}" for begin, end in zip(*region, strict=True)) + "]"


def _regions(regions: Sequence[Region]) -> str:
    more = f" and {len(regions) - 3} more regions" if len(regions) > 3 else ""
    return ", ".join(map(_slices, regions[:3])) + more + f" ({sum(map(_numel, regions))} elements)"


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more
