"""
`python zero.py STAGE RANKS BYTES DIRECTORY`: DeepSpeed trains a step and saves its checkpoint, of about BYTES, in bf16.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.multiprocessing as mp
from model import sized, tokens

_PARAMETER_BYTES = 14  # bf16, master, two moments


def rank_main(rank: int, stage: int, ranks: int, nbytes: float, directory: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import deepspeed

    # Its collectives in shared memory would be compiled first, and leave their buffers in /dev/shm.
    deepspeed.comm.torch.build_shm_op = lambda: None
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    model = sized(nbytes / _PARAMETER_BYTES)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    loss = engine(tokens())
    engine.backward(loss)
    engine.step()
    # What ds_to_universal wants, and its users have to give; stage 3 does not look at it.
    engine.save_checkpoint(directory, client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stage, ranks, nbytes, directory, port = sys.argv[1:]
    mp.spawn(rank_main, (int(stage), int(ranks), float(nbytes), directory, int(port)), nprocs=int(ranks))
