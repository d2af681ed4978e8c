"""
The coordinator: one pure state machine. Events and time in, ordered effects and reasons out.

Rule 1: no I/O, no clock, no thread, no randomness: the same events at the same times give the same outputs.
Rule 2: the truth about bytes is in the daemons' inventories; what is remembered (Put) is only what must never go back:
epochs, the line, what was committed, what is durable.
Rule 3: every message may come twice, late, or of an older epoch; none of that changes anything but a counter.

The parts: `inventory` (nodes and what they hold), `rendezvous_core` (launchers), `membership` (epochs), `commits`,
`hangs`, `persists`, `recovery` with `rebuilds` and `snapshots`. This file connects them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from snapshotd.coordinator.commits import Commits
from snapshotd.coordinator.epochs import Epochs
from snapshotd.coordinator.events import (
    AgentMessageArrived,
    AgentSessionEnded,
    Answer,
    CoreSettings,
    Event,
    ForgetWanted,
    NodeMessageArrived,
    NodeSessionEnded,
    Output,
    SessionId,
    SnapshotWanted,
    Ticked,
)
from snapshotd.coordinator.hangs import HangWatch
from snapshotd.coordinator.inventory import Inventory, Node
from snapshotd.coordinator.job import Context, Decision, Job
from snapshotd.coordinator.membership import Epoch
from snapshotd.coordinator.outbox import Outbox
from snapshotd.coordinator.parts import JobParts
from snapshotd.coordinator.persists import Persists
from snapshotd.coordinator.rebuilds import Rebuilds
from snapshotd.coordinator.recovery import Recovery
from snapshotd.coordinator.rendezvous_core import EXIT_LOST, Launchers
from snapshotd.coordinator.status import describe
from snapshotd.v1 import control_pb2 as control

__all__ = ["CoordinatorCore"]

_SEQS_KEPT = 256


class CoordinatorCore:
    """Decides everything that the coordinator decides; its shell only carries events in and effects out."""

    def __init__(self, settings: CoreSettings, remembered: Iterable[tuple[str, str, str]] = ()) -> None:
        self.ctx = Context(settings=settings, nodes=Inventory(), out=Outbox())
        self.jobs: dict[str, JobParts] = {}
        self.epochs = Epochs(self.ctx)
        self._started = False
        self._seqs: dict[SessionId, dict[int, None]] = {}
        self._remember(remembered)

    def handle(self, event: Event, now: float) -> Output:
        """Take one fact in; return what the shell must do next, in the order of the fields of Output."""
        self.ctx.now = now
        if not self._started:
            self._start(now)
        match event:
            case NodeMessageArrived(session=session, message=message):
                self._on_node_message(session, message)
            case NodeSessionEnded(session=session):
                self._on_node_session_ended(session)
            case AgentMessageArrived(session=session, message=agent_message):
                self._on_agent_message(session, agent_message)
            case AgentSessionEnded(session=session):
                for parts in self.jobs.values():
                    parts.launchers.session_ended(session)
            case SnapshotWanted(request_id=request_id, job=name, step=step):
                self._on_snapshot_wanted(request_id, name, step)
            case ForgetWanted(request_id=request_id, job=name):
                self._on_forget(request_id, name)
            case Ticked():
                self._on_tick()
        return self.ctx.out.take()

    def status(self, now: float) -> dict[str, object]:
        """Return what people and tools see: nodes, jobs, levels, margins, recoveries, newest reasons."""
        return describe(self.ctx, self.jobs, now)

    # ------------------------------------------------------------ start

    def _remember(self, remembered: Iterable[tuple[str, str, str]]) -> None:
        for name, key, text in remembered:
            value = json.loads(text)
            parts = self._parts(name)
            if key == "epoch":
                parts.job.number = int(value["number"])
                parts.job.last_m = int(value["m"])
                if value["epoch"] is not None:
                    parts.job.current = Epoch.from_json(value["epoch"])
                parts.launchers.remember(value["launchers"])
            else:
                parts.job.remember(key, value)
        for parts in self.jobs.values():
            job = parts.job
            if job.current is not None and not job.finished:
                for node_id in job.current.node_ids:
                    self.ctx.nodes.remember(node_id)
        for node_id in self.ctx.settings.nodes_expected:
            self.ctx.nodes.remember(node_id)

    def _start(self, now: float) -> None:
        self._started = True
        self.ctx.started = now
        for node in self.ctx.nodes.nodes.values():
            node.down_since = now
        for parts in self.jobs.values():
            for agent in parts.launchers.agents.values():
                agent.down_since = now

    def _parts(self, name: str) -> JobParts:
        parts = self.jobs.get(name)
        if parts is None:
            job = Job(name=name)
            rebuilds = Rebuilds(self.ctx, job)
            persists = Persists(self.ctx, job)
            launchers = Launchers(self.ctx, job, self._mint)
            parts = self.jobs[name] = JobParts(
                job=job,
                launchers=launchers,
                commits=Commits(self.ctx, job, lambda _: persists.maybe_begin()),
                persists=persists,
                rebuilds=rebuilds,
                recovery=Recovery(
                    self.ctx, job, rebuilds, on_refused=self._on_refused, on_plan_lost=self._on_plan_lost
                ),
                hangs=HangWatch(self.ctx, job, launchers.restart),
            )
        return parts

    # ------------------------------------------------------------ nodes

    def _on_node_message(self, session: SessionId, message: control.NodeMessage) -> None:
        body = message.WhichOneof("body")
        if body == "hello":
            self._on_hello(session, message.hello)
            return
        node = self.ctx.nodes.of_session(session)
        if node is None:
            return
        seen = self._seqs.setdefault(session, {})
        if message.seq and message.seq in seen:
            return
        seen[message.seq] = None
        if len(seen) > _SEQS_KEPT:
            del seen[next(iter(seen))]
        if message.HasField("freed"):
            self.ctx.nodes.remove(node, message.freed)
        if body == "heartbeat":
            node.counters = dict(message.heartbeat.counters)
            node.arena_bytes, node.budget_bytes = message.heartbeat.arena_bytes, message.heartbeat.budget_bytes
            node.resident_bytes = message.heartbeat.resident_bytes
        elif body == "inventory_change":
            self._on_inventory_change(node, message.inventory_change)
        elif body is not None:
            self._on_job_message(node, body, message)

    def _on_job_message(self, node: Node, body: str, message: control.NodeMessage) -> None:
        if body == "persist_sealed":
            parts = self._parts(message.persist_sealed.durable.job)
            parts.persists.on_sealed(node, message.persist_sealed)
            return
        parts = self._parts(getattr(message, body).job)
        if body == "worker_attached":
            self.epochs.on_attached(parts, node, message.worker_attached)
            self.epochs.repeat(parts, node, [message.worker_attached])
        elif body == "worker_detached":
            self.ctx.nodes.promise(node, message.worker_detached.sealing, self.ctx.now)
            self.epochs.on_detached(parts, node, message.worker_detached)
        elif body == "sealed":
            parts.commits.on_sealed(node, message.sealed)
            parts.hangs.advance(parts.commits.progress, parts.commits.furthest)
        elif body == "skipped":
            parts.commits.on_skipped(node, message.skipped)
            parts.hangs.advance(parts.commits.progress, parts.commits.furthest)
        elif body == "parity_built":
            parts.commits.on_parity_built(node, message.parity_built)
        elif body == "parity_failed":
            parts.commits.on_parity_failed(node, message.parity_failed)
        elif body == "persist_done":
            parts.persists.on_done(node, message.persist_done)
        elif body == "rebuild_done":
            parts.rebuilds.on_done(node, message.rebuild_done)
            parts.recovery.advance()
        elif body == "restore_asked":
            parts.recovery.on_asked(node, message.restore_asked)
        elif body == "restore_finished":
            self._on_restore_finished(parts, message.restore_finished)
        elif body == "first_step":
            episode = parts.job.episode(message.first_step.epoch)
            if episode is not None:
                episode.first_step_at = self.ctx.now

    def _on_hello(self, session: SessionId, hello: control.NodeHello) -> None:
        nodes = self.ctx.nodes
        known = nodes.get(hello.node_id)
        if known is not None and known.session == session:
            return
        node, older, restarted = nodes.hello(session, hello, self.ctx.now)
        if older is not None:
            self.ctx.out.close(older)
        if restarted:
            self.ctx.out.note("membership", "", f"the daemon of {node.node_id} was restarted")
        named = {ref.job for ref in hello.slots} | {ref.set.job for ref in hello.parities}
        named |= set(hello.epochs) | {worker.job for worker in hello.workers} | {ref.job for ref in hello.durables}
        for name, number in hello.epochs.items():
            self.epochs.learn(self._parts(name), number)
        for durable in hello.durables:
            job = self._parts(durable.job).job
            if (durable.epoch, durable.step) not in job.durables:
                job.add_durable(durable)
            job.ever = True
        for ref in hello.slots:
            self._parts(ref.job).job.saw((ref.epoch, ref.step))
        welcome = control.NodeWelcome()
        for name in sorted(named):
            committed = self.jobs[name].job.committed if name in self.jobs else None
            if committed is not None and self.jobs[name].job.fallback is None:
                welcome.committed.add(
                    job=name,
                    epoch=committed.epoch,
                    step=committed.step,
                    level=control.Committed.Level.ValueType(committed.level),
                )
        self.ctx.out.to_node(session, welcome=welcome)
        for worker in hello.workers:
            self.epochs.on_attached(self._parts(worker.job), node, worker)
        for parts in self.jobs.values():
            self.epochs.repeat(parts, node, [one for one in hello.workers if one.job == parts.job.name])
        for parts in self.jobs.values():
            current = parts.job.current
            if parts.job.name in named or (current is not None and node.node_id in current.node_ids):
                parts.recovery.resync(node)
                parts.commits.resync(node)
                parts.persists.resync(node)
            parts.rebuilds.resync(node)
            parts.recovery.advance()
            parts.commits.advance()

    def _on_node_session_ended(self, session: SessionId) -> None:
        self._seqs.pop(session, None)
        node = self.ctx.nodes.session_ended(session, self.ctx.now)
        if node is None:
            return
        for parts in self.jobs.values():
            if node.node_id in parts.job.node_ids():
                parts.job.sign(self.ctx.now, f"the daemon of {node.node_id} lost its connection")

    def _on_inventory_change(self, node: Node, change: control.InventoryChange) -> None:
        self.ctx.nodes.add(node, change.slots_added, change.parities_added)
        self.ctx.nodes.remove(node, change)
        touched = {ref.job for ref in (*change.slots_added, *change.slots_removed)}
        touched |= {ref.set.job for ref in (*change.parities_added, *change.parities_removed)}
        for name in sorted(touched):
            parts = self._parts(name)
            if change.reason == "corrupt":
                parts.job.counts["corrupt_objects"] += len(change.slots_removed) + len(change.parities_removed)
                text = f"{node.node_id} found bytes that do not match their digest: they count as lost and are rebuilt"
                self.ctx.out.note("integrity", name, text)
            parts.recovery.advance()

    def _on_restore_finished(self, parts: JobParts, done: control.RestoreFinished) -> None:
        episode = parts.job.episode(done.epoch)
        if not done.ok:
            parts.job.counts["restore_failures"] += 1
            text = f"rank {done.rank} could not restore: {done.error}"
            self.ctx.out.note("recovery", parts.job.name, text, epoch=done.epoch)
        elif episode is not None:
            episode.restored_at = self.ctx.now
            episode.fetch_s = max(episode.fetch_s, done.fetch_s)
            episode.load_s = max(episode.load_s, done.load_s)

    # ------------------------------------------------------------ launchers

    def _on_agent_message(self, session: SessionId, message: control.AgentMessage) -> None:
        body = message.WhichOneof("body")
        if body == "join":
            self._parts(message.join.job).launchers.join(session, message.join)
        elif body == "resume":
            parts = self._parts(message.resume.job)
            self.epochs.learn(parts, message.resume.epoch)
            parts.launchers.resume(session, message.resume)
        elif body == "leave":
            self._parts(message.leave.job).launchers.leave(message.leave)

    def _mint(self, job: Job, reason: str) -> int:
        return self.epochs.mint(self.jobs[job.name], reason)

    def _on_refused(self, job: Job, reason: str) -> None:
        parts = self.jobs[job.name]
        if parts.launchers.agents:
            parts.launchers.close(reason, EXIT_LOST)

    def _on_plan_lost(self, job: Job, reason: str) -> None:
        self.jobs[job.name].launchers.restart(reason)

    # ------------------------------------------------------------ tools

    def _on_snapshot_wanted(self, request_id: str, name: str, step: int | None) -> None:
        parts = self.jobs.get(name)
        if parts is None:
            known = ", ".join(sorted(self.jobs)[:16]) or "none"
            text = f"there is no job {name!r}; known are: {known}"
            self.ctx.out.answer(Answer(request_id=request_id, error_code="INVALID_ARGUMENT", error=text))
            return
        parts.recovery.want(request_id, step)

    def _on_forget(self, request_id: str, name: str) -> None:
        parts = self.jobs.get(name)
        if parts is None:
            text = f"there is no job {name!r}"
            self.ctx.out.answer(Answer(request_id=request_id, error_code="INVALID_ARGUMENT", error=text))
            return
        number = parts.job.number + 1
        drop = control.DropSnapshots(job=name, epoch=number, reason="the job was forgotten")
        for node in self.ctx.nodes.connected():
            self.ctx.out.to_node(node.session, drop=drop)
        self.ctx.out.delete(name, None)
        self.ctx.nodes.drop_job(name)
        self.ctx.out.forget(name)
        del self.jobs[name]
        # The number of the epoch goes on: it never goes back, not even for a forgotten job.
        fresh = self._parts(name)
        fresh.job.number = number
        fresh.job.rounds = parts.job.rounds
        fresh.job.decision = Decision(
            epoch=number, kind=control.RESTORE_KIND_UNSPECIFIED, reason="forgotten", released=True
        )
        fresh.launchers.take_over(parts.launchers)
        self.epochs.put(fresh)
        answer = control.ForgetJobResponse(message=f"job {name} is forgotten; its next launch starts afresh")
        self.ctx.out.answer(Answer(request_id=request_id, forgotten=answer))

    # ------------------------------------------------------------ time

    def _on_tick(self) -> None:
        settings = self.ctx.settings
        for node in self.ctx.nodes.expire(self.ctx.now, settings.node_lease_s, settings.startup_grace_s):
            self.ctx.out.note(
                "membership", "", f"{node.node_id} is dead: away for longer than {settings.node_lease_s} s"
            )
            for parts in self.jobs.values():
                parts.commits.on_node_lost(node)
                parts.persists.on_node_lost(node)
                parts.rebuilds.on_node_lost(node)
        for parts in list(self.jobs.values()):
            parts.launchers.tick()
            parts.rebuilds.tick()
            parts.commits.tick()
            parts.recovery.advance()
            parts.hangs.advance(parts.commits.progress, parts.commits.furthest)
            self.epochs.note_late(parts)
