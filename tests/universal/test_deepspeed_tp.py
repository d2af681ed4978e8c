"""Tensor-parallel ranks of DeepSpeed put together by what the checkpoint itself says."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.readers import read
from tests.universal.test_deepspeed_make import Run, expect, zero3, zero12

SHAPES = {
    "embed.weight": (13, 6),
    "attn.qkv.weight": (16, 6),
    "attn.qkv.bias": (16,),
    "attn.out.weight": (6, 9),
    "mlp.gate_up.weight": (10, 6),
    "mlp.down.weight": (6, 5),
    "norm.weight": (6,),
}
Cut = Callable[[torch.Tensor], list[torch.Tensor]]


def sub_cut(dim: int, widths: list[list[int]]) -> Cut:
    """Each rank has ``widths[sub][rank]`` of each sub-parameter, one behind the other."""

    def cut(whole: torch.Tensor) -> list[torch.Tensor]:
        subs = whole.split([sum(row) for row in widths], dim)
        pieces = [sub.split(row, dim) for sub, row in zip(subs, widths, strict=True)]
        return [torch.cat([piece[t] for piece in pieces], dim) for t in range(len(widths[0]))]

    return cut


def shards_of(run: Run, cuts: dict[str, Cut], tp: int) -> list[Run]:
    """What each tensor rank holds: cut parameters in pieces, all else whole."""
    found = []
    for t in range(tp):
        part = copy.deepcopy(run)
        for tensors in (part.master, *part.states.values(), part.model, part.cold):
            for name in tensors:
                if name in cuts:
                    tensors[name] = cuts[name](tensors[name])[t].clone()
        part.shapes = {name: tuple(tensor.shape) for name, tensor in part.master.items()}
        found.append(part)
    return found


def piece(shape: Any, source: tuple[int, Any], dest: tuple[int, Any], ranks: list[int], scale: float = 1.0) -> Any:
    found = {
        "shape": list(shape),
        "source": [source[0], list(source[1])],
        "dest": [dest[0], list(dest[1])],
        "locations": ranks,
    }
    return found if scale == 1.0 else {**found, "scale": scale}  # DeepSpeed leaves out what is 1


WIDTHS = {
    "attn.qkv.weight": [[6, 2], [3, 1], [3, 1]],  # whole heads: 3 : 1
    "attn.qkv.bias": [[6, 2], [3, 1], [3, 1]],
    "mlp.gate_up.weight": [[3, 2], [3, 2]],
    "embed.weight": [[7, 6]],
    "attn.out.weight": [[5, 4]],
    "mlp.down.weight": [[3, 2]],
}
DIMS = {"attn.out.weight": 1, "mlp.down.weight": 1}
CUTS = {name: sub_cut(DIMS.get(name, 0), widths) for name, widths in WIDTHS.items()}


def exact(name: str) -> str:
    return f"^{re.escape(name)}$"


def autotp_info() -> dict[str, Any]:
    """As AutoTP writes it, version 0.4; frozen parameters have a pattern too, aliases have none."""
    subs = ["attn.qkv.weight", "attn.qkv.bias", "mlp.gate_up.weight"]
    return {
        "universal_checkpoint_version": 0.4,
        "parameter_with_row_parallelism_patterns": [exact("attn.out.weight"), exact("mlp.down.weight")],
        "tp_replicated_parameter_patterns": [exact("norm.weight"), exact("pos.weight"), exact("pos.bias")],
        "vocabulary_parameter_patterns": [exact("embed.weight")],
        "original_vocab_size": 13,
        "parameter_with_sub_params": [
            {
                "patterns": [exact(name)],
                "shape": [tuple(map(sum, WIDTHS[name])), *([-1] if len(SHAPES[name]) > 1 else [])],
                "partition_dim": 0,
            }
            for name in subs
        ],
        "sub_param_shard_widths": {exact(name): WIDTHS[name] for name in subs},
        "autotp_unsupported_parameter_patterns": {},
    }


def write(root: Path, run: Run, info: Any, dp: int, *, stage: int, cuts: dict[str, Cut] = CUTS) -> Path:
    more = {"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}, "mp_world_size": 2}
    if info is not None:
        more["universal_checkpoint_info"] = info
    for t, part in enumerate(shards_of(run, cuts, 2)):
        if stage == 3:
            zero3(root, part, dp, mp=t, more=more)
        else:
            zero12(root, part, dp, stage=stage, mp=t, more=more)
    return root


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_autotp_with_uneven_heads_and_vocabulary(tmp_path: Path, stage: int, dp: int) -> None:
    """Fused qkv under grouped-query attention and SwiGLU are no plain blocks; norms must not grow."""
    run = Run(dtype=torch.bfloat16, shapes=SHAPES, seed=dp)
    state = read(write(tmp_path, run, autotp_info(), dp, stage=stage))
    expect(state, run.truth())
    assert run.param_groups() == state.param_groups
    assert {"dp": dp, "tp": 2, "pp": 1} == state.source["topology"]


def strides(shape: tuple[int, ...]) -> list[int]:
    return [int(torch.empty(shape).stride(d)) for d in range(len(shape))]


def affine_of(name: str) -> dict[str, Any]:
    shape = SHAPES[name]
    if name not in WIDTHS:
        whole = piece(shape, (0, strides(shape)), (0, strides(shape)), [0, 1])
        entry = {"shard_shape": list(shape), "pieces": [whole]}
        return {"logical_shape": list(shape), "ranks": {0: entry, 1: entry}}
    dim, widths = DIMS.get(name, 0), WIDTHS[name]
    ranks: dict[int, Any] = {}
    for t in (0, 1):
        local = list(shape)
        local[dim] = sum(row[t] for row in widths)
        pieces, begin, taken = [], 0, 0
        for row in widths:
            size = list(shape)
            size[dim] = row[t]
            at = (begin + sum(row[:t])) * strides(shape)[dim]
            own = strides(tuple(local))
            pieces.append(piece(size, (at, strides(shape)), (taken * own[dim], own), [t]))
            begin, taken = begin + sum(row), taken + row[t]
        ranks[t] = {"shard_shape": local, "pieces": pieces}
    return {"logical_shape": list(shape), "ranks": ranks}


@pytest.mark.parametrize("stage", [1, 3])
def test_affine_map_comes_before_the_patterns(tmp_path: Path, stage: int) -> None:
    """0.19.8 describes shards as strided blocks; a map it does not know must not be ignored."""
    run = Run(dtype=torch.bfloat16, shapes=SHAPES)
    info = {
        "universal_checkpoint_version": 0.4,
        "tp_replicated_parameter_patterns": [".*"],  # wrong for all but what has no map
        "affine_map": {"version": 1, "params": {exact(name): affine_of(name) for name in SHAPES}},
    }
    expect(read(write(tmp_path / "one", run, info, 2, stage=stage)), run.truth())
    info["affine_map"]["version"] = 2
    with pytest.raises(FormatError, match="affine_map has version 2"):
        read(write(tmp_path / "two", run, info, 2, stage=stage))


def test_affine_map_of_blocks_that_are_no_boxes_and_of_scaled_ones(tmp_path: Path) -> None:
    """Heads that are taken in turns, and a bias that is divided by the number of ranks."""
    run = Run(shapes={"turns.weight": (8, 3), "bias": (4,)}, groups=[["turns.weight", "bias"]], frozen={})
    turns = lambda whole: [whole.reshape(4, 2, 3)[:, t].reshape(4, 3) for t in (0, 1)]  # noqa: E731
    entry = {
        "logical_shape": [8, 3],
        "ranks": {
            t: {"shard_shape": [4, 3], "pieces": [piece((4, 3), (3 * t, (6, 1)), (0, (3, 1)), [t])]} for t in (0, 1)
        },
    }
    halved = {
        "logical_shape": [4],
        "ranks": {
            t: {"shard_shape": [4], "pieces": [piece((4,), (0, (1,)), (0, (1,)), [0, 1], 0.5)]} for t in (0, 1)
        },
    }
    info = {"affine_map": {"version": 1, "params": {exact("turns.weight"): entry, exact("bias"): halved}}}
    parts = shards_of(run, {"turns.weight": turns}, 2)
    for part in parts:
        part.master["bias"] = part.master["bias"] * 0.5
        part.model["bias"] = part.model["bias"] * 0.5
        part.states["exp_avg"]["bias"] = part.states["exp_avg"]["bias"] / 0.5
        part.states["exp_avg_sq"]["bias"] = part.states["exp_avg_sq"]["bias"] / 0.25
    more = {"mp_world_size": 2, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}
    for t, part in enumerate(parts):
        zero12(tmp_path, part, 2, mp=t, more={**more, "universal_checkpoint_info": info})
    expect(read(tmp_path), run.truth())


def test_patterns_of_client_code(tmp_path: Path) -> None:
    """Megatron-DeepSpeed's lists: two halves, a count of sub-parameters, averages, padded vocabulary, open ends."""
    shapes = {
        "word_embeddings.weight": (13, 4),
        "qkv.weight": (12, 4),
        "mlp.up.weight": (8, 4),
        "mlp.down.weight": (4, 8),
        "layernorm.weight": (4,),
        "other.weight": (6, 4),
    }
    run = Run(shapes=shapes, frozen={})
    info = {
        "universal_checkpoint_version": 0.3,
        "original_vocab_size": 13,
        "vocabulary_parameter_patterns": [r"word_embeddings\.weight"],
        "parameter_to_average_patterns": [r".*layernorm"],
        "parameter_with_2_sub_params_cat_dim_0": [r"mlp\.up\.weight"],
        "parameter_with_row_parallelism_patterns": [r"mlp\.down\.weight"],
        "parameter_with_sub_params": [{"patterns": [r"qkv\.weight"], "shape": (3, -1), "partition_dim": 0}],
    }
    cuts = {
        "word_embeddings.weight": lambda w: list(torch.cat([w, torch.full((3, 4), 9.0)]).split(8)),
        "qkv.weight": sub_cut(0, [[2, 2], [2, 2], [2, 2]]),
        "mlp.up.weight": sub_cut(0, [[2, 2], [2, 2]]),
        "mlp.down.weight": sub_cut(1, [[4, 4]]),
        "other.weight": sub_cut(0, [[3, 3]]),
    }
    state = read(write(tmp_path, run, info, 2, stage=1, cuts=cuts))
    expect(state, run.truth())
    assert any("averaged" in line and "layernorm.weight" in line for line in state.warnings)


def test_what_cannot_be_put_together_is_refused_by_name(tmp_path: Path) -> None:
    """Guessing a layout gives a model that runs and is wrong."""
    run = Run(shapes=SHAPES)
    cases: list[tuple[Any, str]] = [
        (None, "no universal_checkpoint_info.*embed.weight"),
        ({**autotp_info(), "sub_param_shard_widths": {}}, "sub_param_shard_widths for attn.qkv.weight"),
        (
            {**autotp_info(), "autotp_unsupported_parameter_patterns": {exact("norm.weight"): "yuan heads"}},
            "norm.weight was cut.*yuan heads",
        ),
        ({**autotp_info(), "tp_replicated_parameter_patterns": ["norm", "norm.*"]}, "norm.weight is matched by"),
        ({**autotp_info(), "original_vocab_size": None}, "original_vocab_size is None"),
        ({**autotp_info(), "tp_replicated_parameter_patterns": ["("]}, "no regular expression"),
    ]
    for i, (info, message) in enumerate(cases):
        with pytest.raises(UsageError if info is None else FormatError, match=message):
            read(write(tmp_path / str(i), run, info, 1, stage=1)).check()


def test_copies_that_should_be_equal_but_are_not_are_told(tmp_path: Path) -> None:
    run = Run(shapes=SHAPES)
    for t, part in enumerate(shards_of(run, CUTS, 2)):
        part.master["norm.weight"][0] += t
        part.model["norm.weight"][0] += t
        more = {"mp_world_size": 2, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}
        zero12(tmp_path, part, 1, mp=t, more={**more, "universal_checkpoint_info": autotp_info()})
    state = read(tmp_path)
    with pytest.raises(FormatError, match="norm.weight should be the same"):
        expect(state, run.truth())
