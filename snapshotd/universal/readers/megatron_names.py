"""
Megatron's parameters by name: their numbers in the whole model, and the order in which a module lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from snapshotd.universal.readers.conventions import looks_like_buffer
from snapshotd.universal.views import View

__all__ = [
    "EMBEDDING",
    "OUTPUT",
    "Order",
    "in_list_order",
    "is_buffer",
    "is_expert",
    "layer_of",
    "list_order",
    "order_of",
    "renumbered",
]

EMBEDDING: Final = "embedding.word_embeddings.weight"
OUTPUT: Final = "output_layer.weight"

_LAYER: Final = re.compile(r"^((?:.*?\.)?layers)\.(\d+)\.")
_LOCAL_EXPERT: Final = re.compile(r"(\.experts\.local_experts\.)(\d+)(\.)")
_GROUPED_EXPERT: Final = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)()$")

# The order in which modules are made, so that of named_parameters(); what is not here keeps its place behind them.
_ORDER: Final = {
    name: i
    for i, name in enumerate(
        (
            *("embedding", "word_embeddings", "position_embeddings", "tokentype_embeddings", "rotary_pos_emb"),
            *("encoder", "decoder", "layers", "input_layernorm", "self_attention", "core_attention"),
            *("linear_proj", "linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
            *("linear_kv_down_proj", "linear_kv_up_proj", "q_layernorm", "k_layernorm", "kv_layernorm"),
            *("pre_cross_attn_layernorm", "cross_attention", "linear_q", "linear_kv"),
            *("pre_mlp_layernorm", "mlp", "router", "experts", "local_experts", "linear_fc1", "linear_fc2"),
            *("shared_experts", "final_layernorm", "final_norm", "mtp", "output_layer"),
            *("layer_norm_weight", "layer_norm_bias", "gate_weight", "weight", "bias"),
        )
    )
}


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one of the routed experts."""
    return ".experts." in name


def is_buffer(name: str, view: View) -> bool:
    """Whether a tensor of the model's dict is no parameter."""
    return looks_like_buffer(name) or "int" in view.dtype or view.dtype == "bool"


def layer_of(name: str) -> tuple[str, int] | None:
    """Return ("decoder.layers", 3) for ``decoder.layers.3.mlp.linear_fc1.weight``; None outside of layers."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def renumbered(name: str, layers: Mapping[str, int], experts: int) -> str:
    """Return the name in the whole model: layers count on from ``layers`` (by list), experts from ``experts``."""
    match = _LAYER.match(name)
    if match:
        name = f"{match[1]}.{int(match[2]) + layers.get(match[1], 0)}.{name[match.end() :]}"
    for pattern in (_LOCAL_EXPERT, _GROUPED_EXPERT):
        name = pattern.sub(lambda found: f"{found[1]}{int(found[2]) + experts}{found[3]}", name)
    return name


def list_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts names as ``named_parameters()`` of a GPTModel lists them."""
    key: list[tuple[int, int, str]] = []
    for part in name.split("."):
        if part.isdigit():
            key.append((0, int(part), ""))
            continue
        stem = part if part in _ORDER else part.rstrip("0123456789")  # linear_fc1, but weight7
        number = int(part[len(stem) :] or 0) if stem in _ORDER else 0
        key.append((_ORDER.get(stem, len(_ORDER)), number, part))
    return tuple(key)


def in_list_order(name: str) -> bool:
    """Whether the place of a parameter in ``named_parameters()`` is known."""
    return all(place < len(_ORDER) for place, _, _ in list_order(name))


@dataclass(frozen=True, slots=True)
class Order:
    """Names as a module lists them; ``opening``: those that are in no layer, and in the first pipeline stage."""

    names: tuple[str, ...]
    opening: frozenset[str]


def order_of(names: Iterable[str]) -> Order:
    """
    Return the order of the model of which a source lists ``names`` so.

    Megatron's own are sorted by ``list_order``. Any other keeps its place behind what the source lists before it, in
    its layer where it is in one. One that is in no layer belongs to the first stage if it is before all layers.
    """
    names = list(names)
    known = sorted(filter(in_list_order, names), key=list_order)
    keys = {name: (float(i), 0) for i, name in enumerate(known)}
    begins = {layer_of(name): keys[name][0] - 0.5 for name in reversed(known)}
    last: dict[tuple[str, int] | None, float] = {}
    for number, name in enumerate(names, 1):
        layer = layer_of(name)
        if name not in keys:
            anywhere = last.get(None, -1.0)
            keys[name] = (anywhere if layer is None else last.get(layer, begins.get(layer, anywhere)), number)
        last[layer] = last[None] = keys[name][0]
    ordered = sorted(keys, key=keys.__getitem__)
    layers = next((i for i, name in enumerate(ordered) if layer_of(name) and not name.startswith("mtp.")), len(ordered))
    opening = {name for name in ordered[:layers] if not in_list_order(name)}
    return Order(tuple(ordered), frozenset(opening.union(name for name in ordered if name.startswith("embedding."))))
