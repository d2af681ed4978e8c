"""What an optimizer holds is taken in step by step, and always is what a look at all of it would give."""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict

import pytest
import torch
from snapshotd_client.codec import dumps
from snapshotd_client.inventory import Inventory
from snapshotd_client.optim import OptimizerView
from torch import nn


def fresh(model, opt):
    return Inventory(model=model, optimizer=opt, scheduler=None, scaler=None, extra=None, world_size=1)


def seen(inventory):
    """All that a capture takes of the optimizers: names, the very tensors, and the text."""
    reading, _ = inventory.read()
    return [(leaf.name, leaf.kind, id(leaf.tensor)) for leaf in reading.lasting], reading.optimizers


def other(dice, value):
    """What may stand there in the next step: mostly of the same kind."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return dice.choice(
            [
                value.clone,
                value.clone,
                lambda: torch.rand(value.shape, dtype=value.dtype),
                lambda: value.double() if value.dtype is torch.float32 else value.float(),
                lambda: value[..., :1].clone() if value.dim() else value.reshape(1),
                lambda: value.clone().requires_grad_(dice.random() < 0.5),
                lambda: nn.Parameter(value.clone()),
                lambda: 3,
            ]
        )()
    if value is None or isinstance(value, (int, float, str)):
        return dice.choice([1, 2.5, True, None, "a", float("nan"), (1, "b"), torch.ones(3)])
    return dice.choice([(2, "b"), [1, 2], {"a": torch.ones(2)}, 7])


def change(dice, opt, state):
    key = dice.choice(list(state))
    kind = dice.random()
    if kind < 0.75:
        state[key] = other(dice, state[key])
    elif kind < 0.82:
        state[f"new{dice.randrange(3)}"] = dice.choice([1, torch.ones(2)])
    elif kind < 0.88 and len(state) > 1:
        del state[key]
    elif kind < 0.94:
        state[key] = state.pop(key)  # elsewhere in the order
    else:
        for param, held in opt.state.items():
            if held is state:
                opt.state[param] = dice.choice([OrderedDict, dict])(state)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_always_what_a_new_look_gives(seed):
    """Breaks: a number, a tensor or a shape of an older step is captured."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    for param in model.parameters():
        opt.state[param]["note"] = dice.choice(["x", (1, 2), 0.5])
    inventory = fresh(model, opt)
    for _ in range(60):
        for _ in range(dice.choice([0, 1, 1, 2, 5])):
            change(dice, opt, opt.state[dice.choice(list(opt.state))])
        if dice.random() < 0.3:
            opt.param_groups[0]["lr"] = dice.choice([1e-3, 1, None, float("inf")])
        assert seen(inventory) == seen(fresh(model, opt))
        if dice.random() < 0.5:
            inventory.forget_moving()


def test_tensors_and_numbers_of_the_same_kind_are_taken_in_without_a_new_scan(monkeypatch):
    """Breaks: an optimizer that replaces its state costs as much in each step as its first capture."""
    model = nn.Linear(4, 4)
    opt = torch.optim.Optimizer(model.parameters(), {"lr": 1.0})
    for param in model.parameters():
        opt.state[param] = {"m": torch.zeros_like(param), "step": 0, "scale": torch.tensor(1.0), "name": "x"}
    inventory = fresh(model, opt)
    expected, _ = inventory.read()
    monkeypatch.setattr("snapshotd_client.optim.encode", lambda value, path: value)  # a scan would give a sink to it
    for step in range(1, 5):
        for state in opt.state.values():
            state.update(m=state["m"] + 1, scale=torch.tensor(float(step)), step=step)
        reading, changed = inventory.read()
        assert not changed
        assert [leaf.name for leaf in expected.lasting] == [leaf.name for leaf in reading.lasting]
        tensors = [value for state in opt.state.values() for value in (state["m"], state["scale"])]
        assert [*map(id, tensors)] == [id(leaf.tensor) for leaf in reading.lasting if leaf.kind == "optim"]
        assert reading.optimizers.count(f'"step":{dumps(step)}'.encode()) == 2
        if step > 1:
            inventory.forget_moving()


def test_what_is_replaced_is_let_go_of_and_nothing_else():
    """Breaks: peak memory grows by a whole optimizer state; or each step looks at all parameters anew."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    inventory = fresh(model, opt)
    inventory.read()
    assert [] == inventory.forget_moving()
    first, *_ = opt.state.values()
    for _ in range(3):
        first["exp_avg"] = first["exp_avg"].clone()
        reading, _ = inventory.read()
        gone = inventory.forget_moving()
        assert {id(value) for value in first.values()} == {id(leaf.tensor) for leaf in gone}
        del reading, gone
        old = weakref.ref(first["exp_avg"])
        first["exp_avg"] = torch.zeros(4, 4)
        assert old() is None
    assert isinstance(inventory.optimizers[0], OptimizerView)
