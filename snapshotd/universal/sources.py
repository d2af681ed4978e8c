"""
Sources: files and blocks of bytes that views read by ranges.

Rule 1: nothing is mapped and nothing stays open: a file that somebody cuts short is an error with a name and no SIGBUS,
and ten thousand files need no ten thousand descriptors.
Rule 2: a read gives all the bytes that were asked for, or raises CorruptionError with the file, the offset and what was
expected. Any number of threads may read at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from snapshotd.errors import CorruptionError

__all__ = ["BytesSource", "FileSource", "Source", "read_bytes"]


class Source(Protocol):
    """
    Bytes that can be read by ranges, by any number of threads. ``label`` names them in messages (a path, mostly).

    A protocol, because bytes are in files, in memory, in verified durable snapshots and in a daemon's slots.
    """

    @property
    def label(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes that there are."""

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill ``out`` (contiguous writable bytes) from byte ``begin`` on; CorruptionError where that fails."""


class FileSource:
    """One file; its size is taken when it is first asked for. Equal when the paths are."""

    __slots__ = ("_size", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._size = -1

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        if self._size < 0:
            try:
                self._size = os.stat(self.path).st_size
            except OSError as error:
                raise CorruptionError(f"{self.path} cannot be read: {error.strerror}") from error
        return self._size

    def read_into(self, begin: int, out: memoryview) -> None:
        at = 0
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while at < out.nbytes:
                    count = os.preadv(fd, [out[at:]], begin + at)
                    if not count:
                        raise CorruptionError(
                            f"{self.path} ends at byte {begin + at}, but bytes [{begin}, {begin + out.nbytes}) are "
                            "needed: it was cut short; copy it again, or take an older checkpoint"
                        )
                    at += count
            finally:
                os.close(fd)
        except OSError as error:
            raise CorruptionError(f"{self.path} cannot be read at byte {begin + at}: {error.strerror}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileSource) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"FileSource({str(self.path)!r})"


class BytesSource:
    """Bytes in memory: scalars, and what stood inside a pickle."""

    __slots__ = ("data", "label")

    def __init__(self, data: bytes, label: str = "memory") -> None:
        self.data = data
        self.label = label

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, begin: int, out: memoryview) -> None:
        if not 0 <= begin <= begin + out.nbytes <= len(self.data):
            raise CorruptionError(
                f"{self.label} has {len(self.data)} bytes, but [{begin}, {begin + out.nbytes}) are needed"
            )
        out[:] = self.data[begin : begin + out.nbytes]


def read_bytes(source: Source, begin: int, nbytes: int) -> bytes:
    """Return ``nbytes`` bytes of ``source``; checks its size first, so that a length that lies allocates nothing."""
    if begin < 0 or nbytes < 0 or begin + nbytes > source.size:
        raise CorruptionError(
            f"{source.label} has {source.size} bytes, but [{begin}, {begin + nbytes}) are needed: it was cut short"
        )
    data = bytearray(nbytes)
    source.read_into(begin, memoryview(data))
    return bytes(data)
