"""
Lists of copies: whatever the arrays look like, the bytes arrive, and what lies side by side is copied in one piece.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshotd_client.arrays import carrier
from snapshotd_client.copying import CopyList, CopyPool, copy_alone, join_neighbours


def nothing():
    pass


def copied(pairs, threads, slot=None):
    pool = CopyPool(threads)
    copies = CopyList(pairs, threads, slot)
    try:
        pool.copy(copies, nothing)
    finally:
        pool.close()
    return copies.digests()


@st.composite
def arrays(draw):
    """(source, shape): dense, transposed, strided, a slice, 0-d or empty, of any item size."""
    kind = carrier(draw(st.sampled_from([1, 2, 4, 8, 16])))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    if draw(st.booleans()):
        shape = (*shape, draw(st.sampled_from([1, 7, 9000])))
    whole = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, size=(*(2 * n for n in shape),))
    whole = whole.astype(kind)
    form = draw(st.sampled_from(["dense", "strided", "corner", "transposed"]))
    if form == "strided":
        return whole[tuple(slice(None, None, 2) for _ in shape)] if shape else whole
    part = whole[tuple(slice(0, n) for n in shape)] if shape else whole
    if form == "corner":
        return part
    return np.ascontiguousarray(part) if form == "dense" else np.ascontiguousarray(part.T).T


@pytest.fixture(params=[1, 2])
def torch_threads(request):
    """Torch has one thread, or more: it copies large arrays as well, or not."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(arrays(), max_size=6), st.integers(1, 4))
def test_any_arrays_by_any_number_of_threads(torch_threads, sources, threads):
    """Breaks: some shape, stride or size of a tensor is garbage in the snapshot."""
    sources.sort(key=lambda array: -array.itemsize)
    slot = np.full(sum(array.nbytes for array in sources), 0xA5, dtype=np.uint8)
    pairs, position = [], 0
    for source in sources:
        end = position + source.nbytes
        pairs.append((slot[position:end].view(source.dtype).reshape(source.shape), source))
        position = end
    copied(pairs, threads)
    assert [source.tobytes() for source in sources] == [target.tobytes() for target, _ in pairs]


@pytest.fixture
def given_to_torch(monkeypatch):
    """The sizes of what torch has copied."""
    sizes = []
    real = torch._foreach_copy_

    def copy(targets, sources):
        sizes.extend(target.nbytes for target in targets)
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    return sizes


def test_where_torch_has_one_thread_it_copies_all(torch_threads, given_to_torch):
    """Breaks: large arrays go one by one, each of them waiting for the interpreter's lock, or torch starts threads."""
    sources = [np.arange(nbytes, dtype=np.uint64).astype(np.uint8) for nbytes in (100, 1 << 20, 200, 3 << 20)]
    targets = [np.zeros_like(source) for source in sources]
    copied(list(zip(targets, sources, strict=True)), 1)
    assert all(np.array_equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert sum(given_to_torch) == (300 + (4 << 20) if torch_threads == 1 else 300)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_ours_have_torch_copy_alone(threads, given_to_torch):
    """Breaks: large arrays are copied at nine tenths of the speed, by more threads than were asked for, or training
    goes on with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    sources = [np.arange(nbytes, dtype=np.uint64).astype(np.uint8) for nbytes in (100, 1 << 20, 200, 3 << 20)]
    targets = [np.zeros_like(source) for source in sources]
    pool = CopyPool(threads)
    copies = CopyList(list(zip(targets, sources, strict=True)), threads)
    try:
        with ThreadPoolExecutor(1, initializer=copy_alone) as pipeline:
            pipeline.submit(pool.copy, copies, nothing).result()  # the helpers start
            given_to_torch.clear()
            running = set(os.listdir("/proc/self/task"))
            pipeline.submit(pool.copy, copies, nothing).result()
            assert running == set(os.listdir("/proc/self/task"))
            assert pipeline.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        pool.close()
        torch.set_num_threads(before)
    assert all(np.array_equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert sum(given_to_torch) == sum(source.nbytes for source in sources)


def test_neighbours_are_copied_in_one_piece():
    """Breaks: flat buffers that a framework has cut into thousands of parameters are copied part by part."""
    source = np.arange(1000, dtype=np.int64)
    slot = np.zeros(8000, dtype=np.uint8)
    cuts = [0, 10, 10, 400, 401, 1000]
    pairs = [
        (slot[8 * a : 8 * b].view(np.int64), source[a:b].reshape(-1, 1)[:, 0])
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    joined = join_neighbours(pairs)
    assert [8000] == [target.nbytes for target, _ in joined]
    copied(pairs, 1)
    assert source.tobytes() == slot.tobytes()


@pytest.mark.parametrize(("at", "nbytes", "words"), [(0, 64, True), (4, 60, True), (2, 60, False), (4, 59, False)])
def test_what_can_be_is_copied_as_words(at, nbytes, words):
    """Breaks: torch copies a state byte by byte, which is slower; or words that are none."""
    source, slot = np.arange(64, dtype=np.uint8), np.zeros(72, dtype=np.uint8)
    begin = -slot.ctypes.data % 4
    ((target, found),) = join_neighbours([(slot[begin : begin + nbytes], source[at : at + nbytes])])
    assert [nbytes, nbytes] == [target.nbytes, found.nbytes]
    assert {(4 if words else 1)} == {target.itemsize, found.itemsize}


@pytest.mark.parametrize("gap", ["source", "target", "order"])
def test_what_has_a_gap_is_not_joined(gap):
    """Breaks: bytes between two tensors end up in the snapshot, and the rest one tensor too far."""
    source, slot = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    first, second = (slice(0, 16), slice(16, 32))
    behind = slice(17, 33)
    pairs = {
        "source": [(slot[first], source[first]), (slot[second], source[behind])],
        "target": [(slot[first], source[first]), (slot[behind], source[second])],
        "order": [(slot[second], source[second]), (slot[first], source[first])],
    }[gap]
    assert [16, 16] == [target.nbytes for target, _ in join_neighbours(pairs)]


def test_error_of_a_helper_reaches_the_caller():
    """Breaks: a copy that failed in a helper thread counts as done."""
    pool = CopyPool(3)
    copies = CopyList([(np.zeros(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8))], 3)

    def fail():
        raise MemoryError("of the helper")

    copies.halves[1][2].copy = fail
    try:
        with pytest.raises(MemoryError, match="of the helper"):
            pool.copy(copies, nothing)
    finally:
        pool.close()
