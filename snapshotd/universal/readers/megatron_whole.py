"""
The undivided model out of the parts of all ranks, and the State around it: what both of Megatron's formats share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.derived import Merged
from snapshotd.universal.globals import NumpyArray, TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import Part
from snapshotd.universal.readers.megatron_groups import GroupTable
from snapshotd.universal.readers.megatron_names import EMBEDDING, OUTPUT, is_buffer, is_expert
from snapshotd.universal.readers.megatron_padding import put_padding
from snapshotd.universal.readers.megatron_rules import is_fused, looks_gated, merge_fused, rules_for
from snapshotd.universal.rules import Rejoiner, Rules
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.views import View, files_of

__all__ = ["Whole", "put_rng", "put_vocabulary", "step_view"]

_COMPARED_NUMEL: Final = 1 << 16
"""Copies on expert ranks that are larger are not compared: that would read the dense model once per expert rank."""


class Whole:
    """
    Parts of ranks, added in any order of ranks but in the model's order of names; ``put`` makes a State of them.

    ``rules``: the user's own.
    """

    def __init__(self, facts: Facts, rules: Rules | None = None) -> None:
        self.facts, self.given = facts, rules
        self.parts: dict[str, dict[Place, Part]] = {}
        self.groups = GroupTable()
        self.warnings: list[str] = []

    def add(self, place: Place, part: Part) -> None:
        mine = self.parts.setdefault(part.name, {})
        if place in mine:
            raise FormatError(f"{part.name} is there twice, in {files_of(mine[place].view)} and {files_of(part.view)}")
        mine[place] = part

    def put(self, state: State) -> None:
        """Add tensors, tied names and groups to ``state``."""
        rules = self._rules()
        rejoiner = Rejoiner(rules, self.facts.tp)
        whole: dict[str, dict[str, View]] = {}
        for name, parts in self.parts.items():
            kind = "buffer" if is_buffer(name, next(iter(parts.values())).view) else "model"
            views = {place: part.view for place, part in parts.items()}
            whole[name] = {kind: self._whole(rejoiner, name, views, kind)}
            for kind in dict.fromkeys(kind for part in parts.values() for kind in part.states):
                found = {place: part.states[kind] for place, part in parts.items() if kind in part.states}
                whole[name][kind] = self._whole(rejoiner, name, found, kind)
        self._tie(state, whole)
        kinds = dict.fromkeys(kind for views in whole.values() for kind in views)
        for kind in sorted(kinds, key=lambda kind: {"model": 0, "buffer": 1, "fp32": 2}.get(kind, 3)):
            state.tensors += [Tensor(kind, name, views[kind]) for name, views in whole.items() if kind in views]
        put_padding(state, {key: view for key, view in rejoiner.padding.items() if key[1] in whole})
        self.groups.put(state, {name: i for i, name in enumerate(whole)})
        if state.param_groups:
            listed = {name for group in state.param_groups for name in group["names"]}
            state.frozen += [name for name, views in whole.items() if "model" in views and name not in listed]
        state.warnings += self.warnings + rejoiner.warnings()

    def _rules(self) -> Rules:
        """UsageError that lists the parameters that several tensor ranks have and no rule covers."""
        shown = {name: next(iter(parts.values())).view for name, parts in self.parts.items()}
        gated = looks_gated(shown) if self.facts.gated is None else None
        rules = rules_for(self.facts, self.given, gated)
        shared = [
            name
            for name, view in shown.items()
            if not is_buffer(name, view) and not is_fused(name) and self._ranks(name) > 1
        ]
        rules.require(
            "model", shared, f"the run had {self.facts.tp} tensor ranks; say with --rules how they share these"
        )
        return rules

    def _ranks(self, name: str) -> int:
        return self.facts.etp if is_expert(name) else self.facts.tp

    def _whole(self, rejoiner: Rejoiner, name: str, views: Mapping[Place, View], kind: str) -> View:
        if is_fused(name) and next(iter(views.values())).shape:
            return self._fused(rejoiner.rules, name, views)
        ranks, rule = self._ranks(name), rejoiner.rules.find(kind, name)
        by_rank: dict[int, list[View]] = {}
        for place, view in sorted(views.items(), key=lambda item: (item[0].ep, item[0])):
            by_rank.setdefault(place.tp % ranks, []).append(view)
        divided = rule is not None and rule.how in ("sharded", "flattened")
        if kind in ("model", "buffer") or divided:
            self._complete(name, len(by_rank), ranks, views)
        copies = [self._one(name, by_rank[rank]) for rank in sorted(by_rank)]
        if name.endswith((EMBEDDING, OUTPUT)):
            self._check_padded(name, copies)
        if rule is not None:
            return rejoiner.merge(kind, name, copies)
        return copies[0] if len(copies) == 1 else Merged(copies, "equal", name)

    def _fused(self, rules: Rules, name: str, views: Mapping[Place, View]) -> View:
        facts = self.facts
        grid: dict[int, dict[int, View]] = {}
        for place, view in sorted(views.items()):
            grid.setdefault(place.ep, {}).setdefault(place.tp % facts.etp, view)
        rows = [[row[tp] for tp in sorted(row)] for _, row in sorted(grid.items())]
        self._complete(name, len(rows), facts.ep, views)
        return merge_fused(name, rows, facts.experts_per_rank, rules.sizes["glu"] == 2)

    def _one(self, name: str, copies: Sequence[View]) -> View:
        """Expert ranks are data-parallel ranks to all but the experts: their copies are the same."""
        if len(copies) == 1 or copies[0].numel > _COMPARED_NUMEL:
            return copies[0]
        return Merged(copies, "equal", name)

    def _complete(self, name: str, found: int, expected: int, views: Mapping[Place, View]) -> None:
        if found != expected:
            files = ", ".join(files_of(view) for view in list(views.values())[:3])
            raise FormatError(
                f"{name} is on {found} of {expected} ranks that should have a part of it (it is in {files})"
            )

    def _check_padded(self, name: str, shards: Sequence[View]) -> None:
        padded = self.facts.count("padded_vocab_size")
        rows = sum(view.shape[0] for view in shards if view.shape)
        if padded is not None and rows and rows != padded:
            raise FormatError(
                f"{name} has {rows} rows in all, but args say padded_vocab_size {padded} ({files_of(shards[0])})"
            )

    def _tie(self, state: State, whole: dict[str, dict[str, View]]) -> None:
        """
        Tied embeddings: the first and the last stage have a copy each; with one stage there is one tensor.

        The copies are compared when they are read, all states of them.
        """
        if not self.facts.tied:
            return
        first = next((name for name in whole if name.endswith(EMBEDDING)), None)
        if first is None:
            return
        alias = next((name for name in whole if name.endswith(OUTPUT)), None)
        if alias is None:
            alias = first[: -len(EMBEDDING)] + OUTPUT
        copies = whole.pop(alias, {})
        for kind, view in copies.items():
            known = whole[first].get(kind)
            whole[first][kind] = view if known is None else Merged([known, view], "equal", f"{kind} of {first}")
        state.tied[alias] = first


def put_vocabulary(state: State, facts: Facts) -> None:
    """Say in ``source`` how the vocabulary was padded."""
    padded, true = facts.count("padded_vocab_size"), facts.count("vocab_size")
    if padded is not None:
        state.source["padded_vocab_size"] = padded
    if true is not None:
        state.source["vocab_size"] = true


def put_rng(state: State, rank: int, saved: Any) -> None:
    """Put what one rank's generators had into ``state``: torch's as tensors, Python's and numpy's in ``extra``."""
    if not isinstance(saved, Mapping):
        return
    others: dict[str, Any] = {}
    for key, value in saved.items():
        if key == "torch_rng_state" and isinstance(value, TensorRef):
            state.tensors.append(Tensor("rng", str(rank), value.view))
        elif key == "cuda_rng_state" and isinstance(value, TensorRef):
            state.tensors.append(Tensor("rng", f"{rank}/cuda", value.view))
        elif key == "rng_tracker_states" and isinstance(value, Mapping):
            for name, item in value.items():
                if isinstance(item, TensorRef):
                    state.tensors.append(Tensor("rng", f"{rank}/cuda/{name}", item.view))
                else:
                    others.setdefault(key, {})[name] = item
        elif value is not None:
            others[key] = _numbers(value)
    if others:
        kept = state.extra.setdefault("rng_state", {})
        kept[str(rank)] = to_json(others, f"rng_state.{rank}", state.tensors)


def _numbers(value: Any) -> Any:
    """numpy's generator as plain numbers: its array has 624 of them, and set_state takes a list."""
    if isinstance(value, NumpyArray):
        return value.value.tolist()
    return [_numbers(item) for item in value] if isinstance(value, (list, tuple)) else value


def step_view(value: Any) -> View | None:
    """Return the optimizer's step as a 0-d view: of its own dtype, int64 for an int, float32 for a float."""
    if isinstance(value, TensorRef):
        return value.view if value.numel == 1 else None
    if type(value) is int:
        return scalar(value, "int64")
    if type(value) is float:  # the 0-d float32 tensor of torch's AdamW, put through item()
        return scalar(value, "float32")
    return None
