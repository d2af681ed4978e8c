"""
What the ranks of test_dcp_mesh.py do under torchrun: ``mesh_ranks.py FOLDER``. Asserts here end the test.

A module under FSDP2 x tensor parallelism on a 2 x 2 mesh takes what was converted, by plain ``dcp.load``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def module_of(truth: dict[str, Any], mesh: DeviceMesh) -> torch.nn.Module:
    """A module with the parameters of the truth, zeros, cut as ``truth["dims"]`` says."""
    root = torch.nn.Module()
    for name, whole in truth["model"].items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        value = torch.zeros_like(whole)
        if name in truth["dims"]:
            value = distribute_tensor(value, mesh["tp"], [Shard(truth["dims"][name])])
        owner.register_parameter(last, torch.nn.Parameter(value))
    fully_shard(root, mesh=mesh["dp"])
    return root


def tree_of(module: torch.nn.Module, names: list[str]) -> dict[str, Any]:
    """What a trainer passes to dcp.load: the weights and a moment of each, as DTensors."""
    weights = {name: tensor for name, tensor in module.state_dict().items() if name in names}
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in weights.items()}
    return {"model": weights, "optim": {"state": moments}}


def assert_same(truth: dict[str, Any], tree: dict[str, Any]) -> None:
    for name, tensor in tree["model"].items():
        assert isinstance(tensor, DTensor), name
        assert torch.equal(truth["model"][name], tensor.full_tensor()), name
        assert torch.equal(truth["exp_avg"][name], tree["optim"]["state"][name]["exp_avg"].full_tensor()), name


def load(folder: Path) -> None:
    truth = torch.load(folder / "truth.pt")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = module_of(truth, mesh)
    tree = tree_of(module, list(truth["model"]))
    dcp.load(tree, checkpoint_id=str(folder / "dcp"))
    assert_same(truth, tree)
    own = folder / f"own_{dist.get_rank()}"
    own.mkdir()
    for file in (".metadata", f"__{dist.get_rank()}_0.distcp"):
        shutil.copy(folder / "dcp" / file, own)
    tree = tree_of(module_of(truth, mesh), truth["local"])
    dcp.load(tree, storage_reader=dcp.FileSystemReader(str(own)))  # nothing of what it needs lies in another file
    assert_same(truth, tree)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    load(Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # gloo's threads may bring the process down when they are torn down at its end
