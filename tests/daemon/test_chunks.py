"""Parts of chunks from a source that has whole chunks only, as a durable file."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from snapshotd.daemon.chunks import read_through_chunks
from snapshotd.daemon.source import Piece
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy


class Whole:
    """Gives whole chunks, and notes which."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.file_bytes = data.nbytes
        self.spans: list[tuple[int, int]] = []

    def read(self, pieces: Sequence[Piece]) -> int:
        for piece in pieces:
            assert piece.begin % CHUNK_BYTES == 0
            assert piece.end % CHUNK_BYTES == 0 or piece.end == self.file_bytes
            self.spans.append((piece.begin, piece.end))
            piece.into[:] = self.data[piece.begin : piece.end].tobytes()
        return sum(piece.into.nbytes for piece in pieces)


def test_any_copies_match_a_plain_loop() -> None:
    data = np.random.default_rng(0).integers(0, 256, 20 * CHUNK_BYTES + 17, np.uint8)
    dice = random.Random(4)
    for _ in range(100):
        copies: list[Copy] = []
        place = 0
        for _ in range(dice.randrange(1, 9)):
            run = dice.choice([1, 8, 5000, 300_000])
            stride = run + dice.choice([0, 8, 3000, 600_000])
            count = dice.randrange(1, 4)
            begin = dice.randrange(data.nbytes - (count - 1) * stride - run)
            dims = ((count, stride, run),) if count > 1 else ()
            copies.append(Copy(source=0, target=0, src_begin=begin, dst_begin=place, run_bytes=run, dims=dims))
            place += count * run
        expected = b"".join(data[src : src + run].tobytes() for copy in copies for src, _, run in copy.runs())
        out = bytearray(len(expected))
        source = Whole(data)
        fetched = read_through_chunks(source, copies, [memoryview(out)])
        assert bytes(out) == expected
        assert fetched == sum(end - begin for begin, end in source.spans)


def test_neighbours_share_their_chunks() -> None:
    """Forty biases in one chunk are one read of a shared disk, not forty."""
    data = np.zeros(8 * CHUNK_BYTES, np.uint8)
    source = Whole(data)
    copies = [
        Copy(source=0, target=0, src_begin=begin, dst_begin=100 * i, run_bytes=100)
        for i, begin in enumerate([*range(CHUNK_BYTES, CHUNK_BYTES + 4000, 100), 7 * CHUNK_BYTES])
    ]
    out = memoryview(bytearray(100 * len(copies)))
    assert 2 * CHUNK_BYTES == read_through_chunks(source, copies, [out])
    assert [(CHUNK_BYTES, 2 * CHUNK_BYTES), (7 * CHUNK_BYTES, 8 * CHUNK_BYTES)] == source.spans
