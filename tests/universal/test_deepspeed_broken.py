"""DeepSpeed checkpoints that are not whole: the message names the file, what was expected and found, what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from snapshotd.errors import CorruptionError, FormatError
from snapshotd.universal.readers import deepspeed, read
from tests.universal.test_deepspeed_make import Run, deepspeed_names, expect, save, zero3, zero12

OPTIM = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


@pytest.fixture
def run() -> Run:
    return Run(dtype=torch.bfloat16)


def refused(path: Path, *parts: str) -> None:
    """Reading is refused, and the message has all the parts."""
    with pytest.raises(CorruptionError) as caught:
        read(path).check()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_missing_rank_files_are_named(tmp_path: Path, run: Run, rank: int) -> None:
    """A node whose disk is gone: what is left must not be taken for the whole."""
    one, three = zero12(tmp_path / "one", run, 3), zero3(tmp_path / "three", run, 3)
    (one / "global_step5" / OPTIM.format(rank)).unlink()
    refused(one, f"missing {OPTIM.format(rank)}", "Expected ranks 0 to 2", "dp_world_size 3", "older checkpoint")
    (three / "global_step5" / OPTIM.format(rank)).unlink()
    refused(three, f"missing {OPTIM.format(rank)}", "Expected ranks 0 to 2")
    three = zero3(tmp_path / "model", run, 3)
    (three / "global_step5" / MODEL3.format(rank)).unlink()
    refused(three, f"missing {MODEL3.format(rank)}", "Expected ranks 0 to 2")


def test_missing_model_file_and_missing_optimizer(tmp_path: Path, run: Run) -> None:
    root = zero12(tmp_path, run, 2)
    model = root / "global_step5" / "mp_rank_00_model_states.pt"
    moved = model.rename(model.with_suffix(".away"))
    refused(root, "has no *_model_states.pt", "rank 0")
    moved.rename(model)
    for rank in range(2):
        (root / "global_step5" / OPTIM.format(rank)).unlink()
    refused(root, "has no *_optim_states.pt, expected those of 2 ranks")


@pytest.mark.parametrize("name", [OPTIM.format(1), "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path: Path, run: Run, name: str, keep: float) -> None:
    path = zero12(tmp_path, run, 2) / "global_step5" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    refused(tmp_path, name)


def test_leftovers_of_a_run_with_more_ranks_are_named(tmp_path: Path, run: Run) -> None:
    """The same tag, saved again after the job was made smaller: the old ranks' files are still there."""
    for make in (zero12, zero3):
        root = tmp_path / make.__name__
        make(root, run, 4)
        make(root, run, 2)
        refused(root, OPTIM.format(2) if make is zero12 else MODEL3.format(2), "expected 2", "left over", "move away")


def test_a_file_of_another_world_size_is_named(tmp_path: Path, run: Run) -> None:
    for make in (zero12, zero3):
        root, other = make(tmp_path / f"{make.__name__}2", run, 2), make(tmp_path / f"{make.__name__}4", run, 4)
        shutil.copy(other / "global_step5" / OPTIM.format(1), root / "global_step5" / OPTIM.format(1))
        refused(root, OPTIM.format(1), "world size")


def test_model_file_of_another_world_size(tmp_path: Path, run: Run) -> None:
    root, other = zero12(tmp_path / "two", run, 2), zero12(tmp_path / "three", run, 3)
    shutil.copy(other / "global_step5" / "mp_rank_00_model_states.pt", root / "global_step5")
    refused(root, f"missing {OPTIM.format(2)}", "dp_world_size 3")


def test_ranks_of_different_steps_are_told(tmp_path: Path, run: Run) -> None:
    """A node that died while saving keeps its file of the save before."""
    later = Run(dtype=torch.bfloat16, steps=(torch.tensor(5.0), torch.tensor(5.0)))
    for make in (zero12, zero3):
        root, other = make(tmp_path / make.__name__, run, 2), make(tmp_path / f"{make.__name__}later", later, 2)
        shutil.copy(other / "global_step5" / OPTIM.format(1), root / "global_step5" / OPTIM.format(1))
        refused(root, OPTIM.format(1), "is of step 5", "is of step 4", "Take all files of one step")


def test_ranks_without_steps_are_told_by_their_learning_rate(tmp_path: Path) -> None:
    sgd = Run(dtype=torch.bfloat16, kinds=("momentum_buffer",), steps=(None, None), hyper=[{"lr": 0.1}, {"lr": 0.1}])
    later = Run(dtype=torch.bfloat16, kinds=("momentum_buffer",), steps=(None, None), hyper=[{"lr": 0.2}, {"lr": 0.1}])
    root, other = zero12(tmp_path / "a", sgd, 2), zero12(tmp_path / "b", later, 2)
    shutil.copy(other / "global_step5" / OPTIM.format(1), root / "global_step5" / OPTIM.format(1))
    refused(root, OPTIM.format(1), "lr 0.2", "0.1", "different saves")


def test_model_files_of_different_global_steps(tmp_path: Path, run: Run) -> None:
    root = zero3(tmp_path / "a", run, 2)
    other = zero3(tmp_path / "b", run, 2, more={"global_steps": 6})
    shutil.copy(other / "global_step5" / MODEL3.format(1), root / "global_step5")
    refused(root, MODEL3.format(1), "global step 6", "is of 5")


def test_weights_of_another_step_than_their_masters(tmp_path: Path, run: Run) -> None:
    """Only rank 0 writes the model file; when it is of the save before, no rank file shows it."""
    later = Run(dtype=torch.bfloat16, seed=1, steps=(torch.tensor(5.0), torch.tensor(5.0)))
    root, other = zero12(tmp_path / "a", run, 2), zero12(tmp_path / "b", later, 2)
    for rank in range(2):
        shutil.copy(other / "global_step5" / OPTIM.format(rank), root / "global_step5")
    refused(root, "mp_rank_00_model_states.pt is of global step 5", "step 5", "embed.weight")


def test_a_fresh_optimizer_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Fine-tuning counts global steps on and starts the optimizer at 0."""
    run = Run(dtype=torch.bfloat16, steps=(torch.tensor(1.0), torch.tensor(1.0)))
    expect(read(zero12(tmp_path / "one", run, 2)), run.truth())
    state = read(zero3(tmp_path / "three", run, 2))
    expect(state, run.truth())
    assert any("are they of one save" in line for line in state.warnings)


def test_stages_and_precisions_that_lie_over_one_another(tmp_path: Path, run: Run) -> None:
    both = tmp_path / "stages"
    zero12(both, run, 2)
    zero3(both, run, 2)
    refused(both, "mp_rank_00_model_states.pt", MODEL3.format(0), "another run")
    both = tmp_path / "precisions"
    zero12(both, run, 2)
    zero12(both, Run(), 2)
    refused(both, "of the same rank", "bf16_")
    mixed, other = zero12(tmp_path / "mixed", run, 2, stage=1), zero12(tmp_path / "two", run, 2, stage=2)
    shutil.copy(other / "global_step5" / OPTIM.format(1), mixed / "global_step5")
    refused(mixed, "ZeRO stages ['1', '2']")


def test_another_models_files(tmp_path: Path, run: Run) -> None:
    other = Run(dtype=torch.bfloat16, shapes={**run.shapes, "layers.1.big.weight": (11, 50)})
    root, wrong = zero12(tmp_path / "a", run, 2), zero12(tmp_path / "b", other, 2)
    shutil.copy(wrong / "global_step5" / "mp_rank_00_model_states.pt", root / "global_step5")
    refused(root, OPTIM.format(0), "param_shapes have", "different runs")
    root = zero3(tmp_path / "c", run, 2)
    wrong = zero3(tmp_path / "d", other, 2)
    shutil.copy(wrong / "global_step5" / MODEL3.format(1), root / "global_step5")
    refused(root, MODEL3.format(1), "other param_shapes")


def test_a_damaged_partition(tmp_path: Path, run: Run) -> None:
    root = zero12(tmp_path, run, 2)
    path = root / "global_step5" / OPTIM.format(1)
    with deepspeed_names():
        values = torch.load(path, weights_only=False)
        state = values["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
        state["exp_avg"] = state["exp_avg"][:-5].clone()
        save(values, path)
    refused(root, OPTIM.format(1), "exp_avg of group 0")


def test_latest_that_leads_nowhere(tmp_path: Path, run: Run) -> None:
    root = zero12(tmp_path, run, 1)
    (root / "latest").write_text("global_step9")
    assert deepspeed.detect(root)
    refused(root, "latest names 'global_step9'", "global_step5")
    (root / "latest").write_text("../elsewhere")
    refused(root, "should name a folder beside it")
    (root / "latest").unlink()
    assert read(root).step == 5
    shutil.copytree(root / "global_step5", root / "global_step7")
    refused(root, "several checkpoints (global_step5, global_step7)")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert not deepspeed.detect(tmp_path)
    with pytest.raises(FormatError, match="is no checkpoint of DeepSpeed"):
        deepspeed.read(tmp_path)


def test_state_that_was_swapped_out(tmp_path: Path, run: Run) -> None:
    """NVMe offload leaves the masters in swap files beside the checkpoint."""
    root = zero3(tmp_path, run, 2)
    path = root / "global_step5" / OPTIM.format(0)
    with deepspeed_names():
        values = torch.load(path, weights_only=False)
        values["optimizer_state_dict"]["fp32_flat_groups"] = []
        save(values, path)
    refused(root, OPTIM.format(0), "0 sub-groups", "NVMe")


def test_a_pickle_that_wants_to_run_something(tmp_path: Path, run: Run) -> None:
    class Attack:
        def __reduce__(self) -> object:
            import os

            return os.system, ("touch /tmp/snapshotd-was-here",)

    root = zero12(tmp_path, run, 1, more={"trainer": Attack()})
    refused(root, "system")
    assert not Path("/tmp/snapshotd-was-here").exists()
