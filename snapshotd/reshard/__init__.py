"""
Pure: from tensor boxes that are there and tensor boxes that are wanted to a plan of byte-range copies.

Knows ``layout`` and nobody else.
"""

from __future__ import annotations

from snapshotd.reshard.apply import apply_copy, gather_copy, scatter_copies
from snapshotd.reshard.copies import Copy, cut_copy, merge_neighbours
from snapshotd.reshard.plan import Key, Planner, SourceShards, TargetShard

__all__ = [
    "Copy",
    "Key",
    "Planner",
    "SourceShards",
    "TargetShard",
    "apply_copy",
    "cut_copy",
    "gather_copy",
    "merge_neighbours",
    "scatter_copies",
]
