"""
Seal a slot: hash what the worker has written, and write the record that makes it count.

Rule 1: the header is hashed too, and must be the one that was registered: a worker that scribbled over it has written
something else than it said.
Rule 2: the data digest leaves out the step's own JSON. Two successive steps with the same one have the same tensors.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import xxhash

from snapshotd.arena import Arena, SlotFile
from snapshotd.daemon.cancel import check_cancel
from snapshotd.errors import CorruptionError, FormatError
from snapshotd.failpoints import failpoint
from snapshotd.layout import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    KnownDigests,
    Layout,
    chunk_count,
    chunk_digests,
    header_length,
    root_digest,
)
from snapshotd.v1 import control_pb2 as control

__all__ = ["DigestsInPassing", "SealedSlot", "digests_of", "seal_slot"]

_PART_DIGESTS_BYTES: Final = 512 * DIGEST_BYTES
"""Of what one thread hashes at a time, 64 MiB: less is not worth another thread, which takes some 0.1 ms."""

_MAX_THREADS: Final = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Of one slot. A node with accelerators has cores to spare, and steps shorter than what one core takes to hash them."""

_MAX_LAYOUTS: Final = 64
_meta_begins: Final[dict[tuple[str, int], int]] = {}
"""Where the step's own JSON begins, by the layout's hash and the size of the file: layouts are stable from step to
step, and parsing one of 10,000 tensors takes longer than hashing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSlot:
    """A slot that counts from now on. ``ref`` has its root digest; ``digests`` are those of its chunks."""

    ref: control.SlotRef
    data_digest: str
    digests: bytes
    seconds: float


def seal_slot(
    arena: Arena,
    slot: SlotFile,
    ref: control.SlotRef,
    cancel: threading.Event | None = None,
    known: Sequence[KnownDigests] = (),
) -> SealedSlot:
    """
    Hash what is not ``known`` of the open ``slot``, and write its record; ``ref`` lacks the root digest.

    CorruptionError when the header is not the registered one, the size is not, or chunks are known that there are not;
    the slot stays open then.
    """
    began = time.monotonic()
    failpoint("daemon.before_hash")
    if slot.file_bytes != ref.file_bytes:
        raise CorruptionError(f"the slot has {slot.file_bytes} bytes, but {ref.file_bytes} were to be sealed")
    meta_begin = _check_header(slot.view, ref)
    digests = digests_of(slot.view, slot.file_bytes, cancel, known)
    sealed = control.SlotRef()
    sealed.CopyFrom(ref)
    sealed.root_digest = root_digest(digests)
    data_digest = _data_digest(slot.view, digests, meta_begin)
    failpoint("daemon.after_hash")
    arena.seal(slot, sealed, digests)
    return SealedSlot(ref=sealed, data_digest=data_digest, digests=digests, seconds=time.monotonic() - began)


def digests_of(
    view: memoryview,
    length: int,
    cancel: threading.Event | None = None,
    known: Sequence[KnownDigests] = (),
    *,
    max_threads: int = _MAX_THREADS,
) -> bytes:
    """
    Return the chunk digests of ``view[0:length]``, those that are not ``known`` computed; Cancelled soon after
    ``cancel`` is set. CorruptionError for known ones of chunks that there are not.
    """
    digests = bytearray(chunk_count(length) * DIGEST_BYTES)
    missing: list[tuple[int, int]] = []
    at = 0
    for first, found in sorted(known):
        begin, end = first * DIGEST_BYTES, first * DIGEST_BYTES + len(found)
        if begin < at or end > length // CHUNK_BYTES * DIGEST_BYTES or end % DIGEST_BYTES:
            raise CorruptionError(
                f"the worker sent {len(found)} bytes of digests from chunk {first} on, of a slot of {length} bytes"
            )
        digests[begin:end] = found
        missing.append((at, begin))
        at = end
    missing.append((at, len(digests)))
    parts = [
        (begin, min(begin + _PART_DIGESTS_BYTES, end))
        for first, end in missing
        for begin in range(first, end, _PART_DIGESTS_BYTES)
    ]

    def add(part: tuple[int, int]) -> None:
        begin, end = (position // DIGEST_BYTES * CHUNK_BYTES for position in part)
        digests[slice(*part)] = _digests_between(view, begin, min(end, length), cancel)

    threads = min(max_threads, sum(end - begin for begin, end in parts) // _PART_DIGESTS_BYTES)
    if threads <= 1:
        for part in parts:
            add(part)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="snapshotd-digest") as pool:
            for _ in pool.map(add, parts):
                pass
    return bytes(digests)


def _digests_between(view: memoryview, begin: int, end: int, cancel: threading.Event | None) -> bytes:
    """``begin`` is where a chunk begins."""
    with view[begin:end] as part:
        return chunk_digests(part, part.nbytes, cold=True, between=lambda: check_cancel(cancel, "hashing"))


class DigestsInPassing:
    """
    The chunk digests of a file that is being written: of what was just written, while it is in the cache.

    Any number of threads may write, to chunks of their own.
    """

    def __init__(self, view: memoryview, file_bytes: int) -> None:
        self._view = view
        self._file_bytes = file_bytes
        self._digests = bytearray(chunk_count(file_bytes) * DIGEST_BYTES)
        self._known = bytearray(chunk_count(file_bytes))

    def wrote(self, begin: int, end: int) -> None:
        """Bytes ``[begin, end)`` of the file are there and stay: digest the whole chunks among them."""
        first, last = chunk_count(begin), end // CHUNK_BYTES
        if first < last:
            with self._view[first * CHUNK_BYTES : last * CHUNK_BYTES] as part:
                self._digests[first * DIGEST_BYTES : last * DIGEST_BYTES] = chunk_digests(part, part.nbytes)
            self._known[first:last] = b"\1" * (last - first)

    def finish(self, cancel: threading.Event | None = None) -> bytes:
        """All bytes are there: digest what is left, and return the digests of all chunks."""
        at = -1
        while (at := self._known.find(0, at + 1)) >= 0:
            check_cancel(cancel, "hashing")
            with self._view[at * CHUNK_BYTES : min((at + 1) * CHUNK_BYTES, self._file_bytes)] as part:
                self._digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = chunk_digests(part, part.nbytes)
        return bytes(self._digests)


def _check_header(view: memoryview, ref: control.SlotRef) -> int:
    """Return where the step's own JSON begins."""
    try:
        length = header_length(view[:8])
    except FormatError as error:
        raise CorruptionError(f"the worker of rank {ref.rank} wrote over the slot's header: {error}") from error
    if length > view.nbytes or (got := xxhash.xxh3_128_hexdigest(view[:length])) != ref.layout_hash:
        got = got if length <= view.nbytes else f"of {length} bytes"
        raise CorruptionError(
            f"the worker of rank {ref.rank} wrote over the slot's header: it is {got}, expected {ref.layout_hash}"
        )
    begin = _meta_begins.get((ref.layout_hash, view.nbytes))
    if begin is None:
        if len(_meta_begins) >= _MAX_LAYOUTS:
            _meta_begins.clear()
        begin = Layout.parse(bytes(view[:length]), file_bytes=view.nbytes).meta[0]
        _meta_begins[ref.layout_hash, view.nbytes] = begin
    return begin


def _data_digest(view: memoryview, digests: bytes, meta_begin: int) -> str:
    """The digest over all chunks before the JSON, and over the bytes before it in the chunk where it begins."""
    whole = meta_begin // CHUNK_BYTES
    with view[whole * CHUNK_BYTES : meta_begin] as rest:
        tail = xxhash.xxh3_64_digest(rest)
    return root_digest(digests[: whole * DIGEST_BYTES] + tail)
