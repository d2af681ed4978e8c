"""
What snapshotd costs, measured beside its floors and beside what people use instead: `make bench`, `snapshotd bench`.

parts/        one file per part: what is measured       cluster.py   coordinator and daemons, real processes
run.py        what a part gets: rounds, memory, state   state.py     a GPT with AdamW of any size, and its step
figures.py    series of measurements, and ratios        worker.py    runs one part, in a process of its own
rows.py       rows: what, ours, floor, ratio, goal      bench.py     runs the parts, cleans up, collects
processes.py  children that end with us, by pid         table.py     the table

Rule 1: a figure is a ratio of two series that were measured in turns in one run.
Rule 2: imports are relative: in a wheel this is snapshotd.benchmarks, and no top-level name is taken.
"""

from __future__ import annotations

from .figures import Sample, Series
from .rows import Row
from .run import Run

__all__ = ["Row", "Run", "Sample", "Series"]
