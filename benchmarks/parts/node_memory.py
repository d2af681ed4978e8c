"""Memory of a node: what slots and parity take of tmpfs, and the daemon's own memory, as the status shows them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .. import Row, Run, Series
from ..played import Company

GOAL = 9
SECONDS = 13

_NODES, _M, _GENERATIONS = 4, 1, 2
_HEARTBEAT_S = 1.5


def rows(run: Run) -> Iterator[Row]:
    share = _GENERATIONS * (1 + _M / (_NODES - _M))
    size = min(run.size(300e6), int(shutil.disk_usage(run.directory).free * 0.9 / share / _NODES))
    cluster = run.cluster(_NODES, budget=f"{int(size * share * 1.5) + (16 << 20)}")
    files, shown, own = [], [], []
    with Company(cluster, size) as company:
        slot_bytes = company.workers[0].layout.file_bytes
        for _ in range(2 if run.short else 3):
            for _ in range(3):
                company.step()
                files.append(float(max(_held(node.arena) for node in cluster.nodes)))
            time.sleep(_HEARTBEAT_S)  # the status tells what the last heartbeat did
            nodes = cluster.status()["nodes"]
            shown.append(float(max(node["arena_bytes"] for node in nodes)))
            own.append(float(max(node["resident_bytes"] for node in nodes)))
    formula = Series((share * slot_bytes,))
    against = "generations x (1 + m/k) x state"
    what = f"tmpfs of a node, {slot_bytes / 1e6:.0f} MB of state, n = {_NODES}, m = {_M}"
    yield Row.cost(what, Series.of(files), formula, at_most=1.02, against=against, unit="B")
    yield Row.cost(f"{what}, by the status", Series.of(shown), formula, at_most=1.02, against=against, unit="B")
    yield Row.limit("the daemon's own memory, by the status", Series.of(own), at_most=150e6, unit="B")


def _held(arena: Path) -> int:
    return sum(path.stat().st_size for path in arena.glob("*/*") if path.is_file())
