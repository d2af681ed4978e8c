"""
Views that change what they read: another order of dimensions, another dtype, the merge of copies; padding; and those
whose bytes have a digest.

See views.py for the rules; all of them hold here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from snapshotd.errors import CorruptionError, FormatError, LayoutError
from snapshotd.universal.sources import Source
from snapshotd.universal.views import SCRATCH_BYTES, Index, Stored, View, files_of, slabs
from snapshotd.universal.words import Words, cast, from_float, to_float, word_dtype

__all__ = ["Cast", "Deferred", "Filled", "Merged", "Permuted", "Sealed"]


class Permuted(View):
    """``base`` with its dimensions in the order ``axes``, as numpy's transpose does it."""

    __slots__ = ("axes", "base")

    def __init__(self, base: View, axes: Sequence[int]) -> None:
        if sorted(axes) != list(range(len(base.shape))):
            raise LayoutError(f"{tuple(axes)} is no order of the dimensions of {base.shape}")
        super().__init__(base.dtype, [base.shape[axis] for axis in axes])
        self.base, self.axes = base, tuple(axes)

    def inner(self) -> Iterable[View]:
        return (self.base,)

    def read_into(self, at: Index, out: Words) -> None:
        back = tuple(self.axes.index(d) for d in range(len(self.axes)))
        self.base.read_into(tuple(at[i] for i in back), out.transpose(back))


class Cast(View):
    """``base`` as ``dtype``, rounded to nearest even, multiplied by ``scale``."""

    __slots__ = ("base", "scale")

    def __init__(self, base: View, dtype: str, scale: float = 1.0) -> None:
        super().__init__(dtype, base.shape)
        self.base, self.scale = base, scale

    def inner(self) -> Iterable[View]:
        return (self.base,)

    def read_into(self, at: Index, out: Words) -> None:
        for begin, place in _bounded(at, out):
            scratch = np.empty(place.shape, dtype=word_dtype(self.base.dtype))
            self.base.read_into(begin, scratch)
            place[...] = cast(scratch, self.base.dtype, self.dtype, self.scale).reshape(place.shape)


class Merged(View):
    """
    Several copies of one array. ``how`` "equal": the first, FormatError where another differs in a bit. "average": the
    arithmetic mean, in float64, of elements that are not equal in all bits.
    """

    __slots__ = ("copies", "how", "name")

    def __init__(self, copies: Sequence[View], how: Literal["equal", "average"], name: str = "a tensor") -> None:
        if not copies:
            raise LayoutError("no copies to merge")
        super().__init__(copies[0].dtype, copies[0].shape)
        self.copies, self.how, self.name = tuple(copies), how, name
        for copy in copies:
            if copy.dtype != self.dtype or copy.shape != self.shape:
                raise FormatError(
                    f"{name}: copies differ: {self.dtype} {list(self.shape)} in {files_of(copies[0])}, {copy.dtype} "
                    f"{list(copy.shape)} in {files_of(copy)}"
                )

    def inner(self) -> Iterable[View]:
        return self.copies

    def read_into(self, at: Index, out: Words) -> None:
        for begin, place in _bounded(at, out):
            self.copies[0].read_into(begin, place)
            if self.how == "average":
                total = np.zeros(place.shape, dtype=np.float64)
                differs = np.zeros(place.shape, dtype=bool)
            for i, copy in enumerate(self.copies):
                scratch = np.empty(place.shape, dtype=place.dtype)
                if i or self.how == "average":
                    copy.read_into(begin, scratch)
                if self.how == "average":
                    total += to_float(scratch, self.dtype).reshape(place.shape)
                    differs |= scratch != place
                elif i and not np.array_equal(scratch, place):
                    raise FormatError(
                        f"{self.name} should be the same in {files_of(self.copies[0])} and {files_of(copy)}, "
                        "but differs"
                    )
            if self.how == "average":
                mean = from_float(total / len(self.copies), self.dtype).reshape(place.shape)
                place[...] = np.where(differs, mean, place)


class Sealed(Stored):
    """A whole tensor, ``what`` in words, of a file that says its ``digest``: who reads all of it compares."""

    __slots__ = ("digest", "what")

    def __init__(
        self, source: Source, offset: int, dtype: str, shape: Sequence[int], *, digest: str, what: str
    ) -> None:
        super().__init__(source, offset, dtype, shape)
        self.digest, self.what = digest, what

    def expect(self, digest: str) -> None:
        """Raise CorruptionError unless that is the digest."""
        if digest != self.digest:
            raise CorruptionError(
                f"{self.label}: {self.what} has the digest {digest}, expected {self.digest}: the file has changed, or "
                "rotted; copy it again, or convert it anew"
            )


class Filled(View):
    """``word`` everywhere: 0 for padding."""

    __slots__ = ("word",)

    def __init__(self, dtype: str, shape: Sequence[int], word: int = 0) -> None:
        super().__init__(dtype, shape)
        self.word = word

    def read_into(self, at: Index, out: Words) -> None:
        out[...] = self.word


class Deferred(View):
    """
    What ``load`` returns, which is called once, when it is first read. FormatError unless dtype and shape are as said.

    ``label`` names the file in messages.
    """

    __slots__ = ("_label", "_load", "_lock", "_view")

    def __init__(self, dtype: str, shape: Sequence[int], load: Callable[[], View], label: str = "") -> None:
        super().__init__(dtype, shape)
        self._load, self._label = load, label
        self._view: View | None = None
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        return self._label

    @property
    def view(self) -> View:
        with self._lock:
            if self._view is None:
                view = self._load()
                if view.dtype != self.dtype or view.shape != self.shape:
                    raise FormatError(
                        f"{self.label}: a tensor of {view.dtype} {list(view.shape)} where {self.dtype} "
                        f"{list(self.shape)} should be"
                    )
                self._view = view
            return self._view

    def check(self, name: str) -> None:
        pass  # what it loads is one range of a file

    def read_into(self, at: Index, out: Words) -> None:
        self.view.read_into(at, out)


def _bounded(at: Index, out: Words) -> Iterator[tuple[Index, Words]]:
    """Cut a box so that no part has more than SCRATCH_BYTES."""
    for begin, lengths in slabs(out.shape, out.itemsize, SCRATCH_BYTES):
        place = out[tuple(slice(b, b + n) for b, n in zip(begin, lengths, strict=True))] if out.ndim else out
        yield tuple(a + b for a, b in zip(at, begin, strict=True)), place
