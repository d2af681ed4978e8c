"""
What the coordinator orders, and what a node reports to it.

Rule: an order that comes twice is worked off once and answered each time.
"""

from __future__ import annotations

from snapshotd.daemon.core_protect import Protects
from snapshotd.daemon.core_slots import Slots
from snapshotd.daemon.core_state import JobState, NodeState, Slot, SnapshotKey, State, Worker, parity_key
from snapshotd.daemon.events import (
    DeleteParity,
    DeleteSlot,
    PersistSlots,
    RebuildFinished,
    RebuildObject,
    SealPersisted,
    ServeRestore,
)
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["Orders"]

_DONE_KEPT = 8

_DECISIONS = {
    control.RESTORE_KIND_FRESH: worker.RestoreDecision.KIND_FRESH,
    control.RESTORE_KIND_REFUSED: worker.RestoreDecision.KIND_REFUSED,
}


class Orders:
    """Works off the coordinator's messages; those about parity are `protects`'."""

    def __init__(self, state: NodeState, slots: Slots) -> None:
        self._state = state
        self._slots = slots
        self.protects = Protects(state, slots)

    def on_message(self, message: control.CoordinatorMessage) -> None:
        body = message.WhichOneof("body")
        if body == "welcome":
            for committed in message.welcome.committed:
                self._on_committed(committed)
            return
        if body == "rebuild":
            self._on_rebuild(message.rebuild)
            return
        if body == "persist":
            self._on_persist(message.persist)
        elif body == "persist_seal":
            self._on_persist_seal(message.persist_seal)
        elif body == "committed":
            self._on_committed(message.committed)
        elif body is not None:
            self._on_epoch_message(body, message)

    def _on_epoch_message(self, body: str, message: control.CoordinatorMessage) -> None:
        """Messages that hold for the newest epoch only."""
        order = getattr(message, body)
        job = self._state.job(order.job)
        if order.epoch < job.epoch:
            self._state.count("stale_messages")
            return
        if order.epoch > job.epoch and job.enter(order.epoch):
            self._slots.cancel_build(job)
        if body == "epoch_formed":
            self._on_formed(job, message.epoch_formed)
        elif body == "protect":
            self.protects.on_ordered(job, message.protect)
        elif body == "abandon":
            self._on_abandon(job, message.abandon)
        elif body == "restore_plan":
            self._on_plan(job, message.restore_plan)
        elif body == "drop":
            self._on_drop(job, message.drop)
        elif body == "set_replica_mode":
            mode = message.set_replica_mode
            job.split, job.split_reason = mode.split, mode.reason
            for one in self._state.workers_of(job.name):
                frame = worker.Frame(replica_mode=worker.ReplicaMode(split=mode.split, reason=mode.reason))
                self._state.send(one.conn, frame)

    # ------------------------------------------------------------ epochs

    def _on_formed(self, job: JobState, formed: control.EpochFormed) -> None:
        job.formed = formed
        me = self._state.settings.node_id
        job.ranks_here = {rank for rank, node_id in enumerate(formed.nodes) if node_id == me}
        for one in self._state.workers_of(job.name):
            self.assign_epoch(job, one)
        self._slots.drop_orphans(job)
        self.report_all(job)
        self._slots.serve(job)
        self.answer_queries(job)

    def assign_epoch(self, job: JobState, one: Worker, *, attaching: bool = False) -> None:
        """
        Tell a worker whose launcher knew no epoch which one it is in; once per (epoch, rank) and process.

        attaching: it has just come. Then only a process that was told before is told again; of another one the
        coordinator says whether it belongs to the epoch or begins a new round of its launch.
        """
        formed = job.formed
        if one.hello.epoch or formed is None or formed.formation != one.hello.formation:
            return
        here = one.rank < len(formed.nodes) and formed.nodes[one.rank] == self._state.settings.node_id
        known = job.assigned.get(one.rank)
        if here and known in ((one.hello.nonce,) if attaching else (None, one.hello.nonce)):
            job.assigned[one.rank] = one.hello.nonce
            one.epoch = formed.epoch

    # ------------------------------------------------------------ reports

    def hello(self) -> control.NodeHello:
        state, settings = self._state, self._state.settings
        hello = control.NodeHello(
            node_id=settings.node_id,
            nonce=settings.nonce,
            version=settings.version,
            bulk_address=settings.bulk_address,
            domain=settings.domain,
            budget_bytes=settings.budget_bytes,
            persist_every_steps=settings.persist_every_steps,
            persist_every_s=settings.persist_every_s,
            durables=state.durables.values(),
            workers=[one.attached() for one in state.workers.values() if not one.finished],
            epochs={job.name: job.epoch for job in state.jobs.values() if job.epoch},
        )
        for slot in state.slots.values():
            if slot.state is State.SEALED and slot.ref is not None and not slot.doomed:
                hello.slots.append(slot.ref)
            elif slot.state is State.SEALING and slot.promised and slot.ref is not None:
                hello.sealing.append(slot.ref)
        for job in state.jobs.values():
            hello.parities.extend(job.parities.values())
        return hello

    def report_all(self, job: JobState) -> None:
        """Say again which uncommitted steps of the epoch are sealed here, oldest first."""
        steps = {slot.key[1] for slot in self._slots.sealed(job.name) if self._is_uncommitted(job, slot.key)}
        for step in sorted(steps):
            self.report_sealed(job, step)
        self.report_partial(job)

    def report_sealed(self, job: JobState, step: int, *, now: bool = False) -> None:
        """
        Say that all ranks here have sealed a step, once they have; where the last of them has done it ``now`` and the
        parity is being built at once, with that.
        """
        slots = self._slots.sealed(job.name, (job.epoch, step))
        expected = self._expected_ranks(job)
        if expected and expected <= {slot.rank for slot in slots if not slot.rebuilt}:
            report = self._sealed_report(job, step, slots)
            if not now or not self.protects.begin_unasked(job, report):
                self._state.tell(control.NodeMessage(sealed=report))

    def report_partial(self, job: JobState) -> None:
        """Say which ranks sealed a step that another rank here has left out: it cannot become whole."""
        expected = self._expected_ranks(job)
        if len(expected) < 2:
            return
        for step in sorted({slot.key[1] for slot in self._slots.sealed(job.name)}):
            key = (job.epoch, step)
            if not self._is_uncommitted(job, key):
                continue
            slots = self._slots.sealed(job.name, key)
            sealed = {slot.rank for slot in slots}
            sealing = [slot for slot in self._slots.of_job(job.name) if slot.state is State.SEALING]
            pending = {slot.rank for slot in sealing if slot.key == key}
            left_out = expected - sealed - pending
            if sealed and any(job.progress.get(rank, -1) >= step for rank in left_out):
                self._state.tell(control.NodeMessage(sealed=self._sealed_report(job, step, slots)))

    def report_late(self, job: JobState, slot: Slot) -> None:
        """Say that a slot is sealed whose worker is gone; with all of the step here, none of which may be known."""
        slot.promised = False
        added = [one.ref for one in self._slots.sealed(job.name, slot.key) if one.ref is not None]
        self._state.tell(control.NodeMessage(inventory_change=control.InventoryChange(slots_added=added)))

    def _sealed_report(self, job: JobState, step: int, slots: list[Slot]) -> control.NodeSealed:
        if self._state.connected:
            job.reported.add((job.epoch, step))
        slots = sorted(slots, key=lambda slot: slot.rank)
        shards = [slot.shard for slot in slots if slot.shard is not None and not slot.rebuilt]
        if self._state.connected and any(shard.pledged for shard in shards):
            job.pledged.add((job.epoch, step))
        return control.NodeSealed(job=job.name, epoch=job.epoch, step=step, shards=shards)

    def _expected_ranks(self, job: JobState) -> set[int]:
        if job.ranks_here is not None:
            return job.ranks_here
        current = [one for one in self._state.workers_of(job.name) if one.epoch == job.epoch]
        count = max((one.hello.local_world_size for one in current), default=0)
        return {one.rank for one in current} if current and len(current) >= count else set()

    def _is_uncommitted(self, job: JobState, key: SnapshotKey) -> bool:
        return key[0] == job.epoch and (job.committed is None or key > job.committed)

    # ------------------------------------------------------------ commit

    def _on_committed(self, committed: control.Committed) -> None:
        job, key = self._state.job(committed.job), (committed.epoch, committed.step)
        if key[0] < job.line_epoch and key not in job.kept:
            # An older epoch's commit that comes after the decision what the line goes on from.
            self._state.count("stale_messages")
            return
        if job.committed is not None and key < job.committed:
            self._state.count("stale_messages")
            return
        if job.enter(key[0]):
            self._slots.cancel_build(job)
        job.committed = key
        job.kept = {one for one in job.kept if one >= key}
        job.built_unasked = {one for one in job.built_unasked if one > key}
        self._slots.free(job, lambda other: other < key)

    def _on_abandon(self, job: JobState, abandon: control.Abandon) -> None:
        if abandon.min_step < job.min_step:
            self._state.count("stale_messages")
            return
        job.min_step = abandon.min_step
        self._state.count("abandoned_steps")

        def gone(key: SnapshotKey) -> bool:
            return self._is_uncommitted(job, key) and key[1] <= abandon.up_to_step and key[1] < abandon.min_step

        self._slots.free(job, gone)

    def _on_drop(self, job: JobState, drop: control.DropSnapshots) -> None:
        keep = {(one.epoch, one.step) for one in drop.keep}
        job.line_epoch, job.kept = drop.epoch, keep
        if job.committed is not None and job.committed[0] < drop.epoch:
            job.committed = min(keep) if keep else None
        self._slots.free(job, lambda key: key[0] < drop.epoch and key not in keep)

    # ------------------------------------------------------------ rebuild

    def _on_rebuild(self, order: control.Rebuild) -> None:
        one = order.set
        job = self._state.job(one.job)
        key = (one.epoch, one.step)
        place = (one.epoch, one.step, one.group, one.lane, order.position, order.slot, order.parity)
        done = control.RebuildDone(
            job=one.job, epoch=one.epoch, step=one.step, group=one.group, lane=one.lane, position=order.position
        )
        slot = self._slots.holding(job.name, key, one.members[order.position].slot.rank) if order.slot else None
        parity = job.parities.get((*key, one.group, one.lane, order.position)) if order.parity else None
        if (slot is not None or not order.slot) and (parity is not None or not order.parity):
            done.ok = True
            if slot is not None and slot.ref is not None:
                done.slot.CopyFrom(slot.ref)
            if parity is not None:
                done.parity.CopyFrom(parity)
            self._state.tell(control.NodeMessage(rebuild_done=done))
        elif place not in job.rebuilding:
            job.rebuilding[place] = self._state.new_slot_id()
            self._state.do(RebuildObject(rebuild=order, slot=job.rebuilding[place]))

    def on_rebuild_finished(self, event: RebuildFinished) -> None:
        done = event.done
        job, key = self._state.job(done.job), (done.epoch, done.step)
        part = (*key, done.group, done.lane, done.position)
        for place in [place for place in job.rebuilding if place[:5] == part]:
            if done.ok and (place[5] != done.HasField("slot")) and (place[6] != done.HasField("parity")):
                continue
            del job.rebuilding[place]
        past = (job.committed is not None and key < job.committed) or (key[0] < job.line_epoch and key not in job.kept)
        if done.ok and past:
            if event.slot is not None:
                self._state.do(DeleteSlot(slot=event.slot))
            if done.HasField("parity"):
                self._state.do(DeleteParity(parity=done.parity))
            done = control.RebuildDone(
                job=done.job,
                epoch=done.epoch,
                step=done.step,
                group=done.group,
                lane=done.lane,
                position=done.position,
                ok=False,
                reason="nobody needs this snapshot any more",
            )
        elif done.ok:
            if done.HasField("slot") and event.slot is not None:
                self._slots.add_sealed(event.slot, done.slot, "", rebuilt=True)
                self._state.count("rebuilt_slots")
            if done.HasField("parity"):
                job.parities[parity_key(done.parity)] = done.parity
                self._state.count("rebuilt_parities")
        else:
            self._state.count("rebuild_failures")
        self._state.tell(control.NodeMessage(rebuild_done=done))

    # ------------------------------------------------------------ persist

    def _on_persist(self, order: control.Persist) -> None:
        job, key = self._state.job(order.job), (order.epoch, order.step)
        if key in job.persisted:
            self._state.tell(control.NodeMessage(persist_done=job.persisted[key]))
            return
        if key in job.persisting:
            return
        if not self._slots.sealed(job.name, key):
            done = control.PersistDone(
                job=order.job, epoch=order.epoch, step=order.step, ok=False, reason="this step is not here any more"
            )
            self._state.tell(control.NodeMessage(persist_done=done))
            return
        job.persisting.add(key)
        self._state.do(PersistSlots(persist=order))

    def on_persist_finished(self, done: control.PersistDone) -> None:
        job, key = self._state.job(done.job), (done.epoch, done.step)
        job.persisting.discard(key)
        if done.ok:
            job.persisted[key] = done
            for old in sorted(job.persisted)[:-_DONE_KEPT]:
                del job.persisted[old]
        self._state.count("persisted" if done.ok else "persist_failures")
        self._state.tell(control.NodeMessage(persist_done=done))
        self._slots.free_doomed(job)
        self._slots.serve(job)

    def _on_persist_seal(self, order: control.PersistSeal) -> None:
        job, key = self._state.job(order.job), (order.epoch, order.step)
        if key in job.durables_done:
            self._state.tell(control.NodeMessage(persist_sealed=job.durables_done[key]))
        elif key not in job.sealing_durable:
            job.sealing_durable.add(key)
            self._state.do(SealPersisted(seal=order))

    def on_durable_sealed(self, done: control.PersistSealed) -> None:
        job, key = self._state.job(done.durable.job), (done.durable.epoch, done.durable.step)
        job.sealing_durable.discard(key)
        if done.ok:
            job.durables_done[key] = done
            for old in sorted(job.durables_done)[:-_DONE_KEPT]:
                del job.durables_done[old]
            self._state.durables[(job.name, *key)] = done.durable
            for removed in done.removed:
                self._state.durables.pop((removed.job, removed.epoch, removed.step), None)
        self._state.tell(control.NodeMessage(persist_sealed=done))

    # ------------------------------------------------------------ restore

    def _on_plan(self, job: JobState, plan: control.RestorePlan) -> None:
        known = job.plan
        if known is not None and (known.kind, known.source_epoch, known.source_step) != (
            plan.kind,
            plan.source_epoch,
            plan.source_step,
        ):
            self._state.count("contradicting_plans")
            return
        job.plan = plan
        self.answer_queries(job)

    def answer_queries(self, job: JobState) -> None:
        """Answer the workers that asked what to restore; ask the coordinator where its plan is not known yet."""
        for one in self._state.workers_of(job.name):
            if one.query is None or not one.epoch or one.epoch != job.epoch:
                continue
            if job.plan is None:
                if not job.plan_asked and self._state.connected:
                    job.plan_asked = True
                    asked = control.RestoreAsked(job=job.name, epoch=one.epoch, rank=one.rank)
                    self._state.tell(control.NodeMessage(restore_asked=asked))
                continue
            request_id, _ = one.query
            one.query = None
            self._answer(job.plan, one, request_id)

    def _answer(self, plan: control.RestorePlan, one: Worker, request_id: int) -> None:
        kind = _DECISIONS.get(plan.kind)
        if kind is None:
            one.restoring = True
            frame = worker.Frame(request_id=request_id, restore_query=worker.RestoreQuery())
            self._state.do(
                ServeRestore(conn=one.conn, rank=one.rank, world_size=one.world_size, plan=plan, frame=frame)
            )
            return
        if plan.kind == control.RESTORE_KIND_FRESH:
            one.first_step_due = True
        decision = worker.RestoreDecision(kind=kind, epoch=plan.epoch, reason=plan.reason, lost_steps=plan.lost_steps)
        self._state.send(one.conn, worker.Frame(request_id=request_id, restore_decision=decision))

    def give_up_queries(self, job: JobState) -> None:
        """Answer "not decided" to workers that have waited for too long (they ask again); turn older epochs away."""
        for one in self._state.workers_of(job.name):
            if one.query is not None and one.epoch and one.epoch < job.epoch:
                text = f"epoch {one.epoch} of job {job.name} is over, it is at {job.epoch}: start this worker again"
                error = worker.WorkerError(code="STALE_EPOCH", message=text, fatal=True)
                self._state.count("stale_workers")
                self._state.send(one.conn, worker.Frame(request_id=one.query[0], error=error))
                one.query = None
                continue
            if one.query is None or self._state.now - one.query[1] < self._state.settings.restore_wait_s:
                continue
            request_id, _ = one.query
            one.query, job.plan_asked = None, False
            where = "the coordinator is away" if not self._state.connected else "the coordinator has not decided yet"
            decision = worker.RestoreDecision(kind=worker.RestoreDecision.KIND_UNDECIDED, epoch=one.epoch, reason=where)
            self._state.send(one.conn, worker.Frame(request_id=request_id, restore_decision=decision))
