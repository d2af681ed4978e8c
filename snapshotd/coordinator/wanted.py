"""
Where the bytes of a snapshot are: for workers that restore, and for tools that ask for one.

Rule 1: a plan names one holder and one slot for each rank; the holder where the same rank runs now comes first.
Rule 2: a tool gets the newest snapshot that can be rebuilt (or just the step that it asked for), then the newest
durable one, else a refusal that says what there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshotd.coordinator.events import Answer
from snapshotd.coordinator.inventory import SnapshotKey
from snapshotd.coordinator.job import Context, Decision, Job
from snapshotd.coordinator.rebuilds import Rebuilds
from snapshotd.coordinator.snapshots import Snapshot, collect
from snapshotd.v1 import control_pb2 as control

__all__ = ["Wanted", "restore_plan"]


def restore_plan(ctx: Context, job: Job, decision: Decision, snapshot: Snapshot | None) -> control.RestorePlan:
    """Return where each rank's slot of ``snapshot`` is read; without one, the decision alone."""
    plan = control.RestorePlan(
        job=job.name,
        epoch=decision.epoch,
        kind=control.RestoreKind.Name(decision.kind),
        reason=decision.reason,
        lost_steps=decision.lost_steps,
        source_world_size=decision.world_size,
        durable_path=decision.path,
    )
    if decision.source is not None:
        plan.source_epoch, plan.source_step = decision.source
    if snapshot is not None:
        for rank in range(snapshot.world_size):
            plan.nodes.append(_place(job, snapshot, rank))
            plan.slots.append(snapshot.slots[rank])
        plan.peers.extend(ctx.nodes.peers(list(plan.nodes)))
    return plan


def _place(job: Job, snapshot: Snapshot, rank: int) -> str:
    epoch, holders = job.current, snapshot.holders[rank]
    if epoch is not None and rank in epoch.ranks and epoch.ranks[rank].node_id in holders:
        return epoch.ranks[rank].node_id
    return holders[0]


@dataclass(slots=True)
class _Request:
    """A tool's request to read a snapshot. excluded: candidates that could not be rebuilt, and why."""

    request_id: str
    step: int | None
    excluded: dict[SnapshotKey, str] = field(default_factory=dict)


class Wanted:
    """The requests of tools for snapshots of one job that are not answered yet."""

    def __init__(self, ctx: Context, job: Job, rebuilds: Rebuilds) -> None:
        self._ctx = ctx
        self._job = job
        self._rebuilds = rebuilds
        self._requests: list[_Request] = []

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, request_id: str, step: int | None) -> None:
        self._requests.append(_Request(request_id=request_id, step=step))

    def advance(self) -> None:
        """Answer what can be answered now; for the others something is being rebuilt, or a node is only away."""
        self._requests = [request for request in self._requests if not self._serve(request)]

    def _serve(self, request: _Request) -> bool:
        job = self._job
        counts = job.counts_on_line
        found = collect(job.name, self._ctx.nodes.connected(), counts)
        reasons = []
        for key in sorted(found, reverse=True):
            if request.step is not None and key[1] != request.step:
                continue
            snapshot = found[key]
            possible, reason = snapshot.verdict()
            reason = request.excluded.get(key, reason)
            if key in request.excluded or not possible:
                reasons.append(reason)
                continue
            if snapshot.missing_ranks():
                trouble = self._rebuilds.drive(snapshot, parity=False)
                if not trouble:
                    return False
                request.excluded[key] = trouble
                reasons.append(trouble)
                continue
            decision = Decision(
                epoch=job.number,
                kind=control.RESTORE_KIND_MEMORY,
                source=key,
                world_size=snapshot.world_size,
                reason=f"from memory, step {key[1]}",
            )
            self._located(request, decision, snapshot)
            return True
        if self._ctx.nodes.absent(job.name, job.node_ids()):
            return False
        for key in sorted(job.durables, reverse=True):
            if request.step is None or key[1] == request.step:
                source = job.durables[key]
                decision = Decision(
                    epoch=job.number,
                    kind=control.RESTORE_KIND_DURABLE,
                    source=key,
                    world_size=source.world_size,
                    path=source.path,
                    reason=f"from the durable tier, step {key[1]}",
                )
                self._located(request, decision, None)
                return True
        steps = sorted({key[1] for key in found if found[key].verdict()[0]} | {key[1] for key in job.durables})
        self._refuse(request, steps, reasons)
        return True

    def _located(self, request: _Request, decision: Decision, snapshot: Snapshot | None) -> None:
        located = control.LocateSnapshotResponse(plan=restore_plan(self._ctx, self._job, decision, snapshot))
        self._ctx.out.answer(Answer(request_id=request.request_id, located=located))

    def _refuse(self, request: _Request, steps: list[int], reasons: list[str]) -> None:
        name = self._job.name
        there = f"there are steps {', '.join(map(str, steps[-16:]))}" if steps else "there is no other either"
        if not steps and not reasons and self._job.committed is None:
            text, code = f"job {name} has no snapshot yet: nothing of it was committed", "INVALID_ARGUMENT"
        elif request.step is not None and not reasons:
            text, code = f"job {name} has no snapshot of step {request.step}; {there}", "INVALID_ARGUMENT"
        else:
            text = f"no snapshot of job {name} can be had: {'; '.join(reasons[:4]) or 'nothing is held'}; {there}"
            code = "UNRECOVERABLE"
        self._ctx.out.answer(Answer(request_id=request.request_id, error_code=code, error=text))
