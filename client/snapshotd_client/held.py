"""
Whether something is still what it was: the objects that a look found are held, and compared by identity.

Rule 1: objects are held as long as they are compared, so that an identity never stands for two of them.
Rule 2: no line of Python runs per object. That is what makes a look at 10,000 tensors in each step affordable.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

__all__ = ["Held", "is_same"]


class Held:
    """The keys and values of some dicts, as they are when this is made."""

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        known = list(dicts)
        self._empty = [entries for entries in known if not entries]
        self._filled = [entries for entries in known if entries]
        self._keys, self._values = _look(self._filled)

    def unchanged(self) -> bool:
        """Whether each of the dicts has the same keys and values, in the same order: the very objects."""
        if any(self._empty):
            return False
        keys, values = _look(self._filled)
        return is_same(keys, self._keys) and is_same(values, self._values)


def is_same(found: Sequence[object], held: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(found) == len(held) and all(map(operator.is_, found, held))


def _look(dicts: list[dict[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return list(chain.from_iterable(dicts)), list(chain.from_iterable(map(dict.values, dicts)))
