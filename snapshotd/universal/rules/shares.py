"""
Shares: the geometry of a rule. What each rank has of a whole, and the whole of what the ranks have; ``split`` and
``merge`` are each other's inverse. Pure: views in, views out, nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.derived import Filled, Merged
from snapshotd.universal.rules.language import Rule, Rules, name_list
from snapshotd.universal.views import Cut, Joined, Reshaped, View, concat, files_of, flat_part

__all__ = ["Rejoiner", "merge", "split", "widths"]


def widths(rule: Rule, length: int, ranks: int, name: str) -> list[list[int]]:
    """
    Return ``[part][rank]``: how much of each sub-part of a dimension of ``length`` each rank has.

    UsageError where the parts do not divide the length, or the ranks do not divide a part and ``uneven`` is not set.
    """
    units = rule.units
    unit, rest = divmod(length, sum(units))
    if rest:
        raise UsageError(f"{rule.where}: the parts {units} do not divide the size {length} of {name}")
    rows: list[list[int]] = []
    for size in (count * unit for count in units):
        if rule.ranks:
            rows.append(_weighted(rule, size, ranks, name))
            continue
        step, odd = -(-size // ranks), size % ranks
        if odd and not rule.uneven:
            raise UsageError(
                f"{rule.where}: {size} of {name} cannot be divided over {ranks} ranks; uneven = true cuts it as "
                "torch.chunk does"
            )
        rows.append([max(0, min(step, size - rank * step)) for rank in range(ranks)])
    return rows


def merge(rule: Rule, name: str, views: Sequence[View], shape: Sequence[int] | None = None) -> View:
    """
    Return the whole of ``name``, of which ``views`` are what the ranks have, in their order.

    ``shape``: of the whole, for flattened ones whose rule does not say it. FormatError where shapes contradict the
    rule.
    """
    first = views[0]
    if rule.how == "averaged" and first.shape:
        return first if len(views) == 1 else Merged(views, "average", name)
    if rule.how == "flattened" and first.shape:
        return _unflattened(rule, name, views, shape)
    if rule.how == "sharded" and first.shape:
        return _merge_sharded(rule, name, views)
    return first if len(views) == 1 else Merged(views, "equal", name)


def split(rule: Rule, name: str, view: View, ranks: int) -> list[View]:
    """Return what each of ``ranks`` ranks has of the whole ``view``: the inverse of ``merge``."""
    if rule.how in ("replicated", "averaged") or not view.shape:
        return [view] * ranks
    if rule.how == "flattened":
        return _flattened(view, ranks)
    _check_dim(rule, name, view)
    if rule.vocabulary is not None:
        view = _padded(rule, view, ranks)
    return _cuts(view, rule.dim, widths(rule, view.shape[rule.dim], ranks, name))


class Rejoiner:
    """
    Puts the shards of tensor-parallel ranks together by rules, and remembers what should be said about it.

    ``padding``: by (kind, name), the rows behind a vocabulary that were cut off.
    """

    def __init__(self, rules: Rules, ranks: int) -> None:
        self.rules, self.ranks = rules, ranks
        self.averaged: set[str] = set()
        self.padded: set[str] = set()
        self.padding: dict[tuple[str, str], View] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def merge(self, kind: str, name: str, shards: Sequence[View]) -> View:
        """Return the whole of ``name``. UsageError where no rule covers it; weights should come before their states."""
        rule = self.rules.find(kind, name)
        if rule is None:
            self.rules.require(kind, [name], f"it is on {self.ranks} ranks, and the source does not record how")
            raise AssertionError("unreachable")
        whole = merge(rule.as_padded(), name, shards, self._shapes.get(name))
        whole, rest = _cut_vocabulary(rule, name, whole)
        if rest is not None:
            self.padding[kind, name] = rest
        self._shapes.setdefault(name, whole.shape)
        if rule.how == "averaged" and whole.shape:
            self.averaged.add(name)
        if rule.vocabulary == 0:
            self.padded.add(name)
        return whole

    def warnings(self) -> list[str]:
        """Return what a person should know of what was done."""
        lines = []
        if self.averaged:
            lines.append(f"averaged over {self.ranks} ranks, which no rank had: {name_list(sorted(self.averaged))}")
        if self.padded:
            lines.append(
                f"the true size of the vocabulary is not known, so padding stays on {name_list(sorted(self.padded))}: "
                "say vocabulary = ROWS in the rules"
            )
        return lines


def _merge_sharded(rule: Rule, name: str, views: Sequence[View]) -> View:
    dim, first = rule.dim, views[0]
    _check_dim(rule, name, first)
    for view in views:
        others = [d for d in range(len(first.shape)) if d != dim]
        same = view.dtype == first.dtype and len(view.shape) == len(first.shape)
        if not same or any(view.shape[d] != first.shape[d] for d in others):
            raise FormatError(
                f"{name}: {first.dtype} {list(first.shape)} in {files_of(first)} and {view.dtype} {list(view.shape)} "
                f"in {files_of(view)} are no parts of one tensor on dimension {dim} ({rule.where})"
            )
    if len(rule.units) == 1:
        whole = concat(views, dim)
    else:
        length = sum(view.shape[dim] for view in views)
        rows = widths(rule, length, len(views), name)
        for rank, view in enumerate(views):
            expected = sum(row[rank] for row in rows)
            if view.shape[dim] != expected:
                raise FormatError(
                    f"{name}: rank {rank} has {view.shape[dim]} of {length} on dimension {dim} ({files_of(view)}), by "
                    f"{rule.where} it should have {expected}"
                )
        whole = join_parts(views, dim, rows)
    return _cut_vocabulary(rule, name, whole)[0]


def _cut_vocabulary(rule: Rule, name: str, whole: View) -> tuple[View, View | None]:
    """The true rows of a vocabulary, and its padding if it has any."""
    rows, dim = rule.vocabulary, rule.dim
    if not isinstance(rows, int) or not rows or not whole.shape or rows == whole.shape[dim]:
        return whole, None
    if rows > whole.shape[dim]:
        raise FormatError(
            f"{name} has {whole.shape[dim]} rows in all ({files_of(whole)}), by {rule.where} it should have {rows} and "
            "padding behind them"
        )
    return _slice(whole, dim, 0, rows), _slice(whole, dim, rows, whole.shape[dim] - rows)


def join_parts(views: Sequence[View], dim: int, rows: Sequence[Sequence[int]]) -> View:
    """Return the whole of shards that have a piece of each sub-part, ``rows[part][rank]`` wide, one after the other."""
    parts: list[tuple[Sequence[int], View]] = []
    taken, at = [0] * len(views), 0
    for row in rows:
        for rank, (view, width) in enumerate(zip(views, row, strict=True)):
            if width:
                parts.append((_at(view, dim, at), _slice(view, dim, taken[rank], width)))
            taken[rank] += width
            at += width
    shape = list(views[0].shape)
    shape[dim] = at
    return Joined(views[0].dtype, shape, parts)


def _cuts(view: View, dim: int, rows: Sequence[Sequence[int]]) -> list[View]:
    result: list[View] = []
    for rank in range(len(rows[0])):
        pieces: list[View] = []
        begin = 0
        for row in rows:
            pieces.append(_slice(view, dim, begin + sum(row[:rank]), row[rank]))
            begin += sum(row)
        result.append(concat(pieces, dim))
    return result


def _weighted(rule: Rule, size: int, ranks: int, name: str) -> list[int]:
    weights = [weight for weight in rule.ranks if isinstance(weight, int)]
    if len(weights) != ranks:
        raise UsageError(f"{rule.where}: ranks = {weights}, but {name} is on {ranks} ranks")
    unit, rest = divmod(size, sum(weights))
    if rest:
        raise UsageError(f"{rule.where}: ranks = {weights} do not divide {size} of {name}")
    return [weight * unit for weight in weights]


def _padded(rule: Rule, view: View, ranks: int) -> View:
    step = ranks * (rule.multiple if isinstance(rule.multiple, int) else 1)
    missing = -view.shape[rule.dim] % step
    if not missing:
        return view
    shape = list(view.shape)
    shape[rule.dim] = missing
    return concat([view, Filled(view.dtype, shape)], rule.dim)


def _unflattened(rule: Rule, name: str, views: Sequence[View], shape: Sequence[int] | None) -> View:
    sizes = tuple(size for size in rule.shape if isinstance(size, int)) if rule.shape else shape
    if any(len(view.shape) != 1 for view in views):
        if len(views) == 1:
            return views[0]
        raise FormatError(f"{name} is not flat in {files_of(views[0])}, though {rule.where} says so")
    flat = concat(views)
    if sizes is None:
        raise UsageError(f"{rule.where}: the shape of {name} is not known; say shape = [...]")
    if prod(sizes) > flat.numel:
        raise FormatError(f"{name} has {flat.numel} elements in all ({files_of(flat)}), too few for {list(sizes)}")
    return flat_part(flat, 0, sizes)


def _flattened(view: View, ranks: int) -> list[View]:
    flat: View = Reshaped(view, (view.numel,))
    step = -(-view.numel // ranks)
    if step * ranks > view.numel:
        flat = concat([flat, Filled(view.dtype, (step * ranks - view.numel,))])
    return [Cut(flat, (rank * step,), (step,)) for rank in range(ranks)]


def _check_dim(rule: Rule, name: str, view: View) -> None:
    if rule.dim >= len(view.shape):
        raise UsageError(f"{rule.where}: {name} has the shape {list(view.shape)}, and no dimension {rule.dim}")


def _at(view: View, dim: int, at: int) -> list[int]:
    place = [0] * len(view.shape)
    place[dim] = at
    return place


def _slice(view: View, dim: int, at: int, width: int) -> View:
    shape = list(view.shape)
    shape[dim] = width
    return Cut(view, _at(view, dim, at), shape)
