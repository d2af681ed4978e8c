"""Bulk bytes between processes: ranges of slots and parity over plain sockets, verified."""

from snapshotd.transfer.blocks import BLOCK_BYTES_MAX, BLOCKS_MAX, whole_inside
from snapshotd.transfer.client import BulkClient, ObjectInfo
from snapshotd.transfer.exact import Exact, Run, runs_of
from snapshotd.transfer.gather import Piece, Read, gather
from snapshotd.transfer.incoming import Incoming, Steering
from snapshotd.transfer.objects import Leased, Lookup, Servable
from snapshotd.transfer.pacing import Pacer
from snapshotd.transfer.server import BulkServer
from snapshotd.transfer.wire import (
    RANGES_MAX,
    CorruptChunk,
    ObjectMissing,
    PeerBusy,
    TransferCancelled,
    format_address,
    parse_address,
)

__all__ = [
    "BLOCKS_MAX",
    "BLOCK_BYTES_MAX",
    "RANGES_MAX",
    "BulkClient",
    "BulkServer",
    "CorruptChunk",
    "Exact",
    "Incoming",
    "Leased",
    "Lookup",
    "ObjectInfo",
    "ObjectMissing",
    "Pacer",
    "PeerBusy",
    "Piece",
    "Read",
    "Run",
    "Servable",
    "Steering",
    "TransferCancelled",
    "format_address",
    "gather",
    "parse_address",
    "runs_of",
    "whole_inside",
]
