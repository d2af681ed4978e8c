"""
Protect: compute this node's part of the parity of a step that all ranks have sealed.

Each member of a parity group holds the parity of m of the n stripes. It pulls the k data units of each from the other
members, window by window, and encodes and digests them while they are in the cache. So each node sends m times its own
data, and receives as much, whatever the size of the group. With k = 1 parity is a mirror, received where it stays.

Rule 1: what is encoded is verified as it is read. A bit that flipped since the seal must not end up in the parity,
where nobody would find it before the day it is needed.
Rule 2: parity is sealed whole or not at all, and its record says all that is needed to decode.
Rule 3: where nobody has ordered it, what a peer has sealed is known from that peer: its slot is waited for, a little,
and comes with its root digest, which goes into the record. Whoever commits compares that with what the peer reported.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Final

from snapshotd.arena import Arena, ParityFile, parity_key
from snapshotd.daemon.cancel import check_cancel
from snapshotd.daemon.seal import DigestsInPassing
from snapshotd.daemon.source import Source
from snapshotd.daemon.sources import LocalSource, PeerSource, Sources
from snapshotd.daemon.windows import Input, run_windows
from snapshotd.erasure import Codec, ParityRow, StripeGeometry
from snapshotd.errors import LayoutError, UsageError
from snapshotd.failpoints import failpoint
from snapshotd.layout import root_digest
from snapshotd.v1 import control_pb2 as control

__all__ = ["build_parity", "check_stripe_set", "clear_gaps", "geometry_of", "has_part", "seal_parity"]

_SEALED_S: Final = 0.5
"""How much later than this node another one may seal a step whose parity nobody has ordered."""


def build_parity(
    protect: control.Protect,
    node_id: str,
    arena: Arena,
    sources: Sources,
    codec: Codec,
    cancel: threading.Event | None = None,
) -> list[control.ParityRef]:
    """
    Build and seal the parity files of ``node_id`` for all stripe sets that it is a member of.

    What is there already is not built again. Slots of others without a root digest are waited for, and get theirs from
    who has them: it is in what is returned. On any error, and when ``cancel`` is set (Cancelled), nothing that was
    built by this call stays. SourceFailed says which member could not be read, and why.
    """
    failpoint("daemon.before_encode")
    sources.learn(protect.peers)
    built: list[ParityFile] = []
    refs: list[control.ParityRef] = []
    try:
        for stripe_set in protect.sets:
            if (stripe_set.job, stripe_set.epoch, stripe_set.step) != (protect.job, protect.epoch, protect.step):
                raise UsageError(f"a stripe set of step {stripe_set.step} in an order for step {protect.step}")
            for position, member in enumerate(stripe_set.members):
                if member.node_id == node_id and _holds_parity(stripe_set, position):
                    refs.append(_build(stripe_set, position, arena, sources, codec, cancel, built))
    except BaseException:
        for parity in built:
            arena.release(parity)
        raise
    return refs


def has_part(protect: control.Protect, node_id: str) -> bool:
    """
    Whether this node holds any of the parity of that step: of small slots not every node does. Of an order that is
    wrong, too: to build it says why.
    """
    try:
        return any(
            member.node_id == node_id and _holds_parity(stripe_set, position)
            for stripe_set in protect.sets
            for position, member in enumerate(stripe_set.members)
        )
    except LayoutError:
        return True


def _holds_parity(stripe_set: control.StripeSet, position: int) -> bool:
    return stripe_set.m > 0 and geometry_of(stripe_set).parity_bytes(position) > 0


def geometry_of(stripe_set: control.StripeSet) -> StripeGeometry:
    """Return the geometry of a stripe set. LayoutError where there is none with these members and this m."""
    return _geometry(tuple(member.slot.file_bytes for member in stripe_set.members), stripe_set.m)


@lru_cache(maxsize=64)
def _geometry(lengths: tuple[int, ...], m: int) -> StripeGeometry:
    """Sizes are stable from step to step."""
    return StripeGeometry(lengths, m)


def check_stripe_set(stripe_set: control.StripeSet) -> None:
    """Raise UsageError for members that do not belong to the set's step."""
    for position, member in enumerate(stripe_set.members):
        slot = member.slot
        if slot.file_bytes and (slot.job, slot.epoch, slot.step) != (stripe_set.job, stripe_set.epoch, stripe_set.step):
            raise UsageError(
                f"member {position} of the stripe set is of job {slot.job!r}, epoch {slot.epoch}, step {slot.step}; "
                f"the set is of job {stripe_set.job!r}, epoch {stripe_set.epoch}, step {stripe_set.step}"
            )


def seal_parity(
    arena: Arena,
    parity: ParityFile,
    stripe_set: control.StripeSet,
    position: int,
    digests: bytes,
) -> control.ParityRef:
    """Write the record of a parity file whose bytes are all there."""
    ref = control.ParityRef(
        set=stripe_set, position=position, file_bytes=parity.file_bytes, root_digest=root_digest(digests)
    )
    failpoint("daemon.after_encode")
    arena.seal(parity, ref, digests)
    return ref


def clear_gaps(parity: ParityFile, rows: list[ParityRow]) -> None:
    """Between rows are some bytes that belong to none; a file from the pool has somebody's old bytes there."""
    end = 0
    for row in rows:
        if row.length:
            parity.view[end : row.offset] = bytes(row.offset - end)
            end = row.offset + row.length


def _build(
    stripe_set: control.StripeSet,
    position: int,
    arena: Arena,
    sources: Sources,
    codec: Codec,
    cancel: threading.Event | None,
    built: list[ParityFile],
) -> control.ParityRef:
    check_stripe_set(stripe_set)
    geometry = geometry_of(stripe_set)
    wanted = control.ParityRef(set=stripe_set, position=position, file_bytes=geometry.parity_bytes(position))
    existing = arena.find(parity_key(wanted))
    if isinstance(existing, ParityFile) and existing.ref is not None and existing.ref.set == stripe_set:
        found = existing.ref
        if not arena.verify(existing):
            return found  # the order came twice
    check_cancel(cancel, "encoding")
    parity = arena.create_parity(wanted, wanted.file_bytes)
    built.append(parity)
    rows = geometry.parity_rows(position)
    clear_gaps(parity, rows)
    needed = {p for row in rows for p in geometry.contributors(row.stripe) if _gives(geometry, p, row.stripe)}
    unknown = {p for p, member in enumerate(stripe_set.members) if geometry.lengths[p] and not member.slot.root_digest}
    with ExitStack() as stack:
        members: dict[int, LocalSource | PeerSource] = {}
        for p in sorted(needed | unknown):
            member = stripe_set.members[p]
            wait_s = _SEALED_S if p in unknown else 0.0
            members[p] = sources.slot(member.slot, member.node_id, cancel, wait_s=wait_s)
            stack.callback(members[p].close)
        # Those of which nothing is encoded here are asked who they are before the others are read.
        others: list[Source] = [members[p] for p in sorted(unknown - needed)]
        asked = [stack.enter_context(other.stream(0, 0)) for other in others]
        digests = DigestsInPassing(parity.view, parity.file_bytes)
        for row in rows:
            _encode(geometry, row, parity, digests, members, codec, cancel)
        for stream in asked:
            stream.take(0, memoryview(b""))
        if unknown:
            stripe_set = _with_roots(stripe_set, {p: members[p].root for p in unknown})
    return seal_parity(arena, parity, stripe_set, position, digests.finish(cancel))


def _gives(geometry: StripeGeometry, position: int, stripe: int) -> bool:
    begin, end = geometry.unit_range(position, stripe)
    return begin < end


def _with_roots(stripe_set: control.StripeSet, roots: Mapping[int, str]) -> control.StripeSet:
    """A stripe set whose slots are known now."""
    whole = control.StripeSet()
    whole.CopyFrom(stripe_set)
    for position, root in roots.items():
        whole.members[position].slot.root_digest = root
    return whole


def _encode(
    geometry: StripeGeometry,
    row: ParityRow,
    parity: ParityFile,
    digests: DigestsInPassing,
    members: Mapping[int, LocalSource | PeerSource],
    codec: Codec,
    cancel: threading.Event | None,
) -> None:
    def place(begin: int, end: int) -> memoryview:
        return parity.view[row.offset + begin : row.offset + end]

    def encode(begin: int, end: int, views: list[memoryview]) -> None:
        if not mirrored:
            with place(begin, end) as out:
                codec.encode_row(geometry.k, geometry.m, row.row, views, out)
        digests.wrote(row.offset + begin, row.offset + end)
        failpoint("daemon.mid_encode")

    inputs: list[Input] = []
    for contributor in geometry.contributors(row.stripe):
        begin, end = geometry.unit_range(contributor, row.stripe)
        inputs.append(Input(members.get(contributor), begin, end))
    source = inputs[0].source
    mirrored = geometry.k == 1 and source is not None and not source.is_local
    run_windows(inputs, row.length, encode, cancel=cancel, place=place if mirrored else None)
