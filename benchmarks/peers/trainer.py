"""
Trains, and measures one family of systems: `python -m benchmarks.peers.trainer SPEC.json`, once per rank.

One sample is one step of training that keeps the state it began with: save, forward and backward, fence, update, drain.
It begins when the system is ready to keep it.
Plain steps stand between them. Each sample has the step's seconds, the seconds that training was held, the seconds
until the snapshot was complete while training went on, and the CPU seconds of the services that the system has.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..processes import cpu_seconds, die_with_parent
from ..state import Training
from .system import Setting, System
from .turns import Alone, InTurns, Rounds

PLAIN = "plain"
FIRST_STEP = 1000
"""Steps below are for systems that warm up."""

_PER_TURN = 2
"""Rounds in a turn, which begins with a step that does not count."""


def main(spec_path: str) -> None:
    die_with_parent()
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    sys.path.extend(spec["path"])
    home, rank, world = Path(spec["home"]), spec["rank"], spec["world"]
    home.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f".{spec['family']}", __package__)
    if hasattr(module, "early"):
        module.early(home, rank, world)
    training = Training(spec["nbytes"], threads=max(1, spec["cores"] // world))
    dist.init_process_group("gloo", store=dist.FileStore(spec["store"], world), rank=rank, world_size=world)
    setting = Setting(training, home, rank, world, spec["places"])
    systems: list[System] = module.systems(setting)
    samples = _measure(training, systems, spec)
    answer = {
        "nbytes": training.nbytes,
        "systems": {
            system.name: {
                **{key: getattr(system, key) for key in ("outlives", "lacks")},
                "samples": samples[system.name],
            }
            for system in systems
        },
        PLAIN: samples[PLAIN],
    }
    Path(spec["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    for system in systems:
        system.close()


def _measure(training: Training, systems: list[System], spec: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """
    Samples by system: after a step of each that does not count, as many rounds as there are. Where already the first
    step of a system takes longer than all of them may, it is the only one.
    """
    samples: dict[str, list[dict[str, float]]] = {PLAIN: [], **{system.name: [] for system in systems}}
    quick: list[System] = []
    rounds: Rounds = Alone(spec["rounds"], spec["within_s"], _agreed)
    if spec["turns"]:
        rounds = InTurns(spec["turns"], spec["family"])
    if not rounds.another(0):
        return samples
    for step, system in enumerate(systems, FIRST_STEP):
        dist.barrier()
        plain = _plain_step(training)
        system.ready()
        dist.barrier()
        found = _kept_step(training, system, step, watched=True)
        if _agreed(found["step_s"] <= spec["within_s"]):
            quick.append(system)
        else:
            samples[PLAIN].append(plain)
            samples[system.name].append({**found, "plain_s": plain["step_s"], "services_cpu_s": 0.0})
    step = FIRST_STEP + len(systems)
    for count in itertools.count(1):
        if not rounds.another(count):
            return samples
        order = quick if count % 2 == 0 else list(reversed(quick))
        if spec["turns"]:
            _plain_step(training)  # the others had the caches: else the plain step would pay for that
            order = order * _PER_TURN
        for system in order:
            dist.barrier()
            plain = _plain_step(training)
            system.ready()
            dist.barrier()
            services = cpu_seconds(spec["places"].get("pids", ()))
            found = _kept_step(training, system, step, watched=not system.polls)
            found["services_cpu_s"] = cpu_seconds(spec["places"].get("pids", ())) - services
            samples[PLAIN].append(plain)
            samples[system.name].append({**found, "plain_s": plain["step_s"]})
            step += 1
            if system.polls:
                system.ready()
                dist.barrier()
                watched = _kept_step(training, system, step, watched=True)
                step += 1
                samples[system.name][-1]["complete_s"] = watched["complete_s"]
    raise AssertionError("there is always another number")


def _plain_step(training: Training) -> dict[str, float]:
    began = time.perf_counter()
    training.backward()
    training.update()
    return {"step_s": time.perf_counter() - began}


def _kept_step(training: Training, system: System, step: int, *, watched: bool) -> dict[str, float]:
    ended: list[float] = []
    watch = threading.Thread(target=lambda: (system.complete(), ended.append(time.perf_counter())))
    began = time.perf_counter()
    system.save(step)
    saved = time.perf_counter()
    if watched:
        watch.start()
    training.backward()
    before_fence = time.perf_counter()
    system.fence()
    after_fence = time.perf_counter()
    training.update()
    before_drain = time.perf_counter()
    if watched:
        watch.join()
        if not ended:
            raise RuntimeError(f"{system.name}: the save of step {step} was never complete")
    system.drain()
    done = time.perf_counter()
    stall = saved - began + after_fence - before_fence + (done - before_drain if system.waits else 0.0)
    found = {"step_s": done - began, "stall_s": stall}
    return {**found, "complete_s": ended[0] - began} if watched else found


def _agreed(over: bool) -> bool:
    """What rank 0 thinks."""
    word = torch.tensor([int(over)])
    dist.broadcast(word, 0)
    return bool(word.item())


if __name__ == "__main__":
    main(*sys.argv[1:])
