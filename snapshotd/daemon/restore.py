"""
Restore: tell a worker what its source has, and put the bytes that it wants where it can map them.

One ``Restore`` serves all ranks of this node under one plan: the layouts of all source ranks are read once, or known.

Rule 1: what lies in one piece in a slot of this node is answered in place, under lease until it is released. All else
goes into one buffer per request: from local slots by memory copy, from peers and durable files by verified ranges.
Rule 2: a corrupt source is reported and refused. The slot can be decoded; wrong bytes cannot be taken back. Whoever
asks again gets the slot that is there by then; batches that were answered before stay as they are.
Rule 3: a worker may read slots itself, here and on peers, and is told where: then no byte of that passes through this
process. What it fails to get that way it asks for here, where a failed source is waited for.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from snapshotd.arena import Arena, BufferFile, Lease, SealableFile
from snapshotd.daemon.boxes import Boxes
from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.layouts import Layouts
from snapshotd.daemon.locate import is_direct, located
from snapshotd.daemon.plans import PlanSources, read_bytes, slots_of_plan
from snapshotd.daemon.sources import DurableSource, LocalSource, Source, Sources
from snapshotd.errors import BudgetError, LayoutError, LocalProtocolError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import TensorBox
from snapshotd.layout.header import decode_json
from snapshotd.reshard import Copy, TargetShard, apply_copy, merge_neighbours
from snapshotd.transfer import Piece, gather
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

_Held: TypeAlias = Lease[SealableFile] | BufferFile | Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """
    The answer to one request: box i lies at ``offsets[i]`` of ``paths[files[i]]``. Valid until it is released.

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
        layouts: those that the node knows already.
    """

    def __init__(
        self,
        order: control.RestorePlan,
        world_size: int,
        arena: Arena,
        sources: Sources,
        layouts: Layouts | None = None,
    ) -> None:
        if world_size < 1:
            raise UsageError(f"there is no world of size {world_size}")
        self._order = order
        self._arena = arena
        self._lock = threading.Lock()
        self._next_batch = 1
        self._batches: dict[int, list[_Held]] = {}
        self._closed = False
        self._free: list[BufferFile] = []
        self._plan = PlanSources(order, sources)
        self._fetchers = ThreadPoolExecutor(_MAX_THREADS, "snapshotd-restore")
        try:
            with self._plan.use() as opened:
                self._layouts = (layouts or Layouts()).of(slots_of_plan(order, opened), opened)
        except BaseException:
            self._fetchers.shutdown()
            self._plan.close()
            raise
        self._boxes = Boxes(self._layouts, world_size)

    def follow(self, order: control.RestorePlan) -> None:
        """Sources have moved: go on with this newer plan for the same snapshot."""
        self._plan.follow(order)

    # ------------------------------------------------------------------------------------------ the manifest

    @property
    def is_direct(self) -> bool:
        """Whether a worker can read some of it itself."""
        with self._plan.use() as sources:
            return any(map(is_direct, sources))

    def manifest(self, rank: int) -> bytes:
        """Return the JSON that tells the worker of ``rank`` what there is; see docs/reference/formats.md."""
        source_rank = self._boxes.source_rank(rank)
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
        """
        Return (batch id, path) of a file with the manifest, which stays until the batch is released.

        It lies among the temporary files where the arena has no room: what is whole there must not be out of reach for
        want of some pages.
        """
        text = self.manifest(rank)
        try:
            buffer = self._arena.create_buffer(len(text))
        except BudgetError:
            path = _write_temporary(text)
            return self._keep([path]), str(path)
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
        wanted: worker.RestoreBoxes,
        cancel: threading.Event | None = None,
    ) -> Batch:
        """
        Put the wanted boxes where the worker of ``rank`` can map them.

        LayoutError for what no source has, Unrecoverable for what they do not cover, UsageError for more than
        MAX_BATCH_BYTES; CorruptionError and PeerError for sources that fail. Nothing is held after an error.
        """
        targets = self._boxes.targets(wanted, rank)
        held: list[_Held] = []
        try:
            with self._plan.use() as sources:
                by_target = self._boxes.copies(targets, rank, sources, cancel)
                return self._assemble(targets, by_target, sources, held, cancel)
        except BaseException:
            self._give_back(held)
            raise

    def locate(
        self,
        rank: int,
        wanted: worker.RestoreBoxes,
        known: Collection[str] = (),
        cancel: threading.Event | None = None,
    ) -> worker.RestoreSources:
        """
        Return in which slots the wanted boxes are, for a worker that reads them itself. The errors of assemble.

        ``known``: root digests of slots of this node whose digests it has.
        """
        targets = self._boxes.targets(wanted, rank)
        with self._plan.use() as sources:
            by_target = self._boxes.copies(targets, rank, sources, cancel)
            found = located(by_target, len(targets), sources, known)
        failpoint("daemon.mid_assemble")
        return found

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
            end = begin + target.nbytes
            before = copies[-1] if copies else None
            wanted += target.nbytes
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
            if isinstance(item, Path):
                item.unlink(missing_ok=True)
                continue
            with self._lock:
                kept = not self._closed and item.file_bytes == _KEPT_BYTES and len(self._free) < _MAX_KEPT
                if kept:
                    self._free.append(item)
            if not kept:
                self._arena.release(item)


def _write_temporary(data: bytes) -> Path:
    """Return a private file with ``data``; BudgetError where there is no room for it either."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="snapshotd-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise BudgetError(f"neither the arena nor {tempfile.gettempdir()} has room for {len(data)} bytes") from error
    return Path(name)


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
        return sum(gather(partial(read, sources[rank]), remote[rank], [view]) for rank in ranks)

    def read(source: Source, pieces: Sequence[Piece], parts: Sequence[Copy], targets: Sequence[memoryview]) -> int:
        check_cancel(cancel, "fetching")
        return source.read(pieces, parts, targets)

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
