"""Python's garbage collector, which must not look at all objects of a training while its state is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_held"]


@contextmanager
def collector_held() -> Iterator[None]:
    """
    No collection in here: a full one takes 60 ms with torch alone, more with a model, and all threads wait for it.

    A restore makes many objects, few of them in cycles; what there is of those is collected later.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
