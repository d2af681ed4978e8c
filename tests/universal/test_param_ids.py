"""Optimizers without names: where shapes leave a choice, what trainers commonly do decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotd.universal.readers import read
from snapshotd.universal.readers.param_ids import names_of_ids
from snapshotd.universal.views import read_all

torch = pytest.importorskip("torch")

WIDTH = 6


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.q = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = torch.nn.Linear(WIDTH, WIDTH)


class Net(torch.nn.Module):
    """All its blocks have the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        self.bn = torch.nn.BatchNorm1d(WIDTH)
        self.head = torch.nn.Linear(WIDTH, WIDTH)


def trained_ones(net: Any) -> list[Any]:
    return [p for p in net.parameters() if p.requires_grad]


def by_depth(net: Any) -> list[dict[str, Any]]:
    """A smaller learning rate for what was trained before."""
    head = set(net.head.parameters())
    rest = [p for p in trained_ones(net) if p not in head]
    return [{"params": rest, "lr": 0.01}, {"params": list(net.head.parameters()), "lr": 0.1}]


def by_decay(net: Any) -> list[dict[str, Any]]:
    found = trained_ones(net)
    return [
        {"params": [p for p in found if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in found if p.ndim < 2], "weight_decay": 0.0},
    ]


def each(net: Any) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(trained_ones(net))]


def whole(net: Any) -> list[dict[str, Any]]:
    return [{"params": trained_ones(net)}]


@pytest.mark.parametrize("groups", [whole, by_depth, by_decay, each])
@pytest.mark.parametrize("frozen", [0, 1, 8], ids=["nothing", "embedding", "first blocks"])
def test_each_moment_goes_to_its_parameter(
    groups: Callable[[Any], list[dict[str, Any]]], frozen: int, tmp_path: Path
) -> None:
    """A frozen backbone is what a transfer begins with; its blocks look as those that are trained."""
    torch.manual_seed(5)
    net = Net()
    for p in list(net.parameters())[:frozen]:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups(net), lr=0.1)
    for p in trained_ones(net):
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    state = read(tmp_path / "c.pt")
    state.check()
    names = {id(p): name for name, p in net.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        group["names"] for group in state.param_groups
    ]
    for p, values in optimizer.state.items():
        found = read_all(state.of_kind("exp_avg")[names[id(p)]].view).tobytes()
        assert values["exp_avg"].numpy().tobytes() == found
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == state.frozen


@pytest.mark.timeout(40)
def test_many_like_layers_are_searched_in_seconds() -> None:
    """80 layers with 300 frozen tensors took 45 seconds, while the job waited for its conversion."""
    parts = {"norm.weight": (8,), "norm.bias": (8,), "q.weight": (8, 8), "q.bias": (8,), "k.weight": (8, 8)}
    parts |= {"k.bias": (8,), "o.weight": (8, 8), "o.bias": (8,), "fc1.weight": (32, 8), "fc1.bias": (32,)}
    parts |= {"fc2.weight": (8, 32), "fc2.bias": (8,)}
    model = {f"layers.{i}.{name}": shape for i in range(80) for name, shape in parts.items()}
    trained = list(model)[300:]
    decayed = [name for name in trained if len(model[name]) > 1]
    names = [*decayed, *(name for name in trained if len(model[name]) < 2)]
    groups = [
        {"params": list(range(len(decayed))), "weight_decay": 0.1},
        {"params": list(range(len(decayed), len(names))), "weight_decay": 0.0},
    ]
    found, warning = names_of_ids(groups, {i: model[name] for i, name in enumerate(names)}, model)
    assert dict(enumerate(names)) == found
    assert warning is not None
    assert "more than one assignment" in warning
