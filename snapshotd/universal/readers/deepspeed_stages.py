"""
Optimizers without ZeRO that know a part of the model only: those of pipeline stages, and of expert-parallel ranks.

Such a file has numbers in the place of names, and no word about its part. What is known: experts are dealt out evenly,
in order; a stage has a run of layers, all stages together have all of them, and a tied module is on two stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Merged
from snapshotd.universal.readers.deepspeed_experts import EXPERT
from snapshotd.universal.readers.deepspeed_extra import check_steps
from snapshotd.universal.readers.deepspeed_files import Saved
from snapshotd.universal.readers.deepspeed_plain import num_parameters, read_plain
from snapshotd.universal.readers.deepspeed_weights import Weights
from snapshotd.universal.readers.deepspeed_zero import Optim
from snapshotd.universal.views import View

__all__ = ["check_experts", "read_experts", "read_stages"]


def read_stages(models: Sequence[Saved], weights: Weights) -> list[Optim]:
    """Return the optimizers of a pipeline's stages; ``models`` by stage, ``weights`` of all layers."""
    runs = [list(names) for _, names in groupby((n for n in weights.order if n in weights.model), key=_layer_of)]
    for shared in ([], runs[:1]):  # the first layer may be tied to one of the last stage
        found = _deal(models, weights, runs, shared)
        if found is not None:
            return found
    raise FormatError(
        f"{models[0].path} and the files of the other stages: their optimizers do not fit the weights in the layer "
        "files by order and shape: take all files of one step, or save with ZeRO stage 1, which writes names"
    )


def read_experts(files: Sequence[Saved], weights: Weights) -> Optim:
    """Return the optimizer of which each expert-parallel rank has a file; dense parameters are the same in all."""
    experts: dict[str, int] = {}
    for name in weights.model:
        if match := EXPERT.match(name):
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
    uneven = [prefix for prefix, count in experts.items() if count % len(files)]
    if uneven:
        raise FormatError(
            f"{files[0].path}: there are files of {len(files)} expert-parallel ranks, but {experts[uneven[0]]} experts "
            f"{uneven[0]}*: files are missing or of another run; take all files of one run"
        )
    result = Optim()
    parts = [
        read_plain(saved, Weights(model={n: v for n, v in weights.model.items() if _is_on(n, e, len(files), experts)}))
        for e, saved in enumerate(files)
    ]
    check_steps(parts, [[saved] for saved in files])
    copies: dict[tuple[str, str], list[View]] = {}
    for e, (saved, optim) in enumerate(zip(files, parts, strict=True)):
        for key, view in optim.tensors.items():
            copies.setdefault(key, []).append(view)
        result.shapes.update(optim.shapes)
        result.warnings += [line for line in optim.warnings if line not in result.warnings]
        result.odd.update(optim.odd)
        if not e:
            result.groups, result.rest = optim.groups, optim.rest
            continue
        if len(optim.groups) != len(result.groups):
            raise FormatError(
                f"{saved.path} has {len(optim.groups)} param_groups, {files[0].name} has {len(result.groups)}: the "
                "files are of different runs; take all files of one run"
            )
        for known, group in zip(result.groups, optim.groups, strict=True):
            known.names += [name for name in group.names if name not in known.names]
    for (kind, name), views in copies.items():
        is_one = len(views) == 1 or kind == "step" or not views[0].shape
        result.tensors[kind, name] = views[0] if is_one else Merged(views, "equal", f"{kind} of {name}")
    return result


def check_experts(saved: Saved, weights: Weights, optim: Optim) -> None:
    """Raise FormatError when the optimizer has some of a layer's experts only: ranks' files are missing."""
    trained = {match[1] for name in optim.shapes if (match := EXPERT.match(name))}
    lost = [n for n in weights.model if (m := EXPERT.match(n)) and m[1] in trained and n not in optim.shapes]
    if lost:
        raise FormatError(
            f"{saved.path.parent}: no optimizer has {', '.join(lost[:3])}, expected one expp_rank_*_optim_states.pt "
            "for each expert-parallel rank: copy what is missing from the nodes that wrote it, or take an older "
            "checkpoint"
        )


def _is_on(name: str, rank: int, ranks: int, experts: dict[str, int]) -> bool:
    match = EXPERT.match(name)
    return match is None or int(match[2]) // (experts[match[1]] // ranks) == rank


def _layer_of(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "tied_modules" else first


def _deal(
    models: Sequence[Saved], weights: Weights, runs: Sequence[list[str]], shared: Sequence[list[str]], begin: int = 0
) -> list[Optim] | None:
    """Give the layers from ``begin`` on to the stages; None where no way fits. ``shared``: may be on each stage."""
    if not models:
        return []
    needed = num_parameters(models[0])
    first = range(begin, len(runs) + 1) if len(models) > 1 else (len(runs),)
    for end in first:
        listed = [*(shared if begin else ()), *runs[begin:end]]
        part: dict[str, Any] = {name: weights.model[name] for names in listed for name in names}
        if len(part) < needed:
            continue
        try:
            optim = read_plain(models[0], Weights(model=part))
        except FormatError:
            continue
        rest = _deal(models[1:], weights, runs, shared, end)
        if rest is not None:
            return [optim, *rest]
    return None
