"""
Experts of DeepSpeed's MoE: the same local names on every expert-parallel rank, for different experts.

Native MoE numbers the experts of a rank from 0 in the optimizer's files, and globally in the files of weights; the
undivided model has the global numbers. AutoEP keeps the experts of a layer in one tensor, ``<prefix>.experts.w1``,
whose first dimension is cut over the expert-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.views import View, concat

__all__ = ["EXPERT", "Experts", "rank_sets"]

EXPERT: Final = re.compile(r"(.*\bdeepspeed_experts\.)([0-9]+)(\..*|\Z)")
_FUSED: Final = re.compile(r".*\bexperts\.w[123]\Z")


def rank_sets(world: int, partitions: int, dp_before_ep: bool) -> list[list[int]]:
    """
    Return, for each expert-parallel rank, the data-parallel ranks that hold its experts, in order of their partitions.

    ``partitions``: how many ranks share a group. With world 4 and 2 partitions: [[0, 2], [1, 3]], or [[0, 1], [2, 3]]
    when ``use_data_before_expert_parallelism`` is set.
    """
    ep = world // partitions
    if dp_before_ep:
        return [list(range(e * partitions, (e + 1) * partitions)) for e in range(ep)]
    return [list(range(e, world, ep)) for e in range(ep)]


class Experts:
    """The parameters of one group, on ``ep`` expert-parallel ranks, under the names of the undivided model."""

    def __init__(self, group: Mapping[str, tuple[int, ...]], ep: int, what: str) -> None:
        self.ep = ep
        self.fused = False
        self._found: dict[tuple[str, str], list[View]] = {}
        self._local: dict[str, int] = {}
        if ep == 1:
            return
        for name in group:
            match = EXPERT.match(name)
            if match:
                self._local[match[1]] = max(self._local.get(match[1], 0), int(match[2]) + 1)
            elif _FUSED.match(name):
                self.fused = True
            else:
                raise FormatError(
                    f"{what} is shared by fewer ranks than there are, as experts are, but {name} is no name of an "
                    "expert: this layout is not known here"
                )
        if self.fused and self._local:
            raise FormatError(f"{what} mixes experts of DeepSpeed's MoE and of AutoEP: this layout is not known here")
        self.names = list(group)

    def name(self, local: str, e: int) -> str:
        """The global name of what expert-parallel rank ``e`` calls ``local``."""
        match = EXPERT.match(local) if self.ep > 1 and not self.fused else None
        if match is None:
            return local
        return f"{match[1]}{e * self._local[match[1]] + int(match[2])}{match[3]}"

    def add(self, kind: str, e: int, views: Mapping[str, View]) -> None:
        """Take the views of expert-parallel rank ``e``."""
        self.seen = list(views)
        for local, view in views.items():
            self._found.setdefault((kind, self.name(local, e)), []).append(view)

    def joined(self) -> dict[tuple[str, str], View]:
        """All that was added, under its names; AutoEP's one behind the other on the first dimension."""
        return {key: concat(views) for key, views in self._found.items()}

    def ordered(self, names: Sequence[str]) -> list[str]:
        """The names of the whole group: layer by layer, in each layer the experts in their order."""
        if self.ep == 1 or self.fused:
            return list(names)
        result: list[str] = []
        for _, run in groupby(names, key=lambda name: EXPERT.sub(r"\1", name)):
            members = list(run)
            result += [self.name(name, e) for e in range(self.ep) for name in members]
        return result

    def owners(self) -> Iterator[tuple[str, int]]:
        """Each name, with the expert-parallel rank that holds it (the first where all do)."""
        for e in range(self.ep):
            for local in self.seen:
                if e == 0 or not self.fused:
                    yield self.name(local, e), e
