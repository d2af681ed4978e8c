"""
safetensors files: the header of any such file, to checked views; and the header of one that is to be written.

This is the general format, as the package of that name and transformers write it: our own slot files, with their page
alignment and boxes, are in layout/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

from snapshotd.errors import FormatError, LayoutError
from snapshotd.layout.box import Box
from snapshotd.layout.dtypes import DTYPES, dtype_of, stored_shape
from snapshotd.layout.header import decode_json
from snapshotd.universal.sources import Source, read_bytes
from snapshotd.universal.views import Stored

__all__ = ["encode_header", "read_header"]

MAX_HEADER_BYTES: Final = 256 << 20
"""Largest header that is read: the safetensors package stops at 100 MB."""

_BY_TAG: Final = {dtype.tag: dtype.name for dtype in DTYPES.values() if dtype.native}


def read_header(source: Source) -> tuple[dict[str, Stored], dict[str, str]]:
    """
    Return the tensors of a safetensors file, in the order of their bytes, and its ``__metadata__``.

    FormatError, naming the file, when it is cut short, or the header says what cannot be.
    """
    label = source.label
    if source.size < 8:
        raise FormatError(f"{label} has {source.size} bytes: too few for a safetensors file")
    length = int.from_bytes(read_bytes(source, 0, 8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > source.size:
        raise FormatError(
            f"{label}: the header claims {length} bytes, the file has {source.size}: no safetensors file, or cut short"
        )
    entries = decode_json(read_bytes(source, 8, length), f"the header of {label}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{label}: __metadata__ is not text")
    found = [_entry(source, 8 + length, key, value) for key, value in entries.items()]
    found.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    expected = 8 + length
    for key, view in found:
        if view.offset != expected:
            raise FormatError(f"{label}: {key} begins at byte {view.offset}, but the one before ends at {expected}")
        expected += view.nbytes
    if expected != source.size:
        raise FormatError(
            f"{label} has {source.size} bytes, but its header describes {expected}: it was cut short, or changed"
        )
    return dict(found), metadata


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int], int]:
    """
    Return the header for (key, dtype, shape) in this order, the offset in the file of each, and the file's size.

    Types that the safetensors package does not know are stored as bytes (U8): see layout/dtypes.py.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    offsets: list[int] = []
    for key, name, shape in tensors:
        dtype = dtype_of(name)
        nbytes = prod(shape) * dtype.itemsize
        entries[key] = {
            "dtype": dtype.tag,
            "shape": list(stored_shape(dtype, shape)),
            "data_offsets": [at, at + nbytes],
        }
        offsets.append(at)
        at += nbytes
    if len(entries) != len(tensors) + 1:
        raise LayoutError("two tensors of one file have the same name, or one is called __metadata__")
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [begin + offset for offset in offsets], begin + at


def _entry(source: Source, data_begin: int, key: str, value: object) -> tuple[str, Stored]:
    what = f"{source.label}: {key:.200}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what} needs exactly dtype, shape and data_offsets")
    dtype = _BY_TAG.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{what} has the unknown dtype {value['dtype']!r:.40}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise FormatError(f"{what}: shape and data_offsets must be lists")
    try:
        begin, end = Box.whole(tuple(offsets)).lengths
        view = Stored(source, data_begin + begin, dtype, shape)
    except LayoutError as error:
        raise FormatError(f"{what}: {error}") from error
    if view.nbytes != end - begin or data_begin + end > source.size:
        raise FormatError(
            f"{what} has the bytes [{begin}, {end}) for {dtype} {shape}; the file has {source.size - data_begin}: it "
            "was cut short, or the header is wrong"
        )
    return key, view
