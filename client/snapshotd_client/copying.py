"""
Copies of many arrays at once by several threads: what is copied is sorted out once, then copied at each step.

Rule 1: whole chunks of a slot go by compiled code, where it is there, which digests them on the way (see chunks).
Rule 2: of the others, arrays that lie side by side on both sides become one.
Rule 3: these go in a single call of torch, which holds the interpreter's lock for none of them: the training thread
needs it. In these threads torch has one thread only (``copy_alone``): it would have more of its own copy large ones.
Where that cannot be had, large ones go one by one through ``np.copyto``, which lets go of the lock as well.
Rule 4: what is copied is split over the threads by bytes, not by arrays.
Rule 5: these threads go before training's, if the system lets them. What they do is as much either way, but until it is
done the step can be lost with its process, and the next update has to wait.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch

from snapshotd.layout import KnownDigests
from snapshotd.native import kernels
from snapshotd_client.arrays import Array, address_of
from snapshotd_client.chunks import ChunkCopies, Part, Rest
from snapshotd_client.libraries import loaded

__all__ = ["CopyList", "CopyPool", "copy_alone", "go_first", "join_neighbours", "split_by_bytes"]

SMALL_BYTES: Final = 32 * 1024
"""Below this torch would not think of using threads of its own either."""
_WORD: Final = np.dtype(np.int32)
_NICER: Final = 10
"""Ten times the share of a core that a thread of training gets beside it."""

Pairs = list[tuple[Array, Array]]
Done: TypeAlias = "queue.SimpleQueue[BaseException | None]"


class CopyList:
    """
    (target, source) pairs, ready to be copied by ``threads`` threads, again and again.

    ``slot``: the whole file that the targets lie in, if they lie in one; its chunks are digested then.
    """

    def __init__(self, pairs: Sequence[tuple[Array, Array]], threads: int, slot: Array | None = None) -> None:
        self._arrays = list(pairs)  # what was joined does not keep alive all that it shows
        compiled = kernels()
        self._chunks = ChunkCopies(pairs, slot, compiled) if slot is not None and compiled is not None else None
        count = 2 * threads  # two halves, so that there is a middle
        rest = pairs if self._chunks is None else [_bytes_of(part) for part in self._chunks.rest]
        others = split_by_bytes(join_neighbours(rest), count)
        parts = [None] * count if self._chunks is None else self._chunks.split(count)
        shares = [_Share(*both) for both in zip(parts, others, strict=True)]
        self.halves = [shares[:threads], shares[threads:]]

    def digests(self) -> list[KnownDigests]:
        """Return the digests of the slot's chunks that were found when it was copied last."""
        return self._chunks.digests() if self._chunks is not None else []


class _Share:
    """What one thread copies in one go."""

    def __init__(self, part: Part | None, others: Pairs) -> None:
        self._part = part
        self._others = _Others(others)

    def copy(self) -> None:
        self._others.copy()
        if self._part is not None:
            self._part.copy()


class _Others:
    """What torch copies, and numpy where torch would start threads."""

    def __init__(self, pairs: Pairs) -> None:
        self._targets = [torch.from_numpy(target) for target, _ in pairs]
        self._sources = [torch.from_numpy(source) for _, source in pairs]
        self._large = [(target, source) for target, source in pairs if target.nbytes >= SMALL_BYTES]
        small = [n for n, (target, _) in enumerate(pairs) if target.nbytes < SMALL_BYTES]
        self._small = [self._targets[n] for n in small], [self._sources[n] for n in small]

    def copy(self) -> None:
        if torch.get_num_threads() == 1:
            if self._targets:
                torch._foreach_copy_(self._targets, self._sources)
            return
        if self._small[0]:
            torch._foreach_copy_(*self._small)
        for target, source in self._large:
            np.copyto(target, source)


class CopyPool:
    """
    ``threads - 1`` helpers beside the thread that calls ``copy``; they start with the first copy that needs them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._queue: queue.SimpleQueue[tuple[_Share, Done] | None] = queue.SimpleQueue()
        self._helpers: list[threading.Thread] = []

    def copy(self, copies: CopyList, middle: Callable[[], object]) -> None:
        """Copy all of it; call ``middle`` once in between. Raises what a helper raised."""
        first, second = copies.halves
        self._copy_all(first)
        middle()
        self._copy_all(second)

    def close(self) -> None:
        for _ in self._helpers:
            self._queue.put(None)
        for helper in self._helpers:
            helper.join(2.0)
        self._helpers.clear()

    def _copy_all(self, shares: list[_Share]) -> None:
        mine, *others = shares
        while len(self._helpers) < len(others):
            helper = threading.Thread(target=self._help, name=f"snapshotd-copy-{len(self._helpers)}", daemon=True)
            helper.start()
            self._helpers.append(helper)
        done: Done = queue.SimpleQueue()
        for share in others:
            self._queue.put((share, done))
        mine.copy()
        for error in [done.get() for _ in others]:
            if error is not None:
                raise error

    def _help(self) -> None:
        copy_alone()
        while (item := self._queue.get()) is not None:
            share, done = item
            result: BaseException | None = None
            try:
                share.copy()
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


def _bytes_of(part: Rest) -> tuple[Array, Array]:
    target, source = part.pair
    if part.end is None or (part.begin, part.end) == (0, target.nbytes):
        return target, source
    return _as_bytes(target)[part.begin : part.end], _as_bytes(source)[part.begin : part.end]


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
