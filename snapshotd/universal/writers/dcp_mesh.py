"""
In which rank's file each box of a tensor lies, for a target layout.

DCP records the offsets of each box, and its reader intersects them with what a job wants: whatever is decided here, any
job can load the result. It decides how much of it lies in a rank's own file.

Ranks count as ``init_device_mesh`` with (pp, dp, tp) does: tensor ranks fastest. Layers are dealt to pipeline stages in
blocks; what comes before the first layer is of the first stage, what comes behind the last layer of the last. Inside a
stage a tensor is cut over the tensor ranks by its rule, then over the data-parallel ranks on dimension 0 as FSDP2 does.
Where no rule says that a tensor is sharded, all ranks of the stage share dimension 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

from snapshotd.errors import UsageError
from snapshotd.universal.rules import Rule, Rules, load_rules, widths

__all__ = ["Mesh"]

_SHARD_FROM: Final = 2
"""Tensors with fewer elements on dimension 0 are not cut."""

_LAYER: Final = re.compile(r"(.*?)\.(\d+)(?:\.|\Z)")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths."""


class Mesh:
    """The ranks of ``layout``; ``names`` are those of the model, in its order. UsageError for axes that DCP has not."""

    def __init__(self, layout: Mapping[str, int], rules: Rules | None, names: Sequence[str]) -> None:
        wrong = [axis for axis in ("ep", "vpp") if layout.get(axis, 1) > 1]
        if wrong:
            raise UsageError(f"--layout: {', '.join(wrong)} means nothing to DCP; it takes dp, tp, pp, and cp like dp")
        self.dp, self.tp, self.pp = layout.get("dp", 1) * layout.get("cp", 1), layout.get("tp", 1), layout.get("pp", 1)
        self.world = self.dp * self.tp * self.pp
        self.rules = rules if rules is not None else _common_names() if self.tp > 1 else None
        self.stages = _stages(names, self.pp)
        self.turn = [0] * self.pp

    def boxes(self, kind: str, name: str, shape: tuple[int, ...]) -> list[tuple[int, Box]]:
        """Return the boxes of a tensor, each with the rank in whose file it lies. They cover it exactly once."""
        stage = self.stages.get(name, self.pp - 1)
        first, ranks = stage * self.dp * self.tp, self.dp * self.tp
        rule = self._rule(kind, name, shape)
        if rule is not None:
            return [(first + rank, box) for rank, box in self._by_rule(rule, name, shape)]
        if ranks == 1 or not shape or shape[0] < _SHARD_FROM or 0 in shape:
            # What is not cut goes to the ranks in turn, so that their files are of about the same size.
            self.turn[stage] += 1
            return [(first + self.turn[stage] % ranks, ((0,) * len(shape), shape))]
        rest = (0,) * (len(shape) - 1)
        return [
            (first + rank, ((begin, *rest), (length, *shape[1:])))
            for rank, (begin, length) in enumerate(_chunks(shape[0], ranks))
        ]

    def _rule(self, kind: str, name: str, shape: tuple[int, ...]) -> Rule | None:
        """Only where the tensor ranks have different parts of it; a state of another shape has no such dimension."""
        rule = None if self.tp == 1 or self.rules is None else self.rules.find(kind, name)
        if rule is None or rule.how != "sharded" or rule.dim >= len(shape) or 0 in shape:
            return None
        return replace(rule, uneven=True)

    def _by_rule(self, rule: Rule, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
        """The boxes of each rank of a stage: one for each sub-part of a fused tensor that it has something of."""
        table = widths(rule, shape[rule.dim], self.tp, name)
        begins = list(accumulate((sum(row) for row in table), initial=0))
        for t in range(self.tp):
            runs = [(begin + sum(row[:t]), row[t]) for begin, row in zip(begins, table, strict=False) if row[t]]
            rows = sum(count for _, count in runs) if rule.dim == 0 else shape[0]
            for d, (begin, length) in enumerate(_chunks(rows, self.dp)):
                for at, count in _inside(runs, begin, length) if rule.dim == 0 else runs:
                    offsets, lengths = [0] * len(shape), list(shape)
                    offsets[0], lengths[0] = begin, length
                    offsets[rule.dim], lengths[rule.dim] = at, count
                    yield d * self.tp + t, (tuple(offsets), tuple(lengths))


def _common_names() -> Rules:
    """The preset for common names. DTensor knows no sub-parts: what is fused is cut in blocks."""
    preset = load_rules("transformers")
    return Rules([replace(rule, parts=1) for rule in preset.rules], preset.sizes, preset.label)


def _chunks(length: int, parts: int) -> list[tuple[int, int]]:
    """(begin, length) of the parts that torch.chunk makes; fewer than ``parts`` where it is short."""
    step = -(-length // parts)
    return [(begin, min(step, length - begin)) for begin in range(0, length, max(1, step))]


def _inside(runs: Sequence[tuple[int, int]], begin: int, length: int) -> Iterator[tuple[int, int]]:
    """What ``[begin, begin + length)`` of the runs, one behind the other, is of the whole."""
    at = 0
    for start, count in runs:
        low, high = max(begin, at), min(begin + length, at + count)
        if low < high:
            yield start + low - at, high - low
        at += count


def _stages(names: Sequence[str], pp: int) -> dict[str, int]:
    """The pipeline stage of each name; those that are not listed are of the last one."""
    layers: dict[tuple[str, str], int] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault((match[1], match[2]), len(layers))
    found: dict[str, int] = {}
    begun = False
    for name in names:
        match = _LAYER.match(name)
        begun = begun or match is not None
        if match:
            found[name] = layers[match[1], match[2]] * pp // len(layers)
        else:
            found[name] = pp - 1 if begun else 0
    return found
