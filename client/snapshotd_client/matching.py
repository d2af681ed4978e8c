"""
Whatever a universal checkpoint has, by name, for what a job has: a manifest as one of the job's own snapshots would be.

Rule 1: names decide, and nothing else. A tied parameter is found under any of its names; a float32 parameter takes the
master copy where there is one.
Rule 2: the checkpoint's optimizer must be the job's: the same states where the job has some already, else at least its
hyperparameters. Numbers and tensors of another optimizer are not taken for its own.
Rule 3: what a parameter, a group or a scheduler does not find stays as it is, and ``Notes`` says so. Only a parameter
without a tensor is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch

from snapshotd.errors import UsageError
from snapshotd_client.arrays import Array, carrier, dtype_name
from snapshotd_client.codec import Json, encode
from snapshotd_client.dtensors import is_dtensor, local_of
from snapshotd_client.fetch import Entry, Manifest
from snapshotd_client.inventory import Inventory
from snapshotd_client.models import Param
from snapshotd_client.optim import OptimizerView
from snapshotd_client.spelling import Speller

__all__ = ["Checkpoint", "Matcher", "Notes", "View"]

_NUMBERS: Final = frozenset({"int64", "float64", "bool"})
"""A state without dimensions and of such a type was a Python number."""

_WAYS: Final = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""What says how an update is computed, on which hardware: the job's own stay."""

_NAMES_MAX: Final = 10


class View(Protocol):
    """A tensor of the checkpoint, read by boxes."""

    dtype: str
    shape: tuple[int, ...]

    def read_into(self, at: tuple[int, ...], out: Array) -> None:
        """Fill ``out`` with the box of its shape that begins at ``at``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """
    A universal checkpoint; ``tensors`` by kind and name, ``states``: those of the optimizer by parameter.

    ``step`` is as it says itself, ``steps_made`` how many optimizer steps that means; None where nobody knows.
    """

    path: str
    step: int | None
    steps_made: int | None
    tensors: Mapping[tuple[str, str], View]
    states: Mapping[str, Mapping[str, View]]
    tied: Mapping[str, str]
    param_groups: Sequence[Mapping[str, Any]]
    extra: Mapping[str, Any]

    @property
    def first_step(self) -> int:
        """The step to go on with, counted from 0. 0 for weights alone, and where nobody knows."""
        return (self.steps_made or 0) if self.has_optimizer else 0

    @property
    def has_optimizer(self) -> bool:
        """Whether it is more than weights: plain SGD has groups, and no state."""
        return bool(self.states) or bool(self.param_groups)

    @property
    def generators(self) -> Mapping[str, Any]:
        """Python's and NumPy's generators by rank, where the hook itself wrote them: others spell them otherwise."""
        found = self.extra.get("rng")
        return found if isinstance(found, Mapping) and all(map(str.isdigit, found)) else {}


@dataclass(slots=True)
class Notes:
    """What is to be told: ``kept`` stays as it was, ``cast`` changed its type, ``unused`` is in the checkpoint only."""

    kept: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class Matcher:
    """
    One job and one checkpoint.

    Once the manifest is made, ``views`` has the tensor for each name in it, and ``kept_state`` the parameters, by
    identity, that the checkpoint's optimizer did not know: what state they have is theirs to keep.
    """

    def __init__(self, checkpoint: Checkpoint, inventory: Inventory) -> None:
        self.views: dict[str, View] = {}
        self.kept_state: set[int] = set()
        self.notes = Notes()
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._entries: dict[str, Entry] = {}
        self._used: set[tuple[str, str]] = set()
        self._used_extra: set[str] = set()
        self._problems: list[str] = []
        self._speller = Speller(self._leaf)
        self._aliases: dict[str, list[str]] = {}

    def manifest(self) -> Manifest:
        """Return what to restore. UsageError, with all names, when the checkpoint does not fit."""
        self._inventory.rescan()
        for alias, name in self._inventory.tree.ties.items():
            self._aliases.setdefault(name, []).append(alias)
        lacking = [_plain(param.name) for param in self._params() if not self._match_param(param)]
        if lacking:
            raise UsageError(
                f"{self._checkpoint.path} lacks {len(lacking)} of the model's parameters: {_some(lacking)}. It has "
                f"{_some([name for kind, name in self._checkpoint.tensors if kind == 'model'])}"
            )
        self._match_buffers()
        optimizers: list[Json] = []
        rest: dict[str, Json] = {"schedulers": [], "scaler": None, "modules": {}, "extra": {}}
        if self._checkpoint.has_optimizer:
            optimizers = [self._match_optimizer(view) for view in self._inventory.optimizers]
            rest = self._match_rest()
        if self._problems:
            raise UsageError(f"{self._checkpoint.path} does not fit this job: {'; '.join(self._problems[:_NAMES_MAX])}")
        self._note_unused()
        return Manifest(source={}, tensors=self._entries, ties={}, meta={"optimizers": optimizers, "rest": rest})

    # ------------------------------------------------------------------ modules

    def _params(self) -> Iterator[Param]:
        yield from self._inventory.tree.params.values()
        yield from self._inventory.strays()

    def _match_param(self, param: Param) -> bool:
        kinds = ("fp32", "model", "buffer") if param.tensor.dtype is torch.float32 else ("model", "fp32", "buffer")
        key = self._find(kinds, param.name)
        if key is None:
            return False
        self._used |= {("fp32", key[1]), ("model", key[1])}
        placed = self._inventory.tree.placement(param)
        self._take(key, param.name, "param", dtype_name(local_of(param.tensor)), placed.shape)
        return True

    def _match_buffers(self) -> None:
        for name, spot in self._inventory.tree.buffers.items():
            key, buffer = self._find(("buffer", "model"), name), spot.get()
            if key is None:
                if buffer is not None:
                    self.notes.kept.append(f"the buffer {_plain(name)}")
                continue
            view = self._checkpoint.tensors[key]
            alike = buffer is not None and tuple(buffer.shape) == view.shape
            dtype = dtype_name(local_of(buffer)) if buffer is not None and alike else view.dtype
            self._take(key, name, "buffer", dtype)

    def _find(self, kinds: Sequence[str], name: str) -> tuple[str, str] | None:
        """Return the first of the kinds that the checkpoint has under any of the tensor's names."""
        names = self._names(name)
        return next(((k, n) for k in kinds for n in names if (k, n) in self._checkpoint.tensors), None)

    def _names(self, name: str) -> list[str]:
        mine = [_plain(one) for one in (name, *self._aliases.get(name, ()))]
        return [*mine, *(self._checkpoint.tied[one] for one in mine if one in self._checkpoint.tied)]

    def _take(
        self, key: tuple[str, str], name: str, kind: str, dtype: str, shape: tuple[int, ...] | None = None
    ) -> None:
        """Let the job's tensor ``name``, which has ``dtype`` and ``shape``, be filled from ``key``."""
        view = self._checkpoint.tensors[key]
        self._used.add(key)
        if shape is not None and shape != view.shape:
            self._problems.append(f"{_plain(name)} has shape {shape} here, {view.shape} there")
        if dtype != view.dtype:
            if not (_is_float(dtype) and _is_float(view.dtype)):
                self._problems.append(f"{_plain(name)} is {dtype} here, {view.dtype} there")
            self.notes.cast.append(f"{_plain(name)} ({view.dtype} to {dtype})")
        self._add(name, kind, view, dtype)

    def _add(self, name: str, kind: str, view: View, dtype: str) -> None:
        self.views[name] = view
        self._entries[name] = Entry(name, dtype, view.shape, "global", kind)

    # ------------------------------------------------------------------ optimizers

    def _match_optimizer(self, view: OptimizerView) -> Json:
        self._refuse_inner(view)
        by_id = {id(param.tensor): param for param in view.params}
        groups: list[Json] = []
        state: list[Json] = []
        unknown: list[str] = []
        listed = {name for group in self._checkpoint.param_groups for name in group["names"]}
        for index, group in enumerate(view.optimizer.param_groups):
            members = [by_id[id(tensor)] for tensor in group["params"]]
            groups.append(self._match_group(view, index, group, [param.name for param in members]))
            for param in members:
                values = self._match_state(view, param, group)
                if values:
                    state.append([["param", param.name], values])
                elif listed.isdisjoint(self._names(param.name)):  # else it had none there: no gradient, as yet
                    unknown.append(_plain(param.name))
                    self.kept_state.add(id(param.tensor))
        if unknown:
            self.notes.kept.append(f"{view.key}: the state of {_some(unknown)}")
        return {"key": view.key, "groups": groups, "state": state}

    def _refuse_inner(self, view: OptimizerView) -> None:
        mine = {id(param.tensor) for param in view.params}
        for other in self._inventory.optimizers:
            if other is not view and not mine.isdisjoint(id(param.tensor) for param in other.params):
                raise UsageError(
                    f"{view.key} and {other.key} have the same parameters: a universal checkpoint does not say whose "
                    "a state is. Start from its weights alone: snapshotd convert SRC DST --to universal --only model"
                )

    def _match_group(self, view: OptimizerView, index: int, group: Mapping[str, Any], names: list[str]) -> Json:
        known = {one for name in names for one in self._names(name)}
        theirs = [one for one in self._checkpoint.param_groups if not known.isdisjoint(one["names"])]
        self._refuse_another(view, theirs)
        hyper: dict[str, Json] = {}
        for key, mine in group.items():
            found = [one[key] for one in theirs if key in one]
            if key in _WAYS or not found:
                continue
            if any(one != found[0] for one in found):
                self.notes.kept.append(
                    f"{view.key}: {key} of group {index}, which joins several groups of other values"
                )
                continue
            hyper[key] = self._speller.spell(found[0], mine, f"{view.key}.group{index}.{key}")
        return {"params": names, "hyper": hyper}

    def _refuse_another(self, view: OptimizerView, theirs: Sequence[Mapping[str, Any]]) -> None:
        """Each number that the job's optimizer was made with must stand in the groups of the checkpoint's, too."""
        made = getattr(view.optimizer, "defaults", {})
        needed = [key for key, value in made.items() if key not in ("lr", "weight_decay") and _is_numeric(value)]
        lacking = [key for key in needed if theirs and not any(key in one for one in theirs)]
        if lacking:
            there = sorted({key for one in theirs for key in one} - {"names"})
            raise UsageError(
                f"{self._checkpoint.path} is of another optimizer than {type(view.optimizer).__name__}: it has no "
                f"{', '.join(lacking)}, but {', '.join(there)}. {_ONLY_MODEL}"
            )

    def _match_state(self, view: OptimizerView, param: Param, group: Mapping[str, Any]) -> dict[str, Json]:
        owner = next((one for one in self._names(param.name) if one in self._checkpoint.states), _plain(param.name))
        old = view.optimizer.state.get(param.tensor, {})
        path = view.state_path(param.name)
        values: dict[str, Json] = {}
        for kind, found in self._checkpoint.states.get(owner, {}).items():
            self._used.add((kind, owner))
            if found.shape == () and found.dtype in _NUMBERS and not isinstance(old.get(kind), torch.Tensor):
                values[kind] = _number(found)
                continue
            self._add(f"{path}.{kind}", "optim", found, found.dtype)
            values[kind] = self._state_leaf(f"{path}.{kind}", found, param, group)
        for kind, value in self._checkpoint.extra.get("optimizer_state", {}).get(owner, {}).items():
            values[kind] = self._speller.spell(value, old.get(kind), f"{path}.{kind}")
        lacking = sorted(str(kind) for kind in old if kind not in values)
        if values and lacking:
            raise UsageError(
                f"{self._checkpoint.path} is of another optimizer than {type(view.optimizer).__name__}: it has no "
                f"{', '.join(lacking)} of {_plain(param.name)}, but {', '.join(values)}. {_ONLY_MODEL}"
            )
        return values

    def _state_leaf(self, name: str, view: View, param: Param, group: Mapping[str, Any]) -> Json:
        # As torch's own load_state_dict: one-element counts stay on the host, unless the kernel wants them beside it.
        beside = bool(view.shape) or bool(group.get("capturable")) or bool(group.get("fused"))
        device = param.tensor.device.type if beside else "cpu"
        leaf: dict[str, Json] = {"$": "leaf", "n": name, "t": view.dtype, "s": list(view.shape), "d": device}
        if view.shape and view.shape == tuple(param.tensor.shape):
            leaf["l"] = 1
        return leaf

    # ------------------------------------------------------------------ everything else

    def _match_rest(self) -> dict[str, Json]:
        extras = self._inventory.extras
        schedulers = extras.scheduler_states()
        found: list[Json] = []
        for name, mine in schedulers:
            key = "lr_scheduler" if len(schedulers) == 1 else f"lr_{name}"
            found.append([name, self._match_object(key, name, mine)])
        scaler = extras.scaler_state()
        modules: dict[str, Json] = {}
        for name in self._inventory.tree.extra_states:
            key = f"modules.{name}"
            if key in self._checkpoint.extra:
                modules[name] = self._spell_extra(key, None, f"extra_state.{name}")
        extra: dict[str, Json] = {}
        for name in extras.values:
            key = next((key for key in (f"extra.{name}", name) if key in self._checkpoint.extra), "")
            if key:
                extra[name] = self._spell_extra(key, extras.template(name), f"extra.{name}")
        return {
            "schedulers": found,
            "scaler": None if scaler is None else self._match_object("scaler", "scaler", scaler),
            "modules": modules,
            "extra": extra,
        }

    def _match_object(self, key: str, name: str, mine: Mapping[str, Any]) -> Json:
        """Return the state for a scheduler or scaler: its own one, where the checkpoint's is of another kind."""
        theirs = self._checkpoint.extra.get(key)
        public = [one for one in mine if not str(one).startswith("_")]
        if isinstance(theirs, Mapping) and all(one in theirs for one in public):
            return self._spell_extra(key, mine, name)
        self.notes.kept.append(name if theirs is None else f"{name} (that of the checkpoint is of another kind)")
        return encode(mine, name)

    def _spell_extra(self, key: str, template: Any, path: str) -> Json:
        self._used_extra.add(key)
        return self._speller.spell(self._checkpoint.extra[key], template, path)

    def _leaf(self, tensor: str, template: Any, path: str) -> Json:
        view = self._checkpoint.tensors.get(("extra", tensor))
        if view is None:
            raise UsageError(f"{self._checkpoint.path}: extra speaks of the tensor {tensor}, which is not there")
        self._used.add(("extra", tensor))
        if isinstance(template, (int, float)) and view.shape == ():
            return _number(view)
        self._add(path, "extra", view, view.dtype)
        leaf: dict[str, Json] = {"$": "leaf", "n": path, "t": view.dtype, "s": list(view.shape), "d": "cpu"}
        if isinstance(template, np.ndarray):
            leaf["a"] = 1
        if is_dtensor(template):
            leaf["x"] = ["R"] * template.device_mesh.ndim
        return leaf

    def _note_unused(self) -> None:
        """Note what the checkpoint has and nobody asked for, by kind, and of ``extra`` by name."""
        by_kind: dict[str, list[str]] = {}
        for kind, name in self._checkpoint.tensors:
            if kind not in ("rng", "extra") and (kind, name) not in self._used:
                by_kind.setdefault(kind, []).append(name)
        self.notes.unused += [f"{kind} of {_some(names)}" for kind, names in by_kind.items()]
        known = {*self._used_extra, "optimizer_state", *(["rng"] if self._checkpoint.generators else [])}
        self.notes.unused += [f"extra.{key}" for key in self._checkpoint.extra if key not in known]
        self.notes.unused += self._speller.objects


_ONLY_MODEL: Final = (
    "Take the same one, or start from the weights alone: snapshotd convert SRC DST --to universal --only model"
)


def _number(view: View) -> bool | int | float:
    dtype: torch.dtype = getattr(torch, view.dtype)
    out = np.empty((), dtype=carrier(dtype.itemsize))
    view.read_into((), out)
    return torch.from_numpy(out).view(dtype).item()


def _is_numeric(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_numeric, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_float(dtype: str) -> bool:
    return bool(getattr(torch, dtype).is_floating_point)


def _plain(name: str) -> str:
    """Return the name in a universal checkpoint: without the mark of the only module."""
    return name.removeprefix("model.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
    return ", ".join(names[:_NAMES_MAX]) + more
