"""What people and tools see of the coordinator: bounded, JSON-able, with the newest reasons."""

from __future__ import annotations

from collections.abc import Mapping

from snapshotd.coordinator.inventory import Node
from snapshotd.coordinator.job import Context, Episode, Job, Sealed
from snapshotd.coordinator.parts import JobParts
from snapshotd.coordinator.snapshots import collect, margin
from snapshotd.v1 import control_pb2 as control

__all__ = ["describe"]

_REASONS_SHOWN = 12
_RANKS_SHOWN = 256


def describe(ctx: Context, jobs: Mapping[str, JobParts], now: float) -> dict[str, object]:
    return {
        "now": now,
        "parity": ctx.settings.parity,
        "nodes": [_node(node, now) for _, node in sorted(ctx.nodes.nodes.items())],
        "jobs": [_job(ctx, parts) for _, parts in sorted(jobs.items())],
        "reasons": list(ctx.out.recent.get("", ()))[-_REASONS_SHOWN:],
    }


def _node(node: Node, now: float) -> dict[str, object]:
    state = "up" if node.connected else "away" if node.alive else "dead"
    return {
        "node_id": node.node_id,
        "state": state,
        "away_s": round(now - node.down_since, 3) if node.down_since is not None and not node.connected else 0.0,
        "version": node.version,
        "bulk": node.bulk,
        "domain": node.domain,
        "slots": len(node.slots),
        "parities": len(node.parities),
        "arena_bytes": node.arena_bytes,
        "budget_bytes": node.budget_bytes,
        "resident_bytes": node.resident_bytes,
        "counters": node.counters,
    }


def _job(ctx: Context, parts: JobParts) -> dict[str, object]:
    job, epoch = parts.job, parts.job.current
    return {
        "job": job.name,
        "epoch": job.number,
        "formed": epoch is not None and epoch.formed,
        "world_size": epoch.world_size if epoch is not None else 0,
        "members": epoch.nodes[:_RANKS_SHOWN] if epoch is not None else [],
        "groups": epoch.groups if epoch is not None else [],
        "m": epoch.m if epoch is not None else 0,
        "m_reason": epoch.reason if epoch is not None else "",
        "finished": job.finished,
        "hung": parts.hangs.reason,
        "launchers": {
            "state": parts.launchers.state,
            "reason": parts.launchers.reason,
            "members": dict(sorted(parts.launchers.members.items())),
            "waiting": sorted(agent.node_id for agent in parts.launchers.agents.values() if agent.waiting),
        },
        "committed": _sealed(job.committed),
        "fallback": _sealed(job.fallback),
        "margin": _margin(ctx, job),
        "pending": {
            "sealed": {str(step): len(shards) for step, shards in sorted(parts.commits.sealed.items())},
            "protecting": parts.commits.in_flight.step if parts.commits.in_flight is not None else None,
            "waiting_for": sorted(parts.commits.in_flight.waiting) if parts.commits.in_flight is not None else [],
            "min_step": parts.commits.min_step,
            "rebuilding": len(parts.rebuilds.orders),
        },
        "restore": {
            "waiting": parts.recovery.waiting_reason,
            "decided": None if job.decision is None else job.decision.to_json(),
        },
        "durables": [{"epoch": d.epoch, "step": d.step, "path": d.path} for d in job.durables.values()],
        "persist": {
            "last_step": parts.persists.last_step,
            "in_flight": parts.persists.in_flight.snapshot.step if parts.persists.in_flight is not None else None,
            "reason": parts.persists.last_reason,
        },
        "counts": dict(sorted(job.counts.items())),
        "recoveries": [_episode(episode) for episode in job.episodes],
        "reasons": list(ctx.out.recent.get(job.name, ()))[-_REASONS_SHOWN:],
    }


def _episode(episode: Episode) -> dict[str, object]:
    return {
        "epoch": episode.epoch,
        "reason": episode.reason,
        "kind": episode.kind,
        "source": list(episode.source) if episode.source is not None else None,
        "lost_steps": episode.lost_steps,
        "phases": episode.phases(),
    }


def _sealed(sealed: Sealed | None) -> dict[str, object] | None:
    if sealed is None:
        return None
    level = control.Committed.Level.Name(control.Committed.Level.ValueType(sealed.level))
    return {
        "epoch": sealed.epoch,
        "step": sealed.step,
        "level": level.removeprefix("LEVEL_").lower(),
        "world_size": sealed.world_size,
    }


def _margin(ctx: Context, job: Job) -> int | None:
    """How many more node losses the newest committed snapshot survives; -1: it is lost already."""
    committed = job.committed
    if committed is None:
        return None
    alive = [node for node in ctx.nodes.nodes.values() if node.alive]
    snapshot = collect(job.name, alive, lambda key: key == committed.key).get(committed.key)
    return -1 if snapshot is None else margin(snapshot)
