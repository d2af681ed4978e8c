"""
Where many tensors lie, of what shape each is and how often it was changed, read at once from the objects that torch
keeps of them.

Asking 10,000 tensors one by one takes 3 ms of each step, all but a tenth of it spent on waiting for memory. The same
words, gathered, take 0.6 ms, and their shapes 0.5 ms more. See docs/adr/0015.

Rule 1: no address is followed that may have ceased to be one. The caller holds the Python objects. What such an object
says belongs to it: only where that is what it was before, it is followed to the next. So this is for the training
thread, which replaces no tensor meanwhile, and not for one beside it.
Rule 2: nobody knows here how torch's objects are built. Where the words lie in them is found out from tensors made for
it, of which torch says what they are; and what was read so of each tensor is compared with what torch says of it.
Rule 3: where that does not work out (another torch, an unusual tensor), there is no ``Sight``, and torch is asked.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch

from snapshotd_client.arrays import Array
from snapshotd_client.counters import logger
from snapshotd_client.words import Trail, Words, offset_of, peek

__all__ = ["Sight"]

_TENSOR_BYTES: Final = 192
_STORAGE_BYTES: Final = 64
_COUNTER_BYTES: Final = 32
"""So much of such an object is looked through for its words."""

_INLINE_DIMS: Final = 5
"""Sizes and strides of so many dimensions lie in the tensor itself."""

_impl_of: Final = operator.attrgetter("_cdata")


class Sight:
    """
    What some tensors were when it was made: of each its memory, shape and strides, and its counter of changes in place.

    The caller holds ``objects`` and ``tensors`` (the former's local parts, the same objects where they are no DTensors)
    as long as it uses this. ``pointers`` is what torch says of where the tensors lie. ValueError where torch's objects
    do not say the same, or cannot be read (those of a tensor of more than five dimensions lie elsewhere).
    """

    __slots__ = ("_counters", "_lies", "_versions")

    def __init__(
        self, objects: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], pointers: Sequence[int]
    ) -> None:
        fields = _fields()
        if fields is None:
            raise ValueError("the fields of torch's objects are not to be found")
        self._lies = Trail()
        sharded = [(a, b) for a, b in zip(objects, tensors, strict=True) if a is not b]
        if sharded:
            slot = {type(outer): (outer, inner) for outer, inner in sharded}
            slot_of = {kind: _slot_of(*pair) for kind, pair in slot.items()}
            slots = [id(outer) + slot_of[type(outer)] for outer, _ in sharded]
            _expect(self._lies.follow(slots), [id(inner) for _, inner in sharded])
        inside = [id(tensor) + fields.tensor for tensor in tensors]
        impls = self._lies.follow(inside)
        _expect(impls, list(map(_impl_of, tensors)))
        both = self._lies.follow(np.concatenate((impls + fields.storage, impls + fields.offset)))
        storages, offsets = np.split(both, 2)
        if not storages.all():
            raise ValueError("a tensor without memory")
        data = self._lies.follow(storages + fields.data)
        sizes = np.array([tensor.element_size() for tensor in tensors], np.int64)
        said = np.array(pointers, np.int64)
        _expect(np.where(said == 0, 0, data + offsets * sizes), said)  # torch says 0 of what has no elements
        self._follow_shapes(fields, impls, tensors)

        self._counters = Trail()
        counters = self._counters.follow(self._counters.follow(inside) + fields.counter)
        # Inference tensors count nothing.
        self._versions = Words(counters + fields.version) if counters.all() else None

    def holds(self) -> bool:
        """Whether all tensors lie where they lay, and are of the shape that they were of."""
        return self._lies.holds()

    def versions(self) -> Array | None:
        """Return how often each was changed, as `torch.Tensor._version` does; None where torch has to be asked."""
        if self._versions is None or not self._counters.holds():
            return None
        return np.frombuffer(self._versions.read(), np.int64).astype(np.uint32)

    def _follow_shapes(self, fields: _Fields, impls: Array, tensors: Sequence[torch.Tensor]) -> None:
        dims = np.array([tensor.dim() for tensor in tensors], np.int64)
        if len(dims) and dims.max() > _INLINE_DIMS:
            raise ValueError("a tensor of many dimensions")
        total = int(dims.sum())
        nth = np.arange(total) - np.repeat(np.cumsum(dims) - dims, dims)
        begins = np.repeat(impls, dims) + 8 * nth
        places = np.concatenate((impls + fields.dim, begins + fields.size, begins + fields.stride))
        shapes = chain.from_iterable(tensor.shape for tensor in tensors)
        strides = chain.from_iterable(tensor.stride() for tensor in tensors)
        _expect(self._lies.follow(places), [*dims, *shapes, *strides])


@dataclass(frozen=True, slots=True)
class _Fields:
    """How many bytes from the beginning of its object each word lies."""

    tensor: int  # in Python's object of a tensor: where torch's begins
    storage: int  # in a tensor: where its storage begins
    offset: int  # in a tensor: elements of the storage before its own
    data: int  # in a storage: where its memory begins
    dim: int  # in a tensor: how many dimensions it has
    size: int  # in a tensor: the first of its sizes, which the others follow
    stride: int  # in a tensor: the first of its strides, likewise
    counter: int  # in a tensor: where its counter of changes begins
    version: int  # in a counter: the changes


@functools.cache
def _fields() -> _Fields | None:
    """None where this torch's objects are not as they are expected to be."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _find_fields()
    except (ValueError, OSError, AttributeError, TypeError, RuntimeError) as error:
        logger.warning(
            "snapshotd: torch %s does not keep its tensors as others do (%s): each is asked where it lies, which takes "
            "0.2 ms more of each step per 1,000 tensors",
            torch.__version__,
            error,
        )
        return None


def _find_fields() -> _Fields:
    long = torch.zeros(70_001, device="cpu")
    foreign = torch.from_numpy(np.zeros(7))  # torch's own memory is found twice: what frees it is its address, too
    tensors = [long[12_345:], long[70_000:], foreign, torch.nn.Parameter(torch.zeros(5, device="cpu"))]
    impls = list(map(_impl_of, tensors))
    storages = [tensor.untyped_storage() for tensor in tensors]
    begins = [storage._cdata for storage in storages]

    tensor = _place(list(map(id, tensors)), impls, torch._C.TensorBase.__basicsize__)
    storage = _place(impls, begins, _TENSOR_BYTES)
    offset = _place(impls, [int(tensor.storage_offset()) for tensor in tensors], _TENSOR_BYTES)
    data = _place(begins, [storage.data_ptr() for storage in storages], _STORAGE_BYTES)
    return _Fields(tensor, storage, offset, data, *_find_shape(), *_find_counter(storage))


def _find_shape() -> tuple[int, int, int]:
    shapes = [(23, 3, 5, 7, 11), (29, 13), (31, 2, 17, 19)]
    base = torch.zeros(10_000, device="cpu")
    tensors = [base.as_strided(shape, shape[::-1]) for shape in shapes]
    impls = list(map(_impl_of, tensors))
    words = ([len(shape) for shape in shapes], [shape[0] for shape in shapes], [shape[-1] for shape in shapes])
    dim, size, stride = (_place(impls, wanted, _TENSOR_BYTES) for wanted in words)
    return dim, size, stride


def _find_counter(storage: int) -> tuple[int, int]:
    """A tensor shares with its `detach` its counter and its storage, and with other tensors neither."""
    tensors = [torch.zeros(3, device="cpu") for _ in range(3)]
    views = [tensor.detach() for tensor in tensors]
    own, shared = (_columns(map(_impl_of, some), _TENSOR_BYTES) for some in (tensors, views))
    shared_alone = [place for place in own if own[place] == shared[place] and len(set(own[place])) == len(tensors)]
    [counter] = [place for place in shared_alone if place != storage]
    for tensor, times in zip(tensors, (1, 300, 77), strict=True):
        for _ in range(times):
            tensor.zero_()
    inside = _columns(own[counter], _COUNTER_BYTES)
    versions = [tensor._version for tensor in tensors]
    [version] = [place for place, words in inside.items() if [word & 0xFFFFFFFF for word in words] == versions]
    return counter, version


def _place(begins: Sequence[int], words: Sequence[int], within: int) -> int:
    return offset_of(*zip(begins, words, strict=True), within=within)


def _columns(begins: Iterable[int], nbytes: int) -> dict[int, tuple[int, ...]]:
    """The words of some objects, by how many bytes from the beginning they lie."""
    rows = [peek(begin, nbytes) for begin in begins]
    return {number * 8: words for number, words in enumerate(zip(*rows, strict=True))}


def _slot_of(outer: torch.Tensor, inner: torch.Tensor) -> int:
    """How many bytes from its beginning a DTensor has the address of its local part."""
    return offset_of((id(outer), id(inner)), within=type(outer).__basicsize__)


def _expect(found: Array, said: Sequence[int] | Array) -> None:
    if not np.array_equal(found, np.asarray(said, np.int64)):
        raise ValueError("torch's objects do not say what torch says")
