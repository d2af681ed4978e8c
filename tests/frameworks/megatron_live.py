"""
The state of live ranks as one undivided model, by the modules' own layer and expert numbers; and the ranks' processes.

No file and no code of the converter takes part: what comes out here is what a conversion has to give.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from tests.frameworks.megatron_job import Case, Run

TIMEOUT_S = 240
ROWS = ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def perform(case: Case, folder: Path, *, load: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    """
    Run ``case`` on as many processes as it has ranks: train, or load; note the live state; save; train 3 more steps.

    Returns what rank 0 saw: ``tensors`` by "kind/name", ``groups``, ``steps``, ``scheduler``, ``next_losses``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.pt"
    with tempfile.TemporaryDirectory() as place:
        ranks = [_start(case, rank, Path(place) / "store", result, load, save) for rank in range(case.world)]
        failed = _wait(ranks, folder)
    assert {} == failed
    return dict(torch.load(result, weights_only=False))


def _start(case: Case, rank: int, store: Path, result: Path, load: Path | None, save: Path | None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # what it starts itself ends with it
        log = os.open(result.parent / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.world)
        found = _rank(case, load, save)
        if rank == 0:
            torch.save(found, result)
        dist.barrier()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait(ranks: list[int], folder: Path) -> dict[int, str]:
    """The end of each rank's log for those that failed; one that fails takes the others with it."""
    codes: dict[int, int] = {}
    end = time.monotonic() + TIMEOUT_S
    while len(codes) < len(ranks):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            codes[ranks.index(child)] = status
        if time.monotonic() > end or any(codes.values()):
            for rank in set(range(len(ranks))) - set(codes):
                os.kill(ranks[rank], signal.SIGKILL)
                codes[rank] = os.waitpid(ranks[rank], 0)[1]
        time.sleep(0.02)
    for child in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return {
        rank: (folder / f"rank{rank}.log").read_text(errors="replace")[-2000:] for rank, code in codes.items() if code
    }


def _rank(case: Case, load: Path | None, save: Path | None) -> dict[str, Any]:
    run = Run(case)
    losses = run.train(case.steps) if load is None else []
    if load is not None:
        run.load(load)
    generator = torch.get_rng_state()
    everyone: list[Any] = [None] * case.world
    dist.all_gather_object(everyone, (_records(run), _groups(run), generator))
    if save is not None:
        run.save(save)
    found = {
        "step": run.step,
        "losses": losses,
        "scheduler": run.scheduler.state_dict(),
        "groups": [groups for _, groups, _ in everyone],
        "next_losses": run.train(3),
    }
    if dist.get_rank() == 0:
        found["tensors"] = _whole(case, [records for records, _, _ in everyone])
        found["tensors"].update({f"rng/{rank}": state for rank, (_, _, state) in enumerate(everyone)})
    return found


def _names(chunk: Any) -> dict[Any, str]:
    """Parameters to their names in the undivided model."""
    module = chunk.module
    while hasattr(module, "module"):
        module = module.module
    global_parts: list[tuple[str, str]] = []
    for name, part in module.named_modules():
        if hasattr(part, "local_expert_indices") and hasattr(part, "experts"):
            prefix = f"{name}.experts.local_experts"
            global_parts += [(f"{prefix}.{i}.", f"{prefix}.{e}.") for i, e in enumerate(part.local_expert_indices)]
    for name, part in module.named_modules():
        if type(part).__name__ == "TransformerLayer":
            global_parts.append((f"{name}.", f"{name.rpartition('.')[0]}.{part.layer_number - 1}."))
    found: dict[Any, str] = {}
    for name, parameter in module.named_parameters():
        whole = name
        for local, real in [one for one in global_parts if "experts" in one[0] and name.startswith(one[0])]:
            whole = real + name[len(local) :]
        for local, real in [one for one in global_parts if "experts" not in one[0] and name.startswith(one[0])]:
            whole = real + whole[len(local) :]
        found[parameter] = whole
    return found


def _optimizers(run: Run) -> list[Any]:
    return [one for one in run.optimizer.chained_optimizers if not getattr(one, "is_stub_optimizer", False)]


def _states(run: Run) -> dict[Any, dict[str, tuple[int, torch.Tensor]]]:
    """Parameter to states by kind: (the first element that this rank has, its flat piece)."""
    found: dict[Any, dict[str, tuple[int, torch.Tensor]]] = {}
    for one in _optimizers(run):
        if isinstance(one, DistributedOptimizer):
            for parameter in one.model_param_group_index_map:
                begin = one._get_model_param_range_map(parameter)["param"].start
                states = one._get_main_param_and_optimizer_states(parameter)
                found[parameter] = {kind: (begin, value) for kind, value in states.items() if torch.is_tensor(value)}
            continue
        models = _models_of(one)
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                states = dict(one.optimizer.state[main])
                if main in models:
                    states["param"] = main
                found[models.get(main, main)] = {kind: (0, value.reshape(-1)) for kind, value in states.items()}
    return {
        parameter: {kind: (begin, value.detach().clone()) for kind, (begin, value) in states.items()}
        for parameter, states in found.items()
    }


def _models_of(optimizer: Any) -> dict[Any, Any]:
    half, full = getattr(optimizer, "float16_groups", []), getattr(optimizer, "fp32_from_float16_groups", [])
    return {main: model for a, b in zip(half, full, strict=True) for model, main in zip(a, b, strict=True)}


def _groups(run: Run) -> list[tuple[dict[str, Any], list[str]]]:
    """(hyperparameters, names) of this rank's groups, all optimizers of a chain in their order."""
    names = {parameter: name for chunk in run.model for parameter, name in _names(chunk).items()}
    found: list[tuple[dict[str, Any], list[str]]] = []
    for one in _optimizers(run):
        members: list[list[str]] = [[] for _ in one.optimizer.param_groups]
        if isinstance(one, DistributedOptimizer):
            for parameter, (group, _) in one.model_param_group_index_map.items():
                members[group].append(names[parameter])
        else:
            models = _models_of(one)
            for mine, group in zip(members, one.optimizer.param_groups, strict=True):
                mine += [names[models.get(main, main)] for main in group["params"]]
        for mine, group in zip(members, one.optimizer.param_groups, strict=True):
            found.append(({key: value for key, value in group.items() if key not in ("params", "step")}, mine))
    return found


def _records(run: Run) -> list[dict[str, Any]]:
    states = _states(run)
    return [
        {
            "name": name,
            "pp": mpu.get_pipeline_model_parallel_rank(),
            "tp": mpu.get_tensor_model_parallel_rank(),
            "ep": mpu.get_expert_model_parallel_rank(),
            "weight": parameter.detach().clone(),
            "states": states.get(parameter, {}),
        }
        for chunk in run.model
        for parameter, name in _names(chunk).items()
    ]


def _whole(case: Case, everyone: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in (record for records in everyone for record in records):
        by_name.setdefault(record["name"], []).append(record)
    found: dict[str, torch.Tensor] = {}
    for name, records in by_name.items():
        by_rank: dict[int, dict[str, torch.Tensor]] = {}
        for record in records:
            if record["pp"] == records[0]["pp"]:
                _fill(by_rank.setdefault(record["tp"], {}), record)
        parts = [by_rank[rank] for rank in sorted(by_rank)]
        for kind in parts[0]:
            whole = _join(name, [part[kind] for part in parts], case.swiglu)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")) and whole.dim():
                whole = whole[: case.vocab]
            found[f"{kind}/{name}"] = whole.clone()
    if case.tied:
        for key in [key for key in found if key.endswith("/output_layer.weight")]:
            first = key.replace("output_layer.weight", "embedding.word_embeddings.weight")
            assert torch.equal(found[first], found.pop(key)), key
    return found


def _fill(into: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    weight = record["weight"]
    into["model"] = weight
    for kind, (begin, flat) in record["states"].items():
        if kind == "step":
            into["step"] = flat.reshape(())
            continue
        if kind == "param" and weight.dtype == torch.float32:
            continue
        whole = into.setdefault({"param": "fp32"}.get(kind, kind), torch.full(weight.shape, float("nan")))
        whole.view(-1)[begin : begin + flat.numel()] = flat.reshape(-1)


def _join(name: str, parts: list[torch.Tensor], swiglu: bool) -> torch.Tensor:
    if len(parts) == 1 or not parts[0].dim():
        return parts[0]
    if "linear_fc1" in name and swiglu:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    if any(word in name for word in ROWS):
        return torch.cat(parts)
    if name.endswith(COLUMNS):
        return torch.cat(parts, 1)
    assert all(torch.equal(parts[0], part) for part in parts), name
    return parts[0]
