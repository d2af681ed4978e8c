"""
What the training scripts of the fault tests share: arguments, models, optimizers, data, and notes for the judge.

Nothing here knows snapshotd. The judge reads what a worker noted in FAULTS_DIR: one file per worker process, with the
step it started from, the loss of each step bit by bit, and digests of the state. What a worker does between two steps
is its own affair: here it waits, from each step of FAULTS_HOLD on, until the judge lets it do one step more (file
`go-STEP`) or go on freely (file `done-HOLD`), so that a fault strikes at a known step.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

SEED = 20240607
WIDTH = 32
VOCABULARY = 61
STEP_S = 0.02
"""The least time of a step; a real one takes longer than the copy of its state."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adamw")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast and a gradient scaler")
    parser.add_argument("--loader", action="store_true", help="a DataLoader with forked workers")
    parser.add_argument("--batchnorm", action="store_true", help="a model with buffers that each rank changes")
    parser.add_argument("--large", type=int, default=0, metavar="N", help="a parameter more, of N x 1024 numbers")
    parser.add_argument("--one-cycle", action="store_true", help="OneCycleLR, which changes lr and betas each step")
    return parser.parse_args()


def seed() -> None:
    """The usual calls; the same on each rank, so that all make the same model."""
    torch.set_num_threads(1)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


_finished: list[bool] = []


@atexit.register
def _leave() -> None:
    # Runs after everybody else's exit handlers, as it was registered first. Torch's gloo backend may hang when it is
    # torn down at the end of a process: its destructor joins a thread that waits for the interpreter's lock.
    if _finished:
        os._exit(0)


# ---------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Words(nn.Module):
    """A small language model with tied weights, a scalar parameter, a frozen one, and a buffer that counts."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(large, 1024)) if large else None
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.numel()
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        if self.large is not None:
            h = h + self.large.mean()
        return self.head(self.frozen(h) * self.gain)


class Normed(nn.Module):
    """Batch normalisation: buffers that training changes, different on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.convolution(self.embedding(x).transpose(1, 2))
        return self.head(torch.relu(self.norm(h)).transpose(1, 2))


def build_model(args: argparse.Namespace) -> nn.Module:
    return Normed() if args.batchnorm else Words(args.large)


# ---------------------------------------------------------------- optimizers


class Factored(torch.optim.Optimizer):
    """Like Adafactor: row and column means in place of a full second moment; its state is replaced at each step."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "decay": 0.9, "warm": [1.0, 0.5]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                here, grad = _local(p), _local(p.grad)
                state = self.state[p]
                count = state.get("count", 0) + 1
                square = grad * grad + 1e-30
                if here.dim() == 2 and here.numel():
                    row = state.get("row", torch.zeros(here.shape[0])) * group["decay"] + square.mean(1) * 0.1
                    column = state.get("column", torch.zeros(here.shape[1])) * group["decay"] + square.mean(0) * 0.1
                    scale = torch.outer(row, column) / row.mean()
                    self.state[p] = {"count": count, "row": row, "column": column}
                else:
                    full = state.get("full", torch.zeros_like(here)) * group["decay"] + square * 0.1
                    scale = full
                    self.state[p] = {"count": count, "full": full}
                here.sub_(group["lr"] * grad / (scale.sqrt() + 1e-8) / group["warm"][0])


class Orthogonal(torch.optim.Optimizer):
    """Like Muon: momentum, then Newton-Schulz on the whole matrix."""

    def __init__(self, params: Any, lr: float = 5e-3, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = buffer.full_tensor() if isinstance(buffer, DTensor) else buffer.clone()
                update = update / (update.norm() + 1e-7)
                for _ in range(3):
                    gram = update @ update.T
                    update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.add_(update, alpha=-group["lr"])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    return [torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)]


def _sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.SGD(trained, lr=0.05, momentum=0.9, nesterov=True)]


def _factored(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [Factored([p for p in model.parameters() if p.requires_grad])]


def _orthogonal(model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2]
    rest = [p for p in trained if p.dim() != 2]
    return [Orthogonal(matrices), torch.optim.AdamW(rest, lr=1e-2)]


def _zero1(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Each rank keeps the state of some parameters only, in an optimizer inside the one that is stepped."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    return [ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-2)]


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd, "factored": _factored, "orthogonal": _orthogonal, "zero1": _zero1}


def build_optimizers(args: argparse.Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    return OPTIMIZERS[args.optimizer](model)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Any:
    if args.one_cycle:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=args.steps + 1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8))


# ---------------------------------------------------------------- data


class Dataset(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, (17,), generator=torch.Generator().manual_seed(index))

    def __len__(self) -> int:
        return 1 << 20


class Position:
    """Which batch comes next: the data position that has to survive."""

    def __init__(self) -> None:
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]


def batches(
    args: argparse.Namespace, position: Position, rank: int | None = None, world: int | None = None
) -> Iterator[torch.Tensor]:
    """Batches of a share (default: this rank's of all) from the position on; make it after the restore."""
    rank = dist.get_rank() if rank is None else rank
    world = dist.get_world_size() if world is None else world

    def indices() -> Iterator[list[int]]:
        start = position.batch
        while True:
            yield [(start * world + rank) * 4 + i for i in range(4)]
            start += 1

    if args.loader:
        loader = torch.utils.data.DataLoader(
            Dataset(), batch_sampler=indices(), num_workers=2, generator=torch.Generator().manual_seed(SEED)
        )
        yield from loader
    dataset = Dataset()
    for chosen in indices():
        yield torch.stack([dataset[i] for i in chosen])


def loss_of(args: argparse.Namespace, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    # Python's and NumPy's generators take part, so that the run is only equal if they too are restored.
    weight = 1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.amp):
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss * weight


# ---------------------------------------------------------------- notes for the judge


class Notes:
    """What this worker did, line by line; a line that was written survives the worker."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], others: dict[str, Any]) -> None:
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._optimizers = optimizers
        self._others = others
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        self._directory = Path(os.environ["FAULTS_DIR"])
        self._holds = [int(step) for step in os.environ.get("FAULTS_HOLD", "").split(",") if step]
        self._traces = os.environ.get("FAULTS_TRACE") == "1"
        self._node = os.environ.get("FAULTS_NODE", "")
        self._next = 0.0
        name = f"notes.{time.monotonic_ns():020d}.{self._node}.{os.getpid()}"
        self._file = (self._directory / name).open("w", buffering=1)
        script = Path(sys.argv[0]).name
        self._write(kind="start", rank=self._rank, world=world, node=self._node, pid=os.getpid(), script=script)

    def restored(self, first: int) -> None:
        """Right after the restore: where it goes on, and with what."""
        self._write(kind="restored", first=first, local=self.local(), full=self.full() if self._traces else None)

    def step(self, step: int, loss: torch.Tensor) -> None:
        """Before the step is captured: its loss and, on request, the whole state."""
        full = self.full() if self._traces else None
        self._write(kind="step", step=step, loss=float(loss.detach()).hex(), full=full)

    def hold(self, step: int) -> None:
        """The end of a step: no step is shorter than STEP_S, and from some on the judge decides."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        for hold in self._holds:
            done, go = self._directory / f"done-{hold}", self._directory / f"go-{step}"
            if step >= hold and not done.exists():
                self._write(kind="hold", step=step)
                while not (done.exists() or go.exists()):
                    time.sleep(0.005)
        self._next = time.monotonic() + STEP_S

    def finish(self) -> None:
        self._write(kind="end", local=self.local(), full=self.full() if self._traces else None)
        self._file.close()
        _finished.append(True)

    def local(self) -> dict[str, str]:
        """Digests of everything that this rank holds."""
        digests = self._digests(_local)
        digests["rng"] = _digest(torch.get_rng_state())
        digests["random"] = hashlib.sha256(repr(random.getstate()).encode()).hexdigest()[:16]
        digests["numpy"] = hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest()[:16]
        return digests

    def full(self) -> dict[str, str]:
        """Digests of the gathered state: the same however it is cut over ranks. All ranks call it together."""
        return self._digests(_whole)

    def _digests(self, part: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, str]:
        tensors = (*self._model.named_parameters(), *self._model.named_buffers(), *self._optimizer_state())
        digests = {name: _digest(part(tensor)) for name, tensor in tensors}
        for name, value in {**self._others, "groups": _Groups(self._optimizers)}.items():
            digests[name] = hashlib.sha256(repr(value.state_dict()).encode()).hexdigest()[:16]
        return digests

    def _optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = {id(p): name for name, p in self._model.named_parameters()}
        for index, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    for key, value in sorted(optimizer.state.get(p, {}).items()):
                        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                        yield f"optimizer{index}.{names[id(p)]}.{key}", tensor

    def _write(self, **note: Any) -> None:
        self._file.write(json.dumps(note) + "\n")


class _Groups:
    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> Any:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return [{key: value for key, value in sorted(group.items()) if key != "params"} for group in groups]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode() + raw).hexdigest()[:16]
