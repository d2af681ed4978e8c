"""
ZeRO's optimizer files of one model-parallel rank, put together: masters, optimizer states, steps, groups.

Stage 1 and 2: the parameters of a group lie one behind the other in a flat buffer, which is cut in equal parts, one for
each data-parallel rank; a parameter begins and ends anywhere. Stage 3: each parameter is cut on its own, in parts of
``ceil(numel / ranks)``, and a rank's flat buffer is its parts one behind the other.

Rule 1: ``param_shapes`` of the model file is the law for the order: ``param_slice_mappings`` has the offsets before the
round-robin shuffle.
Rule 2: a state's name is whatever the optimizer calls it. A tensor as long as the partition is a state; a number is one
value for all parameters of the group ("step", mostly).
Rule 3: lengths are checked against the partition, since some are saved with the padding at their end and some without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.deepspeed_experts import Experts, rank_sets
from snapshotd.universal.readers.deepspeed_files import Saved
from snapshotd.universal.readers.deepspeed_groups import (
    Shapes,
    alignment,
    dict_of,
    hyperparameters,
    inner_of,
    list_of,
    padding,
    param_shapes,
    partitions,
    stage3_sets,
    sub_groups,
    user_order,
)
from snapshotd.universal.state import scalar
from snapshotd.universal.views import Reshaped, View, concat, flat_part, read_all
from snapshotd.universal.words import to_float

__all__ = ["MASTER", "Group", "Optim", "number_view", "read_flat", "read_stage3"]

MASTER = "fp32"
"""The kind under which the weights' masters are collected, whatever their dtype."""

@dataclass(slots=True)
class Group:
    """A parameter group: its parameters in order, and its hyperparameters as the file has them."""

    names: list[str]
    values: dict[str, Any]


@dataclass(slots=True)
class Optim:
    """What the optimizer files of one model-parallel rank hold."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[tuple[str, str], View] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)
    """Values beside the tensors: loss scaler, gradient clipping, ..."""
    odd: dict[str, Any] = field(default_factory=dict)
    """States that are neither as long as the partition nor one number, by file."""
    warnings: list[str] = field(default_factory=list)


def read_flat(
    model: Saved, files: Sequence[Saved], dp_before_ep: bool = False, shapes: Shapes | None = None
) -> Optim:
    """
    Return what the files of stage 1 or 2 (and BF16_Optimizer) hold; ``files`` by data-parallel rank.

    ``dp_before_ep``: ``use_data_before_expert_parallelism`` of the configuration. ``shapes``: instead of those in the
    model file.
    """
    shapes = param_shapes(model) if shapes is None else shapes
    result = Optim()
    values = [inner_of(saved) for saved in files]
    for saved, value in zip(files, values, strict=True):
        count = len(list_of(value, "single_partition_of_fp32_groups", saved))
        if count != len(shapes):
            raise FormatError(
                f"{saved.path} has {count} parameter groups, {model.name} has {len(shapes)}: the files are of "
                "different runs; take all files of one run"
            )
    hypers = hyperparameters(files, values, len(shapes))
    for g, group in enumerate(shapes):
        holes = alignment(files[0], values[0], g, len(group))
        count = partitions(files, values, g)
        units = []
        for ranks in rank_sets(len(files), count, dp_before_ep):
            own = [files[r] for r in ranks]
            pads = [padding(values[r], g) for r in ranks]
            units.append(_Unit(result, f"group {g}", own, [_flat_states(files[r], values[r], g) for r in ranks], pads))
        experts = Experts(group, len(units), f"{model.path}: parameter group {g}")
        _put(result, units, experts, partial(_Unit.cut, group=group, holes=holes))
        names = user_order(group, g, [values[r] for r in rank_sets(len(files), count, dp_before_ep)[0]], model)
        result.groups.append(Group(experts.ordered(names), hypers[g]))
    _keep_rest(result, values[0])
    return result


def read_stage3(models: Sequence[Saved], files: Sequence[Saved]) -> Optim:
    """Return what the files of stage 3 hold; both by data-parallel rank."""
    shapes = param_shapes(models[0])
    for model in models[1:]:
        if param_shapes(model) != shapes:
            raise FormatError(
                f"{model.path} has other param_shapes than {models[0].name}: the files are of different runs; take all "
                "files of one run"
            )
    result = Optim()
    values = [inner_of(saved) for saved in files]
    inner = [dict_of(value.get("optimizer_state_dict"), "optimizer_state_dict", saved)
             for value, saved in zip(values, files, strict=True)]
    for saved, value in zip(files, values, strict=True):
        count = value.get("partition_count")
        if type(count) is int and count != len(files) and not value.get("ds_zero_partition_groups"):
            raise FormatError(
                f"{saved.path} is of {count} partitions, but there are files of {len(files)} ranks: it is of another "
                "world size; take all files of one run"
            )
    members = sub_groups(files, inner, len(shapes))
    finals: list[list[str]] = []
    for s, group in enumerate(shapes):
        units = []
        for ranks in stage3_sets(values, s):
            own = [files[r] for r in ranks]
            states = [_sliced_states(files[r], values[r], inner[r], s, len(shapes)) for r in ranks]
            units.append(_Unit(result, f"sub-group {s}", own, states, [0] * len(ranks)))
        experts = Experts(group, len(units), f"{models[0].path}: sub-group {s}")
        _put(result, units, experts, partial(_Unit.slice, group=group))
        finals.append(experts.ordered(list(group)))
    for subs, hyper in members:
        result.groups.append(Group([name for s in subs for name in finals[s]], hyper))
    _keep_rest(result, values[0])
    return result


def number_view(value: Any) -> View | None:
    """Return a view of one number (a Python number, or a tensor with one element), None for anything else."""
    if isinstance(value, bool):
        return scalar(value, "bool")
    if isinstance(value, int):
        return scalar(value, "int64") if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return scalar(value, "float64")
    if isinstance(value, TensorRef) and value.numel == 1:
        return value.view if not value.shape else flat_part(value.view, 0, ())
    return None


class _Unit:
    """
    One group (sub-group) on the ranks that share it: ``states`` has, for each of them, the master and what the
    optimizer keeps. Sorts them into ``flats`` (as long as the partition) and ``numbers`` (one for the whole group).
    """

    def __init__(
        self,
        result: Optim,
        what: str,
        files: Sequence[Saved],
        states: Sequence[Mapping[str, Any]],
        pads: Sequence[int],
    ) -> None:
        self.result, self.what, self.files, self.pads = result, what, files, pads
        self.flats: dict[str, list[TensorRef]] = {}
        self.numbers: dict[str, View] = {}
        self.lengths = [state[MASTER].numel for state in states]
        for kind in dict.fromkeys(kind for state in states for kind in state):
            self._sort(kind, [state.get(kind) for state in states])

    def cut(
        self, kind: str, group: Mapping[str, tuple[int, ...]], holes: Sequence[int]
    ) -> dict[str, View]:
        """The parameters of stage 1 and 2: each is a range of the ranks' flat buffers, one behind the other."""
        if not group:
            return {}
        flats = self.flats[kind]
        size = self._partition_size(kind)
        total = sum(prod(shape) for shape in group.values()) + sum(holes[:-1])
        slack = size * len(flats) - total
        if not 0 <= slack <= 2 * len(flats) + sum(self.pads) + sum(holes[-1:]):
            raise FormatError(
                f"{self.files[0].path} and the other ranks' files hold {size * len(flats)} elements of {kind} in "
                f"{self.what}, but the parameters in param_shapes have {total}: the files are of different runs or "
                "world sizes; take all files of one run"
            )
        views = [_flat_view(flat) for flat in flats]
        found: dict[str, View] = {}
        at = 0
        for (name, shape), hole in zip(group.items(), holes, strict=True):
            end = at + prod(shape)
            parts: list[View] = []
            for r in range(at // size, -(-end // size)) if end > at else ():
                begin, stop = max(at, r * size) - r * size, min(end, (r + 1) * size) - r * size
                self._need(r, kind, stop, name)
                parts.append(flat_part(views[r], begin, shape if stop - begin == end - at else (stop - begin,)))
            found[name] = _whole(parts, shape, views[0])
            at = end + hole
        return found

    def slice(self, kind: str, group: Mapping[str, tuple[int, ...]]) -> dict[str, View]:
        """The parameters of stage 3: each is a part of every rank's flat buffer."""
        views = [_flat_view(flat) for flat in self.flats[kind]]
        ranks = len(views)
        needed = sum(-(-prod(shape) // ranks) for shape in group.values())
        for r, view in enumerate(views):
            self._need(r, kind, needed, f"{ranks} ranks")
            if view.numel > needed + 128 + 2 * ranks:
                raise FormatError(
                    f"{self.files[r].path}: {kind} of {self.what} has {view.numel} elements, expected {needed} for "
                    f"{ranks} ranks: it is of another world size; take all files of one run"
                )
        found: dict[str, View] = {}
        at = 0
        for name, shape in group.items():
            numel = prod(shape)
            k = -(-numel // ranks)
            parts = [
                flat_part(views[r], at, shape if k >= numel else (min(k, numel - r * k),))
                for r in range(ranks)
                if r * k < numel
            ]
            found[name] = _whole(parts, shape, views[0])
            at += k
        return found

    def _sort(self, kind: str, given: Sequence[Any]) -> None:
        if all(value is None for value in given):
            return
        for saved, value in zip(self.files, given, strict=True):
            if value is None:
                raise FormatError(
                    f"{saved.path} has no {kind} in {self.what}, which other ranks have: the files are of different "
                    "saves; take all files of one step"
                )
        if kind != "step" and all(isinstance(value, TensorRef) and value.shape for value in given):
            fits = [m <= value.numel <= m + pad for value, m, pad in zip(given, self.lengths, self.pads, strict=True)]
            if any(fits):
                for saved, value, m, fit in zip(self.files, given, self.lengths, fits, strict=True):
                    if not fit:
                        raise FormatError(
                            f"{saved.path}: {kind} of {self.what} has {value.numel} elements, expected {m}: the file "
                            "is damaged or of another world size; take an older checkpoint"
                        )
                self.flats[kind] = list(given)
                return
        views = [number_view(value) for value in given]
        if views[0] is None or any(view is None for view in views):
            self._keep(kind, given, "has no element per parameter")
            return
        numbers = [(view.dtype, read_all(view).tobytes()) for view in views if view is not None]
        other = next((r for r, number in enumerate(numbers) if number != numbers[0]), None)
        if other is None:
            self.numbers[kind] = views[0]
        elif kind == "step":
            raise FormatError(
                f"{self.files[other].path} is of step {_show(given[other])}, but {self.files[0].name} is of step "
                f"{_show(given[0])} ({self.what}): the files are of different saves. Take all files of one step, or an "
                "older checkpoint that is whole"
            )
        else:
            self._keep(kind, given, "differs between ranks")

    def _keep(self, kind: str, given: Sequence[Any], why: str) -> None:
        for saved, value in zip(self.files, given, strict=True):
            self.result.odd.setdefault(saved.name, {})[f"{self.what} {kind}"] = value
        self.result.warnings.append(f"the state {kind} of {self.what} {why}: it is kept in 'extra'")

    def _partition_size(self, kind: str) -> int:
        """Elements of each rank's partition: what is there, or what is there and the padding that was taken off."""
        lengths = [flat.numel for flat in self.flats[kind]]
        whole = max(lengths)
        for size in (whole, max(n + pad for n, pad in zip(lengths, self.pads, strict=True))):
            if size and all(n == size or n + pad == size for n, pad in zip(lengths, self.pads, strict=True)):
                return size
        worst = next((r for r, n in enumerate(lengths) if n not in (whole, whole - self.pads[r])), 0)
        raise FormatError(
            f"{self.files[worst].path}: {kind} of {self.what} has {lengths[worst]} elements and {self.pads[worst]} of "
            f"padding, but the partition has {whole} on another rank: the file is damaged or of another world size; "
            "take all files of one run"
        )

    def _need(self, rank: int, kind: str, count: int, why: str) -> None:
        found = self.flats[kind][rank].numel
        if found < count:
            raise FormatError(
                f"{self.files[rank].path}: {kind} of {self.what} has {found} elements, expected at least {count} (for "
                f"{why}): the file is damaged or of another world size; take an older checkpoint"
            )


def _put(
    result: Optim,
    units: Sequence[_Unit],
    experts: Experts,
    cut: Callable[[_Unit, str], dict[str, View]],
) -> None:
    """Put all states of a group into ``result``, under the names of the undivided model."""
    for kind in units[0].flats:
        for e, unit in enumerate(units):
            if kind not in unit.flats:
                raise FormatError(
                    f"{unit.files[0].path} has no {kind} in {unit.what}, which {units[0].files[0].name} has: the files "
                    "are of different saves; take all files of one step"
                )
            experts.add(kind, e, cut(unit, kind))
    for (kind, name), view in experts.joined().items():
        result.tensors[kind, name] = view
        result.shapes[name] = view.shape
    for kind in units[0].numbers:
        numbers = [unit.numbers.get(kind) for unit in units]
        for name, e in experts.owners():
            number = numbers[e]
            if number is not None:
                result.tensors[kind, name] = number


def _whole(parts: Sequence[View], shape: tuple[int, ...], like: View) -> View:
    if not parts:
        return flat_part(like, 0, shape)  # no elements at all
    whole = concat(parts)
    return whole if whole.shape == shape else Reshaped(whole, shape)


def _flat_view(flat: TensorRef) -> View:
    return flat.view if len(flat.shape) == 1 else Reshaped(flat.view, (flat.numel,))


def _flat_states(saved: Saved, values: Mapping[str, Any], g: int) -> dict[str, Any]:
    """The master and the optimizer's states of group ``g`` on one rank, stage 1 and 2."""
    master = values["single_partition_of_fp32_groups"][g]
    if not isinstance(master, TensorRef):
        raise FormatError(f"{saved.path}: the fp32 partition of group {g} is a {type(master).__name__}, not a tensor")
    base = values.get("base_optimizer_state")
    if isinstance(base, (list, tuple)):  # elastic
        state = base[g] if g < len(base) else {}
    elif isinstance(base, dict):
        groups = base.get("param_groups")
        ids = groups[g].get("params") if isinstance(groups, list) and g < len(groups) else None
        state = dict_of(base.get("state", {}), "state", saved).get(ids[0] if ids else g, {})
    else:
        raise FormatError(f"{saved.path}: base_optimizer_state is missing: not a file of ZeRO stage 1 or 2")
    return {MASTER: master, **dict_of(state, f"the state of group {g}", saved)}


def _sliced_states(
    saved: Saved, values: Mapping[str, Any], inner: Mapping[str, Any], s: int, expected: int
) -> dict[str, Any]:
    """The master and the optimizer's states of sub-group ``s`` on one rank, stage 3."""
    flats = list_of(values, "fp32_flat_groups", saved)
    if len(flats) != expected or not isinstance(flats[s], TensorRef):
        raise FormatError(
            f"{saved.path} has {len(flats)} sub-groups in fp32_flat_groups, but param_shapes has {expected}: the files "
            "are of different runs, or the masters were swapped out to NVMe (then load the checkpoint in DeepSpeed "
            "and save it with offload to the CPU)"
        )
    state = dict_of(inner.get("state", {}), "state", saved).get(s, {})
    return {MASTER: flats[s], **dict_of(state, f"the state of sub-group {s}", saved)}


def _keep_rest(result: Optim, values: Mapping[str, Any]) -> None:
    dropped = {
        *("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings", "fp32_flat_groups"),
        *("optimizer_state_dict", "group_paddings", "param_alignment_paddings", "partition_count", "zero_stage"),
        *("ds_zero_partition_groups", "base_optimizer_state_step"),
    }
    result.rest = {key: value for key, value in values.items() if key not in dropped}


def _show(value: Any) -> str:
    view = number_view(value)
    if view is None:
        return repr(value)[:40]
    if not isinstance(value, TensorRef):
        return str(value)
    number = to_float(read_all(view).reshape(1), view.dtype)[0]
    return f"{number:g}"
