"""Memory of the worker: what the hook adds to a training process, outside the slots."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
from collections.abc import Iterator

from .. import Row, Run, Series

GOAL = 9
SECONDS = 18


def rows(run: Run) -> Iterator[Row]:
    training = run.training()
    cluster = run.cluster(1, m=0)
    training.step()
    give_back_memory()
    before = anonymous_bytes(os.getpid())
    from snapshotd_client import Snapshotter

    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    added = []
    for step in range(4 if run.short else 12):
        snap.capture(step)
        snap.wait(20)
        gc.collect()
        added.append(float(anonymous_bytes(os.getpid()) - before))
    assert snap.stats["sealed"] > 0
    yield Row.limit("memory that the hook adds to a worker, 592 tensors", Series.of(added[1:]), at_most=16e6, unit="B")


def give_back_memory() -> None:
    """Have malloc keep nothing that nobody uses: it would be given back some time, and counted as less growth."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def anonymous_bytes(pid: int) -> int:
    """Resident memory that is the process's own: shared mappings, as slots are, do not count."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        found = re.search(r"RssAnon:\s+(\d+) kB", file.read())
    return int(found[1]) * 1024 if found else 0
