"""
Weights and buffers of one model-parallel rank: from ``module``, from a pipeline's layer files, from experts' files.

Rule 1: dtypes are kept as they are stored; buffers are those that ``buffer_names`` lists.
Rule 2: stage 3 stores no 16-bit weights: they are the masters, rounded to the dtype of the empty placeholder.
Rule 3: a tied weight is there under the one name that the optimizer knows; ties are taken from ``shared_params`` and
from shared storages, never from equal values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Merged
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.deepspeed_experts import EXPERT
from snapshotd.universal.readers.deepspeed_files import Folder, Saved, load
from snapshotd.universal.views import Reshaped, View, concat, flat_part

__all__ = ["Weights", "expert_files_missing", "expert_weights", "frozen_parts", "module_weights", "pipeline_weights"]

_TIED: Final = re.compile(r"tied_modules\.([^.]+)\.(.+)\Z")


@dataclass(slots=True)
class Weights:
    """``empty``: dtypes of stage 3's placeholders. ``rest``: what is no tensor in the state dict (extra states)."""

    model: dict[str, View] = field(default_factory=dict)
    buffers: dict[str, View] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)


def module_weights(saved: Saved, trained: Mapping[str, Any], *, is_stage3: bool = False) -> Weights:
    """
    Return what ``module`` of a model file holds. ``trained``: the names that the optimizer has. ``is_stage3``: what
    has no elements is a placeholder; in other stages it is a parameter without elements.
    """
    module = saved.typed("module", dict, {})
    shared = _shared(saved)
    buffers = set(saved.typed("buffer_names", (list, tuple), ()))
    known = saved.get("buffer_names") is not None
    found = Weights()
    by_identity: dict[tuple[object, ...], str] = {}
    for name, value in module.items():
        if isinstance(value, TensorRef) and name in trained and value.numel:
            by_identity.setdefault(value.identity, name)
    for name, value in module.items():
        if not isinstance(value, TensorRef):
            found.rest[name] = value
            continue
        if name in buffers or (not known and "float" not in value.dtype and name not in trained):
            found.buffers[name] = value.view
            found.order.append(name)
            continue
        target = shared.get(name)
        if target is None and name not in trained and value.numel:
            target = by_identity.setdefault(value.identity, name)
        if target is not None and target != name and target in module:
            found.tied[name] = target
            continue
        found.order.append(name)
        shape = trained.get(name)
        if (is_stage3 and not value.numel) or (shape is not None and prod(shape) != value.numel):
            found.empty[name] = value.dtype
        else:
            found.model[name] = value.view
    for alias, name in shared.items():
        if alias not in module and (name in found.model or name in trained):
            found.tied[alias] = name
    return found


def frozen_parts(models: Sequence[Saved]) -> dict[str, View]:
    """Return the frozen parameters of stage 3: each rank has ``ceil(numel / ranks)`` elements of them in a fragment."""
    shapes = models[0].typed("frozen_param_shapes", dict, {})
    found: dict[str, View] = {}
    for name, given in shapes.items():
        shape = tuple(given)
        numel = prod(shape)
        k = -(-numel // len(models))
        parts: list[View] = []
        for r, saved in enumerate(models):
            fragment = saved.typed("frozen_param_fragments", dict, {}).get(name)
            if not isinstance(fragment, TensorRef):
                raise FormatError(
                    f"{saved.path} has no fragment of the frozen parameter {name}, expected {k} elements; take an "
                    "older checkpoint"
                )
            if fragment.shape == shape and (len(models) > 1 or len(shape) != 1):
                parts = [fragment.view]  # not partitioned
                break
            if fragment.numel < k:
                raise FormatError(
                    f"{saved.path} has {fragment.numel} elements of the frozen parameter {name}, expected {k} for "
                    f"{len(models)} ranks: it is damaged or of another world size; take all files of one run"
                )
            if r * k < numel:
                flat = fragment.view if len(fragment.shape) == 1 else Reshaped(fragment.view, (fragment.numel,))
                parts.append(flat_part(flat, 0, shape if k >= numel else (min(k, numel - r * k),)))
        whole = concat(parts) if parts else Reshaped(fragment.view, (0,))
        found[name] = whole if whole.shape == shape else Reshaped(whole, shape)
    return found


def pipeline_weights(
    folder: Folder, tp: int, models: Sequence[Saved], trained: Mapping[str, tuple[int, ...]]
) -> Weights:
    """
    Return the weights in the layer files of tensor rank ``tp``, under the optimizer's names: ``3.attn.qkv.weight``, and
    ``tied_modules.embed.weight`` for the tied ones.
    """
    buffers = {name for saved in models for name in saved.typed("buffer_names", (list, tuple), ())}
    shared: dict[str, str] = {}
    for saved in models:
        shared.update(_shared(saved))
    found = Weights(tied={})
    copies: dict[str, list[View]] = {}
    tied_keys = list(dict.fromkeys(match[1] for name in (*trained, *buffers) if (match := _TIED.match(name))))
    used: set[str] = set()
    for layer in sorted(index for index, rank in folder.layers if rank == tp):
        saved = load(folder.layers[layer, tp])
        tensors = {name: value for name, value in saved.values.items() if isinstance(value, TensorRef)}
        found.rest.update((f"{layer}.{name}", value) for name, value in saved.values.items() if name not in tensors)
        plain = [name for name in tensors if f"{layer}.{name}" in trained or f"{layer}.{name}" in buffers]
        prefix = f"{layer}."
        if tensors and not plain:
            key = _tied_key(tensors, tied_keys, used, trained, buffers)
            if key is not None:
                used.add(key)
                prefix = f"tied_modules.{key}."
        for name, value in tensors.items():
            full = prefix + name
            if full in shared and shared[full] != full:
                found.tied[full] = shared[full]
                continue
            if full in buffers:
                found.buffers.setdefault(full, value.view)
            else:
                copies.setdefault(full, []).append(value.view)
            if full not in found.order:
                found.order.append(full)
    lost = sorted(name for name in buffers if name not in found.buffers and name not in shared)
    if lost:
        raise FormatError(
            f"{folder.path}: the buffers {', '.join(lost[:5])} are in no layer_*_model_states.pt, but {models[0].name} "
            "and the files of the other stages name them: copy the layer files that are missing from the nodes that "
            "wrote them, or take an older checkpoint"
        )
    for name, views in copies.items():
        found.model[name] = views[0] if len(views) == 1 else Merged(views, "equal", name)
    return found


def expert_weights(folder: Folder, mp: int, prefixes: Collection[str] = ()) -> dict[str, View]:
    """
    Return the weights in the experts' files. ``prefixes``: ``<module>.experts`` of AutoEP, whose experts become the
    first dimension of one tensor.
    """
    found: dict[str, View] = {}
    fused: dict[str, dict[int, View]] = {}
    for (_, expert, rank), path in sorted(folder.experts.items()):
        if rank != mp:
            continue
        for name, value in load(path).values.items():
            if not isinstance(value, TensorRef):
                continue
            base, _, number = name.rpartition(".")
            if base.rpartition(".")[0] in prefixes and number == str(expert):
                fused.setdefault(base, {})[expert] = value.view
            else:
                found[name] = value.view
    for name, experts in fused.items():
        if sorted(experts) != list(range(len(experts))):
            raise FormatError(
                f"{folder.path}: {name} has files of the experts {sorted(experts)!s:.200}, expected all from 0 on: "
                "copy what is missing, or take an older checkpoint"
            )
        found[name] = concat([Reshaped(view, (1, *view.shape)) for _, view in sorted(experts.items())])
    return found


def expert_files_missing(folder: Folder, names: Sequence[str]) -> str:
    """A hint about the files in which weights that are missing should be."""
    experts = sorted({int(match[2]) for name in names if (match := EXPERT.match(name))})
    if not experts:
        return ""
    return f" (files layer_*_expert_{experts[0]}_mp_rank_*_model_states.pt)"


def _tied_key(
    tensors: Mapping[str, TensorRef],
    keys: Sequence[str],
    used: Collection[str],
    trained: Mapping[str, tuple[int, ...]],
    buffers: Collection[str],
) -> str | None:
    """The key of the tied module that a layer file is of: all its tensors are known under it, or all that is known."""
    if trained:
        fitting = [
            key
            for key in keys
            if all(
                f"tied_modules.{key}.{name}" in buffers
                or trained.get(f"tied_modules.{key}.{name}") in (value.shape, (value.numel,))
                for name, value in tensors.items()
            )
        ]
    else:
        known = {key: [name for name in buffers if name.startswith(f"tied_modules.{key}.")] for key in keys}
        fitting = [key for key in keys if all(name.split(".", 2)[2] in tensors for name in known[key])]
    fresh = [key for key in fitting if key not in used]
    return next(iter(fresh or fitting), None)


def _shared(saved: Saved) -> dict[str, str]:
    shared = saved.typed("shared_params", dict, {})
    return {str(alias): str(name) for alias, name in shared.items()}
