"""A record is whole and consistent, or it is none."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.arena import records
from snapshotd.errors import FormatError
from snapshotd.layout.digest import chunk_digests, root_digest
from snapshotd.v1.control_pb2 import ParityRef, SlotRef, StripeSet
from snapshotd.v1.record_pb2 import Record

DIGESTS = chunk_digests(b"x" * 300_000, 300_000)
SLOT = SlotRef(job="j", epoch=1, step=7, rank=3, file_bytes=300_000, root_digest=root_digest(DIGESTS))
PARITY = ParityRef(set=StripeSet(job="j", m=1), position=2, file_bytes=300_000, root_digest=root_digest(DIGESTS))


def _frame(message: bytes) -> bytes:
    return struct.pack("<8sIQ", records.MAGIC, len(message), xxhash.xxh3_64_intdigest(message)) + message


@pytest.mark.parametrize("ref", [SLOT, PARITY])
def test_round_trip(ref: SlotRef | ParityRef) -> None:
    record = records.make_record(ref, DIGESTS, 12.5)
    assert record == records.decode(records.encode(record))


def test_every_bit_flip_is_found() -> None:
    """A rotten record must never let a slot pass for another one."""
    data = records.encode(records.make_record(SLOT, DIGESTS, 1.0))
    for bit in range(len(data) * 8):
        torn = bytearray(data)
        torn[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            records.decode(bytes(torn))
    for length in range(len(data)):
        with pytest.raises(FormatError):
            records.decode(data[:length])
    with pytest.raises(FormatError):
        records.decode(data + b"\0")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.ClearField("slot"),
        lambda record: setattr(record, "chunk_bytes", 4096),
        lambda record: setattr(record, "chunk_digests", DIGESTS + b"12345678"),
        lambda record: setattr(record, "chunk_digests", bytes(16)),
        lambda record: setattr(record, "sealed_at", float("nan")),
        lambda record: setattr(record.slot, "file_bytes", 2**64 - 1),
        lambda record: setattr(record.slot, "root_digest", ""),
    ],
)
def test_a_record_that_contradicts_itself(change: object) -> None:
    record = records.make_record(SLOT, DIGESTS, 1.0)
    change(record)  # type: ignore[operator]
    with pytest.raises(FormatError):
        records.decode(_frame(record.SerializeToString()))
    with pytest.raises(FormatError):
        records.encode(record)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_hostile_bytes(data: bytes) -> None:
    """Either parsed, or FormatError; never another error."""
    for candidate in (data, _frame(data), records.MAGIC + data):
        with suppress(FormatError):
            assert isinstance(records.decode(candidate), Record)
