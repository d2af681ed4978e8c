"""
The payload of an answer that holds exactly what was asked for: runs straight into their places, strided parts behind.

Rule 1: a chunk that is whole in a run is compared with the object's own digest, in whatever pieces it arrives. What
        lies in other chunks was verified by its owner, and is compared with the digests that the owner sends behind it.
Rule 2: hashing follows receiving while the bytes are still in the cache; buffers too small for a system call each are
        filled from one that is not.
Rule 3: nothing that was handed out may be used before ``finish``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from snapshotd.errors import CorruptionError
from snapshotd.layout import CHUNK_BYTES, DIGEST_BYTES, RunningDigests, chunk_count
from snapshotd.reshard import Copy, scatter_copies
from snapshotd.transfer import wire
from snapshotd.transfer.blocks import BLOCK_BYTES_MAX, is_direct, portions, whole_inside
from snapshotd.transfer.incoming import Receiver, Steering

__all__ = ["Exact", "Run", "runs_of"]

_SMALL_BYTES: Final = 32 * 1024
"""Of a buffer: copying it costs less than a system call of its own."""


class Run(NamedTuple):
    """File bytes ``[begin, end)``, which go into ``outs``, one after the other."""

    begin: int
    end: int
    outs: list[memoryview]


def runs_of(pieces: Iterable[tuple[int, memoryview]]) -> list[Run]:
    """Return buffers and where in the file their bytes begin as runs: what follows each other in the file is one."""
    runs: list[Run] = []
    for begin, out in pieces:
        if not out.nbytes:
            continue
        if runs and runs[-1].end == begin:
            last = runs[-1]
            last.outs.append(out)
            runs[-1] = Run(last.begin, begin + out.nbytes, last.outs)
        else:
            runs.append(Run(begin, begin + out.nbytes, [out]))
    return runs


class Exact:
    """
    Receives the runs and parts of one answer, in the order in which they were asked for. For one thread.

    ``digests`` are those of all chunks of the object of ``file_bytes``; ``name`` and ``peer`` are for messages.
    """

    def __init__(
        self, receiver: Receiver, *, digests: bytes, file_bytes: int, steering: Steering, name: str, peer: str
    ) -> None:
        self._receiver = receiver
        self._digests = digests
        self._file_bytes = file_bytes
        self._steering = steering
        self._name, self._peer = name, peer
        self._loose = RunningDigests()  # of what is in no whole chunk
        self._scratch = bytearray()

    def fill(self, run: Run) -> None:
        """Fill the buffers of ``run``. The errors of receiving; CorruptChunk."""
        first, last = whole_inside(run.begin, run.end, self._file_bytes)
        chunks = RunningDigests()
        at = run.begin
        for group in _groups(run.outs):
            whole = group[0] if len(group) == 1 else self._room(sum(out.nbytes for out in group))
            done, nbytes = 0, whole.nbytes
            while done < nbytes:
                # Pieces end where chunks do: then most are hashed in one go.
                end = (at + wire.PIECE_BYTES) // CHUNK_BYTES * CHUNK_BYTES
                count = min(nbytes - done, end - at)
                with whole[done : done + count] as piece:
                    self._receiver.receive(piece)
                    if first <= at and at + count <= last:
                        chunks.add(piece)
                    else:
                        self._add(piece, at, first, last, chunks)
                done += count
                at += count
                self._steering.after(count)
            if len(group) > 1:
                _hand_out(whole, group)
        expected = self._digests[first // CHUNK_BYTES * DIGEST_BYTES : chunk_count(last) * DIGEST_BYTES]
        if first < last and (found := chunks.finish()) != expected:
            wrong = first // CHUNK_BYTES + _first_difference(found, expected)
            message = f"chunk {wrong} of {self._name} from {self._peer} does not match its digest"
            raise wire.CorruptChunk(message, chunk=wrong, peer=self._peer)

    def scatter(self, parts: Sequence[Copy], targets: Sequence[memoryview]) -> None:
        """Carry out ``parts`` into ``targets``, by their numbers in the copies. The errors of receiving."""
        for portion in portions(parts):
            nbytes = sum(copy.nbytes for copy in portion)
            if is_direct(portion):
                with targets[portion[0].target][slice(*portion[0].dst_range)] as piece:
                    self._receiver.receive(piece)
                    self._loose.add(piece)
            else:
                with self._room(nbytes) as piece:
                    self._receiver.receive(piece)
                    self._loose.add(piece)
                    scatter_copies(portion, piece, targets)
            self._steering.after(nbytes)

    def finish(self) -> None:
        """Compare what is in no whole chunk with what its owner sent. CorruptionError; the errors of receiving."""
        if self._receiver.tail().digests != self._loose.finish():
            raise CorruptionError(
                f"parts of {self._name} from {self._peer} do not match the digests that it sent with them"
            )

    def _room(self, nbytes: int) -> memoryview:
        """Return the beginning of scratch memory, of at most BLOCK_BYTES_MAX."""
        self._scratch = self._scratch or bytearray(BLOCK_BYTES_MAX)
        return memoryview(self._scratch)[:nbytes]

    def _add(self, piece: memoryview, at: int, first: int, last: int, chunks: RunningDigests) -> None:
        """Hash what was received for file offset ``at`` on, on both sides of where whole chunks begin and end."""
        head = max(0, min(first - at, piece.nbytes))
        tail = max(head, min(last - at, piece.nbytes))
        for begin, end, digests in (
            (0, head, self._loose),
            (head, tail, chunks),
            (tail, piece.nbytes, self._loose),
        ):
            if begin < end:
                with piece[begin:end] as part:
                    digests.add(part)


def _groups(outs: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Yield buffers in order: a large one alone, small ones as many as come to a chunk."""
    group: list[memoryview] = []
    size = 0
    for out in outs:
        alone = out.nbytes >= _SMALL_BYTES
        if group and (alone or size + out.nbytes > CHUNK_BYTES):
            yield group
            group, size = [], 0
        if alone:
            yield [out]
        else:
            group.append(out)
            size += out.nbytes
    if group:
        yield group


def _hand_out(whole: memoryview, outs: Iterable[memoryview]) -> None:
    at = 0
    for out in outs:
        out[:] = whole[at : at + out.nbytes]
        at += out.nbytes


def _first_difference(found: bytes, expected: bytes) -> int:
    for place in range(0, min(len(found), len(expected)), DIGEST_BYTES):
        if found[place : place + DIGEST_BYTES] != expected[place : place + DIGEST_BYTES]:
            return place // DIGEST_BYTES
    return min(len(found), len(expected)) // DIGEST_BYTES
