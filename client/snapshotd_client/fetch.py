"""
Boxes of a snapshot into tensors: what is wanted is asked for in batches, and copied from the daemon's files.

Rule 1: a batch has at most 128 MiB; a larger box is cut along its first dimension > 1.
Rule 2: a tensor is filled only with bytes of its own dtype and of exactly its shape; the daemon has verified them.
Rule 3: an answer is checked (number of wants, ranges inside the files) before a byte of it is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import torch

from snapshotd.errors import SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.layout import DTYPES
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.arrays import Array, carrier, view_of
from snapshotd_client.errors import RestoreError
from snapshotd_client.link import Link
from snapshotd_client.placement import Piece
from snapshotd_client.slots import map_readable

__all__ = ["BATCH_BYTES", "Entry", "Fetcher", "Manifest", "Want"]

BATCH_BYTES: Final = 128 * 1024 * 1024
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


class Fetcher:
    """Gets wants filled, over as many connections as it takes, until ``deadline`` (of time.monotonic)."""

    def __init__(self, link: Link, deadline: float) -> None:
        self._link = link
        self._deadline = deadline
        self.fetch_s = 0.0
        self.local_bytes = self.remote_bytes = self.decoded_bytes = 0

    def run(self, wants: Sequence[Want]) -> None:
        """Fill all ``wants``. RestoreError when the daemon cannot give them."""
        for number, batch in enumerate(_batches(wants)):
            if number == 1:
                failpoint("client.mid_restore")
            self._run_batch(batch)
            if number == 0:
                failpoint("client.mid_restore") if len(wants) == len(batch) else None

    def _run_batch(self, batch: list[Want]) -> None:
        ready = self._ask(batch)
        if ready.error:
            raise RestoreError(f"the daemon cannot give the state: {ready.error}")
        if not len(batch) == len(ready.files) == len(ready.offsets):
            raise RestoreError(f"the daemon answered {len(ready.files)} boxes where {len(batch)} were asked for")
        files: dict[int, Array] = {}
        try:
            for want, index, offset in zip(batch, ready.files, ready.offsets, strict=True):
                if want.nbytes == 0:
                    continue
                if index not in files:
                    files[index] = map_readable(ready.paths[index])
                _fill(want, files[index], offset)
        except (OSError, SnapshotdError, IndexError) as error:
            raise RestoreError(f"what the daemon gave cannot be read: {error}") from error
        finally:
            release = pb.Frame(restore_release=pb.RestoreRelease(batch_id=ready.batch_id))
            self._link.post(release, self._link.session)
        self.local_bytes += ready.local_bytes
        self.remote_bytes += ready.remote_bytes
        self.decoded_bytes += ready.decoded_bytes

    def _ask(self, batch: list[Want]) -> pb.RestoreReady:
        request = pb.RestoreWant(
            wants=[
                pb.RestoreWant.Want(
                    name=want.entry.name,
                    scope=want.entry.scope,
                    offsets=want.piece.box.offsets,
                    lengths=want.piece.box.lengths,
                )
                for want in batch
            ]
        )
        begun = time.monotonic()
        try:
            while (left := self._deadline - time.monotonic()) > 0:
                if not self._link.wait_session(min(left, _ASK_S)):
                    if self._link.refused is not None:
                        raise RestoreError(f"the daemon refuses this worker: {self._link.refused.message}")
                    continue
                answer = self._link.ask(pb.Frame(restore_want=request), left)
                if answer is None:
                    continue
                if answer.WhichOneof("body") == "restore_ready":
                    return answer.restore_ready
                raise RestoreError(f"the daemon cannot give the state: {answer.error.message or 'no answer'}")
            raise RestoreError("the daemon did not give the state in time (SNAPSHOTD_RESTORE_TIMEOUT_S)")
        finally:
            self.fetch_s += time.monotonic() - begun


def _batches(wants: Sequence[Want]) -> Iterator[list[Want]]:
    batch: list[Want] = []
    size = 0
    for want in wants:
        for part in _cut(want):
            if batch and (size + part.nbytes > BATCH_BYTES or len(batch) >= _MAX_WANTS):
                yield batch
                batch, size = [], 0
            batch.append(part)
            size += part.nbytes
    if batch:
        yield batch


def _cut(want: Want) -> Iterator[Want]:
    if want.nbytes <= BATCH_BYTES:
        yield want
        return
    lengths = want.piece.box.lengths
    dim = next(d for d, n in enumerate(lengths) if n > 1)
    step = max(1, lengths[dim] * BATCH_BYTES // want.nbytes)
    for begin in range(0, lengths[dim], step):
        rows = want.piece.rows(dim, begin, min(begin + step, lengths[dim]))
        yield from _cut(Want(want.entry, rows, want.target)) if step == 1 else (Want(want.entry, rows, want.target),)


def _fill(want: Want, data: Array, offset: int) -> None:
    if offset + want.nbytes > data.nbytes:
        raise RestoreError(f"{want.entry.name}: the daemon's file has {data.nbytes} bytes, too few for {offset}")
    itemsize = DTYPES[want.entry.dtype].itemsize
    raw = data[offset : offset + want.nbytes]
    if offset % itemsize:
        raw = raw.copy()
    source = raw.view(carrier(itemsize)).reshape(want.piece.box.lengths)
    slices = want.piece.slices()
    target = want.target
    if target.device.type == "cpu":
        whole = view_of(target)
        np.copyto(whole[slices] if slices else whole, source)
        return
    dtype = torch.from_numpy(source).dtype
    view = target.detach().view(dtype)
    with torch.no_grad():
        (view[slices] if slices else view).copy_(torch.from_numpy(source))
