"""Protect: a large state on four daemons, from its seals to the commit of its parity, against the floors of that."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

from .. import Row, Run, Sample
from ..floors import Floors
from ..played import Company

GOAL = 7
SECONDS = 41

_NODES, _K = 4, 3
_SHARE = 2 * _NODES * (1 + 1 / _K) + 3
"""What all of it needs of tmpfs, in states: two generations with parity on each node, and the floors' memory."""


def rows(run: Run) -> Iterator[Row]:
    size = min(run.size(), int(shutil.disk_usage(run.directory).free * 0.9 / _SHARE)) // (8 << 20) * (8 << 20)
    floors = Floors(run, size, _K)
    budget = f"{int(size * 2 * (1 + 1 / _K) * 1.02) + (16 << 20)}"
    cluster = run.cluster(_NODES, budget=budget)
    with Company(cluster, size) as company:
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: Sample(company.step()),
            "digest": floors.digest,
            "send": floors.send,
            "encode": floors.encode,
        }
        found = run.rounds(ways, rounds=5, within_s=60.0, pids=[*cluster.pids, floors.owner])
    ours = found["ours"]
    parts = {name: found[name] * _NODES for name in ("digest", "send", "encode")}
    floor = parts["digest"] + parts["send"] + parts["encode"]
    nbytes = _NODES * size
    text = ", ".join(f"{name} {one.median:.2f} s" for name, one in parts.items())
    yield Row.cost(
        f"seals to protected commit, {_NODES} nodes with {size / 1e9:.2f} GB each, m = 1",
        ours,
        floor,
        at_most=1.3,
        against="digest + send + encode on two cores",
        nbytes=nbytes,
        text=text,
    )
