"""
Where bulk bytes come from: objects (slots, parity) in this node's arena, on a peer, or in a durable file.

A chunk in the arena is hashed once per source, then known to be good: sources live as long as one operation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from snapshotd.arena import Arena, Lease, SealableFile, SlotFile, describe, parity_key, slot_key
from snapshotd.daemon.chunks import read_through_chunks
from snapshotd.daemon.peer_source import PeerSource
from snapshotd.daemon.source import (
    Corruption,
    InTurn,
    OnCorruption,
    Source,
    Stream,
    check_range,
    check_root,
)
from snapshotd.durable.reader import RankFile
from snapshotd.errors import CorruptionError, PeerUnreachable
from snapshotd.layout import CHUNK_BYTES, root_digest, verify
from snapshotd.reshard import Copy, apply_copy
from snapshotd.transfer import BulkClient, Piece, whole_inside
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = [
    "Corruption",
    "DurableSource",
    "LocalSource",
    "OnCorruption",
    "PeerSource",
    "Source",
    "Sources",
    "Stream",
    "local_corruption",
]


class LocalSource:
    """A sealed object of this node's arena, under lease until it is closed."""

    is_local: Final = True

    def __init__(
        self,
        lease: Lease[SealableFile],
        node_id: str,
        name: str,
        file_bytes: int,
        root: str,
        on_corruption: OnCorruption,
    ) -> None:
        obj = lease.obj
        assert obj.ref is not None
        assert obj.digests is not None
        self.node_id, self.name, self.obj = node_id, name, obj
        self.file_bytes = obj.file_bytes
        self._ref: control.SlotRef | control.ParityRef = obj.ref
        self._digests = obj.digests
        self._lease = lease
        self._on_corruption = on_corruption
        self._known = bytearray(len(self._digests) // 8)  # one per chunk: verified
        if self.file_bytes != file_bytes:
            raise CorruptionError(f"{name} on {node_id} has {self.file_bytes} bytes, expected {file_bytes}")
        check_root(self, self._digests, root)
        self.root = root or root_digest(self._digests)

    def digests(self) -> bytes:
        return self._digests

    def view(self, begin: int, end: int) -> memoryview:
        """Return the mapping of ``[begin, end)``, verified."""
        check_range(self, begin, end)
        first, stop = begin // CHUNK_BYTES, -(-end // CHUNK_BYTES) if end > begin else begin // CHUNK_BYTES
        while (first := self._known.find(0, first, stop)) >= 0:
            last = self._known.find(1, first, stop)
            last = stop if last < 0 else last
            chunk_end = min(last * CHUNK_BYTES, self.file_bytes)
            wrong = verify(self.obj.view, self._digests, first * CHUNK_BYTES, chunk_end, cold=True)
            if wrong:
                corruption = local_corruption(self.obj, self._ref, wrong, self.node_id, "a reader")
                self._on_corruption(corruption)
                raise CorruptionError(corruption.detail)
            self._known[first:last] = b"\1" * (last - first)
            first = last
        return self.obj.view[begin:end]

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        return self.view(begin, end)

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy] = (), targets: Sequence[memoryview] = ()) -> int:
        for piece in pieces:
            with self.view(piece.begin, piece.end) as view:
                _copy(piece.into, view)
        for part in parts:
            self.view(*part.src_range).release()
            apply_copy(part, self.obj.view, targets[part.target])
        return 0

    def stream(self, begin: int, end: int) -> InTurn:
        return InTurn(self, begin, end)

    def close(self) -> None:
        self._lease.close()


class DurableSource:
    """A rank's file of a durable snapshot. Closed by whoever opened the snapshot."""

    is_local: Final = False
    node_id: Final = "durable"

    def __init__(self, file: RankFile, on_corruption: OnCorruption) -> None:
        self.name = str(file.path)
        self.slot = file.slot
        self.file_bytes = file.file_bytes
        self._file = file
        self._on_corruption = on_corruption

    def digests(self) -> bytes:
        return self._file.digests

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        self.read([Piece(begin, room)])
        return room[: end - begin]

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy] = (), targets: Sequence[memoryview] = ()) -> int:
        fetched = 0
        ends: list[Copy] = []  # what pieces have of chunks that are not whole in them: neighbours share those
        for number, piece in enumerate(pieces):
            check_range(self, piece.begin, piece.end)
            first, last = whole_inside(piece.begin, piece.end, self.file_bytes)
            fetched += self._read_chunks(first, piece.into[first - piece.begin : last - piece.begin])
            for begin, end in ((piece.begin, first), (last, piece.end)):
                if begin < end:
                    ends.append(Copy(0, number, begin, begin - piece.begin, end - begin))
        if ends or parts:
            rooms = [*(piece.into for piece in pieces), *targets]
            moved = (part._replace(target=part.target + len(pieces)) for part in parts)
            fetched += read_through_chunks(self, [*ends, *moved], rooms)
        return fetched

    def _read_chunks(self, begin: int, into: memoryview) -> int:
        try:
            self._file.read_into(begin, into)
        except CorruptionError as error:
            self._on_corruption(Corruption(node_id=self.node_id, local=False, detail=str(error)))
            raise
        return into.nbytes

    def stream(self, begin: int, end: int) -> InTurn:
        return InTurn(self, begin, end)

    def close(self) -> None:
        pass


class Sources:
    """
    Finds objects: here, or on the peer that has them. Lives as long as the daemon; safe to use from many threads.

    Args:
        node_id: of this node; "" for a tool, which has no arena either.
        client: reads from peers; the caller closes it.
        on_corruption: hears of each mismatch, in the thread that found it.
    """

    def __init__(
        self,
        node_id: str,
        arena: Arena | None,
        client: BulkClient,
        on_corruption: OnCorruption = lambda corruption: None,
    ) -> None:
        self.node_id = node_id
        self.on_corruption = on_corruption
        self._arena = arena
        self._client = client
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}
        self._pace: Callable[[int], None] | None = None

    def paced(self, pace: Callable[[int], None]) -> Sources:
        """Return the same sources, with reads from peers slowed down by ``pace``; see BulkClient."""
        twin = copy.copy(self)  # with the same addresses, under the same lock
        twin._pace = pace
        return twin

    def learn(self, peers: Iterable[control.PeerAddress]) -> None:
        """Remember where nodes are; a node that came back elsewhere is found there from now on."""
        with self._lock:
            self._addresses.update((peer.node_id, peer.bulk) for peer in peers)

    def slot(
        self, ref: control.SlotRef, node_id: str, cancel: threading.Event | None = None, *, wait_s: float = 0.0
    ) -> LocalSource | PeerSource:
        """
        Return the slot of ``ref``: from the arena when it is there, else from ``node_id``.

        CorruptionError when this node should have it and does not; PeerUnreachable for a node without address. That a
        peer does not have it shows at the first read; streams from it wait up to ``wait_s`` for it to be sealed there.
        Without ``root_digest`` in ``ref`` the slot is as good as the word of who has it.
        """
        return self._open(slot_key(ref), node_id, ref.file_bytes, ref.root_digest, cancel, wait_s)

    def parity(
        self, ref: control.ParityRef, node_id: str, cancel: threading.Event | None = None
    ) -> LocalSource | PeerSource:
        """The same for a parity file."""
        return self._open(parity_key(ref), node_id, ref.file_bytes, ref.root_digest, cancel, 0.0)

    def _open(
        self,
        key: ObjectKey,
        node_id: str,
        file_bytes: int,
        root: str,
        cancel: threading.Event | None,
        wait_s: float,
    ) -> LocalSource | PeerSource:
        lease = self._arena.acquire(key) if self._arena is not None else None
        if lease is not None:
            try:
                return LocalSource(lease, self.node_id, describe(key), file_bytes, root, self.on_corruption)
            except CorruptionError:
                lease.close()
                if node_id == self.node_id:
                    raise
            except BaseException:
                lease.close()
                raise
        if node_id and node_id == self.node_id:
            raise CorruptionError(f"{describe(key)} is not on {node_id} any more")
        with self._lock:
            address = self._addresses.get(node_id)
        if not address:
            raise PeerUnreachable(f"{describe(key)} is on {node_id or 'no node'}, which has no known address")
        return PeerSource(
            self._client,
            address,
            key,
            node_id=node_id,
            file_bytes=file_bytes,
            root=root,
            wait_s=wait_s,
            on_corruption=self.on_corruption,
            cancel=cancel,
            pace=self._pace,
        )


def local_corruption(
    obj: SealableFile,
    ref: control.SlotRef | control.ParityRef,
    wrong: Sequence[int],
    node_id: str,
    found_by: str,
) -> Corruption:
    """Return what is to be reported when chunks ``wrong`` of a local object do not match."""
    key = slot_key(ref) if isinstance(ref, control.SlotRef) else parity_key(ref)
    listed = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    return Corruption(
        node_id=node_id,
        local=True,
        detail=f"{describe(key)}: chunk {listed} does not match its digest, found by {found_by}",
        slot_id=obj.slot_id if isinstance(obj, SlotFile) else None,
        slot=ref if isinstance(ref, control.SlotRef) else None,
        parity=ref if isinstance(ref, control.ParityRef) else None,
    )


def _copy(into: memoryview, view: memoryview) -> None:
    """By numpy: other threads go on meanwhile, which a slice assignment does not let them."""
    if view.nbytes:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(view, np.uint8))
