"""
Files of an arena, mapped: slots, parity, and buffers for restores.

Rule 1: a file's memory is all there before anybody gets it (fallocate), so that a full tmpfs is an error here
        and never a SIGBUS in a worker that writes through its mapping. So is that of its record: whoever fills the
        tmpfs later does not keep steps from being sealed.
Rule 2: the fields of these objects change under their arena's lock only; ``view`` is anybody's.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar

from snapshotd.arena.keys import KeyId, ref_key
from snapshotd.errors import BudgetError, FormatError, LocalProtocolError, UsageError
from snapshotd.layout import digest
from snapshotd.mapping import map_file, map_new_file
from snapshotd.sizes import format_bytes
from snapshotd.v1.control_pb2 import ParityRef, SlotRef

__all__ = [
    "AnyFile",
    "BufferFile",
    "Outcome",
    "ParityFile",
    "SealableFile",
    "SlotFile",
    "State",
    "check_header",
    "check_private",
    "create_file",
    "draft_path",
    "open_file",
    "seal_key",
]

Outcome = Literal["pool", "delete"]

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
RefT = TypeVar("RefT", SlotRef, ParityRef)


class State(enum.Enum):
    """
    Where a file is in its life.

    OPEN: its owner may write. SEALED: it has a record and can be found. POOLED: free, to be taken again.
    DOOMED: gone for its owner, but somebody still reads. GONE: unlinked and unmapped.
    """

    OPEN = "open"
    SEALED = "sealed"
    POOLED = "pooled"
    DOOMED = "doomed"
    GONE = "gone"


class _MappedFile:
    """A file and its mapping. ``cost_bytes`` is what it counts in the arena's budget: whole pages."""

    kind: Literal["slot", "parity", "buffer"]

    def __init__(self, file_id: int, path: Path, file_bytes: int, view: memoryview | None, cost_bytes: int) -> None:
        self.file_id = file_id
        self.path = path
        self.file_bytes = file_bytes
        self.cost_bytes = cost_bytes
        self.view: memoryview = memoryview(bytearray()) if view is None else view
        self.state = State.OPEN
        self.num_leases = 0
        self.outcome: Outcome = "delete"
        self.key: KeyId | None = None

    @cached_property
    def record_path(self) -> Path:
        """Where the seal record of this file is, if it has one."""
        return self.path.with_suffix(".rec")

    @cached_property
    def draft_path(self) -> Path:
        """Where its record is written before it has its name, and where the memory for it is kept."""
        return draft_path(self.path)

    def unseal(self) -> None:
        """Take the record away; its memory is kept for the next one."""
        with suppress(FileNotFoundError):
            os.replace(self.record_path, self.draft_path)

    def unlink(self) -> None:
        """Remove the file and the memory that was kept for its record."""
        self.path.unlink(missing_ok=True)
        self.draft_path.unlink(missing_ok=True)

    @property
    def sealed(self) -> bool:
        """Whether the file has a record and can be found by its key."""
        return self.state is State.SEALED

    def unmap(self) -> None:
        """Give the memory back; when slices of ``view`` are still held somewhere, the last one to go does it."""
        with suppress(BufferError):  # an array shows it: then the mapping ends with the array
            self.view.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path.name} {self.file_bytes} bytes {self.state.value}>"


class _SealableFile(_MappedFile, Generic[RefT]):
    """A file that can be sealed: ``ref`` and ``digests`` (8 bytes a chunk) are known then."""

    ref: RefT | None = None
    digests: bytes | None = None

    @property
    def root(self) -> str:
        """The root digest, "" while unsealed."""
        return "" if self.ref is None or self.digests is None else self.ref.root_digest


class SlotFile(_SealableFile[SlotRef]):
    """One rank's snapshot of one step. ``ref`` and ``digests`` are None until it is sealed."""

    kind = "slot"
    job = ""

    @property
    def slot_id(self) -> int:
        """The number that names this file; never given twice, not by a later daemon either."""
        return self.file_id


class ParityFile(_SealableFile[ParityRef]):
    """Parity of one position of a stripe set. ``digests`` is None until it is sealed."""

    kind = "parity"


class BufferFile(_MappedFile):
    """Memory for bytes on their way to a restoring worker. Never sealed, never found again."""

    kind = "buffer"


SealableFile = SlotFile | ParityFile
AnyFile = SlotFile | ParityFile | BufferFile


def draft_path(path: Path) -> Path:
    """Return where the record of the file at ``path`` is written before it has its name."""
    return path.with_suffix(".rec.tmp")


def create_file(path: Path, nbytes: int, *, record_bytes: int = 0) -> memoryview | None:
    """
    Create ``path`` (0600) with all its memory, and return it mapped and populated; None for no bytes.

    ``record_bytes`` of memory for its record are taken too. BudgetError when the memory is not there; then there is no
    file either. What was in the memory is zeros.
    """
    draft = draft_path(path)
    descriptor = os.open(path, _CREATE, 0o600)
    try:
        if record_bytes:
            _allocate(draft, record_bytes)
        if nbytes == 0:
            return None
        return map_new_file(descriptor, nbytes)
    except BaseException as error:
        path.unlink(missing_ok=True)
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise BudgetError(
                f"{format_bytes(nbytes)} ({nbytes} bytes) could not be allocated in {path.parent}: {error.strerror}"
            ) from error
        raise
    finally:
        os.close(descriptor)


def _allocate(path: Path, nbytes: int) -> None:
    descriptor = os.open(path, _CREATE, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    finally:
        os.close(descriptor)


def open_file(path: Path, nbytes: int) -> memoryview | None:
    """
    Return the existing file mapped and populated; None for no bytes.

    FormatError unless it is a regular file of ours, private, with exactly ``nbytes`` and no second name. OSError when
    the machine cannot map it: then nothing is wrong with the file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        check_private(descriptor, path.name)
        status = os.fstat(descriptor)
        if status.st_size != nbytes:
            raise FormatError(f"{path.name} has {status.st_size} bytes, its record says {nbytes}")
        return map_file(descriptor, nbytes) if nbytes else None
    finally:
        os.close(descriptor)


def check_private(descriptor: int, name: str) -> None:
    """Raise FormatError unless the open file is a regular one of ours, with one name and no access for others."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{name} is no regular file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or status.st_nlink != 1:
        raise FormatError(
            f"{name} is not private: user {status.st_uid}, mode {status.st_mode & 0o777:04o}, {status.st_nlink} names"
        )


def check_header(header: bytes, file_bytes: int) -> None:
    """Raise UsageError for a header that is longer than its file."""
    if len(header) > file_bytes:
        raise UsageError(f"a header of {len(header)} bytes does not fit into a slot of {file_bytes}")


def seal_key(obj: SealableFile, ref: SlotRef | ParityRef, digests: bytes) -> KeyId:
    """Return the key to seal under. LocalProtocolError when file, reference and digests do not belong together."""
    if isinstance(obj, SlotFile) is not isinstance(ref, SlotRef):
        raise LocalProtocolError(f"{obj!r} cannot be sealed as a {type(ref).__name__}")
    if ref.file_bytes != obj.file_bytes:
        raise LocalProtocolError(f"{obj!r} cannot be sealed as {ref.file_bytes} bytes")
    if len(digests) != digest.chunk_count(obj.file_bytes) * digest.DIGEST_BYTES:
        raise LocalProtocolError(f"{obj!r} cannot be sealed with {len(digests)} bytes of digests")
    if ref.root_digest != digest.root_digest(digests):
        raise LocalProtocolError(f"{obj!r} cannot be sealed: the root digest is not that of its chunks")
    return ref_key(ref)
