"""Latency: a tiny state, from its seal to the commit of its parity, over four daemons and a coordinator."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from .. import Row, Run, Sample, Series
from ..messages import Played
from ..played import Company
from ..processes import wait_for

GOAL = 10
SECONDS = 17

_NODES = 4
_BYTES = 100_000
_PAUSE_S = 0.02
_BLOCK = 30
"""Steps of less than a second: how their medians differ is what the machine does to one."""


def rows(run: Run) -> Iterator[Row]:
    what = f"seal to protected commit, 100 KB on each of {_NODES} nodes"
    with Company(run.cluster(_NODES, budget="64MiB"), _BYTES) as company:

        def ours() -> Sample:
            time.sleep(_PAUSE_S)  # as a training step would: what is not on the way to the commit is over by then
            return Sample(company.step())

        alone = run.rounds({"ours": ours}, rounds=40 if run.short else 300, within_s=12.0, warm=10)["ours"]
        for name, share, block, at_most in (("p50", 50, _BLOCK, 0.008), ("p99", 99, len(alone.values), 0.030)):
            value = Series(tuple(_percentiles(alone.values, share, block)))
            text = f"of {len(alone.values)} steps"
            yield Row.limit(f"{what}, {name}", value, at_most=at_most, unit="s", text=text)

        with _messages(run) as bare:
            steps = count(1)

            def floor() -> Sample:
                time.sleep(_PAUSE_S)
                began = time.perf_counter()
                bare.step(next(steps))
                return Sample(time.perf_counter() - began)

            found = run.rounds({"ours": ours, "floor": floor}, rounds=80, within_s=5.0, warm=10)
    yield Row.cost(what, found["ours"], found["floor"], at_most=None, against="its messages between bare processes")


def _percentiles(values: Sequence[float], share: int, block: int) -> Iterator[float]:
    """Of each block of so many values in turn, of those that are left with the last one."""
    for begin in range(0, max(1, len(values) - block + 1), block):
        end = begin + block if begin + 2 * block <= len(values) else len(values)
        yield float(np.percentile(values[begin:end], share))


def _messages(run: Run) -> Played:
    """Processes that send each other the messages of a step of so many nodes, and do nothing else."""
    module = f"{__package__.rpartition('.')[0]}.messages"
    port = run.directory / "port"
    children = [run.start("messages", ["-m", module, "coordinate", str(port), str(_NODES)])]
    wait_for(port.exists, "the bare coordinator to serve", 60.0, of=children)
    paths = [run.directory / f"bare-{index}" for index in range(_NODES)]
    for index, path in enumerate(paths):
        arguments = ["node", port.read_text(encoding="ascii"), str(path), str(index), str(_BYTES)]
        children.append(run.start(f"messages-{index}", ["-m", module, *arguments]))
    for path in paths:
        wait_for(path.exists, "a bare node to serve", 60.0, of=children)
    return Played(paths)
