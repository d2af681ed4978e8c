"""
Tells those who read host memory before torch takes it away.

``share_memory_``, and a tensor sent to another process, move a storage's bytes into shared memory and unmap where they
were, whoever has a view of it. No copy of ours may be reading there by then: it would end the training with SIGSEGV.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final

import torch

__all__ = ["Sharing"]

_MOVES: Final = ("_share_fd_cpu_", "_share_filename_cpu_")
"""All ways of torch into shared memory lead through one of these methods of UntypedStorage."""

_lock = threading.Lock()
_readers: list[Reader] = []
_originals: dict[str, Any] = {}

Reader = Callable[[int, int], AbstractContextManager[object]]


class Sharing:
    """
    Memory moves within ``reader(begin, end)``, its first and its end address, until ``remove``.

    On the thread that shares it, which is any.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        with _lock:
            _readers.append(reader)
            if not _originals:
                _wrap()

    def remove(self) -> None:
        with _lock:
            _readers.remove(self._reader)
            if not _readers:
                _unwrap()


def _wrap() -> None:
    for name in _MOVES:
        original = getattr(torch.UntypedStorage, name)
        _originals[name] = original
        setattr(torch.UntypedStorage, name, _within_readers(original))


def _unwrap() -> None:
    for name, original in _originals.items():
        setattr(torch.UntypedStorage, name, original)
    _originals.clear()


def _within_readers(original: Any) -> Any:
    @functools.wraps(original)
    def share(storage: Any, *args: Any, **kwargs: Any) -> Any:
        if storage.is_shared():
            return original(storage, *args, **kwargs)
        begin = storage.data_ptr()
        with ExitStack() as stack:
            for reader in list(_readers):
                stack.enter_context(reader(begin, begin + storage.nbytes()))
            return original(storage, *args, **kwargs)

    return share
