"""
The order in which models list their parameters, for names that a file has in another one.

safetensors files are sorted by name, but an optimizer's numbers count in the order of the modules. A name says where
its module stands; in which order well-known modules list their parts stands here. It decides nothing alone: the
optimizer's shapes must fit the order, see param_ids.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["module_order"]

_ORDERS: Final[tuple[tuple[str, ...], ...]] = tuple(
    tuple(line.split())
    for line in """
    weight bias
    logit_scale text_model vision_model visual_projection text_projection
    cls_token mask_token position_embeddings patch_embeddings
    word_embeddings position_embeddings token_type_embeddings LayerNorm
    class_embedding token_embedding patch_embedding position_embedding
    shared encoder decoder
    embeddings embeddings_project encoder decoder transformer layers layer layernorm pooler
    embeddings pre_layrnorm encoder post_layernorm
    wte wpe h ln_f
    word_embeddings word_embeddings_layernorm h ln_f
    embed_tokens layers norm
    embed_tokens layers final_layernorm
    embed_in layers final_layer_norm
    embed_tokens embed_positions final_layer_norm layers
    conv1 conv2 embed_tokens embed_positions layers layer_norm layernorm_embedding
    embed_tokens block final_layer_norm
    model transformer gpt_neox bert roberta electra deberta vit backbone encoder decoder lm_head embed_out cls
    distilbert vocab_transform vocab_layer_norm vocab_projector
    pooler classifier qa_outputs score
    bias transform decoder
    bias dense layer_norm decoder
    dense LayerNorm
    q_proj k_proj v_proj o_proj dense q_norm k_norm
    k_proj v_proj q_proj out_proj
    o_proj qkv_proj
    query key value
    query_proj key_proj value_proj
    q_lin k_lin v_lin out_lin
    q k v o relative_attention_bias
    query_key_value dense
    c_attn c_proj
    self output
    gate_proj up_proj down_proj
    gate_up_proj down_proj
    experts gate shared_expert
    fc1 fc2
    fc_in fc_out
    c_fc c_proj
    lin1 lin2
    wi wi_0 wi_1 wo
    w1 w2 w3
    dense_h_to_4h dense_4h_to_h
    self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    self_attn block_sparse_moe input_layernorm post_attention_layernorm
    ln_1 attn ln_2 mlp
    self_attention mlp input_layernorm
    input_layernorm self_attention post_attention_layernorm mlp
    input_layernorm post_attention_layernorm attention mlp
    self_attn self_attn_layer_norm encoder_attn encoder_attn_layer_norm fc1 fc2 final_layer_norm
    self_attn layer_norm1 mlp layer_norm2
    attention layernorm_before layernorm_after mlp
    attention intermediate output layernorm_before layernorm_after
    attention sa_layer_norm ffn output_layer_norm
    SelfAttention EncDecAttention DenseReluDense layer_norm
    norm mixer
    conv1d in_proj x_proj dt_proj out_proj
    norm1 attn norm2 mlp
    attention feed_forward attention_norm ffn_norm
    tok_embeddings layers norm output
    lora_A lora_B
    """.strip().splitlines()
)
"""Parts of one module, in order. For the parts that a module has, the line that knows most of them is taken."""

_PLACES: Final = tuple({part: i for i, part in enumerate(order)} for order in _ORDERS)


def module_order(names: Iterable[str]) -> list[str]:
    """Return ``names`` in the order of ``named_parameters()``, as far as their parts are known; else by name."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
    return list(_walk(tree, ""))


def _walk(tree: dict[str, Any], prefix: str) -> Iterable[str]:
    places = max(_PLACES, key=lambda known: sum(part in known for part in tree))

    def place(part: str) -> tuple[Any, ...]:
        # A module's own parameters come before those of its parts, numbered parts in order of their numbers.
        number = int(part) if part.isdigit() else -1
        return bool(tree[part]), places.get(part, len(places)), number, _natural(part)

    for part in sorted(tree, key=place):
        if tree[part]:
            yield from _walk(tree[part], f"{prefix}{part}.")
        else:
            yield prefix + part


def _natural(text: str) -> list[Any]:
    return [(0, int(item), "") if item.isdigit() else (1, 0, item) for item in re.split(r"([0-9]+)", text) if item]
