"""What trainers make of torch's state dicts: wrappers, several optimizers, files beside the weights, odd values."""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshotd.universal import convert
from snapshotd.universal.compare import diff
from snapshotd.universal.readers import read
from snapshotd.universal.readers.conventions import is_rng, step_of_name, unwrapped
from snapshotd.universal.readers.module_order import module_order
from snapshotd.universal.state import State
from snapshotd.universal.views import read_all, stored_bytes

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
safetensors = pytest.importorskip("safetensors.torch")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.a = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 7)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Any) -> Any:
        return self.head(self.norm(self.a(self.embed(ids))))


def trained(make: Callable[[Any], list[Any]]) -> tuple[Any, list[Any]]:
    torch.manual_seed(1)
    net = Net()
    optimizers = make(net)
    for _ in range(2):
        net(torch.arange(7)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return net, optimizers


def adamw(net: Any) -> list[Any]:
    return [torch.optim.AdamW(net.parameters(), lr=0.1)]


def raw(tensor: Any) -> bytes:
    data: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def check(state: State, net: Any, optimizers: list[Any]) -> None:
    """The state has what the live objects have, under the model's names."""
    state.check()
    named = dict(net.named_parameters())
    owners = {id(p): name for name, p in named.items()}
    assert {name: raw(p) for name, p in named.items()} == {
        name: read_all(tensor.view).tobytes() for name, tensor in state.of_kind("model").items()
    }
    assert list(state.of_kind("buffer")) == ["count"]
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            for kind, value in values.items():
                if value is not None:
                    assert raw(value) == read_all(state.of_kind(kind)[owners[id(p)]].view).tobytes(), kind
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    expected = [[owners[id(p)] for p in group["params"]] for group in groups]
    assert expected == [group["names"] for group in state.param_groups]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module.", "module.module."])
@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_wrappers_leave_no_trace_in_names(kind: str, wrapper: str, tmp_path: Path) -> None:
    """A checkpoint of DDP or torch.compile would not fit the plain model, nor one that is wrapped otherwise."""
    net, optimizers = trained(adamw)
    weights = {wrapper + name: tensor for name, tensor in net.state_dict().items()}
    tree = {"model": weights, "optimizer": optimizers[0].state_dict()}
    if kind == "torch":
        torch.save(tree, tmp_path / "c")
    else:
        dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    check(read(tmp_path / "c"), net, optimizers)


def test_a_part_that_is_called_module_stays() -> None:
    assert {"module.a": "module.a", "b": "b"} == unwrapped(["module.a", "b"])
    assert {"x._checkpoint_wrapped_module.w": "x.w"} == unwrapped(["x._checkpoint_wrapped_module.w"])
    assert {"module.a": "a"} == unwrapped(["module.a"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_share_the_model(order: tuple[int, int], tmp_path: Path) -> None:
    """Muon for the matrices and AdamW for the rest: alone, the numbers of either fit the model in many ways."""

    def make(net: Any) -> list[Any]:
        hidden = [net.a.weight]
        rest = [p for p in net.parameters() if p is not hidden[0]]
        found = [torch.optim.SGD(hidden, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.1)]
        return [found[i] for i in order]

    net, optimizers = trained(make)
    torch.save({"model": net.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, tmp_path / "c")
    check(read(tmp_path / "c"), net, optimizers)


def test_factored_states_find_their_parameters(tmp_path: Path) -> None:
    """Adafactor's rows and columns do not have the parameter's shape."""
    net, optimizers = trained(lambda net: [torch.optim.Adafactor(net.parameters(), lr=0.1)])
    torch.save({"model": net.state_dict(), "optimizer": optimizers[0].state_dict()}, tmp_path / "c")
    check(read(tmp_path / "c"), net, optimizers)


def test_a_frozen_parameter_inside_a_group_is_frozen(tmp_path: Path) -> None:
    """AdamW(model.parameters()) takes the frozen ones too: they have a number, and no state."""

    def make(net: Any) -> list[Any]:
        net.embed.weight.requires_grad_(False)
        return adamw(net)

    net, optimizers = trained(make)
    torch.save({"model": net.state_dict(), "optimizer": optimizers[0].state_dict()}, tmp_path / "c")
    state = read(tmp_path / "c")
    check(state, net, optimizers)
    assert state.frozen == ["embed.weight"]


def test_a_list_of_state_dicts(tmp_path: Path) -> None:
    net, optimizers = trained(adamw)
    torch.save([net.state_dict(), optimizers[0].state_dict(), 2], tmp_path / "c")
    check(read(tmp_path / "c"), net, optimizers)


VALUES = {
    "args": argparse.Namespace(lr=0.1, sizes=[1, 2]),
    "when": datetime.datetime(2024, 5, 6, 7, 8),
    "python": random.Random(3).getstate(),
    "numpy": {"state": np.random.RandomState(3).get_state(), "scalar": np.float32(1.5)},
    "nested": [1, [2, {"t": torch.arange(3)}], None],
    "dtype": torch.bfloat16,
    "inf": float("inf"),
    "rng_state": {"note": "not a generator"},
}


@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_odd_values_come_back(to: str, tmp_path: Path) -> None:
    """What a trainer keeps beside the tensors would be lost, or be another thing after a round trip."""
    net, optimizers = trained(adamw)
    weights = net.state_dict()
    weights["a._extra_state"] = {"scale": torch.ones(2), "n": 1}
    torch.save({"model": weights, "optimizer": optimizers[0].state_dict(), **VALUES}, tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "u", to="universal")
    state = read(tmp_path / "u")
    assert list(state.extra["model_state"]) == ["a._extra_state"]
    assert {*VALUES, "model_state"} == state.extra.keys()
    convert(tmp_path / "u", tmp_path / "x", to=to)
    assert diff(state, read(tmp_path / "x")) == []
    if to == "torch":
        back = torch.load(tmp_path / "x", weights_only=True)
        assert list(back["model"]["a._extra_state"]) == ["scale", "n"]
        assert back["dtype"] == torch.bfloat16


def test_torchtitan_tells_its_step_as_a_tensor(tmp_path: Path) -> None:
    net, _ = trained(adamw)
    tree = {**net.state_dict(), "train_state": {"step": torch.tensor(7, dtype=torch.int32)}}
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    state = read(tmp_path / "c")
    assert state.step == 7
    assert list(net.state_dict()) == [t.name for t in state.tensors if t.kind in ("model", "buffer")]


def test_lightning_keeps_the_rest_in_a_file_beside(tmp_path: Path) -> None:
    """Step and schedulers of a sharded Lightning checkpoint stand in meta.pt."""
    net, optimizers = trained(adamw)
    names = dict(enumerate(name for name, _ in net.named_parameters()))
    state = {names[i]: values for i, values in optimizers[0].state_dict()["state"].items()}
    groups = [{**group, "params": list(names.values())} for group in optimizers[0].state_dict()["param_groups"]]
    tree = {"state_dict": net.state_dict(), "optimizer_0": {"state": state, "param_groups": groups}}
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    torch.save({"global_step": 2, "lr_schedulers": [{"last_epoch": 2}]}, tmp_path / "c" / "meta.pt")
    found = read(tmp_path / "c")
    check(found, net, optimizers)
    assert found.step == 2
    assert [{"last_epoch": 2}] == found.extra["lr_schedulers"]


def put_beside(folder: Path) -> None:
    torch.save({"last_epoch": 2}, folder / "scheduler.bin")
    states = {"step": 2, "random_state": random.Random(1).getstate(), "torch_manual_seed": torch.get_rng_state()}
    states["numpy_random_seed"] = np.random.RandomState(1).get_state()
    states["torch_cuda_manual_seed"] = [torch.ones(16).byte()]
    torch.save(states, folder / "random_states_1.pkl")
    torch.save(Net(), folder / "custom_checkpoint_0.pkl")


def test_accelerate_keeps_the_rest_in_files_beside(tmp_path: Path) -> None:
    """Scheduler and random generators would be lost; a file that is not understood is told by name."""
    net, _ = trained(adamw)
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / "pytorch_model_fsdp_0"
    dcp.save({"model": net.state_dict()}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    put_beside(tmp_path / "c")
    state = read(tmp_path / "c")
    assert {"last_epoch": 2} == state.extra["lr_scheduler"]
    assert {"1", "1/cuda:0"} == set(state.of_kind("rng"))
    assert {"step", "random_state", "numpy_random_seed"} == state.extra["rng"]["1"].keys()
    assert ["custom_checkpoint_0.pkl"] == [line.split()[0] for line in state.warnings]


def llama_like() -> Any:
    """Modules in the order of transformers' Llama; safetensors sorts their names otherwise."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, torch.nn.Linear(4, 4, bias=name != "o_proj"))

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()
            self.mlp = torch.nn.Module()
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(self.mlp, name, torch.nn.Linear(4, 4, bias=False))
            self.input_layernorm = torch.nn.LayerNorm(4, bias=False)
            self.post_attention_layernorm = torch.nn.LayerNorm(4, bias=False)

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = torch.nn.Embedding(5, 4)
    model.model.layers = torch.nn.ModuleList(Layer() for _ in range(11))
    model.model.norm = torch.nn.LayerNorm(4, bias=False)
    model.lm_head = torch.nn.Linear(4, 5, bias=False)
    return model


def save_trainer(folder: Path, model: Any) -> Any:
    """What HF Trainer puts into checkpoint-2: two groups, decay first."""
    named = list(model.named_parameters())
    decay = [p for _, p in named if p.ndim > 1]
    rest = [p for _, p in named if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    folder.mkdir()
    safetensors.save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 2}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state(), "python": random.getstate()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "loss": float("nan")}))
    return optimizer


def test_trainer_checkpoint_gives_each_moment_to_its_weight(tmp_path: Path) -> None:
    """The weights' file is sorted by name; all matrices have one shape here, so a wrong order would go unnoticed."""
    torch.manual_seed(2)
    model = llama_like()
    optimizer = save_trainer(tmp_path / "checkpoint-2", model)
    state = read(tmp_path / "checkpoint-2")
    state.check()
    names = {id(p): name for name, p in model.named_parameters()}
    for p, values in optimizer.state.items():
        for kind, value in values.items():
            assert raw(value) == read_all(state.of_kind(kind)[names[id(p)]].view).tobytes()
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        group["names"] for group in state.param_groups
    ]
    assert state.step == 2
    assert list(state.of_kind("rng")) == ["0"]
    assert ["optimizer.pt"] == [line.split()[0] for line in state.warnings]


def test_an_optimizer_that_fits_no_order_is_kept_as_it_is(tmp_path: Path) -> None:
    """The weights would not be convertible for the sake of an optimizer that nobody can name."""
    optimizer = save_trainer(tmp_path / "c", llama_like())
    safetensors.save_file({"w": torch.zeros(3)}, tmp_path / "c" / "model.safetensors")
    state = read(tmp_path / "c")
    state.check()
    assert list(state.of_kind("model")) == ["w"]
    assert len(optimizer.param_groups) == len(state.extra["optimizer"]["param_groups"])
    assert any("optimizer.pt is kept in extra.optimizer" in line for line in state.warnings)


def test_modules_come_in_the_order_of_their_definition() -> None:
    expected = [name for name, _ in llama_like().named_parameters()]
    assert expected == module_order(sorted(expected))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("rng_3",), "3"),
        (("rng_state",), "0"),
        (("rng", "cpu"), "0"),
        (("rng", "cuda:1"), "0/cuda:1"),
        (("cuda_rng_state_all", 1), "0/cuda:1"),
        (("rank_2", "rng", "cuda", 0), "2/cuda:0"),
        (("rng_states", 2), "2"),
        (("weights",), None),
    ],
)
def test_names_of_generators(path: tuple[Any, ...], name: str | None) -> None:
    """A rank would go on with the generator of another, or of another device."""
    assert name == is_rng(path, stored_bytes(bytes(8), "uint8", (8,)))


@pytest.mark.parametrize(
    ("name", "step"), [("checkpoint-500", 500), ("step_7", 7), ("epoch=1-step=30.ckpt", 30), ("model", None)]
)
def test_steps_in_names(name: str, step: int | None) -> None:
    assert step == step_of_name(name)
