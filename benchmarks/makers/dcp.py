"""
`python dcp.py RANKS BYTES DIRECTORY PORT`: FSDP2 trains a step, torch.distributed.checkpoint saves it, of about BYTES.

`load_on` loads it again, on any number of ranks.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from model import GPT, sized, tokens
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

_PARAMETER_BYTES = 12  # fp32, two moments
_WIDTH_MAX = 1 << 16


def rank_main(rank: int, ranks: int, nbytes: float, directory: str, port: int) -> None:
    state = _trained(rank, ranks, nbytes, port)
    dcp.save(state, checkpoint_id=directory)
    torch.distributed.destroy_process_group()


def load_on(directory: str, ranks: int, port: int) -> float:
    """The seconds of `dcp.load` itself on the slowest of `ranks` ranks."""
    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    width = metadata["model.norm.weight"].size[0]
    context = mp.get_context("spawn")
    seconds = context.SimpleQueue()
    mp.spawn(_load_main, (ranks, width, directory, port, seconds), nprocs=ranks)
    return max(seconds.get() for _ in range(ranks))


def _load_main(rank: int, ranks: int, width: int, directory: str, port: int, seconds: Any) -> None:
    state = _trained(rank, ranks, width, port)
    torch.distributed.barrier()
    began = time.perf_counter()
    dcp.load(state, checkpoint_id=directory)
    seconds.put(time.perf_counter() - began)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _trained(rank: int, ranks: int, size: float, port: int) -> dict[str, Any]:
    """What a rank holds after a step. ``size``: bytes of the checkpoint, or the width of the model."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    model = GPT(int(size)) if size < _WIDTH_MAX else sized(size / _PARAMETER_BYTES)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(tokens()).backward()
    optimizer.step()
    weights, optim = get_state_dict(model, optimizer)
    return {"model": weights, "optim": optim, "step": 1}


if __name__ == "__main__":
    ranks, nbytes, directory, port = sys.argv[1:]
    mp.spawn(rank_main, (int(ranks), float(nbytes), directory, int(port)), nprocs=int(ranks))
