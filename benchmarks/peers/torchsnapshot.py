"""torchsnapshot: asynchronous snapshots into files in tmpfs."""

from __future__ import annotations

from typing import Any

from .system import Setting
from .torch_native import _Files

__all__ = ["systems"]


def systems(setting: Setting) -> list[Any]:
    return [AsyncTake(setting)]


class AsyncTake(_Files):
    name = "torchsnapshot async_take"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        import torchsnapshot

        self._take = torchsnapshot.Snapshot.async_take
        self._pending: Any = None

    def save(self, step: int) -> None:
        self._path_now = self._path(step)
        app_state = {"model": self._training.model, "optimizer": self._training.optimizer}
        self._pending = self._take(str(self._path_now), app_state)

    def complete(self) -> None:
        if self._pending is not None:
            self._pending.wait()

    def drain(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._keep(self._path_now)
