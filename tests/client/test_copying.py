"""
Lists of copies: whatever the arrays look like, the bytes arrive, and what lies side by side is copied in one piece.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshotd_client import copying
from snapshotd_client.arrays import carrier
from snapshotd_client.copying import CopyList, CopyPool, copy_alone, join_neighbours
from snapshotd_client.streaming import Trials, find_streams


def nothing():
    pass


def copied(pairs, threads, streams=()):
    """By ordinary copies, and then by each kind of streaming stores."""
    pool = CopyPool(threads, streams)
    copies = CopyList(pairs, pool)
    try:
        pool.copy(copies, nothing)
        for _ in streams:
            for target, source in pairs:
                assert target.tobytes() == source.tobytes()
                target[...] = 0
            pool.copy(copies, nothing)
    finally:
        pool.close()


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
    copied(pairs, threads, find_streams())
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
    copies = CopyList(list(zip(targets, sources, strict=True)), pool)
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


def aligned(nbytes, at):
    """Noise that begins at so many bytes behind a multiple of 64."""
    room = np.random.default_rng(nbytes).integers(256, size=nbytes + 128, dtype=np.uint8)
    return room[-room.ctypes.data % 64 + at :][:nbytes]


@pytest.fixture
def streamed():
    """(nbytes of each call, a stream that does as the machine's would)."""
    calls = []

    def stream(target, source, nbytes):
        assert not (target | source | nbytes) % 32, "this would end the process"
        calls.append(nbytes)
        ctypes.memmove(target, source, nbytes)

    return calls, stream


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("at", "source_at"), [(0, 0), (4, 4), (33, 1), (63, 31), (0, 4), (16, 0)])
def test_large_arrays_arrive_wherever_they_lie(streamed, at, source_at, threads):
    """Breaks: an address that is not aligned ends the training; the first or last bytes of a tensor are missing, or
    those behind it are written over."""
    calls, watched = streamed
    for streams in (find_streams(), [watched]):
        for nbytes in (1000, (256 << 10) - 1, (256 << 10) + 33, (4 << 20) + 95, 9 << 20):
            whole, source = aligned(nbytes + 64, at), aligned(nbytes, source_at)
            before, target = whole.copy(), whole[:nbytes]
            target[:] = 0
            copied([(target, source)], threads, streams)
            assert np.array_equal(target, source)
            assert np.array_equal(whole[nbytes:], before[nbytes:])
    if (at - source_at) % 32:
        assert not calls
    else:
        parts = 2 * 2 * threads  # both halves of two arrays, by each thread
        assert sum(calls) > (13 << 20) + 95 - parts * 64


def test_what_is_not_dense_is_not_streamed(streamed):
    """Breaks: the bytes between the rows of a strided tensor are in the snapshot."""
    calls, watched = streamed
    source = np.arange(8 << 20, dtype=np.uint32).reshape(4096, -1)[:, ::2]
    target = np.zeros(source.shape, source.dtype)
    copied([(target, source)], 2, [watched])
    assert np.array_equal(target, source)
    assert not calls


class Clock:
    """Time that only copies take: ``streams`` and ``others`` seconds for each of 16 pieces of 4 MiB."""

    def __init__(self, monkeypatch):
        self.now = self.streams = self.others = 0.0
        self.streamed = 0
        monkeypatch.setattr(copying.time, "perf_counter", lambda: self.now)
        real = torch._foreach_copy_

        def copy(targets, sources):
            self.now += self.others * len(targets)
            real(targets, sources)

        monkeypatch.setattr(torch, "_foreach_copy_", copy)

    def stream(self, target, source, nbytes):
        self.now += self.streams
        self.streamed += 1
        ctypes.memmove(target, source, nbytes)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def capture(clock):
    """Copies a state; returns how many of its 16 pieces were streamed, and the seconds that it took."""
    source, target = aligned(64 << 20, 0), aligned(64 << 20, 0)
    pool = CopyPool(1, [clock.stream])
    copies = CopyList([(target, source)], pool)

    def run():
        target[::4096] ^= 0xFF
        clock.streamed, began = 0, clock.now
        pool.copy(copies, nothing)
        assert np.array_equal(target[::4096], source[::4096])
        return clock.streamed, clock.now - began

    with ThreadPoolExecutor(1, initializer=copy_alone) as pipeline:
        yield lambda: pipeline.submit(run).result()
    pool.close()


def test_the_faster_way_is_taken(clock, capture):
    """Breaks: copies are slower than torch's on processors that have slow streaming stores, or for ever where they had
    been slow when it began."""
    clock.streams, clock.others = 0.0002, 0.0003
    counts = [capture()[0] for _ in range(70)]
    assert counts[:6] == [0, 16] * 3  # tries
    assert counts[6:64] == [16] * 58
    assert counts[64:] == [0, 16, 16, 16, 16, 16]  # and once more
    clock.others = 0.0001
    counts = [capture()[0] for _ in range(128)]
    assert counts[58:122] == [0] * 64
    assert counts[122:] == [16, 0, 0, 0, 0, 0]


def test_the_fastest_of_several_streams_is_taken():
    """Breaks: copies are slower than they need be on processors that one of the libraries is slow on; or all of them
    wait for the lock, one after the other."""
    trials, seconds = Trials(2), [3.0, 2.0, 1.0]

    def run(count, *, waited=False):
        ways = []
        for _ in range(count):
            way = trials.way()
            trials.ended(way, pace=seconds[way.number], waited=waited and way.number > 0)
            ways.append(way.number)
        return ways

    assert run(9) == [0, 1, 2] * 3
    assert run(55) == [2] * 55
    assert run(1 + 63 + 1 + 63) == [0] + [2] * 63 + [1] + [2] * 63
    seconds[1] = 0.5
    assert run(64 + 64) == [0] + [2] * 63 + [1] + [1] * 63
    assert run(1) == [0]
    way = trials.way()
    assert (way.number, way.patience) == (1, pytest.approx(0.5 * 2.5 * 1.02))
    trials.ended(way, pace=0.5, waited=False)
    seconds[1:] = [9.0, 9.0]
    assert run(2, waited=True) == [1, 1]
    assert run(8 + 16 + 2, waited=True) == [0] * 8 + [2] + [0] * 16 + [1]


def test_a_way_is_not_left_since_training_takes_more_of_the_machine(clock, capture):
    """Breaks: what the other way took on an idle machine is compared with what this one takes beside training."""
    clock.streams, clock.others = 0.0002, 0.0003
    for _ in range(10):
        capture()
    clock.streams, clock.others = 0.0004, 0.0006
    assert [capture()[0] for _ in range(54)] == [16] * 54
    assert [capture()[0] for _ in range(6)] == [0] + [16] * 5


def test_who_waits_for_the_lock_asks_for_it_no_more_for_a_while(clock, capture):
    """Breaks: training that keeps the interpreter busy holds up each of the snapshot's tensors for 5 ms."""
    clock.streams, clock.others = 0.0002, 0.0003
    for _ in range(10):
        capture()
    clock.streams = 0.0052
    for _ in range(2):  # once is forgiven
        count, seconds = capture()
        assert count == 2 * 5  # in two halves
        assert seconds == pytest.approx(10 * 0.0052 + 6 * 0.0003)
    for pause in (8, 16, 32, 64, 64):
        assert [capture()[0] for _ in range(pause + 1)] == [0] * pause + [2 * 5]
    clock.streams = 0.0002
    assert [capture()[0] for _ in range(66)] == [0] * 64 + [16] * 2
    clock.streams = 0.0052
    assert [capture()[0] for _ in range(11)] == [2 * 5] * 2 + [0] * 8 + [2 * 5]
    clock.streams = 0.0002
    assert [capture()[0] for _ in range(17)] == [0] * 16 + [16]
    for _ in range(3):
        clock.streams = 0.0052
        assert capture()[0] == 2 * 5
        clock.streams = 0.0002
        assert capture()[0] == 16


def test_a_machine_that_is_slower_for_a_while_is_not_taken_for_that(clock, capture):
    """Breaks: beside training that needs the memory as well, copies are broken off again and again."""
    clock.streams, clock.others = 0.0002, 0.0003
    for _ in range(10):
        capture()
    clock.streams = 0.0006
    assert capture()[0] == 16


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
    copies = CopyList([(np.zeros(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8))], pool)

    def fail(stream, patience):
        raise MemoryError("of the helper")

    copies.halves[1][2].copy = fail
    try:
        with pytest.raises(MemoryError, match="of the helper"):
            pool.copy(copies, nothing)
    finally:
        pool.close()
