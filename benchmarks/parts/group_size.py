"""Group size: the CPU seconds of daemons and coordinator for a GB that is captured, by the nodes of a parity group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from .. import Row, Run, Sample
from ..played import Company
from ..processes import cpu_seconds

GOAL = 11

_SIZES = (3, 5, 8)
_STATE_BYTES = 1 << 30
"""Of all nodes together, whatever their number."""


def rows(run: Run) -> Iterator[Row]:
    sizes = _SIZES[:2] if run.short else _SIZES
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Sample]] = {str(nodes): _way(run, nodes, stack) for nodes in sizes}
        found = run.rounds(ways, rounds=5, within_s=20.0)
    least = str(sizes[0])
    for nodes in sizes[1:]:
        yield Row.cost(
            f"CPU of a GB in a group of {nodes} nodes",
            found[str(nodes)],
            found[least],
            at_most=1.1,
            against=f"a group of {least}",
        )


def _way(run: Run, nodes: int, stack: ExitStack) -> Callable[[], Sample]:
    """One step of a group, from its seals to the commit of its parity."""
    size = run.size(_STATE_BYTES) // nodes
    cluster = run.cluster(nodes, budget=str(int(size * 3.2) + (16 << 20)))
    company = stack.enter_context(Company(cluster, size))

    def step() -> Sample:
        before = cpu_seconds(cluster.pids)
        company.step()
        return Sample((cpu_seconds(cluster.pids) - before) / (nodes * size / 1e9))

    return step
