"""
Sums over the bit patterns of tensors, on the device where they lie: replicas are compared without moving their bytes.

Rule 1: integers only, so that the order of the additions does not matter and the same bits give the same sums anywhere.
Rule 2: each element of a stretch counts times an odd number of its own, so that no single change, and no exchange of
two elements, leaves the sum (modulo 2**64) as it was. This finds accidents; it is no protection against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch

from snapshotd_client.arrays import carrier_dtype

__all__ = ["content_sums"]

_STRETCH: Final = 4 * 1024 * 1024
"""Elements; the products take eight bytes each."""


def content_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sums of all stretches of ``tensors`` (one device's) in order: int64, on that device, one dimension."""
    found = [
        (part * _weights(part.device)[: part.numel()]).sum()
        for tensor in tensors
        for part in _words(tensor).split(_STRETCH)
        if part.numel()
    ]
    return torch.stack(found) if found else torch.empty(0, dtype=torch.int64, device=tensors[0].device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as integers, flat."""
    words = tensor.detach().contiguous().view(carrier_dtype(tensor.element_size())).reshape(-1)
    return words if not words.is_complex() else torch.view_as_real(words).reshape(-1).view(torch.int64)


@lru_cache(maxsize=16)
def _weights(device: torch.device) -> torch.Tensor:
    ours = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randint(-(1 << 62), 1 << 62, (_STRETCH,), generator=ours, dtype=torch.int64, device="cpu")
    return (drawn * 2 + 1).to(device)
