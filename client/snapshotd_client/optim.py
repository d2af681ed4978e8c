"""
What is inside an optimizer: no names of any algorithm, just what is really there.

Rule 1: the state is whatever ``optimizer.state`` holds: tensors become leaves, all else JSON. It may appear late, nest,
or be replaced by new objects each step. An optimizer inside another one (an attribute of it) is one of its own.
Rule 2: looking again is cheap. Each parameter's state is an ``_Entry`` that is scanned again only if one of its values
is another object than before.
Rule 3: ids are compared only while we hold the objects, so an id never stands for two of them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from snapshotd_client.codec import Json, dumps, encode
from snapshotd_client.errors import CannotExpress
from snapshotd_client.leaves import Leaf, LeafSink, Names
from snapshotd_client.models import ModelTree, Param, check_tensor

__all__ = ["Change", "OptimizerView", "named_optimizers", "unseen_state"]

_SCALARS = (bool, int, float, str, type(None))
_MAPPINGS = (dict, OrderedDict, defaultdict)


class Change(Enum):
    """What ``refresh`` found."""

    NONE = "none"
    MOVED = "moved"  # other objects or values, the same tensors by name, shape and type
    LAYOUT = "layout"  # something else: scan again


@dataclass(slots=True, eq=False)
class _Entry:
    """The state of one parameter, or the hyperparameters of one group."""

    path: str
    container: Any
    param: Param | None
    key: Any = None
    keys: tuple[Any, ...] = ()
    values: list[Any] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    flat: bool = False
    moves: bool = False
    leaves: list[Leaf] = field(default_factory=list)
    signature: tuple[Any, ...] = ()
    text: str = ""
    key_text: str = ""

    def is_same(self, container: Any) -> bool:
        """Whether a scan of ``container`` would give what the last one gave."""
        if not self.flat or type(container) not in _MAPPINGS or not self.ids:
            return self.flat and not self.keys and not container
        return list(map(id, container.values())) == self.ids and tuple(container) == self.keys

    def scan(self, container: Any, names: Callable[[str], str], skip: str | None = None) -> None:
        self.container = container
        sink = LeafSink("optim", self.param, inline_bytes=0, name=names)
        value = container if skip is None else {k: v for k, v in container.items() if k != skip}
        self.text = dumps(encode(value, self.path, sink))
        self.leaves = sink.leaves
        self.signature = tuple(_sign(leaf) for leaf in sink.leaves)
        if type(container) in _MAPPINGS:
            self.keys = tuple(container)
            self.values = list(container.values())
            self.ids = list(map(id, self.values))
            self.flat = all(_is_flat(v) for k, v in container.items() if k != skip)
        else:
            self.flat = False


class OptimizerView:
    """One optimizer of the user, seen as names, leaves and JSON."""

    def __init__(self, key: str, optimizer: Any) -> None:
        self.key = key
        self.optimizer = optimizer
        self.params: list[Param] = []  # of all groups, in order
        self.strays: list[Param] = []  # parameters that are in no model
        self._names: Names = Names()
        self._groups: list[_Entry] = []
        self._members: list[int] = []
        self._member_texts: list[str] = []
        self._entries: list[_Entry] = []

    def scan(self, tree: ModelTree) -> None:
        """Look at everything anew. CannotExpress or ValueError for what cannot be kept."""
        self._names = Names()
        self.params, self.strays = [], []
        by_id: dict[int, Param] = {}
        self._member_texts = []
        for g, group in enumerate(self.optimizer.param_groups):
            members: list[Param] = []
            for i, tensor in enumerate(group["params"]):
                param = tree.by_id.get(id(tensor))
                if param is None:
                    check_tensor(f"{self.key}.group{g}.param{i}", tensor)
                    param = Param(f"{self.key}.group{g}.param{i}", tensor, ())
                    self.strays.append(param)
                by_id[id(tensor)] = param
                members.append(param)
            self.params += members
            self._member_texts.append(dumps([param.name for param in members]))
        self._members = self._member_ids()
        self._groups = []
        for g, group in enumerate(self.optimizer.param_groups):
            entry = _Entry(f"{self.key}.group{g}", group, None)
            entry.scan(group, self._names.take, "params")
            self._groups.append(entry)
        self._entries = []
        for key, value in self.optimizer.state.items():
            param = self._owner(key, by_id, tree)
            path = f"{self.key}.state.{key!s:.80}" if param is None else self.state_path(param.name)
            entry = _Entry(path, value, param, key)
            entry.key_text = self._key_text(entry)
            entry.scan(value, self._names.take)
            self._entries.append(entry)

    def refresh(self) -> Change:
        """Look whether anything is other than at the last scan, and take in what can be taken in."""
        if self._member_ids() != self._members or len(self.optimizer.param_groups) != len(self._groups):
            return Change.LAYOUT
        found = Change.NONE
        for entry, group in zip(self._groups, self.optimizer.param_groups, strict=True):
            if not entry.is_same(group):
                if not self._rescan(entry, group, "params"):
                    return Change.LAYOUT
                found = Change.MOVED
        state = self.optimizer.state
        if len(state) != len(self._entries):
            return Change.LAYOUT
        for entry, (key, value) in zip(self._entries, state.items(), strict=True):
            if entry.key is not key and (isinstance(key, torch.Tensor) or entry.key != key):
                return Change.LAYOUT
            if not entry.is_same(value):
                if not self._rescan(entry, value, None):
                    return Change.LAYOUT
                found = Change.MOVED
        return found

    def state_path(self, name: str) -> str:
        """Return what the names of a parameter's state begin with."""
        short = name.removeprefix("model.") if name.startswith("model.") else name.removeprefix(f"{self.key}.")
        return f"{self.key}.{short}"

    def leaves(self) -> list[Leaf]:
        """Return all leaves, in an order that only a new scan changes."""
        return [leaf for entries in (self._groups, self._entries) for entry in entries for leaf in entry.leaves]

    def forget_moving(self) -> bool:
        """Let go of state that is replaced each step, so that the old does not stay alive beside the new."""
        dropped = False
        for entry in self._entries:
            if entry.moves:
                entry.values, entry.ids, entry.leaves, dropped = [], [], [], True
        return dropped

    def text(self) -> str:
        """Return the JSON text of groups and state, for the step's meta."""
        groups = ",".join(
            f'{{"params":{members},"hyper":{entry.text}}}'
            for members, entry in zip(self._member_texts, self._groups, strict=True)
        )
        state = ",".join(f"[{entry.key_text},{entry.text}]" for entry in self._entries)
        return f'{{"key":{dumps(self.key)},"groups":[{groups}],"state":[{state}]}}'

    def _rescan(self, entry: _Entry, container: Any, skip: str | None) -> bool:
        before, old_names = entry.signature, iter([sign[0] for sign in entry.signature])
        kept = entry.leaves  # held until the end of this function, so that ids mean something
        entry.scan(container, lambda path: next(old_names, path), skip)
        if kept and [id(leaf.tensor) for leaf in kept] != [id(leaf.tensor) for leaf in entry.leaves]:
            entry.moves = True
        return before == entry.signature

    def _member_ids(self) -> list[int]:
        return [id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]]

    def _owner(self, key: Any, by_id: dict[int, Param], tree: ModelTree) -> Param | None:
        if not isinstance(key, torch.Tensor):
            return None
        param = by_id.get(id(key)) or tree.by_id.get(id(key))
        if param is None:
            what = f"state of a tensor of shape {tuple(key.shape)} that is no parameter"
            raise CannotExpress(f"{self.key}.state", what)
        return param

    def _key_text(self, entry: _Entry) -> str:
        if entry.param is not None:
            return dumps(["param", entry.param.name])
        key: Json = encode(entry.key, f"{entry.path}.<key>")
        return dumps(["key", key])


def named_optimizers(optimizer: object) -> list[OptimizerView]:
    """Check the user's ``optimizer`` argument. TypeError with the fix."""
    items: list[tuple[str, object]]
    if optimizer is None:
        return []
    if _is_optimizer(optimizer):
        items = [("optim", optimizer)]
    elif isinstance(optimizer, Mapping):
        items = [(f"optim.{key}", item) for key, item in optimizer.items()]
    elif isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        items = [(f"optim.{i}", item) for i, item in enumerate(optimizer)]
    else:
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, a list or dict of them, or an object with .param_groups, "
            f".state and .step, not {type(optimizer).__name__}"
        )
    for key, item in items:
        if not _is_optimizer(item):
            raise TypeError(f"{key}: a {type(item).__name__} lacks .param_groups, .state or .step of an optimizer")
    views: list[OptimizerView] = []
    for key, item in items:
        _add_with_inner(key, item, views)
    return views


def _add_with_inner(key: str, optimizer: Any, views: list[OptimizerView]) -> None:
    """Take an optimizer and those inside it (as ZeRO's, Lookahead's or SAM's have), which hold the real state."""
    if any(optimizer is view.optimizer or optimizer.state is view.optimizer.state for view in views):
        return  # given twice, or a wrapper that only passes on what is seen already
    views.append(OptimizerView(key, optimizer))
    for name, value in getattr(optimizer, "__dict__", {}).items():
        many = value if isinstance(value, (list, tuple)) else [value]
        for number, inner in enumerate(many):
            if _is_optimizer(inner):
                _add_with_inner(f"{key}.{name}" if inner is value else f"{key}.{name}.{number}", inner, views)


def unseen_state(views: Sequence[OptimizerView]) -> list[str]:
    """Return the paths of tensors that optimizers keep where nobody looks: not in state, group or inner optimizer."""
    known = {id(tensor) for view in views for group in view.optimizer.param_groups for tensor in group["params"]}
    found: list[str] = []
    for view in views:
        for name, value in getattr(view.optimizer, "__dict__", {}).items():
            if name in ("state", "param_groups", "defaults"):
                continue
            items = value.values() if isinstance(value, Mapping) else value
            many = list(items) if isinstance(items, (list, tuple, type({}.values()))) else [value]
            if any(isinstance(item, torch.Tensor) and id(item) not in known for item in many):
                found.append(f"{view.key}.{name}")
    return found


def _is_optimizer(value: object) -> bool:
    if isinstance(value, torch.optim.Optimizer):
        return True
    return (
        isinstance(getattr(value, "param_groups", None), Sequence)
        and isinstance(getattr(value, "state", None), Mapping)
        and callable(getattr(value, "step", None))
    )


def _is_flat(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, *_SCALARS)):
        return True
    return type(value) is tuple and all(type(item) in _SCALARS for item in value)


def _sign(leaf: Leaf) -> tuple[Any, ...]:
    tensor = leaf.tensor
    local = getattr(tensor, "_local_tensor", tensor)
    placements = getattr(tensor, "placements", ())
    return (leaf.name, tensor.dtype, tensor.shape, local.shape, tensor.device.type, placements, tensor.requires_grad)
