"""
A little daemon for the client's tests: real socket, real slot files, everything else as dumb as possible.

It keeps a copy of each sealed slot, and answers restores from those copies, box by box, byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snapshotd.layout import DTYPES, Box, Layout
from snapshotd.v1 import worker_pb2 as pb


@dataclass
class Sealed:
    """A copy of one sealed slot."""

    layout: Layout
    data: np.ndarray

    @property
    def meta_text(self) -> str:
        begin, end = self.layout.meta
        return self.data[begin:end].tobytes().decode().rstrip(" ")

    @property
    def meta(self) -> dict:
        return json.loads(self.meta_text)

    def tensor(self, name: str) -> np.ndarray:
        (shard,) = (shard for shard in self.layout.shards if shard.key == name)
        dtype = np.dtype((np.void, DTYPES[shard.tensor.dtype].itemsize))
        return self.data[shard.begin : shard.end].view(dtype).reshape(shard.tensor.box.lengths)


class Wanted(NamedTuple):
    """One box that is asked for."""

    name: str
    scope: str
    box: Box


def wanted_boxes(boxes: pb.RestoreBoxes) -> list[Wanted]:
    cuts = [(cut.scope, Box(tuple(cut.offsets), tuple(cut.lengths))) for cut in boxes.cuts]
    return [Wanted(name, *cuts[number]) for name, number in zip(boxes.names, boxes.cut_of, strict=True)]


@dataclass
class Peer:
    """One connection of one worker."""

    sock: socket.socket
    hello: pb.WorkerHello | None = None
    layout: Layout | None = None
    slots: dict[int, Path] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, frame: pb.Frame) -> None:
        body = frame.SerializeToString()
        with self.lock, contextlib.suppress(OSError):
            self.sock.sendall(struct.pack("<I", len(body)) + body)


class FakeDaemon:
    """Start it with ``with``; ``sealed[step][rank]`` is what was captured."""

    def __init__(self, *, slots: int = 2, capture_every: int = 1, grant: bool = True, min_step: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fd-"))
        self.slot_folder = self.folder  # on a disk, most often
        self.path = str(self.folder / "d.sock")
        self.num_slots = slots
        self.capture_every = capture_every
        self.grant = grant
        self.min_step = min_step
        self.accept_layout = True
        self.fatal = ""
        self.decision: pb.RestoreDecision | None = None
        self.sealed: dict[int, dict[int, Sealed]] = {}
        self.seals: list[pb.Seal] = []
        self.skips: list[pb.Skip] = []
        self.hellos: list[pb.WorkerHello] = []
        self.layouts: list[Layout] = []
        self.registered: list[pb.RegisterLayout] = []
        self.goodbyes: list[pb.Goodbye] = []
        self.dones: list[pb.RestoreDone] = []
        self.wants: list[pb.RestoreWant] = []
        self.world_size = 1
        self.newest: int | None = None
        self.peers: list[Peer] = []
        self.changed = threading.Condition()
        self._next = 1
        self._server: socket.socket | None = None

    def __enter__(self) -> FakeDaemon:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen(16)
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        for peer in list(self.peers):
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)

    def wait_for(self, what, timeout: float = 60.0) -> None:
        """Wait until ``what()``; it is looked at after each frame."""
        with self.changed:
            assert self.changed.wait_for(what, timeout), "the daemon waited in vain"

    def make_room(self) -> None:
        """Grant slots for layouts that were refused."""
        for peer in self.peers:
            self._make_slots(peer)
            self._grant(peer)

    def grant_all(self) -> None:
        for peer in self.peers:
            self._grant(peer)

    def broadcast(self, frame: pb.Frame) -> None:
        for peer in self.peers:
            peer.send(frame)

    # ------------------------------------------------------------------

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            peer = Peer(sock)
            self.peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        file = peer.sock.makefile("rb")
        try:
            while head := file.read(4):
                length = struct.unpack("<I", head)[0]
                body = file.read(length)
                if len(body) < length:
                    break
                frame = pb.Frame.FromString(body)
                with self.changed:
                    self._hear(peer, frame)
                    self.changed.notify_all()
        except OSError:
            pass
        finally:
            file.close()
            peer.sock.close()
            with self.changed:
                self.peers.remove(peer)
                self.changed.notify_all()

    def _hear(self, peer: Peer, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("body")
        if kind == "hello":
            peer.hello = frame.hello
            self.hellos.append(frame.hello)
            if self.fatal:
                peer.send(pb.Frame(error=pb.WorkerError(code="STALE_EPOCH", message=self.fatal, fatal=True)))
                return
            peer.send(pb.Frame(welcome=pb.WorkerWelcome(node_id="n0", capture_every=self.capture_every)))
        elif kind == "register_layout":
            self._register(peer, frame)
        elif kind == "seal":
            self._seal(peer, frame.seal)
        elif kind == "skip":
            self.skips.append(frame.skip)
        elif kind == "restore_query":
            peer.send(pb.Frame(request_id=frame.request_id, restore_decision=self._decide(peer)))
        elif kind == "restore_want":
            self.wants.append(frame.restore_want)
            ready = self._give(peer, frame.restore_want)
            peer.send(pb.Frame(request_id=frame.request_id, restore_ready=ready))
        elif kind == "restore_done":
            self.dones.append(frame.restore_done)
        elif kind == "goodbye":
            self.goodbyes.append(frame.goodbye)

    def _register(self, peer: Peer, frame: pb.Frame) -> None:
        layout = Layout.parse(frame.register_layout.header)
        reply = pb.LayoutReply(accepted=self.accept_layout, layout_hash=layout.hash)
        if not self.accept_layout:
            reply.reason = "it needs 7 GiB, the budget is 1 GiB"
        peer.layout = layout
        peer.slots = {}
        self.layouts.append(layout)
        self.registered.append(frame.register_layout)
        if self.accept_layout:
            self._make_slots(peer)
        peer.send(pb.Frame(request_id=frame.request_id, layout_reply=reply))
        if self.grant:
            self._grant(peer)

    def _make_slots(self, peer: Peer) -> None:
        for _ in range(self.num_slots):
            path = self.slot_folder / f"slot-{self._next}"
            with path.open("wb") as file:
                file.truncate(peer.layout.file_bytes)
            path.chmod(0o600)
            peer.slots[self._next] = path
            self._next += 1

    def _grant(self, peer: Peer) -> None:
        for slot_id, path in peer.slots.items():
            self._grant_one(peer, slot_id, path)

    def _grant_one(self, peer: Peer, slot_id: int, path: Path) -> None:
        layout = peer.layout
        peer.send(
            pb.Frame(
                grant=pb.Grant(
                    slot_id=slot_id,
                    path=str(path),
                    file_bytes=layout.file_bytes,
                    layout_hash=layout.hash,
                    min_step=self.min_step,
                )
            )
        )

    def _seal(self, peer: Peer, seal: pb.Seal) -> None:
        path = peer.slots[seal.slot_id]
        data = np.fromfile(path, dtype=np.uint8)
        assert peer.layout.hash == seal.layout_hash
        assert data[: len(peer.layout.header)].tobytes() == peer.layout.header
        self.sealed.setdefault(seal.step, {})[peer.hello.rank] = Sealed(peer.layout, data)
        self.world_size = peer.hello.world_size
        self.seals.append(seal)
        if self.grant:
            self._grant_one(peer, seal.slot_id, path)

    def whole_steps(self) -> list[int]:
        whole = [step for step, ranks in self.sealed.items() if len(ranks) == self.world_size]
        return sorted(step for step in whole if self.newest is None or step <= self.newest)

    def _decide(self, peer: Peer) -> pb.RestoreDecision:
        if self.decision is not None:
            return self.decision
        steps = self.whole_steps()
        if not steps:
            return pb.RestoreDecision(kind=pb.RestoreDecision.KIND_FRESH, reason="nothing was captured before")
        step = steps[-1]
        path = self.folder / f"manifest-{peer.hello.rank}-{len(self.dones)}.json"
        path.write_text(json.dumps(self._manifest(step, peer.hello.rank)))
        path.chmod(0o600)
        return pb.RestoreDecision(
            kind=pb.RestoreDecision.KIND_SNAPSHOT,
            source_epoch=1,
            source_step=step,
            source_world_size=self.world_size,
            source="memory",
            reason="the newest snapshot",
            manifest_path=str(path),
        )

    def _manifest(self, step: int, rank: int) -> dict:
        ranks = self.sealed[step]
        source = rank % self.world_size
        tensors: dict[str, dict] = {}
        ties: dict[str, str] = {}
        for r, sealed in sorted(ranks.items()):
            ties.update(sealed.layout.ties)
            for shard in sealed.layout.shards:
                t = shard.tensor
                if t.scope == "global" or r == source:
                    tensors[t.name] = {
                        "name": t.name,
                        "dtype": t.dtype,
                        "shape": list(t.global_shape),
                        "scope": t.scope,
                        "kind": t.kind,
                    }
        return {
            "version": 1,
            "source": {"epoch": 1, "step": step, "world_size": self.world_size, "rank": source},
            "tensors": list(tensors.values()),
            "ties": ties,
            "meta": ranks[source].meta_text,
        }

    def _give(self, peer: Peer, request: pb.RestoreWant) -> pb.RestoreReady:
        step = self.whole_steps()[-1]
        path = self.folder / f"batch-{peer.hello.rank}-{len(self.wants)}"
        ready = pb.RestoreReady(batch_id=len(self.wants), paths=[str(path)])
        with path.open("wb") as file:
            for want in wanted_boxes(request.boxes):
                ready.files.append(0)
                ready.offsets.append(file.tell())
                file.write(self.assemble(step, peer.hello.rank, want).tobytes())
        path.chmod(0o600)
        ready.local_bytes = path.stat().st_size
        return ready

    def assemble(self, step: int, rank: int, want: Wanted) -> np.ndarray:
        """Return the wanted box; fails when a byte of it is nowhere."""
        wanted = want.box
        out: np.ndarray | None = None
        have = np.zeros(wanted.lengths, dtype=bool)
        for r, sealed in self.sealed[step].items():
            if want.scope == "rank" and r != rank % self.world_size:
                continue
            for shard in sealed.layout.shards:
                if shard.tensor.name != want.name or shard.tensor.scope != want.scope:
                    continue
                itemsize = DTYPES[shard.tensor.dtype].itemsize
                if out is None:
                    out = np.zeros((*wanted.lengths, itemsize), dtype=np.uint8)
                box = shard.tensor.box
                common = box.intersect(wanted)
                if common is None:
                    continue
                data = sealed.data[shard.begin : shard.end].reshape((*box.lengths, itemsize))
                there = tuple(
                    slice(o - p, o - p + n) for o, p, n in zip(common.offsets, box.offsets, common.lengths, strict=True)
                )
                here = tuple(
                    slice(o - p, o - p + n)
                    for o, p, n in zip(common.offsets, wanted.offsets, common.lengths, strict=True)
                )
                out[here] = data[there]
                have[here] = True
        assert out is not None, f"nobody has {want.name}"
        assert have.all(), f"{want.name} has holes"
        return out
