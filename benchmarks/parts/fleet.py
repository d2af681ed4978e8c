"""Two hundred daemons with 1,600 ranks, played, and one coordinator, real: a commit per step, five steps a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from .. import Row, Run, Series
from ..fleet import Fleet
from ..processes import cpu_seconds

GOAL = 10

_RANKS_PER_NODE = 8
_PERIOD_S = 0.2


def rows(run: Run) -> Iterator[Row]:
    nodes, steps = (32, 10) if run.short else (200, 50)
    cluster = run.cluster(0)
    cores, rates, seconds = asyncio.run(_measure(cluster.address, cluster.coordinator.pid, nodes, steps))
    what = f"{nodes} daemons, {nodes * _RANKS_PER_NODE} ranks"
    yield Row.limit(f"{what}: the coordinator's CPU, at 5 steps a second", cores, at_most=0.5, unit="cores")
    yield Row.limit(f"{what}: time between commits", rates, at_most=_PERIOD_S * 1.05, unit="s")
    yield Row.shown(f"{what}: seal to commit", seconds, unit="s")


async def _measure(address: str, pid: int, nodes: int, steps: int) -> tuple[Series, Series, Series]:
    fleet = Fleet(nodes, _RANKS_PER_NODE)
    cores: list[float] = []
    periods: list[float] = []
    seconds: list[float] = []
    async with fleet.serving(address, 60.0):
        for _ in range(5):
            cpu, began = cpu_seconds([pid]), time.monotonic()
            seconds += await fleet.run(steps // 5, _PERIOD_S)
            elapsed = time.monotonic() - began
            cores.append((cpu_seconds([pid]) - cpu) / elapsed)
            periods.append(elapsed / (steps // 5))
    return Series.of(cores), Series.of(periods), Series.of(seconds)
