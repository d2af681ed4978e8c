"""
What is a DTensor, what is an FSDP module, without importing either: that takes half as long as torch itself.

Who has such an object has imported its class; where the class was never imported, nothing is one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["is_dtensor", "is_fsdp1", "is_fsdp2", "local_of"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether ``value`` is a DTensor."""
    if type(value) in _PLAIN:
        return False
    found = _loaded("torch.distributed.tensor", "DTensor")
    return found is not None and isinstance(value, found)


def is_fsdp2(module: torch.nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this very module."""
    # torch 2.4 and 2.5 had it in the second place.
    places = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    return any(found is not None and isinstance(module, found) for found in (_loaded(p, "FSDPModule") for p in places))


def is_fsdp1(module: torch.nn.Module) -> bool:
    """Whether this is the older wrapper, FullyShardedDataParallel."""
    found = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    return found is not None and isinstance(module, found)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that this rank holds of ``tensor``: itself, or a DTensor's local part."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
