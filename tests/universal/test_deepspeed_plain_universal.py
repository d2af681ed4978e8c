"""DeepSpeed without ZeRO, whose optimizer has numbers for names, and folders of DeepSpeed Universal."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.errors import FormatError
from snapshotd.universal.readers import read
from tests.universal.test_deepspeed_make import Run, deepspeed_names, expect, finish, save


def plain(root: Path, run: Run, how: str, **more: Any) -> Path:
    """Stage 0: torch's dict (fp32), FP16_UnfusedOptimizer, or FP16_Optimizer with flat groups."""
    values = run.common(dp=2, param_shapes=None, shared_params=None, **more)
    values["module"] = run.module()
    state: dict[int, Any] = {}
    groups: list[Any] = []
    if how == "fused":
        for g, names in enumerate(run.groups):
            flat = lambda tensors, names=names: torch.cat([tensors[n].reshape(-1) for n in names])  # noqa: E731
            state[g] = {"step": run.steps[g], **{kind: flat(tensors) for kind, tensors in run.states.items()}}
            groups.append({**run.hyper[g], "params": [g]})
        masters: Any = [torch.cat([run.master[n].reshape(-1) for n in names]) for names in run.groups]
    else:
        for g, names in enumerate(run.groups):
            ids = list(range(len(state), len(state) + len(names)))
            for key, name in zip(ids, names, strict=True):
                state[key] = {"step": run.steps[g], **{kind: t[name] for kind, t in run.states.items()}}
            groups.append({**run.hyper[g], "params": ids})
        masters = [[run.master[n] for n in names] for names in run.groups]
    inner = {"state": state, "param_groups": groups}
    if how == "torch":
        values["optimizer"] = inner
    else:
        values["optimizer"] = {
            "dynamic_loss_scale": True,
            "cur_scale": 65536.0,
            "cur_iter": 5,
            "optimizer_state_dict": inner,
            ("fp32_groups_flat" if how == "fused" else "fp32_groups"): masters,
        }
    save(values, root / "global_step5" / "mp_rank_00_model_states.pt")
    return finish(root)


@pytest.mark.parametrize("how", ["unfused", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_without_zero_finds_each_masters_weight(tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    """Masters are numbered over groups, weights are in the model's order, and frozen ones lie between."""
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3), "b.bias": (4,), "c.weight": (4, 3)}
    groups = [["c.weight", "a.weight", "b.weight"], ["b.bias", "a.bias"]]  # not the model's order
    run = Run(dtype=dtype, shapes=shapes, groups=groups, frozen={"pos.weight": (4, 3)})
    state = read(plain(tmp_path, run, how))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert state.frozen == ["pos.weight"]
    assert state.extra["deepspeed"]["cur_scale"] == 65536.0


@pytest.mark.parametrize("how", ["unfused", "fused", "torch"])
def test_parameter_without_elements_and_without_zero(tmp_path: Path, how: str) -> None:
    """torch's optimizer has it in its group, those of DeepSpeed for 16 bits leave it out."""
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3)}
    if how == "torch":
        run = Run(shapes={**shapes, "nothing": (0, 3)}, groups=[["b.weight", "nothing"], [*shapes][:2]], frozen={})
    else:
        run = Run(dtype=torch.bfloat16, shapes=shapes, groups=[["b.weight", "a.weight"], ["a.bias"]])
        run.cold = {"nothing": torch.empty((0, 3), dtype=torch.bfloat16)}
    state = read(plain(tmp_path, run, how))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert state.frozen == []
    assert (how != "torch") == any("nothing without elements" in line for line in state.warnings)


def test_norms_of_ones_are_told_apart_by_order(tmp_path: Path) -> None:
    shapes = {"n1.weight": (4,), "gain": (1,), "n2.weight": (4,), "n3.weight": (4,), "last": (2,)}
    names = ["n1.weight", "gain", "n2.weight", "n3.weight"]
    run = Run(dtype=torch.bfloat16, shapes=shapes, groups=[names, ["last"]], frozen={})
    for name in names:
        run.master[name] = torch.ones(shapes[name])
        run.model[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
    for how in ("unfused", "fused"):
        expect(read(plain(tmp_path / how, run, how)), run.truth())


def test_fp32_without_zero_is_named_by_order_and_shape(tmp_path: Path) -> None:
    shapes = {"embed.weight": (7, 3), "a.bias": (4,), "a.weight": (4, 3), "head.weight": (7, 3)}
    run = Run(shapes=shapes, tied={"x": "embed.weight"})
    state = read(plain(tmp_path, run, "torch"))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert run.tied == state.tied


def test_master_that_is_of_no_weight_is_refused(tmp_path: Path) -> None:
    run = Run(dtype=torch.bfloat16)
    run.master["embed.weight"] = run.master["embed.weight"] + 1
    with pytest.raises(FormatError, match="rounds to none of the model's weights"):
        read(plain(tmp_path, run, "unfused"))


def test_model_without_optimizer(tmp_path: Path) -> None:
    run = Run(dtype=torch.bfloat16, kinds=())
    values = run.common(dp=1, param_shapes=None)
    values["module"] = run.module()
    save(values, tmp_path / "global_step5" / "mp_rank_00_model_states.pt")
    state = read(tmp_path)
    assert state.param_groups == []
    assert set(run.shapes) | set(run.frozen) == set(state.of_kind("model"))


def universal(root: Path, run: Run, *, stage: int, dp: int = 2, step: bool = True) -> Path:
    """What ds_to_universal writes: dicts with shapes for stage 1 and 2, flat vectors for stage 3."""
    tag = root / "global_step5_universal"
    with deepspeed_names() as ds:
        for r in range(dp if stage == 3 else 1):
            values = run.common(dp=dp)
            values["module"] = run.module()
            values["param_shapes"] = [OrderedDict((n, torch.Size(run.shapes[n])) for n in g) for g in run.groups]
            name = "mp_rank_00_model_states.pt"
            if stage == 3:
                values["module"] = OrderedDict({n: torch.empty(0, dtype=run.dtype) for n in (*run.model, *run.cold)})
                values["module"].update(run.buffers)
                values["frozen_param_shapes"] = OrderedDict((n, t.shape) for n, t in run.cold.items())
                values["frozen_param_fragments"] = OrderedDict(
                    (n, torch.cat([t.reshape(-1), t.new_zeros(-t.numel() % dp)]).chunk(dp)[r].clone())
                    for n, t in run.cold.items()
                )
                name = f"zero_pp_rank_{r}_mp_rank_00_model_states.pt"
            save(values, tag / name)
        for g, names in enumerate(run.groups):
            for name in names:
                for kind, tensors in (("fp32", run.master), *run.states.items()):
                    tensor = tensors[name].clone()
                    value = tensor.reshape(-1) if stage == 3 else {"cat_dim": 0, "param": tensor}
                    save(value, tag / "zero" / name / f"{kind}.pt")
                if step and stage < 3:
                    save(run.steps[g], tag / "zero" / name / "step.pt")
        groups = [{**hyper, "params": [g]} for g, hyper in enumerate(run.hyper)]
        common: dict[str, Any] = {
            "zero_stage": ds.ZeroStageEnum(stage),
            "loss_scaler": ds.LossScaler(cur_scale=2.0),
            "ds_version": "0.19.8",
            "param_groups": groups,
        }
        if stage == 3:
            states = {g: {"step": step, "exp_avg": torch.zeros(9)} for g, step in enumerate(run.steps)}
            common["optimizer_state_dict"] = {"state": states, "param_groups": groups}
            common["fp32_flat_groups"] = [torch.zeros(9)]
        save(common, tag / "zero" / "optimizer_state.pt")
    (root / "latest_universal").write_text(tag.name)
    return root


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_universal_folder_of_each_stage(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    run = Run(dtype=dtype, kinds=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), tied={"head": "embed.weight"})
    state = read(universal(tmp_path, run, stage=stage))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert run.tied == state.tied
    assert list(run.frozen) == state.frozen
    assert state.source["universal"]
    assert state.extra["loss_scaler"]["fields"]["cur_scale"] == 2.0


def test_universal_steps_as_integers_or_in_the_group(tmp_path: Path) -> None:
    run = Run(steps=(4, 4))
    expect(read(universal(tmp_path / "int", run, stage=2)), run.truth())
    run = Run(steps=(None, None), hyper=[{"lr": 1.0, "step": 4}, {"lr": 2.0, "step": 4}])
    state = read(universal(tmp_path / "group", run, stage=2, step=False))
    expect(state, run.truth())
    assert [group["step"] for group in state.param_groups] == [4, 4]


def test_universal_folder_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """ds_to_universal that died in the middle leaves a folder that looks like one."""
    import shutil

    run = Run()
    for i, (name, message) in enumerate(
        [
            ("zero/embed.weight", "folders of embed.weight are missing, expected one for each of the 8"),
            ("zero/optimizer_state.pt", "optimizer_state.pt is missing"),
            ("zero/embed.weight/fp32.pt", "has no fp32.pt"),
        ]
    ):
        root = universal(tmp_path / str(i), run, stage=2)
        path = root / "global_step5_universal" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(FormatError, match=message):
            read(root)
    root = universal(tmp_path / "left", run, stage=1)
    save({"param": torch.zeros(1)}, root / "global_step5_universal" / "zero" / "other.weight" / "fp32.pt")
    with pytest.raises(FormatError, match="other.weight: left over"):
        read(root)
    root = universal(tmp_path / "shape", run, stage=3)
    save(torch.zeros(5), root / "global_step5_universal" / "zero" / "embed.weight" / "fp32.pt")
    with pytest.raises(FormatError, match=r"has 5 elements, but param_shapes says \[7, 3\]"):
        read(root)
