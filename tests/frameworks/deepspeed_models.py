"""
The tiny GPT for each kind of DeepSpeed's parallelism: as it is, as a pipeline, with experts, and cut by AutoTP.

``build(case, rank)`` gives a ``Built``: the model, the names of this rank's parameters in the undivided model, and how
what the ranks hold makes a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.fixtures import model as tiny


@dataclass
class Built:
    model: Any
    names: dict[int, str]
    cfg: Any
    merge: Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


def build(case: Any, rank: int) -> Built:
    cfg = tiny.Cfg(**{"layers": 2, **case.model})
    if case.pp:
        model = pipeline(cfg, case)
        return Built(model, {id(param): name for name, param in model.named_parameters()}, cfg, _as_it_is)
    model = tiny.build(cfg)
    if case.experts:
        return with_experts(model, cfg, case, rank)
    for change in case.changes:
        CHANGES[change](model)
    if case.tp > 1:  # AutoTP cuts attention between the key-value heads that a config tells
        model.config = SimpleNamespace(
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, hidden_size=cfg.hidden
        )
    names = {id(param): name for name, param in model.named_parameters()}
    return Built(model, names, cfg, merge_tp(cfg, case) if case.tp > 1 else _as_it_is)


def _as_it_is(shards: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return shards[0]


def _empty_parameter(model: Any) -> None:
    """In a module that is never called: DeepSpeed 0.19.8 can not gather it for one that is, in stage 3."""
    model.spare = torch.nn.Module()
    model.spare.nothing = torch.nn.Parameter(torch.empty(0, 3))
    model.register_buffer("no_rows", torch.empty(0, 4))
    model.register_buffer("flags", torch.tensor([True, False, True]))
    model.register_buffer("sixteen", torch.tensor([1.5, -0.0], dtype=torch.float16))


def _unused_parameter(model: Any) -> None:
    model.idle = torch.nn.Parameter(torch.arange(7.0))


def _shared_module(model: Any) -> None:
    """Two layers that are one: all of their parameters have two names."""
    model.layers[1].mlp = model.layers[0].mlp


def _frozen_layer(model: Any) -> None:
    for param in model.layers[0].parameters():
        param.requires_grad_(False)


CHANGES: dict[str, Callable[[Any], None]] = {
    "empty": _empty_parameter,
    "unused": _unused_parameter,
    "shared": _shared_module,
    "frozen layer": _frozen_layer,
}


# ---------------------------------------------------------------------------------------------------------- pipelines


class Embed(torch.nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(cfg.vocab, cfg.hidden))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


class Position(torch.nn.Module):
    """Frozen, with an integer buffer that counts."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.empty(cfg.seq, cfg.hidden), requires_grad=False)
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.tokens_seen += x.shape[0] * x.shape[1]
        return x + self.table


class Head(torch.nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(cfg.vocab, cfg.hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def _tied_head(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.t()


def pipeline(cfg: Any, case: Any) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers: list[Any] = []
    if cfg.tied:
        layers.append(TiedLayerSpec("embed", Embed, cfg, tied_weight_attr="weight"))
    else:
        layers.append(LayerSpec(Embed, cfg))
    if cfg.frozen:
        layers.append(LayerSpec(Position, cfg))
    layers += [LayerSpec(tiny.Block, cfg, i) for i in range(cfg.layers)]
    layers.append(lambda x: x * 1.0)  # a layer without a file
    layers.append(LayerSpec(tiny.RMSNorm, cfg.hidden))
    if cfg.tied:
        layers.append(TiedLayerSpec("embed", Embed, cfg, forward_fn=_tied_head, tied_weight_attr="weight"))
    else:
        layers.append(LayerSpec(Head, cfg))
    loss = lambda out, target: torch.nn.functional.cross_entropy(  # noqa: E731
        out.float().reshape(-1, cfg.vocab), target.reshape(-1)
    )
    module = PipelineModule(layers, num_stages=case.pp, loss_fn=loss, partition_method=case.partition)
    with torch.no_grad():
        for name, param in module.named_parameters():
            _fill(name, param)
    return module


def _fill(name: str, param: torch.Tensor) -> None:
    """The same values for the same name, wherever it is."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7 + len(name))
    if param.dim() >= 2:
        param.copy_(torch.randn(param.shape, generator=generator) * 0.5 / param.shape[-1] ** 0.5)
    else:
        param.copy_(1 + 0.1 * torch.randn(param.shape, generator=generator))


# ------------------------------------------------------------------------------------------------------------ experts


def with_experts(model: Any, cfg: Any, case: Any, rank: int) -> Built:
    from deepspeed.moe.layer import MoE

    class Experts(MoE):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    ep = case.ep
    ep_rank = rank // (case.world // ep) if case.config.get("use_data_before_expert_parallelism") else rank % ep
    local = case.experts // ep
    for i in range(cfg.layers):
        if i % 2 == case.expert_layers:
            torch.manual_seed(1)
            model.layers[i].mlp = Experts(
                cfg.hidden, tiny.SwiGLU(cfg), num_experts=case.experts, ep_size=ep, k=1, use_rts=False,
                use_residual=case.residual,
            )
    names: dict[int, str] = {}
    for name, param in model.named_parameters():
        full = re.sub(
            r"(deepspeed_experts\.)(\d+)", lambda match: f"{match[1]}{ep_rank * local + int(match[2])}", name
        )
        names[id(param)] = full
        if ".mlp." in name:
            with torch.no_grad():
                _fill(full, param)
    return Built(model, names, cfg, _as_it_is)


# ------------------------------------------------------------------------------------------------------------- AutoTP


def tp_config(case: Any) -> dict[str, Any]:
    """What the configuration says to AutoTP: the fused matrices by their sub-parameters."""
    cfg = tiny.Cfg(**{"layers": 2, **case.model})
    d = cfg.hidden // cfg.heads
    sizes = [cfg.heads * d, cfg.kv_heads * d, cfg.kv_heads * d]
    specs: list[dict[str, Any]] = [
        {"patterns": [r".*attn\.out\.weight$", r".*mlp\.down\.weight$"], "partition_type": "row"},
    ]
    if cfg.fused:
        specs.append({"patterns": [r".*attn\.qkv\.weight$"], "partition_type": "column",
                      "shape": [sizes, -1], "partition_dim": 0})
        specs.append({"patterns": [r".*mlp\.gate_up\.weight$"], "partition_type": "column",
                      "shape": [2, -1], "partition_dim": 0})
    else:
        specs.append({"patterns": [r".*attn\.[qkv]\.weight$", r".*mlp\.(gate|up)\.weight$"],
                      "partition_type": "column"})
    if case.gather_head:
        specs.append({"patterns": [r".*lm_head\.weight$"], "partition_type": "column", "gather_output": True})
    return {"autotp_size": case.tp, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def merge_tp(cfg: Any, case: Any) -> Any:
    """What the tensor ranks hold, as a whole: ``{kind/name: tensor}`` of a list of such, by tensor rank."""

    def merge(shards: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: _merged(cfg, case, key, [shard[key] for shard in shards]) for key in shards[0]}

    return merge


def _merged(cfg: Any, case: Any, key: str, shards: list[torch.Tensor]) -> torch.Tensor:
    if shards[0].dim() == 0:
        return shards[0]
    if re.search(r"attn\.out\.weight|mlp\.down\.weight", key):
        return torch.cat(shards, 1)
    if re.search(r"attn\.qkv\.", key):
        h, kv = cfg.heads, cfg.kv_heads
        parts = [shard.split([len(shard) * n // (h + 2 * kv) for n in (h, kv, kv)]) for shard in shards]
        return torch.cat([part[i] for i in range(3) for part in parts])
    if re.search(r"mlp\.gate_up\.", key):
        return torch.cat([shard.chunk(2)[i] for i in range(2) for shard in shards])
    if re.search(r"attn\.[qkv]\.|mlp\.(gate|up)\.", key) or (case.gather_head and "lm_head" in key):
        return torch.cat(shards)
    assert all(torch.equal(shard, shards[0]) for shard in shards), key
    return shards[0]


def micro_batches(cfg: Any, number: int, rank: int, world: int, count: int) -> Iterator[tuple[Any, Any]]:
    """This rank's part of the batch of a step, in ``count`` parts, as a pipeline eats it."""
    ids, targets = tiny.batch(cfg, number, rank, world)
    return iter(zip(ids.chunk(count), targets.chunk(count), strict=True))
