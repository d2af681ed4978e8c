"""
The daemon's Unix socket: one connection per worker, framed protobuf, the peer's user checked.

A worker's death is seen at once through its pidfd, also when forked children of it (DataLoader
workers) still hold the socket open; where the pid cannot be seen, the end of the stream tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from snapshotd.daemon.events import WorkerConn
from snapshotd.errors import RemoteProtocolError
from snapshotd.security import bind_unix
from snapshotd.v1 import worker_pb2 as worker
from snapshotd.workersocket import Frames, encode_frame

__all__ = ["WorkerSocket"]

log = logging.getLogger("snapshotd.daemon")

WRITE_LIMIT_BYTES = 8 << 20
"""Unread bytes after which a worker that does not read is cut off."""

CLOSE_S = 1.0
"""How long the daemon's end waits for workers to read what they were told."""

_CREDENTIALS = struct.Struct("3i")


class WorkerSocket:
    """
    Accepts workers until `close`; reports frames and ends through the two callbacks, on the event loop.

    who: answers "which daemon is this?" without a worker's session.
    """

    def __init__(
        self,
        path: Path,
        *,
        who: Callable[[], worker.IAm],
        frame: Callable[[WorkerConn, worker.Frame], None],
        gone: Callable[[WorkerConn], None],
    ) -> None:
        self.path = path
        self._who = who
        self._frame = frame
        self._gone = gone
        self._workers: dict[WorkerConn, _Worker] = {}
        self._next = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind; raises UsageError when another daemon listens there."""
        listener = bind_unix(self.path)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Worker(self), sock=listener)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        workers = list(self._workers.values())
        for one in workers:
            one.transport.close()
        if workers:
            await asyncio.wait([one.ended for one in workers], timeout=CLOSE_S)
        for one in workers:
            one.transport.abort()  # it does not read
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def send(self, conn: WorkerConn, frame: worker.Frame) -> None:
        """Queue a frame; a worker that is gone or does not read loses it."""
        one = self._workers.get(conn)
        if one is None or one.transport.is_closing():
            return
        one.transport.write(encode_frame(frame))
        if one.transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
            log.warning("worker connection %d does not read; closing it", conn)
            one.transport.abort()

    def cut(self, conn: WorkerConn) -> None:
        """Close a connection after what is queued was sent."""
        one = self._workers.get(conn)
        if one is not None:
            one.transport.close()

    # ---------------------------------------------------------------- what a connection says

    def made(self, one: _Worker) -> WorkerConn | None:
        """Return the name of a new connection, or None for one that is not served."""
        pid, uid = _peer(one.transport.get_extra_info("socket"))
        if uid not in (os.getuid(), 0):
            log.warning("refused a connection of user %d to %s", uid, self.path)
            return None
        self._next += 1
        conn = WorkerConn(self._next)
        self._workers[conn] = one
        one.watch(pid)
        return conn

    def said(self, conn: WorkerConn, frame: worker.Frame) -> bool:
        """Take a frame; False for a question that anybody may ask."""
        if frame.HasField("who_are_you"):
            self.send(conn, worker.Frame(request_id=frame.request_id, i_am=self._who()))
            return False
        self._frame(conn, frame)
        return True

    def broke(self, conn: WorkerConn, error: RemoteProtocolError) -> None:
        """Tell a worker that what it says cannot be understood."""
        log.warning("worker connection %d broke the protocol: %s", conn, error)
        error_frame = worker.WorkerError(code=error.code, message=str(error), fatal=True)
        self.send(conn, worker.Frame(error=error_frame))

    def lost(self, conn: WorkerConn, *, known: bool) -> None:
        """Forget a connection that ended."""
        del self._workers[conn]
        if known:
            self._gone(conn)


class _Worker(asyncio.Protocol):
    """One connection. ``ended`` is done when it is closed, and all that was read of it was told."""

    transport: asyncio.Transport

    def __init__(self, owner: WorkerSocket) -> None:
        self._owner = owner
        self._frames = Frames()
        self._conn: WorkerConn | None = None
        self._known = False
        self._pidfd = -1
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._conn = self._owner.made(self)
        if self._conn is None:
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._conn is None:
            return
        try:
            for frame in self._frames.feed(data):
                self._known = self._owner.said(self._conn, frame) or self._known
        except RemoteProtocolError as error:
            self._broke(error)

    def eof_received(self) -> None:
        if self._frames.is_inside:
            self._broke(RemoteProtocolError("the stream ended inside a frame"))
        self._end()  # now: what is still to be sent may never be read

    def connection_lost(self, error: Exception | None) -> None:
        self._end()
        self.ended.set_result(None)

    def _broke(self, error: RemoteProtocolError) -> None:
        if self._conn is not None:
            self._owner.broke(self._conn, error)
        self._end()
        self.transport.close()

    def _end(self) -> None:
        self._unwatch()
        conn, self._conn = self._conn, None
        if conn is not None:
            self._owner.lost(conn, known=self._known)

    def watch(self, pid: int) -> None:
        """Notice the death of the process at the other end."""
        if pid <= 0:
            return
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    def _died(self) -> None:
        self._unwatch()
        # What the worker wrote before it died is still to be read: a seal counts when it was sent.
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").shutdown(socket.SHUT_RD)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def _peer(link: socket.socket) -> tuple[int, int]:
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid
