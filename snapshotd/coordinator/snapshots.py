"""
What can be had: snapshots as the living nodes really hold them. A pure function of inventories and losses.

Rule: committed or not does not matter here. A snapshot can be had when each slot is somewhere, or can be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

from snapshotd.coordinator.inventory import Node, SnapshotKey
from snapshotd.erasure.geometry import StripeGeometry, recoverable
from snapshotd.v1 import control_pb2 as control

__all__ = ["Snapshot", "collect", "margin", "parity_sizes"]

_COMBINATIONS_MAX = 2000


@dataclass(slots=True)
class Snapshot:
    """One step of one epoch: who holds which part of it."""

    job: str
    epoch: int
    step: int
    world_size: int = 0
    slots: dict[int, control.SlotRef] = field(default_factory=dict)
    holders: dict[int, list[str]] = field(default_factory=dict)
    sets: dict[tuple[int, int], control.StripeSet] = field(default_factory=dict)
    parity_holders: dict[tuple[int, int, int], list[str]] = field(default_factory=dict)

    @property
    def key(self) -> SnapshotKey:
        return (self.epoch, self.step)

    def missing_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.holders]

    def losses(self, of: control.StripeSet, without: Collection[str] = ()) -> tuple[frozenset[int], frozenset[int]]:
        """Positions of a stripe set whose slot, and whose parity, no living node (outside `without`) holds."""
        data, parity = set(), set()
        group, lane, sizes = of.group, of.lane, parity_sizes(_lengths(of), of.m)
        for position, (member, parity_bytes) in enumerate(zip(of.members, sizes, strict=True)):
            if member.slot.file_bytes and not _left(self.holders.get(member.slot.rank), without):
                data.add(position)
            if parity_bytes and not _left(self.parity_holders.get((group, lane, position)), without):
                parity.add(position)
        return frozenset(data), frozenset(parity)

    def verdict(self, without: Collection[str] = ()) -> tuple[bool, str]:
        """Whether every rank's slot is there or can be decoded, and the reason in words."""
        covered = {member.slot.rank for one in self.sets.values() for member in one.members if member.slot.file_bytes}
        bare = [r for r in range(self.world_size) if not _left(self.holders.get(r), without) and r not in covered]
        if bare or not self.world_size:
            return False, f"step {self.step}: no slot and no parity of rank {', '.join(map(str, bare[:8]))}"
        for one in self.sets.values():
            data, parity = self.losses(one, without)
            if not data:
                continue
            possible, reason = _recoverable(_lengths(one), one.m, data, parity)
            if not possible:
                lost = ", ".join(sorted({one.members[position].node_id for position in data | parity}))
                return False, f"step {self.step}: more than m={one.m} parts are lost (of {lost}): {reason}"
        return True, f"step {self.step}: every rank's slot is there or can be decoded"

    def covered(self) -> bool:
        """Whether there is a stripe set of every rank: else a parity group has built nothing, or lost all of it."""
        ranks = {member.slot.rank for one in self.sets.values() for member in one.members if member.slot.file_bytes}
        return ranks == set(range(self.world_size))

    def redundant(self) -> bool:
        """Whether nothing at all is missing, and every rank is covered by parity."""
        if not self.covered() or self.missing_ranks():
            return False
        return not any(data or parity for data, parity in map(self.losses, self.sets.values()))


def collect(job: str, nodes: Iterable[Node], wanted: Callable[[SnapshotKey], bool]) -> dict[SnapshotKey, Snapshot]:
    """Return the snapshots of a job that the nodes hold parts of."""
    found: dict[SnapshotKey, Snapshot] = {}

    def snapshot(epoch: int, step: int) -> Snapshot:
        return found.setdefault((epoch, step), Snapshot(job=job, epoch=epoch, step=step))

    for node in nodes:
        for slot in node.slots.values():
            if slot.job == job and wanted((slot.epoch, slot.step)):
                one = snapshot(slot.epoch, slot.step)
                one.world_size = slot.world_size
                one.slots[slot.rank] = slot
                one.holders.setdefault(slot.rank, []).append(node.node_id)
        for (job_, epoch, step, group, lane, position), part_of in node.parities.items():
            if job_ == job and wanted((epoch, step)):
                one = snapshot(epoch, step)
                one.sets[group, lane] = part_of
                one.parity_holders.setdefault((group, lane, position), []).append(node.node_id)
                for member in part_of.members:
                    if member.slot.file_bytes:
                        one.world_size = member.slot.world_size
                        one.slots.setdefault(member.slot.rank, member.slot)
    return found


@lru_cache(maxsize=4096)
def parity_sizes(lengths: tuple[int, ...], m: int) -> tuple[int, ...]:
    """Return how many bytes of parity each position of a stripe set holds; tiny or empty shards may leave it none."""
    geometry = StripeGeometry(lengths, m)
    return tuple(geometry.parity_bytes(position) for position in range(len(lengths)))


def margin(snapshot: Snapshot) -> int:
    """Return how many nodes, whichever they are, may be lost so that the snapshot can still be had; -1: it cannot."""
    if not snapshot.verdict()[0]:
        return -1
    holders = sorted(
        {node for nodes in snapshot.holders.values() for node in nodes}
        | {node for nodes in snapshot.parity_holders.values() for node in nodes}
    )
    limit = max((one.m for one in snapshot.sets.values()), default=0)
    tried = 0
    for count in range(1, min(limit, len(holders)) + 1):
        for lost in combinations(holders, count):
            tried += 1
            if tried > _COMBINATIONS_MAX or not snapshot.verdict(frozenset(lost))[0]:
                return count - 1
    return limit


def _left(holders: list[str] | None, without: Collection[str]) -> bool:
    return holders is not None and (not without or any(holder not in without for holder in holders))


def _lengths(of: control.StripeSet) -> tuple[int, ...]:
    return tuple(member.slot.file_bytes for member in of.members)


@lru_cache(maxsize=4096)
def _recoverable(
    lengths: tuple[int, ...], m: int, data_missing: frozenset[int], parity_missing: frozenset[int]
) -> tuple[bool, str]:
    return recoverable(StripeGeometry(lengths, m), data_missing, parity_missing)
