"""
The payload of an answer on its way in: verified piece by piece, straight into the reader's memory.

Rule 1: hashing follows receiving while the bytes are still in the cache; the kernel's socket buffers receive the next
        piece meanwhile, so no second thread is needed to overlap the two.
Rule 2: what was handed out is what was sealed. After an error the rest of the answer is not read, and the connection
        must not be used again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from snapshotd.arena.keys import describe
from snapshotd.errors import UsageError
from snapshotd.layout import CHUNK_BYTES, verify
from snapshotd.transfer import wire
from snapshotd.transfer.pool import Borrowed
from snapshotd.v1.bulk_pb2 import BulkResponse, ObjectKey

__all__ = ["Incoming", "Receiver", "Steering", "whole_chunks"]

_PIECE_BYTES: Final = wire.PIECE_BYTES
assert _PIECE_BYTES % CHUNK_BYTES == 0

_spare_chunks: Final[deque[bytearray]] = deque(maxlen=16)
"""Memory for a chunk that streams have done with: fresh memory would cost more than all else of a short one."""


class Receiver(Protocol):
    """Where the bytes come from: a borrowed connection."""

    def receive(self, out: memoryview) -> None: ...

    def tail(self) -> BulkResponse:
        """What is said behind blocks and exact ranges; a refusal is raised."""
        ...


class Steering(NamedTuple):
    """What the caller may do between pieces: see BulkClient."""

    cancel: threading.Event | None
    pace: Callable[[int], None] | None

    def after(self, nbytes: int) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise wire.TransferCancelled("the transfer was cancelled")
        if self.pace is not None and nbytes:
            self.pace(nbytes)


def whole_chunks(span: tuple[int, int], file_bytes: int) -> tuple[int, int]:
    """Return the smallest range of whole chunks around a span."""
    begin, end = span
    if begin == end:
        return begin, end
    return begin // CHUNK_BYTES * CHUNK_BYTES, min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, file_bytes)


class Incoming:
    """
    The bytes of ``spans``, one after the other, each chunk compared with its digest; the answer holds whole chunks.

    For one thread at a time. ``begin`` is called once, with the first fill: it awaits the head of the answer and
    returns the digests of all chunks of the file. ``key`` and ``peer`` are for messages. The connection of the answer
    is given back by ``close``, which the end of a block does.
    """

    def __init__(
        self,
        answer: Borrowed,
        spans: Sequence[tuple[int, int]],
        *,
        begin: Callable[[], bytes],
        file_bytes: int,
        steering: Steering,
        key: ObjectKey,
        peer: str,
    ) -> None:
        self._answer = answer
        self._spans = [span for span in reversed(spans) if span[0] < span[1]]
        self._begin = begin
        self._digests: bytes | None = None
        self._file_bytes = file_bytes
        self._steering = steering
        self._key, self._peer = key, peer
        self._at = self._stop = 0
        self._closed = False
        self._chunk: bytearray | None = None
        self._rest = memoryview(b"")  # of a chunk that is here, and was handed out in part

    @property
    def is_whole(self) -> bool:
        """Whether all of the answer was read, and handed out."""
        return self._digests is not None and not self._spans and self._at == self._stop and not self._rest

    def close(self) -> None:
        """Nothing more is wanted of it. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.is_whole:
            self._answer.keep()
        self._answer.end()
        self._rest = memoryview(b"")
        if self._chunk is not None:
            _spare_chunks.append(self._chunk)
            self._chunk = None

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fill(self, out: memoryview) -> None:
        """
        Fill ``out`` with the next bytes. UsageError when there are not so many.

        The errors of reading, and CorruptChunk: then the contents of ``out`` are undefined.
        """
        if self._digests is None:
            self._digests = self._begin()
        done = 0
        while done < out.nbytes:
            if self._rest:
                count = min(self._rest.nbytes, out.nbytes - done)
                out[done : done + count] = self._rest[:count]
                self._rest = self._rest[count:]
                done += count
                continue
            if self._at == self._stop:
                self._next_span(out.nbytes - done)
            done += self._receive(out, done)

    def _next_span(self, wanted: int) -> None:
        if not self._spans:
            raise UsageError(f"{wanted} bytes more than the spans have were to be read")
        self._at, self._stop = self._spans.pop()

    def _receive(self, out: memoryview, done: int) -> int:
        """Receive whole chunks into ``out``, at most a piece, or else one chunk to be handed out in parts."""
        at, stop = self._at, self._stop
        end = min(at + out.nbytes - done, stop, at + _PIECE_BYTES)
        if end < self._file_bytes:
            end = end // CHUNK_BYTES * CHUNK_BYTES
        if at % CHUNK_BYTES == 0 and end > at:
            with out[done : done + end - at] as piece:
                self._take(piece, at)
            self._at = end
            return end - at
        first, last = whole_chunks((at, at + 1), self._file_bytes)
        if self._chunk is None:
            self._chunk = _take_chunk()
        whole = memoryview(self._chunk)[: last - first]
        self._take(whole, first)
        self._at = min(stop, last)
        self._rest = whole[at - first : self._at - first]
        return 0

    def _take(self, piece: memoryview, begin: int) -> None:
        assert self._digests is not None
        self._answer.receive(piece)
        wrong = verify(piece, self._digests, begin, begin + piece.nbytes, base=begin)
        if wrong:
            message = f"chunk {wrong[0]} of {describe(self._key)} from {self._peer} does not match its digest"
            raise wire.CorruptChunk(message, chunk=wrong[0], peer=self._peer)
        self._steering.after(piece.nbytes)


def _take_chunk() -> bytearray:
    try:
        return _spare_chunks.pop()
    except IndexError:
        return bytearray(CHUNK_BYTES)
