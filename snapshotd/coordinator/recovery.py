"""
Which step an epoch goes on from, and what has to be rebuilt for it.

Rule 1: one decision per (job, epoch). It may still change while slots are rebuilt for it; once it is released (Put and
told to anybody) it never does.
Rule 2: the newest snapshot on the line that can be rebuilt from what living nodes hold; then the newest durable one;
then, only if nothing was ever committed, a fresh start; else a refusal in words.
Rule 3: nothing is decided while a node that may hold something is only away for less than its lease, nor while one
still hashes what a worker that is gone has handed over to it (a minute at most).
Rule 4: what is chosen is committed by that. An older snapshot at a better level stays until the chosen one has it too.
"""

from __future__ import annotations

from collections.abc import Callable

from snapshotd.coordinator.inventory import Node, SnapshotKey
from snapshotd.coordinator.job import Context, Decision, Job, Sealed
from snapshotd.coordinator.membership import Epoch
from snapshotd.coordinator.rebuilds import Rebuilds
from snapshotd.coordinator.snapshots import Snapshot, collect
from snapshotd.coordinator.wanted import Wanted, restore_plan
from snapshotd.v1 import control_pb2 as control

__all__ = ["Recovery"]

FRESH = control.RESTORE_KIND_FRESH
MEMORY = control.RESTORE_KIND_MEMORY
DURABLE = control.RESTORE_KIND_DURABLE
REFUSED = control.RESTORE_KIND_REFUSED

SEALED = control.Committed.LEVEL_SEALED
PROTECTED = control.Committed.LEVEL_PROTECTED
PERSISTED = control.Committed.LEVEL_PERSISTED

_NODES_IN_REASONS = 8


class Recovery:
    """Recoveries of one job."""

    def __init__(
        self,
        ctx: Context,
        job: Job,
        rebuilds: Rebuilds,
        *,
        on_refused: Callable[[Job, str], None],
        on_plan_lost: Callable[[Job, str], None],
    ) -> None:
        self.waiting_reason = ""
        self._ctx = ctx
        self._job = job
        self._rebuilds = rebuilds
        self._on_refused = on_refused
        self._on_plan_lost = on_plan_lost
        self._pending: Decision | None = None
        self._excluded: dict[SnapshotKey, str] = {}
        self._asked: set[str] = set()
        self._told: control.RestorePlan | None = None
        self._wanted = Wanted(ctx, job, rebuilds)

    # ------------------------------------------------------------ messages

    def reset(self) -> None:
        """A new epoch was minted: it has no decision yet."""
        self._pending, self.waiting_reason = None, ""
        self._excluded.clear()
        self._asked.clear()
        self._told = None

    def on_asked(self, node: Node, message: control.RestoreAsked) -> None:
        if message.epoch != self._job.number:
            self._job.counts["fenced_messages"] += 1
            return
        self._asked.add(node.node_id)
        self.advance()

    def want(self, request_id: str, step: int | None) -> None:
        self._wanted.add(request_id, step)
        self.advance()

    def resync(self, node: Node) -> None:
        """Bring a node that said hello up to date."""
        job, decision = self._job, self._decided()
        if decision is None:
            return
        if job.current is not None and node.node_id in job.current.node_ids:
            self._asked.add(node.node_id)
        if job.learned and job.committed is None:
            # The store was lost: whatever the nodes hold may be all that there is.
            return
        self._ctx.out.to_node(node.session, drop=self._drop(decision))

    # ------------------------------------------------------------ decisions

    def advance(self) -> None:
        job, epoch = self._job, self._job.current
        decided = self._decided()
        if decided is None and job.number > 0:
            if epoch is not None and epoch.formed and epoch.number == job.number:
                self._decide(epoch)
            elif self._asked and self._is_new():
                self._release(Decision(epoch=job.number, kind=FRESH, reason="a new job: nothing was ever captured"))
        decided = self._decided()
        if decided is not None:
            self._notice_moves(decided)
            if self._asked:
                self._answer_asked(decided)
        self._maintain()
        self._wanted.advance()

    def _decided(self) -> Decision | None:
        decision = self._job.decision
        return decision if decision is not None and decision.epoch == self._job.number else None

    def _is_new(self) -> bool:
        job = self._job
        return not (job.ever or job.learned or job.lineage or self._absent())

    def _absent(self) -> list[str]:
        return self._ctx.nodes.absent(self._job.name, self._job.node_ids())

    def _decide(self, epoch: Epoch) -> None:
        """Choose, rebuild what the choice lacks, release. Each round excludes one candidate, so the loop ends."""
        absent = self._absent()
        if absent:
            self.waiting_reason = (
                f"waiting for {', '.join(absent[:_NODES_IN_REASONS])}: away, perhaps only for a moment"
            )
            self._ctx.out.note("recovery", self._job.name, self.waiting_reason, epoch=epoch.number)
            return
        sealing = self._ctx.nodes.sealing(self._job.name, self._ctx.now)
        if sealing:
            self.waiting_reason = (
                f"waiting for {', '.join(sealing[:_NODES_IN_REASONS])}: what its workers sealed last is being hashed"
            )
            self._ctx.out.note("recovery", self._job.name, self.waiting_reason, epoch=epoch.number)
            return
        while True:
            decision, snapshot = self._choose(epoch)
            self._pending = decision
            if snapshot is not None and snapshot.missing_ranks():
                trouble = self._rebuilds.drive(snapshot, parity=False)
                if trouble:
                    self._excluded[snapshot.key] = f"step {snapshot.step} could not be rebuilt ({trouble})"
                    continue
                lost = ", ".join(map(str, snapshot.missing_ranks()[:_NODES_IN_REASONS]))
                self.waiting_reason = f"rebuilding step {snapshot.step} of rank {lost}"
                return
            self.waiting_reason = ""
            self._release(decision, snapshot)
            return

    def _choose(self, epoch: Epoch) -> tuple[Decision, Snapshot | None]:
        job = self._job
        if job.learned and self._runs_already(epoch):
            reason = "this epoch was running before the coordinator knew of it"
            return Decision(epoch=epoch.number, kind=control.RESTORE_KIND_UNSPECIFIED, reason=reason), None
        nodes = self._ctx.nodes.connected()
        found = collect(job.name, nodes, lambda key: key[0] < epoch.number and job.counts_on_line(key))
        failures = list(self._excluded.values())
        for key in sorted(found, reverse=True):
            if key in self._excluded:
                continue
            possible, reason = found[key].verdict()
            if possible:
                return self._from_memory(epoch, found[key], failures), found[key]
            failures.append(reason)
        durable = max((key for key in job.durables if self._job.counts_on_line(key)), default=None)
        why = self._why_not(failures)
        if durable is not None:
            source = job.durables[durable]
            lost = self._lost_steps(source.step)
            reason = f"from the durable snapshot of step {source.step} ({source.path}); {lost} steps are lost: {why}"
            return Decision(
                epoch=epoch.number,
                kind=DURABLE,
                source=durable,
                world_size=source.world_size,
                reason=reason,
                lost_steps=lost,
                path=source.path,
            ), None
        if job.committed is None and not (job.learned and found):
            lost = self._lost_steps(-1)
            reason = "a fresh start: nothing was ever committed" + (f" ({why})" if failures else "")
            return Decision(epoch=epoch.number, kind=FRESH, reason=reason, lost_steps=lost), None
        lost = self._lost_steps(-1)
        reason = f"the state is lost, and nothing is on the durable tier: {why}. {lost} steps of training are lost"
        return Decision(epoch=epoch.number, kind=REFUSED, reason=reason, lost_steps=lost), None

    def _from_memory(self, epoch: Epoch, snapshot: Snapshot, failures: list[str]) -> Decision:
        lost = self._lost_steps(snapshot.step)
        reason = f"from memory, step {snapshot.step}"
        decoded = sorted({*snapshot.missing_ranks(), *self._rebuilds.decoded.get(snapshot.key, ())})
        if decoded:
            reason += f", rank {', '.join(map(str, decoded[:_NODES_IN_REASONS]))} decoded from parity"
        if lost:
            reason += f"; {lost} newer steps are lost"
        if failures:
            reason += f" ({'; '.join(failures[:3])})"
        return Decision(
            epoch=epoch.number,
            kind=MEMORY,
            source=snapshot.key,
            world_size=snapshot.world_size,
            reason=reason,
            lost_steps=lost,
        )

    def _release(self, decision: Decision, snapshot: Snapshot | None = None) -> None:
        """Remember the decision, then tell it; from here on it stands."""
        job = self._job
        decision.released, decision.decided_at = True, self._ctx.now
        self._pending = None
        job.decision = decision
        if decision.kind == REFUSED:
            self._ctx.out.put(job.name, "line", job.line_json(), sync=True)
            self._tell(decision)
            self._on_refused(job, decision.reason)
            return
        job.descend(decision.epoch, decision.source)
        level: int = SEALED
        if snapshot is not None:
            self._commit_choice(snapshot)
            level = job.committed.level if job.committed is not None else SEALED
        elif decision.source is not None:
            job.committed = Sealed(
                epoch=decision.source[0], step=decision.source[1], level=PERSISTED, world_size=decision.world_size
            )
            job.fallback = None
        elif decision.kind == FRESH:
            job.committed = job.fallback = None
        # What was sealed beyond the source is given up: it is counted as lost once.
        job.newest_sealed = decision.source
        self._ctx.out.put(job.name, "line", job.line_json(), sync=True)
        self._ctx.out.put(job.name, "commit", job.commit_json(), sync=True)
        if decision.kind == control.RESTORE_KIND_UNSPECIFIED:
            return
        self._tell(decision)
        for node in self._ctx.nodes.connected():
            if snapshot is not None and job.fallback is None and level == PROTECTED:
                committed = control.Committed(job=job.name, epoch=snapshot.epoch, step=snapshot.step, level=PROTECTED)
                self._ctx.out.to_node(node.session, committed=committed)
            self._ctx.out.to_node(node.session, drop=self._drop(decision))

    def _tell(self, decision: Decision) -> None:
        job = self._job
        self._ctx.out.note("recovery", job.name, decision.reason, epoch=decision.epoch)
        episode = job.episode(decision.epoch)
        if episode is not None:
            episode.released_at, episode.source = self._ctx.now, decision.source
            episode.kind = control.RestoreKind.Name(decision.kind).removeprefix("RESTORE_KIND_").lower()
            episode.lost_steps = decision.lost_steps
        if job.current is not None and job.current.number == decision.epoch:
            self._asked.update(job.current.node_ids)
        self._answer_asked(decision)

    def _commit_choice(self, snapshot: Snapshot) -> None:
        job, old = self._job, self._job.committed
        level: int = PROTECTED if snapshot.redundant() else SEALED
        if old is not None and old.key == snapshot.key:
            level = max(level, old.level)
        job.fallback = None if level >= PROTECTED else self._better_than(snapshot, level)
        job.committed = Sealed(epoch=snapshot.epoch, step=snapshot.step, level=level, world_size=snapshot.world_size)

    def _better_than(self, snapshot: Snapshot, level: int) -> Sealed | None:
        """
        An older snapshot that is protected, while the chosen one is not: it stays.

        What the nodes hold counts before what is remembered: the newest commits may have been forgotten.
        """
        nodes = self._ctx.nodes.connected()
        found = collect(self._job.name, nodes, lambda key: self._job.counts_on_line(key) and key < snapshot.key)
        whole = [key for key, one in found.items() if one.redundant()]
        known = [
            one.key
            for one in (self._job.committed, self._job.fallback)
            if one is not None and one.key in found and level < one.level < PERSISTED and found[one.key].verdict()[0]
        ]
        some = [key for key, one in found.items() if one.sets and one.verdict()[0]]
        for keys in (whole, known, some):
            if keys:
                best = max(keys)
                return Sealed(epoch=best[0], step=best[1], level=PROTECTED, world_size=found[best].world_size)
        return None

    def _answer_asked(self, decision: Decision) -> None:
        """Send the plan to the nodes that asked; a plan whose slots are not all there is rebuilt first."""
        job = self._job
        plan: control.RestorePlan | None
        if decision.kind == MEMORY:
            assert decision.source is not None
            source = decision.source
            snapshot = collect(job.name, self._ctx.nodes.connected(), lambda key: key == source).get(source)
            if self._source_is_past(decision):
                self._asked.clear()
                return
            if snapshot is None or not snapshot.verdict()[0]:
                if self._absent():
                    return
                reason = f"step {source[1]}, which this epoch was to go on from, is lost by now"
                plan = control.RestorePlan(job=job.name, epoch=decision.epoch, kind=REFUSED, reason=reason)
                self._on_plan_lost(job, reason)
            elif snapshot.missing_ranks():
                self._rebuilds.drive(snapshot, parity=False)
                return
            else:
                plan = restore_plan(self._ctx, job, decision, snapshot)
        elif decision.kind == control.RESTORE_KIND_UNSPECIFIED:
            plan = None
        else:
            plan = restore_plan(self._ctx, job, decision, None)
        for node_id in sorted(self._asked):
            if plan is not None:
                self._ctx.out.to_node(self._ctx.nodes.session_of(node_id), restore_plan=plan)
        self._asked.clear()
        self._told = plan

    def _notice_moves(self, decision: Decision) -> None:
        """A source came back elsewhere, or was rebuilt elsewhere: whoever still restores from it has to hear of it."""
        job, told = self._job, self._told
        if told is None or told.kind != MEMORY or decision.source is None or self._source_is_past(decision):
            return
        source = decision.source
        snapshot = collect(job.name, self._ctx.nodes.connected(), lambda key: key == source).get(source)
        if snapshot is None or snapshot.missing_ranks() or job.current is None or job.current.number != decision.epoch:
            return
        if restore_plan(self._ctx, job, decision, snapshot) != told:
            self._asked.update(job.current.node_ids)

    def _source_is_past(self, decision: Decision) -> bool:
        """The epoch has committed since: each of its ranks has restored long ago."""
        committed = self._job.committed
        return committed is not None and committed.epoch == decision.epoch

    def _drop(self, decision: Decision) -> control.DropSnapshots:
        """Of epochs before the decision's, only what the line still rests on is kept."""
        job = self._job
        keep = {sealed.key for sealed in (job.committed, job.fallback) if sealed is not None}
        if decision.kind == REFUSED:
            keep |= collect(job.name, self._ctx.nodes.nodes.values(), lambda _: True).keys()
        if decision.kind == MEMORY and decision.source is not None and not self._source_is_past(decision):
            keep.add(decision.source)
        return control.DropSnapshots(
            job=job.name,
            epoch=decision.epoch,
            keep=[control.DropSnapshots.Keep(epoch=epoch, step=step) for epoch, step in sorted(keep)],
            reason=decision.reason,
        )

    # ------------------------------------------------------------ redundancy

    def _maintain(self) -> None:
        """Rebuild at once what the newest committed snapshot lacks."""
        job, committed = self._job, self._job.committed
        needed: set[SnapshotKey] = {sealed.key for sealed in (committed, job.fallback) if sealed is not None}
        if self._pending is not None and self._pending.source is not None:
            needed.add(self._pending.source)
        if not self._wanted:
            self._rebuilds.forget_but(needed)
        if committed is None or job.finished or committed.level == PERSISTED:
            return
        whole = self._make_whole(committed)
        if job.fallback is not None:
            self._make_whole(job.fallback)
        if whole and committed.level == SEALED:
            job.committed = Sealed(
                epoch=committed.epoch, step=committed.step, level=PROTECTED, world_size=committed.world_size
            )
            job.fallback = None
            self._ctx.out.put(job.name, "commit", job.commit_json(), sync=False)
            message = control.Committed(job=job.name, epoch=committed.epoch, step=committed.step, level=PROTECTED)
            for node in self._ctx.nodes.connected():
                self._ctx.out.to_node(node.session, committed=message)

    def _make_whole(self, sealed: Sealed) -> bool:
        """Order what a snapshot lacks. Return whether it lacks nothing, parity included."""
        settled = self._ctx.nodes.settled
        place = (self._job.name, *sealed.key)
        if place in settled:
            return settled[place]
        alive = [node for node in self._ctx.nodes.nodes.values() if node.alive]
        snapshot = collect(self._job.name, alive, lambda key: key == sealed.key).get(sealed.key)
        if snapshot is None or not snapshot.sets or not snapshot.verdict()[0]:
            settled[place] = False
            return False
        if snapshot.redundant():
            settled[place] = True
            return True
        if not self._ctx.nodes.unheard():  # after a restart, a part that nobody has named yet is not a lost part
            self._rebuilds.drive(snapshot, parity=True)
        return False

    # ------------------------------------------------------------ small ones

    def _runs_already(self, epoch: Epoch) -> bool:
        return any(
            ref.job == self._job.name and ref.epoch == epoch.number
            for node in self._ctx.nodes.connected()
            for ref in node.slots.values()
        )

    def _lost_steps(self, step: int) -> int:
        job = self._job
        known = [key[1] for key in (job.newest_sealed, job.committed.key if job.committed else None) if key is not None]
        return max(0, max(known, default=-1) - step)

    def _why_not(self, failures: list[str]) -> str:
        lost = sorted(node.node_id for node in self._ctx.nodes.nodes.values() if not node.alive)
        words = []
        if lost:
            words.append(f"lost nodes: {', '.join(lost[:_NODES_IN_REASONS])} (parity covers m={self._job.last_m})")
        words.extend(failures[:3] or ["no living node holds a snapshot of this job"])
        return "; ".join(words)
