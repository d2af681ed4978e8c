"""
Everything on: two ranks train and keep each step, copied, hashed, sent, coded and committed, each on a node of its own.

A step counts until its commit. The floor of what it adds: the CPU seconds of the bare parts of it, measured in the same
run, divided by the two cores.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import Row, Run, Series
from ..floors import CORES, Floors
from .peers import OURS, measure

GOAL = 3
SECONDS = 39

_NODES = 2
_WITHIN_S = 20.0

_PARTS = ("copy", "digest", "send", "encode")


def rows(run: Run) -> Iterator[Row]:
    whole = run.size() // (10 if run.short else 1)
    samples = measure(run, "ours", _NODES, whole, _WITHIN_S)[OURS]["samples"]
    nbytes = whole // _NODES
    floors = Floors(run, nbytes // (1 << 20) * (1 << 20), _NODES - 1)
    found = run.rounds({name: getattr(floors, name) for name in _PARTS}, rounds=7, pids=[floors.owner])
    cpu = {name: Series(found[name].cpu_s) for name in _PARTS}
    parts = cpu["copy"] + cpu["digest"] + cpu["send"] + cpu["encode"]
    added = Series(tuple(sample["step_s"] - sample["plain_s"] for sample in samples))
    captured = _NODES * nbytes / 1e9
    text = ", ".join(f"{name} {one.median * _NODES / captured:.3f}" for name, one in cpu.items())
    yield Row.cost(
        f"added to a step until its commit, {_NODES} nodes, everything on",
        added,
        parts * (_NODES / CORES),
        at_most=None if run.short else 1.2,  # what a commit costs however small the state counts too much then
        against=f"CPU seconds of the bare parts on {CORES} cores",
        text=f"(CPU s/GB: {text})",
    )
    services = Series(tuple(sample["services_cpu_s"] for sample in samples))
    yield Row.cost(
        "CPU of daemons and coordinator for each GB captured",
        services / captured,
        (parts - cpu["copy"]) * (_NODES / captured),
        at_most=None,
        against="bare digest + send + encode",
    )
