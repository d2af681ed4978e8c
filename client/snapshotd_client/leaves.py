"""
Leaves: tensors inside nested state. Each becomes a shard of its own, and JSON in its place says how to make it again.

A leaf's JSON: ``n`` name, ``t`` dtype, ``s`` (global) shape, ``d`` device type, ``g`` 1 requires_grad + 2 Parameter,
``l`` 1 when it lies as its parameter does, ``x`` placements when it is a DTensor, ``a`` 1 for a NumPy array.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from snapshotd_client.codec import INLINE_BYTES, Json
from snapshotd_client.dtensors import is_dtensor
from snapshotd_client.errors import CannotExpress
from snapshotd_client.models import Param, check_tensor

__all__ = ["Leaf", "LeafSink", "Names", "as_tensor", "leaf_names"]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One captured tensor: ``param`` is the parameter that it is state of, if any; ``sync``: see plan."""

    name: str
    kind: str
    tensor: torch.Tensor
    param: Param | None = None
    sync: bool = False


@dataclass(slots=True, eq=False)
class Names:
    """Gives each tensor a name that no other has; the same names for the same state, in the same order."""

    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> str:
        base, count = name, 1
        while name in self.used:
            count += 1
            name = f"{base}~{count}"
        self.used.add(name)
        return name


@dataclass(slots=True, eq=False)
class LeafSink:
    """Collects the leaves of one value; ``name`` makes a tensor's name of its path."""

    kind: str
    param: Param | None = None
    sync: bool = False
    inline_bytes: int = INLINE_BYTES
    name: Callable[[str], str] = str
    leaves: list[Leaf] = field(default_factory=list)

    def __call__(self, path: str, value: torch.Tensor | np.ndarray[Any, Any]) -> Json:
        is_array = isinstance(value, np.ndarray)
        tensor = as_tensor(value)
        try:
            check_tensor(path, tensor)
        except ValueError as error:
            raise CannotExpress(path, f"a tensor that cannot be captured ({error})") from error
        leaf = Leaf(self.name(path), self.kind, tensor, self.param, self.sync)
        self.leaves.append(leaf)
        data: dict[str, Json] = {
            "$": "leaf",
            "n": leaf.name,
            "t": str(tensor.dtype).removeprefix("torch."),
            "s": list(tensor.shape),
            "d": tensor.device.type,
        }
        if is_array:
            data["a"] = 1
        if flags := (2 if isinstance(tensor, nn.Parameter) else 0) + int(tensor.requires_grad):
            data["g"] = flags
        if is_dtensor(tensor):
            data["x"] = [_spell(placement) for placement in tensor.placements]
        if self.param is not None and _lies_like(tensor, self.param.tensor):
            data["l"] = 1
        return data


def as_tensor(value: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    """Return ``value`` as a tensor that shares its memory where that is possible."""
    if isinstance(value, torch.Tensor):
        return value
    if any(stride < 0 for stride in value.strides):
        value = value.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only arrays: nobody writes through this tensor
        return torch.from_numpy(value)


def leaf_names(data: Json) -> list[str]:
    """Return the names of all leaves in JSON that ``encode`` gave."""
    if isinstance(data, list):
        return [name for item in data for name in leaf_names(item)]
    if not isinstance(data, dict):
        return []
    if data.get("$") == "leaf":
        return [data["n"]]
    return [name for item in data.values() for name in leaf_names(item)]


def _lies_like(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    if tensor.dim() == 0 or tensor.shape != param.shape:
        return False
    if is_dtensor(tensor) and is_dtensor(param):
        return tuple(tensor.placements) == tuple(param.placements) and tensor.device_mesh == param.device_mesh
    return not is_dtensor(tensor) and not is_dtensor(param)


def _spell(placement: Any) -> str:
    if placement.is_replicate():
        return "R"
    if placement.is_partial():
        return "P"
    return f"S{placement.dim}"
