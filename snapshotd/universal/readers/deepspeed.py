"""
Read a checkpoint of DeepSpeed: ZeRO 0 to 3 in any precision, pipelines, tensor parallelism, experts, and Universal.

The files of each model-parallel rank are put together first (data-parallel partitions, see deepspeed_zero.py), then the
tensor-parallel shards of each pipeline stage (deepspeed_tp.py), then the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.derived import Cast, Merged
from snapshotd.universal.readers.deepspeed_extra import add_extra, check_model_step, check_steps, plain_groups
from snapshotd.universal.readers.deepspeed_files import (
    Folder,
    Saved,
    find_tag,
    is_tag_folder,
    listed,
    load,
    require_ranks,
    same_everywhere,
)
from snapshotd.universal.readers.deepspeed_groups import mapped_shapes, stage_of
from snapshotd.universal.readers.deepspeed_plain import read_plain
from snapshotd.universal.readers.deepspeed_stages import check_experts, read_experts, read_stages
from snapshotd.universal.readers.deepspeed_tp import Shards
from snapshotd.universal.readers.deepspeed_weights import (
    Weights,
    expert_files_missing,
    expert_weights,
    frozen_parts,
    module_weights,
    pipeline_weights,
)
from snapshotd.universal.readers.deepspeed_zero import MASTER, Optim, read_flat, read_stage3
from snapshotd.universal.rules import Rejoiner, Rules, name_list
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import Reshaped, View

__all__ = ["detect", "read"]


def detect(path: Path) -> bool:
    """Whether ``path`` is a tag's folder with files of ranks, or a folder with such a folder."""
    if path.is_file():
        return path.name in ("latest", "latest_universal") and detect(path.parent)
    if is_tag_folder(path):
        return True
    for name in ("latest", "latest_universal"):
        file = path / name
        if file.is_file() and file.stat().st_size < 4096:
            tag = file.read_bytes().decode("utf-8", "replace").strip()
            if tag.startswith("global_step") or (tag and "\0" not in tag and is_tag_folder(path / tag)):
                return True
    return any(child.is_dir() and is_tag_folder(child) for child in listed(path)[:1000])


def read(path: Path, rules: Rules | None = None) -> State:
    """
    Return the state at ``path``: a tag's folder, or the folder with ``latest``.

    ``rules``: for tensor-parallel ranks where the files have no patterns.
    """
    folder = Folder.scan(find_tag(path))
    if folder.universal:
        from snapshotd.universal.readers import ds_universal

        return ds_universal.read_folder(folder)
    return _Checkpoint(folder, rules).state()


class Topology:
    """How many ranks of each kind there are, as the model files say, and the model files themselves."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        if folder.is_empty:
            raise FormatError(
                f"{folder.path} has no *_model_states.pt, without which the optimizer's files have no names: copy it "
                "from rank 0, or take an older checkpoint"
            )
        ranks = folder.mp_ranks
        first = load(folder.model[ranks[0]] if folder.model else folder.model3[min(folder.model3)])
        self.first = first
        dims = first.typed("checkpoint_parallel_dimensions", dict, {})
        size = first.count("mp_world_size") or 1
        tensor_ranks = max((rank for _, rank in folder.layers), default=-1) + 1
        self.tp = _degree(dims.get("tp_degree")) or tensor_ranks or (1 if first.get("module", 0) is None else size)
        self.pp = _degree(dims.get("pp_degree")) or max(1, size // self.tp)
        self.is_pipeline = bool(folder.layers) and first.get("module") is None
        self.dp = first.count("dp_world_size") or self._counted_dp()
        self.stage3 = not folder.model
        count = self.pp * self.tp
        why = f"{first.name} says: {self.pp} pipeline stages x {self.tp} tensor ranks"
        self.models: list[list[Saved]] = []
        if self.stage3:
            why_dp = f"{first.name} says dp_world_size {self.dp}"
            for mp in range(count):
                found = {dp: path for (dp, rank), path in folder.model3.items() if rank == mp}
                name = f"zero_pp_rank_{{}}_mp_rank_{mp:02d}_model_states.pt"
                self.models.append([load(p) for p in self._ranks(found, name, why_dp)])
            require_ranks(
                {rank: folder.model3[min(k for k in folder.model3 if k[1] == rank)] for rank in ranks},
                count, name="zero_pp_rank_*_mp_rank_{:02d}_model_states.pt", why=why, folder=folder.path,
                what="model-parallel rank",
            )
        else:
            paths = require_ranks(
                folder.model, count, name="mp_rank_{:02d}_model_states.pt", why=why, folder=folder.path,
                what="model-parallel rank",
            )
            self.models = [[first if path == first.path else load(path)] for path in paths]
        every = [saved for row in self.models for saved in row]
        self.step = same_everywhere(every, "global_steps", "global step")
        same_everywhere(every, "dp_world_size", "data-parallel size")

    def optim(self) -> list[list[Saved]]:
        """The optimizer files, by model-parallel and by data-parallel rank."""
        why = f"{self.first.name} says dp_world_size {self.dp}"
        rows: list[list[Saved]] = []
        for mp in range(self.pp * self.tp):
            found = {dp: path for (dp, rank), path in self.folder.optim.items() if rank == mp}
            prefix = next((p.name.partition("zero_")[0] for p in self.folder.optim.values()), "")
            name = f"{prefix}zero_pp_rank_{{}}_mp_rank_{mp:02d}_optim_states.pt"
            rows.append([load(path) for path in self._ranks(found, name, why)])
        others = [path.name for (_, rank), path in self.folder.optim.items() if rank >= self.pp * self.tp]
        if others:
            raise FormatError(
                f"{self.folder.path}: {', '.join(others[:4])} are of model-parallel ranks that do not belong here: "
                f"expected {self.pp * self.tp}. They are left over from another run with the same tag: move them away"
            )
        return rows

    def _ranks(self, found: Mapping[int, Path], name: str, why: str) -> list[Path]:
        return require_ranks(found, self.dp, name=name, why=why, folder=self.folder.path)

    def _counted_dp(self) -> int:
        found = [dp for dp, _ in (*self.folder.optim, *self.folder.model3)]
        return max(found, default=0) + 1


class _Checkpoint:
    """A native checkpoint, on the way to a State."""

    def __init__(self, folder: Folder, rules: Rules | None = None) -> None:
        self.folder = folder
        self.rules = rules
        self.topology = Topology(folder)
        self.warnings: list[str] = []
        self.stage: int | None = None

    def state(self) -> State:
        topology = self.topology
        first = topology.first
        zero = first.get("param_shapes") is not None
        if zero and not self.folder.optim:
            raise FormatError(
                f"{self.folder.path} has no *_optim_states.pt, expected those of {topology.dp} ranks ({first.name} was "
                "saved with ZeRO): copy them from the nodes that wrote them, or take an older checkpoint"
            )
        bf16_pipeline = topology.is_pipeline and isinstance(first.get("optimizer"), dict)
        bf16_pipeline = bf16_pipeline and "single_partition_of_fp32_groups" in first.get("optimizer")
        if not zero and self.folder.optim and not bf16_pipeline:
            path = next(iter(self.folder.optim.values()))
            raise FormatError(
                f"{self.folder.path}: {path.name} is of a run with ZeRO, but {first.name} of one without: they are of "
                "different runs with the same tag; move away the files of the older one"
            )
        optims, weights = self._zero() if zero or bf16_pipeline else self._plain()
        return assemble(topology, optims, weights, self.stage, self.warnings, rules=self.rules)

    def _zero(self) -> tuple[list[Optim], list[Weights]]:
        topology = self.topology
        optims: list[Optim] = []
        rows = topology.optim()
        config = topology.first.get("ds_config")
        dp_before_ep = bool(config.get("use_data_before_expert_parallelism")) if isinstance(config, dict) else False
        for models, files in zip(topology.models, rows, strict=True):
            stages = {stage_of(saved) for saved in files}
            if len(stages) > 1:
                raise FormatError(
                    f"{self.folder.path}: {files[0].name} and those of the other ranks are of the ZeRO stages "
                    f"{sorted(map(str, stages))}: they are of different runs with the same tag; move away those of the "
                    "older one"
                )
            stage = stages.pop()
            if (stage == 3) != topology.stage3:
                raise FormatError(
                    f"{files[0].path} is of ZeRO stage {stage}, but {models[0].name} is not: they are of different "
                    "runs with the same tag; move away the files of the older one"
                )
            self.stage = 1 if stage is None else stage
            if topology.stage3:
                optims.append(read_stage3(models, files))
            elif models[0].get("param_shapes") is not None:
                optims.append(read_flat(models[0], files, dp_before_ep))
            else:
                self.stage = 0
                optims.append(read_flat(models[0], files, dp_before_ep, mapped_shapes(files)))
        check_steps(optims, rows)
        weights: list[Weights] = []
        for t in range(topology.tp if topology.is_pipeline else 0):
            stages_of_t = list(range(t, topology.pp * topology.tp, topology.tp))
            shapes = {name: shape for mp in stages_of_t for name, shape in optims[mp].shapes.items()}
            weights.append(pipeline_weights(self.folder, t, [topology.models[mp][0] for mp in stages_of_t], shapes))
            for mp in stages_of_t:
                shape_as(optims[mp], weights[t].model)
        if not topology.is_pipeline:
            for mp, (models, optim) in enumerate(zip(topology.models, optims, strict=True)):
                found = module_weights(models[0], optim.shapes, is_stage3=topology.stage3)
                autoep = [
                    str(entry.get("expert_key_prefix"))
                    for entry in models[0].get("ds_autoep_layers") or models[0].get("autoep_layers") or ()
                    if isinstance(entry, dict)
                ]
                for name, view in expert_weights(self.folder, mp, autoep).items():
                    found.model[name] = view
                    found.order.append(name)
                if topology.stage3:
                    fill_stage3(found, models, optim, self.warnings)
                weights.append(found)
        return optims, weights

    def _plain(self) -> tuple[list[Optim], list[Weights]]:
        """Without ZeRO. Pipelines have their weights in layer files then too, names are found per stage."""
        topology = self.topology
        self.stage = 0
        if topology.is_pipeline:
            models = [row[0] for row in topology.models]
            weights = [
                pipeline_weights(self.folder, t, models[t :: topology.tp], {}) for t in range(topology.tp)
            ]
            if all(saved.get("optimizer") is None for saved in models):
                return [Optim() for _ in models], weights
            rows = [read_stages(models[t :: topology.tp], weights[t]) for t in range(topology.tp)]
            optims = [rows[t][s] for s in range(topology.pp) for t in range(topology.tp)]
            check_steps(optims, topology.models)
            return optims, weights
        optims = []
        weights = []
        for mp, (saved, *_) in enumerate(topology.models):
            found = module_weights(saved, {})
            for name, view in expert_weights(self.folder, mp).items():
                found.model[name] = view
                found.order.append(name)
            weights.append(found)
            ranks = {rank: path for (rank, place), path in self.folder.expp.items() if place == mp}
            if len(ranks) > 1:
                name = f"expp_rank_{{}}_mp_rank_{mp:02d}_optim_states.pt"
                why = f"the highest rank is {max(ranks)}"
                files = require_ranks(ranks, max(ranks) + 1, name=name, why=why, folder=self.folder.path)
                optims.append(read_experts([load(path) for path in files], found))
            else:
                optims.append(Optim() if saved.get("optimizer") is None else read_plain(saved, found))
            check_experts(saved, found, optims[-1])
        return optims, weights


def shape_as(optim: Optim, model: Mapping[str, View]) -> None:
    """Give states that are known as flat vectors only the shape of their weights."""
    for key, view in optim.tensors.items():
        weight = model.get(key[1])
        if weight is not None and len(view.shape) == 1 and view.shape != weight.shape and view.numel == weight.numel:
            optim.tensors[key] = Reshaped(view, weight.shape)
            optim.shapes[key[1]] = weight.shape


def fill_stage3(found: Weights, models: Sequence[Saved], optim: Optim, warnings: list[str]) -> None:
    """Stage 3's weights: frozen ones of their fragments, the others rounded from the masters."""
    frozen = frozen_parts(models)
    lost = []
    for name in (*found.order, *frozen, *optim.shapes):
        if name in found.model or name in found.buffers:
            continue
        master = optim.tensors.get((MASTER, name))
        if name in frozen:
            found.model[name] = frozen[name]
        elif master is not None:
            dtype = found.empty.get(name, master.dtype)
            found.model[name] = master if dtype == master.dtype else Cast(master, dtype)
        else:
            lost.append(name)
            continue
        if name not in found.order:
            found.order.append(name)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.append(
            f"the checkpoint names parameters without holding them: {', '.join(lost[:5])}{more} (those that are "
            "frozen, or have no elements, were left out when it was saved)"
        )
        found.order = [name for name in found.order if name not in lost]


def assemble(
    topology: Topology,
    optims: Sequence[Optim],
    weights: Sequence[Weights],
    stage: int | None,
    warnings: list[str],
    *,
    format_name: str = "deepspeed",
    rules: Rules | None = None,
) -> State:
    """
    Return the state of what each model-parallel rank holds. ``optims``: by model-parallel rank, or one that is whole;
    ``weights``: by model-parallel rank, in a pipeline by tensor rank.
    """
    first = topology.first
    state = State(format=format_name, tensors=[], step=topology.step, warnings=warnings)
    merger = _merger(topology, optims, weights, rules) if len(weights) > 1 else None
    model, buffers, order = _merge_weights(topology, weights, merger)
    states = _merge_optims(topology, optims, merger)
    trained = dict.fromkeys(name for kind, name in states if kind == MASTER)
    trained.update(dict.fromkeys(name for optim in optims for group in optim.groups for name in group.names))
    missing = [name for name in trained if name not in model]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FormatError(
            f"{topology.folder.path}: the weights of {', '.join(missing[:5])}{more} are in no file"
            f"{expert_files_missing(topology.folder, missing)}, but the optimizer has them: copy what is missing from "
            "the nodes that wrote it, or take an older checkpoint"
        )
    kinds = list(dict.fromkeys(kind for kind, _ in states if kind != MASTER))
    for name in order:
        if name in buffers:
            state.tensors.append(Tensor("buffer", name, buffers[name]))
            continue
        state.tensors.append(Tensor("model", name, model[name]))
        master = states.get((MASTER, name))
        if master is not None and master.dtype != model[name].dtype:
            state.tensors.append(Tensor("fp32", name, master))
        for kind in kinds:
            view = states.get((kind, name))
            if view is not None:
                state.tensors.append(Tensor(kind, name, view))
    for found in weights:
        state.tied.update({alias: name for alias, name in found.tied.items() if name in model or name in buffers})
    for optim in optims:
        state.warnings += [line for line in optim.warnings if line not in state.warnings]
    check_model_step(topology.folder.path, first, state, states)
    _mark_frozen(topology, state, model, trained)
    state.param_groups = plain_groups(topology.folder.path, optims, state)
    state.warnings += merger.warnings() if merger is not None else []
    add_extra(state, topology.models, optims, weights, tp=topology.tp, dp=topology.dp)
    state.source = {
        "framework": "deepspeed",
        "version": first.get("ds_version") if isinstance(first.get("ds_version"), str) else None,
        "zero_stage": stage,
        "topology": {"dp": topology.dp, "tp": topology.tp, "pp": topology.pp},
        "tag": topology.folder.path.name,
    }
    return state


def _mark_frozen(topology: Topology, state: State, model: Mapping[str, View], trained: Mapping[str, Any]) -> None:
    """``frozen_param_shapes`` also lists what has no elements, since DeepSpeed leaves that out of its optimizer."""
    if not trained:
        return
    listed_frozen = {
        name for row in topology.models for name in (row[0].typed("frozen_param_shapes", dict, {}))
    }
    is_listed = any(row[0].get("frozen_param_shapes") is not None for row in topology.models)
    others = [name for name in model if name not in trained and model[name].numel]
    empty = [name for name in model if name not in trained and not model[name].numel]
    if empty:
        state.warnings.append(
            f"{name_list(empty)} without elements: no file says whether trained, in which parameter group, or frozen"
        )
    if not is_listed:  # stage 0 and 1 do not say; what no optimizer trains is frozen
        state.frozen = others
        return
    state.frozen = [name for name in others if name in listed_frozen]
    unknown = [name for name in others if name not in listed_frozen]
    if unknown:
        state.warnings.append(f"neither trained by the optimizer nor frozen: {', '.join(unknown[:5])}")


Merger = Shards | Rejoiner


def _merger(
    topology: Topology, optims: Sequence[Optim], weights: Sequence[Weights], rules: Rules | None
) -> Merger | None:
    if topology.tp == 1:
        return None
    info = topology.first.get("universal_checkpoint_info")
    where = topology.first.path
    if info is None:
        info = next((optim.rest.get("universal_checkpoint_info") for optim in optims), None)
    if isinstance(info, dict):
        return Shards(info, topology.tp, str(where), rules)
    names = [name for found in weights[:1] for name, view in found.model.items() if view.shape]
    if rules is None:
        raise UsageError(
            f"{where} is of {topology.tp} tensor-parallel ranks, but has no universal_checkpoint_info that says how "
            f"the shards of these make a whole: {name_list(names)}; give --rules with a preset or a file"
        )
    rules.require("model", names, f"{where} has no universal_checkpoint_info")
    return Rejoiner(rules, topology.tp)


def _merge_weights(
    topology: Topology, weights: Sequence[Weights], merger: Merger | None
) -> tuple[dict[str, View], dict[str, View], list[str]]:
    """Weights of all tensor ranks as a whole: {name: view} of parameters and of buffers, and the order."""
    model: dict[str, View] = {}
    buffers: dict[str, View] = {}
    rows = [list(weights)] if topology.is_pipeline else _stages(weights, topology.tp)
    order: dict[str, None] = {}
    for row in rows:
        order.update(dict.fromkeys(row[0].order))
        for name, view in row[0].buffers.items():
            buffers.setdefault(name, view)
        for name in row[0].model:
            shards = [found.model[name] for found in row if name in found.model]
            whole = _merge("model", name, shards, len(row), merger, topology)
            model[name] = whole if name not in model else Merged([model[name], whole], "equal", name)
    return model, buffers, [name for name in order if name in model or name in buffers]


def _merge_optims(
    topology: Topology, optims: Sequence[Optim], merger: Merger | None
) -> dict[tuple[str, str], View]:
    copies: dict[tuple[str, str], list[View]] = {}
    for row in _stages(optims, topology.tp if len(optims) > 1 else 1):
        for (kind, name), view in row[0].tensors.items():
            if view.shape == () and row[0].shapes.get(name) != ():
                whole = view  # one number for all, compared already
            else:
                shards = [optim.tensors[kind, name] for optim in row if (kind, name) in optim.tensors]
                whole = _merge(kind, name, shards, len(row), merger, topology)
            copies.setdefault((kind, name), []).append(whole)
    return {
        key: views[0] if len(views) == 1 else Merged(views, "equal", f"{key[0]} of {key[1]}")
        for key, views in copies.items()
    }


def _merge(
    kind: str, name: str, shards: Sequence[View], expected: int, merger: Merger | None, topology: Topology
) -> View:
    if merger is None or expected == 1:
        return shards[0]
    if len(shards) != expected:
        raise FormatError(
            f"{topology.folder.path}: {kind} of {name} is on {len(shards)} of {expected} tensor-parallel ranks: files "
            "are missing or of another run; take all files of one run"
        )
    if kind == "step" and all(shard.shape == () for shard in shards):
        return shards[0]
    return merger.merge("fp32" if kind == "model" else kind, name, shards)


def _stages(items: Sequence[Any], tp: int) -> list[list[Any]]:
    return [list(items[begin : begin + tp]) for begin in range(0, len(items), tp)]


def _degree(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
