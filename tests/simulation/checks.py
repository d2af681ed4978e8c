"""
What must hold after each event, whatever happened; and the marks that rare situations were reached.

Rule: the checks look at what really exists in the arenas, never at what a core believes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotd.coordinator.events import Output, Put, ToAgent, ToNode
from snapshotd.coordinator.job import Job
from snapshotd.daemon.core_state import State
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker
from tests.simulation.arena import parity_bytes, truth

if TYPE_CHECKING:
    from tests.simulation.node import SimNode
    from tests.simulation.world import World


_KNOWN_S = 1.0
"""How long a message may be under way over a connection that holds."""


class InvariantBroken(AssertionError):
    """Something that must never happen has happened."""


@dataclass(frozen=True)
class HandedOver:
    """A slot that a worker has sealed: when, and to which run of which daemon, over which of its connections."""

    at: float
    node: SimNode
    incarnation: int
    link: object

    def is_there(self, key: tuple[int, int], rank: int) -> bool:
        """Whether it is sealed, or will be although its worker is gone, and the coordinator can know of it."""
        node = self.node
        if node.lost or node.core is None or (node.incarnation, node.link) != (self.incarnation, self.link):
            return False
        for slot_id, slot in node.core.state.slots.items():
            if slot.ref is not None and not slot.doomed and (slot.key, slot.rank) == (key, rank):
                return slot.promised or (slot.state is State.SEALED and node.arena[slot_id].good())
        return False


@dataclass
class Relied:
    """A snapshot that is relied on. budget: parts that may still be lost without it being lost."""

    key: tuple[int, int]
    level: int
    m: int
    budget: int
    weak: bool = False


class Checks:
    """The invariants of one world."""

    def __init__(self, world: World) -> None:
        self.dirty = False
        self.commits = 0
        self.newest_epoch = 0
        self.relied: dict[tuple[int, int], Relied] = {}
        self.committed: tuple[int, int] | None = None
        self.ever_committed = False
        self._world = world
        self._sealed: dict[tuple[int, int], dict[int, str]] = {}
        self._world_sizes: dict[tuple[int, int], int] = {}
        self._handed_over: dict[tuple[int, int], dict[int, HandedOver]] = {}
        self._built: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
        self._sets: dict[tuple[int, int], dict[tuple[int, int], control.StripeSet]] = {}
        self._formed: dict[int, control.EpochFormed] = {}
        self._decided: dict[str, tuple[int, int, int]] = {}
        self._adopted: tuple[int, ...] | None = None
        self._agents: dict[tuple[int, int], str] = {}

    def fail(self, text: str) -> None:
        raise InvariantBroken(f"seed {self._world.plan.seed} at {self._world.clock.now:.3f}: {text}")

    # ------------------------------------------------------------ what nodes do

    def on_handed_over(self, node: SimNode, ref: control.SlotRef) -> None:
        handed = HandedOver(self._world.clock.now, node, node.incarnation, node.link)
        self._handed_over.setdefault((ref.epoch, ref.step), {})[ref.rank] = handed
        self._world_sizes[(ref.epoch, ref.step)] = ref.world_size

    def on_slot_sealed(self, node: SimNode, ref: control.SlotRef, content: str) -> None:
        known = self._sealed.setdefault((ref.epoch, ref.step), {})
        if known.setdefault(ref.rank, content) != content:
            self.fail(f"rank {ref.rank} sealed step {ref.step} of epoch {ref.epoch} twice with other bytes")

    def on_parity_built(self, key: tuple[int, int], parities: list[control.ParityRef]) -> None:
        built, sets = self._built.setdefault(key, set()), self._sets.setdefault(key, {})
        for ref in parities:
            built.add((ref.set.group, ref.set.lane, ref.position))
            sets[ref.set.group, ref.set.lane] = ref.set

    def _unprotected(self, key: tuple[int, int], world_size: int) -> list[str]:
        """What lacks for the protection of a step: ranks that no parity covers, and parity that was never built."""
        lacks, covered = [], set()
        for where, one in self._sets.get(key, {}).items():
            lengths = tuple(member.slot.file_bytes for member in one.members)
            for position, member in enumerate(one.members):
                if member.slot.file_bytes:
                    covered.add(member.slot.rank)
                if parity_bytes(lengths, one.m, position) and (*where, position) not in self._built[key]:
                    lacks.append(f"parity of {member.node_id}")
        return lacks + [f"any parity of rank {rank}" for rank in range(world_size) if rank not in covered]

    def after_node(self, node: SimNode) -> None:
        counts: dict[int, int] = {}
        if node.core is None:
            return
        state = node.core.state
        for slot in state.slots.values():
            if not slot.rebuilt and slot.state is not State.VOIDING:  # which a tool may hold
                counts[slot.rank] = counts.get(slot.rank, 0) + 1
        limit = self._world.plan.generations + 2
        if counts and max(counts.values()) > limit:
            self.fail(f"{node.node_id} has {counts} slots per rank, at most {limit} may be")
        if self.dirty:
            self.check_relied()

    def part_lost(self) -> None:
        """Bytes of one object have become rotten."""
        for one in self.relied.values():
            one.budget -= 1

    def node_lost(self, node: SimNode) -> None:
        """A node is about to be lost, with as many parts of each snapshot as it holds (after a rebuild perhaps two)."""
        for one in self.relied.values():
            held = truth([node], one.key)
            positions: dict[tuple[int, int], set[int]] = {}
            for group, lane, position in held.parity:
                positions.setdefault((group, lane), set()).add(position)
            for key, stripe_set in held.sets.items():
                ranks = {m.slot.rank: p for p, m in enumerate(stripe_set.members) if m.slot.file_bytes}
                positions[key] |= {ranks[rank] for rank in held.slots if rank in ranks}
            one.budget -= max(map(len, positions.values())) if positions else len(held.slots)

    def check_relied(self) -> None:
        """The newest committed snapshot can be rebuilt from what is there, unless more than m parts were lost."""
        self.dirty = False
        nodes = [node for node in self._world.nodes.values() if not node.lost]
        for one in self.relied.values():
            there = truth(nodes, one.key)
            if there.rebuildable():
                if there.whole():
                    one.budget = max((s.m for s in there.sets.values()), default=0)
                    one.weak = False
                continue
            if one.budget >= 0 and not one.weak:
                self.fail(f"the committed snapshot {one.key} is gone, though no more than m={one.m} parts were lost")

    # ------------------------------------------------------------ what the coordinator does

    def before_persist(self, output: Output) -> None:
        """Look at what the coordinator is about to remember: epochs, commits, choices."""
        values = {}
        for effect in output.persist:
            if isinstance(effect, Put):
                values[effect.key] = json.loads(effect.value)
        if "epoch" in values:
            number = values["epoch"]["number"]
            if number < self.newest_epoch:
                self.fail(f"the epoch goes back from {self.newest_epoch} to {number}")
            self.newest_epoch = number
            current = values["epoch"]["epoch"]
            if current is not None and current["formed"]:
                ranks = current["ranks"]
                if len(ranks) != current["world_size"]:
                    self.fail(f"epoch {number} is complete without all its ranks")
        choice = values["line"]["decision"] if "line" in values else None
        if choice is not None:
            self._on_choice(choice, values.get("commit"))
        elif "commit" in values and values["commit"]["committed"] is not None:
            if values["commit"]["fallback"] is not None:
                # A forgotten commit is adopted beside an older one: nothing is given up by that.
                self._world.probe("adopted")
                self._adopted = tuple(values["commit"]["committed"][:2])
            else:
                self._on_commit(values["commit"]["committed"])

    def _on_commit(self, committed: list[int]) -> None:
        epoch, step, level, world_size = committed
        key = (epoch, step)
        if self.committed is not None and key == self.committed:
            for one in self.relied.values():
                if one.key == key:
                    one.level = level
            self.relied = {k: one for k, one in self.relied.items() if k == key}
            return
        if epoch != self.newest_epoch and key != self._adopted:
            self.fail(f"step {step} of epoch {epoch} is committed, but the job is at epoch {self.newest_epoch}")
        if self.committed is not None and key < self.committed:
            self.fail(f"the commit goes back from {self.committed} to {key}")
        sealed = self._sealed.get(key, {})
        if set(sealed) != set(range(world_size)):
            self.fail(f"step {step} is committed, but only ranks {sorted(sealed)} of {world_size} have sealed it")
        formed = self._formed.get(epoch)
        if formed is None:
            self.fail(f"step {step} is committed in epoch {epoch}, which was never complete")
        assert formed is not None
        if level >= control.Committed.LEVEL_PROTECTED:
            lacks = self._unprotected(key, world_size)
            # The parity of an adopted step may have been completed by rebuild orders instead.
            alive = [node for node in self._world.nodes.values() if not node.lost]
            if lacks and not (key == self._adopted and truth(alive, key).rebuildable()):
                self.fail(f"step {step} is committed as protected without {', '.join(lacks)}")
        elif formed.m and not (self._built.get(key) and self._world.coordinator.incarnation > 1):
            # Only a restarted coordinator that finds a step half protected may take it as it is.
            self.fail(f"step {step} is committed without parity, though the epoch has m={formed.m}")
        m = formed.m if level >= control.Committed.LEVEL_PROTECTED else 0
        self.commits += 1
        self.committed, self.ever_committed = key, True
        self.relied = {key: Relied(key=key, level=level, m=m, budget=m)}
        # A node whose daemon is down may have lost its arena already, and bytes may have become rotten that nobody has
        # read since: what is lost counts from the beginning.
        nodes = [node for node in self._world.nodes.values() if not node.lost]
        there = truth(nodes, key)
        if not (there.whole() if m else there.rebuildable()):
            self.relied[key].budget -= max(1, there.most_lost())
        self.check_relied()

    def _on_choice(self, choice: dict[str, object], commit: dict[str, list[int]] | None) -> None:
        kind = choice["kind"]
        probe = self._world.probe
        # Only nodes with a session count for the coordinator; the others are away for longer than their lease.
        core = self._world.coordinator.core
        assert core is not None
        known = {node.node_id for node in core.ctx.nodes.connected()}
        connected = [node for node in self._world.nodes.values() if not node.lost and node.node_id in known]
        source = None if choice["source"] is None else tuple(choice["source"])  # type: ignore[arg-type]
        for one in self.relied.values():
            older = source is None or source < one.key
            if older and kind and truth(connected, one.key).rebuildable() and not self._was_tried(one.key):
                self.fail(f"epoch {choice['epoch']} goes on from {source}, though {one.key} can be rebuilt")
        if kind:
            self._check_handed_over(source)
        if kind == control.RESTORE_KIND_FRESH:
            probe("fresh")
            if self.ever_committed:
                self.fail("a fresh start, though there were commits before")
        elif kind == control.RESTORE_KIND_MEMORY:
            probe("memory")
            assert source is not None
            if self.committed is not None and source > self.committed:
                probe("uncommitted_preferred")
            if "decoded" in str(choice["reason"]):
                probe("decoded")
            if commit is not None and commit["fallback"] is not None:
                probe("fallback_kept")
        elif kind == control.RESTORE_KIND_DURABLE:
            probe("durable")
        elif kind == control.RESTORE_KIND_REFUSED:
            probe("refused")
        if commit is None or commit["committed"] is None:
            if kind != control.RESTORE_KIND_REFUSED:
                self.relied, self.committed = {}, None
            return
        better = [one for one in self.relied.values() if one.level >= control.Committed.LEVEL_PROTECTED]
        self.relied = {}
        for entry in (commit["committed"], commit["fallback"]):
            if entry is not None and kind == control.RESTORE_KIND_MEMORY:
                key = (entry[0], entry[1])
                there = truth([node for node in self._world.nodes.values() if not node.lost], key)
                m = max((s.m for s in there.sets.values()), default=0) if there.whole() else 0
                self.relied[key] = Relied(key=key, level=entry[2], m=m, budget=m if there.rebuildable() else -1)
        self.committed = (commit["committed"][0], commit["committed"][1])
        if kind == control.RESTORE_KIND_MEMORY and commit["committed"][2] < control.Committed.LEVEL_PROTECTED:
            # One at least as new that is whole with its parity, known or not as committed, may stand in for it.
            newest = max((key for key, one in self.relied.items() if one.m > 0), default=(0, 0))
            for one in better:
                kept = one.key in self.relied or one.key <= newest
                if one.key < self.committed and not kept and truth(connected, one.key).rebuildable():
                    self.fail(f"the protected {one.key} is given up for {self.committed}, which is only sealed")

    def _check_handed_over(self, source: tuple[int, ...] | None) -> None:
        """A step that all ranks have handed over in time survives them, hashed or not."""
        core = self._world.coordinator.core
        assert core is not None
        job = core.jobs[self._world.job].job
        before = Job(name=job.name, lineage=dict(job.lineage))
        before.lineage.pop(job.head, None)
        before.head = max(before.lineage, default=0)
        known = {node.node_id for node in core.ctx.nodes.connected()}
        for key, ranks in self._handed_over.items():
            if (source is not None and key <= source) or not before.counts_on_line(key) or self._was_tried(key):
                continue
            if len(ranks) == self._world_sizes[key] and all(
                one.node.node_id in known and one.at + _KNOWN_S <= self._world.clock.now and one.is_there(key, rank)
                for rank, one in ranks.items()
            ):
                self.fail(f"the job goes on from {source}, though all ranks have handed over {key}")

    def _was_tried(self, key: tuple[int, int]) -> bool:
        """Whether the coordinator knows of failed rebuilds of it (sources that went away while it was decoded)."""
        core = self._world.coordinator.core
        parts = core.jobs.get(self._world.job) if core is not None else None
        return parts is not None and key in parts.recovery._excluded

    def on_send(self, send: ToNode | ToAgent) -> None:
        body = send.message.WhichOneof("body")
        if isinstance(send, ToAgent):
            return
        message = send.message
        if body == "epoch_formed":
            formed = message.epoch_formed
            if formed.epoch < self.newest_epoch:
                self.fail(f"epoch {formed.epoch} is said to be complete after epoch {self.newest_epoch}")
            self._check_attached(formed)
            known = self._formed.setdefault(formed.epoch, formed)
            if list(known.nodes) != list(formed.nodes):
                self.fail(f"epoch {formed.epoch} was complete with other nodes before")
        elif body == "abandon":
            self._world.probe("abandon")
        elif body == "rebuild":
            self._world.probe("rebuild_ordered")

    def _check_attached(self, formed: control.EpochFormed) -> None:
        """Each rank of an epoch really was started for this epoch, where the coordinator says."""
        training = self._world.trainings.get(f"e{formed.epoch}")
        if self._world.plan.foreign:
            return
        for rank, node_id in enumerate(formed.nodes):
            one = training.workers.get(rank) if training is not None else None
            if one is None or one.node_id != node_id:
                self.fail(f"epoch {formed.epoch} is complete with rank {rank} on {node_id}, which never ran there")

    def on_forget(self) -> None:
        self._world.probe("forgotten")
        self.relied, self.committed, self.ever_committed = {}, None, False

    # ------------------------------------------------------------ what launchers and workers see

    def on_agent_formed(self, agent: str, formed: control.AgentFormed) -> None:
        if self._agents.setdefault((formed.epoch, formed.group_rank), agent) != agent:
            self.fail(f"two launchers have group rank {formed.group_rank} of epoch {formed.epoch}")
        if formed.epoch > self.newest_epoch:
            self.fail(f"a launcher heard of epoch {formed.epoch} before it was remembered")

    def on_decision(self, uid: str, rank: int, decision: worker.RestoreDecision) -> None:
        text = f"{decision.source_epoch}.{decision.source_step} {decision.reason}"
        self._world.clock.tell(f"{uid} rank {rank} is told: kind {decision.kind} from {text}")
        if decision.kind in (worker.RestoreDecision.KIND_UNDECIDED, worker.RestoreDecision.KIND_REFUSED):
            return
        this = (decision.kind, decision.source_epoch, decision.source_step)
        if self._decided.setdefault(uid, this) != this:
            self.fail(f"rank {rank} of {uid} is to go on from {this}, others from {self._decided[uid]}")

    def on_restored(self, plan: control.RestorePlan, contents: dict[int, str]) -> None:
        """The bytes that a rank gets are of exactly the planned step, rank by rank, of one launch."""
        key = (plan.source_epoch, plan.source_step)
        if set(contents) != set(range(plan.source_world_size)):
            self.fail(f"the plan for {key} has ranks {sorted(contents)} of {plan.source_world_size}")
        expected = self._sealed.get(key, {})
        for rank, content in contents.items():
            if expected.get(rank) != content:
                self.fail(f"wrong bytes: rank {rank} of {key} is {content!r}, sealed was {expected.get(rank)!r}")
        if len({content.split(".")[0] for content in contents.values()}) != 1:
            self.fail(f"bytes of different launches in {key}: {contents}")
