"""
Which nodes there are, and what each of them holds.

Rule 1: a node without a session for longer than its lease is dead, and what it held is lost.
Rule 2: a hello is the whole truth about its node: it replaces what was known.
Rule 3: a remembered node that has not been heard of since the coordinator started is waited for.
Rule 4: what is `settled` about a snapshot holds until any node gains or loses a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from snapshotd.coordinator.events import SessionId
from snapshotd.v1 import control_pb2 as control

__all__ = ["Inventory", "JobSnapshot", "Node", "ParityKey", "SlotKey", "SnapshotKey", "parity_key", "slot_key"]

DEAD_KEPT = 64
"""Dead nodes that are still named in reasons and shown in the status."""

HASHED_S = 60.0
"""How long a decision waits for a slot that is being hashed."""

SnapshotKey: TypeAlias = tuple[int, int]
"""(epoch, step): snapshots of one job are ordered so."""
SlotKey: TypeAlias = tuple[str, int, int, int]
"""job, epoch, step, rank"""
ParityKey: TypeAlias = tuple[str, int, int, int, int, int]
"""job, epoch, step, group, lane, position"""
JobSnapshot: TypeAlias = tuple[str, int, int]
"""job, epoch, step"""


def slot_key(ref: control.SlotRef) -> SlotKey:
    return (ref.job, ref.epoch, ref.step, ref.rank)


def parity_key(ref: control.ParityRef) -> ParityKey:
    one = ref.set
    return (one.job, one.epoch, one.step, one.group, one.lane, ref.position)


@dataclass(slots=True)
class Node:
    """
    One daemon. connected: it has a session; alive: it has one, or its lease still runs.

    sealing: slots that workers which are gone have handed over to it, and that it has not yet hashed; since when.
    parities: what each is a part of.
    """

    node_id: str
    session: SessionId | None = None
    nonce: str = ""
    version: str = ""
    bulk: str = ""
    domain: str = ""
    alive: bool = True
    heard: bool = False
    down_since: float | None = None
    budget_bytes: int = 0
    arena_bytes: int = 0
    resident_bytes: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    persist_every_steps: int = 0
    persist_every_s: float = 0.0
    slots: dict[SlotKey, control.SlotRef] = field(default_factory=dict)
    sealing: dict[SlotKey, float] = field(default_factory=dict)
    parities: dict[ParityKey, control.StripeSet] = field(default_factory=dict)

    @property
    def connected(self) -> bool:
        return self.session is not None

    def holds_job(self, job: str) -> bool:
        return any(key[0] == job for key in self.slots) or any(key[0] == job for key in self.parities)


class Inventory:
    """
    All nodes, by id and by session.

    settled: whether a snapshot lacks nothing, where that is known. Not in it: look at what the nodes hold.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.settled: dict[JobSnapshot, bool] = {}
        self._sessions: dict[SessionId, Node] = {}

    def remember(self, node_id: str) -> None:
        """A node that must exist somewhere: wait for its hello, or for its lease."""
        self.nodes.setdefault(node_id, Node(node_id=node_id))

    def of_session(self, session: SessionId) -> Node | None:
        return self._sessions.get(session)

    def get(self, node_id: str) -> Node | None:
        return self.nodes.get(node_id)

    def session_of(self, node_id: str) -> SessionId | None:
        node = self.nodes.get(node_id)
        return None if node is None else node.session

    def alive(self, node_id: str) -> bool:
        node = self.nodes.get(node_id)
        return node is not None and node.alive

    def connected(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.connected]

    def hello(self, session: SessionId, hello: control.NodeHello, now: float) -> tuple[Node, SessionId | None, bool]:
        """Take the hello in. Return the node, its older session if it had one, and whether its daemon is a new one."""
        node = self.nodes.setdefault(hello.node_id, Node(node_id=hello.node_id))
        older = node.session if node.session not in (None, session) else None
        if older is not None:
            self._sessions.pop(older, None)
        restarted = node.nonce not in ("", hello.nonce)
        node.session, node.nonce, node.version = session, hello.nonce, hello.version
        node.bulk, node.domain = hello.bulk_address, hello.domain
        node.alive, node.heard, node.down_since = True, True, None
        node.budget_bytes = hello.budget_bytes
        node.persist_every_steps, node.persist_every_s = hello.persist_every_steps, hello.persist_every_s
        self._lose_all(node)
        self.promise(node, hello.sealing, now)
        self.add(node, hello.slots, hello.parities)
        self._sessions[session] = node
        return node, older, restarted

    def session_ended(self, session: SessionId, now: float) -> Node | None:
        """Start the lease of the session's node; None when the session is not a node's newest."""
        node = self._sessions.pop(session, None)
        if node is not None:
            node.session, node.down_since = None, now
        return node

    def expire(self, now: float, lease_s: float, grace_s: float) -> list[Node]:
        """Declare nodes dead whose lease is over; what they held is lost. Return them."""
        dead = []
        for node in self.nodes.values():
            if node.connected or not node.alive:
                continue
            if node.down_since is None:
                node.down_since = now
            if now - node.down_since >= (lease_s if node.heard else max(lease_s, grace_s)):
                node.alive = False
                self._lose_all(node)
                dead.append(node)
        gone = [node for node in self.nodes.values() if not node.alive]
        for node in sorted(gone, key=lambda node: node.down_since or 0.0)[:-DEAD_KEPT]:
            del self.nodes[node.node_id]
        return dead

    def absent(self, job: str, node_ids: frozenset[str]) -> list[str]:
        """Nodes that may still come back with something of the job: alive, but without a session."""
        return sorted(
            node.node_id
            for node in self.nodes.values()
            if node.alive and not node.connected and (not node.heard or node.node_id in node_ids or node.holds_job(job))
        )

    def unheard(self) -> bool:
        """Whether a remembered node may still come and say what it holds."""
        return any(node.alive and not node.heard for node in self.nodes.values())

    def peers(self, node_ids: Iterator[str] | list[str]) -> list[control.PeerAddress]:
        found = []
        for node_id in dict.fromkeys(node_ids):
            node = self.nodes.get(node_id)
            if node is not None and node.bulk:
                found.append(control.PeerAddress(node_id=node_id, bulk=node.bulk))
        return found

    def promise(self, node: Node, slots: Iterable[control.SlotRef], now: float) -> None:
        """These will be added, or removed, when they are hashed."""
        node.sealing.update((key, now) for key in map(slot_key, slots) if key not in node.slots)

    def sealing(self, job: str, now: float) -> list[str]:
        """Nodes that may still add to what is known of the job; no hash takes longer than HASHED_S."""
        return sorted(
            node.node_id
            for node in self.connected()
            if any(key[0] == job and now - since < HASHED_S for key, since in node.sealing.items())
        )

    def add(self, node: Node, slots: Iterable[control.SlotRef], parities: Iterable[control.ParityRef]) -> None:
        for slot in slots:
            slot_place = slot_key(slot)
            node.slots[slot_place] = slot
            node.sealing.pop(slot_place, None)
            self.settled.pop(slot_place[:3], None)
        for parity in parities:
            self.add_parity(node, parity_key(parity), parity.set)

    def add_parity(self, node: Node, place: ParityKey, part_of: control.StripeSet) -> None:
        node.parities[place] = part_of
        self.settled.pop(place[:3], None)

    def remove(self, node: Node, change: control.InventoryChange) -> None:
        for slot in change.slots_removed:
            slot_place = slot_key(slot)
            node.slots.pop(slot_place, None)
            node.sealing.pop(slot_place, None)
            self.settled.pop(slot_place[:3], None)
        for parity in change.parities_removed:
            parity_place = parity_key(parity)
            node.parities.pop(parity_place, None)
            self.settled.pop(parity_place[:3], None)

    def _lose_all(self, node: Node) -> None:
        for slot_place in node.slots:
            self.settled.pop(slot_place[:3], None)
        for parity_place in node.parities:
            self.settled.pop(parity_place[:3], None)
        node.slots, node.parities, node.sealing = {}, {}, {}

    def drop_job(self, job: str) -> None:
        self.settled = {key: whole for key, whole in self.settled.items() if key[0] != job}
        for node in self.nodes.values():
            node.slots = {key: ref for key, ref in node.slots.items() if key[0] != job}
            node.parities = {key: ref for key, ref in node.parities.items() if key[0] != job}
            node.sealing = {key: since for key, since in node.sealing.items() if key[0] != job}
