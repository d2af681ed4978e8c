"""Which nodes protect each other."""

from __future__ import annotations

import pytest

from snapshotd.coordinator.membership import parity_groups


def named(count: int) -> list[str]:
    return [f"n{index}" for index in range(count)]


def test_groups_are_balanced() -> None:
    groups, m, reason = parity_groups(named(10), {}, group_size=8, parity=2)
    assert [len(group) for group in groups] == [5, 5]
    assert (m, reason) == (2, "")


def test_nodes_of_one_failure_domain_are_dealt_to_different_groups() -> None:
    domains = {"n0": "rack1", "n1": "rack1", "n2": "rack2", "n3": "rack2"}
    groups, _, _ = parity_groups(named(4), domains, group_size=2, parity=1)
    assert all(len({domains[node] for node in group}) == 2 for group in groups)


def test_a_group_is_never_left_too_small_for_the_parity_asked_for() -> None:
    groups, m, _ = parity_groups(named(3), {}, group_size=2, parity=1)
    assert [len(group) for group in groups] == [3]
    assert m == 1


@pytest.mark.parametrize(("count", "parity", "m"), [(1, 1, 0), (2, 2, 1), (3, 2, 2), (2, 0, 0)])
def test_too_few_nodes_reduce_m_and_say_why(count: int, parity: int, m: int) -> None:
    _, effective, reason = parity_groups(named(count), {}, group_size=16, parity=parity)
    assert effective == m
    assert bool(reason) == (m < parity)
