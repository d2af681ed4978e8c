"""
snapshotd itself, whole and with parts switched off.

A state outlives the worker when `wait` has returned: the daemon has it, and recovery waits until it is hashed
(tests/daemon/test_handed_over.py kills a worker at that moment). It outlives the node when it is protected.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

from ..processes import BenchError, wait_for
from ..run import SETTLING_CAPTURES
from .bare_parts import BareParts
from .system import Setting, System

__all__ = ["systems"]

_JOB = "bench"
_POLL_S = 0.01
_COMMIT_S = 30.0
_WARM_STEPS, _WARM_STEP_S = 40, 2.0


def systems(setting: Setting) -> list[System]:
    ours: list[System] = [Snapshots(setting, **place) for place in setting.places["clusters"]]
    return [*ours, BareParts(setting)] if setting.places["bare"] else ours


class Snapshots(System):
    """The hook, on a daemon that is there, copying with as many threads as training has; `level`: what is committed."""

    waits = False

    def __init__(
        self, setting: Setting, *, name: str, sockets: list[str], coordinator: str, level: str, lacks: str
    ) -> None:
        from snapshotd_client import Snapshotter
        from snapshotd_client.settings import Settings

        self.name, self.lacks = name, lacks
        self.outlives = "node" if level == "protected" else "worker"
        self.polls = self.outlives == "node"
        self._level = level
        self._step, self._left_out = -1, 0
        self._status = _Status(coordinator)
        self._snapshots = Snapshotter(
            setting.training.model,
            setting.training.optimizer,
            settings=Settings(
                socket=sockets[setting.rank],
                job=_JOB,
                rank=setting.rank,
                world_size=setting.world,
                formation="bench",
                copy_threads=torch.get_num_threads(),
            ),
        )
        self._snapshots.restore()
        self._warm_up()

    def ready(self) -> None:
        """
        Once the daemon has granted a slot, which it does when it hears of the commit before.

        It hears of it later than we do where others have its core. Training would leave that step out and keep the
        next; a round has one.
        """
        wait_for(lambda: self._snapshots._pipeline._grants, "a slot for the next step", _COMMIT_S)

    def save(self, step: int) -> None:
        self._step = step
        self._left_out = self._snapshots.stats["skipped"]
        self._snapshots.capture(step)

    def fence(self) -> None:
        self._snapshots.fence()

    def drain(self) -> None:
        """Until the commit, known here by the slot that it frees: to ask the coordinator would be part of the step."""
        if self._snapshots.stats["skipped"] > self._left_out:
            raise BenchError(f"step {self._step} was left out: {self._snapshots.stats}")
        self.ready()

    def complete(self) -> None:
        if self.outlives == "node":
            self._await_commit()
        else:
            self._snapshots.wait()

    def _await_commit(self) -> None:
        deadline = time.monotonic() + _COMMIT_S
        while not self._status.committed(self._step, self._level):
            stats = self._snapshots.stats
            if stats["skipped"] > self._left_out:
                raise BenchError(f"step {self._step} was left out: {stats}")
            if time.monotonic() > deadline:
                raise BenchError(f"step {self._step} was not committed: {stats}; {self._status.job()}")
            time.sleep(_POLL_S)

    def close(self) -> None:
        self._snapshots.close()
        self._status.close()

    def _warm_up(self) -> None:
        """Until all ranks have slots (made when the first layout is registered), and copy in their best way."""
        for step in range(_WARM_STEPS):
            dist.barrier()
            self._snapshots.capture(step)
            self._snapshots.wait(_WARM_STEP_S)
            deadline = time.monotonic() + _WARM_STEP_S
            while not (committed := self._status.committed(step, self._level)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            everywhere = torch.tensor([int(committed)])
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            if everywhere.item() and step >= SETTLING_CAPTURES:
                return
        raise BenchError(f"no step was committed at the start: {self._snapshots.stats}; {self._status.job()}")


class _Status:
    """What the coordinator has committed of one job."""

    def __init__(self, address: str) -> None:
        from snapshotd.rpc import open_channel
        from snapshotd.v1 import control_pb2, control_pb2_grpc

        self._channel = open_channel(address, tls=None, insecure=False)
        self._stub = control_pb2_grpc.CoordinatorServiceStub(self._channel)
        self._request = control_pb2.GetStatusRequest()

    def job(self) -> dict[str, Any]:
        jobs = json.loads(self._stub.GetStatus(self._request, timeout=10).json)["jobs"]
        return next((job for job in jobs if job["job"] == _JOB), {})

    def committed(self, step: int, level: str) -> bool:
        committed: dict[str, Any] = self.job().get("committed") or {}
        return committed.get("step", -1) >= step and committed.get("level") in (level, "protected", "persisted")

    def close(self) -> None:
        self._channel.close()
