"""
How Megatron's tensor ranks share a parameter: the user's rules, behind them the package's preset ``megatron``.

Numbers that ``args`` record come before those under a file's [sizes]. One thing is not for the language of rules:
GroupedMLP's weight1 and weight2, which hold all experts of a rank in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_names import is_buffer
from snapshotd.universal.rules import Rules, load_rules, split
from snapshotd.universal.views import Cut, Joined, Reshaped, View

__all__ = ["is_fused", "looks_gated", "merge_fused", "rules_for", "share_of"]

_FUSED: Final = re.compile(r"(?:^|\.)experts\.weight[12]\Z")
_FIRST: Final = re.compile(r"(.*\.)(?:linear_fc1|dense_h_to_4h)(\.weight\d*)\Z")
_SECOND: Final = ("linear_fc2", "dense_4h_to_h")


def rules_for(facts: Facts, given: Rules | None = None, gated: bool | None = None) -> Rules:
    """Return the rules of a run. ``gated``: whether its MLPs begin with [gate; up], where ``args`` do not say it."""
    gated = gated if facts.gated is None else facts.gated
    recorded = {
        "glu": None if gated is None else 1 + gated,
        "vocabulary": facts.count("vocab_size"),
        "multiple": facts.count("make_vocab_size_divisible_by"),
    }
    preset = load_rules("megatron")
    own, sizes, label = ([], {}, preset.label) if given is None else (given.rules, given.sizes, given.label)
    known = {key: size for key, size in recorded.items() if size is not None}
    return Rules([*own, *preset.rules], {**preset.sizes, **sizes, **known}, label)


def looks_gated(weights: Mapping[str, View]) -> bool | None:
    """
    Whether the first matrices of MLPs are [gate; up], by their shapes on one rank; None where nothing shows it.

    They have twice as many rows as the second ones have columns then.
    """
    found: set[bool] = set()
    for name, view in weights.items():
        match = _FIRST.match(name)
        second = [weights.get(f"{match[1]}{module}{match[2]}") for module in _SECOND] if match else []
        found |= {view.shape[:1] == (2 * other.shape[-1],) for other in second if other is not None and other.shape}
    if len(found) > 1:
        raise FormatError("some MLPs look as if they began with [gate; up], others not, and there are no args")
    return next(iter(found), None)


def is_fused(name: str) -> bool:
    """Whether a parameter is GroupedMLP's weight1 or weight2."""
    return _FUSED.search(name) is not None


def share_of(rules: Rules, kind: str, name: str, view: View, rank: int, ranks: int) -> View:
    """Return what tensor rank ``rank`` of ``ranks`` has of a whole tensor, whose vocabulary is padded already."""
    if ranks == 1:
        return view
    rule = rules.find(kind, name)
    if rule is None and not is_buffer(name, view):
        rules.require(kind, [name], f"there are {ranks} tensor ranks")
    return view if rule is None else split(rule.as_padded(), name, view, ranks)[rank]


def merge_fused(name: str, grid: Sequence[Sequence[View]], experts: int, gated: bool) -> View:
    """
    Return GroupedMLP's matrix for all experts; ``grid``: by expert rank, then by tensor rank; ``experts``: per rank.

    Its memory is one block per expert: [hidden, ffn] (weight1, read so in spite of its shape) and [ffn, hidden].
    """
    first, incoming = grid[0][0], name.endswith("1")
    hidden = first.shape[0] if incoming else first.shape[1]
    local = [[view.numel // max(1, experts * hidden) for view in row] for row in grid]
    width = sum(local[0])
    parts: list[tuple[Sequence[int], View]] = []
    for e, row in enumerate(grid):
        at = 0
        for view, mine in zip(row, local[e], strict=True):
            if not incoming:
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
    if not incoming:
        return Reshaped(Joined(first.dtype, (total, width, hidden), parts), (total * width, hidden))
    return Reshaped(Joined(first.dtype, (total, hidden, width), parts), (hidden, total * width))
