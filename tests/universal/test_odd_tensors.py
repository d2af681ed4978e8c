"""Tensors that are not what their bytes say, and values that no other test has: none may be read as something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal import convert
from snapshotd.universal.compare import diff
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
