"""
Names for the numbers of ``optimizer.state_dict()``: ids count over the groups in order, then inside each group.

The file has no names (since torch 2.6 it has ``param_names``, if the optimizer was made from named parameters). What is
known: a group lists its parameters in the model's order, each parameter is in one group at most, and the state of an id
has its parameter's shape. The assignments that fit are searched; where several fit, the one is taken that trainers
commonly make (matrices in the group with weight decay, norms and biases in the one without), with a warning.

The search goes from parameter to parameter. Two ways to the same place (as many of each group have a name) are one, the
better; of more than ``_MAX_PLACES`` places, which frozen parts of models with many like layers have, those are followed
that promise most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers.conventions import looks_like_buffer, looks_like_parameter

__all__ = ["Fits", "names_of_ids"]

_MAX_PLACES: Final = 400
"""Enough for a frozen part of any length; the search takes about a millisecond for each parameter then."""

_FEW_GROUPS: Final = 4
"""Up to so many groups all ways are searched, also where taking one group behind the other fits."""

_PLACED: Final = 4
"""How well it goes that a parameter is in a group that is its own."""

_FROZEN: Final = -4
"""How badly it goes that a parameter is in no group."""

_TURN: Final = -1
"""How badly it goes that a parameter is trained and its neighbour is not."""

Shape = tuple[int, ...]
Fits = Callable[[Shape], bool]
"""Whether a parameter of some shape can have the state that is there."""

_At = tuple[tuple[int, ...], bool | None]
"""How many of each group have a name, and whether the last parameter was left out (None: there was none yet)."""

_Node = tuple[int, int, _At | None, int]
"""(score, number of ways, place before, group taken or -1)"""


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
    candidates = {name: shape for name, shape in model.items() if name not in never}
    # Groups that are not split by decay are split by depth: a backbone and its head, or a learning rate for each layer.
    by_depth = len(ids) > 1 and len({not group.get("weight_decay", 0.0) for group in groups}) == 1
    behind = _search(candidates, [{}], [[item for members in ids for item in members]], shapes) if by_depth else None
    sizes = ", ".join(str(len(members)) for members in ids)
    reason = (
        f"the optimizer's state ({sizes} parameters in {len(ids)} groups) does not fit the model's "
        f"{len(candidates)} tensors by order and shape: is it of another model?"
    )
    found = None
    if behind is None or len(ids) <= _FEW_GROUPS:
        try:
            found = _search(candidates, groups, ids, shapes)
        except _TooMany as error:
            reason = str(error)
    if found is not None and found[1] == 1:
        return found[0], None
    found = behind or found
    if found is None:
        raise FormatError(reason)
    return found[0], (
        "the optimizer's state has numbers instead of names, and shapes and order allow more than one assignment: "
        "taken is the one with matrices in the groups with weight decay, norms and biases in those without, and "
        "frozen parameters side by side"
    )


class _TooMany(FormatError):
    """There are more ways than can be searched."""


def _search(
    model: Mapping[str, Shape],
    groups: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[Any]],
    shapes: Mapping[Any, Shape | Fits | None],
) -> tuple[dict[Any, str], int] | None:
    """Return the best assignment and whether there are others (the number of ways, 2 at most); None: none was found."""
    return _Search(model, groups, ids, shapes).best()


def _recorded(groups: Sequence[Mapping[str, Any]], model: Mapping[str, Shape]) -> dict[Any, str] | None:
    result: dict[Any, str] = {}
    for group in groups:
        names, ids = group.get("param_names"), group["params"]
        if not isinstance(names, list) or len(names) != len(ids):
            return None
        result.update(zip(ids, names, strict=True))
    return result if not model or all(name in model for name in result.values()) else None


class _Search:
    """One call of _search."""

    def __init__(
        self,
        model: Mapping[str, Shape],
        groups: Sequence[Mapping[str, Any]],
        ids: Sequence[Sequence[Any]],
        shapes: Mapping[Any, Shape | Fits | None],
    ) -> None:
        self.model, self.groups, self.ids, self.shapes = model, groups, ids, shapes
        self.names = list(model)
        self.total = sum(map(len, ids))
        self.fitting: dict[tuple[int, Shape], list[bool]] = {}
        lows = [self._lows(g) for g in range(len(ids))]
        self.lows = [tuple(low[i] for low in lows) for i in range(len(self.names) + 1)]
        # How many of the parameters from each on can be left out without a turn.
        self.free = [0]
        for name in reversed(self.names):
            self.free.append(self.free[-1] + (not looks_like_parameter(name)))
        self.free.reverse()

    def best(self) -> tuple[dict[Any, str], int] | None:
        if any(self.lows[0]):
            return None
        nodes: list[dict[_At, _Node]] = [{((0,) * len(self.ids), None): (0, 1, None, -1)}]
        cut = False
        for i in range(len(self.names)):
            after = self._step(i, nodes[-1])
            if len(after) > _MAX_PLACES:
                cut = True
                kept = set(nlargest(_MAX_PLACES, after, key=lambda at: self._promise(i + 1, at, after[at][0])))
                after = {at: node for at, node in after.items() if at in kept}
            nodes.append(after)
        end = tuple(map(len, self.ids))
        ends = [at for at in nodes[-1] if at[0] == end]
        if not ends:
            if cut:
                raise _TooMany("too many ways to give the optimizer's numbers to the model's parameters")
            return None
        at = max(ends, key=lambda one: nodes[-1][one][0])
        ways = sum(nodes[-1][one][1] for one in ends)
        result: dict[Any, str] = {}
        for i in range(len(self.names), 0, -1):
            _, _, before, group = nodes[i][at]
            assert before is not None
            if group >= 0:
                result[self.ids[group][before[0][group]]] = self.names[i - 1]
            at = before
        return result, 2 if cut else min(2, ways)

    def _step(self, i: int, before: Mapping[_At, _Node]) -> dict[_At, _Node]:
        """One more parameter: in one of the groups, or in none."""
        name = self.names[i]
        shape = self.model[name]
        after: dict[_At, _Node] = {}
        sure = looks_like_parameter(name)
        left_out = _left_out(name)
        needed = self.total - (len(self.names) - i - 1)
        low = self.lows[i + 1]
        rising = [g for g, count in enumerate(low) if count > self.lows[i][g]]
        fitting = [self._fitting(g, shape) for g in range(len(self.ids))]
        gains = [_PLACED if len(self.groups) == 1 or _fits(name, shape, group) else 0 for group in self.groups]

        def reach(at: _At, score: int, ways: int, origin: _At, group: int) -> None:
            known = after.get(at)
            # Of two that go equally well the first is taken where it may be a buffer, which comes behind the parameters
            # of its module, and the last where both are parameters: what is frozen is rather at the model's beginning.
            if known is None or score > known[0] or (score == known[0] and (group >= 0) == sure):
                after[at] = (score, min(2, ways + (known[1] if known else 0)), origin, group)
            else:
                after[at] = (known[0], min(2, known[1] + ways), known[2], known[3])

        for at, (score, ways, _, _) in before.items():
            placed, out = at
            behind = [g for g in rising if placed[g] < low[g]]
            if not behind and sum(placed) >= needed:
                turn = _TURN if sure and out is False else 0
                reach((placed, True if sure else out), score + left_out + turn, ways, at, -1)
            for g in behind if behind else range(len(placed)):
                count = placed[g]
                if len(behind) < 2 and count < len(fitting[g]) and fitting[g][count]:
                    turn = _TURN if out else 0
                    reach(((*placed[:g], count + 1, *placed[g + 1 :]), False), score + gains[g] + turn, ways, at, g)
        return after

    def _fitting(self, g: int, shape: Shape) -> list[bool]:
        """Return which members of a group can be a parameter of ``shape``."""
        found = self.fitting.get((g, shape))
        if found is None:
            known = [self.shapes.get(member) for member in self.ids[g]]
            found = [fits is None or (fits(shape) if callable(fits) else fits == shape) for fits in known]
            self.fitting[g, shape] = found
        return found

    def _lows(self, g: int) -> list[int]:
        """Return how many members of a group must have a name at least before each parameter, and at the end."""
        low = len(self.ids[g])
        found = [low]
        for name in reversed(self.names):
            if low and self._fitting(g, self.model[name])[low - 1]:
                low -= 1
            found.append(low)
        return found[::-1]

    def _promise(self, i: int, at: _At, score: int) -> int:
        """How well it can go in the end for a place before parameter ``i``, against others there."""
        placed, out = at
        count = sum(placed)
        left = len(self.names) - i - (self.total - count)
        turn = _TURN if (out and count < self.total) or (out is False and left > self.free[i]) else 0
        return score - (_PLACED - _FROZEN) * count + turn


def _left_out(name: str) -> int:
    """How well it goes that no group has the tensor: well for buffers, and for tables that are often not trained."""
    if looks_like_buffer(name):
        return 2
    return _FROZEN if looks_like_parameter(name) and "pos" not in name.lower() else -2


def _fits(name: str, shape: Shape, group: Mapping[str, Any]) -> bool:
    plain = len(shape) < 2 or name.endswith("bias") or "norm" in name.lower()
    return plain == (not group.get("weight_decay", 0.0))
