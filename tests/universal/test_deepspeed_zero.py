"""Every option of ZeRO that changes where elements lie, against files that are laid out by the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from tests.universal.test_deepspeed_make import Run, expect, zero3, zero12

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("stage", "dp", "dtype"),
    [(1, 1, DTYPES[0]), (1, 2, DTYPES[0]), (2, 3, DTYPES[1]), (1, 5, DTYPES[2]), (2, 16, DTYPES[0])],
)
def test_stage_1_and_2_at_any_world_size(tmp_path: Path, stage: int, dp: int, dtype: torch.dtype) -> None:
    """A parameter begins in one rank's file and ends two files later; trailing ranks hold padding only."""
    run = Run(dtype=dtype, seed=dp)
    state = read(zero12(tmp_path, run, dp, stage=stage))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert list(run.frozen) == state.frozen
    assert (dp, stage) == (state.source["topology"]["dp"], state.source["zero_stage"])


@pytest.mark.parametrize(
    ("sub_group_size", "dp", "dtype"),
    [
        *((10**9, 1, DTYPES[0]), (6, 2, DTYPES[0]), (10**9, 3, DTYPES[1])),
        *((6, 5, DTYPES[2]), (1, 3, DTYPES[0]), (1, 16, DTYPES[1])),
    ],
)
def test_stage_3_at_any_world_size_and_sub_group_size(
    tmp_path: Path, sub_group_size: int, dp: int, dtype: torch.dtype
) -> None:
    """Sub-groups and groups are counted apart; a one-element parameter takes one element on every rank."""
    run = Run(dtype=dtype, seed=dp, frozen={"pos.weight": (5, 3), "pos.bias": (7,), "pos.one": (1,)})
    state = read(zero3(tmp_path, run, dp, sub_group_size=sub_group_size))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert list(run.frozen) == state.frozen


@pytest.mark.parametrize(
    "options",
    [
        {"elastic": True},
        {"bf16_optimizer": True},
        {"round_robin": True},
        {"alignment": 4},
        {"alignment": 4, "round_robin": True},
        {"alignment": 8, "elastic": True},
        {"old": True},
        {"old": True, "round_robin": True},
        {"elastic": True, "round_robin": True},
    ],
)
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_options_that_move_elements(tmp_path: Path, dp: int, options: dict[str, Any]) -> None:
    """Padding stripped or not, order shuffled, holes between parameters: one slip and all that follows is shifted."""
    run = Run(dtype=torch.bfloat16, seed=dp)
    state = read(zero12(tmp_path, run, dp, **options))
    expect(state, run.truth())
    names = [group["names"] for group in state.param_groups]
    assert run.groups == names
    if options.get("elastic"):
        assert list(state.param_groups[0]) == ["names"]
        assert any("hyperparameters" in line for line in state.warnings)
    else:
        assert run.param_groups() == state.param_groups


@pytest.mark.parametrize("dp", [2, 3])
def test_tied_weight_is_there_once_with_its_alias(tmp_path: Path, dp: int) -> None:
    """A tied head that comes apart trains on as two weights."""
    run = Run(dtype=torch.bfloat16, tied={"lm_head.weight": "embed.weight"})
    for name, make in (("one", zero12), ("three", zero3)):
        state = read(make(tmp_path / name, run, dp))
        expect(state, run.truth())
        assert run.tied == state.tied


@pytest.mark.parametrize("how", ["zero1", "zero2", "zero3"])
def test_frozen_parameters_that_were_left_out(tmp_path: Path, how: str) -> None:
    """exclude_frozen_parameters: what is not in the checkpoint must not be invented, nor stop the rest."""
    run = Run(dtype=torch.bfloat16)
    if how == "zero3":
        path = zero3(tmp_path, run, 2, exclude_frozen=True)
    else:
        path = zero12(tmp_path, run, 2, stage=int(how[-1]), exclude_frozen=True)
    run.cold = {}
    state = read(path)
    expect(state, run.truth())
    assert state.frozen == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameter_without_elements(tmp_path: Path, stage: int) -> None:
    """DeepSpeed leaves it out of its optimizer, and lists it with the frozen ones if it lists those."""
    run = Run(dtype=torch.bfloat16, frozen={"pos.weight": (5, 3), "nothing": (0, 3)})
    path = zero3(tmp_path / "in", run, 2) if stage == 3 else zero12(tmp_path / "in", run, 2, stage=stage)
    state = read(path)
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert state.frozen == ["pos.weight"]
    (line,) = [line for line in state.warnings if "nothing" in line]
    assert line == "nothing without elements: no file says whether trained, in which parameter group, or frozen"
    convert(path, tmp_path / "universal", to="universal")
    convert(tmp_path / "universal", tmp_path / "out", to="deepspeed")
    assert diff(state, read(tmp_path / "out")) == []


def test_parameter_without_elements_in_the_optimizer(tmp_path: Path) -> None:
    """Older DeepSpeed lists it in its group."""
    run = Run(dtype=torch.bfloat16, shapes={"a": (4, 3), "nothing": (0, 3), "b": (5,)}, groups=[["a", "nothing", "b"]])
    for name, make in (("one", zero12), ("three", zero3)):
        state = read(make(tmp_path / name, run, 2))
        expect(state, run.truth())
        assert run.param_groups() == state.param_groups
        assert list(run.frozen) == state.frozen


def test_fused_adam_keeps_its_stale_step_in_the_group_and_the_true_one_per_parameter(tmp_path: Path) -> None:
    """The group's step stays 0 for ever; taking it would repeat the bias correction of the first steps."""
    hyper = [{"lr": 0.1, "step": 0}, {"lr": 0.2, "step": 0}]
    run = Run(steps=(4, 4), hyper=hyper)
    state = read(zero12(tmp_path / "rigid", run, 2))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    state = read(zero12(tmp_path / "elastic", run, 2, elastic=True))
    expect(state, run.truth())
    assert [group["step"] for group in state.param_groups] == [0, 0]


def test_step_in_the_group_alone(tmp_path: Path) -> None:
    """apex and Transformer Engine keep the step in the group only."""
    run = Run(steps=(None, None), hyper=[{"lr": 0.1, "step": 7}, {"lr": 0.2, "step": 7}])
    for elastic in (False, True):
        state = read(zero12(tmp_path / str(elastic), run, 2, step_in="group", elastic=elastic))
        expect(state, {key: value for key, value in run.truth().items() if not key.startswith("step/")})
        assert [group["step"] for group in state.param_groups] == [7, 7]


@pytest.mark.parametrize(
    "kinds", [("exp_avg",), ("momentum_buffer",), ("sum",), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ()]
)
def test_states_are_called_what_the_optimizer_calls_them(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Lion, SGD, Adagrad, AMSGrad: tools that know Adam's names only lose the rest."""
    run = Run(dtype=torch.bfloat16, kinds=kinds)
    expect(read(zero12(tmp_path / "one", run, 3)), run.truth())
    expect(read(zero3(tmp_path / "three", run, 3)), run.truth())


def test_state_without_an_element_per_parameter_is_kept(tmp_path: Path) -> None:
    """1-bit optimizers have error buffers of their own sizes, others a number per group: nothing is dropped."""
    run = Run(dtype=torch.bfloat16)
    more = {"worker_error": torch.arange(3.0), "d": 0.25, "unused": None}
    state = read(zero12(tmp_path, run, 2, extra_states=more))
    state.check()
    numbers = [tensor for tensor in state.tensors if tensor.kind == "d"]
    assert len(run.shapes) == len(numbers)
    kept = [tensor.name for tensor in state.tensors if tensor.kind == "extra"]
    assert len([name for name in kept if "worker_error" in name]) == 4
    assert any("worker_error" in line for line in state.warnings)


def test_scaler_scheduler_counters_client_state_and_generators(tmp_path: Path) -> None:
    """fp16: skipped steps are counted apart, and the scaler's state is in every optimizer file."""
    run = Run(dtype=torch.float16)
    state = read(zero3(tmp_path / "three", run, 3))
    assert state.step == 5
    assert tuple(state.extra[key] for key in ("global_steps", "global_samples", "skipped_steps")) == (5, 60, 1)
    assert state.extra["lr_scheduler"] == {"last_batch_iteration": 3}
    client = {"iteration": 5, "consumed": {"epoch": 0, "order": [2, 0, 1], "ratio": {"$float": "nan"}}}
    assert client == state.extra["client_state"]
    assert "client_state_of_ranks" not in state.extra
    assert sorted(tensor.name for tensor in state.tensors if tensor.kind == "rng") == ["0", "1", "2"]
    state = read(zero12(tmp_path / "one", run, 3))
    scaler = state.extra["loss_scaler"]
    assert scaler["$object"] == "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"
    assert scaler["fields"] == {"cur_scale": 256.0, "cur_iter": 5, "last_overflow_iter": 0, "dynamic": True}


def test_more_ranks_than_text_can_sort(tmp_path: Path) -> None:
    """Rank 10 comes before rank 2 as text."""
    run = Run(dtype=torch.bfloat16, shapes={"a": (41, 3), "b": (17,)})
    expect(read(zero12(tmp_path / "one", run, 12)), run.truth())
    expect(read(zero3(tmp_path / "three", run, 12)), run.truth())


def test_random_models(tmp_path: Path) -> None:
    """The formulas hold for any shapes, groups and world sizes."""
    import random

    for seed in range(25):
        draw = random.Random(seed)
        shapes = {
            f"p{i}.weight": tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 3)))
            for i in range(draw.randint(1, 12))
        }
        names = list(shapes)
        draw.shuffle(names)
        cuts = sorted(draw.sample(range(1, len(names)), min(len(names) - 1, draw.randint(0, 2))))
        groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
        run = Run(dtype=draw.choice(DTYPES), shapes=shapes, groups=groups, seed=seed)
        dp = draw.randint(1, 7)
        one = zero12(
            tmp_path / f"one{seed}",
            run,
            dp,
            elastic=draw.random() < 0.3,
            round_robin=draw.random() < 0.4,
            alignment=draw.choice([1, 1, 4, 6]),
        )
        expect(read(one), run.truth())
        expect(read(zero3(tmp_path / f"three{seed}", run, dp, sub_group_size=draw.choice([1, 5, 1000]))), run.truth())
