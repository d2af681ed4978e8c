"""
What the sources of a restore have, by name, and the plan from the boxes that a worker wants to copies of their bytes.

Rule: rank-private tensors come from the source rank of the same number (modulo the source's world size). With another
world size that is a guess for "param" and "optim": it is made only if all source ranks agree on the bytes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

import xxhash

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.plans import read_bytes
from snapshotd.daemon.sources import Source
from snapshotd.errors import LayoutError, Unrecoverable, UsageError
from snapshotd.layout import CHUNK_BYTES, Box, Index, Layout, Scope, Shard, TensorBox
from snapshotd.reshard import Copy, Key, Planner, SourceShards, TargetShard
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["Boxes"]

_GUESSED_KINDS: Final = frozenset({"param", "optim"})

_Where: TypeAlias = tuple[str, Scope]


@dataclass(frozen=True, slots=True)
class _Group:
    """
    Source ranks with the same tensors in the same order: a place means the same tensor in all of their layouts.

    ``index`` is that of all: shards at places with the same number are alike in each layout.
    """

    number: int
    ranks: list[int]
    layouts: list[Layout]
    index: Index


class _Spots:
    """The shards of a tensor, which is at one place or more of one group or more: the SourceShards of a plan."""

    __slots__ = ("_spots",)

    def __init__(self, spots: Sequence[tuple[_Group, int]]) -> None:
        self._spots = spots

    @property
    def likeness(self) -> tuple[tuple[int, int], ...]:
        return tuple([(group.number, group.index.likes[place]) for group, place in self._spots])

    def __iter__(self) -> Iterator[tuple[int, Shard]]:
        for group, place in self._spots:
            for rank, layout in zip(group.ranks, group.layouts, strict=True):
                yield rank, layout.shards[place]

    def __getitem__(self, number: int) -> tuple[int, Shard]:
        for group, place in self._spots:
            if number < len(group.ranks):
                return group.ranks[number], group.layouts[number].shards[place]
            number -= len(group.ranks)
        raise IndexError(number)


class Boxes:
    """
    All boxes of the source ranks whose ``layouts`` these are, in order of rank, for a world of ``world_size`` that
    restores. Safe to use from many threads.
    """

    def __init__(self, layouts: Sequence[Layout], world_size: int) -> None:
        self._num_sources = len(layouts)
        self._world_size = world_size
        self._lock = threading.Lock()
        self._planner: tuple[list[bool], Planner] | None = None  # and which sources it took for local
        self._equal: dict[str, str] = {}  # name of a rank-private tensor: what is wrong with it, or ""
        self._layouts = tuple(layouts)
        self._groups = _groups_of(layouts)
        self._alone = [_Group(-1 - rank, [rank], [layout], layout.index) for rank, layout in enumerate(layouts)]

    def source_rank(self, rank: int) -> int:
        """Return the source rank whose private state ``rank`` goes on with."""
        return rank % self._num_sources

    def targets(self, wanted: worker.RestoreBoxes, rank: int) -> list[TargetShard]:
        """
        Return the boxes that ``rank`` wants, numbered, with the dtypes and shapes that the sources have.

        LayoutError for what no source has, UsageError for what cannot be.
        """
        if not 0 <= rank < self._world_size:
            raise UsageError(f"there is no rank {rank} in a world of {self._world_size}")
        names, cut_of = list(wanted.names), list(wanted.cut_of)
        cuts = [(_scope_of(cut), Box(tuple(cut.offsets), tuple(cut.lengths))) for cut in wanted.cuts]
        if len(names) != len(cut_of) or max(cut_of, default=-1) >= len(cuts):
            raise UsageError(f"{len(names)} names, {len(cut_of)} numbers and {len(cuts)} cuts do not make up boxes")
        inside: set[tuple[int, tuple[int, ...]]] = set()  # many tensors are of one shape, and cut alike
        targets = []
        for index, (name, number) in enumerate(zip(names, cut_of, strict=True)):
            scope, box = cuts[number]
            tensor = self._tensor(name, scope, rank)
            if (number, tensor.global_shape) not in inside:
                tensor.check_inside(box)
                inside.add((number, tensor.global_shape))
            targets.append(TargetShard(index, tensor, box, 0))
        return targets

    def copies(
        self, targets: Sequence[TargetShard], rank: int, sources: Sequence[Source], cancel: threading.Event | None
    ) -> dict[int, list[Copy]]:
        """
        Return what fills each target, by its number; local sources are preferred.

        Unrecoverable for what the sources do not cover, or what is private to other ranks; the errors of reading.
        """
        source_rank = self.source_rank(rank)
        private = [target for target in targets if target.tensor.scope == "rank"]
        for name in sorted({target.tensor.name for target in private}):
            self._check_private(name, source_rank, sources, cancel)
        rank_source = {target.target: source_rank for target in private}
        local = [source.is_local for source in sources]
        with self._lock:
            if self._planner is None or self._planner[0] != local:
                self._planner = local, Planner(self._find, lambda source: 0 if local[source] else 1)
            copies = self._planner[1].plan(targets, rank_source)
        by_target: defaultdict[int, list[Copy]] = defaultdict(list)
        for copy in copies:
            by_target[copy.target].append(copy)
        return by_target

    def _find(self, key: Key) -> SourceShards | None:
        name, source = key
        groups = self._groups if source is None else [self._alone[source]]
        where: _Where = name, "global" if source is None else "rank"
        spots = [(group, place) for group in groups for place in group.index.places.get(where, ())]
        return _Spots(spots) if spots else None

    def _tensor(self, name: str, scope: Scope, rank: int) -> TensorBox:
        """Return a part of what ``rank`` knows as ``name``."""
        for group in self._groups if scope == "global" else [self._alone[self.source_rank(rank)]]:
            for place in group.index.places.get((name, scope), ()):
                return group.layouts[0].shards[place].tensor
        raise LayoutError(f"the source has no tensor {name!r:.200} of scope {scope!r}")

    def _check_private(
        self, name: str, source_rank: int, sources: Sequence[Source], cancel: threading.Event | None
    ) -> None:
        """Refuse a rank-private parameter or optimizer state when which rank's it should be is not clear."""
        shards = [
            (rank, layout.shards[place])
            for rank, layout in enumerate(self._layouts)
            for place in layout.index.places.get((name, "rank"), ())
        ]
        kinds = {shard.tensor.kind for source, shard in shards if source == source_rank}
        if self._world_size == self._num_sources or not kinds & _GUESSED_KINDS:
            return
        with self._lock:
            wrong = self._equal.get(name)
        if wrong is None:
            wrong = _differs(shards, sources, cancel)
            with self._lock:
                self._equal[name] = wrong
        if wrong:
            raise Unrecoverable(
                f"{name!r} is private to each rank, and {wrong}: it cannot be restored with {self._world_size} ranks "
                f"from {self._num_sources}. Restore with {self._num_sources} ranks, or make it a DTensor"
            )


def _groups_of(layouts: Sequence[Layout]) -> list[_Group]:
    by_names: defaultdict[bytes, list[int]] = defaultdict(list)
    for rank, layout in enumerate(layouts):
        by_names[layout.index.names].append(rank)
    groups = []
    for number, ranks in enumerate(by_names.values()):
        same = [layouts[rank] for rank in ranks]
        numbers: dict[tuple[int, ...], int] = {}
        rows = {layout.index.likes: None for layout in same}  # mostly one: models are cut alike on all ranks
        likes = tuple([numbers.setdefault(column, len(numbers)) for column in zip(*rows, strict=True)])
        groups.append(_Group(number, ranks, same, same[0].index._replace(likes=likes)))
    return groups


def _scope_of(cut: worker.RestoreBoxes.Cut) -> Scope:
    if cut.scope not in ("global", "rank"):
        raise UsageError(f"the scope of a box must be 'global' or 'rank', not {cut.scope!r:.40}")
    return cast("Scope", cut.scope)


def _differs(
    shards: Sequence[tuple[int, Shard]], sources: Sequence[Source], cancel: threading.Event | None
) -> str:
    """Return in words how the ranks differ, "" if all of them have the same boxes with the same bytes."""
    digests: dict[int, list[tuple[object, ...]]] = {rank: [] for rank in range(len(sources))}
    for source, shard in shards:
        check_cancel(cancel, "restoring")
        tensor = shard.tensor
        digest = _digest(sources[source], shard.begin, tensor.nbytes)
        digests[source].append((tensor.dtype, tensor.global_shape, tensor.box, digest))
    for rank, found in digests.items():
        if not found:
            return f"rank {rank} of the source does not have it"
        if found != digests[0]:
            return f"rank {rank} of the source has another value than rank 0"
    return ""


def _digest(source: Source, begin: int, nbytes: int) -> bytes:
    digest = xxhash.xxh3_128()
    for at in range(begin, begin + nbytes, 32 * CHUNK_BYTES):
        digest.update(read_bytes(source, at, min(at + 32 * CHUNK_BYTES, begin + nbytes)))
    return digest.digest()
