"""DLRover's flash checkpoint: a synchronous copy into one shared-memory buffer; with replicas, whole copies by gloo."""

from __future__ import annotations

import os
from pathlib import Path

from .system import Setting, System

__all__ = ["early", "systems"]

RUN = f"sb{os.getpid()}"
"""Names its shared memory and its sockets, whose paths must be short."""


def early(home: Path, rank: int, world: int) -> None:
    """It forks its saver: that must happen while this process has one thread."""
    os.environ.update(DLROVER_LOG_LEVEL="ERROR", TORCHELASTIC_RUN_ID=RUN, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(NODE_RANK=str(rank), NODE_NUM=str(world), GROUP_RANK=str(rank), GROUP_WORLD_SIZE=str(world))
    from dlrover.python.common import multi_process

    multi_process.SOCKET_TMP_DIR = str(home / "s")
    from dlrover.trainer.torch.flash_checkpoint import engine

    engine.CheckpointEngine.saver_proc = engine.start_saver_process()


def systems(setting: Setting) -> list[System]:
    return [Flash(setting)]


class Flash(System):
    def __init__(self, setting: Setting) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        replicated = setting.world > 1
        self.name = "DLRover flash checkpoint" + (" with replicas" if replicated else "")
        # Its restore from a replica makes the buffer and does not fill it (0.6.1): what it sends is not read again.
        self.outlives = "worker"
        self.lacks = "digest, second buffer" + ("" if replicated else ", redundancy")
        self._training = setting.training
        self._memory = StorageType.MEMORY
        self._segment = Path("/dev/shm") / RUN
        self._checkpointer = DdpCheckpointer(
            str(setting.home / "dlrover"),
            global_shard_num=setting.world,
            replica_count=setting.world if replicated else 0,
        )

    def save(self, step: int) -> None:
        training = self._training
        state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
        self._checkpointer.save_checkpoint(step + 1, state, storage_type=self._memory)

    def close(self) -> None:
        for path in self._segment.parent.glob(f"{self._segment.name}*"):
            path.unlink()
