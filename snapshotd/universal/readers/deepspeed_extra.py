"""
What a DeepSpeed checkpoint holds beside tensors: groups, counters, schedulers, scalers, random states, client state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Cast
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.deepspeed_files import Saved
from snapshotd.universal.readers.deepspeed_weights import Weights
from snapshotd.universal.readers.deepspeed_zero import MASTER, Optim
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View, read_all, slabs
from snapshotd.universal.words import to_float, word_dtype

__all__ = ["add_extra", "check_model_step", "check_steps", "plain_groups"]

_ENGINE: Final = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "lr_scheduler", "skipped_steps", "global_steps", "global_samples", "dp_world_size"),
        *("mp_world_size", "checkpoint_parallel_dimensions", "ds_version"),
    }
)
"""Keys of the engine that are read elsewhere."""

_KEPT: Final = (
    *("ds_config", "data_sampler", "random_ltd", "sparse_tensor_module_names", "csr_tensor_module_names"),
    *("num_experts", "ds_autoep_layers", "autoep_layers", "folding", "universal_checkpoint_info"),
)
"""Keys of the engine that go into ``extra["deepspeed"]``."""

_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096

_CPU_RNG_BYTES: Final = 5056
"""The state of torch's CPU generator."""


def add_extra(
    state: State,
    models: Sequence[Sequence[Saved]],
    optims: Sequence[Optim],
    weights: Sequence[Weights],
    *,
    tp: int,
    dp: int,
) -> None:
    """Put counters, scheduler, scaler, client state and what else there is into ``state.extra``."""
    first = models[0][0]
    extra, tensors = state.extra, state.tensors
    for key in ("global_steps", "global_samples", "skipped_steps"):
        if first.get(key) is not None:
            extra[key] = to_json(first.get(key), key, tensors)
    extra["lr_scheduler"] = to_json(first.get("lr_scheduler"), "lr_scheduler", tensors)
    rest = optims[0].rest if optims else {}
    if "loss_scaler" in rest:
        extra["loss_scaler"] = to_json(rest["loss_scaler"], "loss_scaler", tensors)
    engine: dict[str, Any] = {key: first.get(key) for key in _KEPT if first.get(key) is not None}
    for key, value in rest.items():
        if key not in ("loss_scaler", "ds_version"):
            engine.setdefault(key, value)
    odd: dict[str, Any] = {}
    for optim in optims:
        for name, values in optim.odd.items():
            odd.setdefault(name, {}).update(values)
    if odd:
        engine["optimizer_states"] = odd
    module = {name: value for found in weights[:1] for name, value in found.rest.items()}
    if module:
        engine["module"] = module
    extra["deepspeed"] = to_json(engine, "deepspeed", tensors)
    _add_client_state(state, models, tp=tp, dp=dp)


def plain_groups(where: Path, optims: Sequence[Optim], state: State) -> list[dict[str, Any]]:
    """
    Return the parameter groups as JSON. The stages of a pipeline have the groups each for their own parameters: those
    with equal hyperparameters are put together, the first of a stage with the first, the second with the second.
    """
    merged: list[dict[str, Any]] = []
    for mp, optim in enumerate(optims):
        taken: set[int] = set()
        for g, group in enumerate(optim.groups):
            values = {
                key: to_json(value, f"param_groups.{g}.{key}", state.tensors if not mp else [])
                for key, value in group.values.items()
                if key != "names"
            }
            same = [i for i, other in enumerate(merged) if {k: v for k, v in other.items() if k != "names"} == values]
            free = [i for i in same if i not in taken]
            if not mp or not free:
                taken.add(len(merged))
                merged.append({"names": list(group.names), **values})
                continue
            taken.add(free[0])
            target = merged[free[0]]
            have = set(target["names"])
            target["names"] += [name for name in group.names if name not in have]
    if merged and all(set(values) <= {"names", "step"} for values in merged):
        state.warnings.append(
            f"{where}: an elastic checkpoint has no hyperparameters (lr, weight decay, ...): the groups have names only"
        )
    seen: set[str] = set()
    for done in merged:
        twice = [name for name in done["names"] if name in seen]
        if twice:
            raise FormatError(f"{where}: {twice[0]} is in two parameter groups: the files are of different runs")
        seen.update(done["names"])
    return merged


def check_steps(optims: Sequence[Optim], rows: Sequence[Sequence[Saved]]) -> None:
    """Raise FormatError when the model-parallel ranks are of different steps."""
    first: tuple[bytes, str, str] | None = None
    for optim, files in zip(optims, rows, strict=True):
        views = {id(view): view for (kind, _), view in optim.tensors.items() if kind == "step" and view.shape == ()}
        newest = max((_number(view) for view in views.values()), default=None)
        if newest is None:
            continue
        data = repr(newest).encode()
        if first is None:
            first = data, f"{newest:g}", files[0].name
        elif first[0] != data:
            raise FormatError(
                f"{files[0].path} is of step {newest:g}, but {first[2]} is of step {first[1]}: the files are of "
                "different saves. Take all files of one step, or an older checkpoint that is whole"
            )


def check_model_step(where: Path, first: Saved, state: State, states: Mapping[tuple[str, str], View]) -> None:
    """
    Raise FormatError when the weights are of another step than the optimizer. The counters alone do not prove it: who
    starts with a fresh optimizer has them apart for ever. So weights are compared with what the masters round to.
    """
    steps = {id(view): view for (kind, _), view in states.items() if kind == "step" and view.shape == ()}
    newest = max((_number(view) for view in steps.values()), default=None)
    counted = (first.count("global_steps") or 0) - (first.count("skipped_steps") or 0)
    if newest is None or not counted or newest == counted:
        return
    checked = 0
    for tensor in state.tensors:
        master = states.get((MASTER, tensor.name))
        is_stored = tensor.view is not master and not isinstance(tensor.view, Cast)
        if tensor.kind != "model" or master is None or not tensor.view.numel or not is_stored:
            continue
        box = next(slabs(tensor.shape, tensor.view.itemsize, _SAMPLE_BYTES))
        mine, other = (_read_box(view, *box) for view in (tensor.view, Cast(master, tensor.dtype)))
        if mine != other:
            raise FormatError(
                f"{first.path} is of global step {first.count('global_steps')}, the optimizer's files beside it are of "
                f"step {newest:g}, and {tensor.name} is not what its master rounds to: the files are of different "
                f"saves. Take all files of one step, or an older checkpoint that is whole ({where})"
            )
        checked += 1
        if checked >= _SAMPLES:
            return
    if not checked:
        state.warnings.append(
            f"{first.name} counts {counted} steps, less those skipped, the optimizer {newest:g}: are they of one save?"
        )


def _read_box(view: View, at: tuple[int, ...], lengths: tuple[int, ...]) -> bytes:
    out = np.empty(lengths, dtype=word_dtype(view.dtype))
    view.read_into(at, out)
    return out.tobytes()


def _add_client_state(state: State, models: Sequence[Sequence[Saved]], *, tp: int, dp: int) -> None:
    """The caller's own values; of other ranks only where they differ. Generators' states become tensors of kind rng."""
    of_first: tuple[Any, list[Tensor]] | None = None
    others: dict[str, Any] = {}
    keys: dict[str, list[str]] = {}
    for mp, row in enumerate(models):
        for r, saved in enumerate(row):
            rank = (mp // tp) * dp * tp + r * tp + mp % tp
            client = {key: value for key, value in saved.values.items() if key not in _ENGINE and key not in _KEPT}
            for key in list(client):
                found = _generators(key, client[key], rank)
                if found:
                    del client[key]
                    state.tensors += [Tensor("rng", name, view) for name, view in found]
                    keys.setdefault(key, []).extend(name for name, _ in found)
            tensors: list[Tensor] = []
            name = "client_state" if of_first is None else f"client_state_of_ranks.{rank}"
            plain = to_json(client, name, tensors)
            if of_first is None:
                of_first = plain, tensors
                state.tensors += tensors
            elif not _same(of_first, (plain, tensors), name):
                others[str(rank)] = plain
                state.tensors += tensors
    state.extra["client_state"] = of_first[0] if of_first else {}
    if others:
        state.extra["client_state_of_ranks"] = others
    if keys:
        state.extra["rng_keys"] = keys


def _generators(key: str, value: Any, rank: int) -> list[tuple[str, View]]:
    """The states of random generators in one value of the client state, under the names that State wants."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not listed or not all(isinstance(item, TensorRef) and item.dtype == "uint8" for item in listed):
        return []
    text = key.lower()
    if any(len(item.shape) != 1 for item in listed) or not re.search("rng|random|generator", text):
        return []
    device = re.search("cuda|xpu|npu|hpu|mps", text)
    if device is None and len(listed) == 1 and listed[0].numel == _CPU_RNG_BYTES:
        return [(str(rank), listed[0].view)]
    if device is not None:
        return [(f"{rank}/{device.group()}:{i}", item.view) for i, item in enumerate(listed)]
    return []


def _same(one: tuple[Any, list[Tensor]], other: tuple[Any, list[Tensor]], name: str) -> bool:
    text = repr(other[0]).replace(f"{name}.", "client_state.")
    if repr(one[0]) != text or len(one[1]) != len(other[1]):
        return False
    for left, right in zip(one[1], other[1], strict=True):
        if (left.dtype, left.shape) != (right.dtype, right.shape) or left.nbytes > 1 << 20:
            return False
        if read_all(left.view).tobytes() != read_all(right.view).tobytes():
            return False
    return True


def _number(view: View) -> float:
    value: Mapping[int, float] = dict(enumerate(to_float(read_all(view).reshape(1), view.dtype).tolist()))
    return float(value[0])
