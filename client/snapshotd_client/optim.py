"""
What is inside an optimizer: no names of any algorithm, just what is really there.

Rule 1: the state is whatever ``optimizer.state`` holds: tensors become leaves, all else JSON. It may appear late, nest,
or be replaced by new objects each step. An optimizer inside another one (an attribute of it) is one of its own.
Rule 2: looking again is cheap. One pass tells whether all values are the objects that they were (``Held``). Only where
that is not so, each parameter's state, an ``_Entry``, is looked at: other numbers and plain tensors of the same kind
are taken in, and it is scanned again if more than that is another.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshotd_client.codec import Json, dumps, encode
from snapshotd_client.errors import CannotExpress
from snapshotd_client.held import Held, is_same
from snapshotd_client.leaves import Leaf, LeafSink, Names
from snapshotd_client.models import ModelTree, Param, check_tensor

__all__ = ["OptimizerView", "named_optimizers", "unseen_state"]

_SCALARS = (bool, int, float, str, type(None))
_MAPPINGS = (dict, OrderedDict, defaultdict)
_KEPT = (*_SCALARS, tuple)
_GONE = object()


@dataclass(slots=True, eq=False)
class _Entry:
    """The state of one parameter, or the hyperparameters of one group."""

    path: str
    param: Param | None
    key: Any = None
    kind: Any = None  # of mapping
    keys: tuple[Any, ...] = ()
    values: list[Any] = field(default_factory=list)
    flat: bool = False
    moves: bool = False
    leaves: list[Leaf] = field(default_factory=list)
    leaf_of: dict[str, int] = field(default_factory=dict)  # by key: which leaf a plain tensor is
    names: dict[str, str] = field(default_factory=dict)  # of the leaves, by path
    signature: tuple[Any, ...] = ()
    text: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    key_text: str = ""

    def is_same(self, container: Any) -> bool:
        """Whether a scan of ``container`` would give what the last one gave."""
        if not self.flat or type(container) is not self.kind:
            return False
        return is_same(list(container.values()), self.values) and tuple(container) == self.keys

    def scan(self, container: Any, names: Callable[[str], str], skip: str | None = None) -> None:
        def take(path: str) -> str:
            self.names[path] = name = names(path)
            return name

        self.names = {}
        sink = LeafSink("optim", self.param, inline_bytes=0, name=take)
        value = container if skip is None else {k: v for k, v in container.items() if k != skip}
        data = encode(value, self.path, sink)
        self.text = dumps(data)
        self.leaves = sink.leaves
        self.signature = tuple(_sign(leaf) for leaf in sink.leaves)
        self.kind, self.keys, self.values = type(container), (), []
        self.flat, self.texts, self.leaf_of = False, {}, {}
        if type(container) in _MAPPINGS:
            self.keys = tuple(container)
            self.values = list(container.values())
            self.flat = all(_is_flat(v) for v in value.values()) and all(type(key) is str for key in self.keys)
            if self.flat:
                tensors = [key for key, item in value.items() if isinstance(item, torch.Tensor)]
                self.leaf_of = {key: number for number, key in enumerate(tensors) if type(value[key]) is torch.Tensor}
            is_plain = type(container) is dict and "$" not in value  # else it is tagged in the JSON
            if self.flat and is_plain and any(type(item) in _SCALARS for item in value.values()):
                self.texts = {key: f"{dumps(key)}:{dumps(item)}" for key, item in data.items()}

    def take_in(self, container: Any) -> bool:
        """
        Take in numbers, strings and plain tensors that are others than at the last scan, but of the same kind; False if
        more than that has changed.
        """
        if not self.flat or self.kind is not type(container) or tuple(container) != self.keys:
            return False
        values = list(container.values())
        scalars: dict[str, Any] = {}
        tensors: dict[int, torch.Tensor] = {}
        for key, old, new in zip(self.keys, self.values, values, strict=True):
            if old is new:
                continue
            number = self.leaf_of.get(key, -1)
            if number >= 0 and type(new) is torch.Tensor and self._is_alike(number, new):
                tensors[number] = new
            elif self.texts and type(old) in _SCALARS and type(new) in _SCALARS:
                scalars[key] = new
            else:
                return False
        self.values = values
        if scalars:
            for key, value in scalars.items():
                self.texts[key] = f"{dumps(key)}:{dumps(encode(value, self.path))}"
            self.text = f"{{{','.join(self.texts.values())}}}"
        if tensors:
            names = [signed[0] for signed in self.signature]
            made = {number: Leaf(names[number], "optim", tensor, self.param) for number, tensor in tensors.items()}
            self.moves = self.moves or bool(self.leaves)
            self.leaves = [made.get(number) or self.leaves[number] for number in range(len(names))]
        return True

    def forget(self) -> None:
        """Let go of the tensors: of all in a flat mapping but numbers, texts and tuples of those."""
        self.values = [value if self.flat and type(value) in _KEPT else _GONE for value in self.values]
        self.leaves = []

    def _is_alike(self, number: int, tensor: torch.Tensor) -> bool:
        shape = tensor.shape
        _, *expected = self.signature[number]
        found = [tensor.dtype, shape, shape, tensor.device.type, (), tensor.requires_grad]
        return found == expected and tensor.layout is torch.strided


class OptimizerView:
    """One optimizer of the user, seen as names, leaves and JSON."""

    def __init__(self, key: str, optimizer: Any) -> None:
        self.key = key
        self.optimizer = optimizer
        self.params: list[Param] = []  # of all groups, in order
        self.strays: list[Param] = []  # parameters that are in no model
        self._names: Names = Names()
        self._groups: list[_Entry] = []
        self._members: list[list[Any]] = []  # by group
        self._member_texts: list[str] = []
        self._entries: list[_Entry] = []
        self._held: tuple[Any, Held] | None = None  # the state, and what is in it and in its dicts
        self._moving: list[_Entry] = []
        self._leaves: list[Leaf] | None = None
        self._text: bytes | None = None

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
        self._members = [list(group["params"]) for group in self.optimizer.param_groups]
        self._groups = []
        for g, group in enumerate(self.optimizer.param_groups):
            entry = _Entry(f"{self.key}.group{g}", None)
            entry.scan(group, self._names.take, "params")
            self._groups.append(entry)
        self._entries = []
        for key, value in self.optimizer.state.items():
            param = self._owner(key, by_id, tree)
            path = f"{self.key}.state.{key!s:.80}" if param is None else self.state_path(param.name)
            entry = _Entry(path, param, key)
            entry.key_text = self._key_text(entry)
            entry.scan(value, self._names.take)
            self._entries.append(entry)
        self._leaves = self._text = None
        self._hold()

    def refresh(self) -> bool:
        """Take in what is other than at the last scan; False where that needs a new scan: another layout."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if len(groups) != len(self._groups):
            return False
        for entry, group, members in zip(self._groups, groups, self._members, strict=True):
            if not is_same(group["params"], members):
                return False
            if not entry.is_same(group) and not self._take_in(entry, group, "params"):
                return False
        if self._holds(state):
            return True
        if len(state) != len(self._entries):
            return False
        for entry, (key, value) in zip(self._entries, state.items(), strict=True):
            if entry.key is not key and (isinstance(key, torch.Tensor) or entry.key != key):
                return False
            if not entry.is_same(value) and not self._take_in(entry, value, None):
                return False
        self._hold()
        return True

    def state_path(self, name: str) -> str:
        """Return what the names of a parameter's state begin with."""
        short = name.removeprefix("model.") if name.startswith("model.") else name.removeprefix(f"{self.key}.")
        return f"{self.key}.{short}"

    def leaves(self) -> list[Leaf]:
        """Return all leaves, in an order that only a new scan changes; the same list while they are the same."""
        if self._leaves is None:
            self._leaves = [leaf for entry in (*self._groups, *self._entries) for leaf in entry.leaves]
        return self._leaves

    def forget_moving(self) -> list[Leaf]:
        """Let go of state that is replaced, or the old would stay alive beside the new; return what that was."""
        gone = [leaf for entry in self._moving for leaf in entry.leaves]
        if gone:
            for entry in self._moving:
                entry.forget()
            self._held = self._leaves = None
        return gone

    def forget(self) -> None:
        """Let go of everything but the optimizer, until the next ``scan``."""
        self.params, self.strays, self._members = [], [], []
        self._groups, self._entries, self._moving = [], [], []
        self._held = self._leaves = self._text = None

    def text(self) -> bytes:
        """Return the JSON text of groups and state, for the step's meta."""
        if self._text is None:
            groups = ",".join(
                f'{{"params":{members},"hyper":{entry.text}}}'
                for members, entry in zip(self._member_texts, self._groups, strict=True)
            )
            state = ",".join(f"[{entry.key_text},{entry.text}]" for entry in self._entries)
            self._text = f'{{"key":{dumps(self.key)},"groups":[{groups}],"state":[{state}]}}'.encode()
        return self._text

    def _hold(self) -> None:
        """Remember what the state is made of, where one look can tell that it still is."""
        self._moving = [entry for entry in self._entries if entry.moves]
        self._held = None
        state = self.optimizer.state
        if type(state) in _MAPPINGS and all(entry.flat for entry in self._entries):
            self._held = (state, Held([state, *state.values()]))

    def _holds(self, state: Mapping[Any, Any]) -> bool:
        if self._held is None:
            return False
        held, values = self._held
        return state is held and values.unchanged()

    def _take_in(self, entry: _Entry, container: Any, skip: str | None) -> bool:
        """Look at one entry anew; False where its leaves are not what they were, but for being other objects."""
        text, leaves = entry.text, entry.leaves
        if entry.take_in(container):
            if entry.text != text:
                self._text = None
            if entry.leaves is not leaves:
                self._leaves = None
            return True
        self._text = None
        before, names, kept = entry.signature, entry.names, entry.leaves
        entry.scan(container, lambda path: names.get(path, path), skip)
        if is_same([leaf.tensor for leaf in kept], [leaf.tensor for leaf in entry.leaves]):
            entry.leaves = kept
        else:
            entry.moves = entry.moves or bool(kept)
            self._leaves = None
        return before == entry.signature

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
