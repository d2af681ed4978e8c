"""
Inflation and stall: a training loop that keeps each step, sealed only, on all cores, against the bare parts of it.

The floor is the same loop with one bare background copy, fenced before the next update, and one bare digest of the same
bytes behind it, in a process that yields as much as the daemon does.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotd.mapping import map_new_file

from .. import Row, Run, Sample, Series
from ..bare import BareCopy
from ..processes import cpu_seconds, wait_for

if TYPE_CHECKING:
    from ..state import Training

GOAL = 3
_NICE = 5
"""What the daemon runs at."""
_SLACK = 0.2
"""What is added is a third of a step, and steps without snapshots differ by a tenth: runs of the same code on two cores
gave 0.93, 0.96, 1.06 and 1.18."""


def rows(run: Run) -> Iterator[Row]:
    from snapshotd_client import Snapshotter

    training = run.training()
    pairs, path, nbytes = bare_slot(run, training)
    hasher = _Hasher(run, path)
    bare = BareCopy(pairs, hasher.begin)
    run.finally_do(bare.close)
    cluster = run.cluster(1, m=0)
    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    kept = _Kept(snap, [*cluster.pids, os.getpid()])
    for _ in range(3):  # layouts, slots, mappings
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


class _Hasher:
    """The process that hashes the bare slot."""

    def __init__(self, run: Run, path: Path) -> None:
        address = run.directory / "hasher"
        module = f"{__package__.rpartition('.')[0]}.bare"
        self._child = run.start("hasher", ["-m", module, str(path), str(address), str(_NICE)])
        wait_for(address.exists, "the hasher", 30.0, of=[self._child])
        self._link = socket.socket(socket.AF_UNIX)
        run.finally_do(self._link.close)
        self._link.connect(str(address))

    @property
    def pid(self) -> int:
        return self._child.pid

    def begin(self) -> None:
        self._link.sendall(b".")

    def wait(self) -> None:
        self._link.recv(1)


def _bare_step(training: Training, copy: BareCopy, hasher: _Hasher, pid: int) -> Callable[[], Sample]:
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


def bare_slot(run: Run, training: Training) -> tuple[list[tuple[Any, Any]], Path, int]:
    """A warm file in tmpfs that the state fits into: (target, source) arrays, its path and its size."""
    import numpy as np
    import torch

    sources = [tensor.view(torch.int32).numpy() for tensor in training.tensors]
    nbytes = sum(source.nbytes for source in sources)
    path = run.directory / "bare"
    with path.open("w+b") as file:
        slot = np.frombuffer(map_new_file(file.fileno(), nbytes), dtype=np.uint8)
    pairs, position = [], 0
    for source in sources:
        end = position + source.nbytes
        pairs.append((slot[position:end].view(np.int32).reshape(source.shape), source))
        position = end
    return pairs, path, nbytes
