"""
Windows: a computation over long strings of bytes, piece by piece, while the bytes are in the cache.

One thread takes a window of each input (received and verified), computes, and goes on; the kernel receives the next
window meanwhile. So bytes pass through memory once, nothing is handed from thread to thread, and scratch memory is one
window per input, whatever the size of the objects. Long strings are cut into as many parts as there are threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final, NamedTuple

import numpy as np

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.source import Source, Stream
from snapshotd.errors import AccessDenied, CorruptionError, PeerError, SnapshotdError
from snapshotd.layout import CHUNK_BYTES

__all__ = ["MAX_THREADS", "WINDOW_BYTES", "Consume", "Input", "SourceFailed", "run_windows"]

WINDOW_BYTES: Final = 8 * CHUNK_BYTES
"""1 MiB: large enough for the system calls and the codec."""

_SCRATCH_BYTES: Final = 8 * WINDOW_BYTES
"""All inputs of a window together: with many inputs windows are smaller. In a group of eight nodes half of this takes
3 % more CPU, and a sixth more switches between threads."""

MAX_THREADS: Final = max(1, min(4, (os.cpu_count() or 1) // 2))
"""The other half of the cores serves peers."""

_PART_BYTES: Final = 32 * WINDOW_BYTES
"""Less is not worth another thread, and another connection to each peer."""

_ERASURES: Final = (AccessDenied, CorruptionError, PeerError)
"""What goes wrong with a source is the source's failure."""

Consume = Callable[[int, int, list[memoryview]], None]


class Input(NamedTuple):
    """Bytes ``[begin, end)`` of a source; of no bytes: nothing is read, and no source is needed."""

    source: Source | None
    begin: int
    end: int


class SourceFailed(SnapshotdError):
    """
    One source is corrupt, gone or unreachable: an erasure. The cause is its own error.

    ``finished``: so many bytes from the beginning on have been consumed.
    """

    code = "SOURCE_FAILED"

    def __init__(self, source: Source, error: SnapshotdError) -> None:
        super().__init__(f"{source.name} on {source.node_id}: {error}")
        self.source = source
        self.finished = 0


def run_windows(
    inputs: Sequence[Input],
    length: int,
    consume: Consume,
    *,
    cancel: threading.Event | None = None,
    place: Callable[[int, int], memoryview] | None = None,
    max_threads: int = MAX_THREADS,
) -> None:
    """
    Call ``consume(begin, end, views)`` for windows that make up ``[0, length)``, with the verified bytes of the inputs.

    Views are valid during the call, and shorter than the window where their input ends. Several threads may call at the
    same time, for different windows. ``place``: where the bytes of the only input may go at once.

    SourceFailed names the input that could not be read; Cancelled when ``cancel`` is set.
    """
    num_parts = max(1, min(max_threads, length // _PART_BYTES))
    part = -(-length // (num_parts * WINDOW_BYTES)) * WINDOW_BYTES
    stop = threading.Event()
    parts = [
        _Part(inputs, begin, min(begin + part, length), consume, cancel, stop, place)
        for begin in range(0, length, max(part, 1))
    ]
    if len(parts) == 1:
        parts[0].run()
    elif parts:
        with ThreadPoolExecutor(len(parts) - 1, thread_name_prefix="snapshotd-window") as pool:
            others = [pool.submit(one.run) for one in parts[1:]]
            parts[0].run()
            for other in others:
                other.result()
    _raise_first(parts)


def _raise_first(parts: Sequence[_Part]) -> None:
    """Raise what went wrong, if anything did: what is no matter of the sources first."""
    errors = [one.error for one in parts if one.error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, SourceFailed)):
        if isinstance(error, SourceFailed):
            unfinished = next(one for one in parts if one.at < one.end)
            error.finished = unfinished.at
        raise error


class _Part:
    """One thread's share: bytes ``[begin, end)``. ``at``: how far it got; ``error``: why not further."""

    def __init__(
        self,
        inputs: Sequence[Input],
        begin: int,
        end: int,
        consume: Consume,
        cancel: threading.Event | None,
        stop: threading.Event,
        place: Callable[[int, int], memoryview] | None,
    ) -> None:
        self.at, self.end = begin, end
        self.error: BaseException | None = None
        self._inputs = [
            Input(item.source, min(item.begin + begin, item.end), min(item.begin + end, item.end)) for item in inputs
        ]
        self._consume, self._cancel, self._stop, self._place = consume, cancel, stop, place

    def run(self) -> None:
        """Consume all windows, or keep the error and stop the others."""
        try:
            self._run()
        except BaseException as error:
            self.error = error
            self._stop.set()

    def _run(self) -> None:
        num_remote = sum(_is_remote(item) for item in self._inputs)
        chunks = max(1, min(WINDOW_BYTES, _SCRATCH_BYTES // max(1, num_remote)) // CHUNK_BYTES)
        step = min(chunks * CHUNK_BYTES, self.end - self.at)
        in_place = self._place is not None and len(self._inputs) == 1
        needed = [step if _is_remote(item) and not in_place else 0 for item in self._inputs]
        rooms = [np.empty(nbytes, np.uint8).data for nbytes in needed]  # not zeroed: all that is read is written
        with ExitStack() as stack:
            # All are asked before the first answer is awaited.
            streams = [self._open(item, stack) for item in self._inputs]
            left = [item.end - item.begin for item in self._inputs]
            while self.at < self.end and not self._stop.is_set():
                check_cancel(self._cancel, "reading")
                stop = min(self.at + step, self.end)
                if in_place and self._place is not None:
                    rooms[0] = self._place(self.at, stop)
                views = []
                for index, (item, stream) in enumerate(zip(self._inputs, streams, strict=True)):
                    nbytes = min(stop - self.at, left[index])
                    views.append(_take(item, stream, nbytes, rooms[index]))
                    left[index] -= nbytes
                self._consume(self.at, stop, views)
                self.at = stop

    def _open(self, item: Input, stack: ExitStack) -> Stream | None:
        if item.source is None or item.begin == item.end:
            return None
        try:
            return stack.enter_context(item.source.stream(item.begin, item.end))
        except _ERASURES as error:
            raise SourceFailed(item.source, error) from error


def _is_remote(item: Input) -> bool:
    return item.source is not None and not item.source.is_local and item.begin < item.end


def _take(item: Input, stream: Stream | None, nbytes: int, room: memoryview) -> memoryview:
    if stream is None or item.source is None or not nbytes:
        return memoryview(b"")
    try:
        return stream.take(nbytes, room)
    except _ERASURES as error:
        raise SourceFailed(item.source, error) from error
