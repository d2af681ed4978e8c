"""How work in a thread is stopped: an event that it looks at between pieces of some milliseconds."""

from __future__ import annotations

import threading

from snapshotd.errors import SnapshotdError

__all__ = ["Cancelled", "check_cancel"]


class Cancelled(SnapshotdError):
    """The work was not wanted any more; nothing of it is left behind."""

    code = "CANCELLED"


def check_cancel(cancel: threading.Event | None, what: str) -> None:
    """Raise Cancelled if ``cancel`` is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"{what} was cancelled")
