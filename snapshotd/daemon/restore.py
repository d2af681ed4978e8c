"""
Restore: tell a worker what its source has, and put the bytes that it wants where it can map them.

One ``Restore`` serves all ranks of this node under one plan: the layouts of all source ranks are read once.

Rule 1: what lies in one piece in a slot of this node is answered in place, under lease until it is released. All else
goes into one buffer per request: from local slots by memory copy, from peers and durable files by verified ranges.
Rule 2: a corrupt source is reported and refused. The slot can be decoded; wrong bytes cannot be taken back. Whoever
asks again gets the slot that is there by then; batches that were answered before stay as they are.
Rule 3: rank-private tensors come from the source rank of the same number (modulo the source's world size). With
another world size that is a guess for "param" and "optim": it is made only if all source ranks agree on the bytes.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Final, TypeAlias

import xxhash

from snapshotd.arena import Arena, BufferFile, Lease, SealableFile
from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.gather import gather
from snapshotd.daemon.plans import PlanSources, read_bytes, read_layouts
from snapshotd.daemon.sources import DurableSource, LocalSource, Source, Sources
from snapshotd.errors import LayoutError, LocalProtocolError, Unrecoverable, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import CHUNK_BYTES, Box, TensorBox
from snapshotd.layout.header import decode_json
from snapshotd.reshard import Copy, SourceShard, TargetShard, apply_copy, merge_neighbours, plan
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["MAX_BATCH_BYTES", "Batch", "Restore"]

MAX_BATCH_BYTES: Final = 256 * 1024 * 1024
"""Of one request, not counting what is answered in place: bounds the buffers of a restore."""

_KEPT_BYTES: Final = 17 * 1024 * 1024
"""A worker asks for 16 MiB at once. Memory that is touched for the first time costs more than the network, so buffers
of this size are used again."""

_KEPT_FROM_BYTES: Final = 2 * 1024 * 1024
_MAX_KEPT: Final = 32

_ALIGN_BYTES: Final = 64
"""Of each want in a buffer: the worker makes tensors of any element type on it."""

_MAX_THREADS: Final = 8

_GUESSED_KINDS: Final = frozenset({"param", "optim"})


_Held: TypeAlias = Lease[SealableFile] | BufferFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """
    The answer to one request: wants[i] lies at ``offsets[i]`` of ``paths[files[i]]``. Valid until it is released.

    local_bytes, remote_bytes: where the wanted bytes came from. fetched_bytes: what that took, in whole chunks.
    """

    batch_id: int
    paths: tuple[str, ...]
    files: tuple[int, ...]
    offsets: tuple[int, ...]
    local_bytes: int
    remote_bytes: int
    fetched_bytes: int

    def frame(self) -> worker.RestoreReady:
        """Return the answer for the worker."""
        return worker.RestoreReady(
            batch_id=self.batch_id,
            paths=self.paths,
            files=self.files,
            offsets=self.offsets,
            local_bytes=self.local_bytes,
            remote_bytes=self.remote_bytes,
        )


class Restore:
    """
    Serves the bytes of one plan to the ranks of this node. Safe to use from many threads; ``close`` releases all.

    Args:
        world_size: of the epoch that restores.
        arena: where buffers are made.
    """

    def __init__(self, order: control.RestorePlan, world_size: int, arena: Arena, sources: Sources) -> None:
        if world_size < 1:
            raise UsageError(f"there is no world of size {world_size}")
        self._order = order
        self._world_size = world_size
        self._arena = arena
        self._lock = threading.Lock()
        self._next_batch = 1
        self._batches: dict[int, list[_Held]] = {}
        self._closed = False
        self._free: list[BufferFile] = []
        self._equal: dict[str, str] = {}  # name of a rank-private tensor: what is wrong with it, or ""
        self._plan = PlanSources(order, sources)
        self._fetchers = ThreadPoolExecutor(_MAX_THREADS, "snapshotd-restore")
        try:
            with self._plan.use() as opened:
                self._layouts = read_layouts(opened)
        except BaseException:
            self._fetchers.shutdown()
            self._plan.close()
            raise
        self._shards: defaultdict[tuple[str, str], list[SourceShard]] = defaultdict(list)
        for rank, layout in enumerate(self._layouts):
            for shard in layout.shards:
                self._shards[shard.tensor.name, shard.tensor.scope].append(
                    SourceShard(source=rank, tensor=shard.tensor, begin=shard.begin)
                )

    def follow(self, order: control.RestorePlan) -> None:
        """Sources have moved: go on with this newer plan for the same snapshot."""
        self._plan.follow(order)

    # ------------------------------------------------------------------------------------------ the manifest

    def source_rank(self, rank: int) -> int:
        """Return the source rank whose private state ``rank`` goes on with."""
        return rank % len(self._layouts)

    def manifest(self, rank: int) -> bytes:
        """Return the JSON that tells the worker of ``rank`` what there is; see docs/reference/restore-manifest."""
        source_rank = self.source_rank(rank)
        tensors: dict[tuple[str, str], TensorBox] = {}
        ties: dict[str, str] = {}
        for number, layout in enumerate(self._layouts):
            for shard in layout.shards:
                tensor = shard.tensor
                if tensor.scope == "rank" and number != source_rank:
                    continue
                first = tensors.setdefault((tensor.name, tensor.scope), tensor)
                if (first.dtype, first.global_shape) != (tensor.dtype, tensor.global_shape):
                    raise LayoutError(
                        f"{tensor.name} is {first.dtype} {list(first.global_shape)} in one source rank, but "
                        f"{tensor.dtype} {list(tensor.global_shape)} in rank {number}"
                    )
            if number != source_rank:
                ties.update(layout.ties)
        ties.update(self._layouts[source_rank].ties)
        document = {
            "version": 1,
            "source": {
                "epoch": self._order.source_epoch,
                "step": self._order.source_step,
                "world_size": len(self._layouts),
                "rank": source_rank,
            },
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": tensor.global_shape,
                    "scope": tensor.scope,
                    "kind": tensor.kind,
                }
                for tensor in tensors.values()
            ],
            "ties": ties,
            "meta": self._meta(source_rank),
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def write_manifest(self, rank: int) -> tuple[int, str]:
        """Return (batch id, path) of a file with the manifest, which stays until the batch is released."""
        text = self.manifest(rank)
        buffer = self._arena.create_buffer(len(text))
        try:
            buffer.view[:] = text
            return self._keep([buffer]), str(buffer.path)
        except BaseException:
            self._arena.release(buffer)
            raise

    # ------------------------------------------------------------------------------------------ the bytes

    def assemble(
        self,
        rank: int,
        wants: Sequence[worker.RestoreWant.Want],
        cancel: threading.Event | None = None,
    ) -> Batch:
        """
        Put the wanted boxes where the worker of ``rank`` can map them.

        LayoutError for what no source has, Unrecoverable for what they do not cover, UsageError for more than
        MAX_BATCH_BYTES; CorruptionError and PeerError for sources that fail. Nothing is held after an error.
        """
        if not 0 <= rank < self._world_size:
            raise UsageError(f"there is no rank {rank} in a world of {self._world_size}")
        targets = [self._target(index, want, rank) for index, want in enumerate(wants)]
        held: list[_Held] = []
        try:
            with self._plan.use() as sources:
                by_target = self._copies(targets, self.source_rank(rank), sources, cancel)
                return self._assemble(targets, by_target, sources, held, cancel)
        except BaseException:
            self._give_back(held)
            raise

    def release(self, batch_id: int) -> None:
        """Let go of a batch's leases and buffers; an unknown one is no error, the order may come twice."""
        with self._lock:
            held = self._batches.pop(batch_id, [])
        self._give_back(held)

    def close(self) -> None:
        """Let go of everything. The worker's mappings stay valid, but nobody may rely on their bytes any more."""
        with self._lock:
            self._closed = True
            batches = list(self._batches.values())
            self._batches.clear()
            free, self._free = self._free, []
        for held in batches:
            self._give_back(held)
        self._give_back(free)
        self._fetchers.shutdown(wait=False)
        self._plan.close()

    def __enter__(self) -> Restore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ insides

    def _target(self, index: int, want: worker.RestoreWant.Want, rank: int) -> TargetShard:
        """The wanted box, with the dtype and shape that the source has."""
        if want.scope not in ("global", "rank"):
            raise UsageError(f"{want.name!r:.100}: the scope must be 'global' or 'rank', not {want.scope!r:.40}")
        shards = self._shards.get((want.name, want.scope), [])
        if want.scope == "rank":
            shards = [shard for shard in shards if shard.source == self.source_rank(rank)]
        if not shards:
            raise LayoutError(f"the source has no tensor {want.name!r:.200} of scope {want.scope!r}")
        tensor = shards[0].tensor.part(Box(tuple(want.offsets), tuple(want.lengths)))
        return TargetShard(target=index, tensor=tensor, begin=0)

    def _copies(
        self,
        targets: Sequence[TargetShard],
        source_rank: int,
        sources: Sequence[Source],
        cancel: threading.Event | None,
    ) -> dict[int, list[Copy]]:
        names = {(target.tensor.name, target.tensor.scope) for target in targets}
        for name, scope in sorted(names):
            if scope == "rank":
                self._check_private(name, source_rank, sources, cancel)
        # Both scopes of one name may be wanted; the planner tells them apart by the scope of the target.
        by_target: defaultdict[int, list[Copy]] = defaultdict(list)
        for scope in ("global", "rank"):
            some = [target for target in targets if target.tensor.scope == scope]
            if not some:
                continue
            made = plan(
                (shard for name, of in names if of == scope for shard in self._shards[name, of]),
                some,
                prefer=lambda source: 0 if sources[source].is_local else 1,
                rank_source={target.target: source_rank for target in some},
            )
            for copy in made.copies:
                by_target[copy.target].append(copy)
        return by_target

    def _assemble(
        self,
        targets: Sequence[TargetShard],
        by_target: dict[int, list[Copy]],
        sources: Sequence[Source],
        held: list[_Held],
        cancel: threading.Event | None,
    ) -> Batch:
        paths: list[str] = []
        files = [0] * len(targets)
        offsets = [0] * len(targets)
        place: dict[int, int] = {}  # target: offset in the buffer
        in_place: dict[int, int] = {}  # source: index in paths
        end = wanted = local = 0
        before: Copy | None = None  # the last copy into the buffer
        for target in targets:
            copies = by_target.get(target.target, [])
            source = sources[copies[0].source] if len(copies) == 1 and not copies[0].dims else None
            if isinstance(source, LocalSource):
                copy = copies[0]
                source.view(*copy.src_range).release()
                if copy.source not in in_place:
                    in_place[copy.source] = len(paths)
                    held.append(self._arena.lease(source.obj))
                    paths.append(str(source.obj.path))
                files[target.target], offsets[target.target] = in_place[copy.source], copy.src_begin
                local += copy.nbytes
                continue
            place[target.target] = begin = _place(copies, end, before)
            end = begin + target.tensor.nbytes
            before = copies[-1] if copies else None
            wanted += target.tensor.nbytes
        if wanted > MAX_BATCH_BYTES:
            raise UsageError(f"{wanted} bytes were asked for at once; the limit is {MAX_BATCH_BYTES}: ask for less")
        remote = fetched = 0
        if place:
            buffer = self._buffer(end)
            held.append(buffer)
            for number, offset in place.items():
                files[number], offsets[number] = len(paths), offset
            paths.append(str(buffer.path))
            copies = [copy.shifted(offset) for number, offset in place.items() for copy in by_target.get(number, [])]
            copied, remote, fetched = _fill(buffer.view, merge_neighbours(copies), sources, self._fetchers, cancel)
            local += copied
        return Batch(
            batch_id=self._keep(held),
            paths=tuple(paths),
            files=tuple(files),
            offsets=tuple(offsets),
            local_bytes=local,
            remote_bytes=remote,
            fetched_bytes=fetched,
        )

    def _check_private(
        self, name: str, source_rank: int, sources: Sequence[Source], cancel: threading.Event | None
    ) -> None:
        """Refuse a rank-private parameter or optimizer state when which rank's it should be is not clear."""
        shards = self._shards[name, "rank"]
        kinds = {shard.tensor.kind for shard in shards if shard.source == source_rank}
        if self._world_size == len(self._layouts) or not kinds & _GUESSED_KINDS:
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
                f"from {len(self._layouts)}. Restore with {len(self._layouts)} ranks, or make it a DTensor"
            )

    def _meta(self, source_rank: int) -> str:
        """The step's own JSON of a source rank, as text; FormatError when it is not JSON."""
        with self._plan.use() as sources:
            source = sources[source_rank]
            text = read_bytes(source, *self._layouts[source_rank].meta).strip(b" \0\t\r\n")
            if not text:
                return ""
            decode_json(text, f"__meta__ of {source.name}")
            return text.decode()

    def _keep(self, held: list[_Held]) -> int:
        with self._lock:
            if self._closed:
                raise LocalProtocolError("the restore is closed")
            batch_id = self._next_batch
            self._next_batch += 1
            self._batches[batch_id] = held
            return batch_id

    def _buffer(self, nbytes: int) -> BufferFile:
        """Return a buffer of at least so many bytes: memory that was used before, or else new."""
        with self._lock:
            for place, buffer in enumerate(self._free):
                if buffer.file_bytes >= nbytes:
                    return self._free.pop(place)
        kept = _KEPT_FROM_BYTES <= nbytes <= _KEPT_BYTES
        return self._arena.create_buffer(_KEPT_BYTES if kept else max(nbytes, _ALIGN_BYTES))

    def _give_back(self, held: Iterable[_Held]) -> None:
        for item in held:
            if isinstance(item, Lease):
                item.close()
                continue
            with self._lock:
                kept = not self._closed and item.file_bytes == _KEPT_BYTES and len(self._free) < _MAX_KEPT
                if kept:
                    self._free.append(item)
            if not kept:
                self._arena.release(item)


def _place(copies: Sequence[Copy], end: int, before: Copy | None) -> int:
    """
    Return where in the buffer, from ``end`` on, a want goes: as it lies in its source, so that neighbours there are
    neighbours here, and one long run to fetch. Elements are aligned there.
    """
    if len(copies) != 1 or copies[0].dims:
        return -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
    copy = copies[0]
    if before is not None and not before.dims and (before.source, before.src_range[1]) == (copy.source, copy.src_begin):
        return end
    return -(-end // _ALIGN_BYTES) * _ALIGN_BYTES + copy.src_begin % _ALIGN_BYTES


def _fill(
    view: memoryview,
    copies: Iterable[Copy],
    sources: Sequence[Source],
    fetchers: ThreadPoolExecutor,
    cancel: threading.Event | None,
) -> tuple[int, int, int]:
    """Carry out all copies; peers in parallel, local ones meanwhile. Returns bytes (local, remote, fetched)."""
    by_source: defaultdict[int, list[Copy]] = defaultdict(list)
    for copy in copies:
        by_source[copy.source].append(copy)
    remote = {rank: some for rank, some in by_source.items() if not sources[rank].is_local}
    by_place: defaultdict[str, list[int]] = defaultdict(list)
    for rank in sorted(remote):
        source = sources[rank]
        by_place[source.name if isinstance(source, DurableSource) else source.node_id].append(rank)

    def fetch(ranks: Sequence[int]) -> int:
        return sum(gather(sources[rank], remote[rank], view, cancel) for rank in ranks)

    local_bytes = 0
    fetches: list[Future[int]] = []
    try:
        for ranks in by_place.values():
            fetches.append(_begin(fetchers, fetch, ranks))
        for rank, some in by_source.items():
            source = sources[rank]
            if isinstance(source, LocalSource):
                for copy in some:
                    check_cancel(cancel, "restoring")
                    source.view(*copy.src_range).release()
                    apply_copy(copy, source.obj.view, view)
                    local_bytes += copy.nbytes
                failpoint("daemon.mid_assemble")
    except BaseException:
        wait([future for future in fetches if not future.cancel()])
        raise
    wait(fetches)  # all of them: nothing may write into the buffer any more when this ends, however it does
    fetched = sum(future.result() for future in fetches)
    if remote:
        failpoint("daemon.mid_assemble")
    return local_bytes, sum(copy.nbytes for some in remote.values() for copy in some), fetched


def _begin(fetchers: ThreadPoolExecutor, fetch: Callable[[Sequence[int]], int], ranks: Sequence[int]) -> Future[int]:
    try:
        return fetchers.submit(fetch, ranks)
    except RuntimeError as error:
        raise LocalProtocolError("the restore is closed") from error


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
    for at in range(begin, begin + nbytes, 16 * CHUNK_BYTES):
        digest.update(read_bytes(source, at, min(at + 16 * CHUNK_BYTES, begin + nbytes)))
    return digest.digest()
