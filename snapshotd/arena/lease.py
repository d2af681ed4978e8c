"""The right to read a file of the arena while its owner may already have done with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from snapshotd.arena.files import AnyFile

__all__ = ["Lease"]

FileT = TypeVar("FileT", bound=AnyFile)


class Lease(Generic[FileT]):
    """The right to read ``obj`` until close(). A context manager; close() may be called twice and by any thread."""

    def __init__(self, obj: FileT, give_back: Callable[[FileT], None]) -> None:
        self.obj = obj
        self._give_back: Callable[[FileT], None] | None = give_back
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the right back; a deletion that waited for it happens now."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.obj)

    def __enter__(self) -> FileT:
        return self.obj

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
