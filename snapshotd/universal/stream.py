"""
The streaming engine: views go into files by slabs, with bounded memory, several threads, digests, and a way to go on.

Rule 1: a file is written under a temporary name and gets its own when all of it is there. Nothing else is written but
the journal, which is removed at the end; the bytes of tensors are never copied to another place on disk.
Rule 2: memory is one slab per thread, and as much again for scratch: ``memory_bytes`` is shared out among the threads.
Rule 3: the journal says which tensors are complete, with their digests. When an interrupted run goes on, it believes
nothing: it reads those bytes again, and takes them only if the digest is the one in the journal.
Rule 4: files are not synced to the disk: like ``cp``. Whoever reads, verifies; the marker's digests tell what is torn.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.universal.views import View, slabs
from snapshotd.universal.words import word_dtype

__all__ = ["DEFAULT_MEMORY", "OutFile", "Placed", "Settings", "Written", "digest_of", "write_files"]

DEFAULT_MEMORY: Final = 512 << 20
"""Bytes that a conversion may use for its buffers, as ``--memory`` says it."""

JOURNAL: Final = ".snapshotd-convert.jsonl"
"""The name of the journal in the target directory, while a conversion runs."""

_SLAB_BYTES: Final = 8 << 20
"""Largest slab: more does not make the disk faster, and leaves the cache."""

_MIN_MEMORY: Final = 1 << 20

_FLUSH_BYTES: Final = 64 << 20
"""The journal goes to the disk after this many bytes of tensors: what an interruption may cost."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from several threads, but never from two at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a conversion runs. ``threads`` 0: as many as there are cores, up to 4."""

    memory_bytes: int = DEFAULT_MEMORY
    threads: int = 0
    resume: bool = False
    progress: Progress | None = None

    @property
    def num_threads(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, min(4, cores))

    @property
    def slab_bytes(self) -> int:
        if self.memory_bytes < _MIN_MEMORY:
            raise UsageError(f"a conversion needs at least {_MIN_MEMORY} bytes of memory, not {self.memory_bytes}")
        # A slab, scratch of a strided read, scratch of a cast, and what the copies of a merge need.
        return max(65536, min(_SLAB_BYTES, self.memory_bytes // (4 * self.num_threads)))


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

    ``identity`` names the work: an interrupted run goes on only if it is the same. UsageError when the directory holds
    something else (or, with a ``journal`` of its own name, one of the files), and when it holds an interrupted run and
    ``settings.resume`` is not set.
    """
    target.mkdir(parents=True, exist_ok=True)
    there = {entry.name for entry in target.iterdir()} - {journal}
    if journal != JOURNAL:
        there &= {file.name for file in files}
    record = _Journal(target / journal, identity, settings.resume, sorted(there))
    try:
        return _Run(target, files, settings, record).run()
    finally:
        record.close()


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
                    raise UsageError(
                        f"{self.path.parent} holds an interrupted conversion of something else, or with other "
                        "options: give the same ones, or remove it"
                    )
                if i:
                    written = Written(str(entry["digest"]), int(entry["crc"]))
                    self.done[str(entry["file"]), str(entry["key"])] = written
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the run was interrupted


class _Run:
    def __init__(self, target: Path, files: Sequence[OutFile], settings: Settings, journal: _Journal) -> None:
        self.target, self.files, self.settings, self.journal = target, files, settings, journal
        self.slab_bytes = settings.slab_bytes
        self.total = sum(placed.view.nbytes for file in files for placed in file.tensors)
        self.done_bytes = 0
        self.lock = threading.Lock()
        self.stopped = False
        self.buffers = threading.local()
        self.written: dict[str, dict[str, Written]] = {file.name: {} for file in files}
        self.left = {file.name: len(file.tensors) for file in files}

    def run(self) -> dict[str, dict[str, Written]]:
        opened: dict[str, int] = {}
        try:
            with ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="convert") as pool:
                futures = []
                for file in self.files:
                    fd = opened[file.name] = self._open(file)
                    for offset, data in file.blocks:
                        _write_at(fd, offset, data)
                    if not file.tensors:
                        self._complete(file, fd)
                    futures += [pool.submit(self._tensor, file, fd, group) for group in _groups(file.tensors)]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                except BaseException:
                    self.stopped = True
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for fd in opened.values():
                os.close(fd)
        return self.written

    def _open(self, file: OutFile) -> int:
        final, temporary = self.target / file.name, self._temporary(file)
        if final.exists() and not temporary.exists():
            # From a run that was interrupted later on. It is taken back, and its bytes are verified like all others.
            os.rename(final, temporary)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(fd, file.nbytes)
        return fd

    def _temporary(self, file: OutFile) -> Path:
        path = self.target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.parent / f".{path.name}.part"

    def _tensor(self, file: OutFile, fd: int, group: Sequence[Placed]) -> None:
        for placed in group:
            if self.stopped:
                return
            known = self.journal.done.get((file.name, placed.key))
            written = known if known is not None and self._is_there(fd, placed, known) else None
            if written is None:
                written = self._copy(file, fd, placed)
                self.journal.add(file.name, placed.key, written, placed.view.nbytes)
            with self.lock:
                self.written[file.name][placed.key] = written
                self.left[file.name] -= 1
                last = not self.left[file.name]
            if last:
                self._complete(file, fd)

    def _copy(self, file: OutFile, fd: int, placed: Placed) -> Written:
        view, offset = placed.view, placed.offset
        state, crc = xxhash.xxh3_128(), 0
        buffer = self._buffer()
        for at, lengths in slabs(view.shape, view.itemsize, self.slab_bytes):
            if self.stopped:
                raise UsageError("the conversion was stopped")
            data = _read(view, at, lengths, buffer)
            state.update(data)
            if file.crc:
                crc = zlib.crc32(data, crc)
            _write_at(fd, offset, data)
            offset += data.nbytes
            self._advance(data.nbytes)
        return Written(f"xxh3_128:{state.hexdigest()}", crc)

    def _is_there(self, fd: int, placed: Placed, known: Written) -> bool:
        state = xxhash.xxh3_128()
        buffer = memoryview(self._buffer())
        end = placed.offset + placed.view.nbytes
        for begin in range(placed.offset, end, self.slab_bytes):
            part = buffer[: min(self.slab_bytes, end - begin)]
            if os.preadv(fd, [part], begin) != part.nbytes:
                return False
            state.update(part)
        if f"xxh3_128:{state.hexdigest()}" != known.digest:
            return False
        self._advance(placed.view.nbytes)
        return True

    def _complete(self, file: OutFile, fd: int) -> None:
        if file.finish is not None:
            for offset, data in file.finish(self.written[file.name]):
                _write_at(fd, offset, data)
        os.rename(self._temporary(file), self.target / file.name)

    def _advance(self, nbytes: int) -> None:
        if self.settings.progress is not None:
            with self.lock:
                self.done_bytes += nbytes
                self.settings.progress(self.done_bytes, self.total)

    def _buffer(self) -> Any:
        if not hasattr(self.buffers, "slab"):
            self.buffers.slab = np.empty(max(self.slab_bytes, 16), np.uint8)
        return self.buffers.slab


def _groups(tensors: Sequence[Placed]) -> list[list[Placed]]:
    """Many small tensors go together: a task costs as much as copying some 50 KB."""
    groups: list[list[Placed]] = []
    nbytes = 0
    for placed in tensors:
        if not groups or nbytes + placed.view.nbytes > _SLAB_BYTES or len(groups[-1]) >= 256:
            groups.append([])
            nbytes = 0
        groups[-1].append(placed)
        nbytes += placed.view.nbytes
    return groups


def _read(view: View, at: tuple[int, ...], lengths: tuple[int, ...], buffer: Any) -> memoryview:
    """Return the bytes of a box that is contiguous in row-major order, in ``buffer``."""
    nbytes = view.itemsize
    for length in lengths:
        nbytes *= length
    words = buffer[:nbytes].view(word_dtype(view.dtype)).reshape(lengths)
    view.read_into(at, words)
    return memoryview(buffer[:nbytes])


def _write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    try:
        while rest.nbytes:
            count = os.pwrite(fd, rest, offset)
            offset += count
            rest = rest[count:]
    except OSError as error:
        raise CorruptionError(f"cannot write: {error.strerror}; --resume goes on when that is mended") from error
