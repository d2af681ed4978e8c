"""
A small GPT that learns Python from Python's own library, and survives what kills its workers.

    torchrun --nproc-per-node 2 examples/train_gpt.py --steps 50 --out out

Only the three lines marked "snapshotd" have to do with fault tolerance. With a daemon on the node every step is kept,
and a restarted worker goes on from the last one; without a daemon the script trains unprotected.

The mathematics depend on nothing but the arguments: not on the clock, the host or the number of restarts. So two runs
with the same number of workers end with the same bits, which is what `make demo` checks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from snapshotd_client import Snapshotter
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # bytes


# ---------------------------------------------------------------- model


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.project(y), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, *, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---------------------------------------------------------------- data


def corpus(limit_bytes: int) -> Tensor:
    """Python's library source, the same bytes in the same order on every worker of this machine."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


class Sampler:
    """
    Batches that depend on (seed, position) alone, however many workers share them.

    Each worker takes its part of the global batch; `state_dict` makes the position part of the snapshot.
    """

    def __init__(self, data: Tensor, *, seed: int, batch: int, context: int, rank: int = 0, world: int = 1) -> None:
        self._data, self._seed, self._batch, self._context = data, seed, batch, context
        self._mine = slice(rank * batch // world, (rank + 1) * batch // world)
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this worker."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.position)
        starts = torch.randint(len(self._data) - self._context - 1, (self._batch,), generator=generator)[self._mine]
        self.position += 1
        rows = self._data[starts[:, None] + torch.arange(self._context + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self._seed:
            raise ValueError(f"the snapshot was taken with --seed {state['seed']}, this run has {self._seed}")
        self.position = state["position"]


# ---------------------------------------------------------------- training


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = start_processes(options)

    torch.manual_seed(options.seed)  # the same parameters on every worker, before they are sharded
    model: nn.Module = GPT(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        context=options.context,
        dropout=options.dropout,
    ).to(device)
    model = parallelize(model, options.parallel, world, device)
    torch.manual_seed(options.seed + 1 + rank)  # from here on (dropout) each worker has its own numbers

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps))
    data = corpus(options.corpus_bytes)
    sampler = Sampler(data, seed=options.seed, batch=options.batch, context=options.context, rank=rank, world=world)
    record = Record(options.out, rank, world)

    snapshots = Snapshotter(model=model, optimizer=optimizer, scheduler=scheduler, extra={"data": sampler})  # snapshotd
    first = snapshots.restore()  # snapshotd
    record.started(first)
    if first in options.digest or (first and options.digest_restored):
        record.state(first, model, optimizer, scheduler)

    for step in range(first, options.steps):
        began = time.monotonic()
        inputs, targets = sampler.next()
        logits = model(inputs.to(device))
        # The mean over the global batch, whatever part of it this worker has: DDP and FSDP average over workers.
        share = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum")
        loss = share * (world / (options.batch * options.context))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        snapshots.capture(step)  # snapshotd

        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
            total /= world
        record.loss(step, total)
        if step + 1 in options.digest:
            record.state(step + 1, model, optimizer, scheduler)
        if options.step_ms:
            time.sleep(max(0.0, options.step_ms / 1000 - (time.monotonic() - began)))

    record.state(options.steps, model, optimizer, scheduler, final=True)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still needs the group
        dist.destroy_process_group()


def start_processes(options: argparse.Namespace) -> torch.device:
    """Join the process group of torchrun, if there is one; returns this worker's device."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.device_count() >= local_world else "cpu"
    if kind == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if "RANK" in os.environ:
        dist.init_process_group(options.backend or ("nccl" if kind == "cuda" else "gloo"))
    elif options.parallel != "none":
        raise SystemExit(f"--parallel {options.parallel} needs torchrun; use --parallel none for one plain process")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def parallelize(model: nn.Module, parallel: str, world: int, device: torch.device) -> nn.Module:
    if parallel == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if parallel == "ddp":
        # Without it DDP groups the gradients anew after the first step of each process. Of three workers or more that
        # is another order of sums, so a run that was restarted would differ in the last bits, whoever restored it.
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return model


def warmup_cosine(steps: int) -> Any:
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


class Record:
    """
    What a run leaves in DIR for comparing it bit by bit with another one; rank 0 writes it.

    run.jsonl             one line per start ({"start": step, "world": n}) and per step ({"step": n, "loss": hex float})
    state-N.json          digest of every tensor of the whole state after N steps
    final.json, .safetensors   the same at the end, and the tensors themselves
    """

    def __init__(self, directory: Path | None, rank: int, world: int) -> None:
        self._directory, self._rank, self._world = directory, rank, world
        self._file = -1
        if directory is not None and rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(directory / "run.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def started(self, first: int) -> None:
        self._write({"start": first, "world": self._world, "pid": os.getpid()})

    def loss(self, step: int, loss: Tensor) -> None:
        if self._rank != 0:
            return
        value = loss.item()
        self._write({"step": step, "loss": value.hex(), "world": self._world})
        if self._directory is None:
            print(f"step {step}: loss {value:.4f}", flush=True)

    def state(self, step: int, model: nn.Module, optimizer: Any, scheduler: Any, *, final: bool = False) -> None:
        """Gather the whole state (every worker takes part) and write its digests."""
        if self._directory is None:
            return
        from full_state import gather, write_safetensors, write_summary

        tensors, values = gather(model, optimizer, {"scheduler": scheduler.state_dict(), "steps": step})
        if self._rank != 0:
            return
        if final:
            write_safetensors(self._directory / "final.safetensors", tensors)
        write_summary(self._directory / ("final.json" if final else f"state-{step}.json"), tensors, values)

    def _write(self, line: dict[str, object]) -> None:
        if self._file >= 0:
            # One write of a whole line: a SIGKILL leaves it whole or away.
            os.write(self._file, (json.dumps({**line, "time": time.time()}) + "\n").encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own library source.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("fsdp2", "ddp", "none"), default="fsdp2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA for all, or none")
    parser.add_argument("--backend", default="", help="of torch.distributed; default: nccl on CUDA, else gloo")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="bytes per sample")
    parser.add_argument("--batch", type=int, default=12, help="samples per step, over all workers")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--corpus-bytes", type=int, default=4 << 20)
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="leave losses and digests there")
    parser.add_argument("--step-ms", type=float, default=0, help="let a step last at least that long, to watch it")
    parser.add_argument(
        "--digest",
        type=lambda text: {int(part) for part in text.split(",")},
        default=set(),
        metavar="N,...",
        help="write the digests of the whole state after these numbers of steps, too",
    )
    parser.add_argument("--digest-restored", action="store_true", help="the same after each restore")
    return parser.parse_args()


if __name__ == "__main__":
    main()
