"""
Which parameter is in which group of the optimizer, and at which place: Megatron's files say it by position only.

Groups are made by a rule that has not changed in years: vectors and biases have no weight decay, experts that are
spread over expert ranks stand apart, and so do embeddings under a learning rate of their own; inside a group, the
order is that of ``named_parameters()``. What comes out is compared with the numbers and shapes that the file has. Where
that does not fit (frozen parameters, a user's own groups), all assignments by order and shape are searched
(param_ids.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.megatron_facts import Facts
from snapshotd.universal.readers.megatron_names import EMBEDDING, OUTPUT, is_expert
from snapshotd.universal.readers.param_ids import names_of_ids
from snapshotd.universal.state import State

__all__ = ["GroupTable", "Member", "assign", "by_rule"]

_NOT_HYPERPARAMETERS: Final = frozenset({"params", "param_names", "step"})


@dataclass(frozen=True, slots=True)
class Member:
    """What the rule looks at: a parameter's name in the whole model and its shape on the rank at hand."""

    name: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class GroupTable:
    """The groups of all ranks as one list: those with equal hyperparameters are one group."""

    groups: dict[str, tuple[dict[str, Any], dict[str, None]]] = field(default_factory=dict)

    def add(self, groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[str]], label: str) -> None:
        """Add one rank's groups and the names in each."""
        seen: dict[str, int] = {}
        for group, names in zip(groups, members, strict=True):
            values = {key: value for key, value in group.items() if key not in _NOT_HYPERPARAMETERS}
            plain = to_json(values, f"param_groups of {label}")
            text = json.dumps(plain, sort_keys=True)
            seen[text] = seen.get(text, 0) + 1
            known = self.groups.setdefault(f"{text}#{seen[text]}", (plain, {}))
            known[1].update(dict.fromkeys(names))

    def put(self, state: State, order: Mapping[str, int]) -> None:
        """Put the groups into ``state``, names in the model's order; those that are not in ``order`` are aliases."""
        for values, names in self.groups.values():
            known = sorted((name for name in names if name in order), key=order.__getitem__)
            state.param_groups.append({"names": known, **values})


def by_rule(members: Sequence[Member], groups: Sequence[Mapping[str, Any]], facts: Facts) -> list[list[Member]] | None:
    """Return the members of each group by Megatron's own rule; None when the groups are not of that kind."""
    wanted = [_signature_of_group(group, facts) for group in groups]
    if len(set(wanted)) != len(wanted):
        return None
    places = {signature: i for i, signature in enumerate(wanted)}
    result: list[list[Member]] = [[] for _ in groups]
    only = len(groups) == 1
    for member in members:
        place = 0 if only else places.get(_signature(member, facts))
        if place is None:
            return None
        result[place].append(member)
    return result


def assign(
    members: Sequence[Member],
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[Any, tuple[int, ...] | None],
    facts: Facts,
    label: str,
) -> tuple[list[list[Member]], str | None]:
    """
    Return the members of each group, in the order of the group's ``params``, and a warning or None.

    ``shapes``: of the state of each id in ``params``, where there is one. FormatError when nothing fits.
    """
    ids = [list(group["params"]) for group in groups]
    found = by_rule(members, groups, facts)
    if found is not None and all(
        len(mine) == len(numbers) and all(shapes.get(i) in (None, m.shape) for i, m in zip(numbers, mine, strict=True))
        for mine, numbers in zip(found, ids, strict=True)
    ):
        return found, None
    by_name = {member.name: member for member in members}
    try:
        names, warning = names_of_ids(groups, shapes, {member.name: member.shape for member in members})
    except FormatError as error:
        raise FormatError(f"{label}: {error}") from error
    result = [[by_name[names[i]] for i in numbers if i in names] for numbers in ids]
    return result, f"{label}: {warning}" if warning else None


def _signature(member: Member, facts: Facts) -> tuple[bool, bool, bool]:
    plain = len(member.shape) <= 1 or member.name.endswith(".bias")
    skip = facts.flag("apply_wd_to_qk_layernorm") or facts.text("no_weight_decay_cond_type") in (
        "apply_wd_to_qk_layernorm",
        "qwen3_next",
    )
    if skip and ("q_layernorm." in member.name or "k_layernorm." in member.name):
        plain = False
    elif not skip and len(member.shape) > 1:
        plain = member.name.endswith(".bias")
    decoupled = facts.number("decoupled_lr") is not None and member.name in (EMBEDDING, OUTPUT)
    return plain, facts.ep > 1 and is_expert(member.name), decoupled


def _signature_of_group(group: Mapping[str, Any], facts: Facts) -> tuple[bool, bool, bool]:
    mult = group.get("wd_mult")
    plain = mult == 0.0 if type(mult) in (int, float) else not group.get("weight_decay", 0.0)
    lr = facts.number("decoupled_lr")
    decoupled = group.get("is_decoupled_lr") is True or (
        lr is not None and group.get("max_lr") == lr and lr != facts.number("lr")
    )
    return plain, group.get("is_expert_parallel") is True, decoupled
