"""Batches: in order, none lost, none larger than it may be unless one item is."""

from __future__ import annotations

import random

from snapshotd.batches import batches


def sizes(made: list[list[memoryview]]) -> list[list[int]]:
    return [[item.nbytes for item in batch] for batch in made]


def items(*nbytes: int) -> list[memoryview]:
    return [memoryview(bytes(n)) for n in nbytes]


def test_as_many_together_as_fit() -> None:
    assert [[4, 6], [5], [30], [1, 0, 9]] == sizes(list(batches(items(4, 6, 5, 30, 1, 0, 9), 10)))
    assert [[1, 1], [1, 1], [1]] == sizes(list(batches(items(1, 1, 1, 1, 1), 10, 2)))
    assert [] == list(batches([], 10))


def test_nothing_is_lost_or_moved() -> None:
    dice = random.Random(1)
    for _ in range(100):
        given = items(*(dice.choice([0, 1, 7, 50, 300]) for _ in range(dice.randrange(40))))
        made = list(batches(given, 100, 5))
        assert given == [item for batch in made for item in batch]
        assert all(len(batch) == 1 or (len(batch) <= 5 and sum(map(len, batch)) <= 100) for batch in made)
