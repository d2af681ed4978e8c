"""
Group size: the CPU seconds of daemons and coordinator for a GB that is captured, by the nodes of a parity group.

Larger groups have more streams, each with less in it, on the same cores and the same caches. What the same work, and
these streams alone, cost bare processes stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from .. import Row, Run, Sample
from ..played import Company
from ..processes import cpu_seconds
from ..streams import Group

GOAL = 11
SECONDS = 43

_SIZES = (3, 5, 8)
_NODE_BYTES = 170_000_000
"""Of each node, whatever their number: what somebody has who adds nodes to a group. Three groups: 8 GB."""


def rows(run: Run) -> Iterator[Row]:
    sizes = _SIZES[:2] if run.short else _SIZES
    ends = (sizes[0], sizes[-1])
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Sample]] = {}
        for nodes in sizes:
            nbytes = run.size(_NODE_BYTES)
            cluster = run.cluster(nodes, budget=str(int(nbytes * 3.2) + (16 << 20)))
            company = stack.enter_context(Company(cluster, nbytes))
            ways[f"{nodes}"] = _way(company.step, cluster.pids, nodes * nbytes)
            if nodes in ends:
                group = Group(run, nodes, nbytes)
                ways[f"{nodes} bare"] = _way(group.protect, group.pids, nodes * nbytes)
                ways[f"{nodes} streams"] = _way(group.stream, group.pids, nodes * nbytes)
        found = run.rounds(ways, rounds=7, within_s=16.0)
    least = sizes[0]
    for nodes in sizes[1:]:
        yield Row.cost(
            f"CPU of a GB in a group of {nodes} nodes",
            found[f"{nodes}"],
            found[f"{least}"],
            at_most=1.1,
            against=f"a group of {least}",
        )
    for what, way in (("the same", "bare"), ("its streams alone", "streams")):
        yield Row.cost(
            f"{what}, by {sizes[-1]} bare processes",
            found[f"{sizes[-1]} {way}"],
            found[f"{least} {way}"],
            at_most=None,
            against=f"by {least}",
        )
    for nodes in ends:
        yield Row.cost(
            f"CPU of a GB in a group of {nodes} nodes, against bare processes",
            found[f"{nodes}"],
            found[f"{nodes} bare"],
            at_most=None,
            against="the same work",
        )


def _way(step: Callable[[], object], pids: Sequence[int], nbytes: int) -> Callable[[], Sample]:
    """One step of a group, from its seals to the commit of its parity."""

    def way() -> Sample:
        before = cpu_seconds(pids)
        step()
        return Sample((cpu_seconds(pids) - before) / (nbytes / 1e9))

    return way
