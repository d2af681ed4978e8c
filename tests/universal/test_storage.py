"""Our storage for torch.distributed.checkpoint: between real ranks, and with any trainer's keys."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal.compare import diff, verify
from snapshotd.universal.readers import read
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import read_all, stored_bytes

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from snapshotd.universal.storage import StorageReader, StorageWriter  # noqa: E402 needs torch
from snapshotd.universal.storage.keys import KeyLookup  # noqa: E402

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RANKS = Path(__file__).resolve().parent / "storage_ranks.py"


def torchrun(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(RANKS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.timeout(600)
def test_two_ranks_save_and_three_load(tmp_path: Path) -> None:
    """A job of torch's own tools would have to change more than one argument, or go on from other numbers."""
    torchrun(2, "save", str(tmp_path))
    assert verify(tmp_path / "u").problems == []
    state = read(tmp_path / "u")
    assert (3, {"lm_head.weight": "embed.weight"}, ["pos.weight"]) == (state.step, state.tied, state.frozen)
    assert ["0", "1"] == sorted(state.of_kind("rng"))
    torchrun(3, "load", str(tmp_path))
    again = read(tmp_path / "again")
    assert [] == [item for item in diff(state, again) if item.kind != "rng"]


def save(tree: dict[str, Any], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, storage_writer=StorageWriter(path), no_dist=True)
    return path


def load(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tree, storage_reader=StorageReader(path), no_dist=True)
    return tree


WEIRD = {
    "nan": torch.tensor([0x7F800001, 0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32),
    "bool": torch.tensor([True, False, True]),
    "bf16": torch.randn(3, 5).bfloat16(),
    "f8": torch.randn(4).to(torch.float8_e4m3fn),
    "u16": torch.tensor([1, 65535], dtype=torch.uint16),
    "complex": torch.randn(2, 2, dtype=torch.complex64),
    "transposed": torch.randn(4, 6).t(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
}


def test_every_dtype_and_shape_goes_there_and_back(tmp_path: Path) -> None:
    values = {"step": 3, "none": None, "nested": [1, {"t": torch.arange(3)}], "tuple": (1, 2.5), "bytes": b"x"}
    path = save({"model": WEIRD, "values": values}, tmp_path / "u")
    assert verify(path).problems == []
    zeros = {name: torch.zeros_like(tensor) for name, tensor in WEIRD.items()}
    found = load({"model": zeros, "values": dict.fromkeys(values, 0)}, path)
    for name, tensor in WEIRD.items():
        expected, got = tensor.contiguous(), found["model"][name].contiguous()
        assert expected.dtype == got.dtype
        assert expected.view(-1).view(torch.uint8).tolist() == got.view(-1).view(torch.uint8).tolist(), name
    assert (3, None, [1, 2.5], b"x") == tuple(found["values"][key] for key in ("step", "none", "tuple", "bytes"))


@pytest.mark.parametrize("case", ["dcp_fsdp2_w4", "torch_save_plain", "ds_z2_bf16_w2", "hf_llama_sharded"])
def test_any_format_is_loaded(case: str, tmp_path: Path) -> None:
    """Foreign checkpoints could be used by a DCP job only after a conversion."""
    source = FIXTURES / case / "ckpt"
    source = source if source.is_dir() else FIXTURES / case / "checkpoint.pt"
    state = read(source)
    weights = state.of_kind("model")
    tree = {"net": {name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for name, t in weights.items()}}
    for name, tensor in load(tree, source)["net"].items():
        raw = read_all(weights[name].view).tobytes()
        assert raw == tensor.view(-1).view(torch.uint8).numpy().tobytes(), name
    convert(source, tmp_path / "u", to="universal")
    again = {name: torch.zeros_like(tensor) for name, tensor in tree["net"].items()}
    load({"model": again}, tmp_path / "u")
    assert all(torch.equal(again[name], tensor) for name, tensor in tree["net"].items())


def test_float32_weights_get_the_master_copies(tmp_path: Path) -> None:
    """A bf16 job of DeepSpeed that goes on in float32 would lose the lower half of each number."""
    source = FIXTURES / "ds_z2_bf16_w2" / "ckpt"
    masters = read(source).of_kind("fp32")
    tree = {"model": {name: torch.zeros(t.shape) for name, t in masters.items()}}
    load(tree, source)
    wide = [name for name, tensor in tree["model"].items() if not torch.equal(tensor, tensor.bfloat16().float())]
    assert wide


def number(value: float) -> Any:
    return stored_bytes(struct.pack("<f", value), "float32", (1,))


LOOKUP = KeyLookup(
    State(
        format="x",
        tensors=[
            Tensor("model", "layers.0.w", number(1)),
            Tensor("model", "layers.10.w", number(2)),
            Tensor("exp_avg", "layers.0.w", number(3)),
            Tensor("exp_avg", "layers.10.w", number(4)),
            Tensor("rng", "2", stored_bytes(b"x", "uint8", (1,))),
            Tensor("extra", "data.t", number(5)),
        ],
        tied={"head.w": "layers.0.w"},
        param_groups=[
            {"names": ["layers.10.w"], "lr": 0.1},
            {"names": ["layers.0.w"], "lr": 0.2, "betas": [0.9, 0.99]},
        ],
        extra={"lr_scheduler": {"last_epoch": 3}, "data": {"t": {"$tensor": "data.t"}, "a.b": [5, {"c": 6}]}},
        step=9,
    )
)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.0.w", ("model", "layers.0.w")),
        ("layers.10.w", ("model", "layers.10.w")),
        ("app.net.module._orig_mod.layers.0.w", ("model", "layers.0.w")),
        ("model.head.w", ("model", "layers.0.w")),
        ("optim.state.layers.10.w.exp_avg", ("exp_avg", "layers.10.w")),
        ("state.layers.0.w.exp_avg", ("exp_avg", "layers.0.w")),
        ("optimizer.state.0.exp_avg", ("exp_avg", "layers.10.w")),
        ("optim.state.module.layers.0.w.exp_avg", ("exp_avg", "layers.0.w")),
        ("optim.param_groups.1.lr", 0.2),
        ("optim.param_groups.1.betas", (0.9, 0.99)),
        ("optim.param_groups.0.params", ["layers.10.w"]),
        ("param_groups.layers.0.w.lr", 0.2),
        ("rng_2", ("rng", "2")),
        ("lr_scheduler.last_epoch", 3),
        ("data.a.b.1.c", 6),
        ("step", 9),
    ],
)
def test_keys_of_all_trainers_are_answered(key: str, expected: Any) -> None:
    found = LOOKUP.find(key)
    assert expected == (found.key if isinstance(found, Tensor) else found)
    assert key in LOOKUP


@pytest.mark.parametrize("key", ["model.layers.1.w", "optim.state.x.exp_avg", "optim.param_groups.2.lr", "rng_3", "a"])
def test_keys_that_are_not_there_are_missing(key: str) -> None:
    """The trainer must hear that something is missing, not get something else."""
    with pytest.raises(KeyError):
        LOOKUP.find(key)
    assert key not in LOOKUP


def test_numbered_groups_list_numbers() -> None:
    """torch's load_state_dict would find no state for a parameter whose number became a name, and say nothing."""
    assert [1] == LOOKUP.find("optim.param_groups.1.params", numbered=True)


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointException, match="is not empty .* save into a new directory"):
        save({"a": torch.ones(2)}, tmp_path)


def test_ranks_that_do_not_speak_to_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_collectives"):
        StorageWriter(tmp_path).set_up_storage_writer(True, use_collectives=False)


def test_a_save_that_failed_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Half a checkpoint would be taken for a whole one."""

    class Broken(StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            raise OSError("no space left")

    with warnings.catch_warnings(), pytest.raises(CheckpointException, match="no space left"):
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2)}, storage_writer=Broken(tmp_path / "u"), no_dist=True)
    with pytest.raises(FormatError):
        read(tmp_path / "u", "universal")
    assert all(entry.name.endswith(".part") for entry in (tmp_path / "u").iterdir())
    save({"a": torch.ones(2)}, tmp_path / "u")
