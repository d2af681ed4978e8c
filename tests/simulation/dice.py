"""Chance and virtual time: named random streams that do not disturb each other, and a queue of what comes next."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any


class Dice:
    """One random stream per name: a new use of chance in one place changes nothing elsewhere."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[str, random.Random] = {}

    def stream(self, name: str) -> random.Random:
        if name not in self._streams:
            self._streams[name] = random.Random(f"{self.seed}/{name}")
        return self._streams[name]


class Clock:
    """Virtual time. `trace` is the hash of all that happened: equal seeds must give equal traces."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.log: list[str] | None = None
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> float:
        self._count += 1
        at = self.now + max(0.0, delay)
        heapq.heappush(self._queue, (at, self._count, call, args))
        return at

    def step(self) -> bool:
        if not self._queue:
            return False
        self.now, _, call, args = heapq.heappop(self._queue)
        self.steps += 1
        call(*args)
        return True

    def tell(self, text: str) -> None:
        """Say what happens: into the trace, and into the log where one is kept."""
        self._hash.update(f"{self.now:.6f} {text}\n".encode())
        if self.log is not None:
            self.log.append(f"{self.now:9.4f} {text}")

    @property
    def trace(self) -> str:
        return self._hash.hexdigest()
