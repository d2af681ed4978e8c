"""
Boxes of a snapshot straight out of peers' slots into tensors, past the daemon, which only says where they are.

Rule 1: only what fills contiguous host memory is read so.
Rule 2: an answer is checked before a byte of it is used, each byte that a peer sends is compared with a digest, and the
digests with the root that the daemon names.
Rule 3: this is a shortcut, and may fail: what a peer does not give, or not right, is left to the daemon, which reports
it and waits for what is being rebuilt. A peer that failed is not asked again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from snapshotd.errors import CorruptionError, PeerUnreachable, SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.reshard import Copy
from snapshotd.transfer import BulkClient, ObjectInfo, Piece, Read, gather
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.arrays import view_of
from snapshotd_client.counters import logger
from snapshotd_client.errors import RestoreError
from snapshotd_client.fetch import Want, asked_for
from snapshotd_client.link import Link, Question

__all__ = ["PeerReader"]

_BATCH_BYTES: Final = 64 * 1024 * 1024
"""Located at once: small enough that the first bytes come soon, large enough that the question costs nothing."""

_MAX_WANTS: Final = 500
_PEER_S: Final = 5.0
"""A peer that is silent for so long is left to the daemon, which has more patience."""


class _Spot(NamedTuple):
    """A want, and the memory that it is to fill."""

    want: Want
    room: memoryview


class PeerReader:
    """Reads what it can from peers, until ``deadline`` (of time.monotonic), so many slots at a time as ``threads``."""

    def __init__(self, link: Link, deadline: float, threads: int) -> None:
        self._link = link
        self._deadline = deadline
        self._threads = threads
        self._failed: set[str] = set()
        self._digests: dict[str, bytes] = {}  # of all chunks, by their root
        self.read_s = 0.0
        self.read_bytes = 0

    def run(self, wants: Iterable[Want]) -> list[Want]:
        """Fill those of ``wants`` that can be, and return the others."""
        begun = time.monotonic()
        left: list[Want] = []
        batches = _batches(_spots(wants, left))
        with (
            ThreadPoolExecutor(self._threads, "snapshotd-peers") as pool,
            BulkClient(timeout_s=_PEER_S, connections_per_peer=self._threads) as client,
        ):
            batch = next(batches, None)
            question = self._ask(batch) if batch else None
            while batch and question:
                following = next(batches, None)
                # The daemon looks for these while those before are read.
                next_question = self._ask(following) if following else None
                left += self._read(batch, self._answer(question), client, pool)
                failpoint("client.mid_restore")
                batch, question = following, next_question
        self.read_s = time.monotonic() - begun
        return left

    def _ask(self, batch: Sequence[_Spot]) -> Question:
        locate = pb.RestoreLocate(wants=[asked_for(spot.want) for spot in batch])
        return self._link.begin(pb.Frame(restore_locate=locate))

    def _answer(self, question: Question) -> pb.RestoreSources:
        answer = self._link.finish(question, max(0.0, self._deadline - time.monotonic()))
        if answer is None or answer.WhichOneof("body") != "restore_sources":
            return pb.RestoreSources(error="the daemon does not answer")
        return answer.restore_sources

    def _read(
        self, batch: Sequence[_Spot], sources: pb.RestoreSources, client: BulkClient, pool: ThreadPoolExecutor
    ) -> list[Want]:
        """Read what peers have of a batch, and return the wants that are not whole afterwards."""
        if sources.error:
            return [spot.want for spot in batch]  # the daemon says why again, or has waited by then
        copies = [_copies_of(peer) for peer in sources.peers]
        others = set(sources.others)
        _check(batch, copies, others)
        rooms = [spot.room for spot in batch]

        def read(number: int) -> int | None:
            return self._read_peer(sources.peers[number], copies[number], rooms, client)

        for some, nbytes in zip(copies, pool.map(read, range(len(copies))), strict=True):
            self.read_bytes += nbytes or 0
            if nbytes is None:
                others.update(copy.target for copy in some)
        return [batch[number].want for number in sorted(others)]

    def _read_peer(
        self, peer: pb.RestoreSources.Peer, copies: Sequence[Copy], rooms: Sequence[memoryview], client: BulkClient
    ) -> int | None:
        """Carry out the copies out of one slot, and return the bytes read; None when that failed, which is told."""
        if peer.address in self._failed:
            return None
        try:
            return gather(_read_from(client, peer, self._digests, self._check_time), copies, rooms)
        except SnapshotdError as error:
            self._failed.add(peer.address)
            logger.warning("snapshotd: a slot on %s is read by the daemon instead: %s", peer.node_id, error)
            if isinstance(error, CorruptionError):
                with contextlib.suppress(SnapshotdError):
                    client.suspect(peer.address, peer.object)
                fault = pb.RestoreFault(node_id=peer.node_id, detail=str(error)[:2000])
                self._link.post(pb.Frame(restore_fault=fault), self._link.session)
            return None

    def _check_time(self, nbytes: int) -> None:
        if time.monotonic() > self._deadline:
            raise PeerUnreachable("the restore took too long (SNAPSHOTD_RESTORE_TIMEOUT_S)")


def _read_from(
    client: BulkClient, peer: pb.RestoreSources.Peer, known: dict[str, bytes], pace: Callable[[int], None]
) -> Read:
    """
    Return what reads from ``peer``'s object, as ``gather`` asks for it; ``known`` are chunk digests by their root.

    The errors of BulkClient; CorruptionError for an object that is not the one that is meant.
    """

    def learn(info: ObjectInfo) -> None:
        if info.root != peer.root_digest:
            raise CorruptionError(f"{peer.node_id} has the root digest {info.root}, expected {peer.root_digest}")
        known[info.root] = info.digests

    def read(pieces: Sequence[Piece], parts: Sequence[Copy], rooms: Sequence[memoryview]) -> int:
        client.read_verified(
            peer.address,
            peer.object,
            pieces,
            parts,
            rooms,
            digests=known.get(peer.root_digest),
            file_bytes=peer.file_bytes,
            learned=learn,
            pace=pace,
        )
        return sum(piece.into.nbytes for piece in pieces) + sum(part.nbytes for part in parts)

    return read


def _spots(wants: Iterable[Want], left: list[Want]) -> Iterator[_Spot]:
    """Yield the wants that fill contiguous host memory; the others go to ``left``."""
    for want in wants:
        room = _room_of(want)
        if room is None:
            left.append(want)
        else:
            yield _Spot(want, room)


def _room_of(want: Want) -> memoryview | None:
    if want.target.device.type != "cpu" or want.target.is_conj() or want.target.is_neg() or not want.nbytes:
        return None
    whole, slices = view_of(want.target), want.piece.slices()
    part = whole[slices] if slices else whole
    return part.reshape(-1).view(np.uint8).data if part.flags.c_contiguous else None


def _batches(spots: Iterable[_Spot]) -> Iterator[list[_Spot]]:
    batch: list[_Spot] = []
    size = 0
    for spot in spots:
        if batch and (size + spot.room.nbytes > _BATCH_BYTES or len(batch) == _MAX_WANTS):
            yield batch
            batch, size = [], 0
        batch.append(spot)
        size += spot.room.nbytes
    if batch:
        yield batch


def _copies_of(peer: pb.RestoreSources.Peer) -> list[Copy]:
    return [
        Copy(
            source=0,
            target=copy.want,
            src_begin=copy.src_begin,
            dst_begin=copy.dst_begin,
            run_bytes=copy.run_bytes,
            dims=tuple((repeat.count, repeat.src_stride, repeat.dst_stride) for repeat in copy.repeats),
        )
        for copy in peer.copies
    ]


def _check(batch: Sequence[_Spot], copies: Sequence[Sequence[Copy]], others: set[int]) -> None:
    """RestoreError unless each want is filled whole, or is one of the others, and nothing goes beside it."""
    filled = dict.fromkeys(range(len(batch)), 0)
    for copy in (copy for some in copies for copy in some):
        if copy.target not in filled or copy.dst_range[1] > batch[copy.target].room.nbytes:
            raise RestoreError("the daemon's answer does not fit what it was asked for")
        filled[copy.target] += copy.nbytes
    wrong = [n for n, nbytes in filled.items() if nbytes != (0 if n in others else batch[n].room.nbytes)]
    if wrong or not filled.keys() >= others:
        raise RestoreError(f"the daemon's answer does not say where {len(wrong)} of {len(batch)} boxes are")
