"""
What the ranks of test_storage.py do under torchrun: ``storage_ranks.py save|load FOLDER``. Asserts here end the test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from snapshotd.universal.storage import StorageReader, StorageWriter
from tests.fixtures import model as tiny

CONFIG = tiny.Cfg(vocab=97, hidden=24, layers=2, ffn=40, tied=True)


class Run:
    """A model under FSDP2, with two groups and a scheduler."""

    def __init__(self, seed: int) -> None:
        self.model = tiny.build(tiny.Cfg(**{**CONFIG.facts(), "seed": seed}))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(tiny.groups_of(self.model, "decay"))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, tiny.warm_cos())

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            batch = tiny.batch(CONFIG, step, dist.get_rank(), dist.get_world_size())
            loss = tiny.loss_of(self.model, CONFIG, *batch)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path) -> None:
        model, optim = get_state_dict(self.model, self.optimizer)
        tree: dict[str, Any] = {"model": model, "optim": optim, "train": {"step": 3}}
        tree["lr_scheduler"] = self.scheduler.state_dict()
        tree[f"rng_{dist.get_rank()}"] = torch.get_rng_state()
        dcp.save(tree, storage_writer=StorageWriter(folder))

    def load(self, folder: Path, *, flat: bool = False) -> None:
        """``flat``: as torchtitan has it, everything at the top and the optimizer flattened."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optim = get_state_dict(self.model, self.optimizer, options=options)
        tree: dict[str, Any] = {**model, "optimizer": optim} if flat else {"model": model, "optim": optim}
        tree["lr_scheduler"] = self.scheduler.state_dict()
        dcp.load(tree, storage_reader=StorageReader(folder))
        model = {name: tree[name] for name in model} if flat else tree["model"]
        optim = tree["optimizer" if flat else "optim"]
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optim, options=options
        )
        self.scheduler.load_state_dict(tree["lr_scheduler"])

    def whole(self) -> dict[str, torch.Tensor]:
        """Everything as whole tensors; a collective."""
        found = {name: full(tensor) for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{kind}/{name}"] = full(value)
        found["lr"] = torch.tensor([group["lr"] for group in self.optimizer.param_groups], dtype=torch.float64)
        found["decay"] = torch.tensor([group["weight_decay"] for group in self.optimizer.param_groups])
        return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), found[name].view(-1).view(torch.uint8)), name


def save(folder: Path) -> None:
    run = Run(seed=1)
    run.train(0, 3)
    whole = run.whole()
    run.save(folder / "u")
    expected = run.train(3, 5)
    if dist.get_rank() == 0:
        torch.save({"whole": whole, "after": run.whole()}, folder / "truth.pt")
    else:
        run.whole()
    again = Run(seed=2)
    again.train(0, 1)
    again.load(folder / "u")
    assert_same(whole, again.whole())
    assert expected == again.train(3, 5)


def load(folder: Path) -> None:
    truth = torch.load(folder / "truth.pt")
    for flat in (False, True):
        run = Run(seed=2)
        run.train(0, 1)
        run.load(folder / "u", flat=flat)
        assert_same(truth["whole"], run.whole())
    run.save(folder / "again")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()
    os._exit(0)  # gloo's threads may bring the process down when they are torn down at its end
