"""
Reshard: a snapshot of 4 ranks read by 2, 3 and 8; a lost rank decoded out of 3 others; all of it verified.

The reader is a worker's, with the tensors that it fills; its daemon, beside it, says where the bytes are. It is one of
the group that protected the state; a new one, which has to read the layouts first, stands beside it.
"""

from __future__ import annotations

import json
import socket
import time
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from snapshotd_client.direct import DirectReader
from snapshotd_client.fetch import Entry, Want
from snapshotd_client.interpreter import reading_state
from snapshotd_client.link import Link
from snapshotd_client.placement import Piece

from snapshotd.arena import Arena
from snapshotd.daemon.rebuild import rebuild
from snapshotd.daemon.sources import Sources
from snapshotd.erasure import load_codec
from snapshotd.transfer import BulkClient
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

from .. import Row, Run, Series
from ..holder import JOB, RANKS, boxes_of, tensors
from ..locator import NEW
from ..owner import PIECE_BYTES, RANGE
from ..processes import BenchError, wait_for

GOAL = 8
SECONDS = 35

_THREADS = 2  # as a worker has, of two cores
_WINDOW_BYTES = 1 << 20
_RANKS_OF_NEW = 3
_STATE_BYTES = 592 * (4 << 20)
"""592 tensors of 4 MB: of four ranks, 0.6 GB each."""


def rows(run: Run) -> Iterator[Row]:
    nbytes = run.size(_STATE_BYTES)
    out = run.directory / "holder.json"
    module = f"{__package__.rpartition('.')[0]}.holder"
    holder = run.start("holder", ["-m", module, str(run.directory / "held"), str(out), str(nbytes)])
    text = wait_for(lambda: out.read_text(encoding="ascii") if out.exists() else "", "the holder", 120.0, of=[holder])
    found_there = json.loads(text)
    target = run.memory(3 * int(found_there["plain_bytes"]), fill=False)
    path = run.directory / "reader.sock"
    module = f"{__package__.rpartition('.')[0]}.locator"
    locator = run.start("locator", ["-m", module, str(path), str(out)])
    wait_for(path.exists, "the reader's daemon", 30.0, of=[locator])
    scene = _Scene(run, path, found_there, nbytes, target)
    run.finally_do(scene.close)
    for ranks in (2, 3, 8):
        wanted, wants = scene.wanted_bytes(ranks), scene.wants(ranks)
        ways = {"ours": partial(scene.read, scene.link(ranks), wants), "floor": partial(scene.receive, target, wanted)}
        if ranks == _RANKS_OF_NEW:
            ways["new"] = partial(scene.read, scene.link(ranks, NEW), wants)
        found = run.rounds(ways, rounds=21, within_s=5.0, pids=[holder.pid, locator.pid], warm=2)
        yield Row.speed(
            f"{RANKS} ranks' state read by rank 1 of {ranks}",
            found["ours"],
            found["floor"],
            at_least=None if run.short else 0.8,
            against="plain TCP recv_into of the bytes wanted",
            nbytes=wanted,
        )
        if "new" in found:
            yield Row.speed(
                f"{RANKS} ranks' state read by rank 1 of {ranks}, on a new node",
                found["new"],
                found["floor"],
                at_least=None,
                against="plain TCP recv_into of the bytes wanted",
                nbytes=wanted,
            )
        yield Row.cost(
            f"{RANKS} ranks' state read by rank 1 of {ranks}: bytes",
            Series((float(scene.fetched_bytes),)),
            Series((float(wanted),)),
            unit="B",
            at_most=1.05,
            against="bytes wanted",
        )
    found = run.rounds(
        {"ours": scene.decode, "floor": lambda: scene.receive_and_decode(target)},
        rounds=5,
        within_s=20.0,
        pids=[holder.pid],
    )
    yield Row.speed(
        "a lost rank decoded (k = 3), verified and sealed",
        found["ours"],
        found["floor"],
        at_least=None if run.short else 0.7,
        against="plain TCP of 3 shards, then ISA-L decode",
        nbytes=scene.plain_bytes,
    )


class _Silent:
    """A worker that only restores hears nothing else of its daemon."""

    def on_welcome(self, welcome: worker.WorkerWelcome, session: int) -> None: ...

    def on_frame(self, frame: worker.Frame, session: int) -> None: ...

    def on_lost(self, reason: str, was_welcome: bool) -> None: ...

    def on_refused(self, error: worker.WorkerError) -> None: ...


@dataclass
class _Held:
    addresses: list[str]
    plain: list[int]
    stripe_set: control.StripeSet


class _Scene:
    """A node that has nothing yet, and the holder that has it all."""

    def __init__(self, run: Run, path: Path, found: dict[str, Any], nbytes: int, memory: memoryview) -> None:
        self._nbytes = nbytes
        self._held = _Held(
            list(found["addresses"]), list(found["plain"]), control.StripeSet.FromString(b64decode(found["set"]))
        )
        self.plain_bytes = int(found["plain_bytes"])
        self.fetched_bytes = 0
        self._arena = Arena(Path(run.directory) / "reader", budget_bytes=1 << 40)
        self._client = BulkClient()
        self._sources = Sources("reader", self._arena, self._client)
        self._codec, _ = load_codec()
        self._memory = memory
        self._socket = path
        self._links: list[Link] = []
        self._peers = [
            control.PeerAddress(node_id=f"n{rank}", bulk=address) for rank, address in enumerate(self._held.addresses)
        ]

    def close(self) -> None:
        for link in self._links:
            link.close(None)
        self._client.close()
        self._arena.close()

    def wanted_bytes(self, ranks: int) -> int:
        return sum(boxes_of(shape, 1, ranks).numel * 4 for _, shape in tensors(self._nbytes))

    def link(self, ranks: int, formation: str = "") -> Link:
        """As rank 1 of so many; of a NEW formation on a node that has just been added."""
        hello = worker.WorkerHello(protocol=1, job=JOB, rank=1, world_size=ranks, formation=formation)
        link = Link(str(self._socket), hello, _Silent())
        link.start()
        self._links.append(link)
        if not link.wait_session(30.0):
            raise BenchError("the reader's daemon does not answer")
        return link

    def read(self, link: Link, wants: Sequence[Want]) -> None:
        """From the question what there is to the last byte in its tensor."""
        decision = link.ask(worker.Frame(restore_query=worker.RestoreQuery()), 60.0)
        if decision is None:
            raise BenchError("the reader's daemon does not say what there is")
        reader = DirectReader(link, time.monotonic() + 60.0, _THREADS)
        with reading_state():  # as a restore does
            left = reader.run(wants)
        link.post(worker.Frame(restore_done=worker.RestoreDone(ok=True)), link.session)
        self.fetched_bytes = reader.peer_bytes
        if left:
            raise BenchError(f"{len(left)} boxes were not read from peers")

    def wants(self, ranks: int) -> list[Want]:
        """What rank 1 has of each tensor, as tensors in warm memory."""
        at = 0
        made = []
        for name, shape in tensors(self._nbytes):
            box = boxes_of(shape, 1, ranks)
            room = self._memory[at : at + box.numel * 4]
            at += room.nbytes
            target = torch.frombuffer(room, dtype=torch.float32).view(box.lengths)
            made.append(Want(Entry(name, "float32", tuple(shape), "global", "param"), Piece(box, (0, 0)), target))
        return made

    def receive(self, target: memoryview, nbytes: int) -> None:
        """So many bytes of the three slots, one after the other."""
        at = 0
        for port in self._held.plain:
            end = min(nbytes, at + self.plain_bytes)
            if at == end:
                break
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(RANGE.pack(0, end - at))
                while at < end:
                    at += sock.recv_into(target[at : min(at + PIECE_BYTES, end)])

    def decode(self) -> None:
        """Rank 3 out of the other slots and the parity, into memory of this node that was used before."""
        nodes = [f"n{rank}" for rank in range(RANKS)]
        order = control.Rebuild(
            set=self._held.stripe_set,
            position=3,
            slot=True,
            slot_nodes=[*nodes[:3], ""],
            parity_nodes=[*nodes[:3], ""],
            peers=self._peers,
        )
        rebuilt = rebuild(order, "reader", self._arena, self._sources, self._codec)
        if rebuilt.slot is None:
            raise BenchError(rebuilt.done.reason)
        self._arena.release(rebuilt.slot)

    def receive_and_decode(self, target: memoryview) -> None:
        size = self.plain_bytes
        self.receive(target, 3 * size)
        out = memoryview(bytearray(_WINDOW_BYTES))
        for at in range(0, size, _WINDOW_BYTES):
            end = min(at + _WINDOW_BYTES, size)
            known = [(place, target[i * size + at : i * size + end]) for i, place in enumerate((0, 1, 3))]
            self._codec.decode(3, 1, known, 2, out[: end - at])
