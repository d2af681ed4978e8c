"""
Many daemons that are played by one process, eight ranks on each, for a coordinator that is real.

They say what daemons say, in as many messages over as many connections, and do nothing of what they are told. An order
to protect stands for them, as it does for daemons: of later steps they say that they are protected when they say that
they are sealed, or a little later.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from snapshotd.rpc import open_aio_channel
from snapshotd.stripesets import set_digest
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc

from .replay import KINDS

__all__ = ["Fleet"]

JOB = "fleet"
_SLOT_BYTES = 16 << 20
_HEARTBEAT_S = 1.0


class _Node:
    """One daemon as the coordinator sees it."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        self.node_id = f"n{index:03}"
        self.epoch = 0
        self._fleet = fleet
        self._ranks = range(index * fleet.ranks_per_node, (index + 1) * fleet.ranks_per_node)
        self._seq = 0
        self._outbox: asyncio.Queue[control.NodeMessage] = asyncio.Queue()
        self._slots: dict[int, list[control.SlotRef]] = {}
        self._parities: dict[int, list[tuple[control.StripeSet, int]]] = {}
        self._freed = control.InventoryChange()
        self._order: control.Protect | None = None
        self.heard: dict[str, control.CoordinatorMessage] = {}

    async def serve(self, address: str) -> None:
        # A subchannel of its own: as many connections as there would be daemons.
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with open_aio_channel(address, tls=None, insecure=False, options=options) as channel:
            call = control_grpc.CoordinatorServiceStub(channel).NodeSession(wait_for_ready=True)
            await call.wait_for_connection()
            self.tell(hello=control.NodeHello(node_id=self.node_id, nonce=secrets.token_hex(4), bulk_address="h:1"))
            for lane, rank in enumerate(self._ranks):
                attached = control.WorkerAttached(job=JOB, formation="f", rank=rank, world_size=self._fleet.world_size)
                attached.local_rank, attached.nonce = lane, f"w{rank}"
                self.tell(worker_attached=attached)
            writer = asyncio.create_task(self._write(call))
            try:
                async for message in call:
                    self._hear(message)
            finally:
                writer.cancel()

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            while True:
                await call.write(await self._outbox.get())

    def tell(self, **body: object) -> None:
        self._seq += 1
        message = control.NodeMessage(seq=self._seq, **body)
        if self._freed.ByteSize():
            message.freed.CopyFrom(self._freed)
            self._freed.Clear()
        self._outbox.put_nowait(message)

    def seal(self, step: int, *, apart: bool) -> None:
        shards = [control.NodeSealed.Shard(slot=slot_of(self._fleet, self.epoch, step, rank)) for rank in self._ranks]
        self._slots[step] = [shard.slot for shard in shards]
        sealed = control.NodeSealed(job=JOB, epoch=self.epoch, step=step, shards=shards)
        if self._order is None:
            self.tell(sealed=sealed)
            return
        digests = self._fleet.set_digests(self._order, step)
        lanes = self._parities_of(self._order, step)
        built = control.ParityBuilt(job=JOB, epoch=self.epoch, step=step, lanes=lanes, unasked=True)
        built.sets.extend(digests[lane] for lane in lanes)
        if apart:
            sealed.protecting = True
            self.tell(sealed=sealed)
            self.tell(parity_built=built)
        else:
            sealed.built.CopyFrom(built)
            self.tell(sealed=sealed)

    def beat(self) -> None:
        counters = {f"counter_{index}": index for index in range(20)}
        self.tell(heartbeat=control.Heartbeat(counters=counters, arena_bytes=1, budget_bytes=2, resident_bytes=3))

    def _hear(self, message: control.CoordinatorMessage) -> None:
        body = message.WhichOneof("body") or ""
        self.heard[body] = message
        if body == "epoch_formed":
            self.epoch = message.epoch_formed.epoch
            self._fleet.formed.add(self.node_id)
        elif body == "protect":
            self._build(message.protect)
        elif body == "committed":
            self._free(message.committed.step)
            self._fleet.committed(message.committed.step)

    def _build(self, order: control.Protect) -> None:
        self._order = order
        lanes = self._parities_of(order, order.step)
        self.tell(parity_built=control.ParityBuilt(job=JOB, epoch=order.epoch, step=order.step, lanes=lanes))

    def _parities_of(self, order: control.Protect, step: int) -> list[int]:
        """The lanes of which it has parity of a step."""
        parities = self._parities[step] = [
            (one, position)
            for one in order.sets
            for position, member in enumerate(one.members)
            if member.node_id == self.node_id
        ]
        return [one.lane for one, _ in parities]

    def _free(self, before: int) -> None:
        for step in [step for step in self._slots if step < before]:
            for slot in self._slots.pop(step):
                self._freed.slots_removed.add(job=JOB, epoch=slot.epoch, step=step, rank=slot.rank)
            for one, position in self._parities.pop(step, ()):
                name = control.StripeSet(job=JOB, epoch=self.epoch, step=step, group=one.group, lane=one.lane)
                self._freed.parities_removed.add(set=name, position=position)


def slot_of(fleet: Fleet, epoch: int, step: int, rank: int) -> control.SlotRef:
    ref = control.SlotRef(job=JOB, epoch=epoch, step=step, rank=rank, lane=rank % fleet.ranks_per_node)
    ref.world_size, ref.file_bytes = fleet.world_size, _SLOT_BYTES
    ref.root_digest, ref.layout_hash = f"{step:016x}{rank:016x}", "1" * 32
    return ref


class Fleet:
    """
    The daemons. ``run`` captures a step every ``period_s`` and returns how long each took to be committed everywhere.
    ``apart``: it takes them so long to protect it that they say so in a message of its own.
    """

    def __init__(self, num_nodes: int, ranks_per_node: int) -> None:
        self.ranks_per_node = ranks_per_node
        self.world_size = num_nodes * ranks_per_node
        self.formed: set[str] = set()
        self._nodes = [_Node(self, index) for index in range(num_nodes)]
        self._told = 0
        self._step = 0
        self._digests: dict[tuple[int, int], list[int]] = {}
        self._whole = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, address: str, timeout_s: float) -> AsyncIterator[None]:
        """Connected, with a complete epoch and a first commit behind it."""
        tasks = [asyncio.create_task(node.serve(address)) for node in self._nodes]
        try:
            deadline = time.monotonic() + timeout_s
            while len(self.formed) < len(self._nodes) and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            await self.run(3, 0.0)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def record(self, folder: Path) -> None:
        """Write what each daemon was told last, of each kind, for `benchmarks.replay`."""
        for node in self._nodes:
            for kind in KINDS:
                (folder / f"{node.node_id}.{kind}").write_bytes(node.heard[kind].SerializeToString())

    def committed(self, step: int) -> None:
        self._told += step == self._step
        if self._told == len(self._nodes):
            self._whole.set()

    def set_digests(self, order: control.Protect, step: int) -> list[int]:
        """Of the sets of an order, for another step."""
        place = (order.sets[0].group, step)
        digests = self._digests.get(place)
        if digests is None:
            digests = self._digests[place] = []
            for one in order.sets:
                again = control.StripeSet()
                again.CopyFrom(one)
                again.step = step
                for member in again.members:
                    member.slot.CopyFrom(slot_of(self, one.epoch, step, member.slot.rank))
                digests.append(set_digest(again))
        return digests

    async def run(self, steps: int, period_s: float, *, apart: bool = False) -> list[float]:
        found: list[float] = []
        beaten_at = 0.0
        for _ in range(steps):
            began = time.monotonic()
            self._step, self._told, self._digests = self._step + 1, 0, {}
            self._whole.clear()
            for node in self._nodes:
                node.seal(self._step, apart=apart)
            if began - beaten_at >= _HEARTBEAT_S:
                beaten_at = began
                for node in self._nodes:
                    node.beat()
            await asyncio.wait_for(self._whole.wait(), 60.0)
            found.append(time.monotonic() - began)
            await asyncio.sleep(max(0.0, began + period_s - time.monotonic()))
        return found
