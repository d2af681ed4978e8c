"""
A slot of this node that is read as a file into tensors, verified; no page of it is mapped here.

A mapping would cost as much as the copy, once for each page; and a file that is cut short is an error, not a signal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.layout import CHUNK_BYTES, root_digest
from snapshotd.reshard import Copy
from snapshotd.transfer import Exact, Piece, Run, Steering, runs_of
from snapshotd.v1.bulk_pb2 import BulkResponse
from snapshotd_client.slots import open_checked

__all__ = ["SlotFile"]


class SlotFile:
    """
    The slot at ``path``, of ``file_bytes``. Several threads may read at once.

    CorruptionError for chunk digests that do not make up ``root``; AccessDenied and OSError for a path that is not what
    it should be.
    """

    def __init__(self, path: str, file_bytes: int, digests: bytes, root: str) -> None:
        if root_digest(digests) != root:
            raise CorruptionError(f"the chunk digests of {path} do not make up the root digest {root}")
        self._path, self._file_bytes, self._digests = path, file_bytes, digests
        self._fd = open_checked(path, os.O_RDONLY, None)

    def read(
        self, pieces: Sequence[Piece], parts: Sequence[Copy], targets: Sequence[memoryview], steering: Steering
    ) -> int:
        """
        Fill ``pieces``, and carry out ``parts`` of one run each into ``targets``, verified; return their bytes.

        CorruptionError names the first chunk that does not match, or where the file ends.
        """
        if any(part.dims for part in parts):
            raise UsageError("a strided block is not read from a file")
        more = [Piece(part.src_begin, targets[part.target][slice(*part.dst_range)]) for part in parts]
        nbytes = 0
        for run in runs_of([*pieces, *more]):
            if not 0 <= run.begin <= run.end <= self._file_bytes:
                raise UsageError(f"[{run.begin}, {run.end}) is not inside the {self._file_bytes} bytes of {self._path}")
            whole = _around(run, self._file_bytes)
            exact = Exact(
                _Reading(self._fd, whole.begin, self._path),
                digests=self._digests,
                file_bytes=self._file_bytes,
                steering=steering,
                name=self._path,
                peer="this node",
            )
            exact.fill(whole)
            nbytes += run.end - run.begin
        return nbytes

    def close(self) -> None:
        os.close(self._fd)


class _Reading:
    """The file from ``at`` on, as a Receiver."""

    def __init__(self, fd: int, at: int, path: str) -> None:
        self._fd, self._at, self._path = fd, at, path

    def receive(self, out: memoryview) -> None:
        done = 0
        while done < out.nbytes:
            with out[done:] as rest:
                count = os.preadv(self._fd, [rest], self._at)
            if not count:
                raise CorruptionError(f"{self._path} ends at {self._at}")
            done += count
            self._at += count

    def tail(self) -> BulkResponse:
        raise AssertionError("whole chunks have no tail")


def _around(run: Run, file_bytes: int) -> Run:
    """Return a run with the rest of the chunks that it has in part, into scratch memory."""
    begin = run.begin // CHUNK_BYTES * CHUNK_BYTES
    end = min(-(-run.end // CHUNK_BYTES) * CHUNK_BYTES, file_bytes)
    before, behind = bytearray(run.begin - begin), bytearray(end - run.end)
    outs = [memoryview(before), *run.outs, memoryview(behind)]
    return Run(begin, end, [out for out in outs if out.nbytes])
