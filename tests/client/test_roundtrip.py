"""
N steps straight must equal: train, die, restore into other memory with other values, train on. Bit by bit.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from fake_daemon import wanted_boxes
from safetensors import safe_open
from torch import nn
from torch.optim import lr_scheduler

TOTAL, CUT = 8, 4


class Factored(torch.optim.Optimizer):
    """Adafactor's shape of state: row and column statistics, an int step."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    if p.dim() >= 2:
                        state["row"] = torch.zeros(p.shape[:-1])
                        state["col"] = torch.zeros(p.shape[:-2] + p.shape[-1:])
                    else:
                        state["full"] = torch.zeros_like(p)
                state["step"] += 1
                square = p.grad.square() + 1e-30
                if p.dim() >= 2:
                    state["row"].lerp_(square.mean(-1), 0.1)
                    state["col"].lerp_(square.mean(-2), 0.1)
                    scale = (state["row"].unsqueeze(-1) * state["col"].unsqueeze(-2)).rsqrt()
                else:
                    state["full"].lerp_(square, 0.1)
                    scale = state["full"].rsqrt()
                p.add_(p.grad * scale, alpha=-group["lr"] / state["step"])


class Muonish(torch.optim.Optimizer):
    """A bf16 momentum that is a new tensor each step, as several published Muon implementations do."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "ns_coefficients": (3.4445, -4.775, 2.0315)})

    @torch.no_grad()
    def step(self, closure=None):
        a, b, _ = self.param_groups[0]["ns_coefficients"]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                old = state.get("momentum", torch.zeros_like(p, dtype=torch.bfloat16))
                state["momentum"] = (old.float() * 0.9 + p.grad).bfloat16()
                p.sub_(state["momentum"].float(), alpha=group["lr"] * (a + b / 10))


class Odd(torch.optim.Optimizer):
    """None, ints, lists, nested dicts, and state that belongs to no parameter."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "history": [1, 2.5, None]})

    @torch.no_grad()
    def step(self, closure=None):
        shared = self.state["global"]
        shared["calls"] = shared.get("calls", 0) + 1
        shared.setdefault("noise", torch.zeros(3)).add_(0.5)
        for group in self.param_groups:
            group["history"].append(shared["calls"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(buf=None, recent=[], nested={"a": {"b": torch.ones_like(p)}, 3: (1, "x")})
                state["recent"] = [*state["recent"][-1:], p.grad.clone()]
                state["nested"]["a"]["b"].mul_(0.9).add_(p.grad)
                p.sub_(sum(state["recent"]) + state["nested"]["a"]["b"], alpha=group["lr"] / len(group["history"]))


class Averaging(torch.optim.Optimizer):
    """Lookahead's and ZeRO's shape: the optimizer that is stepped holds another one, which has most of the state."""

    def __init__(self, params, lr=1e-2):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.AdamW(params, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            p.copy_(slow.lerp_(p, 0.5))


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=False),
    "adamw_foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True, amsgrad=True),
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "adam_tensor_lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-2), foreach=False),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "rmsprop_centered": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, centered=True, momentum=0.5),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "rprop": lambda ps: torch.optim.Rprop(ps),
    "asgd": lambda ps: torch.optim.ASGD(ps),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "factored": Factored,
    "muonish": Muonish,
    "odd": Odd,
    "averaging": Averaging,
}

SCHEDULERS = {
    "none": lambda o: None,
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=40, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 20)], milestones=[3]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
}


class Model(nn.Module):
    """Tied, frozen, 0-d, empty, bf16, integer, boolean and non-contiguous tensors, in one small model that trains."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.bias16 = nn.Parameter(torch.randn(8).bfloat16())
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.register_buffer("mask", torch.rand(8) > 0.1, persistent=False)
        self.register_buffer("seen", torch.randint(0, 9, (), dtype=torch.int64))
        self.register_buffer("strided", torch.randn(6, 4)[::2, 1:3])

    def forward(self, x):
        self.seen += x.numel()
        y = self.body(self.embed(x)) * self.scale + self.bias16.float()
        return self.head((y @ self.turned) * self.mask)


class Sampler:
    def __init__(self, start=0):
        self.position = start

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def __next__(self):
        self.position += 1
        return self.position


class Job:
    """A whole training job: what the Snapshotter is given, and one step of it."""

    def __init__(self, optimizer="adamw", scheduler="none", cls=Model):
        self.model = cls()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = OPTIMIZERS[optimizer](trained)
        self.sched = SCHEDULERS[scheduler](self.opt)
        self.extra = {
            "data": Sampler(random.randrange(100)),
            "average": torch.zeros(300),
            "table": np.zeros(400),
            "seen": [random.random()],
            "notes": {"losses": (0.0, float("inf"))},
            "epoch": random.randrange(10),
            "generator": torch.Generator(torch.get_default_device()).manual_seed(random.randrange(100)),
        }

    def step(self):
        x = torch.randint(0, 16, (6,)) + (next(self.extra["data"]) + self.extra["epoch"]) % 2
        loss = self.model(x % 16).float().square().mean() * 0.01 * (1 + random.random()) + np.random.rand()
        loss = loss + torch.rand(1, generator=self.extra["generator"]).item()
        loss.backward()
        self.opt.step()
        if self.sched is not None:
            self.sched.step(loss.item()) if isinstance(
                self.sched, lr_scheduler.ReduceLROnPlateau
            ) else self.sched.step()
        self.opt.zero_grad()
        self.extra["average"].lerp_(torch.full((300,), loss.item()), 0.5)
        self.extra["table"] += loss.item()
        self.extra["seen"].append(loss.item())
        self.extra["notes"]["losses"] = (loss.item(), float("inf"))
        self.extra["epoch"] += 1
        return loss.item()

    def snapshotter(self, make, **kwargs):
        return make(self.model, self.opt, self.sched, extra=self.extra, **kwargs)


def flat(value, path="", out=None):
    """Every leaf of nested state by path, tensors as (dtype, shape, bytes)."""
    out = {} if out is None else out
    if isinstance(value, dict):
        for key, item in value.items():
            flat(item, f"{path}/{key!r}", out)
    elif isinstance(value, (list, tuple)):
        out[path] = (type(value), len(value))
        for i, item in enumerate(value):
            flat(item, f"{path}/{i}", out)
    elif isinstance(value, torch.Tensor):
        flattened = value.detach().cpu().contiguous().reshape(-1)
        raw = flattened.view(torch.uint8).numpy().tobytes() if value.numel() else b""
        out[path] = (value.dtype, value.device.type, value.shape, raw)
    elif isinstance(value, np.ndarray):
        out[path] = (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, torch.Generator):
        flat(value.get_state(), path, out)
    elif hasattr(value, "state_dict"):
        flat(value.state_dict(), path, out)
    else:
        out[path] = (type(value), repr(value))
    return out


def state_of(job):
    """All state of a job, bit by bit."""
    names = {p: n for n, p in job.model.named_parameters()}
    optimizer = {names.get(key, key): value for key, value in job.opt.state.items()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in job.opt.param_groups]
    buffers = dict(job.model.named_buffers())
    params = dict(job.model.named_parameters(remove_duplicate=False))
    return flat([params, buffers, optimizer, groups, job.sched, job.extra])


def assert_equal_run(make, seed, new_job, total=TOTAL, cut=CUT):
    seed(1)
    straight = new_job()
    expected = [straight.step() for _ in range(total)]
    seed(1)
    job = new_job()
    snap = job.snapshotter(make)
    assert snap.restore() == 0
    losses = []
    for step in range(cut):
        losses.append(job.step())
        snap.capture(step)
        assert snap.wait(20)
        make.sealed(step)
    assert cut == snap.stats["sealed"], snap.stats
    snap.close()

    seed(99)
    job = new_job()
    job.step()  # other values everywhere, and state that is in the way
    snap = job.snapshotter(make)
    assert cut == snap.restore()
    for step in range(cut, total):
        losses.append(job.step())
        snap.capture(step)
        assert snap.wait(20)
        make.sealed(step)
    assert all(map(math.isfinite, expected))
    assert expected == losses
    assert state_of(straight) == state_of(job)
    assert total - cut == snap.stats["sealed"], snap.stats
    return job


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_goes_on_bit_by_bit(optimizer, snapshotter, seed):
    """Breaks: the recovered run drifts from the undisturbed one."""
    assert_equal_run(snapshotter, seed, lambda: Job(optimizer))


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "none"])
def test_scheduler_goes_on_bit_by_bit(scheduler, snapshotter, seed):
    """Breaks: the learning rate jumps after a recovery."""
    assert_equal_run(snapshotter, seed, lambda: Job("sgd_momentum", scheduler))


def test_fresh_optimizer_without_state_is_filled(snapshotter, seed):
    """Breaks: recovery into a new process, where no optimizer step was made yet, loses the optimizer's state."""
    seed(1)
    job = Job("adamw")
    snap = job.snapshotter(snapshotter)
    for step in range(3):
        job.step()
        snap.capture(step)
        assert snap.wait(20)
        snapshotter.sealed(step)
    expected = state_of(job)
    seed(5)
    other = Job("adamw")
    assert other.snapshotter(snapshotter).restore() == 3
    assert expected == state_of(other)
    assert all(s["step"].device.type == "cpu" and s["step"].dtype == torch.float32 for s in other.opt.state.values())


def test_lbfgs_closure_state(snapshotter, seed):
    """Breaks: optimizers with lists of tensors and a closure."""

    class Closed(Job):
        def __init__(self):
            self.model = nn.Linear(4, 4)
            self.opt = torch.optim.LBFGS(self.model.parameters(), max_iter=3, history_size=3)
            self.sched, self.extra = None, {}

        def step(self):
            x = torch.randn(8, 4)

            def closure():
                self.opt.zero_grad()
                loss = (self.model(x) - x.sin()).square().mean()
                loss.backward()
                return loss

            return self.opt.step(closure).item()

    assert_equal_run(snapshotter, seed, Closed)


def test_several_models_optimizers_and_schedulers(snapshotter, seed):
    """Breaks: GANs and Muon-plus-AdamW set-ups."""

    class Pair(Job):
        def __init__(self):
            self.models = {"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)}
            self.model = nn.ModuleDict(self.models)
            self.opts = [Muonish(self.models["g"].parameters()), torch.optim.AdamW(self.models["d"].parameters())]
            self.scheds = [lr_scheduler.StepLR(o, 2) for o in self.opts]
            self.opt, self.sched, self.extra = self.opts[0], self.scheds[1], {}

        def step(self):
            loss = self.models["d"](self.models["g"](torch.randn(5, 4))).square().mean()
            loss.backward()
            for each in (*self.opts, *self.scheds):
                each.step()
            self.model.zero_grad()
            return loss.item()

        def snapshotter(self, make):
            return make(self.models, {"muon": self.opts[0], "adam": self.opts[1]}, self.scheds)

    assert_equal_run(snapshotter, seed, Pair)


def test_grad_scaler_and_amp(snapshotter, seed):
    """Breaks: mixed precision loses its scale."""

    class Amp(Job):
        def __init__(self):
            self.model = nn.Linear(4, 4)
            self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** random.randrange(4, 9), growth_interval=2)
            self.sched, self.extra = None, {"scaler_seen": self.scaler}

        def step(self):
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(torch.randn(5, 4)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
            self.opt.zero_grad()
            return loss.item()

        def snapshotter(self, make):
            return make(self.model, self.opt, scaler=self.scaler)

    job = assert_equal_run(snapshotter, seed, Amp)
    assert job.scaler.state_dict()["_growth_tracker"] in (0, 1)


def test_a_scaler_of_ones_own_gets_back_what_it_gave(snapshotter, seed):
    """Breaks: a tensor in its state comes back as a number."""

    class Scaler:
        def __init__(self):
            self.state = {"scale": torch.zeros(()), "hits": 0}

        def state_dict(self):
            return dict(self.state)

        def load_state_dict(self, state):
            self.state = dict(state)

    model, scaler = nn.Linear(2, 2), Scaler()
    snap = snapshotter(model, None, scaler=scaler)
    scaler.state = {"scale": torch.tensor(8.0), "hits": 3}
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    again = Scaler()
    assert 1 == snapshotter(model, None, scaler=again).restore()
    assert flat(scaler.state) == flat(again.state)


def test_group_added_in_training_is_added_again(snapshotter, seed):
    """Breaks: gradual unfreezing: the group of the running job is not in the script's start."""
    seed(1)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    opt = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    snap = snapshotter(model, opt)

    def train(model, opt, count):
        for _ in range(count):
            model[1](model[0](torch.randn(4, 3))).sum().backward()
            opt.step()
            opt.zero_grad()

    train(model, opt, 2)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    opt.add_param_group({"params": list(model[1].parameters()), "lr": 0.01, "weight_decay": 0.5})
    train(model, opt, 2)
    snap.capture(1)
    assert snap.wait(20)
    snapshotter.sealed(1)
    assert 2 == snap.stats["sealed"] == snap.stats["layouts"]

    other = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    other_opt = torch.optim.AdamW(other[0].parameters(), lr=0.1)
    again = snapshotter(other, other_opt)
    assert again.restore() == 2
    assert [group["lr"] for group in other_opt.param_groups] == [0.1, 0.01]
    state = torch.get_rng_state()
    train(other, other_opt, 2)
    torch.set_rng_state(state)
    train(model, opt, 2)
    assert flat(dict(model.named_parameters())) == flat(dict(other.named_parameters()))


def test_slot_is_a_safetensors_file_with_ties_and_all_kinds(daemon, snapshotter, seed, tmp_path):
    """Breaks: persisted snapshots that no other tool can read."""
    seed(1)
    job = Job()
    snap = job.snapshotter(snapshotter)
    job.step()
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    sealed = daemon.sealed[0][0]
    path = tmp_path / "slot.safetensors"
    path.write_bytes(sealed.data.tobytes())
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("model.embed.weight"), job.model.embed.weight)
        assert torch.equal(file.get_tensor("model.bias16"), job.model.bias16)
        assert torch.equal(file.get_tensor("model.turned"), job.model.turned)
        assert torch.equal(
            file.get_tensor("optim.body.0.weight.exp_avg"), job.opt.state[job.model.body[0].weight]["exp_avg"]
        )
        names = set(file.keys())
    assert {"model.mask", "model.seen", "model.frozen", "model.empty", "optim.scale.step", "extra.average"} <= names
    assert dict(sealed.layout.ties) == {"model.head.weight": "model.embed.weight"}
    kinds = {shard.tensor.kind: shard.tensor.scope for shard in sealed.layout.shards}
    assert kinds == {"param": "global", "optim": "global", "buffer": "rank", "extra": "rank"}
    assert sealed.meta["step"] == 0


def test_names_do_not_depend_on_wrappers(daemon, snapshotter):
    """Breaks: a job that turns on torch.compile can't read its own snapshots."""
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.DataParallel(torch.compile(nn.Sequential(inner[0], checkpoint_wrapper(inner[1]))))
    snap = snapshotter(model)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    expected = {"model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"}
    assert expected == {s.tensor.name for s in daemon.sealed[0][0].layout.shards}


def test_module_extra_state_travels(snapshotter):
    """Breaks: FP8 scaling factors and other state that modules keep outside of tensors."""

    class Meter(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def get_extra_state(self):
            return {"value": self.value, "history": torch.full((500,), self.value)}

        def set_extra_state(self, state):
            self.value, self.history = state["value"], state["history"]

    snap = snapshotter(nn.Sequential(Meter(3.5), nn.Linear(2, 2)))
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    other = nn.Sequential(Meter(0.0), nn.Linear(2, 2))
    assert snapshotter(other).restore() == 1
    assert 3.5 == other[0].value == other[0].history[499].item()


def test_restore_fills_memory_in_place_and_replaces_odd_buffers(snapshotter):
    """Breaks: views and captured graphs that point at the old memory; caches that have grown."""
    model = nn.Linear(3, 3)
    model.register_buffer("cache", torch.arange(10.0), persistent=False)
    model.register_buffer("waves", torch.complex(torch.ones(200), torch.arange(200.0)).conj())
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    snap = snapshotter(model, opt)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)

    other = nn.Linear(3, 3)
    other.register_buffer("cache", torch.zeros(2), persistent=False)
    other.register_buffer("waves", torch.zeros(200, dtype=torch.complex64).conj())
    other.register_buffer("own", torch.ones(1))
    other_opt = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    other(torch.ones(1, 3)).sum().backward()
    other_opt.step()
    before = (other.weight.data_ptr(), other_opt.state[other.weight]["momentum_buffer"].data_ptr())
    assert snapshotter(other, other_opt).restore() == 1
    assert before == (other.weight.data_ptr(), other_opt.state[other.weight]["momentum_buffer"].data_ptr())
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.cache, other.cache)
    assert torch.equal(model.waves, other.waves)
    assert torch.equal(torch.ones(1), other.own)
    assert other_opt.param_groups[0]["lr"] == 0.1


def test_large_boxes_are_asked_in_parts(daemon, snapshotter, monkeypatch):
    """Breaks: a tensor that is larger than what the daemon gives at once."""
    from snapshotd_client import fetch

    model = nn.Linear(50, 70)
    snap = snapshotter(model)
    snap.capture(0)
    assert snap.wait(20)
    snapshotter.sealed(0)
    monkeypatch.setattr(fetch, "BATCH_BYTES", 1000)
    other = nn.Linear(50, 70)
    assert snapshotter(other).restore() == 1
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    sizes = [sum(4 * int(np.prod(w.box.lengths)) for w in wanted_boxes(request.boxes)) for request in daemon.wants]
    assert len(sizes) > 10
    assert max(sizes) <= 1000


def test_state_that_nobody_looks_at_is_said(snapshotter, caplog):
    """A restore that silently lacks a part of the optimizer gives other numbers than the run that never failed."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.params_again = list(model.parameters())
    snapshotter(model, optimizer)
    assert "not captured" not in caplog.text
    optimizer.slow = [torch.zeros(3)]
    snapshotter(model, optimizer)
    assert "optim.slow: tensors outside the optimizer's .state are not captured" in caplog.text
