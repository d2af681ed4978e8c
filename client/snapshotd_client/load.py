"""
Where each byte of a snapshot goes in this rank's modules and optimizers, whatever layout it was captured in.

Rule 1: everything that can be is filled in place: parameters, buffers, and optimizer tensors of equal shape and dtype.
Rule 2: nothing goes through ``optimizer.load_state_dict``: it casts dtypes. State gets the source's dtypes, exactly.
Rule 3: state of a parameter's shape takes the parameter's placement here, wherever it was sharded there.
Rule 4: what does not fit is collected first, and refused with up to ten names before a byte is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from snapshotd_client.arrays import dtype_name
from snapshotd_client.codec import Json, decode
from snapshotd_client.dtensors import is_dtensor, local_of
from snapshotd_client.errors import RestoreError
from snapshotd_client.fetch import Entry, Manifest, Want
from snapshotd_client.inventory import Inventory
from snapshotd_client.leaves import leaf_names
from snapshotd_client.models import Param
from snapshotd_client.optim import OptimizerView
from snapshotd_client.placement import Placement, place_dtensor, place_on_mesh, place_plain, strides_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Loader"]

_MAX_NAMES: Final = 10


@dataclass(frozen=True, slots=True, eq=False)
class _OptimizerLoad:
    """One optimizer with its decoded groups and state, which take effect in ``apply``."""

    view: OptimizerView
    groups: list[tuple[list[torch.Tensor], dict[str, Any]]]
    state: list[tuple[Any, Any]]


class Loader:
    """
    ``wants`` says what to fetch (and makes the tensors for it); after that, ``apply`` puts it in place.

    ``model_only``: optimizers and schedulers stay as they are.
    """

    def __init__(self, inventory: Inventory, manifest: Manifest, *, model_only: bool = False) -> None:
        self._inventory = inventory
        self._manifest = manifest
        self._model_only = model_only
        self._wants: list[Want] = []
        self._leaf_tensors: dict[str, Any] = {}
        self._loads: list[_OptimizerLoad] = []
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._problems: list[str] = []
        self._device = next((d for d in inventory.devices()), torch.device("cpu"))

    def wants(self) -> list[Want]:
        """Return everything to fetch. RestoreError when the snapshot does not fit these modules and optimizers."""
        inventory = self._inventory
        inventory.rescan()
        for param in (*inventory.tree.params.values(), *inventory.strays()):
            self._want_param(param)
        for spot in inventory.tree.buffers.values():
            self._want_buffer(spot.owner, spot.key, spot.name)
        stored = {item["key"]: item for item in self._manifest.meta["optimizers"]}
        for view in [] if self._model_only else inventory.optimizers:
            if view.key not in stored:
                self._problems.append(f"{view.key} (not in the snapshot, which has {', '.join(stored) or 'none'})")
                continue
            self._loads.append(self._prepare_optimizer(view, stored[view.key]))
        self._want_extras(self._manifest.meta["rest"])
        if self._problems:
            shown = "; ".join(self._problems[:_MAX_NAMES])
            more = f"; and {len(self._problems) - _MAX_NAMES} more" if len(self._problems) > _MAX_NAMES else ""
            raise RestoreError(
                f"the snapshot does not fit this model: {shown}{more}. Another training needs another name (torchrun's "
                "--rdzv-id, or SNAPSHOTD_JOB); `snapshotd forget` lets one begin anew"
            )
        return self._wants

    def apply(self) -> list[str]:
        """Put everything in place, after the fetch; return the names of extras that the snapshot does not have."""
        for owner, key, tensor in self._buffers:
            owner._buffers[key] = tensor
        for load in self._loads:
            _apply_optimizer(load)
        rest = self._manifest.meta["rest"]
        if not self._model_only:
            self._inventory.extras.load_schedulers(rest, self._leaf)
        missing = self._inventory.extras.load_extra(rest, self._leaf, self._inventory.tree.extra_states)
        self._inventory.rescan()
        return missing

    # ------------------------------------------------------------------ modules

    def _want_param(self, param: Param) -> None:
        entry = self._manifest.find(param.name)
        if entry is None:
            self._problems.append(f"{param.name} is not in the snapshot")
            return
        self._want(entry, param.tensor, self._inventory.tree.placement(param), param.name)

    def _want_buffer(self, owner: nn.Module, key: str, name: str) -> None:
        entry = self._manifest.find(name)
        if entry is None:
            return
        old = owner._buffers.get(key)
        if is_dtensor(old):
            placed = place_dtensor(old)
            self._want(entry, old, placed, name)
            return
        fits = old is not None and tuple(old.shape) == entry.shape and dtype_name(old) == entry.dtype
        if old is None or not fits or old.is_conj() or old.is_neg():
            device = old.device if old is not None else next((p.device for p in owner.parameters()), self._device)
            old = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
            self._buffers.append((owner, key, old))
        self._want(entry, old, place_plain(old.shape, "rank"), name)

    def _want(self, entry: Entry, target: torch.Tensor, placement: Placement, name: str) -> None:
        """Ask for this rank's part of ``entry`` into ``target``, or note why it does not fit."""
        local = local_of(target)
        if entry.scope == "rank":
            placement = place_plain(local.shape, "rank")
        if dtype_name(local) != entry.dtype:
            self._problems.append(f"{name} is {dtype_name(local)} here, {entry.dtype} in the snapshot")
        elif placement.shape != entry.shape:
            self._problems.append(f"{name} has shape {placement.shape} here, {entry.shape} in the snapshot")
        else:
            self._wants += [Want(entry, piece, local.detach()) for piece in placement.pieces if not piece.box.is_empty]

    # ------------------------------------------------------------------ optimizers

    def _prepare_optimizer(self, view: OptimizerView, stored: Json) -> _OptimizerLoad:
        by_name = {p.name: p for p in (*self._inventory.tree.params.values(), *view.strays)}
        aliases = {**self._inventory.tree.ties, **self._manifest.ties}
        groups: list[tuple[list[torch.Tensor], dict[str, Any]]] = []
        current = list(view.optimizer.param_groups)
        if len(current) > len(stored["groups"]):
            self._problems.append(f"{view.key} has {len(current)} groups, the snapshot {len(stored['groups'])}")
        for g, group in enumerate(stored["groups"]):
            members = [by_name.get(name) or by_name.get(aliases.get(name, "")) for name in group["params"]]
            lacking = [n for n, member in zip(group["params"], members, strict=True) if member is None]
            if lacking:
                self._problems.append(f"{view.key} group {g} has {', '.join(lacking[:3])} in the snapshot only")
            tensors = [member.tensor for member in members if member is not None]
            old = current[g] if g < len(current) else {}
            if old and {id(t) for t in old["params"]} != {id(t) for t in tensors} and not lacking:
                self._problems.append(f"{view.key} group {g} has other parameters than in the snapshot")
            maker = self._leaf_maker(None, f"{view.key}.group{g}", old)
            groups.append((tensors, decode(group["hyper"], maker)))
        state: list[tuple[Any, Any]] = []
        for (kind, key), value in stored["state"]:
            param = (by_name.get(key) or by_name.get(aliases.get(key, ""))) if kind == "param" else None
            if kind == "param" and param is None:
                self._problems.append(f"{view.key} has state of {key}, which is not here")
                continue
            target = param.tensor if param is not None else decode(key)
            old = view.optimizer.state.get(target, {}) if target in view.optimizer.state else {}
            path = view.state_path(key) if kind == "param" else f"{view.key}.state.{target!s:.80}"
            state.append((target, decode(value, self._leaf_maker(param, path, old))))
        return _OptimizerLoad(view, groups, state)

    def _leaf_maker(self, param: Param | None, path: str, old: Any) -> Callable[[Json], Any]:
        """Return what finds or makes the tensor for a leaf, and asks for its bytes."""
        there = dict(_tensors_of(old, path))

        def make(leaf: Json) -> Any:
            entry = self._manifest.tensors.get(leaf["n"])
            if entry is None:
                self._problems.append(f"{leaf['n']} is not in the snapshot")
                return None
            tensor = there.get(leaf["n"])
            if tensor is None or not _is_reusable(leaf, tensor, param):
                tensor = self._make(leaf, entry, param)
            placement = place_dtensor(tensor) if is_dtensor(tensor) else place_plain(tensor.shape, "rank")
            self._want(entry, tensor, placement, leaf["n"])
            return tensor

        return make

    def _make(self, leaf: Json, entry: Entry, param: Param | None) -> torch.Tensor:
        dtype = getattr(torch, leaf["t"])
        home = param.tensor if param is not None else None
        device = torch.device("cpu") if leaf["d"] == "cpu" else (home.device if home is not None else self._device)
        shape = tuple(leaf["s"])
        tensor: torch.Tensor
        if is_dtensor(home) and (leaf.get("l") or leaf.get("x")):
            tensor = _like_dtensor(home, shape, dtype, device, leaf)
        elif leaf.get("l") and home is not None and tuple(home.shape) == shape:
            tensor = torch.empty_like(home, dtype=dtype, device=device, requires_grad=False)
        elif leaf.get("x") and entry.scope == "rank":
            tensor = torch.empty(entry.shape, dtype=dtype, device=device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        flags = leaf.get("g", 0)
        if flags & 2:
            return nn.Parameter(tensor, requires_grad=bool(flags & 1))
        return tensor.requires_grad_() if flags & 1 else tensor

    # ------------------------------------------------------------------ extras

    def _want_extras(self, rest: Json) -> None:
        """Make tensors for the leaves of schedulers, scaler and extra; the objects take them over by themselves."""
        templates: dict[str, torch.Tensor] = {}
        for name in self._inventory.extras.values:
            if leaf_names(rest["extra"].get(name)):
                found = _tensors_of(self._inventory.extras.template(name), "")
                templates.update({f"extra.{name}{dotted}": tensor for dotted, tensor in found})
        for part in ("schedulers", "scaler", "modules", "extra"):
            self._want_leaves(rest[part], templates)

    def _want_leaves(self, data: Json, templates: dict[str, torch.Tensor]) -> None:
        if isinstance(data, list):
            for item in data:
                self._want_leaves(item, templates)
        elif isinstance(data, dict) and data.get("$") == "leaf":
            self._want_leaf(data, templates.get(data["n"]))
        elif isinstance(data, dict):
            for item in data.values():
                self._want_leaves(item, templates)

    def _want_leaf(self, leaf: Json, template: torch.Tensor | None) -> None:
        entry = self._manifest.tensors.get(leaf["n"])
        if entry is None:
            self._problems.append(f"{leaf['n']} is not in the snapshot")
            return
        dtype = getattr(torch, leaf["t"])
        tensor: torch.Tensor
        if leaf.get("x") and is_dtensor(template):
            tensor = _like_dtensor(template, tuple(leaf["s"]), dtype, template.device, {"l": 1})
            placement = place_dtensor(template)
        else:
            device = torch.device("cpu") if leaf["d"] == "cpu" or leaf.get("a") else self._device
            tensor = torch.empty(entry.shape, dtype=dtype, device=device)
            placement = place_plain(entry.shape, "rank")
        self._want(entry, tensor, placement, leaf["n"])
        flags = leaf.get("g", 0)
        if flags & 2:
            tensor = nn.Parameter(tensor, requires_grad=bool(flags & 1))
        elif flags & 1:
            tensor.requires_grad_()
        self._leaf_tensors[leaf["n"]] = tensor.numpy() if leaf.get("a") else tensor

    def _leaf(self, leaf: Json) -> Any:
        return self._leaf_tensors[leaf["n"]]


def _apply_optimizer(load: _OptimizerLoad) -> None:
    optimizer = load.view.optimizer
    for g, (tensors, hyper) in enumerate(load.groups):
        if g >= len(optimizer.param_groups):
            group = {"params": tensors, **hyper}
            if callable(getattr(optimizer, "add_param_group", None)):
                optimizer.add_param_group(group)
            else:
                optimizer.param_groups.append(group)
        target = optimizer.param_groups[g]
        target["params"][:] = tensors
        target.update(hyper)
    state = optimizer.state
    old = {id(key): value for key, value in state.items()}
    keys = list(state)  # keep keys alive while their ids are looked at
    state.clear()
    for key, value in load.state:
        kept = old.get(id(key))
        if type(kept) is dict and type(value) is dict:
            kept.clear()
            kept.update(value)
            value = kept
        state[key] = value
    del keys


def _like_dtensor(
    home: DTensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, leaf: Json
) -> torch.Tensor:
    """Return an empty DTensor of ``shape`` on ``home``'s mesh: placed as ``home``, or as the leaf was."""
    placements: Any = home.placements
    if not leaf.get("l"):
        spelled = leaf["x"] if len(leaf["x"]) == home.device_mesh.ndim else ["R"] * home.device_mesh.ndim
        from torch.distributed.tensor import Replicate, Shard  # slow to import; here it has been

        placements = [Shard(int(text[1:])) if text[0] == "S" else Replicate() for text in spelled]
    _, local_shape = place_on_mesh(shape, home.device_mesh, placements)
    local = torch.empty(local_shape, dtype=dtype, device=device)
    return type(home).from_local(
        local, home.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides_of(shape)
    )


def _is_reusable(leaf: Json, tensor: torch.Tensor, param: Param | None) -> bool:
    """Whether ``tensor``, which has the leaf's name, can be filled in place."""
    if list(tensor.shape) != leaf["s"] or str(tensor.dtype) != f"torch.{leaf['t']}" or _is_expanded(tensor):
        return False
    # A dense tensor whose parameter is a DTensor now, or the other way round, is made anew as its parameter lies.
    lies = is_dtensor(tensor) == (param is not None and is_dtensor(param.tensor))
    return lies or not leaf.get("l")


def _tensors_of(value: Any, path: str) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors inside ``value`` with their paths, spelled as the codec spells them."""
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _tensors_of(item, f"{path}.{key}")]
    if isinstance(value, (list, tuple)):
        return [pair for i, item in enumerate(value) for pair in _tensors_of(item, f"{path}[{i}]")]
    return []


def _is_expanded(tensor: torch.Tensor) -> bool:
    local = local_of(tensor)
    return any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True))
