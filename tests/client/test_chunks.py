"""Whole chunks that are digested while they are copied: the digests are those of the slot, and no byte is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshotd_client.arrays import address_of
from snapshotd_client.chunks import ChunkCopies
from snapshotd_client.copying import CopyList, CopyPool

from snapshotd.layout import CHUNK_BYTES, DIGEST_BYTES, chunk_digests
from snapshotd.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="nothing was compiled; tests/native fails where it should be")

SIZES = st.one_of(
    st.integers(0, 5000),
    st.integers(-70, 70).map(lambda beside: CHUNK_BYTES + beside),
    st.integers(1, 12 * CHUNK_BYTES),
    st.integers(1, 9).map(lambda count: count * CHUNK_BYTES),
)


def make_slot(nbytes):
    room = np.full(nbytes + 64, 0xA5, np.uint8)
    return room[-address_of(room) % 64 :][:nbytes]


class Case:
    """Arrays of such sizes and forms in a slot, behind a header, with so many bytes between them."""

    def __init__(self, header, tensors, seed):
        self.rng = np.random.default_rng(seed)
        ends = np.cumsum([header, *(size + gap for size, gap, _ in tensors)])
        self.slot = make_slot(int(ends[-1]) + 100)
        self.pairs, self.dense = [], np.zeros(self.slot.nbytes, bool)
        for begin, (size, _, strided) in zip(ends, tensors, strict=False):
            target = self.slot[begin : begin + size]
            if strided:
                source = np.zeros((size, 2), np.uint8)[:, 0]
            else:
                source = np.zeros(size + 64, np.uint8)[self.rng.integers(64) :][:size]
                self.dense[begin : begin + size] = True
            self.pairs.append((target, source))
        self.dense[[*range(header), -1]] = False

    def change(self):
        for _, source in self.pairs:
            source[...] = self.rng.integers(256, size=source.shape, dtype=np.uint8)

    def check(self, copies):
        for target, source in self.pairs:
            assert np.array_equal(target, source)
        expected = chunk_digests(self.slot, self.slot.nbytes)
        known = set()
        for first, digests in copies.digests():
            begin = first * DIGEST_BYTES
            assert digests == expected[begin : begin + len(digests)]
            known |= set(range(first, first + len(digests) // DIGEST_BYTES))
        whole = self.dense[: self.slot.nbytes // CHUNK_BYTES * CHUNK_BYTES].reshape(-1, CHUNK_BYTES)
        assert known == set(np.flatnonzero(whole.all(axis=1)))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([0, 64, 5000, CHUNK_BYTES, CHUNK_BYTES + 8]),
    st.lists(st.tuples(SIZES, st.sampled_from([0, 0, 0, 0, 1, 64]), st.sampled_from([False] * 9 + [True])), max_size=9),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_tensors_by_any_number_of_threads(header, tensors, threads, seed):
    """Breaks: a chunk's digest is another than its bytes', and the daemon records it: the snapshot is lost; a chunk
    that nobody copied whole counts as known; bytes of what lies at a chunk's edge are missing."""
    case = Case(header, tensors, seed)
    pool = CopyPool(threads)
    copies = CopyList(case.pairs, threads, case.slot)
    before = case.slot.copy()
    written = np.zeros(case.slot.nbytes, bool)
    for target, _ in case.pairs:
        begin = address_of(target) - address_of(case.slot)
        written[begin : begin + target.nbytes] = True
    try:
        for _ in range(2):
            case.change()
            pool.copy(copies, int)
            case.check(copies)
    finally:
        pool.close()
    assert np.array_equal(case.slot[~written], before[~written])


def test_threads_get_as_many_chunks_each():
    """Breaks: one thread copies all, and the others wait."""
    case = Case(64, [(41 * CHUNK_BYTES, 0, False), (100, 0, False), (80 * CHUNK_BYTES, 0, False)], 1)
    copies = ChunkCopies(case.pairs, case.slot, kernels())
    counts = [int(part._words[:, 3].sum()) for part in copies.split(4)]
    assert sum(counts) == 120
    assert max(counts) - min(counts) <= 1


def test_thousands_of_tensors_smaller_than_a_chunk():
    """Breaks: models of many small tensors are hashed by the daemon, tensor by tensor."""
    case = Case(640, [(1000, 0, False)] * 5000, 1)
    copies = CopyList(case.pairs, 2, case.slot)
    pool = CopyPool(2)
    case.change()
    pool.copy(copies, int)
    pool.close()
    case.check(copies)
    assert sum(len(digests) for _, digests in copies.digests()) == DIGEST_BYTES * (5_000_640 // CHUNK_BYTES - 1)


def test_a_slot_that_begins_elsewhere_is_refused():
    """Breaks: a streaming store to an address that is not aligned ends the training."""
    slot = make_slot(3 * CHUNK_BYTES)[8:]
    with pytest.raises(ValueError, match="does not begin at a multiple of 64"):
        CopyList([(slot, np.zeros_like(slot))], 1, slot)
