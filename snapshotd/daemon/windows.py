"""
Windows: the inputs of a computation over long strings of bytes, read piece by piece, one piece ahead.

While one window is computed, the inputs of the next are received by one thread each: the codec and the sockets release
Python's lock, so both go on at once. Memory is bounded by two windows, whatever the size of the objects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.sources import Source
from snapshotd.errors import AccessDenied, CorruptionError, PeerError, SnapshotdError
from snapshotd.layout import CHUNK_BYTES

__all__ = ["WINDOW_BYTES", "Input", "SourceFailed", "WindowPump"]

WINDOW_BYTES: Final = 4 * CHUNK_BYTES
"""1 MiB: ISA-L is at its best from there on, and k of them stay in the second-level cache."""

_MAX_THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class Input:
    """Bytes ``[begin, end)`` of a source; of no bytes: nothing is read, and no source is needed."""

    source: Source | None
    begin: int
    end: int

    def fetch(self, room: memoryview) -> memoryview:
        if self.begin == self.end or self.source is None:
            return memoryview(b"")
        return self.source.fetch(self.begin, self.end, room)


class SourceFailed(SnapshotdError):
    """One source is corrupt, gone or unreachable: an erasure. The cause is its own error."""

    code = "SOURCE_FAILED"

    def __init__(self, source: Source, error: SnapshotdError) -> None:
        super().__init__(f"{source.name} on {source.node_id}: {error}")
        self.source = source


class WindowPump:
    """Threads and scratch memory for inputs of windows. A context manager; for one thread at a time."""

    def __init__(self, num_inputs: int, cancel: threading.Event | None = None) -> None:
        self._cancel = cancel
        self._pool = ThreadPoolExecutor(max(1, min(num_inputs, _MAX_THREADS)), thread_name_prefix="snapshotd-window")
        self._scratch: tuple[dict[int, bytearray], dict[int, bytearray]] = ({}, {})

    def run(
        self,
        windows: Sequence[Sequence[Input]],
        consume: Callable[[int, list[memoryview]], None],
    ) -> None:
        """
        Call ``consume(i, views)`` for each window in turn, with the verified bytes of its inputs.

        The views are valid during the call. SourceFailed names the input that could not be read; the windows before
        have been consumed then, and the pump can be used again.
        """
        if not windows:
            return
        ahead = self._start(windows[0], 0)
        for index in range(len(windows)):
            views = self._finish(windows[index], ahead)
            ahead = []
            if index + 1 < len(windows):
                ahead = self._start(windows[index + 1], index + 1)
            try:
                check_cancel(self._cancel, "reading")
                consume(index, views)
            except BaseException:
                wait(ahead)  # they write into our memory
                raise
            finally:
                for view in views:
                    view.release()

    def __enter__(self) -> WindowPump:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def _start(self, window: Sequence[Input], index: int) -> list[Future[memoryview]]:
        return [self._pool.submit(item.fetch, self._room(index % 2, place, item)) for place, item in enumerate(window)]

    def _room(self, half: int, place: int, item: Input) -> memoryview:
        """Return memory that the source may read into; what is mapped here needs none."""
        nbytes = 0 if item.source is None or item.source.is_local else item.end - item.begin
        room = self._scratch[half].get(place, b"")
        if len(room) < nbytes:
            room = self._scratch[half][place] = bytearray(max(nbytes, WINDOW_BYTES))
        return memoryview(room)[:nbytes]

    @staticmethod
    def _finish(window: Sequence[Input], futures: Sequence[Future[memoryview]]) -> list[memoryview]:
        wait(futures)
        for item, future in zip(window, futures, strict=True):
            error = future.exception()
            if item.source is not None and isinstance(error, (AccessDenied, CorruptionError, PeerError)):
                raise SourceFailed(item.source, error) from error
        return [future.result() for future in futures]
