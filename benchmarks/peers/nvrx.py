"""
NVIDIA Resiliency Extension: local checkpoints, files in tmpfs; with replicas, whole copies among a clique of ranks.

It wants CUDA tensors. Two shims let it work on host memory and add nothing to its time: its check that tensors are
CUDA's is not made, and waiting for the device returns. Where the save goes on behind training it must own what it
writes, so there the copy to the host is a clone.
"""

from __future__ import annotations

import multiprocessing.connection
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .system import Setting, System

__all__ = ["systems"]


def systems(setting: Setting) -> list[System]:
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    if setting.world > 1:
        return [Local(setting, "NVRx local checkpoint, replicated")]
    return [Local(setting, "NVRx local checkpoint"), LocalAsync(setting, "NVRx local checkpoint, async")]


class Local(System):
    def __init__(self, setting: Setting, name: str) -> None:
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

        self.name = name
        self.lacks = "digest" if setting.world > 1 else "digest, redundancy"
        self.outlives = "node" if setting.world > 1 else "worker"
        self._training = setting.training
        strategy = None
        if setting.world > 1:
            strategy = CliqueReplicationStrategy.from_replication_params(1, setting.world)
        directory = setting.home / type(self).__name__
        self._manager = LocalCheckpointManager(str(directory), repl_strategy=strategy)

    def _state(self) -> Any:
        from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import BasicTensorAwareStateDict

        training = self._training
        state = BasicTensorAwareStateDict.__new__(BasicTensorAwareStateDict)
        live = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
        state.state_dict = _rebuilt(live, lambda tensor: tensor)  # it changes the containers that it is given
        state._is_hollow = False
        return state

    def save(self, step: int) -> None:
        self._manager.save(self._state(), step)


class LocalAsync(Local):
    def __init__(self, setting: Setting, name: str) -> None:
        super().__init__(setting, name)
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import TemporalAsyncCaller

        self._caller = TemporalAsyncCaller()
        self._caller.rank = dist.get_rank() if dist.is_initialized() else 0
        self._request: Any = None

    def save(self, step: int) -> None:
        state = self._state()
        state.state_dict = _rebuilt(state.state_dict, lambda tensor: tensor.detach().clone())
        self._request = self._manager.save(state, step, is_async=True)
        self._caller.schedule_async_call(self._request.freeze())

    def drain(self) -> None:
        if self._request is not None:
            self._caller.is_current_async_call_done(blocking=True, no_dist=True)
            for finalize in self._request.finalize_fns:
                finalize()
            self._request = None

    def complete(self) -> None:
        process = self._caller.process
        if process is not None:
            multiprocessing.connection.wait([process.sentinel])


def _rebuilt(tree: Any, of_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested dicts and lists, new ones, with what `of_tensor` makes of each tensor."""
    if isinstance(tree, dict):
        return {key: _rebuilt(value, of_tensor) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rebuilt(value, of_tensor) for value in tree]
    return of_tensor(tree) if isinstance(tree, torch.Tensor) else tree
