"""
The random number generators that training draws from: Python, NumPy's global one, torch CPU, and the accelerators.

All states are small and go into the step's JSON. Accelerators are counted by position among those that the model uses,
so that a rank finds its own again on another machine.
"""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from snapshotd_client.codec import dumps

__all__ = ["RngText", "accelerators_of", "set_rng"]


def accelerators_of(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Return the accelerator devices on which ``tensors`` lie, in a stable order."""
    found = {(t.device.type, t.device.index or 0) for t in tensors if t.device.type not in ("cpu", "meta")}
    return [torch.device(kind, index) for kind, index in sorted(found)]


class RngText:
    """
    The state of all generators as JSON text.

    Each generator's text is kept until it has drawn again: most are idle in most steps, and to write one out takes ten
    times longer than to look whether it is as before.
    """

    def __init__(self) -> None:
        self._texts: dict[str, tuple[Any, str]] = {}

    def read(self, devices: Iterable[torch.device]) -> str:
        """Return the text for now; ``set_rng`` takes what it says."""
        parts = [f'"python":{self._text("python", random.getstate(), _python_json)}']
        parts.append(f'"torch":{self._text("torch", torch.get_rng_state().numpy().tobytes(), _b64)}')
        found = []
        for number, device in enumerate(devices):
            state = torch.get_device_module(device).get_rng_state(device).cpu().numpy().tobytes()
            text = self._text(f"{device.type} {number}", state, _b64)
            found.append(f"[{dumps(device.type)},{text}]")
        parts.append(f'"devices":[{",".join(found)}]')
        legacy: Any = np.random.get_state(legacy=True)
        kind, keys, position, has_gauss, cached = legacy[:5]
        if kind == "MT19937":
            state = (keys.tobytes(), int(position), int(has_gauss), float(cached))
            parts.append(f'"numpy":{self._text("numpy", state, _numpy_json)}')
        return f"{{{','.join(parts)}}}"

    def _text(self, name: str, state: Any, form: Callable[[Any], Any]) -> str:
        known = self._texts.get(name)
        if known is None or known[0] != state:
            known = self._texts[name] = (state, dumps(form(state)))
        return known[1]


def set_rng(data: dict[str, Any], devices: Iterable[torch.device]) -> None:
    """Set the generators that ``data`` has, in the form of ``RngText``. ValueError when it can't be that."""
    if "python" in data:
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


def _python_json(state: Any) -> list[Any]:
    version, words, gauss = state
    return [version, _b64(struct.pack(f"<{len(words)}Q", *words)), gauss]


def _numpy_json(state: Any) -> list[Any]:
    keys, position, has_gauss, cached = state
    raw = np.frombuffer(keys, dtype=np.uint32).astype("<u4").tobytes()
    return [_b64(raw), position, has_gauss, cached.hex()]


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
