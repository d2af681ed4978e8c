"""
Megatron's parameters by name: how tensor ranks share each of them, in which order a module lists them, their numbers.

Rules (a name that no rule covers is an error as soon as there is more than one tensor rank):

* ``vocabulary``  rows of the padded vocabulary, one block a rank; the padding is cut off the whole
* ``column``      rows (dim 0), one block a rank. Queries, keys and values lie by query group, so blocks follow
* ``gated``       rows, each rank's block being [its part of gate; its part of up]
* ``row``         columns (dim 1)
* ``replicated``  the same on every rank
* ``fused_in``, ``fused_out``  GroupedMLP's weight1 and weight2: all experts of a rank in one matrix
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Filled, Merged
from snapshotd.universal.readers.conventions import looks_like_buffer
from snapshotd.universal.views import Cut, Joined, Reshaped, View, concat, files_of

__all__ = [
    "EMBEDDING",
    "OUTPUT",
    "cut_rows",
    "in_list_order",
    "is_buffer",
    "is_expert",
    "layer_of",
    "list_order",
    "merge",
    "merge_fused",
    "pad_rows",
    "renumbered",
    "rule_of",
    "split",
]

EMBEDDING: Final = "embedding.word_embeddings.weight"
OUTPUT: Final = "output_layer.weight"

_RULES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(rf"(?:^|\.)(?:{pattern})$"), rule)
    for pattern, rule in (
        (r"experts\.weight1", "fused_in"),
        (r"experts\.weight2", "fused_out"),
        (r"(?:lm_head|pooler|binary_head)\..*", "replicated"),
        (r"word_embeddings\.weight", "vocabulary"),
        (r"output_layer\.(?:weight|bias)", "vocabulary"),
        (r"(?:position|tokentype)_embeddings\.weight|tokentype_embeddings", "replicated"),
        (r"[a-z_]*(?:norm|layernorm)\d?\.(?:weight|bias)|.*\.layer_norm_(?:weight|bias)", "replicated"),
        (r"linear_[a-z_]*down_proj\.weight", "replicated"),
        (
            r"(?:linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(?:weight|bias)",
            "column",
        ),
        (r"(?:query_key_value|query|key_value)\.(?:weight|bias)", "column"),
        (r"core_attention\.softmax_offset", "column"),
        (r"(?:linear_fc1|dense_h_to_4h)\.(?:weight|bias)\d*", "fc1"),
        (r"(?:linear_fc2|dense_4h_to_h|linear_proj|self_attention\.dense|inter_attention\.dense)\.weight\d*", "row"),
        (
            r"(?:linear_fc2|dense_4h_to_h|linear_proj|self_attention\.dense|inter_attention\.dense)\.bias\d*",
            "replicated",
        ),
        (r"router\.(?:weight|bias|expert_bias|local_tokens_per_expert)", "replicated"),
        (r"shared_experts\.gate_weight", "replicated"),
        (r"eh_proj\.weight", "column"),
    )
)

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


def rule_of(name: str, gated: bool) -> str | None:
    """Return the rule for a parameter; None when there is none."""
    for pattern, rule in _RULES:
        if pattern.search(name):
            if rule == "fc1":
                return "gated" if gated else "column"
            return rule
    return None


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


def merge(name: str, rule: str, views: Sequence[View]) -> View:
    """Return the whole of a parameter, or of a state of it, whose parts of all tensor ranks are ``views``."""
    first = views[0]
    if len(views) == 1 or not first.shape:
        return first if len(views) == 1 else Merged(views, "equal", name)
    dim = 1 if rule == "row" else 0
    for view in views:
        same = view.shape[:dim] == first.shape[:dim] and view.shape[dim + 1 :] == first.shape[dim + 1 :]
        if view.dtype != first.dtype or len(view.shape) != len(first.shape) or not same:
            raise FormatError(
                f"{name}: tensor ranks differ: {first.dtype} {list(first.shape)} in {files_of(first)}, {view.dtype} "
                f"{list(view.shape)} in {files_of(view)}: files of different runs in one folder"
            )
    if rule == "replicated":
        return Merged(views, "equal", name)
    if rule == "gated":
        return _merge_gated(name, views)
    return concat(views, dim)


def _merge_gated(name: str, views: Sequence[View]) -> View:
    rows = sum(view.shape[0] for view in views)
    parts: list[tuple[Sequence[int], View]] = []
    at = 0
    for view in views:
        half, odd = divmod(view.shape[0], 2)
        if odd:
            raise FormatError(f"{name}: {view.shape[0]} rows in {files_of(view)} are no [gate; up]")
        rest, zeros = view.shape[1:], (0,) * (len(view.shape) - 1)
        parts.append(((at, *zeros), Cut(view, (0, *zeros), (half, *rest))))
        parts.append(((rows // 2 + at, *zeros), Cut(view, (half, *zeros), (half, *rest))))
        at += half
    return Joined(views[0].dtype, (rows, *views[0].shape[1:]), parts)


def merge_fused(rule: str, grid: Sequence[Sequence[View]], experts: int, gated: bool) -> View:
    """
    Return GroupedMLP's matrix for all experts; ``grid``: by expert rank, then by tensor rank; ``experts``: per rank.

    Its memory is one block per expert: [hidden, ffn] (weight1, read so in spite of its shape) and [ffn, hidden].
    """
    first = grid[0][0]
    hidden = first.shape[0] if rule == "fused_in" else first.shape[1]
    local = [[view.numel // max(1, experts * hidden) for view in row] for row in grid]
    width = sum(local[0])
    parts: list[tuple[Sequence[int], View]] = []
    for e, row in enumerate(grid):
        at = 0
        for view, mine in zip(row, local[e], strict=True):
            if rule == "fused_out":
                parts.append(((e * experts, at, 0), Reshaped(view, (experts, mine, hidden))))
                at += mine
                continue
            block = Reshaped(view, (experts, hidden, mine))
            pieces = 2 if gated else 1
            size = mine // pieces
            for piece in range(pieces):
                cut = Cut(block, (0, 0, piece * size), (experts, hidden, size))
                parts.append(((e * experts, 0, piece * (width // pieces) + at), cut))
            at += size
    total = experts * len(grid)
    if rule == "fused_out":
        return Reshaped(Joined(first.dtype, (total, width, hidden), parts), (total * width, hidden))
    return Reshaped(Joined(first.dtype, (total, hidden, width), parts), (hidden, total * width))


def split(name: str, rule: str, view: View, rank: int, size: int) -> View:
    """Return what tensor rank ``rank`` of ``size`` has of a whole tensor: the inverse of ``merge``."""
    if size == 1 or rule == "replicated" or not view.shape:
        return view
    dim = 1 if rule == "row" else 0
    pieces = 2 if rule == "gated" else 1
    length = view.shape[dim] if dim < len(view.shape) else 0
    if length % (size * pieces):
        raise FormatError(f"{name}: {length} rows or columns cannot be divided over {size} tensor ranks")
    part = length // (size * pieces)
    cuts: list[View] = []
    for piece in range(pieces):
        at, shape = [0] * len(view.shape), list(view.shape)
        at[dim], shape[dim] = piece * (length // pieces) + rank * part, part
        cuts.append(Cut(view, at, shape))
    return concat(cuts, dim)


def cut_rows(view: View, rows: int | None) -> View:
    """Return the first ``rows`` rows: the vocabulary without its padding."""
    if rows is None or not view.shape or view.shape[0] <= rows:
        return view
    return Cut(view, (0,) * len(view.shape), (rows, *view.shape[1:]))


def pad_rows(view: View, rows: int) -> View:
    """Return ``view`` with zeros behind it, up to ``rows`` rows."""
    if not view.shape or view.shape[0] >= rows:
        return view
    return concat([view, Filled(view.dtype, (rows - view.shape[0], *view.shape[1:]))], 0)
