"""
What ZeRO's files say beside the tensors: shapes and order of parameters, groups, partitions, padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from snapshotd.errors import FormatError
from snapshotd.universal.readers.deepspeed_files import Saved
from snapshotd.universal.standins import Record

__all__ = [
    "Shapes",
    "alignment",
    "dict_of",
    "hyperparameters",
    "inner_of",
    "list_of",
    "mapped_shapes",
    "padding",
    "param_shapes",
    "partitions",
    "stage3_sets",
    "stage_of",
    "sub_groups",
    "user_order",
]

Shapes = list[dict[str, tuple[int, ...]]]
"""For each group (stage 3: sub-group) name to shape, in the order of the flat buffers."""


def param_shapes(model: Saved) -> Shapes:
    """Return ``param_shapes`` of a model file: per group (stage 3: per sub-group) name to shape, in order."""
    shapes = model.typed("param_shapes", (list, tuple, dict), None)
    if isinstance(shapes, dict):  # one group, before groups were listed
        shapes = [shapes]
    if not shapes or not all(isinstance(group, dict) for group in shapes):
        raise FormatError(
            f"{model.path} has no param_shapes, without which the flat buffers of ZeRO have no names: was it saved "
            "without ZeRO? Then the *_optim_states.pt files beside it are of another run"
        )
    return [
        {str(name): tuple(shape) if isinstance(shape, (tuple, list)) else (shape,) for name, shape in group.items()}
        for group in shapes
    ]


def mapped_shapes(files: Sequence[Saved]) -> Shapes:
    """
    Return what ``param_shapes`` would be, flat, from ``param_slice_mappings``: a pipeline in bf16 without ZeRO has the
    files of BF16_Optimizer (which does not shuffle), and no ``param_shapes``.
    """
    found: Shapes = []
    for saved in files:
        for g, mapping in enumerate(list_of(inner_of(saved), "param_slice_mappings", saved)):
            if g == len(found):
                found.append({})
            for name, fragment in dict_of(mapping, "param_slice_mappings", saved).items():
                numel = fragment.get("numel") if isinstance(fragment, Record) else None
                if type(numel) is not int or numel < 0:
                    raise FormatError(f"{saved.path}: param_slice_mappings has {fragment!r:.80} for {name}")
                found[g][str(name)] = (sum(found[g].get(str(name), ())) + numel,)
    return found


def stage_of(optim: Saved) -> int | None:
    """Return ``zero_stage``, None where the file has none (BF16_Optimizer)."""
    stage = inner_of(optim).get("zero_stage")
    if isinstance(stage, Record) and stage.args:
        stage = stage.args[0]
    return stage if type(stage) is int else None


def inner_of(saved: Saved) -> dict[str, Any]:
    return dict_of(saved.get("optimizer_state_dict"), "optimizer_state_dict", saved)


def dict_of(value: Any, what: str, saved: Saved) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{saved.path}: {what} is a {type(value).__name__}, expected a dict: not a file of ZeRO")
    return value


def list_of(values: Mapping[str, Any], key: str, saved: Saved) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, (list, tuple)):
        raise FormatError(
            f"{saved.path}: {key} is missing: not a file of this ZeRO stage, or the rest of another run with the same "
            "tag; take all files of one run"
        )
    return list(value)


def hyperparameters(files: Sequence[Saved], values: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Each group's hyperparameters, stage 1 and 2; elastic files have but the step."""
    bases = [value.get("base_optimizer_state") for value in values]
    if not isinstance(bases[0], dict):
        step = values[0].get("base_optimizer_state_step")
        return [{} if step is None else {"step": step} for _ in range(count)]
    lists = [_groups_of(dict_of(base, "base_optimizer_state", saved), saved)
             for base, saved in zip(bases, files, strict=True)]
    _check_equal(files, lists)
    if len(lists[0]) != count:
        raise FormatError(f"{files[0].path} has {len(lists[0])} param_groups, expected {count}")
    return [{key: value for key, value in group.items() if key != "params"} for group in lists[0]]


def sub_groups(
    files: Sequence[Saved], inner: Sequence[Mapping[str, Any]], count: int
) -> list[tuple[list[int], dict[str, Any]]]:
    """For each group of stage 3 its sub-groups and its hyperparameters."""
    lists = [_groups_of(state, saved) for state, saved in zip(inner, files, strict=True)]
    _check_equal(files, lists)
    members = [(list(group.get("params", ())), group) for group in lists[0]]
    if sorted(s for subs, _ in members for s in subs) != list(range(count)):
        raise FormatError(
            f"{files[0].path}: its param_groups have the sub-groups {[subs for subs, _ in members]!s:.200}, but "
            f"param_shapes has {count}: the files are of different runs; take all files of one run"
        )
    return [(subs, {key: value for key, value in group.items() if key != "params"}) for subs, group in members]


def _groups_of(state: Mapping[str, Any], saved: Saved) -> list[dict[str, Any]]:
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise FormatError(f"{saved.path}: the optimizer has no param_groups: not a file that DeepSpeed wrote")
    return groups


def _check_equal(files: Sequence[Saved], lists: Sequence[list[dict[str, Any]]]) -> None:
    """Hyperparameters are the same on all ranks; the learning rate tells ranks of different steps apart."""
    for saved, groups in zip(files, lists, strict=True):
        if len(groups) != len(lists[0]):
            raise FormatError(
                f"{saved.path} has {len(groups)} param_groups, {files[0].name} has {len(lists[0])}: the files are of "
                "different runs; take all files of one run"
            )
        for g, (mine, first) in enumerate(zip(groups, lists[0], strict=True)):
            for key in first:
                if isinstance(first[key], (int, float, str, bool, tuple, list)) and repr(mine.get(key)) != repr(
                    first[key]
                ):
                    raise FormatError(
                        f"{saved.path} has {key} {mine.get(key)!r:.80} in parameter group {g}, {files[0].name} has "
                        f"{first[key]!r:.80}: the files are of different saves. Take all files of one step, or an "
                        "older checkpoint that is whole"
                    )


def partitions(files: Sequence[Saved], values: Sequence[Mapping[str, Any]], g: int) -> int:
    """How many ranks share group ``g``: all, but for experts."""
    for saved, value in zip(files, values, strict=True):
        counts = value.get("partition_count")
        count = counts[g] if isinstance(counts, (list, tuple)) and g < len(counts) else counts
        if count is None:
            count = len(files)
        if type(count) is not int or count < 1 or len(files) % count:
            raise FormatError(
                f"{saved.path}: group {g} is cut in {count!r:.40} partitions, but there are files of {len(files)} "
                "ranks: it is of another world size; take all files of one run"
            )
        if saved is files[0]:
            first = count
        elif count != first:
            raise FormatError(
                f"{saved.path}: group {g} is cut in {count} partitions, {files[0].name} says {first}: the files are of "
                "different world sizes; take all files of one run"
            )
    return first


def stage3_sets(values: Sequence[Mapping[str, Any]], s: int) -> list[list[int]]:
    """The ranks that share sub-group ``s``: all, but for the experts of AutoEP."""
    sets: set[tuple[int, ...]] = set()
    for value in values:
        groups = value.get("ds_zero_partition_groups")
        ranks = groups[s].get("partition_ranks") if isinstance(groups, list) and s < len(groups) else None
        if isinstance(ranks, (list, tuple)) and all(type(rank) is int for rank in ranks):
            sets.add(tuple(ranks))
    covered = sorted(rank for ranks in sets for rank in ranks)
    if len(sets) < 2 or covered != list(range(len(values))):
        return [list(range(len(values)))]
    return [list(ranks) for ranks in sorted(sets)]


def padding(values: Mapping[str, Any], g: int) -> int:
    pads = values.get("group_paddings")
    pad = pads[g] if isinstance(pads, (list, tuple)) and g < len(pads) else 0
    return pad if type(pad) is int and pad > 0 else 0


def alignment(saved: Saved, values: Mapping[str, Any], g: int, count: int) -> list[int]:
    """Elements of padding behind each parameter."""
    holes = values.get("param_alignment_paddings")
    if not holes:
        return [0] * count
    mine = holes[g] if isinstance(holes, (list, tuple)) and g < len(holes) else None
    if not isinstance(mine, (list, tuple)) or len(mine) != count or any(type(n) is not int or n < 0 for n in mine):
        raise FormatError(
            f"{saved.path}: param_alignment_paddings of group {g} is {mine!r:.80}, expected {count} numbers: it is of "
            "another run than param_shapes; take all files of one run"
        )
    return list(mine)


def user_order(group: Mapping[str, Any], g: int, values: Sequence[Mapping[str, Any]], model: Saved) -> list[str]:
    """
    The names as the user's group lists them. ``round_robin_gradients`` deals them out to the ranks that share the
    group (``values``) like cards; where the file has no configuration, ``param_slice_mappings`` has the old order.
    """
    names = list(group)
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if isinstance(zero, dict):
        places = [place for first in range(len(values)) for place in range(first, len(names), len(values))]
        is_dealt = zero.get("round_robin_gradients") is True
        return [name for _, name in sorted(zip(places, names, strict=True))] if is_dealt else names
    found: dict[str, None] = {}
    for value in values:
        mappings = value.get("param_slice_mappings")
        mapping = mappings[g] if isinstance(mappings, (list, tuple)) and g < len(mappings) else None
        if isinstance(mapping, dict):
            found.update(dict.fromkeys(mapping))
    return list(found) if found.keys() == group.keys() else names
