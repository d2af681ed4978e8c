"""The workers' socket: frames in whatever portions they arrive, and connections that end in their own ways."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from snapshotd.daemon.events import WorkerConn
from snapshotd.daemon.workers import WRITE_LIMIT_BYTES, WorkerSocket
from snapshotd.v1 import worker_pb2 as worker
from snapshotd.workersocket import MAX_FRAME_BYTES, encode_frame

SKIP = worker.Frame(skip=worker.Skip(step=7))


class Served:
    """A socket, a client of it, and what was heard."""

    def __init__(self, path: Path) -> None:
        self.heard: list[worker.Frame] = []
        self.gone: list[WorkerConn] = []
        self.changed = asyncio.Event()
        self.workers = WorkerSocket(path, who=worker.IAm, frame=self._frame, gone=self._gone)
        self.client = socket.socket(socket.AF_UNIX)

    def _frame(self, conn: WorkerConn, frame: worker.Frame) -> None:
        self.heard.append(frame)
        self.changed.set()

    def _gone(self, conn: WorkerConn) -> None:
        self.gone.append(conn)
        self.changed.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.changed.wait(), 30)
        self.changed.clear()


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Served]:
    home = tmp_path / "run"
    home.mkdir(mode=0o700)
    served = Served(home / "d.sock")
    await served.workers.start()
    with served.client:
        served.client.connect(str(served.workers.path))
        try:
            yield served
        finally:
            await served.workers.close()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_frames_arrive_in_any_portions(tmp_path: Path, size: int) -> None:
    async def run() -> None:
        async with serving(tmp_path) as served:
            data = encode_frame(SKIP) * 3
            for at in range(0, len(data), size):
                served.client.sendall(data[at : at + size])
                await asyncio.sleep(0)
            while len(served.heard) < 3:
                await served.wait()
            assert [SKIP] * 3 == served.heard
            served.client.shutdown(socket.SHUT_WR)
            while not served.gone:
                await served.wait()

    asyncio.run(run())


def test_a_worker_that_does_not_read_is_cut(tmp_path: Path) -> None:
    """What it was told stays unread for ever: nobody waits for it to be sent, neither here nor at the daemon's end."""

    async def run() -> None:
        async with serving(tmp_path) as served:
            served.client.sendall(encode_frame(SKIP))
            await served.wait()
            grant = worker.Frame(grant=worker.Grant(path="x" * (1 << 20)))
            for _ in range(WRITE_LIMIT_BYTES // (1 << 20) + 2):
                served.workers.send(WorkerConn(1), grant)
            await served.wait()
            assert [WorkerConn(1)] == served.gone

    asyncio.run(run())


@pytest.mark.parametrize("ending", [b"\xff\xff\xff\xff", encode_frame(SKIP)[:-1]], ids=["length", "cut short"])
def test_what_is_no_frame_ends_a_connection(tmp_path: Path, ending: bytes) -> None:
    assert int.from_bytes(b"\xff\xff\xff\xff", "little") > MAX_FRAME_BYTES

    async def run() -> None:
        async with serving(tmp_path) as served:
            served.client.sendall(encode_frame(SKIP) + ending)
            served.client.shutdown(socket.SHUT_WR)
            while not served.gone:
                await served.wait()
            assert [SKIP] == served.heard
            served.client.settimeout(30)
            said = await asyncio.to_thread(lambda: b"".join(iter(lambda: served.client.recv(4096), b"")))
            assert "REMOTE_PROTOCOL" == worker.Frame.FromString(said[4:]).error.code

    asyncio.run(run())
