"""What comes with torch: torch.save, and torch.distributed.checkpoint in its forms, into tmpfs."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from .system import Setting, System

__all__ = ["systems"]


def systems(setting: Setting) -> list[System]:
    # DCP's process executor makes a group of its own, from these.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    return [
        TorchSave(setting),
        DcpSave(setting),
        DcpAsync(setting, "DCP async_save, thread"),
        DcpAsync(setting, "DCP async_save, process, shared memory", process=True),
    ]


class _Files(System):
    """Each save writes a new file or directory and then removes the one before, as scripts do that keep the newest."""

    lacks = "digest, redundancy"

    def __init__(self, setting: Setting) -> None:
        self._training = setting.training
        self._home = setting.home / type(self).__name__
        self._kept: Path | None = None

    def _state(self) -> dict[str, Any]:
        return {"model": self._training.model.state_dict(), "optimizer": self._training.optimizer.state_dict()}

    def _path(self, step: int) -> Path:
        self._home.mkdir(parents=True, exist_ok=True)
        return self._home / f"step-{step}"

    def _keep(self, path: Path) -> None:
        old, self._kept = self._kept, path
        if old is not None:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


class TorchSave(_Files):
    name = "torch.save"

    def save(self, step: int) -> None:
        path = self._path(step)
        with path.open("wb") as file:
            torch.save(self._state(), file)
        self._keep(path)


class DcpSave(_Files):
    name = "DCP save"

    def save(self, step: int) -> None:
        path = self._path(step)
        dcp.save(self._state(), checkpoint_id=path)
        self._keep(path)


class DcpAsync(_Files):
    """With a stager that is kept and reuses its memory, as its documentation advises."""

    def __init__(self, setting: Setting, name: str, *, process: bool = False) -> None:
        super().__init__(setting)
        self.name = name
        self._home = self._home.with_name(f"dcp-async-{'process' if process else 'thread'}")
        kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=process, use_async_staging=True, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)
        self._more = {"async_checkpointer_type": kind, "async_stager": self._stager}
        self._staged: Future[Any] | None = None
        self._done: Future[Any] | None = None
        self._path_now = self._home

    def save(self, step: int) -> None:
        self._path_now = self._path(step)
        answer: Any = dcp.async_save(self._state(), checkpoint_id=self._path_now, **self._more)
        self._staged, self._done = answer.staging_completion, answer.upload_completion

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def drain(self) -> None:
        if self._done is not None:
            self._done.result()
            self._done = None
            self._keep(self._path_now)

    def complete(self) -> None:
        done = self._done
        if done is not None:
            done.result()

    def close(self) -> None:
        self._stager.close()
