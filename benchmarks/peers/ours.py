"""snapshotd itself, whole and with parts switched off; and the floor of them all: one bare copy, fenced."""

from __future__ import annotations

import json
import mmap
import threading
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .system import Setting, System

__all__ = ["systems"]

_POLL_S = 0.01
_WARM_STEPS, _WARM_STEP_S = 40, 2.0


def systems(setting: Setting) -> list[System]:
    found: list[System] = [Snapshots(setting, **place) for place in setting.places["clusters"]]
    return [*found, BareCopy(setting)] if setting.world == 1 else found


class Snapshots(System):
    """The hook, on a daemon that is there; complete when the coordinator has committed at `level`."""

    polls = True
    waits = False

    def __init__(
        self, setting: Setting, *, name: str, sockets: list[str], coordinator: str, level: str, lacks: str
    ) -> None:
        from snapshotd_client import Snapshotter
        from snapshotd_client.settings import Settings

        self.name, self.lacks = name, lacks
        self.outlives = "node" if level == "protected" else "worker"
        self._level = level
        self._step = -1
        self._status = _Status(coordinator)
        self._snapshots = Snapshotter(
            setting.training.model,
            setting.training.optimizer,
            settings=Settings(
                socket=sockets[setting.rank],
                job="bench",
                rank=setting.rank,
                world_size=setting.world,
                formation="bench",
            ),
        )
        self._snapshots.restore()
        self._warm_up()

    def save(self, step: int) -> None:
        self._step = step
        self._snapshots.capture(step)

    def fence(self) -> None:
        self._snapshots.fence()

    def drain(self) -> None:
        self.complete()

    def complete(self) -> None:
        deadline = time.monotonic() + 30
        while not self._status.committed(self._step, self._level):
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {self._step} was not committed: {self._snapshots.stats}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        self._snapshots.close()
        self._status.close()

    def _warm_up(self) -> None:
        """Until all ranks have slots: they are made when the first layout is registered."""
        for step in range(_WARM_STEPS):
            dist.barrier()
            self._snapshots.capture(step)
            self._snapshots.wait(_WARM_STEP_S)
            deadline = time.monotonic() + _WARM_STEP_S
            while not (committed := self._status.committed(step, self._level)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            everywhere = torch.tensor([int(committed)])
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            if everywhere.item():
                return
        raise TimeoutError(f"no step was committed at the start: {self._snapshots.stats}")


class _Status:
    """What the coordinator has committed."""

    def __init__(self, address: str) -> None:
        from snapshotd.rpc import open_channel
        from snapshotd.v1 import control_pb2, control_pb2_grpc

        self._channel = open_channel(address, tls=None, insecure=False)
        self._stub = control_pb2_grpc.CoordinatorServiceStub(self._channel)
        self._request = control_pb2.GetStatusRequest()

    def committed(self, step: int, level: str) -> bool:
        jobs = json.loads(self._stub.GetStatus(self._request, timeout=10).json)["jobs"]
        committed: dict[str, Any] = (jobs[0].get("committed") or {}) if jobs else {}
        return committed.get("step", -1) >= step and committed.get("level") in (level, "protected", "persisted")

    def close(self) -> None:
        self._channel.close()


class BareCopy(System):
    """A thread that copies each tensor into warm tmpfs memory, and a fence before the update: no less is possible."""

    name = "bare background copy"
    lacks = "everything but the copy"

    def __init__(self, setting: Setting) -> None:
        self._sources = [tensor.numpy() for tensor in setting.training.tensors]
        total = sum(-(-source.nbytes // 64) * 64 for source in self._sources)
        path = setting.home / "bare"
        with path.open("w+b") as file:
            file.truncate(total)
            memory = mmap.mmap(file.fileno(), total, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        whole = np.frombuffer(memory, dtype=np.uint8)
        self._targets, begin = [], 0
        for source in self._sources:
            part = whole[begin : begin + source.nbytes]
            self._targets.append(part.view(source.dtype).reshape(source.shape))
            begin += -(-source.nbytes // 64) * 64
        self._wanted, self._done = threading.Semaphore(0), threading.Event()
        self._done.set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def save(self, step: int) -> None:
        self._done.clear()
        self._wanted.release()

    def fence(self) -> None:
        self._done.wait()

    def complete(self) -> None:
        self._done.wait()

    def close(self) -> None:
        self._closing = True
        self._wanted.release()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closing:
                return
            for target, source in zip(self._targets, self._sources, strict=True):
                np.copyto(target, source)
            self._done.set()
