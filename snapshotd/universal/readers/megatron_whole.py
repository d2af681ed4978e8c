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
from snapshotd.universal.readers.megatron_padding import padding_rows, put_padding
from snapshotd.universal.readers.megatron_rules import cut_rows, is_buffer, is_expert, merge, merge_fused, rule_of
from snapshotd.universal.state import State, Tensor, scalar
from snapshotd.universal.views import View, files_of

__all__ = ["Whole", "put_rng", "put_vocabulary", "step_view"]

_COMPARED_NUMEL: Final = 1 << 16
"""Copies on expert ranks that are larger are not compared: that would read the dense model once per expert rank."""

_EMBEDDING: Final = "word_embeddings.weight"
_OUTPUT: Final = "output_layer.weight"


class Whole:
    """Parts of ranks, added in any order of ranks but in the model's order of names; ``put`` makes a State of them."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.parts: dict[str, dict[Place, Part]] = {}
        self.groups = GroupTable()
        self.padding: dict[tuple[str, str], View] = {}
        self.warnings: list[str] = []

    def add(self, place: Place, part: Part) -> None:
        mine = self.parts.setdefault(part.name, {})
        if place in mine:
            raise FormatError(f"{part.name} is there twice, in {files_of(mine[place].view)} and {files_of(part.view)}")
        mine[place] = part

    def put(self, state: State) -> None:
        """Add tensors, tied names and groups to ``state``."""
        rules = {name: self._rule(name, parts) for name, parts in self.parts.items()}
        unknown = [name for name, rule in rules.items() if rule is None]
        if unknown:
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise FormatError(
                f"no rule says how these parameters are shared by {self.facts.tp} tensor ranks: "
                f"{', '.join(unknown[:10])}{more}; save with tensor-parallel size 1, or as torch_dist"
            )
        whole: dict[str, dict[str, View]] = {}
        for name, parts in self.parts.items():
            rule = rules[name] or ""
            buffer = is_buffer(name, next(iter(parts.values())).view)
            kind = "buffer" if buffer else "model"
            views = {place: part.view for place, part in parts.items()}
            whole[name] = {kind: self._whole(name, rule, views, kind)}
            for kind in dict.fromkeys(kind for part in parts.values() for kind in part.states):
                found = {place: part.states[kind] for place, part in parts.items() if kind in part.states}
                whole[name][kind] = self._whole(name, rule, found, kind)
        self._tie(state, whole)
        kinds = dict.fromkeys(kind for views in whole.values() for kind in views)
        for kind in sorted(kinds, key=lambda kind: {"model": 0, "buffer": 1, "fp32": 2}.get(kind, 3)):
            state.tensors += [Tensor(kind, name, views[kind]) for name, views in whole.items() if kind in views]
        put_padding(state, {key: view for key, view in self.padding.items() if key[1] in whole})
        self.groups.put(state, {name: i for i, name in enumerate(whole)})
        if state.param_groups:
            listed = {name for group in state.param_groups for name in group["names"]}
            state.frozen += [name for name, views in whole.items() if "model" in views and name not in listed]
        state.warnings += self.warnings

    def _rule(self, name: str, parts: Mapping[Place, Part]) -> str | None:
        rule = rule_of(name, self._gated(name, parts))
        if rule is None and (self.facts.tp == 1 or is_buffer(name, next(iter(parts.values())).view)):
            return "replicated"
        return rule

    def _gated(self, name: str, parts: Mapping[Place, Part]) -> bool:
        """What args say; without them, whether the first matrix has twice as many rows as the second has columns."""
        if self.facts.gated is not None:
            return self.facts.gated
        first, second = next(
            (
                pair
                for pair in (("linear_fc1.", "linear_fc2."), ("dense_h_to_4h.", "dense_4h_to_h."))
                if pair[0] in name
            ),
            ("", ""),
        )
        stem = name.partition(first)[0] if first else ""
        other = self.parts.get(f"{stem}{second}weight")
        mine = self.parts.get(f"{stem}{first}weight")
        if not first or other is None or mine is None:
            return False
        place = next(iter(mine))
        return place in other and mine[place].view.shape[0] == 2 * other[place].view.shape[-1]

    def _whole(self, name: str, rule: str, views: Mapping[Place, View], kind: str) -> View:
        facts = self.facts
        if rule in ("fused_in", "fused_out"):
            grid: dict[int, dict[int, View]] = {}
            for place, view in sorted(views.items()):
                grid.setdefault(place.ep, {}).setdefault(place.tp % facts.etp, view)
            if next(iter(views.values())).shape == ():
                return merge(name, rule, list(views.values()))
            rows = [[row[tp] for tp in sorted(row)] for _, row in sorted(grid.items())]
            self._complete(name, len(rows), facts.ep, views)
            return merge_fused(rule, rows, facts.experts_per_rank, facts.gated is True)
        expert = is_expert(name)
        ranks = facts.etp if expert else facts.tp
        by_rank: dict[int, list[View]] = {}
        for place, view in sorted(views.items(), key=lambda item: (item[0].ep, item[0])):
            by_rank.setdefault(place.tp % ranks, []).append(view)
        if kind in ("model", "buffer") or rule != "replicated":
            self._complete(name, len(by_rank), ranks, views)
        copies = [self._one(name, by_rank[rank]) for rank in sorted(by_rank)]
        view = merge(name, rule, copies)
        return self._unpadded(name, view, kind) if rule == "vocabulary" else view

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

    def _unpadded(self, name: str, view: View, kind: str) -> View:
        padded, true = self.facts.count("padded_vocab_size"), self.facts.count("vocab_size")
        if not view.shape:
            return view
        if padded is not None and view.shape[0] != padded:
            raise FormatError(
                f"{name} has {view.shape[0]} rows in all, but args say padded_vocab_size {padded} ({files_of(view)})"
            )
        if true is not None and true > view.shape[0]:
            raise FormatError(f"{name} has {view.shape[0]} rows, but args say vocab_size {true} ({files_of(view)})")
        rows = padding_rows(view, true)
        if rows is not None:
            self.padding[kind, name] = rows
        return cut_rows(view, true)

    def _tie(self, state: State, whole: dict[str, dict[str, View]]) -> None:
        """
        Tied embeddings: the first and the last stage have a copy each; with one stage there is one tensor.

        The copies are compared when they are read, all states of them.
        """
        if not self.facts.tied:
            return
        first = next((name for name in whole if name.endswith(f"embedding.{_EMBEDDING}")), None)
        if first is None:
            return
        alias = next((name for name in whole if name.endswith(_OUTPUT)), None)
        if alias is None:
            alias = f"{first[: -len('embedding.' + _EMBEDDING)]}{_OUTPUT}"
        copies = whole.pop(alias, {})
        for kind, view in copies.items():
            known = whole[first].get(kind)
            whole[first][kind] = view if known is None else Merged([known, view], "equal", f"{kind} of {first}")
        state.tied[alias] = first


def put_vocabulary(state: State, facts: Facts) -> None:
    """Say in ``source`` how the vocabulary was padded, or warn that the true size is not known."""
    padded, true = facts.count("padded_vocab_size"), facts.count("vocab_size")
    if padded is not None:
        state.source["padded_vocab_size"] = padded
    if true is not None:
        state.source["vocab_size"] = true
        return
    if any(tensor.name.endswith((_EMBEDDING, _OUTPUT)) for tensor in state.tensors):
        state.warnings.append(
            "args do not say the true vocab_size (it came from a tokenizer): word embeddings and output layer keep "
            "their padding rows"
        )


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
