"""
Copies between arrays by several threads, split by bytes and not by arrays.

``np.copyto`` lets other Python threads run, so threads are enough; see the measurements in the design notes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from snapshotd_client.arrays import Array

__all__ = ["CopyPool", "split_by_bytes"]

Pairs = list[tuple[Array, Array]]
Done: TypeAlias = "queue.SimpleQueue[BaseException | None]"


class CopyPool:
    """``threads - 1`` helpers beside the thread that calls ``copy``; they start with the first copy that needs them."""

    def __init__(self, threads: int) -> None:
        self._count = threads
        self._queue: queue.SimpleQueue[tuple[Pairs, Done] | None] = queue.SimpleQueue()
        self._helpers: list[threading.Thread] = []

    def copy(self, pairs: Sequence[tuple[Array, Array]], middle: Callable[[], object]) -> None:
        """Copy each (target, source); call ``middle`` once in between. Raises what a helper raised."""
        first, second = split_by_bytes(pairs, 2)
        self._copy_all(first)
        middle()
        self._copy_all(second)

    def close(self) -> None:
        for _ in self._helpers:
            self._queue.put(None)
        for helper in self._helpers:
            helper.join(2.0)
        self._helpers.clear()

    def _copy_all(self, pairs: Pairs) -> None:
        if self._count == 1:
            _copy(pairs)
            return
        while len(self._helpers) < self._count - 1:
            helper = threading.Thread(target=self._help, name=f"snapshotd-copy-{len(self._helpers)}", daemon=True)
            helper.start()
            self._helpers.append(helper)
        done: Done = queue.SimpleQueue()
        mine, *others = split_by_bytes(pairs, self._count)
        for part in others:
            self._queue.put((part, done))
        _copy(mine)
        errors = [done.get() for _ in others]
        for error in errors:
            if error is not None:
                raise error

    def _help(self) -> None:
        while (item := self._queue.get()) is not None:
            pairs, done = item
            try:
                _copy(pairs)
            except BaseException as error:  # goes to the thread that waits, and is raised there
                done.put(error)
            else:
                done.put(None)


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


def _copy(pairs: Pairs) -> None:
    for target, source in pairs:
        np.copyto(target, source)
