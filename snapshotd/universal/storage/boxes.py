"""Boxes of views into torch tensors, tensors into bytes, and values with views in them as torch has them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from snapshotd.universal.globals import TorchDType
from snapshotd.universal.views import View, slabs
from snapshotd.universal.words import Words, word_dtype

__all__ = ["bytes_of", "read_box", "real_value", "tensor_of", "words_of"]

_SLAB_BYTES: Final = 8 << 20
_CARRIERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def read_box(view: View, at: tuple[int, ...], lengths: tuple[int, ...], target: torch.Tensor) -> None:
    """Fill ``target``, of any device and strides, with a box of ``view``; torch casts where the dtypes differ."""
    dtype = getattr(torch, view.dtype)
    if target.device.type == "cpu" and target.dtype == dtype:
        if target.numel():
            view.read_into(at, words_of(target))
        return
    for begin, sizes in slabs(lengths, view.itemsize, _SLAB_BYTES):
        part = torch.empty(sizes, dtype=dtype)
        if part.numel():
            view.read_into(tuple(a + b for a, b in zip(at, begin, strict=True)), words_of(part))
        place = target[tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))] if sizes else target
        place.copy_(part)


def words_of(tensor: torch.Tensor) -> Words:
    """Return the elements of a tensor in host memory as words, in the same memory."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    words: Words = plain.view(_CARRIERS[plain.element_size()]).numpy()
    return words.view(word_dtype(str(plain.dtype).removeprefix("torch.")))


def tensor_of(view: View) -> torch.Tensor:
    """Return all of ``view`` as a tensor: for small ones."""
    tensor = torch.empty(view.shape, dtype=getattr(torch, view.dtype))
    if tensor.numel():
        view.read_into((0,) * len(view.shape), words_of(tensor))
    return tensor


def real_value(value: Any) -> Any:
    """Return ``value`` with tensors in the place of views, and torch's dtypes in that of their names."""
    if isinstance(value, View):
        return tensor_of(value)
    if isinstance(value, TorchDType):
        return getattr(torch, str(value))
    if isinstance(value, (list, tuple)):
        return type(value)(real_value(item) for item in value)
    if isinstance(value, dict):
        return {key: real_value(item) for key, item in value.items()}
    return value


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor of any device and strides, row-major."""
    plain = np.ascontiguousarray(words_of(tensor.detach().cpu()))
    return plain.reshape(-1).view(np.uint8).data
