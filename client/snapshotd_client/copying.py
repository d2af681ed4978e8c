"""
Copies of many arrays at once by several threads: what is copied is sorted out once, then copied at each step.

Rule 1: arrays that lie side by side on both sides become one.
Rule 2: large ones go one by one by streaming stores (see streaming), where the machine has some and they are faster.
Each of these calls waits for the interpreter's lock at its end; where that takes long, the rest goes as under rule 3.
Rule 3: all others go in a single call of torch, which holds the interpreter's lock for none of them: the training
thread needs it. In these threads torch has one thread only (``copy_alone``): it would have more of its own copy large
ones. Where that cannot be had, large ones go one by one through ``np.copyto``, which lets go of the lock as well.
Rule 4: what is copied is split over the threads by bytes, not by arrays.
Rule 5: these threads go before training's, if the system lets them. What they do is as much either way, but until it is
done the step can be lost with its process, and the next update has to wait.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import torch

from snapshotd_client.arrays import Array, address_of
from snapshotd_client.libraries import loaded
from snapshotd_client.streaming import ALIGN_BYTES, Stream, Trials

__all__ = ["CopyList", "CopyPool", "copy_alone", "go_first", "join_neighbours", "split_by_bytes"]

SMALL_BYTES: Final = 32 * 1024
"""Below this torch would not think of using threads of its own either."""
_STREAM_BYTES: Final = 256 * 1024
"""What is smaller is not worth a call of its own."""

_PIECE_BYTES: Final = 4 * 1024 * 1024
_WAITS_S: Final = 0.02
"""Who does not let go of the interpreter's lock by himself keeps it for 5 ms (sys.getswitchinterval). Less than four
times as much may be other threads that have the core."""

_WORD: Final = np.dtype(np.int32)
_NICER: Final = 10
"""Ten times the share of a core that a thread of training gets beside it."""

Pairs = list[tuple[Array, Array]]
Done: TypeAlias = "queue.SimpleQueue[BaseException | bool]"


class CopyList:
    """
    (target, source) pairs, ready to be copied by the threads of ``pool``, again and again.
    """

    def __init__(self, pairs: Sequence[tuple[Array, Array]], pool: CopyPool) -> None:
        self._arrays = list(pairs)  # what was joined does not keep alive all that it shows
        joined = join_neighbours(pairs)
        # Two halves, so that there is a middle.
        self.halves = [
            [_Share(part, streams=bool(pool.streams)) for part in split_by_bytes(half, pool.threads)]
            for half in split_by_bytes(joined, 2)
        ]
        self.streamed_bytes = sum(share.streamed_bytes for half in self.halves for share in half)


class _Share:
    """What one thread copies in one go."""

    def __init__(self, pairs: Pairs, *, streams: bool) -> None:
        self._runs: list[_Run] = []
        others: Pairs = []
        for pair in pairs:
            runs = _runs_of(*pair) if streams and pair[0].nbytes >= _STREAM_BYTES else []
            if not runs:
                others.append(pair)
                continue
            self._runs += runs
            for begin, end in (0, runs[0].begin), (runs[-1].end, pair[0].nbytes):
                if begin < end:
                    others.append(_bytes_of(pair, begin, end))
        self._others = _Others(others)
        self._instead: _Others | None = None  # of streaming stores
        self.streamed_bytes = sum(run.end - run.begin for run in self._runs)

    def copy(self, stream: Stream | None, patience: float) -> bool:
        """
        Copy all; by ``stream`` as long as that does not take more than ``patience`` seconds per byte. Returns whether
        it did.
        """
        self._others.copy()
        if not self._runs:
            return False
        done = self._stream_all(stream, patience) if stream is not None else 0
        if done == len(self._runs):
            self._instead = None
            return False
        if self._instead is None:
            self._instead = _Others([_bytes_of(run.pair, run.begin, run.end) for run in self._runs])
        self._instead.copy(done)
        return stream is not None

    def _stream_all(self, stream: Stream, patience: float) -> int:
        """Copy all runs, or the first ones until that takes too long; returns how many."""
        end = time.perf_counter() + _WAITS_S
        for count, run in enumerate(self._runs, 1):
            stream(run.target, run.source, run.end - run.begin)
            end += patience * (run.end - run.begin)
            if time.perf_counter() > end:
                return count
        return len(self._runs)


class _Run(NamedTuple):
    """Bytes ``[begin, end)`` of a dense pair, and their addresses."""

    pair: tuple[Array, Array]
    begin: int
    end: int
    target: int
    source: int


class _Others:
    """What torch copies, and numpy where torch would start threads."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._targets = [torch.from_numpy(target) for target, _ in pairs]
        self._sources = [torch.from_numpy(source) for _, source in pairs]
        small = [n for n, (target, _) in enumerate(pairs) if target.nbytes < SMALL_BYTES]
        self._small = [self._targets[n] for n in small], [self._sources[n] for n in small]

    def copy(self, first: int = 0) -> None:
        """Copy all but those before the ``first``."""
        if torch.get_num_threads() == 1:
            if first < len(self._pairs):
                torch._foreach_copy_(self._targets[first:], self._sources[first:])
            return
        if not first and self._small[0]:
            torch._foreach_copy_(*self._small)
        for target, source in self._pairs[first:]:
            if first or target.nbytes >= SMALL_BYTES:
                np.copyto(target, source)


class CopyPool:
    """
    ``threads - 1`` helpers beside the thread that calls ``copy``; they start with the first copy that needs them.

    ``streams``: the ways to copy large arrays by streaming stores that there are.
    """

    def __init__(self, threads: int, streams: Sequence[Stream] = ()) -> None:
        self.threads = threads
        self.streams = streams
        self._queue: queue.SimpleQueue[tuple[_Share, Stream | None, float, Done] | None] = queue.SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._trials = Trials(len(streams))

    def copy(self, copies: CopyList, middle: Callable[[], object]) -> None:
        """Copy all of it; call ``middle`` once in between. Raises what a helper raised."""
        first, second = copies.halves
        if not copies.streamed_bytes:
            self._copy_all(first, None, 0.0)
            middle()
            self._copy_all(second, None, 0.0)
            return
        way = self._trials.way()
        stream = self.streams[way.number - 1] if way.number else None
        began = time.perf_counter()
        waited = self._copy_all(first, stream, way.patience)
        middle()
        waited |= self._copy_all(second, stream, way.patience)
        pace = (time.perf_counter() - began) * self.threads / copies.streamed_bytes
        self._trials.ended(way, pace=pace, waited=waited)

    def close(self) -> None:
        for _ in self._helpers:
            self._queue.put(None)
        for helper in self._helpers:
            helper.join(2.0)
        self._helpers.clear()

    def _copy_all(self, shares: list[_Share], stream: Stream | None, patience: float) -> bool:
        mine, *others = shares
        while len(self._helpers) < len(others):
            helper = threading.Thread(target=self._help, name=f"snapshotd-copy-{len(self._helpers)}", daemon=True)
            helper.start()
            self._helpers.append(helper)
        done: Done = queue.SimpleQueue()
        for share in others:
            self._queue.put((share, stream, patience, done))
        waited = mine.copy(stream, patience)
        results = [done.get() for _ in others]
        for result in results:
            if isinstance(result, BaseException):
                raise result
            waited |= result
        return waited

    def _help(self) -> None:
        copy_alone()
        while (item := self._queue.get()) is not None:
            share, stream, patience, done = item
            result: BaseException | bool
            try:
                result = share.copy(stream, patience)
            except BaseException as error:  # goes to the thread that waits, and is raised there
                result = error
            del item, share  # nothing here holds what has been copied
            done.put(result)


def go_first() -> None:
    """Raise the priority of the calling thread, and of those that it starts; left out where that is not allowed."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) - _NICER)


def copy_alone() -> None:
    """
    Have torch do what the calling thread asks for in that thread alone; no other thread hears of it.

    The number of threads that OpenMP starts is one of each thread's own (OpenMP 5.2, 2.1: ``nthreads-var``), which
    ``torch.set_num_threads`` would change for training. Left as it is where torch was built without OpenMP.
    """
    torch.get_num_threads()  # the first call in a thread sets how many it has
    for library in loaded("libgomp", "libiomp", "libomp"):
        with contextlib.suppress(AttributeError):
            library.omp_set_num_threads(1)
    for library in loaded("libtorch_cpu"):
        with contextlib.suppress(AttributeError):
            library.MKL_Set_Num_Threads_Local(1)  # MKL_NUM_THREADS would go before the other


def join_neighbours(pairs: Sequence[tuple[Array, Array]]) -> Pairs:
    """
    Return the same copies, without the empty ones, where both sides are dense as words, or else bytes; neighbours are
    joined. (Torch copies words faster than bytes: by 7 % on one machine that was measured.)
    """
    runs: list[tuple[Array, Array, int]] = []
    ends = (0, 0)
    for target, source in pairs:
        nbytes = target.nbytes
        if not nbytes:
            continue
        if not (target.flags.c_contiguous and source.flags.c_contiguous):
            runs.append((target, source, 0))
            ends = (0, 0)
            continue
        begins = address_of(target), address_of(source)
        if begins == ends:
            first_target, first_source, length = runs.pop()
            runs.append((first_target, first_source, length + nbytes))
        else:
            runs.append((target, source, nbytes))
        ends = (begins[0] + nbytes, begins[1] + nbytes)
    return [_dense(t, s, length) if length else (t, s) for t, s, length in runs]


def split_by_bytes(pairs: Sequence[tuple[Array, Array]], count: int) -> list[Pairs]:
    """Return ``count`` lists of about the same number of bytes; arrays are cut along their first dimension > 1."""
    total = sum(target.nbytes for target, _ in pairs)
    out: list[Pairs] = [[] for _ in range(count)]
    index, position = 0, 0
    for target, source in pairs:
        size = target.nbytes
        while index < count - 1 and position + size > (limit := (index + 1) * total // count):
            dim = next((d for d, n in enumerate(target.shape) if n > 1), None)
            rows = 0 if dim is None else (limit - position) * target.shape[dim] // size
            if dim is not None and rows > 0:
                head = (*(slice(None),) * dim, slice(0, rows))
                tail = (*(slice(None),) * dim, slice(rows, None))
                out[index].append((target[head], source[head]))
                target, source = target[tail], source[tail]
                position += size - target.nbytes
                size = target.nbytes
            index += 1
            if size == 0:
                break
        out[index].append((target, source))
        position += size
    return out


def _runs_of(target: Array, source: Array) -> list[_Run]:
    """What streaming stores can copy of two arrays, in pieces; nothing where they are not dense, or lie otherwise."""
    if not (target.flags.c_contiguous and source.flags.c_contiguous):
        return []
    into, out_of = address_of(target), address_of(source)
    if (into - out_of) % ALIGN_BYTES:
        return []
    first = -into % ALIGN_BYTES
    last = first + (target.nbytes - first) // ALIGN_BYTES * ALIGN_BYTES
    ends = [*range(first + _PIECE_BYTES, last, _PIECE_BYTES), last]
    begins = range(first, last, _PIECE_BYTES)
    return [
        _Run((target, source), begin, end, into + begin, out_of + begin)
        for begin, end in zip(begins, ends, strict=True)
    ]


def _bytes_of(pair: tuple[Array, Array], begin: int, end: int) -> tuple[Array, Array]:
    target, source = pair
    return _as_bytes(target)[begin:end], _as_bytes(source)[begin:end]


def _as_bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _dense(target: Array, source: Array, length: int) -> tuple[Array, Array]:
    """Return ``length`` bytes from where each array begins."""
    aligned = not (address_of(target) | address_of(source) | length) % _WORD.itemsize
    target, source = _as_bytes(target), _as_bytes(source)
    if target.nbytes != length:
        target, source = (
            np.lib.stride_tricks.as_strided(array, shape=(length,), strides=(1,)) for array in (target, source)
        )
    return (target.view(_WORD), source.view(_WORD)) if aligned else (target, source)
