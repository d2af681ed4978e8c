"""
Whether something is still what it was: the objects that a look found are held, and compared by identity.

Rule 1: objects are held as long as they are compared, so that an identity never stands for two of them.
Rule 2: no line of Python runs per object. That is what makes a look at 10,000 tensors in each step affordable.
Rule 3: where the interpreter gives each state of each dict a version of its own (PEP 509, up to Python 3.11), a dict
whose version is the one before is not opened: that spares most of the look. Another version only says: look.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch._C._dynamo import guards

from snapshotd_client.words import Words, offset_of

__all__ = ["Held", "is_same"]


class Held:
    """The keys and values of some dicts, as they are when this is made."""

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        known = list(dicts)
        self._empty = [entries for entries in known if not entries]
        self._filled = [entries for entries in known if entries]
        place = _place_of_version()
        self._words = None if place is None else Words(id(entries) + place for entries in known)
        self._versions = None if self._words is None else self._words.read()
        self._keys, self._values = _look(self._filled)

    def unchanged(self) -> bool:
        """Whether each of the dicts has the same keys and values, put in in the same order: the very objects."""
        versions = None if self._words is None else self._words.read()
        if versions is not None and versions == self._versions:
            return True
        if any(self._empty):
            return False
        keys, values = _look(self._filled)
        if not (is_same(keys, self._keys) and is_same(values, self._values)):
            return False
        self._versions = versions
        return True


def is_same(found: Sequence[object], held: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(found) == len(held) and all(map(operator.is_, found, held))


def _look(dicts: list[dict[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return list(chain.from_iterable(dicts)), list(chain.from_iterable(map(dict.values, dicts)))


@functools.cache
def _place_of_version() -> int | None:
    """How many bytes from its beginning a dict has its version; None where there is none, or nobody says where."""
    version_of = getattr(guards, "dict_version", None)
    if sys.version_info >= (3, 12) or version_of is None:  # later ones count nothing, and torch would watch each dict
        return None
    dicts: list[dict[Any, Any]] = [{number: number} for number in range(3)]
    try:
        return offset_of(*((id(some), version_of(some)) for some in dicts), within=dict.__basicsize__)
    except (ValueError, OSError):
        return None
