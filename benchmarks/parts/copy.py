"""Copy: the state into its slot, by the copier of the hook, against the best plain copy of the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import xxhash

from snapshotd.layout import CHUNK_BYTES
from snapshotd.mapping import map_new_file

from .. import Row, Run, Series

if TYPE_CHECKING:
    from snapshotd_client.binding import Binding

    from snapshotd.v1 import worker_pb2 as pb

    from ..state import Training

__all__ = ["bound", "rows"]

GOAL = 1
SECONDS = 26


def rows(run: Run) -> Iterator[Row]:
    import torch
    from snapshotd_client.copier import Copier
    from snapshotd_client.copying import copy_alone

    binding, meta, grant = bound(run, run.training())
    plan, nbytes = binding.plan, grant.file_bytes
    for threads in (1, 2):
        torch.set_num_threads(threads)
        copier = Copier(threads, {})
        run.finally_do(copier.close)
        slot = copier.open(grant, plan)
        pipeline = ThreadPoolExecutor(1, initializer=copy_alone)
        run.finally_do(pipeline.shutdown)

        def capture(copier: Any = copier, slot: Any = slot) -> None:
            copier.issue(slot, binding, [])
            copier.copy(slot, binding)
            assert binding.moved() == []
            copier.write_meta(slot, plan, meta)

        def ours(pipeline: Any = pipeline, capture: Any = capture) -> None:
            pipeline.submit(capture).result()

        # Into the same memory: in other memory the same copy differs by a tenth.
        plain = _plain(run, slot.views, binding.sources, threads)
        ways = {"ours": ours, "digest": _bare_digest(run, slot.mapping.bytes, threads), **plain}
        found = run.rounds(ways, rounds=21, within_s=9.0)
        name, floor = _best({key: found[key] for key in plain})
        by = f"{threads} thread{'s' if threads > 1 else ''}"
        yield Row.speed(
            f"{len(plan.parts)} tensors into a slot, {by}",
            found["ours"],
            floor,
            at_least=0.95,
            against=name,
            nbytes=nbytes,
        )
        yield Row.speed(
            f"{len(plan.parts)} tensors into a slot, and its digests, {by}",
            found["ours"],
            floor + found["digest"],
            at_least=0.95,
            against=f"{name}, then bare xxh3",
            nbytes=nbytes,
        )


def bound(run: Run, training: Training) -> tuple[Binding, list[bytes], pb.Grant]:
    """A capture of that state as the hook prepares it, and a warm slot of that size."""
    from snapshotd_client.binding import Binding
    from snapshotd_client.inventory import Inventory

    from snapshotd.v1 import worker_pb2 as pb

    inventory = Inventory(
        model=training.model, optimizer=training.optimizer, scheduler=None, scaler=None, extra=None, world_size=1
    )
    reading = inventory.rescan()
    meta = reading.meta(0, 0, 1, 0)
    binding = Binding(inventory.plan(reading, sum(map(len, meta)), 0, True))
    binding.bind(reading.lasting, reading.sync)
    layout = binding.plan.layout
    path = run.directory / "slot"
    with path.open("w+b") as file:
        map_new_file(file.fileno(), layout.file_bytes)
    return binding, meta, pb.Grant(slot_id=1, path=str(path), file_bytes=layout.file_bytes, layout_hash=layout.hash)


def _plain(run: Run, targets: list[Any], sources: list[Any], threads: int) -> dict[str, Callable[[], None]]:
    """Plain copies of the same arrays by as many threads; the best of them is the floor."""
    import numpy as np
    import torch

    shares: list[list[tuple[Any, Any]]] = [[] for _ in range(threads)]
    total, position = sum(target.nbytes for target in targets), 0
    for target, source in zip(targets, sources, strict=True):
        shares[min(threads - 1, position * threads // total)].append((target, source))
        position += target.nbytes
    pool = ThreadPoolExecutor(threads)
    run.finally_do(pool.shutdown)
    as_tensors = [torch.from_numpy(target) for target in targets], [torch.from_numpy(source) for source in sources]

    def share(pairs: list[tuple[Any, Any]]) -> None:
        for target, source in pairs:
            np.copyto(target, source)

    def copyto() -> None:
        list(pool.map(share, shares))

    def copy_() -> None:
        for target, source in zip(*as_tensors, strict=True):
            target.copy_(source)

    def foreach() -> None:
        torch._foreach_copy_(*as_tensors)

    return {
        "np.copyto, one by one": copyto,
        "torch._foreach_copy_": foreach,
        "Tensor.copy_, one by one": copy_,
    }


def _bare_digest(run: Run, slot: Any, threads: int) -> Callable[[], None]:
    view, share = memoryview(slot), len(slot) // threads
    pool = ThreadPoolExecutor(threads)
    run.finally_do(pool.shutdown)

    def digest(begin: int) -> None:
        for at in range(begin, begin + share, CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(view[at : at + CHUNK_BYTES])

    return lambda: list(pool.map(digest, range(0, threads * share, share))) and None


def _best(found: dict[str, Series]) -> tuple[str, Series]:
    return min(found.items(), key=lambda item: item[1].median)

