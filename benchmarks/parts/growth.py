"""Growth: what a capture costs by bytes, and what 10,000 steps leave behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from .. import Row, Run, Series
from .worker_memory import anonymous_bytes, give_back_memory

if TYPE_CHECKING:
    from snapshotd_client.copying import CopyPool

GOAL = 11
SECONDS = 76
_SIZES = (0.1e9, 1e9, 3e9, 6e9)
_STEPS = 10_000
_BATCH = 10
_SPARE = 3e9
"""Bytes that stay free: the state and its slot come on top."""


def rows(run: Run) -> Iterator[Row]:
    yield from _by_bytes(run)
    yield from _by_steps(run)


def _by_bytes(run: Run) -> Iterator[Row]:
    """The smallest in turns with each other size: what was copied between them has left the caches."""
    from snapshotd_client.copying import CopyPool

    pool = CopyPool(1)
    run.finally_do(pool.close)
    least = _SIZES[0]
    sizes = _SIZES[1:2] if run.short else _SIZES[1:]
    small = _Copy(run, pool, run.size(least))
    for size in sizes:
        nbytes = run.size(size)
        if 2 * nbytes + _SPARE > psutil.virtual_memory().available:
            yield Row.note(f"a GB of {size / 1e9:g} GB", "this machine has too little free memory for it now")
            continue
        large = _Copy(run, pool, nbytes)
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

    def __init__(self, run: Run, pool: CopyPool, nbytes: int) -> None:
        import numpy as np
        import torch
        from snapshotd_client.copying import CopyList

        each = max(4096, min(8 << 20, nbytes // 12 // 4096 * 4096))
        count = nbytes // each
        self.nbytes = count * each
        slot = np.frombuffer(run.memory(self.nbytes, fill=False), dtype=np.uint8)
        for path in run.directory.glob("memory-*"):
            path.unlink()  # the memory goes when nobody maps it
        sources = [torch.ones(each, dtype=torch.uint8).numpy() for _ in range(count)]
        pairs = [(slot[n * each : (n + 1) * each], source) for n, source in enumerate(sources)]
        self._pool, self._copies = pool, CopyList(pairs, 1, slot)

    def __call__(self) -> None:
        self._pool.copy(self._copies, middle=int)

    def close(self) -> None:
        del self._copies


def _by_steps(run: Run) -> Iterator[Row]:
    steps = 300 if run.short else _STEPS
    old = _Job(run, "old")
    old.capture(10)  # layouts, slots, mappings
    give_back_memory()
    marks = []
    for _ in range(10):
        old.capture(steps // 10)
        marks.append(_Mark(old, steps * (len(marks) + 1) // 10))
    young = _Job(run, "young")
    young.capture(10)
    ways = {"old": lambda: old.capture(_BATCH), "young": lambda: young.capture(_BATCH)}
    found = run.rounds(ways, rounds=61, within_s=8.0, warm=3)
    yield Row.cost(
        f"a capture after {steps} steps",
        found["old"] / _BATCH,
        found["young"] / _BATCH,
        at_most=1.1,
        against="one of a job that has just begun",
    )
    for mark in marks:
        yield Row.shown(f"worker after {mark.step} steps", Series((float(mark.worker),)), unit="B")
        yield Row.shown(f"daemon after {mark.step} steps", Series((float(mark.daemon),)), unit="B")
    first, last = marks[0], marks[-1]
    for name in ("worker", "daemon"):
        grown = max(0.0, float(getattr(last, name) - getattr(first, name)))
        # A hundred bytes a step would be this much: more than noise, and a leak.
        yield Row.limit(f"memory that the {name} grew by", Series((grown,)), at_most=1e6, unit="B")
    files = Series((float(last.files),)), Series((float(first.files),))
    yield Row.cost("files in the arena, at the end", *files, at_most=1.0, against="after a tenth", unit="")
    yield Row.note("captures sealed", f"{last.sealed} of {last.captured}")


class _Job:
    """A small training whose state is captured again and again."""

    def __init__(self, run: Run, name: str) -> None:
        from snapshotd_client import Snapshotter

        self._training = run.training(4e6)
        self.cluster = run.cluster(1, m=0)
        self.snap = Snapshotter(
            self._training.model, self._training.optimizer, settings=self.cluster.settings(job=name)
        )
        run.finally_do(self.snap.close)
        self.snap.restore()
        self._step = 0

    def capture(self, count: int) -> None:
        for _ in range(count):
            self.snap.capture(self._step)
            self.snap.wait(20)
            self._step += 1


class _Mark:
    """What there is after so many steps."""

    def __init__(self, job: _Job, step: int) -> None:
        gc.collect()
        node = job.cluster.nodes[0]
        self.step = step
        self.worker = anonymous_bytes(os.getpid())
        self.daemon = anonymous_bytes(node.pid)
        self.files = sum(len(files) for _, _, files in os.walk(node.arena))
        self.sealed, self.captured = job.snap.stats["sealed"], job.snap.stats["captured"]
