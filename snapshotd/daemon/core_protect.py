"""
The parity that this node builds of a step: because it is told to, or because it was told before.

Rule 1: one step at a time, and what the coordinator orders comes first.
Rule 2: an order that was carried out stands until the epoch ends. When all ranks here have sealed a later step, of the
same layouts, its parity is built at once, from what the peers have sealed of it. The report of the seal waits for that,
`HOLD_S` and a tick at most: in a healthy job one message says both.
Rule 3: nothing depends on that. What was begun without an order and cannot be finished is taken back by the report of
the seal without it, and nothing more is begun so before the next order was carried out.
Rule 4: a step whose workers go may never be whole for the coordinator, which would know nothing of the parity that it
has not ordered: what was built is told whole then.
"""

from __future__ import annotations

from snapshotd.daemon.core_slots import Slots
from snapshotd.daemon.core_state import JobState, NodeState, SnapshotKey, parity_key
from snapshotd.daemon.events import BuildParity, DeleteParity, ParityAborted, ParityFinished
from snapshotd.stripesets import set_digest
from snapshotd.v1 import control_pb2 as control

__all__ = ["Protects"]


class Protects:
    """Decides which parity is built here, and says what became of it."""

    def __init__(self, state: NodeState, slots: Slots) -> None:
        self._state = state
        self._slots = slots

    # ------------------------------------------------------------ orders

    def on_ordered(self, job: JobState, protect: control.Protect) -> None:
        key = (protect.epoch, protect.step)
        if job.committed is not None and key <= job.committed:
            self._state.count("stale_messages")
            return
        mine = self._my_positions(protect)
        for one, position in mine:
            slot = one.members[position].slot
            if slot.file_bytes and self._slots.holding(job.name, key, slot.rank) is None:
                self._tell_failed(protect, f"the slot of rank {slot.rank} is not here any more")
                return
        if key in job.built and self._is_built(job, protect):
            job.standing = protect
            self._tell_built(job, protect)
            return
        if job.building is not None:
            if job.unasked is None and (job.building.epoch, job.building.step) == key:
                return
            self._slots.cancel_build(job)
        job.built.discard(key)
        self._build(job, protect)

    def _my_positions(self, protect: control.Protect) -> list[tuple[control.StripeSet, int]]:
        me = self._state.settings.node_id
        return [
            (one, position)
            for one in protect.sets
            for position, member in enumerate(one.members)
            if member.node_id == me
        ]

    def _is_built(self, job: JobState, protect: control.Protect) -> bool:
        """Whether the parity that is here is of just these sets: without an order others may have been meant."""
        for one, position in self._my_positions(protect):
            ref = job.parities.get((one.epoch, one.step, one.group, one.lane, position))
            if ref is not None and ref.set != one:
                return False
        return True

    def _build(self, job: JobState, protect: control.Protect) -> None:
        if (protect.epoch, protect.step) in job.cancelling:
            # The cancelled build of the same step has not ended yet.
            job.build_next = protect
            return
        job.building = protect
        self._state.do(BuildParity(protect=protect))

    # ------------------------------------------------------------ without an order

    def begin_unasked(self, job: JobState, report: control.NodeSealed) -> bool:
        """
        All ranks here have just sealed a step: build its parity if an order stands. True: the report is kept, and goes
        to the coordinator by itself.
        """
        order = self._standing_order(job, report)
        if order is None:
            return False
        report.protecting = True
        job.unasked = report
        self._state.hold(report)
        self._build(job, order)
        return True

    def _standing_order(self, job: JobState, report: control.NodeSealed) -> control.Protect | None:
        """The order that stands, for the step of the report; the slots of peers without their root digests."""
        stands = job.standing
        if stands is None or job.building is not None or not self._state.connected:
            return None
        if (job.epoch, report.step) in job.cancelling or report.step <= stands.step:
            return None
        sealed = {shard.slot.rank: shard.slot for shard in report.shards}
        order = control.Protect(job=job.name, epoch=job.epoch, step=report.step)
        for stripe_set in stands.sets:
            again = order.sets.add()
            again.CopyFrom(stripe_set)
            again.step = report.step
            for member in again.members:
                if not member.slot.file_bytes:
                    continue
                if member.node_id != self._state.settings.node_id:
                    member.slot.step, member.slot.root_digest = report.step, ""
                    continue
                slot = sealed.pop(member.slot.rank, None)
                if slot is None or (slot.file_bytes, slot.layout_hash) != (
                    member.slot.file_bytes,
                    member.slot.layout_hash,
                ):
                    return None
                member.slot.CopyFrom(slot)
        return order if not sealed else None

    # ------------------------------------------------------------ endings

    def on_finished(self, event: ParityFinished) -> None:
        job, key = self._state.job(event.job), (event.epoch, event.step)
        following = self._after_cancel(job, key)
        order, unasked = None, None
        if job.building is not None and (job.building.epoch, job.building.step) == key:
            order, job.building = job.building, None
            unasked, job.unasked = job.unasked, None
        wanted = any(slot.key == key for slot in self._slots.sealed(event.job))
        if not wanted or event.epoch < job.epoch:
            for ref in event.parities:
                if parity_key(ref) not in job.parities:
                    self._state.do(DeleteParity(parity=ref))
            return
        for ref in event.parities:
            job.parities[parity_key(ref)] = ref
        job.built.add(key)
        self._state.count("parity_us", int(event.seconds * 1e6))
        if unasked is not None:
            self._tell_unasked(job, unasked, event)
            job.built_unasked.add(key)
            here = {one.rank for one in self._state.workers_of(job.name) if one.epoch == job.epoch}
            if not here >= {shard.slot.rank for shard in unasked.shards}:
                self.tell_whole(job)
        elif order is not None:
            job.standing = order
            self._tell_built(job, order)
        elif following is not None:
            self.on_ordered(job, following)
        elif event.parities:  # it was too late to stop it: what there is now may be another coordinator's news
            change = control.InventoryChange(parities_added=event.parities)
            self._state.tell(control.NodeMessage(inventory_change=change))

    def on_aborted(self, event: ParityAborted) -> None:
        job = self._state.job(event.job)
        if (event.epoch, event.step) in job.cancelling:
            following = self._after_cancel(job, (event.epoch, event.step))
            if following is not None and following.epoch == job.epoch:
                self.on_ordered(job, following)
            return
        building = job.building
        if building is None or (building.epoch, building.step) != (event.epoch, event.step):
            return
        job.building = None
        if job.unasked is not None:
            self._state.count("unasked_failures")
            job.standing = None
            self._slots.take_back_unasked(job)
            return
        self._state.count("parity_failures")
        self._tell_failed(building, event.reason)

    def _after_cancel(self, job: JobState, key: SnapshotKey) -> control.Protect | None:
        """A cancelled build has ended; return the same step's Protect that came meanwhile."""
        job.cancelling.discard(key)
        following = job.build_next
        if following is None or (following.epoch, following.step) != key:
            return None
        job.build_next = None
        return following

    # ------------------------------------------------------------ words

    def _tell_built(self, job: JobState, order: control.Protect) -> None:
        built = control.ParityBuilt(job=job.name, epoch=order.epoch, step=order.step)
        for one, position in self._my_positions(order):
            if (one.epoch, one.step, one.group, one.lane, position) in job.parities:
                built.lanes.append(one.lane)
        self._state.tell(control.NodeMessage(parity_built=built))

    def _tell_unasked(self, job: JobState, report: control.NodeSealed, event: ParityFinished) -> None:
        built = control.ParityBuilt(job=job.name, epoch=event.epoch, step=event.step, unasked=True)
        for ref in event.parities:
            built.lanes.append(ref.set.lane)
            built.sets.append(set_digest(ref.set))
        self._state.count("unasked_parities")
        if self._state.take_held(report):
            report.protecting = False
            report.built.CopyFrom(built)
            self._state.tell(control.NodeMessage(sealed=report))
        else:
            self._state.tell(control.NodeMessage(parity_built=built))

    def tell_whole(self, job: JobState) -> None:
        """A worker is gone: say what was built without an order, with its stripe sets."""
        keys, job.built_unasked = job.built_unasked, set()
        refs = [ref for place, ref in job.parities.items() if place[:2] in keys]
        if refs:
            self._state.tell(control.NodeMessage(inventory_change=control.InventoryChange(parities_added=refs)))

    def _tell_failed(self, protect: control.Protect, reason: str) -> None:
        failed = control.ParityFailed(job=protect.job, epoch=protect.epoch, step=protect.step, reason=reason)
        self._state.tell(control.NodeMessage(parity_failed=failed))
