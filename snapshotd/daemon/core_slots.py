"""
Slots and parity of a node: who may write, what counts, what may be freed.

Rule 1: the newest committed snapshot is freed by nothing but a newer commit, or the coordinator's DropSnapshots.
Rule 2: a sealed step that the coordinator may commit at any moment (its parity is whole here, or its slots are pledged)
is never overwritten.
Rule 3: at most `generations` slots per rank; slots kept for older epochs count, but one can always be granted. A slot
that a reader holds for long does not count: another takes its place, if there is memory, until the reader has done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from snapshotd.daemon.core_state import JobState, NodeState, Slot, SnapshotKey, State, Worker
from snapshotd.daemon.events import (
    CancelParity,
    CreateSlot,
    DeleteParity,
    DeleteSlot,
    SealSlot,
    SlotId,
    SlotSealed,
    VoidSlot,
)
from snapshotd.layout import KnownDigests
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["Slots"]

_RETRY_REFUSED_S = 5.0
_HELD_S = 1.0
"""A slot that nobody wants any more and that is read for longer than this is held by a tool: protection takes less."""


class Slots:
    """The slots of a node."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    # ------------------------------------------------------------ queries

    def of_job(self, job: str) -> list[Slot]:
        return [slot for slot in self._state.slots.values() if slot.job == job]

    def sealed(self, job: str, key: SnapshotKey | None = None) -> list[Slot]:
        return [
            slot
            for slot in self._state.slots.values()
            if slot.state is State.SEALED and slot.job == job and (key is None or slot.key == key)
        ]

    def holding(self, job: str, key: SnapshotKey, rank: int) -> Slot | None:
        return next((slot for slot in self.sealed(job, key) if slot.ref is not None and slot.ref.rank == rank), None)

    # ------------------------------------------------------------ granting

    def serve(self, job: JobState) -> None:
        """Give each worker of the job what it may have: a grant, or a slot on its way to one."""
        for one in self._state.workers_of(job.name):
            self._serve_worker(job, one)

    def _serve_worker(self, job: JobState, one: Worker) -> None:
        if not one.layout_hash or one.finished or (job.epoch and one.epoch and one.epoch < job.epoch):
            return
        own: list[Slot] = []
        for slot in self._own(job, one):
            if slot.state is State.FREE and slot.layout_hash != one.layout_hash:
                self._delete(slot)
            else:
                own.append(slot)
        states = [slot.state for slot in own]
        coming = State.FREE in states or State.CREATING in states or State.VOIDING in states
        if not coming and (one.granted is None or len(own) < self._limit(job, own)):
            self._acquire(job, one, own)
            own = self._own(job, one)
            states = [slot.state for slot in own]
        if one.layout_request is not None and State.CREATING not in states:
            self._reply_layout(one, accepted=True, reason="")
        if State.FREE in states and one.granted is None and one.epoch and one.epoch == job.epoch:
            free = own[states.index(State.FREE)]
            free.state, free.conn, one.granted = State.GRANTED, one.conn, free.slot
            grant = worker.Grant(
                slot_id=free.slot,
                path=free.path,
                file_bytes=free.file_bytes,
                layout_hash=free.layout_hash,
                min_step=job.min_step,
            )
            self._state.send(one.conn, worker.Frame(grant=grant))

    def _own(self, job: JobState, one: Worker) -> list[Slot]:
        """The slots of a worker's rank, without those that readers hold."""
        rank, name = one.rank, job.name
        return [
            slot
            for slot in self._state.slots.values()
            if slot.rank == rank and slot.job == name and not self._is_held(slot)
        ]

    def _is_held(self, slot: Slot) -> bool:
        return slot.state is State.VOIDING and self._state.now - slot.voided_at >= _HELD_S

    def _limit(self, job: JobState, own: list[Slot]) -> int:
        kept = sum(slot.state is State.SEALED and slot.key[0] < job.epoch for slot in own)
        limit = max(self._state.settings.generations, kept + 1)
        if not self._state.connected and any(slot.state is State.SEALED and self._exposed(job, slot) for slot in own):
            # Neither may be overwritten while nobody can say which of them is the committed one.
            limit += 1
        return limit

    def _acquire(self, job: JobState, one: Worker, own: list[Slot]) -> None:
        """Get a worker a slot: adopt one that nobody uses, create one, or (coordinator away) overwrite one."""
        if len(own) < self._limit(job, own):
            orphan = next((slot for slot in self.of_job(job.name) if self._is_orphan(job, slot)), None)
            if orphan is not None and orphan.layout_hash == one.layout_hash:
                orphan.rank = one.rank
                return
            if orphan is not None:
                self._delete(orphan)
            if one.refused_at is not None and self._state.now - one.refused_at < _RETRY_REFUSED_S:
                return
            slot = Slot(
                slot=self._state.new_slot_id(),
                job=job.name,
                rank=one.rank,
                state=State.CREATING,
                layout_hash=one.layout_hash,
                file_bytes=one.file_bytes,
            )
            if any(each.rank == one.rank and self._is_held(each) for each in self.of_job(job.name)):
                self._state.count("slots_beside_held")
            self._state.slots[slot.slot] = slot
            self._state.do(self._order(job, one, slot.slot))
        elif not self._state.connected and one.granted is None:
            self._overwrite(job, own)

    def _order(self, job: JobState, one: Worker, slot: SlotId) -> CreateSlot:
        """The order for a slot, with what the job needs on this node in all (ranks not yet known: as this one)."""
        here = {each.rank: each.file_bytes for each in self._state.workers.values() if each.job == job.name}
        lanes = [nbytes for nbytes in here.values() if nbytes]
        lanes += [one.file_bytes] * (one.hello.local_world_size - len(lanes))
        n = len(set(job.formed.nodes)) if job.formed is not None else 1
        m = job.formed.m if job.formed is not None else 0
        return CreateSlot(
            slot=slot,
            job=job.name,
            header=one.header,
            file_bytes=one.file_bytes,
            lane_bytes=tuple(lanes),
            generations=self._state.settings.generations,
            k=max(1, n - m),
            m=m,
            held_bytes=sum(slot.file_bytes for slot in self.of_job(job.name) if self._is_held(slot)),
        )

    def _overwrite(self, job: JobState, own: list[Slot]) -> None:
        """While the coordinator is away nothing is committed: the oldest step that nobody relies on makes room."""
        choices = [
            slot
            for slot in own
            if slot.state is State.SEALED
            and slot.key[0] == job.epoch
            and not self._is_committed(job, slot.key)
            and not self._exposed(job, slot)
            and slot.key not in job.persisting
        ]
        if choices:
            oldest = min(choices, key=lambda slot: slot.key)
            self._state.count("overwritten_uncommitted")
            self.free_parities(job, lambda key: key == oldest.key)
            self.release(oldest)

    def _exposed(self, job: JobState, slot: Slot) -> bool:
        """Whether the coordinator may commit this step without asking this node again."""
        key = slot.key
        if self._is_committed(job, key) or key[0] != job.epoch:
            return False
        if key in job.unsure:
            return True
        if job.formed is None or job.formed.m == 0:
            return key in job.reported
        return key in job.built or key in job.pledged

    def _is_orphan(self, job: JobState, slot: Slot) -> bool:
        if slot.state is not State.FREE:
            return False
        return job.ranks_here is not None and slot.rank not in job.ranks_here

    def _is_committed(self, job: JobState, key: SnapshotKey) -> bool:
        return job.committed is not None and key <= job.committed

    def created(self, slot_id: SlotId, path: str) -> None:
        slot = self._state.slots.get(slot_id)
        if slot is None or slot.state is not State.CREATING:
            return
        slot.state, slot.path = State.FREE, path
        one = self._state.worker_of(slot.job, slot.rank)
        if one is not None:
            one.refused_at = None
        self.serve(self._state.job(slot.job))

    def refused(self, slot_id: SlotId, reason: str) -> None:
        slot = self._state.slots.pop(slot_id, None)
        if slot is None:
            return
        self._state.count("slots_refused")
        self._state.note("capture", slot.job, f"no slot for rank {slot.rank}: {reason}")
        one = self._state.worker_of(slot.job, slot.rank)
        if one is not None:
            one.refused_at = self._state.now
            # Those of another layout hold the last steps of it, and will never take one of this.
            others = any(
                (other.rank, other.layout_hash) == (slot.rank, slot.layout_hash) for other in self.of_job(slot.job)
            )
            if not others:  # also where it was accepted while the old ones left no room for the question
                one.layout_request = one.layout_id
            self._reply_layout(one, accepted=others, reason="" if others else reason)

    def _reply_layout(self, one: Worker, *, accepted: bool, reason: str) -> None:
        if one.layout_request is None:
            return
        reply = worker.LayoutReply(accepted=accepted, reason=reason, layout_hash=one.layout_hash)
        self._state.send(one.conn, worker.Frame(request_id=one.layout_request, layout_reply=reply))
        one.layout_request = None

    # ------------------------------------------------------------ sealing

    def seal(self, job: JobState, one: Worker, message: worker.Seal) -> bool:
        """Take a filled slot over from its worker. False: it does not count, and is granted again."""
        slot = self._state.slots.get(SlotId(message.slot_id))
        if slot is None or slot.conn != one.conn or slot.state is not State.GRANTED:
            self._state.count("seals_of_unknown_slots")
            return False
        one.granted = None
        slot.conn = None
        stale = one.epoch != job.epoch or message.layout_hash != slot.layout_hash
        if stale or message.step < job.min_step or message.step <= one.last_sealed:
            self._state.count("seals_refused")
            self.release(slot)
            return False
        one.last_sealed = message.step
        slot.state = State.SEALING
        slot.ref = control.SlotRef(
            job=job.name,
            epoch=one.epoch,
            step=message.step,
            rank=one.rank,
            world_size=one.hello.world_size,
            lane=one.hello.local_rank,
            file_bytes=slot.file_bytes,
            layout_hash=slot.layout_hash,
        )
        slot.shard = control.NodeSealed.Shard(
            replica_group=one.replica_group,
            replica_hash=message.replica_hash or one.replica_hash,
            replica_digest=message.replica_digest,
            pledged=slot.file_bytes <= self._state.settings.pledge_bytes,
        )
        known = tuple(KnownDigests(found.first, found.digests) for found in message.digests)
        self._state.do(SealSlot(slot=slot.slot, ref=slot.ref, known=known))
        return True

    def sealed_now(self, event: SlotSealed) -> Slot | None:
        """The record is written: the slot counts, unless its step was given up meanwhile."""
        slot = self._state.slots.get(event.slot)
        if slot is None or slot.state is not State.SEALING:
            return None
        slot.state, slot.ref = State.SEALED, event.ref
        if slot.shard is not None:
            slot.shard.slot.CopyFrom(event.ref)
        job = self._state.job(slot.job)
        late = slot.key[0] == job.epoch and slot.key[1] < job.min_step
        if slot.doomed or late or (job.committed is not None and slot.key < job.committed):
            self.release(slot)
            return None
        return slot

    def ready(self, slot_id: SlotId) -> None:
        slot = self._state.slots.get(slot_id)
        if slot is None or slot.state is not State.VOIDING:
            return
        slot.state = State.FREE
        job = self._state.job(slot.job)
        own = [other for other in self.of_job(slot.job) if other.rank == slot.rank]
        if len(own) > self._limit(job, own):
            self._delete(slot)
        self.serve(job)

    # ------------------------------------------------------------ freeing

    def release(self, slot: Slot) -> None:
        """Make a slot free again, or delete it where nobody here could use it; later, if something holds it."""
        job = self._state.job(slot.job)
        if slot.state in (State.SEALING, State.CREATING) or (slot.state is State.SEALED and slot.key in job.persisting):
            slot.doomed = True
            return
        if slot.state is State.SEALED and slot.ref is not None:
            self._state.freed(slots=[slot.ref])
        slot.ref, slot.shard, slot.conn, slot.doomed, slot.promised = None, None, None, False, False
        one = self._state.worker_of(slot.job, slot.rank)
        wrong = one is not None and one.layout_hash not in ("", slot.layout_hash)
        if slot.rebuilt or wrong:
            self._delete(slot)
        elif slot.state is not State.VOIDING:
            slot.state, slot.voided_at = State.VOIDING, self._state.now
            self._state.do(VoidSlot(slot=slot.slot))

    def free(self, job: JobState, gone: Callable[[SnapshotKey], bool]) -> None:
        """Free the slots and parity of each snapshot that is `gone`."""
        if job.building is not None and gone((job.building.epoch, job.building.step)):
            self.cancel_build(job)
        for slot in self.of_job(job.name):
            if slot.ref is not None and slot.state in (State.SEALED, State.SEALING) and gone(slot.key):
                self.release(slot)
        self.free_parities(job, gone)
        self.serve(job)

    def free_parities(self, job: JobState, gone: Callable[[SnapshotKey], bool]) -> None:
        removed = {key: ref for key, ref in job.parities.items() if gone(key[:2])}
        for key, ref in removed.items():
            del job.parities[key]
            self._state.do(DeleteParity(parity=ref))
        job.built = {key for key in job.built if not gone(key)}
        job.built_unasked = {key for key in job.built_unasked if not gone(key)}
        job.reported = {key for key in job.reported if not gone(key)}
        job.pledged = {key for key in job.pledged if not gone(key)}
        job.unsure = {key for key in job.unsure if not gone(key)}
        self._state.freed(parities=removed.values())

    def free_doomed(self, job: JobState) -> None:
        for slot in self.of_job(job.name):
            if slot.doomed and slot.state is State.SEALED:
                self.release(slot)

    def cancel_build(self, job: JobState) -> None:
        if job.building is not None:
            job.cancelling.add((job.building.epoch, job.building.step))
            self._state.do(CancelParity(job=job.name, epoch=job.building.epoch, step=job.building.step))
        job.building = job.build_next = None
        self.take_back_unasked(job)

    def take_back_unasked(self, job: JobState) -> None:
        """What was begun without an order is not built: the step is sealed here, and that is all."""
        report, job.unasked = job.unasked, None
        if report is not None and (self._state.take_held(report) or report.epoch == job.epoch):
            report.protecting = False
            self._state.tell(control.NodeMessage(sealed=report))

    def drop_orphans(self, job: JobState) -> None:
        """Free slots of ranks that do not run here any more; the ranks that do may adopt those of their layout."""
        layouts = {one.layout_hash for one in self._state.workers_of(job.name)}
        waiting = any(not one.layout_hash for one in self._state.workers_of(job.name))
        for slot in self.of_job(job.name):
            if self._is_orphan(job, slot) and slot.layout_hash not in layouts and not waiting:
                self._delete(slot)

    def worker_gone(self, one: Worker) -> list[control.SlotRef]:
        """Free what it was filling. Return the names of what it had handed over and is still being hashed."""
        handed_over = []
        for slot in list(self._state.slots.values()):
            if slot.conn == one.conn and slot.state is State.GRANTED:
                self.release(slot)
            elif slot.state is State.SEALING and (slot.job, slot.rank, slot.doomed) == (one.job, one.rank, False):
                slot.promised = True
                handed_over.append(slot.ref)
        return [ref for ref in handed_over if ref is not None]

    def lost(self, slot: Slot) -> None:
        """The bytes of a sealed slot are bad: an erasure from now on."""
        change = control.InventoryChange(slots_removed=[slot.ref] if slot.ref is not None else [], reason="corrupt")
        self._state.tell(control.NodeMessage(inventory_change=change))
        self._delete(slot)

    def adopt(self, recovered: Iterable[tuple[SlotId, control.SlotRef, str]]) -> None:
        """Take in what the arena held when the daemon started."""
        for slot_id, ref, path in recovered:
            self.add_sealed(slot_id, ref, path)
            job = self._state.job(ref.job)
            job.epoch = max(job.epoch, ref.epoch)
            job.unsure.add((ref.epoch, ref.step))

    def add_sealed(self, slot_id: SlotId, ref: control.SlotRef, path: str, *, rebuilt: bool = False) -> Slot:
        slot = Slot(
            slot=slot_id,
            job=ref.job,
            rank=ref.rank,
            state=State.SEALED,
            layout_hash=ref.layout_hash,
            file_bytes=ref.file_bytes,
            path=path,
            ref=ref,
            shard=control.NodeSealed.Shard(slot=ref),
            rebuilt=rebuilt,
        )
        self._state.slots[slot_id] = slot
        self._state.next_slot = max(self._state.next_slot, slot_id + 1)
        return slot

    def _delete(self, slot: Slot) -> None:
        del self._state.slots[slot.slot]
        self._state.do(DeleteSlot(slot=slot.slot))
