"""Digests: rot is found in the chunk where it is, and nowhere else."""

from __future__ import annotations

import mmap
import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import native
from snapshotd.errors import UsageError
from snapshotd.layout import CHUNK_BYTES, RunningDigests, chunk_count, chunk_digests, is_right, root_digest, verify

LENGTH = 3 * CHUNK_BYTES + 17
DATA = bytes(range(256)) * (LENGTH // 256 + 1)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, LENGTH, 20 * LENGTH])
def test_digests_are_plain_xxh3_per_chunk(length: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs, and other versions of this one, must be able to check our files."""
    if not compiled:
        monkeypatch.setattr(native, "kernels", lambda: None)
    data = random.Random(1).randbytes(length + 100)
    digests = chunk_digests(data, length)
    assert digests == chunk_digests(data, length, cold=True)
    assert len(digests) == 8 * chunk_count(length)
    expected = b"".join(
        xxhash.xxh3_64_digest(data[i : min(i + CHUNK_BYTES, length)])[::-1] for i in range(0, length, CHUNK_BYTES)
    )
    assert digests == expected
    assert root_digest(digests) == xxhash.xxh3_128_hexdigest(expected)
    assert verify(data, digests, 0, length) == verify(data, digests, 0, length, cold=True) == []
    if length > CHUNK_BYTES:
        last = chunk_count(length) - 1
        wrong = bytearray(data)
        wrong[length - 1] ^= 1
        wrong[0] ^= 1
        assert verify(wrong, digests, 0, length) == verify(wrong, digests, 0, length, cold=True) == [0, last]


def test_golden() -> None:
    """These values may never change: digests outlive the process that made them."""
    assert chunk_digests(b"snapshotd", 9).hex() == "f10b88e5d5fb42cf"
    assert root_digest(b"") == "99aa06d3014798d86001c324468d497f"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, LENGTH - 1), st.integers(1, 255))
def test_one_changed_byte_is_found_in_its_chunk(at: int, flip: int) -> None:
    data = bytearray(DATA[:LENGTH])
    digests = chunk_digests(data, LENGTH)
    data[at] ^= flip
    chunk = at // CHUNK_BYTES
    assert verify(data, digests, 0, LENGTH) == [chunk]
    assert verify(data, digests, (chunk + 1) * CHUNK_BYTES if chunk < 3 else 0, LENGTH) == ([] if chunk < 3 else [3])
    assert verify(data, digests, 0, chunk * CHUNK_BYTES) == []


def test_part_of_a_file() -> None:
    """A repairing daemon checks just the range that it fetched."""
    digests = chunk_digests(DATA, LENGTH)
    part = DATA[CHUNK_BYTES : 2 * CHUNK_BYTES]
    assert verify(part, digests, CHUNK_BYTES, 2 * CHUNK_BYTES, base=CHUNK_BYTES) == []
    assert verify(b"\1" + part[1:], digests, CHUNK_BYTES, 2 * CHUNK_BYTES, base=CHUNK_BYTES) == [1]
    assert verify(b"", digests, CHUNK_BYTES, CHUNK_BYTES, base=CHUNK_BYTES) == []


def test_a_mapping_can_be_closed_afterwards() -> None:
    """A view kept alive would keep tmpfs memory alive, or make closing it fail."""
    with mmap.mmap(-1, LENGTH) as mapping:
        digests = chunk_digests(mapping, LENGTH)
        assert verify(mapping, digests, 0, LENGTH) == []
    assert mapping.closed


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (1, CHUNK_BYTES),
        (-CHUNK_BYTES, 0),
        (CHUNK_BYTES, 0),
        (0, CHUNK_BYTES + 1),
        (0, 5 * CHUNK_BYTES),
        (0, 4 * CHUNK_BYTES),
    ],
)
def test_bad_ranges_are_refused(begin: int, end: int) -> None:
    """A range that is silently not checked would be as bad as no digest."""
    digests = chunk_digests(DATA, LENGTH)
    with pytest.raises(UsageError):
        verify(DATA[:LENGTH], digests, begin, end)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError):
        chunk_digests(b"abc", 4)
    with pytest.raises(UsageError):
        chunk_digests(b"abc", -1)
    with pytest.raises(UsageError):
        verify(b"abc", b"1234567", 0, 3)
    with pytest.raises(UsageError):
        verify(DATA, chunk_digests(DATA, LENGTH), 0, CHUNK_BYTES, base=CHUNK_BYTES)


def test_single_chunks() -> None:
    data = bytearray(DATA[: 2 * CHUNK_BYTES + 5])
    digests = chunk_digests(data, len(data))
    for chunk in range(3):
        assert is_right(memoryview(data), digests, chunk)
        data[chunk * CHUNK_BYTES + 4] ^= 1
        assert [other == chunk for other in range(3)] == [
            not is_right(memoryview(data), digests, other) for other in range(3)
        ]
        data[chunk * CHUNK_BYTES + 4] ^= 1


def test_bytes_that_come_in_pieces_have_the_digests_of_the_whole() -> None:
    dice = random.Random(3)
    data = memoryview(dice.randbytes(3 * CHUNK_BYTES + 17))
    for _ in range(30):
        running = RunningDigests()
        at = 0
        while at < data.nbytes:
            end = min(at + dice.choice([0, 1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5]), data.nbytes)
            running.add(data[at:end])
            at = end
        assert chunk_digests(data, data.nbytes) == running.finish()
    assert b"" == RunningDigests().finish()
