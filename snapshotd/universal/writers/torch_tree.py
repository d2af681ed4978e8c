"""
The state as the nested dict that a torch trainer would save: for the torch and the DCP writer.

``{model, optim or optimizer, fp32, rng, <extra>, step, snapshotd}``: the last says what torch's dicts do not (which
names are buffers, frozen, tied), so that reading it back gives the very same state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from snapshotd.universal.globals import TorchDType
from snapshotd.universal.pickling import Name
from snapshotd.universal.plain import from_json
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View, read_all
from snapshotd.universal.words import to_float

__all__ = [
    "NOTE_KEY",
    "is_plain_step",
    "modules_of",
    "note_of",
    "optimizer_groups",
    "plain_value",
    "rest_of",
    "stand_ins",
]

NOTE_KEY: Final = "snapshotd"
"""The key of what torch's own dicts do not say."""

MODULES_KEY: Final = "model_state"
"""The key of ``extra`` under which the readers put what modules have besides tensors."""

_SECTIONS: Final = frozenset({"model", "optim", "optimizer", "fp32", "rng_state", NOTE_KEY})

_TUPLES: Final = frozenset({"betas", "eps", "etas", "ns_coefficients", "step_sizes"})


def note_of(state: State) -> dict[str, Any]:
    """Return what torch's dicts do not say."""
    return {
        "version": 1,
        "step": state.step,
        "step_in_extra": "step" in state.extra,
        "renamed": {renamed_of(key): key for key in state.extra if renamed_of(key) != key},
        "rng": list(state.of_kind("rng")),
        "buffers": list(state.of_kind("buffer")),
        "frozen": list(state.frozen),
        "tied": dict(state.tied),
    }


def optimizer_groups(state: State, tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups with their names under "names", hyperparameters as torch has them."""
    groups: list[dict[str, Any]] = []
    for group in state.param_groups:
        values: dict[str, Any] = {}
        for key, value in group.items():
            item = from_json(value, tensors) if key != "names" else list(value)
            values[key] = tuple(item) if key in _TUPLES and isinstance(item, list) else item
        groups.append(values)
    return groups


def rest_of(state: State, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``extra`` as plain values, with ``tensors`` in their places; what is of the modules is left out."""
    rest = {key: from_json(value, tensors) for key, value in state.extra.items() if key != MODULES_KEY}
    return {renamed_of(key): value for key, value in rest.items()}


def modules_of(state: State, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what modules have in their state dict besides tensors, by name."""
    values = state.extra.get(MODULES_KEY)
    return from_json(values, tensors) if isinstance(values, dict) else {}


def renamed_of(key: str) -> str:
    """Return the key for an entry of ``extra``: another one where it is a section of ours."""
    return f"extra_{key}" if key in _SECTIONS else key


def stand_ins(value: Any, put: Callable[[View], Any]) -> Any:
    """Return ``value`` with what the pickle writer takes: ``put(view)`` for each view, torch's names for dtypes."""
    if isinstance(value, View):
        return put(value)
    if isinstance(value, TorchDType):
        return Name("torch", str(value))
    if isinstance(value, list):
        return [stand_ins(item, put) for item in value]
    if isinstance(value, tuple):
        return tuple(stand_ins(item, put) for item in value)
    if isinstance(value, dict):
        return {key: stand_ins(item, put) for key, item in value.items()}
    return value


def is_plain_step(tensor: Tensor) -> bool:
    """Whether an optimizer's scalar was a Python int: those are kept as int64."""
    return tensor.dtype == "int64" and tensor.shape == ()


def plain_value(view: View) -> Any:
    """Return the number in a 0-d view."""
    return to_float(read_all(view), view.dtype).reshape(-1)[0].item()
