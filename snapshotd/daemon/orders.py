"""
The node's work orders, bound to its arena, peers, codec and durable directory. Called in threads.

Rule 1: what an order finds rotten is reported on the spot, whatever becomes of the order.
Rule 2: a restore that meets a rotten or unreachable source waits (bounded) for it to be rebuilt or to come back: the
coordinator has heard of it, and the worker has nothing better to do. A newer plan says where it is then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from snapshotd.arena import Arena, Need, SlotFile, check
from snapshotd.arena.keys import parity_key
from snapshotd.daemon import events
from snapshotd.daemon.cancel import Cancelled
from snapshotd.daemon.layouts import Layouts
from snapshotd.daemon.persist import persist_slots, seal_persisted
from snapshotd.daemon.protect import build_parity, has_part
from snapshotd.daemon.rebuild import rebuild
from snapshotd.daemon.restore import Restore
from snapshotd.daemon.scrub import scrub_once
from snapshotd.daemon.seal import SealedSlot, seal_slot
from snapshotd.daemon.sources import Corruption, Sources, local_corruption
from snapshotd.erasure import Codec
from snapshotd.errors import CorruptionError, PeerError, SnapshotdError
from snapshotd.layout import KnownDigests
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["Orders"]

log = logging.getLogger("snapshotd.daemon")

RESTORE_PATIENCE_S = 30.0
RESTORE_RETRY_S = 0.2
REPEATED_S = 5.0
"""A refusal is logged again when it was not repeated for so long: who cannot restore asks many times a second."""


class Orders:
    """
    Does what the node core orders.

    pace: called with the bytes that were read from peers to protect a step; see BulkClient.
    on_corruption, on_count: set by the shell; called from any thread.
    """

    def __init__(
        self,
        *,
        node_id: str,
        arena: Arena,
        sources: Sources,
        codec: Codec,
        persist_root: Path | None,
        persist_keep: int,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        self._node_id = node_id
        self._arena = arena
        self._sources = sources
        self._codec = codec
        self._layouts = Layouts()
        self._persist_root = persist_root
        self._persist_keep = persist_keep
        self._lock = threading.Lock()
        self._restores: dict[tuple[object, ...], Restore] = {}
        self._users: dict[events.WorkerConn, tuple[object, ...]] = {}
        self._newest: dict[str, control.RestorePlan] = {}
        self._manifests: dict[events.WorkerConn, int] = {}
        self._refused = ("", 0.0)  # the last refusal, and when that was
        self.cancel = threading.Event()
        self.on_corruption: Callable[[events.CorruptionFound], None] = lambda found: None
        self.on_count: Callable[[str, int], None] = lambda name, amount: None
        sources.on_corruption = self._corrupt
        # Protecting may take its time. What a recovery waits for may not.
        self._paced = sources if pace is None else sources.paced(pace)

    # ---------------------------------------------------------------- orders

    def create_slot(self, order: events.CreateSlot) -> SlotFile:
        """A new slot; BudgetError, with all numbers, when the job as a whole would not fit on this node."""
        need = Need(
            slot_bytes=order.lane_bytes,
            generations=order.generations,
            k=order.k,
            m=order.m,
            held_bytes=order.held_bytes,
        )
        held = min(need.total, self._arena.used_bytes)
        check(need, budget=self._arena.budget_bytes, root=self._arena.root, held_bytes=held)
        return self._arena.create_slot(order.header, order.file_bytes, job=order.job)

    def seal(self, slot: SlotFile, ref: control.SlotRef, known: Sequence[KnownDigests]) -> SealedSlot:
        return seal_slot(self._arena, slot, ref, self.cancel, known)

    def has_part(self, protect: control.Protect) -> bool:
        return has_part(protect, self._node_id)

    def build_parity(self, protect: control.Protect, cancel: threading.Event) -> list[control.ParityRef]:
        refs = build_parity(protect, self._node_id, self._arena, self._paced, self._codec, cancel)
        # Of an order that stands the slots are known from what was built, and their layouts from what was ordered.
        self._layouts.learn(protect.sets if protect.peers else [ref.set for ref in refs], self._paced)
        return refs

    def delete_parity(self, ref: control.ParityRef) -> None:
        file = self._arena.find(parity_key(ref))
        if file is not None:
            self._arena.release(file)

    def rebuild(self, order: control.Rebuild) -> tuple[control.RebuildDone, SlotFile | None]:
        self._sources.learn(order.peers)
        try:
            rebuilt = rebuild(order, self._node_id, self._arena, self._sources, self._codec, self.cancel)
        except SnapshotdError as error:
            done = control.RebuildDone(
                job=order.set.job,
                epoch=order.set.epoch,
                step=order.set.step,
                group=order.set.group,
                lane=order.set.lane,
                position=order.position,
                reason=str(error),
            )
            return done, None
        if rebuilt.done.ok:
            self.on_count("rebuilt", 1)
        return rebuilt.done, rebuilt.slot

    def persist(self, order: control.Persist) -> control.PersistDone:
        if self._persist_root is None:
            reason = f"{self._node_id} has no durable directory (--persist)"
            return control.PersistDone(job=order.job, epoch=order.epoch, step=order.step, reason=reason)
        try:
            return persist_slots(order, self._arena, self._sources, self._persist_root, self.cancel)
        except Cancelled as error:
            return control.PersistDone(job=order.job, epoch=order.epoch, step=order.step, reason=str(error))

    def seal_persisted(self, order: control.PersistSeal) -> control.PersistSealed:
        if self._persist_root is None:
            return control.PersistSealed(reason=f"{self._node_id} has no durable directory (--persist)")
        return seal_persisted(order, self._persist_root, keep=self._persist_keep, note=log.warning)

    def suspected(self, key: ObjectKey) -> None:
        """A peer says that what it read of an object here was wrong: verify it now."""
        lease = self._arena.acquire(key)
        if lease is None:
            return
        with lease as file:
            wrong = self._arena.verify(file)
            if wrong and file.ref is not None:
                self._corrupt(local_corruption(file, file.ref, wrong, self._node_id, "a peer"))

    def scrub(self, bytes_per_s: int) -> None:
        """One pass; ends early and quietly when the daemon stops."""
        try:
            scrub_once(self._arena, bytes_per_s, self.cancel, self._corrupt, node_id=self._node_id)
        except Cancelled:
            return

    # ---------------------------------------------------------------- restore

    def serve_restore(
        self, conn: events.WorkerConn, rank: int, world_size: int, plan: control.RestorePlan, frame: worker.Frame
    ) -> worker.Frame:
        """
        The answer to a RestoreQuery (decision with manifest), RestoreWant or RestoreLocate; an error is told in it.
        """
        deadline = time.monotonic() + RESTORE_PATIENCE_S
        while True:
            try:
                return self._serve(conn, rank, world_size, plan, frame)
            except (CorruptionError, PeerError) as error:
                if time.monotonic() >= deadline or self.cancel.wait(RESTORE_RETRY_S):
                    return self._refusal(plan, frame, error)
                log.info("restoring rank %d of job %s waits: %s", rank, plan.job, error)
            except SnapshotdError as error:
                return self._refusal(plan, frame, error)

    def follow(self, plan: control.RestorePlan) -> None:
        """The coordinator's newest word on where the sources of a restore are; restores that wait go on with it."""
        with self._lock:
            self._newest[plan.job] = plan
            restore = self._restores.get(_restore_key(plan))
        if restore is not None:
            restore.follow(plan)

    def release_restore(self, conn: events.WorkerConn, batch_id: int | None) -> None:
        with self._lock:
            key = self._users.get(conn)
            restore = self._restores.get(key) if key is not None else None
            last = False
            manifest = None
            if batch_id is None and key is not None:
                del self._users[conn]
                manifest = self._manifests.pop(conn, None)
                last = key not in self._users.values()
                if last:
                    self._restores.pop(key, None)
        if restore is None:
            return
        if batch_id is not None:
            restore.release(batch_id)
        elif last:
            restore.close()
        elif manifest is not None:
            restore.release(manifest)

    def close(self) -> None:
        with self._lock:
            restores = list(self._restores.values())
            self._restores.clear()
            self._users.clear()
        for restore in restores:
            restore.close()
        self._layouts.close()

    def _serve(
        self, conn: events.WorkerConn, rank: int, world_size: int, plan: control.RestorePlan, frame: worker.Frame
    ) -> worker.Frame:
        restore = self._open(conn, world_size, plan)
        if frame.HasField("restore_want"):
            batch = restore.assemble(rank, frame.restore_want.boxes, self.cancel)
            return worker.Frame(request_id=frame.request_id, restore_ready=batch.frame())
        if frame.HasField("restore_locate"):
            found = restore.locate(rank, frame.restore_locate.boxes, set(frame.restore_locate.known), self.cancel)
            return worker.Frame(request_id=frame.request_id, restore_sources=found)
        batch_id, path = restore.write_manifest(rank)
        with self._lock:
            self._manifests[conn] = batch_id
        decision = _decision(plan)
        decision.kind = worker.RestoreDecision.KIND_SNAPSHOT
        decision.manifest_path = path
        decision.direct = restore.is_direct
        return worker.Frame(request_id=frame.request_id, restore_decision=decision)

    def _open(self, conn: events.WorkerConn, world_size: int, plan: control.RestorePlan) -> Restore:
        key = _restore_key(plan)
        with self._lock:
            self._users[conn] = key
            restore = self._restores.get(key)
            newest = self._newest.get(plan.job)
        if newest is not None and _restore_key(newest) == key:
            plan = newest
        if restore is not None:
            return restore
        fresh = Restore(plan, world_size, self._arena, self._sources, self._layouts)
        with self._lock:
            restore = self._restores.setdefault(key, fresh)
        if restore is not fresh:
            fresh.close()
        return restore

    def _refusal(self, plan: control.RestorePlan, frame: worker.Frame, error: SnapshotdError) -> worker.Frame:
        text = f"restoring job {plan.job} from step {plan.source_step} failed: {error}"
        before, self._refused = self._refused, (text, time.monotonic())
        if text != before[0] or self._refused[1] - before[1] > REPEATED_S:
            log.error(text)
        if frame.HasField("restore_want"):
            return worker.Frame(request_id=frame.request_id, restore_ready=worker.RestoreReady(error=str(error)))
        if frame.HasField("restore_locate"):
            return worker.Frame(request_id=frame.request_id, restore_sources=worker.RestoreSources(error=str(error)))
        decision = _decision(plan)
        decision.kind = worker.RestoreDecision.KIND_UNDECIDED
        decision.reason = str(error)
        return worker.Frame(request_id=frame.request_id, restore_decision=decision)

    def _corrupt(self, found: Corruption) -> None:
        self.on_count("corrupt", 1)
        log.error("%s: %s", found.node_id or self._node_id, found.detail)
        if found.local:
            self.on_corruption(
                events.CorruptionFound(slot=None, ref=found.slot, parity=found.parity, detail=found.detail)
            )


def _restore_key(plan: control.RestorePlan) -> tuple[object, ...]:
    """What makes two plans the same restore, wherever its sources are."""
    return (plan.job, plan.epoch, plan.kind, plan.source_epoch, plan.source_step, plan.durable_path)


def _decision(plan: control.RestorePlan) -> worker.RestoreDecision:
    durable = plan.kind == control.RESTORE_KIND_DURABLE
    return worker.RestoreDecision(
        epoch=plan.epoch,
        source_epoch=plan.source_epoch,
        source_step=plan.source_step,
        source_world_size=plan.source_world_size,
        source="durable" if durable else "memory",
        reason=plan.reason,
        lost_steps=plan.lost_steps,
    )
