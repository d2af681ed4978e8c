"""The DeepSpeed Universal folder that we write: what DeepSpeed's loader wants of it, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.errors import UsageError
from snapshotd.universal import Settings, convert
from snapshotd.universal.readers import detect, read
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.views import stored_bytes
from snapshotd.universal.writers import deepspeed as writer
from tests.universal.test_deepspeed_fixtures import CASES, FIXTURES
from tests.universal.test_deepspeed_make import Run, contents, deepspeed_names, zero12


def same(one: State, other: State) -> None:
    assert contents(one) == contents(other)
    for field in ("step", "param_groups", "tied", "frozen", "extra"):
        assert getattr(one, field) == getattr(other, field), field


def load(path: Path) -> Any:
    with deepspeed_names():
        return torch.load(path, weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_the_identity(case: str, tmp_path: Path) -> None:
    source = read(FIXTURES / case / "ckpt")
    convert(FIXTURES / case / "ckpt", tmp_path / "out", to="deepspeed", settings=Settings())
    assert detect(tmp_path / "out") == "deepspeed"
    same(source, read(tmp_path / "out"))


def test_what_the_loader_of_deepspeed_wants(tmp_path: Path) -> None:
    """Stage 1 and 2 read dicts with shapes and param_groups, stage 3 a step by sub-group; all want ds_version."""
    run = Run(dtype=torch.float16, tied={"head": "embed.weight"})
    convert(zero12(tmp_path / "in", run, 2), tmp_path / "out", to="deepspeed", settings=Settings())
    tag = tmp_path / "out" / (tmp_path / "out" / "latest_universal").read_text()
    assert tag.name == "global_step5_universal"
    for name in run.shapes:
        files = {path.name for path in (tag / "zero" / name).iterdir()}
        assert {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"} == files
        assert torch.equal(run.master[name], load(tag / "zero" / name / "fp32.pt")["param"])
        assert torch.equal(run.states["exp_avg"][name], load(tag / "zero" / name / "exp_avg.pt")["param"])
    assert torch.tensor(3.0) == load(tag / "zero" / "temperature" / "step.pt")
    common = load(tag / "zero" / "optimizer_state.pt")
    assert [group["lr"] for group in common["param_groups"]] == [0.001, 0.002]
    assert (common["param_groups"][0]["betas"], common["param_groups"][0]["params"]) == ((0.9, 0.95), [0])
    assert torch.tensor(4.0) == common["optimizer_state_dict"]["state"][0]["step"]
    assert type(common["loss_scaler"]).__name__ == "DynamicLossScaler"
    assert common["loss_scaler"].cur_scale == 256.0
    assert common["ds_version"] == "0.19.8"
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        model = load(tag / name)
        assert model["lr_scheduler"] == {"last_batch_iteration": 3}
        assert (model["global_steps"], model["skipped_steps"], model["global_samples"]) == (5, 1, 60)
        assert [list(names) for names in run.groups] == [list(group) for group in model["param_shapes"]]
        assert torch.Size([7, 3]) == model["param_shapes"][0]["embed.weight"]
        assert torch.equal(run.rng, model["torch_rng"])
        assert model["iteration"] == 5
    assert torch.equal(run.model["embed.weight"], load(tag / "mp_rank_00_model_states.pt")["module"]["head"])


def state_of(**more: Any) -> State:
    weight = stored_bytes(torch.arange(6.0).to(torch.bfloat16).view(torch.uint8).numpy().tobytes(), "bfloat16", (2, 3))
    moment = stored_bytes(torch.arange(6.0).numpy().tobytes(), "float32", (2, 3))
    tensors = [Tensor("model", "a", weight), Tensor("model", "b", weight), Tensor("exp_avg", "a", moment)]
    return State(format="test", tensors=tensors, **more)


def test_weights_without_masters_and_groups(tmp_path: Path) -> None:
    """From Hugging Face: DeepSpeed needs masters and one group; the way back has neither."""
    state = state_of(step=None)
    assert (
        writer.losses(state)
    ) == ["there are no parameter groups: all parameters are put into one without hyperparameters"]
    writer.write(state, tmp_path, Settings(), identity="x", options={"layout": {}})
    tag = tmp_path / "global_step0_universal"
    assert torch.equal(torch.arange(6.0).reshape(2, 3), load(tag / "zero" / "b" / "fp32.pt")["param"])
    same(state, read(tmp_path))


def test_what_deepspeed_cannot_load_is_told_and_kept(tmp_path: Path) -> None:
    state = state_of(step=7, param_groups=[{"names": ["a", "b"], "lr": 0.1}])
    state.tensors += [
        Tensor("step", "a", scalar(3, "int64")),
        Tensor("step", "b", scalar(4, "int64")),
        Tensor("d", "a", scalar(0.5, "float32")),
        Tensor("rng", "0/cuda:0", stored_bytes(b"\1\2", "uint8", (2,))),
        Tensor("extra", "loader.order", stored_bytes(b"\1\2", "uint8", (2,))),
    ]
    state.extra = {"loader": {"order": {"$tensor": "loader.order"}}, "nan": {"$float": "nan"}}
    lines = writer.losses(state)
    assert any("will not load: d" in line for line in lines)
    assert any("steps from 3 to 4" in line for line in lines)
    writer.write(state, tmp_path, Settings(), identity="x", options={"layout": {}})
    same(state, read(tmp_path))


def test_round_robin_gradients_are_a_warning(tmp_path: Path) -> None:
    """DeepSpeed's loader takes the places that parameters had before they were dealt out to the ranks."""
    warned = []
    for dealt in (False, True):
        source = zero12(tmp_path / f"in{dealt}", Run(dtype=torch.bfloat16), 2, round_robin=dealt)
        lines = convert(source, tmp_path / f"out{dealt}", to="deepspeed").warnings
        warned.append(any("load it with round_robin_gradients false" in line for line in lines))
    assert warned == [False, True]


def test_what_deepspeeds_own_loader_leaves_alone_is_a_warning(tmp_path: Path) -> None:
    """Stage 3 would give all groups the weight decay of the first, in silence; now it finds none to give."""
    run = Run(dtype=torch.float16)
    report = convert(zero12(tmp_path / "in", run, 2), tmp_path / "out", to="deepspeed", strict=True)
    assert report.lost == []
    parts = (
        "no buffers: rope, seen, mask must",
        "no frozen parameters: pos.weight, pos.bias must",
        "no hyperparameters by group: betas, lr, weight_decay stay",
        "one tensor the step of all 2 groups",
    )
    assert [True] * 4 == [part in line for part, line in zip(parts, report.warnings, strict=True)]
    tag = tmp_path / "out" / "global_step5_universal"
    common = load(tag / "zero" / "optimizer_state.pt")
    assert [{"eps": 1e-8, "fused": None, "params": [g]} for g in range(2)] == (
        common["optimizer_state_dict"]["param_groups"]
    )
    assert [0.0, 0.1] == [group["weight_decay"] for group in common["param_groups"]]


def test_optimizers_that_stage_3_cannot_load_are_told(tmp_path: Path) -> None:
    """Its loader asks for exp_avg and exp_avg_sq by name, whatever the optimizer is."""
    run = Run(kinds=("momentum_buffer",), frozen={})
    lines = convert(zero12(tmp_path / "in", run, 1), tmp_path / "out", to="deepspeed").warnings
    assert any("loads exp_avg and exp_avg_sq alone" in line and "momentum_buffer" in line for line in lines)


def test_more_files_than_descriptors_at_once(tmp_path: Path) -> None:
    """A model of a thousand parameters has four thousand files; a process may have 1024 open."""
    import resource

    run = Run(shapes={f"p{i}.weight": (2,) for i in range(300)}, frozen={})
    run.groups, run.hyper, run.steps = [run.groups[1]], run.hyper[:1], run.steps[:1]
    source = zero12(tmp_path / "in", run, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    done: list[tuple[int, int]] = []
    try:
        settings = Settings(progress=lambda now, total: done.append((now, total)))
        convert(source, tmp_path / "out", to="deepspeed", settings=settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert done[-1][0] == done[-1][1]
    assert done == sorted(done)
    same(read(source), read(tmp_path / "out"))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    run = Run()
    source = zero12(tmp_path / "in", run, 1)

    class Stop(Exception):
        pass

    def stop(now: int, total: int) -> None:
        if now > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert(source, tmp_path / "out", to="deepspeed", settings=Settings(progress=stop))
    assert not (tmp_path / "out" / "latest_universal").exists()
    convert(source, tmp_path / "out", to="deepspeed", settings=Settings(resume=True))
    same(read(source), read(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["global_step5_universal", "latest_universal"]


def test_a_layout_and_names_that_are_no_folders_are_refused(tmp_path: Path) -> None:
    state = state_of()
    with pytest.raises(UsageError, match="has no layout"):
        writer.write(state, tmp_path, Settings(), identity="x", options={"layout": {"tp": 2}})
    state.tensors.append(Tensor("model", "a/b", state.tensors[0].view))
    with pytest.raises(UsageError, match="can not be the name of a folder"):
        writer.write(state, tmp_path, Settings(), identity="x", options={"layout": {}})
