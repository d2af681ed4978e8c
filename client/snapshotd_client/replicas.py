"""
What tells whether replicas are equal: a digest of all values that ranks hold several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash

from snapshotd_client.device import CopyStream

__all__ = ["ReplicaDigest"]


class ReplicaDigest:
    """
    The digest of ``tensors`` in their order, those in host memory first.

    Made behind the copies of a step: what lies on a device is only issued then, on its stream of ``streams``, and ready
    once a later mark is reached; host memory is read at once.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], streams: Mapping[str, CopyStream]) -> None:
        on_device: dict[str, list[torch.Tensor]] = {}
        on_host: list[torch.Tensor] = []
        for tensor in tensors:
            if tensor.numel():
                (on_host if tensor.is_cpu else on_device.setdefault(str(tensor.device), [])).append(tensor)
        self._sums = [streams[name].sums(some) for name, some in on_device.items()]
        self._digest = xxhash.xxh3_128()
        for tensor in on_host:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._digest.update(raw.numpy().tobytes() if raw.numel() < 4096 else raw.numpy().data)

    def hexdigest(self) -> str:
        """Return it, once."""
        for sums in self._sums:
            self._digest.update(sums.numpy().data)
        return self._digest.hexdigest()
