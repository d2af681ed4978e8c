"""
Boxes of a snapshot straight out of slots into tensors, past the daemon, which only says where they are.

Rule 1: what does not fill contiguous host memory (of a device, or strided) is read into some that is copied from.
Rule 2: an answer is checked before a byte of it is used; each byte is compared with a digest, and the digests with the
root that the daemon names.
Rule 3: this is a shortcut, and may fail: what cannot be read, or is not right, is left to the daemon, which reports it
and waits for what is being rebuilt. A slot or peer that failed is not tried again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch

from snapshotd.batches import batches
from snapshotd.errors import CorruptionError, PeerUnreachable, SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.reshard import Copy, cut_copy
from snapshotd.transfer import BulkClient, ObjectInfo, Piece, Read, Steering, gather
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.arrays import carrier_dtype, memory_of, view_of
from snapshotd_client.counters import logger
from snapshotd_client.errors import RestoreError
from snapshotd_client.fetch import Want, asked_for, cut
from snapshotd_client.link import Link, Question
from snapshotd_client.slotfile import SlotFile

__all__ = ["DirectReader"]

_BATCH_BYTES: Final = 8 * 1024 * 1024
"""Located at first: small, so that bytes come soon. The next ones are larger: their questions are answered while bytes
come, and each request that begins and ends costs both ends time."""

_BATCH_GROWTH: Final = 64
_MAX_BATCH_BYTES: Final = 512 * 1024 * 1024
_STAGED_BYTES: Final = 16 * 1024 * 1024  # of memory that is copied from, in one batch
_AHEAD: Final = 1
_AT_ONCE: Final = 2  # batches that are being read
_MAX_WANTS: Final = 2000
_SHARE_BYTES: Final = 4 * 1024 * 1024
_PEER_S: Final = 5.0
"""A peer that is silent for so long is left to the daemon, which has more patience."""


class _Spot(NamedTuple):
    """A want of so many bytes, and the tensor whose memory is filled for it; not its own target: it is staged."""

    want: Want
    nbytes: int
    filled: torch.Tensor

    @property
    def is_staged(self) -> bool:
        return self.filled is not self.want.target

    def room(self) -> memoryview:
        """Return the memory."""
        want = self.want
        if self.is_staged or self.filled.shape == want.piece.box.lengths:
            return memory_of(self.filled)
        return view_of(self.filled)[want.piece.slices()].reshape(-1).view(np.uint8).data


class _Reading(NamedTuple):
    """A batch that is being read; ``others`` are the numbers of those of its wants that are left to the daemon."""

    batch: Sequence[_Spot]
    others: set[int]
    jobs: Sequence[tuple[bool, Sequence[Copy], Future[int | None]]]  # whether out of a file, what, and the bytes read


class DirectReader:
    """
    Reads what it can itself, until ``deadline`` (of time.monotonic), with so many ``threads``.

    From one peer half as many at once: each keeps a core busy, and so does the kernel that brings it the bytes.
    """

    def __init__(self, link: Link, deadline: float, threads: int) -> None:
        self._link = link
        self._threads = threads
        self._steering = Steering(cancel=None, pace=partial(_check_time, deadline))
        self._deadline = deadline
        self._lock = threading.Lock()
        self._failed: set[str] = set()
        self._digests: dict[str, bytes] = {}  # of all chunks of a peer's slot, by their root
        self._files: dict[str, SlotFile] = {}  # of this node, by their root
        self._placing: set[torch.device] = set()  # devices that go on copying by themselves
        self.read_s = 0.0
        self.own_bytes = self.peer_bytes = 0

    def run(self, wants: Iterable[Want]) -> list[Want]:
        """Fill those of ``wants`` that can be, and return the others."""
        begun = time.monotonic()
        left: list[Want] = []
        todo = _batches(_spots(wants, left))
        asked: deque[tuple[Sequence[_Spot], Question]] = deque()
        reading: deque[_Reading] = deque()
        try:
            with (
                ThreadPoolExecutor(self._threads, "snapshotd-direct") as pool,
                BulkClient(timeout_s=_PEER_S, connections_per_peer=max(1, self._threads // 2)) as client,
            ):
                while True:
                    if len(asked) <= _AHEAD and (batch := next(todo, None)):
                        asked.append((batch, self._ask(batch)))
                    elif asked and len(reading) < _AT_ONCE:
                        reading.append(self._begin(*asked.popleft(), client, pool))
                    elif reading:
                        left += self._end(reading.popleft())
                        failpoint("client.mid_restore")
                    else:
                        break
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()
        for device in self._placing:
            torch.get_device_module(device).synchronize(device)
        self.read_s = time.monotonic() - begun
        return left

    def _ask(self, batch: Sequence[_Spot]) -> Question:
        with self._lock:
            known = list(self._files)
        locate = pb.RestoreLocate(boxes=asked_for(spot.want for spot in batch), known=known)
        return self._link.begin(pb.Frame(restore_locate=locate))

    def _answer(self, question: Question) -> pb.RestoreSources:
        answer = self._link.finish(question, max(0.0, self._deadline - time.monotonic()))
        if answer is None or answer.WhichOneof("body") != "restore_sources":
            return pb.RestoreSources(error="the daemon does not answer")
        return answer.restore_sources

    def _begin(
        self, batch: Sequence[_Spot], question: Question, client: BulkClient, pool: ThreadPoolExecutor
    ) -> _Reading:
        """Begin to read what can be of a batch. No thread waits for the others between two batches."""
        rooms = [spot.room() for spot in batch]  # while the daemon answers
        sources = self._answer(question)
        if sources.error:
            return _Reading(batch, set(range(len(batch))), [])  # the daemon says why again, or has waited by then
        wanted = [(slot, _copies_of(slot)) for slot in sources.slots]
        others = set(sources.others)
        _check(batch, [copies for _, copies in wanted], others)
        jobs = [
            (bool(slot.path), share, pool.submit(self._read_slot, slot, share, rooms, client))
            for slot, copies in wanted
            for share in (_shares(copies, self._threads) if slot.path else (copies,))
        ]
        return _Reading(batch, others, jobs)

    def _end(self, reading: _Reading) -> list[Want]:
        """Wait for a batch, and return the wants that are not whole."""
        batch, others, jobs = reading
        for is_file, share, job in jobs:
            nbytes = job.result()
            if nbytes is None:
                others.update(copy.target for copy in share)
            elif is_file:
                self.own_bytes += nbytes
            else:
                self.peer_bytes += nbytes
        for number, spot in enumerate(batch):
            if spot.is_staged and number not in others:
                _place(spot.want, spot.filled)
                if spot.filled.is_pinned():
                    self._placing.add(spot.want.target.device)
        return [batch[number].want for number in sorted(others)]

    def _read_slot(
        self, slot: pb.RestoreSources.Slot, copies: Sequence[Copy], rooms: Sequence[memoryview], client: BulkClient
    ) -> int | None:
        """Carry out copies out of one slot, and return the bytes read; None when that failed, which is told."""
        place = slot.path or slot.address
        if place in self._failed:
            return None
        try:
            return gather(self._read_file(slot) if slot.path else self._read_peer(slot, client), copies, rooms)
        except (SnapshotdError, OSError) as error:
            with self._lock:
                if place in self._failed:
                    return None
                self._failed.add(place)
            logger.warning("snapshotd: a slot on %s is read by the daemon instead: %s", slot.node_id, error)
            if isinstance(error, CorruptionError):
                if slot.address:
                    with contextlib.suppress(SnapshotdError):
                        client.suspect(slot.address, slot.object)
                fault = pb.RestoreFault(node_id=slot.node_id, detail=str(error)[:2000])
                self._link.post(pb.Frame(restore_fault=fault), self._link.session)
            return None

    def _read_file(self, slot: pb.RestoreSources.Slot) -> Read:
        with self._lock:
            file = self._files.get(slot.root_digest)
            if file is None:
                file = SlotFile(slot.path, slot.file_bytes, slot.digests, slot.root_digest)
                self._files[slot.root_digest] = file
        return partial(file.read, steering=self._steering)

    def _read_peer(self, slot: pb.RestoreSources.Slot, client: BulkClient) -> Read:
        def learn(info: ObjectInfo) -> None:
            if info.root != slot.root_digest:
                raise CorruptionError(f"{slot.node_id} has the root digest {info.root}, expected {slot.root_digest}")
            self._digests[info.root] = info.digests

        def read(pieces: Sequence[Piece], parts: Sequence[Copy], rooms: Sequence[memoryview]) -> int:
            client.read_verified(
                slot.address,
                slot.object,
                pieces,
                parts,
                rooms,
                digests=self._digests.get(slot.root_digest),
                file_bytes=slot.file_bytes,
                learned=learn,
                pace=self._steering.pace,
            )
            return sum(piece.into.nbytes for piece in pieces) + sum(part.nbytes for part in parts)

        return read


def _check_time(deadline: float, nbytes: int) -> None:
    if time.monotonic() > deadline:
        raise PeerUnreachable("the restore took too long (SNAPSHOTD_RESTORE_TIMEOUT_S)")


def _spots(wants: Iterable[Want], left: list[Want]) -> Iterator[_Spot]:
    """Yield what is to be read; what has no bytes, or waits for a conjugation, goes to ``left``."""
    for want in wants:
        nbytes = want.nbytes
        if not nbytes or want.target.is_conj() or want.target.is_neg():
            left.append(want)
        elif _is_plain(want):
            yield _Spot(want, nbytes, want.target)
        else:
            for part in cut(want):
                yield _Spot(part, part.nbytes, _stage(part))


def _stage(want: Want) -> torch.Tensor:
    """Return memory of a want's size: pinned, if that can be, where a device is to read it: six times as fast."""
    lengths, dtype = want.piece.box.lengths, carrier_dtype(want.target.element_size())
    if want.target.is_cuda:
        with contextlib.suppress(RuntimeError):
            return torch.empty(lengths, dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(lengths, dtype=dtype, device="cpu")


def _is_plain(want: Want) -> bool:
    """Whether a want fills contiguous host memory."""
    target = want.target
    if not target.is_cpu:
        return False
    if target.shape == want.piece.box.lengths:  # most wants fill a tensor
        return target.is_contiguous()
    return bool(view_of(target)[want.piece.slices()].flags.c_contiguous)


def _place(want: Want, staged: torch.Tensor) -> None:
    target, slices = want.target.detach().view(staged.dtype), want.piece.slices()
    with torch.no_grad():
        # torch hands out pinned memory again only when the device has read it.
        (target[slices] if slices else target).copy_(staged, non_blocking=staged.is_pinned())


def _batches(spots: Iterable[_Spot]) -> Iterator[list[_Spot]]:
    batch: list[_Spot] = []
    size = staged = 0
    limit = _BATCH_BYTES
    for spot in spots:
        if batch and (size >= limit or staged >= _STAGED_BYTES or len(batch) == _MAX_WANTS):
            yield batch
            batch, size, staged, limit = [], 0, 0, min(limit * _BATCH_GROWTH, _MAX_BATCH_BYTES)
        batch.append(spot)
        size += spot.nbytes
        staged += spot.nbytes if spot.is_staged else 0
    if batch:
        yield batch


def _shares(copies: Sequence[Copy], threads: int) -> Iterator[list[Copy]]:
    """Yield copies of a file in order of their places, as lists of about the same size for so many threads."""
    limit = max(_SHARE_BYTES, -(-sum(copy.nbytes for copy in copies) // threads))
    ordered = sorted(copies, key=lambda copy: copy.src_begin)
    return batches((part for copy in ordered for part in cut_copy(copy, limit)), limit)


def _copies_of(slot: pb.RestoreSources.Slot) -> list[Copy]:
    """Return what the daemon says of a slot; RestoreError for columns that do not belong together."""
    try:
        columns = zip(slot.wants, slot.src_begins, slot.dst_begins, slot.run_bytes, strict=True)
        copies = [Copy(0, *row) for row in columns]
        for block in slot.blocks:
            dims = tuple((repeat.count, repeat.src_stride, repeat.dst_stride) for repeat in block.repeats)
            copies[block.copy] = copies[block.copy]._replace(dims=dims)
    except (ValueError, IndexError) as error:
        raise RestoreError("the daemon's answer does not say what is copied where") from error
    return copies


def _check(batch: Sequence[_Spot], copies: Sequence[Sequence[Copy]], others: set[int]) -> None:
    """RestoreError unless each want is filled whole, or is one of the others, and nothing goes beside it."""
    filled = dict.fromkeys(range(len(batch)), 0)
    for copy in (copy for some in copies for copy in some):
        if copy.target not in filled or copy.dst_range[1] > batch[copy.target].nbytes:
            raise RestoreError("the daemon's answer does not fit what it was asked for")
        filled[copy.target] += copy.nbytes
    wrong = [n for n, nbytes in filled.items() if nbytes != (0 if n in others else batch[n].nbytes)]
    if wrong or not filled.keys() >= others:
        raise RestoreError(f"the daemon's answer does not say where {len(wrong)} of {len(batch)} boxes are")
