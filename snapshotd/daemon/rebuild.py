"""
Rebuild: decode the lost slot of one position of a parity group, or compute its lost parity, and keep it here.

Rule 1: a source that is corrupt, gone or does not answer is one more erasure. The plan is made again with what is left,
and the work goes on where it was.
Rule 2: the digests of a lost slot are lost with it, its root digest is not. A decoded slot is kept if its own digests
have that root, and never otherwise.
Rule 3: slots are anchored by their root digests, parity is not: when the root comes out wrong, some parity was wrong
from the beginning, and other combinations are tried while there are any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice
from typing import Final

from snapshotd.arena import Arena, ParityFile, SlotFile, describe, parity_key, slot_key
from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.protect import check_stripe_set, clear_gaps, geometry_of, seal_parity
from snapshotd.daemon.seal import digests_of
from snapshotd.daemon.sources import Source, Sources, Stream
from snapshotd.daemon.windows import WINDOW_BYTES, SourceFailed
from snapshotd.erasure import Codec, Part, StripeGeometry, decode_plan, reencode_plan
from snapshotd.errors import (
    AccessDenied,
    BudgetError,
    CorruptionError,
    LayoutError,
    PeerError,
    Unrecoverable,
    UsageError,
)
from snapshotd.failpoints import failpoint
from snapshotd.layout import root_digest
from snapshotd.v1 import control_pb2 as control

__all__ = ["Rebuilt", "rebuild"]

_MAX_ATTEMPTS: Final = 16
"""Combinations of parity that are tried when decoded bytes have the wrong root. Each costs a whole decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """How it ended. ``slot``: the rebuilt (or found) slot file, sealed; also when only the parity failed after it."""

    done: control.RebuildDone
    slot: SlotFile | None


def rebuild(
    order: control.Rebuild,
    node_id: str,
    arena: Arena,
    sources: Sources,
    codec: Codec,
    cancel: threading.Event | None = None,
) -> Rebuilt:
    """
    Carry out the order. What cannot be done is told in ``done.reason``, with the numbers; nothing doubtful is kept.

    ``done.slot`` and ``done.parity`` are set for what is here now, also when ``done.ok`` is false because the other
    one failed. Raises Cancelled, and what is no matter of the sources (failpoints, bugs).
    """
    began = time.monotonic()
    stripe_set = order.set
    done = control.RebuildDone(
        job=stripe_set.job,
        epoch=stripe_set.epoch,
        step=stripe_set.step,
        group=stripe_set.group,
        lane=stripe_set.lane,
        position=order.position,
    )
    slot: SlotFile | None = None
    try:
        sources.learn(order.peers)
        work = _Rebuild(order, node_id, arena, sources, codec, cancel)
        if order.slot:
            slot = work.rebuild_slot()
            assert slot.ref is not None
            done.slot.CopyFrom(slot.ref)
        if order.parity:
            done.parity.CopyFrom(work.rebuild_parity())
        done.ok = True
    except (BudgetError, CorruptionError, LayoutError, PeerError, Unrecoverable, UsageError) as error:
        done.reason = str(error)
    except BaseException:
        if slot is not None and work.made_slot:
            arena.delete(slot)  # nobody will hear of it
        raise
    done.seconds = time.monotonic() - began
    return Rebuilt(done=done, slot=slot)


_MakePlan = Callable[[Set[int], Set[int]], list[Part]]


@dataclass(slots=True)
class _Available:
    """Where there still is something, by position: what fails is taken out. ``lost``: what failed, in words."""

    data: dict[int, Source]
    parity: dict[int, Source]
    lost: list[str] = field(default_factory=list)

    def for_one_stripe(self) -> _Available:
        """A source with a rotten chunk in this stripe may be good for the others."""
        return _Available(data=dict(self.data), parity=dict(self.parity), lost=list(self.lost))

    def drop(self, failed: SourceFailed) -> None:
        for known in (self.data, self.parity):
            for position in [p for p, source in known.items() if source is failed.source]:
                del known[position]
        self.lost.append(str(failed))


class _Rebuild:
    """One order: its geometry, and the sources that are left."""

    def __init__(
        self,
        order: control.Rebuild,
        node_id: str,
        arena: Arena,
        sources: Sources,
        codec: Codec,
        cancel: threading.Event | None,
    ) -> None:
        check_stripe_set(order.set)
        self._geometry: StripeGeometry = geometry_of(order.set)
        n = self._geometry.n
        if order.position >= n or len(order.slot_nodes) != n or len(order.parity_nodes) != n:
            raise UsageError(
                f"position {order.position} with {len(order.slot_nodes)} slot and {len(order.parity_nodes)} parity "
                f"nodes does not fit {n} members"
            )
        self.made_slot = False
        self._order = order
        self._node_id = node_id
        self._arena = arena
        self._sources = sources
        self._codec = codec
        self._cancel = cancel

    def rebuild_slot(self) -> SlotFile:
        ref = self._order.set.members[self._order.position].slot
        what = describe(slot_key(ref))
        if not ref.file_bytes or not ref.root_digest:
            raise UsageError(f"position {self._order.position} had no slot that could be rebuilt")
        existing = self._arena.find(slot_key(ref))
        if isinstance(existing, SlotFile) and self._has_slot(ref) and not self._arena.verify(existing):
            return existing  # the order came twice
        slot = self._arena.take_free(ref.job, ref.file_bytes)
        slot = slot or self._arena.create_slot(b"", ref.file_bytes, job=ref.job)  # whose memory is new: slower
        try:
            reasons: list[str] = []
            for excluded in islice(self._exclusions(), _MAX_ATTEMPTS):
                with ExitStack() as stack:
                    available = self._open(stack, excluded)
                    try:
                        self._decode_slot(slot, available)
                    except Unrecoverable as error:
                        if not reasons:
                            raise
                        reasons.append(f"without the parity of {_positions(excluded)}: {error}")
                        continue
                digests = digests_of(slot.view, slot.file_bytes, self._cancel)
                if (got := root_digest(digests)) == ref.root_digest:
                    self._arena.seal(slot, ref, digests)
                    self.made_slot = True
                    return slot
                reasons.append(
                    f"without the parity of {_positions(excluded)}: "
                    f"decoded to the root {got}, expected {ref.root_digest}"
                )
            raise Unrecoverable(f"{what} cannot be decoded to the right bytes: {'; '.join(reasons)}")
        except BaseException:
            self._arena.release(slot)
            raise

    def rebuild_parity(self) -> control.ParityRef:
        stripe_set, position = self._order.set, self._order.position
        geometry = self._geometry
        if not stripe_set.m:
            raise UsageError("a stripe set with m = 0 has no parity")
        wanted = control.ParityRef(set=stripe_set, position=position, file_bytes=geometry.parity_bytes(position))
        existing = self._arena.find(parity_key(wanted))
        if isinstance(existing, ParityFile) and existing.ref is not None and existing.ref.set == stripe_set:
            found = existing.ref
            if not self._arena.verify(existing):
                return found
        parity = self._arena.create_parity(wanted, wanted.file_bytes)
        try:
            rows = geometry.parity_rows(position)
            clear_gaps(parity, rows)
            with ExitStack() as stack:
                available = self._open(stack, frozenset((position,)))
                for row in rows:
                    with parity.view[row.offset : row.offset + row.length] as out:
                        plan = partial(reencode_plan, geometry, row.stripe, row.row)
                        self._compute(out, plan, geometry.k + row.row, available)
            return seal_parity(self._arena, parity, stripe_set, position, self._cancel)
        except BaseException:
            self._arena.release(parity)
            raise

    def _decode_slot(self, slot: SlotFile, available: _Available) -> None:
        geometry, position = self._geometry, self._order.position
        for unit in range(geometry.k):
            stripe = geometry.stripe_of(position, unit)
            begin, end = geometry.unit_range(position, stripe)
            with slot.view[begin:end] as out:
                plan = partial(decode_plan, geometry, stripe, position)
                self._compute(out, plan, geometry.code_index(position, stripe), available)

    def _compute(self, out: memoryview, plan: _MakePlan, index: int, available: _Available) -> None:
        """Fill ``out`` with part ``index`` of a stripe; Unrecoverable when too little is left."""
        left = available.for_one_stripe()
        at = 0
        while at < out.nbytes:
            try:
                parts = plan(left.data.keys(), left.parity.keys())
            except Unrecoverable as error:
                lost = f"; lost on the way: {'; '.join(left.lost)}" if left.lost else ""
                raise Unrecoverable(f"{error}{lost}") from error
            at, failed = self._compute_with(parts, out, at, index, left)
            if failed is not None:
                left.drop(failed)
                if not isinstance(failed.__cause__, CorruptionError):
                    available.drop(failed)  # it will not answer for the next stripe either

    def _compute_with(
        self, parts: list[Part], out: memoryview, at: int, index: int, available: _Available
    ) -> tuple[int, SourceFailed | None]:
        """Go on from ``at``; return how far it got, to the end or to where a source failed."""
        geometry = self._geometry
        finished = at
        with ExitStack() as stack:
            try:
                inputs = [_Input(stack, part, available, at, out.nbytes) for part in parts]
                for begin in range(at, out.nbytes, WINDOW_BYTES):
                    check_cancel(self._cancel, "decoding")
                    end = min(begin + WINDOW_BYTES, out.nbytes)
                    known = [(part.index, item.take(begin, end)) for part, item in zip(parts, inputs, strict=True)]
                    with out[begin:end] as target:
                        self._codec.decode(geometry.k, geometry.m, known, index, target)
                    finished = end
                    failpoint("daemon.mid_rebuild")
            except SourceFailed as failed:
                return finished, failed
        return finished, None

    def _open(self, stack: ExitStack, without_parity: Set[int]) -> _Available:
        """Open what the order says is there; what cannot be opened is an erasure."""
        order = self._order
        available = _Available(data={}, parity={})
        for position, member in enumerate(order.set.members):
            node = order.slot_nodes[position]
            local = bool(member.slot.file_bytes) and self._has_slot(member.slot)
            if member.slot.file_bytes and (node or local):
                self._try_open(stack, available, available.data, position, self._node_id if local else node)
            node = order.parity_nodes[position]
            if node and position not in without_parity and self._geometry.parity_bytes(position):
                self._try_open(stack, available, available.parity, position, node)
        return available

    def _has_slot(self, ref: control.SlotRef) -> bool:
        obj = self._arena.find(slot_key(ref))
        return obj is not None and obj.root == ref.root_digest

    def _try_open(
        self, stack: ExitStack, available: _Available, known: dict[int, Source], position: int, node: str
    ) -> None:
        try:
            if known is available.data:
                source = self._sources.slot(self._order.set.members[position].slot, node, self._cancel)
            else:
                nbytes = self._geometry.parity_bytes(position)
                ref = control.ParityRef(set=self._order.set, position=position, file_bytes=nbytes)
                source = self._sources.parity(ref, node, self._cancel)
        except (AccessDenied, CorruptionError, PeerError) as error:
            available.lost.append(str(error))
            return
        known[position] = stack.enter_context(closing(source))

    def _exclusions(self) -> Iterator[frozenset[int]]:
        """Yield sets of positions whose parity is not to be used: none first, then one, then two, ..."""
        holders = [p for p, node in enumerate(self._order.parity_nodes) if node]
        for count in range(self._geometry.m):
            for excluded in combinations(holders, count):
                yield frozenset(excluded)


class _Input:
    """
    One part of a decoding, from ``at`` on, window by window: its source sends ahead while another window is decoded.

    A part that is shorter than what is computed from it is zeros behind its end. SourceFailed when it cannot be read.
    """

    def __init__(self, stack: ExitStack, part: Part, available: _Available, at: int, stop: int) -> None:
        self._part = part
        self._source = (available.parity if part.is_parity else available.data).get(part.position)
        self._room = memoryview(b"")
        self._stream: Stream | None = None
        begin, end = min(part.begin + at, part.end), min(part.begin + stop, part.end)
        if begin < end and self._source is not None:
            if not self._source.is_local:
                self._room = memoryview(bytearray(WINDOW_BYTES))
            with self._failing():
                self._stream = stack.enter_context(self._source.stream(begin, end))

    def take(self, begin: int, end: int) -> memoryview:
        """Return the bytes of the window, which is the next one; they are valid until the one after it."""
        nbytes = min(self._part.begin + end, self._part.end) - min(self._part.begin + begin, self._part.end)
        if not nbytes or self._stream is None:
            return memoryview(b"")
        with self._failing():
            return self._stream.take(nbytes, self._room)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (AccessDenied, CorruptionError, PeerError) as error:
            assert self._source is not None
            raise SourceFailed(self._source, error) from error


def _positions(excluded: Set[int]) -> str:
    return ", ".join(map(str, sorted(excluded))) or "none"
