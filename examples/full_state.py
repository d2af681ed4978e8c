"""
The whole training state in one place, for comparing two runs bit by bit: gathered, digested, written.

Nothing here knows which optimizer it is: every tensor in the optimizer's state and every value in its parameter groups
is taken.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from snapshotd.layout.header import Header, RawTensor, encode_header

__all__ = ["gather", "write_safetensors", "write_summary"]

_TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, values: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Return (tensors by name, JSON values): parameters, buffers, optimizer state, param groups, and `values`.

    Every rank must call it, in the same order: sharded tensors are put together by collectives.
    """
    tensors: dict[str, Tensor] = {}
    values = dict(values)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[f"model.{name}"] = _whole(tensor)
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = _whole(value)
            else:
                values[f"optimizer.{name}.{key}"] = value
    for index, group in enumerate(optimizer.param_groups):
        values[f"group.{index}"] = {key: value for key, value in group.items() if key != "params"}
    return tensors, values


def write_summary(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """JSON: dtype, shape and SHA-256 of each tensor, and the values; there whole or not at all."""
    summary = {
        "tensors": {
            name: {
                "dtype": _TAGS[tensor.dtype],
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(_bytes(tensor)).hexdigest(),
            }
            for name, tensor in tensors.items()
        },
        "values": values,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1, default=_exact), encoding="utf-8")
    temporary.replace(path)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors as one safetensors file, in the order given."""
    entries: dict[str, RawTensor] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = RawTensor(tag=_TAGS[tensor.dtype], shape=tuple(tensor.shape), begin=offset, end=end)
        offset = end
    with path.open("wb") as file:
        file.write(encode_header(Header(metadata={"format": "pt"}, tensors=entries)))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _exact(value: object) -> object:
    raise TypeError(f"{value!r} is not JSON")
