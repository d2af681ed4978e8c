"""Stall where forward and backward are shorter than the copy: the fence waits, as for a bare copy and no longer."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .. import Row, Run
from ..bare import BareCopy, bare_slot
from ..run import SETTLING_CAPTURES

GOAL = 2
SECONDS = 30
_COMPUTE_S = 0.02


def rows(run: Run) -> Iterator[Row]:
    import torch
    from snapshotd_client import Snapshotter

    training = run.training()
    training.backward()
    pairs, _, nbytes = bare_slot(run.directory, training.tensors)
    bare = BareCopy(pairs)
    run.finally_do(bare.close)
    cluster = run.cluster(1, m=0, generations=3)
    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    work = torch.randn(256, 256)
    steps = iter(range(1 << 30))

    def compute() -> None:
        end = time.perf_counter() + _COMPUTE_S * min(1.0, run.scale)
        while time.perf_counter() < end:
            torch.mm(work, work)

    def plain() -> float:
        training.optimizer.step()
        began = time.perf_counter()
        bare.begin()
        held = time.perf_counter() - began
        compute()
        began = time.perf_counter()
        bare.fence()
        return held + time.perf_counter() - began

    def ours() -> float:
        while True:  # a step that found no free slot held the thread for nothing: it does not count
            sealed, held = snap.stats["sealed"], kept()
            if snap.stats["sealed"] > sealed:
                return held

    def kept() -> float:
        training.optimizer.step()
        began = time.perf_counter()
        snap.capture(next(steps))
        held = time.perf_counter() - began
        compute()
        began = time.perf_counter()
        snap.fence()
        held += time.perf_counter() - began
        snap.wait(10)
        return held

    for _ in range(SETTLING_CAPTURES):
        ours()
    before = snap.stats
    found = run.rounds({"ours": ours, "floor": plain}, rounds=9, within_s=14.0)
    sealed, skipped = (snap.stats[key] - before[key] for key in ("sealed", "skipped"))
    yield Row.cost(
        "thread held, forward and backward shorter than the copy",
        found["ours"],
        found["floor"],
        at_most=1.1,
        against="bare fenced copy",
        nbytes=nbytes,
    )
    yield Row.note("steps kept with a short forward", f"{sealed} sealed, {skipped} skipped")
