"""
Numbers of bytes as people write and read them.
"""

from __future__ import annotations

import re
from typing import Final

from snapshotd.errors import UsageError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE: Final = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([KMGTP]?)(|B|IB)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """
    Return the number of bytes that ``text`` says: ``4GiB``, ``512 MiB``, ``1.5T``, ``4GB``, ``1048576``.

    KiB, MiB ... and the bare letters K, M, G, T, P are powers of 1024; KB, MB ... are powers of 1000.
    UsageError for anything else.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (not match[2] and match[3].upper() == "IB"):
        raise UsageError(f"{text!r} is no size; write it like 4GiB, 512MiB or a number of bytes")
    base: int = 1000 if match[2] and match[3].upper() == "B" else 1024
    factor: int = base ** _UNITS[match[2].upper()]
    whole, _, fraction = match[1].partition(".")
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def format_bytes(nbytes: int) -> str:
    """Return ``nbytes`` for people: ``4 GiB``, ``1.5 MiB``, ``17 B``; rounded to a tenth, up at the half."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if abs(round(size, 1)) < 1024:
            return f"{size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size / 1024:.1f}".removesuffix(".0") + " PiB"
