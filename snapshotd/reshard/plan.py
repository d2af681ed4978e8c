"""
Plan which bytes go where: boxes in, byte-range copies out. Restores from memory and of durable snapshots use it.

Rule 1: each wanted byte is written by exactly one copy.
Rule 2: tensors of scope "global" match by name, over all sources. Those of scope "rank" match by name in the one source
that ``rank_source`` gives for the target.
Rule 3: where sources overlap (replicas), the preferred one is taken, and the next for what it lacks only.
Rule 4: nothing is converted: dtype and global shape must be the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import sub
from typing import Final, NamedTuple, Protocol

from snapshotd.errors import LayoutError, Unrecoverable
from snapshotd.layout.box import Box, TensorBox
from snapshotd.layout.layout import Shard
from snapshotd.reshard.copies import Copy, block_copy, merge_neighbours
from snapshotd.reshard.regions import Region, RegionIndex, overlap, region_of, subtract

__all__ = ["Key", "Planner", "SourceShards", "TargetShard"]

_LISTED: Final = 10


class SourceShards(Protocol):
    """
    What there is of a tensor: shards by number, from 0 on, each in a file (an opaque id, such as a rank).

    ``likeness`` is the same for tensors whose shards have the same dtypes, shapes, boxes and files: they may differ in
    their names, and in where in their files they begin.
    """

    @property
    def likeness(self) -> Hashable: ...

    def __iter__(self) -> Iterator[tuple[int, Shard]]: ...

    def __getitem__(self, number: int) -> tuple[int, Shard]: ...


class TargetShard(NamedTuple):
    """
    What of a tensor is wanted: ``box`` of the one that ``tensor`` is a part of, at byte offset ``begin`` of the file
    ``target`` (an opaque id, such as a rank). The box is inside its shape.
    """

    target: int
    tensor: TensorBox
    box: Box
    begin: int

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.tensor.itemsize


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


class _Family(NamedTuple):
    """
    Tensors of one likeness: parts of the first of them that differ in dtype or shape, each with its source, if they do,
    or else one part; and the numbers of the shards that the geometry has.
    """

    parts: Sequence[tuple[int, TensorBox]]
    numbers: list[int]
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
    Plans boxes as they are asked for, and looks at the sources of tensors alike once. For one thread at a time.

    ``find`` gives the sources of a key, and the same ones whenever it is asked; None where there are none. ``prefer``
    ranks sources, lower first (0 for local, 1 for remote); of equal boxes in equally ranked sources the one with the
    lower id is taken, so that a plan depends on nothing but what is given.
    """

    def __init__(self, find: Callable[[Key], SourceShards | None], prefer: Callable[[int], int]) -> None:
        self._find = find
        self._prefer = prefer
        self._ranking: dict[int, tuple[int, int]] = {}
        self._families: dict[Hashable, _Family] = {}

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
            key = (target.tensor.name, None) if target.tensor.scope == "global" else _private_key(target, rank_source)
            found = self._find(key)
            if found is not None:
                family = self._families.get(found.likeness)
                if family is None:
                    family = self._families[found.likeness] = self._family(found)
                copies += _fill(target, found, family, failures)
            elif not target.box.is_empty:  # an empty one needs nothing, and a rank may have skipped what has no bytes
                where = "" if key[1] is None else f" (private to source {key[1]})"
                failures.absent[key[0]] = f"{key[0]}{where}"
        failures.raise_any()
        return copies

    def _family(self, found: SourceShards) -> _Family:
        """Of several shards with the very same box, keep the preferred one only."""
        source, shard = found[0]
        parts = [(source, shard.tensor)]
        best: dict[Box, tuple[tuple[int, int], int]] = {}
        for number, (source, shard) in enumerate(found):
            tensor = shard.tensor
            if not _is_same(tensor, parts[0][1]):
                parts.append((source, tensor))
            elif not tensor.box.is_empty:
                if source not in self._ranking:
                    self._ranking[source] = (self._prefer(source), source)
                there = best.get(tensor.box)
                if there is None or self._ranking[source] < there[0]:
                    best[tensor.box] = (self._ranking[source], number)
        geometry = _Geometry([rank for rank, _ in best.values()], tuple(best), parts[0][1].itemsize)
        return _Family(parts, [number for _, number in best.values()], geometry)


def _private_key(target: TargetShard, rank_source: Mapping[int, int] | None) -> Key:
    name = target.tensor.name
    if rank_source is None:
        return name, target.target
    if target.target not in rank_source:
        raise LayoutError(f"rank_source names no source for target {target.target}, which wants {name}")
    return name, rank_source[target.target]


def _fill(target: TargetShard, found: SourceShards, family: _Family, failures: _Failures) -> list[Copy]:
    """Return the copies that fill one target shard; what cannot be filled goes to ``failures``."""
    tensor = target.tensor
    for source, part in family.parts:
        if not _is_same(part, tensor):
            failures.different[tensor.name] = (
                f"{tensor.name} is {tensor.dtype} {list(tensor.global_shape)} in target {target.target}, but "
                f"{part.dtype} {list(part.global_shape)} in source {source}"
            )
            return []
    if target.box.is_empty:
        return []
    parts, left, may_join = family.geometry.fill(target.box)
    if left:
        failures.uncovered[tensor.name] = (
            f"{tensor.name} {list(tensor.global_shape)} in target {target.target} lacks {_regions(left)}"
        )
    copies = [
        Copy(
            copy.source,
            target.target,
            found[family.numbers[number]][1].begin + copy.src_begin,
            target.begin + copy.dst_begin,
            copy.run_bytes,
            copy.dims,
        )
        for number, copy in parts
    ]
    return merge_neighbours(copies) if may_join else copies


def _is_same(one: TensorBox, other: TensorBox) -> bool:
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
