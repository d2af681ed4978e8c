"""
How epochs begin and become complete: minted for launchers that agreed, or for a launch whose ranks are all attached.

Rule 1: an epoch is Put before anybody hears of it, and its number is the newest that anybody ever said.
Rule 2: a launch that knows no epoch is told apart by its formation and, where that repeats, by its processes' nonces:
another process in the place of a rank begins a new round of the launch.
"""

from __future__ import annotations

from snapshotd.coordinator.inventory import Node
from snapshotd.coordinator.job import Context, Episode
from snapshotd.coordinator.membership import Attached, Epoch, Round, parity_groups
from snapshotd.coordinator.parts import JobParts
from snapshotd.v1 import control_pb2 as control

__all__ = ["Epochs"]

_ROUNDS_KEPT = 8
_NODES_IN_REASONS = 16


class Epochs:
    """The epochs of all jobs."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def learn(self, parts: JobParts, number: int) -> None:
        """A peer knows a newer epoch than the store: never go back behind it."""
        job = parts.job
        if number > job.number:
            job.number, job.learned = number, True
            job.current = None
            parts.commits.reset(adopt=True)
            parts.recovery.reset()
            self.put(parts)

    def on_attached(self, parts: JobParts, node: Node, worker: control.WorkerAttached) -> None:
        job = parts.job
        if not 0 <= worker.rank < worker.world_size:
            job.counts["refused_messages"] += 1
            return
        who = Attached(node_id=node.node_id, nonce=worker.nonce, local_rank=worker.local_rank)
        job.finished = False
        current = job.current
        of_round = current is not None and current.formation != "" and current.formation == worker.formation
        if worker.epoch and not (of_round and current is not None and current.ranks.get(worker.rank) != who):
            self._attach_known(parts, worker, who)
        else:
            self._attach_round(parts, worker, who)

    def _attach_known(self, parts: JobParts, worker: control.WorkerAttached, who: Attached) -> None:
        job = parts.job
        if worker.epoch < job.number:
            job.counts["fenced_messages"] += 1
            return
        self.learn(parts, worker.epoch)
        if job.current is None or job.current.number != job.number:
            job.current = Epoch(number=job.number, formation=worker.formation, minted_at=self._ctx.now)
        epoch = job.current
        epoch.world_size = epoch.world_size or worker.world_size
        if worker.world_size != epoch.world_size:
            job.counts["refused_messages"] += 1
            return
        known = epoch.ranks.get(worker.rank)
        if known == who:
            return
        if epoch.formed and known is not None and known.node_id != who.node_id:
            text = f"rank {worker.rank} of epoch {epoch.number} attached on {who.node_id}, it runs on {known.node_id}"
            self._ctx.out.note("membership", job.name, text, epoch=epoch.number)
            job.counts["refused_messages"] += 1
            return
        epoch.attach(worker.rank, who)
        if epoch.complete():
            self._formed(parts, epoch)

    def _attach_round(self, parts: JobParts, worker: control.WorkerAttached, who: Attached) -> None:
        job, current = parts.job, parts.job.current
        if current is not None and current.formation == worker.formation and current.ranks.get(worker.rank) == who:
            return
        one = job.rounds.get(worker.formation)
        if one is None or one.world_size != worker.world_size:
            one = job.rounds[worker.formation] = Round(world_size=worker.world_size)
        one.ranks[worker.rank] = who
        while len(job.rounds) > _ROUNDS_KEPT:
            del job.rounds[next(iter(job.rounds))]
        if len(one.ranks) < one.world_size:
            return
        job.rounds.clear()
        job.number += 1
        reason = job.first_sign[1] if job.first_sign is not None else "all ranks of a launch are attached"
        self._begin_epoch(parts, reason)
        job.current = Epoch(
            number=job.number,
            formation=worker.formation,
            world_size=one.world_size,
            ranks=one.ranks,
            minted_at=self._ctx.now,
        )
        self._formed(parts, job.current)

    def repeat(self, parts: JobParts, node: Node, workers: list[control.WorkerAttached]) -> None:
        """
        A worker that attached again may sit behind a daemon that knows nothing of its epoch any more.

        Nothing is said where another process has taken a worker's place: that one does not belong to the epoch.
        """
        epoch = parts.job.current
        if epoch is None or not epoch.formed or node.node_id not in epoch.node_ids:
            return
        if epoch.formation and not workers:
            return
        known = {rank: epoch.ranks[rank].nonce for rank in epoch.ranks_of(node.node_id)}
        if all(known.get(one.rank) == one.nonce for one in workers):
            self._ctx.out.to_node(node.session, epoch_formed=epoch.message(parts.job.name))

    def mint(self, parts: JobParts, reason: str) -> int:
        """A new epoch whose launchers are agreed on; its workers attach later."""
        job = parts.job
        job.number += 1
        parts.launchers.epoch = job.number
        self._begin_epoch(parts, reason or "the launchers are complete")
        job.current = Epoch(number=job.number, minted_at=self._ctx.now)
        self.put(parts)
        return job.number

    def _begin_epoch(self, parts: JobParts, reason: str) -> None:
        job = parts.job
        sign = job.first_sign
        broken_at = parts.launchers.broken_at if sign is not None and parts.launchers.broken_at else None
        job.open_episode(
            Episode(
                epoch=job.number,
                reason=reason,
                noticed_at=sign[0] if sign is not None else None,
                broken_at=broken_at if broken_at is not None else (sign[0] if sign is not None else None),
                minted_at=self._ctx.now,
            )
        )
        parts.attach_noted = False
        parts.commits.reset()
        parts.recovery.reset()
        self._ctx.out.note("membership", job.name, f"epoch {job.number} begins: {reason}", epoch=job.number)

    def _formed(self, parts: JobParts, epoch: Epoch) -> None:
        """Each rank is attached: the epoch can commit and restore."""
        job, settings = parts.job, self._ctx.settings
        domains = {
            node_id: node.domain for node_id in epoch.node_ids if (node := self._ctx.nodes.get(node_id)) is not None
        }
        epoch.groups, epoch.m, epoch.reason = parity_groups(
            epoch.node_ids, domains, group_size=settings.group_size, parity=settings.parity
        )
        epoch.formed, epoch.formed_at = True, self._ctx.now
        job.last_m = epoch.m
        episode = job.episode(epoch.number)
        if episode is not None and episode.formed_at is None:
            episode.formed_at = self._ctx.now
        self.put(parts)
        sessions = map(self._ctx.nodes.session_of, epoch.node_ids)
        self._ctx.out.to_nodes(sessions, epoch_formed=epoch.message(job.name))
        where = ", ".join(epoch.node_ids[:_NODES_IN_REASONS])
        text = f"epoch {epoch.number} is complete: {epoch.world_size} ranks on {where}, m={epoch.m}"
        text += f" ({epoch.reason})" if epoch.reason else ""
        self._ctx.out.note("membership", job.name, text, epoch=epoch.number)
        parts.recovery.advance()
        parts.commits.advance()

    def on_detached(self, parts: JobParts, node: Node, gone: control.WorkerDetached) -> None:
        job = parts.job
        for one in job.rounds.values():
            who = one.ranks.get(gone.rank)
            if who is not None and who.nonce == gone.nonce:
                del one.ranks[gone.rank]
        epoch = job.current
        who = epoch.ranks.get(gone.rank) if epoch is not None else None
        if epoch is None or who is None or who.nonce != gone.nonce:
            return
        if gone.finished:
            job.finished = True
            return
        if not epoch.formed:
            epoch.detach(gone.rank)
        job.sign(self._ctx.now, f"rank {gone.rank} on {node.node_id} ended")

    def put(self, parts: JobParts) -> None:
        value = {
            "number": parts.job.number,
            "m": parts.job.last_m,
            "epoch": None if parts.job.current is None else parts.job.current.to_json(),
            "launchers": parts.launchers.to_json(),
        }
        self._ctx.out.put(parts.job.name, "epoch", value, sync=True)

    def note_late(self, parts: JobParts) -> None:
        epoch = parts.job.current
        if epoch is None or epoch.formed or parts.attach_noted:
            return
        if self._ctx.now - epoch.minted_at >= self._ctx.settings.attach_timeout_s:
            parts.attach_noted = True
            there = f"{len(epoch.ranks)} of {epoch.world_size or 'an unknown number of'} ranks"
            text = f"epoch {epoch.number} waits: {there} attached after {self._ctx.settings.attach_timeout_s:.0f} s"
            self._ctx.out.note("membership", parts.job.name, text, epoch=epoch.number)
