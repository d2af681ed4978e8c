"""
Find model, optimizer and the rest in a DCP checkpoint's flat keys.

Nothing fixes the keys: they are whatever dict the trainer passed, flattened. Conventions that are met, all of which are
found by what they have in common (an optimizer has ``P.param_groups.`` and ``P.state.`` under one prefix P; the names
in it are the ends of the model's keys)::

    model.<fqn>        optim.state.<fqn>.exp_avg        optim.param_groups.<i>.lr          most examples, FSDP1
    model.<fqn>        optim.state.<fqn>.exp_avg        optim.param_groups.<fqn>.lr        flatten_optimizer_state_dict
    <fqn>              state.<fqn>.exp_avg              param_groups.<fqn>.lr              torchtitan
    model.<fqn>        optimizer.state.<fqn or id>.step                                    accelerate
    model.<fqn>        optimizer_0.state.<fqn>.exp_avg                                     Lightning
    app.model.<fqn>    app.optim.state.<fqn>.exp_avg                                       torch's tutorial (AppState)

fqns contain dots. ``planner_data`` has the paths, but not where the optimizer was flattened: then the last dot ends the
fqn, because no optimizer's state and no hyperparameter has a dot in its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.conventions import Model, find_step, is_rng, unwrapped
from snapshotd.universal.readers.optimizers import Optimizer, name_optimizers
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View

__all__ = ["Item", "assemble"]

_GROUPS: Final = re.compile(r"(?P<prefix>(?:.*\.)?)param_groups\.")
_MODEL_PREFIXES: Final = ("model.", "app.model.", "module.", "state_dict.", "model_state_dict.", "models.", "net.", "")
NOTE_KEY: Final = "snapshotd"
_REST_PREFIXES: Final = re.compile(
    r"(lr_scheduler|scheduler|dataloader|train_state|train|rng|extra|args|config|ema)[._]"
)

_EXTRA_STATE: Final = re.compile(r"(^|\.)_extra_state(\.|$)")
"""What ``get_extra_state`` of a module gave, or a part of it."""

_COUNTERS: Final = frozenset({"step", "epoch", "iteration", "iter", "global_step", "tokens"})
"""Names that trainers give to numbers at the top level, and nobody to a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One flat key: a tensor, or an object. ``path`` is None where the writer's version did not record it."""

    key: str
    path: tuple[Any, ...] | None
    view: View | None = None
    value: Any = None
    sharded: bool = False


@dataclass(slots=True)
class _Optim:
    """What is found under one optimizer's prefix."""

    prefix: str
    states: dict[Any, dict[str, Any]] = field(default_factory=dict)
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)
    by_name: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


def assemble(items: Sequence[Item], *, compare: bool = True) -> State:
    """
    Return the state that the items are; see the module.

    ``compare``: read weights that the optimizer does not know, to see whether they are tied to one that it knows.
    """
    state = State(format="dcp", tensors=[])
    note = next((item.value for item in items if item.key == NOTE_KEY and isinstance(item.value, dict)), None)
    if note is not None:
        # Our own writer's: see writers/torch_tree.py.
        state.tensors += [
            Tensor("fp32", str(item.path[1]), item.view)
            for item in items
            if item.path and len(item.path) == 2 and item.path[0] == "fp32" and item.view is not None
        ]
        items = [item for item in items if item.key != NOTE_KEY and (not item.path or item.path[0] != "fp32")]
        generators = {f"rng_{name}": str(name) for name in note.get("rng") or ()}
        mine = {item.key: item.view for item in items if item.key in generators and item.view is not None}
        state.tensors += [Tensor("rng", generators[key], view) for key, view in mine.items()]
        items = [item for item in items if item.key not in mine]
    prefixes = [prefix for prefix in _optimizer_prefixes(items) if note is None or prefix == "optim."]
    optims, rest = _take_optimizers(items, prefixes, state)
    optimizers = [_optimizer(optim) for optim in optims]
    names = [name for optimizer in optimizers for name in optimizer.names if isinstance(name, str)]
    prefix = "model." if note is not None else _model_prefix(rest, names)
    weights = {item.key[len(prefix) :]: item for item in rest if _is_weight(item, prefix, set(names))}
    taken = {item.key for item in weights.values()}
    plain = unwrapped(weights)
    weights = {plain[name]: item for name, item in weights.items()}
    views = {name: item.view for name, item in weights.items() if item.view is not None}
    for optimizer in optimizers:
        optimizer.rename(plain)
    warning = name_optimizers(optimizers, views)
    if warning:
        state.warnings.append(warning)
    _put_rest(state, [_of_module(item, prefix) for item in rest if item.key not in taken], note)
    listed = {name for optimizer in optimizers for name in optimizer.names}
    sharded = [name for name, item in weights.items() if item.sharded]
    idle = [name for optimizer in optimizers for name in optimizer.idle]
    if note is not None:
        Model.put_noted(state, views, note)
    else:
        Model(views, listed=listed if optimizers else None, idle=idle, sharded=sharded, compare=compare).put(state)
    for optimizer in optimizers:
        optimizer.put(state)
    if any(_is_merged(optim, optimizer) for optim, optimizer in zip(optims, optimizers, strict=True)):
        state.warnings.append(
            "the optimizer's groups are not recorded: parameters with equal hyperparameters are taken for one group, "
            "so groups that were equal are one now"
        )
    state.step = (find_step(state) if compare else None) if note is None else note.get("step")
    return state


def _optimizer_prefixes(items: Sequence[Item]) -> list[str]:
    """The prefixes P (with their dot, or empty) for which both P.param_groups. and P.state. are there."""
    found: dict[str, None] = {}
    for item in items:
        match = _GROUPS.match(item.key)
        if match and not any(item.key.startswith(f"{known}param_groups.") for known in found):
            found[match["prefix"]] = None
    return list(found)


def _take_optimizers(
    items: Sequence[Item], prefixes: Sequence[str], state: State
) -> tuple[list[_Optim], list[Item]]:
    """Return the optimizers, and what is none's. One with the same names as another trains another model: it stays."""
    optims = [_Optim(prefix) for prefix in prefixes]
    rest: list[Item] = []
    for item in items:
        owner = next((optim for optim in optims if _take(optim, item)), None)
        (rest if owner is None else owner.items).append(item)
    seen: set[str] = set()
    kept: list[_Optim] = []
    for optim in optims:
        names = {name for name in optim.states if isinstance(name, str)}
        if names & seen:
            rest += optim.items
            state.warnings.append(
                f"{optim.prefix}state has the names of another optimizer's: it is kept in extra.{optim.prefix[:-1]}"
            )
        else:
            kept.append(optim)
            seen |= names
    return kept, rest


def _take(optim: _Optim, item: Item) -> bool:
    """Put an item that is the optimizer's into it; says whether it was."""
    if not item.key.startswith(optim.prefix):
        return False
    rest = item.key[len(optim.prefix) :]
    value = item.view if item.view is not None else item.value
    if rest.startswith("state."):
        owner, _, name = rest[len("state.") :].rpartition(".")
        path = item.path or ()
        # An unflattened path says it exactly, also for states that are nested: (..., 'state', fqn, name, ...).
        depth = next((i for i, part in enumerate(path) if part == "state"), -1)
        if depth >= 0 and len(path) > depth + 2:
            owner, name = path[depth + 1], ".".join(map(str, path[depth + 2 :]))
        if not owner:
            return False
        optim.states.setdefault(_number(owner), {})[name] = value
        return True
    if rest.startswith("param_groups."):
        owner, _, name = rest[len("param_groups.") :].rpartition(".")
        first, _, inner = rest[len("param_groups.") :].partition(".")
        if first.isdigit() and (item.path is None or "param_groups" in item.path):
            optim.groups.setdefault(int(first), {})[inner] = value
        else:
            optim.by_name.setdefault(owner, {})[name] = value
        return True
    return False


def _number(owner: Any) -> Any:
    return int(owner) if isinstance(owner, str) and owner.isdigit() else owner


def _optimizer(optim: _Optim) -> Optimizer:
    if optim.groups:
        groups = []
        for _, fields in sorted(optim.groups.items()):
            params = fields.get("params")
            if isinstance(params, (list, tuple)):
                groups.append({**_unflatten(fields), "params": list(params)})
            else:
                groups.append({**_unflatten(fields), "params": []})
        numbered = Optimizer(groups, optim.states)
        numbered.flattened = bool(optim.by_name)  # our own writer says both
        return numbered
    # Flattened: each parameter has its own copy of the hyperparameters; equal ones make a group.
    groups = []
    for name, fields in optim.by_name.items():
        for group in groups:
            if {key: value for key, value in group.items() if key != "params"} == fields:
                group["params"].append(name)
                break
        else:
            groups.append({**fields, "params": [name]})
    optimizer = Optimizer(groups, optim.states)
    optimizer.flattened = True
    return optimizer


def _is_merged(optim: _Optim, optimizer: Optimizer) -> bool:
    """Whether a group may have been several: it has more than one member, and nobody said that they are together."""
    return not optim.groups and any(len(group["params"]) > 1 for group in optimizer.groups)


def _unflatten(fields: dict[str, Any]) -> dict[str, Any]:
    """Undo the flattening of lists that held tensors or mappings: 'betas.0', 'betas.1'."""
    result: dict[str, Any] = {}
    for key, value in fields.items():
        name, _, index = key.partition(".")
        if index.isdigit():
            result.setdefault(name, []).append(value)
        else:
            result[key] = value
    return result


def _model_prefix(items: Sequence[Item], names: Sequence[str]) -> str:
    keys = [item.key for item in items if item.view is not None]
    if names:
        wanted = set(names)
        counts: dict[str, int] = {}
        for prefix in dict.fromkeys(key[: -len(names[0])] for key in keys if _ends_with(key, names[0])):
            counts[prefix] = len(wanted & {key[len(prefix) :] for key in keys if key.startswith(prefix)})
        if not counts:
            raise FormatError(f"the optimizer has state for {names[0]}, but no tensor's key ends so: no model is there")
        return max(counts, key=lambda prefix: (counts[prefix], prefix in _MODEL_PREFIXES, -len(prefix)))
    for prefix in _MODEL_PREFIXES[:-1]:
        mine = [item for item in items if item.view is not None and item.key.startswith(prefix)]
        # A path of one part means that "model." begins the name itself: the trainer passed a flat state dict.
        if any(item.path is None or len(item.path) > 1 for item in mine):
            return prefix
    return _largest_section(items)


def _largest_section(items: Sequence[Item]) -> str:
    """The prefix of the dict that has most bytes, where no tensor stands at the top level; else none."""
    sizes: dict[str, int] = {}
    for item in items:
        if item.view is None or item.path is None or _REST_PREFIXES.match(item.key):
            continue
        if len(item.path) == 1 and item.key not in _COUNTERS and is_rng(item.path, item.view) is None:
            return ""
        if len(item.path) > 1:
            prefix = item.key[: -len(str(item.path[-1]))]
            sizes[prefix] = sizes.get(prefix, 0) + item.view.nbytes
    return max(sizes, key=lambda prefix: sizes[prefix], default="")


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _is_weight(item: Item, prefix: str, listed: set[str]) -> bool:
    if item.view is None or not item.key.startswith(prefix):
        return False
    name = item.key[len(prefix) :]
    if name in listed:
        return True
    if _EXTRA_STATE.search(name) or is_rng(item.path or (item.key,), item.view) is not None:
        return False
    if prefix:
        return True
    # At the top level weights stand beside the trainer's own sections, which have paths of several parts.
    if item.path is not None:
        return len(item.path) == 1 and name not in _COUNTERS
    return _REST_PREFIXES.match(name) is None


def _of_module(item: Item, prefix: str) -> Item:
    """What a module has in its state dict besides tensors goes where the reader of torch.save files puts it."""
    path = item.path or (item.key,)
    depth = prefix.count(".")
    inside = item.key.startswith(prefix) and len(path) > depth and (prefix or _EXTRA_STATE.search(item.key))
    return replace(item, path=("model_state", *path[depth:])) if inside else item


def _put_rest(state: State, items: Sequence[Item], note: Mapping[str, Any] | None) -> None:
    """
    Everything that is neither model nor optimizer: random generators, and the tree of the rest.

    Our own writer's ``note`` has said which are generators: nothing is one by its name then.
    """
    renamed = note.get("renamed") if note is not None else None
    renamed = renamed if isinstance(renamed, dict) else {}
    tree = _Node()
    ranks: set[str] = set()
    for item in items:
        path = item.path or (item.key,)
        if item.view is not None and note is None:
            rank = is_rng(path, item.view)
            if rank is not None and rank not in ranks:
                ranks.add(rank)
                state.tensors.append(Tensor("rng", rank, item.view))
                continue
        node = tree
        for part in path[:-1]:
            inner = node.setdefault(part, _Node())
            if not isinstance(inner, _Node):
                raise FormatError(f"the keys contradict each other at {item.key}")
            node = inner
        node[path[-1]] = item.view if item.view is not None else item.value
    for key, value in tree.items():
        name = renamed.get(str(key), str(key))
        state.extra[name] = to_json(_lists(value), name, state.tensors)


class _Node(dict[Any, Any]):
    """A dict that was flattened, as opposed to a value that is a dict."""


def _lists(node: Any) -> Any:
    """Undo the flattening: what had the keys 0, 1, 2 ... was a list."""
    if not isinstance(node, _Node):
        return node
    result = {key: _lists(value) for key, value in node.items()}
    if result and all(type(key) is int for key in result) and set(result) == set(range(len(result))):
        return [result[key] for key in range(len(result))]
    return result
