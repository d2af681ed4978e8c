"""
Carry out byte-range copies from a source that is not mapped here: few requests, and nothing fetched that is not wanted.

Rule 1: what follows each other in the source is one run, wherever it goes, and goes straight there.
Rule 2: all else (small tensors far from others, strided blocks of short runs) is read as parts of chunks.
Rule 3: both in one request, unless there are very many parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from snapshotd.batches import batches
from snapshotd.layout import CHUNK_BYTES
from snapshotd.reshard import Copy, cut_copy
from snapshotd.transfer.blocks import BLOCK_BYTES_MAX, BLOCKS_MAX
from snapshotd.transfer.wire import RANGES_MAX

__all__ = ["BATCH_BYTES", "Piece", "Read", "gather"]

BATCH_BYTES: Final = 128 * CHUNK_BYTES
"""16 MiB of parts in one request: as much as a worker asks for at once."""

_RUN_BYTES: Final = 64 * 1024
"""Shorter ones are cheaper gathered with others by their owner."""


class Piece(NamedTuple):
    """The bytes of an object from ``begin`` on are wanted in ``into``, as many as it has room for."""

    begin: int
    into: memoryview

    @property
    def end(self) -> int:
        return self.begin + self.into.nbytes


Read: TypeAlias = Callable[[Sequence[Piece], Sequence[Copy], Sequence[memoryview]], int]
"""
Fills pieces and carries out parts into targets, by their numbers, with verified bytes, in one request; returns the
bytes that were fetched for it.
"""


def gather(read: Read, copies: Iterable[Copy], targets: Sequence[memoryview]) -> int:
    """
    Carry out ``copies`` by ``read`` into ``targets``, by their numbers in the copies; return the bytes fetched.

    The errors of ``read``. What is in the targets after an error is not to be used.
    """
    runs: list[Copy] = []
    small: list[Copy] = []
    for copy in copies:
        if not copy.dims:
            runs.append(copy)
        elif copy.run_bytes >= _RUN_BYTES:
            runs += (copy._replace(src_begin=src, dst_begin=dst, dims=()) for src, dst, _ in copy.runs())
        else:
            small.append(copy)
    pieces: list[Piece] = []
    num_runs = 0
    requests: list[list[Piece]] = []
    for run in _joined(sorted(runs, key=lambda copy: copy.src_begin)):
        if run[-1].src_begin + run[-1].run_bytes - run[0].src_begin < _RUN_BYTES:
            small += run
            continue
        if num_runs == RANGES_MAX:
            requests.append(pieces)
            pieces, num_runs = [], 0
        num_runs += 1
        pieces += [Piece(copy.src_begin, _into(targets[copy.target], copy)) for copy in run]
    requests.append(pieces)
    parts = [part for copy in small for part in cut_copy(copy, BLOCK_BYTES_MAX)]
    behind = list(batches(sorted(parts, key=lambda copy: copy.src_begin), BATCH_BYTES, BLOCKS_MAX))
    fetched = 0
    for pieces in requests:
        batch = behind.pop() if behind else []
        if pieces or batch:
            fetched += read(pieces, batch, targets)
    for batch in behind:
        fetched += read([], batch, targets)
    return fetched


def _into(target: memoryview, run: Copy) -> memoryview:
    whole = run.dst_begin == 0 and run.run_bytes == target.nbytes
    return target if whole else target[slice(*run.dst_range)]


def _joined(runs: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Yield runs that follow each other in the source, wherever they go, as one."""
    joined: list[Copy] = []
    for run in runs:
        if joined and joined[-1].src_begin + joined[-1].run_bytes != run.src_begin:
            yield joined
            joined = []
        joined.append(run)
    if joined:
        yield joined
