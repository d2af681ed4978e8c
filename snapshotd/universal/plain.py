"""
Plain values: whatever stood in a checkpoint beside the tensors, as JSON and back.

Strings, finite numbers, booleans, None, lists and dicts with string keys are themselves; tuples become lists. The rest
is an object with one key that begins with ``$``: ``$items`` (a dict with other keys, or keys with ``$``), ``$float``
(nan, inf), ``$bytes`` (base64), ``$set``, ``$complex``, ``$dtype``, ``$tensor`` (the name of a tensor of kind "extra"),
``$object`` (a framework's object: class, arguments, fields).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.universal.globals import NumpyArray, NumpyDType, TensorRef, TorchDType
from snapshotd.universal.standins import Global, Record
from snapshotd.universal.state import Tensor
from snapshotd.universal.views import View, stored_bytes

__all__ = ["from_json", "to_json"]

_MAX_DEPTH: Final = 200
_MAX_NODES: Final = 20_000_000
_OBJECT_KEYS: Final = frozenset({"$object", "args", "fields", "member", "state"})


def to_json(value: Any, name: str, tensors: list[Tensor] | None = None) -> Any:
    """
    Return ``value`` as JSON values. Tensors in it are put on ``tensors``, named after their path below ``name``.

    FormatError for structures that are too deep or contain themselves, and for tensors where ``tensors`` is None.
    """
    return _Encoder(tensors).encode(value, name, 0)


class _Encoder:
    def __init__(self, tensors: list[Tensor] | None) -> None:
        self.tensors = tensors
        self.nodes = 0

    def encode(self, value: Any, name: str, depth: int) -> Any:
        self.nodes += 1
        if depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise FormatError(f"{name:.200} is too deep or too large for JSON, or contains itself")
        if isinstance(value, TorchDType):
            return {"$dtype": str(value)}
        if value is None or isinstance(value, (bool, str, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, (list, tuple)):
            return [self.encode(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            return self._mapping(value, name, depth)
        if isinstance(value, (set, frozenset)):
            items = [self.encode(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
            return {"$set": sorted(items, key=repr)}
        if isinstance(value, (bytes, bytearray)):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, complex):
            return {"$complex": [repr(value.real), repr(value.imag)]}
        if isinstance(value, Record):
            return self._record(value, name, depth)
        if isinstance(value, Global):
            return {"$object": value.name}
        if isinstance(value, NumpyDType):
            return {"$dtype": str(value.value)}
        if isinstance(value, NumpyArray) and value.value.dtype.kind in "US":
            return self.encode(value.value.tolist(), name, depth)
        return {"$tensor": self._tensor(value, name)}

    def _mapping(self, value: Mapping[Any, Any], name: str, depth: int) -> Any:
        if "$object" in value and value.keys() <= _OBJECT_KEYS:  # as from_json gave it
            return {key: self.encode(item, name, depth + 1) for key, item in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
        return {
            "$items": [
                [self.encode(key, name, depth + 1), self.encode(item, f"{name}.{key!s:.100}", depth + 1)]
                for key, item in value.items()
            ]
        }

    def _record(self, value: Record, name: str, depth: int) -> Any:
        result: dict[str, Any] = {"$object": value.name}
        if value.member is not None:
            result["member"] = value.member
        if value.args:
            result["args"] = self.encode(list(value.args), name, depth + 1)
        if value.fields:
            result["fields"] = self.encode(value.fields, name, depth + 1)
        if value.state is not None:
            result["state"] = self.encode(value.state, name, depth + 1)
        return result

    def _tensor(self, value: Any, name: str) -> str:
        view: View
        if isinstance(value, View):
            view = value
        elif isinstance(value, TensorRef):
            view = value.view
        elif isinstance(value, NumpyArray) and value.value.dtype.kind in "biufc":
            array = np.ascontiguousarray(value.value.astype(value.value.dtype.newbyteorder("<")))
            view = stored_bytes(array.tobytes(), str(np.dtype(array.dtype.name)), value.value.shape)
        else:
            raise FormatError(f"{name:.200}: a {type(value).__name__} cannot be kept as JSON")
        if self.tensors is None:
            raise FormatError(f"{name:.200}: a tensor where only plain values are expected")
        self.tensors.append(Tensor("extra", name, view))
        return name


def from_json(value: Any, tensors: Mapping[str, Any]) -> Any:
    """
    Return what ``to_json`` was given, but for tuples (lists) and frameworks' objects (dicts, as they stand).

    ``tensors``: by name, what to put in the place of each tensor. FormatError for marks that ``to_json`` does not make.
    """
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key in _MARKS:
            try:
                return _MARKS[key](item, tensors)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise FormatError(f"{{{key!r:.20}: {item!r:.80}}} stands for nothing that is known") from error
    return {key: from_json(item, tensors) for key, item in value.items()}


def _items(pairs: Any, tensors: Mapping[str, Any]) -> dict[Any, Any]:
    decoded = [(from_json(key, tensors), from_json(item, tensors)) for key, item in pairs]
    return {tuple(key) if isinstance(key, list) else key: item for key, item in decoded}


def _dtype(name: Any) -> TorchDType:
    if not isinstance(name, str):
        raise TypeError(name)
    return TorchDType(name)


_MARKS: Final[dict[str, Callable[[Any, Mapping[str, Any]], Any]]] = {
    "$tensor": lambda name, tensors: tensors[name],
    "$items": _items,
    "$float": lambda text, tensors: float(text),
    "$bytes": lambda text, tensors: base64.b64decode(text, validate=True),
    "$set": lambda items, tensors: set(from_json(items, tensors)),
    "$complex": lambda parts, tensors: complex(float(parts[0]), float(parts[1])),
    "$dtype": lambda name, tensors: _dtype(name),
}
