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
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice
from typing import Final

from snapshotd.arena import Arena, ParityFile, SlotFile, describe, parity_key, slot_key
from snapshotd.daemon.protect import check_stripe_set, clear_gaps, geometry_of, seal_parity
from snapshotd.daemon.seal import DigestsInPassing
from snapshotd.daemon.sources import Source, Sources
from snapshotd.daemon.windows import Input, SourceFailed, run_windows
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


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a part of a stripe belongs: bytes ``[begin, end)`` of a file."""

    view: memoryview
    begin: int
    end: int
    digests: DigestsInPassing

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def window(self, begin: int, end: int) -> memoryview:
        return self.view[self.begin + begin : self.begin + end]

    def wrote(self, begin: int, end: int) -> None:
        self.digests.wrote(self.begin + begin, self.begin + end)


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
                        digests = self._decode_slot(slot, available)
                    except Unrecoverable as error:
                        if not reasons:
                            raise
                        reasons.append(f"without the parity of {_positions(excluded)}: {error}")
                        continue
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
            digests = DigestsInPassing(parity.view, parity.file_bytes)
            with ExitStack() as stack:
                available = self._open(stack, frozenset((position,)))
                for row in rows:
                    plan = partial(reencode_plan, geometry, row.stripe, row.row)
                    target = _Target(parity.view, row.offset, row.offset + row.length, digests)
                    self._compute(target, plan, geometry.k + row.row, available)
            return seal_parity(self._arena, parity, stripe_set, position, digests.finish(self._cancel))
        except BaseException:
            self._arena.release(parity)
            raise

    def _decode_slot(self, slot: SlotFile, available: _Available) -> bytes:
        """Fill the slot, and return its chunk digests."""
        geometry, position = self._geometry, self._order.position
        digests = DigestsInPassing(slot.view, slot.file_bytes)
        for unit in range(geometry.k):
            stripe = geometry.stripe_of(position, unit)
            begin, end = geometry.unit_range(position, stripe)
            plan = partial(decode_plan, geometry, stripe, position)
            target = _Target(slot.view, begin, end, digests)
            self._compute(target, plan, geometry.code_index(position, stripe), available)
        return digests.finish(self._cancel)

    def _compute(self, target: _Target, plan: _MakePlan, index: int, available: _Available) -> None:
        """Fill ``target`` with part ``index`` of a stripe; Unrecoverable when too little is left."""
        left = available.for_one_stripe()
        at = 0
        while at < target.nbytes:
            try:
                parts = plan(left.data.keys(), left.parity.keys())
            except Unrecoverable as error:
                lost = f"; lost on the way: {'; '.join(left.lost)}" if left.lost else ""
                raise Unrecoverable(f"{error}{lost}") from error
            try:
                self._compute_with(parts, target, at, index, left)
                return
            except SourceFailed as failed:
                at += failed.finished
                left.drop(failed)
                if not isinstance(failed.__cause__, CorruptionError):
                    available.drop(failed)  # it will not answer for the next stripe either

    def _compute_with(
        self, parts: list[Part], target: _Target, at: int, index: int, available: _Available
    ) -> None:
        """Go on from ``at`` to the end, or to where a source fails."""
        geometry = self._geometry

        def decode(begin: int, end: int, views: list[memoryview]) -> None:
            known = [(part.index, view) for part, view in zip(parts, views, strict=True)]
            with target.window(at + begin, at + end) as out:
                self._codec.decode(geometry.k, geometry.m, known, index, out)
            target.wrote(at + begin, at + end)
            failpoint("daemon.mid_rebuild")

        inputs = [_input(part, available, at) for part in parts]
        run_windows(inputs, target.nbytes - at, decode, cancel=self._cancel)

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


def _input(part: Part, available: _Available, at: int) -> Input:
    """A part from ``at`` on: one that is shorter than what is computed from it is zeros behind its end."""
    known = available.parity if part.is_parity else available.data
    return Input(known.get(part.position), min(part.begin + at, part.end), part.end)


def _positions(excluded: Set[int]) -> str:
    return ", ".join(map(str, sorted(excluded))) or "none"
