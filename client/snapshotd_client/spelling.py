"""
Values of a universal checkpoint, spelled as the hook spells its own: JSON to JSON, with the job's value as template.

A universal checkpoint keeps no Python types: a tuple is a list there, a Counter a dict. Which it is to be, the value
that the job has in that very place tells; where the job has none, a list stays a list.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import torch

from snapshotd_client.codec import Json, encode

__all__ = ["Speller"]

_LISTS: Final[dict[type, str]] = {
    tuple: "tuple",
    torch.Size: "Size",
    set: "set",
    frozenset: "frozenset",
    range: "range",
}
_DICTS: Final[dict[type, str]] = {OrderedDict: "OrderedDict", Counter: "Counter"}
_TEXTS: Final[dict[type, str]] = {torch.device: "device", PurePosixPath: "path"}
_BYTES: Final = ("bytearray", "BytesIO")

Leaf = Callable[[str, Any, str], Json]
"""Gives the JSON for a tensor, of its name in the checkpoint, the template, and its path in the job."""


class Speller:
    """Spells values; ``leaf`` is asked for each tensor. ``objects`` collects what cannot be made again: their paths."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self.objects: list[str] = []

    def spell(self, value: Any, template: Any, path: str) -> Json:
        """Return the hook's JSON for ``value``, which ``path`` names in messages and in the names of tensors."""
        if isinstance(value, list):
            return self._list(value, template, path)
        if isinstance(value, dict):
            return self._tagged(value, template, path) if _is_tagged(value) else self._dict(value, template, path)
        if isinstance(value, str) and type(template) in _TEXTS:
            return {"$": _TEXTS[type(template)], "v": value}
        if isinstance(value, (int, float)) and isinstance(template, torch.Tensor):
            return encode(torch.full_like(template, value), path)
        if isinstance(value, (int, float)) and isinstance(template, np.generic):
            return encode(template.dtype.type(value), path)
        return value

    def _list(self, value: list[Any], template: Any, path: str) -> Json:
        inner = list(template) if isinstance(template, (list, tuple, deque)) else []
        items = [self.spell(item, inner[i] if i < len(inner) else None, f"{path}[{i}]") for i, item in enumerate(value)]
        if type(template) is deque:
            return {"$": "deque", "m": template.maxlen, "v": items}
        tag = _LISTS.get(type(template))
        return items if tag is None else {"$": tag, "v": items}

    def _dict(self, value: dict[str, Any], template: Any, path: str) -> Json:
        inner = template if isinstance(template, Mapping) else {}
        spelled = {key: self.spell(item, inner.get(key), f"{path}.{key}") for key, item in value.items()}
        tag = _DICTS.get(type(template))
        return spelled if tag is None else {"$": tag, "v": [[key, item] for key, item in spelled.items()]}

    def _tagged(self, value: dict[str, Any], template: Any, path: str) -> Json:
        if "$object" in value:
            self.objects.append(path)
            return None
        ((tag, item),) = value.items()
        if tag == "$tensor":
            return self._leaf(item, template, path)
        if tag == "$items":
            return self._items(item, template, path)
        if tag == "$float":
            return {"$": "float", "v": struct.pack("<d", float(item)).hex()}
        if tag == "$bytes":
            kind = type(template).__name__
            return {"$": kind if kind in _BYTES else "bytes", "v": item}
        if tag == "$set":
            return {"$": "frozenset" if type(template) is frozenset else "set", "v": self._list(item, None, path)}
        if tag == "$complex":
            return {"$": "complex", "v": struct.pack("<dd", float(item[0]), float(item[1])).hex()}
        return {"$": "dtype", "v": item}

    def _items(self, pairs: list[Any], template: Any, path: str) -> Json:
        inner = {str(key): item for key, item in template.items()} if isinstance(template, Mapping) else {}
        keys = [{"$": "tuple", "v": key} if isinstance(key, list) else key for key, _ in pairs]
        spelled = [self.spell(item, inner.get(str(key)), f"{path}.{key!s:.60}") for key, item in pairs]
        tag = _DICTS.get(type(template), "dict")
        return {"$": tag, "v": [list(pair) for pair in zip(keys, spelled, strict=True)]}


def _is_tagged(value: dict[str, Any]) -> bool:
    return "$object" in value or (len(value) == 1 and next(iter(value)).startswith("$"))
