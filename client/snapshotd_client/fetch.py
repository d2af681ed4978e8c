"""
Boxes of a snapshot into tensors by way of the daemon, for what is not read past it (see direct): it is asked for in
batches, and copied from the daemon's files.

Rule 1: a batch has at most 16 MiB; a larger box is cut along its first dimension > 1. While one is copied, the daemon
gets the next ones ready; no thread waits for the others between two of them.
Rule 2: a tensor is filled only with bytes of its own dtype and of exactly its shape; the daemon has verified them.
Rule 3: an answer is checked (number of wants, ranges inside the files) before a byte of it is used.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import torch

from snapshotd.batches import batches
from snapshotd.errors import SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.layout import DTYPES
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.arrays import Array, carrier, view_of
from snapshotd_client.copying import split_by_bytes
from snapshotd_client.errors import RestoreError
from snapshotd_client.link import Link, Question
from snapshotd_client.placement import Piece
from snapshotd_client.readable import WHOLE_BYTES, ReadableFiles, populate

__all__ = ["BATCH_BYTES", "Entry", "Fetcher", "Manifest", "Want", "asked_for", "cut"]

BATCH_BYTES: Final = 16 * 1024 * 1024
"""Small enough for the cache, from where the daemon has put it; large enough that the round trip vanishes."""

_AHEAD: Final = 1
_AT_ONCE: Final = 2  # batches that are being copied
_POPULATE_BYTES: Final = 64 * 1024
_MAX_WANTS: Final = 2000  # in one batch: keeps its frame small
_ASK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the snapshot, as its manifest has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scope: str
    kind: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds for this rank. ``meta`` is the parsed JSON of the source rank."""

    source: dict[str, Any]
    tensors: dict[str, Entry]
    ties: dict[str, str]
    meta: dict[str, Any]

    def find(self, name: str) -> Entry | None:
        """Return the entry of ``name``, or of the tensor that it is an alias of."""
        return self.tensors.get(name) or self.tensors.get(self.ties.get(name, ""))


@dataclass(frozen=True, slots=True, eq=False)
class Want:
    """Box ``piece`` of tensor ``entry`` is to be copied into ``target``, a local tensor."""

    entry: Entry
    piece: Piece
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        return prod(self.piece.box.lengths) * DTYPES[self.entry.dtype].itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A want, its bytes in a file of the daemon's, and whether the pages of those have yet to be mapped."""

    want: Want
    source: Array
    is_cold: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Filling:
    """An answer of the daemon of ``session`` that is being copied."""

    ready: pb.RestoreReady
    session: int
    copies: list[Future[None]]


class Fetcher:
    """
    Gets wants filled, over as many connections as it takes, until ``deadline`` (of time.monotonic).

    threads: that copy at the same time. The daemon reads and verifies the next batches meanwhile.
    again: called on each new connection, before anything is asked there: a daemon that was started anew has to learn
    what is being restored.
    """

    def __init__(self, link: Link, deadline: float, threads: int, again: Callable[[], None]) -> None:
        self._link = link
        self._deadline = deadline
        self._threads = threads
        self._again = again
        self._session = link.session
        self._files = ReadableFiles()
        self.fetch_s = 0.0
        self.local_bytes = self.remote_bytes = self.decoded_bytes = 0

    def run(self, wants: Iterable[Want]) -> None:
        """Fill all ``wants``, in this order. RestoreError when the daemon cannot give them."""
        asked: deque[tuple[list[Want], Question]] = deque()
        filling: deque[_Filling] = deque()
        with ThreadPoolExecutor(self._threads, "snapshotd-fill") as copiers:
            left = batches((part for want in wants for part in cut(want)), BATCH_BYTES, _MAX_WANTS)
            batch = next(left, None)
            while batch or asked or filling:
                if batch and len(asked) <= _AHEAD:
                    asked.append((batch, self._begin(batch)))
                    batch = next(left, None)
                elif asked and len(filling) < _AT_ONCE:
                    filling.append(self._take(*asked.popleft(), copiers))
                else:
                    self._end(filling.popleft())
                    failpoint("client.mid_restore")

    def _take(self, batch: list[Want], question: Question, copiers: ThreadPoolExecutor) -> _Filling:
        ready, session = self._finish(batch, question)
        if ready.error:
            raise RestoreError(f"the daemon cannot give the state: {ready.error}")
        if not len(batch) == len(ready.files) == len(ready.offsets):
            raise RestoreError(f"the daemon answered {len(ready.files)} boxes where {len(batch)} were asked for")
        try:
            found = [
                _source_of(want, self._files.get(ready.paths[index]), offset)
                for want, index, offset in zip(batch, ready.files, ready.offsets, strict=True)
                if want.nbytes
            ]
        except (OSError, SnapshotdError, IndexError) as error:
            raise RestoreError(f"what the daemon gave cannot be read: {error}") from error
        return _Filling(ready, session, _fill(found, self._threads, copiers))

    def _end(self, filling: _Filling) -> None:
        for copy in filling.copies:
            copy.result()
        ready = filling.ready
        self._link.post(pb.Frame(restore_release=pb.RestoreRelease(batch_id=ready.batch_id)), filling.session)
        self.local_bytes += ready.local_bytes
        self.remote_bytes += ready.remote_bytes
        self.decoded_bytes += ready.decoded_bytes

    def _begin(self, batch: list[Want]) -> Question:
        return self._link.begin(pb.Frame(restore_want=pb.RestoreWant(boxes=asked_for(batch))))

    def _finish(self, batch: list[Want], question: Question) -> tuple[pb.RestoreReady, int]:
        """Return the answer and the session that it is of; asks again whenever the connection is lost."""
        begun = time.monotonic()
        try:
            while (left := self._deadline - time.monotonic()) > 0:
                answer = self._link.finish(question, left)
                if answer is not None:
                    if answer.WhichOneof("body") == "restore_ready":
                        return answer.restore_ready, question.session
                    raise RestoreError(f"the daemon cannot give the state: {answer.error.message or 'no answer'}")
                if self._link.wait_session(min(left, _ASK_S)):
                    session = self._link.session
                    if session != self._session:
                        self._again()
                        self._session = session
                    question = self._begin(batch)
                elif self._link.refused is not None:
                    raise RestoreError(f"the daemon refuses this worker: {self._link.refused.message}")
            raise RestoreError("the daemon did not give the state in time (SNAPSHOTD_RESTORE_TIMEOUT_S)")
        finally:
            self.fetch_s += time.monotonic() - begun


def asked_for(wants: Iterable[Want]) -> pb.RestoreBoxes:
    """Return wants in the daemon's words."""
    asked = pb.RestoreBoxes()
    numbers: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
    for want in wants:
        entry, box = want.entry, want.piece.box
        asked.names.append(entry.name)
        asked.cut_of.append(numbers.setdefault((entry.scope, box.offsets, box.lengths), len(numbers)))
    for scope, offsets, lengths in numbers:
        asked.cuts.add(scope=scope, offsets=offsets, lengths=lengths)
    return asked


def cut(want: Want) -> Iterator[Want]:
    """Return the parts of a want, each of at most ``BATCH_BYTES``."""
    if want.nbytes <= BATCH_BYTES:
        yield want
        return
    lengths = want.piece.box.lengths
    dim = next(d for d, n in enumerate(lengths) if n > 1)
    step = max(1, lengths[dim] * BATCH_BYTES // want.nbytes)
    for begin in range(0, lengths[dim], step):
        rows = want.piece.rows(dim, begin, min(begin + step, lengths[dim]))
        yield from cut(Want(want.entry, rows, want.target)) if step == 1 else (Want(want.entry, rows, want.target),)


def _source_of(want: Want, data: Array, offset: int) -> _Found:
    """Return the wanted box as it lies in the daemon's file, in a type that carries its elements."""
    if offset + want.nbytes > data.nbytes:
        raise RestoreError(f"{want.entry.name}: the daemon's file has {data.nbytes} bytes, too few for {offset}")
    itemsize = DTYPES[want.entry.dtype].itemsize
    raw = data[offset : offset + want.nbytes]
    if offset % itemsize:
        raw = raw.copy()
    return _Found(want, raw.view(carrier(itemsize)).reshape(want.piece.box.lengths), data.nbytes > WHOLE_BYTES)


def _fill(batch: Sequence[_Found], threads: int, copiers: ThreadPoolExecutor) -> list[Future[None]]:
    """Begin to copy into the targets: those in host memory by all threads, each a share of the bytes."""
    pairs: dict[bool, list[tuple[Array, Array]]] = {True: [], False: []}
    for found in batch:
        slices, target = found.want.piece.slices(), found.want.target
        if target.device.type == "cpu":
            whole = view_of(target)
            pairs[found.is_cold].append((whole[slices] if slices else whole, found.source))
            continue
        if found.is_cold:
            populate(found.source)
        view = target.detach().view(torch.from_numpy(found.source).dtype)
        with torch.no_grad():
            (view[slices] if slices else view).copy_(torch.from_numpy(found.source))
    return [
        copiers.submit(_copy_all, part, is_cold)
        for is_cold, some in pairs.items()
        for part in split_by_bytes(some, threads)
    ]


def _copy_all(pairs: Sequence[tuple[Array, Array]], is_cold: bool) -> None:
    for target, source in pairs:
        if is_cold and source.nbytes >= _POPULATE_BYTES:
            populate(source)
        np.copyto(target, source)
