"""
The bytes of the simulated cluster: slots, parity, durable snapshots, and what can truly be rebuilt from them.

A slot's bytes are one short text that says who wrote them at which step. Parity remembers the texts it was computed
from. Decoding is modelled by the production geometry's own `recoverable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from snapshotd.erasure.geometry import StripeGeometry, recoverable
from snapshotd.v1 import control_pb2 as control

if TYPE_CHECKING:
    from tests.simulation.node import SimNode


@dataclass
class ArenaSlot:
    """One slot file. record: set by the seal, removed by the void. rotten: its bytes do not match its digest."""

    file_bytes: int
    content: str = ""
    record: control.SlotRef | None = None
    rotten: bool = False

    def good(self) -> bool:
        return self.record is not None and not self.rotten and self.record.root_digest == self.content


@dataclass
class ArenaParity:
    ref: control.ParityRef
    contents: dict[int, str]
    rotten: bool = False


@dataclass
class Durable:
    """A snapshot on the durable tier; counts when sealed."""

    contents: dict[int, str] = field(default_factory=dict)
    sealed: bool = False
    world_size: int = 0


def parity_key(ref: control.ParityRef) -> tuple[int, int, int, int, int]:
    return (ref.set.epoch, ref.set.step, ref.set.group, ref.set.lane, ref.position)


@lru_cache(maxsize=65536)
def can_rebuild(lengths: tuple[int, ...], m: int, data: frozenset[int], parity: frozenset[int]) -> bool:
    return recoverable(StripeGeometry(lengths, m), data, parity)[0]


@lru_cache(maxsize=65536)
def parity_bytes(lengths: tuple[int, ...], m: int, position: int) -> int:
    return StripeGeometry(lengths, m).parity_bytes(position)


@dataclass
class Truth:
    """What really exists of one snapshot, on a given set of nodes."""

    world_size: int = 0
    slots: set[int] = field(default_factory=set)
    sets: dict[tuple[int, int], control.StripeSet] = field(default_factory=dict)
    parity: set[tuple[int, int, int]] = field(default_factory=set)

    def rebuildable(self) -> bool:
        if not self.world_size:
            return False
        missing = set(range(self.world_size)) - self.slots
        for key, one in self.sets.items():
            ranks = {p: m.slot.rank for p, m in enumerate(one.members) if m.slot.file_bytes}
            data = frozenset(p for p, rank in ranks.items() if rank in missing)
            if not data:
                continue
            lengths = tuple(m.slot.file_bytes for m in one.members)
            parity = frozenset(p for p in range(len(one.members)) if (*key, p) not in self.parity)
            if can_rebuild(lengths, one.m, data, parity):
                missing -= {ranks[p] for p in data}
        return not missing

    def most_lost(self) -> int:
        """At how many positions of a stripe set something is missing, its slot or its parity; of the worst set."""
        worst = 0
        for key, one in self.sets.items():
            lengths = tuple(m.slot.file_bytes for m in one.members)
            bad = 0
            for position, member in enumerate(one.members):
                parity = parity_bytes(lengths, one.m, position) and (*key, position) not in self.parity
                bad += bool(parity or (member.slot.file_bytes and member.slot.rank not in self.slots))
            worst = max(worst, bad)
        return worst

    def whole(self) -> bool:
        """Nothing at all is missing, parity included: that of all ranks, or of none."""
        if not self.world_size or len(self.slots) < self.world_size:
            return False
        covered = {member.slot.rank for one in self.sets.values() for member in one.members if member.slot.file_bytes}
        if covered and len(covered) < self.world_size:
            return False  # one group has built its parity, another has not
        for key, one in self.sets.items():
            lengths = tuple(m.slot.file_bytes for m in one.members)
            for position in range(len(one.members)):
                if parity_bytes(lengths, one.m, position) and (*key, position) not in self.parity:
                    return False
        return True


def truth(nodes: list[SimNode], key: tuple[int, int]) -> Truth:
    """Collect what the nodes really hold of (epoch, step)."""
    found = Truth()
    for node in nodes:
        for slot in node.arena.values():
            ref = slot.record
            if ref is not None and (ref.epoch, ref.step) == key and slot.good():
                found.world_size = ref.world_size
                found.slots.add(ref.rank)
        for parity in node.parities.values():
            ref_set = parity.ref.set
            if (ref_set.epoch, ref_set.step) == key and not parity.rotten:
                found.sets[(ref_set.group, ref_set.lane)] = ref_set
                found.parity.add((ref_set.group, ref_set.lane, parity.ref.position))
                for member in ref_set.members:
                    if member.slot.file_bytes:
                        found.world_size = member.slot.world_size
    return found
