"""
The messages of a protected step and nothing else: what a small step costs before anybody does anything with it.

`python -m benchmarks.messages coordinate PORT_FILE NODES`, and for each node `... node ADDRESS SOCKET RANK UNIT_BYTES`:
a worker says that it sealed, and its node tells the coordinator over gRPC, two of them when they have read what they
need. The slots are one unit each: rank 0 reads those of all others over TCP into memory, in a thread, rank 1 that of
rank 0 and the digests of the others. When all have reported, the coordinator tells all that the step is committed, and
the nodes tell their workers. The messages are a daemon's own, with as much in them. Nothing is hashed, encoded,
written, looked up, waited for or decided.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import struct
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from snapshotd.rpc import open_aio_channel
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc
from snapshotd.v1 import worker_pb2 as worker

from .bare_server import relay, serve
from .owner import RANGE, serve_plainly

__all__ = ["Played"]

_LENGTH = struct.Struct("<I")
_HASH = "0123456789abcdef" * 2
_DIGEST_BYTES = 8
_BUILDERS = ("n0", "n1")


class _Coordinator(control_grpc.CoordinatorServiceServicer):
    def __init__(self, count: int) -> None:
        self._count = count
        self._sessions: dict[str, asyncio.Queue[control.CoordinatorMessage]] = {}
        self._peers: list[control.PeerAddress] = []
        self._num_sealed = 0

    async def NodeSession(self, request_iterator: Any, context: Any) -> None:
        queue: asyncio.Queue[control.CoordinatorMessage] = asyncio.Queue()
        await relay(context, queue, lambda message: self._said(message, queue))

    def _said(self, message: control.NodeMessage, queue: asyncio.Queue[control.CoordinatorMessage]) -> None:
        if message.HasField("hello"):
            self._sessions[message.hello.node_id] = queue
            self._peers.append(control.PeerAddress(node_id=message.hello.node_id, bulk=message.hello.bulk_address))
            if len(self._peers) == self._count:
                self._tell(_BUILDERS, protect=control.Protect(peers=self._peers))
        else:
            self._num_sealed += 1
            if self._num_sealed == self._count:
                self._num_sealed = 0
                sealed = message.sealed
                committed = control.Committed(job=sealed.job, epoch=sealed.epoch, step=sealed.step, level=2)
                self._tell(self._sessions, committed=committed)

    def _tell(self, names: Iterable[str], **body: Any) -> None:
        for name in names:
            self._sessions[name].put_nowait(control.CoordinatorMessage(**body))


class _Node:
    def __init__(self, index: int, unit_bytes: int) -> None:
        self._name, self._rank, self._unit_bytes = f"n{index}", index, unit_bytes
        self._port = serve_plainly(memoryview(mmap.mmap(-1, unit_bytes)), None)
        self._reads: dict[socket.socket, memoryview] = {}
        self._pool = ThreadPoolExecutor(1)
        self._outbox: asyncio.Queue[control.NodeMessage] = asyncio.Queue()
        self._writer: asyncio.StreamWriter

    async def run(self, address: str, path: str) -> None:
        async with open_aio_channel(address, tls=None, insecure=False) as channel:
            call = control_grpc.CoordinatorServiceStub(channel).NodeSession(wait_for_ready=True)
            await call.wait_for_connection()
            hello = control.NodeHello(node_id=self._name, bulk_address=f"127.0.0.1:{self._port}")
            self._outbox.put_nowait(control.NodeMessage(hello=hello))
            async with await asyncio.start_unix_server(self._worker, path):
                writer = asyncio.create_task(self._write(call))
                async for message in call:
                    if message.HasField("protect"):
                        self._connect(message.protect.peers)
                    else:
                        self._commit()
                await writer

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while head := await reader.read(_LENGTH.size):
            frame = worker.Frame.FromString(await reader.readexactly(*_LENGTH.unpack(head)))
            step = {"job": "bench", "epoch": 1, "step": frame.seal.step}
            slot = control.SlotRef(
                **step, rank=self._rank, world_size=4, file_bytes=100_000, layout_hash=_HASH, root_digest=_HASH
            )
            sealed = control.NodeSealed(**step, shards=[control.NodeSealed.Shard(slot=slot, pledged=True)])
            if self._reads:
                loop = asyncio.get_running_loop()
                sealed.built.CopyFrom(control.ParityBuilt(**step, lanes=[0], unasked=True, sets=[1 << 60]))
                loop.run_in_executor(self._pool, self._read, sealed, loop)
            else:
                self._report(sealed)

    def _connect(self, peers: Iterable[control.PeerAddress]) -> None:
        """To whom this node reads from, and how much: all of a slot, or its digest."""
        for peer in peers:
            if peer.node_id == self._name:
                continue
            host, port = peer.bulk.split(":")
            sock = socket.create_connection((host, int(port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            whole = self._rank == 0 or peer.node_id == "n0"
            self._reads[sock] = memoryview(bytearray(self._unit_bytes if whole else _DIGEST_BYTES))

    def _read(self, sealed: control.NodeSealed, loop: asyncio.AbstractEventLoop) -> None:
        for sock, room in self._reads.items():
            sock.sendall(RANGE.pack(0, room.nbytes))
        for sock, room in self._reads.items():
            at = 0
            while at < room.nbytes:
                at += sock.recv_into(room[at:])
        loop.call_soon_threadsafe(self._report, sealed)

    def _report(self, sealed: control.NodeSealed) -> None:
        self._outbox.put_nowait(control.NodeMessage(sealed=sealed))

    def _commit(self) -> None:
        data = worker.Frame(grant=worker.Grant(slot_id=1, path="/dev/shm/slot", file_bytes=100_000)).SerializeToString()
        self._writer.write(_LENGTH.pack(len(data)) + data)


class Played:
    """The workers of those nodes, by their sockets. A context manager."""

    def __init__(self, paths: list[Path]) -> None:
        self._socks = [socket.socket(socket.AF_UNIX) for _ in paths]
        for sock, path in zip(self._socks, paths, strict=True):
            sock.settimeout(60.0)
            sock.connect(str(path))

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self._socks:
            sock.close()

    def step(self, number: int) -> None:
        """All say that they sealed, and wait for the word that all is committed."""
        seal = worker.Frame(seal=worker.Seal(slot_id=1, step=number, layout_hash=_HASH)).SerializeToString()
        for sock in self._socks:
            sock.sendall(_LENGTH.pack(len(seal)) + seal)
        for sock in self._socks:
            (size,) = _LENGTH.unpack(sock.recv(_LENGTH.size, socket.MSG_WAITALL))
            worker.Frame.FromString(sock.recv(size, socket.MSG_WAITALL))


if __name__ == "__main__":
    if sys.argv[1] == "coordinate":
        bare = _Coordinator(int(sys.argv[3]))
        add = control_grpc.add_CoordinatorServiceServicer_to_server
        asyncio.run(serve(sys.argv[2], lambda server: add(bare, server)))
    else:
        asyncio.run(_Node(int(sys.argv[4]), int(sys.argv[5])).run(sys.argv[2], sys.argv[3]))
