"""
The optimizer of a run without ZeRO: it is in the model file, and its parameters are numbers, not names.

With 16-bit weights each parameter has a master in the file: it belongs to the weight that it rounds to. In fp32 there
is no master, and names are found by order and shape (see param_ids.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Cast
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.deepspeed_experts import EXPERT
from snapshotd.universal.readers.deepspeed_files import Saved
from snapshotd.universal.readers.deepspeed_groups import dict_of
from snapshotd.universal.readers.deepspeed_weights import Weights
from snapshotd.universal.readers.deepspeed_zero import MASTER, Group, Optim, number_view
from snapshotd.universal.readers.param_ids import names_of_ids
from snapshotd.universal.views import Cut, Reshaped, View, flat_part
from snapshotd.universal.words import Words, word_dtype

__all__ = ["num_parameters", "read_plain"]

_PREFIX: Final = 16
_SAMPLE: Final = 4096
"""Elements that are compared to tell whose master a tensor is: from the begin, and the last ones."""

_TRIES_MAX: Final = 100_000


def read_plain(saved: Saved, weights: Weights) -> Optim:
    """Return the optimizer in the model file ``saved``, whose weights are ``weights``."""
    outer = dict_of(saved.get("optimizer"), "optimizer", saved)
    state, groups = _state_of(saved)
    states = dict_of(state.get("state", {}), "state", saved)
    result = Optim()
    result.rest = {
        key: value
        for key, value in outer.items()
        if key not in ("optimizer_state_dict", "fp32_groups", "fp32_groups_flat", "state", "param_groups")
    }
    flats = outer.get("fp32_groups_flat")
    masters = outer.get("fp32_groups")
    if isinstance(flats, (list, tuple)):
        _read_fused(result, saved, weights, flats, groups, states)
    elif isinstance(masters, (list, tuple)):
        _read_masters(result, saved, weights, masters, groups, states)
    else:
        _read_by_shape(result, saved, weights, groups, states)
    return result


def num_parameters(saved: Saved) -> int:
    """How many parameters the optimizer in ``saved`` has at least: FP16_Optimizer puts a group's into one."""
    return sum(len(group["params"]) for group in _state_of(saved)[1])


def _state_of(saved: Saved) -> tuple[dict[Any, Any], list[Any]]:
    """The state dict of torch's optimizer, and its groups."""
    outer = dict_of(saved.get("optimizer"), "optimizer", saved)
    state = dict_of(outer.get("optimizer_state_dict", outer), "optimizer_state_dict", saved)
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise FormatError(f"{saved.path}: the optimizer has no param_groups: not a file that DeepSpeed wrote")
    return state, groups


def _read_masters(
    result: Optim, saved: Saved, weights: Weights, masters: Sequence[Any], groups: list[Any], states: Mapping[Any, Any]
) -> None:
    """FP16_UnfusedOptimizer: a master per parameter, in the groups' order."""
    finder = _Finder(saved, weights)
    last: str | None = None
    if len(masters) != len(groups):
        raise FormatError(f"{saved.path} has {len(masters)} groups of masters and {len(groups)} param_groups")
    for group, listed in zip(groups, masters, strict=True):
        ids = group["params"]
        if len(ids) != len(listed):
            raise FormatError(f"{saved.path}: a group of {len(ids)} parameters has {len(listed)} masters")
        names = []
        for key, master in zip(ids, listed, strict=True):
            if not isinstance(master, TensorRef):
                raise FormatError(f"{saved.path}: a master is a {type(master).__name__}, not a tensor")
            name = last = finder.find(master.view, last)
            names.append(name)
            result.tensors[MASTER, name] = master.view
            _put_state(result, saved, name, master.shape, states.get(key, {}))
        result.groups.append(Group(names, _hyper(group)))


def _read_fused(
    result: Optim, saved: Saved, weights: Weights, flats: Sequence[Any], groups: list[Any], states: Mapping[Any, Any]
) -> None:
    """FP16_Optimizer: one flat master per group, the parameters one behind the other."""
    finder = _Finder(saved, weights)
    for group, master in zip(groups, flats, strict=True):
        if not isinstance(master, TensorRef) or len(master.shape) != 1:
            raise FormatError(f"{saved.path}: fp32_groups_flat has something else than flat tensors")
        state = states.get(group["params"][0], {}) if group["params"] else {}
        names = finder.split(master.view)
        at = 0
        for name in names:
            shape = weights.model[name].shape
            result.tensors[MASTER, name] = flat_part(master.view, at, shape)
            for kind, value in state.items():
                if isinstance(value, TensorRef) and value.numel == master.numel and value.shape:
                    result.tensors[kind, name] = flat_part(value.view, at, shape)
                elif (number := number_view(value)) is not None:
                    result.tensors[kind, name] = number
            result.shapes[name] = shape
            at += prod(shape)
        result.groups.append(Group(names, _hyper(group)))


def _read_by_shape(
    result: Optim, saved: Saved, weights: Weights, groups: list[Any], states: Mapping[Any, Any]
) -> None:
    """torch's own optimizer on fp32 weights."""
    shapes: dict[Any, tuple[int, ...] | None] = {}
    for key, state in states.items():
        tensors = [value.shape for value in state.values() if isinstance(value, TensorRef) and value.shape]
        # The state of a parameter with one element is told from the step by the parameter's own dimensions.
        shapes[key] = tensors[0] if tensors and all(shape == tensors[0] for shape in tensors) else None
    floating = {name: view.shape for name, view in weights.model.items() if "float" in view.dtype}
    names: dict[Any, str] = {}
    has_experts = any(group.get("moe") for group in groups)
    for is_moe in sorted({bool(group.get("moe")) for group in groups}):
        chosen = [group for group in groups if bool(group.get("moe")) == is_moe]
        own = {n: s for n, s in floating.items() if not has_experts or (EXPERT.match(n) is not None) == is_moe}
        try:
            found, warning = names_of_ids(chosen, shapes, own)
        except FormatError as error:
            raise FormatError(f"{saved.path}: {error}") from error
        names.update(found)
        if warning:
            result.warnings.append(warning)
    for group in groups:
        members = [names[key] for key in group["params"]]
        for key, name in zip(group["params"], members, strict=True):
            _put_state(result, saved, name, weights.model[name].shape, states.get(key, {}))
        result.groups.append(Group(members, _hyper(group)))


def _put_state(result: Optim, saved: Saved, name: str, shape: tuple[int, ...], state: Any) -> None:
    result.shapes[name] = shape
    for kind, value in dict_of(state, f"the state of {name}", saved).items():
        if isinstance(value, TensorRef) and value.shape == shape and (kind != "step" or shape):
            result.tensors[kind, name] = value.view
        elif (number := number_view(value)) is not None:
            result.tensors[kind, name] = number
        elif isinstance(value, TensorRef):
            result.tensors[kind, name] = value.view
        elif value is not None:
            result.odd.setdefault(saved.name, {})[f"{kind} of {name}"] = value


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


class _Finder:
    """Finds the weight that a master rounds to; each weight once, in the model's order where several would do."""

    def __init__(self, saved: Saved, weights: Weights) -> None:
        self.saved = saved
        self.model = {
            name: view
            for name, view in weights.model.items()
            if view.dtype in ("float16", "bfloat16", "float32") and view.numel
        }
        self.order = {name: i for i, name in enumerate(self.model)}
        self.begins = {name: _words(view, 0, min(view.numel, _PREFIX)) for name, view in self.model.items()}
        self.used: set[str] = set()

    def find(self, master: View, last: str | None) -> str:
        """The weight of the master's shape that it rounds to, the first behind ``last`` if there is one."""
        for name in self._fitting(_flat(master), 0, last):
            if self.model[name].shape == master.shape:
                self.used.add(name)
                return name
        raise self._error(f"the master of shape {list(master.shape)}")

    def split(self, master: View) -> list[str]:
        """The weights that lie one behind the other in a flat master: all of it, with a way back from wrong turns."""
        names: list[str] = []
        at, tries = 0, 0
        stack = [self._fitting(master, 0, None)]
        while at < master.numel:
            tries += 1
            name = next(stack[-1], None)
            if name is not None:
                names.append(name)
                self.used.add(name)
                at += self.model[name].numel
                stack.append(self._fitting(master, at, name))
                continue
            stack.pop()
            if not names or tries > _TRIES_MAX:
                raise self._error(f"the flat master of {master.numel} elements")
            name = names.pop()
            self.used.discard(name)
            at -= self.model[name].numel
        return names

    def _fitting(self, master: View, begin: int, last: str | None) -> Iterator[str]:
        """The weights that a flat master's elements from ``begin`` on round to."""
        if begin >= master.numel:
            return
        start = 0 if last is None else self.order[last] + 1
        listed = list(self.model)
        for name in (*listed[start:], *listed[:start]):
            view = self.model[name]
            if name in self.used or begin + view.numel > master.numel:
                continue
            known = self.begins[name]
            part = Cast(Cut(master, (begin,), (len(known),)), view.dtype)
            if np.array_equal(_words(part, 0, len(known)), known) and _rounds_to(
                flat_part(master, begin, view.shape), view
            ):
                yield name

    def _error(self, what: str) -> FormatError:
        return FormatError(
            f"{self.saved.path}: {what} rounds to none of the model's weights: weights and optimizer are of different "
            "steps; take all files of one step"
        )


def _flat(view: View) -> View:
    return Reshaped(view, (view.numel,)) if view.shape else flat_part(view, 0, (1,))


def _words(view: View, begin: int, count: int) -> Words:
    out = np.empty(count, dtype=word_dtype(view.dtype))
    flat = view if len(view.shape) == 1 else _flat(view)
    flat.read_into((begin,), out)
    return out


def _rounds_to(master: View, weight: View) -> bool:
    """Whether the first elements of ``master`` and the last ones are those of ``weight``, rounded."""
    cast = Cast(master, weight.dtype)
    count = min(weight.numel, _SAMPLE)
    return all(
        np.array_equal(_words(cast, begin, count), _words(weight, begin, count))
        for begin in {0, weight.numel - count}
    )
