"""
What is looked at in each step must be seen when it changes, however cheap the look is.
"""

from __future__ import annotations

import copy
import json
import random
import threading
from collections import OrderedDict, defaultdict
from itertools import chain

import numpy as np
import pytest
import torch
from snapshotd_client.binding import Binding
from snapshotd_client.held import Held, is_same
from snapshotd_client.leaves import Leaf
from snapshotd_client.placement import place_plain
from snapshotd_client.plan import build_plan, plan_leaf
from snapshotd_client.rng import RngText, set_rng
from torch import nn


def captured(daemon, snap, step):
    snap.capture(step)
    assert snap.wait(20)
    daemon.wait_for(lambda: step in daemon.sealed or any(skip.step == step for skip in daemon.skips))
    return daemon.sealed.get(step, {}).get(0)


@pytest.mark.parametrize("seed", range(6))
def test_what_has_changed_and_nothing_else_is_looked_at_again(tensors_are, monkeypatch, seed):
    """Breaks: an optimizer that replaces one tensor in each step is paid for with a look at all of them."""
    monkeypatch.setattr("snapshotd_client.binding._AT_ONCE", 3)
    looked = []
    look = Binding._look
    monkeypatch.setattr(Binding, "_look", lambda self, index, tensor: looked.append(index) or look(self, index, tensor))
    dice = random.Random(seed)
    tensors = [torch.full((6, 2), float(number)) for number in range(10)]
    leaves = [Leaf(f"t{number}", "param", tensor, None) for number, tensor in enumerate(tensors)]
    binding = Binding(build_plan([plan_leaf(leaf, place_plain((6, 2), "global")) for leaf in leaves],
                                 rank=0, split=False, ties={}, meta_capacity=64))  # fmt: skip
    assert binding.follow(leaves)
    moved: set[int] = set()
    for _ in range(60):
        looked.clear()
        changed = set(dice.sample(range(10), dice.choice([0, 0, 0, 1, 1, 2, 5])))
        leaves = leaves if dice.random() < 0.5 else list(leaves)
        for index in sorted(changed):
            value = torch.rand(6, 2)
            if dice.random() < 0.5:
                leaves[index].tensor.data = value
                moved.add(index)
            else:
                leaves = list(leaves)
                leaves[index] = Leaf(f"t{index}", "param", value, None)
        assert binding.follow(leaves)
        assert sorted(looked) == sorted(changed)
        assert all(torch.equal(torch.from_numpy(source).view(torch.float32), leaf.tensor)
                   for source, leaf in zip(binding.sources, leaves, strict=True))  # fmt: skip
        gone = dice.sample(range(10), dice.choice([0, 0, 0, 1, 3]))
        if gone:
            binding.let_go([leaves[index] for index in gone])
            assert all(binding.sources[index].numel() == 0 for index in gone)
            leaves = [Leaf(leaf.name, "param", leaf.tensor, None) for leaf in leaves]
            looked.clear()
            assert binding.follow(leaves)
            assert set(gone) <= set(looked) <= moved.union(gone)
            assert len(looked) == len(set(looked))
    for _ in range(4):  # what has moved once is not taken for what moves always
        looked.clear()
        binding.let_go([])
        assert binding.follow(leaves)
    assert [] == looked


@pytest.fixture
def job(snapshotter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    opt.step()
    return model, opt, snapshotter(model, opt)


@pytest.fixture(params=["seen", "asked"])
def tensors_are(request, monkeypatch):
    if request.param == "asked":
        monkeypatch.setattr("snapshotd_client.sight._fields", lambda: None)
    return request.param


_RESHAPED = {
    "rows": lambda data: data[:4],
    "transposed": lambda data: data.t(),
    "shape": lambda data: data.view(4, 9),
    "optimizer": lambda data: data[:5],
}


def _reshape(model, opt, change):
    weight = model[0].weight
    tensor = opt.state[weight]["exp_avg"] if change == "optimizer" else weight
    tensor.data = _RESHAPED[change](tensor.data)
    name = "optim.0.weight.exp_avg" if change == "optimizer" else "model.0.weight"
    return name, (tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes())


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("change", list(_RESHAPED))
def test_same_memory_under_another_shape_is_not_captured_as_before(tensors_are, daemon, job, change, before):
    """Breaks: a weight that was cut or transposed in place is captured with its old shape for ever after."""
    model, opt, snap = job
    for step in range(before):
        assert captured(daemon, snap, step)
    name, expected = _reshape(model, opt, change)
    sealed = captured(daemon, snap, before)
    unseen = tensors_are == "asked" and before == 3
    assert (sealed is None) is unseen
    assert snap.stats["torn"] == unseen
    if unseen:
        assert "0.weight" in daemon.skips[0].detail
    for step in (before + 1, before + 2):
        kept = (sealed or captured(daemon, snap, step)).tensor(name)
        assert (kept.shape, kept.tobytes()) == expected
        sealed = None
    assert snap.stats["torn"] == unseen


def test_other_memory_is_followed(daemon, job):
    """Breaks: memory that was left is captured, or what was prepared for it is copied."""
    model, opt, snap = job
    for step in range(6):
        for tensor in (model[1].bias, opt.state[model[1].bias]["exp_avg"]):
            tensor.data = torch.full((6,), float(step))
        sealed = captured(daemon, snap, step)
        for name in ("model.1.bias", "optim.1.bias.exp_avg"):
            assert np.full(6, step, np.float32).tobytes() == sealed.tensor(name).tobytes()
    assert snap.stats["layouts"] == 1


def test_numbers_in_the_state_are_those_of_the_step(daemon, job):
    """Breaks: a learning rate or a step count of an older step, because the text was kept."""
    model, opt, snap = job
    state = opt.state[model[0].weight]
    for step, (rate, count) in enumerate([(0.5, 1), (0.25, 1), (0.25, 2), (0.125, True), (float("inf"), None)]):
        opt.param_groups[0]["lr"] = rate
        state["count"] = count
        sealed = captured(daemon, snap, step)
        [entry] = sealed.meta["optimizers"]
        found = {key[1]: value for key, value in entry["state"]}["model.0.weight"]["count"]
        assert (type(count), count) == (type(found), found)
        hyper = entry["groups"][0]["hyper"]["lr"]
        assert hyper == (rate if step < 4 else {"$": "float", "v": "000000000000f07f"})


def test_renamed_and_reordered_state_is_seen(daemon, job):
    """Breaks: tensors are restored under the name that they had before."""
    model, opt, snap = job
    assert captured(daemon, snap, 0)
    state = opt.state[model[0].bias]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]
    sealed = captured(daemon, snap, 1)
    assert state["exp_avg"].numpy().tobytes() == sealed.tensor("optim.0.bias.exp_avg").tobytes()
    state["renamed"] = state.pop("exp_avg")
    sealed = captured(daemon, snap, 2)
    assert "optim.0.bias.exp_avg" not in {shard.key for shard in sealed.layout.shards}
    assert state["renamed"].numpy().tobytes() == sealed.tensor("optim.0.bias.renamed").tobytes()
    model.add_module("other", model._modules.pop("1"))
    sealed = captured(daemon, snap, 3)
    assert "model.other.weight" in {shard.key for shard in sealed.layout.shards}


def test_each_generator_is_written_when_it_has_drawn():
    """Breaks: after a restore, dropout or shuffling repeats an older step."""
    text = RngText()
    draws = [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: float(np.random.random()),
        lambda: float(np.random.normal()),
        lambda: float(np.random.normal()),  # from what the one before has left over
        lambda: float(torch.rand(())),
        lambda: 0.0,
    ]
    for draw in draws:
        draw()
        kept = json.loads(text.read([]))
        expected = [one() for one in draws]
        set_rng(kept, [])
        assert expected == [one() for one in draws]


def test_slots_are_mapped_before_a_step_needs_them(daemon, job):
    """Breaks: the first steps wait at their fence until a gigabyte is mapped."""
    _, _, snap = job
    snap._register_early()
    with snap._pipeline._changed:
        assert snap._pipeline._changed.wait_for(lambda: len(snap._pipeline._grants) == daemon.num_slots, 20)
    while len(snap._pipeline._copier._slots) < daemon.num_slots:
        threading.Event().wait(0.001)
    before = dict(snap._pipeline._copier._slots)
    assert captured(daemon, snap, 0)
    assert before == snap._pipeline._copier._slots


@pytest.mark.parametrize("change", ["data", "set", "swapped", "shared", "state", "dict", "dict, then state", "loaded"])
def test_a_tensor_that_is_another_is_captured(tensors_are, daemon, job, change):
    """Breaks: the bytes of a tensor that was left are kept as this step's, for ever after."""
    model, opt, snap = job
    weight, name = model[0].weight, "model.0.weight"
    assert captured(daemon, snap, 0)
    assert captured(daemon, snap, 1)
    if change == "data":
        weight.data = weight.data.clone()
    elif change == "set":
        with torch.no_grad():
            weight.set_(torch.rand(6, 6))
    elif change == "swapped":
        torch.utils.swap_tensors(weight, nn.Parameter(torch.rand(6, 6)))
    elif change == "shared":
        weight.share_memory_()
    else:
        name = "optim.0.weight.exp_avg"
    if change.startswith("dict"):
        opt.state[weight] = dict(opt.state[weight])
        assert captured(daemon, snap, 2)
        assert captured(daemon, snap, 3)
    if change.endswith("state"):
        opt.state[weight]["exp_avg"] = opt.state[weight]["exp_avg"].clone()  # equal, but another
    elif change == "loaded":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert captured(daemon, snap, 4)
    tensor = weight.detach() if name.startswith("model") else opt.state[weight]["exp_avg"]
    tensor.fill_(7.0)
    assert tensor.numpy().tobytes() == captured(daemon, snap, 5).tensor(name).tobytes()


def test_a_parameter_in_another_group_is_seen(daemon, snapshotter):
    """Breaks: after a restore a parameter trains with the learning rate of the group that it was in before."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = torch.optim.SGD([{"params": list(model[n].parameters()), "lr": 1.0 + n} for n in range(2)])
    snap = snapshotter(model, opt)
    assert captured(daemon, snap, 0)
    first, second = (group["params"] for group in opt.param_groups)
    second.insert(0, first.pop())
    [entry] = captured(daemon, snap, 1).meta["optimizers"]
    names = [group["params"] for group in entry["groups"]]
    assert [["model.0.weight"], ["model.0.bias", "model.1.weight", "model.1.bias"]] == names


_CHANGES = {
    "value": lambda first, second: first.update(b=[1]),
    "key": lambda first, second: first.update(c=first.pop("b")),
    "order": lambda first, second: first.update(a=first.pop("a")),
    "more": lambda first, second: first.setdefault("c", 3),
    "fewer": lambda first, second: first.popitem(),
    "emptied": lambda first, second: first.clear(),
    "merged": lambda first, second: first.__ior__({"a": 1000.0}),
    "filled": lambda first, second: second.update(a=1),
}


@pytest.fixture(params=["read", "looked into"])
def dicts_are(request, monkeypatch):
    if request.param == "looked into":
        monkeypatch.setattr("snapshotd_client.held._fields", lambda: None)
    return request.param


_KINDS = {"dict": dict, "defaultdict": lambda known: defaultdict(list, known), "OrderedDict": OrderedDict}


@pytest.mark.parametrize("looks", [1, 2, 3])
@pytest.mark.parametrize("kind", list(_KINDS))
@pytest.mark.parametrize("change", list(_CHANGES))
def test_held_sees_every_change(dicts_are, change, kind, looks):
    first, second = _KINDS[kind]({"a": 1000, "b": [1]}), _KINDS[kind]({})
    held = Held([first, second])
    for _ in range(looks):
        assert held.unchanged()
    assert (held._trail is not None) is (dicts_are == "read" and kind != "OrderedDict")
    _CHANGES[change](first, second)
    assert not held.unchanged()
    assert not held.unchanged()
    assert not is_same([first], [dict(first)])


def test_held_takes_no_notice_of_the_same_put_in_again(dicts_are):
    """Breaks: an optimizer that puts its tensors back after each step makes a new layout each time."""
    entries = {"a": [1], "b": [2]}
    held = Held([entries])
    for _ in range(5):
        entries["b"] = entries.pop("b")
        assert held.unchanged()
        assert held.unchanged()
    entries["b"] = [2]
    assert not held.unchanged()


def test_held_agrees_with_a_look_after_anything(dicts_are):
    """Breaks: after some series of changes that gives a dict its old table back, it is taken for what it was."""
    draw = random.Random(7)
    objects = [object() for _ in range(40)]
    for _ in range(300):
        many = [_KINDS[draw.choice(["dict", "defaultdict"])]({}) for _ in range(4)]
        for entries in many[1:]:
            entries.update((draw.choice(objects), draw.choice(objects)) for _ in range(draw.choice([1, 3, 9, 40])))
        held, before = Held(many), [[*map(id, chain(*entries.items()))] for entries in many]
        for _ in range(30):
            kept = many[draw.randrange(4)]
            key = draw.choice([*kept, *objects[:3]])
            undo = draw.random() < 0.5
            copy = dict(kept)
            match draw.randrange(5):
                case 0:
                    kept[key] = draw.choice(objects)
                case 1:
                    kept.pop(key, None)
                case 2:
                    kept.update((another, another) for another in objects)
                case 3:
                    kept.clear()
                case 4:
                    kept[key] = kept.pop(key, objects[0])
            now = [[*map(id, chain(*entries.items()))] for entries in many]
            assert held.unchanged() is (now == before)
            if undo:
                kept.clear()
                kept.update(copy)
            now = [[*map(id, chain(*entries.items()))] for entries in many]
            assert held.unchanged() is (now == before)
            if now != before:
                held, before = Held(many), now
