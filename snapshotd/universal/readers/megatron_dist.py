"""
Megatron's distributed checkpoints (``--ckpt-format torch_dist``): ``common.pt`` and DCP files with Megatron's own keys.

Tensors are whole already, SwiGLU's included. What differs from the model: layers (and experts) are stacked, norms have
Transformer Engine's names whatever the model was made of, the vocabulary is padded, tied weights are there once. The
optimizer is under the model's keys, or in flat buckets per model-parallel rank (dp_reshardable, see megatron_dp.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.layout.header import decode_json
from snapshotd.universal import torchzip
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers import dcp
from snapshotd.universal.readers.dcp_keys import Item
from snapshotd.universal.readers.megatron_dp import Objects, put_dp_reshardable
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import Part
from snapshotd.universal.readers.megatron_groups import Member, by_rule
from snapshotd.universal.readers.megatron_names import is_buffer, is_expert, list_order
from snapshotd.universal.readers.megatron_optim import groups_of
from snapshotd.universal.readers.megatron_rules import rules_for
from snapshotd.universal.readers.megatron_whole import Whole, put_rng, put_vocabulary, step_view
from snapshotd.universal.rules import Rules
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State
from snapshotd.universal.views import Cut, Joined, Reshaped, View

__all__ = ["is_distributed", "read_distributed"]

METADATA: Final = "metadata.json"
COMMON: Final = "common.pt"
VERSION: Final = 1
FULL: Final = ("fully_reshardable", "fully_sharded_model_space")
FLAT: Final = ("dp_reshardable", "fully_sharded_bucket_space", "dp_zero_gather_scatter")

_STATE: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([A-Za-z_0-9]+)\.(.+)\Z")
_OPTIMIZER: Final = re.compile(r"(?:chained_(\d+)\.)?optimizer\.")
_OBJECT: Final = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)\Z")
_STACKED: Final = re.compile(r"((?:.*?\.)?layers)\.(?!\d)(.+)\Z")
_EXPERTS: Final = re.compile(r"(.*\.experts)\.experts\.(?:(\d+)\.)?(.+)\Z")
_NORMS: Final = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_KINDS: Final = {"fp32_param": "fp32", "param": "fp32"}
_TAKEN: Final = frozenset({"optimizer", "iteration", "rng_state"})


def is_distributed(folder: Path) -> bool:
    """Whether ``folder`` is a distributed checkpoint of Megatron-core."""
    if not (folder / METADATA).is_file():
        return False
    source = FileSource(folder / METADATA)
    if source.size > 1 << 16:
        return False
    try:
        return "sharded_backend" in decode_json(read_bytes(source, 0, source.size).decode(), source.label)
    except (FormatError, UnicodeDecodeError):
        return False


def read_distributed(folder: Path, rules: Rules | None = None) -> State:
    """Return the state in an iteration's folder. ``rules``: for parameters that Megatron-core does not know."""
    _check_backend(folder)
    common_path = folder / COMMON
    if not common_path.is_file():
        raise FormatError(
            f"{common_path} is missing: it holds the run's arguments. Copy it, or take an older checkpoint"
        )
    common = torchzip.load(FileSource(common_path))
    if not isinstance(common, dict):
        raise FormatError(f"{common_path} holds a {type(common).__name__}, expected a dict")
    facts = Facts(common.get("args"), str(common_path))
    items = dcp.items_of(folder, dcp.load_metadata(folder))
    objects = _objects(items)
    whole = Whole(
        Facts(
            {
                **facts.args,
                "tensor_model_parallel_size": 1,
                "expert_model_parallel_size": 1,
                "expert_tensor_parallel_size": 1,
            },
            facts.label,
        ),
        rules,
    )
    parts = _model(items, facts)
    state = State(format="megatron", tensors=[], step=_iteration(folder, common))
    sharding = _sharding(common, objects)
    _put_states(items, parts, facts, sharding, folder)
    _put_optimizer(common, objects, items, parts, whole, facts, rules_for(facts, rules), sharding, folder)
    for name in sorted(parts, key=list_order):
        whole.add(Place(0, 0, 0), parts[name])
    whole.put(state)
    _put_rest(state, common, objects, facts, sharding)
    put_vocabulary(state, facts)
    return state


def _check_backend(folder: Path) -> None:
    source = FileSource(folder / METADATA)
    said = decode_json(read_bytes(source, 0, source.size).decode(), source.label)
    backend, version = said.get("sharded_backend"), said.get("sharded_backend_version")
    if backend != "torch_dist" or version != VERSION:
        raise FormatError(
            f"{source.label} says {json.dumps(backend)[:40]} version {json.dumps(version)[:20]}; this program reads "
            "torch_dist version 1: load the checkpoint with the release that wrote it, and save it as torch_dist"
        )


def _iteration(folder: Path, common: Mapping[str, Any]) -> int | None:
    value = common.get("iteration")
    match = re.fullmatch(r"iter_(\d+)", folder.name)
    if type(value) is not int:
        return int(match[1]) if match else None
    if match and int(match[1]) != value:
        raise FormatError(f"{folder / COMMON} is of iteration {value}, but lies in {folder.name}: it was moved")
    return value


def _objects(items: Sequence[Item]) -> Objects:
    """Objects are stored as ``key/shard_<offsets>_<sizes>``, one per rank that has another one."""
    found: Objects = {}
    for item in items:
        if item.view is None:
            match = _OBJECT.match(item.key)
            key = match[1] if match else item.key
            at = tuple(int(n) for n in match[2].split(".") if n) if match else ()
            size = tuple(int(n) for n in match[3].split(".") if n) if match else ()
            value = item.value[0] if isinstance(item.value, list) and len(item.value) == 1 else item.value
            found.setdefault(key, {})[at] = (size, value)
    return found


def _model(items: Sequence[Item], facts: Facts) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for item in items:
        if item.view is not None and not _OPTIMIZER.match(item.key):
            for name, view in _expanded(item.key, item.view, facts):
                if name in parts:
                    raise FormatError(f"{name} is there twice: stacked, and as a layer of its own")
                parts[name] = Part(name, view, name)
    return parts


def _expanded(key: str, view: View, facts: Facts) -> Iterator[tuple[str, View]]:
    """The tensors that a stack of layers, of experts, or of both holds, under the model's own names."""
    match = _STACKED.match(key)
    if match is None:
        yield from _experts(_model_name(key, facts), view, facts)
        return
    for i, layer in enumerate(_unstacked(view, key)):
        yield from _experts(_model_name(f"{match[1]}.{i}.{match[2]}", facts), layer, facts)


def _experts(name: str, view: View, facts: Facts) -> Iterator[tuple[str, View]]:
    match = _EXPERTS.match(name)
    if match is None:
        yield name, view
    elif match[2] is not None:
        yield _expert_name(match[1], int(match[2]), match[3], facts), view
    else:
        for e, expert in enumerate(_unstacked(view, name)):
            yield _expert_name(match[1], e, match[3], facts), expert


def _expert_name(prefix: str, expert: int, rest: str, facts: Facts) -> str:
    grouped = facts.flag("moe_grouped_gemm") and facts.text("transformer_impl") == "transformer_engine"
    if grouped and not facts.flag("moe_use_legacy_grouped_gemm"):
        return f"{prefix}.{rest}{expert}"  # TEGroupedMLP: linear_fc1.weight7
    return f"{prefix}.local_experts.{expert}.{rest}"


def _model_name(key: str, facts: Facts) -> str:
    """The local spec has its norms as modules of their own; they are stored where Transformer Engine has them."""
    if facts.text("transformer_impl") == "local":
        for stored, name in _NORMS:
            if stored in key:
                return key.replace(stored, name)
    return key


def _unstacked(view: View, key: str) -> list[View]:
    if not view.shape:
        raise FormatError(f"{key} should be a stack of layers or experts, but has no dimension")
    rest = view.shape[1:]
    zeros = (0,) * len(rest)
    if not isinstance(view, Joined):
        return [Reshaped(Cut(view, (i, *zeros), (1, *rest)), rest) for i in range(view.shape[0])]
    parts: list[list[tuple[Sequence[int], View]]] = [[] for _ in range(view.shape[0])]
    for at, part in view.parts:
        inner = part.shape[1:]
        for i in range(part.shape[0]):
            if not 0 <= at[0] + i < len(parts):
                raise FormatError(f"{key}: a part at {list(at)} of {list(part.shape)} is not inside {list(view.shape)}")
            one = part if part.shape[0] == 1 else Cut(part, (i, *(0 for _ in inner)), (1, *inner))
            parts[at[0] + i].append((at[1:], Reshaped(one, inner)))
    return [Joined(view.dtype, rest, pieces) for pieces in parts]


def _sharding(common: Mapping[str, Any], objects: Objects) -> str | None:
    """How the distributed optimizer was saved; None: there was none."""
    saved = common.get("optimizer")
    for one in _chain(saved):
        if isinstance(one.get("param_state_sharding_type"), str):
            return str(one["param_state_sharding_type"])
    content = common.get("content_metadata")
    value = content.get("distrib_optim_sharding_type") if isinstance(content, dict) else None
    return value if isinstance(value, str) else None


def _chain(saved: Any) -> list[dict[str, Any]]:
    """One optimizer, or several under the keys 0, 1, ..."""
    if isinstance(saved, list):
        return [one for one in saved if isinstance(one, dict)]
    if not isinstance(saved, dict) or not saved:
        return []
    if all(type(key) is int for key in saved):
        return [saved[key] for key in sorted(saved) if isinstance(saved[key], dict)]
    return [saved]


def _put_states(
    items: Sequence[Item], parts: Mapping[str, Part], facts: Facts, sharding: str | None, folder: Path
) -> None:
    shapes = {item.key: item.view.shape for item in items if item.view is not None}
    for item in items:
        match = _STATE.match(item.key) if item.view is not None else None
        if match is None or item.view is None:
            continue
        kind, key = _KINDS.get(match[1], match[1]), match[2]
        view = item.view
        if key in shapes and view.shape != shapes[key]:
            view = _unflattened(view, shapes[key], f"{folder}: {item.key}")
        for name, one in _expanded(key, view, facts):
            part = parts.get(name)
            if part is None:
                raise FormatError(f"{folder}: {item.key} is the state of {name}, which is not in the model")
            if kind == "fp32" and part.view.dtype == "float32":
                continue  # the weights themselves
            part.states[kind] = one


def _unflattened(view: View, shape: Sequence[int], label: str) -> View:
    """
    fully_sharded_model_space: [X/x, Y/y, x*y], the pieces of a grid, each flattened so that ranks could share it.
    """
    grid = view.shape[:-1]
    fits = len(grid) == len(shape) and all(g > 0 and n % g == 0 for g, n in zip(grid, shape, strict=True))
    piece = tuple(n // g for g, n in zip(grid, shape, strict=True)) if fits else ()
    size = 1
    for n in piece:
        size *= n
    if not fits or size != view.shape[-1]:
        raise FormatError(
            f"{label} has shape {list(view.shape)}, its parameter {list(shape)}: neither equal nor pieces of it; the "
            "sharding of the optimizer is of an unknown version: save with --dist-ckpt-optim-fully-reshardable"
        )
    by_cell: dict[tuple[int, ...], list[tuple[Sequence[int], View]]] = {}
    for at, part in view.parts if isinstance(view, Joined) else [((0,) * len(view.shape), view)]:
        ones = part.shape[:-1]
        for cell in _cells(ones):
            one = part if all(n == 1 for n in ones) else Cut(part, (*cell, 0), (*(1 for _ in ones), part.shape[-1]))
            place = tuple(a + c for a, c in zip(at, cell, strict=False))
            by_cell.setdefault(place, []).append(((at[-1],), Reshaped(one, (part.shape[-1],))))
    pieces: list[tuple[Sequence[int], View]] = []
    for cell, flats in by_cell.items():
        begin = tuple(c * n for c, n in zip(cell, piece, strict=True))
        pieces.append((begin, Reshaped(Joined(view.dtype, (size,), flats), piece)))
    return Joined(view.dtype, shape, pieces)


def _cells(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _cells(shape[1:]):
            yield (first, *rest)


def _put_optimizer(
    common: Mapping[str, Any],
    objects: Objects,
    items: Sequence[Item],
    parts: dict[str, Part],
    whole: Whole,
    facts: Facts,
    rules: Rules,
    sharding: str | None,
    folder: Path,
) -> None:
    if sharding is not None and sharding not in (*FULL, *FLAT):
        raise FormatError(
            f"{folder}: the optimizer's sharding type {sharding!r:.60} is not read here; load the checkpoint with the "
            "release that wrote it, and save with --dist-ckpt-optim-fully-reshardable"
        )
    flat = sharding in FLAT or any(_flat_key(item.key) for item in items)
    if flat:
        whole.warnings += put_dp_reshardable(objects, items, parts, whole.groups, facts, rules, folder)
        return
    chain = _chain(common.get("optimizer"))
    if sharding is not None and not any("optimizer" in one for one in chain):
        chain = _chain_of_objects(objects) or chain
    ordered = [parts[name] for name in sorted(parts, key=list_order) if not is_buffer(name, parts[name].view)]
    for i, one in enumerate(chain):
        if "optimizer" not in one and "param_groups" not in one:
            continue
        groups = groups_of(one, str(folder / COMMON))
        mine = ordered
        if len(chain) > 1:
            last = i == len(chain) - 1
            mine = [part for part in ordered if (facts.ep > 1 and is_expert(part.name)) == last]
        found = by_rule([Member(part.name, part.view.shape) for part in mine], groups, facts)
        if found is None:
            raise FormatError(
                f"{folder / COMMON}: {len(groups)} parameter groups that are not told apart by weight decay, experts "
                "or learning rate: nothing says which parameter is in which"
            )
        whole.groups.add(groups, [[member.name for member in names] for names in found], str(folder / COMMON))
        inner = one.get("optimizer", one)
        shared = inner.get("state", {}).get("common_step") if isinstance(inner.get("state"), dict) else None
        for group, names in zip(groups, found, strict=True):
            step = step_view(shared if shared is not None else group.get("step"))
            for member in names:
                if step is not None and parts[member.name].states:
                    parts[member.name].states["step"] = step


def _flat_key(key: str) -> bool:
    return "optimizer.distributed.dp_group_idx_" in key and ".gbuf_idx_" in key


def _chain_of_objects(objects: Objects) -> list[dict[str, Any]]:
    """fully_sharded_model_space keeps each model-parallel rank's groups as an object; all ranks have the same."""
    found: dict[int, dict[str, Any]] = {}
    for key, shards in objects.items():
        match = re.fullmatch(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.optimizer", key)
        if match:
            value = next(iter(shards.values()))[1]
            if isinstance(value, dict):
                found.setdefault(int(match[1] or 0), {"optimizer": value})
    return [found[i] for i in sorted(found)]


def _put_rest(state: State, common: Mapping[str, Any], objects: Objects, facts: Facts, sharding: str | None) -> None:
    state.source.update(
        storage="torch_dist",
        layout={"tp": facts.tp, "pp": facts.pp, "vpp": facts.vp, "ep": facts.ep, "dp": facts.data_parallel_size},
    )
    if sharding is not None:
        state.source["distrib_optim_sharding_type"] = sharding
    for at, (_, saved) in sorted(objects.get("rng_state", {}).items()):
        pp, tp, dp = (*at, 0, 0, 0)[:3]
        for i, item in enumerate(saved if isinstance(saved, list) else [saved]):
            put_rng(state, facts.rank_at(pp, tp, dp + i), item)
    for key, value in common.items():
        if key not in _TAKEN:
            state.extra[str(key)] = to_json(value, str(key), state.tensors)
    for one in _chain(common.get("optimizer")):
        if one.get("grad_scaler") is not None and "grad_scaler" not in state.extra:
            state.extra["grad_scaler"] = to_json(one["grad_scaler"], "grad_scaler", state.tensors)
    for key, shards in objects.items():
        if key == "rng_state":
            continue
        if (match := _OPTIMIZER.match(key)) is not None:
            if key.endswith(".grad_scaler") and "grad_scaler" not in state.extra:
                state.extra["grad_scaler"] = to_json(next(iter(shards.values()))[1], "grad_scaler", state.tensors)
            continue
        kept = {".".join(map(str, at)): value for at, (_, value) in shards.items() if value is not None}
        if kept:
            name = "extra_state" if key.endswith("._extra_state") else "objects"
            state.extra.setdefault(name, {})[key] = to_json(kept, f"{name}.{key}", state.tensors)
    del match
