"""
Writing durable snapshots, so that a crash at any instant leaves whole snapshots or nothing that anybody reads.

Rule 1: each file is written under a temporary name, fsynced, renamed, and its directory fsynced.
Rule 2: the marker comes last, and goes first when a snapshot is removed.
Rule 3: only what this format names is ever deleted. A directory that holds anything else stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
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
    snapshot_directory_name,
    snapshot_of_directory_name,
)
from snapshotd.durable.reader import open_snapshot, read_marker
from snapshotd.errors import CorruptionError, FormatError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.v1 import control_pb2 as control

__all__ = [
    "RankWriter",
    "make_directories",
    "prune",
    "remove_temporaries",
    "snapshot_path",
    "write_atomic",
    "write_marker",
]

_OURS: Final = re.compile(r"(rank-[0-9]{6,}\.(safetensors|json)|snapshot\.json)(\.[0-9a-f]{16}\.tmp)?\Z")


def snapshot_path(root: str | os.PathLike[str], job: str, epoch: int, step: int) -> Path:
    """Return where a snapshot is, or will be, under ``root``."""
    return Path(root) / job_directory_name(job) / snapshot_directory_name(epoch, step)


def make_directories(path: Path, *, below: Path) -> None:
    """Create ``path`` and its parents up to ``below``, which is created too; each name is durable on return."""
    missing = [path, *(parent for parent in path.parents if parent == below or below in parent.parents)]
    for directory in reversed(missing):
        # Several nodes write to the same place: whoever comes second finds it made.
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700, parents=directory == below)
        fsync_directory(directory.parent)


class RankWriter:
    """
    Writes one rank's file and JSON into a snapshot directory.

    ``write`` the bytes in order, then ``finish``; leaving the ``with`` block before that removes the temporary file.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._file = _AtomicFile(directory / rank_file_name(rank))

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def written(self) -> int:
        return self._file.written

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def finish(self, record: RankRecord) -> None:
        """Give the file its name, and write its JSON. The caller has verified the bytes against the record."""
        if self._file.written != record.slot.file_bytes or record.slot.rank != self._rank:
            raise CorruptionError(
                f"{self._file.path}: {self._file.written} bytes of rank {self._rank} were written, expected "
                f"{record.slot.file_bytes} bytes of rank {record.slot.rank}"
            )
        failpoint("persist.before_rename")
        self._file.commit()
        failpoint("persist.after_rename")
        write_atomic(self._directory / rank_record_name(self._rank), record.encode())

    def __enter__(self) -> RankWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.abandon()


def write_marker(directory: Path, marker: Marker) -> None:
    """Make ``directory`` a snapshot. All of its files are in place and durable before this is called."""
    failpoint("persist.before_marker")
    write_atomic(directory / MARKER_NAME, marker.encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file: after a crash it is there with all of ``data``, or it is as it was before."""
    file = _AtomicFile(path)
    try:
        file.write(memoryview(data))
        file.commit()
    finally:
        file.abandon()


def prune(
    root: str | os.PathLike[str],
    job: str,
    *,
    keep: int,
    written: tuple[int, int],
    note: Callable[[str], None] = lambda text: None,
) -> list[control.DurableRef]:
    """
    Remove all whole snapshots of the job but the ``keep`` newest, and what crashes left that is older than ``written``.

    Newest is by (epoch, step). ``written``: the (epoch, step) that was just written; it is never removed. Newer
    directories without a marker may be in the making: they stay. So do directories whose marker is there and not
    understood, which may be another version's. ``note`` hears what could not be removed; that is no error.

    Returns the whole snapshots that were removed.
    """
    if keep < 1:
        raise UsageError(f"the number of durable snapshots to keep must be at least 1, not {keep}")
    base = Path(root) / job_directory_name(job)
    whole: dict[tuple[int, int], control.DurableRef] = {}
    leftovers: list[Path] = []
    with os.scandir(base) as entries:
        children = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in children:
        named = snapshot_of_directory_name(name)
        if named is None or named == written:
            continue
        if not os.path.lexists(base / name / MARKER_NAME):
            if named < written:
                leftovers.append(base / name)
            continue
        try:
            marker = read_marker(base / name)
            if (marker.job, marker.epoch, marker.step) != (job, *named):
                raise FormatError(f"the marker says step {marker.step} of epoch {marker.epoch} of job {marker.job!r}")
            whole[named] = open_snapshot(base / name).ref
        except FormatError as error:
            note(f"{base / name} is left alone: {error}")
    removed: list[control.DurableRef] = []
    newest = sorted([*whole, written], reverse=True)[:keep]
    for named, ref in sorted(whole.items()):
        if named not in newest and _remove_snapshot(Path(ref.path), note):
            removed.append(ref)
    for path in leftovers:
        _remove_snapshot(path, note)
    return removed


def remove_temporaries(directory: Path) -> None:
    """Remove what interrupted attempts left in a snapshot directory. Nobody may be writing to it."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".tmp") and _OURS.match(entry.name)]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / name)


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _AtomicFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, 0o600)

    def write(self, data: memoryview) -> None:
        at = 0
        while at < data.nbytes:
            with data[at:] as rest:
                at += os.write(self._fd, rest)
        self.written += data.nbytes

    def commit(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.rename(self._temporary, self.path)
        fsync_directory(self.path.parent)

    def abandon(self) -> None:
        """Remove the temporary file, unless it was committed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)


def _remove_snapshot(path: Path, note: Callable[[str], None]) -> bool:
    """Remove a snapshot directory, marker first. True if it is not a snapshot any more."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path / MARKER_NAME)
            fsync_directory(path)
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if _OURS.match(entry.name)]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path / name)
        os.rmdir(path)
    except OSError as error:
        note(f"{path} could not be removed altogether: {error.strerror}")
    return not os.path.lexists(path / MARKER_NAME)
