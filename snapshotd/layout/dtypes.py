"""
The one table of element types: how torch spells them, how many bytes they have, how safetensors tags them.

Rule 1: names are torch's without the leading ``torch.``; they are what our metadata and all rooms use.
Rule 2: a type that the safetensors package cannot read is stored as ``U8`` with the last dimension multiplied by
its item size. Its true type is in our own metadata, so nothing is lost, and any tool can still open the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from snapshotd.errors import LayoutError

__all__ = ["DTYPES", "DType", "dtype_of", "stored_shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """
    One element type.

    ``itemsize`` is in bytes. ``tag`` is what stands in a safetensors header; ``native`` is False where the tag is
    ``U8`` because safetensors has none for this type.
    """

    name: str
    itemsize: int
    tag: str
    native: bool


def _native(name: str, itemsize: int, tag: str) -> DType:
    return DType(name=name, itemsize=itemsize, tag=tag, native=True)


def _as_bytes(name: str, itemsize: int) -> DType:
    return DType(name=name, itemsize=itemsize, tag="U8", native=False)


DTYPES: Final[dict[str, DType]] = {
    dtype.name: dtype
    for dtype in (
        _native("bool", 1, "BOOL"),
        _native("uint8", 1, "U8"),
        _native("int8", 1, "I8"),
        _native("uint16", 2, "U16"),
        _native("int16", 2, "I16"),
        _native("uint32", 4, "U32"),
        _native("int32", 4, "I32"),
        _native("uint64", 8, "U64"),
        _native("int64", 8, "I64"),
        _native("float16", 2, "F16"),
        _native("bfloat16", 2, "BF16"),
        _native("float32", 4, "F32"),
        _native("float64", 8, "F64"),
        _native("complex64", 8, "C64"),
        _native("float8_e4m3fn", 1, "F8_E4M3"),
        _native("float8_e5m2", 1, "F8_E5M2"),
        _native("float8_e8m0fnu", 1, "F8_E8M0"),
        _native("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
        _native("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
        # safetensors 0.8 refuses a header with these.
        _as_bytes("complex128", 16),
        _as_bytes("complex32", 4),
        # Two 4-bit numbers per byte. safetensors' F4 counts the numbers, torch's shape counts the bytes.
        _as_bytes("float4_e2m1fn_x2", 1),
    )
}


def dtype_of(name: str) -> DType:
    """Return the table's entry for a torch name without ``torch.``; LayoutError if there is none."""
    found = DTYPES.get(name)
    if found is None:
        raise LayoutError(f"unknown dtype {name!r}; known are {', '.join(sorted(DTYPES))}")
    return found


def stored_shape(dtype: DType, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """
    Return the shape that stands in the safetensors header for elements of ``dtype`` in a box of ``lengths``.

    The same as ``lengths``, but where the type is stored as bytes: then the last dimension is in bytes, and a 0-d
    tensor becomes one of shape ``(itemsize,)``.
    """
    if dtype.native:
        return lengths
    if not lengths:
        return (dtype.itemsize,)
    return (*lengths[:-1], lengths[-1] * dtype.itemsize)
