"""
Megatron's optimizers of one rank: plain, mixed precision, distributed, and several of them chained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_flat import Part, buffers_of, put_coalesced
from snapshotd.universal.readers.megatron_groups import GroupTable, Member, assign, by_rule
from snapshotd.universal.readers.megatron_names import is_buffer, is_expert
from snapshotd.universal.readers.megatron_whole import step_view
from snapshotd.universal.views import View

__all__ = ["Optimizers", "chained", "groups_of"]

_HALF: Final = frozenset({"float16", "bfloat16"})


class Optimizers:
    """Reads one rank's optimizers into the parts of its ``chunks``. ``pp``: its stage."""

    def __init__(self, facts: Facts, table: GroupTable, chunks: Sequence[Sequence[Part]], pp: int) -> None:
        self.facts, self.table, self.pp = facts, table, pp
        self.chunks = [[part for part in chunk if not is_buffer(part.name, part.view)] for chunk in chunks]
        self.warnings: list[str] = []

    def add(self, saved: Any, flat: Any, label: str, flat_label: str) -> None:
        """``saved``: the model file's ``optimizer``; ``flat``: what ``distrib_optim.pt`` holds, None without it."""
        optimizers = saved if isinstance(saved, list) else [saved]
        flats = flat if isinstance(flat, list) else [flat] * (1 if flat is not None else 0)
        if flat is not None and len(flats) != len(optimizers):
            raise FormatError(f"{flat_label} has {len(flats)} optimizers, {label} has {len(optimizers)}")
        for i, (one, chunks) in enumerate(
            zip(optimizers, chained(self.chunks, optimizers, self.facts, label), strict=True)
        ):
            if not isinstance(one, dict) or not one:
                continue  # a rank without trainable parameters
            if flat is None:
                self._plain(one, chunks, label)
            else:
                self._distributed(one, flats[i], chunks, label, flat_label)

    def _plain(self, saved: Mapping[str, Any], chunks: Sequence[Sequence[Part]], label: str) -> None:
        groups = groups_of(saved, label)
        inner = saved.get("optimizer", saved)
        states = inner.get("state")
        if not isinstance(states, dict) or not all(isinstance(group.get("params"), list) for group in groups):
            raise FormatError(f"{label}: an optimizer without state or without the groups' params")
        parts = {part.name: part for chunk in chunks for part in chunk}
        members = [Member(part.name, part.view.shape) for part in parts.values()]
        shapes = {owner: _shape_of(fields, label) for owner, fields in states.items()}
        found, warning = assign(members, groups, shapes, self.facts, label)
        if warning:
            self.warnings.append(warning)
        masters = saved.get("fp32_from_fp16_params")
        for i, (group, mine) in enumerate(zip(groups, found, strict=True)):
            owners = [parts[member.name] for member in mine]
            if len(owners) != len(group["params"]):
                raise FormatError(f"{label}: group {i} has {len(group['params'])} parameters, the model {len(owners)}")
            for number, part in zip(group["params"], owners, strict=True):
                _put_states(part, states.get(number, {}), group, label)
            if masters is not None:
                _put_masters(owners, masters, i, label)
        self.table.add(groups, [[member.name for member in mine] for mine in found], label)

    def _distributed(
        self, saved: Mapping[str, Any], flat: Any, chunks: Sequence[Sequence[Part]], label: str, flat_label: str
    ) -> None:
        groups = groups_of(saved, label)
        parts = [part for chunk in chunks for part in chunk]
        found = by_rule([Member(part.name, part.view.shape) for part in parts], groups, self.facts)
        if found is None:
            raise FormatError(
                f"{label}: {len(groups)} parameter groups that are not told apart by weight decay, experts or learning "
                "rate: the distributed optimizer does not say which parameter is in which"
            )
        if flat is None:
            return  # expert ranks but the first: the dense parameters' state is with the first
        if not isinstance(flat, dict):
            raise FormatError(f"{flat_label} holds a {type(flat).__name__}, expected a dict of gradient buffers")
        warning = put_coalesced(buffers_of(chunks), flat, self.facts, self.pp, flat_label)
        if warning:
            self.warnings.append(warning)
        by_name = {part.name: part for part in parts if part.states}  # without the frozen ones
        found = [[member for member in mine if member.name in by_name] for mine in found]
        self.table.add(groups, [[member.name for member in mine] for mine in found], label)
        for group, mine in zip(groups, found, strict=True):
            step = step_view(group.get("step"))
            for member in mine if step is not None else ():
                by_name[member.name].states["step"] = step  # type: ignore[assignment]


def chained(
    chunks: Sequence[Sequence[Part]], optimizers: Sequence[Any], facts: Facts, label: str
) -> list[list[list[Part]]]:
    """
    Return the chunks that each optimizer of a chain has: dense parameters first, those of spread experts last.

    With --overlap-param-gather-with-optimizer-step the first chunk has an optimizer of its own.
    """
    spread = facts.ep > 1 and any(is_expert(part.name) for chunk in chunks for part in chunk)
    if len(optimizers) == 1:
        return [[list(chunk) for chunk in chunks]]
    dense = [[part for part in chunk if not (facts.ep > 1 and is_expert(part.name))] for chunk in chunks]
    result = [dense]
    if facts.flag("overlap_param_gather_with_optimizer_step") and len(chunks) > 1:
        result = [dense[:1], dense[1:]]
    if len(result) < len(optimizers) and (spread or facts.ep > 1):
        result.append([[part for part in chunk if is_expert(part.name)] for chunk in chunks])
    if len(result) != len(optimizers):
        raise FormatError(f"{label} has {len(optimizers)} chained optimizers, expected {len(result)}")
    return result


def groups_of(saved: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, with or without a wrapper around torch's own dict."""
    inner = saved.get("optimizer", saved)
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise FormatError(f"{label}: an optimizer without param_groups (it has {', '.join(map(str, saved))})")
    return groups


def _shape_of(fields: Any, label: str) -> tuple[int, ...] | None:
    if not isinstance(fields, dict):
        raise FormatError(f"{label}: the optimizer's state makes no sense")
    shapes = [value.shape for value in fields.values() if isinstance(value, TensorRef) and value.shape != ()]
    return shapes[0] if shapes else None


def _put_states(part: Part, fields: Mapping[str, Any], group: Mapping[str, Any], label: str) -> None:
    for kind, value in fields.items():
        view: View | None = value.view if isinstance(value, TensorRef) else step_view(value)
        if view is None:
            continue
        if view.shape not in (part.view.shape, ()):
            raise FormatError(
                f"{label}: {kind} of {part.name} is {list(view.shape)}, the parameter is {list(part.view.shape)}"
            )
        part.states[kind] = view
    step = step_view(group.get("step"))  # FusedAdam of apex and Transformer Engine
    if step is not None and "step" not in part.states:
        part.states["step"] = step


def _put_masters(owners: Sequence[Part], masters: Any, group: int, label: str) -> None:
    """``fp32_from_fp16_params``: per group a list, with the 16-bit parameters only."""
    half = [part for part in owners if part.view.dtype in _HALF]
    mine = masters[group] if isinstance(masters, list) and group < len(masters) else None
    if not isinstance(mine, list) or len(mine) != len(half):
        raise FormatError(f"{label}: group {group} has {len(half)} 16-bit parameters, and not as many fp32 copies")
    for part, value in zip(half, mine, strict=True):
        if not isinstance(value, TensorRef) or value.shape != part.view.shape:
            raise FormatError(f"{label}: the fp32 copy of {part.name} {list(part.view.shape)} is {value!r:.80}")
        part.states["fp32"] = value.view
