"""
Copies that digest what they copy: the whole chunks of a slot, with compiled code (snapshotd.native).

Rule 1: a chunk is copied so if all of its bytes come from arrays that are dense. The rest is for others to copy, and
its digests for the daemon to compute, who would compute all of them without us.
Rule 2: the digest is that of the bytes that the slot gets: what changes meanwhile changes both.
Rule 3: an array may go in parts to several threads. A chunk goes to one.
Rule 4: what was copied is there for others once they hear of it. Streaming stores are seen late, but each call ends in
a fence that waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from snapshotd.layout import CHUNK_BYTES, DIGEST_BYTES, KnownDigests
from snapshotd.native import ALIGN_BYTES, RUN_WORDS, Kernels
from snapshotd_client.arrays import Array, address_of

__all__ = ["ChunkCopies", "Part", "Rest"]

_WORD: Final = np.dtype(np.uint64)

Pair: TypeAlias = "tuple[Array, Array]"


class Rest(NamedTuple):
    """Bytes ``[begin, end)`` of a pair of dense arrays; all of it, however it lies, where ``end`` is None."""

    pair: Pair
    begin: int
    end: int | None


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Whole chunks of the slot, one behind the other; ``segments`` (address, bytes) have exactly their bytes."""

    first: int
    count: int
    segments: Array

    def cut(self, begin: int, end: int) -> _Run:
        """Return the chunks ``[begin, end)`` of it."""
        ends = np.cumsum(self.segments[:, 1], dtype=np.int64)
        lower, upper = begin * CHUNK_BYTES, end * CHUNK_BYTES
        low, high = int(np.searchsorted(ends, lower, side="right")), int(np.searchsorted(ends, upper)) + 1
        segments = self.segments[low:high].copy()
        skipped = lower - (int(ends[low - 1]) if low else 0)
        segments[0] += np.array([skipped, -skipped]).astype(_WORD)
        segments[-1, 1] -= np.uint64(int(ends[high - 1]) - upper)
        return _Run(self.first + begin, end - begin, segments)


class Part:
    """What one thread copies in one go."""

    def __init__(self, kernels: Kernels, words: Array, keeps: object) -> None:
        self._kernels = kernels
        self._words = words
        self._keeps = keeps

    def copy(self) -> None:
        """Copy and digest; the interpreter's lock is let go of once."""
        if len(self._words):
            self._kernels.copy_digest(address_of(self._words), len(self._words))


class ChunkCopies:
    """
    The chunks of a slot that ``pairs`` (target, source) fill with dense arrays; ``rest`` is what they do not fill.

    ``slot`` is the whole file, which the targets lie in. Who copies keeps the arrays alive. ValueError for a slot that
    does not begin where the compiled code can write: mappings do.
    """

    def __init__(self, pairs: Sequence[Pair], slot: Array, kernels: Kernels) -> None:
        if address_of(slot) % ALIGN_BYTES:
            raise ValueError(f"a slot at {address_of(slot):#x} does not begin at a multiple of {ALIGN_BYTES}")
        self._kernels = kernels
        self._slot = slot
        self.rest: list[Rest] = []
        self._runs: list[_Run] = []
        dense = []
        for pair in pairs:
            target, source = pair
            if target.flags.c_contiguous and source.flags.c_contiguous and target.nbytes:
                dense.append((address_of(target) - address_of(slot), target.nbytes, address_of(source), pair))
            else:
                self.rest.append(Rest(pair, 0, None))
        dense.sort(key=lambda item: item[0])
        places = np.array([item[:3] for item in dense], np.int64).reshape(-1, 3)
        begins, ends = places[:, 0], places[:, 0] + places[:, 1]
        gaps = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        for low, high in zip([0, *gaps], [*gaps, len(dense)], strict=True):
            if low < high:
                self._add(places[low:high], [item[3] for item in dense[low:high]])
        counts = [run.count for run in self._runs]
        self.num_chunks = sum(counts)
        self._digests = np.zeros(self.num_chunks, _WORD)
        self._begins = np.cumsum([0, *counts])

    def split(self, count: int) -> list[Part]:
        """Return ``count`` parts of about as many chunks each."""
        return [
            self._part(number * self.num_chunks // count, (number + 1) * self.num_chunks // count)
            for number in range(count)
        ]

    def digests(self) -> list[KnownDigests]:
        """Return those of the chunks that were copied last."""
        return [
            KnownDigests(run.first, self._digests[begin : begin + run.count].tobytes())
            for run, begin in zip(self._runs, self._begins, strict=False)
        ]

    def _add(self, places: Array, pairs: list[Pair]) -> None:
        """Add what lies side by side in the slot."""
        begins, ends, sources = places[:, 0], places[:, 0] + places[:, 1], places[:, 2]
        first, last = -(-int(begins[0]) // CHUNK_BYTES), int(ends[-1]) // CHUNK_BYTES
        if first >= last:
            self.rest += [Rest(pair, 0, pair[0].nbytes) for pair in pairs]
            return
        lower, upper = first * CHUNK_BYTES, last * CHUNK_BYTES
        for number in np.flatnonzero((begins < lower) | (ends > upper)):
            pair, begin, end = pairs[number], int(begins[number]), int(ends[number])
            outside = (begin, min(end, lower)), (max(begin, upper), end)
            self.rest += [Rest(pair, low - begin, high - begin) for low, high in outside if low < high]
        lows, highs = np.maximum(begins, lower), np.minimum(ends, upper)
        segments = np.stack([sources + (lows - begins), highs - lows], axis=1)[lows < highs].astype(_WORD)
        self._runs.append(_Run(first, last - first, segments))

    def _part(self, begin: int, end: int) -> Part:
        runs = []
        for run, at in zip(self._runs, map(int, self._begins), strict=False):
            low, high = max(begin, at), min(end, at + run.count)
            if low < high:
                runs.append((run.cut(low - at, high - at), low))
        words = np.zeros((len(runs), RUN_WORDS), _WORD)
        for row, (run, position) in zip(words, runs, strict=True):
            target = address_of(self._slot) + run.first * CHUNK_BYTES
            row[:] = target, address_of(self._digests) + position * DIGEST_BYTES, address_of(run.segments), run.count
        return Part(self._kernels, words, (runs, self._slot, self._digests))
