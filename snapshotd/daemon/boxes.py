"""
What the sources of a restore have, by name, and the plan from the boxes that a worker wants to copies of their bytes.

Rule: rank-private tensors come from the source rank of the same number (modulo the source's world size). With another
world size that is a guess for "param" and "optim": it is made only if all source ranks agree on the bytes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import xxhash

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.plans import read_bytes
from snapshotd.daemon.sources import Source
from snapshotd.errors import LayoutError, Unrecoverable, UsageError
from snapshotd.layout import CHUNK_BYTES, Box, Layout
from snapshotd.reshard import Copy, Key, Planner, SourceShard, TargetShard
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["Boxes"]

_GUESSED_KINDS: Final = frozenset({"param", "optim"})


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
        self._shards: defaultdict[tuple[str, str], list[SourceShard]] = defaultdict(list)
        for rank, layout in enumerate(layouts):
            for shard in layout.shards:
                tensor = shard.tensor
                self._shards[tensor.name, tensor.scope].append(SourceShard(rank, tensor, shard.begin))

    def source_rank(self, rank: int) -> int:
        """Return the source rank whose private state ``rank`` goes on with."""
        return rank % self._num_sources

    def targets(self, wants: Sequence[worker.RestoreWant.Want], rank: int) -> list[TargetShard]:
        """
        Return the boxes that ``rank`` wants, numbered, with the dtypes and shapes that the sources have.

        LayoutError for what no source has, UsageError for what cannot be.
        """
        if not 0 <= rank < self._world_size:
            raise UsageError(f"there is no rank {rank} in a world of {self._world_size}")
        cut: dict[tuple[tuple[int, ...], ...], Box] = {}  # many tensors are of one shape, and cut alike
        return [self._target(index, want, rank, cut) for index, want in enumerate(wants)]

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

    def _find(self, key: Key) -> Sequence[SourceShard]:
        name, source = key
        if source is None:
            return self._shards.get((name, "global"), ())
        return [shard for shard in self._shards.get((name, "rank"), ()) if shard.source == source]

    def _target(
        self,
        index: int,
        want: worker.RestoreWant.Want,
        rank: int,
        cut: dict[tuple[tuple[int, ...], ...], Box],
    ) -> TargetShard:
        name, scope = want.name, want.scope
        if scope not in ("global", "rank"):
            raise UsageError(f"{name!r:.100}: the scope must be 'global' or 'rank', not {scope!r:.40}")
        shards = self._shards.get((name, scope), [])
        if scope == "rank":
            shards = [shard for shard in shards if shard.source == self.source_rank(rank)]
        if not shards:
            raise LayoutError(f"the source has no tensor {name!r:.200} of scope {scope!r}")
        tensor = shards[0].tensor
        place = tensor.global_shape, tuple(want.offsets[:]), tuple(want.lengths[:])  # a slice is read at once
        box = cut.get(place)
        if box is not None:
            return TargetShard(index, tensor.part(box, is_inside=True), 0)
        box = Box(*place[1:])
        part = tensor.part(box)
        cut[place] = box
        return TargetShard(index, part, 0)

    def _check_private(
        self, name: str, source_rank: int, sources: Sequence[Source], cancel: threading.Event | None
    ) -> None:
        """Refuse a rank-private parameter or optimizer state when which rank's it should be is not clear."""
        shards = self._shards[name, "rank"]
        kinds = {shard.tensor.kind for shard in shards if shard.source == source_rank}
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


def _differs(shards: Sequence[SourceShard], sources: Sequence[Source], cancel: threading.Event | None) -> str:
    """Return in words how the ranks differ, "" if all of them have the same boxes with the same bytes."""
    digests: dict[int, list[tuple[object, ...]]] = {rank: [] for rank in range(len(sources))}
    for shard in shards:
        check_cancel(cancel, "restoring")
        tensor = shard.tensor
        digest = _digest(sources[shard.source], shard.begin, tensor.nbytes)
        digests[shard.source].append((tensor.dtype, tensor.global_shape, tensor.box, digest))
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
