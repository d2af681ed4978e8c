"""
Scrub: hash everything that is sealed again, slowly, so that rot is found while it can still be decoded around.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from snapshotd.arena import Arena
from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.sources import Corruption, local_corruption
from snapshotd.errors import LocalProtocolError, UsageError

__all__ = ["Scrubbed", "scrub_once"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """One pass over the arena: what was looked at, and how much of it was wrong."""

    num_objects: int
    num_corrupt: int
    nbytes: int


def scrub_once(
    arena: Arena,
    pace_bytes_per_s: float,
    cancel: threading.Event,
    on_corruption: Callable[[Corruption], None],
    *,
    node_id: str = "",
    wait: Callable[[float], object] | None = None,
) -> Scrubbed:
    """
    Verify each sealed object once, at ``pace_bytes_per_s``, and report those that do not match.

    ``wait`` is called with seconds (default: ``cancel.wait``). Objects that are freed meanwhile are left out. Cancelled
    soon after ``cancel`` is set.
    """
    if not pace_bytes_per_s > 0:
        raise UsageError(f"the pace of the scrub must be above 0 bytes per second, not {pace_bytes_per_s}")
    pause = cancel.wait if wait is None else wait
    seen = corrupt = nbytes = 0

    def pace(count: int) -> None:
        nonlocal nbytes
        nbytes += count
        pause(count / pace_bytes_per_s)
        check_cancel(cancel, "the scrub")

    for obj in arena.sealed():
        check_cancel(cancel, "the scrub")
        ref = obj.ref
        try:
            wrong = arena.verify(obj, pace)
        except LocalProtocolError:
            continue  # it was given back since we listed it: nobody relies on it any more
        seen += 1
        # A slot that was sealed anew since then has other bytes, and they were right.
        if wrong and ref is not None and obj.ref is ref:
            corrupt += 1
            on_corruption(local_corruption(obj, ref, wrong, node_id, "the scrub"))
    return Scrubbed(num_objects=seen, num_corrupt=corrupt, nbytes=nbytes)
