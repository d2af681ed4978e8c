"""
Brings what a binding shows into the slots that the daemon granted.

Rule 1: only the copy thread calls this.
Rule 2: what can be sorted out beforehand is, once per slot: mapped pages, views, pinned memory, lists of copies. A step
then costs its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from snapshotd.failpoints import failpoint
from snapshotd.layout import KnownDigests
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.arrays import Array
from snapshotd_client.binding import Binding
from snapshotd_client.copying import CopyList, CopyPool
from snapshotd_client.device import CopyStream
from snapshotd_client.plan import Plan
from snapshotd_client.slots import Mapping, MappingCache

__all__ = ["Copier", "Marks", "Slot"]

Marks = list[tuple[CopyStream, Any]]


@dataclass(eq=False)  # no __slots__: bindings refer to it weakly
class Slot:
    """A granted slot, mapped: ``views`` of each part of the plan, and where the JSON of its last step ended."""

    mapping: Mapping
    views: list[Array]
    meta_end: int
    pinned: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """What a binding has to bring into one slot."""

    on_host: CopyList
    on_device: list[tuple[CopyStream, list[torch.Tensor], list[torch.Tensor]]]


class Copier:
    """Owns the mapped slots of the layout in use, and the threads that fill them."""

    def __init__(self, threads: int, streams: dict[str, CopyStream]) -> None:
        self._pool = CopyPool(threads)
        self._streams = streams
        self._mappings = MappingCache()
        self._slots: dict[str, Slot] = {}
        self._pinned: list[tuple[CopyStream, Array]] = []
        self._layout_hash = ""

    def open(self, grant: pb.Grant, plan: Plan) -> Slot:
        """Return the slot of ``grant``, mapped; AccessDenied, FormatError, OSError or ValueError where it can't be."""
        layout = plan.layout
        if self._layout_hash != layout.hash:
            self._forget(layout.hash)
        if grant.file_bytes != layout.file_bytes:
            raise ValueError(f"the granted slot has {grant.file_bytes} bytes, the layout {layout.file_bytes}")
        mapping = self._mappings.get(grant.path, grant.file_bytes)
        slot = self._slots.get(grant.path)
        if slot is None or slot.mapping is not mapping:
            slot = Slot(mapping, plan.slot_views(mapping.bytes), meta_end=layout.meta[1])
            header = np.frombuffer(layout.header, dtype=np.uint8)
            if not np.array_equal(mapping.bytes[: header.nbytes], header):
                mapping.bytes[: header.nbytes] = header
            for stream in self._streams.values():
                if stream.pin(mapping.bytes):
                    slot.pinned = True
                    self._pinned.append((stream, mapping.bytes))
                    break
            self._slots[grant.path] = slot
        return slot

    def issue(self, slot: Slot, binding: Binding, marks: Marks) -> None:
        """Issue the copies that go on by themselves, behind ``marks``."""
        for stream, mark in marks:
            stream.begin(mark)
        for stream, targets, sources in self._copies(slot, binding).on_device:
            stream.copy(targets, sources, slot.pinned)

    def copy(self, slot: Slot, binding: Binding) -> list[KnownDigests]:
        """Make the copies that need us; return the digests that they found."""
        copies = self._copies(slot, binding).on_host
        self._pool.copy(copies, middle=lambda: failpoint("client.mid_copy"))
        return copies.digests()

    def write_meta(self, slot: Slot, plan: Plan, pieces: list[bytes]) -> None:
        """Write the step's JSON, and spaces over what is left of the one before."""
        position, _ = plan.layout.meta
        for piece in pieces:
            slot.mapping.bytes[position : position + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            position += len(piece)
        slot.mapping.bytes[position : slot.meta_end] = 0x20
        slot.meta_end = position

    def check_equal(self, slot: Slot, binding: Binding) -> None:
        """AssertionError with the name of a tensor whose copy is another."""
        for part, target, source in zip(binding.plan.parts, slot.views, binding.sources, strict=True):
            host = source.cpu().numpy() if isinstance(source, torch.Tensor) else source
            if target.tobytes() != np.ascontiguousarray(host).tobytes():
                raise AssertionError(f"the copy of {binding.plan.planned[part.index].name} is not equal to the tensor")

    def close(self) -> None:
        """End the threads and unmap the slots."""
        self._pool.close()
        self._forget("")

    def _copies(self, slot: Slot, binding: Binding) -> _Copies:
        known: _Copies | None = binding.copies.get(slot)
        if known is not None:
            return known
        on_host: list[tuple[Array, Array]] = []
        on_device: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in zip(slot.views, binding.sources, strict=True):
            if isinstance(source, torch.Tensor):
                targets, sources = on_device.setdefault(str(source.device), ([], []))
                targets.append(torch.from_numpy(target))
                sources.append(source)
            else:
                on_host.append((target, source))
        streams = [(self._streams[name], *lists) for name, lists in on_device.items()]
        made = binding.copies[slot] = _Copies(CopyList(on_host, self._pool.threads, slot.mapping.bytes), streams)
        return made

    def _forget(self, layout_hash: str) -> None:
        for stream, memory in self._pinned:
            stream.unpin(memory)
        self._pinned.clear()
        self._slots.clear()
        self._mappings.clear()
        self._layout_hash = layout_hash
