"""
An accelerator: device to slot against plain copies to pinned memory, and what a step of a 1B-parameter model loses.

Nothing here needs another process than the daemon's; without a device there is a line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from snapshotd.layout import CHUNK_BYTES

from .. import Row, Run, Sample, Series
from ..processes import BenchError, wait_for
from .copy import bound

if TYPE_CHECKING:
    from ..cluster import Cluster
    from ..state import Training

GOAL = 12
SECONDS = 2

_BYTES = 12e9
"""1e9 parameters of four bytes, and AdamW's two moments of each."""
_TENSORS = 4 * (12 * 24 + 4)
_SEQUENCES = 64
_MICRO_BATCHES = 4
"""Of 64 * 128 tokens each: 32,768 tokens a step."""
_STEPS = 6
"""In a round, without a look at the device in between: the host runs ahead, as in training."""


def rows(run: Run) -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        yield Row.note("device to slot, stall on a device", "torch finds no CUDA device here: not measured")
        return
    training = run.training(_BYTES, tensors=_TENSORS, device="cuda", sequences=_SEQUENCES)
    yield Row.note("device", f"{torch.cuda.get_device_name()}, {training.nbytes / 1e9:.1f} GB of state")
    yield _copy(run, training)
    yield from _steps(run, training)


def _copy(run: Run, training: Training) -> Row:
    import torch
    from snapshotd_client.copier import Copier
    from snapshotd_client.device import stream_for

    binding, _, grant = bound(run, training)
    stream = stream_for(torch.device("cuda"))
    streams = {str(tensor.device): stream for tensor in training.tensors if tensor.is_cuda}
    copier = Copier(1, streams)
    slot = copier.open(grant, binding.plan)
    assert slot.pinned
    sources = [source for source in binding.sources if isinstance(source, torch.Tensor)]
    pinned = torch.empty(sum(source.nbytes for source in sources), dtype=torch.uint8, pin_memory=True)
    targets, position = [], 0
    for source in sources:
        targets.append(pinned[position : position + source.nbytes].view(source.dtype).view(source.shape))
        position += source.nbytes
    side = torch.cuda.Stream()

    def plain() -> None:
        with torch.cuda.stream(side):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        side.synchronize()

    def ours() -> None:
        copier.issue(slot, binding, [(stream, stream.mark_compute())])
        copier.copy(slot, binding)
        stream.wait(stream.mark_copied())

    found = run.rounds({"ours": ours, "floor": plain}, rounds=9, within_s=20.0)
    copier.close()
    return Row.speed(
        f"{len(sources)} tensors from the device into a slot",
        found["ours"],
        found["floor"],
        at_least=0.9,
        against="copies to pinned memory, one by one",
        nbytes=position,
    )


def _steps(run: Run, training: Training) -> Iterator[Row]:
    import torch
    from snapshotd_client import Snapshotter

    def backward() -> None:
        for _ in range(_MICRO_BATCHES):
            with torch.autocast("cuda", torch.bfloat16):
                loss = training.loss()
            loss.backward()

    cluster = run.cluster(1, m=0)
    snap = Snapshotter(training.model, training.optimizer, settings=cluster.settings())
    run.finally_do(snap.close)
    snap.restore()
    numbers = iter(range(1 << 30))
    held: list[float] = []

    def plain() -> Sample:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_STEPS):
            backward()
            training.update()
        torch.cuda.synchronize()
        return Sample((time.perf_counter() - began) / _STEPS)

    def kept() -> Sample:
        torch.cuda.synchronize()
        began = time.perf_counter()
        here = 0.0
        for _ in range(_STEPS):
            backward()
            begun = time.perf_counter()
            snap.fence()
            here += time.perf_counter() - begun
            training.update()
            begun = time.perf_counter()
            snap.capture(next(numbers))
            here += time.perf_counter() - begun
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        held.append(here / _STEPS)
        return Sample(elapsed / _STEPS)

    kept()  # layouts, slots, pinned mappings
    held.clear()
    before = snap.stats
    found = run.rounds({"ours": kept, "floor": plain}, rounds=7, within_s=60.0)
    assert snap.wait(60)
    stats = snap.stats
    stall = Series(tuple(held[1:]))  # one round is for warming up
    yield Row.cost(
        "thread held, a step of 1e9 parameters on the device",
        stall,
        found["floor"],
        at_most=0.01,
        against="the step",
    )
    yield Row.cost(
        "a step of 1e9 parameters on the device, captured",
        found["ours"],
        found["floor"],
        at_most=None,
        against="the step without",
        nbytes=training.nbytes,
    )
    counted = {key: stats[key] - before[key] for key in stats if key == "sealed" or key.startswith("skipped")}
    text = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in counted.items() if count or key == "sealed")
    yield Row.note("steps kept on the device", text)
    snap.capture(last := next(numbers))  # plain steps came after the last one
    assert snap.wait(60)
    wait_for(lambda: (cluster.job().get("committed") or {}).get("step") == last, "the commit", 60.0)
    snap.close()
    yield _restore(run, training, cluster)


def _restore(run: Run, training: Training, cluster: Cluster) -> Row:
    """A new worker's restore, of the last step that was captured."""
    import torch
    from snapshotd_client import Snapshotter
    from snapshotd_client.sums import content_sums

    on_device = [tensor for tensor in training.tensors if tensor.is_cuda]
    memory = np.frombuffer(run.memory(training.nbytes), np.uint8)
    warm = np.ones_like(memory)
    formations = iter(range(1 << 30))

    def copy_and_digest() -> None:
        np.copyto(warm, memory)
        for begin in range(0, len(warm), CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(warm[begin : begin + CHUNK_BYTES].data)

    def ours() -> Sample:
        expected = content_sums(on_device)
        for tensor in on_device:
            tensor.zero_()
        settings = cluster.settings(formation=f"again-{next(formations)}")
        with Snapshotter(training.model, training.optimizer, settings=settings) as again:
            again.restore()
            facts = again.last_restore
        if not torch.equal(expected, content_sums(on_device)):
            raise BenchError("what was restored is not what was captured")
        return Sample(facts["fetch_s"] + facts["load_s"])

    found = run.rounds({"ours": ours, "floor": copy_and_digest}, rounds=5, within_s=40.0)
    return Row.speed(
        "restore from the own node's slot onto the device",
        found["ours"],
        found["floor"],
        at_least=0.85,
        against="memcpy, then digest, one thread",
        nbytes=training.nbytes,
    )
