"""
Runs a function before each update of any of some optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Fence"]


class Fence:
    """
    ``run`` is called before each ``step`` of ``optimizers``, until ``remove``.

    Real optimizers have a hook for it; of anything else the instance's ``step`` is wrapped.
    """

    def __init__(self, optimizers: Sequence[Any], run: Callable[[], None]) -> None:
        self._undo: list[Callable[[], None]] = []
        for optimizer in optimizers:
            self._undo.append(_hook(optimizer, run) or _wrap(optimizer, run))

    def remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()


def _hook(optimizer: Any, run: Callable[[], None]) -> Callable[[], None] | None:
    # A wrapper that is an Optimizer by class, but never called its __init__, has no hooks that anybody would run.
    if not isinstance(optimizer, torch.optim.Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
        return None
    if not getattr(type(optimizer).step, "hooked", False):
        return None
    handle = optimizer.register_step_pre_hook(lambda *args: run())
    return handle.remove


def _wrap(optimizer: Any, run: Callable[[], None]) -> Callable[[], None]:
    original = optimizer.step
    had_own = "step" in vars(optimizer)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        run()
        return original(*args, **kwargs)

    optimizer.step = step

    def undo() -> None:
        if vars(optimizer).get("step") is step:
            if had_own:
                optimizer.step = original
            else:
                del optimizer.step

    return undo
