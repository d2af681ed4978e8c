"""The interpreter while a state is read: what it does beside that, and how long one thread may keep it from others."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["reading_state"]

_SWITCH_S: Final = 0.0002


@contextmanager
def reading_state() -> Iterator[None]:
    """
    No collection in here: a full one takes 60 ms with torch alone, more with a model, and all threads wait for it.
    A restore makes many objects, few of them in cycles; what there is of those is collected later.

    And who has bytes to receive, or to verify, does not wait for the 5 ms that a thread may by default go on in Python:
    the one that asks for the next bytes is such a thread.
    """
    enabled, switch_s = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    if switch_s > _SWITCH_S:
        sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        if switch_s > _SWITCH_S:
            sys.setswitchinterval(switch_s)
        if enabled:
            gc.enable()
