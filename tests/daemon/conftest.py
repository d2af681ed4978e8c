"""Nodes in one process: real arenas in shared memory, real bulk servers on loopback, real slots."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from snapshotd import failpoints
from snapshotd.arena import Arena, SlotFile, parity_key, slot_key
from snapshotd.daemon.protect import build_parity
from snapshotd.daemon.rebuild import Rebuilt, rebuild
from snapshotd.daemon.seal import seal_slot
from snapshotd.daemon.sources import Corruption, Sources
from snapshotd.erasure import Codec, load_codec
from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.transfer import BulkClient, BulkServer
from snapshotd.v1 import control_pb2 as control

JOB = "job"

Shards = Sequence[tuple[TensorBox, np.ndarray]]


class Node:
    """One daemon's worth of memory and sockets."""

    def __init__(self, root: Path, node_id: str) -> None:
        self.node_id = node_id
        self.corruptions: list[Corruption] = []
        self.arena = Arena(root / node_id, budget_bytes=1 << 30)
        self.server = BulkServer(("127.0.0.1", 0), self.arena.acquire, wait=self.arena.wait_sealed)
        self.client = BulkClient(timeout_s=5.0)
        self.sources = Sources(node_id, self.arena, self.client, self.corruptions.append)
        self.alive = True

    @property
    def address(self) -> control.PeerAddress:
        return control.PeerAddress(node_id=self.node_id, bulk=self.server.address_text)

    def slot_bytes(self, ref: control.SlotRef) -> bytes:
        obj = self.arena.find(slot_key(ref))
        assert obj is not None
        return bytes(obj.view)

    def kill(self) -> None:
        """As SIGKILL and the loss of its tmpfs."""
        if self.alive:
            self.alive = False
            self.server.close()
            self.client.close()
            root = self.arena.root
            self.arena.close()
            shutil.rmtree(root)


class Cluster:
    """The nodes n0, n1, ...; made by the fixture of this name."""

    def __init__(self, root: Path, codec: Codec) -> None:
        self.root = root
        self.codec = codec
        self.nodes: dict[str, Node] = {}

    def add(self, *node_ids: str) -> list[Node]:
        for node_id in node_ids:
            self.nodes[node_id] = Node(self.root, node_id)
        return [self.nodes[node_id] for node_id in node_ids]

    @property
    def peers(self) -> list[control.PeerAddress]:
        return [node.address for node in self.nodes.values()]

    def close(self) -> None:
        for node in self.nodes.values():
            node.kill()

    # ------------------------------------------------------------------------------------------ slots

    def seal(
        self,
        node: Node,
        shards: Shards,
        *,
        rank: int = 0,
        world_size: int = 1,
        lane: int = 0,
        epoch: int = 1,
        step: int = 7,
        meta: Mapping[str, object] | None = None,
        ties: Mapping[str, str] | None = None,
    ) -> control.SlotRef:
        """Do what a worker and its daemon do in a step."""
        layout = Layout.build([box for box, _ in shards], meta_capacity=200, ties=ties or {})
        slot = node.arena.create_slot(layout.header, layout.file_bytes, job=JOB)
        values = {shard.key: shard for shard in layout.shards}
        for box, value in shards:
            key = box.name if box.is_whole else box.name + "@" + ",".join(map(str, box.box.offsets))
            shard = values[key]
            assert value.shape == box.box.lengths
            slot.view[shard.begin : shard.end] = np.ascontiguousarray(value).tobytes()
        text = json.dumps({"rank": rank, **(meta or {})}).encode()
        slot.view[layout.meta[0] : layout.meta[1]] = text.ljust(200)
        ref = control.SlotRef(
            job=JOB,
            epoch=epoch,
            step=step,
            rank=rank,
            world_size=world_size,
            lane=lane,
            file_bytes=layout.file_bytes,
            layout_hash=layout.hash,
        )
        return seal_slot(node.arena, slot, ref).ref

    def seal_random(self, node: Node, elements: int, **kwargs: int) -> control.SlotRef:
        """A slot with one tensor of so many float32."""
        value = np.random.default_rng(elements + kwargs.get("rank", 0)).random(elements, np.float32)
        return self.seal(node, [(whole(f"w{kwargs.get('rank', 0)}", value), value)], **kwargs)

    # ------------------------------------------------------------------------------------------ parity

    def stripe_set(
        self, slots: Sequence[control.SlotRef | None], m: int, *, lane: int = 0, nodes: Sequence[str] | None = None
    ) -> control.StripeSet:
        names = nodes or [f"n{i}" for i in range(len(slots))]
        members = [
            control.StripeMember(node_id=name, slot=slot if slot is not None else control.SlotRef())
            for name, slot in zip(names, slots, strict=True)
        ]
        return control.StripeSet(job=JOB, epoch=1, step=7, group=0, lane=lane, m=m, members=members)

    def protect(self, *sets: control.StripeSet) -> list[control.ParityRef]:
        order = control.Protect(job=JOB, epoch=1, step=7, sets=sets, peers=self.peers)
        refs: list[control.ParityRef] = []
        for node in self.nodes.values():
            if node.alive:
                refs += build_parity(order, node.node_id, node.arena, node.sources, self.codec)
        return refs

    def rebuild_order(
        self,
        stripe_set: control.StripeSet,
        position: int,
        *,
        lost: Sequence[int] = (),
        slot: bool = True,
        parity: bool = False,
    ) -> control.Rebuild:
        nodes = [member.node_id for member in stripe_set.members]
        return control.Rebuild(
            set=stripe_set,
            position=position,
            slot=slot,
            parity=parity,
            slot_nodes=[
                "" if p in lost or not stripe_set.members[p].slot.file_bytes else n for p, n in enumerate(nodes)
            ],
            parity_nodes=["" if p in lost else n for p, n in enumerate(nodes)],
            peers=self.peers,
        )

    def rebuild(self, node: Node, order: control.Rebuild) -> Rebuilt:
        return rebuild(order, node.node_id, node.arena, node.sources, self.codec)

    def parity_bytes(self, ref: control.ParityRef) -> bytes:
        obj = self.nodes[ref.set.members[ref.position].node_id].arena.find(parity_key(ref))
        assert obj is not None
        return bytes(obj.view)


def whole(name: str, value: np.ndarray, *, kind: str = "param", scope: str = "global") -> TensorBox:
    return TensorBox(
        name=name, dtype=str(value.dtype), global_shape=value.shape, box=Box.whole(value.shape), scope=scope, kind=kind
    )


def flip(view: memoryview, at: int) -> None:
    view[at] ^= 1


@pytest.fixture(scope="session")
def codec() -> Codec:
    return load_codec()[0]


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory on a tmpfs, removed afterwards."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="snapshotd-test-", dir=base) as name:
        yield Path(name)


@pytest.fixture
def cluster(shared_memory: Path, codec: Codec) -> Iterator[Cluster]:
    made = Cluster(shared_memory, codec)
    yield made
    failpoints.configure(None)
    made.close()


__all__ = ["JOB", "Cluster", "Node", "SlotFile", "flip", "whole"]
