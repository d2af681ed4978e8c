"""
What the ranks of test_distributed.py do: two processes, gloo, one daemon each scenario. Asserts here end the test.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from snapshotd_client import RestoreError, Snapshotter
from snapshotd_client.settings import Settings
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from snapshotd.errors import CorruptionError  # noqa: E402
from snapshotd.universal.sources import FileSource  # noqa: E402
from tests.fixtures import model as tiny  # noqa: E402

WORLD = 2


class Net(nn.Module):
    """Sizes that two ranks cannot share evenly, one that is smaller than the world, and a buffer."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(self.embed(x)))))


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05, amsgrad=True)


def muon(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def train(model, opt):
    loss = model(torch.randint(0, 11, (8,))).square().mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def wrap(kind, model):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model
    assert kind == "plain"
    return model


def digest(model, opt):
    """A hash of this rank's own part of everything."""
    hasher = hashlib.sha256()

    def add(value):
        if isinstance(value, DTensor):
            value = value._local_tensor
        if isinstance(value, torch.Tensor):
            hasher.update(repr((value.dtype, value.shape)).encode())
            hasher.update(
                value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            )
        elif isinstance(value, dict):
            for key in value:
                hasher.update(repr(key).encode() if isinstance(key, str) else b"p")
                add(value[key])
        else:
            hasher.update(repr(value).encode())

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
    add(dict(opt.state))
    return hasher.hexdigest()


def full(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()


def full_state(model, opt):
    """Everything as whole tensors, by name; a collective."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    out = {f"p.{name}": full(p).clone() for name, p in inner.named_parameters()}
    for name, p in inner.named_parameters():
        for key, value in opt.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                out[f"s.{name}.{key}"] = full(value).clone()
    return out


def settings(job, **more):
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    return Settings(
        socket=job["socket"], job="t", rank=rank, world_size=world, local_rank=rank, local_world_size=world,
        connect_timeout_s=0.3, restore_timeout_s=30, **more,
    )  # fmt: skip


def same_world(job):
    """Straight on must equal die and go on, for this rank's every byte."""
    kind, make_opt = job["kind"], {"adamw": adamw, "muon": muon}[job["opt"]]
    rank = dist.get_rank()
    start = 1 if kind != "plain" else rank

    def build(seed):
        model = wrap(kind, Net(seed))
        opt = make_opt(model.parameters())
        torch.manual_seed(100 + rank)
        return model, opt

    model, opt = build(start)
    expected = [train(model, opt) for _ in range(6)]
    expected_digest = digest(model, opt)

    model, opt = build(start)
    losses = []
    with Snapshotter(model, opt, settings=settings(job)) as snap:
        assert snap.restore() == 0
        for step in range(3):
            losses.append(train(model, opt))
            if job.get("eval"):
                model.eval()
                with torch.no_grad():  # leaves the FSDP root unsharded
                    model(torch.zeros(2, dtype=torch.int64))
                model.train()
            snap.capture(step)
            assert snap.wait(20)
        assert snap.stats["sealed"] == 3, snap.stats
    state = full_state(model, opt)
    if rank == 0:
        save_file(state, job["full"])
    dist.barrier()

    model, opt = build(9)
    torch.manual_seed(5)
    with Snapshotter(model, opt, settings=settings(job)) as snap:
        assert snap.restore() == 3
        losses += [train(model, opt) for _ in range(3)]
        final = digest(model, opt)
        for step in range(6, 20):  # copies under forward and backward: nothing of training changes what is copied
            train(model, opt)
            snap.capture(step)
        snap.wait(20)
        assert snap.stats["torn"] == snap.stats["errors"] == 0, snap.stats
    assert losses == expected, (losses, expected)
    assert final == expected_digest
    dist.barrier()


def from_one(job):
    """What one plain process captured is restored by two sharded ranks; "start": a universal checkpoint of it."""
    model = wrap(job["kind"], Net(9))
    opt = adamw(model.parameters())
    with Snapshotter(model, opt, settings=settings(job, start=job.get("start", ""))) as snap:
        assert snap.restore() == 1
        assert snap.last_restore["kind"] == ("start" if "start" in job else "snapshot")
    state = full_state(model, opt)
    expected = load_file(job["full"])
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype
    if job["kind"] == "fsdp":
        moment = opt.state[model.embed.weight]["exp_avg"]
        assert isinstance(moment, DTensor)
        assert moment.placements == model.embed.weight.placements
        assert not isinstance(opt.state[model.embed.weight]["step"], DTensor)
    train(model, opt)
    dist.barrier()


def from_fixture(job):
    """A foreign run goes on: it was of two ranks under FSDP2, so its next losses come out to the bit."""
    truth = json.loads(Path(job["truth"]).read_text())
    config = tiny.Cfg(**{**truth["model"], "seed": 5})
    model = tiny.build(config)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = torch.optim.AdamW(tiny.groups_of(model, "one"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, tiny.warm_cos())
    extra = {"dataloader": {}, "train": {"step": 0}}
    read = count_reads()
    with Snapshotter(model, opt, scheduler, extra=extra, settings=settings(job)) as snap:
        first = snap.restore(job["start"])
        assert snap.last_restore["generators"]
    assert first == truth["step"]  # so many steps were made, counted from 0
    assert extra == {"dataloader": truth["dataloader"], "train": {"step": 4, "tokens": 768}}
    # Each byte for its digest on one of the ranks, and each rank its half of what is sharded.
    whole = sum(path.stat().st_size for path in Path(job["start"]).glob("*.safetensors"))
    total = torch.tensor(read())
    dist.all_reduce(total)
    assert whole < total.item() < 2.2 * whole, (whole, total)
    losses = []
    for step in range(first, first + 3):
        loss = tiny.loss_of(model, config, *tiny.batch(config, step, dist.get_rank(), WORLD))
        loss.backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / WORLD)
    assert losses == truth["next_losses"], losses
    dist.barrier()


def from_rot(job):
    """One byte is rotten, and one rank finds it: no rank may go on."""
    model = DistributedDataParallel(Net(9))
    with Snapshotter(model, adamw(model.parameters()), settings=settings(job, start=job["start"])) as snap:
        try:
            snap.restore()
        except CorruptionError as error:
            text = str(error)
        except RestoreError as error:
            text = f"told: {error}"
        else:
            text = "it went on"
    assert "exp_avg of" in text or "told: the ranks do not go on from the same state" in text, text
    told = torch.tensor(int(text.startswith("told:")))
    dist.all_reduce(told)
    assert told == 1
    dist.barrier()


def count_reads():
    """Count the bytes that are read from files, from now on; the function gives the number and ends it."""
    before = FileSource.read_into
    count = 0
    lock = threading.Lock()

    def read_into(self, begin, out):
        nonlocal count
        with lock:
            count += out.nbytes
        before(self, begin, out)

    def end():
        FileSource.read_into = before
        return count

    FileSource.read_into = read_into
    return end


def odd_placements(job):
    """Tensor-parallel and replicated DTensors, and plain ones beside them that nobody knows to be equal."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Module()
        model.column = nn.Parameter(distribute_tensor(torch.randn(4, 7), mesh, [Shard(1)]))
        model.copied = nn.Parameter(distribute_tensor(torch.randn(5, 3), mesh, [Replicate()]))
        model.tiny = nn.Parameter(distribute_tensor(torch.randn(1, 3), mesh, [Shard(0)]))
        model.own = nn.Parameter(torch.full((3,), float(rank + seed)))
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return model, opt

    model, opt = build(1)
    opt.step()
    with Snapshotter(model, opt, settings=settings(job)) as snap:
        snap.restore()
        snap.capture(0)
        assert snap.wait(20)
        assert snap.stats["sealed"] == 1
    expected = digest(model, opt)
    dist.barrier()
    model, opt = build(7)
    with Snapshotter(model, opt, settings=settings(job)) as snap:
        assert snap.restore() == 1
    assert digest(model, opt) == expected
    assert model.own[0].item() != 7 + rank
    dist.barrier()


def disagree(job):
    """One rank has no daemon: no rank may go on."""
    rank = dist.get_rank()
    mine = {**job, "socket": job["socket"] if rank == 0 else "/nonexistent/d.sock"}
    model = DistributedDataParallel(Net(1))
    with Snapshotter(model, adamw(model.parameters()), settings=settings(mine)) as snap:
        try:
            snap.restore()
        except RestoreError as error:
            text = str(error)
        else:
            text = "it went on"
    assert "rank 1: no daemon" in text, text
    dist.barrier()


SCENARIOS = {
    "same_world": same_world,
    "from_one": from_one,
    "from_fixture": from_fixture,
    "from_rot": from_rot,
    "odd_placements": odd_placements,
    "disagree": disagree,
}


def run_rank(rank: int, folder: str, jobs: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, job in json.loads(jobs):
        SCENARIOS[name](job)
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()
