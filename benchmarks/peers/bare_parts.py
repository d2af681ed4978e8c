"""What no snapshot of each step with a digest can do without, as a system: bare copies, fenced, and one bare digest."""

from __future__ import annotations

import threading

import torch

from ..bare import BareCopy, BareHash, Pairs, bare_slot
from .system import Setting, System

__all__ = ["BareParts"]


class BareParts(System):
    """As many plain threads as training has copy beside it; another process hashes what they copied. All is lost."""

    name = "a bare copy and digest"
    outlives = "nothing"
    lacks = "all else"
    waits = False

    def __init__(self, setting: Setting) -> None:
        pairs, path, nbytes = bare_slot(setting.home, setting.training.tensors)
        self._hash = BareHash(setting.home, path)
        threads = torch.get_num_threads()
        self._left, self._lock = threads, threading.Lock()
        self._copies = [BareCopy(share, self._copied) for share in _shares(pairs, nbytes, threads)]

    def save(self, step: int) -> None:
        self._left = len(self._copies)
        for copy in self._copies:
            copy.begin()

    def fence(self) -> None:
        for copy in self._copies:
            copy.fence()

    def complete(self) -> None:
        self._hash.wait()

    def close(self) -> None:
        for copy in self._copies:
            copy.close()
        self._hash.close()

    def _copied(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._hash.begin()


def _shares(pairs: Pairs, nbytes: int, count: int) -> list[Pairs]:
    shares: list[Pairs] = [[] for _ in range(count)]
    position = 0
    for target, source in pairs:
        shares[min(count - 1, position * count // nbytes)].append((target, source))
        position += target.nbytes
    return shares
