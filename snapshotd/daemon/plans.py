"""
The sources of a restore plan: one per source rank, opened together, and opened anew after one has failed.

A slot that turned out rotten is freed, decoded, and there again under the same name: whoever asks a second time must
not hold on to the old one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final

from snapshotd.daemon.source import Source
from snapshotd.daemon.sources import DurableSource, Sources
from snapshotd.durable import open_snapshot
from snapshotd.errors import CorruptionError, FormatError, LocalProtocolError, PeerError, UsageError
from snapshotd.layout import CHUNK_BYTES, Layout, header_length
from snapshotd.transfer import Piece
from snapshotd.v1 import control_pb2 as control

__all__ = ["PlanSources", "read_bytes", "read_layouts", "slots_of_plan"]

_MAX_THREADS: Final = 8

_HEADER_GUESS_BYTES: Final = 2 * CHUNK_BYTES
"""Read at once from each source: the header of a thousand tensors, and a digest chunk is fetched whole anyway."""


class PlanSources:
    """
    ``use`` gives the sources of all source ranks, in order of rank. Safe to use from many threads.

    Opened at once, so that a plan that cannot be served is refused where it is taken up: CorruptionError or PeerError
    when a source is not what the plan says, UsageError for a plan without sources.
    """

    def __init__(self, order: control.RestorePlan, sources: Sources) -> None:
        self._order = order
        self._sources = sources
        self._lock = threading.Lock()
        self._closed = False
        self._current: _Opened | None = _Opened(order, sources)

    @contextmanager
    def use(self) -> Iterator[Sequence[Source]]:
        """
        The sources, which stay open until the end of the block.

        After a CorruptionError or PeerError in the block they are opened anew for the next one. The errors of opening;
        LocalProtocolError after ``close``.
        """
        with self._lock:
            if self._closed:
                raise LocalProtocolError("the restore is closed")
            if self._current is None:
                self._current = _Opened(self._order, self._sources)
            opened = self._current
            opened.num_users += 1
        failed = False
        try:
            yield opened.sources
        except (CorruptionError, PeerError):
            failed = True
            raise
        finally:
            with self._lock:
                opened.num_users -= 1
                if failed and self._current is opened:
                    self._current = None
                last = self._current is not opened and not opened.num_users
            if last:
                opened.close()

    def follow(self, order: control.RestorePlan) -> None:
        """Sources have moved: what is opened anew is opened where this newer plan for the same snapshot says."""
        with self._lock:
            self._order = order

    def close(self) -> None:
        """Close the sources when the last block ends. May be called twice."""
        with self._lock:
            self._closed = True
            opened, self._current = self._current, None
            last = opened is not None and not opened.num_users
        if opened is not None and last:
            opened.close()


class _Opened:
    """The sources of one plan, open."""

    def __init__(self, order: control.RestorePlan, sources: Sources) -> None:
        self.num_users = 0
        with ExitStack() as stack:
            if order.kind == control.RESTORE_KIND_DURABLE:
                self.sources = _open_durable(order, sources, stack.callback)
            elif order.kind == control.RESTORE_KIND_MEMORY:
                self.sources = _open_memory(order, sources, stack.callback)
            else:
                raise UsageError(f"a plan of kind {control.RestoreKind.Name(order.kind)} has no bytes to restore")
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


def slots_of_plan(order: control.RestorePlan, sources: Sequence[Source]) -> list[control.SlotRef]:
    """Return what the sources of a plan are, in order of rank."""
    durable = [source.slot for source in sources if isinstance(source, DurableSource)]
    return durable or list(order.slots)


def read_layouts(sources: Sequence[Source]) -> list[Layout]:
    """Read all headers, several at a time: with a hundred peers it is the round trips that take time."""
    with ThreadPoolExecutor(max(1, min(len(sources), _MAX_THREADS)), "snapshotd-headers") as pool:
        return list(pool.map(_read_layout, sources))


def read_bytes(source: Source, begin: int, end: int) -> bytes:
    """Return the verified bytes ``[begin, end)``: for little ones."""
    with memoryview(bytearray(end - begin)) as into:
        source.read([Piece(begin, into)])
        return bytes(into)


def _read_layout(source: Source) -> Layout:
    head = read_bytes(source, 0, min(_HEADER_GUESS_BYTES, source.file_bytes))
    length = header_length(head)
    if length > source.file_bytes:
        raise FormatError(f"{source.name}: the header claims {length} bytes, but there are {source.file_bytes}")
    if length > len(head):
        head += read_bytes(source, len(head), length)
    return Layout.parse(head, file_bytes=source.file_bytes)


def _open_durable(
    order: control.RestorePlan, sources: Sources, at_close: Callable[[Callable[[], None]], object]
) -> list[Source]:
    snapshot = open_snapshot(order.durable_path)
    at_close(snapshot.close)
    marker = snapshot.marker
    found = (marker.job, marker.epoch, marker.step, marker.world_size)
    expected = (order.job, order.source_epoch, order.source_step, order.source_world_size)
    if found != expected:
        raise FormatError(f"{order.durable_path} is (job, epoch, step, world size) {found}, expected {expected}")
    return [DurableSource(snapshot.rank_file(rank), sources.on_corruption) for rank in range(snapshot.world_size)]


def _open_memory(
    order: control.RestorePlan, sources: Sources, at_close: Callable[[Callable[[], None]], object]
) -> list[Source]:
    if not order.source_world_size == len(order.slots) == len(order.nodes) > 0:
        raise UsageError(
            f"a plan for {order.source_world_size} source ranks names {len(order.slots)} slots "
            f"on {len(order.nodes)} nodes"
        )
    sources.learn(order.peers)
    opened: list[Source] = []
    for rank, (ref, node) in enumerate(zip(order.slots, order.nodes, strict=True)):
        if (ref.rank, ref.epoch, ref.step) != (rank, order.source_epoch, order.source_step):
            raise UsageError(f"slot {rank} of the plan is of rank {ref.rank}, epoch {ref.epoch}, step {ref.step}")
        source = sources.slot(ref, node)
        at_close(source.close)
        opened.append(source)
    return opened
