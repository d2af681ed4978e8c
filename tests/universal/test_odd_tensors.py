"""Tensors that are not what their bytes say, and values that no other test has: none may be read as something else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd import universal
from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.plain import from_json
from snapshotd.universal.readers import read
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

DTYPES = {name: getattr(torch, name) for name in ("complex64", "float8_e4m3fn", "int64")}

LAZY: dict[str, Callable[[], Any]] = {
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("wrap", [lambda tensor: tensor, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_bytes_that_torch_would_turn_round_are_refused(kind: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """torch saves such a tensor's storage as it is, and a mark that each sign is to be turned when it is read."""
    tensor = wrap(LAZY[kind]())
    torch.save({"model": {"w": tensor}}, tmp_path / "c.pt")
    with pytest.raises(FormatError, match="resolve_conj"):
        read(tmp_path / "c.pt")
    torch.save({"model": {"w": tensor.detach().resolve_conj().resolve_neg()}}, tmp_path / "c.pt")
    assert ["w"] == list(read(tmp_path / "c.pt").of_kind("model"))


def test_plain_types_are_values(tmp_path: Path) -> None:
    """A defaultdict pickles what makes its values; others keep a type beside the weights."""
    tree = {
        "model": {"w": torch.ones(2)},
        "seen": defaultdict(int, {"a": 1}),
        "loss": defaultdict(float, {"b": 0.5}),
        "names": defaultdict(str, {"c": "d"}),
        "flags": defaultdict(bool, {"e": True}),
        "cast": float,
    }
    torch.save(tree, tmp_path / "c.pt")
    extra = read(tmp_path / "c.pt").extra
    assert {"a": 1} == extra["seen"]
    assert {"b": 0.5} == extra["loss"]
    assert {"c": "d"} == extra["names"]
    assert {"e": True} == extra["flags"]
    assert "float" in extra["cast"]["$object"]


def test_a_tensor_among_the_hyperparameters_is_loaded(tmp_path: Path) -> None:
    """torch's optimizers take a tensor as their learning rate."""
    from snapshotd.universal.storage import StorageReader, StorageWriter

    tree = {
        "model": {"w": torch.ones(2)},
        "optim": {
            "state": {"w": {"exp_avg": torch.ones(2)}},
            "param_groups": [{"params": ["w"], "lr": torch.tensor(0.003)}],
        },
        "counts": {"seen": torch.arange(3)},
    }
    dcp.save(tree, storage_writer=StorageWriter(tmp_path / "c"), no_dist=True)
    found = {
        "model": {"w": torch.zeros(2)},
        "optim": {
            "state": {"w": {"exp_avg": torch.zeros(2)}},
            "param_groups": [{"params": ["w"], "lr": torch.tensor(0.0)}],
        },
        "counts": {"seen": torch.zeros(3, dtype=torch.int64)},
    }
    dcp.load(found, storage_reader=StorageReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(torch.tensor(0.003), found["optim"]["param_groups"][0]["lr"])
    assert [0, 1, 2] == found["counts"]["seen"].tolist()
    assert [1.0, 1.0] == found["optim"]["state"]["w"]["exp_avg"].tolist()


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "int64"])
def test_deepspeed_has_real_masters_only(dtype: str, tmp_path: Path) -> None:
    """A master in float32 would have lost the imaginary part."""
    weights = {"a": torch.ones(2), "b.weight": (torch.arange(3) + (1j if "complex" in dtype else 0)).to(DTYPES[dtype])}
    groups = [{"params": [0, 1], "param_names": list(weights), "lr": 0.1}]
    torch.save({"model": weights, "optimizer": {"state": {}, "param_groups": groups}}, tmp_path / "c.pt")
    with pytest.raises(UsageError, match=rf"b\.weight is {dtype}.*float32"):
        convert(tmp_path / "c.pt", tmp_path / "d", to="deepspeed")
    assert not (tmp_path / "d").exists()
    torch.save(weights, tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "d", to="deepspeed")
    differences = diff(read(tmp_path / "c.pt"), read(tmp_path / "d"))
    assert [] == [line for line in differences if line.what != "param_groups"]


def test_an_empty_frozen_parameter_comes_back_from_deepspeed(tmp_path: Path) -> None:
    tree = {
        "model": {"a": torch.ones(2), "empty": torch.nn.Parameter(torch.empty(0, 4), requires_grad=False)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 0.1}]},
    }
    torch.save(tree, tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "d", to="deepspeed")
    state = read(tmp_path / "d")
    state.check()
    assert ["empty"] == state.frozen
    assert (0, 4) == state.of_kind("model")["empty"].shape
    assert [1.0, 1.0] == read_all(state.of_kind("model")["a"].view).view("f4").tolist()


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_is_its_checkpoint(index: str, tmp_path: Path) -> None:
    """Who has a checkpoint of many files names the one that lists them."""
    if index.startswith("model"):
        pytest.importorskip("safetensors.torch").save_file({"w": torch.ones(2)}, tmp_path / "part")
    else:
        torch.save({"w": torch.ones(2)}, tmp_path / "part")
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": {"w": "part"}}))
    assert ["w"] == list(read(tmp_path / index).of_kind("model"))


def test_arrays_of_text_are_lists(tmp_path: Path) -> None:
    """Labels of classes, as NumPy keeps them."""
    labels = np.array([["cat", "dog"], ["emu", ""]])
    torch.save({"model": {"w": torch.ones(2)}, "labels": labels, "raw": labels.astype("S")}, tmp_path / "c.pt")
    extra = read(tmp_path / "c.pt").extra
    assert labels.tolist() == extra["labels"]
    assert labels.astype("S").tolist() == from_json(extra["raw"], {})


def test_parameters_are_taken_for_trained_before_what_may_be_buffers(tmp_path: Path) -> None:
    """SGD without momentum has no state: that ten numbers stand for ten of fourteen tensors is all that is known."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))
            self.none = torch.nn.Parameter(torch.ones(0, 3))
            self.register_buffer("wave", torch.ones(3, dtype=torch.complex64))
            self.register_buffer("statistic", torch.ones(3))
            self.a = torch.nn.Linear(3, 3)
            self.norm = torch.nn.BatchNorm1d(3)

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    state = read(tmp_path / "c.pt")
    assert [[name for name, _ in net.named_parameters()]] == [group["names"] for group in state.param_groups]
    assert [] == [name for name in state.frozen if name in dict(net.named_parameters())]


def test_weights_below_any_key_are_found_in_dcp(tmp_path: Path) -> None:
    """A trainer's own name for its model, and no optimizer that would tell."""
    tree = {"nets": {"main": {"a.weight": torch.ones(2, 3)}}, "counts": {"seen": torch.ones(1)}, "step": 4}
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    state = read(tmp_path / "c")
    assert ["a.weight"] == list(state.of_kind("model"))
    assert ["counts", "step"] == sorted(state.extra)
    convert(tmp_path / "c", tmp_path / "h", to="hf")
    assert ["a.weight"] == list(read(tmp_path / "h").of_kind("model"))


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_weights_are_no_checkpoint_of_hugging_face(dry_run: bool, tmp_path: Path) -> None:
    tree = {
        "model": {"w": torch.ones(2)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 0.1}]},
    }
    torch.save(tree, tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "u", to="universal", only="optimizer")
    with pytest.raises(UsageError, match="no weights"):
        convert(tmp_path / "u", tmp_path / "h", to="hf", dry_run=dry_run)
    assert not (tmp_path / "h").exists()


def test_indexes(tmp_path: Path) -> None:
    """NumPy's integers are integers; what is none is told."""
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": weight}, tmp_path / "c.pt")
    with universal.open(tmp_path / "c.pt") as checkpoint:
        found = checkpoint["w"]
        assert weight[1, -1].item() == found[np.int64(1), np.int32(-1)]
        for index in ("x", None, 1.5):
            with pytest.raises(UsageError, match="an index is"):
                found[index]  # type: ignore[index]
