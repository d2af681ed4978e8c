"""
Pacing: several threads together move no more than so many bytes a second.

Rule 1: who has moved bytes waits until their time is over; so the rate is kept over any time that is longer than a
piece takes, whatever the number of threads.
Rule 2: time that was lost (a thread woke up late) may be caught up, for some milliseconds; time in which nobody wanted
anything may not: no bursts after a pause.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from snapshotd.errors import UsageError

__all__ = ["Pacer"]

_CATCH_UP_S: Final = 0.02


class Pacer:
    """
    Call it with each number of bytes that were moved; it returns when the next may be.

    Args:
        bytes_per_s: the most, all callers together.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s <= 0:
            raise UsageError(f"a pace must be above 0, not {bytes_per_s} bytes per second")
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._over_at = 0.0  # when the time of all that was moved so far is over

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            now = self._clock()
            self._over_at = max(self._over_at, now - _CATCH_UP_S) + nbytes / self._bytes_per_s
            wait_s = self._over_at - now
        if wait_s > 0:
            self._sleep(wait_s)
