"""In which slots the boxes are that a worker wants, in words that it can act on without its daemon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final, TypeAlias

from snapshotd.daemon.sources import LocalSource, PeerSource, Source
from snapshotd.reshard import Copy
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["is_direct", "located"]

_RUN_BYTES: Final = 1024 * 1024
"""Of this node's slots a worker reads long runs, by whole chunks; what is scattered is faster out of a mapping."""

_Slot: TypeAlias = LocalSource | PeerSource


def is_direct(source: Source) -> bool:
    """Whether a worker can read a source itself: a slot here, or on a peer that is read in plain TCP."""
    return isinstance(source, LocalSource) or (isinstance(source, PeerSource) and source.is_plain and bool(source.root))


def located(
    by_target: Mapping[int, Sequence[Copy]], num_wants: int, sources: Sequence[Source], known: Collection[str]
) -> worker.RestoreSources:
    """
    Return the copies that fill wants 0 to ``num_wants`` - 1, by slot. A want that needs anything but what a worker
    should read itself is one of ``others``, whole. Slots of this node come with their digests, unless ``known`` has
    their root.
    """
    wanted: defaultdict[int, list[Copy]] = defaultdict(list)
    for copies in by_target.values():
        for copy in copies:
            wanted[copy.source].append(copy)
    slots: dict[int, _Slot] = {}
    for number, copies in sorted(wanted.items()):
        source = sources[number]
        if isinstance(source, PeerSource) and is_direct(source) or isinstance(source, LocalSource) and _is_long(copies):
            slots[number] = source
    others = {want for want in range(num_wants) if not by_target.get(want)}
    others.update(copy.target for number, copies in wanted.items() if number not in slots for copy in copies)
    found = worker.RestoreSources(others=sorted(others))
    for number, slot in slots.items():
        copies = [copy for copy in wanted[number] if copy.target not in others] if others else wanted[number]
        if copies:
            found.slots.append(_told(slot, copies, known))
    return found


def _is_long(copies: Sequence[Copy]) -> bool:
    """Whether copies are plain, and make up long runs of their source."""
    if any(copy.dims for copy in copies):
        return False
    begins = {copy.src_begin for copy in copies}
    num_runs = sum(copy.src_begin + copy.run_bytes not in begins for copy in copies)
    return sum(copy.run_bytes for copy in copies) >= num_runs * _RUN_BYTES


def _told(slot: _Slot, copies: Sequence[Copy], known: Collection[str]) -> worker.RestoreSources.Slot:
    told = worker.RestoreSources.Slot(
        node_id=slot.node_id,
        file_bytes=slot.file_bytes,
        root_digest=slot.root,
    )
    told.wants.extend([copy.target for copy in copies])
    told.src_begins.extend([copy.src_begin for copy in copies])
    told.dst_begins.extend([copy.dst_begin for copy in copies])
    told.run_bytes.extend([copy.run_bytes for copy in copies])
    for number, copy in enumerate(copies):
        if copy.dims:
            block = told.blocks.add(copy=number)
            for count, there, here in copy.dims:
                block.repeats.add(count=count, src_stride=there, dst_stride=here)
    if isinstance(slot, LocalSource):
        told.path = str(slot.obj.path)
        if slot.root not in known:
            told.digests = slot.digests()
    else:
        told.address = slot.address
        told.object.CopyFrom(slot.key)
    return told
