"""
The hook: captures the training state after each step, and brings it back.

Rule 1: nothing raises out of ``capture``; what goes wrong is counted, said once, and training goes on.
Rule 2: nothing in ``capture`` or the fence waits for the daemon.
Rule 3: in a forked child (a DataLoader worker) everything here is inert.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from snapshotd.failpoints import failpoint
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.binding import Binding
from snapshotd_client.counters import Counters, Warner, logger
from snapshotd_client.device import CopyStream, stream_for
from snapshotd_client.fence import Fence
from snapshotd_client.inventory import Inventory, Reading, check_expressible
from snapshotd_client.link import Link
from snapshotd_client.pipeline import Job, Pipeline
from snapshotd_client.plan import Plan
from snapshotd_client.restore import Restorer
from snapshotd_client.settings import Settings
from snapshotd_client.sharing import Sharing

__all__ = ["Snapshotter"]

_CLOSE_S = 10.0
_COPY_THREADS = 4
"""At most, where nobody says how many: more rarely copy faster."""
_DEBUG_WAIT_S = 5.0
_RELEASE_S = 5.0


class Snapshotter:
    """
    Keeps every training step in memory that outlives this process, and restores from it.

    ``model``: a Module, or a list or dict of them; plain, DDP or FSDP2 (fully_shard), any DTensor parameters.
    ``optimizer``: an Optimizer, or a list or dict; also any object with .param_groups, .state and .step.
    ``scheduler``: one or several; ``scaler``: a GradScaler; ``extra``: a dict of name to anything with
    state_dict/load_state_dict, tensors, NumPy arrays, or JSON values.

    Wrong arguments, and state that cannot be kept, raise TypeError or ValueError here. Call ``restore`` once before the
    loop and ``capture`` after each optimizer step, both from the training thread.
    """

    def __init__(
        self,
        model: object,
        optimizer: object = None,
        scheduler: object = None,
        scaler: object = None,
        extra: Mapping[str, Any] | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        self.settings = Settings.from_environment() if settings is None else settings
        self._inventory = Inventory(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            extra=extra,
            world_size=self.settings.world_size,
        )
        check_expressible(self._inventory)
        _check_only_one(self.settings)
        self._pid = os.getpid()
        self._inert = False
        self._closed = False
        self._failed = False
        self._counters = Counters()
        self._warner = Warner()
        self._capture_every = 1
        self._split = True
        self._plan: Plan | None = None
        self._binding: Binding | None = None
        self._last_step = -1
        self._first_step = 0
        self._unfenced = 0  # captures since an update was announced
        self._was_welcome = False
        self._last_restore: dict[str, Any] = {}
        self._streams: dict[str, CopyStream] = {}  # by device, made when its first tensor is seen
        self._link = Link(self.settings.socket, _hello(self.settings), self)
        self._pipeline = Pipeline(
            link=self._link,
            counters=self._counters,
            warner=self._warner,
            copy_threads=self.settings.copy_threads or min(_COPY_THREADS, torch.get_num_threads()),
            streams=self._streams,
            compare=self.settings.debug_copy,
        )
        self._fence = Fence([view.optimizer for view in self._inventory.optimizers], self.fence)
        self._steady = threading.RLock()  # held while a capture takes the tensors' addresses, and while memory moves
        self._sharing = Sharing(self._memory_moves)
        self._link.start()
        self._pipeline.start()
        _alive.add(self)
        if unseen := self._inventory.unseen():
            self._warner.warn(
                "unseen",
                f"snapshotd: {', '.join(unseen[:5])}: tensors outside the optimizer's .state are not captured; "
                "pass what has to survive as extra",
            )

    # ------------------------------------------------------------------ what users call

    def restore(self, start: str | os.PathLike[str] | None = None) -> int:
        """
        Load the newest state that can be had, and return the step to go on with: 0 on a fresh job.

        ``start`` (default: SNAPSHOTD_START) is a universal checkpoint for a fresh job to begin with; a job that has a
        snapshot of its own never looks at it. The step is then the one after the checkpoint's, or 0 where it has
        weights only.

        Waits for the daemon's decision. StateLost (exit code 6) when the state is lost for good, RestoreError when it
        does not fit this model or ranks disagree, UsageError or CorruptionError when ``start`` does not fit or is
        broken; they all mean that training must not go on.
        """
        if self._inert or self._closed:
            return 0
        path = self.settings.start if start is None else os.fspath(start)
        restorer = Restorer(self._inventory, self._link, self.settings, path)
        try:
            outcome = restorer.run()
        except BaseException:
            self._failed = True
            raise
        self._last_restore = outcome.facts
        self._last_step = outcome.first_step - 1
        self._first_step = outcome.first_step
        if outcome.first_step > 0:
            self._register_early()
        return outcome.first_step

    def capture(self, step: int) -> None:
        """
        Keep the state after optimizer step ``step``. Returns at once; the copy is finished before the next update.

        Never raises. Steps must grow; a step that cannot be kept is counted in ``stats``.
        """
        if self._inert or self._closed:
            return
        try:
            if not self._accept(step):
                return
            failpoint("client.capture")
            self._finish_reading()
            begun = time.perf_counter_ns()
            with self._steady:
                self._capture(step)
            self._counters.add("prepare_ns", time.perf_counter_ns() - begun)
        except Exception as error:  # Rule 1
            self._counters.add("errors")
            self._warner.warn(f"capture:{type(error).__name__}", f"step {step} was not captured: {error}")
            skip = pb.Skip(step=step, reason=pb.Skip.REASON_ERROR, detail=f"{type(error).__name__}: {error}"[:500])
            self._link.post(pb.Frame(skip=skip), self._link.session)

    def fence(self) -> None:
        """
        Wait until nothing reads the state any more. The optimizers' ``step`` does this by itself.

        Call it before you change parameters or optimizer state in any other way, such as by a CUDA graph that has an
        optimizer's ``step`` in it: before each ``replay``.
        """
        if not self._inert and not self._finish_reading():
            self._unfenced = 0

    def release(self) -> None:
        """
        Let go of all tensors, once the last capture is copied; one that finds no slot for some seconds is given up.

        What was captured is held from one capture to the next. Call this before you move state elsewhere and count on
        its memory, as where a device is lent out between two phases of training. The next capture looks at everything
        anew.
        """
        if self._inert or self._closed:
            return
        with self._steady:
            self._pipeline.wait(_RELEASE_S)
            self._pipeline.drain()
            self._binding = None
            self._inventory.forget()

    def _finish_reading(self) -> bool:
        """Fence; return whether an accelerator only records what is issued now."""
        recording = any(stream.recording() for stream in self._streams.values())
        self._pipeline.fence(recording=recording)
        binding = self._binding
        if binding is not None:
            binding.let_go(self._inventory.forget_moving())
        return recording

    def wait(self, timeout_s: float | None = None) -> bool:
        """
        Wait until the last capture is skipped, or is the daemon's and outlives this process.

        False when time ran out, or at once when the daemon went away before it had it. Training needs not call this.
        """
        return True if self._inert else self._pipeline.wait(timeout_s)

    def close(self) -> None:
        """Finish the last capture and tell the daemon that this worker is done. Happens at a normal exit by itself."""
        self._close(finished=True)

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start: captured, sealed, skipped (by reason), torn, reconnects, stall_ns, copy_ns, ..."""
        return self._counters.snapshot()

    @property
    def extra(self) -> Mapping[str, Any]:
        """The user's ``extra``, as restored."""
        return self._inventory.extras.values

    @property
    def last_restore(self) -> dict[str, Any]:
        """What ``restore`` did: kind, step, reason, lost_steps, fetch_s, load_s, ..."""
        return dict(self._last_restore)

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._close(finished=kind is None)

    # ------------------------------------------------------------------ what the link tells us (on its thread)

    def on_welcome(self, welcome: pb.WorkerWelcome, session: int) -> None:
        self._capture_every = max(1, welcome.capture_every)
        if self._warner.over("away"):
            logger.warning("snapshotd: the daemon is back; steps are captured again")
        if self._was_welcome:
            self._counters.add("reconnects")
        self._was_welcome = True
        plan = self._plan
        if plan is not None:
            self._pipeline.register(plan, session)

    def on_frame(self, frame: pb.Frame, session: int) -> None:
        match frame.WhichOneof("body"):
            case "grant":
                self._pipeline.on_grant(frame.grant, session)
            case "layout_reply":
                self._pipeline.on_layout_reply(frame.request_id, frame.layout_reply)
            case "replica_mode":
                self._on_replica_mode(frame.replica_mode)
            case "error":
                self._warner.warn(f"error:{frame.error.code}", f"snapshotd: the daemon says {frame.error.message}")
            case _:
                pass  # of a newer daemon, or an answer that nobody waits for any more

    def on_lost(self, reason: str, was_welcome: bool) -> None:
        self._pipeline.on_lost()
        if was_welcome:
            self._counters.add("outages")
        self._warner.warn("away", f"snapshotd: no daemon, steps are not captured until one is there: {reason}")

    def on_refused(self, error: pb.WorkerError) -> None:
        self._pipeline.on_lost()
        message = f"snapshotd: the daemon will not serve this worker: {error.message} ({error.code})"
        self._warner.warn("refused", message)

    # ------------------------------------------------------------------ inside

    def _accept(self, step: object) -> bool:
        if type(step) is not int or step < 0:
            self._counters.add("bad_step")
            self._warner.warn("bad_step", f"snapshotd: capture() needs the step as an int from 0 on, not {step!r:.60}")
            return False
        if step <= self._last_step:
            self._counters.add("bad_step")
            message = f"snapshotd: capture({step}) came after step {self._last_step}: steps must grow; it is ignored"
            self._warner.warn("bad_step", message)
            return False
        self._last_step = step
        return step % self._capture_every == 0

    def _capture(self, step: int) -> None:
        session = self._link.session
        if session == 0:
            self._pipeline.away(step)
            return
        binding, meta = self._prepare(step)
        if not self._pipeline.is_registered(binding.plan, session):
            self._pipeline.register(binding.plan, session)
        job = Job(step, binding, meta, self._wants_digest(step), session)
        job.marks = [(stream, stream.mark_compute()) for stream in self._streams.values()]
        self._pipeline.submit(job)
        if job.marks and self._unfenced:
            self._hold()
        self._unfenced += 1
        self._counters.add("captured")
        if self.settings.debug_copy:
            self._pipeline.wait(_DEBUG_WAIT_S)

    @contextmanager
    def _memory_moves(self, begin: int, end: int) -> Iterator[None]:
        """Another thread, or this one, moves host memory: after the capture that reads it, and before the next."""
        binding = self._binding
        if self._inert or binding is None or not binding.reads(begin, end):
            yield
            return
        with self._steady:
            self._pipeline.fence()
            yield

    def _hold(self) -> None:
        """
        Let the device finish this capture before all that comes: since the last one no update was announced.

        A CUDA graph with an optimizer's step in it calls nobody, and leaves no trace in the tensors' versions.
        """
        self._pipeline.hold()
        if self._unfenced > 1:  # a GradScaler leaves out a step now and then
            self._warner.warn(
                "unfenced",
                "snapshotd: no optimizer step called the fence between captures, as where a CUDA graph has it: the "
                "device waits for each copy now; call fence() before each replay, and they overlap",
            )

    def _prepare(self, step: int) -> tuple[Binding, list[bytes]]:
        """Return this step's tensors, bound to a plan that fits them, and its meta."""
        reading, changed = self._inventory.read()
        meta = self._meta(reading, step)
        binding = self._binding
        if binding is not None and not changed and self._has_room(binding.plan, meta):
            if binding.bind(reading.lasting, reading.sync):
                return binding, meta
            reading = self._inventory.rescan()
            meta = self._meta(reading, step)
        plan = self._inventory.plan(reading, sum(map(len, meta)), self.settings.rank, self._split)
        binding = Binding(plan)
        if not binding.bind(reading.lasting, reading.sync):
            raise RuntimeError("the state changed while it was looked at")
        for leaf in reading.leaves:
            device = leaf.tensor.device
            if device.type != "cpu" and str(device) not in self._streams:
                self._streams[str(device)] = stream_for(device)
        self._plan, self._binding = plan, binding
        self._counters.add("layouts")
        return binding, meta

    def _has_room(self, plan: Plan, meta: list[bytes]) -> bool:
        begin, end = plan.layout.meta
        return self._plan is plan and sum(map(len, meta)) <= end - begin

    def _meta(self, reading: Reading, step: int) -> list[bytes]:
        settings = self.settings
        return reading.meta(step, settings.rank, settings.world_size, settings.epoch)

    def _register_early(self) -> None:
        """After a restore the layout is known: let the daemon make its slots before the first step is done."""
        try:
            session = self._link.session
            if session:
                binding, _ = self._prepare(self._last_step)
                self._pipeline.register(binding.plan, session)
        except Exception as error:  # the first capture tries again and says what is wrong
            logger.debug("the layout could not be registered early: %s", error)

    def _wants_digest(self, step: int) -> bool:
        """Whether replicas are compared now: at the 1st to 4th capture, powers of two, and every 256th."""
        if not self._split:
            return False
        nth = (step - self._first_step) // self._capture_every + 1
        return nth <= 4 or nth & (nth - 1) == 0 or nth % 256 == 0

    def _on_replica_mode(self, mode: pb.ReplicaMode) -> None:
        if mode.split == self._split:
            return
        self._split = mode.split
        self._plan = None  # the next capture makes a new one
        if not mode.split:
            self._warner.warn(
                "replicas",
                f"snapshotd: each rank keeps all of its replicated state from now on, because {mode.reason}",
            )

    def _close(self, finished: bool) -> None:
        if self._inert or self._closed:
            return
        self._closed = True
        _alive.discard(self)
        self._fence.remove()
        self._pipeline.close(_CLOSE_S)
        self._sharing.remove()  # the last copy may have been running
        self._link.close(pb.Frame(goodbye=pb.Goodbye(finished=finished and not self._failed)))
        self._binding = self._plan = None

    def _abandon_in_child(self) -> None:
        self._inert = True
        self._link.abandon_in_child()


def _hello(settings: Settings) -> pb.WorkerHello:
    return pb.WorkerHello(
        protocol=1,
        job=settings.job,
        rank=settings.rank,
        world_size=settings.world_size,
        local_rank=settings.local_rank,
        local_world_size=settings.local_world_size,
        epoch=settings.epoch or 0,
        formation=settings.formation,
        nonce=settings.nonce,
        pid=os.getpid(),
    )


def _check_only_one(settings: Settings) -> None:
    """Raise ValueError where another Snapshotter would be taken for this one: the daemon has one worker per rank."""
    mine = (settings.socket, settings.job, settings.rank)
    if any(mine == (one.settings.socket, one.settings.job, one.settings.rank) for one in _alive if not one._inert):
        raise ValueError(
            f"this process has a Snapshotter of job {settings.job}, rank {settings.rank}, already: give one of them "
            "all models and optimizers, as lists or dicts; or call the other one's close() first"
        )


_alive: weakref.WeakSet[Snapshotter] = weakref.WeakSet()


def _close_all() -> None:
    # An exception that ended the script has left its traces by now; its state must not count as finished.
    failed = getattr(sys, "last_type", None) is not None
    for snapshotter in list(_alive):
        snapshotter._close(finished=not failed)


def _abandon_all() -> None:
    for snapshotter in list(_alive):
        snapshotter._abandon_in_child()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
