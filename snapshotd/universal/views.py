"""
Views: arrays that are read only when somebody asks for a box of them, and never as a whole.

A view has a ``dtype`` (torch's name without ``torch.``), a ``shape``, and ``read_into``. Views are combined:

* ``Stored``    a strided range of a file (or of bytes)
* ``Joined``    the whole, made of views that lie at offsets in it: TP and FSDP shards
* ``Cut``       a box of another view
* ``Reshaped``  the same elements in row-major order under another shape: parameters inside a flat buffer

and those of derived.py: ``Permuted``, ``Cast``, ``Merged``, ``Filled``, ``Deferred``.

Rule 1: making a view reads nothing and costs nothing. Files are opened when elements are read.
Rule 2: elements are words (see words.py); only a cast and an average look inside.
Rule 3: ``read_into`` may be called by any number of threads; its scratch is bounded (``SCRATCH_BYTES`` per level).
Rule 4: ``Joined.check`` proves that each element is there exactly once. The converter calls it through
``State.check``; who makes a ``Joined`` from numbers of a file needs not check them before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Final

import numpy as np

from snapshotd.errors import CorruptionError, FormatError, LocalProtocolError
from snapshotd.layout.box import Box
from snapshotd.layout.dtypes import dtype_of
from snapshotd.reshard.regions import Region, RegionIndex, overlap, subtract
from snapshotd.universal.sources import BytesSource, Source
from snapshotd.universal.words import Words, word_dtype

__all__ = [
    "SCRATCH_BYTES",
    "Cut",
    "Described",
    "Joined",
    "Reshaped",
    "Stored",
    "View",
    "concat",
    "files_of",
    "flat_part",
    "read_all",
    "slabs",
    "stored_bytes",
]

SCRATCH_BYTES: Final = 2 << 20
"""Most scratch memory of one strided read: large enough that system calls vanish, small enough to stay in a cache."""

Index = tuple[int, ...]


class View(ABC):
    """An array that is read by boxes. The subclasses are the whole list; see the module."""

    __slots__ = ("dtype", "shape")

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype = dtype_of(dtype).name
        self.shape = Box.whole(tuple(shape)).lengths  # checks them

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return dtype_of(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @abstractmethod
    def read_into(self, at: Index, out: Words) -> None:
        """
        Fill ``out`` with the box that begins at ``at`` and has the shape of ``out``.

        ``out`` is an array of ``word_dtype(self.dtype)`` with as many dimensions as the view, of any strides. The box
        must lie inside the view. CorruptionError names the file that does not hold what it should.
        """

    @property
    def label(self) -> str:
        """The name of the file that this very view reads; empty where it stands on other views."""
        return ""

    def inner(self) -> Iterable[View]:
        """The views that this one is made of."""
        return ()

    def check(self, name: str) -> None:
        """
        Raise FormatError, with ``name`` and the region, unless each element is there exactly once; CorruptionError for
        a file that is too short for what should be in it. Reads nothing.
        """
        for view in self.inner():
            view.check(name)

    def labels(self) -> list[str]:
        """The names of the files that this view reads, each once."""
        found: dict[str, None] = {}
        todo: list[View] = [self]
        while todo:
            view = todo.pop()
            if view.label:
                found[view.label] = None
            todo += view.inner()
        return list(found)


class Described(View):
    """A tensor that is only spoken of: its dtype and shape, and no bytes. Whoever reads it is wrong."""

    __slots__ = ()

    def read_into(self, at: Index, out: Words) -> None:
        raise LocalProtocolError(f"a tensor of {self.dtype} {list(self.shape)} is only described here, not held")


class Stored(View):
    """
    A strided range of a source: element ``index`` is at byte ``offset + itemsize * sum(index * strides)``.

    ``strides`` are in elements and default to row-major. LayoutError for ranges that leave the source, when its size
    is known without a look at the disk (``limit``: the end of the storage that the elements must lie in).
    """

    __slots__ = ("offset", "source", "strides")

    def __init__(
        self,
        source: Source,
        offset: int,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dtype, shape)
        self.source = source
        self.offset = offset
        self.strides = _row_major(self.shape) if strides is None else tuple(strides)
        if len(self.strides) != len(self.shape) or offset < 0 or any(stride < 0 for stride in self.strides):
            raise FormatError(f"{source.label}: strides {self.strides} do not fit the shape {self.shape}")

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def end(self) -> int:
        """The first byte behind the last element."""
        if 0 in self.shape:
            return self.offset
        return self.offset + self.itemsize * (_extent(self.shape, self.strides) + 1)

    @property
    def is_contiguous(self) -> bool:
        return _is_row_major(self.shape, self.strides)

    def check(self, name: str) -> None:
        if self.end > self.source.size:
            raise CorruptionError(
                f"{name}: {self.label} has {self.source.size} bytes, but {self.end} are needed: it was cut short; copy "
                "it again, or take an older checkpoint"
            )

    def read_into(self, at: Index, out: Words) -> None:
        if not out.size:
            return
        item = self.itemsize
        begin = self.offset + item * sum(a * s for a, s in zip(at, self.strides, strict=True))
        if out.flags.c_contiguous and _is_row_major(out.shape, self.strides):
            self.source.read_into(begin, out.reshape(-1).view(np.uint8).data)
            return
        extent = _extent(out.shape, self.strides) + 1
        # What lies between the wanted elements is read too, unless it is much more than they are.
        if extent * item <= SCRATCH_BYTES and (extent <= 8 * out.size or extent * item <= 65536):
            scratch = np.empty(extent, dtype=out.dtype)
            self.source.read_into(begin, scratch.view(np.uint8).data)
            steps = tuple(stride * item for stride in self.strides)
            out[...] = np.lib.stride_tricks.as_strided(scratch, out.shape, steps, writeable=False)
            return
        d = next(d for d, length in enumerate(out.shape) if length > 1)
        half = out.shape[d] // 2
        low, high = _split(out, d, half)
        self.read_into(at, low)
        self.read_into((*at[:d], at[d] + half, *at[d + 1 :]), high)

    def __eq__(self, other: object) -> bool:
        """Whether both are the very same elements of the same source: how tied tensors are found."""
        return isinstance(other, Stored) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.source, self.offset, self.dtype, self.shape, self.strides


class Joined(View):
    """The whole of ``shape``, made of ``parts``: (offsets in the whole, view). Empty parts are allowed and ignored."""

    __slots__ = ("_index", "parts")

    def __init__(self, dtype: str, shape: Sequence[int], parts: Iterable[tuple[Sequence[int], View]]) -> None:
        super().__init__(dtype, shape)
        self.parts = [(tuple(offsets), view) for offsets, view in parts if 0 not in view.shape]
        self._index: RegionIndex[View] | None = None
        for offsets, view in self.parts:
            if view.dtype != self.dtype or len(offsets) != len(self.shape) or len(view.shape) != len(self.shape):
                raise FormatError(
                    f"a part of {view.dtype} {list(view.shape)} at {list(offsets)} ({files_of(view)}) does not fit "
                    f"into {self.dtype} {list(self.shape)}"
                )

    def inner(self) -> Iterable[View]:
        return [view for _, view in self.parts]

    def check(self, name: str) -> None:
        self._check_cover(name)
        super().check(name)

    def read_into(self, at: Index, out: Words) -> None:
        if not out.size:
            return
        wanted = (at, tuple(a + n for a, n in zip(at, out.shape, strict=True)))
        if self._index is None:
            self._index = RegionIndex([(_region(offsets, view), view) for offsets, view in self.parts])
        left = out.size
        for region, view in self._index.overlapping(wanted):
            common = overlap(region, wanted)
            if common is None:
                continue
            begins, ends = common
            place = _part(out, tuple(slice(b - a, e - a) for b, e, a in zip(begins, ends, at, strict=True)))
            view.read_into(tuple(b - o for b, o in zip(begins, region[0], strict=True)), place)
            left -= place.size
        if left:  # check() says it better; but never give out memory that nobody wrote
            raise FormatError(f"the parts of a tensor of shape {list(self.shape)} do not cover {wanted} exactly once")

    def _check_cover(self, name: str) -> None:
        for offsets, view in self.parts:
            if any(o < 0 or o + n > s for o, n, s in zip(offsets, view.shape, self.shape, strict=True)):
                raise FormatError(
                    f"{name}: the part {_slices(_region(offsets, view))} ({files_of(view)}) is not inside the shape "
                    f"{list(self.shape)}"
                )
        index = RegionIndex([(_region(offsets, view), view) for offsets, view in self.parts])
        if len(self.parts) > 1:
            for offsets, view in self.parts:
                mine = _region(offsets, view)
                for region, other in index.overlapping(mine):
                    common = overlap(region, mine)
                    if other is not view and common is not None:
                        raise FormatError(
                            f"{name}: the region {_slices(common)} is there twice, in {files_of(view)} and in "
                            f"{files_of(other)}"
                        )
        if sum(view.numel for _, view in self.parts) == self.numel:
            return
        left: list[Region] = [((0,) * len(self.shape), self.shape)] if self.numel else []
        for offsets, view in self.parts:
            hole = _region(offsets, view)
            rest: list[Region] = []
            for piece in left:
                common = overlap(piece, hole)
                rest += [piece] if common is None else subtract(piece, common)
            left = rest
        if left:
            more = f" and {len(left) - 1} more regions" if len(left) > 1 else ""
            files = files_of(self)
            raise FormatError(
                f"{name}: the region {_slices(left[0])}{more} of shape {list(self.shape)} is in no file"
                + (f"; there are parts in {files}" if files else "")
            )


class Cut(View):
    """The box of ``base`` that begins at ``at`` and has ``shape``."""

    __slots__ = ("at", "base")

    def __init__(self, base: View, at: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__(base.dtype, shape)
        self.base, self.at = base, tuple(at)
        if not Box.whole(base.shape).contains(Box(self.at, self.shape)):
            box = Box(self.at, self.shape)
            raise FormatError(f"the box {box} is not inside the shape {list(base.shape)} ({files_of(base)})")

    def inner(self) -> Iterable[View]:
        return (self.base,)

    def read_into(self, at: Index, out: Words) -> None:
        self.base.read_into(tuple(a + b for a, b in zip(self.at, at, strict=True)), out)


class Reshaped(View):
    """The elements of ``base`` in row-major order, as an array of ``shape``."""

    __slots__ = ("base",)

    def __init__(self, base: View, shape: Sequence[int]) -> None:
        super().__init__(base.dtype, shape)
        if self.numel != base.numel:
            raise FormatError(f"{base.numel} elements ({files_of(base)}) cannot have the shape {list(self.shape)}")
        self.base = base

    def inner(self) -> Iterable[View]:
        return (self.base,)

    def read_into(self, at: Index, out: Words) -> None:
        if not out.size:
            return
        strides = _row_major(self.shape)
        # The dimensions behind `d` are taken whole, so that everything from d on is one run of the flat array.
        d = len(self.shape)
        while d > 0 and (d == len(self.shape) or out.shape[d] == self.shape[d]):
            d -= 1
        for outer in product(*(range(n) for n in out.shape[:d])):
            index = (*(a + i for a, i in zip(at, outer, strict=False)), *at[d:])
            begin = sum(i * s for i, s in zip(index, strides, strict=True))
            place = _part(out, outer)
            if place.flags.c_contiguous:
                _read_flat(self.base, begin, place.reshape(-1))
            else:
                step = max(1, SCRATCH_BYTES // max(1, place[:1].nbytes)) if place.ndim else 1
                for first in range(0, place.shape[0] if place.ndim else 1, step):
                    part = place[first : first + step] if place.ndim else place
                    scratch = np.empty(part.size, dtype=out.dtype)
                    _read_flat(self.base, begin + first * (part.size // max(1, len(part) if part.ndim else 1)), scratch)
                    part[...] = scratch.reshape(part.shape)


def stored_bytes(data: bytes, dtype: str, shape: Sequence[int], label: str = "memory") -> Stored:
    """Return a view of ``data``, row-major; FormatError unless it has exactly the bytes for that."""
    view = Stored(BytesSource(data, label), 0, dtype, shape)
    if view.nbytes != len(data):
        raise FormatError(f"{label}: {len(data)} bytes are no {dtype} of shape {list(shape)}")
    return view


def concat(views: Sequence[View], dim: int = 0) -> View:
    """Return the views one behind the other on ``dim``."""
    if len(views) == 1:
        return views[0]
    shape = list(views[0].shape)
    at = [0] * len(shape)
    parts: list[tuple[Sequence[int], View]] = []
    for view in views:
        parts.append((tuple(at), view))
        at[dim] += view.shape[dim]
    shape[dim] = at[dim]
    return Joined(views[0].dtype, shape, parts)


def flat_part(flat: View, begin: int, shape: Sequence[int]) -> View:
    """Return ``prod(shape)`` elements of the 1-d ``flat`` from ``begin`` on, in that shape."""
    numel = prod(shape)
    if type(flat) is Stored and flat.is_contiguous:  # stays one range of the file
        if not 0 <= begin <= begin + numel <= flat.numel:
            raise FormatError(f"[{begin}:{begin + numel}] is not inside {flat.numel} elements of {flat.source.label}")
        return Stored(flat.source, flat.offset + begin * flat.itemsize, flat.dtype, shape)
    return Reshaped(Cut(flat, (begin,), (numel,)), shape)


def read_all(view: View) -> Words:
    """Return all elements as words: for small tensors."""
    out = np.empty(view.shape, dtype=word_dtype(view.dtype))
    view.read_into((0,) * len(view.shape), out)
    return out


def slabs(shape: Index, itemsize: int, max_bytes: int) -> Iterator[tuple[Index, Index]]:
    """
    Iterate over (offsets, lengths) of boxes that are contiguous in row-major order, in that order, over all of
    ``shape``, each of at most ``max_bytes`` (but never less than one element).
    """
    if 0 in shape:
        return
    d, row = len(shape), itemsize
    while d > 0 and row * shape[d - 1] <= max_bytes:
        d -= 1
        row *= shape[d]
    if d == 0:
        yield (0,) * len(shape), shape
        return
    # Dimensions behind d - 1 are taken whole, dimension d - 1 in steps.
    step = max(1, max_bytes // row)
    tail = shape[d:]
    zeros = (0,) * len(tail)
    ones = (1,) * (d - 1)
    for outer in product(*(range(n) for n in shape[: d - 1])):
        for begin in range(0, shape[d - 1], step):
            yield (*outer, begin, *zeros), (*ones, min(step, shape[d - 1] - begin), *tail)


def _read_flat(view: View, begin: int, out: Words) -> None:
    """Fill the 1-d ``out`` with the elements of ``view`` from ``begin`` on in row-major order."""
    if not out.size:
        return
    shape = view.shape
    at = [0] * len(shape)

    def walk(d: int, begin: int, out: Words) -> None:
        if d >= len(shape) - 1:
            at_last = (*at[:-1], begin) if shape else ()
            view.read_into(at_last, out.reshape((1,) * (len(shape) - 1) + (out.size,)) if shape else out.reshape(()))
            return
        row = prod(shape[d + 1 :])
        first, skip = divmod(begin, row)
        done = 0
        if skip or out.size < row:
            done = min(row - skip, out.size)
            at[d] = first
            walk(d + 1, skip, out[:done])
            at[d] = 0
            first += 1
        rows = (out.size - done) // row
        if rows:
            box = (*at[:d], first, *(0 for _ in shape[d + 1 :]))
            view.read_into(box, out[done : done + rows * row].reshape((1,) * d + (rows, *shape[d + 1 :])))
            done += rows * row
            first += rows
        if done < out.size:
            at[d] = first
            walk(d + 1, 0, out[done:])
            at[d] = 0

    walk(0, begin, out)


def _region(offsets: Index, view: View) -> Region:
    return offsets, tuple(o + n for o, n in zip(offsets, view.shape, strict=True))


def _row_major(shape: Index) -> Index:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(1, shape[d + 1])
    return tuple(strides)


def _is_row_major(shape: Sequence[int], strides: Index) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _extent(shape: Sequence[int], strides: Index) -> int:
    """The distance of the last element from the first, in elements."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _part(out: Words, index: tuple[int | slice, ...]) -> Words:
    """Return ``out[index]``, but ``out`` itself where it has no dimensions: numpy would give a number, no view."""
    part: Words = out[index] if index else out
    return part


def _split(out: Words, d: int, at: int) -> tuple[Words, Words]:
    head = (slice(None),) * d
    return out[(*head, slice(None, at))], out[(*head, slice(at, None))]


def _slices(region: Region) -> str:
    return "[" + ", ".join(f"{begin}:{end}" for begin, end in zip(*region, strict=True)) + "]"


def files_of(view: View) -> str:
    labels = view.labels()
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
