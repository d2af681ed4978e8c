"""
Boxes: rectangular parts of named global tensors.

Rule 1: whoever makes a Box or a TensorBox gets a checked one; everything behind relies on it.
Rule 2: a box with a zero length in any dimension is empty and holds no bytes; a 0-d box holds one element.
Rule 3: sizes are bounded (``MAX_NBYTES``), so that sums of offsets fit 64-bit file offsets everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Final, Literal, cast

from snapshotd.errors import LayoutError
from snapshotd.layout.dtypes import DTYPES, dtype_of

__all__ = ["MAX_DIMS", "MAX_NAME_BYTES", "MAX_NBYTES", "Box", "Scope", "TensorBox"]

Scope = Literal["global", "rank"]

MAX_DIMS: Final = 32
"""Dimensions of one tensor. numpy before 2.0 stops at 32, torch at 64; nobody has been seen above 8."""

MAX_NBYTES: Final = 1 << 56
"""Bytes of one global tensor: 64 PiB, far above any tensor and far below 2**63."""

MAX_NAME_BYTES: Final = 4096
"""UTF-8 bytes of one tensor name. Real FQNs stay below 200; four times that of a path component is plenty."""

_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")


@dataclass(frozen=True, slots=True)
class Box:
    """
    A rectangle of elements: ``offsets[d] <= index[d] < offsets[d] + lengths[d]`` for each dimension d.

    Both tuples have one entry per dimension, in elements. LayoutError for anything but non-negative ints.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_ints("offsets", self.offsets)
        _check_ints("lengths", self.lengths)
        if len(self.offsets) != len(self.lengths):
            raise LayoutError(
                f"a box needs one offset and one length per dimension: offsets {self.offsets}, lengths {self.lengths}"
            )

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box of a complete tensor of ``shape``."""
        return cls((0,) * len(shape), shape)

    @property
    def ndim(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """The first index behind the box in each dimension."""
        return tuple(o + n for o, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements: 1 for a 0-d box, 0 for an empty one."""
        return prod(self.lengths)

    @property
    def is_empty(self) -> bool:
        return 0 in self.lengths

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, or None if there is none. LayoutError if the dimensions differ."""
        if self.ndim != other.ndim:
            raise LayoutError(f"cannot intersect a {self.ndim}-d box with a {other.ndim}-d box")
        begins = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(min(a, b) for a, b in zip(self.ends, other.ends, strict=True))
        if any(b >= e for b, e in zip(begins, ends, strict=True)):
            return None
        return Box(begins, tuple(e - b for b, e in zip(begins, ends, strict=True)))

    def contains(self, other: Box) -> bool:
        """Whether each element of ``other`` is in this box: true for an empty ``other`` of as many dimensions."""
        if self.ndim != other.ndim:
            return False
        if other.is_empty:
            return True
        return all(
            a <= b and b + n <= a + m
            for a, m, b, n in zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True)
        )

    def __str__(self) -> str:
        """As Python slices: ``[0:4, 8:16]``."""
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offsets, self.lengths, strict=True)) + "]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBox:
    """
    One rectangular part of one named tensor.

    ``global_shape`` is the shape of the whole, in elements; ``box`` lies inside it, also when empty.
    ``scope`` "global": the parts on all ranks make up one tensor. "rank": the tensor is private to its rank (RNG
    state, buffers of a data loader) and is matched by rank, never joined.
    ``kind`` says what it is ("param", "buffer", "optim", "rng", "extra", "meta", ...): a short identifier.

    LayoutError, with the tensor's name, for anything that does not fit together.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    scope: Scope
    kind: str

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not isinstance(self.dtype, str):
            raise LayoutError(f"tensor {self.name!r}: the dtype must be a str, not {type(self.dtype).__name__}")
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            dtype = dtype_of(self.dtype)  # for its message
        _check_ints(f"tensor {self.name!r}: global_shape", self.global_shape)
        if not isinstance(self.box, Box):
            raise LayoutError(f"tensor {self.name!r}: the box must be a Box, not {type(self.box).__name__}")
        _check_inside(self.name, self.global_shape, self.box)
        # Zero dimensions are left out, so that a shape such as (0, 2**60) cannot smuggle in huge strides.
        if prod(size for size in self.global_shape if size) * dtype.itemsize > MAX_NBYTES:
            raise LayoutError(
                f"tensor {self.name!r}: shape {self.global_shape} of {self.dtype} is above the limit of "
                f"{MAX_NBYTES} bytes"
            )
        if self.scope not in ("global", "rank"):
            raise LayoutError(f"tensor {self.name!r}: the scope must be 'global' or 'rank', not {self.scope!r}")
        if not isinstance(self.kind, str) or not _KIND.match(self.kind):
            raise LayoutError(
                f"tensor {self.name!r}: the kind must be an identifier of at most 32 characters, not {self.kind!r}"
            )

    def check_inside(self, box: Box) -> None:
        """LayoutError, with the tensor's name, when ``box`` is not inside its shape."""
        _check_inside(self.name, self.global_shape, box)

    def named(self, name: str) -> TensorBox:
        """Return the same part of another tensor of this shape: nothing but the name is checked again."""
        _check_name(name)
        return _unchecked(self, name, self.box)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def numel(self) -> int:
        """Elements of this part."""
        return self.box.numel

    @property
    def nbytes(self) -> int:
        """Bytes of this part."""
        return self.box.numel * DTYPES[self.dtype].itemsize

    @property
    def is_whole(self) -> bool:
        """Whether this part is the complete tensor."""
        return self.box.lengths == self.global_shape


def _unchecked(like: TensorBox, name: str, box: Box) -> TensorBox:
    """Return ``like`` with two fields that were checked, which are few of all checks."""
    other = object.__new__(TensorBox)
    put = object.__setattr__
    put(other, "name", name)
    put(other, "dtype", like.dtype)
    put(other, "global_shape", like.global_shape)
    put(other, "box", box)
    put(other, "scope", like.scope)
    put(other, "kind", like.kind)
    return other


def _check_inside(name: str, shape: tuple[int, ...], box: Box) -> None:
    if len(shape) != len(box.lengths):
        raise LayoutError(f"tensor {name!r}: a {len(box.lengths)}-d box {box} in a {len(shape)}-d shape {shape}")
    for size, offset, length in zip(shape, box.offsets, box.lengths, strict=True):
        if offset + length > size:
            raise LayoutError(f"tensor {name!r}: the box {box} is not inside the shape {shape}")


def _check_ints(what: str, values: object) -> None:
    if not isinstance(values, tuple):
        raise LayoutError(f"{what} must be a tuple of ints, not {type(values).__name__}")
    if len(values) > MAX_DIMS:
        raise LayoutError(f"{what} has {len(values)} dimensions; the limit is {MAX_DIMS}")
    for value in cast("tuple[object, ...]", values):
        # bool is an int to Python, but never a size.
        if type(value) is not int or not 0 <= value <= MAX_NBYTES:
            raise LayoutError(f"{what} must be ints from 0 to 2**56, not {value!r:.60}")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise LayoutError(f"a tensor name must be a non-empty str, not {name!r:.60}")
    if name.isascii():
        size = len(name)
    else:
        try:
            size = len(name.encode())
        except UnicodeEncodeError as error:
            raise LayoutError(f"the tensor name {name!r:.60} is not valid Unicode") from error
    if size > MAX_NAME_BYTES:
        raise LayoutError(f"the tensor name {name!r:.60}... has {size} bytes; the limit is {MAX_NAME_BYTES}")
