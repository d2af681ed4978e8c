"""Simulated workers: they restore, train in lockstep, and capture what the node grants them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.v1 import worker_pb2 as worker

if TYPE_CHECKING:
    from tests.simulation.node import SimNode
    from tests.simulation.world import World


@lru_cache(maxsize=1024)
def layout_of(rank: int, world_size: int) -> Layout:
    """
    Unequal shards: the layout depends on the rank and the world. In every other world a shard has several units of a
    stripe, elsewhere one.
    """
    most = 4096 if world_size % 2 else 1 << 20
    count = most // 64 * (1 + rank % 16) + world_size
    place = Box((rank * 64 % (most // 2),), (min(count, most // 2),))
    box = TensorBox(name="w", dtype="float32", global_shape=(most,), box=place, scope="global", kind="param")
    return Layout.build([box], meta_capacity=64)


class Training:
    """The workers of one launch. A step begins when all of them have done the one before."""

    def __init__(self, world: World, uid: str, world_size: int) -> None:
        self.uid = uid
        self.world_size = world_size
        self.workers: dict[int, SimWorker] = {}
        self.step: int | None = None
        self.ended = False
        self._world = world
        self._dice = world.dice.stream("training")

    def restored(self) -> None:
        """A worker is ready: begin when all are, from the step that all of them restored."""
        ready = [one.restored_step for one in self.workers.values() if one.alive and one.restored_step is not None]
        if self.step is not None or len(ready) < self.world_size or self.ended:
            return
        if len(set(ready)) != 1:
            self._world.checks.fail(f"ranks of {self.uid} restored different steps: {ready}")
        self.step = ready[0] + 1
        self._world.clock.tell(f"training {self.uid} goes on at step {self.step}")
        self._world.clock.after(self._dice.uniform(0.1, 0.5), self._round)

    def _round(self) -> None:
        if self.ended or self.step is None:
            return
        if any(not one.alive for one in self.workers.values()):
            return
        for one in self.workers.values():
            self._world.clock.after(self._dice.uniform(0.0, 0.1), one.capture, self.step)
        self.step += 1
        self._world.clock.after(self._world.plan.step_s * self._dice.uniform(0.9, 1.1), self._round)


class SimWorker:
    """One worker process with its hook."""

    def __init__(
        self,
        world: World,
        node: SimNode,
        training: Training,
        *,
        rank: int,
        local_rank: int,
        local_world_size: int,
        epoch: int,
        formation: str,
    ) -> None:
        self.alive = True
        self.rank = rank
        self.restored_step: int | None = None
        self.refused = False
        self._world = world
        self._node = node
        self._training = training
        self._hello = worker.WorkerHello(
            protocol=1,
            job=world.job,
            rank=rank,
            world_size=training.world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            epoch=epoch,
            formation=formation,
            nonce=f"{training.uid}/{rank}",
            pid=rank + 1,
        )
        self._conn: int | None = None
        self._grant: worker.Grant | None = None
        self._source: tuple[int, int] | None = None
        self._dice = world.dice.stream("workers")
        training.workers[rank] = self
        self._connect()

    @property
    def node_id(self) -> str:
        return self._node.node_id

    # ------------------------------------------------------------ connection

    def _connect(self) -> None:
        if not self.alive or self._conn is not None:
            return
        self._conn = self._node.open(self)
        if self._conn is None:
            self._world.clock.after(self._dice.uniform(0.2, 0.5), self._connect)
        else:
            self._say(worker.Frame(request_id=1, hello=self._hello))

    def disconnected(self) -> None:
        self._conn = self._grant = None
        if self.alive:
            self._world.clock.after(self._dice.uniform(0.2, 0.5), self._connect)

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        conn, self._conn = self._conn, None
        if conn is not None:
            self._world.clock.after(self._dice.uniform(0.0, 0.1), self._node.gone, conn)

    def _say(self, frame: worker.Frame) -> None:
        if self._conn is not None:
            self._world.clock.after(0.001, self._node.said, self._conn, frame)

    # ------------------------------------------------------------ frames

    def heard(self, conn: int, frame: worker.Frame) -> None:
        if not self.alive or conn != self._conn:
            return
        body = frame.WhichOneof("body")
        if body == "welcome":
            self._after_welcome()
        elif body == "restore_decision":
            self._on_decision(frame.restore_decision)
        elif body == "restore_ready":
            self._on_ready(frame.restore_ready)
        elif body == "grant":
            self._grant = frame.grant
        elif body == "error" and frame.error.fatal:
            self._world.probe(f"worker_error_{frame.error.code}")
            self.alive = False
            self._world.worker_failed(self)

    def _after_welcome(self) -> None:
        if self.restored_step is None:
            self._say(worker.Frame(request_id=2, restore_query=worker.RestoreQuery()))
            return
        header = layout_of(self.rank, self._hello.world_size).header
        self._say(worker.Frame(request_id=3, register_layout=worker.RegisterLayout(header=header)))

    def _ask_again(self) -> None:
        if self.alive and self._conn is not None and self.restored_step is None:
            self._say(worker.Frame(request_id=2, restore_query=worker.RestoreQuery()))

    def _on_decision(self, decision: worker.RestoreDecision) -> None:
        self._world.checks.on_decision(self._training.uid, self.rank, decision)
        if decision.kind == worker.RestoreDecision.KIND_UNDECIDED:
            self._world.clock.after(0.2, self._ask_again)
        elif decision.kind == worker.RestoreDecision.KIND_FRESH:
            self._restored(-1)
        elif decision.kind == worker.RestoreDecision.KIND_REFUSED:
            self.refused = True
            self.alive = False
            if self._conn is not None:
                self._world.clock.after(0.05, self._node.gone, self._conn)
            self._world.worker_failed(self)
        else:
            self._source = (decision.source_epoch, decision.source_step)
            self._say(worker.Frame(request_id=4, restore_want=worker.RestoreWant()))

    def _on_ready(self, ready: worker.RestoreReady) -> None:
        if self._source is None:
            return
        done = worker.RestoreDone(ok=not ready.error, error=ready.error, step=self._source[1])
        self._say(worker.Frame(restore_done=done))
        if ready.error:
            self._world.probe("restore_retried")
            self._source = None
            self._world.clock.after(0.5, self._ask_again)
        else:
            self._restored(self._source[1])

    def _restored(self, step: int) -> None:
        if self.restored_step is None:
            self.restored_step = step
            self._after_welcome()
            self._training.restored()

    # ------------------------------------------------------------ training

    def capture(self, step: int) -> None:
        if not self.alive:
            return
        grant = self._grant
        if grant is None or step < grant.min_step or self._dice.random() < self._world.plan.torn_chance:
            reason = worker.Skip.REASON_NO_SLOT
            if grant is not None:
                reason = worker.Skip.REASON_ALIGNING if step < grant.min_step else worker.Skip.REASON_TORN
            self._say(worker.Frame(skip=worker.Skip(step=step, reason=reason)))
            return
        self._grant = None
        slot = self._node.arena.get(grant.slot_id)
        if slot is None:
            return
        if slot.record is not None:
            self._world.checks.fail(f"slot {grant.slot_id} of {self._node.node_id} is granted while its record stands")
        slot.content = "half written"
        self._world.clock.after(self._dice.uniform(0.02, 0.15), self._filled, grant, step)

    def _filled(self, grant: worker.Grant, step: int) -> None:
        slot = self._node.arena.get(grant.slot_id)
        if not self.alive or slot is None or self._conn is None:
            return
        if slot.record is not None:
            return
        slot.content = f"{self._training.uid}.{step}.{self.rank}"
        self._say(worker.Frame(seal=worker.Seal(slot_id=grant.slot_id, step=step, layout_hash=grant.layout_hash)))
