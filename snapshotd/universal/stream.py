"""
The streaming engine: views go into files by slabs, with bounded memory, several threads, digests, and a way to go on.

Rule 1: a file is written under a temporary name and gets its own when all of it is there. Nothing else is written but
the journal, which is removed at the end; the bytes of tensors are never copied to another place on disk.
Rule 2: memory is one slab per thread, and some scratch: ``memory_bytes`` says how many threads there may be.
Rule 3: the journal says which tensors are complete, with their digests. When an interrupted run goes on, it believes
nothing: it reads those bytes again, and takes them only if the digest is the one in the journal. It writes nothing that
is there already.
Rule 4: files are not synced to the disk: like ``cp``. Whoever reads, verifies; the marker's digests tell what is torn.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from snapshotd.errors import BudgetError, UsageError
from snapshotd.universal.derived import Sealed
from snapshotd.universal.views import View, slabs
from snapshotd.universal.words import word_dtype

__all__ = [
    "DEFAULT_MEMORY",
    "OutFile",
    "Placed",
    "Settings",
    "Written",
    "check_sealed",
    "digest_of",
    "write_files",
]

DEFAULT_MEMORY: Final = 512 << 20
"""Bytes that a conversion may use for its buffers, as ``--memory`` says it."""

JOURNAL: Final = ".snapshotd-convert.jsonl"
"""The name of the journal in the target directory, while a conversion runs."""

_SLAB_BYTES: Final = 2 << 20
"""Largest slab: more does not make the disk faster, and leaves the processor's cache."""

_GROUP_BYTES: Final = 8 << 20

_THREAD_BYTES: Final = 16 << 20
"""What a thread needs at most: its slab, and scratch for strided reads, casts and comparisons of copies."""

_FLUSH_BYTES: Final = 64 << 20
"""The journal is written out with each file, and after this many bytes of tensors: what an interruption may cost."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads, but never from two at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a conversion runs. ``threads`` 0: as many as there are cores, up to 4."""

    memory_bytes: int = DEFAULT_MEMORY
    threads: int = 0
    resume: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes < _THREAD_BYTES:
            raise UsageError(f"--memory: {_THREAD_BYTES >> 20} MiB are the least, not {self.memory_bytes} bytes")
        if self.threads < 0:
            raise UsageError(f"--threads: {self.threads} is no number of threads")

    @property
    def num_threads(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(self.threads or min(4, cores), self.memory_bytes // _THREAD_BYTES))


@dataclass(frozen=True, slots=True)
class Placed:
    """A view's place in a file: row-major from byte ``offset`` on. ``key`` names it within the file."""

    key: str
    view: View
    offset: int


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of one Placed. ``crc`` is zlib's, or 0 where the file did not ask for it."""

    digest: str
    crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutFile:
    """
    A file to write: ``name`` in the target directory, its size, fixed bytes (``blocks``: offset and bytes), tensors.

    ``finish``: gives further blocks once all tensors are written (a zip's directory has their checksums).
    """

    name: str
    nbytes: int
    blocks: Sequence[tuple[int, bytes]]
    tensors: Sequence[Placed]
    crc: bool = False
    finish: Callable[[dict[str, Written]], Sequence[tuple[int, bytes]]] | None = field(default=None, compare=False)


def digest_of(view: View, slab_bytes: int = _SLAB_BYTES) -> str:
    """Return ``xxh3_128:`` and the digest of a view's bytes in row-major order."""
    buffer = np.empty(max(view.itemsize, min(slab_bytes, view.nbytes)), np.uint8)
    state = xxhash.xxh3_128()
    for at, lengths in slabs(view.shape, view.itemsize, slab_bytes):
        state.update(_read(view, at, lengths, buffer))
    return f"xxh3_128:{state.hexdigest()}"


def write_files(
    target: Path, files: Sequence[OutFile], settings: Settings, *, identity: str, journal: str = JOURNAL
) -> dict[str, dict[str, Written]]:
    """
    Write ``files`` into the directory ``target`` and return {file: {key: Written}}.

    ``identity`` names the work (and behind a space, in words): an interrupted run goes on only if it is the same.
    UsageError when the directory holds something else (or, with a ``journal`` of its own name, one of the files), and
    when it holds an interrupted run and ``settings.resume`` is not set.
    """
    if target.is_symlink() and not target.exists():
        raise UsageError(f"{target} is a link to nowhere: choose another target, or remove it")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is there, and is no directory: choose another target, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    there = {entry.name for entry in target.iterdir()} - {journal}
    if journal != JOURNAL:
        there &= {file.name for file in files}
    record = _Journal(target / journal, identity, settings.resume, sorted(there))
    try:
        check_sealed(_read_in_parts(files), settings.num_threads)
        return _Run(target, files, settings, record).run()
    finally:
        record.close()


def check_sealed(views: Iterable[View], threads: int) -> None:
    """Read those that have a digest, and compare. CorruptionError."""
    sealed = [view for view in views if isinstance(view, Sealed)]
    with ThreadPoolExecutor(threads, "snapshotd-verify") as pool:
        for view, digest in zip(sealed, pool.map(digest_of, sealed), strict=True):
            view.expect(digest)


def _read_in_parts(files: Sequence[OutFile]) -> list[View]:
    """All views that are read, but not as a whole: whoever writes a whole one compares its digest on the way."""
    found: dict[int, View] = {}
    todo = [inner for file in files for placed in file.tensors for inner in placed.view.inner()]
    while todo:
        view = todo.pop()
        if id(view) not in found:
            found[id(view)] = view
            todo += view.inner()
    return list(found.values())


def unwritable(path: Path, error: OSError) -> UsageError:
    """Return what to raise where ``path`` cannot be written: BudgetError when there is no room."""
    kind = BudgetError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
    return kind(f"{path} cannot be written: {error.strerror}; --resume goes on when that is mended")


def remove_journal(target: Path) -> None:
    """Say that the work in ``target`` is done: after the marker was written."""
    (target / JOURNAL).unlink(missing_ok=True)


class _Journal:
    """One JSON line per complete tensor, after a first line with the identity."""

    def __init__(self, path: Path, identity: str, resume: bool, others: Sequence[str]) -> None:
        self.path = path
        self.done: dict[tuple[str, str], Written] = {}
        self._lock = threading.Lock()
        self._unflushed = 0
        target = path.parent
        if self.path.exists():
            if not resume:
                raise UsageError(f"{target} holds an interrupted conversion: go on with --resume, or remove it")
            self._load(identity)
        elif others:
            raise UsageError(f"{target} already holds {', '.join(others[:3])}: choose another target, or remove it")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        if not self._file.tell():
            self._file.write(json.dumps({"identity": identity}) + "\n")
            self._file.flush()

    def add(self, file: str, key: str, written: Written, nbytes: int) -> None:
        line = json.dumps({"file": file, "key": key, "digest": written.digest, "crc": written.crc})
        with self._lock:
            self._file.write(line + "\n")
            self._unflushed += nbytes
            if self._unflushed >= _FLUSH_BYTES:
                self._file.flush()
                self._unflushed = 0

    def flush(self) -> None:
        with self._lock:
            self._file.flush()
            self._unflushed = 0

    def close(self) -> None:
        self._file.close()

    def _load(self, identity: str) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} cannot be read: remove {self.path.parent} and start anew") from error
        for i, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if i == 0 and entry["identity"] != identity:
                    words = str(entry["identity"]).partition(" ")[2] or "something else"
                    raise UsageError(
                        f"{self.path.parent} holds an interrupted conversion of {words}, as it was then, or with other "
                        "options: give the same ones, or remove it"
                    )
                if i:
                    written = Written(str(entry["digest"]), int(entry["crc"]))
                    self.done[str(entry["file"]), str(entry["key"])] = written
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the run was interrupted


class _Run:
    """One call of write_files. Files are opened when their first tensor's turn comes, and closed with their last."""

    def __init__(self, target: Path, files: Sequence[OutFile], settings: Settings, journal: _Journal) -> None:
        self.settings, self.journal = settings, journal
        self.total = sum(placed.view.nbytes for file in files for placed in file.tensors)
        self.done_bytes = 0
        self.lock = threading.Lock()
        self.stopped = False
        self.buffers = threading.local()
        self.files = [_File(target, file) for file in files]

    def run(self) -> dict[str, dict[str, Written]]:
        try:
            with ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="convert") as pool:
                tasks = [(file, group) for file in self.files for group in _groups(file.plan.tensors)]
                futures = [pool.submit(self._tensors, file, group) for file, group in tasks]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                except BaseException:
                    self.stopped = True
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for file in self.files:
                file.close()
        return {file.plan.name: file.written for file in self.files}

    def _tensors(self, file: _File, group: Sequence[Placed]) -> None:
        if not self.stopped:
            file.open()
        for placed in group:
            if self.stopped:
                return
            known = self.journal.done.get((file.plan.name, placed.key))
            written = known if known is not None and self._is_there(file, placed, known) else None
            if written is None:
                written = self._copy(file, placed)
                self.journal.add(file.plan.name, placed.key, written, placed.view.nbytes)
            file.add(placed.key, written)
        if not self.stopped and file.is_whole:
            self.journal.flush()  # first: a finished file that nobody knows of would be written again
            file.complete()

    def _copy(self, file: _File, placed: Placed) -> Written:
        view, offset = placed.view, placed.offset
        state, crc = xxhash.xxh3_128(), 0
        buffer = self._buffer()
        file.take_back()
        for at, lengths in slabs(view.shape, view.itemsize, _SLAB_BYTES):
            if self.stopped:
                raise UsageError("the conversion was stopped")
            data = _read(view, at, lengths, buffer)
            state.update(data)
            if file.plan.crc:
                crc = zlib.crc32(data, crc)
            file.write(offset, data)
            offset += data.nbytes
            self._advance(data.nbytes)
        digest = f"xxh3_128:{state.hexdigest()}"
        if isinstance(view, Sealed):
            view.expect(digest)
        return Written(digest, crc)

    def _is_there(self, file: _File, placed: Placed, known: Written) -> bool:
        state = xxhash.xxh3_128()
        buffer = memoryview(self._buffer())
        end = placed.offset + placed.view.nbytes
        for begin in range(placed.offset, end, _SLAB_BYTES):
            part = buffer[: min(_SLAB_BYTES, end - begin)]
            if file.read(begin, part) != part.nbytes:
                return False
            state.update(part)
        if f"xxh3_128:{state.hexdigest()}" != known.digest:
            return False
        self._advance(placed.view.nbytes)
        return True

    def _advance(self, nbytes: int) -> None:
        if self.settings.progress is not None:
            with self.lock:
                self.done_bytes += nbytes
                self.settings.progress(self.done_bytes, self.total)

    def _buffer(self) -> Any:
        if not hasattr(self.buffers, "slab"):
            self.buffers.slab = np.empty(max(_SLAB_BYTES, 16), np.uint8)
        return self.buffers.slab


class _File:
    """
    A file on its way: under its temporary name until it is whole.

    One that an interrupted run finished keeps its final name, and is only read, unless something in it is not as the
    journal says: then it is taken back, and mended like one that was not finished.
    """

    def __init__(self, target: Path, plan: OutFile) -> None:
        self.plan = plan
        self.written: dict[str, Written] = {}
        self._final = target / plan.name
        self._temporary = self._final.parent / f".{self._final.name}.part"
        self._lock = threading.RLock()
        self._fd = -1
        self._finished = False

    @property
    def is_whole(self) -> bool:
        return len(self.written) == len(self.plan.tensors)

    def open(self) -> None:
        """Open it, or make it, unless that was done; its fixed bytes are in it then."""
        with self._lock:
            if self._fd >= 0:
                return
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._finished = self._final.exists() and not self._temporary.exists()
            path = self._final if self._finished else self._temporary
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._fd).st_size != self.plan.nbytes:
                self.take_back()
                os.ftruncate(self._fd, self.plan.nbytes)
            self._put(self.plan.blocks)

    def add(self, key: str, written: Written) -> None:
        with self._lock:
            self.written[key] = written

    def complete(self) -> None:
        """Give it its final name: all tensors are there. Nothing happens when that was done."""
        with self._lock:
            if self._fd < 0:
                return
            if self.plan.finish is not None:
                self._put(self.plan.finish(self.written))
            if not self._finished:
                os.rename(self._temporary, self._final)
            self.close()

    def take_back(self) -> None:
        """A file that was finished is not: it is about to be written to."""
        with self._lock:
            if self._finished:
                os.rename(self._final, self._temporary)
                self._finished = False

    def read(self, offset: int, out: memoryview) -> int:
        return os.preadv(self._fd, [out], offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            while rest.nbytes:
                count = os.pwrite(self._fd, rest, offset)
                offset += count
                rest = rest[count:]
        except OSError as error:
            raise unwritable(self._final, error) from error

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _put(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        for offset, data in blocks:
            if self._finished and os.pread(self._fd, len(data), offset) == data:
                continue
            self.take_back()
            self.write(offset, data)


def _groups(tensors: Sequence[Placed]) -> list[list[Placed]]:
    """
    Many small tensors go together: a task costs as much as copying some 50 KB. Large ones come first, so that all
    threads end at about the same time. A file without tensors has one empty group.
    """
    groups: list[list[Placed]] = []
    nbytes = 0
    for placed in sorted(tensors, key=lambda placed: -placed.view.nbytes):
        if not groups or nbytes + placed.view.nbytes > _GROUP_BYTES or len(groups[-1]) >= 256:
            groups.append([])
            nbytes = 0
        groups[-1].append(placed)
        nbytes += placed.view.nbytes
    return groups or [[]]


def _read(view: View, at: tuple[int, ...], lengths: tuple[int, ...], buffer: Any) -> memoryview:
    """Return the bytes of a box that is contiguous in row-major order, in ``buffer``."""
    nbytes = view.itemsize
    for length in lengths:
        nbytes *= length
    words = buffer[:nbytes].view(word_dtype(view.dtype)).reshape(lengths)
    view.read_into(at, words)
    return memoryview(buffer[:nbytes])
