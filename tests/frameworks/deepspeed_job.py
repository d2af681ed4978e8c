"""
Runs of the real DeepSpeed: train, capture the live state, save, go on; or load a checkpoint and go on.

Each rank is a process. They are forked off one server that has imported DeepSpeed already, and meet through a file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 20_000
TIMEOUT_S = int(os.environ.get("DEEPSPEED_RUN_TIMEOUT_S", "300"))
CLIENT = {"iteration": 4, "consumed_samples": 48, "dataloader": {"epoch": 0, "index": 4, "order": [2, 0, 1]}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    One run. ``optimizer``: a class of torch.optim that the client makes, or ``config:NAME`` for the configuration's.
    """

    name: str
    world: int = 2
    stage: int = 1
    dtype: str = "bf16"
    groups: str = "decay"
    optimizer: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    next_steps: int = 3
    exclude_frozen: bool = False
    zero_init: bool = False
    scheduler: str = "config"
    client: bool = True
    tag: str | None = None
    changes: tuple[str, ...] = ()
    pp: int = 0
    micro: int = 2
    partition: str = "uniform"
    tp: int = 1
    gather_head: bool = False
    experts: int = 0
    ep: int = 1
    expert_layers: int = 1
    residual: bool = False

    def ds_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": False}
        if self.stage in (1, 2):
            zero |= {"reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000}
        if self.stage == 3:
            zero |= {"reduce_bucket_size": 50_000, "stage3_prefetch_bucket_size": 50_000}
            zero |= {"stage3_param_persistence_threshold": 0}
        config: dict[str, Any] = {
            "train_batch_size": 12 if 12 % self.world == 0 else self.world,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero | self.zero,
        }
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.scheduler == "config":
            params = {"warmup_min_lr": 1e-5, "warmup_max_lr": 3e-3, "warmup_num_steps": 2, "total_num_steps": 24}
            config["scheduler"] = {"type": "WarmupDecayLR", "params": params}
        if self.optimizer.startswith("config:"):
            config["optimizer"] = {"type": self.optimizer.removeprefix("config:"), "params": self.options}
        if self.pp:
            config["train_micro_batch_size_per_gpu"] = 12 // (self.world // self.pp) // self.micro
            config["gradient_accumulation_steps"] = self.micro
        if self.tp > 1:
            from tests.frameworks.deepspeed_models import tp_config

            config["tensor_parallel"] = tp_config(self)
            del config["train_batch_size"]
            config["train_micro_batch_size_per_gpu"] = 12 * self.tp // self.world
            config["gradient_accumulation_steps"] = 1
        for key, value in self.config.items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        return config


def launch(work: str, case: Case, folder: Path, **arguments: Any) -> None:
    """Run ``work`` (train or resume) in ``case.world`` processes; RuntimeError with tracebacks when one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", __name__])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            context.Process(target=_rank, args=(work, case, rank, str(folder), meeting, arguments))
            for rank in range(case.world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=TIMEOUT_S)
        stuck = [process for process in ranks if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        logs = [Path(meeting) / f"{rank}.log" for rank in range(case.world)]
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if failed or stuck:
            texts = [f"--- rank {rank}\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs) if log.exists()]
            raise RuntimeError(f"{case.name}: ranks {failed} of {case.world} failed\n" + "\n".join(texts[:2]))


def _rank(work: str, case: Case, rank: int, folder: str, meeting: str, arguments: dict[str, Any]) -> None:
    log = open(f"{meeting}/{rank}.log", "w", buffering=1)  # noqa: SIM115 the process ends with it
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.dump_traceback_later(TIMEOUT_S - 20, file=log)  # where it hangs, if it does
    with contextlib.suppress(BaseException):
        try:
            _start(case, rank, meeting)
            (_train if work == "train" else _resume)(case, Path(folder), **arguments)
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()
            log.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
    os._exit(1)


def _start(case: Case, rank: int, meeting: str) -> None:
    import deepspeed
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(case.world), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(CROSS_RANK="0", CROSS_SIZE="1", LOCAL_SIZE=str(case.world))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and leave files in /dev/shm
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=case.world, auto_mpi_discovery=False,
        verbose=False,
    )
    torch.manual_seed(SEED + rank)


class Run:
    """An engine over the tiny GPT, and what is needed to train and to look into it."""

    def __init__(self, case: Case, universal: bool = False) -> None:
        import deepspeed
        import torch
        import torch.distributed as dist

        from tests.fixtures import model as tiny
        from tests.frameworks import deepspeed_models as models

        self.case, self.tiny, self.models = case, tiny, models
        config = case.ds_config()
        if universal:
            config["checkpoint"] = {"load_universal": True}
        with deepspeed.zero.Init(config_dict_or_path=config) if case.zero_init else contextlib.nullcontext():
            built = models.build(case, dist.get_rank())
        self.cfg, self.names, self.merge, model = built.cfg, built.names, built.merge, built.model
        shapes = {name: getattr(param, "ds_shape", param.shape) for name, param in model.named_parameters()}
        groups = tiny.groups_of(model, case.groups, shapes=shapes)
        if case.experts:
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

            groups = split([{**group, "name": f"group {g}"} for g, group in enumerate(groups)])
        groups = [group for group in groups if group["params"]]  # as DeepSpeed itself does
        self.groups = [[self.names[id(param)] for param in group["params"]] for group in groups]
        optimizer, scheduler = None, None
        if not case.optimizer.startswith("config:"):
            kind = getattr(torch.optim, case.optimizer)
            known = (*kind.__init__.__code__.co_varnames, "params", "name", "moe")
            listed = [{k: v for k, v in group.items() if k in known} for group in groups]
            optimizer = kind(listed, **{"lr": 3e-3, **case.options})
        if case.scheduler == "torch":
            scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, tiny.warm_cos())  # noqa: E731
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=None if optimizer else groups, config=config,
            lr_scheduler=scheduler,
        )
        if case.optimizer == "config:Muon":  # it makes groups of its own
            self.groups = [[self.names[id(param)] for param in group] for group in self.engine.optimizer.bit16_groups]
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        import torch
        import torch.distributed as dist

        case = self.case
        if case.pp:
            grid = self.engine.grid
            rank, world = grid.get_data_parallel_id(), grid.data_parallel_size
            batches = self.models.micro_batches(self.cfg, number, rank, world, case.micro)
            self.losses.append(float(self.engine.train_batch(batches)))
            return
        world, rank = dist.get_world_size() // case.tp, dist.get_rank() // case.tp
        ids, targets = self.tiny.batch(self.cfg, number, rank, world, n=12 if 12 % world == 0 else world)
        loss = self.tiny.loss_of(self.engine, self.cfg, ids, targets)
        self.engine.backward(loss)
        self.engine.step()
        self.engine.module.tokens_seen += ids.numel() * world
        mean = loss.detach().to(torch.float64)
        dist.all_reduce(mean)
        self.losses.append(mean.item() / dist.get_world_size())

    def capture(self) -> Any:
        import torch.distributed as dist

        from tests.frameworks.deepspeed_live import capture

        if self.case.tp > 1:  # its layers are new ones
            self.names = {id(param): name for name, param in self.engine.module.named_parameters()}
        return capture(self.engine, self.names, self.groups, self.merge, dist.get_rank() % self.case.tp)


def _train(case: Case, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    run = Run(case)
    for number in range(case.steps):
        run.step(number)
    live = run.capture()
    client: dict[str, Any] = {}
    if case.client:
        client = {**CLIENT, "torch_rng": torch.get_rng_state()}
    run.engine.save_checkpoint(str(folder / "ckpt"), tag=case.tag, client_state=client,
                               exclude_frozen_parameters=case.exclude_frozen)
    if case.client:
        live.tensors["rng/0"] = _of_rank_0(torch.get_rng_state())
    before, run.losses = run.losses, []
    for number in range(case.steps, case.steps + case.next_steps):
        run.step(number)
    if dist.get_rank() == 0:
        more = {"losses": before, "next_losses": run.losses, "world_size": case.world}
        _write_truth(folder, run, live, client, more)


def _of_rank_0(tensor: Any) -> Any:
    import torch.distributed as dist

    tensor = tensor.clone()
    dist.broadcast(tensor, 0)
    return tensor


def _resume(case: Case, folder: Path, source: str) -> None:
    """Load the DeepSpeed Universal folder in ``source`` into a fresh engine, capture what it holds, and go on."""
    import torch.distributed as dist

    run = Run(case, universal=True)
    path, client = run.engine.load_checkpoint(source)
    assert path is not None, f"DeepSpeed found nothing in {source}"
    live = run.capture()
    first = run.engine.global_steps
    for number in range(first, first + case.next_steps):
        run.step(number)
    if dist.get_rank() == 0:
        kept = {key: client[key] for key in CLIENT if key in client}
        _write_truth(folder, run, live, kept, {"next_losses": run.losses})


def _write_truth(folder: Path, run: Run, live: Any, client: dict[str, Any], more: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in live.tensors.items()}
    save_file(tensors, folder / "truth.safetensors")
    facts = {
        "step": live.counters["global_steps"],
        **live.counters,
        "tied": live.tied,
        "frozen": live.frozen,
        "param_groups": live.groups,
        "client_state": {key: value for key, value in client.items() if key != "torch_rng"},
        "ds_config": run.case.ds_config(),
        "model": run.cfg.facts(),
        **more,
    }
    (folder / "truth.json").write_text(json.dumps(facts, indent=1, default=str))
