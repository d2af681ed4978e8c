"""Growth: what a capture costs by bytes, and what 10,000 steps leave behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import psutil

from .. import Row, Run, Series
from .worker_memory import anonymous_bytes

GOAL = 11
_SIZES = (0.1e9, 1e9, 3e9, 6e9)
_STEPS = 10_000
_SPARE = 3e9
"""Bytes that stay free: the state and its slot come on top."""


def rows(run: Run) -> Iterator[Row]:
    yield from _by_bytes(run)
    yield from _by_steps(run)


def _by_bytes(run: Run) -> Iterator[Row]:
    """The smallest in turns with each other size: what was copied between them has left the caches."""
    least = _SIZES[0]
    sizes = _SIZES[1:2] if run.short else _SIZES[1:]
    small = _Copy(run, run.size(least))
    for size in sizes:
        nbytes = run.size(size)
        if 2 * nbytes + _SPARE > psutil.virtual_memory().available:
            yield Row.note(f"a GB of {size / 1e9:g} GB", "this machine has too little free memory for it now")
            continue
        large = _Copy(run, nbytes)
        found = run.rounds({"small": small, "large": large}, rounds=5, within_s=4.0)
        large.close()
        yield Row.cost(
            f"a GB of {size / 1e9:g} GB",
            found["large"] / (large.nbytes / 1e9),
            found["small"] / (small.nbytes / 1e9),
            # What the short form copies fits into caches, more or less of it.
            at_most=None if run.short else 1.1,
            against=f"a GB of {least / 1e9:g} GB",
        )
    small.close()


class _Copy:
    """Tensors of 8 MB that the hook's copier brings into a slot."""

    def __init__(self, run: Run, nbytes: int) -> None:
        import numpy as np
        from snapshotd_client.copying import CopyList, CopyPool

        each = max(4096, min(8 << 20, nbytes // 12))
        count = nbytes // each
        self.nbytes = count * each
        slot = np.frombuffer(run.memory(self.nbytes, fill=False), dtype=np.uint8)
        for path in run.directory.glob("memory-*"):
            path.unlink()  # the memory goes when nobody maps it
        sources = [np.ones(each, np.uint8) for _ in range(count)]
        pairs = [(slot[n * each : (n + 1) * each], source) for n, source in enumerate(sources)]
        self._pool, self._copies = CopyPool(1), CopyList(pairs, 1)

    def __call__(self) -> None:
        self._pool.copy(self._copies, middle=int)

    def close(self) -> None:
        self._pool.close()
        del self._copies


def _by_steps(run: Run) -> Iterator[Row]:
    from snapshotd_client import Snapshotter

    training = run.training(4e6)
    cluster = run.cluster(1, m=0)
    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    steps = 300 if run.short else _STEPS
    marks = [_Mark(snap, cluster, run, 0)]
    times: list[float] = []
    for step in range(steps):
        began = perf_counter()
        snap.capture(step)
        snap.wait(20)
        times.append(perf_counter() - began)
        if (step + 1) % (steps // 10) == 0:
            marks.append(_Mark(snap, cluster, run, step + 1))
    first, last = marks[1], marks[-1]
    tenth = steps // 10
    early, late = Series.of(times[tenth : 2 * tenth]), Series.of(times[-tenth:])
    yield Row.cost(f"the last tenth of {steps} captures", late, early, at_most=1.1, against="the second tenth")
    for mark in marks[1:]:
        yield Row.shown(f"worker after {mark.step} steps", Series((float(mark.worker),)), unit="B")
        yield Row.shown(f"daemon after {mark.step} steps", Series((float(mark.daemon),)), unit="B")
    for name in ("worker", "daemon"):
        grown = max(0.0, float(getattr(last, name) - getattr(first, name)))
        # A hundred bytes a step would be this much: more than noise, and a leak.
        yield Row.limit(f"memory that the {name} grew by", Series((grown,)), at_most=1e6, unit="B")
    files = Series((float(last.files),)), Series((float(first.files),))
    yield Row.cost("files in the arena, at the end", *files, at_most=1.0, against="after a tenth", unit="")
    yield Row.note("captures sealed", f"{snap.stats['sealed']} of {steps}")


class _Mark:
    """What there is at one time."""

    def __init__(self, snap: Any, cluster: Any, run: Run, step: int) -> None:
        snap.wait(20)
        gc.collect()
        node = cluster.nodes[0]
        self.step = step
        self.worker = anonymous_bytes(os.getpid())
        self.daemon = anonymous_bytes(node.pid)
        self.files = sum(len(files) for _, _, files in os.walk(node.arena))
