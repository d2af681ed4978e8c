"""
What a source is: the verified bytes of one object (slot, parity, durable file), wherever it is.

Rule 1: no byte leaves a source unverified. Chunk digests are those that came with the object, and their root is
compared with the one that the coordinator was told when the object was sealed, where that is known.
Rule 2: a mismatch is an erasure: it is reported by ``on_corruption``, and CorruptionError is raised. An object that is
not where it should be is an erasure too. PeerError: nobody answers. Whoever asks takes other sources, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.layout import root_digest
from snapshotd.reshard import Copy
from snapshotd.transfer import Piece
from snapshotd.v1 import control_pb2 as control

__all__ = [
    "Corruption",
    "InTurn",
    "OnCorruption",
    "Source",
    "Stream",
    "check_range",
    "check_root",
]


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

    def read(self, pieces: Sequence[Piece], parts: Sequence[Copy] = (), targets: Sequence[memoryview] = ()) -> int:
        """
        Fill all ``pieces`` and carry out ``parts`` into ``targets``, by their numbers in the copies, with verified
        bytes, in one request; return how many bytes were fetched for that, of those that are not here.

        At most 4096 parts of at most 1 MiB each.
        """
        ...

    def stream(self, begin: int, end: int) -> AbstractContextManager[Stream]:
        """Read ``[begin, end)`` bit by bit; what follows is on its way meanwhile."""
        ...

    def close(self) -> None: ...


class Stream(Protocol):
    """The bytes of a span of a source, in order. For one thread at a time."""

    def take(self, nbytes: int, room: memoryview) -> memoryview:
        """Return the next ``nbytes``: a mapping of a local object, else the beginning of ``room``, filled."""
        ...


class InTurn:
    """The stream of a source that has nothing on its way: each ``take`` fetches. A context manager, as all are."""

    def __init__(self, source: Source, begin: int, end: int) -> None:
        check_range(source, begin, end)
        self._source = source
        self._at, self._end = begin, end

    def take(self, nbytes: int, room: memoryview) -> memoryview:
        begin, self._at = self._at, self._at + nbytes
        if self._at > self._end:
            raise UsageError(f"{self._at - self._end} bytes more than the stream has were to be taken")
        return self._source.fetch(begin, self._at, room)

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def check_range(source: Source, begin: int, end: int) -> None:
    """Raise UsageError for a range that the source does not have."""
    if not 0 <= begin <= end <= source.file_bytes:
        raise UsageError(f"[{begin}, {end}) is not inside the {source.file_bytes} bytes of {source.name}")


def check_root(source: Source, digests: bytes, root: str) -> None:
    """An object with another root than the coordinator was told is not the one that is meant."""
    if root and (got := root_digest(digests)) != root:
        raise CorruptionError(f"{source.name} on {source.node_id} has the root digest {got}, expected {root}")
