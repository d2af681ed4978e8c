"""Layout check: what each step looks at to know that its layout still holds; after an update, with cold caches."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .. import Row, Run, Series

GOAL = 1
SECONDS = 18


def rows(run: Run) -> Iterator[Row]:
    import torch
    from snapshotd_client.binding import Binding
    from snapshotd_client.inventory import Inventory

    for tensors, limit_s in ((592, 0.5e-3), (10_000, 3e-3)):
        training = run.training(60e6, tensors=tensors)
        inventory = Inventory(
            model=training.model, optimizer=training.optimizer, scheduler=None, scaler=None, extra=None, world_size=1
        )
        reading = inventory.rescan()
        plan = inventory.plan(reading, 0, 0, True)
        binding = Binding(plan)
        for _ in range(2):  # then they are known to stay where they are
            assert binding.bind(reading.lasting, reading.sync)
        checks, whole, addresses = [], [], []
        training.backward()
        for _ in range(5 if run.short else 40):
            training.optimizer.step()
            began = time.perf_counter()
            same = inventory.unchanged() and binding.follow(reading.lasting)
            checks.append(time.perf_counter() - began)
            assert same
            training.optimizer.step()
            began = time.perf_counter()
            found, _ = inventory.read()
            binding.bind(found.lasting, found.sync)
            found.meta(0, 0, 1, 0)
            whole.append(time.perf_counter() - began)
            tensors_now = [leaf.tensor for leaf in reading.lasting]
            training.optimizer.step()
            began = time.perf_counter()
            list(map(torch.Tensor.data_ptr, tensors_now))
            addresses.append(time.perf_counter() - began)
        state = next(iter(training.optimizer.state.values()))
        replaced = []
        for _ in range(5 if run.short else 15):
            began = time.perf_counter()
            binding.let_go(inventory.forget_moving())  # as the fence does, before the step
            took = time.perf_counter() - began
            training.optimizer.step()
            state["exp_avg"] = state["exp_avg"].clone()
            began = time.perf_counter()
            found, changed = inventory.read()
            assert not changed and binding.bind(found.lasting, found.sync)
            found.meta(0, 0, 1, 0)
            replaced.append(took + time.perf_counter() - began)
            del found
        yield Row.limit(f"layout check, {tensors} tensors", Series.of(checks), at_most=limit_s, unit="s")
        yield Row.shown(f"torch asked where each tensor lies, {tensors}", Series.of(addresses), unit="s")
        yield Row.shown(f"all of capture's look, with versions and generators, {tensors}", Series.of(whole), unit="s")
        yield Row.shown(f"the same, one state tensor replaced in each step, {tensors}", Series.of(replaced), unit="s")
