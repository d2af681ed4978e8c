"""
Tagged JSON: Python values to JSON text and back, exactly, and with no code in the data.

Rule 1: what is read back has the same types and values: tuples, dict keys that are no strings, bytes, NaN, complex,
ints of any size, sets, torch.Size, dtypes, devices, NumPy scalars. Types are compared exactly: a subclass that is not
in the table is refused, because its behaviour could not be brought back.
Rule 2: plain JSON values stand for themselves; all else is ``{"$": tag, "v": ...}``.
Rule 3: tensors and arrays go to the ``sink``, which gives back JSON that stands for them ("leaf"); small ones are
kept inline. Those of accelerators never are: to read one waits for all that the device still has to do.
Rule 4: decoding calls nothing but the table below and what the user registered.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

import numpy as np
import torch

from snapshotd_client.errors import CannotExpress

__all__ = ["INLINE_BYTES", "Json", "Sink", "Source", "decode", "dumps", "encode", "register_codec"]

Json = Any  # mypy has no recursive JSON that stays readable
Source = Callable[[Json], Any]

INLINE_BYTES: Final = 1024
"""Tensors below this stay in the JSON: a shard of its own costs more than that in the header."""

_MAX_DEPTH: Final = 100


class Sink(Protocol):
    """Takes tensors and arrays of at least ``inline_bytes`` and gives the JSON that stands for each."""

    inline_bytes: int

    def __call__(self, path: str, value: torch.Tensor | np.ndarray[Any, Any]) -> Json: ...


_BIG_INT: Final = 1 << 4096
"""Above this, ints are written in hexadecimal: Python limits decimal ones to 4300 digits."""

_FACTORIES: Final[dict[str, Any]] = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str}
_registered: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {}
_registered_types: dict[type, str] = {}


def register_codec(
    kind: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any], *, name: str | None = None
) -> None:
    """
    Tell how values of exactly the type ``kind`` are kept: ``encode`` gives what can be kept, ``decode`` takes it back.

    ``name`` (default: the type's full name) is what stands in the snapshot; it must mean the same when it is restored.
    """
    if not isinstance(kind, type):
        raise TypeError(f"register_codec needs a type, not {kind!r:.60}")
    if not callable(encode) or not callable(decode):
        raise TypeError("register_codec needs two functions: encode(value) and decode(what encode gave)")
    tag = name or f"{kind.__module__}.{kind.__qualname__}"
    _registered[tag] = (kind, encode, decode)
    _registered_types[kind] = tag


def dumps(value: Json) -> str:
    """Return compact JSON text of what ``encode`` gave."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def encode(value: object, path: str, sink: Sink | None = None) -> Json:
    """
    Return the JSON for ``value``; CannotExpress, with the path of the culprit, when there is none.

    ``sink`` gets each tensor and array that is not tiny; without one they are all kept inline.
    """
    return _encode(value, path, sink, 0)


def decode(data: Json, source: Source | None = None) -> Any:
    """
    Return the value that ``data`` stands for; ``source`` gives the tensor for each leaf that the sink made.

    ValueError for JSON that ``encode`` cannot have made.
    """
    return _decode(data, source, 0)


def _encode(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_BIG_INT < value < _BIG_INT else {"$": "int", "v": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$": "float", "v": struct.pack("<d", value).hex()}
    if depth > _MAX_DEPTH:
        raise CannotExpress(path, f"nesting deeper than {_MAX_DEPTH} (or a value that contains itself)")
    if kind is list:
        return [_encode(item, f"{path}[{i}]", sink, depth + 1) for i, item in enumerate(value)]
    if kind is dict:
        return _encode_dict(value, path, sink, depth)
    if kind is tuple:
        return {"$": "tuple", "v": [_encode(item, f"{path}[{i}]", sink, depth + 1) for i, item in enumerate(value)]}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, sink)
    if kind is np.ndarray:
        return _encode_array(value, path, sink)
    tag = _registered_types.get(kind)
    if tag is not None:
        return {"$": "user", "t": tag, "v": _encode(_registered[tag][1](value), path, sink, depth + 1)}
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(value, path, sink, depth)
    if isinstance(value, np.dtype) and value.names is None and not value.hasobject:
        return {"$": "npdtype", "v": value.str}
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return {"$": "np", "t": value.dtype.str, "v": _b64(value.tobytes())}
    raise CannotExpress(path, f"a value of type {kind.__module__}.{kind.__qualname__}")


def _encode_dict(value: dict[Any, Any], path: str, sink: Sink | None, depth: int) -> Json:
    if all(type(key) is str for key in value) and "$" not in value:
        return {key: _encode(item, f"{path}.{key}", sink, depth + 1) for key, item in value.items()}
    return {"$": "dict", "v": _encode_pairs(value, path, sink, depth)}


def _encode_pairs(value: Any, path: str, sink: Sink | None, depth: int) -> list[Json]:
    pairs: list[Json] = []
    for key, item in value.items():
        key_json = _encode(key, f"{path}.<key {key!r:.40}>", None, depth + 1)
        pairs.append([key_json, _encode(item, f"{path}.{key!s:.60}", sink, depth + 1)])
    return pairs


def _encode_items(tag: str) -> Callable[[Any, str, Sink | None, int], Json]:
    def run(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
        return {"$": tag, "v": _encode_pairs(value, path, sink, depth)}

    return run


def _encode_set(tag: str) -> Callable[[Any, str, Sink | None, int], Json]:
    def run(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
        items = [_encode(item, f"{path}.<item {item!r:.40}>", None, depth + 1) for item in value]
        return {"$": tag, "v": sorted(items, key=dumps)}  # the same text for the same set

    return run


def _encode_plain(tag: str, form: Callable[[Any], Json]) -> Callable[[Any, str, Sink | None, int], Json]:
    def run(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
        return {"$": tag, "v": form(value)}

    return run


def _encode_defaultdict(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
    factory = value.default_factory
    name = None if factory is None else next((n for n, f in _FACTORIES.items() if f is factory), "")
    if name == "":
        raise CannotExpress(path, f"a defaultdict with the factory {factory!r:.60}")
    return {"$": "defaultdict", "f": name, "v": _encode_pairs(value, path, sink, depth)}


def _encode_deque(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
    items = [_encode(item, f"{path}[{i}]", sink, depth + 1) for i, item in enumerate(value)]
    return {"$": "deque", "m": value.maxlen, "v": items}


def _encode_slice(value: Any, path: str, sink: Sink | None, depth: int) -> Json:
    return {"$": "slice", "v": [_encode(part, path, sink, depth + 1) for part in (value.start, value.stop, value.step)]}


def _encode_tensor(value: torch.Tensor, path: str, sink: Sink | None) -> Json:
    nbytes = value.numel() * value.element_size()
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_cpu
    if sink is not None and (nbytes >= sink.inline_bytes or not is_plain):
        return sink(path, value)
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        raise CannotExpress(path, f"a tensor of type {type(value).__name__} and layout {value.layout}")
    if value.is_meta or value.is_quantized:
        raise CannotExpress(path, "a tensor on the meta device, or a quantized one,")
    plain = value.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return {
        "$": "tensor",
        "t": str(value.dtype).removeprefix("torch."),
        "s": list(value.shape),
        "d": value.device.type,
        "g": (2 if isinstance(value, torch.nn.Parameter) else 0) + int(value.requires_grad),
        "v": _b64(raw),
    }


def _encode_array(value: np.ndarray[Any, Any], path: str, sink: Sink | None) -> Json:
    if value.dtype.hasobject:
        raise CannotExpress(path, "a NumPy array of Python objects")
    shared = str(value.dtype) in _ARRAY_TYPES and value.dtype.isnative
    if sink is not None and shared and value.nbytes >= sink.inline_bytes:
        return sink(path, value)
    descr = np.lib.format.dtype_to_descr(value.dtype)
    return {"$": "array", "t": descr, "s": list(value.shape), "v": _b64(value.tobytes())}


_ARRAY_TYPES: Final = frozenset(
    ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    + ("float16", "float32", "float64", "complex64", "complex128")
)
"""Array types that torch has too, and so can be shards; others stay inline."""


_SPECIAL: Final[dict[type, Callable[[Any, str, Sink | None, int], Json]]] = {
    OrderedDict: _encode_items("OrderedDict"),
    Counter: _encode_items("Counter"),
    defaultdict: _encode_defaultdict,
    deque: _encode_deque,
    set: _encode_set("set"),
    frozenset: _encode_set("frozenset"),
    bytes: _encode_plain("bytes", lambda v: _b64(v)),
    bytearray: _encode_plain("bytearray", lambda v: _b64(v)),
    complex: _encode_plain("complex", lambda v: struct.pack("<dd", v.real, v.imag).hex()),
    range: _encode_plain("range", lambda v: [v.start, v.stop, v.step]),
    slice: _encode_slice,
    io.BytesIO: _encode_plain("BytesIO", lambda v: _b64(v.getvalue())),
    PurePosixPath: _encode_plain("path", str),
    torch.Size: _encode_plain("Size", list),
    torch.dtype: _encode_plain("dtype", lambda v: str(v).removeprefix("torch.")),
    torch.device: _encode_plain("device", str),
}


def _decode(data: Json, source: Source | None, depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise ValueError("the JSON is nested too deeply")
    if isinstance(data, list):
        return [_decode(item, source, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    tag = data.get("$")
    if tag is None:
        return {key: _decode(item, source, depth + 1) for key, item in data.items()}
    if tag == "leaf":
        if source is None:
            raise ValueError("a tensor stands where none can be")
        return source(data)
    if tag == "user":
        entry = _registered.get(data["t"])
        if entry is None:
            raise ValueError(f"no codec is registered for {data['t']!r:.80}; call register_codec before restore()")
        return entry[2](_decode(data["v"], source, depth + 1))
    if tag in ("dict", "OrderedDict", "Counter", "defaultdict"):
        return _decode_mapping(tag, data, source, depth)
    items = _ITEMS.get(tag)
    if items is not None:
        return items([_decode(item, source, depth + 1) for item in data["v"]], data)
    plain = _PLAIN.get(tag)
    if plain is None:
        raise ValueError(f"unknown tag {tag!r:.60} in the snapshot's JSON: it was written by a newer version")
    return plain(data)


def _decode_mapping(tag: str, data: Json, source: Source | None, depth: int) -> Any:
    pairs = [(_decode(key, None, depth + 1), _decode(item, source, depth + 1)) for key, item in data["v"]]
    if tag == "dict":
        return dict(pairs)
    if tag == "OrderedDict":
        return OrderedDict(pairs)
    if tag == "Counter":
        return Counter(dict(pairs))
    return defaultdict(None if data["f"] is None else _FACTORIES[data["f"]], pairs)


def _decode_tensor(data: Json) -> torch.Tensor:
    dtype = _dtype(data["t"])
    raw = bytearray(base64.b64decode(data["v"]))
    shape = tuple(data["s"])
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if raw:
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape).clone()
    if data["d"] != "cpu" and torch.get_device_module(data["d"]).is_available():
        tensor = tensor.to(data["d"])
    if data["g"] & 2:
        return torch.nn.Parameter(tensor, requires_grad=bool(data["g"] & 1))
    return tensor.requires_grad_() if data["g"] & 1 else tensor


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r:.40}")
    return dtype


def _decode_array(data: Json) -> np.ndarray[Any, Any]:
    descr = data["t"]
    dtype = np.dtype(descr if isinstance(descr, str) else [tuple(part) for part in descr])
    return np.frombuffer(base64.b64decode(data["v"]), dtype=dtype).reshape(data["s"]).copy()


def _decode_complex(data: Json) -> complex:
    return complex(*struct.unpack("<dd", bytes.fromhex(data["v"])))


_ITEMS: Final[dict[str, Callable[[list[Any], Json], Any]]] = {
    "tuple": lambda items, data: tuple(items),
    "set": lambda items, data: set(items),
    "frozenset": lambda items, data: frozenset(items),
    "deque": lambda items, data: deque(items, data["m"]),
    "slice": lambda items, data: slice(*items),
    "range": lambda items, data: range(*items),
    "Size": lambda items, data: torch.Size(items),
}

_PLAIN: Final[dict[str, Callable[[Json], Any]]] = {
    "int": lambda data: int(data["v"], 16),
    "float": lambda data: struct.unpack("<d", bytes.fromhex(data["v"]))[0],
    "complex": _decode_complex,
    "bytes": lambda data: base64.b64decode(data["v"]),
    "bytearray": lambda data: bytearray(base64.b64decode(data["v"])),
    "BytesIO": lambda data: io.BytesIO(base64.b64decode(data["v"])),
    "path": lambda data: PurePosixPath(data["v"]),
    "dtype": lambda data: _dtype(data["v"]),
    "device": lambda data: torch.device(data["v"]),
    "npdtype": lambda data: np.dtype(data["v"]),
    "np": lambda data: np.frombuffer(base64.b64decode(data["v"]), dtype=np.dtype(data["t"]))[0],
    "tensor": _decode_tensor,
    "array": _decode_array,
}


def _b64(raw: bytes | bytearray) -> str:
    return base64.b64encode(raw).decode()
