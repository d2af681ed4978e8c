"""
Two hundred daemons with 1,600 ranks, played, and one coordinator, real: a commit per step, five steps a second. In
turns with it the same messages, replayed; and steps whose parity takes so long that it is reported apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from .. import Row, Run, Series
from ..fleet import Fleet
from ..processes import cpu_seconds, wait_for

GOAL = 10
SECONDS = 13

_RANKS_PER_NODE = 8
_PERIOD_S = 0.2
_ROUNDS = 4


def rows(run: Run) -> Iterator[Row]:
    nodes, steps = (32, 8) if run.short else (200, 40)
    cluster = run.cluster(0)
    # Both before gRPC has threads here: a process that has some had better not fork.
    folder, port = run.directory / "answers", run.directory / "replay.port"
    folder.mkdir()
    replay = run.start("replay", ["-m", f"{__package__.rpartition('.')[0]}.replay", str(port), str(folder)])
    wait_for(port.exists, "the replay", 30.0, of=[replay])
    played, told = Fleet(nodes, _RANKS_PER_NODE), Fleet(nodes, _RANKS_PER_NODE)
    pid = cluster.coordinator.pid
    ours, apart, bare = _Found(pid, played), _Found(pid, played, apart=True), _Found(replay.pid, told)
    asyncio.run(_measure(ours, apart, cluster.address, bare, port.read_text(), folder, steps // _ROUNDS))
    what = f"{nodes} daemons, {nodes * _RANKS_PER_NODE} ranks"
    cores = Series.of(ours.cores)
    yield Row.limit(f"{what}: the coordinator's CPU, at 5 steps a second", cores, at_most=0.5, unit="cores")
    yield Row.limit(f"{what}: time between commits", Series.of(ours.periods), at_most=_PERIOD_S * 1.05, unit="s")
    yield Row.shown(f"{what}: seal to commit", Series.of(ours.seconds), unit="s")
    yield Row.shown(f"{what}: CPU, parity reported apart", Series.of(apart.cores), unit="cores")
    alone = Series.of(bare.cores)
    against = "a server that replays its answers"
    beside = f"{what}: CPU beside that of the messages"
    yield Row.cost(beside, cores, alone, at_most=None, unit="cores", against=against)
    yield Row.shown(f"{what}: seal to commit by {against}", Series.of(bare.seconds), unit="s")


class _Found:
    """What a coordinator's process took, round by round."""

    def __init__(self, pid: int, fleet: Fleet, *, apart: bool = False) -> None:
        self._pid, self.fleet, self._apart = pid, fleet, apart
        self.cores: list[float] = []
        self.periods: list[float] = []
        self.seconds: list[float] = []

    async def round(self, steps: int) -> None:
        cpu, began = cpu_seconds([self._pid]), time.monotonic()
        self.seconds += await self.fleet.run(steps, _PERIOD_S, apart=self._apart)
        elapsed = time.monotonic() - began
        self.cores.append((cpu_seconds([self._pid]) - cpu) / elapsed)
        self.periods.append(elapsed / steps)


async def _measure(
    ours: _Found, apart: _Found, address: str, bare: _Found, bare_address: str, folder: Path, steps: int
) -> None:
    """The coordinator, and in turns with it one that says what it said, to as many daemons."""
    async with ours.fleet.serving(address, 60.0):
        ours.fleet.record(folder)
        async with bare.fleet.serving(bare_address, 60.0):
            for count in range(_ROUNDS):
                for found in (ours, bare, apart) if count % 2 == 0 else (apart, bare, ours):
                    await found.round(steps)
