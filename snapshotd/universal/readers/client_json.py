"""
The tagged JSON of the training hook, decoded without torch: plain values, and views for tensors.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TorchDType
from snapshotd.universal.views import View, stored_bytes

__all__ = ["decode"]

_MAX_DEPTH: Final = 200
_LISTS: Final = frozenset({"tuple", "deque", "slice", "range", "Size"})
_DICTS: Final = frozenset({"dict", "OrderedDict", "Counter", "defaultdict"})


def decode(data: Any, leaf: Callable[[Mapping[str, Any]], View], depth: int = 0) -> Any:
    """Return the value that ``data`` stands for; ``leaf`` gives the view of each tensor that is a shard."""
    if depth > _MAX_DEPTH:
        raise FormatError("the step's JSON is nested too deeply")
    if isinstance(data, list):
        return [decode(item, leaf, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    tag = data.get("$")
    if tag is None:
        return {key: decode(item, leaf, depth + 1) for key, item in data.items()}
    try:
        return _tagged(tag, data, leaf, depth)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise FormatError(f"the step's JSON has a {tag!r:.40} that makes no sense: {error!s:.100}") from error


def _tagged(tag: str, data: Mapping[str, Any], leaf: Callable[[Mapping[str, Any]], View], depth: int) -> Any:
    if tag == "leaf":
        return leaf(data)
    value = data["v"]
    if tag in _LISTS:
        return [decode(item, leaf, depth + 1) for item in value]
    if tag in _DICTS:
        return {_key(decode(k, leaf, depth + 1)): decode(v, leaf, depth + 1) for k, v in value}
    if tag in ("set", "frozenset"):
        return {_key(decode(item, leaf, depth + 1)) for item in value}
    if tag == "user":
        return {"$user": data["t"], "value": decode(value, leaf, depth + 1)}
    plain = _PLAIN.get(tag)
    if plain is None:
        raise FormatError(f"the step's JSON has the unknown tag {tag!r:.40}: it was written by a newer version")
    return plain(data)


def _key(value: Any) -> Any:
    return tuple(map(_key, value)) if isinstance(value, list) else value


def _array(data: Mapping[str, Any]) -> Any:
    dtype = np.dtype(data["t"]) if isinstance(data["t"], str) else None
    if dtype is None or dtype.kind not in "biufc":
        return {"$array": data["t"], "shape": data["s"], "data": data["v"]}
    raw = np.frombuffer(base64.b64decode(data["v"]), dtype).astype(dtype.newbyteorder("<"))
    return stored_bytes(raw.tobytes(), dtype.name, tuple(data["s"]))


def _scalar(data: Mapping[str, Any]) -> Any:
    dtype = np.dtype(data["t"])
    if dtype.hasobject:
        raise ValueError("an object")
    return np.frombuffer(base64.b64decode(data["v"]), dtype)[0].item()


_PLAIN: Final[dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "int": lambda data: int(data["v"], 16),
    "float": lambda data: struct.unpack("<d", bytes.fromhex(data["v"]))[0],
    "complex": lambda data: complex(*struct.unpack("<dd", bytes.fromhex(data["v"]))),
    "bytes": lambda data: base64.b64decode(data["v"]),
    "bytearray": lambda data: base64.b64decode(data["v"]),
    "BytesIO": lambda data: base64.b64decode(data["v"]),
    "path": lambda data: str(data["v"]),
    "dtype": lambda data: TorchDType(data["v"]),
    "device": lambda data: str(data["v"]),
    "npdtype": lambda data: str(data["v"]),
    "np": _scalar,
    "tensor": lambda data: stored_bytes(base64.b64decode(data["v"]), data["t"], tuple(data["s"])),
    "array": _array,
}
