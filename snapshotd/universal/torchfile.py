"""
Files as torch.save writes them, laid out ahead of their bytes: a zip of stored entries, each tensor's at its offset.

The checksums of tensors are known only when they were written; ``Archive.finish`` gives the blocks that hold them.
Archives may lie one behind the other in one file: a ``.distcp`` file is that.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from snapshotd.universal.stream import Placed, Written
from snapshotd.universal.views import View

__all__ = ["Archive", "lay_out"]

ALIGN_BYTES: Final = 64
"""Tensors begin at multiples of this in their archive, as in torch's own files."""

_LIMIT: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    header: int  # offsets relative to the archive
    begin: int
    nbytes: int
    key: str | None  # of the tensor; None: its bytes are known
    crc: int
    padding: int


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive at byte ``begin`` of a file. ``blocks``: what can be written now. ``tensors``: what is streamed."""

    begin: int
    nbytes: int
    blocks: list[tuple[int, bytes]]
    tensors: list[Placed]
    entries: list[_Entry]
    directory: int

    def finish(self, written: Mapping[str, Written]) -> list[tuple[int, bytes]]:
        """Return the headers and the directory, with the tensors' checksums."""
        blocks: list[tuple[int, bytes]] = []
        directory: list[bytes] = []
        for entry in self.entries:
            crc = written[entry.key].crc if entry.key is not None else entry.crc
            blocks.append((self.begin + entry.header, _local(entry, crc)))
            directory.append(_central(entry, crc))
        blocks.append((self.begin + self.directory, b"".join(directory) + self._end(sum(map(len, directory)))))
        return blocks

    def _end(self, size: int) -> bytes:
        count, at = len(self.entries), self.directory
        # Always with the zip64 records: readers use them where the short fields say so, and skip them otherwise.
        record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        locator = struct.pack("<IIQI", 0x07064B50, 0, at + size, 1)
        short = struct.pack(
            "<IHHHHIIH", 0x06054B50, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), min(size, _LIMIT), min(at, _LIMIT), 0
        )
        return record + locator + short


def lay_out(
    pickled: bytes, tensors: Sequence[tuple[str, str, View]], *, begin: int = 0, prefix: str = "archive"
) -> Archive:
    """
    Lay out an archive at byte ``begin`` of a file: ``data.pkl`` and a storage for each (storage key, unique key, view).

    The unique key names the tensor within the file that the archive is a part of.
    """
    entries: list[_Entry] = []
    blocks: list[tuple[int, bytes]] = []
    placed: list[Placed] = []
    at = 0

    def add(name: str, nbytes: int, data: bytes | None, key: str | None) -> int:
        nonlocal at
        encoded = f"{prefix}/{name}".encode()
        fixed = at + 30 + len(encoded) + (20 if nbytes >= _LIMIT else 0)
        # The padding is an extra field of its own, of 4 bytes at least.
        padding = -(fixed + 4) % ALIGN_BYTES + 4 if key is not None else 0
        start = fixed + padding
        crc = zlib.crc32(data) if data is not None else 0
        entries.append(_Entry(encoded, at, start, nbytes, key, crc, padding))
        if data is not None:
            blocks.append((begin + start, data))
        at = start + nbytes
        return start

    add("data.pkl", len(pickled), pickled, None)
    add("byteorder", 6, b"little", None)
    for storage, key, view in tensors:
        placed.append(Placed(key, view, begin + add(f"data/{storage}", view.nbytes, None, key)))
    add("version", 2, b"3\n", None)
    size = sum(46 + len(entry.name) + len(_central_extra(entry)) for entry in entries) + 56 + 20 + 22
    return Archive(begin=begin, nbytes=at + size, blocks=blocks, tensors=placed, entries=entries, directory=at)


def _local(entry: _Entry, crc: int) -> bytes:
    extra = b""
    short = min(entry.nbytes, _LIMIT)
    if entry.nbytes >= _LIMIT:
        extra += struct.pack("<HHQQ", 1, 16, entry.nbytes, entry.nbytes)
    if entry.padding:
        extra += struct.pack("<HH", 0x4246, entry.padding - 4) + b"Z" * (entry.padding - 4)
    fixed = struct.pack(
        "<IHHHHHIIIHH", 0x04034B50, 45, 0x0800, 0, 0, 0x21, crc, short, short, len(entry.name), len(extra)
    )
    return fixed + entry.name + extra


def _central_extra(entry: _Entry) -> bytes:
    values = [entry.nbytes, entry.nbytes] if entry.nbytes >= _LIMIT else []
    if entry.header >= _LIMIT:
        values.append(entry.header)
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _central(entry: _Entry, crc: int) -> bytes:
    extra, short = _central_extra(entry), min(entry.nbytes, _LIMIT)
    fixed = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(0x02014B50, 45, 45, 0x0800, 0, 0, 0x21, crc, short, short),
        *(len(entry.name), len(extra), 0, 0, 0, 0, min(entry.header, _LIMIT)),
    )
    return fixed + entry.name + extra
