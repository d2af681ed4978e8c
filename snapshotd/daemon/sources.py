"""
Where bulk bytes come from: objects (slots, parity) in this node's arena, on a peer, or in a durable file.

Rule 1: no byte leaves a source unverified. Chunk digests are those that came with the object, and their root is
compared with the one that the coordinator was told when the object was sealed, where that is known.
Rule 2: a mismatch is an erasure: it is reported by ``on_corruption``, and CorruptionError is raised. An object that is
not where it should be is an erasure too. PeerError: nobody answers. Whoever asks takes other sources, or refuses.
Rule 3: a chunk in the arena is hashed once per source, then known to be good: sources live as long as one operation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from snapshotd.arena import Arena, Lease, SealableFile, SlotFile, describe, parity_key, slot_key
from snapshotd.daemon.cancel import Cancelled
from snapshotd.durable.reader import RankFile
from snapshotd.errors import CorruptionError, PeerUnreachable, SnapshotdError, UsageError
from snapshotd.layout import CHUNK_BYTES, root_digest, verify
from snapshotd.transfer import BulkClient, TransferCancelled
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = [
    "Corruption",
    "DurableSource",
    "LocalSource",
    "OnCorruption",
    "PeerSource",
    "Piece",
    "Source",
    "Sources",
    "local_corruption",
]

_RANGES_AT_ONCE: Final = 4096
"""A frame holds 16 MiB, a range at most 22 bytes of it; the transfer refuses more than 65,536."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """
    Bytes whose digest does not match.

    ``local``: they are in this node's arena, as ``slot_id`` and ``slot``, or ``parity``. Otherwise they came from
    ``node_id`` (rotten there or on the wire), or from a durable file, and the caller of the callback counts.
    """

    node_id: str
    local: bool
    detail: str
    slot_id: int | None = None
    slot: control.SlotRef | None = None
    parity: control.ParityRef | None = None


OnCorruption = Callable[[Corruption], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of an object from ``begin`` on are wanted in ``into``, as many as it has room for."""

    begin: int
    into: memoryview

    @property
    def end(self) -> int:
        return self.begin + self.into.nbytes


class Source(Protocol):
    """
    The verified bytes of one object, wherever it is.

    A seam: encoding, decoding, restoring and exporting do not care where bytes come from, and tests can break it.
    Any number of threads may read at once.
    """

    @property
    def node_id(self) -> str:
        """The node that has the object, for messages."""
        ...

    @property
    def name(self) -> str:
        """What it is, in words."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether ``fetch`` costs nothing but hashing, and needs no room."""
        ...

    @property
    def file_bytes(self) -> int: ...

    def digests(self) -> bytes:
        """Return the digests of all chunks, checked against the root where that is known."""
        ...

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        """Return the verified bytes ``[begin, end)``: a mapping of a local object, else ``room``, filled."""
        ...

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fill all ``pieces`` with verified bytes, in as few requests as possible."""
        ...

    def close(self) -> None: ...


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
        _check_root(self, self._digests, root)

    def digests(self) -> bytes:
        return self._digests

    def view(self, begin: int, end: int) -> memoryview:
        """Return the mapping of ``[begin, end)``, verified."""
        _check_range(self, begin, end)
        first, stop = begin // CHUNK_BYTES, -(-end // CHUNK_BYTES) if end > begin else begin // CHUNK_BYTES
        while (first := self._known.find(0, first, stop)) >= 0:
            last = self._known.find(1, first, stop)
            last = stop if last < 0 else last
            chunk_end = min(last * CHUNK_BYTES, self.file_bytes)
            wrong = verify(self.obj.view, self._digests, first * CHUNK_BYTES, chunk_end)
            if wrong:
                corruption = local_corruption(self.obj, self._ref, wrong, self.node_id, "a reader")
                self._on_corruption(corruption)
                raise CorruptionError(corruption.detail)
            self._known[first:last] = b"\1" * (last - first)
            first = last
        return self.obj.view[begin:end]

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        return self.view(begin, end)

    def read(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            with self.view(piece.begin, piece.end) as view:
                _copy(piece.into, view)

    def close(self) -> None:
        self._lease.close()


class PeerSource:
    """A sealed object on another node. Its digests are fetched with the first read."""

    is_local: Final = False

    def __init__(
        self,
        client: BulkClient,
        address: str,
        key: ObjectKey,
        *,
        node_id: str,
        file_bytes: int,
        root: str,
        on_corruption: OnCorruption,
        cancel: threading.Event | None,
    ) -> None:
        self.node_id, self.name, self.file_bytes = node_id, describe(key), file_bytes
        self._client, self._address, self._key, self._root = client, address, key, root
        self._on_corruption = on_corruption
        self._cancel = cancel
        self._lock = threading.Lock()
        self._digests: bytes | None = None

    def digests(self) -> bytes:
        with self._lock:
            if self._digests is None:
                with self._watched():
                    info = self._client.digests(self._address, self._key, cancel=self._cancel)
                    if info.file_bytes != self.file_bytes:
                        raise CorruptionError(
                            f"{self.name} on {self.node_id} has {info.file_bytes} bytes, expected {self.file_bytes}"
                        )
                    _check_root(self, info.digests, self._root)
                self._digests = info.digests
            return self._digests

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        part = room[: end - begin]
        self.read([Piece(begin, part)])
        return part

    def read(self, pieces: Sequence[Piece]) -> None:
        digests = self.digests()
        for piece in pieces:
            _check_range(self, piece.begin, piece.end)
        # One alone is hashed while it is received; for many the round trips count.
        many = len(pieces) > 1
        aligned = [piece for piece in pieces if many and self._is_aligned(piece)]
        others = [piece for piece in pieces if not (many and self._is_aligned(piece))]
        with self._watched():
            for some in _at_most(aligned, _RANGES_AT_ONCE):
                self._read_aligned(some, digests)
            for piece in others:
                self._client.read_verified(
                    self._address,
                    self._key,
                    piece.begin,
                    piece.end,
                    piece.into,
                    digests=digests,
                    file_bytes=self.file_bytes,
                    cancel=self._cancel,
                )

    def close(self) -> None:
        pass

    def _is_aligned(self, piece: Piece) -> bool:
        return piece.begin % CHUNK_BYTES == 0 and (piece.end % CHUNK_BYTES == 0 or piece.end == self.file_bytes)

    def _read_aligned(self, pieces: Sequence[Piece], digests: bytes) -> None:
        """One request for all; whole chunks are verified where they are."""
        ranges = [(piece.begin, piece.end) for piece in pieces]
        outs = [piece.into for piece in pieces]
        self._client.read(self._address, self._key, ranges, outs, cancel=self._cancel)
        for piece in pieces:
            wrong = verify(piece.into, digests, piece.begin, piece.end, base=piece.begin)
            if wrong:
                raise CorruptionError(f"chunk {wrong[0]} of {self.name} from {self._address} does not match its digest")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Report what does not match; turn the transfer's own words for a cancel into ours."""
        try:
            yield
        except CorruptionError as error:
            self._on_corruption(Corruption(node_id=self.node_id, local=False, detail=str(error)))
            # The owner finds out whether it is rotten there, or was hurt on the way, and has it rebuilt.
            with contextlib.suppress(SnapshotdError):
                self._client.suspect(self._address, self._key)
            raise
        except TransferCancelled as error:
            raise Cancelled(str(error)) from error


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

    def read(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            _check_range(self, piece.begin, piece.end)
            try:
                self._file.read_into(piece.begin, piece.into)
            except CorruptionError as error:
                self._on_corruption(Corruption(node_id=self.node_id, local=False, detail=str(error)))
                raise

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

    def learn(self, peers: Iterable[control.PeerAddress]) -> None:
        """Remember where nodes are; a node that came back elsewhere is found there from now on."""
        with self._lock:
            self._addresses.update((peer.node_id, peer.bulk) for peer in peers)

    def slot(self, ref: control.SlotRef, node_id: str, cancel: threading.Event | None = None) -> Source:
        """
        Return the slot of ``ref``: from the arena when it is there, else from ``node_id``.

        CorruptionError when this node should have it and does not; PeerUnreachable for a node without address. That a
        peer does not have it shows at the first read.
        """
        return self._open(slot_key(ref), node_id, ref.file_bytes, ref.root_digest, cancel)

    def parity(self, ref: control.ParityRef, node_id: str, cancel: threading.Event | None = None) -> Source:
        """The same for a parity file. Without ``root_digest`` in ``ref`` it is as good as the word of who has it."""
        return self._open(parity_key(ref), node_id, ref.file_bytes, ref.root_digest, cancel)

    def _open(self, key: ObjectKey, node_id: str, file_bytes: int, root: str, cancel: threading.Event | None) -> Source:
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
            on_corruption=self.on_corruption,
            cancel=cancel,
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


def _check_range(source: Source, begin: int, end: int) -> None:
    if not 0 <= begin <= end <= source.file_bytes:
        raise UsageError(f"[{begin}, {end}) is not inside the {source.file_bytes} bytes of {source.name}")


def _check_root(source: Source, digests: bytes, root: str) -> None:
    """An object with another root than the coordinator was told is not the one that is meant."""
    if root and (got := root_digest(digests)) != root:
        raise CorruptionError(f"{source.name} on {source.node_id} has the root digest {got}, expected {root}")


def _at_most(pieces: Sequence[Piece], count: int) -> Iterator[Sequence[Piece]]:
    for first in range(0, len(pieces), count):
        yield pieces[first : first + count]


def _copy(into: memoryview, view: memoryview) -> None:
    """By numpy: other threads go on meanwhile, which a slice assignment does not let them."""
    if view.nbytes:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(view, np.uint8))
