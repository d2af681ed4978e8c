"""
``dp_reshardable``, the default of Megatron's distributed checkpoints, and its forerunners: flat buckets of gradient
buffers, a set for each model-parallel rank. They mean something only to a run of the same tensor and pipeline sizes, so
the ranks' own parameters are laid out here again, from ``args``, the sizes of the buckets, and the model's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers.dcp_keys import Item
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import (
    Bucket,
    Part,
    bucket_places,
    buffers_of,
    put_coalesced,
    put_places,
)
from snapshotd.universal.readers.megatron_groups import GroupTable, Member, by_rule
from snapshotd.universal.readers.megatron_names import (
    EMBEDDING,
    OUTPUT,
    Order,
    is_buffer,
    is_expert,
    layer_of,
    list_order,
)
from snapshotd.universal.readers.megatron_optim import chained, groups_of
from snapshotd.universal.readers.megatron_rules import share_of
from snapshotd.universal.readers.megatron_whole import step_view
from snapshotd.universal.rules import Rule, Rules, merge
from snapshotd.universal.views import Cut, Joined, View

__all__ = ["Objects", "put_dp_reshardable", "rank_parts"]

Objects = dict[str, dict[tuple[int, ...], tuple[tuple[int, ...], Any]]]
"""Key to offsets to (sizes, object)."""

_GROUP: Final = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.(.+)\Z")
_EXPERT: Final = re.compile(r"\.experts\.(?:local_experts\.(\d+)\.|linear_fc[12]\.[a-z]+(\d+)$)")
_BUCKET: Final = re.compile(r"gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)\.([A-Za-z_0-9]+)\Z")


def put_dp_reshardable(
    objects: Objects,
    items: Sequence[Item],
    parts: Mapping[str, Part],
    table: GroupTable,
    facts: Facts,
    rules: Rules,
    folder: Path,
) -> list[str]:
    """Give the ``parts`` of the whole model their states out of flat buckets; returns warnings. ``rules``: of it."""
    if not facts.known:
        raise FormatError(
            f"{folder}: the optimizer is in flat buckets (dp_reshardable), and without args nothing tells "
            "what they hold"
        )
    buckets = _buckets(items)
    inner = _inner(objects)
    chains = sorted({chain for chain, _ in [*buckets, *inner]})
    if chains != list(range(len(chains))) or not chains:
        raise FormatError(f"{folder}: the optimizer is said to be in flat buckets, but there are none")
    warnings: list[str] = []
    ranks = {place: rank_parts(parts, facts, rules, place) for place in sorted(_places(facts))}
    for chain in chains:
        for place, chunks in ranks.items():
            spread = facts.ep > 1 and chain == len(chains) - 1 and len(chains) > 1
            if not spread and place.ep:
                continue
            group = _group_index(facts, place, spread)
            label = f"{folder}: " + (f"chained_{chain}." if len(chains) > 1 else "") + f"dp_group_idx_{group}"
            mine = chained(chunks, [None] * len(chains), facts, label)[chain]
            saved = inner.get((chain, group), {})
            if "optimizer" not in saved:
                raise FormatError(f"{label}: its parameter groups are missing: the checkpoint is not whole")
            warning = _put_rank(mine, buckets.get((chain, group), {}), saved, facts, place, label)
            warnings += [warning] if warning else []
            _put_groups(mine, saved, table, facts, label)
    _merge_back(ranks, parts, facts, rules)
    return warnings


def _buckets(items: Sequence[Item]) -> dict[tuple[int, int], dict[int, dict[int, dict[str, View]]]]:
    """(chain, group) -> buffer -> bucket -> name -> flat tensor."""
    found: dict[tuple[int, int], dict[int, dict[int, dict[str, View]]]] = {}
    for item in items:
        match = _GROUP.match(item.key) if item.view is not None else None
        inner = _BUCKET.match(match[3]) if match else None
        if match and inner and item.view is not None:
            place = found.setdefault((int(match[1] or 0), int(match[2])), {}).setdefault(int(inner[1]), {})
            place.setdefault(int(inner[3]), {})[inner[4]] = _clipped(item.view)
    return found


def _clipped(view: View) -> View:
    """The padding behind the last parameter of a bucket may reach beyond the tensor: it is written as a piece too."""
    if not isinstance(view, Joined) or len(view.shape) != 1:
        return view
    parts: list[tuple[Sequence[int], View]] = []
    for at, part in view.parts:
        length = min(part.shape[0], view.shape[0] - at[0])
        if length > 0:
            parts.append((at, part if length == part.shape[0] else Cut(part, (0,), (length,))))
    return Joined(view.dtype, view.shape, parts)


def _inner(objects: Objects) -> dict[tuple[int, int], dict[str, Any]]:
    """(chain, group) -> name -> object: the groups, the scaler, sizes of buckets, the old gathered state."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for key, shards in objects.items():
        if match := _GROUP.match(key):
            found.setdefault((int(match[1] or 0), int(match[2])), {})[match[3]] = next(iter(shards.values()))[1]
    return found


def _places(facts: Facts) -> set[Place]:
    return set(facts.places())


def _group_index(facts: Facts, place: Place, spread: bool) -> int:
    """Model-parallel ranks count tensor ranks fastest; for experts, tensor ranks, then expert ranks, then stages."""
    if spread:
        return place.tp % facts.etp + facts.etp * (place.ep + facts.ep * place.pp)
    return place.tp + facts.tp * place.pp


def rank_parts(
    parts: Mapping[str, Part],
    facts: Facts,
    rules: Rules,
    place: Place,
    *,
    buffers: bool = False,
    order: Order | None = None,
) -> list[list[Part]]:
    """
    Return what one rank has of the whole model's ``parts``, chunk by chunk, in the rank's own order: parameters and
    their states, with ``buffers`` those too. Under tied embeddings the last stage has a copy under its own name.

    ``order``: of all parts, where not all of them are Megatron's own.
    """
    if order is None:
        names = sorted(parts, key=list_order)
        order = Order(tuple(names), frozenset(name for name in names if name.startswith("embedding.")))
    layers = facts.layers_of()
    result: list[list[Part]] = []
    per_rank = facts.experts_per_rank
    for chunk in range(facts.vp):
        first = sum(map(sum, layers[:chunk])) + sum(layers[chunk][: place.pp])
        mine = range(first, first + layers[chunk][place.pp])
        is_first = chunk == 0 and place.pp == 0
        is_last = chunk == facts.vp - 1 and place.pp == facts.pp - 1
        found: list[Part] = []
        for name in order.names:
            part = parts[name]
            at = layer_of(name)
            if is_buffer(name, part.view) and not buffers:
                continue
            if at is not None and not name.startswith("mtp."):
                if at[1] not in mine:
                    continue
            elif not (is_first if name in order.opening else is_last):
                continue
            expert = _EXPERT.search(name)
            if expert and per_rank and int(expert[1] or expert[2]) // per_rank != place.ep:
                continue
            found.append(_cut(name, part, facts, rules, place))
        if is_last and facts.tied and facts.pp > 1 and EMBEDDING in parts:
            found.append(_cut(OUTPUT, parts[EMBEDDING], facts, rules, place))
        result.append(found)
    return result


def _cut(name: str, part: Part, facts: Facts, rules: Rules, place: Place) -> Part:
    ranks = facts.etp if is_expert(name) else facts.tp
    rank = place.tp % ranks
    states = {kind: share_of(rules, kind, name, view, rank, ranks) for kind, view in part.states.items()}
    return Part(name, share_of(rules, "model", name, part.view, rank, ranks), name, states)


def _put_rank(
    chunks: Sequence[Sequence[Part]],
    buckets: Mapping[int, Mapping[int, Mapping[str, View]]],
    saved: Mapping[str, Any],
    facts: Facts,
    place: Place,
    label: str,
) -> str | None:
    buffers = [buffer for buffer in buffers_of(chunks) if buffer]
    if isinstance(saved.get("param_state"), dict):  # dp_zero_gather_scatter: what distrib_optim.pt has, as an object
        return put_coalesced(buffers, saved["param_state"], facts, place.pp, label)
    if sorted(buckets) != list(range(len(buffers))):
        raise FormatError(f"{label} has {len(buckets)} gradient buffers, but the rank's model has {len(buffers)}")
    warnings: list[str] = []
    for i, parts in enumerate(buffers):
        found = [Bucket(buckets[i][b], _begins(buckets[i][b])) for b in sorted(buckets[i])]
        for bucket in found:
            if len({view.shape for view in bucket.tensors.values()}) != 1 or "param" not in bucket.tensors:
                raise FormatError(f"{label}, buffer {i}: the tensors of a bucket differ in size, or param is missing")
        _check_sizes(saved.get("per_bucket_numel_unpadded"), i, found, label)
        places = bucket_places(parts, found, f"{label}, buffer {i}")
        warning = put_places(places, found, f"{label}, buffer {i}")
        warnings += [warning] if warning else []
    return "; ".join(warnings) or None


def _begins(tensors: Mapping[str, View]) -> frozenset[int] | None:
    """Each parameter is a piece of its own in the files, so pieces begin where parameters do."""
    view = tensors.get("param")
    return frozenset(at[0] for at, _ in view.parts) if isinstance(view, Joined) else None


def _check_sizes(said: Any, buffer: int, buckets: Sequence[Bucket], label: str) -> None:
    one = said[buffer] if isinstance(said, list) and buffer < len(said) else None
    sizes = next(iter(one.values())) if isinstance(one, dict) and one else None
    if isinstance(sizes, list) and sizes != [bucket.numel for bucket in buckets]:
        raise FormatError(f"{label}: buckets of {[b.numel for b in buckets]} elements, per_bucket_numel says {sizes}")


def _put_groups(
    chunks: Sequence[Sequence[Part]], saved: Mapping[str, Any], table: GroupTable, facts: Facts, label: str
) -> None:
    groups = groups_of({"optimizer": saved["optimizer"]}, label)
    parts = {part.name: part for chunk in chunks for part in chunk}
    found = by_rule([Member(part.name, part.view.shape) for part in parts.values()], groups, facts)
    if found is None:
        raise FormatError(f"{label}: its {len(groups)} parameter groups are not those that Megatron-LM makes")
    table.add(groups, [[member.name for member in mine] for mine in found], label)
    for group, mine in zip(groups, found, strict=True):
        step = step_view(group.get("step"))
        for member in mine if step is not None else ():
            parts[member.name].states["step"] = step  # type: ignore[assignment]


def _merge_back(
    ranks: Mapping[Place, Sequence[Sequence[Part]]], parts: Mapping[str, Part], facts: Facts, rules: Rules
) -> None:
    """States of the whole parameters out of those of the ranks. The tied copy of the last stage is compared."""
    found: dict[str, dict[Place, Part]] = {}
    for place, chunks in ranks.items():
        for part in (part for chunk in chunks for part in chunk):
            if part.states:
                found.setdefault(part.name, {})[place] = part
    for name, mine in found.items():
        expert = is_expert(name)
        count = facts.etp if expert else facts.tp
        by_rank: dict[int, Part] = {}
        for place, part in sorted(mine.items()):
            by_rank.setdefault(place.tp % count, part)
        if len(by_rank) != count:
            raise FormatError(f"the optimizer's state of {name} is on {len(by_rank)} of {count} tensor ranks")
        owner = parts.get(name)
        if owner is None:
            continue  # the tied copy: equal to the first stage's by construction, and not in the model
        for kind in by_rank[0].states:
            rule = rules.find(kind, name) or Rule.of([name], how="replicated")
            shards = [by_rank[rank].states[kind] for rank in range(count)]
            owner.states[kind] = merge(rule.as_padded(), name, shards)  # as the model's tensors are at this point
