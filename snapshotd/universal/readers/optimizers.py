"""
An optimizer's state dict as torch makes it, ids or names, brought under the model's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.param_ids import Fits, names_of_ids
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.views import View

__all__ = ["Optimizer", "name_optimizers"]

_NOT_HYPERPARAMETERS: Final = frozenset({"params", "param_names"})
_TRAINED: Final = frozenset({"float16", "bfloat16", "float32", "float64", "complex64", "complex128"})
_FACTOR: Final = re.compile(r"(^|_)(row|col|column)(_|$)")
"""Kinds of state that are smaller than their parameter."""

_SCALARS: Final = frozenset({"step", "mu_product", "eta", "mu"})
"""Kinds that are one number whatever the parameter is."""


class Optimizer:
    """Groups (each with ``params``: ids or names) and states by id or name. ``names`` are those of the groups."""

    def __init__(self, groups: list[dict[str, Any]], states: Mapping[Any, Mapping[str, Any]]) -> None:
        self.groups = groups
        self.states = {key: dict(value) for key, value in states.items()}
        self.flattened = False
        for group in groups:
            if not isinstance(group.get("params"), list):
                raise FormatError("a parameter group without its list of parameters")

    @property
    def names(self) -> list[Any]:
        """The members of all groups, and what has state without being in one."""
        members = [name for group in self.groups for name in group["params"]]
        return list(dict.fromkeys([*members, *self.states]))

    @property
    def idle(self) -> list[Any]:
        """The members without state, where others have some: they had no gradient, as frozen parameters have none."""
        return [name for name in self.names if not self.states.get(name)] if any(self.states.values()) else []

    def rename(self, names: Mapping[Any, str]) -> None:
        """Call parameters by other names; what is not in ``names`` keeps its own."""
        for group in self.groups:
            group["params"] = [names.get(member, member) for member in group["params"]]
        self.states = {names.get(owner, owner): fields for owner, fields in self.states.items()}

    def put(self, state: State) -> None:
        """Add states, groups and what else there is to ``state``; names must be the model's by now."""
        for owner in self.names:
            for kind, value in self.states.get(owner, {}).items():
                view = _view_of(value)
                if view is not None:
                    state.tensors.append(Tensor(kind, str(owner), view))
                elif value is not None:
                    kept = state.extra.setdefault("optimizer_state", {}).setdefault(str(owner), {})
                    kept[kind] = to_json(value, f"optimizer_state.{owner}.{kind}", state.tensors)
        for i, group in enumerate(self.groups, start=len(state.param_groups)):
            fields = {
                key: to_json(value, f"param_groups.{i}.{key}", state.tensors)
                for key, value in group.items()
                if key not in _NOT_HYPERPARAMETERS
            }
            state.param_groups.append({"names": [str(name) for name in group["params"]], **fields})
        if self.flattened and len(self.groups) > 0:
            state.source["param_groups"] = "flattened: groups are parameters with equal hyperparameters"


def name_optimizers(
    optimizers: Sequence[Optimizer], views: Mapping[str, View], tied: Mapping[str, str] | None = None
) -> str | None:
    """
    Replace ids by the model's names; returns a warning where that needed a guess.

    All optimizers are looked at together: no two of them train the same parameter.
    """
    numbered = [optimizer for optimizer in optimizers if not all(isinstance(name, str) for name in optimizer.names)]
    if not numbered:
        return None
    groups: list[dict[str, Any]] = []
    shapes: dict[Any, tuple[int, ...] | Fits | None] = {}
    for i, optimizer in enumerate(numbered):
        groups += [{**group, "params": [(i, member) for member in group["params"]]} for group in optimizer.groups]
        shapes.update(((i, owner), _shape_of(fields)) for owner, fields in optimizer.states.items())
    named = {name for optimizer in optimizers if optimizer not in numbered for name in optimizer.names}
    model = {name: view.shape for name, view in views.items() if name not in (tied or {}) and name not in named}
    never = frozenset(name for name, view in views.items() if view.dtype not in _TRAINED)
    names, warning = names_of_ids(groups, shapes, model, never)
    for i, optimizer in enumerate(numbered):
        optimizer.rename({member: names.get((i, member), str(member)) for member in optimizer.names})
    return warning


def _shape_of(fields: Mapping[str, Any]) -> tuple[int, ...] | Fits | None:
    """What the parameter's shape must be like for these states: the first that is no scalar is as large as it is."""
    views = {kind: view for kind, value in fields.items() if (view := _view_of(value)) is not None}
    factors = [view.shape for kind, view in views.items() if _FACTOR.search(kind)]
    if factors:
        return lambda shape: all(_is_factor(factor, shape) for factor in factors)
    shapes = [view.shape for kind, view in views.items() if kind not in _SCALARS]
    return next((shape for shape in shapes if shape not in ((), (1,))), max(shapes, default=None))


def _is_factor(factor: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether ``factor`` is ``shape`` with a dimension reduced to one, or taken out: Adafactor's rows and columns."""
    if len(factor) == len(shape):
        return all(f in (1, n) for f, n in zip(factor, shape, strict=True))
    return any(shape[:d] + shape[d + 1 :] == factor for d in range(len(shape)))


def _view_of(value: Any) -> View | None:
    if isinstance(value, View):
        return value
    if isinstance(value, TensorRef):
        return value.view
    if type(value) is int and abs(value) < 1 << 62:
        return scalar(value, "int64")
    if type(value) is float:
        return scalar(value, "float64")
    if type(value) is bool:
        return scalar(value, "bool")
    return None
