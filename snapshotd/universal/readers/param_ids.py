"""
Names for the numbers of ``optimizer.state_dict()``: ids count over the groups in order, then inside each group.

The file has no names (since torch 2.6 it has ``param_names``, if the optimizer was made from named parameters). What is
known: a group lists its parameters in the model's order, each parameter is in one group at most, and the state of an id
has its parameter's shape. All assignments that fit are searched; where several fit, the one is taken that trainers
commonly make (matrices in the group with weight decay, norms and biases in the one without), with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers.conventions import looks_like_buffer, looks_like_parameter

__all__ = ["Fits", "names_of_ids"]

_MAX_STATES: Final = 200_000

Shape = tuple[int, ...]
Fits = Callable[[Shape], bool]
"""Whether a parameter of some shape can have the state that is there."""

_Node = tuple[int, int, tuple[int, ...] | None, int]
"""(score, number of ways, positions before, group taken or -1)"""


def names_of_ids(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[Any, Shape | Fits | None],
    model: Mapping[str, Shape],
    never: frozenset[str] = frozenset(),
) -> tuple[dict[Any, str], str | None]:
    """
    Return {id: name} and a warning or None.

    Args:
        groups: the optimizer's, each with ``params``.
        shapes: the shape of the state of each id, or which shapes it allows; ids without state are not there.
        model: name to shape in the model's order, tied aliases left out.
        never: names of tensors that no optimizer trains, integers among them.

    FormatError when no assignment fits.
    """
    named = _recorded(groups, model)
    if named is not None:
        return named, None
    ids = [list(group["params"]) for group in groups]
    if all(isinstance(item, str) for members in ids for item in members):
        return {item: item for members in ids for item in members}, None
    total = sum(map(len, ids))
    candidates = [name for name in model if name not in never]
    nodes: list[dict[tuple[int, ...], _Node]] = [{(0,) * len(ids): (0, 1, None, -1)}]
    left = len(candidates)
    for name in candidates:
        left -= 1
        nodes.append(_step(name, model[name], nodes[-1], groups, ids, shapes, total - left))
        if len(nodes[-1]) > _MAX_STATES:
            raise FormatError("too many ways to give the optimizer's numbers to the model's parameters")
    end = tuple(map(len, ids))
    if end not in nodes[-1]:
        sizes = ", ".join(map(str, end))
        raise FormatError(
            f"the optimizer's state ({sizes} parameters in {len(ids)} groups) does not fit the model's "
            f"{len(candidates)} tensors by order and shape: is it of another model?"
        )
    ways = nodes[-1][end][1]
    result: dict[Any, str] = {}
    at = end
    for i in range(len(candidates), 0, -1):
        _, _, before, group = nodes[i][at]
        assert before is not None
        if group >= 0:
            result[ids[group][before[group]]] = candidates[i - 1]
        at = before
    if ways == 1:
        return result, None
    return result, (
        "the optimizer's state has numbers instead of names, and shapes and order allow more than one assignment: "
        "taken is the one with matrices in the groups with weight decay, norms and biases in those without"
    )


def _recorded(groups: Sequence[Mapping[str, Any]], model: Mapping[str, Shape]) -> dict[Any, str] | None:
    result: dict[Any, str] = {}
    for group in groups:
        names, ids = group.get("param_names"), group["params"]
        if not isinstance(names, list) or len(names) != len(ids):
            return None
        result.update(zip(ids, names, strict=True))
    return result if not model or all(name in model for name in result.values()) else None


def _step(
    name: str,
    shape: Shape,
    before: Mapping[tuple[int, ...], _Node],
    groups: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[Any]],
    shapes: Mapping[Any, Shape | Fits | None],
    needed: int,
) -> dict[tuple[int, ...], _Node]:
    """One more parameter: in one of the groups, or in none. ``needed``: how many must be placed by now at least."""
    after: dict[tuple[int, ...], _Node] = {}

    def reach(at: tuple[int, ...], score: int, ways: int, origin: tuple[int, ...], group: int) -> None:
        known = after.get(at)
        # Of two that go equally well the earlier is taken: a module's parameters come before its buffers.
        if known is None or score > known[0] or (score == known[0] and group < 0):
            after[at] = (score, min(2, ways + (known[1] if known else 0)), origin, group)
        else:
            after[at] = (known[0], min(2, known[1] + ways), known[2], known[3])

    for at, (score, ways, _, _) in before.items():
        if sum(at) >= needed:
            reach(at, score + _left_out(name), ways, at, -1)
        for g, members in enumerate(ids):
            if at[g] < len(members):
                fits = shapes.get(members[at[g]])
                if fits is None or (fits(shape) if callable(fits) else fits == shape):
                    gain = 2 if len(groups) == 1 or _fits(name, shape, groups[g]) else 0
                    reach((*at[:g], at[g] + 1, *at[g + 1 :]), score + gain, ways, at, g)
    return after


def _left_out(name: str) -> int:
    """How well it goes that no group has the tensor: well for buffers, and for tables that are often not trained."""
    if looks_like_buffer(name):
        return 1
    return -2 if looks_like_parameter(name) and "pos" not in name.lower() else -1


def _fits(name: str, shape: Shape, group: Mapping[str, Any]) -> bool:
    plain = len(shape) < 2 or name.endswith("bias") or "norm" in name.lower()
    return plain == (not group.get("weight_decay", 0.0))
