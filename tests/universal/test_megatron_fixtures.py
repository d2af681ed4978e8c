"""Checkpoints that Megatron-LM itself wrote, against the live model's state, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.errors import CorruptionError, FormatError
from snapshotd.universal import readers
from snapshotd.universal.safetensors import read_header
from snapshotd.universal.sources import FileSource
from snapshotd.universal.state import State
from snapshotd.universal.stream import Settings
from snapshotd.universal.views import read_all
from snapshotd.universal.writers import megatron

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = ("megatron_tp2_pp2", "megatron_dist_tp2_pp2")
MORE = (
    "megatron_vpp2_tp2_pp2",
    "megatron_dist_opt_tp2_pp2_tied",
    "megatron_moe_ep2_dist_opt",
    "megatron_dist_dp_reshardable",
)
"""Virtual stages with biases; the distributed optimizer; experts; flat buckets over data-parallel ranks."""


def truth_of(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, _ = read_header(FileSource(FIXTURES / case / "truth.safetensors"))
    return tensors, json.loads((FIXTURES / case / "truth.json").read_text())


def state_of(case: str) -> State:
    path = FIXTURES / case / "ckpt"
    assert readers.detect(path) == "megatron"
    state = readers.read(path)
    state.check()
    return state


@pytest.mark.parametrize("case", (*CASES, *MORE))
def test_every_tensor_is_the_live_models(case: str) -> None:
    """Without it a resumed run starts from shifted moments, and its loss only drifts."""
    tensors, _ = truth_of(case)
    state = state_of(case)
    found = {f"{tensor.kind}/{tensor.name}": tensor.view for tensor in state.tensors}
    for key, expected in tensors.items():
        if key.startswith("rng/") and key not in found:
            continue  # the first data-parallel rank writes for the others
        view = found.pop(key)
        assert (expected.dtype, expected.shape) == (view.dtype, view.shape), key
        assert np.array_equal(read_all(expected), read_all(view)), key
    assert {"step", "rng", "extra"} == {key.partition("/")[0] for key in found}


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_no_tensor(case: str) -> None:
    """Losing a group's weight decay or the scheduler's place changes the training silently."""
    _, truth = truth_of(case)
    state = state_of(case)
    assert truth["step"] == state.step
    assert truth["tied"] == state.tied
    assert truth["frozen"] == state.frozen
    assert truth["lr_scheduler"] == state.extra["opt_param_scheduler"]
    assert state.warnings == []
    groups = [group for chained in truth["param_groups_rank0"] for group in chained]
    assert groups == [{key: value for key, value in group.items() if key != "names"} for group in state.param_groups]
    names = [name for group in state.param_groups for name in group["names"]]
    assert sorted(state.of_kind("model")) == sorted(names)
    matrices, vectors = state.param_groups
    assert all(len(state.of_kind("model")[name].shape) == 2 for name in matrices["names"])
    assert all(len(state.of_kind("model")[name].shape) == 1 for name in vectors["names"])
    steps = state.of_kind("step")
    assert sorted(steps) == sorted(names)
    assert {truth["optimizer_step"]} == {read_all(step.view).view(np.float32).item() for step in steps.values()}
    assert truth["padded_vocab_size"] == state.source["padded_vocab_size"]
    assert sorted(name for name in state.of_kind("rng") if name.isdigit()) == ["0", "1", "2", "3"]
    assert len(state.extra["rng_state"]) == 4


@pytest.mark.parametrize("case", MORE)
def test_groups_and_counters_of_all_ranks(case: str) -> None:
    """Positions alone tie them to parameters: one shift, and matrices lose their weight decay."""
    _, truth = truth_of(case)
    state = state_of(case)
    assert (truth["step"], truth["tied"], truth["frozen"]) == (state.step, state.tied, state.frozen)
    assert truth["lr_scheduler"] == state.extra["opt_param_scheduler"]
    assert truth["padded_vocab_size"] == state.source["padded_vocab_size"]
    assert [] == state.warnings
    found = [{key: value for key, value in group.items() if key != "names"} for group in state.param_groups]
    assert truth["param_groups"] == found
    names = [set(group["names"]) for group in state.param_groups]
    members = [{truth["tied"].get(n, n) for n in group} for chain in truth["members_rank0"] for group in chain]
    assert len(members) == len(names)
    assert all(mine <= whole for mine, whole in zip(members, names, strict=True))
    assert {float(truth["step"])} == {_number(step) for step in state.of_kind("step").values()}


def _number(step: Any) -> float:
    return float(read_all(step.view).view(np.dtype(step.dtype)).item())


@pytest.mark.parametrize("case", CASES)
def test_reading_imports_no_framework(case: str) -> None:
    code = (
        "import sys; from pathlib import Path; from snapshotd.universal import readers;"
        f"readers.read(Path({str(FIXTURES / case / 'ckpt')!r}));"
        "assert not {'torch', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("place", ["ckpt", "ckpt/iter_0000004", "ckpt/latest_checkpointed_iteration.txt"])
def test_the_run_the_iteration_and_the_tracker_are_all_paths(place: str) -> None:
    assert readers.read(FIXTURES / CASES[0] / place, "megatron").step == 4


@pytest.mark.parametrize(
    ("case", "file"),
    [
        (CASES[0], "iter_0000004/mp_rank_01_001/model_optim_rng.pt"),
        (MORE[1], "iter_0000004/mp_rank_01_001/distrib_optim.pt"),
        (MORE[3], "iter_0000004/__1_0.distcp"),
        (CASES[1], "iter_0000004/common.pt"),
        (CASES[1], "iter_0000004/metadata.json"),
        (CASES[1], "iter_0000004/.metadata"),
        (CASES[1], "iter_0000004/__2_1.distcp"),
    ],
)
def test_a_missing_file_is_named(case: str, file: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / case / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / file).unlink()
    with pytest.raises(CorruptionError, match=Path(file).name):
        readers.read(tmp_path / "ckpt", "megatron").check()


def test_a_missing_rank_folder_is_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / CASES[0] / "ckpt", tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "iter_0000004" / "mp_rank_00_001")
    with pytest.raises(FormatError, match=r"mp_rank_00_001/model_optim_rng.pt is missing.*3 of them"):
        readers.read(tmp_path / "ckpt")


@pytest.mark.parametrize("case", CASES)
def test_a_truncated_file_is_named(case: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / case / "ckpt", tmp_path / "ckpt")
    for file in sorted((tmp_path / "ckpt").rglob("*"))[2:]:
        if file.is_file() and file.suffix in (".pt", ".distcp", ".metadata"):
            data = file.read_bytes()
            file.write_bytes(data[: len(data) * 2 // 3])
            with pytest.raises(CorruptionError, match=file.name):
                readers.read(tmp_path / "ckpt", "megatron")
            file.write_bytes(data)


def test_ranks_of_different_iterations_are_refused(tmp_path: Path) -> None:
    """Half of the model would be a step older than the other half."""
    shutil.copytree(FIXTURES / CASES[0] / "ckpt", tmp_path / "ckpt")
    later = replace(state_of(CASES[0]), step=5)
    megatron.write(later, tmp_path / "later", Settings(), identity="", options={})
    rank = tmp_path / "ckpt" / "iter_0000004" / "mp_rank_01_001"
    shutil.rmtree(rank)
    shutil.copytree(tmp_path / "later" / "iter_0000005" / "mp_rank_01_001", rank)
    with pytest.raises(FormatError, match=r"mp_rank_01_001.* is of iteration 5, .* of 4: the folder was put together"):
        readers.read(tmp_path / "ckpt")


def test_the_rest_of_a_larger_run_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / CASES[0] / "ckpt", tmp_path / "ckpt")
    folder = tmp_path / "ckpt" / "iter_0000004"
    shutil.copytree(folder / "mp_rank_01_001", folder / "mp_rank_02_001")
    with pytest.raises(FormatError, match="mp_rank_02_001 is too much"):
        readers.read(tmp_path / "ckpt")


def test_a_tracker_that_names_nothing(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / CASES[0] / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(FormatError, match=r"iter_0000005 is missing.*iter_0000004"):
        readers.read(tmp_path / "ckpt")
