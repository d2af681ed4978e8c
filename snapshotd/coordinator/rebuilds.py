"""
Rebuild orders: who decodes which lost slot, who computes which lost parity again.

Rule 1: slots before parity; parity of a set is rebuilt when all its slots are there.
Rule 2: at most one order per lost part. It ends in RebuildDone, in the loss of its node, or in a timeout.
Rule 3: a lost part goes to a node that holds no other part of its stripe set, as far as there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from snapshotd.coordinator.inventory import Node
from snapshotd.coordinator.job import Context, Job
from snapshotd.coordinator.snapshots import Snapshot
from snapshotd.v1 import control_pb2 as control

__all__ = ["Rebuilds"]

PartKey: TypeAlias = tuple[int, int, int, int, int, bool]
"""epoch, step, group, lane, position, slot (else parity)"""

_RETRY_AFTER_S = 10.0
_TRIES_MAX = 6


@dataclass(slots=True)
class Order:
    target: str
    nonce: str
    since: float
    message: control.Rebuild


@dataclass(slots=True)
class Failure:
    """What was tried for a part, and why it failed the last time."""

    targets: set[str] = field(default_factory=set)
    tries: int = 0
    last_at: float = 0.0
    reason: str = ""


class Rebuilds:
    """The rebuild orders of one job. decoded: ranks whose slots had to be decoded, by snapshot."""

    def __init__(self, ctx: Context, job: Job) -> None:
        self.orders: dict[PartKey, Order] = {}
        self.decoded: dict[tuple[int, int], set[int]] = {}
        self._failures: dict[PartKey, Failure] = {}
        self._ctx = ctx
        self._job = job

    def on_done(self, node: Node, done: control.RebuildDone) -> None:
        for is_slot in (True, False):
            key = (done.epoch, done.step, done.group, done.lane, done.position, is_slot)
            order = self.orders.get(key)
            if order is None or order.target != node.node_id:
                continue
            del self.orders[key]
            if done.ok:
                self._failures.pop(key, None)
                self._job.counts["rebuilt_slots" if is_slot else "rebuilt_parities"] += 1
            else:
                self._failed(key, order.target, done.reason)
        if done.ok:
            if done.HasField("slot"):
                self.decoded.setdefault((done.epoch, done.step), set()).add(done.slot.rank)
            slots = [done.slot] if done.HasField("slot") else []
            self._ctx.nodes.add(node, slots, [done.parity] if done.HasField("parity") else [])

    def on_node_lost(self, node: Node) -> None:
        for key, order in list(self.orders.items()):
            if order.target == node.node_id:
                del self.orders[key]

    def resync(self, node: Node) -> None:
        """Orders may have been lost with the node's stream: say them again (doing them twice is harmless)."""
        for order in self.orders.values():
            if order.target == node.node_id:
                self._ctx.out.to_node(node.session, rebuild=order.message)

    def tick(self) -> None:
        for key, order in list(self.orders.items()):
            if self._ctx.now - order.since >= self._ctx.settings.restore_wait_s:
                del self.orders[key]
                self._failed(key, order.target, f"no answer within {self._ctx.settings.restore_wait_s:.0f} s")

    def forget_but(self, keep: set[tuple[int, int]]) -> None:
        """Orders and failures of snapshots that nobody needs any more."""
        self.orders = {key: order for key, order in self.orders.items() if (key[0], key[1]) in keep}
        self._failures = {key: one for key, one in self._failures.items() if (key[0], key[1]) in keep}
        self.decoded = {key: ranks for key, ranks in self.decoded.items() if key in keep}

    def drive(self, snapshot: Snapshot, *, parity: bool) -> str:
        """Order what is missing. Return "" while this goes on or is done, else in words why it cannot be done."""
        trouble = ""
        for one in snapshot.sets.values():
            data_missing, parity_missing = snapshot.losses(one)
            for position in sorted(data_missing):
                trouble = self._ensure(snapshot, one, position, is_slot=True) or trouble
            if parity and not data_missing:
                for position in sorted(parity_missing):
                    trouble = self._ensure(snapshot, one, position, is_slot=False) or trouble
        return trouble

    # ------------------------------------------------------------ private

    def _ensure(self, snapshot: Snapshot, one: control.StripeSet, position: int, *, is_slot: bool) -> str:
        key = (one.epoch, one.step, one.group, one.lane, position, is_slot)
        if key in self.orders:
            return ""
        failure = self._failures.get(key)
        if failure is not None and failure.tries >= _TRIES_MAX:
            if self._ctx.now - failure.last_at < self._ctx.settings.restore_wait_s:
                return failure.reason
            del self._failures[key]
            failure = None
        tried = failure.targets if failure is not None else set()
        target = self._choose(snapshot, one, position, tried)
        if target is None and failure is not None:
            if self._ctx.now - failure.last_at < min(_RETRY_AFTER_S, self._ctx.settings.restore_wait_s):
                return failure.reason
            failure.targets.clear()
            target = self._choose(snapshot, one, position, set())
        if target is None:
            return "no node is there to rebuild on"
        slot_nodes = [_first(snapshot.holders.get(m.slot.rank)) if m.slot.file_bytes else "" for m in one.members]
        parity_nodes = [
            _first(snapshot.parity_holders.get((one.group, one.lane, index))) for index in range(len(one.members))
        ]
        message = control.Rebuild(
            set=one,
            position=position,
            slot=is_slot,
            parity=not is_slot,
            slot_nodes=slot_nodes,
            parity_nodes=parity_nodes,
            peers=self._ctx.nodes.peers([*slot_nodes, *parity_nodes, target.node_id]),
        )
        self.orders[key] = Order(target=target.node_id, nonce=target.nonce, since=self._ctx.now, message=message)
        self._ctx.out.to_node(target.session, rebuild=message)
        what = f"slot of rank {one.members[position].slot.rank}" if is_slot else f"parity {position}"
        text = f"step {one.step}: {what} is rebuilt on {target.node_id}"
        self._ctx.out.note("recovery", self._job.name, text, epoch=one.epoch, step=one.step)
        return ""

    def _choose(self, snapshot: Snapshot, one: control.StripeSet, position: int, tried: set[str]) -> Node | None:
        """Prefer the part's own place, then nodes without a part of this set, then the least loaded survivor."""
        nodes = self._ctx.nodes
        load: dict[str, int] = {}
        own = set(_others(snapshot, one, position, same=True))
        for holder in _others(snapshot, one, position, same=False):
            load[holder] = load.get(holder, 0) + 1
        for key, order in self.orders.items():
            if key[:4] == (one.epoch, one.step, one.group, one.lane) and key[4] != position:
                load[order.target] = load.get(order.target, 0) + 1
        rank = one.members[position].slot.rank
        epoch = self._job.current
        now_at = ""
        if epoch is not None and one.members[position].slot.file_bytes and rank in epoch.ranks:
            now_at = epoch.ranks[rank].node_id
        members = set() if epoch is None else set(epoch.node_ids)

        def cost(node: Node) -> tuple[int, int, int, str]:
            at_home = node.node_id in own or node.node_id == one.members[position].node_id
            place = 0 if at_home else 1 if node.node_id == now_at else 2 if node.node_id in members else 3
            return (load.get(node.node_id, 0), place, len(node.slots), node.node_id)

        choices = [node for node in nodes.connected() if node.node_id not in tried]
        return min(choices, key=cost, default=None)

    def _failed(self, key: PartKey, target: str, reason: str) -> None:
        failure = self._failures.setdefault(key, Failure())
        failure.targets.add(target)
        failure.tries += 1
        failure.last_at, failure.reason = self._ctx.now, f"{target}: {reason}"
        self._job.counts["rebuild_failures"] += 1
        text = f"step {key[1]}: a lost part could not be rebuilt on {target}: {reason}"
        self._ctx.out.note("recovery", self._job.name, text, epoch=key[0], step=key[1])


def _first(holders: list[str] | None) -> str:
    return holders[0] if holders else ""


def _others(snapshot: Snapshot, one: control.StripeSet, position: int, *, same: bool) -> list[str]:
    """Nodes that hold a part of the set: of this position, or of all the others."""
    found: list[str] = []
    for index, member in enumerate(one.members):
        if (index == position) != same:
            continue
        holders = set(snapshot.holders.get(member.slot.rank, ())) if member.slot.file_bytes else set()
        found.extend(holders | set(snapshot.parity_holders.get((one.group, one.lane, index), ())))
    return found
