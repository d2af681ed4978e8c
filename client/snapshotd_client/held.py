"""
Whether something is still what it was: the objects that a look found are held, and compared by identity.

Rule 1: objects are held as long as they are compared, so that an identity never stands for two of them.
Rule 2: no line of Python runs per object. That is what makes a look at 10,000 tensors in each step affordable.
Rule 3: dicts that a second look has found unchanged are not opened any more: it is read in memory, for all of them at
once, that their tables are the ones that they were and have the same keys and values in the same places (see
docs/adr/0015). Where that says anything else, or is not to be had, they are looked into.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, Final

import numpy as np

from snapshotd_client.words import Trail, block, offset_of, peek

__all__ = ["Held", "is_same"]

_TRAILS: Final = 2
"""Where this many times dicts had the same entries, but not in the same places, it would be so each time."""

Dict = dict[Any, Any]


class Held:
    """The keys and values of some dicts, as they are when this is made."""

    def __init__(self, dicts: Iterable[Dict]) -> None:
        known = list(dicts)
        self._empty = [entries for entries in known if not entries]
        self._filled = [entries for entries in known if entries]
        self._keys, self._values = _look(self._filled)
        self._trail: Trail | None = None
        self._trails = _TRAILS

    def unchanged(self) -> bool:
        """Whether each of the dicts has the same keys and values, put in in the same order: the very objects."""
        if self._trail is not None and self._trail.holds():
            return True
        if any(self._empty):
            return False
        keys, values = _look(self._filled)
        if not (is_same(keys, self._keys) and is_same(values, self._values)):
            return False
        self._trail = None
        if self._trails:
            self._trails -= 1
            self._trail = _trail_of(self._empty, self._filled)
        return True


def is_same(found: Sequence[object], held: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(found) == len(held) and all(map(operator.is_, found, held))


def _look(dicts: list[Dict]) -> tuple[list[Any], list[Any]]:
    return list(chain.from_iterable(dicts)), list(chain.from_iterable(map(dict.values, dicts)))


def _trail_of(empty: list[Dict], filled: list[Dict]) -> Trail | None:
    """Return where in memory the entries of these dicts lie; None where that is not to be found out."""
    fields = _fields()
    # An OrderedDict has its order elsewhere.
    if fields is None or any(type(entries) not in (dict, defaultdict) for entries in filled):
        return None
    used, table = fields
    trail = Trail()
    begins = np.array([*map(id, filled), *map(id, empty)], np.int64)
    try:
        found = trail.follow(np.concatenate((begins + used, begins[: len(filled)] + table)))
        tables = found[len(begins) :]
        trail.follow(tables + 8)  # how large it is: its entries are nowhere else then
        trail.follow([place for pair in zip(filled, tables.tolist(), strict=True) for place in _places(*pair)])
    except (KeyError, ValueError):
        return None
    return trail


def _places(entries: Dict, table: int) -> Iterator[int]:
    """Where a dict's keys and values lie in its table. KeyError where they do not."""
    words = block(table, dict.__sizeof__(entries) - type(entries).__basicsize__)
    places = {pair: table + 8 * number for number, pair in enumerate(pairwise(words))}
    for key, value in entries.items():
        place = places[id(key), id(value)]
        yield place
        yield place + 8


@functools.cache
def _fields() -> tuple[int, int] | None:
    """How many bytes from its beginning a dict has the number of its entries, and where its table lies; or None."""
    dicts: list[Dict] = [{str(number): [number] for number in range(size)} for size in (3, 17, 200)]
    try:
        used = offset_of(*((id(some), len(some)) for some in dicts), within=dict.__basicsize__)
        tables = [_tables_of(some) for some in dicts]
        [table] = set.intersection(*tables)
    except (ValueError, OSError):
        return None
    return used, table


def _tables_of(some: Dict) -> set[int]:
    """The words of a dict that are addresses of what has its entries, each of them once, in their order."""
    items = [(id(key), id(value)) for key, value in some.items()]
    nbytes = dict.__sizeof__(some) - dict.__basicsize__
    found = set()
    for number, word in enumerate(peek(id(some), dict.__basicsize__)):
        try:
            words = peek(word, nbytes)
        except (OSError, OverflowError):
            continue
        if [pair for pair in pairwise(words) if pair in set(items)] == items:
            found.add(8 * number)
    return found
