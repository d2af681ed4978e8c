"""
The tensors of a layout by name, and which of them are alike: for who joins many layouts.

It touches little memory: where a restore asks for all tensors of a model, its caches have been used for other things.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import xxhash

from snapshotd.layout.box import Scope, TensorBox

__all__ = ["Index", "index_of"]


class Index(NamedTuple):
    """
    Where in a layout's shards each tensor is, and a number for each shard: those with the same one differ in nothing
    but name and place. Layouts with equal ``names`` (a digest) have the same tensors in the same order.
    """

    places: Mapping[tuple[str, Scope], tuple[int, ...]]
    likes: tuple[int, ...]
    names: bytes


def index_of(tensors: Iterable[TensorBox]) -> Index:
    """Return the index of ``tensors``, in their order."""
    places: defaultdict[tuple[str, Scope], tuple[int, ...]] = defaultdict(tuple)
    numbers: dict[tuple[object, ...], int] = {}
    likes: list[int] = []
    digest = xxhash.xxh3_128()
    for place, tensor in enumerate(tensors):
        places[tensor.name, tensor.scope] += (place,)
        digest.update(f"{len(tensor.name)} {tensor.scope} {tensor.name}".encode())
        like = tensor.dtype, tensor.global_shape, tensor.box, tensor.scope, tensor.kind
        likes.append(numbers.setdefault(like, len(numbers)))
    return Index(dict(places), tuple(likes), digest.digest())
