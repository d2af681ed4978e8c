"""
The coordinator's shell: gRPC streams in, the pure core in the middle, store and streams out.

Rule 1: all calls of the core happen on one event loop, one at a time.
Rule 2: what an Output persists is durable before anything it sends leaves.
Rule 3: a peer that does not read its stream is cut off, it never holds the others up.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import grpc

from snapshotd.coordinator.core import CoordinatorCore
from snapshotd.coordinator.events import (
    AgentMessageArrived,
    AgentSessionEnded,
    Answer,
    CoreSettings,
    Event,
    ForgetWanted,
    NodeMessageArrived,
    NodeSessionEnded,
    Output,
    Put,
    SessionId,
    SnapshotWanted,
    Ticked,
    ToAgent,
    ToNode,
)
from snapshotd.coordinator.store import KV_PREFIX, Store
from snapshotd.errors import AccessDenied
from snapshotd.failpoints import failpoint
from snapshotd.rpc import CHANNEL_OPTIONS, check_peer, same_user_guard
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import control_pb2_grpc as control_grpc

__all__ = ["CoordinatorService"]

log = logging.getLogger("snapshotd.coordinator")

TICK_S = 0.1
STREAM_LIMIT = 4096
"""Messages that may wait for one peer; a peer this far behind is cut off and must reconnect."""

NOTES_KEPT = 500
KV_LIMIT_BYTES = 1 << 20
KV_EPOCHS_KEPT = 64

_SERVICE = "snapshotd.v1.CoordinatorService"


class CoordinatorService(control_grpc.CoordinatorServiceServicer):
    """
    Serves daemons, launchers and tools until `stop`.

    Args:
        clock: seconds; the core is driven by it.
        plain: neither TLS nor --insecure: only this user's processes on this machine are served.
    """

    def __init__(
        self,
        settings: CoreSettings,
        store: Store,
        *,
        plain: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._plain = plain
        self._guard: Callable[[str], bool] | None = None
        self._clock = clock
        self._core = CoordinatorCore(settings, store.remembered())
        self._streams: dict[SessionId, asyncio.Queue[bytes | None]] = {}
        self._encoded: tuple[object, bytes] = (None, b"")
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._notes: deque[dict[str, Any]] = deque(maxlen=NOTES_KEPT)
        self._sessions = 0
        self._requests = 0
        self._note_seq = 0
        self._key_values: OrderedDict[tuple[str, int], dict[str, bytes]] = OrderedDict()
        self._key_changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self.fatal: asyncio.Future[None] | None = None

    async def start(self, listen: str, credentials: grpc.ServerCredentials | None) -> int:
        """Bind and serve; returns the port."""
        self.fatal = asyncio.get_running_loop().create_future()
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        control_grpc.add_CoordinatorServiceServicer_to_server(self, server)
        server.add_registered_method_handlers(_SERVICE, _sessions(self))
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
        self._guard = same_user_guard(port) if self._plain else None
        await server.start()
        self._server = server
        self._ticker = asyncio.create_task(self._tick())
        return port

    async def stop(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        for queue in self._streams.values():
            queue.put_nowait(None)
        if self._server is not None:
            await self._server.stop(0.2)
        self._store.close()

    # ---------------------------------------------------------------- streams

    async def NodeSession(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await self._serve(
            context,
            arrived=lambda session, message: NodeMessageArrived(session=session, message=message),
            ended=lambda session: NodeSessionEnded(session=session),
        )

    async def AgentSession(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await self._serve(
            context,
            arrived=lambda session, message: AgentMessageArrived(session=session, message=message),
            ended=lambda session: AgentSessionEnded(session=session),
        )

    async def _serve(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        arrived: Callable[[SessionId, Any], Event],
        ended: Callable[[SessionId], Event],
    ) -> None:
        await self._admit(context)
        self._sessions += 1
        session = SessionId(f"s{self._sessions}")
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._streams[session] = queue

        async def read() -> None:
            try:
                while (message := await context.read()) is not grpc.aio.EOF:
                    self._dispatch(arrived(session, message))
            finally:
                queue.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (message := await queue.get()) is not None:
                await context.write(message)
        finally:
            reader.cancel()
            with contextlib.suppress(BaseException):
                await reader
            self._streams.pop(session, None)
            self._dispatch(ended(session))

    async def _admit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            check_peer(context.peer(), self._guard)
        except AccessDenied as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))

    # ---------------------------------------------------------------- the core

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._dispatch(Ticked())

    def _dispatch(self, event: Event) -> None:
        try:
            self._obey(self._core.handle(event, self._clock()))
        except Exception as error:
            # A bug of ours: what the core knows may be wrong from here on. Die loudly; the store and the
            # daemons' inventories bring the next coordinator back to the truth.
            log.critical("the core failed on %s", event, exc_info=True)
            if self.fatal is not None and not self.fatal.done():
                self.fatal.set_exception(error)

    def _obey(self, output: Output) -> None:
        if output.persist:
            commit = any(isinstance(change, Put) and "commit" in change.key for change in output.persist)
            epoch = any(isinstance(change, Put) and "epoch" in change.key for change in output.persist)
            if commit:
                failpoint("coordinator.before_commit")
            if epoch:
                failpoint("coordinator.before_epoch")
            self._store.apply(output.persist)
            if commit:
                failpoint("coordinator.after_commit")
            if epoch:
                failpoint("coordinator.after_epoch")
        for outgoing in output.send:
            self._send(outgoing)
        for answer in output.answer:
            future = self._answers.pop(answer.request_id, None)
            if future is not None and not future.done():
                future.set_result(answer)
        for note in output.notes:
            self._note_seq += 1
            self._notes.append(
                {
                    "seq": self._note_seq,
                    "time": time.time(),
                    "stream": note.stream,
                    "job": note.job,
                    "epoch": note.epoch,
                    "step": note.step,
                    "text": note.text,
                }
            )
            log.info("%s job=%s epoch=%d step=%d: %s", note.stream, note.job, note.epoch, note.step, note.text)
        for session in output.close:
            queue = self._streams.get(session)
            if queue is not None:
                queue.put_nowait(None)

    def _send(self, outgoing: ToNode | ToAgent) -> None:
        queue = self._streams.get(outgoing.session)
        if queue is None:
            return
        if queue.qsize() >= STREAM_LIMIT:
            log.warning("session %s does not read its stream; closing it", outgoing.session)
            self._streams.pop(outgoing.session, None)
            queue.put_nowait(None)
            return
        message, data = self._encoded
        if message is not outgoing.message:
            data = outgoing.message.SerializeToString()
            self._encoded = outgoing.message, data  # very likely the next session is told the same
        queue.put_nowait(data)

    async def _ask(self, event: Event, request_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = future
        try:
            self._dispatch(event)
            answer = await future
        finally:
            self._answers.pop(request_id, None)
        if answer.error:
            await context.abort(_STATUS.get(answer.error_code, grpc.StatusCode.UNKNOWN), answer.error)
        return answer

    # ---------------------------------------------------------------- launchers' key-value space

    def _space(self, job: str, epoch: int) -> dict[str, bytes]:
        space = self._key_values.get((job, epoch))
        if space is None:
            prefix = f"{KV_PREFIX}{epoch}/"
            rows = self._store.key_values(job, prefix)
            space = {key[len(prefix) :]: base64.b64decode(value) for key, value in rows.items()}
            self._key_values[job, epoch] = space
            self._store.delete_prefix(job, KV_PREFIX, but=prefix)
            while len(self._key_values) > KV_EPOCHS_KEPT:
                self._key_values.popitem(last=False)
        return space

    async def _put(self, job: str, epoch: int, entries: dict[str, bytes]) -> None:
        space = self._space(job, epoch)
        if sum(map(len, space.values())) + sum(map(len, entries.values())) > KV_LIMIT_BYTES:
            raise ValueError(f"more than {KV_LIMIT_BYTES} bytes in the key-value space of job {job}")
        self._store.apply(
            Put(
                job=job,
                key=f"{KV_PREFIX}{epoch}/{key}",
                value=base64.b64encode(value).decode(),
                sync=False,
            )
            for key, value in entries.items()
        )
        space.update(entries)
        async with self._key_changed:
            self._key_changed.notify_all()

    async def KvSet(
        self, request: control.KvSetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.KvSetResponse:
        await self._admit(context)
        try:
            await self._put(request.job, request.epoch, dict(request.entries))
        except ValueError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return control.KvSetResponse()

    async def KvGet(
        self, request: control.KvGetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.KvGetResponse:
        await self._admit(context)
        space = self._space(request.job, request.epoch)

        def whole() -> bool:
            return all(key in space for key in request.keys)

        async with self._key_changed:
            try:
                await asyncio.wait_for(self._key_changed.wait_for(whole), request.timeout_ms / 1000 or None)
            except asyncio.TimeoutError:
                return control.KvGetResponse(found=False)
        return control.KvGetResponse(found=True, values=[space[key] for key in request.keys])

    async def KvAdd(
        self, request: control.KvAddRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.KvAddResponse:
        await self._admit(context)
        space = self._space(request.job, request.epoch)
        once = f"{request.key}#{request.request_id}"
        if once in space:
            return control.KvAddResponse(value=int(space[once]))
        value = int(space.get(request.key, b"0")) + request.amount
        await self._put(request.job, request.epoch, {request.key: b"%d" % value, once: b"%d" % value})
        return control.KvAddResponse(value=value)

    # ---------------------------------------------------------------- tools

    async def GetStatus(
        self, request: control.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.GetStatusResponse:
        await self._admit(context)
        status = self._core.status(self._clock())
        status["events"] = list(self._notes)
        return control.GetStatusResponse(json=json.dumps(status))

    async def LocateSnapshot(
        self, request: control.LocateSnapshotRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.LocateSnapshotResponse:
        await self._admit(context)
        self._requests += 1
        request_id = f"r{self._requests}"
        step = None if request.latest else request.step
        answer = await self._ask(SnapshotWanted(request_id=request_id, job=request.job, step=step), request_id, context)
        return answer.located or control.LocateSnapshotResponse()

    async def ForgetJob(
        self, request: control.ForgetJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control.ForgetJobResponse:
        await self._admit(context)
        self._requests += 1
        request_id = f"r{self._requests}"
        answer = await self._ask(ForgetWanted(request_id=request_id, job=request.job), request_id, context)
        return answer.forgotten or control.ForgetJobResponse()


def _sessions(service: CoordinatorService) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """The sessions, as the generated code has them, but for answers that are bytes already."""
    return {
        "NodeSession": grpc.stream_stream_rpc_method_handler(service.NodeSession, control.NodeMessage.FromString),
        "AgentSession": grpc.stream_stream_rpc_method_handler(service.AgentSession, control.AgentMessage.FromString),
    }


_STATUS = {
    "INVALID_ARGUMENT": grpc.StatusCode.INVALID_ARGUMENT,
    "UNRECOVERABLE": grpc.StatusCode.DATA_LOSS,
    "UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
}
