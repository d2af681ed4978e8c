"""Pipelines and experts of DeepSpeed: the same weight under two names, the same name for two weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.errors import FormatError
from snapshotd.universal.readers import read
from tests.universal.test_deepspeed_make import (
    Run,
    deepspeed_names,
    expect,
    flat_partitions,
    prefix_of,
    save,
    zero12,
)
from tests.universal.test_deepspeed_tp import exact, sub_cut

PIPE = {
    "tied_modules.embed.weight": (7, 4),
    "2.attn.qkv.weight": (5, 4),
    "2.bias": (3,),
    "3.attn.qkv.weight": (5, 4),
    "3.bias": (3,),
    "10.weight": (4,),
}
PARTS = ("fc1.weight", "fc1.bias")
STAGES = [
    ["tied_modules.embed.weight", "2.attn.qkv.weight", "2.bias"],
    ["tied_modules.embed.weight", "3.attn.qkv.weight", "3.bias", "10.weight"],
]


def pipeline(
    root: Path,
    run: Run,
    dp: int,
    *,
    own_index: bool = False,
    tp: int = 1,
    cuts: Any = None,
    info: Any = None,
    **options: Any,
) -> Path:
    """Two stages; layer 1 has no parameters, layer 11 is the tied module's second use."""
    tag = root / "global_step5"
    files: dict[int, dict[str, torch.Tensor]] = {
        0: {"weight": run.model["tied_modules.embed.weight"]},
        2: {name: run.model[f"2.{name}"] for name in ("attn.qkv.weight", "bias")},
        3: {name: run.model[f"3.{name}"] for name in ("attn.qkv.weight", "bias")},
        10: {"weight": run.model["10.weight"]},
    }
    files[2]["rope"] = run.buffers["2.rope"]
    files[3]["cold.weight"] = run.cold["3.cold.weight"]
    if own_index:
        files[11] = dict(files[0])
    for t in range(tp):
        for i, tensors in files.items():
            name = f"layer_{i:02d}-model_{t:02d}-model_states.pt" if tp > 1 else f"layer_{i:02d}-model_states.pt"
            prefix = "tied_modules.embed." if i in (0, 11) else f"{i}."
            mine = {
                key: cuts[prefix + key](tensor)[t].clone() if cuts and prefix + key in cuts else tensor
                for key, tensor in tensors.items()
            }
            save(OrderedDict(mine), tag / name)
    for s, names in enumerate(STAGES):
        for t in range(tp):
            cut = lambda name, v, t=t: cuts[name](v)[t].clone() if cuts and name in cuts else v  # noqa: E731
            part = Run(
                dtype=run.dtype,
                shapes={name: tuple(cut(name, run.master[name]).shape) for name in names},
                groups=[[name for name in group if name in names] for group in run.groups],
                frozen={},
                hyper=run.hyper,
                steps=run.steps,
            )
            part.master = {name: cut(name, run.master[name]) for name in names}
            part.states = {kind: {n: cut(n, tensors[n]) for n in names} for kind, tensors in run.states.items()}
            more: dict[str, Any] = {
                "buffer_names": ["2.rope"] if s == 0 else [],
                "mp_world_size": 2 * tp,
                "checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": tp},
            }
            if info:
                more["universal_checkpoint_info"] = info
            zero12(root, part, dp, mp=s * tp + t, more=more, module=None, **options)
    return root


def pipe_run(dtype: torch.dtype = torch.bfloat16) -> Run:
    groups = [
        ["tied_modules.embed.weight", "2.attn.qkv.weight", "3.attn.qkv.weight"],
        ["2.bias", "3.bias", "10.weight"],
    ]
    run = Run(dtype=dtype, shapes=PIPE, groups=groups, frozen={"3.cold.weight": (2, 2)})
    run.buffers = {"2.rope": torch.arange(3.0)}
    return run


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("own_index", [False, True])
def test_pipeline_has_one_name_for_each_weight(tmp_path: Path, dp: int, own_index: bool) -> None:
    """Layer files use local names, the optimizer global ones; the tied embedding is in both stages."""
    run = pipe_run()
    state = read(pipeline(tmp_path, run, dp, own_index=own_index))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert state.frozen == ["3.cold.weight"]
    assert {"dp": dp, "tp": 1, "pp": 2} == state.source["topology"]


def test_pipeline_with_tensor_parallel_ranks(tmp_path: Path) -> None:
    run = pipe_run()
    cuts = {
        "tied_modules.embed.weight": sub_cut(0, [[4, 3]]),
        "2.attn.qkv.weight": sub_cut(1, [[2, 2]]),
        "3.attn.qkv.weight": sub_cut(1, [[2, 2]]),
    }
    info = {
        "universal_checkpoint_version": 0.2,
        "parameter_with_row_parallelism_patterns": [r"\d+\.attn\.qkv\.weight"],
        "tp_replicated_parameter_patterns": [r"\d+\.bias", r"10\.weight", r"\d+\.cold"],
        "pipeline_replicated_parameter_patterns": [exact("tied_modules.embed.weight")],
    }
    state = read(pipeline(tmp_path, run, 2, tp=2, cuts=cuts, info=info))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups


def test_pipeline_without_a_layer_file_or_a_stage_is_refused(tmp_path: Path) -> None:
    """Layer numbers have holes by nature: only the optimizer knows that one is missing."""
    root = pipeline(tmp_path, pipe_run(), 2)
    layer = root / "global_step5" / "layer_03-model_states.pt"
    moved = layer.rename(layer.with_suffix(".away"))
    with pytest.raises(FormatError, match=r"weights of 3\.attn\.qkv\.weight, 3\.bias are in no file"):
        read(root)
    moved.rename(layer)
    with deepspeed_names():
        path = root / "global_step5" / "mp_rank_01_model_states.pt"
        values = torch.load(path, weights_only=False)
    save({**values, "buffer_names": ["4.count"]}, path)
    with pytest.raises(FormatError, match=r"the buffers 4\.count are in no layer_\*_model_states\.pt"):
        read(root)
    save(values, path)
    (root / "global_step5" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(FormatError, match=r"missing mp_rank_01_model_states\.pt.*2 pipeline stages"):
        read(root)


def moe_files(root: Path, run: Run, dp: int, ep: int, experts: int, *, dp_before_ep: bool = False) -> Path:
    """One MoE layer, ``experts`` in all. Groups: dense ones over all ranks, the last over the expert-data-parallel."""
    tag = root / "global_step5"
    base = "moe.deepspeed_moe.experts.deepspeed_experts"
    local = experts // ep
    dense = [name for group in run.groups[:-1] for name in group]
    members = [f"{base}.{j}.{part}" for j in range(local) for part in PARTS]
    values = run.common(dp=dp, num_experts=[experts])
    values["ds_config"] = {"use_data_before_expert_parallelism": dp_before_ep}
    values["module"] = OrderedDict({**{name: run.model[name] for name in dense}, **run.cold, **run.buffers})
    shapes = [OrderedDict((n, torch.Size(run.shapes[n])) for n in group) for group in run.groups[:-1]]
    values["param_shapes"] = [*shapes, OrderedDict((n, torch.Size(run.shapes[n])) for n in members)]
    save(values, tag / "mp_rank_00_model_states.pt")
    for e in range(experts):
        weights = {f"{base}.{e}.{part}": run.model[f"{base}.{e}.{part}"] for part in PARTS}
        save(weights, tag / f"layer_0_expert_{e}_mp_rank_00_model_states.pt")
    edp = dp // ep
    with deepspeed_names() as ds:
        for r in range(dp):
            ep_rank, edp_rank = (r // edp, r % edp) if dp_before_ep else (r % ep, r // ep)
            masters, states, pads = [], {}, []
            for g, group in enumerate(run.groups):
                is_moe = g == len(run.groups) - 1
                mine = range(ep_rank * local, (ep_rank + 1) * local)
                names = [f"{base}.{j}.{part}" for j in mine for part in PARTS] if is_moe else group
                world, rank = (edp, edp_rank) if is_moe else (dp, r)
                parts, padding, _ = flat_partitions([run.master[n] for n in names], world)
                pads.append(padding[rank])
                masters.append(parts[rank][: parts[rank].numel() - padding[rank]].clone())
                states[g] = {"step": run.steps[g]}
                for kind in run.kinds:
                    states[g][kind] = flat_partitions([run.states[kind][n] for n in names], world)[0][rank]
            inner = {
                "zero_stage": ds.ZeroStageEnum(2),
                "loss_scaler": ds.LossScaler(cur_scale=1.0),
                "base_optimizer_state": {
                    "state": states,
                    "param_groups": [{**hyper, "params": [g]} for g, hyper in enumerate(run.hyper)],
                },
                "single_partition_of_fp32_groups": masters,
                "group_paddings": pads,
                "partition_count": [dp] * (len(run.groups) - 1) + [edp],
            }
            save({"optimizer_state_dict": inner}, tag / f"{prefix_of(run)}zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
    (root / "latest").write_text("global_step5")
    return root


def moe_run(experts: int) -> Run:
    base = "moe.deepspeed_moe.experts.deepspeed_experts"
    dense = {"embed.weight": (7, 3), "moe.deepspeed_moe.gate.wg.weight": (experts, 3)}
    parts = {
        f"{base}.{e}.{part}": shape for e in range(experts) for part, shape in zip(PARTS, [(5, 3), (5,)], strict=True)
    }
    hyper: list[dict[str, Any]] = [{"lr": 0.1, "moe": False}, {"lr": 0.1, "moe": True, "name": "ep_size_2"}]
    return Run(dtype=torch.bfloat16, shapes={**dense, **parts}, groups=[list(dense), list(parts)], hyper=hyper)


@pytest.mark.parametrize(("dp", "ep", "experts"), [(4, 2, 4), (2, 2, 2), (6, 3, 6), (2, 1, 2), (4, 4, 4)])
@pytest.mark.parametrize("dp_before_ep", [False, True])
def test_experts_have_global_numbers(tmp_path: Path, dp: int, ep: int, experts: int, dp_before_ep: bool) -> None:
    """Every rank calls its experts 0 and 1; joined by name alone, half of the experts are lost and the rest mixed."""
    run = moe_run(experts)
    state = read(moe_files(tmp_path, run, dp, ep, experts, dp_before_ep=dp_before_ep))
    truth = run.truth()
    for group, step in zip(run.groups, run.steps, strict=True):
        truth.update({f"step/{name}": step for name in group})
    expect(state, truth)
    assert run.param_groups() == state.param_groups


def test_a_missing_expert_file_is_named(tmp_path: Path) -> None:
    root = moe_files(tmp_path, moe_run(4), 4, 2, 4)
    (root / "global_step5" / "layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FormatError, match=r"deepspeed_experts\.3\.fc1\.weight.*layer_\*_expert_3_mp_rank"):
        read(root)


def test_autoep_experts_become_one_tensor_again(tmp_path: Path) -> None:
    """AutoEP: [experts, ...] cut on its first dimension, the weights in one file per expert."""
    run = Run(
        dtype=torch.bfloat16,
        shapes={"embed.weight": (7, 3), "mlp.experts.w1": (4, 5, 3), "mlp.experts.w2": (4, 3, 5)},
        groups=[["embed.weight"], ["mlp.experts.w1", "mlp.experts.w2"]],
    )
    tag = tmp_path / "global_step5"
    dp, ep = 4, 2
    values = run.common(dp=dp, num_experts=[4])
    layer = {"expert_key_prefix": "mlp.experts", "num_experts": 4, "num_local_experts": 2, "ep_size": 2}
    values["ds_autoep_layers"] = [layer]
    values["module"] = OrderedDict({"embed.weight": run.model["embed.weight"], **run.cold, **run.buffers})
    local = OrderedDict((n, torch.Size((2, *run.shapes[n][1:]))) for n in run.groups[1])
    values["param_shapes"] = [OrderedDict({"embed.weight": torch.Size((7, 3))}), local]
    save(values, tag / "mp_rank_00_model_states.pt")
    for e in range(4):
        weights = {f"{name}.{e}": run.model[name][e].clone() for name in run.groups[1]}
        save(weights, tag / f"layer_0_expert_{e}_mp_rank_00_model_states.pt")
    with deepspeed_names() as ds:
        for r in range(dp):
            inner: dict[str, Any] = {
                "zero_stage": ds.ZeroStageEnum(2),
                "single_partition_of_fp32_groups": [],
                "group_paddings": [],
                "partition_count": [dp, dp // ep],
            }
            states: dict[int, Any] = {}
            for g, names in enumerate(run.groups):
                cut = lambda t, g=g, r=r: t if g == 0 else t[2 * (r % ep) : 2 * (r % ep) + 2]  # noqa: E731
                world, rank = (dp, r) if g == 0 else (dp // ep, r // ep)
                parts, pads, _ = flat_partitions([cut(run.master[n]) for n in names], world)
                inner["single_partition_of_fp32_groups"].append(parts[rank][: parts[rank].numel() - pads[rank]].clone())
                inner["group_paddings"].append(pads[rank])
                states[g] = {"step": run.steps[g]}
                for kind in run.kinds:
                    states[g][kind] = flat_partitions([cut(run.states[kind][n]) for n in names], world)[0][rank]
            groups = [{**hyper, "params": [g]} for g, hyper in enumerate(run.hyper)]
            inner["base_optimizer_state"] = {"state": states, "param_groups": groups}
            save({"optimizer_state_dict": inner}, tag / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
    state = read(tag)
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups


def test_pipeline_in_bf16_without_zero(tmp_path: Path) -> None:
    """BF16_Optimizer's files without param_shapes: names are in the slices, shapes in the layer files."""
    run = pipe_run()
    root = pipeline(tmp_path, run, 3, bf16_optimizer=True)
    tag = root / "global_step5"
    for s in range(2):
        with deepspeed_names():
            path = tag / f"mp_rank_{s:02d}_model_states.pt"
            values = torch.load(path, weights_only=False)
            optim = torch.load(tag / f"bf16_zero_pp_rank_0_mp_rank_{s:02d}_optim_states.pt", weights_only=False)
            values.update(param_shapes=None, shared_params=None, optimizer=optim["optimizer_state_dict"])
            save(values, path)
    state = read(root)
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert state.source["zero_stage"] == 0
