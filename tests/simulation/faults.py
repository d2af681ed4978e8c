"""Faults: each seed draws a few kinds (a swarm) and at least five occasions; in the end all is healed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snapshotd.daemon import events
from tests.simulation.launchers import SimAgent

if TYPE_CHECKING:
    from tests.simulation.node import SimNode
    from tests.simulation.world import World

FIRST_AT_S = 4.0
FAULTS_MIN = 5
FAULTS_MAX = 9


class Faults:
    """What goes wrong in one world."""

    def __init__(self, world: World) -> None:
        self.done: list[str] = []
        self._world = world
        self._dice = world.dice.stream("faults")
        self._kinds: dict[str, Callable[[], bool]] = {
            "stream_break": self._stream_break,
            "agent_break": self._agent_break,
            "coordinator_crash": self._coordinator_crash,
            "crash_mid_output": self._crash_mid_output,
            "daemon_crash": self._daemon_crash,
            "node_loss": self._node_loss,
            "worker_crash": self._worker_crash,
            "partition": self._partition,
            "slow_node": self._slow_node,
            "bit_rot": self._bit_rot,
            "parity_rot": self._parity_rot,
            "new_node": self._new_node,
            "tool": self._tool,
        }

    def schedule(self, until: float) -> None:
        kinds = self._dice.sample(sorted(self._kinds), self._dice.randint(4, 9))
        weights = [4 if kind in ("node_loss", "worker_crash", "daemon_crash") else 2 for kind in kinds]
        for _ in range(self._dice.randint(FAULTS_MIN, FAULTS_MAX)):
            kind = self._dice.choices(kinds, weights)[0]
            self._world.clock.after(self._dice.uniform(FIRST_AT_S, until - 2.0), self._strike, kind)

    def _strike(self, kind: str) -> None:
        """A fault that finds no victim waits for one, as long as there is time."""
        if self._kinds[kind]():
            self.done.append(kind)
            self._world.probe(f"fault_{kind}")
        else:
            self._world.clock.after(0.7, self._strike, kind)

    def top_up(self) -> bool:
        """Whether there were faults enough; else one more strikes now."""
        if len(self.done) >= FAULTS_MIN:
            return True
        self._strike(self._dice.choice(["stream_break", "daemon_crash", "coordinator_crash"]))
        return False

    def heal(self) -> None:
        world = self._world
        world.clock.tell("heal")
        self._kinds = {kind: lambda: True for kind in self._kinds}
        world.coordinator.crash_mid_output = False
        world.plan.wild = False
        # Eight ranks that tear one copy in twenty each fail so often in a row that their slack outlasts any patience.
        world.plan.torn_chance = 0.0
        world.coordinator.start()
        for node in list(world.nodes.values()):
            node.partitioned, node.slow = False, 1.0
            node.slow_hash_chance = 0.0  # ten ranks that hash so slowly are hardly ever aligned, either
            node.start()
        alive = [node for node in world.nodes.values() if not node.lost]
        for _ in range(max(0, world.plan.min_nodes - len(alive))):
            world.add_node()

    # ------------------------------------------------------------ kinds

    def _up(self) -> list[SimNode]:
        return [node for node in self._world.nodes.values() if not node.lost and node.core is not None]

    def _stream_break(self) -> bool:
        nodes = [node for node in self._up() if node.link is not None]
        if not nodes:
            return False
        node = self._dice.choice(nodes)
        self._world.clock.tell(f"fault: the stream of {node.node_id} breaks")
        node.cut(notice=self._dice.choice([None, 0.0, 1.5]))
        return True

    def _agents(self) -> list[SimAgent]:
        return [agent for agent in self._world.agents if agent.alive and not agent.closed]

    def _agent_break(self) -> bool:
        agents = self._agents()
        if not agents:
            return False
        agent = self._dice.choice(agents)
        self._world.clock.tell(f"fault: the stream of {agent.agent} breaks")
        agent.cut()
        return True

    def _coordinator_crash(self) -> bool:
        coordinator = self._world.coordinator
        if not coordinator.up:
            return False
        coordinator.crash(lose_unsynced=self._dice.random() < 0.3)
        self._world.clock.after(self._dice.choice([0.3, 1.0, 4.0, 8.0]), coordinator.start)
        return True

    def _crash_mid_output(self) -> bool:
        self._world.coordinator.crash_mid_output = True
        return self._world.coordinator.up

    def _daemon_crash(self) -> bool:
        nodes = self._up()
        if not nodes:
            return False
        node = self._dice.choice(nodes)
        node.crash()
        self._world.clock.after(self._dice.choice([0.3, 1.0, 2.0, 6.0]), node.start)
        return True

    def _node_loss(self) -> bool:
        nodes = self._up()
        if not nodes:
            return False
        node = self._dice.choice(nodes)
        self._world.checks.node_lost(node)
        node.lose()
        for agent in self._agents():
            if agent.node is node:
                agent.kill()
        if self._world.foreign is not None:
            for one in self._world.foreign.workers:
                if one._node is node:
                    one.kill()
            self._world.foreign.failed()
        if self._world.plan.spares or len(self._up()) < self._world.plan.min_nodes or self._dice.random() < 0.3:
            self._world.clock.after(self._dice.uniform(0.1, 6.0), self._new_node)
        return True

    def _worker_crash(self) -> bool:
        if self._world.foreign is not None:
            workers = [one for one in self._world.foreign.workers if one.alive]
        else:
            workers = [one for agent in self._agents() for one in agent.workers if one.alive]
        if not workers:
            return False
        one = self._dice.choice(workers)
        self._world.clock.tell(f"fault: worker {one.rank} dies")
        one.kill()
        self._world.worker_failed(one)
        return True

    def _partition(self) -> bool:
        nodes = [node for node in self._up() if not node.partitioned]
        if not nodes:
            return False
        node = self._dice.choice(nodes)
        self._world.clock.tell(f"fault: {node.node_id} is cut off")
        node.partitioned = True
        node.cut(notice=self._dice.choice([0.1, 1.0]))
        for agent in self._agents():
            if agent.node is node:
                agent.cut()
        self._world.clock.after(self._dice.choice([0.5, 2.0, 5.0, 9.0]), self._join_again, node)
        return True

    def _join_again(self, node: SimNode) -> None:
        node.partitioned = False

    def _slow_node(self) -> bool:
        nodes = self._up()
        if not nodes:
            return False
        node = self._dice.choice(nodes)
        self._world.clock.tell(f"fault: {node.node_id} is slow")
        node.slow = self._dice.choice([5.0, 20.0])
        self._world.clock.after(self._dice.uniform(3.0, 10.0), self._fast_again, node)
        return True

    def _fast_again(self, node: SimNode) -> None:
        node.slow = 1.0

    def _bit_rot(self) -> bool:
        """A bit flips in a sealed slot; reads and the scrub find it."""
        found = [(node, i, s) for node in self._up() for i, s in sorted(node.arena.items()) if s.good()]
        if not found:
            return False
        node, slot_id, slot = self._dice.choice(found)
        ref = slot.record
        assert ref is not None
        self._world.clock.tell(f"fault: slot {slot_id} of {node.node_id} rots (step {ref.step} of epoch {ref.epoch})")
        slot.rotten = True
        self._world.checks.part_lost()
        report = events.CorruptionFound(slot=events.SlotId(slot_id), ref=ref, parity=None, detail="scrub")
        self._world.clock.after(self._dice.uniform(0.1, 5.0), self._report, node, node.incarnation, report)
        return True

    def _parity_rot(self) -> bool:
        found = [(node, key) for node in self._up() for key, one in sorted(node.parities.items()) if not one.rotten]
        if not found:
            return False
        node, key = self._dice.choice(found)
        parity = node.parities[key]
        self._world.clock.tell(f"fault: parity {key} of {node.node_id} rots")
        parity.rotten = True
        self._world.checks.part_lost()
        report = events.CorruptionFound(slot=None, ref=None, parity=parity.ref, detail="scrub")
        self._world.clock.after(self._dice.uniform(0.1, 5.0), self._report, node, node.incarnation, report)
        return True

    def _report(self, node: SimNode, incarnation: int, report: events.CorruptionFound) -> None:
        if node.incarnation == incarnation and node.core is not None:
            node.handle(report)

    def _new_node(self) -> bool:
        if len(self._up()) >= self._world.plan.max_nodes + 2:
            return False
        self._world.clock.tell("a node joins")
        self._world.add_node()
        return True

    def _tool(self) -> bool:
        if not self._world.coordinator.up:
            return False
        self._world.coordinator.want(f"tool{len(self.done)}", self._dice.choice([None, None, 3]))
        return True
