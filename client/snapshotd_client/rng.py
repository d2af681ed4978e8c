"""
The random number generators that training draws from: Python, NumPy's global one, torch CPU, and the accelerators.

All states are small and go into the step's JSON. Accelerators are counted by position among those that the model uses,
so that a rank finds its own again on another machine.
"""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["accelerators_of", "rng_json", "set_rng"]


def accelerators_of(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Return the accelerator devices on which ``tensors`` lie, in a stable order."""
    found = {(t.device.type, t.device.index or 0) for t in tensors if t.device.type not in ("cpu", "meta")}
    return [torch.device(kind, index) for kind, index in sorted(found)]


def rng_json(devices: Iterable[torch.device]) -> dict[str, Any]:
    """Return the state of all generators as JSON."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy[:5]
    data: dict[str, Any] = {
        "python": [version, _b64(struct.pack(f"<{len(words)}Q", *words)), gauss],
        "torch": _b64(torch.get_rng_state().numpy().tobytes()),
        "devices": [],
    }
    if kind == "MT19937":
        raw = np.asarray(keys, dtype="<u4").tobytes()
        data["numpy"] = [_b64(raw), int(position), int(has_gauss), float(cached).hex()]
    for device in devices:
        state = torch.get_device_module(device).get_rng_state(device)
        data["devices"].append([device.type, _b64(state.cpu().numpy().tobytes())])
    return data


def set_rng(data: dict[str, Any], devices: Iterable[torch.device]) -> None:
    """Set all generators to what ``rng_json`` gave. ValueError when it can't be that."""
    version, words, gauss = data["python"]
    raw = base64.b64decode(words)
    random.setstate((version, struct.unpack(f"<{len(raw) // 8}Q", raw), gauss))
    if "numpy" in data:
        keys, position, has_gauss, cached = data["numpy"]
        state = np.frombuffer(base64.b64decode(keys), dtype="<u4")
        np.random.set_state(("MT19937", state.astype(np.uint32), position, has_gauss, float.fromhex(cached)))
    torch.set_rng_state(_bytes_tensor(data["torch"]))
    for device, (kind, state_text) in zip(devices, data["devices"], strict=False):
        if device.type == kind:
            torch.get_device_module(device).set_rng_state(_bytes_tensor(state_text), device)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
