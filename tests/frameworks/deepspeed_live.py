"""
The state of a live DeepSpeed engine, gathered from its own objects and not from anything that it saved.

Every rank calls ``capture``; each gets the whole. Pieces travel as they are (DeepSpeed's own ``safe_get_full_*`` sum
them up, which turns -0.0 into 0.0), and each element must come from exactly one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

Piece = tuple[tuple[int, ...], int, torch.Tensor]
"""The whole's shape, where the piece begins in the flattened whole, and its elements."""


Merge = Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


@dataclass
class Live:
    """``tensors``: ``kind/name`` to tensor, as truth.safetensors has it. ``groups``: names and hyperparameters."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)


def capture(engine: Any, names: dict[int, str], groups: list[list[str]], merge: Merge, tensor_rank: int) -> Live:
    """
    Return what the engine holds now: the union over all ranks; what several have must be the same.

    Args:
        names: of this rank's parameters by ``id``.
        groups: names of the parameter groups of this rank's optimizer, as the user listed them.
        merge: makes a whole of what the tensor ranks hold.
    """
    params = {names[id(param)]: param for param in engine.module.parameters()}
    pieces: dict[str, Any] = {}
    with deepspeed.zero.GatheredParameters([p for p in params.values() if getattr(p, "ds_numel", 0)]):
        for name, param in params.items():
            shape = tuple(getattr(param, "ds_shape", param.shape))  # what has no elements can not be gathered
            pieces[f"model/{name}"] = (shape, 0, param.detach().clone().reshape(-1))
    for name, buffer in persistent_buffers(engine.module):
        pieces[f"buffer/{name}"] = (tuple(buffer.shape), 0, buffer.detach().clone().reshape(-1))
    pieces.update(_states(engine, {name: param for name, param in params.items() if param.requires_grad}))
    mine = Live(
        tied=_tied(engine.module),
        frozen=[name for name, param in params.items() if not param.requires_grad],
        groups=[
            {"names": members, **{k: v for k, v in group.items() if k not in ("params", "param_names")}}
            for members, group in zip(groups, base_optimizer(engine).param_groups, strict=True)
        ],
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (tensor_rank, mine, pieces))
    ranks = sorted({rank for rank, _, _ in everyone})
    live = Live(tensors=merge([_whole([held for rank, _, held in everyone if rank == t]) for t in ranks]))
    for _, other, _ in everyone:
        live.tied.update(other.tied)
        live.frozen += [name for name in other.frozen if name not in live.frozen]
        _join(live.groups, other.groups)
    _drop_equal_masters(live)
    live.counters = {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
    }
    return live


def _join(known: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """
    Stages and experts have groups of their own: those with the same hyperparameters are one. Groups of one rank stay
    apart: the first of a rank belongs to the first like it, the second to the second.
    """
    rest = lambda one: repr({key: value for key, value in one.items() if key != "names"})  # noqa: E731
    free = list(known)
    for group in groups:
        same = next((other for other in free if rest(other) == rest(group)), None)
        if same is None:
            known.append({**group, "names": list(group["names"])})
            continue
        free = [other for other in free if other is not same]
        same["names"] += [name for name in group["names"] if name not in same["names"]]


def _tied(module: torch.nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            found[name] = first[id(param)]
    return found


def _whole(everyone: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put the pieces of all ranks together; each element must be there, and the same wherever it is."""
    found: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for mine in everyone for key in mine):
        listed = [mine[key] for mine in everyone if key in mine]
        if not isinstance(listed[0], tuple):
            numbers = [number_tensor(value) for value in listed]
            assert all(torch.equal(number, numbers[0]) for number in numbers), f"{key} differs between ranks"
            found[key] = numbers[0]
            continue
        shape = listed[0][0]
        flat = torch.empty(torch.Size(shape).numel(), dtype=listed[0][2].dtype)
        there = torch.zeros(flat.numel(), dtype=torch.bool)
        for _, begin, piece in listed:
            piece = piece[: max(0, flat.numel() - begin)]
            part = slice(begin, begin + piece.numel())
            old = there[part].clone()
            assert torch.equal(bits(flat[part][old]), bits(piece[old])), f"{key} differs between ranks"
            flat[part] = piece
            there[part] = True
        assert there.all(), f"{key} is not whole"
        found[key] = flat.reshape(shape)
    return found


def _drop_equal_masters(live: Live) -> None:
    """A master of the weight's own dtype is the weight; the others must round to it."""
    for key in [key for key in live.tensors if key.startswith("fp32/")]:
        weights, master = live.tensors[key.replace("fp32/", "model/", 1)], live.tensors[key]
        assert torch.equal(bits(master.to(weights.dtype)), bits(weights)), f"{key} does not round to the weights"
        if weights.dtype == master.dtype:
            del live.tensors[key]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def persistent_buffers(module: torch.nn.Module, prefix: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from persistent_buffers(child, f"{prefix}{name}.")


def base_optimizer(engine: Any) -> Any:
    """The optimizer that the user named, inside whatever DeepSpeed wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _states(engine: Any, trained: dict[str, Any]) -> dict[str, Any]:
    """This rank's pieces of masters and optimizer states, and numbers as they are."""
    outer = engine.optimizer
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        return _stage3(outer, trained)
    if hasattr(outer, "round_robin_bit16_groups") or hasattr(outer, "fp32_groups_flat_partition"):
        return _stage12(outer, trained)
    return _plain(outer, trained)


def number_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().reshape(())
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _sorted(state: dict[str, Any], flat: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states with an element per element of the partition, and the numbers."""
    same = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == flat.shape and k != "step"}
    return same, {key: value for key, value in state.items() if key not in same}


def _stage12(outer: Any, trained: dict[str, Any]) -> dict[str, Any]:
    names = {id(param): name for name, param in trained.items()}
    masters = getattr(outer, "single_partition_of_fp32_groups", None) or outer.fp32_groups_flat_partition
    flats = getattr(outer, "bit16_groups_flat", None) or outer.bf16_groups_flat
    pieces: dict[str, Any] = {}
    for g, master in enumerate(masters):
        group = getattr(outer, "round_robin_bit16_groups", None) or outer.bf16_groups
        offsets = getattr(outer, "round_robin_bit16_offsets", None)
        size = flats[g].numel() // dist.get_world_size(outer.real_dp_process_group[g])
        begin = size * dist.get_rank(outer.real_dp_process_group[g])
        states, numbers = _sorted(outer.optimizer.state[master], master)
        at = 0
        for i, param in enumerate(group[g]):
            if offsets is not None:
                at = offsets[g][i]
            name = names[id(param)]
            first, last = max(at, begin), min(at + param.numel(), begin + size)
            if first < last or not param.numel():
                part = slice(first - begin, max(first, last) - begin)
                for kind, state in {"fp32": master, **states}.items():
                    pieces[f"{kind}/{name}"] = (tuple(param.shape), max(0, first - at), state.detach()[part].clone())
            pieces.update((f"{kind}/{name}", number) for kind, number in numbers.items())
            at += param.numel()
    return pieces


def _stage3(outer: Any, trained: dict[str, Any]) -> dict[str, Any]:
    pieces: dict[str, Any] = {}
    for name, param in ((name, param) for name, param in trained.items() if param.ds_numel):
        sub, begin, count = outer.grad_position[outer.get_param_id(param)]
        master = outer.fp32_partitioned_groups_flat[sub]
        states, numbers = _sorted(outer.optimizer.state[master], master)
        rank = dist.get_rank(outer._get_param_partition_group(param))
        for kind, state in {"fp32": master, **states}.items():
            piece = state.detach()[begin : begin + count].clone()
            pieces[f"{kind}/{name}"] = (tuple(param.ds_shape), rank * count, piece)
        pieces.update((f"{kind}/{name}", number) for kind, number in numbers.items())
    return pieces


def _plain(outer: Any, trained: dict[str, Any]) -> dict[str, Any]:
    """Without ZeRO: masters beside the parameters, or none."""
    names = {id(param): name for name, param in trained.items()}
    base = getattr(outer, "optimizer", outer)
    found: dict[str, Any] = {}

    def put(param: Any, master: Any, part: slice) -> None:
        states, numbers = _sorted(base.state[master], master)
        for kind, state in {"fp32": master, **states}.items():
            piece = state.detach().clone().reshape(-1)[part]
            found[f"{kind}/{names[id(param)]}"] = (tuple(param.shape), 0, piece)
        found.update((f"{kind}/{names[id(param)]}", number) for kind, number in numbers.items())

    for g, group in enumerate(base.param_groups):
        if hasattr(outer, "fp32_groups_flat"):
            at = 0
            for param in outer.fp16_groups[g]:
                put(param, outer.fp32_groups_flat[g], slice(at, at + param.numel()))
                at += param.numel()
            continue
        own = hasattr(outer, "fp32_groups")
        params, masters = (outer.fp16_groups[g], outer.fp32_groups[g]) if own else (group["params"], group["params"])
        for param, master in zip(params, masters, strict=True):
            put(param, master, slice(None))
    return found
