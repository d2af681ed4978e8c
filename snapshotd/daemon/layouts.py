"""
The layouts of slots here and on peers, by their hashes, so that a restore need not begin with reading headers.

Layouts are stable from step to step, and a daemon sees those of its parity group whenever it protects a step: new ones
are read then, in the background. What it has not seen is read by the restore that needs it.

Rule 1: a layout is kept under the hash of the header that it was parsed from, whose bytes were verified. That is what a
SlotRef names, and what the header was compared with when its slot was sealed.
Rule 2: what is kept is bounded. The one that was not used for longest goes first, and is not read ahead again.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Final

from snapshotd.daemon.plans import read_layouts
from snapshotd.daemon.source import Source
from snapshotd.daemon.sources import Sources
from snapshotd.errors import FormatError, SnapshotdError
from snapshotd.layout import Layout
from snapshotd.v1 import control_pb2 as control

__all__ = ["Layouts"]

_MAX_HEADER_BYTES: Final = 16 * 1024 * 1024
"""About 26 MB of memory, or 46,000 tensors: of a budget of 150 MB a daemon uses less than half for all else."""

_MAX_HASHES: Final = 4096

log = logging.getLogger("snapshotd.daemon")


class Layouts:
    """The layouts that a node knows, with at most ``max_bytes`` of headers. Safe to use from many threads."""

    def __init__(self, max_bytes: int = _MAX_HEADER_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Layout] = OrderedDict()  # the last one is the one used last
        self._num_bytes = 0
        self._seen: OrderedDict[str, None] = OrderedDict()  # whether they are known still, or not
        self._thread = ThreadPoolExecutor(1, "snapshotd-layouts")
        self._learning: Future[None] | None = None
        self._cancel = threading.Event()

    def of(self, refs: Sequence[control.SlotRef], sources: Sequence[Source]) -> list[Layout]:
        """
        Return the layouts of slots, whose ``sources`` these are, in their order. Those not known are read.

        The errors of reading; FormatError for a slot with another layout than its ref says.
        """
        found = [self._find(ref) for ref in refs]
        unknown = [place for place, layout in enumerate(found) if layout is None]
        if unknown:
            for place, layout in zip(unknown, read_layouts([sources[place] for place in unknown]), strict=True):
                found[place] = self._keep(layout, refs[place])
        return [layout for layout in found if layout is not None]

    def learn(self, sets: Iterable[control.StripeSet], sources: Sources) -> Future[None] | None:
        """
        Have what is new among the layouts of these slots read in the background; return when that ends, if it goes on.

        What cannot be read is no harm: it is tried again with the next call.
        """
        with self._lock:
            if self._learning is not None and not self._learning.done():
                return self._learning
            new = {
                member.slot.layout_hash: member
                for stripe_set in sets
                for member in stripe_set.members
                if member.slot.layout_hash and member.slot.layout_hash not in self._seen
            }
            if not new or self._cancel.is_set():
                return None
            self._learning = self._thread.submit(self._learn, list(new.values()), sources)
            return self._learning

    def close(self) -> None:
        """End learning; what is known stays usable."""
        with self._lock:
            self._cancel.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _learn(self, members: Iterable[control.StripeMember], sources: Sources) -> None:
        for member in members:
            try:
                with closing(sources.slot(member.slot, member.node_id, self._cancel)) as source:
                    self.of([member.slot], [source])
            except (SnapshotdError, OSError) as error:
                log.debug("the layout of rank %d on %s is not known yet: %s", member.slot.rank, member.node_id, error)

    def _find(self, ref: control.SlotRef) -> Layout | None:
        with self._lock:
            layout = self._known.get(ref.layout_hash)
            if layout is None or layout.file_bytes > ref.file_bytes:
                return None
            self._known.move_to_end(layout.hash)
            return layout

    def _keep(self, layout: Layout, ref: control.SlotRef) -> Layout:
        if layout.hash != ref.layout_hash:
            raise FormatError(
                f"the slot of rank {ref.rank} of step {ref.step} has the layout {layout.hash}, expected "
                f"{ref.layout_hash}"
            )
        layout.index  # noqa: B018  it is made now, while nobody waits for it
        with self._lock:
            self._seen[layout.hash] = None
            if len(self._seen) > _MAX_HASHES:
                self._seen.popitem(last=False)
            if layout.hash not in self._known:
                self._known[layout.hash] = layout
                self._num_bytes += len(layout.header)
            while self._num_bytes > self._max_bytes:
                _, oldest = self._known.popitem(last=False)
                self._num_bytes -= len(oldest.header)
        return layout
