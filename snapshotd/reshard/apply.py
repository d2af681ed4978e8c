"""
Carry out copies in memory, by numpy: one array assignment per copy, whatever its number of runs.

Between two processes the runs of a copy travel one behind the other: gathered here, scattered there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from snapshotd.errors import LayoutError
from snapshotd.reshard.copies import Copy

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

__all__ = ["apply_copy", "gather_copy", "scatter_copies"]

_SMALL_BYTES: Final = 16 * 1024
"""Of one run: moving it takes less than making arrays of it."""

_WORDS: Final[dict[int, np.dtype[Any]]] = {
    8: np.dtype(np.uint64),
    4: np.dtype(np.uint32),
    2: np.dtype(np.uint16),
    1: np.dtype(np.uint8),
}


def apply_copy(copy: Copy, src: Buffer, dst: Buffer) -> None:
    """
    Copy the bytes of ``copy`` from ``src``, the source file's bytes, to ``dst``, the target file's.

    Both are contiguous buffers from file offset 0 on and must not overlap. LayoutError if either is too short, or
    ``dst`` is read-only: nothing is written then.
    """
    source, target = memoryview(src), memoryview(dst)
    if target.readonly:
        raise LayoutError("cannot copy into a read-only buffer")
    for what, view, (begin, end) in (("source", source, copy.src_range), ("target", target, copy.dst_range)):
        if not view.c_contiguous:
            raise LayoutError(f"the {what} buffer is not contiguous")
        if not 0 <= begin <= end <= view.nbytes:
            raise LayoutError(f"the copy needs bytes [{begin}, {end}) of the {what}, which has {view.nbytes}")
    if not copy.nbytes:
        return
    if not copy.dims and copy.run_bytes <= _SMALL_BYTES and source.format == target.format == "B":
        target[slice(*copy.dst_range)] = source[slice(*copy.src_range)]
        return
    # Elements as wide as the runs allow: numpy moves runs of one word far faster than runs of some bytes.
    width = next(width for width in _WORDS if copy.run_bytes % width == 0)
    dtype = _WORDS[width]
    counts = tuple(dim[0] for dim in copy.dims)
    shape = (*counts, copy.run_bytes // width)
    # The constructor, unlike as_strided, checks once more that the strides stay inside the buffer.
    reads: npt.NDArray[Any] = np.ndarray(
        shape, dtype, buffer=source, offset=copy.src_begin, strides=(*(dim[1] for dim in copy.dims), width)
    )
    writes: npt.NDArray[Any] = np.ndarray(
        shape, dtype, buffer=target, offset=copy.dst_begin, strides=(*(dim[2] for dim in copy.dims), width)
    )
    np.copyto(writes, reads)


def gather_copy(copy: Copy, src: Buffer, out: Buffer) -> None:
    """Read the runs of ``copy`` from ``src`` into ``out``, one behind the other. LayoutError as for apply_copy()."""
    strides = copy.packed_strides()
    dims = tuple((count, there, here) for (count, there, _), here in zip(copy.dims, strides, strict=True))
    apply_copy(copy._replace(dst_begin=0, dims=dims), src, out)


def scatter_copies(copies: Iterable[Copy], packed: Buffer, targets: Sequence[Buffer]) -> None:
    """
    Carry out ``copies`` from the bytes that gather_copy() has put one behind the other for each of them in turn.

    ``targets`` are the target files' bytes, by their numbers in the copies.
    """
    at = 0
    for copy in copies:
        strides = copy.packed_strides()
        dims = tuple((count, here, there) for (count, _, there), here in zip(copy.dims, strides, strict=True))
        apply_copy(copy._replace(src_begin=at, dims=dims), packed, targets[copy.target])
        at += copy.nbytes
