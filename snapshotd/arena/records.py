"""
The record file beside a sealed slot or parity file: what it is, and the digests of its chunks.

Bytes: magic ``SNAPREC1``, the message's length (4 bytes little endian), the message's xxh3_64 (8 bytes little
endian), the message (``snapshotd.v1.Record``), and nothing after it.

Rule 1: the record's existence is the seal. It appears whole, by rename, after every byte that it speaks of.
Rule 2: what does not hold together in all its parts is no record: FormatError, never another error, never a guess.
"""

from __future__ import annotations

import math
import struct
from typing import Final

import xxhash
from google.protobuf.message import DecodeError

from snapshotd.errors import FormatError
from snapshotd.layout.digest import CHUNK_BYTES, DIGEST_BYTES, chunk_count, root_digest
from snapshotd.v1.control_pb2 import ParityRef, SlotRef
from snapshotd.v1.record_pb2 import Record

__all__ = ["HEAD_BYTES", "MAGIC", "RECORD_BYTES_MAX", "decode", "encode", "make_record", "room_for"]

MAGIC: Final = b"SNAPREC1"
_HEAD: Final = struct.Struct("<8sIQ")
HEAD_BYTES: Final = _HEAD.size

RECORD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Digests of a file of 2 TiB. A longer record is refused before it is read."""

_REFERENCE_BYTES: Final = 1024
"""What a record is beside its digests: some 200 bytes and the job's name."""


def room_for(file_bytes: int) -> int:
    """Return how many bytes the record of a file of ``file_bytes`` may come to."""
    return HEAD_BYTES + chunk_count(file_bytes) * DIGEST_BYTES + _REFERENCE_BYTES


def make_record(ref: SlotRef | ParityRef, digests: bytes, sealed_at: float) -> Record:
    """Return the record of a file with these chunk ``digests``, sealed at ``sealed_at`` (seconds since 1970)."""
    record = Record(chunk_bytes=CHUNK_BYTES, chunk_digests=digests, sealed_at=sealed_at)
    if isinstance(ref, SlotRef):
        record.slot.CopyFrom(ref)
    else:
        record.parity.CopyFrom(ref)
    return record


def encode(record: Record) -> bytes:
    """Return the bytes of the record file. FormatError if ``record`` contradicts itself: it is checked as if read."""
    _check(record)
    message: bytes = record.SerializeToString()
    if len(message) + HEAD_BYTES > RECORD_BYTES_MAX:
        raise FormatError(f"a record of {len(message)} bytes is longer than {RECORD_BYTES_MAX}")
    return _HEAD.pack(MAGIC, len(message), xxhash.xxh3_64_intdigest(message)) + message


def decode(data: bytes) -> Record:
    """Return the record that ``data`` is, whole and consistent; FormatError says what is wrong with it otherwise."""
    if len(data) < HEAD_BYTES:
        raise FormatError(f"a record of {len(data)} bytes is shorter than its head of {HEAD_BYTES}")
    if len(data) > RECORD_BYTES_MAX:
        raise FormatError(f"a record of {len(data)} bytes is longer than {RECORD_BYTES_MAX}")
    magic, length, checksum = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("not a record: wrong magic")
    if length != len(data) - HEAD_BYTES:
        raise FormatError(f"a record says {length} bytes and has {len(data) - HEAD_BYTES}")
    message = data[HEAD_BYTES:]
    if xxhash.xxh3_64_intdigest(message) != checksum:
        raise FormatError("a record's checksum does not match")
    try:
        record: Record = Record.FromString(message)
    except DecodeError as error:
        raise FormatError(f"a record cannot be parsed: {error}") from error
    _check(record)
    return record


def _check(record: Record) -> None:
    kind = record.WhichOneof("body")
    if kind is None:
        raise FormatError("a record speaks of neither a slot nor parity")
    ref = record.slot if kind == "slot" else record.parity
    if record.chunk_bytes != CHUNK_BYTES:
        raise FormatError(f"a record has chunks of {record.chunk_bytes} bytes, this version has {CHUNK_BYTES}")
    if len(record.chunk_digests) != chunk_count(ref.file_bytes) * DIGEST_BYTES:
        raise FormatError(
            f"a record has {len(record.chunk_digests)} bytes of digests for a file of {ref.file_bytes} bytes"
        )
    if ref.root_digest != root_digest(record.chunk_digests):
        raise FormatError("a record's root digest is not that of its chunk digests")
    if not math.isfinite(record.sealed_at):
        raise FormatError(f"a record was sealed at {record.sealed_at}")
