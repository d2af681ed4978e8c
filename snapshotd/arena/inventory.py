"""
Record files on disk: how one appears, and what a restarted daemon makes of those that it finds.

Files with a valid record are attached, all others are deleted.
Nothing is trusted because it is there: type, owner, mode, number of names, length, checksum and sizes are checked
before a byte is mapped. Bytes themselves are checked later, at leisure, against the digests in the record.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapshotd.arena import records
from snapshotd.arena.budget import page_bytes
from snapshotd.arena.files import ParityFile, SealableFile, SlotFile, check_private, open_file
from snapshotd.errors import BudgetError, FormatError
from snapshotd.failpoints import failpoint
from snapshotd.v1.control_pb2 import ParityRef, SlotRef
from snapshotd.v1.record_pb2 import Record

__all__ = ["Found", "read_folder", "write_record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A file with a valid record."""

    obj: SlotFile | ParityFile
    ref: SlotRef | ParityRef
    digests: bytes
    sealed_at: float


def read_folder(folder: Path, kind: str) -> tuple[list[Found], list[tuple[str, str]]]:
    """
    Return what is valid in one of the arena's folders, and (name, reason) of everything else, which was deleted.

    BudgetError when a valid file cannot be mapped for lack of memory: it is left alone.
    """
    names = sorted(os.listdir(folder))
    found: list[Found] = []
    dropped: list[tuple[str, str]] = []
    used: set[str] = set()
    for name in names:
        path = folder / name
        if path.suffix != ".rec" or kind == "buffer":
            continue
        try:
            item = _attach(path, kind)
        except FormatError as error:
            dropped.append((name, str(error)))
            _remove(path)
            continue
        found.append(item)
        used |= {name, item.obj.path.name}
    for name in names:
        if name not in used and _remove(folder / name) and not name.endswith(".tmp"):  # a draft is nobody's loss
            dropped.append((name, "not sealed"))
    return found, dropped


def write_record(obj: SealableFile, data: bytes) -> None:
    """
    Let the record of a file appear whole, by rename, in the memory that its draft has. Syncing means nothing on tmpfs.

    BudgetError when it needs more, and there is none.
    """
    try:
        descriptor = os.open(obj.draft_path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)
        failpoint("arena.before_seal_record")
        os.rename(obj.draft_path, obj.record_path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise BudgetError(f"no memory for a record of {len(data)} bytes in {obj.path.parent}") from error
        raise


def _attach(record_path: Path, kind: str) -> Found:
    record = _read_record(record_path)
    if record.WhichOneof("body") != kind:
        raise FormatError(f"{record_path.name} is not the record of a {kind}")
    try:
        file_id = int(record_path.stem, 16)
    except ValueError:
        raise FormatError(f"{record_path.name} is not the name of a record") from None
    path = record_path.with_suffix(f".{kind}")
    if not 0 <= file_id < 1 << 63 or record_path.name != f"{file_id:016x}.rec":
        raise FormatError(f"{record_path.name} is not the name of a record")
    ref: SlotRef | ParityRef = record.slot if kind == "slot" else record.parity
    try:
        view = open_file(path, ref.file_bytes)
    except OSError as error:
        raise BudgetError(f"{path} is whole, but cannot be mapped: {error.strerror}") from error
    make = SlotFile if kind == "slot" else ParityFile
    obj = make(file_id, path, ref.file_bytes, view, page_bytes(ref.file_bytes))
    return Found(obj=obj, ref=ref, digests=record.chunk_digests, sealed_at=record.sealed_at)


def _read_record(path: Path) -> Record:
    """Return the record at ``path``, or FormatError. Nothing longer than RECORD_BYTES_MAX is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        check_private(descriptor, path.name)
        size = os.fstat(descriptor).st_size
        if size > records.RECORD_BYTES_MAX:
            raise FormatError(f"{path.name} of {size} bytes is longer than {records.RECORD_BYTES_MAX}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return records.decode(file.read(size))
    finally:
        os.close(descriptor)


def _remove(path: Path) -> bool:
    """Remove what must not be here; a directory that is not empty stays (we never made it). Returns whether it went."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        return True
    return False
