"""Launchers: torchrun agents with our rendezvous, and one foreign launcher that knows nothing of us."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotd.v1 import control_pb2 as control
from tests.simulation.network import Link
from tests.simulation.worker import SimWorker, Training

if TYPE_CHECKING:
    from tests.simulation.node import SimNode
    from tests.simulation.world import World


class SimAgent:
    """A launcher on one node, with our rendezvous."""

    def __init__(self, world: World, node: SimNode) -> None:
        self.node = node
        self.agent = f"agent-{node.node_id}-{world.count_agent()}"
        self.alive = True
        self.closed = False
        self.workers: list[SimWorker] = []
        self.formed: control.AgentFormed | None = None
        self._round = 0
        self._joining = False
        self._world = world
        self._dice = world.dice.stream(f"agent/{node.node_id}")
        self._link: Link | None = None
        self._join_next()

    # ------------------------------------------------------------ connection

    def _connect(self) -> None:
        if not self.alive or self._link is not None or self.closed:
            return
        coordinator = self._world.coordinator
        if not coordinator.up or self.node.partitioned:
            self._world.clock.after(self._dice.uniform(0.2, 0.6), self._connect)
            return
        sid = self._world.new_session(self.agent)
        self._link = Link(
            self._world,
            sid,
            up=coordinator.agent_said,
            down=self._heard,
            ended_up=coordinator.agent_ended,
            ended_down=self._ended,
            latency=0.005,
            ordered=True,
        )
        coordinator.links[sid] = self._link
        if self._joining:
            self._say_join()
        elif self.formed is not None:
            self._world.probe("resume")
            resume = control.AgentResume(
                job=self._world.job,
                agent=self.agent,
                epoch=self.formed.epoch,
                node_id=self.node.node_id,
                group_rank=self.formed.group_rank,
                group_world_size=self.formed.group_world_size,
            )
            self._link.send("up", control.AgentMessage(resume=resume))

    def cut(self) -> None:
        if self._link is not None:
            self._link.cut()

    def _ended(self, link: Link) -> None:
        if link is self._link:
            self._link = None
            self._world.clock.after(self._dice.uniform(0.1, 0.4), self._connect)

    def kill(self) -> None:
        self.alive = False
        self._stop_workers()
        if self._link is not None:
            self._link.cut()
            self._link = None

    # ------------------------------------------------------------ rendezvous

    def _join_next(self) -> None:
        if not self.alive or self.closed:
            return
        self._round += 1
        self._joining, self.formed = True, None
        if self._link is None:
            self._connect()
        else:
            self._say_join()

    def _say_join(self) -> None:
        plan = self._world.plan
        join = control.AgentJoin(
            job=self._world.job,
            agent=self.agent,
            node_id=self.node.node_id,
            min_nodes=plan.min_nodes,
            max_nodes=plan.max_nodes,
            host=f"host-{self.node.node_id}",
            last_call_s=2.0,
            join_timeout_s=600.0,
            round=self._round,
        )
        assert self._link is not None
        self._link.send("up", control.AgentMessage(join=join))

    def _heard(self, link: Link, data: bytes) -> None:
        if link is not self._link or not self.alive:
            return
        update = control.AgentUpdate.FromString(data)
        body = update.WhichOneof("body")
        if body == "formed" and self._joining and update.formed.round == self._round:
            self._joining, self.formed = False, update.formed
            self._world.checks.on_agent_formed(self.agent, update.formed)
            self._world.clock.after(self._dice.uniform(0.3, 1.0), self._start_workers, update.formed)
        elif body == "restart" and not self._joining and self.formed is not None:
            if update.restart.epoch >= self.formed.epoch:
                self._again()
        elif body == "closed" and not self.closed:
            self.closed = True
            self._stop_workers()
            self._world.agent_closed(self, update.closed)
            self.cut()

    def _again(self) -> None:
        """Stop the workers and join again."""
        self._stop_workers()
        self._joining, self.formed = True, None
        self._world.clock.after(self._dice.uniform(0.1, 0.4), self._join_next)

    def _start_workers(self, formed: control.AgentFormed) -> None:
        if not self.alive or self.formed is not formed:
            return
        each = self._world.plan.workers_per_node
        training = self._world.training(f"e{formed.epoch}", formed.group_world_size * each)
        for local_rank in range(each):
            one = SimWorker(
                self._world,
                self.node,
                training,
                rank=formed.group_rank * each + local_rank,
                local_rank=local_rank,
                local_world_size=each,
                epoch=formed.epoch,
                formation="",
            )
            self.workers.append(one)

    def _stop_workers(self) -> None:
        for one in self.workers:
            one.kill()
        self.workers = []

    def worker_failed(self, one: SimWorker) -> None:
        """The launcher sees a dead worker after a moment, stops the others, joins again."""
        if one in self.workers:
            self._world.clock.after(self._dice.uniform(0.05, 0.3), self._react, one)

    def _react(self, one: SimWorker) -> None:
        if self.alive and one in self.workers and not self._joining:
            self._again()


class ForeignLauncher:
    """Another rendezvous: it starts all workers at once, with a formation and no epoch."""

    def __init__(self, world: World) -> None:
        self.count = 0
        self.workers: list[SimWorker] = []
        self.stopped = False
        self._world = world
        self._dice = world.dice.stream("foreign")
        self._pending = False
        self.failed()

    def failed(self) -> None:
        """Something died: after a while everything is started again on the nodes that are left."""
        if not self._pending and not self.stopped:
            self._pending = True
            self._world.clock.after(self._dice.uniform(0.5, 2.0), self._launch)

    def _launch(self) -> None:
        self._pending = False
        for one in self.workers:
            one.kill()
        self.workers = []
        plan = self._world.plan
        nodes = [node for node in self._world.nodes.values() if not node.lost][: plan.max_nodes]
        if len(nodes) < plan.min_nodes or self.stopped:
            if not self.stopped:
                self.failed()
            return
        self.count += 1
        each = plan.workers_per_node
        training = self._world.training(f"f{self.count}", len(nodes) * each)
        # Some launchers repeat their formation; then only the nonces tell the rounds apart.
        formation = "host:29500:0" if plan.same_formation else f"host:29500:{self.count}"
        for index, node in enumerate(nodes):
            for local_rank in range(each):
                self._world.clock.after(
                    self._dice.uniform(0.1, 0.8),
                    self._start,
                    node,
                    training,
                    index * each + local_rank,
                    local_rank,
                    formation,
                    self.count,
                )

    def _start(self, node: SimNode, training: Training, rank: int, local_rank: int, formation: str, count: int) -> None:
        if count != self.count or self.stopped:
            return
        if node.lost:
            self.failed()
            return
        one = SimWorker(
            self._world,
            node,
            training,
            rank=rank,
            local_rank=local_rank,
            local_world_size=self._world.plan.workers_per_node,
            epoch=0,
            formation=formation,
        )
        self.workers.append(one)

    def worker_failed(self, one: SimWorker) -> None:
        if one in self.workers:
            self.failed()
