"""
Epochs: who is in them, how they come to be complete, and which nodes protect each other.

Rule 1: the number of an epoch only grows, over restarts too.
Rule 2: an epoch is complete (formed) when each of its ranks is attached; only then can it commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapshotd.v1 import control_pb2 as control

__all__ = ["Attached", "Epoch", "Round", "parity_groups"]


@dataclass(slots=True)
class Attached:
    """A worker: where it runs, which process it is, and its index on its node."""

    node_id: str
    nonce: str
    local_rank: int


@dataclass(slots=True)
class Round:
    """Workers of one launch that do not know their epoch yet (another rendezvous launched them)."""

    world_size: int
    ranks: dict[int, Attached] = field(default_factory=dict)


@dataclass(slots=True)
class Epoch:
    """One membership. world_size is 0 until the first worker says it. `ranks` changes by `attach` and `detach` only."""

    number: int
    formation: str = ""
    world_size: int = 0
    ranks: dict[int, Attached] = field(default_factory=dict)
    formed: bool = False
    groups: list[list[str]] = field(default_factory=list)
    m: int = 0
    reason: str = ""
    minted_at: float = 0.0
    formed_at: float = 0.0
    _lanes: dict[str, list[int]] | None = field(default=None, repr=False, compare=False)

    def attach(self, rank: int, who: Attached) -> None:
        self.ranks[rank] = who
        self._lanes = None

    def detach(self, rank: int) -> None:
        del self.ranks[rank]
        self._lanes = None

    @property
    def nodes(self) -> list[str]:
        """Node of each rank, by rank."""
        return [self.ranks[rank].node_id for rank in sorted(self.ranks)]

    @property
    def node_ids(self) -> list[str]:
        """Each node once, in the order of its lowest rank."""
        return list(self._by_node())

    def ranks_of(self, node_id: str) -> list[int]:
        """Ranks of a node in the order of their local ranks: index = lane."""
        return self._by_node().get(node_id, [])

    def _by_node(self) -> dict[str, list[int]]:
        """Kept: with a thousand ranks it would be most of what a commit costs."""
        if self._lanes is None:
            self._lanes = {}
            for rank in sorted(self.ranks):
                self._lanes.setdefault(self.ranks[rank].node_id, []).append(rank)
            for lanes in self._lanes.values():
                lanes.sort(key=lambda rank: (self.ranks[rank].local_rank, rank))
        return self._lanes

    def complete(self) -> bool:
        return 0 < self.world_size == len(self.ranks)

    def message(self, job: str) -> control.EpochFormed:
        return control.EpochFormed(
            job=job,
            epoch=self.number,
            world_size=self.world_size,
            nodes=self.nodes,
            m=self.m,
            reason=self.reason,
            formation=self.formation,
        )

    def to_json(self) -> dict[str, object]:
        return {
            "number": self.number,
            "formation": self.formation,
            "world_size": self.world_size,
            "formed": self.formed,
            "ranks": {str(rank): [who.node_id, who.nonce, who.local_rank] for rank, who in self.ranks.items()},
            "groups": self.groups,
            "m": self.m,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Epoch:
        return cls(
            number=int(value["number"]),
            formation=str(value["formation"]),
            world_size=int(value["world_size"]),
            formed=bool(value["formed"]),
            ranks={
                int(rank): Attached(node_id=str(node_id), nonce=str(nonce), local_rank=int(local_rank))
                for rank, (node_id, nonce, local_rank) in value["ranks"].items()
            },
            groups=[[str(node_id) for node_id in group] for group in value["groups"]],
            m=int(value["m"]),
            reason=str(value["reason"]),
        )


def parity_groups(
    node_ids: Sequence[str], domains: Mapping[str, str], *, group_size: int, parity: int
) -> tuple[list[list[str]], int, str]:
    """
    Return the groups, the effective m of all of them, and in words why m is less than asked for ("" when it is not).

    Groups are balanced and have at most group_size nodes, unless that would leave a group too small for the parity
    asked for. Nodes of one failure domain are dealt to different groups as far as there are groups.
    """
    total = len(node_ids)
    count = max(1, -(-total // max(1, group_size)))
    while count > 1 and total // count <= parity:
        count -= 1
    by_domain: dict[str, list[str]] = {}
    for node_id in node_ids:
        by_domain.setdefault(domains.get(node_id) or f"\0{node_id}", []).append(node_id)
    dealt = [
        node_id for domain in sorted(by_domain, key=lambda d: (-len(by_domain[d]), d)) for node_id in by_domain[domain]
    ]
    position = {node_id: index for index, node_id in enumerate(node_ids)}
    groups = [sorted(dealt[index::count], key=position.__getitem__) for index in range(count)]
    smallest = min(len(group) for group in groups)
    m = max(0, min(parity, smallest - 1))
    if m >= parity:
        return groups, m, ""
    if m == 0:
        return groups, 0, "one node only: snapshots outlive the worker and the daemon, but not the node"
    return (
        groups,
        m,
        f"parity {parity} needs {parity + 1} nodes in a group; {smallest} are there, so any {m} may be lost",
    )
