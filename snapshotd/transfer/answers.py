"""
What a bulk server says to one request: a refusal, or a head and then exactly the bytes that it promises.

Rule 1: a request is checked whole before anything is answered.
Rule 2: an object is leased from its lookup to its last byte.
Rule 3: whole chunks leave unverified, for the reader has their digests; parts of chunks are verified before the answer
        begins, and digests of what was sent follow them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

from snapshotd.arena.keys import describe
from snapshotd.errors import CorruptionError, RemoteProtocolError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import DIGEST_BYTES, chunk_count, chunk_digests, verify
from snapshotd.reshard import Copy, gather_copy
from snapshotd.transfer import blocks, wire
from snapshotd.transfer.objects import Holding, Objects, Refusal, Servable
from snapshotd.v1.bulk_pb2 import BulkRequest, BulkResponse, ObjectKey

__all__ = ["Answers"]


class Answers:
    """Answers requests, in the thread of their connection. See BulkServer; ``sent`` hears how many bytes left."""

    def __init__(
        self, objects: Objects, *, suspected: Callable[[ObjectKey], None], sent: Callable[[int], None]
    ) -> None:
        self._objects = objects
        self._suspected = suspected
        self._sent = sent

    def answer(self, sock: socket.socket, request: BulkRequest, holding: Holding) -> None:
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
            wire.send_frame(sock, BulkResponse(ok=True))
            return
        if request.hold:
            obj = holding.add(request.object)
            wire.send_frame(sock, BulkResponse(ok=True, held=True, file_bytes=obj.file_bytes, root_digest=obj.root))
            return
        failpoint("transfer.before_send")
        with self._objects.leased(request.object) as obj, memoryview(obj.view) as view:
            if request.blocks:
                self._send_blocks(sock, obj, view, request)
            else:
                ranges = _checked(request, min(obj.file_bytes, view.nbytes))
                self._send_ranges(sock, obj, view, ranges, with_digests=request.digests)

    # ------------------------------------------------------------------------------------------ ranges

    def _send_ranges(
        self,
        sock: socket.socket,
        obj: Servable,
        view: memoryview,
        ranges: Sequence[tuple[int, int]],
        *,
        with_digests: bool,
    ) -> None:
        """Send the digests, if they are wanted, and the ranges straight from the mapping."""
        assert obj.digests is not None
        digests = obj.digests if with_digests else b""
        _send_head(sock, obj, len(digests) + sum(end - begin for begin, end in ranges))
        with memoryview(digests) as piece:
            self._send_piece(sock, piece, 0, piece.nbytes)
        for begin, end in ranges:
            for at in range(begin, end, wire.PIECE_BYTES):
                self._send_piece(sock, view, at, min(at + wire.PIECE_BYTES, end))
                if at + wire.PIECE_BYTES < end:
                    failpoint("transfer.mid_send")

    def _send_piece(self, sock: socket.socket, view: memoryview, begin: int, end: int) -> None:
        if begin == end:
            return
        with view[begin:end] as piece:
            if failpoint("transfer.corrupt_send") == "corrupt":
                flipped = bytearray(piece)
                flipped[len(flipped) // 2] ^= 0x10
                sock.sendall(flipped)
            else:
                sock.sendall(piece)
        self._sent(end - begin)

    # ------------------------------------------------------------------------------------------ parts of chunks

    def _send_blocks(self, sock: socket.socket, obj: Servable, view: memoryview, request: BulkRequest) -> None:
        """Verify the chunks that the blocks are in, then gather and send piece by piece, then the digests of that."""
        assert obj.digests is not None
        try:
            copies = blocks.copies_of(request.blocks, min(obj.file_bytes, view.nbytes))
            spans = blocks.chunk_spans(copies, obj.file_bytes)
        except UsageError as error:
            raise Refusal("INVALID_ARGUMENT", str(error)) from error
        for begin, end in spans:
            wrong = verify(view, obj.digests, begin, end)
            if wrong:
                message = f"chunk {wrong[0]} of {describe(request.object)} does not match its digest"
                raise Refusal(CorruptionError.code, message)
        total = sum(copy.nbytes for copy in copies)
        _send_head(sock, obj, total + chunk_count(total) * DIGEST_BYTES)
        scratch = bytearray(min(total, 2 * blocks.BLOCK_BYTES_MAX))
        found: list[bytes] = []
        with memoryview(scratch) as room:
            for nbytes in _gathered(copies, view, room):
                with room[:nbytes] as piece:
                    found.append(chunk_digests(piece, nbytes))
                self._send_piece(sock, room, 0, nbytes)
        sock.sendall(b"".join(found))


def _gathered(copies: Iterable[Copy], view: memoryview, room: memoryview) -> Iterator[int]:
    """
    Gather the blocks in ``room``, twice the size of the largest; yield whenever there is a piece, of so many bytes.

    All pieces but the last are BLOCK_BYTES_MAX long: their chunk digests make up those of the whole.
    """
    most = blocks.BLOCK_BYTES_MAX
    held = 0
    for copy in copies:
        with room[held : held + copy.nbytes] as out:
            gather_copy(copy, view, out)
        held += copy.nbytes
        if held >= most:
            yield most
            room[: held - most] = room[most:held]
            held -= most
    if held:
        yield held


def _send_head(sock: socket.socket, obj: Servable, payload_bytes: int) -> None:
    head = BulkResponse(ok=True, file_bytes=obj.file_bytes, root_digest=obj.root, payload_bytes=payload_bytes)
    wire.send_frame(sock, head)


def _checked(request: BulkRequest, file_bytes: int) -> list[tuple[int, int]]:
    ranges = [(item.begin, item.end) for item in request.ranges]
    for begin, end in ranges:
        if not begin <= end <= file_bytes:
            raise Refusal("INVALID_ARGUMENT", f"the range [{begin}, {end}) is not inside {file_bytes} bytes")
    return ranges
