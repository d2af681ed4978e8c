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
from snapshotd.workersocket import encode_frame, read_frame

__all__ = ["WorkerSocket"]

log = logging.getLogger("snapshotd.daemon")

WRITE_LIMIT_BYTES = 8 << 20
"""Unread bytes after which a worker that does not read is cut off."""

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
        self._writers: dict[WorkerConn, asyncio.StreamWriter] = {}
        self._pidfds: dict[WorkerConn, int] = {}
        self._next = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind; raises UsageError when another daemon listens there."""
        listener = bind_unix(self.path)
        self._server = await asyncio.start_unix_server(self._accepted, sock=listener)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for conn in list(self._writers):
            self.cut(conn)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def send(self, conn: WorkerConn, frame: worker.Frame) -> None:
        """Queue a frame; a worker that is gone or does not read loses it."""
        writer = self._writers.get(conn)
        if writer is None or writer.is_closing():
            return
        writer.write(encode_frame(frame))
        if writer.transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
            log.warning("worker connection %d does not read; closing it", conn)
            self.cut(conn)

    def cut(self, conn: WorkerConn) -> None:
        """Close a connection after what is queued was sent."""
        writer = self._writers.get(conn)
        if writer is not None:
            writer.close()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._next += 1
        conn = WorkerConn(self._next)
        pid, uid = _peer(writer.get_extra_info("socket"))
        if uid not in (os.getuid(), 0):
            log.warning("refused a connection of user %d to %s", uid, self.path)
            writer.close()
            self._tasks.discard(task)
            return
        self._writers[conn] = writer
        self._watch(conn, pid, writer)
        known = False
        try:
            while (frame := await read_frame(reader)) is not None:
                if frame.HasField("who_are_you"):
                    self.send(conn, worker.Frame(request_id=frame.request_id, i_am=self._who()))
                    continue
                known = True
                self._frame(conn, frame)
        except RemoteProtocolError as error:
            log.warning("worker connection %d broke the protocol: %s", conn, error)
            error_frame = worker.WorkerError(code=error.code, message=str(error), fatal=True)
            self.send(conn, worker.Frame(error=error_frame))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._unwatch(conn)
            self._writers.pop(conn, None)
            writer.close()
            if known:
                self._gone(conn)
            self._tasks.discard(task)

    def _watch(self, conn: WorkerConn, pid: int, writer: asyncio.StreamWriter) -> None:
        if pid <= 0:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return
        self._pidfds[conn] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._died, conn, writer)

    def _died(self, conn: WorkerConn, writer: asyncio.StreamWriter) -> None:
        self._unwatch(conn)
        # What the worker wrote before it died is still to be read: a seal counts when it was sent.
        transport = writer.transport
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").shutdown(socket.SHUT_RD)
        if transport.is_closing():
            return

    def _unwatch(self, conn: WorkerConn) -> None:
        descriptor = self._pidfds.pop(conn, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)


def _peer(link: socket.socket) -> tuple[int, int]:
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid
