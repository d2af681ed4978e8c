"""
Tensor-parallel shards put together by what the checkpoint says itself: ``universal_checkpoint_info``.

The order of the rules is DeepSpeed's: the affine map, replicated, averaged, two halves, sub-parameters, rows, and what
nothing names is joined on dimension 0; then the vocabulary's padding is cut off. Patterns are anchored at their begin
only, as DeepSpeed matches them (``re.match``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Cast, Merged
from snapshotd.universal.rules import Rules, join_parts, merge, name_list
from snapshotd.universal.standins import Record
from snapshotd.universal.views import Cut, Joined, Reshaped, View, concat, files_of, flat_part

__all__ = ["Patterns", "Shards"]

_SCALE_POWER: Final = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
_RUNS_MAX: Final = 1 << 20
_PATTERN_CHARS_MAX: Final = 4096


class Patterns:
    """A list of regular expressions; those that are one escaped name, as AutoTP writes them, are looked up."""

    def __init__(self, patterns: Sequence[Any], what: str) -> None:
        self.what = what
        self._exact: dict[str, str] = {}
        self._others: list[tuple[str, re.Pattern[str]]] = []
        for pattern in patterns:
            if not isinstance(pattern, str) or len(pattern) > _PATTERN_CHARS_MAX:
                raise FormatError(f"{what}: {pattern!r:.80} is no pattern")
            name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
            if pattern == f"^{re.escape(name)}$":
                self._exact[name] = pattern
                continue
            try:
                self._others.append((pattern, re.compile(pattern)))
            except (re.error, OverflowError, RecursionError) as error:
                raise FormatError(f"{what}: {pattern!r:.80} is no regular expression: {error}") from error

    def find(self, name: str, *, first: bool = False) -> str | None:
        """The pattern that matches; FormatError when several do, unless the ``first`` is wanted."""
        found = [self._exact[name]] if name in self._exact else []
        found += [pattern for pattern, compiled in self._others if compiled.match(name)]
        if len(found) > 1 and not first:
            raise FormatError(
                f"{self.what}: {name} is matched by {found[0]!r:.80} and by {found[1]!r:.80} (patterns are open at "
                "their end: close them with $)"
            )
        return found[0] if found else None


class Shards:
    """
    How the shards of ``tp`` ranks make a whole, as ``info`` says it; ``where`` names the file that has it.

    ``rules``: for what nothing names, before it is joined on dimension 0.
    """

    def __init__(self, info: Mapping[str, Any], tp: int, where: str, rules: Rules | None = None) -> None:
        self.info, self.tp, self.where, self.rules = info, tp, where, rules
        self.averaged: set[str] = set()
        self.version = info.get("universal_checkpoint_version", 0.0)
        if not isinstance(self.version, (int, float)):
            self.version = 0.0
        self._lists = {
            key: self._patterns(key)
            for key in (
                *("tp_replicated_parameter_patterns", "parameter_to_average_patterns"),
                *("parameter_with_2_sub_params_cat_dim_0", "parameter_with_row_parallelism_patterns"),
                "vocabulary_parameter_patterns",
            )
        }
        self._subs: dict[str, Mapping[str, Any]] = {}
        for entry in info.get("parameter_with_sub_params") or ():
            fields = entry.fields if isinstance(entry, Record) else entry
            if not isinstance(fields, dict):
                raise FormatError(f"{where}: parameter_with_sub_params has {entry!r:.80}")
            for pattern in fields.get("patterns") or ():
                self._subs.setdefault(pattern, fields)
        self._sub_patterns = Patterns(list(self._subs), f"{where}: parameter_with_sub_params")
        unsupported = info.get("autotp_unsupported_parameter_patterns") or {}
        self._unsupported = unsupported if isinstance(unsupported, dict) else dict.fromkeys(unsupported, "")
        self._unsupported_patterns = Patterns(list(self._unsupported), where)
        self._affine = self._affine_map()
        self._affine_patterns = Patterns(list(self._affine), f"{where}: affine_map")

    def merge(self, kind: str, name: str, shards: Sequence[View]) -> View:
        """Return the whole of ``name`` of its shards, by tensor-parallel rank."""
        affine = self._affine_patterns.find(name)
        if affine is not None:
            return self._by_map(kind, name, shards, self._affine[affine])
        unsupported = self._unsupported_patterns.find(name, first=True)
        if unsupported is not None:
            raise FormatError(
                f"{self.where}: {name} was cut in a way that DeepSpeed itself says cannot be put together: "
                f"{self._unsupported[unsupported]!s:.200}"
            )
        whole = self._by_pattern(kind, name, shards)
        if self._lists["vocabulary_parameter_patterns"].find(name) is not None:
            rows = self.info.get("original_vocab_size")
            if type(rows) is not int or rows < 1:
                raise FormatError(f"{self.where}: original_vocab_size is {rows!r:.40}, but {name} is a vocabulary")
            if whole.shape and whole.shape[0] > rows:
                return Cut(whole, (0,) * len(whole.shape), (rows, *whole.shape[1:]))
        return whole

    def warnings(self) -> list[str]:
        """Return what a person should know of what was done."""
        if not self.averaged:
            return []
        return [f"averaged over {self.tp} ranks, which no rank had: {name_list(sorted(self.averaged))}"]

    def _by_pattern(self, kind: str, name: str, shards: Sequence[View]) -> View:
        if self._lists["tp_replicated_parameter_patterns"].find(name) is not None:
            return Merged(shards, "equal", name)
        if self._lists["parameter_to_average_patterns"].find(name) is not None:
            self.averaged.add(name)
            return Merged(shards, "average", name)
        if self._lists["parameter_with_2_sub_params_cat_dim_0"].find(name) is not None:
            widths = []
            for shard in shards:
                rows = shard.shape[0] if shard.shape else 1
                # torch.chunk: the first half is the larger one.
                widths.append(((rows + 1) // 2, rows // 2))
            return join_parts(shards, 0, [[pair[half] for pair in widths] for half in (0, 1)])
        pattern = self._sub_patterns.find(name, first=True)
        if pattern is not None:
            return self._by_sub_params(name, shards, pattern)
        row = self._lists["parameter_with_row_parallelism_patterns"].find(name) is not None
        rule = None if row or self.rules is None else self.rules.find(kind, name)
        if rule is not None:
            return merge(rule, name, shards)
        dim = 1 if row else 0
        if any(len(shard.shape) <= dim for shard in shards):
            raise FormatError(
                f"{self.where}: {name} of shape {list(shards[0].shape)} cannot be joined on dimension {dim}; a pattern "
                "must say how its shards make a whole"
            )
        return concat(shards, dim)

    def _by_sub_params(self, name: str, shards: Sequence[View], pattern: str) -> View:
        fields = self._subs[pattern]
        spec, dim = fields.get("shape"), fields.get("partition_dim")
        if not isinstance(spec, (list, tuple)) or type(dim) is not int or not 0 <= dim < len(spec):
            raise FormatError(f"{self.where}: the sub-parameters of {name} are {fields!r:.120}")
        sizes = spec[dim]
        if isinstance(sizes, (list, tuple)):
            sizes = list(sizes)
        else:
            full = sum(shard.shape[dim] if dim < len(shard.shape) else shard.numel for shard in shards)
            if type(sizes) is not int or sizes < 1 or full % sizes:
                raise FormatError(f"{self.where}: {sizes!r:.40} sub-parameters of {name}, whose size is {full}")
            sizes = [full // sizes] * sizes
        widths = (self.info.get("sub_param_shard_widths") or {}).get(pattern)
        if widths is None:
            if self.version >= 0.4 or any(size % self.tp for size in sizes):
                raise FormatError(
                    f"{self.where}: no sub_param_shard_widths for {name}, whose sub-parameters have the sizes {sizes} "
                    f"over {self.tp} ranks: how it was cut is not known; convert it with the DeepSpeed that wrote it"
                )
            widths = [[size // self.tp] * self.tp for size in sizes]
        if [sum(row) for row in widths] != sizes or any(len(row) != self.tp for row in widths):
            raise FormatError(f"{self.where}: sub_param_shard_widths {widths!r:.120} of {name} do not make {sizes}")
        logical = [sum(entry) if isinstance(entry, (list, tuple)) else entry for entry in spec]
        logical[dim] = sum(sizes)
        total = sum(shard.numel for shard in shards)
        if -1 in logical:
            known = -prod(logical)
            if logical.count(-1) > 1 or known <= 0 or total % known:
                raise FormatError(f"{self.where}: the shape {logical} of {name} does not fit its {total} elements")
            logical[logical.index(-1)] = total // known
        local = [
            _as_shape(shard, (*logical[:dim], sum(row[t] for row in widths), *logical[dim + 1 :]), name)
            for t, shard in enumerate(shards)
        ]
        whole = join_parts(local, dim, widths)
        natural = shards[0].shape
        return Reshaped(whole, (whole.numel,)) if len(natural) == 1 and len(whole.shape) > 1 else whole

    def _by_map(self, kind: str, name: str, shards: Sequence[View], entry: Mapping[str, Any]) -> View:
        """``shard == full * scale``, piece by piece; the moments scale with other powers."""
        what = f"{self.where}: affine_map of {name}"
        shape = _counts(entry.get("logical_shape"), what)
        ranks = entry.get("ranks")
        if not isinstance(ranks, dict) or sorted(map(int, ranks)) != list(range(len(shards))):
            raise FormatError(f"{what} has the ranks {list(ranks or ())!r:.80}, expected {len(shards)}")
        copies: dict[tuple[Any, ...], list[tuple[Any, View]]] = {}
        for rank, listed in ranks.items():
            shard = shards[int(rank)]
            if _counts(listed.get("shard_shape"), what) != shard.shape:
                raise FormatError(
                    f"{what}: the shard of rank {rank} has the shape {list(shard.shape)} ({files_of(shard)}), expected "
                    f"{listed.get('shard_shape')}"
                )
            for piece in listed.get("pieces") or ():
                size = _counts(piece.get("shape"), what)
                if prod(size):
                    copies.setdefault((size, *_place(piece, "source", what)), []).append((piece, shard))
        flat: list[tuple[Sequence[int], View]] = []
        boxes: list[tuple[Sequence[int], View]] = []
        for (size, offset, strides), held in copies.items():
            views = [self._piece(kind, piece, shard, size, what) for piece, shard in held]
            whole = views[0] if len(views) == 1 else Merged(views, "equal", name)
            at = _box_at(offset, size, strides, shape)
            if at is not None:
                boxes.append((at, whole))
            else:
                flat += _runs(whole, size, offset, strides, what)
        if not flat:
            return Joined(shards[0].dtype, shape, boxes)
        for place, view in boxes:
            strides = _row_major(shape)
            flat += _runs(view, view.shape, sum(a * s for a, s in zip(place, strides, strict=True)), strides, what)
        return Reshaped(Joined(shards[0].dtype, (prod(shape),), flat), shape)

    def _piece(self, kind: str, piece: Mapping[str, Any], shard: View, size: tuple[int, ...], what: str) -> View:
        offset, strides = _place(piece, "dest", what)
        at = _box_at(offset, size, strides, shard.shape)
        if at is not None:
            view: View = Cut(shard, at, size)
        else:
            flat = Reshaped(shard, (shard.numel,))
            runs = [
                (begin, flat_part(flat, source, (count,)))
                for begin, source, count in _run_list(size, offset, strides, what)
            ]
            view = Reshaped(Joined(shard.dtype, (prod(size),), [((begin,), part) for begin, part in runs]), size)
        scale = piece.get("scale", 1.0)
        if not isinstance(scale, (int, float)) or not scale:
            raise FormatError(f"{what}: a piece has the scale {scale!r:.40}")
        factor = float(scale) ** _SCALE_POWER.get(kind, 1)
        return view if factor == 1.0 else Cast(view, view.dtype, 1.0 / factor)

    def _patterns(self, key: str) -> Patterns:
        patterns = self.info.get(key) or []
        if not isinstance(patterns, (list, tuple)):
            raise FormatError(f"{self.where}: {key} is {patterns!r:.80}, expected a list of patterns")
        return Patterns(patterns, f"{self.where}: {key}")

    def _affine_map(self) -> dict[str, Mapping[str, Any]]:
        found = self.info.get("affine_map")
        if not isinstance(found, dict):
            return {}
        if found.get("version") != 1:
            raise FormatError(
                f"{self.where}: affine_map has version {found.get('version')!r:.40}; this program reads 1: update "
                "snapshotd"
            )
        params = found.get("params")
        return {pattern: entry for pattern, entry in (params or {}).items() if isinstance(entry, dict)}


def _as_shape(view: View, shape: Sequence[int], name: str) -> View:
    if view.numel != prod(shape):
        raise FormatError(
            f"{name}: a shard has {view.numel} elements ({files_of(view)}), but its sub-parameters make {list(shape)}"
        )
    return view if view.shape == tuple(shape) else Reshaped(view, shape)


def _place(piece: Mapping[str, Any], side: str, what: str) -> tuple[int, tuple[int, ...]]:
    """Offset and strides of a piece in the full tensor ("source") or in the shard ("dest")."""
    value = piece.get(side)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or type(value[0]) is not int or value[0] < 0:
        raise FormatError(f"{what}: {side} is {value!r:.80}, expected an offset and strides")
    return value[0], _counts(value[1], what)


def _counts(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or any(type(n) is not int or n < 0 for n in value):
        raise FormatError(f"{what}: {value!r:.80} are no sizes or strides")
    return tuple(value)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def _box_at(offset: Any, size: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    """Where a strided block lies in a dense array of ``shape``; None when it is no box there."""
    if type(offset) is not int or offset < 0 or len(size) != len(shape) or len(strides) != len(shape):
        return None
    at: list[int] = []
    for n, stride, length, dense in zip(size, strides, shape, _row_major(shape), strict=True):
        index, offset = divmod(offset, max(1, dense))
        if (n != 1 and stride != dense) or index + n > length:
            return None
        at.append(index)
    return at if offset == 0 else None


def _run_list(size: Sequence[int], offset: int, strides: Sequence[int], what: str) -> list[tuple[int, int, int]]:
    """(begin among the block's elements, offset, length) of the runs of a strided block."""
    if len(size) != len(strides):
        raise FormatError(f"{what}: {len(size)} sizes and {len(strides)} strides")
    if not size:
        return [(0, offset, 1)]
    d, run = len(size), 1
    while d > 0 and strides[d - 1] == run:
        d -= 1
        run *= size[d]
    outer = prod(size[:d])
    if outer > _RUNS_MAX:
        raise FormatError(f"{what} has more than {_RUNS_MAX} runs")
    runs: list[tuple[int, int, int]] = []
    for i in range(outer):
        at, rest = offset, i
        for n, stride in zip(reversed(size[:d]), reversed(strides[:d]), strict=True):
            rest, index = divmod(rest, n)
            at += index * stride
        runs.append((i * run, at, run))
    return runs


def _runs(
    view: View, size: Sequence[int], offset: int, strides: Sequence[int], what: str
) -> list[tuple[Sequence[int], View]]:
    flat = Reshaped(view, (view.numel,))
    return [((at,), flat_part(flat, begin, (count,))) for begin, at, count in _run_list(size, offset, strides, what)]
