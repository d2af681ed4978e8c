"""
One step on its way to being protected: what is coded together, what each node is told, and who has not done it yet.

A node is told of its own parity group only: with hundreds of nodes the whole order would be most of a commit's cost.
What it was told stands: nodes that have built, or are building, the same of a later step are not told again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from snapshotd.coordinator.inventory import Inventory, ParityKey, SlotKey
from snapshotd.coordinator.membership import Epoch
from snapshotd.coordinator.snapshots import parity_sizes
from snapshotd.stripesets import set_digest
from snapshotd.v1 import control_pb2 as control

__all__ = ["Protecting", "Shards", "begin_protecting"]

Shards: TypeAlias = dict[int, control.NodeSealed.Shard]
"""What each rank has sealed of one step."""


@dataclass(slots=True, kw_only=True)
class Protecting:
    """
    A step whose parity is being built.

    orders: by parity group. group_of: where a node finds its order. sealed: the slots of each node. expected: the
    parity that each node is to build, and what it is a part of. waiting: nodes that have yet to say ParityBuilt; those
    that neither have a part nor need to promise anything more are not asked. unasked: those of them that have begun
    without an order, and have not been given one.
    """

    epoch: int
    step: int
    since: float
    orders: list[control.Protect]
    group_of: dict[str, int]
    sealed: dict[str, set[SlotKey]]
    expected: dict[str, dict[ParityKey, control.StripeSet]]
    waiting: set[str]
    unasked: set[str] = field(default_factory=set)
    _digests: dict[int, list[int]] = field(default_factory=dict)

    def order_of(self, node_id: str) -> control.Protect:
        return self.orders[self.group_of[node_id]]

    def means(self, node_id: str, built: control.ParityBuilt) -> bool:
        """Whether what a node has built without an order is what its order would have said."""
        group = self.group_of[node_id]
        digests = self._digests.get(group)
        if digests is None:
            digests = self._digests[group] = [set_digest(one) for one in self.orders[group].sets]
        sets = zip(built.lanes, built.sets, strict=False)
        return len(built.lanes) == len(built.sets) and all(
            lane < len(digests) and digests[lane] == digest for lane, digest in sets
        )


def begin_protecting(job: str, epoch: Epoch, step: int, shards: Shards, nodes: Inventory, now: float) -> Protecting:
    """The orders for a step that all ranks have sealed."""
    flight = Protecting(
        epoch=epoch.number,
        step=step,
        since=now,
        orders=[],
        group_of={node_id: index for index, group in enumerate(epoch.groups) for node_id in group},
        sealed={
            node_id: {(job, epoch.number, step, rank) for rank in epoch.ranks_of(node_id)} for node_id in epoch.node_ids
        },
        expected={node_id: {} for node_id in epoch.node_ids},
        waiting=set(),
    )
    for index, group in enumerate(epoch.groups):
        order = control.Protect(job=job, epoch=epoch.number, step=step, peers=nodes.peers(group))
        lanes = max(len(epoch.ranks_of(node_id)) for node_id in group)
        for lane in range(lanes):
            lengths = _add_set(order, epoch, index, lane, shards)
            one = order.sets[-1]
            for position, nbytes in enumerate(parity_sizes(lengths, one.m)):
                if nbytes:
                    flight.expected[group[position]][job, epoch.number, step, index, lane, position] = one
        flight.orders.append(order)
    flight.waiting = {
        node_id for node_id in epoch.node_ids if flight.expected[node_id] or not _is_pledged(epoch, node_id, shards)
    }
    return flight


def _is_pledged(epoch: Epoch, node_id: str, shards: Shards) -> bool:
    return all(shards[rank].pledged for rank in epoch.ranks_of(node_id))


def _add_set(order: control.Protect, epoch: Epoch, group: int, lane: int, shards: Shards) -> tuple[int, ...]:
    """Add to the order what one lane of a group codes together: its slots, one of each node. Return their lengths."""
    members = epoch.groups[group]
    one = order.sets.add(
        job=order.job, epoch=order.epoch, step=order.step, group=group, lane=lane, m=min(epoch.m, len(members) - 1)
    )
    lengths = []
    for node_id in members:
        member = one.members.add(node_id=node_id)
        ranks = epoch.ranks_of(node_id)
        if lane < len(ranks):
            member.slot.CopyFrom(shards[ranks[lane]].slot)
        lengths.append(member.slot.file_bytes)
    return tuple(lengths)
