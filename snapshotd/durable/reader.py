"""
Reading durable snapshots: what is there, and its bytes, each of them verified before it is given out.

Files are read by ``pread``, not mapped: a failing disk or a file that somebody cuts short is then an error with a name,
and not a SIGBUS that ends the daemon.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from snapshotd.durable.format import (
    MARKER_NAME,
    Marker,
    RankRecord,
    job_directory_name,
    rank_file_name,
    rank_record_name,
    read_json_file,
    snapshot_of_directory_name,
)
from snapshotd.errors import CorruptionError, FormatError, UsageError
from snapshotd.layout import CHUNK_BYTES, DIGEST_BYTES, Layout, chunk_digests, header_length, verify
from snapshotd.v1 import control_pb2 as control

__all__ = ["DurableSnapshot", "RankFile", "open_snapshot", "read_marker", "scan_durable"]

_READ_BYTES: Final = 32 * CHUNK_BYTES
"""4 MiB: few calls, and small enough to stay in the cache between reading and hashing."""


class RankFile:
    """
    One rank's file of a durable snapshot, open for reading. Any number of threads may read at once.

    CorruptionError or FormatError, naming the file, what was expected and what is there, for a file that is missing,
    cut short or changed.
    """

    def __init__(self, directory: Path, rank: int, marker: Marker) -> None:
        self.path = directory / rank_file_name(rank)
        record_path = directory / rank_record_name(rank)
        record = RankRecord.decode(read_json_file(record_path), str(record_path))
        self.slot = record.slot
        self.digests = record.chunk_digests
        self._chunk_bytes = record.chunk_bytes
        self._read_bytes = max(1, _READ_BYTES // self._chunk_bytes) * self._chunk_bytes
        self._check_record(record_path, marker, rank)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptionError(f"{self.path} cannot be opened: {error.strerror}") from error
        try:
            if (size := os.fstat(self._fd).st_size) != self.slot.file_bytes:
                raise CorruptionError(f"{self.path} has {size} bytes, expected {self.slot.file_bytes}")
            self.layout = self._read_layout()
        except BaseException:
            self.close()
            raise

    @property
    def file_bytes(self) -> int:
        return self.slot.file_bytes

    def read_into(self, begin: int, into: memoryview) -> None:
        """Fill ``into`` (writable bytes) with the file's bytes from ``begin`` on, verified."""
        end = begin + into.nbytes
        if not 0 <= begin <= end <= self.file_bytes:
            raise UsageError(f"[{begin}, {end}) is not inside the {self.file_bytes} bytes of {self.path}")
        chunk_bytes = self._chunk_bytes
        scratch: bytearray | None = None
        at = begin
        while at < end:
            first = at // chunk_bytes * chunk_bytes
            last = min(-(-min(end, first + self._read_bytes) // chunk_bytes) * chunk_bytes, self.file_bytes)
            if first == at and last <= end:
                with into[at - begin : last - begin] as part:
                    self._read_chunks(first, part)
                at = last
                continue
            if first == at and end - at > chunk_bytes:  # the whole chunks of it go straight to their place
                last = end // chunk_bytes * chunk_bytes
                with into[at - begin : last - begin] as part:
                    self._read_chunks(first, part)
                at = last
                continue
            last = min(first + chunk_bytes, self.file_bytes)
            scratch = scratch or bytearray(chunk_bytes)
            with memoryview(scratch)[: last - first] as whole:
                self._read_chunks(first, whole)
                stop = min(last, end)
                into[at - begin : stop - begin] = whole[at - first : stop - first]
            at = stop

    def read(self, begin: int, end: int) -> bytes:
        """Return the verified bytes ``[begin, end)``."""
        result = bytearray(max(end - begin, 0))
        self.read_into(begin, memoryview(result))
        return bytes(result)

    def verify(self, pace: Callable[[int], None] | None = None) -> int:
        """
        Read the whole file once, and return its bytes; CorruptionError for the first one that is wrong.

        ``pace`` is called with the bytes of each piece of some 4 MiB: it may sleep, show progress, or raise to stop.
        """
        buffer = memoryview(bytearray(min(self._read_bytes, self.file_bytes)))
        for begin in range(0, self.file_bytes, self._read_bytes):
            with buffer[: min(self._read_bytes, self.file_bytes - begin)] as part:
                self._read_chunks(begin, part)
                if pace is not None:
                    pace(part.nbytes)
        return self.file_bytes

    def meta(self) -> bytes:
        """Return the step's own JSON, without its padding."""
        return self.read(*self.layout.meta).rstrip(b" \0")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_chunks(self, begin: int, into: memoryview) -> None:
        """Read whole chunks and verify them."""
        at = 0
        while at < into.nbytes:
            try:
                with into[at:] as rest:
                    count = os.preadv(self._fd, [rest], begin + at)
            except OSError as error:
                raise CorruptionError(f"{self.path} cannot be read at {begin + at}: {error.strerror}") from error
            if not count:
                raise CorruptionError(f"{self.path} ends at {begin + at}, expected {self.file_bytes} bytes")
            at += count
        chunk_bytes = self._chunk_bytes
        wrong = verify(into, self.digests, begin, begin + into.nbytes, base=begin, chunk_bytes=chunk_bytes)
        if wrong:
            first = wrong[0] * chunk_bytes
            with into[first - begin : first - begin + chunk_bytes] as chunk:
                got = chunk_digests(chunk, chunk.nbytes, chunk_bytes)
            expected = self.digests[wrong[0] * DIGEST_BYTES : (wrong[0] + 1) * DIGEST_BYTES]
            raise CorruptionError(
                f"{self.path} was changed in bytes [{first}, {first + chunk_bytes}): "
                f"digest {got.hex()}, expected {expected.hex()}"
            )

    def _check_record(self, path: Path, marker: Marker, rank: int) -> None:
        entry, slot = marker.ranks[rank], self.slot
        for what, got, expected in (
            ("job", slot.job, marker.job),
            ("epoch", slot.epoch, marker.epoch),
            ("step", slot.step, marker.step),
            ("rank", slot.rank, rank),
            ("world_size", slot.world_size, marker.world_size),
            ("file_bytes", slot.file_bytes, entry.file_bytes),
            ("root_digest", slot.root_digest, entry.root_digest),
            ("layout_hash", slot.layout_hash, entry.layout_hash),
        ):
            if got != expected:
                raise FormatError(f"{path}: {what} is {got!r}, but the marker says {expected!r}")

    def _read_layout(self) -> Layout:
        if self.file_bytes < 8:
            raise FormatError(f"{self.path} has {self.file_bytes} bytes: too few for a slot file")
        length = header_length(self.read(0, 8))
        if length > self.file_bytes:
            raise FormatError(f"{self.path}: the header claims {length} bytes, but the file has {self.file_bytes}")
        layout = Layout.parse(self.read(0, length), file_bytes=self.file_bytes)
        if layout.hash != self.slot.layout_hash:
            raise FormatError(f"{self.path} has the layout {layout.hash}, expected {self.slot.layout_hash}")
        return layout


class DurableSnapshot:
    """A whole durable snapshot: its marker, and its ranks' files, opened when they are asked for."""

    def __init__(self, path: Path, marker: Marker) -> None:
        self.path = path
        self.marker = marker
        self._files: dict[int, RankFile] = {}
        self._lock = threading.Lock()

    @property
    def ref(self) -> control.DurableRef:
        marker = self.marker
        return control.DurableRef(
            job=marker.job, epoch=marker.epoch, step=marker.step, world_size=marker.world_size, path=str(self.path)
        )

    @property
    def world_size(self) -> int:
        return self.marker.world_size

    def rank_file(self, rank: int) -> RankFile:
        """Return the open file of a rank; the snapshot closes it."""
        if not 0 <= rank < self.world_size:
            raise UsageError(f"{self.path} has no rank {rank}; there are {self.world_size}")
        with self._lock:
            file = self._files.get(rank)
            if file is None:
                file = self._files[rank] = RankFile(self.path, rank, self.marker)
            return file

    def verify(self, pace: Callable[[int], None] | None = None) -> int:
        """Read everything once, and return the number of bytes; CorruptionError for the first one that is wrong."""
        return sum(self.rank_file(rank).verify(pace) for rank in range(self.world_size))

    def close(self) -> None:
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def __enter__(self) -> DurableSnapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_marker(path: Path) -> Marker:
    """Return the marker of the snapshot directory ``path``; FormatError where there is no valid one."""
    marker_path = path / MARKER_NAME
    return Marker.decode(read_json_file(marker_path), str(marker_path))


def open_snapshot(path: str | os.PathLike[str]) -> DurableSnapshot:
    """Open a snapshot directory. FormatError where there is no valid marker: then it is not a snapshot."""
    return DurableSnapshot(Path(path), read_marker(Path(path)))


def scan_durable(root: str | os.PathLike[str], job: str | None = None) -> list[control.DurableRef]:
    """
    Return the whole snapshots under ``root`` (of one job, or of all), ordered by job, epoch and step.

    Only the markers are read, not the bytes. What has no valid marker is left out: it is not a snapshot.
    """
    base = Path(root)
    names = [job_directory_name(job)] if job is not None else _directories(base)
    found: list[control.DurableRef] = []
    for name in names:
        for child in _directories(base / name):
            named = snapshot_of_directory_name(child)
            if named is None:
                continue
            with contextlib.suppress(FormatError):
                snapshot = open_snapshot(base / name / child)
                marker = snapshot.marker
                if (marker.epoch, marker.step) == named and job_directory_name(marker.job) == name:
                    found.append(snapshot.ref)
    return sorted(found, key=lambda ref: (ref.job, ref.epoch, ref.step))


def _directories(path: Path) -> list[str]:
    """The names of real directories in ``path``, none where it does not exist: links are not followed."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise
