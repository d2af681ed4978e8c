"""
Reads the bytes of slots and parity files from other daemons, verified, straight into the reader's own memory.

Rule 1: what read_verified() returns is what was sealed, or it raises. Nothing is retried on wrong bytes: they are an
        erasure, and the caller decodes.
Rule 2: hashing follows receiving piece by piece, while the bytes are still in the cache; the kernel's socket
        buffers receive the next piece meanwhile, so no second thread is needed to overlap the two.
Rule 3: a connection that saw anything unexpected is closed, never reused: leftovers of one answer must not
        become the beginning of the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapshotd.arena.keys import describe
from snapshotd.errors import AccessDenied, CorruptionError, PeerUnreachable, RemoteProtocolError, UsageError
from snapshotd.layout.digest import CHUNK_BYTES, DIGEST_BYTES, chunk_count, root_digest, verify
from snapshotd.transfer import wire
from snapshotd.transfer.pool import Borrowed, Pool
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ByteRange, ObjectKey

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer

__all__ = ["BulkClient", "ObjectInfo"]

_BATCH_BYTES: Final = wire.PIECE_BYTES
assert _BATCH_BYTES % CHUNK_BYTES == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a peer says of an object. ``root`` is that of ``digests`` (checked); that it is the sealed one is not."""

    file_bytes: int
    root: str
    digests: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Control:
    """What the caller may do between batches: see BulkClient."""

    cancel: threading.Event | None
    pace: Callable[[int], None] | None

    def after(self, nbytes: int) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise wire.TransferCancelled("the transfer was cancelled")
        if self.pace is not None and nbytes:
            self.pace(nbytes)


class BulkClient:
    """
    Reads from any number of peers; safe to use from many threads. A context manager.

    Args:
        tls: a context that shows our certificate and asks for the peer's; None for plain TCP.
        timeout_s: a peer that does not give a byte for so long (or does not accept a connection) is unreachable.
        connections_per_peer: so many reads from one peer run at the same time, further ones wait for their turn.

    All reads take ``cancel``, an event that stops them (TransferCancelled) between batches of 1 MiB, and ``pace``,
    called with the bytes of each batch: it may sleep, or raise to stop. Errors of all reads:

    PeerUnreachable: nobody answers, or the peer is lost in the middle. ObjectMissing: it does not have the object.
    AccessDenied: it does not serve us, or its certificate is not of our CA. RemoteProtocolError: it breaks the
    contract. UsageError: a range that the object does not have.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, timeout_s: float = 10.0, connections_per_peer: int = 4
    ) -> None:
        if timeout_s <= 0 or connections_per_peer < 1:
            raise UsageError("timeout_s and connections_per_peer of a bulk client must be positive")
        self._pool = Pool(tls=tls, timeout_s=timeout_s, limit=connections_per_peer)
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Close idle connections; those in use end with their transfer. Further reads raise UsageError."""
        self._pool.close()

    def __enter__(self) -> BulkClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ reads

    def digests(self, address: str, key: ObjectKey, *, cancel: threading.Event | None = None) -> ObjectInfo:
        """
        Return size, root digest and chunk digests of an object.

        CorruptionError when the digests do not make up the root. Compare ``root`` with that of the SlotRef or
        ParityRef that you trust.
        """
        request = BulkRequest(protocol=wire.PROTOCOL, object=key, digests=True)
        with self._asking(address, request, cancel) as (answer, response):
            expected = chunk_count(response.file_bytes) * DIGEST_BYTES
            if response.payload_bytes != expected:
                raise RemoteProtocolError(
                    f"{address} announced {response.payload_bytes} bytes of digests for {response.file_bytes} bytes of "
                    f"{describe(key)}"
                )
            if expected > wire.DIGESTS_BYTES_MAX:
                raise RemoteProtocolError(f"{address} announced {expected} bytes of digests of {describe(key)}")
            data = bytearray(expected)
            with memoryview(data) as view:
                answer.receive(view)
        if root_digest(bytes(data)) != response.root_digest:
            raise CorruptionError(f"the digests of {describe(key)} from {address} do not make up their root digest")
        return ObjectInfo(file_bytes=response.file_bytes, root=response.root_digest, digests=bytes(data))

    def read(
        self,
        address: str,
        key: ObjectKey,
        ranges: Sequence[tuple[int, int]],
        outs: Sequence[Buffer],
        *,
        cancel: threading.Event | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> int:
        """
        Fill ``outs[i]`` with the bytes ``[begin, end)`` of ``ranges[i]``, NOT verified; return the object's size.

        At most 65,536 ranges. After an error the contents of ``outs`` are undefined.
        """
        control = _Control(cancel=cancel, pace=pace)
        with ExitStack() as stack:
            views = [stack.enter_context(_writable(out)) for out in outs]
            if [view.nbytes for view in views] != [end - begin for begin, end in ranges]:
                raise UsageError("ranges and buffers do not have the same lengths")
            answer, response = stack.enter_context(self._reading(address, key, ranges, cancel))
            for view in views:
                for at in range(0, view.nbytes, _BATCH_BYTES):
                    with view[at : at + _BATCH_BYTES] as batch:
                        answer.receive(batch)
                        control.after(batch.nbytes)
            return response.file_bytes

    def read_verified(
        self,
        address: str,
        key: ObjectKey,
        begin: int,
        end: int,
        out: Buffer,
        *,
        digests: bytes,
        file_bytes: int,
        cancel: threading.Event | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        """
        Fill ``out`` with the file bytes ``[begin, end)``, each chunk of them compared with ``digests``.

        ``digests`` are the chunk digests of the whole file of ``file_bytes``, from a source that you trust. Chunks that
        the range touches in part are read whole, into scratch memory. CorruptChunk (a CorruptionError) names the first
        chunk that does not match; after an error the contents of ``out`` are undefined.
        """
        with _writable(out) as out_view:
            if not 0 <= begin <= end <= file_bytes or out_view.nbytes != end - begin:
                raise UsageError(f"cannot read [{begin}, {end}) of {file_bytes} bytes into {out_view.nbytes}")
            if len(digests) != chunk_count(file_bytes) * DIGEST_BYTES:
                raise UsageError(f"{len(digests)} bytes of digests are not those of {file_bytes} bytes")
            if begin == end:
                return
            control = _Control(cancel=cancel, pace=pace)
            first = begin // CHUNK_BYTES * CHUNK_BYTES
            last = min(chunk_count(end) * CHUNK_BYTES, file_bytes)
            with self._reading(address, key, [(first, last)], cancel) as (answer, response):
                if response.file_bytes != file_bytes:
                    raise CorruptionError(
                        f"{describe(key)} has {response.file_bytes} bytes at {address}, {file_bytes} were sealed"
                    )
                for batch, chunk in _receive_verified(answer, out_view, begin, (first, last), digests):
                    if chunk is not None:
                        message = f"chunk {chunk} of {describe(key)} from {address} does not match its digest"
                        raise wire.CorruptChunk(message, chunk=chunk, peer=address)
                    control.after(batch)

    def suspect(self, address: str, key: ObjectKey) -> None:
        """Tell the owner that what it sent of an object did not match; returns when it has verified the object."""
        request = BulkRequest(protocol=wire.PROTOCOL, object=key, suspect=True)
        with self._asking(address, request, None):
            pass

    # ------------------------------------------------------------------------------------------ insides

    @contextmanager
    def _reading(
        self, address: str, key: ObjectKey, ranges: Sequence[tuple[int, int]], cancel: threading.Event | None
    ) -> Iterator[tuple[Borrowed, BulkResponse]]:
        if len(ranges) > wire.RANGES_MAX:
            raise UsageError(f"{len(ranges)} ranges are more than {wire.RANGES_MAX}")
        if any(begin < 0 or end < begin for begin, end in ranges):
            raise UsageError("a range begins before 0 or ends before it begins")
        request = BulkRequest(protocol=wire.PROTOCOL, object=key)
        request.ranges.extend(ByteRange(begin=begin, end=end) for begin, end in ranges)
        with self._asking(address, request, cancel) as (answer, response):
            expected = sum(end - begin for begin, end in ranges)
            if response.payload_bytes != expected:
                raise RemoteProtocolError(
                    f"{address} announced {response.payload_bytes} bytes of {describe(key)}, {expected} were asked for"
                )
            yield answer, response

    @contextmanager
    def _asking(
        self, address: str, request: BulkRequest, cancel: threading.Event | None
    ) -> Iterator[tuple[Borrowed, BulkResponse]]:
        """Yield an ok answer, whose payload must be received whole."""
        if cancel is not None and cancel.is_set():
            raise wire.TransferCancelled("the transfer was cancelled")
        with self._pool.borrow(address, cancel) as borrowed:
            response = borrowed.ask(request)
            if not response.ok:
                borrowed.keep()
                raise _refusal(address, response)
            yield borrowed, response
            borrowed.keep()


def _receive_verified(
    answer: Borrowed, out: memoryview, begin: int, span: tuple[int, int], digests: bytes
) -> Iterator[tuple[int, int | None]]:
    """Receive the chunks of ``span`` batch by batch; yield the bytes of each and the first chunk that is wrong."""
    end = begin + out.nbytes
    scratch = bytearray(CHUNK_BYTES)
    for at, stop in _batches(*span, begin, end):
        # A batch that reaches beyond what is wanted is one single chunk, and goes through the scratch.
        whole = begin <= at and stop <= end
        with out[at - begin : stop - begin] if whole else memoryview(scratch)[: stop - at] as batch:
            answer.receive(batch)
            bad = verify(batch, digests, at, stop, base=at)
            if not bad and not whole:
                low, high = max(at, begin), min(stop, end)
                out[low - begin : high - begin] = batch[low - at : high - at]
        yield stop - at, bad[0] if bad else None


def _batches(first: int, last: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [first, last) into batches: a single chunk where an edge of [begin, end) lies inside it, else 1 MiB."""
    at = first
    while at < last:
        stop = min(at + CHUNK_BYTES, last)
        if at >= begin and stop <= end:
            inner = end if end == last else end // CHUNK_BYTES * CHUNK_BYTES
            stop = min(at + _BATCH_BYTES, inner)
        yield at, stop
        at = stop


def _writable(out: Buffer) -> memoryview:
    view = memoryview(out)
    if view.readonly or not view.c_contiguous:
        raise UsageError("bytes are received into writable contiguous buffers only")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _refusal(address: str, response: BulkResponse) -> Exception:
    """Return the exception that a peer's refusal means here."""
    message = f"{address}: {response.message[:1000]}"
    if response.code == "NOT_FOUND":
        return wire.ObjectMissing(message)
    if response.code == "PERMISSION_DENIED":
        return AccessDenied(message)
    if response.code == "UNAVAILABLE":
        return PeerUnreachable(message)
    if response.code == "INVALID_ARGUMENT":
        return UsageError(message)
    return RemoteProtocolError(f"{message} ({response.code[:64] or 'no code'})")
