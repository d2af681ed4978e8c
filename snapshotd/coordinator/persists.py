"""
The durable tier: when a committed snapshot is written there, and when it counts.

Rule: a durable snapshot counts when its marker is written (PersistSealed), and is remembered before it is relied on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshotd.coordinator.inventory import Node
from snapshotd.coordinator.job import Context, Job, Sealed
from snapshotd.v1 import control_pb2 as control

__all__ = ["Persists"]


@dataclass(slots=True)
class Persisting:
    """A snapshot on its way. sealing: all files are written, the marker is being written."""

    snapshot: Sealed
    order: control.Persist
    waiting: set[str]
    nodes: tuple[str, ...]
    first: str
    since: float
    sealing: control.PersistSeal | None = None
    slots: list[control.SlotRef] = field(default_factory=list)


class Persists:
    """The persisting of one job: at most one snapshot at a time."""

    def __init__(self, ctx: Context, job: Job) -> None:
        self.in_flight: Persisting | None = None
        self.last_step = -1
        self.last_at: float | None = None
        self.last_reason = ""
        self._epoch = -1
        self._ctx = ctx
        self._job = job

    def maybe_begin(self) -> None:
        """After a commit: persist it if that is due and nothing is on its way."""
        job, epoch = self._job, self._job.current
        committed = job.committed
        if committed is None or epoch is None or committed.epoch != epoch.number or self.in_flight is not None:
            return
        if self._epoch != epoch.number:
            self._epoch = epoch.number
            source = job.lineage.get(epoch.number)
            known = [step for number, step in job.durables if number == epoch.number]
            self.last_step = max(known, default=source[1] if source is not None else -1)
            if self.last_at is None:
                self.last_at = self._ctx.now
        if not self._due(epoch.node_ids, committed.step):
            return
        order = control.Persist(
            job=job.name, epoch=committed.epoch, step=committed.step, world_size=committed.world_size
        )
        slots = []
        for rank in range(committed.world_size):
            node = self._ctx.nodes.get(epoch.ranks[rank].node_id)
            ref = None if node is None else node.slots.get((job.name, committed.epoch, committed.step, rank))
            if ref is None:
                self._failed(f"the slot of rank {rank} is not there")
                return
            slots.append(ref)
        nodes = tuple(epoch.node_ids)
        self.in_flight = Persisting(
            snapshot=committed,
            order=order,
            waiting=set(nodes),
            nodes=nodes,
            first=epoch.ranks[0].node_id,
            since=self._ctx.now,
            slots=slots,
        )
        for node_id in nodes:
            self._ctx.out.to_node(self._ctx.nodes.session_of(node_id), persist=order)

    def on_done(self, node: Node, message: control.PersistDone) -> None:
        flight = self.in_flight
        if flight is None or flight.snapshot.key != (message.epoch, message.step):
            return
        if not message.ok:
            self._failed(f"{node.node_id}: {message.reason}")
            return
        flight.waiting.discard(node.node_id)
        if not flight.waiting and flight.sealing is None:
            flight.sealing = control.PersistSeal(
                job=self._job.name,
                epoch=flight.snapshot.epoch,
                step=flight.snapshot.step,
                world_size=flight.snapshot.world_size,
                slots=flight.slots,
            )
            self._ctx.out.to_node(self._ctx.nodes.session_of(flight.first), persist_seal=flight.sealing)

    def on_sealed(self, node: Node, message: control.PersistSealed) -> None:
        job, flight = self._job, self.in_flight
        key = (message.durable.epoch, message.durable.step)
        mine = flight is not None and flight.snapshot.key == key
        if not message.ok:
            if mine:
                self._failed(f"{node.node_id} could not write the marker: {message.reason}")
            return
        job.ever = True
        job.add_durable(message.durable)
        for removed in message.removed:
            job.durables.pop((removed.epoch, removed.step), None)
        job.counts["persists"] += 1
        self._ctx.out.put(job.name, "durable", job.durable_json(), sync=True)
        if mine:
            self.in_flight = None
            self.last_step, self.last_at, self.last_reason = message.durable.step, self._ctx.now, ""

    def on_node_lost(self, node: Node) -> None:
        if self.in_flight is not None and node.node_id in self.in_flight.nodes:
            self._failed(f"{node.node_id} is lost")

    def resync(self, node: Node) -> None:
        flight = self.in_flight
        if flight is None:
            return
        if node.node_id in flight.waiting:
            self._ctx.out.to_node(node.session, persist=flight.order)
        elif flight.sealing is not None and node.node_id == flight.first:
            self._ctx.out.to_node(node.session, persist_seal=flight.sealing)

    def _due(self, node_ids: list[str], step: int) -> bool:
        nodes = [node for node_id in node_ids if (node := self._ctx.nodes.get(node_id)) is not None]
        every_steps = min((node.persist_every_steps for node in nodes if node.persist_every_steps), default=0)
        every_s = min((node.persist_every_s for node in nodes if node.persist_every_s), default=0.0)
        if every_steps and step - self.last_step >= every_steps:
            return True
        return bool(every_s) and self.last_at is not None and self._ctx.now - self.last_at >= every_s

    def _failed(self, reason: str) -> None:
        """Noted, and tried again when it is due the next time."""
        flight, self.in_flight = self.in_flight, None
        if flight is not None:
            self.last_step, self.last_at = flight.snapshot.step, self._ctx.now
        self.last_reason = reason
        self._job.counts["persist_failures"] += 1
        self._ctx.out.note("commit", self._job.name, f"not persisted: {reason}")
