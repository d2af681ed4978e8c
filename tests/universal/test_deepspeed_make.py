"""
Checkpoints as DeepSpeed lays them out, made slowly and obviously from the formulas, without DeepSpeed.

``Run`` holds a small undivided model with its optimizer's state; ``zero12``, ``zero3`` and the others write it as the
files of a run would have it, and ``Run.truth()`` is what a reader must give back. Padding is NaN, so that a
reader that takes one element of it is found out.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from snapshotd.universal.readers import read
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all

SHAPES = {
    "embed.weight": (7, 3),
    "layers.0.qkv.weight": (8, 3),
    "layers.0.norm.weight": (5,),
    "layers.0.gain": (1,),
    "layers.1.big.weight": (11, 5),
    "layers.1.bias": (3,),
    "temperature": (),
    "head.weight": (4, 5),
}


@contextlib.contextmanager
def deepspeed_names() -> Iterator[types.SimpleNamespace]:
    """The classes that stand in DeepSpeed's pickles, under its names, for as long as torch.save runs."""

    class LossScaler:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    class DynamicLossScaler(LossScaler):
        pass

    class ZeroStageEnum(int, Enum):
        disabled = 0
        optimizer_states = 1
        gradients = 2
        weights = 3

        def __reduce_ex__(self, protocol: Any) -> Any:
            return type(self), (self.value,)

    class fragment_address:  # noqa: N801
        def __init__(self, numel: int, start: int) -> None:
            self.numel, self.start = numel, start

    class SubparamShape:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    places = {
        LossScaler: "deepspeed.runtime.fp16.loss_scaler",
        DynamicLossScaler: "deepspeed.runtime.fp16.loss_scaler",
        ZeroStageEnum: "deepspeed.runtime.zero.config",
        fragment_address: "deepspeed.utils.tensor_fragment",
        SubparamShape: "deepspeed.checkpoint.universal_checkpoint",
    }
    added: list[str] = []
    for kind, module in places.items():
        kind.__module__, kind.__qualname__ = module, kind.__name__
        parts = module.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                added.append(name)
        setattr(sys.modules[module], kind.__name__, kind)
    try:
        yield types.SimpleNamespace(**{kind.__name__: kind for kind in places})
    finally:
        for name in added:
            del sys.modules[name]


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype)


@dataclass
class Run:
    """An undivided model after a few steps."""

    dtype: torch.dtype = torch.float32
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))
    groups: list[list[str]] = field(default_factory=list)
    kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    frozen: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"pos.weight": (5, 3), "pos.bias": (7,)})
    tied: dict[str, str] = field(default_factory=dict)
    steps: tuple[Any, ...] = ()
    seed: int = 0
    hyper: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        if not self.groups:
            matrices = [name for name, shape in self.shapes.items() if len(shape) > 1]
            self.groups = [matrices, [name for name in self.shapes if name not in matrices]]
        self.hyper = self.hyper or [
            {"lr": 0.001 * (g + 1), "betas": (0.9, 0.95 + g / 100), "eps": 1e-8, "weight_decay": 0.1 * g, "fused": None}
            for g in range(len(self.groups))
        ]
        self.steps = self.steps or tuple(torch.tensor(4.0 - g) for g in range(len(self.groups)))
        draw = lambda shape: torch.randn(shape, generator=random)  # noqa: E731
        self.master = {name: draw(shape) for name, shape in self.shapes.items()}
        self.states = {kind: {name: draw(shape) for name, shape in self.shapes.items()} for kind in self.kinds}
        self.model = {name: rounded(tensor, self.dtype) for name, tensor in self.master.items()}
        self.cold = {name: rounded(draw(shape), self.dtype) for name, shape in self.frozen.items()}
        self.buffers = {
            "rope": draw((4,)),
            "seen": torch.tensor(768, dtype=torch.int64),
            "mask": torch.tensor([True, False, True]),
        }
        self.rng = torch.get_rng_state()

    def truth(self) -> dict[str, torch.Tensor]:
        found = {f"model/{name}": tensor for name, tensor in {**self.model, **self.cold}.items()}
        found.update({f"buffer/{name}": tensor for name, tensor in self.buffers.items()})
        if self.dtype != torch.float32:
            found.update({f"fp32/{name}": tensor for name, tensor in self.master.items()})
        for kind, tensors in self.states.items():
            found.update({f"{kind}/{name}": tensor for name, tensor in tensors.items()})
        for names, step in zip(self.groups, self.steps, strict=True):
            if step is not None:
                value = step if isinstance(step, torch.Tensor) else torch.tensor(step, dtype=torch.int64)
                found.update({f"step/{name}": value for name in names})
        return found

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"names": names, **{key: list(v) if isinstance(v, tuple) else v for key, v in hyper.items()}}
            for names, hyper in zip(self.groups, self.hyper, strict=True)
        ]

    def common(self, *, dp: int, tp: int = 1, pp: int = 1, **more: Any) -> dict[str, Any]:
        values = {
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "frozen_param_shapes": None,
            "shared_params": dict(self.tied),
            "frozen_param_fragments": None,
            "lr_scheduler": {"last_batch_iteration": 3},
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 1,
            "global_steps": 5,
            "global_samples": 60,
            "dp_world_size": dp,
            "mp_world_size": tp * pp,
            "checkpoint_parallel_dimensions": {"pp_degree": pp, "tp_degree": tp},
            "ds_config": {"train_batch_size": 12, "bf16": {"enabled": self.dtype == torch.bfloat16}},
            "ds_version": "0.19.8",
            "iteration": 5,
            "consumed": {"epoch": 0, "order": (2, 0, 1), "ratio": float("nan")},
            "torch_rng": self.rng,
        }
        values.update(more)
        return values

    def module(self) -> OrderedDict[str, torch.Tensor]:
        found = OrderedDict({**self.model, **self.cold, **self.buffers})
        for alias, name in self.tied.items():
            found[alias] = found[name]
        return found


def save(values: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)


def nans(count: int) -> torch.Tensor:
    return torch.full((count,), float("nan"))


def prefix_of(run: Run) -> str:
    return "bf16_" if run.dtype == torch.bfloat16 else ""


def finish(root: Path, tag: str = "global_step5") -> Path:
    (root / "latest").write_text(tag)
    return root


def flat_partitions(
    tensors: list[torch.Tensor], dp: int, alignment: int = 1
) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """The partitions with their padding, the padding of each, and the holes behind each parameter."""
    pieces, holes = [], []
    for tensor in tensors:
        hole = -tensor.numel() % alignment
        holes.append(hole)
        pieces += [tensor.reshape(-1), nans(hole)]
    flat = torch.cat(pieces)
    full = flat.numel()
    flat = torch.cat([flat, nans(-full % (2 * dp))])
    size = flat.numel() // dp
    pads = [max(0, min(size, (r + 1) * size - full)) for r in range(dp)]
    return [flat[r * size : (r + 1) * size].clone() for r in range(dp)], pads, holes


def zero12(
    root: Path,
    run: Run,
    dp: int,
    *,
    stage: int = 1,
    elastic: bool = False,
    bf16_optimizer: bool = False,
    round_robin: bool = False,
    alignment: int = 1,
    step_in: str = "state",
    exclude_frozen: bool = False,
    old: bool = False,
    mp: int = 0,
    more: dict[str, Any] | None = None,
    module: Any = "own",
    extra_states: dict[str, Any] | None = None,
) -> Path:
    """Stage 1 or 2, or BF16_Optimizer. ``old``: as DeepSpeed 0.15.4 wrote it."""
    tag = root / "global_step5"
    shuffled = [
        [name for first in range(dp) for name in names[first::dp]] if round_robin else list(names)
        for names in run.groups
    ]
    config_more = {}
    if stage == 2 and not exclude_frozen:
        config_more = {
            "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in run.cold.items()),
            "frozen_param_fragments": OrderedDict(run.cold),
        }
    values = run.common(dp=dp, **config_more, **(more or {}))
    values["module"] = run.module() if module == "own" else module
    if not old:
        values["ds_config"] |= {"zero_optimization": {"stage": stage, "round_robin_gradients": round_robin}}
    if exclude_frozen:
        for name in run.frozen:
            values["module"].pop(name)
    values["param_shapes"] = [OrderedDict((name, torch.Size(run.shapes[name])) for name in names) for names in shuffled]
    if old:
        del values["checkpoint_parallel_dimensions"]
        values["sparse_tensor_module_names"] = {"embed"}
    with deepspeed_names() as ds:
        save(values, tag / f"mp_rank_{mp:02d}_model_states.pt")
        parts: dict[str, list[Any]] = {}
        for kind, tensors in (("fp32", run.master), *run.states.items()):
            parts[kind] = [flat_partitions([tensors[n] for n in names], dp, alignment) for names in shuffled]
        for r in range(dp):
            masters, states, pads = [], {}, []
            for g in range(len(shuffled)):
                pad = parts["fp32"][g][1][r]
                strip = lambda t, pad=pad: t[: t.numel() - pad].clone()  # noqa: E731
                pads.append(pad)
                master = parts["fp32"][g][0][r]
                masters.append(master if bf16_optimizer else strip(master))
                states[g] = {}
                if step_in == "state":
                    states[g]["step"] = run.steps[g]
                for kind in run.kinds:
                    tensor = parts[kind][g][0][r]
                    states[g][kind] = strip(tensor) if elastic else tensor
                states[g].update(extra_states or {})
            groups = [{**hyper, "params": [g]} for g, hyper in enumerate(run.hyper)]
            inner: dict[str, Any] = {
                "base_optimizer_state": {"state": states, "param_groups": groups},
                "single_partition_of_fp32_groups": masters,
                "group_paddings": pads,
                "partition_count": [dp] * len(shuffled),
                "ds_version": "0.19.8",
                "clip_grad": 1.0,
                "param_slice_mappings": [
                    slice_mapping(run, names, flat if alignment > 1 else names, dp, r, ds, alignment)
                    for names, flat in zip(run.groups, shuffled, strict=True)
                ],
            }
            if elastic:
                inner["base_optimizer_state"] = list(states.values())
                if step_in == "group" or "step" in run.hyper[0]:
                    inner["base_optimizer_state_step"] = run.hyper[0]["step"]
            if not bf16_optimizer:
                inner["zero_stage"] = ds.ZeroStageEnum(stage)
                inner["loss_scaler"] = (
                    ds.DynamicLossScaler(cur_scale=256.0, cur_iter=5, last_overflow_iter=0, dynamic=True)
                    if run.dtype == torch.float16
                    else ds.LossScaler(cur_scale=1.0, dynamic=False)
                )
                inner["dynamic_loss_scale"] = run.dtype == torch.float16
                inner["overflow"] = False
                if not old:
                    inner["param_alignment_paddings"] = [part[2] for part in parts["fp32"]]
            outer = {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}
            save(outer, tag / f"{prefix_of(run)}zero_pp_rank_{r}_mp_rank_{mp:02d}_optim_states.pt")
    return finish(root)


def slice_mapping(
    run: Run, names: list[str], flat: list[str], dp: int, rank: int, ds: Any, alignment: int
) -> OrderedDict[str, Any]:
    """
    The fragments on a rank, in the user's order (``names``). ``flat``: the order in which their offsets count, since
    0.19.8 forgets the shuffle of round_robin_gradients, except where the parameters are aligned.
    """
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name in flat:
        numel = run.master[name].numel()
        places[name] = (at, at + numel)
        at += numel + -numel % alignment
    size = (at + -at % (2 * dp)) // dp
    found: OrderedDict[str, Any] = OrderedDict()
    for name in names:
        begin, stop = max(places[name][0], rank * size), min(places[name][1], (rank + 1) * size)
        if begin < stop:
            found[name] = ds.fragment_address(stop - begin, begin - rank * size)
    return found


def stage3_piece(tensor: torch.Tensor, dp: int, rank: int) -> torch.Tensor:
    k = -(-tensor.numel() // dp)
    return torch.cat([tensor.reshape(-1), nans(k * dp - tensor.numel()).to(tensor.dtype)])[rank * k : (rank + 1) * k]


def zero3(
    root: Path,
    run: Run,
    dp: int,
    *,
    sub_group_size: int = 10**9,
    exclude_frozen: bool = False,
    mp: int = 0,
    more: dict[str, Any] | None = None,
) -> Path:
    """Stage 3: each parameter cut on its own, sub-groups cut when their partitions reach ``sub_group_size``."""
    tag = root / "global_step5"
    subs: list[list[str]] = []
    members: list[list[int]] = []
    for names in run.groups:
        members.append([])
        pending: list[str] = []
        count = 0
        for name in names:
            pending.append(name)
            count += -(-run.master[name].numel() // dp)
            if count >= sub_group_size or name == names[-1]:
                members[-1].append(len(subs))
                subs.append(pending)
                pending, count = [], 0
    with deepspeed_names() as ds:
        for r in range(dp):
            values = run.common(dp=dp, **(more or {}))
            cold = {} if exclude_frozen else run.cold
            values["module"] = OrderedDict(
                {name: torch.empty(0, dtype=run.dtype) for name in (*run.model, *cold, *run.tied)}
            )
            values["module"].update(run.buffers)
            values["shared_params"] = dict(run.tied) if r == 0 else {}
            values["param_shapes"] = [OrderedDict((n, torch.Size(run.shapes[n])) for n in names) for names in subs]
            if not exclude_frozen:
                values["frozen_param_shapes"] = OrderedDict((n, t.shape) for n, t in cold.items())
                values["frozen_param_fragments"] = OrderedDict((n, stage3_piece(t, dp, r)) for n, t in cold.items())
            save(values, tag / f"zero_pp_rank_{r}_mp_rank_{mp:02d}_model_states.pt")
            state = {}
            flats = []
            for s, names in enumerate(subs):
                g = next(g for g, ids in enumerate(members) if s in ids)
                state[s] = {"step": run.steps[g]}
                for kind in run.kinds:
                    state[s][kind] = torch.cat([stage3_piece(run.states[kind][n], dp, r) for n in names])
                flats.append(torch.cat([stage3_piece(run.master[n], dp, r) for n in names]))
            groups = [{**hyper, "params": ids} for hyper, ids in zip(run.hyper, members, strict=True)]
            inner = {
                "zero_stage": ds.ZeroStageEnum(3),
                "loss_scaler": ds.LossScaler(cur_scale=1.0, dynamic=False),
                "dynamic_loss_scale": False,
                "overflow": False,
                "partition_count": dp,
                "optimizer_state_dict": {"state": state, "param_groups": groups},
                "fp32_flat_groups": flats,
            }
            outer = {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}
            save(outer, tag / f"{prefix_of(run)}zero_pp_rank_{r}_mp_rank_{mp:02d}_optim_states.pt")
    return finish(root)


def contents(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    state.check()
    return {
        f"{tensor.kind}/{tensor.name}": (tensor.dtype, tensor.shape, read_all(tensor.view).tobytes())
        for tensor in state.tensors
    }


def expect(state: State, truth: dict[str, torch.Tensor]) -> None:
    """The state has exactly what the truth has, bit for bit (and generators)."""
    found = {key: value for key, value in contents(state).items() if not key.startswith("rng/")}
    wanted = {
        key: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()),
        )
        for key, tensor in truth.items()
    }
    assert sorted(wanted) == sorted(found)
    assert [key for key, value in wanted.items() if found[key] != value] == []


def test_the_generator_makes_what_the_reader_reads(tmp_path: Path) -> None:
    run = Run(dtype=torch.bfloat16)
    state = read(zero12(tmp_path, run, 2))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
