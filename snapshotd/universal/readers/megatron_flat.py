"""
The flat gradient buffers of Megatron's distributed optimizer, which have neither names nor shapes.

The order is that of the buffer: a rank's parameters in reverse ``named_parameters()`` order, each at a multiple of 64
elements. Buckets are cut when they are full, and around an embedding that two stages share; each bucket begins at a
multiple of 128 (of lcm(data-parallel ranks, 128)) of the buffer, but the padding at its end is not in the file, so that
bucket after bucket the alignment begins anew. There is one buffer per model chunk and dtype, and one more for experts.

Nothing in the file proves a position. What can be proven is: the file's size, the places where the pieces of data-
parallel ranks begin (distributed checkpoints), and that the fp32 copies, rounded, are the weights beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_names import EMBEDDING, OUTPUT
from snapshotd.universal.views import Cut, View, concat, flat_part, read_all
from snapshotd.universal.words import cast

__all__ = ["Bucket", "Part", "bucket_places", "buffers_of", "layouts", "put_coalesced", "put_places"]

ALIGN: Final = 64
"""Parameters begin at 128 bytes of 16-bit elements (param_and_grad_buffer.py)."""

_SAMPLE: Final = 32
_KINDS: Final = {"param": "fp32", "fp32_param": "fp32"}


@dataclass(slots=True)
class Part:
    """
    A parameter as one rank has it: its name in the whole model, its view, and the views of its states by kind.

    ``local``: its name on that rank.
    """

    name: str
    view: View
    local: str = ""
    states: dict[str, View] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket of a buffer: its flat tensors by name, and the elements where its pieces are known to begin."""

    tensors: Mapping[str, View]
    begins: frozenset[int] | None = None

    @property
    def numel(self) -> int:
        return next(iter(self.tensors.values())).numel


def buffers_of(chunks: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """Return the parameters of each gradient buffer: one per chunk and dtype, in the order of their numbers."""
    result: list[list[Part]] = []
    for chunk in chunks:
        by_dtype: dict[str, list[Part]] = {}
        for part in chunk:
            by_dtype.setdefault(part.view.dtype, []).append(part)
        result += by_dtype.values()
    return result


def put_coalesced(
    buffers: Sequence[Sequence[Part]], saved: Mapping[Any, Any], facts: Facts, pp: int, label: str
) -> str | None:
    """
    Give each part its states out of what ``distrib_optim.pt`` holds for one optimizer; returns a warning or None.

    FormatError when sizes do not fit: names the file, the buffer, and both numbers.
    """
    found = {key: value for key, value in saved.items() if type(key) is int}
    if len(found) != len(buffers):
        raise FormatError(f"{label} has {len(found)} gradient buffers, but the model has {len(buffers)}")
    warnings: list[str] = []
    for i, parts in enumerate(buffers):
        tensors, total = _flat_tensors(found.get(i), bool(saved.get("buckets_coalesced")), f"{label}, buffer {i}")
        best: tuple[int, list[int]] | None = None
        for layout in layouts(parts, facts, pp):
            offsets, numel = layout
            if numel != total:
                continue
            right = sum(_agrees(part, tensors["param"], at) for part, at in zip(reversed(parts), offsets, strict=True))
            if best is None or right > best[0]:
                best = (right, offsets)
            if right == len(parts):
                break
        trained = _trained(parts, tensors["param"], total) if best is None else None
        if trained is not None:
            for part, at in trained:
                _put(part, tensors, at)
            continue
        if best is None:
            expected = next(layouts(parts, facts, pp))[1]
            raise FormatError(
                f"{label}, buffer {i}: {total} elements, but the model's {len(parts)} parameters take {expected}: "
                "the file is of another model or another iteration"
            )
        if best[0] < len(parts):
            warnings.append(
                f"{label}: in buffer {i}, {len(parts) - best[0]} of {len(parts)} fp32 copies are not the weights"
            )
        for part, at in zip(reversed(parts), best[1], strict=True):
            _put(part, tensors, at)
    return "; ".join(warnings) or None


def bucket_places(parts: Sequence[Part], buckets: Sequence[Bucket], label: str) -> list[tuple[Part, int, int]]:
    """Return (part, bucket, element in it) for the parameters of a buffer whose buckets' sizes are known."""
    result: list[tuple[Part, int, int]] = []
    bucket, at = 0, 0
    for part in reversed(parts):
        begin = -(-at // ALIGN) * ALIGN
        numel = part.view.numel
        if bucket < len(buckets) and begin + numel > buckets[bucket].numel and at:
            if buckets[bucket].numel not in (at, begin):
                raise _does_not_fit(label, part, bucket, begin, buckets[bucket].numel)
            bucket, begin = bucket + 1, 0
        if bucket >= len(buckets) or begin + numel > buckets[bucket].numel:
            size = buckets[bucket].numel if bucket < len(buckets) else 0
            raise _does_not_fit(label, part, bucket, begin, size)
        begins = buckets[bucket].begins
        if begins is not None and begin not in begins:
            raise FormatError(
                f"{label}: {part.name} should begin at element {begin} of bucket {bucket}, but no piece does: the "
                "order of the model's parameters is not the one known here"
            )
        result.append((part, bucket, begin))
        at = begin + numel
    if bucket != len(buckets) - 1 or buckets[bucket].numel not in (at, -(-at // ALIGN) * ALIGN):
        raise FormatError(
            f"{label}: the model's parameters end at element {at} of bucket {bucket}, but there are {len(buckets)} "
            f"buckets and that one has {buckets[bucket].numel} elements"
        )
    return result


def put_places(places: Sequence[tuple[Part, int, int]], buckets: Sequence[Bucket], label: str) -> str | None:
    """Give each part its states out of its bucket; returns a warning or None."""
    wrong = 0
    for part, bucket, at in places:
        tensors = buckets[bucket].tensors
        wrong += not _agrees(part, tensors.get("param"), at)
        _put(part, tensors, at)
    return f"{label}: {wrong} of {len(places)} fp32 copies are not the weights" if wrong else None


def _put(part: Part, tensors: Mapping[str, View], at: int) -> None:
    for name, flat in tensors.items():
        kind = _KINDS.get(name, name)
        if kind == "fp32" and part.view.dtype == "float32":
            continue  # the weights themselves: in fp32 training there is no second copy
        part.states[kind] = flat_part(flat, at, part.view.shape)


def _does_not_fit(label: str, part: Part, bucket: int, begin: int, size: int) -> FormatError:
    return FormatError(
        f"{label}: {part.name} {list(part.view.shape)} should be at element {begin} of bucket {bucket}, which has "
        f"{size} elements: the model's parameters are not those of the optimizer"
    )


def _flat_tensors(saved: Any, coalesced: bool, label: str) -> tuple[dict[str, View], int]:
    if not isinstance(saved, dict) or len(saved) != 1:
        raise FormatError(
            f"{label}: expected one dtype, found {len(saved) if isinstance(saved, dict) else saved!r:.40}"
        )
    values = next(iter(saved.values()))
    if not isinstance(values, dict):
        raise FormatError(f"{label}: a {type(values).__name__}, expected flat tensors by name")
    tensors: dict[str, View] = {}
    for name, value in values.items():
        if isinstance(value, TensorRef) and len(value.shape) == 1:
            tensors[name] = value.view
        elif isinstance(value, list) and value and all(isinstance(item, TensorRef) for item in value):
            tensors[name] = concat([item.view for item in value])  # before 2024: a tensor per bucket
    sizes = {view.numel for view in tensors.values()}
    said = values.get("numel_unpadded")
    if "param" not in tensors or len(sizes) != 1 or (type(said) is int and said not in sizes):
        raise FormatError(
            f"{label}: flat tensors {sorted(tensors)} of sizes {sorted(sizes)}, numel_unpadded {said!r:.20}: they "
            "should have one size; the file is damaged or of an unknown version"
        )
    return tensors, sizes.pop()


def layouts(parts: Sequence[Part], facts: Facts, pp: int) -> Iterator[tuple[list[int], int]]:
    """All layouts that Megatron's versions and options make: (element of each part, reversed; elements in all)."""

    def shared(part: Part) -> bool:
        return facts.pp > 1 and facts.tied is not False and part.local in (EMBEDDING, OUTPUT)

    limit: int | None = None
    if facts.flag("overlap_grad_reduce") and pp == 0:
        ranks = facts.data_parallel_size or 1
        limit = facts.count("ddp_bucket_size") or max(40_000_000, 1_000_000 * ranks)
        if buckets := facts.count("ddp_num_buckets"):
            limit = max(1, sum(part.view.numel for part in parts) // buckets)
    tried: set[tuple[int, ...]] = set()
    for align in (ALIGN, 1):
        for bucket in dict.fromkeys((limit, None)):
            for own in (shared, lambda part: False):
                offsets, numel = _layout(parts, align, bucket, own)
                if (*offsets, numel) not in tried:
                    tried.add((*offsets, numel))
                    yield offsets, numel


def _layout(
    parts: Sequence[Part], align: int, limit: int | None, shared: Callable[[Part], bool]
) -> tuple[list[int], int]:
    offsets: list[int] = []
    done = 0  # elements of the buckets that are finished
    at = 0  # in the open bucket
    for part in reversed(parts):
        begin = -(-at // align) * align
        if shared(part) and begin:
            done, begin = done + begin, 0
        offsets.append(done + begin)
        at = begin + part.view.numel
        if (limit is not None and at >= limit) or shared(part):
            done, at = done + at, 0
    return offsets, done + at


def _trained(parts: Sequence[Part], flat: View, total: int) -> list[tuple[Part, int]] | None:
    """
    The parameters of a buffer, some being frozen: those are in none. Which they are, nothing says; a parameter is left
    out when its weights do not stand where they should. None unless what is left has the buffer's size to the element.
    """
    found: list[tuple[Part, int]] = []
    at = 0
    for part in reversed(parts):
        begin = -(-at // ALIGN) * ALIGN
        if begin + part.view.numel <= total and _agrees(part, flat, begin):
            found.append((part, begin))
            at = begin + part.view.numel
    return found if at == total else None


def _agrees(part: Part, flat: View | None, at: int) -> bool:
    """Whether the fp32 copy at ``at``, rounded, is the weight: its first and last elements are looked at."""
    dtype = part.view.dtype
    if (
        flat is None
        or flat.dtype != "float32"
        or dtype not in ("bfloat16", "float16", "float32")
        or not part.view.numel
    ):
        return True
    for view, begin in _ends(part.view):
        weight = read_all(view).reshape(-1)
        copy = read_all(flat_part(flat, at + begin, (weight.size,)))
        if not np.array_equal(cast(copy, "float32", dtype).reshape(-1), weight):
            return False
    return True


def _ends(view: View) -> Iterator[tuple[View, int]]:
    """The first and the last few elements: (view, its first element in row-major order)."""
    if not view.shape:
        yield view, 0
        return
    last = view.shape[-1]
    count = min(_SAMPLE, last)
    ones = (1,) * (len(view.shape) - 1)
    yield Cut(view, (0,) * len(view.shape), (*ones, count)), 0
    at = (*(n - 1 for n in view.shape[:-1]), last - count)
    yield Cut(view, at, (*ones, count)), view.numel - count
