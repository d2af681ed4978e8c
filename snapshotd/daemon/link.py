"""The daemon's session with the coordinator: one stream, reconnected for ever, never in anybody's way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc

from snapshotd.rpc import open_aio_channel
from snapshotd.security import TlsFiles
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc

__all__ = ["CoordinatorLink"]

log = logging.getLogger("snapshotd.daemon")

RECONNECT_S = (0.05, 0.1, 0.2, 0.5, 1.0)
QUEUE_LIMIT = 10_000
"""Messages that wait for a coordinator that does not read; beyond, the session is begun anew."""


class CoordinatorLink:
    """Reports `up` after connecting (the core then says hello), `said` per message, `down` when it breaks."""

    def __init__(self, address: str, *, tls: TlsFiles | None, insecure: bool) -> None:
        self.address = address
        self._tls = tls
        self._insecure = insecure
        self._outbox: asyncio.Queue[control.NodeMessage | None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(
        self,
        *,
        up: Callable[[], None],
        down: Callable[[], None],
        said: Callable[[control.CoordinatorMessage], None],
    ) -> asyncio.Task[None]:
        """Begin; the task ends only with an error that is a bug, or by `stop`."""
        self._task = asyncio.get_running_loop().create_task(self._run(up, down, said))
        return self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def send(self, message: control.NodeMessage) -> None:
        """Queue a message for the current session; without a session it is dropped (the next hello says it all)."""
        outbox = self._outbox
        if outbox is None:
            return
        if outbox.qsize() >= QUEUE_LIMIT:
            outbox.put_nowait(None)
            self._outbox = None
            return
        outbox.put_nowait(message)

    async def _run(
        self,
        up: Callable[[], None],
        down: Callable[[], None],
        said: Callable[[control.CoordinatorMessage], None],
    ) -> None:
        channel = open_aio_channel(self.address, tls=self._tls, insecure=self._insecure)
        stub = control_grpc.CoordinatorServiceStub(channel)
        attempt = 0
        warned = False
        try:
            while True:
                outbox: asyncio.Queue[control.NodeMessage | None] = asyncio.Queue()
                call = stub.NodeSession(wait_for_ready=True)
                writer: asyncio.Task[None] | None = None
                try:
                    await call.wait_for_connection()
                    attempt = 0
                    warned = False
                    log.info("connected to the coordinator at %s", self.address)
                    self._outbox = outbox
                    up()
                    writer = asyncio.create_task(_write(call, outbox))
                    async for message in call:
                        said(message)
                except grpc.RpcError as error:
                    if not warned:
                        warned = True
                        log.warning("no coordinator at %s (%s); trying on", self.address, _words(error))
                finally:
                    if writer is not None:
                        writer.cancel()
                        await asyncio.wait({writer})
                    call.cancel()
                    if self._outbox is outbox:
                        self._outbox = None
                        down()
                await asyncio.sleep(RECONNECT_S[min(attempt, len(RECONNECT_S) - 1)])
                attempt += 1
        finally:
            await channel.close()


async def _write(call: grpc.aio.StreamStreamCall[Any, Any], outbox: asyncio.Queue[control.NodeMessage | None]) -> None:
    """Send what is queued until the stream breaks, which its reader notices and handles, or None asks for its end."""
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        while (message := await outbox.get()) is not None:
            await call.write(message)
    call.cancel()


def _words(error: grpc.RpcError) -> str:
    return str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
