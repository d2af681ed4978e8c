"""
``args`` of a Megatron-LM checkpoint for a target layout: those of the source, with what the layout changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_names import EMBEDDING, OUTPUT, layer_of
from snapshotd.universal.state import State, Tensor

__all__ = ["target_args"]

_FLAT_KINDS: Final = ("fp32", "exp_avg", "exp_avg_sq")
_ONE_MORE: Final = ("NullTokenizer", "NullMultimodalTokenizer")
"""These count an end-of-document token on top of --vocab-size before the padding is computed."""


def target_args(state: State, fields: Mapping[str, Any], layout: Mapping[str, int]) -> dict[str, Any]:
    """Return the source's args (``fields``), changed for ``layout``; without them, what the tensors show."""
    weights = state.of_kind("model")
    source = Facts(dict(fields), "args")
    tp, pp = layout.get("tp", source.tp), layout.get("pp", source.pp)
    vp, ep = layout.get("vpp", source.vp if pp == source.pp else 1), layout.get("ep", source.ep)
    same = (tp, pp, vp, ep) == (source.tp, source.pp, source.vp, source.ep)
    dp = layout.get("dp", (source.data_parallel_size or 1) if same else ep)
    args = dict(fields)
    layers = [at[1] for name in weights if (at := layer_of(name)) and not name.startswith("mtp.")]
    args.setdefault("num_layers", max(layers, default=-1) + 1)
    if "swiglu" not in args:
        args["swiglu"] = _looks_gated(weights)
    if "untie_embeddings_and_output_weights" not in args:
        args["untie_embeddings_and_output_weights"] = OUTPUT not in state.tied
    args["padded_vocab_size"] = _padded_size(source, weights[EMBEDDING].shape[0], tp)
    if not source.known:
        args["vocab_size"] = weights[EMBEDDING].shape[0]
    changes: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp if vp > 1 else None,
        "expert_model_parallel_size": ep,
        "ckpt_format": "torch",
        "use_distributed_optimizer": source.flag("use_distributed_optimizer") and _can_be_flat(state),
    }
    if not same or "dp" in layout or not source.known:
        etp = layout.get("tp", source.etp) if source.num_experts else tp
        changes.update(expert_tensor_parallel_size=min(etp, tp), data_parallel_size=dp, world_size=tp * pp * dp)
        changes.update(transformer_pipeline_model_parallel_size=pp, context_parallel_size=1)
    if (pp, vp) != (source.pp, source.vp):
        for key in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
            changes[key] = None
        changes["pipeline_model_parallel_layout"] = None
        changes["num_layers_per_virtual_pipeline_stage"] = None
    return {**args, **changes}


def _padded_size(source: Facts, rows: int, tp: int) -> int:
    """The rows that Megatron-LM gives the word embeddings of a vocabulary of ``rows``."""
    kept = source.count("padded_vocab_size")
    if tp == source.tp and kept is not None and kept >= rows:
        return kept
    if source.count("vocab_size") is None and rows % tp == 0 and source.known:
        return rows  # the padding is still on: how much of it there is, is not known
    step = (source.count("make_vocab_size_divisible_by") or 128) * tp
    tokens = rows + (source.text("tokenizer_type") in _ONE_MORE)
    return -(-tokens // step) * step


def _can_be_flat(state: State) -> bool:
    names = {name for group in state.param_groups for name in group["names"]}
    kinds = {kind for kind in (*state.optimizer_kinds, "fp32") if state.of_kind(kind)}
    return kinds <= {*_FLAT_KINDS, "step"} and all(
        kind == "fp32" or set(state.of_kind(kind)) >= names for kind in _FLAT_KINDS
    )


def _looks_gated(weights: Mapping[str, Tensor]) -> bool:
    first = next((name for name in weights if name.endswith("linear_fc1.weight")), None)
    second = first.replace("linear_fc1", "linear_fc2") if first else ""
    return bool(first) and second in weights and weights[first or ""].shape[0] == 2 * weights[second].shape[1]
