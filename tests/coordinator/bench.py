"""A coordinator core on the bench: what the tests of its parts share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from snapshotd.coordinator.core import CoordinatorCore
from snapshotd.coordinator.events import (
    AgentMessageArrived,
    CoreSettings,
    Delete,
    Event,
    NodeMessageArrived,
    Output,
    Put,
    SessionId,
    Ticked,
    ToAgent,
    ToNode,
)
from snapshotd.v1 import control_pb2 as control

JOB = "job"
SETTINGS = CoreSettings(parity=1, node_lease_s=2.0, agent_lease_s=1.0, last_call_s=5.0, protect_timeout_s=10.0)


class Bench:
    """A coordinator core on the bench: short words for what peers say, and what was said to them."""

    def __init__(self, settings: CoreSettings = SETTINGS, remembered: dict[tuple[str, str], str] | None = None) -> None:
        self.store: dict[tuple[str, str], str] = dict(remembered or {})
        self.core = CoordinatorCore(settings, [(job, key, text) for (job, key), text in self.store.items()])
        self.now = 0.0
        self.last = Output()
        self.notes: list[str] = []
        self._seq = 0

    def handle(self, event: Event) -> Output:
        self.last = self.core.handle(event, self.now)
        for effect in self.last.persist:
            if isinstance(effect, Put):
                self.store[(effect.job, effect.key)] = effect.value
            elif isinstance(effect, Delete):
                self.store = {key: text for key, text in self.store.items() if key[0] != effect.job}
        self.notes.extend(note.text for note in self.last.notes)
        return self.last

    def node(self, session: str, **body: Any) -> Output:
        self._seq += 1
        message = control.NodeMessage(seq=self._seq, **body)
        return self.handle(NodeMessageArrived(session=SessionId(session), message=message))

    def agent(self, session: str, **body: Any) -> Output:
        return self.handle(AgentMessageArrived(session=SessionId(session), message=control.AgentMessage(**body)))

    def tick(self, seconds: float) -> Output:
        self.now += seconds
        return self.handle(Ticked())

    def hello(self, node_id: str, **more: Any) -> Output:
        nonce, session = more.pop("nonce", f"{node_id}#1"), more.pop("session", node_id)
        hello = control.NodeHello(node_id=node_id, nonce=nonce, bulk_address=f"{node_id}:1", **more)
        return self.node(session, hello=hello)

    def join(self, agent: str, *, least: int = 2, most: int = 2, round_: int = 1) -> Output:
        join = control.AgentJoin(
            job=JOB,
            agent=agent,
            node_id=agent.replace("a", "n"),
            min_nodes=least,
            max_nodes=most,
            host=f"host-{agent}",
            last_call_s=5.0,
            join_timeout_s=60.0,
            round=round_,
        )
        return self.agent(agent, join=join)

    def attach(self, node_id: str, rank: int, *, epoch: int, world: int = 2, nonce: str = "") -> Output:
        attached = control.WorkerAttached(
            job=JOB, epoch=epoch, rank=rank, world_size=world, nonce=nonce or f"w{epoch}.{rank}"
        )
        return self.node(node_id, worker_attached=attached)

    def sealed(self, node_id: str, step: int, rank: int, *, epoch: int = 1, world: int = 2, **more: Any) -> Output:
        shard = control.NodeSealed.Shard(slot=slot_ref(step, rank, epoch=epoch, world=world), **more)
        return self.node(node_id, sealed=control.NodeSealed(job=JOB, epoch=epoch, step=step, shards=[shard]))

    def built(self, node_id: str) -> Output:
        """The node has built its part of the Protect that it was sent last."""
        order = self.protect
        lanes = [one.lane for one in order.sets if any(member.node_id == node_id for member in one.members)]
        return self.node(
            node_id, parity_built=control.ParityBuilt(job=JOB, epoch=order.epoch, step=order.step, lanes=lanes)
        )

    def commit(self, step: int, *, epoch: int = 1) -> None:
        """Take a step of the two nodes n0 and n1 all the way."""
        self.sealed("n0", step, 0, epoch=epoch)
        self.sealed("n1", step, 1, epoch=epoch)
        self.protect = self.to_node("n0", "protect")
        self.built("n0")
        self.built("n1")

    def to_node(self, session: str, body: str) -> Any:
        """The last message of this kind to a node in the last output."""
        return next(self._sent(session, body, ToNode), None)

    def to_agent(self, session: str, body: str) -> Any:
        return next(self._sent(session, body, ToAgent), None)

    def _sent(self, session: str, body: str, kind: type[ToNode] | type[ToAgent]) -> Iterator[Any]:
        for send in reversed(self.last.send):
            if isinstance(send, kind) and send.session == session and send.message.WhichOneof("body") == body:
                yield getattr(send.message, body)

    @property
    def job(self) -> dict[str, Any]:
        status = self.core.status(self.now)
        json.dumps(status)
        return next(job for job in status["jobs"] if job["job"] == JOB)  # type: ignore[attr-defined]


def slot_ref(step: int, rank: int, *, epoch: int = 1, world: int = 2) -> control.SlotRef:
    return control.SlotRef(
        job=JOB,
        epoch=epoch,
        step=step,
        rank=rank,
        world_size=world,
        file_bytes=1000 + rank,
        root_digest=f"{step}.{rank}",
    )


def running(settings: CoreSettings = SETTINGS) -> Bench:
    """Two nodes, two launchers, two ranks: epoch 1 is complete."""
    bench = Bench(settings)
    for node in ("n0", "n1"):
        bench.hello(node)
    bench.join("a0")
    bench.join("a1")
    bench.attach("n0", 0, epoch=1)
    bench.attach("n1", 1, epoch=1)
    return bench
