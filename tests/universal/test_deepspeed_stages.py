"""Optimizers without ZeRO of pipeline stages and expert ranks: numbers in the place of names, parts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.errors import FormatError
from snapshotd.universal.readers import read
from snapshotd.universal.readers.deepspeed_extra import plain_groups
from snapshotd.universal.readers.deepspeed_zero import Group, Optim
from snapshotd.universal.state import State
from tests.universal.test_deepspeed_make import Run, deepspeed_names, expect, save
from tests.universal.test_deepspeed_pipe_moe import PARTS, STAGES, moe_files, moe_run, pipe_run, pipeline


def optimizer_of(run: Run, groups: list[list[str]]) -> dict[str, Any]:
    """What DeepSpeed saves without ZeRO: torch's state dict, and in 16 bit a master for each parameter."""
    states: dict[int, Any] = {}
    listed = []
    for names, hyper, step in zip(groups, run.hyper, run.steps, strict=True):
        listed.append({**hyper, "params": list(range(len(states), len(states) + len(names)))})
        for name in names:
            states[len(states)] = {"step": step, **{kind: tensors[name] for kind, tensors in run.states.items()}}
    inner = {"state": states, "param_groups": listed}
    if run.dtype == torch.float32:
        return inner
    masters = [[run.master[name] for name in names] for names in groups]
    return {"optimizer_state_dict": inner, "fp32_groups": masters, "cur_scale": 1.0, "dynamic_loss_scale": False}


def without_zero(root: Path, optimizers: dict[str, Any]) -> Path:
    """Turn a run with ZeRO into one without; ``optimizers`` by the name of the file that has them."""
    tag = root / "global_step5"
    for path in tag.glob("*zero_pp_rank_*_optim_states.pt"):
        path.unlink()
    for path in tag.glob("mp_rank_*_model_states.pt"):
        with deepspeed_names():
            values = torch.load(path, weights_only=False)
        values.update(param_shapes=None, shared_params=None, optimizer=optimizers.get(path.name))
        save(values, path)
    for name, optimizer in optimizers.items():
        if name.startswith("expp"):
            save({"optimizer": optimizer}, tag / name)
    return root


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dp", [1, 2])
def test_stages_get_their_layers_by_order_and_shape(tmp_path: Path, dtype: torch.dtype, dp: int) -> None:
    """The stages' numbers both begin at 0: a wrong deal gives layer 3 the moments of layer 2, which have its shapes."""
    run = pipe_run(dtype)
    optimizers = {
        f"mp_rank_{s:02d}_model_states.pt": optimizer_of(run, [[n for n in g if n in STAGES[s]] for g in run.groups])
        for s in range(2)
    }
    state = read(without_zero(pipeline(tmp_path, run, dp), optimizers))
    local = lambda name: name.replace("tied_modules.embed.", "0.")  # noqa: E731 its key is in no file
    expect(state, {local(key): tensor for key, tensor in run.truth().items()})
    groups = [{**group, "names": list(map(local, group["names"]))} for group in run.param_groups()]
    assert groups == state.param_groups
    assert state.frozen == ["3.cold.weight"]
    assert state.source["zero_stage"] == 0


def test_stages_that_fit_no_layers_are_refused(tmp_path: Path) -> None:
    run = pipe_run(torch.float32)
    two = [[n for n in group if n in STAGES[1]] for group in run.groups]
    optimizers = {f"mp_rank_{s:02d}_model_states.pt": optimizer_of(run, two) for s in range(2)}
    with pytest.raises(FormatError, match=r"do not fit the weights in the layer files"):
        read(without_zero(pipeline(tmp_path, run, 1), optimizers))


def expert_optimizers(run: Run, ep: int, experts: int) -> dict[str, Any]:
    base = "moe.deepspeed_moe.experts.deepspeed_experts"
    local = experts // ep
    return {
        f"expp_rank_{e}_mp_rank_00_optim_states.pt": optimizer_of(
            run, [run.groups[0], [f"{base}.{j}.{part}" for j in range(e * local, (e + 1) * local) for part in PARTS]]
        )
        for e in range(ep)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("dp", "ep"), [(2, 2), (4, 4), (4, 2)])
def test_each_expert_rank_has_its_experts(tmp_path: Path, dtype: torch.dtype, dp: int, ep: int) -> None:
    """All files have the same numbers for other experts, and the same dense parameters."""
    run = moe_run(4)
    run.dtype = dtype
    run.__post_init__()
    run.steps = (run.steps[0], run.steps[0])
    state = read(without_zero(moe_files(tmp_path, run, dp, ep, 4), expert_optimizers(run, ep, 4)))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups


def test_expert_ranks_that_are_missing_or_of_another_step_are_refused(tmp_path: Path) -> None:
    run = moe_run(4)
    files = expert_optimizers(run, 4, 4)
    missing = dict(files)
    del missing["expp_rank_2_mp_rank_00_optim_states.pt"]
    with pytest.raises(FormatError, match=r"missing expp_rank_2_mp_rank_00_optim_states\.pt"):
        read(without_zero(moe_files(tmp_path / "a", run, 4, 4, 4), missing))
    with pytest.raises(FormatError, match=r"no optimizer has .*deepspeed_experts\.2\..*one expp_rank_\*_optim_states"):
        alone = {
            "expp_rank_0_mp_rank_00_optim_states.pt": expert_optimizers(run, 2, 4)[
                "expp_rank_0_mp_rank_00_optim_states.pt"
            ],
        }
        alone["mp_rank_00_model_states.pt"] = alone["expp_rank_0_mp_rank_00_optim_states.pt"]
        read(without_zero(moe_files(tmp_path / "d", run, 2, 2, 4), alone))
    del files["expp_rank_3_mp_rank_00_optim_states.pt"]
    with pytest.raises(FormatError, match=r"files of 3 expert-parallel ranks, but 4 experts"):
        read(without_zero(moe_files(tmp_path / "b", run, 4, 4, 4), files))
    files = expert_optimizers(run, 2, 4)
    run.steps = tuple(step + 1 for step in run.steps)
    files["expp_rank_1_mp_rank_00_optim_states.pt"] = expert_optimizers(run, 2, 4)[
        "expp_rank_1_mp_rank_00_optim_states.pt"
    ]
    with pytest.raises(FormatError, match=r"expp_rank_1_mp_rank_00_optim_states\.pt is of step"):
        read(without_zero(moe_files(tmp_path / "c", run, 4, 2, 4), files))


def test_groups_that_are_alike_stay_apart_on_every_stage() -> None:
    """Two groups under one learning rate are two: a schedule may part them again, and loaders count them."""

    def stage(*groups: tuple[list[str], float]) -> Optim:
        optim = Optim()
        optim.groups = [Group(names, {"lr": lr}) for names, lr in groups]
        return optim

    stages = [stage((["a"], 1.0), (["b"], 0.1), (["c"], 0.1)), stage((["d"], 0.1), (["e"], 0.1), (["f"], 0.5))]
    found = plain_groups(Path("run"), stages, State(format="deepspeed", tensors=[]))
    assert [(["a"], 1.0), (["b", "d"], 0.1), (["c", "e"], 0.1), (["f"], 0.5)] == [
        (group["names"], group["lr"]) for group in found
    ]
