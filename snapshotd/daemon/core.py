"""
The node: one pure state machine that owns the life of every slot and parity file here.

Rule 1: no I/O, no clock, no thread, no randomness. The shell does the work that the effects name and says how it ended.
Rule 2: nothing of an epoch older than the newest known one is acted on; it is counted as `stale_messages`.
Rule 3: with the coordinator away, capture goes on; with it back, the hello says all that is here.
Rule 4: a connection touches only slots of its own job and rank.

`core_state` has the records, `core_slots` the life of slots and parity, `core_orders` what the coordinator orders,
`core_protect` which parity is built.
"""

from __future__ import annotations

from snapshotd.daemon.core_orders import Orders
from snapshotd.daemon.core_slots import Slots
from snapshotd.daemon.core_state import HOLD_S, JobState, NodeState, Slot, State, Worker, parity_key
from snapshotd.daemon.events import (
    CloseWorker,
    CoordinatorDown,
    CoordinatorSaid,
    CoordinatorUp,
    CorruptionFound,
    DeleteParity,
    Effect,
    Event,
    NodeSettings,
    ParityAborted,
    ParityFinished,
    PersistFinished,
    PersistSealFinished,
    RebuildFinished,
    Recovered,
    ReleaseRestore,
    RestoreServed,
    ServeRestore,
    SlotCreated,
    SlotId,
    SlotReady,
    SlotRefused,
    SlotSealed,
    SlotSealFailed,
    Ticked,
    ToWorker,
    WorkerConn,
    WorkerFrame,
    WorkerGone,
)
from snapshotd.errors import FormatError
from snapshotd.layout import Layout
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["HEARTBEAT_S", "PROTOCOL", "NodeCore"]

PROTOCOL = 1
HEARTBEAT_S = 1.0

_SKIP_NAMES = {number: name.removeprefix("REASON_") for name, number in worker.Skip.Reason.items()}


class NodeCore:
    """Decides everything that a daemon decides."""

    def __init__(self, settings: NodeSettings, recovered: Recovered) -> None:
        self.state = NodeState(settings)
        self.slots = Slots(self.state)
        self.orders = Orders(self.state, self.slots)
        self._heartbeat_at: float | None = None
        self.slots.adopt(recovered.slots)
        for ref in recovered.parities:
            job = self.state.job(ref.set.job)
            job.parities[parity_key(ref)] = ref
            job.epoch = max(job.epoch, ref.set.epoch)
        for durable in recovered.durables:
            self.state.durables[(durable.job, durable.epoch, durable.step)] = durable

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one fact in; return what the shell must do, in this order."""
        self.state.now = now
        match event:
            case WorkerFrame(conn=conn, frame=frame):
                self._on_frame(conn, frame)
            case WorkerGone(conn=conn):
                self._on_worker_gone(conn)
            case CoordinatorUp():
                self._on_coordinator_up()
            case CoordinatorDown():
                self._on_coordinator_down()
            case CoordinatorSaid(message=message):
                self.orders.on_message(message)
            case SlotCreated(slot=slot, path=path):
                self.slots.created(slot, path)
            case SlotRefused(slot=slot, reason=reason):
                self.slots.refused(slot, reason)
            case SlotReady(slot=slot):
                self.slots.ready(slot)
            case SlotSealed():
                self._on_slot_sealed(event)
            case SlotSealFailed(slot=slot, reason=reason):
                self._on_seal_failed(slot, reason)
            case ParityFinished():
                self.orders.protects.on_finished(event)
            case ParityAborted():
                self.orders.protects.on_aborted(event)
            case RebuildFinished():
                self.orders.on_rebuild_finished(event)
            case PersistFinished(done=done):
                self.orders.on_persist_finished(done)
            case PersistSealFinished(done=sealed):
                self.orders.on_durable_sealed(sealed)
            case CorruptionFound():
                self._on_corruption(event)
            case RestoreServed(conn=conn, frame=frame):
                self._on_restore_served(conn, frame)
            case Ticked():
                self._on_tick()
        return self.state.take()

    def status(self) -> dict[str, object]:
        """Return what people see of this node."""
        state = self.state
        by_state = {one.value: 0 for one in State}
        for slot in state.slots.values():
            by_state[slot.state.value] += 1
        return {
            "node_id": state.settings.node_id,
            "connected": state.connected,
            "slots": by_state,
            "jobs": {
                job.name: {
                    "epoch": job.epoch,
                    "committed": list(job.committed) if job.committed is not None else None,
                    "sealed": sorted({slot.key for slot in self.slots.sealed(job.name)}),
                    "parities": len(job.parities),
                    "building": job.building.step if job.building is not None else None,
                    "min_step": job.min_step,
                    "workers": {one.rank: one.last_sealed for one in state.workers_of(job.name)},
                }
                for job in state.jobs.values()
            },
            "counters": dict(sorted(state.counters.items())),
        }

    # ------------------------------------------------------------ workers

    def _on_frame(self, conn: WorkerConn, frame: worker.Frame) -> None:
        body = frame.WhichOneof("body")
        if body == "hello":
            self._on_hello(conn, frame)
            return
        if body == "who_are_you":
            i_am = worker.IAm(node_id=self.state.settings.node_id, version=self.state.settings.version)
            self.state.do(ToWorker(conn=conn, frame=worker.Frame(request_id=frame.request_id, i_am=i_am)))
            return
        one = self.state.workers.get(conn)
        if one is None:
            self._refuse(conn, frame.request_id, "REMOTE_PROTOCOL", "the first frame must be WorkerHello")
            return
        job = self.state.job(one.job)
        if body == "register_layout":
            self._on_layout(job, one, frame)
        elif body == "seal":
            self._on_seal(job, one, frame.seal)
        elif body == "skip":
            reason = _SKIP_NAMES.get(frame.skip.reason, "UNSPECIFIED")
            self.state.count(f"skipped_{reason.lower()}")
            self._skipped(job, one, frame.skip.step, reason)
        elif body == "restore_query":
            one.query = (frame.request_id, self.state.now)
            self.orders.answer_queries(job)
        elif body in ("restore_want", "restore_locate"):
            self._on_restore_want(job, one, frame)
        elif body == "restore_fault":
            self.state.count("corrupt")
            fault = frame.restore_fault
            text = f"rank {one.rank} read from {fault.node_id:.200}: {fault.detail:.2000}"
            self.state.note("integrity", one.job, text, epoch=one.epoch)
        elif body == "restore_release":
            self.state.do(ReleaseRestore(conn=conn, batch_id=frame.restore_release.batch_id))
        elif body == "restore_done":
            self._on_restore_done(job, one, frame.restore_done)
        elif body == "goodbye":
            one.finished = frame.goodbye.finished
        else:
            self.state.count("unexpected_frames")

    def _on_hello(self, conn: WorkerConn, frame: worker.Frame) -> None:
        hello = frame.hello
        if conn in self.state.workers:
            return
        wrong = _wrong_hello(hello)
        if wrong:
            self._refuse(conn, frame.request_id, "INVALID_ARGUMENT", wrong)
            return
        job = self.state.job(hello.job)
        if hello.epoch and hello.epoch < job.epoch:
            text = f"this worker belongs to epoch {hello.epoch} of job {hello.job}, which is at {job.epoch}"
            self.state.count("stale_workers")
            self._refuse(conn, frame.request_id, "STALE_EPOCH", text)
            return
        older = self.state.worker_of(hello.job, hello.rank)
        if older is not None and hello.nonce in job.displaced:
            self._refuse(conn, frame.request_id, "STALE_EPOCH", _displaced_by(older.hello), fatal=False)
            return
        if older is not None:
            self._on_worker_gone(older.conn)
            if older.hello.nonce == hello.nonce:  # the same process, which has lost its connection
                self.state.do(CloseWorker(conn=older.conn))
            else:
                job.displaced.append(older.hello.nonce)
                self._refuse(older.conn, 0, "STALE_EPOCH", _displaced_by(hello), fatal=False)
        if hello.epoch:
            self._enter(job, hello.epoch)
        one = Worker(conn=conn, hello=hello, epoch=hello.epoch)
        self.state.workers[conn] = one
        self.orders.assign_epoch(job, one, attaching=True)
        if older is not None and older.hello.nonce == hello.nonce:
            one.last_sealed, one.last_digest = older.last_sealed, older.last_digest
        settings = self.state.settings
        welcome = worker.WorkerWelcome(node_id=settings.node_id, capture_every=max(1, settings.capture_every))
        self.state.send(conn, worker.Frame(request_id=frame.request_id, welcome=welcome))
        if not job.split:
            mode = worker.ReplicaMode(split=False, reason=job.split_reason)
            self.state.send(conn, worker.Frame(replica_mode=mode))
        self.state.tell(control.NodeMessage(worker_attached=one.attached()))

    def _refuse(self, conn: WorkerConn, request_id: int, code: str, text: str, *, fatal: bool = True) -> None:
        """``fatal``: for good; else the worker asks again now and then."""
        error = worker.WorkerError(code=code, message=text, fatal=fatal)
        self.state.do(ToWorker(conn=conn, frame=worker.Frame(request_id=request_id, error=error)))
        self.state.do(CloseWorker(conn=conn))

    def _on_worker_gone(self, conn: WorkerConn) -> None:
        one = self.state.workers.pop(conn, None)
        if one is None:
            return
        if one.restoring:
            self.state.do(ReleaseRestore(conn=conn, batch_id=None))
        self.orders.protects.tell_whole(self.state.job(one.job))
        gone = control.WorkerDetached(
            job=one.job,
            epoch=one.epoch,
            rank=one.rank,
            nonce=one.hello.nonce,
            finished=one.finished,
            sealing=self.slots.worker_gone(one),
        )
        self.state.tell(control.NodeMessage(worker_detached=gone))
        if not one.finished:
            self.state.count("workers_lost")

    def _enter(self, job: JobState, epoch: int) -> None:
        if job.enter(epoch):
            self.slots.cancel_build(job)

    def _on_layout(self, job: JobState, one: Worker, frame: worker.Frame) -> None:
        message = frame.register_layout
        try:
            layout = Layout.parse(message.header)
        except FormatError as error:
            self.state.count("layouts_refused")
            reply = worker.LayoutReply(accepted=False, reason=str(error))
            self.state.send(one.conn, worker.Frame(request_id=frame.request_id, layout_reply=reply))
            return
        if one.granted is not None and layout.hash != one.layout_hash:
            slot = self.state.slots.get(one.granted)
            one.granted = None
            if slot is not None:
                one.layout_hash = layout.hash
                self.slots.release(slot)
        one.header, one.layout_hash, one.file_bytes = layout.header, layout.hash, layout.file_bytes
        one.replica_group, one.replica_hash = message.replica_group, message.replica_hash
        one.layout_id = one.layout_request = frame.request_id
        one.refused_at = None
        self.slots.serve(job)

    # ------------------------------------------------------------ capture

    def _on_seal(self, job: JobState, one: Worker, seal: worker.Seal) -> None:
        self.state.count("copy_ns", seal.copy_ns)
        self.state.count("stall_ns", seal.stall_ns)
        if not self.slots.seal(job, one, seal):
            self._skipped(job, one, seal.step, "ALIGNING")
        else:
            self._first_step(one, seal.step)
        self.slots.serve(job)

    def _on_slot_sealed(self, event: SlotSealed) -> None:
        slot = self.slots.sealed_now(event)
        if slot is None or slot.ref is None:
            return
        job = self.state.job(slot.job)
        self.state.count("sealed_slots")
        self.state.count("seal_us", int(event.seconds * 1e6))
        one = self.state.worker_of(slot.job, slot.rank)
        if one is not None and event.data_digest:
            if one.last_digest == event.data_digest:
                self.state.count("identical_states")
                text = f"rank {slot.rank}: identical state as one step before; is the state captured that is trained?"
                self.state.note("integrity", job.name, text, epoch=slot.key[0], step=slot.key[1])
            one.last_digest = event.data_digest
        if slot.promised or slot.key[0] != job.epoch:
            self.orders.report_late(job, slot)
        if slot.key[0] == job.epoch:
            job.progress[slot.rank] = max(job.progress.get(slot.rank, -1), slot.key[1])
            self.orders.report_sealed(job, slot.key[1], now=True)
            self.orders.report_partial(job)
        self.slots.serve(job)

    def _on_seal_failed(self, slot_id: SlotId, reason: str) -> None:
        slot = self.state.slots.get(slot_id)
        if slot is None or slot.state is not State.SEALING or slot.ref is None:
            return
        self.state.count("seal_failures")
        step = slot.ref.step
        self.state.note("capture", slot.job, f"step {step} of rank {slot.rank} was not sealed: {reason}", step=step)
        slot.state = State.GRANTED
        one = self.state.worker_of(slot.job, slot.rank)
        if slot.promised:
            self.state.freed(slots=[slot.ref])
        self.slots.release(slot)
        if one is not None:
            self._skipped(self.state.job(slot.job), one, step, "ERROR")

    def _skipped(self, job: JobState, one: Worker, step: int, reason: str) -> None:
        self._first_step(one, step)
        if one.epoch != job.epoch or not job.epoch:
            return
        job.progress[one.rank] = max(job.progress.get(one.rank, -1), step)
        skipped = control.NodeSkipped(job=job.name, epoch=one.epoch, step=step, rank=one.rank, reason=reason)
        self.state.tell(control.NodeMessage(skipped=skipped))
        self.orders.report_partial(job)

    def _first_step(self, one: Worker, step: int) -> None:
        if one.first_step_due:
            one.first_step_due = False
            first = control.FirstStep(job=one.job, epoch=one.epoch, rank=one.rank, step=step)
            self.state.tell(control.NodeMessage(first_step=first))

    # ------------------------------------------------------------ restore

    def _on_restore_want(self, job: JobState, one: Worker, frame: worker.Frame) -> None:
        if job.plan is None or job.plan.epoch != one.epoch:
            answer = worker.Frame(request_id=frame.request_id)
            asked = answer.restore_ready if frame.HasField("restore_want") else answer.restore_sources
            asked.error = "ask which state to restore first (RestoreQuery)"
            self.state.send(one.conn, answer)
            return
        one.restoring = True
        self.state.do(ServeRestore(conn=one.conn, rank=one.rank, world_size=one.world_size, plan=job.plan, frame=frame))

    def _on_restore_served(self, conn: WorkerConn, frame: worker.Frame) -> None:
        one = self.state.workers.get(conn)
        if one is None:
            return
        if frame.WhichOneof("body") == "restore_ready":
            one.local_bytes += frame.restore_ready.local_bytes
            one.remote_bytes += frame.restore_ready.remote_bytes
            one.decoded_bytes += frame.restore_ready.decoded_bytes
        self.state.send(conn, frame)

    def _on_restore_done(self, job: JobState, one: Worker, done: worker.RestoreDone) -> None:
        if one.restoring:
            self.state.do(ReleaseRestore(conn=one.conn, batch_id=None))
        one.restoring = False
        one.local_bytes += done.own_bytes
        one.remote_bytes += done.peer_bytes
        one.first_step_due = done.ok
        if not done.ok:
            # The next query asks the coordinator again: the bytes may be elsewhere by then.
            job.plan_asked = False
            job.plan = None
            self.state.count("restore_failures")
        finished = control.RestoreFinished(
            job=one.job,
            epoch=one.epoch,
            rank=one.rank,
            ok=done.ok,
            error=done.error,
            fetch_s=done.fetch_s,
            load_s=done.load_s,
            step=done.step,
            local_bytes=one.local_bytes,
            remote_bytes=one.remote_bytes,
            decoded_bytes=one.decoded_bytes,
        )
        self.state.tell(control.NodeMessage(restore_finished=finished))

    # ------------------------------------------------------------ coordinator, corruption, time

    def _on_coordinator_up(self) -> None:
        self.state.set_connected(True)
        self._heartbeat_at = self.state.now
        self.state.tell(control.NodeMessage(hello=self.orders.hello()))
        for job in self.state.jobs.values():
            self.orders.report_all(job)
            if any(one.query is not None for one in self.state.workers_of(job.name)):
                job.plan_asked = False
                self.orders.answer_queries(job)

    def _on_coordinator_down(self) -> None:
        self.state.set_connected(False)
        for job in self.state.jobs.values():
            self.slots.cancel_build(job)
            self.slots.serve(job)

    def _on_corruption(self, event: CorruptionFound) -> None:
        self.state.count("corrupt_objects")
        if event.slot is not None or event.ref is not None:
            slot = self._corrupt_slot(event)
            if slot is not None:
                self.state.note("integrity", slot.job, f"slot of rank {slot.rank} is corrupt: {event.detail}")
                self.slots.lost(slot)
                self.slots.serve(self.state.job(slot.job))
        if event.parity is not None:
            job = self.state.job(event.parity.set.job)
            ref = job.parities.pop(parity_key(event.parity), None)
            if ref is not None:
                self.state.note("integrity", job.name, f"parity {ref.position} is corrupt: {event.detail}")
                self.state.do(DeleteParity(parity=ref))
                change = control.InventoryChange(parities_removed=[ref], reason="corrupt")
                self.state.tell(control.NodeMessage(inventory_change=change))

    def _corrupt_slot(self, event: CorruptionFound) -> Slot | None:
        """The slot that is meant, by its id or (readers know no ids) by what it holds; None when it has moved on."""
        for slot in self.state.slots.values():
            if event.slot in (None, slot.slot) and event.ref in (None, slot.ref) and slot.state is State.SEALED:
                return slot
        return None

    def _on_tick(self) -> None:
        now = self.state.now
        for job in self.state.jobs.values():
            self.orders.give_up_queries(job)
            self.slots.serve(job)
        self.state.tell_held(HOLD_S)
        self.state.tell_freed()
        if self._heartbeat_at is None or now - self._heartbeat_at >= HEARTBEAT_S:
            self._heartbeat_at = now
            self.state.tell(control.NodeMessage(heartbeat=control.Heartbeat(counters=self.state.counters)))


def _displaced_by(hello: worker.WorkerHello) -> str:
    return (
        f"another process, {hello.pid}, is rank {hello.rank} of job {hello.job} on this node now: this one's steps are "
        "not kept as long as that one is there; two trainings at a time need two names, set SNAPSHOTD_JOB"
    )


def _wrong_hello(hello: worker.WorkerHello) -> str:
    """Return in words what is wrong with a hello, or ""."""
    if hello.protocol != PROTOCOL:
        return f"this daemon speaks protocol {PROTOCOL}, the worker {hello.protocol}: install the same version"
    if not hello.job or not hello.nonce:
        return "a worker needs a job and a nonce"
    if not 0 <= hello.rank < hello.world_size:
        return f"rank {hello.rank} does not fit a world of {hello.world_size}"
    return ""
