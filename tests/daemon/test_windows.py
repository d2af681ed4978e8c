"""Windows: each byte once, whatever fails on the way is known by name, and so is how far it got."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.source import InTurn, Stream
from snapshotd.daemon.windows import WINDOW_BYTES, Input, SourceFailed, run_windows
from snapshotd.errors import CorruptionError

LENGTH = 70 * WINDOW_BYTES + 4711


class Bytes:
    """A source that has its bytes here, as if it was far away. ``rotten``: it fails from there on."""

    is_local = False
    node_id = "n7"

    def __init__(self, data: bytes, rotten: int | None = None) -> None:
        self.name, self.data, self.rotten, self.file_bytes = f"{len(data)} bytes", data, rotten, len(data)

    def fetch(self, begin: int, end: int, room: memoryview) -> memoryview:
        if self.rotten is not None and end > self.rotten:
            raise CorruptionError("rotten")
        room[: end - begin] = self.data[begin:end]
        return room[: end - begin]

    @contextmanager
    def stream(self, begin: int, end: int) -> Iterator[Stream]:
        yield InTurn(self, begin, end)


def inputs_of(*sources: Bytes) -> list[Input]:
    return [Input(source, 0, source.file_bytes) for source in sources]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, WINDOW_BYTES, LENGTH])
def test_each_byte_comes_once_and_short_inputs_just_end(threads: int, length: int) -> None:
    data = random.Random(length).randbytes(length)
    out, short = bytearray(length), bytearray(length // 2)
    calls: list[tuple[int, int]] = []

    def consume(begin: int, end: int, views: list[memoryview]) -> None:
        calls.append((begin, end))
        whole, half, nothing = views
        out[begin : begin + whole.nbytes] = whole
        short[begin : begin + half.nbytes] = half
        assert (end - begin, 0) == (whole.nbytes, nothing.nbytes)

    inputs = [*inputs_of(Bytes(data), Bytes(data[: length // 2])), Input(None, 0, 0)]
    run_windows(inputs, length, consume, max_threads=threads)
    assert (data, data[: length // 2]) == (bytes(out), bytes(short))
    edges = sorted(calls)
    assert [0, *(end for _, end in edges)] == [*(begin for begin, _ in edges), length]


def test_one_input_may_go_straight_to_its_place() -> None:
    data = random.Random(1).randbytes(3 * WINDOW_BYTES + 5)
    out = memoryview(bytearray(len(data)))
    seen: list[bool] = []
    run_windows(
        inputs_of(Bytes(data)),
        len(data),
        lambda begin, end, views: seen.append(views[0] == data[begin:end]),
        place=lambda begin, end: out[begin:end],
    )
    assert (data, {True}) == (bytes(out), set(seen))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_source_that_fails_is_named_and_what_was_finished_is_finished(threads: int) -> None:
    """A rebuild goes on from there with other sources: a hole before it would end in the slot."""
    data = random.Random(2).randbytes(LENGTH)
    good, bad = Bytes(data), Bytes(data, rotten=5 * WINDOW_BYTES)
    finished = bytearray(LENGTH)

    def consume(begin: int, end: int, views: list[memoryview]) -> None:
        finished[begin:end] = b"\1" * (end - begin)

    with pytest.raises(SourceFailed, match="on n7: rotten") as failure:
        run_windows(inputs_of(good, bad), LENGTH, consume, max_threads=threads)
    assert bad is failure.value.source
    assert failure.value.finished <= 5 * WINDOW_BYTES
    assert finished.find(0) >= failure.value.finished
    assert threads > 1 or failure.value.finished == 5 * WINDOW_BYTES


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_of_the_computation_or_a_cancel_ends_all_threads(threads: int) -> None:
    data = bytes(LENGTH)
    cancel = threading.Event()

    def fail(begin: int, end: int, views: list[memoryview]) -> None:
        if begin >= 2 * WINDOW_BYTES:
            raise ZeroDivisionError

    def stop(begin: int, end: int, views: list[memoryview]) -> None:
        cancel.set()

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        run_windows(inputs_of(Bytes(data)), LENGTH, fail, max_threads=threads)
    with pytest.raises(Cancelled):
        run_windows(inputs_of(Bytes(data)), LENGTH, stop, cancel=cancel, max_threads=threads)
    assert before == threading.active_count()
