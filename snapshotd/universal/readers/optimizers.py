"""
An optimizer's state dict as torch makes it, ids or names, brought under the model's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.param_ids import names_of_ids
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.views import View

__all__ = ["Optimizer", "name_optimizer"]

_NOT_HYPERPARAMETERS: Final = frozenset({"params", "param_names"})


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


def name_optimizer(
    optimizer: Optimizer, views: Mapping[str, View], tied: Mapping[str, str] | None = None
) -> str | None:
    """Replace ids by the model's names; returns a warning where that needed a guess."""
    if all(isinstance(name, str) for name in optimizer.names):
        return None
    shapes = {owner: _shape_of(fields) for owner, fields in optimizer.states.items()}
    model = {name: view.shape for name, view in views.items() if name not in (tied or {})}
    integers = frozenset(name for name, view in views.items() if "int" in view.dtype or view.dtype == "bool")
    names, warning = names_of_ids(optimizer.groups, shapes, model, integers)
    for group in optimizer.groups:
        group["params"] = [names.get(member, member) for member in group["params"]]
    optimizer.states = {names.get(owner, str(owner)): fields for owner, fields in optimizer.states.items()}
    return warning


def _shape_of(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a state that is as large as its parameter: the first that is no scalar."""
    for value in fields.values():
        view = _view_of(value)
        if view is not None and view.shape not in ((), (1,)):
            return view.shape
    one = next((view for view in map(_view_of, fields.values()) if view is not None and view.shape == (1,)), None)
    return one.shape if one is not None else None


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
