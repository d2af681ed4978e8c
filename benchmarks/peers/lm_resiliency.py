"""LM-Resiliency: copies in the worker's own memory, and with two ranks whole copies in the other one's."""

from __future__ import annotations

import signal
from typing import Any

from .system import Setting, System

__all__ = ["systems"]


def systems(setting: Setting) -> list[System]:
    return [Gemini(setting)]


class Gemini(System):
    """On CUDA its copy runs beside training; on host tensors it is synchronous."""

    def __init__(self, setting: Setting) -> None:
        from lm_resiliency.checkpointing import InMemoryCheckpointManager, InMemoryCkptConfig

        self.name = "LM-Resiliency" + (", pairwise copies" if setting.world > 1 else "")
        self.outlives = "node" if setting.world > 1 else "nothing"
        self.lacks = "digest" if setting.world > 1 else "digest, redundancy, memory outside the worker"
        self._training = setting.training
        self._replicated = setting.world > 1
        config = InMemoryCkptConfig(
            replication_jump=1,
            disk_flush_interval=0,
            disk_folder=str(setting.home / "lm"),
            run_id="bench",
            pin_memory=False,
        )
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._manager = InMemoryCheckpointManager(config)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def save(self, step: int) -> None:
        self._manager.save_tensors(self._training.tensors, step + 1)

    def complete(self) -> None:
        if self._replicated:
            thread: Any = self._manager._completion_thread
            if thread is not None:
                thread.join()
            replicator = self._manager._replicator
            for thread in (replicator._send_thread, replicator._recv_thread):
                if thread is not None:
                    thread.join()

    def drain(self) -> None:
        self._manager.finalize_replication()

    def close(self) -> None:
        self._manager._disarm_exit_flush()
