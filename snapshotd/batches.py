"""Things that have bytes, in order, as many together as one request or one thread should have."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

__all__ = ["batches"]


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


def batches(items: Iterable[Item], max_bytes: int, max_items: int = sys.maxsize) -> Iterator[list[Item]]:
    """Yield lists of at most so many bytes and items; one that is larger by itself comes alone."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (size + item.nbytes > max_bytes or len(batch) == max_items):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.nbytes
    if batch:
        yield batch
