"""One simulated cluster: built from a seed, disturbed by faults, healed, and then expected to go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from snapshotd.coordinator.core import CoordinatorCore
from snapshotd.coordinator.events import CoreSettings
from snapshotd.daemon.core import NodeCore
from snapshotd.v1 import control_pb2 as control
from tests.simulation.arena import Durable
from tests.simulation.checks import Checks
from tests.simulation.coordinator import SimCoordinator
from tests.simulation.dice import Clock, Dice
from tests.simulation.faults import Faults
from tests.simulation.launchers import ForeignLauncher, SimAgent
from tests.simulation.node import SimNode
from tests.simulation.worker import SimWorker, Training

HEAL_AT_S = 40.0
LIVE_WITHIN_S = 120.0
COMMITS_AFTER_HEAL = 2


@dataclass
class Plan:
    """What a seed makes of the world."""

    seed: int
    nodes: int
    spares: int
    min_nodes: int
    max_nodes: int
    workers_per_node: int
    generations: int
    persist_every_steps: int
    step_s: float
    torn_chance: float
    wild: bool
    foreign: bool
    same_formation: bool
    core_settings: CoreSettings = field(default_factory=CoreSettings)


def make_plan(seed: int) -> Plan:
    dice = Dice(seed).stream("plan")
    nodes = dice.choice([1, 2, 3, 3, 4, 4, 5])
    parity = dice.choice([0, 1, 1, 1, 2])
    core = CoreSettings(
        parity=parity,
        group_size=dice.choice([2, 3, 16, 16]),
        node_lease_s=dice.choice([2.0, 3.0]),
        agent_lease_s=dice.choice([1.0, 2.0]),
        last_call_s=2.0,
        protect_timeout_s=5.0,
        restore_wait_s=6.0,
        startup_grace_s=3.0,
    )
    return Plan(
        seed=seed,
        nodes=nodes,
        spares=dice.choice([0, 0, 1, 1]),
        min_nodes=max(1, nodes - dice.choice([0, 1, 1, 2])),
        max_nodes=nodes + dice.choice([0, 0, 1]),
        workers_per_node=dice.choice([1, 1, 2]),
        generations=dice.choice([2, 2, 3]),
        persist_every_steps=dice.choice([0, 0, 4]),
        step_s=dice.choice([0.5, 1.0, 2.0]),
        torn_chance=dice.choice([0.0, 0.0, 0.05]),
        wild=dice.random() < 0.3,
        foreign=dice.random() < 0.25,
        same_formation=dice.random() < 0.3,
        core_settings=core,
    )


class World:
    """All parts together. `run` ends well, or raises InvariantBroken."""

    def __init__(
        self,
        seed: int,
        *,
        core_class: type[CoordinatorCore] = CoordinatorCore,
        node_class: type[NodeCore] = NodeCore,
        log: bool = False,
    ) -> None:
        self.plan = make_plan(seed)
        self.core_class, self.node_class = core_class, node_class
        self.job = "job"
        self.dice = Dice(seed)
        self.clock = Clock()
        if log:
            self.clock.log = []
        self.probes: Counter[str] = Counter()
        self.checks = Checks(self)
        self.coordinator = SimCoordinator(self)
        self.nodes: dict[str, SimNode] = {}
        self.agents: list[SimAgent] = []
        self.foreign: ForeignLauncher | None = None
        self.durables: dict[tuple[int, int], Durable] = {}
        self.trainings: dict[str, Training] = {}
        self.refused = False
        self._sessions = 0
        self._agents = 0
        self.faults = Faults(self)

    # ------------------------------------------------------------ services

    def probe(self, name: str) -> None:
        self.probes[name] += 1

    def new_session(self, who: str) -> str:
        self._sessions += 1
        return f"{who}~{self._sessions}"

    def count_agent(self) -> int:
        self._agents += 1
        return self._agents

    def training(self, uid: str, world_size: int) -> Training:
        if uid not in self.trainings:
            for older in self.trainings.values():
                older.ended = True
            self.trainings[uid] = Training(self, uid, world_size)
        return self.trainings[uid]

    def reachable(self, node_id: str) -> SimNode | None:
        node = self.nodes.get(node_id)
        return node if node is not None and not node.lost else None

    def worker_failed(self, one: SimWorker) -> None:
        if one.refused and self.foreign is not None:
            self._give_up_state()
        for agent in self.agents:
            agent.worker_failed(one)
        if self.foreign is not None:
            self.foreign.worker_failed(one)

    def agent_closed(self, agent: SimAgent, closed: control.AgentClosed) -> None:
        self.clock.tell(f"{agent.agent} closed: {closed.reason} ({closed.exit_code})")
        if closed.exit_code == 6:
            self._give_up_state()
        self.clock.after(4.0, self._relaunch, agent.node)

    def _give_up_state(self) -> None:
        """The state is lost, and a person decides to begin anew."""
        if not self.refused:
            self.refused = True
            self.clock.after(2.0, self._forget)

    def _forget(self) -> None:
        if not self.coordinator.up:
            self.clock.after(1.0, self._forget)
            return
        self.refused = False
        self.coordinator.forget()

    def _relaunch(self, node: SimNode) -> None:
        if not node.lost and not any(a.alive and not a.closed and a.node is node for a in self.agents):
            self.agents.append(SimAgent(self, node))

    def add_node(self) -> SimNode:
        node = SimNode(self, f"n{len(self.nodes)}")
        self.nodes[node.node_id] = node
        node.start()
        if not self.plan.foreign:
            self.agents.append(SimAgent(self, node))
        return node

    # ------------------------------------------------------------ the run

    def run(self) -> World:
        self.coordinator.start()
        for _ in range(self.plan.nodes):
            self.add_node()
        if self.plan.foreign:
            self.foreign = ForeignLauncher(self)
        self.faults.schedule(HEAL_AT_S)
        self._run_until(HEAL_AT_S)
        while not self.faults.top_up():
            self._run_until(self.clock.now + 1.0)
        self.faults.heal()
        healed_at, commits = self.clock.now, self.checks.commits
        while self.checks.commits < commits + COMMITS_AFTER_HEAL:
            if self.clock.now > healed_at + LIVE_WITHIN_S or not self.clock.step():
                self.checks.fail(f"no progress within {LIVE_WITHIN_S:.0f} s after everything was healed")
        self._run_until(self.clock.now + 1.0)
        return self

    def _run_until(self, end: float) -> None:
        self.clock.after(end - self.clock.now, lambda: None)
        while self.clock.now < end and self.clock.step():
            pass
