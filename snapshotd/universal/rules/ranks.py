"""
States of tensor-parallel ranks: put together by rules (``join_ranks``), and cut for a layout (``cut_ranks``).

Buffers that no rule names are the same on every rank; so is what has no dimensions. Of what is not a tensor, the first
rank's is kept, with a warning where others differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.derived import Merged
from snapshotd.universal.rules.language import Rule, Rules, name_list
from snapshotd.universal.rules.shares import Rejoiner, split
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View

__all__ = ["cut_ranks", "join_ranks", "rules_of_record"]

_RECORDED: Final = ("how", "dim", "parts", "uneven", "ranks", "shape", "vocabulary", "multiple", "kinds")


def join_ranks(states: Sequence[State], rules: Rules | None, labels: Sequence[str]) -> State:
    """Return the state of the whole model, of which ``states`` are the ranks'. ``labels`` are their files."""
    first = states[0]
    _check_same(states, labels)
    wanted = [t for t in first.tensors if t.kind not in ("rng", "extra", "buffer") and t.shape]
    why = f"{labels[0]} and the others are parts of one model"
    if rules is None:
        names = name_list(list(dict.fromkeys(tensor.name for tensor in wanted)))
        raise UsageError(f"{why}; nothing says how these make a whole: {names}; give --rules with a preset or a file")
    for kind in dict.fromkeys(tensor.kind for tensor in wanted):
        rules.require(kind, [t.name for t in wanted if t.kind == kind], why)
    rejoiner = Rejoiner(rules, len(states))
    tables = [{tensor.key: tensor.view for tensor in state.tensors} for state in states]
    tensors: list[Tensor] = []
    for tensor in first.tensors:
        if tensor.kind in ("rng", "extra"):
            continue
        shards = [_shard(table, tensor, label) for table, label in zip(tables, labels, strict=True)]
        if not tensor.shape or (tensor.kind == "buffer" and rules.find("buffer", tensor.name) is None):
            whole: View = Merged(shards, "equal", f"{tensor.kind} of {tensor.name}")
        else:
            whole = rejoiner.merge(tensor.kind, tensor.name, shards)
        tensors.append(Tensor(tensor.kind, tensor.name, whole))
    tensors += [tensor for tensor in first.tensors if tensor.kind == "extra"]
    tensors += _generators(states)
    warnings = list(dict.fromkeys(line for state in states for line in state.warnings)) + rejoiner.warnings()
    warnings += [
        f"{key} differs from rank to rank; the first one's is kept"
        for key in first.extra
        if any(state.extra.get(key) != first.extra[key] for state in states)
    ]
    source = {**first.source, "ranks": len(states)}
    return replace(first, tensors=tensors, warnings=warnings, source=source)


def cut_ranks(state: State, rules: Rules | None, ranks: int) -> tuple[list[State], list[dict[str, Any]]]:
    """
    Return what each of ``ranks`` tensor ranks has of ``state``, and what should be recorded with it.

    Generators go to the rank of their number. UsageError lists what no rule covers.
    """
    cut = [t for t in state.tensors if t.kind not in ("rng", "extra", "buffer") and t.shape]
    if rules is None:
        names = name_list(list(dict.fromkeys(tensor.name for tensor in cut)))
        raise UsageError(f"nothing says how to cut these for tp={ranks}: {names}; give --rules with a preset or a file")
    for kind in dict.fromkeys(tensor.kind for tensor in cut):
        rules.require(kind, [t.name for t in cut if t.kind == kind], f"the layout has {ranks} tensor-parallel ranks")
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for tensor in state.tensors:
        if tensor.kind == "rng":
            number, slash, device = tensor.name.partition("/")
            if number.isdigit() and int(number) < ranks:  # a file holds one rank's generators, under the number 0
                found[int(number)].append(Tensor("rng", f"0{slash}{device}", tensor.view))
            else:
                found[0].append(tensor)
            continue
        rule = None if tensor.kind == "extra" or not tensor.shape else rules.find(tensor.kind, tensor.name)
        parts = [tensor.view] * ranks if rule is None else split(rule, tensor.name, tensor.view, ranks)
        for mine, part in zip(found, parts, strict=True):
            mine.append(Tensor(tensor.kind, tensor.name, part))
    return [replace(state, tensors=mine) for mine in found], _record(state, rules)


def rules_of_record(record: Sequence[Mapping[str, Any]], label: str) -> Rules:
    """Return the rules that ``cut_ranks`` said should be recorded; FormatError where they make no sense."""
    rules = []
    for entry in record:
        fields = {key: entry[key] for key in _RECORDED if key in entry}
        for key in ("parts", "ranks", "shape", "kinds"):
            if isinstance(fields.get(key), list):
                fields[key] = tuple(fields[key])
        names = entry.get("names")
        if not isinstance(names, list) or "how" not in fields:
            raise FormatError(f"{label}: what was recorded of its layout makes no sense: {entry!r:.100}")
        rules.append(Rule(names=(), plain=frozenset(map(str, names)), where=f"what {label} records", **fields))
    return Rules(rules, label=f"what {label} records")


def _record(state: State, rules: Rules) -> list[dict[str, Any]]:
    """Return, as JSON, which rule each tensor of the whole ``state`` was cut by."""
    table: dict[str, dict[str, Any]] = {}
    for tensor in state.tensors:
        rule = None if tensor.kind in ("rng", "extra") or not tensor.shape else rules.find(tensor.kind, tensor.name)
        if rule is None:
            continue
        fields = {key: getattr(rule, key) for key in _RECORDED if getattr(rule, key) not in (None, ())}
        if rule.vocabulary is not None:
            fields["vocabulary"] = tensor.shape[rule.dim]
        if rule.how == "flattened":
            fields["shape"] = list(tensor.shape)
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        key = f"{tensor.kind if rule.kinds else ''} {sorted(fields.items())}"
        entry = table.setdefault(key, {**fields, "names": []})
        if tensor.name not in entry["names"]:
            entry["names"].append(tensor.name)
    return list(table.values())


def _shard(table: Mapping[tuple[str, str], View], tensor: Tensor, label: str) -> View:
    view = table.get(tensor.key)
    if view is None:
        raise FormatError(f"{label} has no {tensor.kind} of {tensor.name}, which rank 0 has: are all files of one run?")
    return view


def _check_same(states: Sequence[State], labels: Sequence[str]) -> None:
    first = states[0]
    known = {tensor.key for tensor in first.tensors if tensor.kind not in ("rng", "extra")}
    for state, label in zip(states[1:], labels[1:], strict=True):
        if state.step != first.step:
            raise FormatError(
                f"{label} is of step {state.step}, {labels[0]} of step {first.step}: the folder was put together from "
                "several saves; take a checkpoint whose ranks are of one step"
            )
        more = [f"{t.kind} of {t.name}" for t in state.tensors if t.key not in known and t.kind not in ("rng", "extra")]
        if more:
            raise FormatError(f"{label} has {name_list(more, 5)}, which {labels[0]} has not: are all files of one run?")
        if [group["names"] for group in state.param_groups] != [group["names"] for group in first.param_groups]:
            raise FormatError(f"{label} and {labels[0]} have other parameter groups: are all files of one run?")


def _generators(states: Sequence[State]) -> list[Tensor]:
    """Each rank's generators under the rank's number, unless the files have numbers already."""
    found: dict[str, Tensor] = {}
    for rank, state in enumerate(states):
        for name, tensor in state.of_kind("rng").items():
            number, slash, device = name.partition("/")
            mine = f"{rank}{slash}{device}" if number == "0" else name
            found.setdefault(mine, Tensor("rng", mine, tensor.view))
    return list(found.values())
