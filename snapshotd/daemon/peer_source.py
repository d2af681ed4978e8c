"""
A sealed object on another node: read over its daemon's bulk listener, and verified here.

Whole chunks are compared with the digests of the object, what is wanted of others by their owner (see transfer). What
does not match is reported to whoever asked, and to the owner, which finds out whether it is rotten there or was hurt
on the way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from snapshotd.arena import describe
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.source import Corruption, OnCorruption, check_range, check_root
from snapshotd.errors import CorruptionError, SnapshotdError
from snapshotd.reshard import Copy
from snapshotd.transfer import BulkClient, Incoming, ObjectInfo, Piece, TransferCancelled
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["PeerSource"]


class PeerSource:
    """
    A sealed object on another node. Its digests are fetched with the first read.

    root: its root digest; where it is not known ("") that of the digests that come. wait_s: how long its streams wait
    for the peer to seal it.
    """

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
        wait_s: float,
        on_corruption: OnCorruption,
        cancel: threading.Event | None,
        pace: Callable[[int], None] | None,
    ) -> None:
        self.node_id, self.file_bytes = node_id, file_bytes
        self.address, self.key, self.root = address, key, root
        self._wait_s = wait_s
        self._client = client
        self._on_corruption = on_corruption
        self._cancel = cancel
        self._pace = pace
        self._lock = threading.Lock()
        self._digests: bytes | None = None

    @property
    def name(self) -> str:
        return describe(self.key)

    @property
    def is_plain(self) -> bool:
        """Whether it is read in plain TCP: then whoever may, can, without our certificate."""
        return self._client.is_plain

    def digests(self) -> bytes:
        with self._lock:
            if self._digests is None:
                with self._watched():
                    self._learn(self._client.digests(self.address, self.key, cancel=self._cancel))
            assert self._digests is not None
            return self._digests

    def _learn(self, info: ObjectInfo) -> None:
        """Check digests that came from the peer against the root that is known, and keep them."""
        if info.file_bytes != self.file_bytes:
            raise CorruptionError(
                f"{self.name} on {self.node_id} has {info.file_bytes} bytes, expected {self.file_bytes}"
            )
        check_root(self, info.digests, self.root)
        self.root = info.root
        self._digests = info.digests

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        part = room[: end - begin]
        self.read([Piece(begin, part)])
        return part

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy] = (), targets: Sequence[memoryview] = ()) -> int:
        for piece in pieces:
            check_range(self, piece.begin, piece.end)
        with self._watched():
            self._client.read_verified(
                self.address,
                self.key,
                pieces,
                parts,
                targets,
                digests=self._digests,
                file_bytes=self.file_bytes,
                learned=self._learn,
                cancel=self._cancel,
                pace=self._pace,
            )
        return sum(piece.into.nbytes for piece in pieces) + sum(part.nbytes for part in parts)

    def stream(self, begin: int, end: int) -> _PeerStream:
        check_range(self, begin, end)
        try:
            incoming = self._client.stream(
                self.address,
                self.key,
                [(begin, end)],
                digests=self._digests,
                file_bytes=self.file_bytes,
                learned=self._learn,
                wait_s=self._wait_s,
                cancel=self._cancel,
                pace=self._pace,
            )
        except TransferCancelled as error:
            raise Cancelled(str(error)) from error
        return _PeerStream(incoming, self._report)

    def close(self) -> None:
        pass

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Report what does not match; turn the transfer's word for a cancel into ours."""
        try:
            yield
        except CorruptionError as error:
            self._report(error)
            raise
        except TransferCancelled as error:
            raise Cancelled(str(error)) from error

    def _report(self, error: CorruptionError) -> None:
        self._on_corruption(Corruption(node_id=self.node_id, local=False, detail=str(error)))
        with contextlib.suppress(SnapshotdError):
            self._client.suspect(self.address, self.key)


class _PeerStream:
    def __init__(self, incoming: Incoming, report: Callable[[CorruptionError], None]) -> None:
        self._incoming, self._report = incoming, report

    def take(self, nbytes: int, room: memoryview) -> memoryview:
        part = room[:nbytes]
        try:
            self._incoming.fill(part)
        except CorruptionError as error:
            self._incoming.close()  # or those who report might wait for each other's connections
            self._report(error)
            raise
        except TransferCancelled as error:
            raise Cancelled(str(error)) from error
        return part

    def __enter__(self) -> _PeerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._incoming.close()
