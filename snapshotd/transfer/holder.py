"""
Lets a peer keep objects for as long as we read them: the client's end of a hold.

Rule: the connection is the hold. It ends with this process at once, and with this host after the peer's idle timeout.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from snapshotd.errors import SnapshotdError
from snapshotd.transfer.pool import Borrowed
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["RENEW_S", "Holder"]

RENEW_S: Final = 40.0
"""A third of what a server keeps a silent connection for."""

_log: Final = logging.getLogger(__name__)


class Holder:
    """
    Holds ``keys`` from construction to close(), over a connection of its own. A context manager.

    Args:
        ask: says over the connection that one of the keys is to be held, and raises unless it is.
    """

    def __init__(
        self, line: Borrowed, keys: Sequence[ObjectKey], ask: Callable[[Borrowed, ObjectKey], None], *, renew_s: float
    ) -> None:
        self._line = line
        self._keys = keys
        self._ask = ask
        self._renew_s = renew_s
        self._ended = threading.Event()
        try:
            for key in keys:
                ask(line, key)
        except BaseException:
            line.close()
            raise
        self._thread = threading.Thread(target=self._renew, name="bulk-hold", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                self._ask(self._line, self._keys[0])  # one word is enough for the connection to live
            except SnapshotdError as error:
                if not self._ended.is_set():
                    _log.warning("a hold is lost, and what it held may go at any moment: %s", error)
                return

    def close(self) -> None:
        """Let go. May be called twice."""
        self._ended.set()
        self._line.hang_up()
        self._thread.join()
        self._line.close()

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
