"""
Write a folder of DeepSpeed Universal, which ``load_universal`` takes at any world size and ZeRO stage 1, 2 or 3.

``TARGET/global_stepN_universal/`` has ``zero/<name>/{fp32,exp_avg,...,step}.pt`` for each trained parameter,
``zero/optimizer_state.pt`` with the parameter groups, and model files for stages 1 and 2 (``mp_rank_00``, with weights
and buffers) and 3 (``zero_pp_rank_0``, without); ``TARGET/latest_universal`` is written last.

DeepSpeed's loader restores what is in ``zero/``, the scheduler and the counters, but no buffers and no frozen weights;
its stage 3 gives every group what ``optimizer_state_dict`` has for the first one. So that has only what all groups have
in common: in the rest, a job keeps what it made its optimizer with. What DeepSpeed has no place for is kept under the
key ``snapshotd`` of the model file, so that reading the folder back gives the very same state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import UsageError
from snapshotd.universal.derived import Cast
from snapshotd.universal.pickling import Call, Instance, Name, Ordered, dumps, tensor_call
from snapshotd.universal.plain import from_json
from snapshotd.universal.readers.ds_universal import NOTE_KEY
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import OutFile, Settings, remove_journal, write_files
from snapshotd.universal.torchfile import lay_out
from snapshotd.universal.views import View, read_all
from snapshotd.universal.writers.torch_tree import is_plain_step, optimizer_groups, plain_value
from snapshotd.universal.writers.universal import write_whole

__all__ = ["check", "limits", "losses", "write"]

_DS_VERSION: Final = "0.19.8"
"""What is written as ``ds_version`` for other sources; without one DeepSpeed refuses to load."""

_STAGE3_KINDS: Final = ("exp_avg", "exp_avg_sq")
"""The optimizer states that the loader of stage 3 asks for, by name."""

_MASTERED: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
"""The types of weights that can have a master copy in float32; others are not trained."""

_SCALERS: Final = ("LossScaler", "DynamicLossScaler")


def losses(state: State) -> list[str]:
    """Return what DeepSpeed can not load of ``state``, one line each."""
    plan = _Plan(state)
    lines = []
    if not state.param_groups:
        lines.append("there are no parameter groups: all parameters are put into one without hyperparameters")
    if plan.odd:
        kinds = ", ".join(sorted({tensor.kind for tensor in plan.odd}))
        lines.append(f"optimizer states without an element per parameter, which DeepSpeed will not load: {kinds}")
    for g, names in enumerate(plan.groups):
        steps = {_number(plan.steps[name]) for name in names if name in plan.steps}
        if len(steps) > 1:
            lines.append(f"parameter group {g} has steps from {min(steps):g} to {max(steps):g}; DeepSpeed wants one")
    return lines


def limits(state: State) -> list[str]:
    """Return what is in the folder but DeepSpeed's own loader leaves alone, one line each."""
    plan = _Plan(state)
    lines = []
    for what, names in (("buffers", list(state.of_kind("buffer"))), ("frozen parameters", state.frozen)):
        if names:
            lines.append(
                f"load_universal of DeepSpeed restores no {what}: {_some(names)} must come from the job itself (they "
                "are in 'module' of mp_rank_00_model_states.pt)"
            )
    if _deals_parameters_out(state):
        lines.append(
            "load_universal of DeepSpeed gives parameters the values of others, in stages 1 and 2 with "
            "round_robin_gradients, which this run has in its configuration: load it with round_robin_gradients false"
        )
    differing = sorted({key for group in state.param_groups for key in group} - _common(state.param_groups) - {"names"})
    if differing:
        lines.append(
            f"ZeRO stage 3 of DeepSpeed takes no hyperparameters by group: {', '.join(differing)} stay as the job made "
            "its optimizer with; stages 1 and 2 take them all"
        )
    if len(plan.groups) > 1 and any(view.dtype != "int64" for view in plan.steps.values()):
        lines.append(
            f"ZeRO stage 3 of DeepSpeed makes one tensor the step of all {len(plan.groups)} groups, and torch's "
            "optimizers count it up once for each: load it with stage 1 or 2, or with an optimizer of DeepSpeed"
        )
    others = [kind for kind in plan.kinds if kind not in _STAGE3_KINDS]
    missing = [kind for kind in _STAGE3_KINDS if kind not in plan.kinds] if plan.kinds else []
    if others or missing:
        lines.append(
            f"ZeRO stage 3 of DeepSpeed loads exp_avg and exp_avg_sq alone, and must have both; here are "
            f"{_some(list(plan.kinds))}: load it with stage 1 or 2"
        )
    return lines


def check(state: State, options: dict[str, Any]) -> None:
    """UsageError for a layout: the format has none."""
    if prod(options.get("layout", {}).values()) != 1 and set(options["layout"]) - {"dp"}:
        raise UsageError("DeepSpeed Universal has no layout: it is cut when it is loaded; leave --layout out")


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write ``state`` into the directory ``target``."""
    check(state, options)
    plan = _Plan(state)
    tag = f"global_step{state.step if state.step is not None else 0}_universal"
    files = [
        _archive(f"{tag}/mp_rank_00_model_states.pt", plan.model_file(whole=True), plan),
        _archive(f"{tag}/zero_pp_rank_0_mp_rank_00_model_states.pt", plan.model_file(whole=False), plan),
        _archive(f"{tag}/zero/optimizer_state.pt", plan.optimizer_file(), plan),
    ]
    for name in plan.shapes:
        for kind, view in plan.states(name):
            path = f"{tag}/zero/{name}/{kind}.pt"
            if kind != "step":
                value: Any = {"cat_dim": 0, "param": plan.put(f"{kind}/{name}", view)}
            elif is_plain_step(Tensor(kind, name, view)):
                value = plain_value(view)
            else:
                value = plan.put(f"{kind}/{name}", view)
            files.append(_archive(path, value, plan))
    write_files(target, files, settings, identity=identity)
    write_whole(target / "latest_universal", tag.encode())
    remove_journal(target)


class _Plan:
    """What goes where. ``put`` collects the tensors of the file that is being described."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.model = state.of_kind("model")
        self.masters = state.of_kind("fp32")
        self.groups = [list(group["names"]) for group in state.param_groups]
        kinds = {kind: state.of_kind(kind) for kind in state.optimizer_kinds}
        if not self.groups:
            frozen = set(state.frozen)
            weights = {**self.model, **self.masters}
            self.groups = [[name for name in weights if name not in frozen and weights[name].dtype in _MASTERED]]
        self.groups = [[state.tied.get(name, name) for name in names] for names in self.groups]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in (name for names in self.groups for name in names):
            tensor = self.masters.get(name) or self.model.get(name)
            if tensor is None:
                raise UsageError(f"{name} is in a parameter group, but has no weights: it can not be written")
            if tensor.dtype not in _MASTERED:
                raise UsageError(f"{name} is {tensor.dtype}, of which DeepSpeed can have no master copy in float32")
            if "/" in name or name in (".", ".."):
                raise UsageError(f"{name!r} can not be the name of a folder, as DeepSpeed Universal wants it")
            self.shapes[name] = tensor.shape
        self.steps = {name: tensor.view for name, tensor in kinds.pop("step", {}).items() if tensor.shape == ()}
        self.kinds: dict[str, dict[str, Tensor]] = {}
        self.odd: list[Tensor] = []
        for kind, tensors in kinds.items():
            fits = all(name in self.shapes and t.shape == self.shapes[name] for name, t in tensors.items())
            if fits and kind not in ("fp32", "step"):
                self.kinds[kind] = tensors
            else:
                self.odd += tensors.values()
        self.odd += [t for t in state.of_kind("step").values() if t.name not in self.steps or t.name not in self.shapes]
        self._storages: list[tuple[str, str, View]] = []
        self._calls: dict[str, Call] = {}

    def put(self, key: str, view: View) -> Call:
        """Return the pickle form of a tensor of the file that is being described; the same key shares a storage."""
        if key not in self._calls:
            storage = str(len(self._storages))
            self._storages.append((storage, key, view))
            self._calls[key] = tensor_call(storage, view.dtype, view.shape, view.nbytes)
        return self._calls[key]

    def take(self) -> list[tuple[str, str, View]]:
        """Return the tensors that were put since the last call."""
        storages, self._storages, self._calls = self._storages, [], {}
        return storages

    def states(self, name: str) -> list[tuple[str, View]]:
        """The files of one parameter: kind and what is in it."""
        master = self.masters.get(name)
        view: View = master.view if master is not None else self.model[name].view
        found = [("fp32", view if master is not None or view.dtype == "float32" else Cast(view, "float32"))]
        found += [(kind, tensors[name].view) for kind, tensors in self.kinds.items() if name in tensors]
        if name in self.steps:
            found.append(("step", self.steps[name]))
        return found

    def model_file(self, *, whole: bool) -> dict[str, Any]:
        """The model file; ``whole`` is that of stages 1 and 2, the other serves stage 3, which wants no weights."""
        state, extra = self.state, self.state.extra
        tensors = {tensor.name: tensor for tensor in state.tensors if tensor.kind == "extra"}
        lazy = _Lazy(self, tensors)
        values: dict[str, Any] = dict(_client_state(state, lazy))
        weights = {
            tensor.name: self.put(f"{tensor.kind}/{tensor.name}", tensor.view)
            for tensor in state.tensors
            if whole and tensor.kind in ("model", "buffer")
        }
        for alias, name in state.tied.items():
            if name in weights:
                weights[alias] = weights[name]
        engine = extra.get("deepspeed")
        engine = from_json(engine, lazy) if isinstance(engine, dict) else {}
        frozen = {name: self.model[name] for name in state.frozen if name in self.model}
        values.update(
            {
                "module": Ordered(weights),
                "buffer_names": list(state.of_kind("buffer")),
                "optimizer": None,
                "param_shapes": [Ordered({name: _size(self.shapes[name]) for name in names}) for names in self.groups],
                "frozen_param_shapes": Ordered({name: _size(tensor.shape) for name, tensor in frozen.items()}),
                "frozen_param_fragments": Ordered({name: weights[name] for name in frozen if name in weights}),
                "shared_params": dict(state.tied),
                "lr_scheduler": from_json(extra.get("lr_scheduler"), lazy),
                "data_sampler": engine.get("data_sampler"),
                "random_ltd": engine.get("random_ltd"),
                "skipped_steps": _count(extra, "skipped_steps", 0),
                "global_steps": _count(extra, "global_steps", state.step or 0),
                "global_samples": _count(extra, "global_samples", 0),
                "dp_world_size": 1,
                "mp_world_size": 1,
                "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
                "ds_config": engine.get("ds_config", {}),
                "ds_version": _version(state),
                "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
            }
        )
        if values["lr_scheduler"] is None:  # DeepSpeed loads it into whatever scheduler there is
            values["lr_scheduler"] = {"last_batch_iteration": max(0, values["global_steps"] - 1)}
        if whole:
            values[NOTE_KEY] = self._note(tensors)
        return values

    def optimizer_file(self) -> dict[str, Any]:
        """``optimizer_state.pt``: groups for stages 1 and 2, the same and steps by group for stage 3."""
        lazy = _Lazy(self, {tensor.name: tensor for tensor in self.state.tensors if tensor.kind == "extra"})
        groups: list[dict[str, Any]] = []
        steps: dict[int, Any] = {}
        given = optimizer_groups(self.state, lazy) or [{} for _ in self.groups]
        for g, (names, group) in enumerate(zip(self.groups, given, strict=True)):
            groups.append({**{key: value for key, value in group.items() if key != "names"}, "params": [g]})
            view = next((self.steps[name] for name in names if name in self.steps), None)
            steps[g] = {"step": group.get("step", 0) if view is None else _step_value(view, self, g)}
        scaler = self.state.extra.get("loss_scaler")
        engine = self.state.extra.get("deepspeed")
        engine = engine if isinstance(engine, dict) else {}
        values: dict[str, Any] = {
            key: engine[key]
            for key in ("dynamic_loss_scale", "overflow", "clip_grad")
            if isinstance(engine.get(key), (bool, int, float))
        }
        kind = str(scaler.get("$object", "")) if isinstance(scaler, dict) else ""
        module, _, name = kind.rpartition(".")
        if name in _SCALERS and module == "deepspeed.runtime.fp16.loss_scaler":
            fields = from_json(scaler.get("fields", {}), lazy) if isinstance(scaler, dict) else {}
            values["loss_scaler"] = Instance(Name(module, name), fields)
        values["ds_version"] = _version(self.state)
        values["param_groups"] = groups
        kept = {*_common(groups), "params"}
        shared = [{key: value for key, value in group.items() if key in kept} for group in groups]
        values["optimizer_state_dict"] = {"state": steps, "param_groups": shared}
        return values

    def _note(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What reading back needs and DeepSpeed has no place for."""
        state = self.state
        return {
            "version": 1,
            "step": state.step,
            "frozen": list(state.frozen),
            "param_groups": state.param_groups,
            "extra": state.extra,
            "tensors": {name: self.put(f"extra/{name}", tensor.view) for name, tensor in tensors.items()},
            "rng": {t.name: self.put(f"rng/{t.name}", t.view) for t in state.tensors if t.kind == "rng"},
            "states": {f"{t.kind}/{t.name}": self.put(f"{t.kind}/{t.name}", t.view) for t in self.odd},
            "derived": [name for name in self.shapes if name not in self.masters and name in self.model],
        }


class _Lazy(Mapping[str, Any]):
    """Tensors inside plain values: put into the file when they are met."""

    def __init__(self, plan: _Plan, tensors: Mapping[str, Tensor]) -> None:
        self.plan, self.tensors = plan, tensors

    def __getitem__(self, name: str) -> Any:
        return self.plan.put(f"extra/{name}", self.tensors[name].view)

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _archive(path: str, value: Any, plan: _Plan) -> OutFile:
    pickled = dumps(value)
    archive = lay_out(pickled, plan.take(), prefix=Path(path).stem)
    return OutFile(
        name=path,
        nbytes=archive.nbytes,
        blocks=archive.blocks,
        tensors=archive.tensors,
        crc=True,
        finish=archive.finish,
    )


def _client_state(state: State, lazy: _Lazy) -> dict[str, Any]:
    """The caller's own values at the top level, where ``load_checkpoint`` returns them; generators under their keys."""
    client = state.extra.get("client_state")
    values = from_json(client, lazy) if isinstance(client, dict) else {}
    rng = state.of_kind("rng")
    keys = state.extra.get("rng_keys")
    for key, names in keys.items() if isinstance(keys, dict) else ():
        mine = [lazy.plan.put(f"rng/{name}", rng[name].view) for name in names if name in rng]
        if mine:
            values[str(key)] = mine[0] if "/" not in str(names[0]) else mine
    return {key: value for key, value in values.items() if isinstance(key, str) and key != NOTE_KEY}


def _common(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    """The hyperparameters that are the same in all groups."""
    return {key for key in (groups[0] if groups else ()) if len({repr(group.get(key)) for group in groups}) == 1}


def _deals_parameters_out(state: State) -> bool:
    """Whether the run was configured with ``round_robin_gradients``."""
    found: Any = state.extra
    for key in ("deepspeed", "ds_config", "zero_optimization"):
        found = found.get(key) if isinstance(found, dict) else None
    return isinstance(found, dict) and found.get("round_robin_gradients") is True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _step_value(view: View, plan: _Plan, group: int) -> Any:
    return plain_value(view) if view.dtype == "int64" else plan.put(f"step.{group}", view)


def _number(view: View) -> float:
    return float(plain_value(view)) if read_all(view).size else 0.0


def _size(shape: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (tuple(shape),))


def _count(extra: Mapping[str, Any], key: str, default: int) -> int:
    value = extra.get(key)
    return value if type(value) is int else default


def _version(state: State) -> str:
    version = state.source.get("version")
    return version if state.source.get("framework") == "deepspeed" and isinstance(version, str) else _DS_VERSION
