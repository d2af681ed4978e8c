"""
Elements as words: tensors travel as unsigned words of their size, so that no bit of a NaN or of -0.0 ever changes.

Only a cast looks inside. numpy has no bfloat16 and no float8: casts go through float32, rounded to nearest even.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from snapshotd.errors import UsageError
from snapshotd.layout.dtypes import dtype_of

__all__ = ["Words", "cast", "from_float", "to_float", "word_dtype"]

Words = npt.NDArray[Any]
"""An array of ``word_dtype(dtype)``: the raw elements."""

_WORDS: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}

_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}


def word_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy type that carries elements of ``dtype`` (torch's name); LayoutError for an unknown one."""
    return _WORDS[dtype_of(dtype).itemsize]


def to_float(words: Words, dtype: str) -> npt.NDArray[Any]:
    """Return numbers for words: float32 for bfloat16, numpy's own type for all that numpy has."""
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype not in _NUMPY:
        raise UsageError(f"{dtype} cannot be turned into numbers here")
    return np.ascontiguousarray(words).view(_NUMPY[dtype])


def from_float(values: npt.NDArray[Any], dtype: str) -> Words:
    """Return the words of ``values`` rounded to ``dtype``."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        # Round to nearest even: add just under half of the last kept bit, and that bit itself.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        # A NaN keeps its sign and the top of its payload, and stays one.
        kept = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(nan, kept, rounded).astype(np.uint16)
    if dtype not in _NUMPY:
        raise UsageError(f"numbers cannot be turned into {dtype} here")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(_NUMPY[dtype])).view(word_dtype(dtype))


def cast(words: Words, source: str, target: str, scale: float = 1.0) -> Words:
    """Return ``words`` of dtype ``source`` as words of ``target``, multiplied by ``scale``."""
    if source == target and scale == 1.0:
        return words
    values = to_float(words, source)
    if scale != 1.0:
        values = (values * np.asarray(scale, dtype=values.dtype)).astype(values.dtype)
    return from_float(values, target)
