"""
The durable tier's directory format: written atomically, read with every byte verified.

Knows ``layout`` and the wire's SlotRef and DurableRef; the daemon's pipelines and the tools stand on it.
"""

from __future__ import annotations

from snapshotd.durable.format import Marker, MarkerRank, RankRecord, job_directory_name, snapshot_directory_name
from snapshotd.durable.reader import DurableSnapshot, RankFile, open_snapshot, scan_durable
from snapshotd.durable.writer import RankWriter, prune, write_atomic, write_marker

__all__ = [
    "DurableSnapshot",
    "Marker",
    "MarkerRank",
    "RankFile",
    "RankRecord",
    "RankWriter",
    "job_directory_name",
    "open_snapshot",
    "prune",
    "scan_durable",
    "snapshot_directory_name",
    "write_atomic",
    "write_marker",
]
