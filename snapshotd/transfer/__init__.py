"""Bulk bytes between processes: ranges of slots and parity over plain sockets, verified."""

from snapshotd.transfer.client import BulkClient, ObjectInfo
from snapshotd.transfer.server import BulkServer, Lookup, Servable
from snapshotd.transfer.wire import CorruptChunk, ObjectMissing, TransferCancelled, format_address, parse_address

__all__ = [
    "BulkClient",
    "BulkServer",
    "CorruptChunk",
    "Lookup",
    "ObjectInfo",
    "ObjectMissing",
    "Servable",
    "TransferCancelled",
    "format_address",
    "parse_address",
]
