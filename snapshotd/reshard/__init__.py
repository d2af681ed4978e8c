"""
Pure: from tensor boxes that are there and tensor boxes that are wanted to a plan of byte-range copies.

Knows ``layout`` and nobody else.
"""

from __future__ import annotations

from snapshotd.reshard.apply import apply_copy, gather_copy, scatter_copies
from snapshotd.reshard.copies import Copy, cut_copy, merge_neighbours
from snapshotd.reshard.plan import Key, Plan, Planner, Problem, SourceShard, TargetShard, coverage, plan

__all__ = [
    "Copy",
    "Key",
    "Plan",
    "Planner",
    "Problem",
    "SourceShard",
    "TargetShard",
    "apply_copy",
    "coverage",
    "cut_copy",
    "gather_copy",
    "merge_neighbours",
    "plan",
    "scatter_copies",
]
