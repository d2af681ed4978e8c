"""
Reads the bytes of slots and parity files from other daemons, verified, straight into the reader's own memory.

Rule 1: what is read is what was sealed, or an error says otherwise. Nothing is retried on wrong bytes: they are an
        erasure, and the caller decodes.
Rule 2: whole chunks are compared with the digests that the caller trusts. What is wanted of other chunks is verified
        by their owner, and compared with the owner's digests for the way.
Rule 3: a connection that saw anything unexpected is closed, never reused: leftovers of one answer must not
        become the beginning of the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from snapshotd.arena.keys import describe
from snapshotd.errors import AccessDenied, CorruptionError, PeerUnreachable, RemoteProtocolError, UsageError
from snapshotd.layout import DIGEST_BYTES, chunk_count, root_digest
from snapshotd.reshard import Copy
from snapshotd.transfer import wire
from snapshotd.transfer.blocks import BLOCK_BYTES_MAX, BLOCKS_MAX, blocks_of, whole_inside
from snapshotd.transfer.exact import Exact, Run, runs_of
from snapshotd.transfer.holder import RENEW_S, Holder
from snapshotd.transfer.incoming import Incoming, Steering, whole_chunks
from snapshotd.transfer.pool import Borrowed, Pool
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ByteRange, ObjectKey

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer

__all__ = ["BulkClient", "ObjectInfo"]


class ObjectInfo(NamedTuple):
    """What a peer says of an object. ``root`` is that of ``digests`` (checked); that it is the sealed one is not."""

    file_bytes: int
    root: str
    digests: bytes


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
        self.is_plain = tls is None

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
        with self._ask(address, request, cancel) as answer:
            response = _head(answer)
            expected = chunk_count(response.file_bytes) * DIGEST_BYTES
            _check_payload(address, key, response, expected)
            data = _receive_digests(answer, key, expected)
            answer.keep()
        return _checked_info(address, key, response, data)

    def read_verified(
        self,
        address: str,
        key: ObjectKey,
        pieces: Sequence[tuple[int, Buffer]],
        parts: Sequence[Copy] = (),
        targets: Sequence[memoryview] = (),
        *,
        digests: bytes | None,
        file_bytes: int,
        learned: Callable[[ObjectInfo], None] = lambda info: None,
        cancel: threading.Event | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        """
        Fill each buffer of ``pieces`` with the bytes of the file from its offset on, and carry out ``parts`` into
        ``targets``, by their numbers in the copies; all in one request, and only what is wanted travels.

        ``digests`` are the chunk digests of the whole file of ``file_bytes``, from a source that you trust. Without
        them they come with the answer; ``learned`` hears of them, and raises unless their root is the one that it
        trusts. Pieces that follow each other in the file are read as one. Chunks that are not whole in it are verified
        by their owner. CorruptChunk (a CorruptionError) names the first whole chunk that does not match; after an error
        the contents of the buffers are undefined.

        ``parts``: at most 4096 copies of at most 1 MiB each. CorruptionError when the owner finds rot, or what it
        verified was hurt on the way.
        """
        with ExitStack() as stack:
            views = [_writable(out) for _, out in pieces]
            stack.callback(_release, views)
            runs = runs_of((begin, view) for (begin, _), view in zip(pieces, views, strict=True))
            if not runs and not parts:
                return
            _check_digests(digests, file_bytes)
            _check_runs(runs, file_bytes)
            _check_parts(parts, targets)
            request = BulkRequest(protocol=wire.PROTOCOL, object=key, digests=digests is None, blocks=blocks_of(parts))
            request.ranges.extend(ByteRange(begin=run.begin, end=run.end) for run in runs)
            request.exact = any(_has_ends(run, file_bytes) for run in runs)
            expected = sum(run.end - run.begin for run in runs) + sum(copy.nbytes for copy in parts)
            answer = stack.enter_context(self._ask(address, request, cancel))
            exact = Exact(
                _Answer(answer),
                digests=_begin(answer, request, digests, file_bytes, expected, learned),
                file_bytes=file_bytes,
                steering=Steering(cancel=cancel, pace=pace),
                name=describe(key),
                peer=address,
            )
            for run in runs:
                exact.fill(run)
            exact.scatter(parts, targets)
            if request.exact or parts:
                exact.finish()
            answer.keep()

    def stream(
        self,
        address: str,
        key: ObjectKey,
        spans: Sequence[tuple[int, int]],
        *,
        digests: bytes | None,
        file_bytes: int,
        learned: Callable[[ObjectInfo], None] = lambda info: None,
        wait_s: float = 0.0,
        cancel: threading.Event | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> Incoming:
        """
        Return the bytes of ``spans`` for who takes them bit by bit: one request, and the peer sends ahead meanwhile.

        Whole chunks around the spans travel, and what is handed out was verified here. The request is on its way when
        this returns, and the answer is awaited by the first fill: whoever reads from several peers asks them all first.
        ``digests`` and ``learned`` are those of ``read_verified``; of spans of no bytes the first fill, of no bytes,
        learns the digests. ``wait_s``: the peer waits so long, a second at most, for an object that it has not sealed
        yet. Whoever waits longer than the peer's timeout between
        two fills loses the connection. What is returned is to be closed, or a context manager.
        """
        if any(not 0 <= begin <= end <= file_bytes for begin, end in spans):
            raise UsageError(f"a span to be read is not inside {file_bytes} bytes")
        _check_digests(digests, file_bytes)
        ranges = [whole_chunks(span, file_bytes) for span in spans if span[0] < span[1]]
        if len(ranges) > wire.RANGES_MAX:
            raise UsageError(f"{len(ranges)} ranges are more than {wire.RANGES_MAX}")
        request = BulkRequest(
            protocol=wire.PROTOCOL, object=key, digests=digests is None, wait_ms=round(wait_s * 1000)
        )
        request.ranges.extend(ByteRange(begin=begin, end=end) for begin, end in ranges)
        expected = sum(end - begin for begin, end in ranges)
        answer = self._ask(address, request, cancel)
        return Incoming(
            answer,
            spans,
            begin=lambda: _begin(answer, request, digests, file_bytes, expected, learned),
            file_bytes=file_bytes,
            steering=Steering(cancel=cancel, pace=pace),
            key=key,
            peer=address,
        )

    def suspect(self, address: str, key: ObjectKey) -> None:
        """Tell the owner that what it sent of an object did not match; returns when it has verified the object."""
        request = BulkRequest(protocol=wire.PROTOCOL, object=key, suspect=True)
        with self._ask(address, request, None) as answer:
            _head(answer)
            answer.keep()

    def hold(self, address: str, keys: Sequence[ObjectKey], *, renew_s: float = RENEW_S) -> Holder:
        """
        Return a hold on objects (at least one): they stay until it is closed, whatever their owner does meanwhile.

        Over a connection that does not count as one of ``connections_per_peer``, on which a thread says every
        ``renew_s`` seconds that we are still here. ObjectMissing when one of them is gone: then none is held. PeerBusy:
        too many hold something there.
        """
        if not keys:
            raise UsageError("a hold on nothing")

        def ask(line: Borrowed, key: ObjectKey) -> None:
            line.send(BulkRequest(protocol=wire.PROTOCOL, object=key, hold=True))
            if not _head(line).held:
                raise RemoteProtocolError(f"{address} cannot hold snapshots for readers: update its daemon")

        return Holder(self._pool.apart(address), list(keys), ask, renew_s=renew_s)

    # ------------------------------------------------------------------------------------------ insides

    def _ask(self, address: str, request: BulkRequest, cancel: threading.Event | None) -> Borrowed:
        """Send a request; the answer has yet to be awaited, and is to be kept once it was received whole."""
        if cancel is not None and cancel.is_set():
            raise wire.TransferCancelled("the transfer was cancelled")
        answer = self._pool.borrow(address, cancel)
        try:
            answer.send(request)
        except BaseException:
            answer.end()
            raise
        return answer


class _Answer:
    """A borrowed connection as a Receiver."""

    def __init__(self, borrowed: Borrowed) -> None:
        self.receive = borrowed.receive
        self._borrowed = borrowed

    def tail(self) -> BulkResponse:
        response = self._borrowed.tail()
        if not response.ok:
            self._borrowed.keep()  # it was read to its end
            raise _refusal(self._borrowed.address, response)
        return response


def _head(answer: Borrowed) -> BulkResponse:
    """Await the head of an answer; a refusal is raised."""
    response = answer.head()
    if not response.ok:
        answer.keep()
        raise _refusal(answer.address, response)
    return response


def _begin(
    answer: Borrowed,
    request: BulkRequest,
    digests: bytes | None,
    file_bytes: int,
    expected: int,
    learned: Callable[[ObjectInfo], None],
) -> bytes:
    """
    Await the head of an answer with ``expected`` bytes of data, and return the digests of all chunks: those that are
    known, or that come with it. An owner that verifies some of it must mean the same object by its name.
    """
    response = _head(answer)
    key, address = request.object, answer.address
    if request.exact and not response.exact:
        raise RemoteProtocolError(f"{address} cannot send ranges that end inside chunks: update its daemon")
    if response.file_bytes != file_bytes:
        raise CorruptionError(f"{describe(key)} has {response.file_bytes} bytes at {address}, {file_bytes} were sealed")
    if digests is not None:
        _check_payload(address, key, response, expected)
        if (request.exact or request.blocks) and response.root_digest != root_digest(digests):
            raise CorruptionError(
                f"{describe(key)} has another root digest at {address} by now: {response.root_digest}"
            )
        return digests
    nbytes = chunk_count(file_bytes) * DIGEST_BYTES
    _check_payload(address, key, response, nbytes + expected)
    info = _checked_info(address, key, response, _receive_digests(answer, key, nbytes))
    learned(info)
    return info.digests


def _receive_digests(answer: Borrowed, key: ObjectKey, nbytes: int) -> bytes:
    if nbytes > wire.DIGESTS_BYTES_MAX:
        raise RemoteProtocolError(f"{answer.address} announced {nbytes} bytes of digests of {describe(key)}")
    data = bytearray(nbytes)
    with memoryview(data) as view:
        answer.receive(view)
    return bytes(data)


def _checked_info(address: str, key: ObjectKey, response: BulkResponse, digests: bytes) -> ObjectInfo:
    if root_digest(digests) != response.root_digest:
        raise CorruptionError(f"the digests of {describe(key)} from {address} do not make up their root digest")
    return ObjectInfo(file_bytes=response.file_bytes, root=response.root_digest, digests=digests)


def _check_digests(digests: bytes | None, file_bytes: int) -> None:
    if digests is not None and len(digests) != chunk_count(file_bytes) * DIGEST_BYTES:
        raise UsageError(f"{len(digests)} bytes of digests are not those of {file_bytes} bytes")


def _check_runs(runs: Sequence[Run], file_bytes: int) -> None:
    if any(not 0 <= run.begin <= run.end <= file_bytes for run in runs):
        raise UsageError(f"a span to be read is not inside {file_bytes} bytes")
    if len(runs) > wire.RANGES_MAX:
        raise UsageError(f"{len(runs)} ranges are more than {wire.RANGES_MAX}")


def _check_parts(parts: Sequence[Copy], targets: Sequence[memoryview]) -> None:
    if len(parts) > BLOCKS_MAX or any(copy.nbytes > BLOCK_BYTES_MAX for copy in parts):
        raise UsageError(f"{len(parts)} copies are more, or larger, than one request may have")
    for copy in parts:
        if not 0 <= copy.target < len(targets) or copy.dst_range[1] > targets[copy.target].nbytes:
            raise UsageError(f"a copy does not end inside its target, number {copy.target} of {len(targets)}")


def _has_ends(run: Run, file_bytes: int) -> bool:
    """Whether a run has chunks in part."""
    return (run.begin, run.end) != whole_inside(run.begin, run.end, file_bytes)


def _check_payload(address: str, key: ObjectKey, response: BulkResponse, expected: int) -> None:
    if response.payload_bytes != expected:
        raise RemoteProtocolError(
            f"{address} announced {response.payload_bytes} bytes of {describe(key)}, {expected} were asked for"
        )


def _writable(out: Buffer) -> memoryview:
    view = memoryview(out)
    if view.readonly or not view.c_contiguous:
        raise UsageError("bytes are received into writable contiguous buffers only")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _release(views: Iterable[memoryview]) -> None:
    for view in views:
        view.release()


def _refusal(address: str, response: BulkResponse) -> Exception:
    """Return the exception that a peer's refusal means here."""
    message = f"{address}: {response.message[:1000]}"
    if response.code == "NOT_FOUND":
        return wire.ObjectMissing(message)
    if response.code == wire.PeerBusy.code:
        return wire.PeerBusy(message)
    if response.code == "PERMISSION_DENIED":
        return AccessDenied(message)
    if response.code == CorruptionError.code:
        return CorruptionError(message)
    if response.code == "UNAVAILABLE":
        return PeerUnreachable(message)
    if response.code == "INVALID_ARGUMENT":
        return UsageError(message)
    return RemoteProtocolError(f"{message} ({response.code[:64] or 'no code'})")
