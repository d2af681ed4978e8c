"""
A pickle writer for plain values and a few named stand-ins: what torch.load(weights_only=True) and DCP's reader take.

Protocol 2 and no memo: values are trees. Nothing of ours, and no object of Python's, ever stands in the result: there
is no class that could be looked up but those that the caller names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from snapshotd.errors import LayoutError

__all__ = ["Call", "Instance", "Name", "Ordered", "Storage", "dumps", "tensor_call"]

_MAX_DEPTH: Final = 200
_BATCH: Final = 1000

STORAGE_CLASSES: Final = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


@dataclass(frozen=True, slots=True)
class Name:
    """A global: ``module.name``."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What calling a global with arguments gives."""

    target: Name
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class, made without arguments, with a state."""

    kind: Name
    state: Any


@dataclass(frozen=True, slots=True)
class Ordered:
    """An OrderedDict."""

    items: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id of torch: the storage ``key`` of ``numel`` elements."""

    key: str
    dtype: str
    numel: int
    nbytes: int


def tensor_call(key: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Call:
    """Return the pickle form of a contiguous tensor that fills the storage ``key``."""
    numel, strides = 1, []
    for size in reversed(shape):
        strides.append(numel)
        numel *= max(1, size)
    count = 0 if 0 in shape else numel
    stride = tuple(reversed(strides))
    storage = Storage(key, dtype, count, nbytes)
    if dtype in STORAGE_CLASSES:
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, stride, False, Ordered()))
    kind = Name("torch", dtype)  # types that are younger than typed storages
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), (storage, 0, shape, stride, False, Ordered(), kind))


def dumps(value: Any) -> bytes:
    """Return the pickle of ``value``; LayoutError, with its type, for what is neither plain nor a stand-in."""
    out: list[bytes] = [b"\x80\x02"]
    _Writer(out.append).put(value, 0)
    out.append(b".")
    return b"".join(out)


class _Writer:
    def __init__(self, emit: Callable[[bytes], None]) -> None:
        self.emit = emit

    def put(self, value: Any, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise LayoutError("a structure is too deep for a pickle")
        write = _KINDS.get(type(value))
        if write is None:
            if isinstance(value, str):
                write = _text
            elif isinstance(value, dict):
                write = _mapping
            else:
                raise LayoutError(f"a {type(value).__name__} cannot be written as a plain value")
        write(self, value, depth)


def _integer(w: _Writer, value: int, depth: int) -> None:
    if 0 <= value < 256:
        w.emit(b"K" + bytes([value]))
    elif -(1 << 31) <= value < 1 << 31:
        w.emit(b"J" + struct.pack("<i", value))
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        w.emit((b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data)


def _text(w: _Writer, value: str, depth: int) -> None:
    data = value.encode("utf-8", "surrogatepass")
    w.emit(b"X" + struct.pack("<I", len(data)) + data)


def _bytes(w: _Writer, value: bytes, depth: int) -> None:
    # What protocol 2 has for bytes, and what the weights-only unpickler takes.
    _call(w, Call(Name("_codecs", "encode"), (str(value, "latin-1"), "latin1")), depth)


def _tuple(w: _Writer, value: tuple[Any, ...], depth: int) -> None:
    if not value:
        w.emit(b")")
        return
    w.emit(b"(")
    for item in value:
        w.put(item, depth + 1)
    w.emit(b"t")


def _list(w: _Writer, value: list[Any], depth: int) -> None:
    w.emit(b"]")
    for begin in range(0, len(value), _BATCH):
        w.emit(b"(")
        for item in value[begin : begin + _BATCH]:
            w.put(item, depth + 1)
        w.emit(b"e")


def _mapping(w: _Writer, value: Mapping[Any, Any], depth: int) -> None:
    w.emit(b"}")
    _items(w, value, depth)


def _items(w: _Writer, value: Mapping[Any, Any], depth: int) -> None:
    items = list(value.items())
    for begin in range(0, len(items), _BATCH):
        w.emit(b"(")
        for key, item in items[begin : begin + _BATCH]:
            w.put(key, depth + 1)
            w.put(item, depth + 1)
        w.emit(b"u")


def _ordered(w: _Writer, value: Ordered, depth: int) -> None:
    w.emit(b"ccollections\nOrderedDict\n)R")
    _items(w, value.items, depth)


def _set(w: _Writer, value: set[Any], depth: int) -> None:
    _call(w, Call(Name("__builtin__", "set"), (sorted(value, key=repr),)), depth)


def _complex(w: _Writer, value: complex, depth: int) -> None:
    _call(w, Call(Name("__builtin__", "complex"), (value.real, value.imag)), depth)


def _name(w: _Writer, value: Name, depth: int) -> None:
    w.emit(f"c{value.module}\n{value.name}\n".encode())


def _call(w: _Writer, value: Call, depth: int) -> None:
    _name(w, value.target, depth)
    _tuple(w, value.args, depth + 1)
    w.emit(b"R")


def _instance(w: _Writer, value: Instance, depth: int) -> None:
    _name(w, value.kind, depth)
    w.emit(b")\x81")
    w.put(value.state, depth + 1)
    w.emit(b"b")


def _storage(w: _Writer, value: Storage, depth: int) -> None:
    known = STORAGE_CLASSES.get(value.dtype)
    kind = Name("torch", known) if known else Name("torch.storage", "UntypedStorage")
    _tuple(w, ("storage", kind, value.key, "cpu", value.numel if known else value.nbytes), depth)
    w.emit(b"Q")


_KINDS: Final[dict[type, Callable[[_Writer, Any, int], None]]] = {
    type(None): lambda w, value, depth: w.emit(b"N"),
    bool: lambda w, value, depth: w.emit(b"\x88" if value else b"\x89"),
    int: _integer,
    float: lambda w, value, depth: w.emit(b"G" + struct.pack(">d", value)),
    str: _text,
    bytes: _bytes,
    tuple: _tuple,
    list: _list,
    dict: _mapping,
    set: _set,
    complex: _complex,
    Name: _name,
    Call: _call,
    Instance: _instance,
    Ordered: _ordered,
    Storage: _storage,
}
