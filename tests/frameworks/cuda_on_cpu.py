"""
torch.cuda on a machine without one: enough of it, on CPU tensors and gloo, for frameworks that call it everywhere.

Model, layers, optimizers, schedules and checkpoints stay the framework's own. Streams and events do nothing, devices
named cuda are the CPU, and two collectives that gloo does not have are made of those that it has.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
MAKERS = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "linspace", "as_tensor"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)


class Nothing:
    """A stream or an event: whatever is asked of it has happened already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Nothing()


def install() -> None:
    """Put the stand-ins in place, for this process."""
    _put_cuda()
    _put_tensors()
    _put_collectives()
    torch.compile = lambda target=None, **kwargs: target if target is not None else (lambda inner: inner)


def _put_cuda() -> None:
    cuda = torch.cuda
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "manual_seed_all", "_lazy_call"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: CPU
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=8, minor=0, total_memory=1 << 30)
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = Nothing
    cuda.current_stream = cuda.default_stream = Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    for module in (cuda, cuda.random):
        module.manual_seed = torch.manual_seed
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda._lazy_call = lambda call, **kwargs: call()
    cuda.default_generators = types.SimpleNamespace()
    cuda.default_generators = _Generators()
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor", "ByteTensor"):
        setattr(cuda, name, getattr(torch, name))


class _Generators:
    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _put_tensors() -> None:
    tensor = torch.Tensor
    tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args: self
    tensor.record_stream = lambda self, *args: None
    tensor.is_cuda = property(lambda self: True)
    named = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = named(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    tensor.type = type_
    moved = tensor.to
    tensor.to = lambda self, *args, **kwargs: moved(self, *map(_on_cpu, args), **_all_on_cpu(kwargs))
    for name in MAKERS:
        setattr(torch, name, _maker(getattr(torch, name)))


def _maker(real: Any) -> Any:
    return lambda *args, **kwargs: real(*args, **_all_on_cpu(kwargs))


def _on_cpu(value: Any) -> Any:
    cuda = str(value).startswith("cuda") if isinstance(value, (str, torch.device)) else False
    return CPU if cuda else value


def _all_on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: _on_cpu(value) for key, value in kwargs.items() if key != "pin_memory"}


def _put_collectives() -> None:
    def reduce_scatter(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, **kwargs: Any) -> Any:
        whole = input.clone()
        dist.all_reduce(whole, op=op, group=group)
        begin = dist.get_rank(group) * output.numel()
        output.copy_(whole.reshape(-1)[begin : begin + output.numel()].reshape(output.shape))
        return Nothing() if kwargs.get("async_op") else None

    def all_to_all(output: Any, input: Any, outs: Any = None, ins: Any = None, group: Any = None, **kw: Any) -> Any:
        outs, ins = kw.get("output_split_sizes", outs), kw.get("input_split_sizes", ins)
        outs, ins = ([int(size) for size in sizes] if sizes is not None else None for sizes in (outs, ins))
        world = dist.get_world_size(group)
        parts = [part.detach().clone() for part in input.split(ins or [input.shape[0] // world] * world)]
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, parts, group=group)
        output.copy_(torch.cat([theirs[dist.get_rank(group)] for theirs in everyone]))
        return Nothing() if kw.get("async_op") else None

    dist.reduce_scatter_tensor = dist._reduce_scatter_base = reduce_scatter
    dist.all_to_all_single = all_to_all
