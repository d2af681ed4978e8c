"""
Names, tensors and ownership of what is inside the user's modules.

Rule 1: names do not depend on how the model is wrapped: DDP, torch.compile and activation checkpointing leave no trace.
Rule 2: a parameter is an object; its names are found by identity, so tied weights appear once and have aliases.
Rule 3: FSDP2 modules are resharded before they are looked at, and the sharded DTensors are what we hold on to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from snapshotd_client.dtensors import is_dtensor, is_fsdp1, is_fsdp2, local_of
from snapshotd_client.held import Held
from snapshotd_client.placement import Placement, place_dtensor, place_plain

__all__ = ["BufferSpot", "ModelTree", "Param", "check_tensor"]

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Children that stand for their parent: torch.compile's and activation checkpointing's wrappers."""


@dataclass(frozen=True, slots=True, eq=False)
class Param:
    """One parameter: ``replicas`` are the ranks of the DDP group that keeps it equal, if any."""

    name: str
    tensor: torch.Tensor
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BufferSpot:
    """Where a buffer hangs; it may be replaced by another tensor at any time."""

    name: str
    owner: nn.Module
    key: str

    def get(self) -> torch.Tensor | None:
        return self.owner._buffers.get(self.key)


@dataclass(slots=True, eq=False)
class _Visit:
    """One way to a module: its canonical name and the DDP wrapper around it, if any."""

    name: str
    module: nn.Module
    ddp: DistributedDataParallel | None
    ddp_name: str


@dataclass(slots=True, eq=False)
class ModelTree:
    """
    What is inside ``models`` (prefix to module), as of the last ``scan``.

    Attributes:
        params: by canonical name, in module order; ``by_id`` finds them by object.
        ties: alias to canonical name, for parameters and modules that are used more than once.
        extra_states: modules that override ``get_extra_state``.
    """

    models: Mapping[str, nn.Module]
    world_size: int
    params: dict[str, Param] = field(default_factory=dict)
    by_id: dict[int, Param] = field(default_factory=dict)
    buffers: dict[str, BufferSpot] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    extra_states: dict[str, nn.Module] = field(default_factory=dict)
    ddps: list[DistributedDataParallel] = field(default_factory=list)
    _sharded: list[Any] = field(default_factory=list)
    _dicts: list[dict[str, Any]] = field(default_factory=list)
    _fsdp_dicts: list[dict[str, Any]] = field(default_factory=list)
    _held: Held = field(default_factory=lambda: Held(()))
    _empty: list[dict[str, Any]] = field(default_factory=list)
    _counted: list[dict[str, Any]] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, model: object, world_size: int) -> ModelTree:
        """Check the user's ``model`` argument and scan it. TypeError or ValueError with the fix."""
        tree = cls(models=_named_models(model), world_size=world_size)
        tree.scan()
        return tree

    def scan(self) -> None:
        """Look at all modules anew."""
        self._reset()
        seen: dict[int, str] = {}
        for visit in self._visits():
            module = visit.module
            if id(module) not in seen:
                seen[id(module)] = visit.name
                self._note_module(visit)
            self._note_tensors(visit)
        self._held = Held(self._dicts)
        self._empty = [entries for entries in self._fsdp_dicts if not entries]
        self._counted = [entries for entries in self._fsdp_dicts if entries]
        self._sizes = list(map(len, self._counted))

    def forget(self) -> None:
        """Let go of everything but the modules, until the next ``scan``."""
        self._reset()
        self._held, self._empty, self._counted, self._sizes = Held(()), [], [], []

    def unchanged(self) -> bool:
        """Whether all parameters are the objects of the last scan, and no module came or went. Cheap."""
        # FSDP2 swaps sharded and unsharded parameters in and out of the module: only their number is looked at.
        counted = not any(self._empty) and list(map(len, self._counted)) == self._sizes
        return counted and self._held.unchanged()

    def reshard(self) -> None:
        """Let FSDP2 modules hold their sharded parameters again (an eval forward can leave the root unsharded)."""
        for module in self._sharded:
            module.reshard()

    def placement(self, param: Param, tensor: torch.Tensor | None = None) -> Placement:
        """Return how ``tensor`` (default: the parameter itself) lies, which is this parameter or state of its shape."""
        tensor = param.tensor if tensor is None else tensor
        if is_dtensor(tensor):
            placed = place_dtensor(tensor)
            if placed.scope == "global" and not placed.replicas and len(param.replicas) > 1:
                return Placement(placed.scope, placed.shape, placed.pieces, param.replicas)
            return placed
        if self.world_size == 1:
            return place_plain(tensor.shape, "global")
        if param.replicas and not is_dtensor(param.tensor):
            return place_plain(tensor.shape, "global", param.replicas)
        return place_plain(tensor.shape, "rank")

    def _reset(self) -> None:
        everything: tuple[Any, ...] = (
            *(self.params, self.by_id, self.buffers, self.ties, self.extra_states),
            *(self.ddps, self._sharded, self._dicts, self._fsdp_dicts),
        )
        for part in everything:
            part.clear()

    def _visits(self) -> Iterator[_Visit]:
        for prefix, model in self.models.items():
            yield from _walk(_Visit(prefix, model, None, ""), frozenset())

    def _note_module(self, visit: _Visit) -> None:
        module = visit.module
        if is_fsdp1(module):
            raise TypeError(
                f"{visit.name}: FullyShardedDataParallel (FSDP1) is not supported; use "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        if is_fsdp2(module):
            reshardable: Any = module
            reshardable.reshard()
            self._sharded.append(module)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.extra_states[visit.name] = module
        if visit.ddp is not None and visit.ddp not in self.ddps:
            self.ddps.append(visit.ddp)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                check_tensor(f"{visit.name}.{key}", buffer)
            self.buffers[f"{visit.name}.{key}"] = BufferSpot(f"{visit.name}.{key}", module, key)
        self._dicts.append(module._modules)
        self._fsdp_dicts.append(module._buffers)
        in_fsdp = any(is_dtensor(param) for param in module._parameters.values())
        (self._fsdp_dicts if in_fsdp else self._dicts).append(module._parameters)

    def _note_tensors(self, visit: _Visit) -> None:
        for key, param in visit.module._parameters.items():
            if param is None:
                continue
            name = f"{visit.name}.{key}"
            check_tensor(name, param)
            known = self.by_id.get(id(param))
            if known is not None:
                if known.name != name:
                    self.ties[name] = known.name
                continue
            if name in self.params:
                raise ValueError(
                    f"two parameters would be called {name}: give the models keys of which none begins with another "
                    "one and a dot"
                )
            entry = Param(name, param, self._replicas(visit, key))
            self.params[name] = self.by_id[id(param)] = entry

    def _replicas(self, visit: _Visit, key: str) -> tuple[int, ...]:
        ddp = visit.ddp
        if ddp is None or self.world_size == 1:
            return ()
        inner = f"{visit.ddp_name}{key}"
        if inner in getattr(ddp, "parameters_to_ignore", ()):
            return ()
        return tuple(sorted(torch.distributed.get_process_group_ranks(ddp.process_group)))


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, with the name and the fix, for a tensor whose bytes cannot be captured."""
    if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
        raise ValueError(f"{name} is not initialized yet (a lazy module): run one forward pass before Snapshotter(...)")
    local = local_of(tensor)
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(
            f"{name} is a {type(local).__name__}: tensor subclasses with a dispatch of their own cannot be kept"
        )
    if local.layout is not torch.strided:
        raise ValueError(f"{name} has layout {local.layout}: only dense tensors can be kept")
    if local.is_meta:
        raise ValueError(f"{name} is on the meta device: materialize the model before Snapshotter(...)")
    if local.is_quantized:
        raise ValueError(f"{name} is quantized: keep its integer representation and scales as buffers instead")


def _walk(visit: _Visit, above: frozenset[int]) -> Iterator[_Visit]:
    yield visit
    module = visit.module
    above |= {id(module)}
    wrapper = isinstance(module, (DistributedDataParallel, DataParallel))
    for key, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        if wrapper and key == "module":
            ddp = module if isinstance(module, DistributedDataParallel) else visit.ddp
            yield from _walk(_Visit(visit.name, child, ddp, "" if ddp is module else visit.ddp_name), above)
            continue
        hidden = key in _WRAPPED
        name = visit.name if hidden else f"{visit.name}.{key}"
        yield from _walk(_Visit(name, child, visit.ddp, f"{visit.ddp_name}{key}." if visit.ddp else ""), above)


def _named_models(model: object) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"model": model}
    items: list[tuple[object, object]]
    if isinstance(model, Mapping):
        items = list(model.items())
    elif isinstance(model, Sequence) and not isinstance(model, str):
        items = list(enumerate(model))
    else:
        raise TypeError(f"model must be a torch.nn.Module, or a list or dict of them, not {type(model).__name__}")
    if not items:
        raise ValueError("model is empty: give at least one torch.nn.Module")
    for key, item in items:
        if not isinstance(item, nn.Module):
            raise TypeError(f"model[{key!r}] must be a torch.nn.Module, not {type(item).__name__}")
    return {f"model.{key}": item for key, item in items if isinstance(item, nn.Module)}
