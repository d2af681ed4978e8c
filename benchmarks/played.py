"""
Workers that are played: they speak the worker's protocol, write nothing but what changes, and seal when they are told.

What they measure is the daemons and the coordinator, without the cost of a training loop and its copies.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from snapshotd.layout import Box, Layout, TensorBox
from snapshotd.mapping import map_file
from snapshotd.v1 import worker_pb2 as worker

from .cluster import Cluster
from .processes import BenchError

__all__ = ["Company"]

_LENGTH = struct.Struct("<I")
_TIMEOUT_S = 60.0
_BLOCK = 1 << 17


class _Worker:
    """One rank. ``grants``: slots that it may fill."""

    def __init__(self, path: Path, rank: int, world_size: int, nbytes: int, formation: str) -> None:
        words = max(1, nbytes // 4)
        tensor = TensorBox(
            name="w", dtype="float32", global_shape=(words,), box=Box((0,), (words,)), scope="rank", kind="param"
        )
        self.layout = Layout.build([tensor], meta_capacity=256)
        self.rank = rank
        self.grants: list[worker.Grant] = []
        self._maps: dict[str, Any] = {}
        self._data = b""
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(_TIMEOUT_S)
        self._sock.connect(str(path))
        hello = worker.WorkerHello(
            protocol=1, job="bench", rank=rank, world_size=world_size, local_world_size=1, formation=formation
        )
        hello.nonce, hello.pid = secrets.token_hex(8), os.getpid()
        self.say(hello=hello)
        self.hear("welcome")

    def say(self, **body: Any) -> None:
        data = worker.Frame(**body).SerializeToString()
        self._sock.sendall(_LENGTH.pack(len(data)) + data)

    def hear(self, body: str) -> worker.Frame:
        """The next frame of that kind; grants on the way are kept."""
        while True:
            while len(self._data) < 4 or len(self._data) < 4 + _LENGTH.unpack(self._data[:4])[0]:
                more = self._sock.recv(1 << 16)
                if not more:
                    raise BenchError(f"the daemon of rank {self.rank} hung up")
                self._data += more
            end = 4 + _LENGTH.unpack(self._data[:4])[0]
            frame, self._data = worker.Frame.FromString(self._data[4:end]), self._data[end:]
            if frame.HasField("grant"):
                self.grants.append(frame.grant)
            if frame.HasField("error"):
                raise BenchError(f"rank {self.rank}: {frame.error.message}")
            if frame.WhichOneof("body") == body:
                return frame

    def write(self, step: int) -> worker.Grant:
        """Fill the granted slot: with noise the first time, then with a page that tells the step."""
        if not self.grants:
            self.hear("grant")
        grant = self.grants.pop(0)
        slot = self._maps.get(grant.path)
        if slot is None:
            with open(grant.path, "r+b") as file:
                slot = np.frombuffer(map_file(file.fileno(), grant.file_bytes), np.uint8)
            self._maps[grant.path] = slot
            words = slot[self.layout.data_begin : len(slot) // 8 * 8].view(np.uint64)
            noise = np.random.default_rng(self.rank).integers(1 << 63, size=_BLOCK, dtype=np.uint64)
            for begin in range(0, len(words), _BLOCK):
                part = words[begin : begin + _BLOCK]
                np.add(noise[: len(part)], np.uint64(begin), out=part)
        slot[self.layout.data_begin : self.layout.data_begin + 4096] = (step * 31 + self.rank) % 251
        return grant

    def close(self) -> None:
        self._sock.close()
        self._maps.clear()


class Company:
    """
    One played worker for each node of a cluster, a fresh epoch. A context manager.

    With two slots per rank the next one is granted when the step before is committed: so a step is over when all ranks
    have been granted their next slot.
    """

    def __init__(self, cluster: Cluster, nbytes: int) -> None:
        count, formation = len(cluster.nodes), secrets.token_hex(4)
        self.workers = [
            _Worker(node.socket, rank, count, nbytes, formation) for rank, node in enumerate(cluster.nodes)
        ]
        for one in self.workers:
            one.say(request_id=1, restore_query=worker.RestoreQuery())
        for one in self.workers:
            one.hear("restore_decision")
            one.say(request_id=2, register_layout=worker.RegisterLayout(header=one.layout.header))
        self._step = 0
        for _ in range(3):
            self.step()

    def __enter__(self) -> Company:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.workers:
            one.close()

    def step(self) -> float:
        """Capture a step on all ranks; seconds from the first seal to the last rank's next slot: to the commit."""
        self._step += 1
        grants = [one.write(self._step) for one in self.workers]
        began = time.perf_counter()
        for one, grant in zip(self.workers, grants, strict=True):
            one.say(seal=worker.Seal(slot_id=grant.slot_id, step=self._step, layout_hash=one.layout.hash))
        for one in self.workers:
            if not one.grants:
                one.hear("grant")
        return time.perf_counter() - began
