"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.errors import UsageError
from snapshotd.sizes import format_bytes, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("17", 17), ("17B", 17), ("4GiB", 4 * GIB), (" 4 gib ", 4 * GIB), ("4g", 4 * GIB), ("4GB", 4 * 10**9)]
    + [("1.5K", 1536), ("0.1MB", 100_000), ("2T", 2 << 40), ("1PiB", 1 << 50)],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert expected == parse_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 GiB x", "4iB", "1e9", "1.", "0x10", "٤", "9" * 30, "nan", "50%"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_format_bytes_is_close(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= max(nbytes * 0.051, 0)


def test_format_bytes() -> None:
    expected = ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 MiB", "4 GiB", "2 PiB"]
    assert expected == [format_bytes(size) for size in (0, 1023, 1024, 1536, (1 << 20) - 1, 4 * GIB, 2 << 50)]
