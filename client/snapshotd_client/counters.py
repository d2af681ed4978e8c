"""
Counters, and warnings that are said once.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

__all__ = ["Counters", "Warner", "logger"]

logger: Final = logging.getLogger("snapshotd")

_NAMES: Final = (
    *("captured", "sealed", "skipped", "skipped_no_slot", "skipped_torn", "skipped_late", "skipped_aligning"),
    *("skipped_refused", "skipped_error", "skipped_away", "torn", "bad_step", "errors", "layouts", "reconnects"),
    *("outages", "prepare_ns", "stall_ns", "copy_ns", "copied_bytes"),
)


class Counters:
    """Numbers that only grow; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = dict.fromkeys(_NAMES, 0)

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)


class Warner:
    """Logs a warning once per cause, until that cause is over."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, cause: str, message: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            logger.warning("%s", message)

    def over(self, cause: str) -> bool:
        """Forget ``cause``, so that it is said again when it comes again; whether it had been said."""
        said = cause in self._said
        self._said.discard(cause)
        return said
