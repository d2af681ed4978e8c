"""
Read a folder of DeepSpeed Universal: a folder ``zero/`` with one folder per trained parameter, beside the model files.

Rule 1: every ``*.pt`` in a parameter's folder is a state of it, ``fp32`` its master. Stage 1 and 2 write dicts with the
tensor in its shape, stage 3 flat vectors, whose shape is in ``param_shapes`` of the model files.
Rule 2: ``zero/optimizer_state.pt`` is rank 0's: its param_groups and steps count, the shards in it mean nothing.
Rule 3: 16-bit weights are in the model files of stage 1 and 2; where these have none, or shards of tensor-parallel
ranks, they are the masters, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Cast
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.deepspeed import Topology, assemble, fill_stage3
from snapshotd.universal.readers.deepspeed_files import Folder, Saved, listed, load
from snapshotd.universal.readers.deepspeed_groups import dict_of, param_shapes, stage_of
from snapshotd.universal.readers.deepspeed_tp import Shards
from snapshotd.universal.readers.deepspeed_weights import Weights, module_weights
from snapshotd.universal.readers.deepspeed_zero import MASTER, Group, Optim, number_view
from snapshotd.universal.sources import FileSource
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import load as load_any
from snapshotd.universal.views import Reshaped, View, flat_part

__all__ = ["NOTE_KEY", "read_folder"]

NOTE_KEY: Final = "snapshotd"
"""The key under which our own writer notes what DeepSpeed has no place for."""


def read_folder(folder: Folder) -> State:
    """Return the state in ``folder``, which has ``zero/``."""
    topology = Topology(folder)
    warnings: list[str] = []
    path = folder.path / "zero" / "optimizer_state.pt"
    if not path.is_file():
        raise FormatError(
            f"{path} is missing; expected with the parameter groups and the loss scaler. The conversion to Universal "
            "was cut short: run it again"
        )
    common = load(path)
    optim = _Reader(topology, common).optim()
    stage = stage_of(Saved(path, {"optimizer_state_dict": common.values}))
    weights = _weights(topology, optim, warnings)
    state = assemble(topology, [optim], weights, stage, warnings, format_name="deepspeed")
    state.source["universal"] = True
    note = topology.first.get(NOTE_KEY)
    if isinstance(note, dict) and note.get("version") == 1:
        _restore(state, note, topology.first)
    return state


def _restore(state: State, note: dict[str, Any], saved: Saved) -> None:
    """Put back what our writer noted, since DeepSpeed has no place for it."""
    tensors = {key: dict_of(note.get(key), f"{NOTE_KEY}.{key}", saved) for key in ("tensors", "rng", "states")}
    if any(not isinstance(value, TensorRef) for found in tensors.values() for value in found.values()):
        raise FormatError(f"{saved.path}: {NOTE_KEY} has something else than tensors")
    derived = set(note.get("derived") or ())
    kept = [t for t in state.tensors if t.kind not in ("rng", "extra") and not (t.kind == "fp32" and t.name in derived)]
    kept += [Tensor("rng", name, value.view) for name, value in tensors["rng"].items()]
    kept += [Tensor("extra", name, value.view) for name, value in tensors["tensors"].items()]
    for key, value in tensors["states"].items():
        kind, _, name = key.partition("/")
        kept.append(Tensor(kind, name, value.view))
    state.tensors = kept
    state.step = note["step"] if type(note.get("step")) is int else None
    state.extra = dict_of(note.get("extra"), f"{NOTE_KEY}.extra", saved)
    groups, frozen = note.get("param_groups"), note.get("frozen")
    if isinstance(groups, list) and isinstance(frozen, list):
        state.param_groups, state.frozen = groups, [str(name) for name in frozen]
    state.warnings.clear()


class _Reader:
    """Puts the folders of the parameters together."""

    def __init__(self, topology: Topology, common: Saved) -> None:
        self.topology, self.common = topology, common
        self.zero = common.path.parent
        self.tp = topology.tp
        inner = common.get("optimizer_state_dict")
        self.inner: dict[str, Any] = inner if isinstance(inner, dict) else {}

    def optim(self) -> Optim:
        result = Optim()
        groups = self.common.get("param_groups") or self.inner.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise FormatError(
                f"{self.common.path} has no param_groups: its conversion to Universal was cut short, or it is of "
                "another program: run ds_to_universal again"
            )
        shapes, units = self._shapes()
        self._check_folders(shapes)
        for name, shape in shapes.items():
            self._read_parameter(result, name, shape)
        members = self._members(groups, units)
        if not isinstance(self.topology.first.get(NOTE_KEY), dict):  # our own writer has no file for what was not there
            self._check_states(result, members)
        for names, group in zip(members, groups, strict=True):
            values = {key: value for key, value in group.items() if key != "params"}
            result.groups.append(Group(names, values))
        if self.topology.stage3:
            self._put_numbers(result, units)
        dropped = {
            *("param_groups", "optimizer_state_dict", "fp32_flat_groups", "group_paddings", "param_alignment_paddings"),
            *("partition_count", "zero_stage", "ds_zero_partition_groups", "param_slice_mappings"),
        }
        result.rest = {key: value for key, value in self.common.values.items() if key not in dropped}
        return result

    def _shapes(self) -> tuple[dict[str, tuple[int, ...] | None], list[list[str]]]:
        """Shapes of all parameters (None: whole, but the model files have shards), and the names of each unit."""
        shapes: dict[str, tuple[int, ...] | None] = {}
        units: list[list[str]] = []
        for mp in range(0, len(self.topology.models), self.tp):
            for u, group in enumerate(param_shapes(self.topology.models[mp][0])):
                if u == len(units):
                    units.append([])
                for name, shape in group.items():
                    if name not in shapes:
                        units[u].append(name)
                    shapes[name] = shape if self.tp == 1 else None
        return shapes, units

    def _members(self, groups: list[dict[str, Any]], units: list[list[str]]) -> list[list[str]]:
        subs = [list(group.get("params", ())) for group in groups]
        if not self.topology.stage3:
            subs = [[g] for g in range(len(groups))]
        if sorted(u for listed_units in subs for u in listed_units) != list(range(len(units))):
            raise FormatError(
                f"{self.common.path} has {len(groups)} param_groups, but param_shapes of {self.topology.first.name} "
                f"has {len(units)}: the files are of different runs; convert the checkpoint again"
            )
        return [[name for u in listed_units for name in units[u]] for listed_units in subs]

    def _check_folders(self, shapes: Mapping[str, Any]) -> None:
        missing = [name for name in shapes if not (self.zero / name).is_dir()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise FormatError(
                f"{self.zero}: the folders of {', '.join(missing[:5])}{more} are missing, expected one for each of the "
                f"{len(shapes)} trained parameters: its conversion to Universal was cut short; run it again"
            )
        known = set(shapes)  # folders with fp32.pt alone: frozen, and buffers
        for row in self.topology.models:
            for key in ("frozen_param_shapes", "module", "shared_params"):
                known.update(row[0].typed(key, dict, {}))
            known.update(row[0].typed("buffer_names", (list, tuple), ()))
        others = [path.name for path in listed(self.zero) if path.is_dir() and path.name not in known]
        if others and self.topology.first.get("module") is not None:
            raise FormatError(
                f"{self.zero} has folders of parameters that {self.topology.first.name} does not list: "
                f"{', '.join(others[:5])}: left over from another checkpoint; convert it into an empty folder"
            )

    def _read_parameter(self, result: Optim, name: str, shape: tuple[int, ...] | None) -> None:
        files = [path for path in listed(self.zero / name) if path.suffix == ".pt"]
        if not any(path.name == "fp32.pt" for path in files):
            raise FormatError(
                f"{self.zero / name} has no fp32.pt: its conversion to Universal was cut short; run it again"
            )
        for path in files:
            kind = path.stem if path.stem != "fp32" else MASTER
            value = load_any(FileSource(path))
            if isinstance(value, dict):
                tensor = value.get("param")
                is_expert = bool(value.get("is_expert_param"))
                if not isinstance(tensor, TensorRef):
                    raise FormatError(f"{path}: a dict without the tensor 'param'")
                if shape is not None and tensor.shape != shape and not is_expert:
                    # Stage 2 under a vocabulary that was padded: the file has the true one.
                    self._check_rows(path, tensor, shape, bool(value.get("vocab_tensor")))
                result.tensors[kind, name] = tensor.view
                continue
            if isinstance(value, TensorRef) and kind != "step" and (value.shape or shape == ()):
                result.tensors[kind, name] = _shaped(path, value, shape, name)
                continue
            number = number_view(value)
            if number is None:
                raise FormatError(f"{path} holds a {type(value).__name__}, expected a tensor or a number")
            result.tensors[kind, name] = number
        result.shapes[name] = result.tensors[MASTER, name].shape

    def _check_states(self, result: Optim, members: list[list[str]]) -> None:
        """All parameters of a group have the same states: ZeRO keeps them in one flat tensor."""
        found: dict[str, set[str]] = {}
        for kind, name in result.tensors:
            found.setdefault(name, set()).add(kind)
        for names in members:
            for name in names:
                missing = set.union(*(found[other] for other in names)) - found[name]
                if missing:
                    raise FormatError(
                        f"{self.zero / name / min(missing)}.pt is missing, though other parameters of its group have "
                        "one: its conversion to Universal was cut short; run it again"
                    )

    def _check_rows(self, path: Path, tensor: TensorRef, shape: tuple[int, ...], is_vocabulary: bool) -> None:
        if not is_vocabulary or tensor.shape[1:] != shape[1:]:
            raise FormatError(
                f"{path} has the shape {list(tensor.shape)}, but {self.topology.first.name} says {list(shape)}: they "
                "are of different runs; convert the checkpoint again"
            )

    def _put_numbers(self, result: Optim, units: list[list[str]]) -> None:
        """Stage 3: steps are in rank 0's optimizer, by sub-group."""
        states = self.inner.get("state")
        for u, names in enumerate(units):
            state = states.get(u) if isinstance(states, dict) else None
            for kind, value in (state or {}).items():
                number = number_view(value) if kind == "step" or not isinstance(value, TensorRef) else None
                if number is not None:
                    for name in names:
                        result.tensors.setdefault((kind, name), number)


def _shaped(path: Path, value: TensorRef, shape: tuple[int, ...] | None, name: str) -> View:
    if shape is None or value.shape == shape:
        return value.view
    if value.numel != prod(shape):
        raise FormatError(
            f"{path} has {value.numel} elements, but param_shapes says {list(shape)} for {name}: they are of different "
            "runs; convert the checkpoint again"
        )
    return flat_part(value.view, 0, shape) if len(value.shape) == 1 else Reshaped(value.view, shape)


def _weights(topology: Topology, optim: Optim, warnings: list[str]) -> list[Weights]:
    found = [module_weights(row[0], optim.shapes, is_stage3=topology.stage3) for row in topology.models]
    first = found[0]
    if len(found) == 1:
        if topology.stage3:
            fill_stage3(first, topology.models[0], optim, warnings)
        return [first]
    whole = Weights(tied=first.tied, buffers=first.buffers, rest=first.rest)
    others = [name for name in first.order if name not in optim.shapes and name not in first.buffers]
    info = topology.first.get("universal_checkpoint_info")
    shards = Shards(info if isinstance(info, dict) else {}, topology.tp, str(topology.first.path))
    dtype = _dtype(topology.first)
    for name in dict.fromkeys((*first.order, *optim.shapes)):
        if name in optim.shapes:
            master = optim.tensors[MASTER, name]
            stored = first.model[name].dtype if name in first.model else first.empty.get(name, dtype)
            whole.model[name] = master if stored == master.dtype else Cast(master, stored)
        elif name in others:
            parts = [one.model[name] for one in found[: topology.tp] if name in one.model]
            if len(parts) != topology.tp:
                warnings.append(f"{name} is named by the checkpoint without being in it")
                continue
            whole.model[name] = parts[0] if topology.tp == 1 else shards.merge(MASTER, name, parts)
        whole.order.append(name)
    if topology.first.get("module") is None:
        lost = sorted({name for row in topology.models for name in row[0].typed("buffer_names", (list, tuple), ())})
        if lost:
            warnings.append(f"DeepSpeed Universal keeps no buffers of a pipeline: {', '.join(lost[:5])} are not in it")
    return [whole]


def _dtype(saved: Saved) -> str:
    """The dtype of the weights, as the configuration has it."""
    config = saved.get("ds_config")
    if isinstance(config, dict):
        for key, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
            section = config.get(key)
            if isinstance(section, dict) and section.get("enabled"):
                return dtype
    return "float32"
