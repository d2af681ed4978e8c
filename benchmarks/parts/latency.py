"""Latency: a tiny state, from its seal to the commit of its parity, over four daemons and a coordinator."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from .. import Row, Run, Sample, Series
from ..played import Company

GOAL = 10

_BYTES = 100_000
_PAUSE_S = 0.02


def rows(run: Run) -> Iterator[Row]:
    with Company(run.cluster(4, budget="64MiB"), _BYTES) as company:

        def step() -> Sample:
            time.sleep(_PAUSE_S)  # as a training step would: what is not on the way to the commit is over by then
            return Sample(company.step())

        found = run.rounds({"step": step}, rounds=40 if run.short else 300, within_s=12.0, warm=10)["step"]
    what = "seal to protected commit, 100 KB on each of 4 nodes"
    for name, share, at_most in (("p50", 50, 0.008), ("p99", 99, 0.030)):
        value = Series((float(np.percentile(found.values, share)),))
        yield Row.limit(f"{what}, {name}", value, at_most=at_most, unit="s", text=f"of {len(found.values)} steps")
