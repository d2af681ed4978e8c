"""
The daemon's shell: workers and coordinator in, the pure node core in the middle, work orders out.

Rule 1: the core is called on one event loop, one event at a time; heavy work runs in threads and
        comes back as an event.
Rule 2: whatever fails here costs protection, never the training job: a failed order is reported.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from snapshotd.arena import Arena, SlotFile
from snapshotd.daemon import events
from snapshotd.daemon.core import NodeCore
from snapshotd.daemon.link import CoordinatorLink
from snapshotd.daemon.orders import Orders
from snapshotd.daemon.workers import WorkerSocket
from snapshotd.errors import SnapshotdError
from snapshotd.failpoints import failpoint
from snapshotd.layout import CHUNK_BYTES
from snapshotd.v1 import worker_pb2 as worker

__all__ = ["DaemonService"]

log = logging.getLogger("snapshotd.daemon")

TICK_S = 0.2
WORK_THREADS = 8
SEALED_AT_ONCE_BYTES = 2 * CHUNK_BYTES
"""So little is hashed faster than a thread is woken up."""

OrderT = TypeVar("OrderT", bound=events.Effect)

LEASE_RETRY_S = 0.005
LEASE_RETRY_MAX_S = 0.1


class DaemonService:
    """
    Runs one node until `stop`.

    Collaborators come ready made: the arena, the orders (pipelines bound to it), the core, the link
    to the coordinator and the workers' socket path.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        orders: Orders,
        core: NodeCore,
        slots: dict[events.SlotId, SlotFile],
        link: CoordinatorLink,
        who: Callable[[], worker.IAm],
        socket_path: Any,
        scrub_rate: int = 0,
    ) -> None:
        self._arena = arena
        self._orders = orders
        self._core = core
        self._slots = slots
        self._link = link
        self._scrub_rate = scrub_rate
        self._socket = WorkerSocket(socket_path, who=who, frame=self._worker_said, gone=self._worker_gone)
        # Sealing is on the way of every step and must not queue behind long work.
        self._sealing = ThreadPoolExecutor(max_workers=4, thread_name_prefix="seal")
        self._working = ThreadPoolExecutor(max_workers=WORK_THREADS, thread_name_prefix="work")
        self._scrubbing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scrub")
        # A restore may wait for a rebuild, which must find a thread.
        self._restoring = ThreadPoolExecutor(max_workers=16, thread_name_prefix="restore")
        self._parity_cancels: dict[tuple[str, int, int], threading.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counters: Counter[str] = Counter()  # of the threads; the core has its own
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self.fatal: asyncio.Future[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.fatal = self._loop.create_future()
        self._orders.on_corruption = self._corruption_from_thread
        self._orders.on_count = self._count_from_thread
        await self._socket.start()
        session = self._link.start(up=self._coordinator_up, down=self._coordinator_down, said=self._coordinator_said)
        session.add_done_callback(self._finished)
        self._spawn(self._tick())
        if self._scrub_rate:
            self._spawn(self._scrub())

    async def stop(self) -> None:
        """End the service; slots and parity stay in the arena for the next daemon."""
        self._stopping = True
        self._orders.cancel.set()
        for cancel in list(self._parity_cancels.values()):
            cancel.set()
        await self._link.stop()
        await self._socket.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sealing.shutdown(wait=True, cancel_futures=True)
        self._working.shutdown(wait=True, cancel_futures=True)
        self._restoring.shutdown(wait=True, cancel_futures=True)
        self._scrubbing.shutdown(wait=True, cancel_futures=True)
        self._orders.close()

    # ---------------------------------------------------------------- facts

    def _worker_said(self, conn: events.WorkerConn, frame: worker.Frame) -> None:
        self._handle(events.WorkerFrame(conn=conn, frame=frame))

    def _worker_gone(self, conn: events.WorkerConn) -> None:
        self._handle(events.WorkerGone(conn=conn))

    def _coordinator_up(self) -> None:
        self._handle(events.CoordinatorUp())

    def _coordinator_down(self) -> None:
        self._handle(events.CoordinatorDown())

    def _coordinator_said(self, message: Any) -> None:
        if message.HasField("restore_plan"):
            self._orders.follow(message.restore_plan)
        self._handle(events.CoordinatorSaid(message=message))

    def _corruption_from_thread(self, found: events.CorruptionFound) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._handle, found)

    def _count_from_thread(self, name: str, amount: int) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._counters.update, {name: amount})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._handle(events.Ticked())

    async def _scrub(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await asyncio.get_running_loop().run_in_executor(self._scrubbing, self._orders.scrub, self._scrub_rate)

    def _handle(self, event: events.Event) -> None:
        """One event, and the endings of what was worked off at once, in turn."""
        happened = [event]
        try:
            for event in happened:
                for effect in self._core.handle(event, time.monotonic()):
                    ending = self._obey(effect)
                    if ending is not None:
                        happened.append(ending)
        except Exception as error:
            log.critical("the node core failed on %s", event)
            self._fail(error)

    # ---------------------------------------------------------------- effects

    def _obey(self, effect: events.Effect) -> events.Event | None:
        """Work an effect off, or begin to; the ending of an order that is over already."""
        match effect:
            case events.ToWorker(conn=conn, frame=frame):
                self._socket.send(conn, frame)
            case events.CloseWorker(conn=conn):
                self._socket.cut(conn)
            case events.ToCoordinator(message=message):
                self._report(message)
            case events.Note():
                log.info(
                    "%s job=%s epoch=%d step=%d: %s", effect.stream, effect.job, effect.epoch, effect.step, effect.text
                )
            case events.DeleteSlot(slot=slot):
                file = self._slots.pop(slot, None)
                if file is not None:
                    self._arena.delete(file)
            case events.DeleteParity(parity=parity):
                self._orders.delete_parity(parity)
            case events.CancelParity(job=job, epoch=epoch, step=step):
                cancel = self._parity_cancels.get((job, epoch, step))
                if cancel is not None:
                    cancel.set()
            case events.ReleaseRestore(conn=conn, batch_id=batch_id):
                self._orders.release_restore(conn, batch_id)
            case events.VoidSlot(slot=slot) if self._arena.invalidate(self._slots[slot]):
                return events.SlotReady(slot=slot)
            case events.VoidSlot():
                self._spawn(self._void(effect))
            case events.SealSlot(slot=slot) if self._slots[slot].file_bytes <= SEALED_AT_ONCE_BYTES:
                return self._seal(effect)
            case events.SealSlot():
                self._begin(self._sealing, self._seal, effect)
            case events.BuildParity(protect=protect) if not self._orders.has_part(protect):
                return self._build_parity(threading.Event(), effect)
            case events.BuildParity(protect=protect):
                cancel = self._parity_cancels[protect.job, protect.epoch, protect.step] = threading.Event()
                self._begin(self._working, partial(self._build_parity, cancel), effect)
            case events.ServeRestore():
                self._begin(self._restoring, self._serve_restore, effect)
            case events.CreateSlot():
                self._begin(self._working, self._create, effect)
            case events.RebuildObject():
                self._begin(self._working, self._rebuild, effect)
            case events.PersistSlots():
                self._begin(self._working, self._persist, effect)
            case events.SealPersisted():
                self._begin(self._working, self._seal_persisted, effect)
            case _:
                raise AssertionError(f"no such order: {effect}")
        return None

    def _report(self, message: Any) -> None:
        if message.HasField("heartbeat"):
            for name, value in self._counters.items():
                message.heartbeat.counters[name] += value
            message.heartbeat.arena_bytes = self._arena.used_bytes
            message.heartbeat.budget_bytes = self._arena.budget_bytes
            message.heartbeat.resident_bytes = _resident_bytes()
        elif message.HasField("sealed") or message.HasField("parity_built"):
            failpoint("daemon.before_report")
        self._link.send(message)

    async def _void(self, order: events.VoidSlot) -> None:
        pause = LEASE_RETRY_S
        while not self._arena.invalidate(self._slots[order.slot]):
            await asyncio.sleep(pause)
            pause = min(pause * 1.1, LEASE_RETRY_MAX_S)  # a tool may hold it for an hour
        self._handle(events.SlotReady(slot=order.slot))

    # ---------------------------------------------------------------- work in threads

    def _begin(self, pool: ThreadPoolExecutor, work: Callable[[OrderT], events.Event], order: OrderT) -> None:
        """Have an order worked off in a thread; what it returns is the next event."""
        loop = self._loop
        assert loop is not None
        pool.submit(work, order).add_done_callback(lambda future: loop.call_soon_threadsafe(self._end, future))

    def _end(self, future: Future[events.Event]) -> None:
        if self._stopping or future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._handle(future.result())
        else:
            self._fail(error)

    def _create(self, order: events.CreateSlot) -> events.Event:
        try:
            file = self._orders.create_slot(order)
        except SnapshotdError as error:
            return events.SlotRefused(slot=order.slot, reason=str(error))
        self._slots[order.slot] = file
        return events.SlotCreated(slot=order.slot, path=str(file.path))

    def _seal(self, order: events.SealSlot) -> events.Event:
        try:
            sealed = self._orders.seal(self._slots[order.slot], order.ref, order.known)
        except (SnapshotdError, OSError) as error:
            return events.SlotSealFailed(slot=order.slot, reason=str(error))
        return events.SlotSealed(
            slot=order.slot, ref=sealed.ref, data_digest=sealed.data_digest, seconds=sealed.seconds
        )

    def _build_parity(self, cancel: threading.Event, order: events.BuildParity) -> events.Event:
        job, epoch, step = order.protect.job, order.protect.epoch, order.protect.step
        began = time.monotonic()
        try:
            parities = self._orders.build_parity(order.protect, cancel)
        except (SnapshotdError, OSError) as error:
            return events.ParityAborted(job=job, epoch=epoch, step=step, reason=str(error))
        finally:
            if self._parity_cancels.get((job, epoch, step)) is cancel:  # not ordered again meanwhile
                del self._parity_cancels[job, epoch, step]
        seconds = time.monotonic() - began
        return events.ParityFinished(job=job, epoch=epoch, step=step, parities=tuple(parities), seconds=seconds)

    def _rebuild(self, order: events.RebuildObject) -> events.Event:
        done, file = self._orders.rebuild(order.rebuild)
        if file is not None:
            self._slots[order.slot] = file
        return events.RebuildFinished(done=done, slot=order.slot if file is not None else None)

    def _persist(self, order: events.PersistSlots) -> events.Event:
        return events.PersistFinished(done=self._orders.persist(order.persist))

    def _seal_persisted(self, order: events.SealPersisted) -> events.Event:
        return events.PersistSealFinished(done=self._orders.seal_persisted(order.seal))

    def _serve_restore(self, order: events.ServeRestore) -> events.Event:
        frame = self._orders.serve_restore(order.conn, order.rank, order.world_size, order.plan, order.frame)
        return events.RestoreServed(conn=order.conn, frame=frame)

    # ---------------------------------------------------------------- tasks

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A bug of ours. The slots outlive this process: the next daemon re-attaches and verifies them."""
        if self.fatal is not None and not self.fatal.done():
            log.critical("the daemon failed in a way that is a bug", exc_info=error)
            self.fatal.set_exception(error)


def _resident_bytes() -> int:
    """This process's own memory: slots and parity, which are shared, are in the arena's account."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE))
    return sum(map(int, found.values())) * 1024
