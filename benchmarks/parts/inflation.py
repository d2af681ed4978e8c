"""
Inflation and stall: a training loop that keeps each step, sealed only, on all cores, against the bare parts of it.

The floor is the same loop with one bare background copy, fenced before the next update, and one bare digest of the same
bytes behind it, in a process that yields as much as the daemon does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .. import Row, Run, Sample, Series
from ..bare import BareCopy, BareHash, bare_slot
from ..processes import cpu_seconds
from ..run import SETTLING_CAPTURES

if TYPE_CHECKING:
    from ..state import Training

GOAL = 3
SECONDS = 63
_SLACK = 0.2
"""What is added is a third of a step, and steps without snapshots differ by a tenth: runs of the same code on two cores
gave 0.93, 0.96, 1.06 and 1.18."""


def rows(run: Run) -> Iterator[Row]:
    from snapshotd_client import Snapshotter

    training = run.training()
    pairs, path, nbytes = bare_slot(run.directory, training.tensors)
    hasher = BareHash(run.directory, path)
    run.finally_do(hasher.close)
    bare = BareCopy(pairs, hasher.begin)
    run.finally_do(bare.close)
    cluster = run.cluster(1, m=0)
    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    kept = _Kept(snap, [*cluster.pids, os.getpid()])
    for _ in range(SETTLING_CAPTURES):
        kept.step(training)
    before = snap.stats
    ways: dict[str, Callable[[], Sample]] = {
        "none": lambda: _timed(training.step, [os.getpid()]),
        "bare copy and digest": _bare_step(training, bare, hasher, os.getpid()),
        "kept": lambda: kept.step(training),
    }
    found = run.rounds(ways, rounds=15, within_s=38.0)
    stats = snap.stats
    added = {name: series - found["none"] for name, series in found.items() if name != "none"}
    yield Row.cost(
        "added to a step, sealed only",
        added["kept"],
        added["bare copy and digest"],
        at_most=1.15,
        slack=_SLACK,
        against="bare fenced copy + digest",
        nbytes=nbytes,
    )
    yield Row.shown("a step without snapshots", found["none"], unit="s")
    yield from _stalls(kept, found["kept"])
    steps, sealed, skipped = (stats[key] - before[key] for key in ("captured", "sealed", "skipped"))
    yield Row.note("steps kept", f"{sealed} of {steps} steps sealed, {skipped} skipped")


def _stalls(kept: _Kept, steps: Series) -> Iterator[Row]:
    stalls = Series.of(kept.stalls[-len(steps.values) :])
    yield Row.limit("thread held by capture and fence, 592 tensors", stalls, at_most=2e-3, unit="s")
    yield Row.cost("thread held, as a share of the step", stalls, steps * 0.01, at_most=1.0, against="1% of the step")


class _Kept:
    """The loop with snapshots: how long each step took, and how long it held the thread."""

    def __init__(self, snap: Any, pids: list[int]) -> None:
        self._snap = snap
        self._pids = pids
        self._number = 0
        self.stalls: list[float] = []

    def step(self, training: Training) -> Sample:
        fenced = self._snap.stats["stall_ns"]
        held = 0.0

        def whole() -> None:
            nonlocal held
            began = time.perf_counter()
            self._snap.capture(self._number)
            held = time.perf_counter() - began
            training.step()

        sample = _timed(whole, self._pids)
        self._number += 1
        self._snap.wait(10)
        self.stalls.append(held + (self._snap.stats["stall_ns"] - fenced) / 1e9)
        return sample


def _bare_step(training: Training, copy: BareCopy, hasher: BareHash, pid: int) -> Callable[[], Sample]:
    def step() -> None:
        copy.begin()
        training.backward()
        copy.fence()
        training.update()

    def run() -> Sample:
        sample = _timed(step, [pid, hasher.pid])
        hasher.wait()
        return sample

    return run


def _timed(step: Callable[[], object], pids: list[int]) -> Sample:
    cpu = cpu_seconds(pids)
    began = time.perf_counter()
    step()
    elapsed = time.perf_counter() - began
    return Sample(elapsed, cpu_seconds(pids) - cpu)
