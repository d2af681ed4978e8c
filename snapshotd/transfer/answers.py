"""
What a bulk server says to one request: a refusal, or a head and then exactly the bytes that it promises.

Rule 1: a request is checked whole before anything is answered.
Rule 2: an object is leased from its lookup to its last byte.
Rule 3: whole chunks leave unverified, for the reader has their digests; chunks of which parts are sent are verified on
        the way, and digests of those parts, or the refusal, follow behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from snapshotd.arena.keys import describe
from snapshotd.errors import CorruptionError, RemoteProtocolError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import CHUNK_BYTES, RunningDigests, is_right
from snapshotd.reshard import Copy, gather_copy
from snapshotd.transfer import blocks, wire
from snapshotd.transfer.objects import Holding, Objects, Refusal, Servable
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ObjectKey

__all__ = ["Answers"]

_WAIT_S: Final = 1.0
"""No request keeps the thread of its connection for longer because of what is not sealed yet."""


class Answers:
    """Answers requests, in the thread of their connection. See BulkServer; ``sent`` hears how many bytes left."""

    def __init__(
        self, objects: Objects, *, suspected: Callable[[ObjectKey], None], sent: Callable[[int], None]
    ) -> None:
        self._objects = objects
        self._suspected = suspected
        self._sent = sent

    def answer(self, out: wire.Outbound, request: BulkRequest, holding: Holding) -> None:
        """
        Send head and payload; what is to be held becomes part of ``holding``, which is the connection's.

        Refusal: say no, and go on. RemoteProtocolError: the peer does not know the rules.
        """
        if request.protocol != wire.PROTOCOL:
            raise RemoteProtocolError(f"protocol {request.protocol} is not spoken here, {wire.PROTOCOL} is")
        if request.object.WhichOneof("kind") is None:
            raise RemoteProtocolError("a request names neither a slot nor a parity file")
        if len(request.ranges) > wire.RANGES_MAX:
            raise RemoteProtocolError(f"{len(request.ranges)} ranges are more than {wire.RANGES_MAX}")
        if request.suspect:
            self._suspected(request.object)
            out.frame(BulkResponse(ok=True))
            return
        if request.hold:
            obj = holding.add(request.object)
            out.frame(BulkResponse(ok=True, held=True, file_bytes=obj.file_bytes, root_digest=obj.root))
            return
        failpoint("transfer.before_send")
        lease = self._objects.lease(request.object, min(request.wait_ms / 1000, _WAIT_S))
        try:
            obj = lease.obj
            with memoryview(obj.view)[: obj.file_bytes] as view:
                self._send_object(out, obj, view, request)
        finally:
            lease.close()

    def _send_object(self, out: wire.Outbound, obj: Servable, view: memoryview, request: BulkRequest) -> None:
        """Send what is asked for of an object, ``view`` all its bytes."""
        ranges, copies = _checked(request, view.nbytes)
        digests = (obj.digests or b"") if request.digests else b""
        data_bytes = sum([end - begin for begin, end in ranges]) + sum([copy.nbytes for copy in copies])
        nbytes = len(digests) + data_bytes
        head = BulkResponse(
            ok=True, file_bytes=obj.file_bytes, root_digest=obj.root, exact=request.exact, payload_bytes=nbytes
        )
        out.frame(head, more=nbytes > 0)
        if digests:
            self._send_piece(out, memoryview(digests), more=data_bytes > 0)
        if request.exact or copies:
            self._send_verified(out, _Verified(obj, view, request.object), view, ranges, copies, exact=request.exact)
        else:
            for begin, end in ranges:
                self._send_range(out, view, begin, end)
        self._sent(nbytes)

    def _send_verified(
        self,
        out: wire.Outbound,
        verified: _Verified,
        view: memoryview,
        ranges: Sequence[tuple[int, int]],
        copies: Sequence[Copy],
        *,
        exact: bool,
    ) -> None:
        for begin, end in ranges:
            if exact:
                verified.add_ends(begin, end)
            self._send_range(out, view, begin, end)
        self._send_blocks(out, verified, copies)
        out.frame(verified.tail())

    def _send_range(self, out: wire.Outbound, view: memoryview, begin: int, end: int) -> None:
        """Send a range straight from the mapping."""
        for at in range(begin, end, wire.PIECE_BYTES):
            with view[at : min(at + wire.PIECE_BYTES, end)] as piece:
                self._send_piece(out, piece)
            if at + wire.PIECE_BYTES < end:
                failpoint("transfer.mid_send")

    def _send_piece(self, out: wire.Outbound, piece: memoryview, *, more: bool = False) -> None:
        if failpoint("transfer.corrupt_send") == "corrupt":
            flipped = bytearray(piece)
            flipped[len(flipped) // 2] ^= 0x10
            piece = memoryview(flipped)
        out.send(piece, more=more)

    def _send_blocks(self, out: wire.Outbound, verified: _Verified, copies: Sequence[Copy]) -> None:
        """Send what the copies read, verified."""
        with memoryview(bytearray(min(sum(copy.nbytes for copy in copies), blocks.BLOCK_BYTES_MAX))) as room:
            for portion in blocks.portions(copies):
                with verified.add(portion, room) as piece:
                    self._send_piece(out, piece)


class _Verified:
    """
    An object, ``view`` all its bytes, of which parts of chunks are sent: chunk by chunk verified, each once, as far as
    it is looked at.

    What is sent of them is hashed in order, for the response behind it.
    """

    def __init__(self, obj: Servable, view: memoryview, key: ObjectKey) -> None:
        self._view, self._key = view, key
        assert obj.digests is not None
        self._digests = obj.digests
        self._known: set[int] = set()
        self._running = RunningDigests()
        self._rotten: str | None = None

    def add_ends(self, begin: int, end: int) -> None:
        """Verify the chunks that a range has in part, and hash what it has of them."""
        first, last = blocks.whole_inside(begin, end, self._view.nbytes)
        if begin < first:
            self._add_end(begin, first)
        if last < end:
            self._add_end(last, end)

    def add(self, portion: Sequence[Copy], room: memoryview) -> memoryview:
        """
        Verify and hash what the copies of a portion read, and return it, one behind the other: the mapping itself, or
        in ``room``.
        """
        for copy in portion:
            for first, stop in blocks.chunks_of(copy):
                self._look(first, stop)
        piece = self._gather(portion, room)
        self._running.add(piece)
        return piece

    def tail(self) -> BulkResponse:
        """Return what is said behind it all: the digests, or which chunk was the first that does not match."""
        if self._rotten is None:
            return BulkResponse(ok=True, digests=self._running.finish())
        return BulkResponse(ok=False, code=CorruptionError.code, message=self._rotten)

    def _add_end(self, begin: int, end: int) -> None:
        self._look(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES))
        with self._view[begin:end] as piece:
            self._running.add(piece)

    def _look(self, first: int, stop: int) -> None:
        for chunk in range(first, stop):
            if chunk in self._known:
                continue
            self._known.add(chunk)
            if not is_right(self._view, self._digests, chunk) and self._rotten is None:
                self._rotten = f"chunk {chunk} of {describe(self._key)} does not match its digest"

    def _gather(self, portion: Sequence[Copy], room: memoryview) -> memoryview:
        if blocks.is_direct(portion):
            return self._view[slice(*portion[0].src_range)]
        held = 0
        for copy in portion:
            with room[held : held + copy.nbytes] as out:
                gather_copy(copy, self._view, out)
            held += copy.nbytes
        return room[:held]


def _checked(request: BulkRequest, file_bytes: int) -> tuple[list[tuple[int, int]], list[Copy]]:
    """The ranges and the blocks of a request; Refusal for those that cannot be."""
    ranges = [(item.begin, item.end) for item in request.ranges]
    for begin, end in ranges:
        if not begin <= end <= file_bytes:
            raise Refusal("INVALID_ARGUMENT", f"the range [{begin}, {end}) is not inside {file_bytes} bytes")
    if not request.blocks:
        return ranges, []
    try:
        copies = blocks.copies_of(request.blocks, file_bytes)
        blocks.check_spread(copies)
    except UsageError as error:
        raise Refusal("INVALID_ARGUMENT", str(error)) from error
    return ranges, copies
