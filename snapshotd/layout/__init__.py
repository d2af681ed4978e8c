"""
Pure: tensor boxes, shards, layouts and their hash, and the slot format.

This room knows none but native, which digests for it where it can; all others may import it. No I/O, no threads, no
torch.
"""

from __future__ import annotations

from snapshotd.layout.box import Box, Scope, TensorBox
from snapshotd.layout.digest import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    KnownDigests,
    RunningDigests,
    chunk_count,
    chunk_digests,
    is_right,
    root_digest,
    verify,
)
from snapshotd.layout.dtypes import DTYPES, DType, dtype_of, stored_shape
from snapshotd.layout.header import header_length
from snapshotd.layout.index import Index
from snapshotd.layout.layout import Layout, Shard

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "DTYPES",
    "Box",
    "DType",
    "Index",
    "KnownDigests",
    "Layout",
    "RunningDigests",
    "Scope",
    "Shard",
    "TensorBox",
    "chunk_count",
    "chunk_digests",
    "dtype_of",
    "header_length",
    "is_right",
    "root_digest",
    "stored_shape",
    "verify",
]
